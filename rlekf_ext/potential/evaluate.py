"""How far a model is from the labels of a set of frames."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from rlekf_ext.options import KINDS
from rlekf_ext.potential.files import write_atomically
from rlekf_ext.potential.model import DeepPotential
from rlekf_ext.potential.neighbors import Frame, collate
from rlekf_ext.processes import ALONE, Processes

ATOMS_AT_ONCE = 512  # frames are evaluated together up to this many atoms: enough to hide the cost of small operations


UNITS = dict(zip(KINDS, ("eV/atom", "eV/Å", "eV/atom"), strict=True))  # of errors


@dataclass(frozen=True)
class Comparison:
    """Labels and predictions, frame after frame, of the frames that have the label; energies and virials in eV/atom,
    force components in eV/Å."""

    energy: np.ndarray  # (frames, 2): label, prediction
    force: np.ndarray  # (3 atoms, 2)
    virial: np.ndarray  # (9 frames, 2)

    @property
    def energy_rmse(self) -> float:
        """eV/atom; NaN without labels."""
        return _rmse(self.energy)

    @property
    def force_rmse(self) -> float:
        """eV/Å, over all components; NaN without labels."""
        return _rmse(self.force)

    @property
    def virial_rmse(self) -> float:
        """eV/atom, over all components; NaN without labels."""
        return _rmse(self.virial)

    def save(self, prefix: str | Path) -> list[Path]:
        """Write PREFIX.e_peratom.out, PREFIX.f.out and PREFIX.v_peratom.out, as far as there are labels, which come
        before predictions, as `dp test -d` does.

        Raises InputError if a file cannot be written.
        """
        axes = "xyz"
        vectors, tensors = [f"f{i}" for i in axes], [f"v{i}{j}" for i in axes for j in axes]
        tables = (
            ("e_peratom", self.energy, ["e"], "eV/atom"),
            ("f", self.force, vectors, "eV/Å"),
            ("v_peratom", self.virial, tensors, "eV/atom"),
        )
        paths = []
        for name, pairs, columns, unit in tables:
            if len(pairs):
                paths.append(Path(f"{prefix}.{name}.out"))
                rows = pairs.reshape(-1, len(columns), 2).transpose(0, 2, 1).reshape(-1, 2 * len(columns))
                header = (
                    " ".join(f"{whose}_{column}" for whose in ("data", "pred") for column in columns) + f" ({unit})"
                )
                _save_table(paths[-1], rows, header)
        return paths


def _save_table(path: Path, rows: np.ndarray, header: str) -> None:
    write_atomically(path, lambda temporary: np.savetxt(temporary, rows, header=header, encoding="utf-8"))


def compare(model: DeepPotential, frames: Iterable[Frame]) -> Comparison:
    """Evaluate labelled frames, several at once. Raises DataError for a frame that does not fit the network."""
    found: dict[str, list[np.ndarray]] = {kind: [np.empty((0, 2))] for kind in KINDS}
    for pairs in _compared(model, frames):
        for kind, values in pairs.items():
            found[kind].append(values.cpu().numpy())
    return Comparison(**{kind: np.concatenate(parts) for kind, parts in found.items()})


def rmse(model: DeepPotential, frames: Iterable[Frame], processes: Processes = ALONE) -> dict[str, float]:
    """RMSE of energies and virials (eV/atom) and force components (eV/Å), NaN without labels; each process passes
    some of the frames."""
    sums = torch.zeros(len(KINDS), 2, dtype=torch.float64)
    for pairs in _compared(model, frames):
        for kind, values in pairs.items():
            sums[KINDS.index(kind)] += torch.tensor(_squares(values.cpu().numpy()), dtype=torch.float64)
    return {kind: _root_mean(*row) for kind, row in zip(KINDS, processes.sum(sums).tolist(), strict=True)}


def watched(frames: Sequence[Frame], quiet: bool = False) -> Iterable[Frame]:
    """The frames, with a progress bar if they take more than five seconds."""
    return tqdm(frames, desc="evaluation", unit="frame", delay=5, disable=quiet or None, leave=False)


def _compared(model: DeepPotential, frames: Iterable[Frame]) -> Iterator[dict[str, Tensor]]:
    """Labels and predictions, (count, 2) for each kind, of a few frames at a time: the columns of Comparison."""
    waiting: list[Frame] = []
    for frame in frames:
        model.descriptor.check(frame)
        atoms = sum(len(each.types) for each in [*waiting, frame])
        if waiting and (frame.labels != waiting[0].labels or atoms > ATOMS_AT_ONCE):
            yield _evaluated(model, waiting)
            waiting = []
        waiting.append(frame)
    if waiting:
        yield _evaluated(model, waiting)


@torch.no_grad()
def _evaluated(model: DeepPotential, frames: Sequence[Frame]) -> dict[str, Tensor]:
    batch = collate(frames).to(device=model.energy_bias.device)
    prediction = model(batch)
    found = {}
    if batch.energy is not None:
        found["energy"] = torch.stack([batch.energy, prediction.energy], 1) / batch.num_atoms[:, None]
    if batch.forces is not None:
        found["force"] = torch.stack([batch.forces.flatten(), prediction.forces.flatten()], 1)
    if batch.virial is not None:
        pairs = torch.stack([batch.virial, prediction.virial], -1) / batch.num_atoms[:, None, None, None]
        found["virial"] = pairs.flatten(0, 2)
    return found


def _squares(pairs: np.ndarray) -> tuple[float, int]:
    """The sum of the squared errors, and how many there are."""
    return float(np.square(pairs[:, 0] - pairs[:, 1]).sum()), len(pairs)


def _root_mean(total: float, count: float) -> float:
    return math.sqrt(total / count) if count else math.nan


def _rmse(pairs: np.ndarray) -> float:
    return _root_mean(*_squares(pairs))
