"""Where the entries of P are in memory: the one Python file that knows the packed layout of csrc/covariance.h.

A block of n weights keeps the lower triangle of its 64 x 64 tiles, one row of tiles after another; the tiles of all
blocks are in one tensor (num_tiles, 64, 64), those on the diagonal whole. Rows and columns past a block's end are zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rlekf_ext import _C
from rlekf_ext.partition import BlockPlan

TILE: int = _C.TILE


def num_tiles(plan: BlockPlan) -> int:
    return sum(_C.num_tiles(size) for size in plan.sizes)


def layout_of(plan: BlockPlan, first_tile: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """(L, 3) int64: first weight, size and first tile of each block; tiles are numbered from `first_tile` on."""
    rows = [(weight, size, tile - first_tile) for weight, size, tile in _C.layout(list(plan.sizes))]
    return torch.tensor(rows, dtype=torch.int64, device=device)


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


def entry_places(plan: BlockPlan) -> tuple[Tensor, Tensor]:
    """Entry (i, j) of P, i >= j in one block, is at row[i] + col[j] in the flat tiles: row, col (N,) int64."""
    block = np.repeat(np.array(_C.layout(list(plan.sizes))), plan.sizes, axis=0)
    tile, inside = np.divmod(np.arange(plan.num_weights) - block[:, 0], TILE)
    row = ((block[:, 2] + tile * (tile + 1) // 2) * TILE + inside) * TILE
    return torch.from_numpy(row), torch.from_numpy(tile * TILE * TILE + inside)


def diagonal_places(plan: BlockPlan, own: range) -> tuple[Tensor, Tensor]:
    """The weights whose diagonal entry is in the tiles `own`, and its index in these, flattened: both int64."""
    row, col = entry_places(plan)
    place = row + col - own.start * TILE * TILE
    weights = ((place >= 0) & (place < len(own) * TILE * TILE)).nonzero()[:, 0]
    return weights, place[weights]


def tile_runs(layout: Tensor, num_tiles: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tiles from 0 to num_tiles, cut into runs of at most `length` tiles of one tile row, for kernels that visit
    one run per program. Waits for the device.

    runs (runs, 4): block, tile row in it, columns from and to; tile_rows (tile rows, 4): block, tile row in it, first
    of its runs, their number; first_tile_rows (L,): of each block. All int64, on the device of `layout`.
    """
    sizes, first_tile = layout[:, 1:].cpu().numpy().T
    rows = -(-sizes // TILE)
    first_tile_rows = np.cumsum(rows) - rows
    block = np.repeat(np.arange(len(sizes)), rows)
    row = np.arange(len(block)) - first_tile_rows[block]
    left = first_tile[block] + row * (row + 1) // 2  # index of the row's first tile, here or not
    from_col, to_col = np.maximum(0, -left), np.minimum(row + 1, num_tiles - left)
    num_runs = -(-np.maximum(0, to_col - from_col) // length)
    first_run = np.cumsum(num_runs) - num_runs
    tile_row = np.repeat(np.arange(len(row)), num_runs)
    col = from_col[tile_row] + (np.arange(len(tile_row)) - first_run[tile_row]) * length
    tables = (
        np.stack([block[tile_row], row[tile_row], col, np.minimum(col + length, to_col[tile_row])], 1),
        np.stack([block, row, first_run, num_runs], 1),
        first_tile_rows,
    )
    runs, tile_rows, first_tile_rows = (torch.from_numpy(table).to(layout.device) for table in tables)
    return runs, tile_rows, first_tile_rows
