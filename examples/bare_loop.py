"""RLEKF in a plain training loop: a network learns energies and forces of four particles."""

import torch

from rlekf_ext import RLEKF, Stepper


def distances(x):
    """The six squared distances (B, 6) of particles at x (B, 4, 3)."""
    i, j = torch.triu_indices(4, 4, offset=1)
    return (x[:, i] - x[:, j]).square().sum(-1)


def reference(x):
    return torch.exp(-distances(x)).sum(1)


def with_forces(energy, x):
    """Energy (B,) and forces (B, 4, 3), which can be differentiated again."""
    x = x.clone().requires_grad_()
    e = energy(x)
    (gradient,) = torch.autograd.grad(e.sum(), x, create_graph=True)
    return e, -gradient


def main():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(6, 24), torch.nn.Tanh(), torch.nn.Linear(24, 1)).double()
    step = Stepper(RLEKF(network.parameters(), memory_factor=0.998))
    for i in range(201):
        x = 0.5 * torch.randn(16, 4, 3, dtype=torch.float64)
        energy, forces = (label.detach() for label in with_forces(reference, x))
        # One call per measured quantity, each with a prediction at the current weights.
        step(network(distances(x))[:, 0], energy)
        error = step(with_forces(lambda x: network(distances(x))[:, 0], x)[1], forces)
        if i % 100 == 0:
            print(f"{i:4d}  mean absolute force error {error:.4f}")


if __name__ == "__main__":
    main()
