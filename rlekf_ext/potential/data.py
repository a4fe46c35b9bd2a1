"""Labelled structures, and from them the frames with neighbours that a network takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from rlekf_ext.errors import DataError, OptionError
from rlekf_ext.options import KINDS
from rlekf_ext.potential.neighbors import Frame, make_frame
from rlekf_ext.potential.stored import Rows

LABELS = ("energies", "forces", "virials")


@dataclass(frozen=True, eq=False)
class System:
    """F frames of the same n atoms with the same labels, one kind at least; float64. Coordinates and forces are left in
    their files where that can be done, as Rows."""

    name: str  # the folder or file, for messages
    types: np.ndarray  # (n,) int64, index into the type map
    coordinates: np.ndarray | Rows  # (F, n, 3), Å
    boxes: np.ndarray | None  # (F, 3, 3), Å, rows are cell vectors; None: not periodic
    energies: np.ndarray | None = None  # (F,), eV
    forces: np.ndarray | Rows | None = None  # (F, n, 3), eV/Å
    virials: np.ndarray | None = None  # (F, 3, 3), eV
    entry: int = 0  # place of the path that it was found at, in the list of paths
    number: int = 0  # place among the systems of all paths, as DeePMD-kit counts them: a folder or file is one
    places: np.ndarray | None = None  # (F,), the number of each frame in the folder or file; None: 0, 1, ...

    def __len__(self) -> int:
        return len(self.coordinates)

    def __getitem__(self, frames: slice | Sequence[int] | np.ndarray) -> System:
        """The frames of a slice or of an index array, as a system."""
        places = np.arange(len(self)) if self.places is None else self.places
        own: dict[str, Any] = {name: getattr(self, name) for name in ("coordinates", "boxes", *LABELS)}
        chosen = {name: array[frames] for name, array in own.items() if array is not None}
        return replace(self, places=places[frames], **chosen)

    @property
    def labels(self) -> tuple[str, ...]:
        """The kinds of label that the frames have: of energy, force, virial."""
        return tuple(kind for kind, name in zip(KINDS, LABELS, strict=True) if getattr(self, name) is not None)

    def frame_name(self, i: int) -> str:
        """Frame i, as a message names it."""
        return f"{self.name}, frame {i if self.places is None else self.places[i]}"


def split(systems: Iterable[System], fraction: float = 0.8) -> tuple[list[System], list[System]]:
    """Cut each system into its first frames, which train, and its last, which validate: the paper's cut in time.

    Systems of one frame with the same atoms are cut as if they were one. Of two frames or more one is on either
    side; one alone trains. Raises OptionError for a fraction outside (0, 1]; at 1 nothing validates.
    """
    if not 0 < fraction <= 1:
        raise OptionError(f"The fraction of frames that train must be in (0, 1] but is: {fraction}.")
    train, validation = [], []
    groups: dict[int | bytes, list[System]] = {}
    for place, system in enumerate(systems):
        groups.setdefault(system.types.tobytes() if len(system) == 1 else place, []).append(system)
    for group in groups.values():
        count = cut = sum(map(len, group))
        if fraction < 1 and count > 1:
            cut = min(max(round(fraction * count), 1), count - 1)
        alone = len(group) == 1
        train += [group[0][:cut]] if alone else group[:cut]
        if cut < count:
            validation += [group[0][cut:]] if alone else group[cut:]
    return train, validation


def frames(systems: Iterable[System], cutoff: float, num_types: int, dtype: torch.dtype = torch.float64) -> list[Frame]:
    """Every frame with its neighbours within `cutoff` (Å) and its labels; DataError for atoms that nearly coincide."""
    return [frame_of(system, i, cutoff, num_types, dtype) for system in systems for i in range(len(system))]


def auto_sel(slots: Iterable[int], factor: float = 1.1) -> tuple[int, ...]:
    """DeePMD-kit's sel = "auto:factor": the most neighbours of each element, times factor, to a multiple of 4."""
    return tuple(4 * ((int(n * factor) + 3) // 4) for n in slots)  # cut to an integer first, as DeePMD-kit does


def frame_of(system: System, i: int, cutoff: float, num_types: int, dtype: torch.dtype = torch.float64) -> Frame:
    """Frame i of a system, as `frames` makes it."""
    name = system.frame_name(i)
    own = {label: getattr(system, label) for label in ("boxes", *LABELS)}
    box, energy, forces, virial = (None if array is None else array[i] for array in own.values())
    try:
        return make_frame(
            system.coordinates[i],
            box,
            system.types,
            cutoff,
            num_types,
            energy=energy,
            forces=forces,
            virial=virial,
            dtype=dtype,
            name=name,
        )
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
