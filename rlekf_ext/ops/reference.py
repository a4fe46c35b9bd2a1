"""The definition of the ops, in dense torch: written for the reader, and what the other backends are held to."""

from __future__ import annotations

from math import floor, isfinite, log2

import torch
from torch import Tensor

from rlekf_ext.covariance import LARGEST_SCALE, STATE, pack, unpack
from rlekf_ext.partition import BlockPlan


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
    now = dict(zip(STATE, state.tolist(), strict=True))
    first_shift = now["shift"]
    increment = torch.zeros_like(weights)
    added: list[Tensor] = []
    for h, z, error in zip(jacobian, cross, innovation.tolist(), strict=True):
        y = z + (now["shift"] - first_shift) * h  # K / β, before the updates of this call are taken off
        for u in added:
            inner = torch.stack(
                [(part_u @ part_h) for part_u, part_h in zip(u.split(sizes), h.split(sizes), strict=True)]
            )
            y = y - u * inner.repeat_interleave(layout[:, 1])
        variance = now["scale"] * float(h @ y)  # HᵀPH

        cause = _reason_to_skip(error, variance)
        if cause:
            now[cause] += 1
            now["skipped_in_a_row"] += 1
            continue

        lam = _lambda(now, variance)
        a = 1 / (now["measurement_noise"] * lam + variance)  # line 8
        rank_one = a * now["scale"]
        u = rank_one**0.5 * y  # line 11: a K Kᵀ = β u uᵀ
        increment += rank_one * (error - float(h @ increment)) * y  # line 12
        pending[int(now["num_pending"])] = u
        added.append(u)
        now["num_pending"] += 1
        now["num_updates"] += 1
        now["skipped_in_a_row"] = 0
        now["variance"], now["rank_one"] = variance, rank_one
        now["scale"] /= lam  # line 11: the factor 1/λ
        now["shift"] += now["process_noise"] / now["scale"]
        now["process_noise"] = max(now["least_process_noise"], now["process_noise_decay"] * now["process_noise"])
        now["forgetting"] *= now["forgetting_rate"]  # line 14: λ <- ν λ + 1 - ν
    state.copy_(state.new_tensor(list(now.values())))
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
    state[STATE["largest_diagonal"]] *= factor


def _lambda(now: dict[str, float], variance: float) -> float:
    """λ of this update: nearer to 1 than the memory factor while a measurement excites nothing, or P is at its
    ceiling."""
    lam = 1 - now["forgetting"]
    if variance < now["least_excitation"] * now["measurement_noise"]:
        lam = 1.0
    largest = now["scale"] * (now["largest_diagonal"] + now["shift"])  # no diagonal entry of P is larger
    return min(1.0, max(lam, largest / now["diagonal_ceiling"]))


def _reason_to_skip(error: float, variance: float) -> str | None:
    if not isfinite(error):
        return "skipped_innovation"
    if not isfinite(variance):
        return "skipped_jacobian"
    return "skipped_variance" if variance < 0 else None
