"""RLEKF with the constructor and the methods of LKFOptimizer, for trainers written for DeePMD-kit's, PWMLFF's or
MatPL's: change the import, nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlekf_ext.covariance import Covariance, abridged, identity
from rlekf_ext.errors import InputError, OptionError
from rlekf_ext.optim import RLEKF
from rlekf_ext.options import BlockOptions, FilterOptions
from rlekf_ext.packing import layout_of, num_tiles, pack
from rlekf_ext.partition import BlockPlan


class _Blocks(Sequence[Tensor]):
    """The blocks of P in `LKFOptimizer.state_dict()`, each dense (n_l, n_l) float64.

    Holds the packed P that the same state dict holds anyway, so that a checkpoint stores P once. A block is made each
    time that it is read.
    """

    def __init__(self, saved: dict[str, Any]):
        self.saved = saved

    def __len__(self) -> int:
        return len(self.saved["sizes"])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        sizes, tiles, pending = (self.saved[name] for name in ("sizes", "tiles", "pending"))
        weight, size, tile = layout_of(BlockPlan(tuple(sizes.tolist())))[index].tolist()
        one = {
            "sizes": sizes.new_tensor([size]),
            "tiles": tiles[tile : tile + num_tiles(BlockPlan((size,)))],
            "pending": pending[:, weight : weight + size],
        }
        return Covariance.from_state_dict({**self.saved, **one}).dense()[0]


torch.serialization.add_safe_globals([_Blocks])  # torch.load reads it with weights_only=True, its default


class LKFOptimizer(RLEKF):
    """The updates of LKF, with the packed P and the guard of RLEKF.

    The same blocks (strategy "deepmd"), the same order of the weights (the dimensions of each tensor reversed), the
    same numbers up to rounding. The positional arguments are those of DeePMD-kit 3.2, PWMLFF 2024.5 and MatPL 2025.3.
    P starts as p0_weight I, or as I for None. The others are keywords: those of RLEKF (covariance_dtype, process_noise,
    ...), and those of PWMLFF's branch dev_nep_reg. Of these, `kalman_lambda_weight` makes the measurement noise that
    many times the number of blocks.

    `param_groups[0]["lr"]` is 1 and scales the weight increment, so leave it (LKF's 0.1 has no effect). Parameters that
    need no gradient are not in P. In LKF they are, which changes the blocks and, with their number, the noise.

    Raises OptionError (a ValueError) for `q0` and `qmin` of that branch; otherwise as RLEKF.
    """

    def __init__(
        self,
        params: Iterable[Any],
        kalman_lambda: float = FilterOptions.memory_factor,
        kalman_nue: float = FilterOptions.forgetting_rate,
        block_size: int = BlockOptions.block_size,
        p0_weight: float | None = None,
        *,
        q0: float | None = None,
        qmin: float | None = None,
        kalman_lambda_weight: float | None = None,
        **settings: Any,
    ):
        names = {"memory_factor": "kalman_lambda", "forgetting_rate": "kalman_nue", "initial_covariance": "p0_weight"}
        for name in names.keys() & settings.keys():
            raise OptionError(f"{name} is called {names[name]} here; use that name.")
        for name, value, holds in (
            ("p0_weight", p0_weight, p0_weight is None or p0_weight > 0),
            ("kalman_lambda", kalman_lambda, 0 < kalman_lambda <= 1),
        ):
            if not holds:
                raise OptionError(f"{name} must be > 0{' and <= 1' * (name != 'p0_weight')} but is: {value}.")
        if q0 is not None or qmin is not None:
            raise OptionError(
                f"q0 and qmin should be None but are {q0} and {qmin}: pass process_noise, which stays constant."
            )
        super().__init__(
            params,
            block_size=block_size,
            memory_factor=kalman_lambda,
            forgetting_rate=kalman_nue,
            initial_covariance=1.0 if p0_weight is None else p0_weight,
            **{"strategy": "deepmd", "transpose": True, **settings},
        )
        if kalman_lambda_weight is not None:
            noise = kalman_lambda_weight * self.filter.plan.num_blocks
            if not noise > 0:
                raise OptionError(f"kalman_lambda_weight should be above 0 but is {kalman_lambda_weight}.")
            self.filter.covariance.set(measurement_noise=noise)
        self._grad_prefactor = 1.0

    def set_grad_prefactor(self, grad_prefactor: float) -> None:
        """Set what `.grad` is divided by to give H."""
        self._grad_prefactor = grad_prefactor

    def step(self, error: Any, iters: Any = None, cur_iter: Any = None) -> None:  # type: ignore[override]
        """One update; `.grad` holds +H times the prefactor, `error` is ε. `iters` and `cur_iter`, which dev_nep_reg
        passes for its process noise, are not used."""
        self.update(self.jacobian() / self._grad_prefactor, error)
        self._look_after()

    def cal_kpu(self) -> Tensor:
        """HᵀPH, (1, 1) float64, with H as `step` takes it: the variance of the quantity whose gradient H is, where the
        measurement noise is 1 per block of P. Changes nothing. Raises RuntimeError if no parameter has a gradient."""
        return self.variance(self.jacobian() / self._grad_prefactor).reshape(1, 1)

    def state_dict(self) -> dict[str, Any]:
        """That of RLEKF, and in the state of parameter 0 what trainers read of LKF's: "P", a sequence of dense blocks,
        and "kalman_lambda". With a process group, that of RLEKF alone. Waits for the device."""
        saved = super().state_dict()
        own = saved["state"][0]
        if own["tiles"] is not self.filter.covariance.tiles:  # spread over the processes
            return saved
        return {**saved, "state": {0: {**own, "P": _Blocks(own), "kalman_lambda": self.filter.memory_factor}}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where an LKFOptimizer was: this one exactly, or one of the other packages by its P, λ and ν.

        Raises ValueError, and changes nothing, for blocks of other sizes and for another optimizer's state.
        """
        state = state_dict["state"].get(0, {})
        if "P" in state and "tiles" not in state:
            self._replace(from_lkf(state_dict))
        else:
            super().load_state_dict(state_dict)

    @torch.no_grad()
    def set_kalman_P(self, P: Sequence[Tensor], kalman_lambda: float = 0.999999999999872) -> None:  # noqa: N802, N803
        """Take over λ and P: the dense blocks (n_l, n_l) of any LKFOptimizer, or `state_dict()["state"][0]["P"]`.

        Raises ValueError, and changes nothing, for blocks of other sizes, and for P of ours in another dtype.
        """
        p = self.filter.covariance
        if isinstance(P, _Blocks):
            self.filter.load_state_dict(P.saved)
            if kalman_lambda != self.filter.memory_factor:  # 1 - λ would round what the state holds
                self.filter.covariance.set(forgetting=1 - float(kalman_lambda))
            return
        state = {"P": P, "kalman_lambda": kalman_lambda, "params_packed_index": [len(block) for block in P]}
        self._replace(from_lkf({"state": {0: state}, "param_groups": [{"kalman_nue": p.scalars().forgetting_rate}]}))

    def _replace(self, new: Covariance) -> None:
        """Take over P, λ and ν, but not the noise, which LKF does not keep."""
        p = self.filter.covariance
        if new.plan != p.plan:
            raise InputError(
                f"P should have blocks of sizes {abridged(p.plan.sizes)} but has {abridged(new.plan.sizes)}; use the "
                "block_size and the parameters that it was made with."
            )
        p.tiles.copy_(new.tiles[p.own_tiles.start : p.own_tiles.stop])
        now = new.scalars()
        kept = ("num_pending", "scale", "shift", "largest", "forgetting", "forgetting_rate")
        p.set(**{name: getattr(now, name) for name in kept})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_grad_prefactor": self._grad_prefactor}


def from_lkf(saved: dict[str, Any]) -> Covariance:
    """The covariance of an LKF (DeePMD-kit's, PWMLFF's, MatPL's) from its optimizer's state dict,
    `torch.load(file)["optimizer"]`.

    LKF keeps dense blocks of P (n_l, n_l), in the dtype of its first parameter, and λ. Its blocks are those of the
    strategy "deepmd", its weights in the order of `transpose=True`. P is symmetrised, and stored in float64 on its
    device; λ and ν carry over, and the measurement noise is the number of blocks, as in LKF. An optimizer of the same
    parameters takes it over with `optimizer.take_over(from_lkf(saved))`.

    Besides both forms of P, needs memory for four times the largest block.

    Raises ValueError for another optimizer's state, and for that of a distributed run, in which LKF saves the blocks of
    rank 0 alone.
    """
    try:
        state, (group,) = saved["state"][0], saved["param_groups"]
        blocks, sizes = state["P"], tuple(state["params_packed_index"])
        forgetting, rate = 1 - float(state["kalman_lambda"]), float(group["kalman_nue"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"This is not the state of an LKFOptimizer of DeePMD-kit, PWMLFF or MatPL ({error!r}): pass the entry "
            "'optimizer' of a checkpoint of theirs. One of rlekf_ext is loaded by load_state_dict."
        ) from error
    shapes = [tuple(block.shape) for block in blocks]
    if shapes != [(size, size) for size in sizes]:
        raise ValueError(
            f"LKF's state should hold square blocks of P of sizes {abridged(sizes)} but holds "
            f"{abridged([shape[0] for shape in shapes])}: a distributed run of LKF saves only those of rank 0, and "
            "the others are lost."
        )
    p = identity(BlockPlan(sizes), device=blocks[0].device)
    tile = 0
    for block in blocks:
        exact = block.to(torch.float64)
        tiles = pack([(exact + exact.T) / 2])
        p.tiles[tile : tile + len(tiles)] = tiles
        tile += len(tiles)
    p.set(forgetting=forgetting, forgetting_rate=rate, measurement_noise=len(sizes), largest=p.stored_diagonal().max())
    return p
