"""What is known of a covariance without making it dense: its extreme eigenvalues, from products with vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Storage in float32 perturbs P by about 1e-7 of its largest entries at every fold. Above this condition number, a
# factor of ten before such a perturbation reaches the smallest eigenvalue, P is about to lose positive definiteness.
FLOAT32_CONDITION = 1e6


@dataclass(frozen=True)
class Diagnostics:
    """P in a few numbers. Eigenvalues are Ritz values: P has one at least as small as `smallest_eigenvalue` and one at
    least as large as `largest_eigenvalue`; a few Lanczos steps may miss the extreme ones."""

    memory_factor: float  # λ
    scale: float  # β
    shift: float  # δ
    trace: float  # of P
    smallest_diagonal: float
    largest_diagonal: float
    smallest_eigenvalue: float
    largest_eigenvalue: float
    variance: float  # HᵀPH of the last measurement used
    gain_norm: float  # |a PH| of the last measurement used: how far w moves for an innovation of 1

    @property
    def condition(self) -> float:
        """A lower bound of the condition number of P; inf if an eigenvalue that is not positive was found."""
        if self.smallest_eigenvalue <= 0:
            return float("inf")
        return self.largest_eigenvalue / self.smallest_eigenvalue


def ritz_values(multiply: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> Tensor:
    """Eigenvalues of a symmetric matrix on the Krylov space of `start` (n,), ascending: Lanczos, fully orthogonalised.

    The smallest is at least the smallest of the matrix, and at most the Rayleigh quotient of `start`.
    """
    vectors = [start / start.norm()]
    diagonal, beside = [], []
    for _ in range(min(steps, len(start))):
        image = multiply(vectors[-1])
        diagonal.append(image @ vectors[-1])
        basis = torch.stack(vectors)
        for _ in range(2):  # one pass leaves 1e-8 of the old directions, two leave 1e-16
            image = image - (basis @ image) @ basis
        length = image.norm()
        if not length > 1e-14 * abs(diagonal[0]):
            break
        beside.append(length)
        vectors.append(image / length)
    beside = beside[: len(diagonal) - 1]
    t = torch.diag(torch.stack(diagonal))
    if beside:
        t = t + torch.diag(torch.stack(beside), 1) + torch.diag(torch.stack(beside), -1)
    return torch.linalg.eigvalsh(t)
