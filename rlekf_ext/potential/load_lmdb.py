"""The LMDB stores of DeePMD-kit 3.2: a msgpack table for each frame. dpdata refuses those whose labels differ."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rlekf_ext.errors import DataError
from rlekf_ext.potential.stored import OF_ATOMS, check_unchanged, stamp_of

# other names of the same keys
NAMES = {
    "coords": "coord",
    "cells": "box",
    "energies": "energy",
    "forces": "force",
    "virials": "virial",
    "atom_types": "atype",
}
WANTED = ("coord", "box", "energy", "force", "virial")


ONE_AT_A_TIME = threading.Lock()  # a process may open a store only once


def read_lmdb(path: Path) -> list[dict[str, Any]]:
    """The frames in blocks of the same arrays (F, ...): these, with "numbers" of the frames, "types", and "names"
    (None if the store has no type map). Coordinates and forces stay in the store. Raises DataError."""
    blocks: dict[tuple, dict[str, list]] = {}  # by the shapes of the arrays
    with _opened(path) as read:
        stamp = stamp_of(_file(path))
        about = read("the metadata", b"__metadata__")
        names = about.get("type_map") and [str(name) for name in about["type_map"]]
        key = about.get("frame_idx_fmt", "012d")
        for i in range(about["nframes"]):
            frame = _frame(read(f"frame {i}", format(i, key).encode()))
            block = blocks.setdefault(tuple((name, array.shape[1:]) for name, array in frame.items()), {"numbers": []})
            block["numbers"].append([i])
            for name in frame.keys() - OF_ATOMS:
                block.setdefault(name, []).append(frame[name])
    found = []
    for shapes, block in blocks.items():
        arrays: dict[str, Any] = {name: np.concatenate(parts) for name, parts in block.items()}
        count = len(arrays["numbers"])
        for name, shape in shapes:
            if name in OF_ATOMS:
                arrays[name] = LmdbArray(path, key, name, arrays["numbers"], (count, *shape), stamp)
        found.append(arrays | {"names": names})
    return found


class LmdbArray:
    """One array of some frames of a store: `Stored` of stored.py."""

    def __init__(
        self, path: Path, key: str, name: str, numbers: np.ndarray, shape: tuple[int, ...], stamp: tuple[int, int]
    ):
        self.path, self.stamp, self.place = Path(os.path.abspath(path)), stamp, f"{name} in {path}"
        self.key, self.name, self.numbers, self.shape = key, name, numbers, shape

    def reshape(self, shape: tuple[int, ...]) -> LmdbArray:
        return LmdbArray(self.path, self.key, self.name, self.numbers, shape, self.stamp)

    def read(self, frames: np.ndarray) -> np.ndarray:
        check_unchanged(_file(self.path), self.stamp)
        found = []
        with _opened(self.path) as read:
            for i in self.numbers[frames].tolist():
                packed = read(f"frame {i}", format(i, self.key).encode())
                value = next(value for key, value in packed.items() if NAMES.get(key, key) == self.name)
                found.append(_array(value).reshape(self.shape[1:]))
        return np.stack(found) if found else np.empty((0, *self.shape[1:]))


@contextmanager
def _opened(path: Path) -> Iterator[Callable[[str, bytes], dict[Any, Any]]]:
    """Inside, a function that gives the table under a key; messages name it as said."""
    try:
        import lmdb
        import msgpack
    except ImportError as error:
        raise DataError(f"{path} is read by lmdb and msgpack: pip install lmdb msgpack.") from error
    place = str(path)

    def read(name: str, key: bytes) -> dict[Any, Any]:
        nonlocal place
        place = f"{path}, {name}"
        packed = transaction.get(key)
        if packed is None:
            raise ValueError("it is missing")
        return msgpack.unpackb(packed)

    try:
        with ONE_AT_A_TIME, lmdb.open(str(path), subdir=path.is_dir(), readonly=True, lock=False) as store:
            if _file(path).stat().st_size < store.stat()["psize"] * (store.info()["last_pgno"] + 1):
                raise ValueError("the file has been cut off")  # it is mapped: reading past its end is fatal
            with store.begin() as transaction:
                yield read
    except Exception as error:  # whatever the decoders stumble over
        raise DataError(f"{place} is not readable as LMDB of DeePMD-kit: {type(error).__name__}: {error}.") from error


def _file(path: Path) -> Path:
    return path / "data.mdb" if path.is_dir() else path


def _frame(packed: dict[Any, Any]) -> dict[str, Any]:
    values = {NAMES.get(key, key): _array(value) for key, value in packed.items()}
    for key in ("coord", "atype"):
        if key not in values:
            raise ValueError(f"it has no {key}")
    frame = {key: values[key][None] for key in WANTED if key in values and values.get(f"find_{key}", 1.0) != 0}
    if not np.any(frame.get("box", 0)):
        frame.pop("box", None)  # DeePMD-kit: a box of zeros is none
    if any(array.dtype.kind not in "biuf" for array in (*frame.values(), values["atype"])):
        raise ValueError("it has arrays that are no numbers")
    return frame | {"types": values["atype"].reshape(1, -1)}


def _array(value: Any) -> np.ndarray:
    if not isinstance(value, dict):
        return np.asarray(value)
    parts = {key.decode() if isinstance(key, bytes) else key: part for key, part in value.items()}
    array = np.frombuffer(parts["data"], dtype=np.dtype(parts["type"]))
    return array.reshape(parts.get("shape", -1))
