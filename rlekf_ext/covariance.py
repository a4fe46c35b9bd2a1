"""The packed covariance as a value: made, counted, unpacked, saved, loaded. csrc/covariance.h owns the layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
import torch
from torch import Tensor

from rlekf_ext import _C
from rlekf_ext.partition import BlockPlan

TILE: int = _C.TILE
MAX_MEASUREMENTS: int = _C.MAX_MEASUREMENTS
STATE: dict[str, int] = _C.STATE  # name of a scalar -> its place in `state`
STORAGE_DTYPES = {torch.float64, torch.float32}


@dataclass
class Covariance:
    """P = scale (S + shift I - Σ u_i u_iᵀ), block by block: S in packed tiles, the u_i that wait, and the filter's
    scalars.

    tiles (num_tiles, 64, 64) float64 or float32; pending (capacity, N) float64; state (19,) float64, see STATE;
    layout (L, 3) int64. All on one device.
    """

    plan: BlockPlan
    tiles: Tensor
    pending: Tensor
    state: Tensor
    layout: Tensor

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.tiles, self.pending, self.state, self.layout))

    def scalar(self, name: str) -> float:
        """One of the scalars named in STATE. Waits for the device."""
        return float(self.state[STATE[name]])

    def dense(self) -> list[Tensor]:
        """The blocks of P, each (n_l, n_l) float64, exactly symmetric."""
        scale, shift, count = (self.scalar(name) for name in ("scale", "shift", "num_pending"))
        blocks = []
        for block, u in zip(
            unpack(self.tiles, self.plan), self.pending[: int(count)].split(self.plan.sizes, 1), strict=True
        ):
            block -= u.T @ u
            block.diagonal().add_(shift)
            blocks.append(scale * torch.tril(block) + scale * torch.tril(block, -1).T)
        return blocks

    def state_dict(self) -> dict[str, Tensor]:
        """What must be saved; the tensors are not copied."""
        sizes = torch.tensor(self.plan.sizes, dtype=torch.int64)
        return {"sizes": sizes, "tiles": self.tiles, "pending": self.pending, "state": self.state}

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """Copy a saved covariance into this one. Raises ValueError for other blocks, another dtype or capacity."""
        sizes = tuple(saved["sizes"].tolist())
        if sizes != self.plan.sizes:
            raise ValueError(
                f"The saved covariance has {len(sizes)} blocks {_abridged(sizes)} but this filter has "
                f"{self.plan.num_blocks} blocks {_abridged(self.plan.sizes)}; build it with the same model, block_size "
                "and strategy."
            )
        for name in ("tiles", "pending", "state"):
            here, there = getattr(self, name), saved[name]
            if here.shape != there.shape or here.dtype != there.dtype:
                raise ValueError(
                    f"The saved {name} have shape {tuple(there.shape)} and {there.dtype} but this filter needs "
                    f"{tuple(here.shape)} and {here.dtype}; build it with the same `pending` and `covariance_dtype`."
                )
        for name in ("tiles", "pending", "state"):
            getattr(self, name).copy_(saved[name])


def identity(
    plan: BlockPlan,
    *,
    initial_covariance: float = 1.0,  # p_0: P starts as p_0 I
    dtype: torch.dtype = torch.float64,
    pending: int = 32,
    device: torch.device | str = "cpu",
) -> Covariance:
    """P = initial_covariance I, with the scalars of a filter that has no noise and does not forget.

    Raises ValueError for a dtype that is not float64 or float32 or a `pending` below 1, and MemoryError, before
    anything is allocated, when P will not fit.
    """
    device = torch.device(device)
    if dtype not in STORAGE_DTYPES:
        raise ValueError(f"covariance_dtype should be torch.float64 or torch.float32 but is {dtype}.")
    if pending < 1:
        raise ValueError(f"pending should be at least 1 but is {pending}.")
    needed, available = required_bytes(plan, dtype=dtype, pending=pending), available_bytes(device)
    if needed > available:
        smaller = "" if dtype == torch.float32 else ", or covariance_dtype=torch.float32, which halves it"
        raise MemoryError(
            f"The covariance needs {needed / 1e9:.2f} GB but {device} has {available / 1e9:.2f} GB: lower block_size "
            f"(the largest block is {max(plan.sizes)}){smaller}."
        )
    layout = torch.tensor(_C.layout(list(plan.sizes)), dtype=torch.int64)
    tiles = torch.empty(_num_tiles(plan), TILE, TILE, dtype=dtype, device=device)
    if device.type == "cpu":
        _C.advise_huge_pages(tiles.data_ptr(), tiles.nbytes)  # before the first touch: a step then misses no page table
    tiles.zero_()
    tiles.view(-1)[_diagonal(plan, layout.numpy()).to(device)] = initial_covariance
    state = torch.zeros(len(STATE), dtype=torch.float64, device=device)
    state[STATE["scale"]] = 1.0
    state[STATE["largest_diagonal"]] = initial_covariance
    state[STATE["process_noise_decay"]] = 1.0
    state[STATE["diagonal_ceiling"]] = inf
    waiting = torch.zeros(pending, plan.num_weights, dtype=torch.float64, device=device)
    return Covariance(plan, tiles, waiting, state, layout.to(device))


def required_bytes(plan: BlockPlan, *, dtype: torch.dtype = torch.float64, pending: int = 32) -> int:
    """Bytes of the packed triangle, the vectors that wait, and the scalars."""
    scalars = 8 * (len(STATE) + 3 * plan.num_blocks)
    return _num_tiles(plan) * TILE * TILE * dtype.itemsize + 8 * pending * plan.num_weights + scalars


def available_bytes(device: torch.device) -> int:
    """Memory that `device` has left: what its driver says of a GPU; on a CPU what the kernel and the cgroup allow."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [2**63]
    try:
        with open("/proc/meminfo") as lines:
            limits += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as used:
            limits.append(int(limit.read()) - int(used.read()))
    except (OSError, ValueError):  # not Linux, no cgroup, or "max": no limit from there
        pass
    return min(limits)


def pack(blocks: Sequence[Tensor], dtype: torch.dtype = torch.float64) -> Tensor:
    """Tiles (num_tiles, 64, 64) that hold symmetric blocks, each (n_l, n_l)."""
    packed = []
    for block in blocks:
        size = len(block)
        rows = -(-size // TILE)
        padded = block.new_zeros(rows * TILE, rows * TILE, dtype=dtype)
        padded[:size, :size] = block
        row, col = torch.tril_indices(rows, rows)
        packed.append(padded.view(rows, TILE, rows, TILE).transpose(1, 2)[row, col])
    return torch.cat(packed)


def unpack(tiles: Tensor, plan: BlockPlan) -> list[Tensor]:
    """The symmetric blocks, each (n_l, n_l) float64, that `tiles` hold."""
    blocks = []
    for size, part in zip(plan.sizes, tiles.split([_C.num_tiles(size) for size in plan.sizes]), strict=True):
        rows = -(-size // TILE)
        row, col = torch.tril_indices(rows, rows)
        whole = part.new_empty(rows, rows, TILE, TILE, dtype=torch.float64)
        whole[col, row] = part.transpose(1, 2).to(torch.float64)
        whole[row, col] = part.to(torch.float64)
        blocks.append(whole.transpose(1, 2).reshape(rows * TILE, rows * TILE)[:size, :size].clone())
    return blocks


def _num_tiles(plan: BlockPlan) -> int:
    return sum(_C.num_tiles(size) for size in plan.sizes)


def _diagonal(plan: BlockPlan, layout: np.ndarray) -> Tensor:
    """Where the diagonal of P stands in the flat tiles: (N,) int64."""
    block = np.repeat(layout, plan.sizes, axis=0)
    row, inside = np.divmod(np.arange(plan.num_weights) - block[:, 0], TILE)
    return torch.from_numpy((block[:, 2] + row * (row + 3) // 2) * TILE * TILE + inside * (TILE + 1))


def _abridged(sizes: Sequence[int]) -> str:
    return str(list(sizes)) if len(sizes) <= 8 else f"[{', '.join(map(str, sizes[:8]))}, ...]"
