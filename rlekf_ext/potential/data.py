"""Labelled structures, and from them the frames with neighbours that a network takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from rlekf_ext.errors import DataError, OptionError
from rlekf_ext.potential.neighbors import Frame, make_frame


@dataclass(frozen=True, eq=False)
class System:
    """F frames of the same n atoms with the same labels, one kind at least; float64."""

    name: str  # the folder or file, for messages
    types: np.ndarray  # (n,) int64, index into the type map
    coordinates: np.ndarray  # (F, n, 3), Å
    boxes: np.ndarray | None  # (F, 3, 3), Å, rows are cell vectors; None: not periodic
    energies: np.ndarray | None = None  # (F,), eV
    forces: np.ndarray | None = None  # (F, n, 3), eV/Å
    virials: np.ndarray | None = None  # (F, 3, 3), eV
    entry: int = 0  # place of the path that it was found at, in the list of paths
    number: int = 0  # place among the systems of all paths, as DeePMD-kit counts them: a folder or file is one

    def __len__(self) -> int:
        return len(self.coordinates)

    def __getitem__(self, frames: slice | Sequence[int] | np.ndarray) -> System:
        """The frames of a slice or of an index array, as a system."""
        names = ("coordinates", "boxes", "energies", "forces", "virials")
        arrays = {name: getattr(self, name) for name in names}
        return replace(self, **{name: None if a is None else a[frames] for name, a in arrays.items()})


def split(systems: Iterable[System], fraction: float = 0.8) -> tuple[list[System], list[System]]:
    """Cut each system into its first frames, which train, and its last, which validate: the paper's cut in time.

    A system of two frames or more keeps one on either side; a single frame trains. Raises OptionError for a fraction
    outside (0, 1]; at 1 nothing validates.
    """
    if not 0 < fraction <= 1:
        raise OptionError(f"The fraction of frames that train must be in (0, 1] but is: {fraction}.")
    train, validation = [], []
    for system in systems:
        cut = len(system)
        if fraction < 1 and cut > 1:
            cut = min(max(round(fraction * cut), 1), cut - 1)
        train.append(system[:cut])
        if cut < len(system):
            validation.append(system[cut:])
    return train, validation


def frames(systems: Iterable[System], cutoff: float, num_types: int, dtype: torch.dtype = torch.float64) -> list[Frame]:
    """Every frame with its neighbours within `cutoff` (Å) and its labels; DataError for atoms that nearly coincide."""
    return [_frame(system, i, cutoff, num_types, dtype) for system in systems for i in range(len(system))]


def auto_sel(frames: Iterable[Frame], factor: float = 1.1) -> tuple[int, ...]:
    """DeePMD-kit's sel = "auto:factor": the most neighbours of each element, times factor, to a multiple of 4.

    Raises DataError if no atom has a neighbour.
    """
    frames = list(frames)
    most = np.max([frame.slots for frame in frames], axis=0)
    if not most.any():
        raise DataError(
            f"No atom has a neighbour within {frames[0].cutoff} Å: check the coordinates, their units and rcut."
        )
    return tuple(4 * ((int(n * factor) + 3) // 4) for n in most)  # cut to an integer first, as DeePMD-kit does


def _frame(system: System, i: int, cutoff: float, num_types: int, dtype: torch.dtype) -> Frame:
    try:
        return make_frame(
            system.coordinates[i],
            None if system.boxes is None else system.boxes[i],
            system.types,
            cutoff,
            num_types,
            energy=None if system.energies is None else system.energies[i],
            forces=None if system.forces is None else system.forces[i],
            virial=None if system.virials is None else system.virials[i],
            dtype=dtype,
        )
    except DataError as error:
        raise DataError(f"{system.name}, frame {i}: {error}") from error
