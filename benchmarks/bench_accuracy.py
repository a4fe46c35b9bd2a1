"""How far the packed filter drifts from a long double filter over many steps with forgetting. `make soak` runs it.

    python benchmarks/bench_accuracy.py [--steps 20000] [--size 512] [--output rows.csv]

Three kinds of H, whose entry k is drawn with the standard deviation 1, 1/k, or exp(-k/32). A row is the largest
difference of P in units of its largest entry, the same for w, and the smallest eigenvalue of P in units of the
largest.
"""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path

import numpy as np
import torch
from rows import append, machine

from rlekf_ext import BlockPlan, KalmanFilter

RESULTS = Path(__file__).resolve().parent / "results/accuracy.csv"
LAMBDA, NU = 0.98, 0.9987
COLUMNS = ["H", "covariance_dtype", "P", "w", "smallest eigenvalue", "steps", "size", "huge_pages", "threads"]
COLUMNS += ["cpu", "cpu_isa", "torch", "numpy", "version", "commit"]
DTYPES = (torch.float64, torch.float32)
DEVIATIONS = {
    "isotropic": lambda k: np.ones_like(k),
    "1/k": lambda k: 1 / k,
    "exp(-k/32)": lambda k: np.exp(-k / 32),
}


class LongDoubleFilter:
    """Algorithm 2 for one block, dense, in the widest floating point of the machine."""

    def __init__(self, size: int):
        self.p, self.w = np.eye(size, dtype=np.longdouble), np.zeros(size, dtype=np.longdouble)
        self.forgetting = 1 - np.longdouble(LAMBDA)  # λ itself, near 1, is off by 4e-17: 4e-12 of P in 1e5 steps

    def step(self, h: np.ndarray, innovation: float) -> None:
        k = (self.p * h).sum(1)
        memory_factor = 1 - self.forgetting
        a = 1 / (memory_factor + h @ k)
        self.w += a * innovation * k
        u = np.sqrt(a) * k  # (a k) kᵀ would not round symmetrically, and an asymmetry of P grows forever
        self.p -= u[:, None] * u
        self.p *= 1 / memory_factor
        self.forgetting *= np.longdouble(NU)


def drift(kind: str, size: int, steps: int) -> dict[torch.dtype, dict[str, float]]:
    """The three figures of a row, for each dtype of S."""
    generator = np.random.default_rng(0)
    deviation = DEVIATIONS[kind](np.arange(1.0, size + 1))
    exact, settings = LongDoubleFilter(size), {"memory_factor": LAMBDA, "forgetting_rate": NU}
    ours = {dtype: KalmanFilter(BlockPlan((size,)), covariance_dtype=dtype, **settings) for dtype in DTYPES}
    weights = {dtype: torch.zeros(size, dtype=torch.float64) for dtype in DTYPES}
    for step in range(steps):
        h, innovation = deviation * generator.standard_normal(size), generator.standard_normal()
        exact.step(h.astype(np.longdouble), innovation)
        for dtype in DTYPES:
            weights[dtype] += ours[dtype].update(torch.from_numpy(h), innovation)
        if step % 1000 == 0:
            print(f"\rH {kind}: step {step} of {steps}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return {dtype: figures(ours[dtype], weights[dtype], exact) for dtype in DTYPES}


def figures(ours: KalmanFilter, weights: torch.Tensor, exact: LongDoubleFilter) -> dict[str, float]:
    (p,) = ours.covariance.dense()
    eigenvalues = torch.linalg.eigvalsh(p)
    return {
        "P": float(abs(p.numpy() - exact.p).max() / abs(exact.p).max()),
        "w": float(abs(weights.numpy() - exact.w).max() / abs(exact.w).max()),
        "smallest eigenvalue": float(eigenvalues[0] / eigenvalues[-1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", nargs="+", choices=list(DEVIATIONS), default=list(DEVIATIONS))
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if np.finfo(np.longdouble).nmant < 63:
        sys.exit(f"long double is no wider than double on {platform.machine()}: run this on x86-64.")
    common = {"steps": arguments.steps, "size": arguments.size, "huge_pages": 0, "numpy": np.__version__}
    common |= machine(arguments.output)
    for kind in arguments.kind:
        for dtype, found in drift(kind, arguments.size, arguments.steps).items():
            print(f"H {kind:<11} {dtype!s:<14}" + "".join(f"  {name} {value:.2e}" for name, value in found.items()))
            figures_of = {name: f"{value:.3e}" for name, value in found.items()}
            row = {"H": kind, "covariance_dtype": dtype, **figures_of, **common}
            append(arguments.output, COLUMNS, [row])


if __name__ == "__main__":
    main()
