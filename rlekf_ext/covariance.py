"""The packed covariance as a value: made, counted, unpacked, saved, loaded, re-blocked. csrc/covariance.h owns the
layout."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlekf_ext import _C
from rlekf_ext.partition import BlockPlan

TILE: int = _C.TILE
MAX_MEASUREMENTS: int = _C.MAX_MEASUREMENTS
LARGEST_SCALE: float = _C.LARGEST_SCALE  # at a fold, what is beyond goes from the scale into S
STATE: dict[str, int] = _C.STATE  # name of a scalar -> its index in `state`
STORAGE_DTYPES = {torch.float64, torch.float32}


class Scalars(NamedTuple):
    """The scalars of the filter, in the order of `state`. csrc/covariance.h owns the list and says what each is."""

    forgetting: float
    forgetting_rate: float
    measurement_noise: float
    process_noise: float
    scale: float
    shift: float
    num_pending: int
    variance: float
    rank_one: float
    num_updates: int
    skipped_innovation: int
    skipped_jacobian: int
    skipped_variance: int
    skipped_in_a_row: int

    @classmethod
    def of(cls, state: Tensor) -> Scalars:
        """Those in a `state` tensor. Waits for the device."""
        now = zip(STATE, state.tolist(), strict=True)
        return cls(**{name: int(value) if name in _C.COUNTERS else value for name, value in now})


if Scalars._fields != tuple(STATE):
    raise ImportError(f"rlekf_ext._C has the scalars {list(STATE)}, not those of this source: build the package again.")


@dataclass(frozen=True)
class StoredTiles:
    """The tiles of a covariance in a folder of torch.distributed.checkpoint, under a name: they stand for the tensor in
    a saved covariance until they are read."""

    folder: str
    name: str
    shape: torch.Size
    dtype: torch.dtype

    def read(self, tiles: Tensor) -> Tensor:
        """Fill and return `tiles`: all of them, or a DTensor of them, which every one of its processes must ask for."""
        from torch.distributed import checkpoint

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # so it is where one process reads all
            checkpoint.load({self.name: tiles}, checkpoint_id=self.folder, no_dist=not _is_spread(tiles))
        return tiles


@dataclass
class Covariance:
    """P = scale (S + shift I - Σ u_i u_iᵀ), block by block: S in packed tiles, the u_i that wait, and the filter's
    scalars.

    tiles (num_tiles, 64, 64) float64 or float32; pending (capacity, N) float64; state (14,) float64, see Scalars;
    layout (L, 3) int64. All on one device. One of several processes that share P keeps the tiles from `first_tile` on
    alone; `dense`, `from_state_dict` and another plan's `reblock` need all of them (KalmanFilter.gathered).
    """

    plan: BlockPlan
    tiles: Tensor
    pending: Tensor
    state: Tensor
    layout: Tensor
    first_tile: int = 0

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.tiles, self.pending, self.state, self.layout))

    @property
    def scale(self) -> Tensor:
        """The scalar `scale`, () on the device: this waits for nothing."""
        return self.state[STATE["scale"]]

    def scalars(self) -> Scalars:
        """All scalars of the filter. Waits for the device."""
        return Scalars.of(self.state)

    def set(self, **scalars: float | Tensor) -> None:
        """Write the scalars named, as in `set(measurement_noise=4.0)`; the others stay."""
        for name, value in scalars.items():
            self.state[STATE[name]] = value

    def dense(self) -> list[Tensor]:
        """The blocks of P, each (n_l, n_l) float64, exactly symmetric."""
        now = self.scalars()
        blocks = []
        for block, u in zip(
            unpack(self.tiles, self.plan), self.pending[: now.num_pending].split(self.plan.sizes, 1), strict=True
        ):
            block -= u.T @ u
            block.diagonal().add_(now.shift)
            blocks.append(now.scale * torch.tril(block) + now.scale * torch.tril(block, -1).T)
        return blocks

    def diagonal(self) -> Tensor:
        """The diagonal of P, (N,) float64, of all tiles."""
        return self.diagonal_of(self.stored_diagonal())

    def stored_diagonal(self) -> Tensor:
        """The diagonal of S, (N,) float64, zero where it stands in tiles of another process."""
        row, col = _places(self.plan)
        place = (row + col - self.first_tile * TILE * TILE).to(self.tiles.device)
        mine = (place >= 0) & (place < self.tiles.numel())
        found = self.pending.new_zeros(self.plan.num_weights)
        found[mine] = self.tiles.view(-1)[place[mine]].to(torch.float64)
        return found

    def diagonal_of(self, stored: Tensor) -> Tensor:
        """The diagonal of P from that of S."""
        now = self.scalars()
        return now.scale * (stored + now.shift - self.pending[: now.num_pending].square().sum(0))

    def state_dict(self) -> dict[str, Tensor]:
        """What must be saved; the tensors are not copied."""
        sizes = torch.tensor(self.plan.sizes, dtype=torch.int64)
        return {"sizes": sizes, "tiles": self.tiles, "pending": self.pending, "state": self.state}

    @classmethod
    def from_state_dict(cls, saved: dict[str, Any]) -> Covariance:
        """The covariance that was saved, with its own blocks and dtype; the tensors are not copied.

        Raises ValueError for what is no saved covariance, one of another version of this package, or one that is spread
        over processes.
        """
        plan, tiles, pending, state = _saved_parts(saved)
        if isinstance(tiles, StoredTiles):
            tiles = tiles.read(torch.empty(tiles.shape, dtype=tiles.dtype))
        if _is_spread(tiles):
            raise ValueError(
                "The saved covariance is spread over processes but here all of it is needed: load it into an RLEKF of "
                "one process by torch.distributed.checkpoint."
            )
        layout = torch.tensor(_C.layout(list(plan.sizes)), dtype=torch.int64, device=tiles.device)
        return cls(plan, tiles, pending, state, layout)

    def load_state_dict(self, saved: dict[str, Any], spread: Callable[[Tensor], Tensor] = lambda own: own) -> None:
        """Copy a saved covariance into this one, from whatever device and backend; of all tiles, those of this process.
        `spread` makes a DTensor of a process's tiles, which is needed to read stored ones.

        Raises ValueError, and changes nothing, for other blocks, another dtype or capacity: see `reblock`.
        """
        plan, tiles, pending, state = _saved_parts(saved)
        stored = tiles if isinstance(tiles, StoredTiles) else None
        if stored:
            tiles = torch.empty(self.tiles.shape, dtype=stored.dtype, device="meta")
        else:
            tiles = tiles.to_local() if _is_spread(tiles) else tiles[self.first_tile :][: len(self.tiles)]
        way_out = "or take over its P as it is said at Covariance.reblock."
        if plan != self.plan:
            sizes = plan.sizes
            raise ValueError(
                f"The saved covariance has {len(sizes)} blocks {_abridged(sizes)} but this filter has "
                f"{self.plan.num_blocks} blocks {_abridged(self.plan.sizes)}; build it with the same model, block_size "
                f"and strategy, {way_out}"
            )
        found = {"tiles": tiles, "pending": pending, "state": state}
        for name, there in found.items():
            here = getattr(self, name)
            if here.shape != there.shape or here.dtype != there.dtype:
                raise ValueError(
                    f"The saved {name} have shape {tuple(there.shape)} and {there.dtype} but this filter needs "
                    f"{tuple(here.shape)} and {here.dtype}; build it with the same `pending` and `covariance_dtype`, "
                    f"{way_out}"
                )
        if stored:
            stored.read(spread(self.tiles))
            del found["tiles"]
        for name, there in found.items():
            getattr(self, name).copy_(there)

    def reblock(
        self, plan: BlockPlan, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Covariance:
        """A new covariance of the same weights in the blocks of `plan`, stored in `dtype` on `device`; by default those
        of this one.

        Entries of P that lie in a block of both plans are kept; the others of the new blocks are zero. (The diagonal
        lies in both, so nothing starts anew.) A new block is then block diagonal with principal submatrices of P on
        its diagonal: positive definite where P was. Storing float64 in float32 rounds S, and keeps that only while
        cond(P) is below about 1e7.

        On other blocks the vectors that wait are folded into S; on the same ones they go on waiting, and in the same
        dtype P is the same bit for bit. All scalars carry over, `measurement_noise` too: its default is the number of
        blocks, but P was earned against the old one. To have the new default, set
        p.set(measurement_noise=plan.num_blocks).

        It works by rows of tiles, in about 4 kB a weight of the largest new block beside the two covariances. An
        optimizer with other blocks, dtype or `pending` than a saved one takes over its P by

            saved = Covariance.from_state_dict(state_dict["state"][0])
            optimizer.filter.covariance = saved.reblock(optimizer.filter.plan, dtype=torch.float32)

        Raises ValueError for another number of weights or a wrong dtype, MemoryError when the new one will not fit.
        """
        if plan.num_weights != self.plan.num_weights:
            raise ValueError(
                f"The new blocks should hold the {self.plan.num_weights} weights of the covariance but hold "
                f"{plan.num_weights}; reblock needs the same model."
            )
        own = range(self.first_tile, self.first_tile + len(self.tiles))
        whole = len(own) == _num_tiles(self.plan)
        if not whole and plan != self.plan:
            raise ValueError("Other blocks need all tiles of P but this process has a part: see KalmanFilter.gathered.")
        new = identity(
            plan,
            dtype=dtype or self.tiles.dtype,
            pending=len(self.pending),
            device=device or self.tiles.device,
            tiles=None if whole else own,
        )
        new.state.copy_(self.state)
        if plan == self.plan:
            new.tiles.copy_(self.tiles)
            new.pending.copy_(self.pending)
            return new
        new.set(num_pending=0)
        waiting = self.pending[: self.scalars().num_pending]
        block = torch.arange(self.plan.num_blocks, device=self.tiles.device)
        block = block.repeat_interleave(self.layout[:, 1])
        row, col = (places.to(self.tiles.device) for places in _places(self.plan))
        tile = 0
        for first, size in zip(plan.offsets, plan.sizes, strict=True):
            for top in range(first, first + size, TILE):  # a row of tiles of a new block, up to its diagonal
                end = min(top + TILE, first + size)
                i, j = slice(top, end), slice(first, end)
                kept = (block[i, None] == block[j]).tril_(top - first)
                s = self.tiles.view(-1)[torch.where(kept, row[i, None] + col[j], 0)].to(torch.float64)
                s = torch.where(kept, s - waiting[:, i].T @ waiting[:, j], 0.0)
                strip = s.new_zeros(TILE, top - first + TILE)
                strip[: end - top, : end - first] = s
                corner = strip[:, -TILE:]
                corner += corner.tril(-1).T  # tiles on the diagonal are kept whole
                tiles = strip.view(TILE, -1, TILE).transpose(0, 1)
                new.tiles[tile : tile + len(tiles)] = tiles
                tile += len(tiles)
        return new


def identity(
    plan: BlockPlan,
    *,
    initial_covariance: float = 1.0,  # p_0: P starts as p_0 I
    dtype: torch.dtype = torch.float64,
    pending: int = 32,
    device: torch.device | str = "cpu",
    tiles: range | None = None,  # those that this process keeps; None: all
) -> Covariance:
    """P = initial_covariance I, with the scalars of a filter that has no noise and does not forget.

    Raises ValueError for a dtype that is not float64 or float32 or a `pending` below 1, and MemoryError, before
    anything is allocated, when P will not fit.
    """
    device = torch.device(device)
    if dtype not in STORAGE_DTYPES:
        raise ValueError(f'covariance_dtype should be torch.float64, torch.float32 or "auto" but is {dtype}.')
    if pending < 1:
        raise ValueError(f"pending should be at least 1 but is {pending}.")
    own = range(_num_tiles(plan)) if tiles is None else tiles
    needed = required_bytes(plan, dtype=dtype, pending=pending, num_tiles=len(own))
    available = available_bytes(device)
    if needed > available:
        smaller = "" if dtype == torch.float32 else ", or covariance_dtype=torch.float32, which halves it"
        raise MemoryError(
            f"The covariance needs {needed / 1e9:.2f} GB but {device} has {available / 1e9:.2f} GB: lower block_size "
            f"(the largest block is {max(plan.sizes)}){smaller}."
        )
    layout = torch.tensor(_C.layout(list(plan.sizes)), dtype=torch.int64)
    s = torch.empty(len(own), TILE, TILE, dtype=dtype, device=device)
    if device.type == "cpu":
        _C.advise_huge_pages(s.data_ptr(), s.nbytes)  # before the first touch: a step then misses no page table
    s.zero_()
    row, col = _places(plan)
    place = row + col - own.start * TILE * TILE
    s.view(-1)[place[(place >= 0) & (place < s.numel())].to(device)] = initial_covariance
    state = torch.zeros(len(STATE), dtype=torch.float64, device=device)
    waiting = torch.zeros(pending, plan.num_weights, dtype=torch.float64, device=device)
    p = Covariance(plan, s, waiting, state, layout.to(device), own.start)
    p.set(scale=1.0)
    return p


def from_lkf(saved: dict[str, Any]) -> Covariance:
    """The covariance of DeePMD-kit's LKF from its optimizer's state dict, `torch.load(file)["optimizer"]`.

    LKF keeps dense blocks of P (n_l, n_l), in the dtype of its first parameter, and λ. Its blocks are those of the
    strategy "deepmd", its weights stand in the order of `transpose=True`. P is symmetrised, and stored in float64 on
    its device; λ and ν carry over, and the measurement noise is the number of blocks, as there. An optimizer of the
    same parameters takes it over by

        optimizer.filter.covariance = from_lkf(saved).reblock(optimizer.filter.plan)

    Beside P as it was and as it is now, it needs four times the largest block.

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
            f"LKF's state should hold square blocks of P of sizes {_abridged(sizes)} but holds "
            f"{_abridged([shape[0] for shape in shapes])}: a distributed run of LKF saves those of rank 0 alone, and "
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


def required_bytes(
    plan: BlockPlan, *, dtype: torch.dtype = torch.float64, pending: int = 32, num_tiles: int | None = None
) -> int:
    """Bytes of the packed triangle (or of so many tiles of it), the vectors that wait, and the scalars."""
    scalars = 8 * (len(STATE) + 3 * plan.num_blocks)
    return (
        (_num_tiles(plan) if num_tiles is None else num_tiles) * TILE * TILE * dtype.itemsize
        + 8 * pending * plan.num_weights
        + scalars
    )


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


def _saved_parts(saved: dict[str, Any]) -> tuple[BlockPlan, Any, Tensor, Tensor]:
    """Plan, tiles, pending and state of a saved covariance, whose shapes fit each other; else ValueError."""
    if missing := [name for name in ("sizes", "tiles", "pending", "state") if name not in saved]:
        raise ValueError(
            f"This is not a saved covariance of RLEKF: it has no {', '.join(missing)}. It stands in "
            "`RLEKF.state_dict()` at ['state'][0]; `from_lkf` reads DeePMD-kit's."
        )
    tiles, pending, state = saved["tiles"], saved["pending"], saved["state"]
    plan = BlockPlan(tuple(saved["sizes"].tolist()))
    wanted = {
        "tiles": (tiles, (_num_tiles(plan), TILE, TILE)),
        "pending": (pending, (len(pending), plan.num_weights)),
        "state": (state, (len(STATE),)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape:
            raise ValueError(
                f"The saved {name} should have shape {shape} for these {plan.num_blocks} blocks but have "
                f"{tuple(tensor.shape)}: another version of rlekf_ext wrote them, and can read them."
            )
    return plan, tiles, pending, state


def _is_spread(tiles: Any) -> bool:
    """Whether it is a DTensor, whose class takes long to import."""
    return hasattr(tiles, "to_local")


def _num_tiles(plan: BlockPlan) -> int:
    return sum(_C.num_tiles(size) for size in plan.sizes)


def _places(plan: BlockPlan) -> tuple[Tensor, Tensor]:
    """Entry (i, j) of P, i >= j in one block, stands at row[i] + col[j] in the flat tiles: row, col (N,) int64."""
    block = np.repeat(np.array(_C.layout(list(plan.sizes))), plan.sizes, axis=0)
    tile, inside = np.divmod(np.arange(plan.num_weights) - block[:, 0], TILE)
    row = ((block[:, 2] + tile * (tile + 1) // 2) * TILE + inside) * TILE
    return torch.from_numpy(row), torch.from_numpy(tile * TILE * TILE + inside)


def _abridged(sizes: Sequence[int]) -> str:
    return str(list(sizes)) if len(sizes) <= 8 else f"[{', '.join(map(str, sizes[:8]))}, ...]"
