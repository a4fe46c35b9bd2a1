"""RLEKF inside DeePMD-kit: `"optimizer": {"type": "RLEKF"}` in the input of an unmodified `dp --pt train`.

1. `register` runs when DeePMD-kit loads its plugins. It gives the options to the argument checker, and wraps the
   checker's `normalize`.
2. An input that asks for RLEKF, once checked, makes `_install` put two names into the trainer's module: a Trainer that
   is the old one for every other input, and an update wrapper that is the old one for every other optimizer.
3. That Trainer tells the old one that the type is LKF, which makes it call the optimizer and the wrapper in the way
   that LKF needs, and hands it ours for both.

So a run that does not ask for RLEKF runs DeePMD-kit's own code alone.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from types import ModuleType, SimpleNamespace
from typing import Any, get_args, get_origin, get_type_hints

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from rlekf_ext.covariance import from_lkf
from rlekf_ext.optim import RLEKF
from rlekf_ext.potential.input import RLEKFKeys
from rlekf_ext.potential.optimizers import MAX_SKIPPED, StoppedError, Watch, measurement_and_filter
from rlekf_ext.processes import Processes
from rlekf_ext.updates import KINDS, FrameUpdater, Measurement

KNOWN = ("3.2",)  # versions of DeePMD-kit that this was written for and is tested with: make test-deepmd
log = logging.getLogger("deepmd.rlekf_ext")
log.addFilter(lambda _: Processes(_group()).rank == 0)

HELP = {
    "block_size": "N_b, the most weights in a block of P; memory and time grow with it. LKF's `kf_blocksize`. Default: "
    "5120.",
    "strategy": "How weights are cut into blocks: `rlekf`, `deepmd` (the blocks of LKF), `lekf`, `sekf` or `gekf`. "
    "Default: `rlekf`, with the preset `lkf`: `deepmd`.",
    "memory_factor": "λ at the first update; it goes to 1. Default: 0.998 (`robust`) or 0.98 (`paper`, `lkf`).",
    "forgetting_rate": "ν in λ <- ν λ + 1 - ν. Default: 0.9987.",
    "initial_covariance": "P starts as this times the identity. Default: 1.",
    "measurement_noise": "The noise of a measurement. Default: the number of blocks.",
    "process_noise": "q, added to the diagonal of P after every update. Default: 0.",
    "process_noise_decay": "q is multiplied by this after every update. Default: 1.",
    "least_process_noise": "q does not go below this. Default: 0.",
    "diagonal_ceiling": "Bound of the diagonal entries of P. Default: none.",
    "least_excitation": "An update whose HᵀPH is below this times the measurement noise forgets nothing. Default: 0.",
    "covariance_dtype": "`float64`, `float32` (half the memory) or `auto`: float32 until it is too coarse. Default: "
    "`float64`.",
    "max_skipped": f"Training stops after so many measurements in a row that were not finite. Default: {MAX_SKIPPED}.",
    "preset": "Defaults of the options below: `robust`, `paper` or `lkf`, the scales of DeePMD-kit's LKF. Default: "
    "`robust`.",
    "group_size": "Atoms (of each frame of the batch) in a force update; null: all atoms, in `num_groups` parts.",
    "num_groups": "Force updates a batch, over disjoint random groups of atoms, seeded by training/seed.",
    "order": "The updates of a batch: a list of `energy`, `force` and `virial`, gone through until no force group is "
    "left. By default virial updates stand before those of the energy where virials are read from the data.",
    "energy_scale": "Multiplies H and ε of energy updates.",
    "force_scale": "Multiplies H and ε of force updates.",
    "virial_scale": "Multiplies H and ε of virial updates.",
    "adaptive_scale": "Whether scales are divided by the running mean of ε of their kind.",
    "early_scale": "Multiplies all scales at the first update, and goes to 1 by 0.13 % an update.",
    "relinearize": "Whether the model is evaluated anew before each update of a batch.",
    "batch": "How frames, of all processes, make one measurement: `mean`, or `sum` (H summed, ε times √B), "
    "as in LKF; or `joint`: one of each process. Default: `mean`, with the preset `lkf`: `sum`.",
    "warm_start": "Whether the energy bias is fitted to the untrained network first.",
}
LKF_TYPE = {"type": "LKF"} | {f"kf_{end}_pref_{kind}": 1.0 for end in ("start", "limit") for kind in "ef"}


def register() -> None:
    """Make the type RLEKF known to DeePMD-kit. Raises RuntimeError where DeePMD-kit is not one that this knows."""
    import deepmd

    version = str(getattr(deepmd, "__version__", "of unknown version"))
    if not version.startswith(tuple(f"{known}." for known in KNOWN)):
        raise RuntimeError(f"rlekf_ext knows DeePMD-kit {', '.join(KNOWN)} but this is {version}")
    argcheck: Any = importlib.import_module("deepmd.utils.argcheck")
    normalize = argcheck.normalize

    def normalize_and_install(data: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        config = normalize(data, *args, **kwargs)
        if Settings.of(config):
            _install()
        return config

    argcheck.opt_args_plugin.register("RLEKF", doc="(Supported Backend: PyTorch; of the package rlekf_ext) ")(
        lambda: arguments(argcheck.Argument)
    )
    argcheck.normalize = normalize_and_install


def arguments(make: Callable[..., Any]) -> list[Any]:
    """The options of the type RLEKF for the argument checker; `make` is its class Argument."""
    kinds, rules = get_type_hints(RLEKFKeys), {field.name: field.metadata for field in fields(RLEKFKeys)}
    return [
        make(name, _kinds(kinds[name]), optional=True, doc=text, **_check(rules[name], name))
        for name, text in HELP.items()
    ]


def _kinds(hint: Any) -> Any:
    if get_origin(hint) is tuple:
        return list
    parts = get_args(hint) or (hint,)
    return [*parts, int] if float in parts else list(parts)


def _check(rule: Mapping[str, Any], name: str) -> dict[str, Any]:
    choices = (*rule["choices"], "lkf") if name == "preset" else rule.get("choices")
    low, above, high = rule.get("low", -math.inf), rule.get("above", -math.inf), rule.get("high", math.inf)

    def holds(value: Any) -> bool:
        if choices:
            return all(item in choices for item in (value if isinstance(value, list) else [value]))
        return value is None or isinstance(value, bool) or (low <= value <= high and value > above)

    says = [f"one of {', '.join(choices)}"] if choices else []
    says += [
        f"{word} {rule[key]}"
        for key, word in (("low", "at least"), ("above", "above"), ("high", "at most"))
        if key in rule
    ]
    return {"extra_check": holds, "extra_check_errmsg": f"should be {' and '.join(says)}"} if says else {}


@dataclass(frozen=True)
class Settings:
    """What an input asks of RLEKF."""

    measurement: Measurement
    filter: dict[str, Any]
    seed: int
    max_skipped: int
    like_lkf: bool  # forces divided by the number of atoms once more
    prefactors: dict[str, float]  # kf_start_pref_e, ..., of type LKF
    orders_virial: bool

    @classmethod
    def of(cls, config: dict[str, Any]) -> Settings | None:
        """None for an input that does not ask for RLEKF."""
        options = dict(config.get("optimizer") or {})
        kind = options.pop("type", "Adam")
        prefactors: dict[str, float] = {}
        if kind == "LKF" and os.environ.get("RLEKF_DEEPMD") == "LKF":
            prefactors = {name: value for name, value in options.items() if name.startswith("kf_") and "pref" in name}
            options = {"preset": "lkf", "block_size": options.get("kf_blocksize", 5120)}
        elif kind != "RLEKF":
            return None
        max_skipped = options.pop("max_skipped", MAX_SKIPPED)
        like_lkf, orders_virial = options.get("preset") == "lkf", "order" in options
        if like_lkf:
            options = {"strategy": "deepmd", "batch": "sum", **options, "preset": "paper"}
        measurement, settings = measurement_and_filter(options)
        return cls(
            replace(measurement, order=tuple(measurement.order)),
            filter=settings,
            seed=config["training"].get("seed") or 0,
            max_skipped=max_skipped,
            like_lkf=like_lkf,
            prefactors=prefactors,
            orders_virial=orders_virial,
        )

    def as_lkf(self) -> dict[str, Any]:
        """The section `optimizer` that makes DeePMD-kit's trainer go LKF's way."""
        return {**LKF_TYPE, **self.prefactors, "kf_blocksize": self.filter.get("block_size", 5120)}


class DeepmdRLEKF(RLEKF):
    """RLEKF as DeePMD-kit's trainer makes and saves it; holds what must outlast a batch.

    Every process of torchrun has all of it, since DeePMD-kit has rank 0 alone save, and makes the same updates.
    """

    def __init__(self, params: Iterable[Tensor], settings: Settings):
        super().__init__(_named(params), transpose=True, **settings.filter)
        self.settings = settings
        self.labels: dict[str, Any] = {}  # of the batch at hand
        model, group = lambda frame, forces: frame.predict(), _group()
        self.updater = FrameUpdater(self, model, settings.measurement, settings.seed, group)
        self._processes = Processes(group)
        self._watch, self._said = Watch(self, settings.max_skipped), ""
        dense = sum(8 * size**2 for size in self.filter.plan.sizes)
        log.info("%r; dense in float64, as in LKF, P would take %.1f MB.", self, dense / 1e6)

    def update_on(self, frame: Any, factors: dict[str, float]) -> None:
        """All updates of a batch, with this process's part of it; `factors` multiply the scales of the kinds of update.

        Raises StoppedError when `max_skipped` measurements in a row had to be skipped.
        """
        base, processes = self.settings.measurement, self._processes
        mine = [*(kind in frame.kinds for kind in KINDS), frame.atoms]
        *labelled, atoms = zip(*processes.gather(mine, self.param_groups[0]["params"][0].device), strict=True)
        kinds = self._order({kind for kind, everywhere in zip(KINDS, labelled, strict=True) if all(everywhere)})
        changed: dict[str, Any] = {f"{kind}_scale": base.scale(kind) * factor for kind, factor in factors.items()}
        if self.settings.like_lkf:
            changed["force_scale"] /= sum(atoms) / processes.size
        if base.group_size and base.batch != "joint":  # groups are drawn from the atoms of all processes
            changed["group_size"] = base.group_size * processes.size
        self.updater.measurement = replace(base, order=kinds, **changed)
        self._watch(len(self.updater(frame)))
        if (skipped := self._watch.skipped()) != self._said:
            self._said = skipped
            log.warning("RLEKF has skipped measurements so far: %s.", skipped)
        if sentence := self._watch.remark():
            log.warning("RLEKF: %s", sentence)

    def _order(self, labelled: set[str]) -> tuple[str, ...]:
        order = list(self.settings.measurement.order)
        if not self.settings.orders_virial:
            order.insert(order.index("energy"), "virial")
        kinds = tuple(kind for kind in order if kind in labelled)
        if not kinds:
            raise StoppedError(f"The data should have labels for some of {', '.join(order)} but have none; see order.")
        return kinds

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "updater": self.updater.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a run stopped: RLEKF's, or LKF's, whose P and λ are taken over."""
        if "P" in state_dict["state"].get(0, {}):
            saved = from_lkf(state_dict)
            p = self.filter.covariance
            self.filter.covariance = saved.reblock(p.plan, dtype=p.tiles.dtype, device=p.tiles.device)
            log.info("P and its memory factor come from LKF's checkpoint.")
            return
        if "updater" not in state_dict:
            raise ValueError(
                "The checkpoint should be of an optimizer of type RLEKF or LKF but is of another; begin with "
                "--init-model, which takes its weights alone, in place of --restart."
            )
        super().load_state_dict(state_dict)
        updater = state_dict["updater"]
        self.updater.load_state_dict({**updater, "generator": updater["generator"].cpu()})


def _named(params: Iterable[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Names by layer, for the strategy lekf: the trainer gives none, but in each layer the matrix comes first."""
    layer = 0
    for i, p in enumerate(params):
        layer += p.dim() > 1
        yield f"layer{layer}.{i}", p


class Updates:
    """KFOptimizerWrapper's two calls a batch. The updates are all made in the second, which has all labels."""

    def __init__(self, wrapper: torch.nn.Module, optimizer: DeepmdRLEKF, *_: Any):
        # Gradients are taken without DDP's sums over the processes.
        self._wrapper = wrapper.module if isinstance(wrapper, DistributedDataParallel) else wrapper
        self._optimizer = optimizer
        self._energy_factor = 1.0

    def update_energy(self, inputs: dict[str, Any], label: Tensor, update_prefactor: float = 1.0) -> None:
        self._energy_factor = update_prefactor

    def update_force(
        self, inputs: dict[str, Any], label: Tensor, update_prefactor: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """All updates of the batch. Returns energy (B, 1) and forces (B, n, 3) as last predicted."""
        frame = self._frame(inputs)
        self._optimizer.update_on(frame, {"energy": self._energy_factor, "force": update_prefactor})
        if frame.last is None:  # all force groups were drawn from the atoms of other processes
            frame.predict()
        return frame.last["energy"], frame.last["force"]

    def _frame(self, inputs: dict[str, Any]) -> Any:
        """The batch in the form of `measurement`: a force group is the same atoms of every frame."""
        labels = self._optimizer.labels
        num_atoms = (inputs["atype"] >= 0).sum(-1)  # -1 fills up batches of mixed systems

        shapes = {"energy": (1,), "force": (-1, 3), "virial": (3, 3)}
        kinds = {name for name in shapes if name in labels and float(labels.get(f"find_{name}", 1.0)) > 0}
        found = {name: labels[name].reshape(len(num_atoms), *shapes[name]) for name in kinds}
        frame = SimpleNamespace(
            kinds=kinds,
            energy=found["energy"][:, 0] if "energy" in kinds else None,
            forces=found["force"].transpose(0, 1) if "force" in kinds else torch.empty(0),
            virial=found.get("virial"),
            num_atoms=num_atoms,
            atoms=inputs["atype"].shape[-1],
            last=None,
        )
        frame.predict = lambda: self._predict(frame, inputs)
        return frame

    def _predict(self, frame: Any, inputs: dict[str, Any]) -> Any:
        predicted, _, _ = self._wrapper(**inputs, skip_loss=True)
        frame.last = {name: predicted[name].detach() for name in ("energy", "force")}
        return SimpleNamespace(
            energy=predicted["energy"].reshape(-1),
            forces=predicted["force"].transpose(0, 1),
            virial=predicted["virial"].reshape(-1, 3, 3) if "virial" in predicted else None,
        )


def _install() -> None:
    """Put our Trainer and update wrapper into the trainer's module; when that is not as known, say so and leave it."""
    training: Any = importlib.import_module("deepmd.pt.train.training")
    if hasattr(training, "rlekf_ext_installed"):
        return
    names = ("LKFOptimizer", "KFOptimizerWrapper", "EnergyStdLoss", "Trainer")
    missing = [name for name in names if not hasattr(training, name)]
    trainer = getattr(training, "Trainer", object)
    missing += [name for name in ("_next_training_batch", "run") if not hasattr(trainer, name)]
    if not missing and not {"config", "restart_model"} <= set(inspect.signature(trainer).parameters):
        missing = ["Trainer(config, restart_model)"]
    if missing:
        log.warning("rlekf_ext: DeePMD-kit's trainer has no %s: type RLEKF is not there.", ", ".join(missing))
        return
    original = training.KFOptimizerWrapper

    def wrapper(model: Any, optimizer: Any, *args: Any) -> Any:
        return (Updates if isinstance(optimizer, DeepmdRLEKF) else original)(model, optimizer, *args)

    training.KFOptimizerWrapper = wrapper
    training.Trainer = _trainer(training)
    training.rlekf_ext_installed = True


def _trainer(training: ModuleType) -> type:
    base: Any = training.Trainer

    class Trainer(base):
        """DeePMD-kit's Trainer, which for inputs that ask for it trains with RLEKF."""

        def __init__(self, config: dict[str, Any], *args: Any, **kwargs: Any):
            settings = Settings.of(config)
            if settings is None:
                super().__init__(config, *args, **kwargs)
                return
            _check_supported(config)
            with _replaced(training, "LKFOptimizer", lambda params, *_: DeepmdRLEKF(params, settings)):
                super().__init__({**config, "optimizer": settings.as_lkf()}, *args, **kwargs)
            if not isinstance(self.loss, training.EnergyStdLoss):
                raise ValueError(
                    f"Optimizer type RLEKF needs a loss of type ener but has {type(self.loss).__name__}; use Adam."
                )
            given = inspect.signature(base.__init__).bind(self, config, *args, **kwargs).arguments
            if given.get("restart_model"):
                saved = torch.load(given["restart_model"], map_location="cpu", weights_only=True)
                self.optimizer.load_state_dict(saved["optimizer"])
            elif settings.measurement.warm_start:
                processes = Processes(_group())
                if processes.rank == 0:
                    self.model.change_out_bias(self.get_sample_func, bias_adjust_mode="change-by-statistic")
                processes.agree(self.model.buffers())

        def _next_training_batch(self, *args: Any, **kwargs: Any) -> Any:
            batch = super()._next_training_batch(*args, **kwargs)
            if isinstance(self.optimizer, DeepmdRLEKF):
                self.optimizer.labels = batch[1]  # LKF's calls hand over no virials
            return batch

    return Trainer


@contextmanager
def _replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _check_supported(config: dict[str, Any]) -> None:
    if "model_dict" in config["model"]:
        raise ValueError("Optimizer type RLEKF trains one model but the input has model_dict; use Adam for several.")


def _group() -> dist.ProcessGroup | None:
    """All processes of torchrun, or None where this one is alone."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if several else None
