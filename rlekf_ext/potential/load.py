"""From files to systems: DeePMD-kit's folders, and whatever dpdata reads."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlekf_ext.errors import DataError
from rlekf_ext.potential.data import System


def load_systems(
    paths: str | Path | Iterable[str | Path], type_map: Sequence[str], patterns: Sequence[str] = ()
) -> list[System]:
    """Read every system at the paths; elements are numbered as in `type_map`.

    A path is a folder with deepmd/npy or deepmd/raw systems in it, at any depth, or a file that dpdata reads. dpdata
    goes by the file's name (OUTCAR, MOVEMENT, *.extxyz); "cp2k/output:run.log" names the format. Raises DataError.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    systems = [system for path in paths for system in _load(str(path), list(type_map))]
    if not systems:
        raise DataError("No data: the list of paths is empty.")
    return systems


def split_format(text: str) -> tuple[str | None, str]:
    """The format, if there is one, and the path of "path" or "format:path"."""
    match = re.fullmatch(r"([a-z0-9_]{2,}(?:/[a-z0-9_]+)*):(.+)", text)  # two letters at least: C: is a drive
    return (match[1], match[2]) if match and not os.path.exists(text) else (None, text)


def _load(text: str, type_map: list[str]) -> list[System]:
    form, name = split_format(text)
    path = Path(name)
    if not os.path.exists(path):  # Path.exists raises for a name that is too long
        raise DataError(f"{path} does not exist (current directory: {Path.cwd()}).")
    try:
        if form in ("deepmd/npy", "deepmd/raw", "deepmd", "deepmd/comp") or (form is None and path.is_dir()):
            return _load_folders(path, form, type_map)
        return _load_dpdata(path, form or path.name.split(".")[-1].lower(), type_map)
    except OSError as error:
        raise DataError(f"{error.filename or path} cannot be read: {error.strerror or error}.") from error


# DeePMD-kit's own folders


def _load_folders(root: Path, form: str | None, type_map: list[str]) -> list[System]:
    folders = sorted(file.parent for file in root.rglob("type.raw"))
    if not folders:
        raise DataError(
            f'{root} holds no system: neither it nor a folder in it has a type.raw; for other files give "format:path".'
        )
    return [_load_folder(folder, form, type_map) for folder in folders]


def _load_folder(folder: Path, form: str | None, type_map: list[str]) -> System:
    types = _folder_types(folder, type_map)
    sets = sorted(folder.glob("set.*"))
    if not sets and not (folder / "coord.raw").exists():
        raise DataError(f"{folder} has a type.raw but no frames: neither folders set.* nor a coord.raw.")
    if form == "deepmd/raw" or not sets:
        parts = [_read_part(folder, ".raw", len(types), folder)]
    else:
        parts = [_read_part(part, ".npy", len(types), folder) for part in sets]
    if any("virial" in part for part in parts) and not all("virial" in part for part in parts):
        raise DataError(f"{folder} has a virial file in some of its sets but not in all.")
    arrays = {label: np.concatenate([part[label] for part in parts]) for label in parts[0]}
    return _system(str(folder), types, arrays)


def _folder_types(folder: Path, type_map: list[str]) -> np.ndarray:
    file = folder / "type.raw"
    types = _read_array(file).reshape(-1)
    names_file = folder / "type_map.raw"
    names = _read_words(names_file) if names_file.exists() else type_map
    whole = (types >= 0) & (types < len(names)) & (types == np.round(types))
    if not whole.all() or not len(types):
        got = f"atom {np.argmin(whole)} has {types[np.argmin(whole)]:g}" if len(types) else "it has no atom"
        raise DataError(f"{file} must number the {len(names)} elements {names} from 0 to {len(names) - 1}, but {got}.")
    return _types([names[int(t)] for t in types], type_map, str(folder))


def _read_part(part: Path, suffix: str, num_atoms: int, folder: Path) -> dict[str, np.ndarray]:
    """The arrays of a set (or of a deepmd/raw folder), checked while the name of the file is known."""
    if (part / "real_atom_types.npy").exists():
        raise DataError(
            f'{part} is a mixed-type set (real_atom_types.npy); give the path as "deepmd/npy/mixed:{folder}".'
        )
    file = part / f"coord{suffix}"
    _require(file)
    coordinates = _read_array(file)
    num_frames = len(coordinates) if coordinates.ndim > 1 else 1  # DeePMD-kit: a flat coord.npy is a single frame
    if not coordinates.size:
        raise DataError(f"{file} holds no frames.")
    arrays = {"coord": _checked(coordinates, str(file), num_frames, num_atoms, "coord")}
    for label in ("energy", "force", "box", "virial"):
        file = part / f"{label}{suffix}"
        if label == "box" and (folder / "nopbc").exists():
            continue
        if label != "virial":
            _require(file)
        if file.exists():
            arrays[label] = _checked(_read_array(file), str(file), num_frames, num_atoms, label)
    return arrays


def _require(file: Path) -> None:
    if not file.exists():
        hint = "; a system without periodic boundaries has an empty file nopbc next to type.raw"
        raise DataError(f"{file} is missing{hint if file.stem == 'box' else ''}.")


def _read_words(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is not readable text: {error}.") from error


def _read_array(file: Path) -> np.ndarray:
    try:
        if file.suffix != ".npy":
            return np.loadtxt(file, ndmin=1 if file.stem == "type" else 2)
        # Mapped, so that a shape larger than the file is an error before memory is asked for; never unpickled.
        array = np.lib.format.open_memmap(file, mode="r")
        if array.dtype.kind in "cmMV":
            raise ValueError(f"its numbers are {array.dtype}")
        return array.astype(np.float64)
    except Exception as error:  # numpy's reader of headers raises whatever it stumbles over
        raise DataError(f"{file} is not a readable array: {error}.") from error


# Everything else: dpdata, https://docs.deepmodeling.com/projects/dpdata

# its formats that hold several formulas in one file or folder
XYZ = ("extxyz", "quip/gap/xyz", "quip/gap/xyz_file", "mace/xyz", "nequip/xyz", "gpumd/xyz")
SEVERAL = (*XYZ, "deepmd/npy/mixed")


def _load_dpdata(path: Path, form: str, type_map: list[str]) -> list[System]:
    try:
        import dpdata
        from dpdata.format import Format
    except ImportError as error:
        raise DataError(f"{path} is read by dpdata, which is not installed: pip install dpdata.") from error
    form = "extxyz" if form == "xyz" else form  # a plain xyz has no labels
    if form not in Format.get_formats():
        raise DataError(f'{path}: dpdata has no format "{form}"; give the path as "format:{path}".')
    if form in XYZ:
        _check_counts(path)
    try:
        if form in SEVERAL:
            found = list(dpdata.MultiSystems.from_file(str(path), form).systems.values())
        else:
            found = [dpdata.LabeledSystem(str(path), fmt=form)]
    except Exception as error:  # its parsers raise whatever they stumble over
        raise DataError(
            f"{path} cannot be read by dpdata as {form} with energies and forces: {type(error).__name__}: {error}."
        ) from error
    if not sum(len(one) for one in found):
        raise DataError(f"{path} holds no frames (dpdata, {form}; unconverged frames are left out).")
    names = [str(path)] if len(found) == 1 else [f"{path} ({one.formula})" for one in found]
    return [_from_dpdata(one.data, name, type_map) for one, name in zip(found, names, strict=True)]


def _check_counts(path: Path) -> None:
    """dpdata takes as many lines as an xyz file announces, also past its end: memory without bound."""
    with open(path, errors="replace") as file:
        lines = file.readlines()
    at = 0
    while at < len(lines):
        count = re.match(r"\s*(\d+)", lines[at])
        if count and int(count[1]) > len(lines) - at - 2:
            raise DataError(
                f"{path}: line {at + 1} announces {count[1]} atoms but the file ends after {len(lines)} lines."
            )
        at += int(count[1]) + 2 if count else 1


def _from_dpdata(data: dict[str, Any], name: str, type_map: list[str]) -> System:
    types = _types([data["atom_names"][t] for t in data["atom_types"]], type_map, name)
    theirs = {"coord": "coords", "energy": "energies", "force": "forces", "box": "cells", "virial": "virials"}
    if data.get("nopbc", False):
        del theirs["box"]
    arrays = {}
    for label, key in theirs.items():
        if key in data:
            arrays[label] = _checked(data[key], f"{name}, {key}", len(data["coords"]), len(types), label)
        elif label != "virial":
            raise DataError(f"{name} has no {key}; training needs energies and forces.")
    return _system(name, types, arrays)


# Checks


def _types(elements: list[str], type_map: list[str], name: str) -> np.ndarray:
    number = {element: i for i, element in enumerate(type_map)}
    for element in elements:
        if element not in number:
            raise DataError(f"{name} has the element {element}, which is not in type_map {type_map}; add it there.")
    return np.array([number[element] for element in elements], dtype=np.int64)


def _checked(array: Any, where: str, num_frames: int, num_atoms: int, label: str) -> np.ndarray:
    """The array as (num_frames, ...) float64, or a DataError that begins with `where`."""
    per_frame = {"coord": (num_atoms, 3), "force": (num_atoms, 3), "energy": (), "box": (3, 3), "virial": (3, 3)}[label]
    array = np.asarray(array, dtype=np.float64)
    wanted = (num_frames, *per_frame)
    if array.size != np.prod(wanted) or (array.ndim > 1 and len(array) != num_frames):
        flat = (num_frames, int(np.prod(per_frame)))
        raise DataError(
            f"{where} has shape {array.shape}, but {num_frames} frames of {num_atoms} atoms want {flat} or {wanted}."
        )
    array = array.reshape(wanted)
    if not np.isfinite(array).all():
        first = tuple(np.argwhere(~np.isfinite(array))[0])
        atom = f", atom {first[1]}" if label in ("coord", "force") else ""
        raise DataError(f"{where}: frame {first[0]}{atom} has the value {array[first]}; all values must be finite.")
    if label == "box":
        with np.errstate(over="ignore", invalid="ignore"):
            volumes = np.abs(np.linalg.det(array))
        if not volumes.min() >= 1e-6:
            raise DataError(
                f"{where}: the box of frame {volumes.argmin()} has volume {volumes.min():g} Å^3; it must be > 0."
            )
    return array


def _system(name: str, types: np.ndarray, arrays: dict[str, np.ndarray]) -> System:
    return System(
        name, types, arrays["coord"], arrays.get("box"), arrays["energy"], arrays["force"], arrays.get("virial")
    )
