"""The definition of the ops, in dense torch: written for the reader, and what the other backends are held to."""

from __future__ import annotations

from math import floor, isfinite, log2

import torch
from torch import Tensor

from rlekf_ext.covariance import LARGEST_SCALE, Scalars, pack, unpack
from rlekf_ext.partition import BlockPlan


def project(tiles: Tensor, pending: Tensor, state: Tensor, layout: Tensor, jacobian: Tensor) -> tuple[Tensor, Tensor]:
    z = multiply_tiles(tiles, pending, state, layout, jacobian)
    gram = finish_projection(z, pending, state, layout, jacobian)
    return z, gram


def multiply_tiles(tiles: Tensor, pending: Tensor, state: Tensor, layout: Tensor, jacobian: Tensor) -> Tensor:
    plan, now = BlockPlan(tuple(layout[:, 1].tolist())), Scalars.of(state)
    if _must_fold(now, pending, jacobian):
        _fold(tiles, pending[: now.num_pending], _fold_factor(now), plan)
    parts = zip(unpack(tiles, plan), jacobian.split(plan.sizes, 1), strict=True)
    return torch.cat([h @ s for s, h in parts], 1)


def finish_projection(z: Tensor, pending: Tensor, state: Tensor, layout: Tensor, jacobian: Tensor) -> Tensor:
    sizes, now = layout[:, 1].tolist(), Scalars.of(state)
    if _must_fold(now, pending, jacobian):
        factor = _fold_factor(now)
        now = now._replace(num_pending=0, scale=now.scale / factor, shift=now.shift * factor)
        state.copy_(state.new_tensor(now))

    gram = []
    parts = (z.split(sizes, 1), pending[: now.num_pending].split(sizes, 1), jacobian.split(sizes, 1))
    for block_z, u, h in zip(*parts, strict=True):
        block_z += now.shift * h - (h @ u.T) @ u
        gram.append(torch.stack([h @ block_z.T, h @ h.T]))
    return torch.stack(gram, 1)


def correct(
    weights: Tensor,
    pending: Tensor,
    state: Tensor,
    layout: Tensor,
    cross: Tensor,
    gram: Tensor,
    jacobian: Tensor,
    innovation: Tensor,
) -> None:
    sizes = layout[:, 1].tolist()
    now = Scalars.of(state)
    first_shift = now.shift
    increment = torch.zeros_like(weights)
    added: list[Tensor] = []
    for h, z, error in zip(jacobian, cross, innovation.tolist(), strict=True):
        y = z + (now.shift - first_shift) * h  # K / β, before the updates of this call are taken off
        for u in added:
            inner = torch.stack(
                [(part_u @ part_h) for part_u, part_h in zip(u.split(sizes), h.split(sizes), strict=True)]
            )
            y = y - u * inner.repeat_interleave(layout[:, 1])
        variance = now.scale * float(h @ y)  # HᵀPH

        cause = _reason_to_skip(error, variance)
        if cause:
            skipped = {cause: getattr(now, cause) + 1, "skipped_in_a_row": now.skipped_in_a_row + 1}
            now = now._replace(**skipped)
            continue

        lam = 1 - now.forgetting
        a = 1 / (now.measurement_noise * lam + variance)  # line 8
        rank_one = a * now.scale
        u = rank_one**0.5 * y  # line 11: a K Kᵀ = β u uᵀ
        increment += rank_one * (error - float(h @ increment)) * y  # line 12
        pending[now.num_pending] = u
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
    state.copy_(state.new_tensor(now))
    weights += increment


def step(
    weights: Tensor,
    tiles: Tensor,
    pending: Tensor,
    state: Tensor,
    layout: Tensor,
    jacobian: Tensor,
    innovation: Tensor,
) -> None:
    cross, gram = project(tiles, pending, state, layout, jacobian)
    correct(weights, pending, state, layout, cross, gram, jacobian, innovation)


def _must_fold(now: Scalars, pending: Tensor, jacobian: Tensor) -> bool:
    return now.num_pending + len(jacobian) > len(pending)


def _fold_factor(now: Scalars) -> float:
    """The power of two that moves from the scale into S, so that the scale cannot overflow."""
    return 2.0 ** floor(log2(now.scale)) if now.scale > LARGEST_SCALE else 1.0


def _fold(tiles: Tensor, vectors: Tensor, factor: float, plan: BlockPlan) -> None:
    """S <- factor (S - Σ u uᵀ)."""
    parts = zip(unpack(tiles, plan), vectors.split(plan.sizes, 1), strict=True)
    tiles.copy_(pack([factor * (s - u.T @ u) for s, u in parts], tiles.dtype))


def _reason_to_skip(error: float, variance: float) -> str | None:
    if not isfinite(error):
        return "skipped_innovation"
    if not isfinite(variance):
        return "skipped_jacobian"
    return "skipped_variance" if variance < 0 else None
