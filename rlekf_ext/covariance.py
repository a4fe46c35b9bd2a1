"""The block-diagonal covariance P as a value: created, read, saved, loaded, moved to other blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlekf_ext import _C
from rlekf_ext.environment import available_bytes
from rlekf_ext.errors import NotEnoughMemoryError
from rlekf_ext.options import FilterOptions
from rlekf_ext.packing import TILE, diagonal_places, entry_places, layout_of, num_tiles, unpack
from rlekf_ext.partition import BlockPlan

MAX_MEASUREMENTS: int = _C.MAX_MEASUREMENTS
LARGEST_SCALE: float = _C.LARGEST_SCALE  # above it, a fold moves a power of two from the scale into S
LEAST_VARIANCE: float = _C.LEAST_VARIANCE  # no update leaves HᵀPH below this times HᵀH times a bound on P
STATE: dict[str, int] = _C.STATE  # name of a scalar -> its index in `state`
STORAGE_DTYPES = {torch.float64, torch.float32}
FORMAT = 1  # of state_dict


class Scalars(NamedTuple):
    """The scalars of the filter, in the order of `state`. csrc/covariance.h owns the list and explains each."""

    forgetting: float
    forgetting_rate: float
    measurement_noise: float
    process_noise: float
    scale: float
    shift: float
    largest: float
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
        """The scalars in a `state` tensor. Waits for the device."""
        now = zip(STATE, state.tolist(), strict=True)
        return cls(**{name: int(value) if name in _C.COUNTERS else value for name, value in now})


if Scalars._fields != tuple(STATE):
    raise ImportError(f"rlekf_ext._C has the scalars {list(STATE)}, not those of this source: rebuild the package.")


@dataclass
class Covariance:
    """P = scale (S + shift I - Σ u_i u_iᵀ), block by block: S in packed tiles, the pending u_i, and the filter's
    scalars.

    tiles (num_tiles, 64, 64) float64 or float32; pending (capacity, N) float64; state (15,) float64, see Scalars;
    layout (L, 3) int64. All on one device. If several processes share P, each keeps only its own tiles, from
    `first_tile` on; `dense`, `from_state_dict` and `reblock` to another plan need all tiles (KalmanFilter.gathered).
    """

    plan: BlockPlan
    tiles: Tensor
    pending: Tensor
    state: Tensor
    layout: Tensor
    first_tile: int = 0

    @property
    def num_bytes(self) -> int:
        """The size of all its tensors; tiles of other processes do not count."""
        return sum(tensor.nbytes for tensor in (self.tiles, self.pending, self.state, self.layout))

    @property
    def own_tiles(self) -> range:
        """The indices of the tiles that are here, among all tiles of P."""
        return range(self.first_tile, self.first_tile + len(self.tiles))

    @property
    def scale(self) -> Tensor:
        """The scalar `scale`, () on the device; does not wait for it."""
        return self.state[STATE["scale"]]

    def scalars(self) -> Scalars:
        """All scalars of the filter. Waits for the device."""
        return Scalars.of(self.state)

    def set(self, **scalars: float | Tensor) -> None:
        """Write the named scalars, as in `set(measurement_noise=4.0)`; the others stay unchanged."""
        for name, value in scalars.items():
            place = self.state[STATE[name]]
            if isinstance(value, Tensor):
                place.copy_(value)
            else:
                place.fill_(value)

    def set_diagonal(self, variances: Tensor) -> None:
        """Start over: P becomes a diagonal, variances (N,) > 0; the other scalars stay as they are."""
        largest = variances.max()
        weights, places = _places_on(self.plan, self.own_tiles, self.tiles.device)
        self.tiles.zero_()
        self.tiles.view(-1)[places] = (variances / largest)[weights].to(self.tiles.dtype)
        self.pending.zero_()
        self.set(scale=largest, shift=0.0, largest=1.0, num_pending=0)

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
        """The diagonal of P, (N,) float64; needs all tiles."""
        return self.diagonal_of(self.stored_diagonal())

    def stored_diagonal(self) -> Tensor:
        """The diagonal of S, (N,) float64, zero for weights whose entry is in a tile of another process."""
        weights, places = _places_on(self.plan, self.own_tiles, self.tiles.device)
        found = self.pending.new_zeros(self.plan.num_weights)
        found[weights] = self.tiles.view(-1)[places].to(torch.float64)
        return found

    def diagonal_of(self, stored: Tensor) -> Tensor:
        """The diagonal of P from that of S, both (N,) float64."""
        now = self.scalars()
        return now.scale * (stored + now.shift - self.pending[: now.num_pending].square().sum(0))

    def state_dict(self) -> dict[str, Any]:
        """What must be saved; the tensors are not copied."""
        sizes = torch.tensor(self.plan.sizes, dtype=torch.int64)
        return {
            "format": FORMAT,
            "sizes": sizes,
            "tiles": self.tiles,
            "pending": self.pending,
            "state": self.state,
            "names": list(STATE),  # of the scalars in `state`
        }

    @classmethod
    def from_state_dict(cls, saved: dict[str, Any]) -> Covariance:
        """The covariance that was saved, with its own blocks and dtype; the tensors are not copied.

        Raises ValueError for anything but a saved covariance, for one of a later version of this package, and for one
        that is spread over processes.
        """
        found = _saved_parts(saved)
        tiles = found.tiles
        if _is_stored(tiles):
            tiles = tiles.read(torch.empty(tiles.shape, dtype=tiles.dtype))
        if _is_spread(tiles):
            raise ValueError(
                "The saved covariance is spread over processes but all of it is needed here: load it into an RLEKF of "
                "one process with torch.distributed.checkpoint."
            )
        return cls(found.plan, tiles, found.pending, found.state, layout_of(found.plan, device=tiles.device))

    def load_state_dict(self, saved: dict[str, Any], spread: Callable[[Tensor], Tensor] = lambda own: own) -> None:
        """Copy a saved covariance into this one, whatever device and backend saved it. With several processes only this
        process's tiles are copied; `spread` must wrap them in a DTensor so that stored tiles can be loaded.

        Raises ValueError, and changes nothing, for different blocks, dtype or `max_pending`: see `reblock`.
        """
        plan, tiles, pending, state = _saved_parts(saved)
        stored = tiles if _is_stored(tiles) else None
        if stored:
            tiles = torch.empty(self.tiles.shape, dtype=stored.dtype, device="meta")
        else:
            tiles = tiles.to_local() if _is_spread(tiles) else tiles[self.first_tile :][: len(self.tiles)]
        way_out = "or take over its P with take_over(Covariance.from_state_dict(saved))."
        if plan != self.plan:
            raise ValueError(
                f"The saved covariance has {plan.num_blocks} blocks {abridged(plan.sizes)} but this filter has "
                f"{self.plan.num_blocks} blocks {abridged(self.plan.sizes)}; build it with the same model, block_size "
                f"and strategy, {way_out}"
            )
        found = {"tiles": tiles, "pending": pending, "state": state}
        for name, there in found.items():
            here = getattr(self, name)
            if here.shape != there.shape or here.dtype != there.dtype:
                raise ValueError(
                    f"The saved {name} have shape {tuple(there.shape)} and {there.dtype} but this filter needs "
                    f"{tuple(here.shape)} and {here.dtype}; build it with the same max_pending and covariance_dtype, "
                    f"{way_out}"
                )
        if stored:
            stored.read(spread(self.tiles))
            del found["tiles"]
        for name, there in found.items():
            getattr(self, name).copy_(there)

    def reblock(
        self,
        plan: BlockPlan,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        max_pending: int | None = None,
    ) -> Covariance:
        """A new covariance of the same weights in the blocks of `plan`, stored in `dtype` on `device`, with room for
        `max_pending` vectors; by default those of this one.

        Entries of P that are in a block of both plans are kept; all others of the new blocks are zero. (The diagonal is
        in both, so no weight starts over.) Each new block is block diagonal with principal submatrices of P on its
        diagonal, and so positive definite if P was. Storing float64 in float32 rounds S, and preserves this only while
        cond(P) is below about 1e7.

        With different blocks or room, pending vectors are folded into S; otherwise they stay pending, and in the same
        dtype P is the same bit for bit. All scalars carry over, including `measurement_noise`: its default is the
        number of blocks, but P was built up with the old one. For the new default: p.set(measurement_noise=num_blocks).

        Works by rows of tiles, in about 4 kB per weight of the largest new block besides the two covariances.

        Raises ValueError for another number of weights, a wrong dtype, or tiles missing for another plan, and
        NotEnoughMemoryError if the new one does not fit.
        """
        if plan.num_weights != self.plan.num_weights:
            raise ValueError(
                f"The new blocks should hold the {self.plan.num_weights} weights of the covariance but hold "
                f"{plan.num_weights}; reblock needs the same model."
            )
        whole = len(self.tiles) == num_tiles(self.plan)
        if not whole and plan != self.plan:
            raise ValueError("Other blocks need all tiles of P but this process has some: see KalmanFilter.gathered.")
        new = identity(
            plan,
            dtype=dtype or self.tiles.dtype,
            max_pending=max_pending or len(self.pending),
            device=device or self.tiles.device,
            tiles=None if whole else self.own_tiles,
        )
        new.state.copy_(self.state)
        if plan == self.plan and len(new.pending) == len(self.pending):
            new.tiles.copy_(self.tiles)
            new.pending.copy_(self.pending)
            return new
        new.set(num_pending=0)
        pending = self.pending[: self.scalars().num_pending]
        block = torch.arange(self.plan.num_blocks, device=self.tiles.device)
        block = block.repeat_interleave(self.layout[:, 1])
        row, col = (places.to(self.tiles.device) for places in entry_places(self.plan))
        tile = 0
        for first, size in zip(plan.offsets, plan.sizes, strict=True):
            for top in range(first, first + size, TILE):  # a row of tiles of a new block, up to its diagonal
                end = min(top + TILE, first + size)
                i, j = slice(top, end), slice(first, end)
                kept = (block[i, None] == block[j]).tril_(top - first)
                s = self.tiles.view(-1)[torch.where(kept, row[i, None] + col[j], 0)].to(torch.float64)
                s = torch.where(kept, s - pending[:, i].T @ pending[:, j], 0.0)
                strip = s.new_zeros(TILE, top - first + TILE)
                strip[: end - top, : end - first] = s
                corner = strip[:, -TILE:]
                corner += corner.tril(-1).T  # tiles on the diagonal are stored whole
                tiles = strip.view(TILE, -1, TILE).transpose(0, 1)
                new.tiles[tile : tile + len(tiles)] = tiles
                tile += len(tiles)
        return new


@lru_cache(maxsize=4)
def _places_on(plan: BlockPlan, own: range, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(index.to(device) for index in diagonal_places(plan, own))


def identity(
    plan: BlockPlan,
    *,
    initial_covariance: float = 1.0,  # p_0: P starts as p_0 I
    dtype: torch.dtype = torch.float64,
    max_pending: int = FilterOptions.max_pending,
    device: torch.device | str = "cpu",
    tiles: range | None = None,  # those that this process keeps; None: all of them
) -> Covariance:
    """P = initial_covariance I, with the scalars of a filter that has no noise and does not forget.

    Raises ValueError for a dtype that is not float64 or float32, and NotEnoughMemoryError, before anything is
    allocated, if P does not fit.
    """
    device = torch.device(device)
    if dtype not in STORAGE_DTYPES:
        raise ValueError(f"dtype should be torch.float64 or torch.float32 but is {dtype}.")
    own = range(num_tiles(plan)) if tiles is None else tiles
    needed = required_bytes(plan, dtype=dtype, max_pending=max_pending, num_own=len(own))
    available = available_bytes(device)
    smaller = "" if dtype == torch.float32 else ", or covariance_dtype float32, which halves it"
    too_large = (
        f"The covariance needs {needed / 1e9:.2f} GB but {device} has {available / 1e9:.2f} GB: lower block_size "
        f"(the largest block is {max(plan.sizes)}){smaller}"
    )
    if needed > available:
        raise NotEnoughMemoryError(f"{too_large}.")
    try:
        s = torch.empty(len(own), TILE, TILE, dtype=dtype, device=device)
        pending = torch.empty(max_pending, plan.num_weights, dtype=torch.float64, device=device)
    except RuntimeError as error:  # what torch makes of memory that it does not get
        raise NotEnoughMemoryError(f"{too_large}.") from error
    if device.type == "cpu":
        _C.advise_huge_pages(s.data_ptr(), s.nbytes)  # before the first touch: a step then has fewer TLB misses
    new = Covariance(plan, s, pending, _initial_state(device), layout_of(plan, device=device), own.start)
    new.set_diagonal(torch.full((plan.num_weights,), initial_covariance, dtype=torch.float64, device=device))
    return new


def required_bytes(
    plan: BlockPlan,
    *,
    dtype: torch.dtype = torch.float64,
    max_pending: int = FilterOptions.max_pending,
    num_own: int | None = None,
) -> int:
    """Bytes of the packed triangle (or of `num_own` tiles of it), the pending vectors, and the scalars."""
    scalars = 8 * (len(STATE) + 3 * plan.num_blocks)
    count = num_tiles(plan) if num_own is None else num_own
    return count * TILE * TILE * dtype.itemsize + 8 * max_pending * plan.num_weights + scalars


def abridged(sizes: Sequence[int]) -> str:
    """Block sizes, shortened for a message."""
    return str(list(sizes)) if len(sizes) <= 8 else f"[{', '.join(map(str, sizes[:8]))}, ...]"


def _initial_state(device: torch.device | str) -> Tensor:
    """The scalars that a filter starts with; a checkpoint written before a scalar was added takes it from here."""
    state = torch.zeros(len(STATE), dtype=torch.float64, device=device)
    state[STATE["scale"]] = state[STATE["largest"]] = 1.0
    return state


class _Saved(NamedTuple):
    plan: BlockPlan
    tiles: Any  # a Tensor, a DTensor, or stored tiles with a `read` into one of these
    pending: Tensor
    state: Tensor


def _saved_parts(saved: dict[str, Any]) -> _Saved:
    """The contents of a saved covariance. Raises ValueError unless they are complete and their shapes fit together."""
    if missing := [name for name in ("sizes", "tiles", "pending", "state", "names") if name not in saved]:
        raise ValueError(
            f"This is not a saved covariance of RLEKF: it has no {', '.join(missing)}. One is in "
            "`RLEKF.state_dict()` at ['state'][0]; integrations.lkf.from_lkf reads DeePMD-kit's."
        )
    names = list(saved["names"])
    if saved.get("format") != FORMAT or (unknown := sorted(set(names) - set(STATE))):
        what = f"format {saved.get('format')}" if saved.get("format") != FORMAT else f"scalars {', '.join(unknown)}"
        raise ValueError(
            f"The saved covariance has {what}, which this version of rlekf_ext does not know: read it with "
            "the version that wrote it."
        )
    tiles, pending = saved["tiles"], saved["pending"]
    plan = BlockPlan(tuple(saved["sizes"].tolist()))
    wanted = {
        "tiles": (tiles, (num_tiles(plan), TILE, TILE)),
        "pending": (pending, (len(pending), plan.num_weights)),
        "state": (saved["state"], (len(names),)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape:
            raise ValueError(
                f"The saved {name} should have shape {shape} for these {plan.num_blocks} blocks but have "
                f"{tuple(tensor.shape)}: the checkpoint is damaged."
            )
    state = _initial_state(saved["state"].device)
    state[[STATE[name] for name in names]] = saved["state"]
    return _Saved(plan, tiles, pending, state)


def _is_spread(tiles: Any) -> bool:
    """Whether it is a DTensor, whose class takes long to import."""
    return hasattr(tiles, "to_local")


def _is_stored(tiles: Any) -> bool:
    """Whether it is a reference to tiles in a file (checkpoint.StoredTiles)."""
    return not isinstance(tiles, Tensor)
