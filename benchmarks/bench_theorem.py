"""Theorem 1 of the paper, in numbers: for independent H, P_t S(t) -> L I / σ² and ε_t K_t falls as 1/t.

    python benchmarks/bench_theorem.py [--weights 200] [--updates 30000]

A linear model y = H·w + noise of deviation 1, with a new H from N(0, σ²) for each update, is learned with the
paper's λ and ν, in one block and in four. S(t) is the sum over k of the product of λ_j over k < j <= t. A row has the
largest distance of an eigenvalue of P_t S(t) σ² / L from 1, and the mean |ε_t K_t| over the last tenth of the updates.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rows import MACHINE, append, machine

from rlekf_ext import KalmanFilter
from rlekf_ext.partition import partition

RESULTS = Path(__file__).resolve().parent / "results/theorem.csv"
COLUMNS = ["blocks", "sigma", "updates", "distance of P S σ²/L from I", "|ε K|", "|ε K| t", *MACHINE]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=int, default=200)
    parser.add_argument("--updates", type=int, default=30000)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    where = machine(given.output)
    stops = [t for t in (300, 1000, 3000, 10000, 30000, 100000) if t <= given.updates]
    for blocks, sigma in ((1, 1.0), (4, 1.0), (1, 0.3)):
        source = torch.Generator().manual_seed(1)
        kalman = KalmanFilter(partition([given.weights], given.weights // blocks, "sekf"))
        wanted = torch.randn(given.weights, generator=source, dtype=torch.float64)
        weights, total, moved = torch.zeros_like(wanted), 0.0, []
        for t in range(1, stops[-1] + 1):
            jacobian = sigma * torch.randn(given.weights, generator=source, dtype=torch.float64)
            noise = torch.randn((), generator=source, dtype=torch.float64)
            before = weights.clone()
            total = kalman.memory_factor * total + 1  # P_t⁻¹ = λ_t P_{t-1}⁻¹ + H Hᵀ / L
            weights += kalman.update(jacobian, jacobian @ (wanted - weights) + noise)
            moved.append(float((weights - before).norm()))
            if t in stops:
                scaled = [block * total * sigma**2 / blocks for block in kalman.covariance.dense()]
                distance = max(float((torch.linalg.eigvalsh(block) - 1).abs().max()) for block in scaled)
                size = sum(moved[-(t // 10) :]) / (t // 10)
                row = dict(
                    zip(COLUMNS, (blocks, sigma, t, f"{distance:.4f}", f"{size:.3e}", f"{size * t:.4f}"), strict=False)
                )
                append(given.output, COLUMNS, [{**row, **where}])
                print(*(f"{name} {value}" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
