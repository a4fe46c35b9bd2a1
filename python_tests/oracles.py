"""Algorithm 2 as the paper writes it, dense and in float64. Shares no code with the package."""

import torch


class DenseFilter:
    """Blocks of P as plain matrices; M measurements of one w as the batch filter does them, one after another."""

    def __init__(self, sizes, lam, nu, p0=1.0, noise=None, q=0.0):
        self.blocks = [p0 * torch.eye(n, dtype=torch.float64) for n in sizes]
        self.sizes, self.lam, self.nu, self.q = list(sizes), lam, nu, q
        self.noise = len(self.sizes) if noise is None else noise

    def step(self, weights, jacobian, innovation):
        start = weights.clone()
        for h, error in zip(jacobian, innovation, strict=True):
            parts = h.split(self.sizes)
            gains = [p @ part for p, part in zip(self.blocks, parts, strict=True)]
            variance = sum(float(part @ k) for part, k in zip(parts, gains, strict=True))
            a = 1 / (self.noise * self.lam + variance)
            remaining = error - h @ (weights - start)
            weights += a * remaining * torch.cat(gains)
            for i, k in enumerate(gains):
                p = (self.blocks[i] - a * torch.outer(k, k)) / self.lam
                self.blocks[i] = p + self.q * torch.eye(len(p), dtype=torch.float64)
            self.lam = self.lam * self.nu + 1 - self.nu


def relative(a, b):
    """Largest difference in units of the largest entry of b."""
    return float((a - b).abs().max() / b.abs().max())
