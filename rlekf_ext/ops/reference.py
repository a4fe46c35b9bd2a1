"""The definition of the ops, in dense torch: written for the reader, and what the other backends are held to."""

from __future__ import annotations

from math import floor, isfinite, log2

import torch
from torch import Tensor

from rlekf_ext.covariance import STATE, pack, unpack
from rlekf_ext.partition import BlockPlan

LARGEST_SCALE = 2.0**40


def project(tiles: Tensor, pending: Tensor, state: Tensor, layout: Tensor, jacobian: Tensor) -> tuple[Tensor, Tensor]:
    plan = BlockPlan(tuple(layout[:, 1].tolist()))
    if int(state[STATE["num_pending"]]) + len(jacobian) > len(pending):
        _fold(tiles, pending, state, plan)
    count, shift = int(state[STATE["num_pending"]]), state[STATE["shift"]]

    cross, gram = [], []
    parts = (unpack(tiles, plan), pending[:count].split(plan.sizes, 1), jacobian.split(plan.sizes, 1))
    for s, u, h in zip(*parts, strict=True):
        z = h @ s - (h @ u.T) @ u + shift * h
        cross.append(z)
        gram.append(torch.stack([h @ z.T, h @ h.T]))
    return torch.cat(cross, 1), torch.stack(gram, 1)


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
    first_shift = state[STATE["shift"]].item()
    increment = torch.zeros_like(weights)
    added: list[Tensor] = []
    for h, z, error in zip(jacobian, cross, innovation, strict=True):
        forgetting, nu, noise, q, beta, delta, num_pending = state[:7].tolist()
        lam = 1 - forgetting

        y = z + (delta - first_shift) * h  # K / β, before the updates of this call are taken off
        for u in added:
            inner = torch.stack(
                [(part_u @ part_h) for part_u, part_h in zip(u.split(sizes), h.split(sizes), strict=True)]
            )
            y = y - u * inner.repeat_interleave(layout[:, 1])
        variance = beta * float(h @ y)  # HᵀPH

        cause = _reason_to_skip(float(error), variance)
        if cause:
            state[STATE[cause]] += 1
            continue

        a = 1 / (noise * lam + variance)  # line 8
        u = (a * beta) ** 0.5 * y  # line 11: a K Kᵀ = β u uᵀ
        increment += a * beta * (float(error) - float(h @ increment)) * y  # line 12
        pending[int(num_pending)] = u
        added.append(u)
        beta = beta / lam  # line 11: the factor 1/λ
        delta = delta + q / beta
        forgetting = nu * forgetting  # line 14: λ <- ν λ + 1 - ν
        state[:7] = state.new_tensor([forgetting, nu, noise, q, beta, delta, num_pending + 1])
        state[STATE["num_updates"]] += 1
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


def _fold(tiles: Tensor, pending: Tensor, state: Tensor, plan: BlockPlan) -> None:
    """S <- S - Σ u uᵀ, and an oversized scale moves into S by a power of two. P stays what it is."""
    count, scale = int(state[STATE["num_pending"]]), float(state[STATE["scale"]])
    factor = 2.0 ** floor(log2(scale)) if scale > LARGEST_SCALE else 1.0
    parts = zip(unpack(tiles, plan), pending[:count].split(plan.sizes, 1), strict=True)
    tiles.copy_(pack([factor * (s - u.T @ u) for s, u in parts], tiles.dtype))
    state[STATE["num_pending"]] = 0
    state[STATE["scale"]] /= factor
    state[STATE["shift"]] *= factor


def _reason_to_skip(error: float, variance: float) -> str | None:
    if not isfinite(error):
        return "skipped_innovation"
    if not isfinite(variance):
        return "skipped_jacobian"
    return "skipped_variance" if variance < 0 else None
