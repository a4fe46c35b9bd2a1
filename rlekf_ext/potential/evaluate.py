"""How far a model is from the labels of a set of frames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from rlekf_ext.potential.files import write_atomically
from rlekf_ext.potential.model import DeepPotential
from rlekf_ext.potential.neighbors import Frame, collate
from rlekf_ext.processes import Processes

ATOMS_AT_ONCE = 512  # frames are evaluated together up to this many atoms: enough to hide the cost of small operations


@dataclass(frozen=True)
class Comparison:
    """Labels and predictions, frame after frame; energies in eV/atom, force components in eV/Å."""

    energy: np.ndarray  # (frames, 2): label, prediction
    force: np.ndarray  # (3 atoms, 2)

    @property
    def energy_rmse(self) -> float:
        """eV/atom."""
        return _rmse(self.energy)

    @property
    def force_rmse(self) -> float:
        """eV/Å, over all components."""
        return _rmse(self.force)

    def save(self, prefix: str | Path) -> list[Path]:
        """Write PREFIX.e_peratom.out and PREFIX.f.out, labels before predictions, as `dp test -d` does.

        Raises InputError if a file cannot be written.
        """
        paths = [Path(f"{prefix}.e_peratom.out"), Path(f"{prefix}.f.out")]
        vectors = self.force.reshape(-1, 3, 2).transpose(0, 2, 1).reshape(-1, 6)
        names = "data_fx data_fy data_fz pred_fx pred_fy pred_fz (eV/Å)"
        write_atomically(paths[0], lambda path: np.savetxt(path, self.energy, header="data_e pred_e (eV/atom)"))
        write_atomically(paths[1], lambda path: np.savetxt(path, vectors, header=names, encoding="utf-8"))
        return paths


@torch.no_grad()
def compare(model: DeepPotential, frames: Sequence[Frame]) -> Comparison:
    """Evaluate labelled frames, several at once."""
    energy, force, waiting = [], [], []
    for i, frame in enumerate(frames):
        waiting.append(frame)
        if i + 1 == len(frames) or sum(len(f.types) for f in [*waiting, frames[i + 1]]) > ATOMS_AT_ONCE:
            batch = collate(waiting)
            prediction = model(batch)
            assert batch.energy is not None  # for mypy: frames here have labels
            assert batch.forces is not None
            energy.append(torch.stack([batch.energy, prediction.energy], 1) / batch.num_atoms[:, None])
            force.append(torch.stack([batch.forces.flatten(), prediction.forces.flatten()], 1))
            waiting = []
    return Comparison(torch.cat(energy).cpu().numpy(), torch.cat(force).cpu().numpy())


def rmse(model: DeepPotential, frames: Sequence[Frame], processes: Processes) -> tuple[float, float]:
    """RMSE of energies (eV/atom) and force components (eV/Å); each process evaluates some of the frames."""
    sums = torch.zeros(4, dtype=torch.float64)
    if own := frames[processes.rank :: processes.size]:
        found = compare(model, own)
        sums = torch.tensor([*_squares(found.energy), *_squares(found.force)], dtype=torch.float64)
    energy, num_energies, force, num_forces = processes.sum(sums).tolist()
    return math.sqrt(energy / num_energies), math.sqrt(force / num_forces)


def _squares(pairs: np.ndarray) -> tuple[float, int]:
    """The sum of the squared errors, and how many there are."""
    return float(np.square(pairs[:, 0] - pairs[:, 1]).sum()), len(pairs)


def _rmse(pairs: np.ndarray) -> float:
    total, count = _squares(pairs)
    return math.sqrt(total / count)
