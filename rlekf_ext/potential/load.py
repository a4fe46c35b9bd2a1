"""From files to systems: DeePMD-kit's folders, HDF5 files and LMDB stores, and whatever dpdata reads.

Readers give blocks of frames, {"coord": array, "energy": array, ...} with the names of DeePMD-kit's files. A block is
checked, cut into parts of the same atoms, and parts that also have the same labels become a System.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from rlekf_ext.errors import DataError
from rlekf_ext.options import KINDS
from rlekf_ext.potential.data import System
from rlekf_ext.potential.files import is_hdf5
from rlekf_ext.potential.load_dpdata import read_dpdata
from rlekf_ext.potential.load_lmdb import read_lmdb
from rlekf_ext.potential.stored import OF_ATOMS, Rows, pieces
from rlekf_ext.potential.stores import Folder, Store, find_systems, open_hdf5
from rlekf_ext.schema import counted

LAYOUT = ("deepmd/npy", "deepmd/raw", "deepmd", "deepmd/comp", "deepmd/npy/mixed", "deepmd/hdf5", "deepmd/hdf5/mixed")
LMDB = ("deepmd/lmdb", "lmdb")
KNOWN = ("OUTCAR", "vasprun.xml", "MOVEMENT", "*.extxyz", "*.hdf5", "*.h5", "*.lmdb")
FRAMES_AT_ONCE = 4096
Part: TypeAlias = tuple[np.ndarray, dict[str, Any]]  # elements of its atoms; arrays, or Rows, by label


def load_systems(
    paths: str | Path | Iterable[str | Path],
    type_map: Sequence[str],
    patterns: Sequence[str] = (),
    *,
    labelled: bool = True,
) -> list[System]:
    """Read every system at the paths; elements are numbered as in `type_map`.

    A path is one of

    - a folder with systems of DeePMD-kit in it, at any depth: deepmd/npy, deepmd/raw, also with mixed types
    - an HDF5 file with the same inside, "water.hdf5", or a group of it, "water.hdf5#/O64H128"
    - an LMDB store, "water.lmdb"
    - a file that dpdata reads, by its name (OUTCAR, MOVEMENT, *.extxyz) or with the format before it,
      "cp2k/output:run.log"

    Wildcards are expanded: "run*/OUTCAR". Of folders and HDF5 files, `patterns` takes only the systems whose path from
    there one of the patterns matches, as in `Path.rglob`. Frames with other elements or other labels are systems of
    their own. Frames must have a label unless `labelled` is false. Raises DataError.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    if "" in paths:
        raise DataError("The path of a system must not be empty.")
    systems: list[System] = []
    number = 0
    every = [(entry, path) for entry, given in enumerate(paths) for path in _expanded(str(given))]
    for entry, path in every:
        for found in _load(path, list(type_map), patterns, labelled):
            systems += [replace(system, entry=entry, number=number) for system in found]
            number += 1
    if not systems:
        raise DataError("No data: the list of paths is empty.")
    if labelled and (without := next((system for system in systems if not system.labels), None)):
        raise DataError(f"{without.frame_name(0)} has no label: neither an energy nor forces nor a virial.")
    return systems


def split_format(text: str) -> tuple[str | None, str]:
    """The format, if there is one, and the path of "path" or "format:path"."""
    match = re.fullmatch(r"([a-z0-9_]{2,}(?:/[a-z0-9_]+)*):(.+)", text)  # two letters at least: C: is a drive
    return (match[1], match[2]) if match and not os.path.exists(text) else (None, text)


def _expanded(text: str) -> list[str]:
    """The paths that a path with wildcards stands for, sorted; any other path as it is."""
    form, name = split_format(text)
    found = sorted(glob.glob(name)) if glob.has_magic(name) and not os.path.exists(name) else []
    return [f"{form}:{path}" if form else path for path in found] or [text]


def _load(text: str, type_map: list[str], patterns: Sequence[str], labelled: bool) -> Iterator[list[System]]:
    """One list for each folder, group or file."""
    form, name = split_format(text)
    front, _, inside = name.partition("#")
    if os.path.exists(name) or not os.path.isfile(front):
        front, inside = name, ""
    path = Path(front)
    try:
        os.stat(path)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist (current directory: {Path.cwd()}).") from error
    except (OSError, ValueError) as error:  # permissions; a name that is too long or has a NUL
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', error)}.") from error
    try:
        if form in LMDB or (form is None and (path.suffix == ".lmdb" or (path / "data.mdb").exists())):
            yield _load_blocks(path, read_lmdb(path), type_map)
        elif path.is_dir() and form in (None, *LAYOUT):
            yield from _load_stores(Folder(path), form, type_map, patterns)
        elif form in LAYOUT or inside or (form is None and (path.suffix in (".hdf5", ".h5") or is_hdf5(path))):
            with open_hdf5(path, inside) as group:
                yield from _load_stores(group, form, type_map, patterns)
        else:
            yield _load_blocks(path, read_dpdata(path, form, None if labelled else type_map), type_map)
    except OSError as error:
        raise DataError(f"{error.filename or path} cannot be read: {error.strerror or error}.") from error


def _load_blocks(path: Path, blocks: list[dict[str, Any]], type_map: list[str]) -> list[System]:
    """The systems of a file, from all its blocks."""
    parts: list[Part] = []
    start = 0
    for block in blocks:
        if count := block["coord"].shape[0]:
            numbers = block.get("numbers", np.arange(start, start + count))
            types = _types(block["types"], block["names"] or type_map, type_map, str(path), str(path), numbers)
            parts += _parts(block | {"types": types}, lambda label: f"{label} in {path}", numbers)
            start += count
    if not parts:
        raise DataError(f"{path} holds no frames (frames that did not converge are left out).")
    return _systems(str(path), parts, type_map)


# DeePMD-kit's own layout


def _load_stores(root: Store, form: str | None, type_map: list[str], patterns: Sequence[str]) -> Iterator[list[System]]:
    none = True
    for store in find_systems(root, patterns):
        none = False
        yield _load_store(store, form, type_map)
    if none and patterns:
        raise DataError(f"{root} holds no system, a {root.kind} with a type.raw, that one of {list(patterns)} matches.")
    if none:
        advice = 'for other files give "format:path", as in "vasp/outcar:run1/out"'
        if others := _files_of_data(root):
            advice = f"give the files in it one by one, such as {', '.join(others)}"
        raise DataError(f"{root} holds no system: neither it nor a {root.kind} in it has a type.raw; {advice}.")


def _files_of_data(root: Store) -> list[str]:
    """Some files below a folder that would be read if they were given by themselves."""
    if not isinstance(root, Folder):
        return []
    files = (file for pattern in KNOWN for file in sorted(root.path.rglob(pattern)))
    return [str(file) for file in islice(files, 3)]


def _load_store(store: Store, form: str | None, type_map: list[str]) -> list[System]:
    names = store.words("type_map.raw") if "type_map.raw" in store else type_map
    types = _types(store.array("type.raw").reshape(-1), names, type_map, str(store), store.file("type.raw"))
    sets = [child for name, child in store.folders().items() if name.startswith("set.")]
    if not sets and "coord.raw" not in store:
        raise DataError(f"{store} has a type.raw but no frames: neither {store.kind}s set.* nor a coord.raw.")
    suffix = ".npy"
    if form == "deepmd/raw" or not sets:
        sets, suffix = [store], ".raw"
    mixed = ["real_atom_types.npy" in part for part in sets]
    if any(mixed) and not all(mixed):
        raise DataError(f"{sets[mixed.index(False)].file('real_atom_types.npy')} is missing; other sets have one.")
    parts: list[Part] = []
    before = 0  # frames in the sets before
    for part in sets:
        block = _read_set(part, suffix, "nopbc" not in store)
        if 0 in block["coord"].shape[:1]:
            continue  # an empty set counts for nothing, as in DeePMD-kit
        block["types"] = types
        if any(mixed):
            block["types"] = _real_types(part, len(types), names, type_map)
        new = _parts(block, lambda label, part=part: part.file(f"{label}{suffix}"))  # type: ignore[misc]
        for _, arrays in new:
            arrays["places"] += before
        before += sum(len(arrays["places"]) for _, arrays in new)
        parts += new
    if not parts:
        raise DataError(f"{sets[0].file(f'coord{suffix}')} holds no frames{' nor do its like' * (len(sets) > 1)}.")
    return _systems(str(store), parts, type_map)


def _read_set(part: Store, suffix: str, periodic: bool) -> dict[str, Any]:
    required = ("coord", "box") if periodic else ("coord",)
    for label in required:
        if f"{label}{suffix}" not in part:
            hint = "; a system without periodic boundaries has an empty file nopbc next to type.raw"
            raise DataError(f"{part.file(f'{label}{suffix}')} is missing{hint if label == 'box' else ''}.")
    here = [label for label in (*required, *KINDS) if f"{label}{suffix}" in part]
    return {label: (part.stored if label in OF_ATOMS else part.array)(f"{label}{suffix}") for label in here}


def _real_types(part: Store, num_atoms: int, names: list[str], type_map: list[str]) -> np.ndarray:
    """The elements of each frame of a mixed-type set, (F, n); -1 is no atom."""
    file = part.file("real_atom_types.npy")
    array = part.stored("real_atom_types.npy")
    size = int(np.prod(array.shape))
    if size % num_atoms:
        raise DataError(f"{file} has shape {array.shape}, but type.raw has {num_atoms} atoms.")
    if not size:
        raise DataError(f"{file} has no frame, but there is one in {part.file('coord.npy')}.")
    count = size // num_atoms
    every = pieces(array.reshape((count, num_atoms)))
    frames = np.arange(count)
    return np.concatenate([_types(some, names, type_map, str(part), file, frames[first:]) for first, some in every])


# Checks


def _types(
    numbers: np.ndarray,
    names: Sequence[str],
    type_map: list[str],
    name: str,
    file: str,
    frames: np.ndarray | None = None,
) -> np.ndarray:
    """Indices into `names` as indices into `type_map`: of the atoms, (n,), or of each frame's, (F, n), where -1 stays.

    `frames` are the numbers of the frames in messages.
    """
    padded = numbers.ndim > 1
    whole = (numbers >= -int(padded)) & (numbers < len(names)) & (numbers == np.round(numbers))
    if not whole.all() or not numbers.size:
        got = "it has no atom"
        if numbers.size:
            *frame, atom = first = tuple(np.argwhere(~whole)[0])
            where = f"frame {frame[0] if frames is None else frames[frame[0]]}, " if frame else ""
            got = f"{where}atom {atom} has {numbers[first]:g}"
        raise DataError(
            f"{file} must number the {counted(len(names), 'element')} {list(names)} from 0 to {len(names) - 1}"
            f"{', or -1 for no atom' * padded}, but {got}."
        )
    numbers = numbers.astype(np.int16 if padded else np.int64)
    for i, element in enumerate(names):
        if element not in type_map and (numbers == i).any():
            raise DataError(
                f"{name} has the element {element}, which is not in type_map {type_map}; add it there, or in training."
            )
    table = [type_map.index(element) if element in type_map else -1 for element in names]
    return np.array([*table, -1], dtype=numbers.dtype)[numbers]


def _parts(block: dict[str, Any], place: Callable[[str], str], numbers: np.ndarray | None = None) -> list[Part]:
    """The frames of a block, checked, in one part for each list of elements.

    "types" is (n,), or (F, n) with -1 where there is no atom; then the atoms of a part are sorted by element. `place`
    names an array in messages, and `numbers` are those of the frames, 0, 1, ... if not given.
    """
    types = block["types"]
    num_atoms = types.shape[-1]
    shape = block["coord"].shape
    num_frames = shape[0] if len(shape) > 1 else 1  # DeePMD-kit: a flat coord.npy is one frame
    numbers = np.arange(num_frames) if numbers is None else numbers
    arrays = {
        label: _checked(block[label], place(label), numbers, num_atoms, label)
        for label in ("coord", "box", *KINDS)
        if label in block
    }
    arrays["places"] = numbers
    if types.ndim == 1:
        return [(types, arrays)]
    if len(types) != num_frames:
        raise DataError(f"{place('coord')} has {num_frames} frames, but there are elements for {len(types)}.")
    rows: dict[bytes, tuple[list[int], list[np.ndarray]]] = {}  # frames, and the order of their atoms
    for first in range(0, num_frames, FRAMES_AT_ONCE):
        some = types[first : first + FRAMES_AT_ONCE]
        order = np.argsort(some, axis=1, kind="stable")
        for i, row in enumerate(np.take_along_axis(some, order, axis=1)):
            frames, orders = rows.setdefault(row.tobytes(), ([], []))
            frames.append(first + i)
            orders.append(order[i, row >= 0].astype(np.int32))
    parts = []
    for frames, orders in rows.values():
        if not len(orders[0]):
            raise DataError(f"{place('coord')}: frame {numbers[frames[0]]} has no atom.")
        part = {label: array[frames] for label, array in arrays.items() if label not in OF_ATOMS}
        order = np.stack(orders)
        for label in OF_ATOMS & arrays.keys():
            part[label] = _in_order(arrays[label], np.array(frames), order)
        parts.append((types[frames[0], orders[0]].astype(np.int64), part))
    return parts


def _in_order(array: np.ndarray | Rows, frames: np.ndarray, order: np.ndarray) -> np.ndarray | Rows:
    """Some frames, with their atoms in the order (F, n)."""
    if isinstance(array, Rows):
        return array.ordered(frames, order)
    return np.take_along_axis(array[frames], order[:, :, None].astype(np.int64), axis=1)


def _checked(array: Any, where: str, numbers: np.ndarray, num_atoms: int, label: str) -> np.ndarray | Rows:
    """The array as (F, ...) float64, or a DataError that begins with `where`, for frames of these numbers (F,)."""
    per_frame = {"coord": (num_atoms, 3), "force": (num_atoms, 3), "energy": (), "box": (3, 3), "virial": (3, 3)}[label]
    if isinstance(array, np.ndarray):
        array = array.astype(np.float64, copy=False)
    num_frames = len(numbers)
    wanted, shape = (num_frames, *per_frame), array.shape
    if np.prod(shape) != np.prod(wanted) or (len(shape) > 1 and shape[0] != num_frames):
        flat = (num_frames, int(np.prod(per_frame)))
        raise DataError(
            f"{where}{f', frame {numbers[0]},' * bool(numbers[0])} has shape {shape}, "
            f"but {num_frames} frames of {num_atoms} atoms want {flat} or {wanted}."
        )
    array = array.reshape(wanted)
    for before, some in pieces(array):
        if not np.isfinite(some).all():
            first = tuple(np.argwhere(~np.isfinite(some))[0])
            atom = f", atom {first[1]}" if label in OF_ATOMS else ""
            raise DataError(
                f"{where}: frame {numbers[before + first[0]]}{atom} has the value {some[first]}; all values must be "
                "finite."
            )
    if not isinstance(array, np.ndarray):
        return Rows.of(array)
    if label == "box":
        with np.errstate(over="ignore", invalid="ignore"):
            volumes = np.abs(np.linalg.det(array))
        worst = volumes.argmin()
        if not volumes[worst] >= 1e-6:
            raise DataError(
                f"{where}: the box of frame {numbers[worst]} has volume {volumes[worst]:g} Å^3; it must be > 0."
            )
    return array


def _systems(name: str, parts: list[Part], type_map: list[str]) -> list[System]:
    """A system for each list of elements with each set of labels, in the order in which they come."""
    groups: dict[tuple, list[Part]] = {}
    for types, arrays in parts:
        groups.setdefault((types.tobytes(), *arrays), []).append((types, arrays))
    several = len({key[0] for key in groups}) > 1
    systems = []
    for group in groups.values():
        types, first = group[0]
        arrays = {label: _joined([arrays[label] for _, arrays in group]) for label in first}
        formula = "".join(f"{type_map[t]}{n}" for t, n in zip(*np.unique(types, return_counts=True), strict=True))
        systems.append(
            System(
                f"{name} ({formula})" if several else name,
                types,
                arrays["coord"],
                arrays.get("box"),
                arrays.get("energy"),
                arrays.get("force"),
                arrays.get("virial"),
                places=arrays["places"],
            )
        )
    return systems


def _joined(several: list[np.ndarray | Rows]) -> np.ndarray | Rows:
    rows = [some for some in several if isinstance(some, Rows)]
    return Rows.joined(rows) if len(rows) == len(several) else np.concatenate([np.asarray(some) for some in several])
