"""Files that are whole or not there: checkpoints of a model and of all that its training needs to go on."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch

from rlekf_ext.dp.input import InputError
from rlekf_ext.dp.model import DeepPotential


def save_checkpoint(path: Path, model: DeepPotential, **rest: Any) -> None:
    """Write the model and whatever else `rest` holds: tensors, numbers, strings, dicts and lists of them."""
    checkpoint = {"model": model.config(), "weights": model.state_dict(), **rest}

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)

    try:
        write_atomically(path, write)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        reason = error if isinstance(error, OSError) else error.__context__ or error
        raise InputError(f"{path} cannot be written: {reason}.") from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote, on the CPU, as tensors that are read from the file when they are used: P takes no
    memory twice, but the file, though it may be replaced, keeps its room on the disk while one of them lives.

    It is read once before, to compare it with the checksums in it (0.3 s a GB). Raises InputError, with the reason,
    for a file that is none or was altered.
    """
    try:
        with ZipFile(path) as archive:  # torch.save writes a CRC-32 for each record; torch.load does not look at them
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} is wrong")
        checkpoint = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        if not {"model", "weights"} <= set(checkpoint):
            raise ValueError("no model in it")
    except FileNotFoundError as error:
        raise InputError(f"The checkpoint {path} does not exist; `rlekf train` without --restart makes one.") from error
    except (PermissionError, IsADirectoryError) as error:
        raise InputError(f"The checkpoint {path} cannot be read: {error.strerror}.") from error
    except Exception as error:  # whatever a damaged file makes of the unpickler: its own words help nobody
        raise InputError(
            f"{path} is not a checkpoint of `rlekf train`: it is damaged, or another program wrote it. Take "
            "another copy, or train anew."
        ) from error
    return checkpoint


def restored_model(checkpoint: dict[str, Any]) -> DeepPotential:
    model = DeepPotential(**checkpoint["model"])
    model.load_state_dict(checkpoint["weights"])
    return model


def check_writable(path: Path) -> None:
    """Raise InputError where `path` cannot be written, before hours are spent on what should stand in it."""
    temporary = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.filename}: {error.strerror}.") from error


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside `path` and move it there: a reader, a full disk, a kill or a power cut finds the old file or the
    new one whole. What a kill leaves beside it is overwritten by the next write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    with suppress(OSError):  # some file systems cannot sync a folder: there the move reaches the disk when it may
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")
