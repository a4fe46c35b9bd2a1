"""The ops as Triton kernels: for GPUs that the compiled ops have no kernels for, and on a CPU in Triton's interpreter.

A step is five launches, each over all blocks. project:
    _visit    reads each tile once (and writes it in a fold) and multiplies it by all Jacobians; some compute u_iᵀh
    _reduce   adds the sums of a tile row in a fixed order, the shift and the pending vectors: cross, its part of gram
    _gather   gram, and the state after the fold
correct:
    _update   M measurements in sequence, on inner products alone: one program
    _apply    the updates to weights and pending vectors

Traffic: the packed triangle, and 2 % of it in float64 for the column sums from _visit to _reduce (M = 1). The limit is
the device's read bandwidth. There are no atomics, so the bits are the same on every run. Scalars stay on the device, in
`state`; the host waits for the device once, in the first call with a given layout. All arithmetic is in float64; a
Python float would arrive in a kernel as float32, so none is passed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils.weak import WeakTensorKeyDictionary

from rlekf_ext.covariance import LARGEST_SCALE as _LARGEST_SCALE
from rlekf_ext.covariance import LEAST_VARIANCE as _LEAST_VARIANCE
from rlekf_ext.covariance import STATE, Covariance
from rlekf_ext.packing import TILE as TILE_SIZE
from rlekf_ext.packing import tile_runs

INTERPRETED = bool(triton.knobs.runtime.interpret)  # whether @triton.jit below makes interpreted kernels

# Kernels can read no globals but constexpr ones. The first are indices into `state`.
FORGETTING = tl.constexpr(STATE["forgetting"])
FORGETTING_RATE = tl.constexpr(STATE["forgetting_rate"])
MEASUREMENT_NOISE = tl.constexpr(STATE["measurement_noise"])
PROCESS_NOISE = tl.constexpr(STATE["process_noise"])
SCALE = tl.constexpr(STATE["scale"])
SHIFT = tl.constexpr(STATE["shift"])
LARGEST = tl.constexpr(STATE["largest"])
NUM_PENDING = tl.constexpr(STATE["num_pending"])
VARIANCE = tl.constexpr(STATE["variance"])
RANK_ONE = tl.constexpr(STATE["rank_one"])
NUM_UPDATES = tl.constexpr(STATE["num_updates"])
SKIPPED_INNOVATION = tl.constexpr(STATE["skipped_innovation"])
SKIPPED_JACOBIAN = tl.constexpr(STATE["skipped_jacobian"])
SKIPPED_VARIANCE = tl.constexpr(STATE["skipped_variance"])
SKIPPED_IN_A_ROW = tl.constexpr(STATE["skipped_in_a_row"])

LARGEST_SCALE = tl.constexpr(_LARGEST_SCALE)  # 2^40: exact in float32 too
LEAST_VARIANCE = tl.constexpr(_LEAST_VARIANCE)  # 2^-40
EXPONENT_BITS = tl.constexpr(0x7FF0000000000000)
INFINITY = tl.constexpr(float("inf"))

TILE = tl.constexpr(TILE_SIZE)
RUN = tl.constexpr(8)  # tiles of one tile row that a program visits
VECTORS = tl.constexpr(8)  # pending vectors at a time
CHUNK = tl.constexpr(128)  # weights at a time in products of whole vectors
PARTS = tl.constexpr(64)  # partial sums loaded at a time, over all measurements
BLOCKS = tl.constexpr(64)  # blocks at a time in the recursion

# A row of `updates`, what one measurement does (csrc/recursion.h): w += gain y, S -= rank_one y yᵀ.
UPDATE_USED = tl.constexpr(0)  # 1, or 0 if the measurement is skipped
UPDATE_SHIFT_GROWTH = tl.constexpr(1)  # of the shift since the projection: y includes shift_growth * h
UPDATE_GAIN = tl.constexpr(2)
UPDATE_RANK_ONE = tl.constexpr(3)
UPDATE_SLOT = tl.constexpr(4)  # row of `pending` for sqrt(rank_one) y
UPDATE_SIZE = tl.constexpr(5)

# Without this they would be recompiled for the value 1 and for multiples of 16, for no gain.
_plain_sizes = triton.jit(do_not_specialize=["num_weights", "num_blocks", "num_tiles", "num_products", "capacity"])


def why_absent(device_type: str) -> str:
    """Why these kernels cannot run on this kind of device, as a sentence; "" if they can."""
    if device_type not in ("cpu", "cuda"):
        return f"none are written for {device_type}."
    if device_type == "cuda" and not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU."
    if device_type == "cpu" and not INTERPRETED:
        return "Triton runs on a CPU only in its interpreter: set TRITON_INTERPRET=1 before triton is imported."
    return ""


@triton.jit
def _fold_due(state, capacity, count: tl.constexpr):
    """How many vectors a pass of M measurements folds into the tiles (0: no fold), how many are still pending after
    that, and the power of two that moves from the scale into S."""
    num_pending = tl.load(state + NUM_PENDING).to(tl.int64)
    scale = tl.load(state + SCALE)
    due = num_pending + count > capacity
    power = (scale.to(tl.int64, bitcast=True) & EXPONENT_BITS).to(tl.float64, bitcast=True)
    factor = tl.where(due & (scale > LARGEST_SCALE), power, 1.0)
    return tl.where(due, num_pending, 0), tl.where(due, 0, num_pending), factor


@triton.jit
def _visit_run(run, tiles, pending, state, layout, runs, jacobian, sums, num_weights, num_tiles, capacity, count):
    """Up to RUN tiles of one tile row. sums: the column sums of each tile, then the row sums of each run."""
    block = tl.load(runs + 4 * run)
    row = tl.load(runs + 4 * run + 1)
    first_col = tl.load(runs + 4 * run + 2)
    end_col = tl.load(runs + 4 * run + 3)
    first_weight = tl.load(layout + 3 * block)
    size = tl.load(layout + 3 * block + 1)
    first_tile = tl.load(layout + 3 * block + 2)
    num_folded, _, factor = _fold_due(state, capacity, count)

    inside = tl.arange(0, TILE)
    entries = inside[:, None] * TILE + inside[None, :]
    h = jacobian + first_weight
    i = row * TILE + inside
    # Sums of pairs of columns: a thread holds both, so the sums take half as many registers along the run.
    row_sums = (tl.zeros((TILE, TILE // 2), tl.float64),) * count
    for col in range(first_col, end_col):
        index = first_tile + row * (row + 1) // 2 + col
        place = tiles + index * (TILE * TILE) + entries
        tile = tl.load(place).to(tl.float64)
        j = col * TILE + inside
        if num_folded > 0:
            for n in range(num_folded):
                u = pending + n * num_weights + first_weight
                ui = tl.load(u + i, mask=i < size, other=0.0)
                uj = tl.load(u + j, mask=j < size, other=0.0)
                tile -= ui[:, None] * uj[None, :]  # products commute: a diagonal tile stays symmetric
            stored = (tile * factor).to(tiles.dtype.element_ty)
            tl.store(place, stored)
            tile = stored.to(tl.float64)
        for k in tl.static_range(count):
            xi = tl.load(h + k * num_weights + i, mask=i < size, other=0.0)
            xj = tl.load(h + k * num_weights + j, mask=j < size, other=0.0)
            pairs = tl.reshape(tile * xj[None, :], (TILE, TILE // 2, 2))
            row_sums = row_sums[1:] + (row_sums[0] + tl.sum(pairs, 2),)  # in order again after the last k
            if col < row:
                tl.store(sums + (index * count + k) * TILE + inside, tl.sum(tile * xi[:, None], 0))
    for k in tl.static_range(count):
        tl.store(sums + ((num_tiles + run) * count + k) * TILE + inside, tl.sum(row_sums[k], 1))


@triton.jit
def _multiply_pending(
    program,
    pending,
    state,
    layout,
    jacobian,
    products,
    num_weights,
    capacity,
    count: tl.constexpr,
    padded: tl.constexpr,
):
    """products (L, capacity, M): u_iᵀ h_j over one block, for VECTORS of the u_i still pending after the fold."""
    groups = tl.cdiv(capacity, VECTORS)
    block = program // groups
    first_weight = tl.load(layout + 3 * block)
    size = tl.load(layout + 3 * block + 1)
    _, num_kept, _ = _fold_due(state, capacity, count)

    n = (program % groups) * VECTORS + tl.arange(0, VECTORS)[None, :, None]
    k = tl.arange(0, padded)[:, None, None]
    total = tl.zeros((padded, VECTORS, CHUNK), tl.float64)
    # A group past the last pending vector has nothing to do.
    for start in range(0, tl.where((program % groups) * VECTORS < num_kept, size, 0), CHUNK):
        i = start + tl.arange(0, CHUNK)[None, None, :]
        u = tl.load(pending + n * num_weights + first_weight + i, mask=(n < num_kept) & (i < size), other=0.0)
        h = tl.load(jacobian + k * num_weights + first_weight + i, mask=(k < count) & (i < size), other=0.0)
        total += u * h
    n = (program % groups) * VECTORS + tl.arange(0, VECTORS)[None, :]
    k = tl.arange(0, padded)[:, None]
    tl.store(products + (block * capacity + n) * count + k, tl.sum(total, 2), mask=(n < num_kept) & (k < count))


@_plain_sizes
def _visit(
    tiles,
    pending,
    state,
    layout,
    runs,
    jacobian,
    sums,
    products,
    num_weights,
    num_tiles,
    num_products,
    capacity,
    count: tl.constexpr,
    padded: tl.constexpr,
):
    """Programs below `num_products` multiply pending vectors, the others visit tiles."""
    program = tl.program_id(0).to(tl.int64)
    if program < num_products:
        _multiply_pending(program, pending, state, layout, jacobian, products, num_weights, capacity, count, padded)
    else:
        run = program - num_products
        _visit_run(run, tiles, pending, state, layout, runs, jacobian, sums, num_weights, num_tiles, capacity, count)


@_plain_sizes
def _reduce(
    pending,
    state,
    layout,
    tile_rows,
    jacobian,
    sums,
    products,
    cross,
    gram_parts,
    num_weights,
    num_tiles,
    capacity,
    count: tl.constexpr,
    padded: tl.constexpr,
    add_sums: tl.constexpr,
    finish: tl.constexpr,
):
    """One tile row. add_sums: z = S h from the sums of _visit; else z is what `cross` holds. finish: z += shift h -
    Σ u_i (u_iᵀ h), and gram_parts (tile rows, 2, M, M)."""
    tile_row = tl.program_id(0).to(tl.int64)
    block = tl.load(tile_rows + 4 * tile_row)
    row = tl.load(tile_rows + 4 * tile_row + 1)
    first_run = tl.load(tile_rows + 4 * tile_row + 2)
    num_runs = tl.load(tile_rows + 4 * tile_row + 3)
    first_weight = tl.load(layout + 3 * block)
    size = tl.load(layout + 3 * block + 1)
    first_tile = tl.load(layout + 3 * block + 2)
    _, num_kept, factor = _fold_due(state, capacity, count)

    k = tl.arange(0, padded)[:, None]
    i = row * TILE + tl.arange(0, TILE)[None, :]
    valid = (k < count) & (i < size)
    here = k * num_weights + first_weight + i
    if add_sums:
        # The row sums of the runs left of the diagonal, then the column sums of the tiles below it that are there.
        each_k = k[:, :, None]
        inside = tl.arange(0, TILE)[None, None, :]
        at_once: tl.constexpr = PARTS // padded
        num_parts = num_runs + tl.cdiv(size, TILE) - 1 - row
        total = tl.zeros((padded, at_once, TILE), tl.float64)
        for start in range(0, num_parts, at_once):
            part = start + tl.arange(0, at_once)[None, :, None]
            below = row + 1 + part - num_runs
            column = first_tile + below * (below + 1) // 2 + row
            place = tl.where(part < num_runs, num_tiles + first_run + part, column)
            there = (part < num_runs) | ((column >= 0) & (column < num_tiles) & (part < num_parts))
            total += tl.load(sums + (place * count + each_k) * TILE + inside, mask=(each_k < count) & there, other=0.0)
        z = tl.sum(total, 1)
    else:
        z = tl.load(cross + here, mask=valid, other=0.0)

    if finish:
        h = tl.load(jacobian + here, mask=valid, other=0.0)
        z += tl.load(state + SHIFT) * factor * h
        for start in range(0, num_kept, VECTORS):
            n = start + tl.arange(0, VECTORS)
            u = pending + n[:, None] * num_weights + first_weight + i
            u = tl.load(u, mask=(n[:, None] < num_kept) & (i < size), other=0.0)
            inner = products + (block * capacity + n[None, :]) * count + k
            inner = tl.load(inner, mask=(n[None, :] < num_kept) & (k < count), other=0.0)
            z -= tl.sum(inner[:, :, None] * u[None, :, :], 1)
        z = tl.where(valid, z, 0.0)  # 0 · NaN in the padding
        other = tl.arange(0, padded)[None, :]
        place = gram_parts + tile_row * (2 * count * count) + k * count + other
        pairs = (k < count) & (other < count)
        tl.store(place, tl.sum(h[:, None, :] * z[None, :, :], 2), mask=pairs)
        tl.store(place + count * count, tl.sum(h[:, None, :] * h[None, :, :], 2), mask=pairs)
    tl.store(cross + here, z, mask=valid)


@_plain_sizes
def _gather(
    state, layout, first_tile_rows, gram_parts, gram, num_blocks, capacity, count: tl.constexpr, entries: tl.constexpr
):
    """gram of one block; the first program also brings the state up to date with the fold."""
    block = tl.program_id(0).to(tl.int64)
    first = tl.load(first_tile_rows + block)
    num_rows = tl.cdiv(tl.load(layout + 3 * block + 1), TILE)
    entry = tl.arange(0, entries)[None, :]
    total = tl.zeros((PARTS, entries), tl.float64)
    for start in range(0, num_rows, PARTS):
        part = start + tl.arange(0, PARTS)[:, None]
        place = gram_parts + (first + part) * (2 * count * count) + entry
        total += tl.load(place, mask=(part < num_rows) & (entry < 2 * count * count), other=0.0)
    entry = tl.arange(0, entries)
    place = gram + (entry // (count * count) * num_blocks + block) * (count * count) + entry % (count * count)
    tl.store(place, tl.sum(total, 0), mask=entry < 2 * count * count)

    if block == 0:
        _, num_kept, factor = _fold_due(state, capacity, count)
        scale = tl.load(state + SCALE) / factor
        shift = tl.load(state + SHIFT) * factor
        largest = tl.load(state + LARGEST) * factor
        tl.debug_barrier()  # no thread writes before all have read
        tl.store(state + NUM_PENDING, num_kept.to(tl.float64))
        tl.store(state + SCALE, scale)
        tl.store(state + SHIFT, shift)
        tl.store(state + LARGEST, largest)


@_plain_sizes
def _update(state, gram, innovation, products, updates, num_blocks, count: tl.constexpr, padded: tl.constexpr):
    """The recursion of csrc/recursion.h. products (L, M, M): y_iᵀ h_j of each block, i <= j; updates (M, 5)."""
    forgetting = tl.load(state + FORGETTING)
    noise = tl.load(state + MEASUREMENT_NOISE)
    process_noise = tl.load(state + PROCESS_NOISE)
    scale = tl.load(state + SCALE)
    shift = tl.load(state + SHIFT)
    largest = tl.load(state + LARGEST)
    num_pending = tl.load(state + NUM_PENDING)
    last_variance = tl.load(state + VARIANCE)
    last_rank_one = tl.load(state + RANK_ONE)
    num_updates = tl.load(state + NUM_UPDATES)
    skipped_innovation = tl.load(state + SKIPPED_INNOVATION)
    skipped_jacobian = tl.load(state + SKIPPED_JACOBIAN)
    skipped_variance = tl.load(state + SKIPPED_VARIANCE)
    skipped_in_a_row = tl.load(state + SKIPPED_IN_A_ROW)

    j = tl.arange(0, padded)
    left = tl.load(innovation + j, mask=j < count, other=0.0)  # of each innovation, after earlier measurements
    first_shift = shift
    for i in tl.static_range(count):
        # y_iᵀ h_j = z_iᵀ h_j + shift_growth h_iᵀ h_j - Σ_{k<i} rank_one_k (y_kᵀ h_i) (y_kᵀ h_j), block by block.
        shift_growth = shift - first_shift
        total = tl.zeros((padded,), tl.float64)
        square = tl.zeros((padded,), tl.float64)  # h_iᵀ h_j
        for start in range(0, num_blocks, BLOCKS):
            block = start + tl.arange(0, BLOCKS)
            row = (block[:, None] * count + i) * count + j[None, :]
            valid = (block[:, None] < num_blocks) & (j[None, :] >= i) & (j[None, :] < count)
            y = tl.load(gram + row, mask=valid, other=0.0)
            plain = tl.load(gram + num_blocks * (count * count) + row, mask=valid, other=0.0)
            y += tl.where(shift_growth != 0, shift_growth * plain, 0.0)
            for k in tl.static_range(i):
                used = tl.load(updates + k * UPDATE_SIZE + UPDATE_USED) != 0
                there = block[:, None] < tl.where(used, num_blocks, 0)  # a skipped one may hold NaN
                rank_one = tl.load(updates + k * UPDATE_SIZE + UPDATE_RANK_ONE)
                earlier = products + (block[:, None] * count + k) * count
                to_i = tl.load(earlier + i, mask=there, other=0.0)
                to_j = tl.load(earlier + j[None, :], mask=there & valid, other=0.0)
                y -= rank_one * to_i * to_j
            tl.store(products + row, y, mask=valid)
            total += tl.sum(y, 0)
            square += tl.sum(plain, 0)

        variance = scale * tl.sum(tl.where(j == i, total, 0.0))
        least = LEAST_VARIANCE * scale * (largest + shift) * tl.sum(tl.where(j == i, square, 0.0))
        good_innovation = tl.abs(tl.load(innovation + i)) < INFINITY
        good_jacobian = tl.abs(variance) < INFINITY
        used = good_innovation & good_jacobian & (variance >= -least)
        lam = 1 - forgetting
        most = (variance - least) / (variance * variance)
        a = tl.where(variance > least, tl.minimum(1 / (noise * lam + variance), most), 0.0)
        rank_one = tl.where(used, scale * a, 0.0)
        gain = tl.where(used, rank_one * tl.sum(tl.where(j == i, left, 0.0)), 0.0)
        left = tl.where(used, left - gain * total, left)
        update = updates + i * UPDATE_SIZE
        tl.store(update + UPDATE_USED, used.to(tl.float64))
        tl.store(update + UPDATE_SHIFT_GROWTH, shift_growth)
        tl.store(update + UPDATE_GAIN, gain)
        tl.store(update + UPDATE_RANK_ONE, rank_one)
        tl.store(update + UPDATE_SLOT, num_pending)

        one = used.to(tl.float64)
        num_pending += one
        num_updates += one
        last_variance = tl.where(used, variance, last_variance)
        last_rank_one = tl.where(used, rank_one, last_rank_one)
        scale = tl.where(used, scale / lam, scale)
        shift = tl.where(used, shift + process_noise / scale, shift)
        forgetting = tl.where(used, forgetting * tl.load(state + FORGETTING_RATE), forgetting)
        skipped_innovation += tl.where(good_innovation, 0.0, 1.0)
        skipped_jacobian += tl.where(good_innovation & (good_jacobian == 0), 1.0, 0.0)
        skipped_variance += tl.where(good_innovation & good_jacobian & (variance < -least), 1.0, 0.0)
        skipped_in_a_row = tl.where(used, 0.0, skipped_in_a_row + 1)
        tl.debug_barrier()  # the next measurement reads products and updates that other threads wrote

    tl.store(state + FORGETTING, forgetting)
    tl.store(state + SCALE, scale)
    tl.store(state + SHIFT, shift)
    tl.store(state + NUM_PENDING, num_pending)
    tl.store(state + VARIANCE, last_variance)
    tl.store(state + RANK_ONE, last_rank_one)
    tl.store(state + NUM_UPDATES, num_updates)
    tl.store(state + SKIPPED_INNOVATION, skipped_innovation)
    tl.store(state + SKIPPED_JACOBIAN, skipped_jacobian)
    tl.store(state + SKIPPED_VARIANCE, skipped_variance)
    tl.store(state + SKIPPED_IN_A_ROW, skipped_in_a_row)


@_plain_sizes
def _apply(
    weights,
    pending,
    layout,
    tile_rows,
    cross,
    jacobian,
    products,
    updates,
    num_weights,
    count: tl.constexpr,
    padded: tl.constexpr,
):
    """y_j = z_j + shift_growth_j h_j - Σ_{k<j} rank_one_k (y_kᵀ h_j) y_k of one tile row; w += gain_j y_j; u_j =
    sqrt(rank_one_j) y_j."""
    tile_row = tl.program_id(0).to(tl.int64)
    block = tl.load(tile_rows + 4 * tile_row)
    first = tl.load(layout + 3 * block)
    i = tl.load(tile_rows + 4 * tile_row + 1) * TILE + tl.arange(0, TILE)
    i += first
    end = first + tl.load(layout + 3 * block + 1)
    k = tl.arange(0, padded)
    used = tl.load(updates + k * UPDATE_SIZE + UPDATE_USED, mask=k < count, other=0.0) != 0
    rank_ones = tl.load(updates + k * UPDATE_SIZE + UPDATE_RANK_ONE, mask=k < count, other=0.0)

    w = tl.load(weights + i, mask=i < end, other=0.0)
    earlier = tl.zeros((padded, TILE), tl.float64)  # y_k of those used so far, 0 of the others
    for j in tl.static_range(count):
        update = updates + j * UPDATE_SIZE
        wanted = i < tl.where(tl.load(update + UPDATE_USED) != 0, end, 0)  # a skipped one may hold NaN
        h = tl.load(jacobian + j * num_weights + i, mask=wanted, other=0.0)
        y = tl.load(cross + j * num_weights + i, mask=wanted, other=0.0) + tl.load(update + UPDATE_SHIFT_GROWTH) * h
        inner = tl.load(products + (block * count + k) * count + j, mask=used & (k < j), other=0.0)
        y -= tl.sum((rank_ones * inner)[:, None] * earlier, 0)
        y = tl.where(wanted, y, 0.0)
        earlier = tl.where(k[:, None] == j, y[None, :], earlier)
        w += tl.load(update + UPDATE_GAIN) * y
        slot = tl.load(update + UPDATE_SLOT).to(tl.int64)
        tl.store(pending + slot * num_weights + i, tl.sqrt(tl.load(update + UPDATE_RANK_ONE)) * y, mask=wanted)
    tl.store(weights + i, w, mask=i < end)


@dataclass
class _Work:
    """What the programs of each launch do: rows of int64 on the device."""

    runs: Tensor  # (runs, 4): block, tile row in it, columns from and to, up to RUN tiles
    tile_rows: Tensor  # (tile rows, 4): block, tile row in it, first of its runs, their number
    first_tile_rows: Tensor  # (L,): of each block


# By layout tensor, device included, while that tensor lives, and by the number of tiles: a layout is made with
# its covariance and never changes in place. Only making an entry waits for the device, in the first step of a filter.
_work_of_layout = WeakTensorKeyDictionary()


def _work(layout: Tensor, num_tiles: int) -> _Work:
    """The work for the tiles from 0 to num_tiles: all of a layout, or fewer if other processes have the rest."""
    known = _work_of_layout.setdefault(layout, {})
    if num_tiles not in known:
        known[num_tiles] = _Work(*tile_runs(layout, num_tiles, RUN.value))
    return known[num_tiles]


def project(p: Covariance, jacobian: Tensor) -> tuple[Tensor, Tensor]:
    cross = _empty(jacobian, *jacobian.shape)
    gram = _project(p, p.tiles, cross, jacobian, multiply=True, finish=True)
    increment_version([p.tiles, p.pending, p.state])
    return cross, gram


def multiply_tiles(p: Covariance, jacobian: Tensor) -> Tensor:
    z = _empty(jacobian, *jacobian.shape)
    _project(p, p.tiles, z, jacobian, multiply=True, finish=False)
    increment_version(p.tiles)
    return z


def finish_projection(p: Covariance, z: Tensor, jacobian: Tensor) -> Tensor:
    gram = _project(p, p.tiles[:0], z, jacobian, multiply=False, finish=True)
    increment_version([z, p.state])
    return gram


def _project(p: Covariance, tiles: Tensor, cross: Tensor, jacobian: Tensor, *, multiply: bool, finish: bool) -> Tensor:
    """multiply: S h of these tiles goes into `cross`. finish: the rest of the projection, which changes `cross`,
    returns gram and notes a fold in `p.state`."""
    pending, state, layout = p.pending, p.state, p.layout
    capacity, num_weights = pending.shape
    count, num_tiles, num_blocks = len(jacobian), len(tiles), len(layout)
    work, padded = _work(layout, num_tiles), triton.next_power_of_2(count)
    num_products = num_blocks * triton.cdiv(capacity, VECTORS.value) if finish else 0
    sums = _empty(tiles, num_tiles + len(work.runs), count, TILE_SIZE)
    products = _empty(tiles, num_blocks, capacity, count)
    gram_parts = _empty(tiles, len(work.tile_rows), 2, count, count)
    gram = _empty(tiles, 2, num_blocks, count, count)
    with torch.cuda.device_of(tiles):
        _visit[(num_products + len(work.runs),)](
            tiles,
            pending,
            state,
            layout,
            work.runs,
            jacobian,
            sums,
            products,
            num_weights,
            num_tiles,
            num_products,
            capacity,
            count=count,
            padded=padded,
            num_warps=8 if count == 1 else 16,  # the sums along a run take 16 registers per measurement at 8 warps
        )
        _reduce[(len(work.tile_rows),)](
            pending,
            state,
            layout,
            work.tile_rows,
            jacobian,
            sums,
            products,
            cross,
            gram_parts,
            num_weights,
            num_tiles,
            capacity,
            count=count,
            padded=padded,
            add_sums=multiply,
            finish=finish,
            num_warps=8,
        )
        if finish:
            _gather[(num_blocks,)](
                state,
                layout,
                work.first_tile_rows,
                gram_parts,
                gram,
                num_blocks,
                capacity,
                count=count,
                entries=triton.next_power_of_2(2 * count * count),
                num_warps=8,
            )
    return gram


def correct(p: Covariance, weights: Tensor, cross: Tensor, gram: Tensor, jacobian: Tensor, innovation: Tensor) -> None:
    pending, state, layout = p.pending, p.state, p.layout
    count, num_weights, num_blocks = len(jacobian), pending.shape[1], len(layout)
    work, padded = _work(layout, 0), triton.next_power_of_2(count)
    products = _empty(weights, num_blocks, count, count)
    updates = _empty(weights, count, UPDATE_SIZE.value)
    with torch.cuda.device_of(weights):
        _update[(1,)](state, gram, innovation, products, updates, num_blocks, count=count, padded=padded)
        _apply[(len(work.tile_rows),)](
            weights,
            pending,
            layout,
            work.tile_rows,
            cross,
            jacobian,
            products,
            updates,
            num_weights,
            count=count,
            padded=padded,
            num_warps=2,
        )
    increment_version([weights, pending, state])


def step(p: Covariance, weights: Tensor, jacobian: Tensor, innovation: Tensor) -> None:
    cross, gram = project(p, jacobian)
    correct(p, weights, cross, gram, jacobian, innovation)


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float64, device=like.device)
