"""Checkpoints: a model and all that its training needs to continue.

Several processes write one checkpoint together: the usual file, with notes instead of the tensors that are spread over
processes, and next to it a folder of torch.distributed.checkpoint with these tensors, one part per process. The file is
written last, and names its folder.
"""

from __future__ import annotations

import os
import shutil
import time
import warnings
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor

from rlekf_ext.errors import InputError
from rlekf_ext.potential.architecture import plain
from rlekf_ext.potential.files import is_hdf5, sync_folder, write_atomically, writing
from rlekf_ext.potential.model import DeepPotential
from rlekf_ext.processes import ALONE, Processes
from rlekf_ext.schema import shown

FORMAT = 1  # of checkpoints; to be raised when what is in them changes its name or its meaning


@dataclass(frozen=True)
class StoredTiles:
    """The tiles of a covariance in a folder of torch.distributed.checkpoint, under a name: they represent the tensor in
    a saved covariance until they are read."""

    folder: str
    name: str
    shape: torch.Size
    dtype: torch.dtype

    def read(self, tiles: Tensor) -> Tensor:
        """Fill and return `tiles`: all of them, or a DTensor of them, which every one of its processes must ask for."""
        from torch.distributed import checkpoint

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # so it is if one process reads all
            checkpoint.load({self.name: tiles}, checkpoint_id=self.folder, no_dist=not hasattr(tiles, "to_local"))
        return tiles


def save_checkpoint(path: Path, model: DeepPotential, processes: Processes = ALONE, **rest: Any) -> None:
    """Write the model and whatever else `rest` holds: tensors, numbers, strings, dicts and lists of them.

    Collective: every process calls it with the same arguments, except DTensors in `rest`. Raises InputError if the file
    cannot be written.
    """
    checkpoint = {"format": FORMAT, "model": plain(model.architecture), "weights": model.state_dict(), **rest}
    spread: dict[str, Tensor] = {}
    checkpoint = _noted(checkpoint, "", spread)
    folder = _shards(path) / str(processes.gather([time.time_ns()])[0][0])
    if spread:
        checkpoint["shards"] = {"folder": folder.name, "checksums": _save_shards(folder, spread, processes)}
    if processes.rank == 0:
        _save_file(path, checkpoint)
        with writing(path):
            for old in _shards(path).glob("*"):
                if old != folder:
                    shutil.rmtree(old)
        if not spread:
            with suppress(OSError):
                _shards(path).rmdir()


def _shards(path: Path) -> Path:
    return path.with_name(f"{path.name}.shards")


def _noted(tree: Any, place: str, spread: dict[str, Tensor]) -> Any:
    """The tree with a note instead of every tensor that is spread over processes; those go to `spread`."""
    if isinstance(tree, dict):
        return {key: _noted(value, f"{place}/{key}", spread) for key, value in tree.items()}
    if hasattr(tree, "to_local"):  # a DTensor, whose class takes long to import
        spread[place] = tree
        return {"spread": place, "shape": list(tree.shape), "dtype": str(tree.dtype).removeprefix("torch.")}
    return tree


def _with_stored(tree: Any, folder: Path) -> Any:
    """The tree with what is stored instead of each note."""
    if not isinstance(tree, dict):
        return tree
    if "spread" in tree:
        return StoredTiles(str(folder), tree["spread"], torch.Size(tree["shape"]), getattr(torch, tree["dtype"]))
    return {key: _with_stored(value, folder) for key, value in tree.items()}


def _save_shards(folder: Path, spread: dict[str, Tensor], processes: Processes) -> dict[str, int]:
    """Write each process's part, and return the checksum of every file."""
    from torch.distributed import checkpoint

    try:
        checkpoint.save(spread, checkpoint_id=str(folder), process_group=processes.group)
    except checkpoint.CheckpointException as error:
        if processes.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        reasons = {str(reason[0]) for reason in error.failures.values()}
        raise InputError(f"{folder} cannot be written: {'; '.join(sorted(reasons))}.") from error
    own = folder / f"__{processes.rank}_0.distcp"
    found = processes.gather([_checksum(own) if own.exists() else -1])
    checksums = {f"__{rank}_0.distcp": value for rank, (value,) in enumerate(found) if value >= 0}
    for each in (folder, folder.parent, folder.parent.parent):  # the files themselves have been synced
        sync_folder(each)
    return {**checksums, ".metadata": _checksum(folder / ".metadata")}


def _checksum(file: Path) -> int:
    value = 0
    with file.open("rb") as opened:
        while piece := opened.read(1 << 20):
            value = zlib.crc32(piece, value)
    return value


def _check_shards(folder: Path, checksums: dict[str, int], processes: Processes) -> None:
    """Every process looks at some of the files; all raise the same InputError."""
    names = sorted(checksums)
    bad = -1
    for place in range(processes.rank, len(names), processes.size):
        try:
            whole = _checksum(folder / names[place]) == checksums[names[place]]
        except OSError:  # no error yet: the other processes would wait for this one
            whole = False
        if not whole:
            bad = place
    for (place,) in processes.gather([bad]):
        if place >= 0:
            file = folder / names[place]
            what = "its checksum is wrong" if os.path.exists(file) else "it is missing"
            raise InputError(
                f"{file}, a part of the checkpoint, cannot be used: {what}. Restore it: it belongs to the file."
            )


def _save_file(path: Path, checkpoint: dict[str, Any]) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # what torch makes of a full disk
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from error
                raise

    write_atomically(path, write)


def load_checkpoint(path: str | Path, processes: Processes = ALONE, *, model_only: bool = False) -> dict[str, Any]:
    """Return what `save_checkpoint` wrote, on the CPU, after a comparison with the checksums in it (0.3 s per GB).

    Tensors are read from the file when they are used, so that P is in memory only once; a file that is replaced keeps
    its space on the disk as long as one of them exists. What several processes have written stays in its folder, as
    StoredTiles; `model_only` leaves that folder alone. Raises InputError, with the reason, for a file that is no
    checkpoint, was altered, or has another format.
    """
    path = Path(path)
    checkpoint = _read(path)
    shards = checkpoint.pop("shards", None)
    if shards and not model_only:
        folder = _shards(path) / shards["folder"]
        _check_shards(folder, shards["checksums"], processes)
        checkpoint = _with_stored(checkpoint, folder)
    return checkpoint


def run_of(path: Path) -> str | None:
    """The name of the run that wrote a checkpoint; None if there is none. Raises InputError for another file."""
    return _read(path).get("run") if os.path.exists(path) else None


def _read(path: Path) -> dict[str, Any]:
    try:
        with ZipFile(path) as archive:  # torch.save writes a CRC-32 for each record; torch.load does not look at them
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} is wrong")
        checkpoint = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        if not {"model", "weights"} <= set(checkpoint):
            raise ValueError("no model in it")
    except FileNotFoundError as error:
        near = Path(f"{path}.pt")
        advice = f"there is {near}" if near.exists() else "`rlekf train` without --restart and --init-model makes one"
        raise InputError(f"The checkpoint {path} does not exist; {advice}.") from error
    except BadZipFile as error:
        if is_hdf5(path):
            raise InputError(
                f"{path} is not a checkpoint of `rlekf train` but a model of DeePMD-kit: `rlekf import {path} -o FILE` "
                "makes one of it."
            ) from error
        raise _unfit(path) from error
    except (PermissionError, IsADirectoryError) as error:
        raise InputError(f"The checkpoint {path} cannot be read: {error.strerror}.") from error
    except Exception as error:  # whatever a damaged file makes of the unpickler: its own words help nobody
        raise _unfit(path) from error
    if "format" not in checkpoint:
        raise InputError(
            f"{path} is not a checkpoint of this version of rlekf_ext: it has no format. Use the version that wrote "
            "it, or train again."
        )
    if checkpoint["format"] != FORMAT:
        raise InputError(
            f"The checkpoint {path} has format {shown(checkpoint['format'])} but this version of rlekf_ext reads "
            f"format {FORMAT}; use the version that wrote it, or train again."
        )
    return checkpoint


def _unfit(path: Path) -> InputError:
    return InputError(
        f"{path} is not a checkpoint of `rlekf train`: it is damaged, or another program wrote it. Take another copy, "
        "or train again."
    )


def restored_model(checkpoint: dict[str, Any]) -> DeepPotential:
    """The model of a loaded checkpoint, on the CPU. Raises InputError if its weights and its network do not fit."""
    model = DeepPotential(checkpoint["model"])
    try:
        model.load_state_dict(checkpoint["weights"])
    except RuntimeError as error:
        raise InputError(f"The weights of the checkpoint are not those of its network: {error}") from error
    return model
