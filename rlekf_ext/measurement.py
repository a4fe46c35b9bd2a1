"""What is measured on a frame, and in which order: Algorithm 1 of the paper, for any model of energies and forces.

A model is called as model(frame, forces=...) and returns an object with `energy` (B,) in eV and, when forces are
asked for, `forces` (n, 3) in eV/Å and, for virial updates, `virial` (B, 3, 3) in eV. A frame holds the labels under
the same names, and `num_atoms` (B,). The optimizer is an RLEKF, or anything with its `step(closure)`, `update` and
`flatten`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

KINDS = ("energy", "force", "virial")
BATCHES = ("mean", "sum")
EMA_DECAY = 0.95
EARLY_DECAY = 0.9987  # an update: as fast as 1 - λ falls with the forgetting rate of the paper


@dataclass(frozen=True)
class Measurement:
    """How a frame becomes updates of the filter, and the memory factor that goes with it. See PRESETS.

    `order` lists the updates of a frame and is gone through again until no force group is left: ("energy", "force")
    is an energy update before every group, ("force",) * 4 + ("energy",) one at the end. Virial updates are left out
    for frames without that label. With `adaptive_scale` a scale is divided by the running mean of ε of its kind.
    `batch` is how B frames make one measurement: "mean", ε and H are those of the mean error; "sum", as DeePMD-kit's
    LKF does it, H is summed over the frames and ε is √B times their mean.

    Raises ValueError for a setting outside its range.
    """

    memory_factor: float  # λ_1 of the paper
    group_size: int | None  # x atoms a force update; None: all atoms, in num_groups parts
    num_groups: int  # y force updates a frame
    order: tuple[str, ...]
    energy_scale: float = 1.0  # multiplies ε and H alike
    force_scale: float = 1.0
    virial_scale: float = 1.0
    adaptive_scale: bool = False
    early_scale: float = 1.0  # multiplies every scale at the first update, and goes to 1 by EARLY_DECAY an update
    relinearize: bool = True  # the model evaluated anew before each update; else all updates of a frame in one pass
    warm_start: bool = False  # before the first update, the mean energy error is moved into the output bias
    average_frames: int = 1  # what is evaluated and saved: a running mean of the weights over about so many frames
    batch: str = "mean"

    def __post_init__(self) -> None:
        if unknown := set(self.order) - set(KINDS):
            raise ValueError(f"order should hold only {', '.join(KINDS)} but holds {', '.join(sorted(unknown))}.")
        if not self.order:
            raise ValueError("order should name at least one kind of update but is empty.")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size should be at least 1, or null for all atoms, but is {self.group_size}.")
        if self.average_frames < 1:
            raise ValueError(f"average_frames should be at least 1 but is {self.average_frames}.")
        if self.num_groups < 1:
            raise ValueError(f"num_groups should be at least 1 but is {self.num_groups}.")
        if self.batch not in BATCHES:
            raise ValueError(f"batch should be one of {', '.join(BATCHES)} but is {self.batch}.")
        if not self.early_scale > 0:
            raise ValueError(f"early_scale should be above 0 but is {self.early_scale}.")
        for kind in KINDS:
            if not self.scale(kind) > 0:
                raise ValueError(f"{kind}_scale should be above 0 but is {self.scale(kind)}.")

    def scale(self, kind: str) -> float:
        return getattr(self, f"{kind}_scale")

    def batch_factors(self, num_frames: int) -> tuple[float, float]:
        """What H and ε of the mean error of so many frames are multiplied by."""
        return (num_frames, math.sqrt(num_frames)) if self.batch == "sum" else (1.0, 1.0)

    def schedule(self, num_groups: int) -> list[str]:
        """The kinds of update of a frame that has this many force groups, in order."""
        kinds: list[str] = []
        while True:
            for kind in self.order:
                if kind != "force" or kinds.count("force") < num_groups:
                    kinds.append(kind)
            if "force" not in self.order or kinds.count("force") == num_groups:
                return kinds


PRESETS = {
    # Hu et al. 2023: x = 6, y = 4, λ_1 = 0.98, energy first.
    "paper": Measurement(0.98, 6, 4, ("energy", "force", "force", "force", "force")),
    # Leaves the first plateau of liquids, and holds energies across volumes: docs/algorithm.md has the trials.
    "robust": Measurement(
        0.998,
        None,
        4,
        ("force", "energy"),
        energy_scale=3.0,
        force_scale=1.0,
        adaptive_scale=True,
        early_scale=5.0,
        warm_start=True,
        average_frames=8,
    ),
}


def energy_error(model: Callable[..., Any], frame: Any) -> Tensor:
    """mean |E - E_DFT| / atoms in eV (Algorithm 2, line 6): its gradient is -H."""
    prediction = model(frame, forces=False)
    return ((prediction.energy - frame.energy).abs() / frame.num_atoms).mean()


def force_error(model: Callable[..., Any], frame: Any, atoms: Tensor) -> Tensor:
    """mean |F - F_DFT| over the 3x components of these atoms, in eV/Å (Algorithm 2, line 6)."""
    return (model(frame, forces=True).forces[atoms] - frame.forces[atoms]).abs().mean()


def virial_error(model: Callable[..., Any], frame: Any) -> Tensor:
    """mean |W - W_DFT| / atoms over the nine components, in eV."""
    difference = (model(frame, forces=True).virial - frame.virial).abs()
    return (difference.mean((1, 2)) / frame.num_atoms).mean()


def force_groups(num_atoms: int, group_size: int | None, num_groups: int, generator: torch.Generator) -> list[Tensor]:
    """Disjoint random groups of atoms: num_groups of group_size, fewer where atoms run out; None: all atoms."""
    atoms = torch.randperm(num_atoms, generator=generator)
    if group_size is None:
        return [group for group in atoms.tensor_split(num_groups) if len(group)]
    return list(atoms[: group_size * num_groups].split(group_size))


def energy_update(optimizer: Any, model: Callable[..., Any], frame: Any, scale: float | Tensor = 1.0) -> Tensor:
    """One energy update (Algorithm 1, lines 2 and 3). Returns ε in eV/atom."""
    return _update(optimizer, lambda: energy_error(model, frame), lambda _: scale)


def force_updates(
    optimizer: Any,
    model: Callable[..., Any],
    frame: Any,
    generator: torch.Generator,
    *,
    group_size: int | None = 6,  # x of the paper
    num_groups: int = 4,  # y
    scale: float | Tensor = 1.0,
) -> list[Tensor]:
    """y force updates, each over x random atoms (Algorithm 1, lines 4 and 5). Returns each ε in eV/Å."""
    groups = force_groups(len(frame.forces), group_size, num_groups, generator)
    return [_update(optimizer, lambda g=g: force_error(model, frame, g), lambda _: scale) for g in groups]  # type: ignore[misc]


def virial_update(optimizer: Any, model: Callable[..., Any], frame: Any, scale: float | Tensor = 1.0) -> Tensor:
    """One virial update. Returns ε in eV/atom."""
    return _update(optimizer, lambda: virial_error(model, frame), lambda _: scale)


class FrameUpdater:
    """All updates of a frame, one frame after another, as a Measurement says; holds random groups and running means."""

    def __init__(self, optimizer: Any, model: Callable[..., Any], measurement: Measurement, seed: int = 0):
        self.optimizer, self.model, self.measurement = optimizer, model, measurement
        self._generator = torch.Generator().manual_seed(seed)
        self._means: dict[str, Tensor] = {}
        self._early = torch.ones((), dtype=torch.float64)  # the part of early_scale - 1 that is left

    def __call__(self, frame: Any) -> list[tuple[str, Tensor]]:
        """Update on one frame. Returns the kind and the unscaled ε of every update, without waiting for the device."""
        m = self.measurement
        groups = force_groups(len(frame.forces), m.group_size, m.num_groups, self._generator)
        kinds = [k for k in m.schedule(len(groups)) if k != "virial" or frame.virial is not None]
        errors = [self._error(kind, frame, groups) for kind in kinds]
        factors = m.batch_factors(len(frame.num_atoms))
        if m.relinearize:
            found = [self._step(kind, error, factors) for kind, error in zip(kinds, errors, strict=True)]
        else:
            found = self._one_pass(kinds, errors, factors)
        return list(zip(kinds, found, strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state(), "means": dict(self._means), "early": self._early.clone()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self._generator.set_state(saved["generator"])
        self._means = {kind: mean.clone() for kind, mean in saved["means"].items()}
        self._early = saved.get("early", torch.zeros_like(self._early)).clone()  # older runs had no early scale

    def _error(self, kind: str, frame: Any, groups: list[Tensor]) -> Callable[[], Tensor]:
        if kind == "energy":
            return lambda: energy_error(self.model, frame)
        if kind == "virial":
            return lambda: virial_error(self.model, frame)
        group = groups.pop(0)
        return lambda: force_error(self.model, frame, group)

    def _step(self, kind: str, error: Callable[[], Tensor], factors: tuple[float, float]) -> Tensor:
        return _update(self.optimizer, error, lambda found: self._scale(kind, found), factors)

    def _one_pass(
        self, kinds: Sequence[str], errors: Iterable[Callable[[], Tensor]], factors: tuple[float, float]
    ) -> list[Tensor]:
        """All measurements at one w: M Jacobians, used one after another by the filter itself."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
        found, jacobian, innovation = [], [], []
        for kind, error in zip(kinds, errors, strict=True):
            value = error()
            scale = self._scale(kind, value.detach())
            gradients = torch.autograd.grad(-factors[0] * scale * value, parameters, allow_unused=True)
            jacobian.append(self.optimizer.flatten(gradients))
            innovation.append(factors[1] * scale * value.detach())
            found.append(value.detach())
        if found:
            self.optimizer.update(torch.stack(innovation), torch.stack(jacobian))
        return found

    def _scale(self, kind: str, error: Tensor) -> float | Tensor:
        scale: float | Tensor = self.measurement.scale(kind)
        if self.measurement.early_scale != 1:
            left = self._early.to(error.device)
            scale = scale * (1 + (self.measurement.early_scale - 1) * left.to(error.dtype))
            self._early = torch.where(error.isfinite(), EARLY_DECAY * left, left)
        if not self.measurement.adaptive_scale:
            return scale
        mean = self._means.get(kind, error)
        mean = torch.where(mean.isfinite(), mean, error)  # the very first ε may not have been finite
        mean = torch.where(error.isfinite(), EMA_DECAY * mean + (1 - EMA_DECAY) * error, mean)
        self._means[kind] = mean
        return scale / mean.clamp_min(torch.finfo(mean.dtype).tiny)


def _update(
    optimizer: Any,
    error: Callable[[], Tensor],
    scale: Callable[[Tensor], float | Tensor],
    factors: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """One step of the optimizer on scale * ε, with H and ε multiplied by `factors`; returns ε without its graph."""
    found: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = error()
        found.append(value.detach())
        of_jacobian, of_innovation = factors
        loss = scale(found[0]) * value
        (of_jacobian * loss).backward()
        return of_innovation * loss

    optimizer.step(closure)
    return found[0]
