"""RLEKF in DeePMD-kit's own trainers, which are not modified on disk. All private names of DeePMD-kit are in this file.

1. `register` runs when DeePMD-kit loads its plugins. It gives the options to the argument checker, and wraps the
   checker's `normalize`.
2. When a checked input asks for RLEKF, `_install` replaces `Trainer` in the modules of those trainers that are loaded,
   by a subclass that does what the original does for any other optimizer.
3. In `pt`, it passes the type LKF to the original, so that it makes and calls the optimizer as for LKF, and gives it
   ours. In `pt_expt`, which has no LKF, it makes the optimizer and the step of training itself.

So a run that does not ask for RLEKF runs only DeePMD-kit's own code.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from rlekf_ext.errors import OptionError
from rlekf_ext.integrations.deepmd.optimizer import NETWORKS, DeepmdRLEKF, Settings, Updates, group, log
from rlekf_ext.options import NOT_IN_DP, Options, help_text
from rlekf_ext.processes import Processes
from rlekf_ext.schema import range_text, values
from rlekf_ext.updates import PRIOR_FRAMES

PT_NAMES = {"w": "matrix", "b": "bias"}  # of what pt_expt calls so
KNOWN = ("3.2",)  # versions of DeePMD-kit that this was written for and is tested with: make test-deepmd


def register() -> None:
    """Make the type RLEKF known to DeePMD-kit. Raises RuntimeError for an unknown version of it."""
    import deepmd

    version = str(getattr(deepmd, "__version__", "of unknown version"))
    if not version.startswith(tuple(f"{known}." for known in KNOWN)):
        raise RuntimeError(f"rlekf_ext supports DeePMD-kit {', '.join(KNOWN)} but this is {version}")
    argcheck: Any = importlib.import_module("deepmd.utils.argcheck")
    if hasattr(argcheck, "rlekf_ext_registered"):  # by the entry point of another trainer
        return
    argcheck.rlekf_ext_registered = True
    normalize = argcheck.normalize

    def normalize_and_install(data: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        config = normalize(data, *args, **kwargs)
        if Settings.of(config):
            _install()
        return config

    argcheck.opt_args_plugin.register("RLEKF", doc="(Supported Backend: PyTorch; of the package rlekf_ext) ")(
        lambda: arguments(argcheck.Argument)
    )
    for name, module in list(sys.modules.items()):  # some have already imported it
        if name.startswith("deepmd.") and getattr(module, "normalize", None) is normalize:
            module.normalize = normalize_and_install  # type: ignore[attr-defined]


def arguments(make: Callable[..., Any]) -> list[Any]:
    """The options of the type RLEKF for the argument checker; `make` is its class Argument."""
    kinds = get_type_hints(Options)
    network = make(
        "network",
        [str],
        optional=True,
        doc="Whose network makes the errors and their derivatives: that of rlekf_ext on dp's weights, if it can "
        "(auto), or dp's. Default: auto; with preset lkf, dp.",
        extra_check=lambda value: value in NETWORKS,
        extra_check_errmsg=f"must be one of {', '.join(NETWORKS)}",
    )
    return [network] + [
        make(f.name, _kinds(kinds[f.name]), optional=True, doc=help_text(f.name), **_check(f.name, f.metadata))
        for f in fields(Options)
        if f.name not in NOT_IN_DP
    ]


def _kinds(hint: Any) -> Any:
    if get_origin(hint) is tuple:
        return list
    parts = get_args(hint) or (hint,)
    return [*parts, int] if float in parts else list(parts)


def _check(name: str, rule: Any) -> dict[str, Any]:
    def holds(value: Any) -> bool:
        try:
            values(Options, {name: value})
        except OptionError:
            return False
        return True

    text = range_text(rule)
    if not text:
        return {}
    return {"extra_check": holds, "extra_check_errmsg": f"must be {'one of ' if rule.get('choices') else ''}{text}"}


def _install() -> None:
    """Put our Trainer into the trainers' modules; one that is not as expected stays as it is, with a warning."""
    for name, (needed, of_trainer, arguments_needed, make) in TRAINERS.items():
        if name not in sys.modules:
            continue  # another backend of dp runs
        module: Any = importlib.import_module(name)
        if hasattr(module, "rlekf_ext_installed"):
            continue
        trainer = getattr(module, "Trainer", object)
        missing = [name for name in ("Trainer", *needed) if not hasattr(module, name)]
        missing += [name for name in of_trainer if not hasattr(trainer, name)]
        if not missing and not arguments_needed <= set(inspect.signature(trainer).parameters):
            missing = [f"Trainer({', '.join(sorted(arguments_needed))})"]
        if missing:
            log.warning("rlekf_ext: %s has no %s: type RLEKF is not available there.", name, ", ".join(missing))
            continue
        module.Trainer = make(module)
        module.rlekf_ext_installed = True


def _pt_trainer(training: Any) -> type:
    base: Any = training.Trainer
    original = training.KFOptimizerWrapper

    def wrapper(model: Any, optimizer: Any, *args: Any) -> Any:
        if not isinstance(optimizer, DeepmdRLEKF):
            return original(model, optimizer, *args)
        return Updates(predicting(model), optimizer)

    training.KFOptimizerWrapper = wrapper

    def predicting(model: Any) -> Callable[[dict[str, Any]], dict[str, Tensor]]:
        # Gradients are taken without DDP's sums over the processes.
        alone = model.module if isinstance(model, DistributedDataParallel) else model
        return lambda inputs: alone(**inputs, skip_loss=True)[0]

    class Trainer(base):
        """DeePMD-kit's Trainer, which trains with RLEKF if the input asks for it."""

        def __init__(self, config: dict[str, Any], *args: Any, **kwargs: Any):
            settings = Settings.of(config)
            if settings is None:
                super().__init__(config, *args, **kwargs)
                return
            _check_supported(config)

            def optimizer(*_: Any) -> DeepmdRLEKF:
                return DeepmdRLEKF(self.wrapper.named_parameters(), settings)

            with _replaced(training, "LKFOptimizer", optimizer):
                super().__init__({**config, "optimizer": settings.as_lkf()}, *args, **kwargs)
            _check_loss(self.loss, training.EnergyStdLoss)
            given = _named(base, self, config, *args, **kwargs)
            if restart := given.get("restart_model"):
                self.optimizer.load_state_dict(_saved_optimizer(restart))
            _start(
                settings,
                self.model,
                self.optimizer,
                bool(restart),
                given.get("init_model"),
                lambda: self.model.change_out_bias(self.get_sample_func, bias_adjust_mode="change-by-statistic"),
                lambda: Updates(predicting(self.wrapper), self.optimizer).frame(
                    self._next_training_batch("Default")[0]
                ),
            )

        def _next_training_batch(self, *args: Any, **kwargs: Any) -> Any:
            batch = super()._next_training_batch(*args, **kwargs)
            if isinstance(self.optimizer, DeepmdRLEKF):
                self.optimizer.labels = batch[1]  # LKF's calls pass no virials
            return batch

    return Trainer


def _expt_trainer(training: Any) -> type:
    base: Any = training.Trainer

    class Trainer(base):
        """DeePMD-kit's Trainer of `pt_expt`, which trains with RLEKF if the input asks for it."""

        def __init__(self, config: dict[str, Any], *args: Any, **kwargs: Any):
            self._rlekf = settings = Settings.of(config)
            if settings is None:
                super().__init__(config, *args, **kwargs)
                return
            _check_supported(config)
            if config["training"].get("zero_stage"):
                raise ValueError("Optimizer type RLEKF keeps P whole on every process: leave out zero_stage.")
            adam = {"type": "Adam", "adam_beta1": 0.9, "adam_beta2": 0.999, "weight_decay": 0.0}
            super().__init__({**config, "optimizer": adam}, *args, **kwargs)
            given = _named(base, self, config, *args, **kwargs)
            _check_loss(self.loss, training.EnergyLoss)
            self._batch: tuple[dict[str, Any], dict[str, Any]] = {}, {}
            # The rate is displayed, but multiplies no update: it falls in the group of a stand-in.
            for own in self.optimizer.param_groups:
                own["lr"] = 1.0
                del own["initial_lr"]
            shown = torch.optim.SGD([torch.zeros(1)], lr=self.lr_schedule.start_lr)
            shown.param_groups[0]["initial_lr"] = self.lr_schedule.start_lr
            shown._opt_called = True  # type: ignore[attr-defined]  # torch's schedulers ask whether step() is
            rates, last = self.scheduler.lr_lambdas, self.start_step - 1  # type: ignore[has-type]
            self.scheduler = torch.optim.lr_scheduler.LambdaLR(shown, rates, last_epoch=last)
            _start(
                settings,
                self.model,
                self.optimizer,
                self.restart_training,
                given.get("init_model"),
                lambda: training.model_change_out_bias(
                    self.model, self._sample_funcs["Default"], _bias_adjust_mode="change-by-statistic"
                ),
                lambda: self._updates().frame(self._next_batch()[0]),
            )

        def _create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            if self._rlekf is None:
                return super()._create_optimizer(*args, **kwargs)
            named = self._unwrapped.named_parameters()  # whatever the number of processes
            return DeepmdRLEKF([(_pt_name(name), p) for name, p in named], self._rlekf)

        def _updates(self) -> Updates:
            alone = self._unwrapped  # gradients are taken without DDP's sums over the processes
            return Updates(lambda inputs: alone(**inputs)[0], self.optimizer)

        def _next_batch(self) -> tuple[dict[str, Any], dict[str, Any]]:
            self._batch = inputs, labels = self.get_data(is_train=True)
            if inputs.get("n_node") is not None:
                raise ValueError("Optimizer type RLEKF takes no batches of the kind mix:N; give a number of frames.")
            self.optimizer.labels = labels
            return self._batch

        def train_step(self, task: Any, step: int) -> Any:
            if self._rlekf is None:
                return super().train_step(task, step)
            rate = self.scheduler.get_last_lr()[0]
            inputs, _ = self._next_batch()
            updates = self._updates()
            updates.update_energy(inputs)
            updates.update_force(inputs)
            self.scheduler.step()
            if self.model_ema is not None:
                self.model_ema.update(self.model)
            payload = {"loss": None, "more_loss": None, "cur_lr_sched": rate}
            return training.TrainStepResult(task_key=task.key, step=step, payload=payload)

        def evaluate_training(self, task: Any, step: int, step_result: Any) -> Any:
            if self._rlekf is None or step_result is None:
                return super().evaluate_training(task, step, step_result)
            inputs, labels = self._batch
            rate = step_result.payload["cur_lr_sched"]
            _, _, more_loss = self._unwrapped(**inputs, cur_lr=rate, label=labels, task_key=task.key)
            return self._more_loss_to_float(more_loss)

    return Trainer


def _pt_name(name: str) -> str:
    """A parameter of pt_expt by its name in pt, which says what it is."""
    stem, _, last = name.rpartition(".")
    return f"{stem}.{PT_NAMES.get(last, last)}"


# What each trainer's module must have, its Trainer, and the arguments of that.
TRAINERS: dict[str, tuple[tuple[str, ...], tuple[str, ...], set[str], Callable[[Any], type]]] = {
    "deepmd.pt.train.training": (
        ("LKFOptimizer", "KFOptimizerWrapper", "EnergyStdLoss"),
        ("_next_training_batch", "run"),
        {"config", "restart_model", "init_model"},
        _pt_trainer,
    ),
    "deepmd.pt_expt.train.training": (
        ("EnergyLoss", "TrainStepResult", "model_change_out_bias"),
        ("_create_optimizer", "_unwrapped", "get_data", "train_step", "evaluate_training", "_more_loss_to_float"),
        {"config", "restart_model", "init_model"},
        _expt_trainer,
    ),
}


def _start(
    settings: Settings,
    model: torch.nn.Module,
    optimizer: DeepmdRLEKF,
    restarted: bool,
    initial: str | None,
    fit_bias: Callable[[], Any],
    next_frame: Callable[[], Any],
) -> None:
    """What the options ask for before the first batch of a trainer, which may begin with the file of a model."""
    if not restarted and not (initial and optimizer.inherit(_saved_optimizer(initial))):
        if settings.options.warm_start and not initial:
            processes = Processes(group())
            if processes.rank == 0:
                fit_bias()
            processes.agree(model.buffers())
        if settings.options.prior == "layers":
            optimizer.updater.warm_start(next_frame() for _ in range(PRIOR_FRAMES))
    if settings.network == "auto":

        def make() -> Any:
            from rlekf_ext.integrations.deepmd.network import OwnNetwork  # which needs the extra `potential`

            return OwnNetwork(lambda path: _save(model, path), list(model.parameters()), optimizer.parameters())

        optimizer.make_network = make


def _named(trainer: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of its __init__ by their names."""
    return inspect.signature(trainer.__init__).bind(*args, **kwargs).arguments


def _saved_optimizer(path: str) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True).get("optimizer") or {}


def _save(model: Any, path: Path) -> None:
    """DeePMD-kit's model as a `.dp` file."""
    serialization: Any = importlib.import_module("deepmd.dpmodel.utils.serialization")
    serialization.save_dp_model(str(path), {"model": model.serialize(), "model_def_script": {}})


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


def _check_loss(loss: Any, wanted: type) -> None:
    if not isinstance(loss, wanted):
        raise ValueError(f"Optimizer type RLEKF needs a loss of type ener but has {type(loss).__name__}; use Adam.")
