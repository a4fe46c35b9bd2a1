"""Files that dpdata reads: https://docs.deepmodeling.com/projects/dpdata"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlekf_ext.errors import DataError
from rlekf_ext.potential.neighbors import thick_box

XYZ = ("extxyz", "quip/gap/xyz", "quip/gap/xyz_file", "mace/xyz", "nequip/xyz", "gpumd/xyz")
# Formats whose files may hold several formulas, and what reads them frame by frame. A LabeledSystem of these would have
# the first frame alone, or the elements of the first in all.
SEVERAL: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in XYZ},
    "ase/traj": ("ase/structure", {"ase_fmt": "traj"}),
    "ase/structure": ("ase/structure", {}),
}
FILES = (*XYZ, "vasp/outcar", "outcar", "vasp/xml", "xml", "pwmat/movement", "movement", "cp2k/output")
DUMPS = ("lammps/dump", "dump")
VACUUM = 50.0  # Å, more than any cutoff: along directions in which a frame is not periodic
KEYS = {"coord": "coords", "energy": "energies", "force": "forces", "box": "cells", "virial": "virials"}


Flags = Sequence[Any]  # whether a frame is periodic along each cell vector, or nothing


def read_dpdata(path: Path, form: str | None, unlabelled: list[str] | None = None) -> list[dict[str, Any]]:
    """The arrays of each system or frame, with "names" and "types"; without a format the name of the file says it.

    With a type map in `unlabelled`, files without labels are read, too. Repeats dpdata's warnings with the name of the
    file. Raises DataError.
    """
    try:
        from dpdata.format import Format
    except ImportError as error:
        raise DataError(f"{path} is read by dpdata, which is not installed: pip install dpdata.") from error
    known = Format.get_formats()
    if form is None:
        parts = path.name.lower().split(".")  # OUTCAR, OUTCAR.1, vasprun.xml, water.extxyz
        form = next((part for part in (parts[-1], parts[0]) if part in known), parts[-1])
    form = "extxyz" if form == "xyz" else form  # a plain xyz has no labels
    if form not in known:
        near = difflib.get_close_matches(form, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f'put its format before it, as in "vasp/outcar:{path}".'
        raise DataError(f'{path}: dpdata has no format "{form}"; {hint}')
    if path.is_dir() and form in FILES:
        raise DataError(f"{path} is a folder, but {form} is read from a file: give the files in it.")
    periodic = _periodic_directions(path) if form in XYZ else []
    if form in DUMPS:
        _check_boundaries(path)
    with warnings.catch_warnings(record=True) as said:
        found = _read(path, form, unlabelled, periodic)
    for warning in said:
        warnings.warn(f"{path}: {warning.message}", stacklevel=2)
    return found


def _read(path: Path, form: str, unlabelled: list[str] | None, periodic: list[Flags]) -> list[dict[str, Any]]:
    try:
        return _read_labelled(path, form, periodic)
    except DataError as error:
        if unlabelled is None:
            raise
        try:
            return _read_structures(path, form, unlabelled)
        except DataError:
            raise
        except Exception as without:
            if "NotImplementedError" not in str(error):
                raise error from without  # what was wrong with the labels says more
            raise _unreadable(path, form, without) from without


def _read_labelled(path: Path, form: str, periodic: list[Flags]) -> list[dict[str, Any]]:
    import dpdata
    from dpdata.format import Format

    place, found, directions = str(path), list[dict[str, Any]](), iter(periodic)
    try:
        if form in SEVERAL:
            name, options = SEVERAL[form]
            reader = Format.get_formats()[name]()
            place = f"{path}, frame 0"
            for frame in reader.from_multi_systems(str(path), **options):
                flags = frame.pbc if hasattr(frame, "pbc") else next(directions, ())
                found.append(_renamed(reader.from_labeled_system(frame), several=True, periodic=flags))
                place = f"{path}, frame {len(found)}"
        else:
            found.append(_renamed(dpdata.LabeledSystem(str(path), fmt=form).data, several=False))
    except DataError as error:
        raise DataError(f"{place}: {error}") from None
    except Exception as error:  # its parsers raise whatever they stumble over
        raise _unreadable(place, form, error) from error
    return found


def _unreadable(place: object, form: str, error: Exception) -> DataError:
    words = f"{type(error).__name__}: {error}".rstrip(". :")
    if isinstance(error, AssertionError) and form.startswith("lammps"):
        words += " (types 1, 2, ... must be elements of the model, in their order)"
    return DataError(f"{place} cannot be read by dpdata as {form}: {words}.")


def _read_structures(path: Path, form: str, type_map: list[str]) -> list[dict[str, Any]]:
    import dpdata
    from dpdata.format import Format

    if form not in SEVERAL:
        return [_renamed(dpdata.System(str(path), fmt=form, type_map=type_map).data, several=False)]
    reader = Format.get_formats()["ase/structure"]()
    atoms = reader.from_multi_systems(str(path), **({"ase_fmt": "extxyz"} if form in XYZ else SEVERAL[form][1]))
    return [_renamed(reader.from_system(frame), several=True, periodic=frame.pbc) for frame in atoms]


def _periodic_directions(path: Path) -> list[Flags]:
    """Of each frame of an extended xyz file, as for dpdata one that is periodic in one or two directions is so in all.

    Raises DataError if the file ends too early: dpdata would take as many lines as it announces, memory without bound.
    """
    with open(path, errors="replace") as file:
        lines = file.readlines()
    at, found = 0, list[Flags]()
    while at < len(lines):
        count = re.match(r"\s*(\d+)", lines[at])
        if count and int(count[1]) > len(lines) - at - 2:
            raise DataError(
                f"{path}: line {at + 1} announces {count[1]} atoms but the file ends after {len(lines)} lines."
            )
        if count:
            found.append(_flags(lines[at + 1], f"{path}, line {at + 2}"))
        at += int(count[1]) + 2 if count else 1
    return found


def _check_boundaries(path: Path) -> None:
    """Raises DataError for a dump of LAMMPS that is not periodic everywhere: dpdata would take it for periodic."""
    with open(path, errors="replace") as file:
        for number, line in enumerate(file, 1):
            flags = re.findall(r"\b[pfsm]{2}\b", line) if line.startswith("ITEM: BOX BOUNDS") else []
            if any(flag != "pp" for flag in flags):
                raise DataError(
                    f"{path}, line {number}: the boundaries {' '.join(flags)} are not periodic, and dumps are read as "
                    'periodic; write such frames as extended xyz with pbc="T T F" or the like.'
                )


def _flags(comment: str, where: str) -> Flags:
    """The directions that the second line of an extended xyz frame says to be periodic; () if it says nothing."""
    given = re.search(r"""\bpbc\s*=\s*("[^"]*"|'[^']*'|\[[^]]*\]|\{[^}]*\}|\S*)""", comment, re.IGNORECASE)
    if not given:
        return ()
    words = re.findall(r"\w+", given[1])
    if len(words) == 1:
        words *= 3
    if len(words) != 3 or not all(re.fullmatch("t|f|true|false|1|0", word, re.IGNORECASE) for word in words):
        raise DataError(f'{where}: pbc should be three of T and F, as in pbc="T T F", but is: {given[1]}.')
    return [word[0] in "Tt1" for word in words]


def _renamed(data: dict[str, Any], several: bool, periodic: Flags = ()) -> dict[str, Any]:
    arrays = {label: np.asarray(data[key], dtype=np.float64) for label, key in KEYS.items() if key in data}
    if data.get("nopbc", False):
        arrays.pop("box", None)
    if 0 < sum(periodic) < 3:
        arrays["box"] = np.array([thick_box(arrays["box"][0], periodic, arrays["coord"][0], VACUUM)])
    if "force" in arrays and arrays["force"].shape == (1,) and np.isnan(arrays["force"][0]):
        del arrays["force"]  # dpdata's value for an extended xyz frame without forces
    types = np.asarray(data["atom_types"], dtype=np.int64)
    return arrays | {"names": list(data["atom_names"]), "types": types[None] if several else types}
