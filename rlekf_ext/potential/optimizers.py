"""What happens on a batch: the updates of RLEKF, or a step of Adam as DeePMD-kit takes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from rlekf_ext.errors import InputError
from rlekf_ext.potential.input import LKF, Adam, Config, Loss
from rlekf_ext.potential.model import DeepPotential
from rlekf_ext.potential.neighbors import Frame, collate
from rlekf_ext.processes import ALONE, Processes
from rlekf_ext.updates import FrameUpdater, beside

Say = Callable[[str], Any]


class KalmanSteps:
    """RLEKF, or LKF, which is RLEKF with the preset `lkf` and DeePMD-kit's prefactors: the updates of a batch."""

    saved_as = ("filter", "updater", "weights")  # what state_dict holds

    def __init__(self, config: Config, model: DeepPotential, num_steps: int, processes: Processes, say: Say):
        options = config.optimizer.options
        self._lkf = options if isinstance(options, LKF) else None
        chosen = self._lkf.options(config.loss.kinds()) if self._lkf else asdict(options)
        seed, group = config.training.seed or 0, processes.group
        self.updater = FrameUpdater(model, transpose=True, seed=seed, process_group=group, say=say, **chosen)
        self.optimizer = self.updater.optimizer
        self._model, self._num_steps, self._processes, self._say = model, num_steps, processes, say

    def start(self, training: Sequence[Frame]) -> None:
        """Before the first batch of a new run."""
        self.updater.warm_start(training)

    def inherit_weights(self, saved: dict[str, Any]) -> None:
        """First, in a run that begins with the model of an earlier one, whose optimizer was `saved`: the filter's own
        weights, of which the model's are the mean over a few batches, if P is to be kept."""
        if self._keeps(saved):
            with torch.no_grad():
                for name, p in self._model.named_parameters():
                    p.copy_(saved["weights"][name])

    def inherit(self, saved: dict[str, Any], training: Sequence[Frame]) -> None:
        """Then: P, or a fresh one."""
        if self._keeps(saved):
            self._say(self.updater.inherit(saved["filter"], saved["updater"]))
            return
        if "filter" not in saved:
            self._say("That checkpoint has no P (NAME.best.pt is the model alone): starting with a fresh one.")
        self.updater.warm_start(training, trained=True)

    def _keeps(self, saved: dict[str, Any]) -> bool:
        return "filter" in saved and self.updater.options.covariance != "fresh"

    def arranged(self, batch: Sequence[Frame]) -> list[Frame]:
        """What this process measures of a batch, as it is evaluated: one frame of several structures, or several."""
        own = own_part(batch, self._processes)
        return [collate(own)] if own and self.updater.options.batch != "joint" else own

    def __call__(self, batch: Sequence[Frame], step: int, frames: list[Frame] | None = None) -> int:
        """All updates of one batch; returns how many. `frames` are what `arranged` has made of it, if it has."""
        factors = self._lkf.prefactors(step / self._num_steps) if self._lkf else None
        return len(self.updater(self.arranged(batch) if frames is None else frames, factors))

    @property
    def result(self) -> DeepPotential:
        """The model to evaluate and save."""
        return self.updater.result

    @property
    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def skipped(self) -> str:
        return self.updater.skipped()

    def state_dict(self) -> dict[str, Any]:
        # The checkpoint's own weights are those of `result`.
        own = {"filter": self.optimizer.state_dict(), "updater": self.updater.state_dict()}
        return {**own, "weights": self._model.state_dict()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self._model.load_state_dict(saved["weights"])
        try:
            self.optimizer.load_state_dict(saved["filter"])
        except ValueError as error:
            name = "kf_blocksize" if self._lkf else "block_size, strategy, max_pending or covariance_dtype"
            raise InputError(
                f"The P of the checkpoint was made with another {name} than the input file asks for ({error}): "
                "restore it there, or begin a new run with the model and P of the checkpoint (--init-model)."
            ) from error
        now = self.optimizer.filter.covariance.scalars().forgetting
        self._say(f"λ continues from the checkpoint's {now:.6g}; memory_factor only sets the first value of a new run.")
        for name, (kept, asked) in self.optimizer.filter.differing_constants().items():
            self._say(f"{name} stays {kept:g}, as the checkpoint has it; the input file asks for {asked:g}.")
        self.updater.load_state_dict(saved["updater"])

    def __repr__(self) -> str:
        return f"LKF by {self.optimizer!r}" if self._lkf else repr(self.optimizer)


class AdamSteps:
    """Adam with DeePMD-kit's learning rate and loss: both decay exponentially, in steps."""

    saved_as = ("state", "param_groups")

    def __init__(self, config: Config, model: DeepPotential, num_steps: int, processes: Processes):
        rate, options = config.learning_rate, config.optimizer.options
        assert isinstance(options, Adam)  # for mypy
        self._options: dict[str, Any] = {"betas": (options.beta1, options.beta2), "weight_decay": options.weight_decay}
        self.optimizer = torch.optim.Adam(model.parameters(), rate.start_lr, fused=True, **self._options)
        self._model, self._rate, self._loss, self._processes = model, rate, config.loss, processes
        # DeePMD-kit's rule where decay_steps is as long as the run.
        short = 100 if num_steps // 10 > 100 else num_steps // 100 + 1
        self._decay_steps = rate.decay_steps if rate.decay_steps < num_steps else short
        self._decay_rate = rate.decay_rate or (rate.stop_lr / rate.start_lr) ** (self._decay_steps / num_steps)

    def start(self, training: Sequence[Frame]) -> None:
        """Nothing needs to be done before the first batch."""

    def inherit_weights(self, saved: dict[str, Any]) -> None:
        """Nothing is taken over of an earlier run but its model."""

    def inherit(self, saved: dict[str, Any], training: Sequence[Frame]) -> None:
        """The same."""

    def arranged(self, batch: Sequence[Frame]) -> list[Frame]:
        """What this process evaluates of a batch: one frame of several structures, or none."""
        own = own_part(batch, self._processes)
        return [collate(own)] if own else []

    def __call__(self, batch: Sequence[Frame], step: int, frames: list[Frame] | None = None) -> int:
        """One update on one batch. `frames` are what `arranged` has made of it, if it has."""
        rate = max(self._rate.start_lr * self._decay_rate ** (step // self._decay_steps), self._rate.stop_lr)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.zero_grad()
        for own in self.arranged(batch) if frames is None else frames:
            loss = mean_squared_loss(self._model, own, prefactors(self._loss, rate / self._rate.start_lr))
            if loss.requires_grad:  # else the batch has no label that counts
                (len(own.num_atoms) / len(batch) * loss).backward()  # the frames of a batch are of one system
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

    def skipped(self) -> str:
        return ""

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(saved)
        self.optimizer.param_groups[0].update(self._options)  # those of the input file

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self._model.parameters())
        return f"Adam({count} weights, lr {self._rate.start_lr:g} to {self._rate.stop_lr:g})"


def build_optimizer(
    config: Config, model: DeepPotential, num_steps: int, processes: Processes = ALONE, say: Say = print
) -> KalmanSteps | AdamSteps:
    """The optimizer that the input file names; `say` is called with what it has to say."""
    if config.optimizer.type == "Adam":
        return AdamSteps(config, model, num_steps, processes)
    return KalmanSteps(config, model, num_steps, processes, say)


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
    """DeePMD-kit's `ener` loss: mean squared errors, those of energy and virial divided by the number of atoms; labels
    that the batch does not have add nothing."""
    prediction = model(batch)
    per_atom = 1 / float(batch.num_atoms.mean())
    terms = (
        (factor["e"] * per_atom, prediction.energy, batch.energy),
        (factor["f"], prediction.forces, batch.forces),
        (factor["v"] * per_atom, prediction.virial, batch.virial),
    )
    loss = prediction.energy.new_zeros(())
    for weight, predicted, label in terms:
        if weight and label is not None:
            loss = loss + weight * (predicted - beside(predicted, label)).square().mean()
    return loss
