"""The extended Kalman filter over flat vectors: Algorithm 2 of the paper. Knows nothing of nn.Parameter or models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import inf
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rlekf_ext import ops
from rlekf_ext.covariance import MAX_MEASUREMENTS, Covariance, Scalars, identity
from rlekf_ext.diagnostics import FLOAT32_CONDITION, Diagnostics, ritz_values
from rlekf_ext.environment import torch_threads
from rlekf_ext.errors import OptionError
from rlekf_ext.options import FilterOptions, checked, takes
from rlekf_ext.partition import BlockPlan
from rlekf_ext.processes import Processes
from rlekf_ext.sharding import TileShare

RENEWED_EVERY = 256  # measurements; `largest` falls by a factor of 0.98 each at most, in the paper's settings


@takes(FilterOptions)
class KalmanFilter:
    """The block-diagonal covariance P of N weights, and the scalars that go with it.

    `plan` gives the blocks; `backend` is "auto", "native", "triton" or "reference". With a `process_group` of
    torch.distributed, P is spread over its processes (see sharding.py): each must make the same calls with the
    same arguments, and keeps the same weights.

    Raises OptionError (a ValueError) for an option out of range, NotEnoughMemoryError if P does not fit, BackendError
    for an absent backend.
    """

    def __init__(
        self,
        plan: BlockPlan,
        *,
        backend: str = "auto",
        device: torch.device | str = "cpu",
        process_group: Any = None,
        **options: Any,
    ):
        self.options: FilterOptions = checked(FilterOptions, options)
        ops.backend(backend, torch.device(device), process_group is not None)  # raises before P is allocated
        self.backend = backend
        self.threads: int | None = None  # of torch, for updates; None: as many as torch has
        dtype = torch.float64 if self.options.covariance_dtype == "float64" else torch.float32
        self._share = TileShare(plan, Processes(process_group)) if process_group is not None else None
        self.covariance = identity(
            plan,
            initial_covariance=self.options.initial_covariance,
            dtype=dtype,
            max_pending=self.options.max_pending,
            device=device,
            tiles=self._share.tiles if self._share else None,
        )
        self.covariance.set(forgetting=1 - self.options.memory_factor, **self._constants())
        # The last Jacobians, for diagnostics: rows are zero until filled. The next one replaces row `_next`.
        self._recent = self.covariance.pending.new_zeros(MAX_MEASUREMENTS, plan.num_weights)
        self._next = 0
        self._unmeasured = 0  # measurements since `largest` was renewed

    @property
    def plan(self) -> BlockPlan:
        """The blocks of P."""
        return self.covariance.plan

    @property
    def measurement_noise(self) -> float:
        """R of the options; without one, L, the number of blocks."""
        noise = self.options.measurement_noise
        return float(self.plan.num_blocks if noise is None else noise)

    @property
    def memory_factor(self) -> float:
        """λ now. Waits for the device."""
        return 1 - self.covariance.scalars().forgetting

    @torch.no_grad()
    def update(self, jacobian: Tensor, innovation: Tensor | float, out: Tensor | None = None) -> Tensor:
        """Algorithm 2, lines 8 to 14: P <- (P - a PH(PH)ᵀ)/λ + q I, λ <- ν λ + 1 - ν, in place and without waiting for
        the device. Returns the increment of the weights, a ε PH (N,) float64, in `out` if that is given.

        One measurement: jacobian (N,), innovation a number or a tensor of one element. M measurements, linearised at
        the same weights: (M, N) and (M,), used in order, in passes of at most 8, each exact given those before it.

        Raises ValueError for other shapes.
        """
        h = self._rows(jacobian)
        e = torch.as_tensor(innovation, dtype=torch.float64, device=h.device).reshape(-1)
        if len(h) != len(e):
            raise ValueError(
                f"There should be an innovation for each of the {len(h)} rows of the jacobian but there are {len(e)}."
            )
        increment = h.new_zeros(self.plan.num_weights) if out is None else out.zero_()
        if len(h):
            self.take(h, e, increment)
            self.note(h)
        return increment

    def take(self, h: Tensor, e: Tensor, increment: Tensor) -> None:
        """The part of `update` that a CUDA graph can repeat: M measurements, h (M, N) and e (M,) float64 on the device,
        into an increment of zeros (N,)."""
        for first in range(0, len(h), self._most_at_once):
            rows = slice(first, first + self._most_at_once)
            # The innovations are those at the weights before the call: correct them for what earlier passes moved.
            left = e[rows] - h[rows] @ increment if first else e[rows]
            with torch_threads(self.threads):
                if self._share:
                    projection = self._share.project(self._ops, self.covariance, h[rows])
                    self._ops.correct(self.covariance, increment, *projection, h[rows], left)
                else:
                    self._ops.step(self.covariance, increment, h[rows], left)

    def note(self, h: Tensor) -> None:
        """The rest of `update`, in which what the host has counted so far decides what is done."""
        self._unmeasured += len(h)
        if self._unmeasured >= RENEWED_EVERY:
            self._unmeasured = 0
            stored = self.covariance.stored_diagonal()
            self.covariance.set(largest=(self._share.processes.sum(stored) if self._share else stored).max())
        for row in h[-MAX_MEASUREMENTS:].split(1) if len(h) > 1 else [h]:
            self._recent[self._next : self._next + 1] = row
            self._next = (self._next + 1) % MAX_MEASUREMENTS

    @torch.no_grad()
    def variance(self, jacobian: Tensor) -> Tensor:
        """HᵀPH, without the measurement noise: () for a jacobian (N,), (M,) for (M, N). Changes neither w nor P.

        Raises ValueError for other shapes."""
        h = self._rows(jacobian)
        if not len(h):
            return h.new_zeros(0)
        project = self.projector()
        sums = [project(batch)[1][0].sum(0).diagonal() for batch in h.split(MAX_MEASUREMENTS)]
        return (self.covariance.scale * torch.cat(sums)).reshape(jacobian.shape[:-1])

    def health(self) -> dict[str, int]:
        """How many measurements were used, and how many skipped, by cause. Waits for the device."""
        now = self.covariance.scalars()._asdict()
        return {name: count for name, count in now.items() if name.startswith(("num_updates", "skipped"))}

    @torch.no_grad()
    def diagnostics(self, lanczos_steps: int = 10) -> Diagnostics:
        """P in a few numbers, at the cost of `lanczos_steps` reads of it. Changes nothing; waits for the device."""
        p = self.covariance
        now = p.scalars()
        stored, project = p.stored_diagonal(), self.projector()
        diagonal = p.diagonal_of(self._share.processes.sum(stored) if self._share else stored)
        start = self._most_certain_of_recent(project)
        if start is None:
            start = torch.zeros_like(diagonal)
            start[diagonal.argmin()] = 1
        noise = torch.randn(len(start), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        start = start / start.norm() + 1e-3 * (noise / noise.norm()).to(start.device)
        values = now.scale * ritz_values(lambda x: project(x[None])[0][0], start, lanczos_steps)
        last = p.pending[max(now.num_pending - 1, 0)]  # sqrt(a β) y of the last measurement used
        return Diagnostics(
            memory_factor=1 - now.forgetting,
            scale=now.scale,
            shift=now.shift,
            trace=float(diagonal.sum()),
            smallest_diagonal=float(diagonal.min()),
            largest_diagonal=float(diagonal.max()),
            smallest_eigenvalue=min(float(values[0]), float(diagonal.min())),
            largest_eigenvalue=max(float(values[-1]), float(diagonal.max())),
            variance=now.variance,
            gain_norm=now.rank_one**0.5 * float(last.norm()),
        )

    def _most_certain_of_recent(self, project: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor | None:
        """The recent Jacobian in whose direction P is smallest: the one that measurements have excited most."""
        h = self._recent
        inner, plain = project(h)[1].sum(1).diagonal(dim1=1, dim2=2)
        quotient = inner / plain
        quotient[~((quotient.abs() < inf) & (plain > 0))] = inf
        best = int(quotient.argmin())
        return h[best] if float(quotient[best]) < inf else None

    def guard_storage(self) -> str:
        """A sentence if float32 is about to become too coarse to store P, else "".

        With covariance_dtype "auto", S is stored in float64 from then on. Raises NotEnoughMemoryError if that does not
        fit.
        """
        if self.covariance.tiles.dtype != torch.float32:
            return ""
        condition = self.diagnostics().condition
        if condition < FLOAT32_CONDITION:
            return ""
        found = f"The condition number of P is above {min(condition, 1e99):.1e}, too high for storage in float32"
        if self.options.covariance_dtype != "auto":
            return f"{found}: P is about to lose positive definiteness. Use covariance_dtype float64 or auto."
        self.covariance = self.covariance.reblock(self.plan, dtype=torch.float64)
        return f"{found}: P is stored in float64 from now on."

    def _constants(self) -> dict[str, float]:
        """The options that are scalars of the filter under the same name, and stay as they are."""
        own = {"measurement_noise": self.measurement_noise}
        shared = (name for name in Scalars._fields if hasattr(self.options, name))
        return {name: own.get(name, getattr(self.options, name)) for name in shared}

    def differing_constants(self) -> dict[str, tuple[float, float]]:
        """Options that this filter was made with but that a loaded or taken over P has otherwise: name -> (P's, ours).
        Waits for the device."""
        now = self.covariance.scalars()
        return {
            name: (getattr(now, name), ours) for name, ours in self._constants().items() if getattr(now, name) != ours
        }

    def take_over(self, covariance: Covariance) -> None:
        """Replace P by that of another filter of the same weights, whatever its blocks and storage: see
        `Covariance.reblock`. Its scalars are taken over, too."""
        here = self.covariance
        new = covariance.reblock(
            here.plan, dtype=here.tiles.dtype, device=here.tiles.device, max_pending=len(here.pending)
        )
        own = slice(here.own_tiles.start, here.own_tiles.stop)
        self.covariance = replace(new, tiles=new.tiles[own].clone(), first_tile=own.start) if self._share else new

    def inherit(self, saved: dict[str, Any]) -> None:
        """P and λ of a saved filter of the same weights, whatever its blocks and storage, for other measurements: the
        options stay this filter's own, and counts start from zero. With covariance_dtype "auto" P keeps the dtype that
        it has. Raises ValueError for another number of weights, and OptionError if covariance_dtype is "float32" but
        this P cannot be stored so."""
        here, dtype = self.covariance, saved["tiles"].dtype
        if self.options.covariance_dtype == "auto" and dtype != here.tiles.dtype:
            here = self.covariance = here.reblock(self.plan, dtype=dtype)
        same = saved["sizes"].tolist() == list(self.plan.sizes) and len(saved["pending"]) == len(here.pending)
        if same and dtype == here.tiles.dtype:
            self.load_state_dict(saved)
        else:
            self.take_over(Covariance.from_state_dict(saved))
        rounded = self.covariance.tiles.dtype == torch.float32 != dtype
        if rounded and (condition := self.diagnostics().condition) >= FLOAT32_CONDITION:
            raise OptionError(
                f"The condition number of the old P is above {min(condition, 1e99):.1e}, too high for storage in "
                "float32: use covariance_dtype float64 or auto."
            )
        self.covariance.set(**self._constants(), **dict.fromkeys(self.health(), 0.0))

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Copy a saved covariance into this filter's, with "auto" its dtype too. Raises ValueError as that does."""
        before, recent = self.covariance, saved.get("recent", self._recent)
        if recent.shape != self._recent.shape:
            raise ValueError(
                f"The saved recent Jacobians have shape {tuple(recent.shape)} but this filter needs "
                f"{tuple(self._recent.shape)}; build it with the same model."
            )
        dtype = saved["tiles"].dtype if "tiles" in saved else before.tiles.dtype
        if self.options.covariance_dtype == "auto" and dtype != before.tiles.dtype:
            self.covariance = before.reblock(self.plan, dtype=dtype)
        try:
            self.covariance.load_state_dict(saved, self._spread)
        except ValueError:
            self.covariance = before
            raise
        self._recent.copy_(recent)
        self._next = 0  # the rows are saved in the order of their age
        self._unmeasured = int(saved.get("unmeasured", 0))

    def state_dict(self) -> dict[str, Any]:
        """What must be saved; large tensors are not copied. With a process group, `tiles` is a DTensor."""
        saved = self.covariance.state_dict()
        return {
            **saved,
            "tiles": self._spread(saved["tiles"]),
            "recent": self._recent.roll(-self._next, 0),
            "unmeasured": self._unmeasured,
        }

    def gathered(self) -> Covariance:
        """The covariance with all its tiles; every process of the group must call this."""
        p = self.covariance
        return replace(p, tiles=self._share.gather(p.tiles), first_tile=0) if self._share else p

    def _spread(self, tiles: Tensor) -> Tensor:
        return self._share.spread(tiles) if self._share else tiles

    def projector(self) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """P H without the factor β, and inner products, of up to 8 rows: `project` on a copy of `pending` with room for
        them, so that nothing is folded."""
        p = self.covariance
        room = p.pending.new_zeros(MAX_MEASUREMENTS, self.plan.num_weights)
        copy = replace(p, pending=torch.cat([p.pending, room]), state=p.state.clone())
        if self._share:
            return partial(self._share.project, self._ops, copy)
        return partial(self._ops.project, copy)

    def _rows(self, jacobian: Tensor) -> Tensor:
        n, jacobian = self.plan.num_weights, torch.as_tensor(jacobian, device=self.covariance.tiles.device)
        if jacobian.dim() not in (1, 2) or jacobian.shape[-1] != n:
            raise ValueError(f"jacobian should have shape ({n},) or (M, {n}) but has {tuple(jacobian.shape)}.")
        return jacobian.reshape(-1, n).to(torch.float64).contiguous()

    @property
    def _ops(self) -> ModuleType:
        return ops.backend(self.backend, self.covariance.tiles.device, self._share is not None)

    @property
    def _most_at_once(self) -> int:
        return min(MAX_MEASUREMENTS, len(self.covariance.pending))
