"""What happens on a batch: the updates of RLEKF or LKF, or a step of Adam as DeePMD-kit takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from rlekf_ext import RLEKF
from rlekf_ext.potential.data import OneLineError
from rlekf_ext.potential.input import Config, InputError, Loss
from rlekf_ext.potential.model import DeepPotential
from rlekf_ext.potential.neighbors import Frame, collate
from rlekf_ext.processes import ALONE, Processes
from rlekf_ext.updates import PRESETS, FrameUpdater, Measurement

MAX_SKIPPED = 20  # measurements in a row: more are no accident
UPDATES_PER_GUARD = 250  # one look costs ten reads of P; in trials the last 500 updates before float32 fails are told


class StoppedError(OneLineError):
    """Training that cannot go on; the message is one sentence."""


def measurement_and_filter(options: dict[str, Any]) -> tuple[Measurement, dict[str, Any]]:
    """The preset that options name, changed by those that are the measurement's; the others as keywords of RLEKF."""
    rest = dict(options)
    measurement = PRESETS[rest.pop("preset", "robust")]
    changed = {name: rest.pop(name) for name in options if name in asdict(measurement)}
    measurement = replace(measurement, **changed)
    if rest.get("covariance_dtype", "auto") != "auto":
        rest["covariance_dtype"] = getattr(torch, rest["covariance_dtype"])
    return measurement, {"memory_factor": measurement.memory_factor, **rest}


class Watch:
    """What is looked after in a filter while it trains."""

    def __init__(self, optimizer: RLEKF, max_skipped: int):
        self._optimizer, self._max_skipped = optimizer, max_skipped
        self._health: dict[str, int] = {}  # as of the last call; to ask the filter waits for the device
        self._unguarded = 0  # updates since the last look at how S is stored

    def __call__(self, updates: int) -> None:
        """After so many more updates. Raises StoppedError when nothing but skipped measurements comes any more."""
        self._unguarded += updates
        self._health = self._optimizer.health()
        in_a_row = self._health["skipped_in_a_row"]
        if in_a_row >= self._max_skipped:
            raise StoppedError(
                f"The last {in_a_row} measurements were all skipped, as many as max_skipped = {self._max_skipped} "
                f"allows or more: {self.skipped()}. Look for labels that are not finite and for atoms that nearly "
                "coincide, or lower the scales, and restart from the checkpoint."
            )

    def skipped(self) -> str:
        """Measurements that the filter's guard had left out by the last call, by cause; "" when there are none."""
        causes = {
            "skipped_innovation": "error not finite",
            "skipped_jacobian": "gradient not finite, or too large",
            "skipped_variance": "variance negative",
        }
        return ", ".join(f"{text}: {self._health[name]}" for name, text in causes.items() if self._health.get(name))

    def remark(self) -> str | None:
        """What the filter has to say of its own numbers; looked at once in UPDATES_PER_GUARD updates."""
        if self._unguarded < UPDATES_PER_GUARD:
            return None
        self._unguarded = 0
        return self._optimizer.guard_storage()


class KalmanSteps:
    """RLEKF, or LKF in DeePMD-kit's form: the updates of a batch."""

    def __init__(
        self,
        config: Config,
        model: DeepPotential,
        training: Sequence[Frame],
        num_steps: int,
        fresh: bool,
        processes: Processes,
    ):
        options = dict(config.optimizer.options)
        self._lkf = {name: options.pop(name) for name in list(options) if name.startswith("kf_")}
        if config.optimizer.type == "LKF":
            options = {"preset": "paper", "strategy": "deepmd", "block_size": self._lkf.get("kf_blocksize", 5120)}
        max_skipped = options.pop("max_skipped", MAX_SKIPPED)
        measurement, settings = measurement_and_filter(options)
        if set(measurement.order) == {"virial"} and any(frame.virial is None for frame in training):
            raise InputError("optimizer/order asks for virial updates alone, but the training data have no virials.")
        if fresh and measurement.warm_start:
            model.fit_energy_bias(training, with_network=True)
        group = processes.group
        self.optimizer = RLEKF(model.named_parameters(), transpose=True, process_group=group, **settings)
        self._updater = FrameUpdater(self.optimizer, model, measurement, config.training.seed or 0, group)
        self._processes = processes
        self._num_steps, self._is_lkf = num_steps, config.optimizer.type == "LKF"
        self._watch = Watch(self.optimizer, max_skipped)
        # Each update fits the frame at hand, and leaves the energies of the others off by a common amount that changes
        # its sign from frame to frame: the mean over a few frames is without it.
        decay = 1 - 1 / measurement.average_frames
        self._model = model
        self._mean = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay else None

    def __call__(self, batch: Sequence[Frame], step: int) -> int:
        """All updates of one batch; returns how many."""
        if self._is_lkf:
            self._updater.measurement = self._as_deepmd(self._updater.measurement, batch, step)
        own = own_part(batch, self._processes)
        together = own and self._updater.measurement.batch != "joint"
        updates = len(self._updater([collate(own)] if together else own))
        if self._mean:
            self._mean.update_parameters(self._model)
        self._watch(updates)
        return updates

    def remarks(self) -> list[str]:
        """What the filter has to say from time to time, a sentence each."""
        return [sentence] if (sentence := self._watch.remark()) else []

    def _as_deepmd(self, measurement: Measurement, batch: Sequence[Frame], step: int) -> Measurement:
        """LKF's scales: prefactors that change geometrically, and forces divided by the number of atoms once more."""
        fraction = step / self._num_steps
        energy, force = (
            self._lkf.get(f"kf_start_pref_{kind}", 1.0) ** (1 - fraction)
            * self._lkf.get(f"kf_limit_pref_{kind}", 1.0) ** fraction
            for kind in "ef"
        )
        return replace(
            measurement,
            energy_scale=energy,
            force_scale=force * len(batch) / sum(len(frame.types) for frame in batch),
            group_size=6 * len(batch),
            batch="sum",
        )

    @property
    def result(self) -> DeepPotential:
        """The model to evaluate and save."""
        return self._mean.module if self._mean else self._model  # type: ignore[return-value]

    @property
    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def skipped(self) -> str:
        return self._watch.skipped()

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"filter": self.optimizer.state_dict(), "updater": self._updater.state_dict()}
        if self._mean:  # the checkpoint's own weights are those of `result`
            state |= {"weights": self._model.state_dict(), "num_averaged": self._mean.n_averaged}
        return state

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(saved["filter"])
        self._updater.load_state_dict(saved["updater"])
        if "weights" in saved:  # else the run had no mean, and the checkpoint's own weights are the filter's
            self._model.load_state_dict(saved["weights"])
        if self._mean and "num_averaged" in saved:
            self._mean.n_averaged.copy_(saved["num_averaged"])

    def __repr__(self) -> str:
        return repr(self.optimizer)


class AdamSteps:
    """Adam with DeePMD-kit's learning rate and loss: both decay exponentially, in steps."""

    def __init__(self, config: Config, model: DeepPotential, num_steps: int, processes: Processes):
        rate, options = config.learning_rate, dict(config.optimizer.options)
        betas = (options.get("beta1", 0.9), options.get("beta2", 0.999))
        decay = options.get("weight_decay", 0.0)
        self.optimizer = torch.optim.Adam(model.parameters(), rate.start_lr, betas, weight_decay=decay, fused=True)
        self._model, self._rate, self._loss, self._processes = model, rate, config.loss, processes
        # DeePMD-kit's rule where decay_steps is as long as the run.
        short = 100 if num_steps // 10 > 100 else num_steps // 100 + 1
        self._decay_steps = rate.decay_steps if rate.decay_steps < num_steps else short
        self._decay_rate = rate.decay_rate or (rate.stop_lr / rate.start_lr) ** (self._decay_steps / num_steps)

    def __call__(self, batch: Sequence[Frame], step: int) -> int:
        """One update on one batch."""
        rate = max(self._rate.start_lr * self._decay_rate ** (step // self._decay_steps), self._rate.stop_lr)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.zero_grad()
        if own := own_part(batch, self._processes):
            loss = mean_squared_loss(self._model, collate(own), prefactors(self._loss, rate / self._rate.start_lr))
            (len(own) / len(batch) * loss).backward()  # the frames of a batch are of one system
        for p in self._model.parameters():
            p.grad = self._processes.sum(torch.zeros_like(p) if p.grad is None else p.grad)
        self.optimizer.step()
        return 1

    @property
    def result(self) -> DeepPotential:
        return self._model

    @property
    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def remarks(self) -> list[str]:
        return []

    def skipped(self) -> str:
        return ""

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(saved)

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self._model.parameters())
        return f"Adam({count} weights, lr {self._rate.start_lr:g} to {self._rate.stop_lr:g})"


def build_optimizer(
    config: Config,
    model: DeepPotential,
    training: Sequence[Frame],
    num_steps: int,
    fresh: bool,
    processes: Processes = ALONE,
) -> KalmanSteps | AdamSteps:
    if config.optimizer.type == "Adam":
        return AdamSteps(config, model, num_steps, processes)
    return KalmanSteps(config, model, training, num_steps, fresh, processes)


def own_part(batch: Sequence[Frame], processes: Processes) -> list[Frame]:
    """The frames of a batch that this process measures; none where there are more processes than frames."""
    first, last = (place * len(batch) // processes.size for place in (processes.rank, processes.rank + 1))
    return list(batch[first:last])


def prefactors(loss: Loss, decayed: float) -> dict[str, float]:
    """DeePMD-kit's prefactors when the learning rate has decayed to this share of its start."""
    return {
        kind: getattr(loss, f"limit_pref_{kind}") * (1 - decayed) + getattr(loss, f"start_pref_{kind}") * decayed
        for kind in "efv"
    }


def mean_squared_loss(model: DeepPotential, batch: Frame, factor: dict[str, float]) -> Tensor:
    """DeePMD-kit's `ener` loss: mean squared errors, those of energy and virial divided by the number of atoms."""
    assert batch.energy is not None  # for mypy: training frames have labels
    assert batch.forces is not None
    prediction = model(batch)
    per_atom = 1 / float(batch.num_atoms.mean())
    loss = factor["e"] * per_atom * (prediction.energy - batch.energy).square().mean()
    loss = loss + factor["f"] * (prediction.forces - batch.forces).square().mean()
    if factor["v"] and batch.virial is not None:
        loss = loss + factor["v"] * per_atom * (prediction.virial - batch.virial).square().mean()
    return loss
