"""The definition of the ops, in dense torch: written to be read; the other backends are tested against it."""

from __future__ import annotations

from math import floor, isfinite, log2

import torch
from torch import Tensor

from rlekf_ext.covariance import LARGEST_SCALE, LEAST_VARIANCE, Covariance, Scalars
from rlekf_ext.packing import pack, unpack


def project(p: Covariance, jacobian: Tensor) -> tuple[Tensor, Tensor]:
    z = multiply_tiles(p, jacobian)
    return z, finish_projection(p, z, jacobian)


def multiply_tiles(p: Covariance, jacobian: Tensor) -> Tensor:
    now, sizes = p.scalars(), p.plan.sizes
    blocks = unpack(p.tiles, p.plan)
    if _must_fold(now, p, jacobian):
        factor, pending = _fold_factor(now), p.pending[: now.num_pending].split(sizes, 1)
        folded = [factor * (s - u.T @ u) for s, u in zip(blocks, pending, strict=True)]
        p.tiles.copy_(pack(folded, p.tiles.dtype))
        blocks = unpack(p.tiles, p.plan)
    return torch.cat([h @ s for s, h in zip(blocks, jacobian.split(sizes, 1), strict=True)], 1)


def finish_projection(p: Covariance, z: Tensor, jacobian: Tensor) -> Tensor:
    now, sizes = p.scalars(), p.plan.sizes
    if _must_fold(now, p, jacobian):
        factor = _fold_factor(now)
        p.set(num_pending=0, scale=now.scale / factor, shift=now.shift * factor, largest=now.largest * factor)
        now = p.scalars()
    gram = []
    parts = (z.split(sizes, 1), p.pending[: now.num_pending].split(sizes, 1), jacobian.split(sizes, 1))
    for block_z, u, h in zip(*parts, strict=True):
        block_z += now.shift * h - (h @ u.T) @ u
        gram.append(torch.stack([h @ block_z.T, h @ h.T]))
    return torch.stack(gram, 1)


def correct(p: Covariance, weights: Tensor, cross: Tensor, gram: Tensor, jacobian: Tensor, innovation: Tensor) -> None:
    sizes, size_of_block = p.plan.sizes, p.layout[:, 1]
    now = p.scalars()
    first_shift = now.shift
    increment = torch.zeros_like(weights)
    added: list[Tensor] = []
    for h, z, error in zip(jacobian, cross, innovation.tolist(), strict=True):
        y = z + (now.shift - first_shift) * h  # K / β, before the updates of this call are subtracted
        for u in added:
            inner = torch.stack(
                [(part_u @ part_h) for part_u, part_h in zip(u.split(sizes), h.split(sizes), strict=True)]
            )
            y = y - u * inner.repeat_interleave(size_of_block)
        variance = now.scale * float(h @ y)  # HᵀPH

        least = LEAST_VARIANCE * now.scale * (now.largest + now.shift) * float(h @ h)
        cause = _reason_to_skip(error, variance, least)
        if cause:
            skipped = {cause: getattr(now, cause) + 1, "skipped_in_a_row": now.skipped_in_a_row + 1}
            now = now._replace(**skipped)
            continue

        lam = 1 - now.forgetting
        a = _gain_factor(variance, now.measurement_noise * lam, least)  # line 8
        rank_one = a * now.scale
        u = rank_one**0.5 * y  # line 11: a K Kᵀ = β u uᵀ
        increment += rank_one * (error - float(h @ increment)) * y  # line 12
        p.pending[now.num_pending] = u
        added.append(u)
        scale = now.scale / lam  # line 11: the factor 1/λ
        now = now._replace(
            scale=scale,
            shift=now.shift + now.process_noise / scale,
            forgetting=now.forgetting * now.forgetting_rate,  # line 14: λ <- ν λ + 1 - ν
            num_pending=now.num_pending + 1,
            num_updates=now.num_updates + 1,
            skipped_in_a_row=0,
            variance=variance,
            rank_one=rank_one,
        )
    p.set(**now._asdict())
    weights += increment


def step(p: Covariance, weights: Tensor, jacobian: Tensor, innovation: Tensor) -> None:
    cross, gram = project(p, jacobian)
    correct(p, weights, cross, gram, jacobian, innovation)


def _must_fold(now: Scalars, p: Covariance, jacobian: Tensor) -> bool:
    """Whether this pass folds, S <- S - Σ u uᵀ, because the pending rows cannot take its vectors too."""
    return now.num_pending + len(jacobian) > len(p.pending)


def _fold_factor(now: Scalars) -> float:
    """In a fold, an oversized scale moves into S by this power of two. P stays what it is."""
    return 2.0 ** floor(log2(now.scale)) if now.scale > LARGEST_SCALE else 1.0


def _gain_factor(variance: float, noise: float, least: float) -> float:
    """a; smaller, down to 0, where the update would leave less than `least` of the variance: what rounding leaves of a
    smaller one may be negative."""
    if variance <= least:
        return 0.0
    return min(1 / (noise + variance), (variance - least) / variance**2)


def _reason_to_skip(error: float, variance: float, least: float) -> str | None:
    if not isfinite(error):
        return "skipped_innovation"
    if not isfinite(variance):
        return "skipped_jacobian"
    return "skipped_variance" if variance < -least else None
