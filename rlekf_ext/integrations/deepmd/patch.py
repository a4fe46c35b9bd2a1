"""RLEKF in DeePMD-kit's own trainer, which is not modified on disk. All private names of DeePMD-kit are in this file.

1. `register` runs when DeePMD-kit loads its plugins. It gives the options to the argument checker, and wraps the
   checker's `normalize`.
2. When a checked input asks for RLEKF, `_install` replaces `Trainer` and `KFOptimizerWrapper` in the trainer's module.
   Both fall through to the originals for any other optimizer.
3. That Trainer passes the type LKF to the original, so that it makes and calls the optimizer as for LKF, and gives it
   ours.

So a run that does not ask for RLEKF runs only DeePMD-kit's own code.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from types import ModuleType
from typing import Any, get_args, get_origin, get_type_hints

import torch

from rlekf_ext.errors import OptionError
from rlekf_ext.integrations.deepmd.optimizer import DeepmdRLEKF, Settings, Updates, group, log
from rlekf_ext.options import NOT_IN_DP, Options, help_text
from rlekf_ext.processes import Processes
from rlekf_ext.schema import range_text, values
from rlekf_ext.updates import PRIOR_FRAMES

KNOWN = ("3.2",)  # versions of DeePMD-kit that this was written for and is tested with: make test-deepmd


def register() -> None:
    """Make the type RLEKF known to DeePMD-kit. Raises RuntimeError for an unknown version of it."""
    import deepmd

    version = str(getattr(deepmd, "__version__", "of unknown version"))
    if not version.startswith(tuple(f"{known}." for known in KNOWN)):
        raise RuntimeError(f"rlekf_ext supports DeePMD-kit {', '.join(KNOWN)} but this is {version}")
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
    kinds = get_type_hints(Options)
    return [
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
    """Put our Trainer and update wrapper into the trainer's module; if it is not as expected, warn and leave it."""
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
        log.warning("rlekf_ext: DeePMD-kit's trainer has no %s: type RLEKF is not available.", ", ".join(missing))
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
            if not isinstance(self.loss, training.EnergyStdLoss):
                raise ValueError(
                    f"Optimizer type RLEKF needs a loss of type ener but has {type(self.loss).__name__}; use Adam."
                )
            given = inspect.signature(base.__init__).bind(self, config, *args, **kwargs).arguments
            if given.get("restart_model"):
                saved = torch.load(given["restart_model"], map_location="cpu", weights_only=True)
                self.optimizer.load_state_dict(saved["optimizer"])
                return
            if settings.options.warm_start:
                processes = Processes(group())
                if processes.rank == 0:
                    self.model.change_out_bias(self.get_sample_func, bias_adjust_mode="change-by-statistic")
                processes.agree(self.model.buffers())
            if settings.options.prior == "layers":
                updates = Updates(self.wrapper, self.optimizer)
                self.optimizer.updater.warm_start(
                    updates.frame(self._next_training_batch("Default")[0]) for _ in range(PRIOR_FRAMES)
                )

        def _next_training_batch(self, *args: Any, **kwargs: Any) -> Any:
            batch = super()._next_training_batch(*args, **kwargs)
            if isinstance(self.optimizer, DeepmdRLEKF):
                self.optimizer.labels = batch[1]  # LKF's calls pass no virials
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
