"""RLEKF in the form in which DeePMD-kit's trainer makes, calls and saves an optimizer."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlekf_ext.errors import DataError, RlekfError
from rlekf_ext.integrations.lkf import from_lkf
from rlekf_ext.optim import RLEKF
from rlekf_ext.options import KINDS, OptimizerOptions, Options, order_of, part, resolve
from rlekf_ext.processes import Processes
from rlekf_ext.updates import FrameUpdater

if TYPE_CHECKING:
    from rlekf_ext.integrations.deepmd.network import OwnNetwork

NETWORKS = "auto", "dp"  # what makes ε and H: the network here if it can, or DeePMD-kit's
CHECK_EVERY = 1000  # frames

log = logging.getLogger("deepmd.rlekf_ext")
log.addFilter(lambda _: Processes(group()).rank == 0)


@dataclass(frozen=True)
class Settings:
    """What an input requests of RLEKF."""

    options: Options
    seed: int
    prefactors: dict[str, float]  # kf_start_pref_e, ..., of type LKF
    network: str  # one of NETWORKS

    @classmethod
    def of(cls, config: dict[str, Any]) -> Settings | None:
        """None for an input that does not ask for RLEKF. Raises OptionError."""
        given = dict(config.get("optimizer") or {})
        kind = given.pop("type", "Adam")
        prefactors: dict[str, float] = {}
        if kind == "LKF" and os.environ.get("RLEKF_DEEPMD") == "LKF":
            prefactors = {name: value for name, value in given.items() if name.startswith("kf_") and "pref" in name}
            given = {"preset": "lkf", "block_size": given.get("kf_blocksize", Options.block_size)}
        elif kind != "RLEKF":
            return None
        # Preset lkf is compared with LKF, bit by bit.
        network = given.pop("network", "dp" if given.get("preset") == "lkf" else NETWORKS[0])
        options = resolve(given, "optimizer")
        if "order" not in given:  # virials, too, in batches that have them
            options = resolve({**given, "order": order_of(options.order, KINDS)}, "optimizer")
        return cls(options, config["training"].get("seed") or 0, prefactors, network)

    def as_lkf(self) -> dict[str, Any]:
        """The section `optimizer` that makes DeePMD-kit's trainer treat the optimizer as its LKF."""
        neutral = {f"kf_{end}_pref_{kind}": 1.0 for end in ("start", "limit") for kind in "ef"}
        return {"type": "LKF", **neutral, **self.prefactors, "kf_blocksize": self.options.block_size}


class DeepmdRLEKF(RLEKF):
    """RLEKF as DeePMD-kit's trainer makes and saves it; holds what must outlast a batch.

    Every process of torchrun holds all of it, since in DeePMD-kit only rank 0 saves, and makes the same updates.
    """

    def __init__(self, params: Iterable[Any], settings: Settings):
        super().__init__(params, transpose=True, **part(OptimizerOptions, settings.options))
        self.labels: dict[str, Any] = {}  # of the current batch
        # dp averages weights with its own enable_ema, and has already fitted its energy bias.
        chosen = {**part(Options, settings.options), "average_frames": 1, "warm_start": False}
        self.updater = FrameUpdater(
            lambda frame, forces: frame.predict(),
            self,
            seed=settings.seed,
            process_group=group(),
            say=lambda sentence: log.warning("RLEKF: %s", sentence),
            **chosen,
        )
        self._said = ""
        self._network: OwnNetwork | None = None
        self._frames = 0
        self.make_network: Callable[[], OwnNetwork] | None = None  # None: DeePMD-kit's network is used
        dense = sum(8 * size**2 for size in self.filter.plan.sizes)
        log.info("%r; dense in float64, as in LKF, P would take %.1f MB.", self, dense / 1e6)

    def on_own_network(self, frame: Any, inputs: dict[str, Any]) -> None:
        """Lets the frame measure itself by the network here, if that can be."""
        if self.make_network is None:
            return
        try:
            network = self._network = self._network or _made(self.make_network)
            if bool((inputs["atype"] < 0).any()):
                raise DataError("batches of structures of different sizes are for dp's network.")
            own = network.frame(inputs, frame)
            frame.measure = network.measured(own)
            if self._frames % CHECK_EVERY == 0:
                apart = network.check(own, frame.predict(), log.info)
                if self._frames == 0:
                    log.info(
                        "RLEKF makes its updates with a network of its own on dp's weights, which is off dp's by "
                        '%.1e; dp evaluates and saves. "network": "dp" switches it off.',
                        apart,
                    )
            self._frames += 1
            frame.shown = network.predict(own)
        except (RlekfError, ImportError) as error:
            self.make_network = frame.measure = None
            log.info("RLEKF makes its updates with dp's own network: %s", error)

    def update_on(self, frames: list[Any], factors: dict[str, float]) -> None:
        """All updates of a batch, with this process's part of it; `factors` multiply the scales of the kinds of update.

        Raises StoppedError if `max_skipped` measurements in a row were skipped.
        """
        self.updater(frames, factors)
        if (skipped := self.updater.skipped()) != self._said:
            self._said = skipped
            log.warning("RLEKF has skipped measurements so far: %s.", skipped)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "updater": self.updater.state_dict()}

    def inherit(self, saved: dict[str, Any]) -> bool:
        """P and λ of another run, of type RLEKF or LKF, for other data; returns whether there are any to be kept."""
        if _is_of_lkf(saved):
            p = from_lkf(saved).state_dict()
            saved = {"state": {0: p}, "updater": {"average": None, "early": torch.zeros(())}}
        if "updater" not in saved:
            log.info("RLEKF: the initial model has no P; starting with a fresh one.")
            return False
        if self.updater.options.covariance == "fresh":
            return False
        log.info("RLEKF: %s", self.updater.inherit(saved, saved["updater"]))
        return True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where a run stopped: RLEKF's, or LKF's, whose P and λ are taken over."""
        if _is_of_lkf(state_dict):
            self.take_over(from_lkf(state_dict))
            self.filter.covariance.set(process_noise=self.options.process_noise)  # which LKF does not have
            log.info("P and its memory factor come from LKF's checkpoint.")
            return
        if "updater" not in state_dict:
            raise ValueError(
                "The checkpoint should be of an optimizer of type RLEKF or LKF but is of another; use --init-model, "
                "which then takes only its weights, instead of --restart."
            )
        super().load_state_dict(state_dict)
        self.updater.load_state_dict(state_dict["updater"])


def _is_of_lkf(saved: dict[str, Any]) -> bool:
    return "P" in saved.get("state", {}).get(0, {})


def _made(make: Callable[[], OwnNetwork]) -> OwnNetwork:
    try:
        return make()
    except (RlekfError, ImportError):
        raise
    except Exception as error:  # of DeePMD-kit: some models cannot be serialized
        raise DataError(f"dp's model cannot be read ({error!r}).") from error


class Updates:
    """KFOptimizerWrapper's two calls per batch. All updates are made in the second, which has all labels."""

    def __init__(self, predict: Callable[[dict[str, Any]], dict[str, Tensor]], optimizer: DeepmdRLEKF):
        """predict(inputs) gives `energy`, `force` and perhaps `virial`, for autograd."""
        self._predict_batch = predict
        self._optimizer = optimizer
        self._energy_factor = 1.0

    def update_energy(self, inputs: dict[str, Any], label: Tensor | None = None, update_prefactor: float = 1.0) -> None:
        self._energy_factor = update_prefactor

    def update_force(
        self, inputs: dict[str, Any], label: Tensor | None = None, update_prefactor: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """All updates of the batch. Returns energy (B, 1) and forces (B, n, 3) as predicted before them."""
        frames = []
        for own, structures in self._measured_apart(inputs):
            frames.append(self.frame(own, structures))
            self._optimizer.on_own_network(frames[-1], own)
        self._optimizer.update_on(frames, {"energy": self._energy_factor, "force": update_prefactor})
        for frame in frames:
            if frame.shown is None:  # all force groups were drawn from the atoms of other processes
                frame.predict()
        energy, force = (torch.cat([frame.shown[name] for frame in frames]) for name in ("energy", "force"))
        return energy, force

    def _measured_apart(self, inputs: dict[str, Any]) -> Iterator[tuple[dict[str, Any], slice]]:
        """What the batch's measurements are made of, and which of its structures: with "joint", one each."""
        count = len(inputs["atype"])
        if self._optimizer.updater.options.batch != "joint" or count == 1:
            yield inputs, slice(None)
            return
        for b in range(count):
            own = slice(b, b + 1)
            of_structures = {name: torch.is_tensor(x) and x.dim() > 0 and len(x) == count for name, x in inputs.items()}
            yield {name: x[own] if of_structures[name] else x for name, x in inputs.items()}, own

    def frame(self, inputs: dict[str, Any], structures: slice = slice(None)) -> Any:
        """These structures of the batch whose labels the optimizer has, in the form of batch_parts.py: a force group is
        the same atoms of each of them."""
        labels = self._optimizer.labels
        num_atoms = (inputs["atype"] >= 0).sum(-1)  # -1 pads batches of mixed systems
        shapes = dict(zip(KINDS, ((), (-1, 3), (3, 3)), strict=True))
        found = {
            kind: labels[kind][structures].reshape(len(num_atoms), *shape)
            for kind, shape in shapes.items()
            if kind in labels and float(labels.get(f"find_{kind}", 1.0)) > 0
        }
        frame = SimpleNamespace(
            energy=found.get("energy"),
            forces=found["force"].transpose(0, 1) if "force" in found else None,
            virial=found.get("virial"),
            num_atoms=num_atoms,
            shown=None,
            measure=None,
        )
        frame.predict = lambda: self._predict(frame, inputs)
        return frame

    def _predict(self, frame: Any, inputs: dict[str, Any]) -> Any:
        predicted = self._predict_batch(inputs)
        frame.shown = frame.shown or {name: predicted[name].detach() for name in ("energy", "force")}
        return SimpleNamespace(
            energy=predicted["energy"].reshape(-1),
            forces=predicted["force"].transpose(0, 1),
            virial=predicted["virial"].reshape(-1, 3, 3) if "virial" in predicted else None,
        )


def group() -> dist.ProcessGroup | None:
    """All processes of torchrun, or None if this one is alone."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if several else None
