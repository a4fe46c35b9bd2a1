"""Turns the frames of a batch, divided over the processes, into measurements of all processes together.

A frame has `num_atoms` (B,) for its B structures and the labels `energy` (B,) in eV, `forces` in eV/Å and `virial`
(B, 3, 3) in eV, each None if missing. `forces` are (n, 3), the structures one after another, or (n, B, 3), the same n
atom indices in B structures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlekf_ext.environment import moved
from rlekf_ext.errors import DataError
from rlekf_ext.options import KINDS, UpdateOptions
from rlekf_ext.processes import Processes


@dataclass(frozen=True)
class Part:
    """A frame, the row of the measurement that it belongs to, and its shares: in the mean over structures, and in each
    mean over a group of atoms."""

    frame: Any
    row: int
    share: float
    groups: list[tuple[Tensor, float]]


@dataclass(frozen=True)
class Whole:
    """The whole batch, over all processes."""

    num_rows: int  # measurements per update
    num_structures: int
    num_groups: int
    atoms_per_structure: float
    kinds: tuple[str, ...]  # for which all frames have labels


def force_groups(num_atoms: int, group_size: int | None, num_groups: int, generator: torch.Generator) -> list[Tensor]:
    """Disjoint random groups: `num_groups` of `group_size` atoms, fewer if atoms run out; None: of all atoms."""
    atoms = torch.randperm(num_atoms, generator=generator)
    groups = atoms.tensor_split(num_groups) if group_size is None else atoms.split(group_size)[:num_groups]
    return [group for group in groups if len(group)]


def divide(
    frames: Sequence[Any],
    options: UpdateOptions,
    processes: Processes,
    generator: torch.Generator,
    device: torch.device | str,
) -> tuple[list[Part], Whole]:
    """This process's parts of each measurement, and the totals over all processes. Every process must call it, with its
    generator in the same state."""

    def groups_of(num_atoms: int, num_structures: int, generator: torch.Generator) -> list[Tensor]:
        size = options.group_size and options.group_size * num_structures
        return force_groups(num_atoms, size, options.num_groups, generator)

    def placed(atoms: Tensor) -> Tensor:
        return moved(atoms, device)

    atoms = [0 if frame.forces is None else len(frame.forces) for frame in frames]  # rows of forces
    structures = [len(frame.num_atoms) for frame in frames]
    # How many structures the rows of forces are divided among: all if one after another, one if they share the rows.
    lengthwise = [
        1 if frame.forces is not None and frame.forces.dim() == 3 else count
        for frame, count in zip(frames, structures, strict=True)
    ]
    fewest_groups = 2**62  # of a frame; only frames that are measurements of their own have groups of their own
    if options.batch == "joint":
        unseeded = torch.Generator()
        counts = [len(groups_of(n, m, unseeded)) for n, m in zip(atoms, lengthwise, strict=True)]
        fewest_groups = min(counts, default=fewest_groups)
    labels = ["forces" if kind == "force" else kind for kind in KINDS]
    missing = [sum(getattr(frame, label) is None for frame in frames) for label in labels]
    own_sizes = [len(frames), sum(structures), sum(atoms), sum(lengthwise), fewest_groups, *missing]
    sizes = processes.gather(own_sizes)
    num_frames, num_structures, num_atoms, num_lengthwise, _, *missing = (
        sum(column) for column in zip(*sizes, strict=True)
    )
    if not num_frames:
        raise DataError("A batch must have a frame, on one process at least, but has none.")
    kinds = tuple(kind for kind, count in zip(KINDS, missing, strict=True) if not count)
    first_frame, first_atom = (sum(row[column] for row in sizes[: processes.rank]) for column in (0, 2))
    atoms_per_structure = num_atoms / max(num_lengthwise, 1)
    if options.batch == "joint":
        seed = int(torch.randint(2**62, (), generator=generator))
        parts = []
        for row, (frame, n, m) in enumerate(zip(frames, atoms, lengthwise, strict=True), first_frame):
            own = groups_of(n, m, torch.Generator().manual_seed(seed + row))
            parts.append(Part(frame, row, 1.0, [(placed(group), 1.0) for group in own]))
        num_groups = min(row[4] for row in sizes)
        return parts, Whole(num_frames, num_structures, num_groups, atoms_per_structure, kinds)
    groups = groups_of(num_atoms, num_lengthwise, generator)
    parts = []
    for frame, n, count in zip(frames, atoms, structures, strict=True):
        own = [group[(group >= first_atom) & (group < first_atom + n)] - first_atom for group in groups]
        shares = [(placed(some), len(some) / len(group)) for some, group in zip(own, groups, strict=True)]
        parts.append(Part(frame, 0, count / num_structures, shares))
        first_atom += n
    return parts, Whole(1, num_structures, len(groups), atoms_per_structure, kinds)
