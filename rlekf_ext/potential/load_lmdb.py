"""The LMDB stores of DeePMD-kit 3.2: a msgpack table for each frame. dpdata refuses those whose labels differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rlekf_ext.errors import DataError

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


def read_lmdb(path: Path) -> list[dict[str, Any]]:
    """For each frame its arrays, with "names" (None if the store has no type map) and "types". Raises DataError."""
    try:
        import lmdb
        import msgpack
    except ImportError as error:
        raise DataError(f"{path} is read by lmdb and msgpack: pip install lmdb msgpack.") from error
    place = str(path)
    try:
        with lmdb.open(str(path), subdir=path.is_dir(), readonly=True, lock=False) as store:
            file = path / "data.mdb" if path.is_dir() else path
            if file.stat().st_size < store.stat()["psize"] * (store.info()["last_pgno"] + 1):
                raise ValueError("the file has been cut off")  # it is mapped: reading past its end is fatal
            frames = []
            with store.begin() as transaction:
                about = msgpack.unpackb(transaction.get(b"__metadata__"))
                names = about.get("type_map") and [str(name) for name in about["type_map"]]
                for i in range(about["nframes"]):
                    place = f"{path}, frame {i}"
                    packed = transaction.get(format(i, about.get("frame_idx_fmt", "012d")).encode())
                    if packed is None:
                        raise ValueError(f"it is missing, of {about['nframes']}")
                    frames.append(_frame(msgpack.unpackb(packed)) | {"names": names})
            return frames
    except Exception as error:  # whatever the decoders stumble over
        raise DataError(f"{place} is not readable as LMDB of DeePMD-kit: {type(error).__name__}: {error}.") from error


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
