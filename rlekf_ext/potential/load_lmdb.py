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


FRAMES_AT_ONCE = 4096
ONE_AT_A_TIME = threading.Lock()  # a process may open a store only once


def read_lmdb(path: Path) -> list[dict[str, Any]]:
    """The frames in blocks that have the same arrays (F, ...): these, with "names" (None if the store has no type map)
    and "types". Coordinates and forces stay in the store. Raises DataError."""
    blocks: list[dict[str, Any]] = []
    waiting: list[dict[str, np.ndarray]] = []

    def finish(end: int) -> None:
        if not waiting:
            return
        block: dict[str, Any] = {name: np.concatenate([frame[name] for frame in waiting]) for name in waiting[0]}
        numbers = np.arange(end - len(waiting), end)
        for name in OF_ATOMS & block.keys():
            block[name] = LmdbArray(path, name, numbers, block[name].shape, stamp)
        blocks.append(block | {"names": names})
        waiting.clear()

    with _opened(path) as read:
        stamp = stamp_of(_file(path))
        about = read(None)
        names = about.get("type_map") and [str(name) for name in about["type_map"]]
        for i in range(about["nframes"]):
            frame = _frame(read(i))
            if waiting and (_shapes(frame) != _shapes(waiting[0]) or len(waiting) == FRAMES_AT_ONCE):
                finish(i)
            waiting.append(frame)
        finish(about["nframes"])
    return blocks


class LmdbArray:
    """One array of some frames of a store: `Stored` of stored.py."""

    def __init__(self, path: Path, name: str, numbers: np.ndarray, shape: tuple[int, ...], stamp: tuple[int, int]):
        self.path, self.stamp = Path(os.path.abspath(path)), stamp
        self.name, self.numbers, self.shape, self.place = name, numbers, shape, f"{name} in {path}"

    def reshape(self, shape: tuple[int, ...]) -> LmdbArray:
        return LmdbArray(self.path, self.name, self.numbers, shape, self.stamp)

    def read(self, frames: np.ndarray) -> np.ndarray:
        check_unchanged(_file(self.path), self.stamp)
        with _opened(self.path) as read:
            each = [_value(read(i), self.name).reshape(self.shape[1:]) for i in self.numbers[frames].tolist()]
        return np.stack(each) if each else np.empty((0, *self.shape[1:]))


@contextmanager
def _opened(path: Path) -> Iterator[Callable[[int | None], dict[Any, Any]]]:
    """Inside, a function that gives a frame by its number, or what is known of all of them."""
    try:
        import lmdb
        import msgpack
    except ImportError as error:
        raise DataError(f"{path} is read by lmdb and msgpack: pip install lmdb msgpack.") from error
    place, key = str(path), "012d"

    def read(i: int | None) -> dict[Any, Any]:
        nonlocal place, key
        place = str(path) if i is None else f"{path}, frame {i}"
        packed = transaction.get(b"__metadata__" if i is None else format(i, key).encode())
        if packed is None:
            raise ValueError("it is missing")
        found = msgpack.unpackb(packed)
        if i is None:
            key = found.get("frame_idx_fmt", key)
        return found

    try:
        with ONE_AT_A_TIME, lmdb.open(str(path), subdir=path.is_dir(), readonly=True, lock=False) as store:
            if _file(path).stat().st_size < store.stat()["psize"] * (store.info()["last_pgno"] + 1):
                raise ValueError("the file has been cut off")  # it is mapped: reading past its end is fatal
            with store.begin() as transaction:
                read(None)
                yield read
    except Exception as error:  # whatever the decoders stumble over
        raise DataError(f"{place} is not readable as LMDB of DeePMD-kit: {type(error).__name__}: {error}.") from error


def _file(path: Path) -> Path:
    return path / "data.mdb" if path.is_dir() else path


def _shapes(frame: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in frame.items()}


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


def _value(packed: dict[Any, Any], name: str) -> np.ndarray:
    return next(_array(value) for key, value in packed.items() if NAMES.get(key, key) == name)


def _array(value: Any) -> np.ndarray:
    if not isinstance(value, dict):
        return np.asarray(value)
    parts = {key.decode() if isinstance(key, bytes) else key: part for key, part in value.items()}
    array = np.frombuffer(parts["data"], dtype=np.dtype(parts["type"]))
    return array.reshape(parts.get("shape", -1))
