"""What is measured on a frame, and in which order: Algorithm 1 of the paper, for any model of energies and forces.

A model is called as model(frame, forces=...) and returns an object with `energy` (B,) in eV and, when forces are
asked for, `forces` (n, 3) in eV/Å and, for virial updates, `virial` (B, 3, 3) in eV. A frame holds the labels under
the same names, and `num_atoms` (B,). The optimizer is an RLEKF, or anything with its `param_groups`, `flatten` and
`update`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlekf_ext.processes import Processes

KINDS = ("energy", "force", "virial")
BATCHES = ("mean", "sum", "joint")
EMA_DECAY = 0.95
EARLY_DECAY = 0.9987  # an update: as fast as 1 - λ falls with the forgetting rate of the paper


@dataclass(frozen=True)
class Measurement:
    """How a frame becomes updates of the filter, and the memory factor that goes with it. See PRESETS.

    `order` lists the updates of a frame and is gone through again until no force group is left: ("energy", "force")
    is an energy update before every group, ("force",) * 4 + ("energy",) one at the end. Virial updates are left out
    for frames without that label. With `adaptive_scale` a scale is divided by the running mean of ε of its kind.
    `batch` is what B frames make: "mean", one measurement whose ε and H are those of the mean error; "sum", as in
    DeePMD-kit's LKF, one whose H is summed over the frames and whose ε is √B times their mean; "joint", B measurements
    at one w, each with its own random groups of atoms, used one after another by the filter itself.

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
    return _update(optimizer, lambda: energy_error(model, frame), scale)


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
    return [_update(optimizer, lambda g=g: force_error(model, frame, g), scale) for g in groups]  # type: ignore[misc]


def virial_update(optimizer: Any, model: Callable[..., Any], frame: Any, scale: float | Tensor = 1.0) -> Tensor:
    """One virial update. Returns ε in eV/atom."""
    return _update(optimizer, lambda: virial_error(model, frame), scale)


class FrameUpdater:
    """All updates of a batch, one batch after another, as a Measurement says; holds random groups and running means.

    With a `process_group` of torch.distributed each process brings its own frames of the batch; ε and H are those of
    the whole batch, and every process makes the same updates.
    """

    def __init__(
        self,
        optimizer: Any,
        model: Callable[..., Any],
        measurement: Measurement,
        seed: int = 0,
        process_group: Any = None,
    ):
        self.optimizer, self.model, self.measurement = optimizer, model, measurement
        self._processes = Processes(process_group)
        self._generator = torch.Generator().manual_seed(seed)
        self._means: dict[str, Tensor] = {}
        self._early = torch.ones((), dtype=torch.float64)  # the part of early_scale - 1 that is left

    def __call__(self, batch: Any) -> list[tuple[str, Tensor]]:
        """Update on one batch: a frame, or a list of frames, none for a process that has no part in it. Each may hold
        several structures side by side; with "joint" each is a measurement. Returns the kind and the unscaled ε of
        every measurement, without waiting for the device."""
        m = self.measurement
        parts, whole = self._divide(batch if isinstance(batch, list) else [batch])
        kinds = [kind for kind in m.schedule(whole.num_groups) if kind != "virial" or whole.has_virial]
        groups = iter(range(whole.num_groups))
        updates = [(kind, next(groups) if kind == "force" else 0) for kind in kinds]
        passes = [[update] for update in updates] if m.relinearize else [updates]
        of_jacobian, of_innovation = m.batch_factors(whole.num_structures)
        done: list[tuple[str, Tensor]] = []
        for at_once in filter(None, passes):
            found = self._measured(at_once, parts, whole.num_rows)
            innovations, jacobians = [], []
            for (kind, _), rows in zip(at_once, found, strict=True):
                scale = self._scale(kind, rows[:, 0])
                innovations.append(of_innovation * scale * rows[:, 0])
                jacobians.append(of_jacobian * scale * rows[:, 1:])
                done += [(kind, error) for error in rows[:, 0].clone()]
            self.optimizer.update(torch.cat(innovations), torch.cat(jacobians))
        return done

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state(), "means": dict(self._means), "early": self._early.clone()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self._generator.set_state(saved["generator"])
        self._means = {kind: mean.clone() for kind, mean in saved["means"].items()}
        self._early = saved.get("early", torch.zeros_like(self._early)).clone()  # older runs had no early scale

    def _divide(self, frames: list[Any]) -> tuple[list[_Part], _Whole]:
        """What this process has of each measurement, and what all have together."""
        m, rank = self.measurement, self._processes.rank
        atoms = [len(frame.forces) for frame in frames]
        structures = [len(frame.num_atoms) for frame in frames]
        least = min(atoms, default=2**62)
        mine = [len(frames), sum(structures), sum(atoms), least, sum(frame.virial is None for frame in frames)]
        everyone = self._processes.gather(mine, _parameters(self.optimizer)[0].device)
        num_frames, num_structures, num_atoms, _, without_virial = (
            sum(column) for column in zip(*everyone, strict=True)
        )
        first_frame, first_atom = (sum(row[column] for row in everyone[:rank]) for column in (0, 2))
        if m.batch == "joint":
            seed = int(torch.randint(2**62, (), generator=self._generator))
            least = min(row[3] for row in everyone)
            num_groups = len(force_groups(least, m.group_size, m.num_groups, torch.Generator()))
            parts = []
            for row, (frame, n) in enumerate(zip(frames, atoms, strict=True), first_frame):
                own = force_groups(n, m.group_size, m.num_groups, torch.Generator().manual_seed(seed + row))
                parts.append(_Part(frame, row, 1.0, [(group, 1.0) for group in own]))
            return parts, _Whole(num_frames, num_structures, num_groups, not without_virial)
        groups = force_groups(num_atoms, m.group_size, m.num_groups, self._generator)
        parts = []
        for frame, n, count in zip(frames, atoms, structures, strict=True):
            own = [group[(group >= first_atom) & (group < first_atom + n)] - first_atom for group in groups]
            shares = [(some, len(some) / len(group)) for some, group in zip(own, groups, strict=True)]
            parts.append(_Part(frame, 0, count / num_structures, shares))
            first_atom += n
        return parts, _Whole(1, num_structures, len(groups), not without_virial)

    def _measured(self, updates: list[tuple[str, int]], parts: list[_Part], num_rows: int) -> Tensor:
        """ε and H of every measurement, (updates, rows, 1 + N) float64, all at the weights as they are."""
        parameters = _parameters(self.optimizer)
        size = 1 + sum(p.numel() for p in parameters)
        found = torch.zeros(len(updates), num_rows, size, dtype=torch.float64, device=parameters[0].device)
        for place, (kind, group) in enumerate(updates):
            for part in parts:
                share, error = part.error(self.model, kind, group)
                if share:
                    found[place, part.row] += share * _jacobian(self.optimizer, error)
        return self._processes.sum(found)

    def _scale(self, kind: str, errors: Tensor) -> float | Tensor:
        """What the measurements with these errors are multiplied by."""
        scale: float | Tensor = self.measurement.scale(kind)
        error = errors.mean()
        if self.measurement.early_scale != 1:
            left = self._early.to(error.device)
            scale = scale * (1 + (self.measurement.early_scale - 1) * left)
            self._early = torch.where(error.isfinite(), EARLY_DECAY ** len(errors) * left, left)
        if not self.measurement.adaptive_scale:
            return scale
        mean = self._means.get(kind, error).to(error)
        mean = torch.where(mean.isfinite(), mean, error)  # the very first ε may not have been finite
        mean = torch.where(error.isfinite(), EMA_DECAY * mean + (1 - EMA_DECAY) * error, mean)
        self._means[kind] = mean
        return scale / mean.clamp_min(torch.finfo(mean.dtype).tiny)


@dataclass(frozen=True)
class _Whole:
    """The batch of all processes."""

    num_rows: int  # measurements an update
    num_structures: int
    num_groups: int
    has_virial: bool


@dataclass(frozen=True)
class _Part:
    """A frame, the row of the measurement that it belongs to, and its share in it: of the mean over structures, and of
    each mean over a group of atoms."""

    frame: Any
    row: int
    share: float
    groups: list[tuple[Tensor, float]]

    def error(self, model: Callable[..., Any], kind: str, group: int) -> tuple[float, Callable[[], Tensor]]:
        if kind == "energy":
            return self.share, lambda: energy_error(model, self.frame)
        if kind == "virial":
            return self.share, lambda: virial_error(model, self.frame)
        atoms, share = self.groups[group]
        return share, lambda: force_error(model, self.frame, atoms)


def _parameters(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def _jacobian(optimizer: Any, error: Callable[[], Tensor]) -> Tensor:
    """(1 + N,) float64: ε, and H = -dε/dw in the order of the optimizer."""
    with torch.enable_grad():
        value = error()
        gradients = torch.autograd.grad(-value, _parameters(optimizer), allow_unused=True)
    return torch.cat([value.detach().to(torch.float64).reshape(1), optimizer.flatten(gradients)])


def _update(optimizer: Any, error: Callable[[], Tensor], scale: float | Tensor) -> Tensor:
    """One update with ε and H multiplied by `scale`; returns ε."""
    found = _jacobian(optimizer, error)
    optimizer.update(scale * found[0], scale * found[1:])
    return found[0]
