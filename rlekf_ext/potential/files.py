"""Files of the user: errors that name the file and the reason, and files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rlekf_ext.errors import InputError


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Inside, a file that cannot be read, or is not text in UTF-8, is an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be read: {_reason(error, path)}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not text in UTF-8: byte {error.start}.") from error


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Inside, a file that cannot be written, for lack of room or of permission, is an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be written: {_reason(error, path)}.") from error


def is_hdf5(path: Path) -> bool:
    """Whether a file is in HDF5. Raises OSError if it cannot be read."""
    with open(path, "rb") as file:
        return file.read(8) == b"\x89HDF\r\n\x1a\n"


def check_writable(path: Path) -> None:
    """Make the folder of `path`, and raise InputError now if `path` cannot be written, not after hours of training."""
    if os.path.isdir(path) or "\0" in str(path):
        raise InputError(f"{str(path)!r} cannot be written: it is no name of a file; choose another.")
    temporary = _beside(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        temporary.unlink()


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file next to `path` and move it there: a reader, a full disk, a kill or a power cut finds the old file or
    the new one whole. What a kill leaves behind is overwritten by the next write. Raises InputError.
    """
    temporary = _beside(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Have its entries on the disk. Some file systems cannot sync a folder: there they reach the disk when they may."""
    with suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _reason(error: OSError, path: str | Path) -> str:
    """The words of the system, after the name of the file unless that is `path` itself."""
    other = error.filename is not None and str(error.filename) not in (str(path), str(_beside(Path(path))))
    return f"{error.filename}: {error.strerror}" if other else str(error.strerror or error)
