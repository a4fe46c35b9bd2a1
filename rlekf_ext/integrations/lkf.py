"""RLEKF with the constructor and the methods of LKFOptimizer, for trainers written for DeePMD-kit's, PWMLFF's or
MatPL's: change the import, nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlekf_ext.covariance import Covariance, abridged, identity
from rlekf_ext.optim import RLEKF
from rlekf_ext.options import BlockOptions, FilterOptions
from rlekf_ext.packing import pack
from rlekf_ext.partition import BlockPlan


class LKFOptimizer(RLEKF):
    """The updates of LKF, with the packed P and the guard of RLEKF.

    The same blocks (strategy "deepmd"), the same order of the weights (matrices stored [in, out]), the same numbers up
    to rounding. `p0_weight` and `kalman_lambda_weight` are PWMLFF's: P starts as p0_weight I, the measurement noise is
    kalman_lambda_weight times the number of blocks. Further keywords are RLEKF's: covariance_dtype, process_noise, ...

    `param_groups[0]["lr"]` is 1 and scales the weight increment (LKF's 0.1 has no effect). `state_dict()` holds P and
    λ, and `load_state_dict` restores them. Parameters that need no gradient are not in P.

    Raises ValueError for PWMLFF's `q0` and `qmin`; otherwise as RLEKF.
    """

    def __init__(
        self,
        params: Iterable[Any],
        kalman_lambda: float = FilterOptions.memory_factor,
        kalman_nue: float = FilterOptions.forgetting_rate,
        block_size: int = BlockOptions.block_size,
        q0: float | None = None,
        qmin: float | None = None,
        p0_weight: float | None = None,
        kalman_lambda_weight: float | None = None,
        **settings: Any,
    ):
        if q0 is not None or qmin is not None:
            raise ValueError(
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
                raise ValueError(f"kalman_lambda_weight should be above 0 but is {kalman_lambda_weight}.")
            self.filter.covariance.set(measurement_noise=noise)
        self._grad_prefactor = 1.0

    def set_grad_prefactor(self, grad_prefactor: float) -> None:
        """Set what `.grad` is divided by to give H."""
        self._grad_prefactor = grad_prefactor

    def step(self, error: Any, iters: Any = None, cur_iter: Any = None) -> None:  # type: ignore[override]
        """One update; `.grad` holds +H times the prefactor, `error` is ε. `iters` and `cur_iter`, which PWMLFF passes
        for its process noise, are not used."""
        self.update(self.jacobian() / self._grad_prefactor, error)

    @torch.no_grad()
    def set_kalman_P(self, P: Sequence[Tensor], kalman_lambda: float = 0.999999999999872) -> None:  # noqa: N802, N803
        """Take over the dense blocks of P (n_l, n_l) of an LKFOptimizer, and its λ.

        Raises ValueError for blocks of other sizes.
        """
        p = self.filter.covariance
        sizes = [len(block) for block in P]
        if sizes != list(p.plan.sizes):
            raise ValueError(
                f"P should have blocks of sizes {list(p.plan.sizes)} but has {sizes}; use the block_size "
                "that it was made with."
            )
        state = {"P": P, "kalman_lambda": kalman_lambda, "params_packed_index": sizes}
        rate = p.scalars().forgetting_rate
        new = from_lkf({"state": {0: state}, "param_groups": [{"kalman_nue": rate}]})
        p.tiles.copy_(new.tiles)
        now = new.scalars()
        p.set(num_pending=now.num_pending, scale=now.scale, shift=now.shift, forgetting=now.forgetting)


def from_lkf(saved: dict[str, Any]) -> Covariance:
    """The covariance of DeePMD-kit's LKF from its optimizer's state dict, `torch.load(file)["optimizer"]`.

    LKF keeps dense blocks of P (n_l, n_l), in the dtype of its first parameter, and λ. Its blocks are those of the
    strategy "deepmd", its weights are in the order of `transpose=True`. P is symmetrised, and stored in float64 on
    its device; λ and ν carry over, and the measurement noise is the number of blocks, as in LKF. An optimizer of the
    same parameters takes it over with `optimizer.take_over(from_lkf(saved))`.

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
            f"This is not the state of DeePMD-kit's LKFOptimizer ({error!r}): pass the entry 'optimizer' of a "
            "checkpoint of `dp --pt train` with optimizer type LKF."
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
    p.set(forgetting=forgetting, forgetting_rate=rate, measurement_noise=len(sizes))
    return p
