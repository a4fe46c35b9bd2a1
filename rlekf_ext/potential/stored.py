"""Arrays of files, of which the frames that are asked for are read.

They are not mapped into memory: where a file has been cut off meanwhile, a read ends with an error, not with a signal.
LMDB maps its stores, so their size and time are looked at before each read.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rlekf_ext.errors import DataError

BYTES_AT_ONCE = 2**23
OF_ATOMS = {"coord", "force"}  # what grows with the atoms of a frame is left in its file


class Stored(Protocol):
    """F frames of an array in a file."""

    shape: tuple[int, ...]
    place: str  # the file, and the array in it
    stamp: tuple[int, int]  # of the file

    def read(self, frames: np.ndarray) -> np.ndarray:
        """Some frames by their numbers, as the array in the file has them, (k, ...). Raises DataError."""


class FileArray:
    """An array in C order that begins at an offset of a file."""

    def __init__(self, path: Path, place: str, offset: int, dtype: np.dtype, shape: tuple[int, ...]):
        self.path, self.place, self.offset, self.dtype, self.shape = path, place, offset, dtype, shape
        self._absolute, self.stamp = Path(os.path.abspath(path)), stamp_of(path)

    def reshape(self, shape: tuple[int, ...]) -> FileArray:
        return FileArray(self.path, self.place, self.offset, self.dtype, shape)

    def read(self, frames: np.ndarray) -> np.ndarray:
        found = np.empty((len(frames), *self.shape[1:]), self.dtype)
        bytes_each = found.nbytes // max(len(frames), 1)
        check_unchanged(self._absolute, self.stamp)
        with readable_still(self._absolute), open(self._absolute, "rb", buffering=0) as file:
            # Frames that follow each other are read together.
            starts = [0, *(np.flatnonzero(np.diff(frames) != 1) + 1).tolist(), len(frames)]
            for first, end in itertools.pairwise(starts):
                file.seek(self.offset + int(frames[first]) * bytes_each)
                rest = found[first:end].reshape(-1).view(np.uint8).data
                while len(rest):
                    count = file.readinto(rest)
                    if not count:
                        raise DataError(f"{self.place} ends before frame {frames[first]}: it was cut off meanwhile.")
                    rest = rest[count:]
        return found


@contextmanager
def readable_still(path: Path) -> Iterator[None]:
    """An OSError becomes a DataError that names the file."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path} can no longer be read: {error.strerror or error}.") from error


def stamp_of(path: Path) -> tuple[int, int]:
    """What changes when a file does: its size, and the time at which it was written, in ns."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def check_unchanged(path: Path, stamp: tuple[int, int]) -> None:
    """Raises DataError if the file is not as it was."""
    with readable_still(path):
        now = stamp_of(path)
    if now != stamp:
        changed = f"it had {stamp[0]} bytes, now {now[0]}" if now[0] != stamp[0] else "it was rewritten"
        raise DataError(
            f"{path} has changed since it was first read ({changed}): start again with the new data, or put the old "
            "file back, with its time, and restart."
        )


def pieces(array: np.ndarray | Stored) -> Iterator[tuple[int, np.ndarray]]:
    """An array a few MB at a time, each part with the number of its first frame."""
    if isinstance(array, np.ndarray):
        yield 0, array
        return
    each = max(1, BYTES_AT_ONCE // (8 * max(1, int(np.prod(array.shape[1:])))))
    for first in range(0, array.shape[0], each):
        yield first, array.read(np.arange(first, min(first + each, array.shape[0])))


class Rows:
    """(F, n, 3) numbers, one row for each atom of each frame; a frame is read from its file when it is asked for.

    rows[i] is the (n, 3) of a frame, and rows[a:b] and rows[indices] are Rows again. For all else take
    numpy.asarray(rows), which reads all of it.
    """

    dtype, ndim = np.dtype(np.float64), 3

    def __init__(
        self,
        arrays: Sequence[Stored],
        array_of: np.ndarray,
        frame_of: np.ndarray,
        order: np.ndarray | None = None,
    ):
        # Frame i is frame frame_of[i] of array array_of[i]; with an order (F, n), its atoms are those of a row of it.
        self._arrays, self._array_of, self._frame_of, self._order = list(arrays), array_of, frame_of, order
        num_atoms = arrays[0].shape[1] if order is None else order.shape[1]
        self.shape = (len(frame_of), num_atoms, 3)

    @classmethod
    def of(cls, array: Stored) -> Rows:
        """All frames of an array."""
        return cls([array], np.zeros(array.shape[0], np.int32), np.arange(array.shape[0]))

    def ordered(self, which: np.ndarray, order: np.ndarray) -> Rows:
        """Some frames, each with its atoms in the order that is its row of order (k, n)."""
        return Rows(self._arrays, self._array_of[which], self._frame_of[which], order)

    @classmethod
    def joined(cls, several: Sequence[Rows]) -> Rows:
        """One after the other."""
        if len(several) == 1:
            return several[0]
        starts = np.cumsum([0] + [len(rows._arrays) for rows in several])
        orders = [rows._order for rows in several if rows._order is not None]
        return cls(
            [array for rows in several for array in rows._arrays],
            np.concatenate([rows._array_of + np.int32(start) for rows, start in zip(several, starts, strict=False)]),
            np.concatenate([rows._frame_of for rows in several]),
            np.concatenate(orders) if orders else None,
        )

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, which: Any) -> Any:
        if isinstance(which, int | np.integer):
            return self.read(np.array([range(len(self))[which]]))[0]
        order = None if self._order is None else self._order[which]
        return Rows(self._arrays, self._array_of[which], self._frame_of[which], order)

    def read(self, which: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Some frames, or all, as one array, float64. Raises DataError for a file that has changed."""
        array_of, frame_of = self._array_of[which], self._frame_of[which]
        found = np.empty((len(frame_of), *self.shape[1:]))
        for number in np.unique(array_of):
            own = np.flatnonzero(array_of == number)
            values = self._arrays[number].read(frame_of[own])
            if self._order is not None:
                values = np.take_along_axis(values, self._order[which][own][:, :, None].astype(np.int64), axis=1)
            found[own] = values
        return found

    def fingerprint(self) -> bytes:
        """Of the files, by their sizes and times, of the choice of frames, and of a few of them."""
        digest = hashlib.blake2b()
        for array in self._arrays:
            digest.update(f"{array.place} {array.stamp} {array.shape}".encode())
        for numbers in (self._array_of, self._frame_of, self._order):
            digest.update(b"" if numbers is None else np.ascontiguousarray(numbers).data)
        if len(self):
            digest.update(self.read(np.linspace(0, len(self) - 1, 3).astype(np.int64)).data)
        return digest.digest()

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return self.read().astype(dtype or np.float64, copy=False)
