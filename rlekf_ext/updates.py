"""From frames to updates of the filter: Algorithm 1 of the paper, for any model of energies and forces.

A model is called as model(frame, forces=...) and returns an object with `energy` (B,) in eV and, when forces are
asked for, `forces` in eV/Å and, for virial updates, `virial` (B, 3, 3) in eV. batch_parts.py says what a frame is. A
model may have a method prepared(frame), as DeepPotential has; what that returns has measure(updates), which makes ε and
H without autograd, and `tensors`, `form` and `around(tensors)`, with which a CUDA graph measures one frame after
another. A frame may also have such a measure(updates) itself.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from rlekf_ext.batch_parts import Part, Whole, divide
from rlekf_ext.covariance import STATE
from rlekf_ext.environment import moved
from rlekf_ext.errors import DataError, OptionError, StoppedError
from rlekf_ext.graphs import CaptureError, Graphs
from rlekf_ext.optim import RLEKF, UPDATES_PER_GUARD
from rlekf_ext.options import KINDS, PRESETS, OptimizerOptions, Options, part, resolve, takes
from rlekf_ext.processes import Processes

EMA_DECAY = 0.95
EARLY_DECAY = Options.forgetting_rate  # per update: as fast as 1 - λ falls in the paper
BATCHES_PER_BALANCE = 16  # the variances of a batch's kinds of update cost up to two reads of P
PRIOR_FRAMES = 16  # the most frames whose energy gradients decide how P starts
LEARNED = 0.05  # Å: energies are learned once their mean error is at most this times that of forces
LEAST_VARIANCE = 1e-12  # in units of the squared mean error
LEAST_ERROR = 1e-6  # eV/atom or eV/Å: what a mean error below it says of the labels is rounding
CAUSES = {
    "skipped_innovation": "error not finite",
    "skipped_jacobian": "gradient not finite, or too large",
    "skipped_variance": "variance negative",
}


@takes(Options)
class FrameUpdater:
    """Trains a model of energies and forces: call it with one batch after another, and it makes all their updates.

        update = FrameUpdater(model, preset="robust", block_size=1024)
        update.warm_start(frames)
        for batch in batches:
            update(batch)
        trained = update.result

    `preset` and the options control everything, including memory factor, warm start and averaging. The optimizer,
    an RLEKF of model.named_parameters(), is made from them; a given `optimizer` must have been made with the same ones.
    `transpose`: see RLEKF. With a `process_group` of torch.distributed each process passes its own frames of a batch; ε
    and H are those of the whole batch, P is spread, and every process makes the same updates. `say` is called with
    occasional messages about the filter, one sentence each.

    Raises OptionError for an option that is unknown or out of range, or that the given optimizer was not made with.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        optimizer: RLEKF | None = None,
        *,
        transpose: bool = False,
        seed: int = 0,
        process_group: Any = None,
        say: Callable[[str], Any] = warnings.warn,
        **options: Any,
    ):
        self.model, self.options = model, resolve(options)
        if optimizer is None:
            settings = part(OptimizerOptions, self.options)
            named = model.named_parameters()  # type: ignore[attr-defined]
            optimizer = RLEKF(named, transpose=transpose, process_group=process_group, **settings)
        else:
            _check_made_with(optimizer, self.options, options)
        self.optimizer = optimizer
        # The model's own ε and H, if it has them and H is of the weights of the filter, in its order.
        own = getattr(model, "prepared", None)
        self._prepared = own if own and optimizer.has_all_reversed(model) else None  # type: ignore[arg-type]
        self._processes, self._say = Processes(process_group), say
        self._graphs = Graphs() if self._prepared and _uses_graphs(optimizer) and process_group is None else None
        self._generator = torch.Generator().manual_seed(seed)
        self._means: dict[str, float | Tensor] = {}
        self._early: float | Tensor = 1.0  # the part of early_scale - 1 that is left
        self._variances: dict[str, float | Tensor] = {}  # HᵀPH by kind, running geometric means, for `balance`
        self._unbalanced = 0  # batches since they were looked at
        self._health: dict[str, int] = {}  # as of the last look at it
        self._unguarded = 0  # updates since the last check of how P is stored
        self._started = not self.options.warm_start and self.options.prior == "identity"
        # Each update fits the current frame, and leaves the energies of the others off by a common amount whose sign
        # changes from frame to frame: the mean over a few frames cancels it.
        averaged = isinstance(model, nn.Module) and self.options.average_frames != 1
        self._average = AveragedModel(model) if averaged else None  # type: ignore[arg-type]
        self._averaged: list[list[Tensor]] = []  # the weights of the mean, and those of the model
        if self.options.average_frames != 1 and not averaged:
            raise OptionError(
                "average_frames must be 1 for a model that is not an nn.Module; average its weights outside."
            )

    @property
    def result(self) -> Any:
        """The model to evaluate and save; with `average_frames` above 1, the running mean of the weights."""
        return self._average.module if self._average else self.model

    def warm_start(self, frames: Iterable[Any], *, trained: bool = False) -> None:
        """What the options ask for before training: `warm_start` fits the model's energy bias to the energy residuals
        of its untrained network on these frames, by model.fit_energy_bias(frames, with_network=True); `prior` gives
        each layer its variance in P, from the gradients of the energies of some of them. A `trained` model keeps its
        energy bias. Every process of a group must call it. Raises OptionError for a model without fit_energy_bias or
        parameters without names. Weights, buffers and energy bias are then those of the first process."""
        frames = frames if isinstance(frames, Sequence) else list(frames)
        if self.options.warm_start and not trained:
            if not hasattr(self.model, "fit_energy_bias"):
                raise OptionError(
                    "warm_start needs a model with a method fit_energy_bias(frames, with_network=True), which this one "
                    "does not have: pass warm_start=False."
                )
            self.model.fit_energy_bias(frames, with_network=True)
        if isinstance(self.model, nn.Module):
            self._processes.agree([*self.model.parameters(), *self.model.buffers()])
        if self._average:
            _copy_buffers(self._average, self.model)
        if self.options.prior == "layers":
            parameters = self.optimizer.parameters()
            squares = torch.zeros(len(parameters), dtype=torch.float64, device=parameters[0].device)
            for frame in frames[:: -(-len(frames) // PRIOR_FRAMES) or 1]:
                for i, gradient in enumerate(self._energy_gradients(frame)):
                    squares[i] += 0 if gradient is None else gradient.double().square().sum()
            self.optimizer.start_by_layers(self._processes.sum(squares))
        self._started = True

    @torch.no_grad()
    def inherit(self, optimizer: dict[str, Any], updater: dict[str, Any]) -> str:
        """Instead of `warm_start`, for other data and a model with the weights of an earlier run: P and λ of that run,
        from what its RLEKF and its FrameUpdater have saved; P is inflated if the option `covariance` says so. Running
        means of errors start over, and other options are those of this run. Returns a sentence about P.

        Raises OptionError if `covariance` is "fresh", and ValueError for another number of weights.
        """
        if self.options.covariance == "fresh":
            raise OptionError(
                "With covariance fresh nothing of the earlier P is used: call warm_start(frames, trained=True)."
            )
        self.optimizer.check_order(optimizer)
        self.optimizer.filter.inherit(optimizer["state"][0])
        p, times = self.optimizer.filter.covariance, ""
        if self.options.covariance == "inflate":
            p.set(scale=p.scale * self.options.inflation)
            times = f" times {self.options.inflation:g}"
        self._load_average(updater["average"])
        if self._average:
            _copy_buffers(self._average, self.model)  # they may have statistics of new elements
        self._early, self._started = self._number(updater["early"]), True
        return f"P is that of the earlier run{times}; 1 - λ continues from {p.scalars().forgetting:.2g}."

    def __call__(self, batch: Any, factors: Mapping[str, float] | None = None) -> list[tuple[str, Tensor]]:
        """Update on one batch: a frame, or several, none for a process without any. A frame may hold several
        structures; with "joint" each frame is a measurement. `factors` multiply the scales of the kinds of update.
        Returns the kind and the unscaled ε () of every measurement, in eV/atom or eV/Å.

        Raises OptionError before a warm start that the options ask for, StoppedError if `max_skipped` measurements in a
        row were skipped, and DataError for a batch without any label that `order` names.
        """
        if not self._started:
            raise OptionError(
                "Call warm_start(frames) before the first batch, or pass warm_start=False and prior='identity'."
            )
        device = self.optimizer.parameters()[0].device
        frames = [batch] if hasattr(batch, "forces") else list(batch)
        parts, whole = divide(frames, self.options, self._processes, self._generator, device)
        unseen = set(whole.kinds) if self.options.balance and self._unbalanced == 0 else set()
        self._unbalanced = (self._unbalanced + 1) % BATCHES_PER_BALANCE
        found = None if self._graphs is None or factors else self._in_a_graph(self._graphs, parts, whole, unseen)
        if found is None:
            found = self._updates(parts, whole, unseen, factors or {}, self.optimizer.update)
        done = [(kind, one) for kind, errors in found[0] for one in errors.unbind()]
        if self._average:
            self._into_mean(self._average)
        self._look_after(len(done))
        return done

    def _updates(
        self,
        parts: Sequence[Part],
        whole: Whole,
        unseen: set[str],
        factors: Mapping[str, float],
        update: Callable[[Tensor, Tensor], None],
    ) -> tuple[list[tuple[str, Tensor]], list[Tensor]]:
        """All updates of a batch: the kind and ε (rows,) of each, and the scaled H (M, N) of each pass."""
        done, used = [], []
        for updates in self._passes(whole):
            errors, jacobians = self._measure(updates, parts, whole.num_rows)
            scaled, innovations = [], []
            for (kind, _), error, jacobian in zip(updates, errors, jacobians, strict=True):
                of_jacobian, of_innovation = self._scales(kind, error, whole, factors.get(kind, 1.0))
                if kind in unseen:
                    unseen.discard(kind)
                    self._see_variance(kind, of_jacobian * jacobian[0])
                share = self._share(kind)
                scaled.append(share * of_jacobian * jacobian)  # not in place: a frame may keep its H
                innovations.append(share * of_innovation * error)
                done.append((kind, error))
            alone = len(updates) == 1
            used.append(scaled[0] if alone else torch.cat(scaled))
            update(used[-1], innovations[0] if alone else torch.cat(innovations))
        return done, used

    def _in_a_graph(
        self, graphs: Graphs, parts: Sequence[Part], whole: Whole, unseen: set[str]
    ) -> tuple[list[tuple[str, Tensor]], list[Tensor]] | None:
        """The same from a CUDA graph; None if there are too many of them, or frames that are not prepared."""
        assert self._prepared is not None  # for mypy: there would be no graphs
        frames = [self._prepared(own.frame) for own in parts]
        if any(frame is None for frame in frames):
            return None
        tensors = [tensor for frame in frames for tensor in frame.tensors]
        places = graphs.placed([*tensors, *(group for own in parts for group, _ in own.groups)])
        if places is None:
            return None
        left = iter(places)
        frames = [frame.around([next(left) for _ in frame.tensors]) for frame in frames]
        shares = [[share for _, share in own.groups] for own in parts]
        again = [
            Part(frame, own.row, own.share, [(next(left), share) for share in each])
            for frame, own, each in zip(frames, parts, shares, strict=True)
        ]
        key = (
            tuple(place.data_ptr() for place in places),
            tuple(frame.form for frame in frames),
            tuple((own.row, own.share, *each) for own, each in zip(parts, shares, strict=True)),
            whole,
            frozenset(unseen),
            frozenset(self._means),
            frozenset(self._variances),
            self.optimizer.form(),
        )
        try:
            done, used = graphs.run(
                key, lambda: self._updates(again, whole, set(unseen), {}, self.optimizer.take), places[0].device
            )
        except CaptureError as error:
            self._graphs = None
            self._say(f"From now on without CUDA graphs, which is slower: {error}")
            return None
        for jacobian in used:
            self.optimizer.filter.note(jacobian)
        return [(kind, error.clone()) for kind, error in done], used

    @torch.no_grad()
    def _into_mean(self, average: AveragedModel) -> None:
        """An exponential mean of the weights, and the buffers as they are. AveragedModel's own waits for a GPU."""
        model: Any = self.model
        if not self._averaged:  # listed once, as in Table.weights_of
            self._averaged = [
                [p for p in some.parameters() if p.is_floating_point() or p.is_complex()]
                for some in (average.module, model)
            ]
        means, now = self._averaged
        if average.n_averaged:
            torch._foreach_lerp_(means, now, 1 / self.options.average_frames)
        else:
            torch._foreach_copy_(means, now)
        _copy_buffers(average, model)
        average.n_averaged += 1

    def skipped(self) -> str:
        """How many measurements the filter has skipped, by cause; "" if none. Waits for the device."""
        self._health = self.optimizer.health()
        return ", ".join(f"{text}: {self._health[name]}" for name, text in CAUSES.items() if self._health.get(name))

    def state_dict(self) -> dict[str, Any]:
        """What is needed to continue with the same bits, besides the state of `optimizer` and the weights."""
        return {
            "generator": self._generator.get_state(),
            "means": {kind: torch.as_tensor(mean, dtype=torch.float64) for kind, mean in self._means.items()},
            "early": torch.as_tensor(self._early, dtype=torch.float64),
            "unguarded": self._unguarded,
            "variances": {kind: torch.as_tensor(v, dtype=torch.float64) for kind, v in self._variances.items()},
            "unbalanced": self._unbalanced,
            "average": self._average.state_dict() if self._average else None,
            # For those who read P: what H of each kind was multiplied by at the end, but for `balance` and `batch`.
            "scales": {kind: torch.as_tensor(self._scale(kind), dtype=torch.float64) for kind in KINDS},
            "force_per_atom": self.options.force_per_atom,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue exactly where the saved updater was."""
        self._generator.set_state(saved["generator"].cpu())
        self._graphs = self._graphs and Graphs()  # the old ones have the numbers of before in their places
        self._means = {kind: self._number(mean) for kind, mean in saved["means"].items()}
        self._variances = {kind: self._number(variance) for kind, variance in saved.get("variances", {}).items()}
        self._early, self._unguarded, self._started = self._number(saved["early"]), saved["unguarded"], True
        self._unbalanced = saved.get("unbalanced", 0)
        self._load_average(saved["average"])

    def _number(self, saved: Tensor) -> float | Tensor:
        """A saved number, as it is kept here: a tensor only where a float would have to be waited for."""
        device = self.optimizer.parameters()[0].device
        return float(saved) if device.type == "cpu" else saved.to(device)

    def _load_average(self, saved: dict[str, Any] | None) -> None:
        if self._average and saved:
            self._average.load_state_dict(saved)
        elif self._average:  # the saved run had no mean: it starts from the current weights
            self._average.module.load_state_dict(self.model.state_dict())  # type: ignore[attr-defined]

    def _passes(self, whole: Whole) -> list[list[tuple[str, int]]]:
        """The updates of a batch as (kind, force group), in passes: those of one pass are taken at the same weights."""
        order = [kind for kind in self.options.order if kind in whole.kinds]
        if not order:
            raise DataError(
                f"A batch needs labels for some of {', '.join(dict.fromkeys(self.options.order))} but has none "
                "that all of its frames have; see the option order."
            )
        groups = iter(range(whole.num_groups))
        updates = [(kind, next(groups) if kind == "force" else 0) for kind in schedule(order, whole.num_groups)]
        return [[update] for update in updates] if self.options.relinearize else [updates]

    def _measure(
        self, updates: Sequence[tuple[str, int]], parts: Sequence[Part], num_rows: int
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Of each update ε (rows,) and H (rows, N), float64, all at the current weights."""
        wanted = [
            [(kind, *own.groups[group]) if kind == "force" else (kind, None, own.share) for kind, group in updates]
            for own in parts
        ]
        if num_rows == len(parts) == self._processes.size == 1:
            errors, jacobians = self._of_frame(parts[0].frame, [(kind, atoms) for kind, atoms, _ in wanted[0]])
            return errors.split(1), jacobians.split(1)
        count, num_weights = len(updates) * num_rows, self.optimizer.filter.plan.num_weights
        device = self.optimizer.filter.covariance.state.device
        message = torch.zeros(count * (num_weights + 1), dtype=torch.float64, device=device)
        errors = message[:count].view(len(updates), num_rows)
        jacobians = message[count:].view(len(updates), num_rows, num_weights)
        for own, each in zip(parts, wanted, strict=True):
            some = [i for i, (_, _, share) in enumerate(each) if share]
            found = self._of_frame(own.frame, [each[i][:2] for i in some]) if some else ((), ())
            for i, error, jacobian in zip(some, *found, strict=True):
                errors[i, own.row] += each[i][2] * error
                jacobians[i, own.row].add_(jacobian, alpha=each[i][2])
        self._processes.sum(message)
        return errors.clone().unbind(), jacobians.unbind()

    def _of_frame(self, frame: Any, updates: Sequence[tuple[str, Tensor | None]]) -> tuple[Tensor, Tensor]:
        """ε (U,) and H = -dε/dw (U, N) of updates at the current weights, each a kind and the atoms of its group."""
        measures = getattr(frame, "measure", None) is not None
        own = frame if measures else self._prepared(frame) if self._prepared else None
        if own is not None:
            return own.measure(updates)
        with torch.enable_grad():
            prediction = self.model(frame, forces=any(kind != "energy" for kind, _ in updates))
            found = [ERRORS[kind](prediction, frame, atoms) for kind, atoms in updates]
        parameters, several = self.optimizer.parameters(), len(updates) > 1
        gradients = [
            torch.autograd.grad(-error, parameters, allow_unused=True, retain_graph=several) for error in found
        ]
        jacobians = [self.optimizer.flatten(gradient) for gradient in gradients]
        return torch.stack([error.detach().double() for error in found]), torch.stack(jacobians)

    def _energy_gradients(self, frame: Any) -> tuple[Tensor | None, ...]:
        """Those of the mean energy per atom by each parameter."""
        with torch.enable_grad():
            energy = self.model(frame, forces=False).energy
            energy = (energy / beside(energy, frame.num_atoms)).mean()
        return torch.autograd.grad(energy, self.optimizer.parameters(), allow_unused=True)

    def _scales(self, kind: str, errors: Tensor, whole: Whole, factor: float) -> tuple[float | Tensor, float | Tensor]:
        """What H and ε of the measurements with these errors are multiplied by."""
        options = self.options
        scale: float | Tensor = getattr(options, f"{kind}_scale") * factor
        if kind == "force" and options.force_per_atom:
            scale = scale / whole.atoms_per_structure
        here = _numbers_of(errors)
        error: Any = here(errors.mean() if len(errors) > 1 else errors[0])
        finite = _is_finite(error)
        left = here(self._early)
        if options.early_scale != 1:
            scale = scale * (1 + (options.early_scale - 1) * left)
        self._early = _kept(left, _where(finite, EARLY_DECAY ** len(errors) * left, left))
        if options.adaptive_scale or options.balance:
            mean = here(self._means.get(kind, error))
            mean = _where(_is_finite(mean), mean, error)  # the very first ε may not have been finite
            mean = _where(finite, EMA_DECAY * mean + (1 - EMA_DECAY) * error, mean)
            self._means[kind] = _kept(self._means.get(kind), mean)
        if options.adaptive_scale:
            scale = scale / _divisor(mean)
        if options.batch == "sum":
            return scale * whole.num_structures, scale * math.sqrt(whole.num_structures)
        return scale, scale

    def _scale(self, kind: str) -> float | Tensor:
        """The scale of a kind of update by options and its mean error alone."""
        scale = getattr(self.options, f"{kind}_scale")
        mean = self._means.get(kind) if self.options.adaptive_scale else None
        return scale if mean is None else scale / _divisor(mean)

    def _see_variance(self, kind: str, jacobian: Tensor) -> None:
        """Take HᵀPH of a measurement into the running geometric mean of its kind; H (N,) as scaled without balance."""
        found = self.optimizer.filter.variance(jacobian)
        here = _numbers_of(found)
        new: Any = here(found)
        old: Any = here(self._variances.get(kind, math.nan))  # NaN: not known yet
        usable = _is_finite(new) & (new > LEAST_VARIANCE)  # it is 0 for the forces of an isolated atom
        seen = _where(usable, (new * _where(_is_finite(old), old, new)) ** 0.5, old)
        self._variances[kind] = _kept(self._variances.get(kind), seen)

    def _share(self, kind: str) -> float | Tensor:
        """What `balance` leaves of the scale of a kind, at most 1."""
        if kind == "force" or not self.options.balance or not {kind, "force"} <= self._variances.keys():
            return 1.0
        state = self.optimizer.filter.covariance.state
        noise: Any = _numbers_of(state)(state[STATE["measurement_noise"]])  # of P, which may not be that of the options
        bound = self.options.balance * (self._variances["force"] / noise) ** 2
        share = (bound * noise / self._variances[kind]) ** 0.5
        learned = self._means[kind] <= LEARNED * self._means["force"]
        return _where(learned & (share < 1), share, 1.0)  # 1 if a variance is not known

    def _look_after(self, updates: int) -> None:
        """After this many more updates: does the filter still use measurements, and is P still stored well enough?"""
        self._unguarded += updates
        guard = self._unguarded >= UPDATES_PER_GUARD
        if not guard and self.optimizer.filter.covariance.state.device.type != "cpu":
            return  # to ask would be to wait for the device
        self._health = self.optimizer.health()
        in_a_row = self._health["skipped_in_a_row"]
        if in_a_row >= self.options.max_skipped:
            of_p = set(CAUSES) & {name for name, count in self._health.items() if count} == {"skipped_variance"}
            advice = (
                "P has lost positive definiteness, as it may in float32: start again, with covariance_dtype float64"
                if of_p
                else "Look for labels that are not finite and for atoms that nearly coincide, or lower the scales, and "
                "restart from the checkpoint"
            )
            raise StoppedError(
                f"The last {in_a_row} measurements were all skipped, but max_skipped is {self.options.max_skipped}: "
                f"{self.skipped()}. {advice}."
            )
        if guard:
            self._unguarded = 0
            if sentence := self.optimizer.guard_storage():
                self._say(sentence)


def _is_finite(x: float | Tensor) -> Any:
    return x.isfinite() if isinstance(x, Tensor) else math.isfinite(x)


def _kept(place: Any, value: Any) -> Any:
    """The value, in the place of the tensor that it follows, so that a CUDA graph finds it there."""
    if not isinstance(value, Tensor):
        return value
    return place.copy_(value) if isinstance(place, Tensor) else value.clone()


def _uses_graphs(optimizer: RLEKF) -> bool:
    return (
        optimizer.filter.covariance.state.is_cuda
        and optimizer.filter.backend != "reference"  # which waits for the device
        and os.environ.get("RLEKF_CUDA_GRAPHS") != "0"
    )


def _where(condition: Any, yes: Any, no: Any) -> Any:
    return torch.where(condition, yes, no) if isinstance(condition, Tensor) else (yes if condition else no)


def _divisor(mean: Any) -> Any:
    """A mean error that a scale can be divided by: not below LEAST_ERROR."""
    return _where(mean < LEAST_ERROR, LEAST_ERROR, mean)


def schedule(order: Sequence[str], num_groups: int) -> list[str]:
    """The kinds of update of a batch that has this many force groups: `order`, repeated until no group is left."""
    kinds: list[str] = []
    left = num_groups if "force" in order else 0
    while True:
        for kind in order:
            if kind != "force" or left:
                kinds.append(kind)
                left -= kind == "force"
        if not left:
            return kinds


def _copy_buffers(average: AveragedModel, model: Any) -> None:
    for mean, buffer in zip(average.module.buffers(), model.buffers(), strict=True):
        mean.copy_(buffer)


def _numbers_of(tensor: Tensor) -> Callable[[Any], Any]:
    """What makes a number of one: on a CPU a float, as a few operations on tensors would take as long as a small
    network; elsewhere a tensor () beside this one, without waiting for it."""
    if tensor.is_cpu:
        return float
    return lambda x: x if isinstance(x, Tensor) else torch.full((), x, dtype=tensor.dtype, device=tensor.device)


def beside(prediction: Tensor, label: Tensor) -> Tensor:
    """The label, on the device of the prediction."""
    return moved(label, prediction.device)


def _label(name: str, prediction: Any, frame: Any) -> Tensor:
    """The label of this name, beside the prediction. Raises DataError for another shape, which might broadcast."""
    predicted, label = getattr(prediction, name), getattr(frame, name)
    if predicted.shape != label.shape:
        raise DataError(
            f"The model's {name} should have the shape of the label {tuple(label.shape)} but has "
            f"{tuple(predicted.shape)}: {name} are {SHAPES[name]}."
        )
    return beside(predicted, label)


def energy_error(prediction: Any, frame: Any, _: Any = None) -> Tensor:
    """mean |E - E_DFT| / atoms in eV/atom (Algorithm 2, line 6): its gradient is -H."""
    energy, num_atoms = _label("energy", prediction, frame), beside(prediction.energy, frame.num_atoms)
    return ((prediction.energy - energy).abs() / num_atoms).mean()


def force_error(prediction: Any, frame: Any, atoms: Tensor) -> Tensor:
    """mean |F - F_DFT| over the 3x components of these atoms, in eV/Å (Algorithm 2, line 6)."""
    return (prediction.forces[atoms] - _label("forces", prediction, frame)[atoms]).abs().mean()


def virial_error(prediction: Any, frame: Any, _: Any = None) -> Tensor:
    """mean |W - W_DFT| / atoms over the nine components, in eV/atom."""
    virial, num_atoms = _label("virial", prediction, frame), beside(prediction.virial, frame.num_atoms)
    return ((prediction.virial - virial).abs().mean((1, 2)) / num_atoms).mean()


SHAPES = {"energy": "(B,), one per structure", "forces": "(n, 3) or (n, B, 3)", "virial": "(B, 3, 3)"}
ERRORS: dict[str, Callable[..., Tensor]] = {"energy": energy_error, "force": force_error, "virial": virial_error}


def _check_made_with(optimizer: RLEKF, options: Options, given: Mapping[str, Any]) -> None:
    """Raises OptionError if the optimizer's options differ from those that the preset or the given options set."""
    named = {**PRESETS[options.preset], **given}
    if "block_size" not in given:  # the memory of P is the caller's choice
        named.pop("block_size", None)
    for name in (f.name for f in fields(OptimizerOptions) if f.name in named):
        wanted, found = getattr(options, name), getattr(optimizer.options, name)
        if found != wanted:
            raise OptionError(
                f"{name} must be {wanted}, for the preset {options.preset}, but the optimizer was made with {found}: "
                f"leave the optimizer out so that FrameUpdater makes one, or make it with {name}={wanted}."
            )
