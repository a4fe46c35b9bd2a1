"""How far off the filter expects a model to be, frame by frame (sqrt(HᵀPH)), and how far off it is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlekf_ext import RLEKF
from rlekf_ext.covariance import Covariance
from rlekf_ext.errors import DataError, InputError
from rlekf_ext.packing import TILE
from rlekf_ext.potential.files import write_atomically
from rlekf_ext.potential.frames import FrameList
from rlekf_ext.potential.model import DeepPotential
from rlekf_ext.potential.neighbors import Frame
from rlekf_ext.potential.table import Table
from rlekf_ext.updates import beside

WITHOUT_LABELS = "The predicted uncertainty needs frames with both energy and forces, but there are none."
DRAWS = 7  # of random signs; with the energy that is 8 measurements of a frame, and so one pass over P


@dataclass(frozen=True)
class Uncertainty:
    """Errors and predicted deviations, a row for each frame.

    A predicted deviation is sqrt(HᵀPH), on the scale of the filter's own measurement noise: it puts frames in an order,
    and is an error bar only after it is multiplied by a factor that labelled frames give (`factors`).
    """

    frame: np.ndarray  # (frames,): numbers, from 0, of the frames that have both labels
    energy: np.ndarray  # (frames, 2): prediction - label in eV/atom; predicted deviation
    force: np.ndarray  # (frames, 2): RMSE of the frame's components in eV/Å; their predicted RMS deviation

    @property
    def spearman(self) -> tuple[float, float]:
        """Rank correlation of the size of the error with the predicted deviation: of energies, of forces."""
        energy, force = (spearman(*abs(pairs.T)) for pairs in (self.energy, self.force))
        return energy, force

    @property
    def factors(self) -> tuple[float, float]:
        """RMS error / RMS deviation on these frames, of energies and of forces; NaN if no deviation is above 0."""
        energy, force = (np.square(pairs).sum(0) for pairs in (self.energy, self.force))
        return _root_of_ratio(*energy), _root_of_ratio(*force)

    def save(self, prefix: str | Path) -> Path:
        """Write PREFIX.uncertainty.out, one line per frame. Raises InputError if it cannot be written."""
        path = Path(f"{prefix}.uncertainty.out")
        rows = np.column_stack([self.frame, self.energy, self.force])
        names = "frame error_e deviation_e rmse_f deviation_f (eV/atom, eV/Å; the scale of deviations is relative)"
        form = ["%8d", *["%24.16e"] * 4]
        write_atomically(path, lambda file: np.savetxt(file, rows, form, header=names, encoding="utf-8"))
        return path


def filter_of(checkpoint: dict[str, Any], model: DeepPotential) -> RLEKF:
    """The filter of a checkpoint, around `model`, its restored model, which gets its table back; P is not copied.

    P is that of the filter's own weights at the end of training. The saved model is, in the preset `robust`, their mean
    over the last few frames, and Jacobians are taken there: it is the model whose errors are asked for.

    Raises InputError for the checkpoint of another optimizer.
    """
    saved = checkpoint.get("optimizer", {}).get("filter")
    if saved is None:
        raise InputError(
            "The predicted uncertainty needs the covariance P of a Kalman filter, which this checkpoint does not hold: "
            "give the last one of a run with the optimizer RLEKF or LKF (NAME.pt; NAME.best.pt is the model alone)."
        )
    # Blocks of one tile make the smallest P, which the saved one replaces at once, whatever its blocks and dtype.
    optimizer = RLEKF(model.named_parameters(), transpose=True, block_size=TILE)
    optimizer.filter.covariance = Covariance.from_state_dict(saved["state"][0])
    if nodes := checkpoint.get("progress", {}).get("nodes"):
        model.table = Table.restored(nodes)
    return optimizer


def check_labels(frames: FrameList) -> None:
    """Raise the DataError of `uncertainty` before anything has been computed."""
    if not any({"energy", "force"} <= set(system.labels) for system, _ in frames.parts()):
        raise DataError(WITHOUT_LABELS)


def uncertainty(optimizer: RLEKF, model: DeepPotential, frames: Iterable[Frame]) -> Uncertainty:
    """Errors and predicted deviations of labelled frames, each of one structure, with one pass over P per frame.

    Frames without an energy or forces are left out. Raises DataError if all are, and InputError if a variance is
    negative or not finite: P is no covariance any more.
    """
    rows = []
    for i, frame in enumerate(frames):
        if frame.energy is None or frame.forces is None:
            continue
        deviation = deviations(optimizer, jacobian_of(optimizer, model, frame), f"frame {i}")
        prediction = model(frame, create_graph=False)
        error = float(prediction.energy[0] - beside(prediction.energy, frame.energy)[0]) / len(frame.types)
        rmse = float((prediction.forces - beside(prediction.forces, frame.forces)).square().mean().sqrt())
        rows.append((i, error, deviation[0], rmse, deviation[1]))
    if not rows:
        raise DataError(WITHOUT_LABELS)
    columns = np.array(rows)
    return Uncertainty(columns[:, 0].astype(np.int64), columns[:, 1:3], columns[:, 3:])


def deviations(optimizer: RLEKF, jacobian: Tensor, name: str) -> tuple[float, float]:
    """The predicted deviations of the energy, eV/atom, and of the force components, eV/Å, from the rows of
    `jacobian_of`. Raises InputError, with the name of the frame, for a variance that is negative or not finite."""
    variance = optimizer.variance(jacobian).tolist()
    if not all(0 <= each < math.inf for each in variance):  # NaN is neither
        raise InputError(
            f"The variance HᵀPH of {name} should be at least 0 and finite but is {min(variance):.3g}: P was spoilt by "
            "rounding. Train with covariance_dtype float64, or with a memory_factor nearer to 1."
        )
    return math.sqrt(variance[0]), math.sqrt(sum(variance[1:]) / DRAWS)


def jacobian_of(optimizer: RLEKF, model: DeepPotential, frame: Frame) -> Tensor:
    """The derivatives (1 + DRAWS, N) of E/n and of the draws g_s by the weights of the filter.

    g_s = Σ_i s_i F_i / sqrt(3n) with random signs s_i: the mean of its variance over all s is the mean of the variances
    of the 3n components, as E[s_i s_j] = δ_ij. The signs are the same for all frames of n atoms, so that chance
    disturbs their order little, and a frame's deviation does not depend on the other frames.
    """
    n = len(frame.types)
    signs = torch.randint(2, (DRAWS, 3 * n), generator=torch.Generator().manual_seed(0)) * 2 - 1
    draws = signs.to(device=model.energy_bias.device, dtype=model.dtype) / math.sqrt(3 * n)
    own = model.prepared(frame)
    if own and optimizer.has_all_reversed(model):
        results, saved = own.predict(True, True)
        by_energies, by_forces, by_virials = (x.new_zeros(1 + DRAWS, *x.shape) for x in results)
        by_energies[0] = 1 / n
        by_forces[1:] = draws.view(DRAWS, n, 3)
        return own.gradients(saved, by_energies, by_forces, by_virials).double()
    with torch.enable_grad():
        prediction = model(frame, create_graph=True)
        values = (prediction.energy[0] / n, *(draws @ prediction.forces.flatten()))
    parameters = optimizer.parameters()
    rows = [torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True) for value in values]
    return torch.stack([optimizer.flatten(row) for row in rows])


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation of x (n,) and y (n,); equal values share their mean rank. NaN if all of one are equal."""
    x, y = (ranks - ranks.mean() for ranks in (_ranks(x), _ranks(y)))
    size = math.sqrt((x @ x) * (y @ y))
    return float(x @ y) / size if size else math.nan


def _root_of_ratio(error: float, deviation: float) -> float:
    return math.sqrt(error / deviation) if deviation else math.nan


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]
