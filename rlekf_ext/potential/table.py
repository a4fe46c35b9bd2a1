"""The network for training, with its embedding nets on a table: all that depends on the geometry is summed first.

An embedding net is a function G of one number, s(r). Interpolated on K nodes x_k by polynomials of degree 7,

    G(s) = Σ_k φ_k(s) G(x_k),

it is linear in its values at the nodes. So the sum over the neighbours of an atom does not wait for the weights:

    T = Σ_edges R G(s)ᵀ = C N        C = Σ_edges R φ(s)ᵀ (4, K), of the geometry;  N = G(nodes) (K, M), of the weights

D = Tᵀ T_< and the fitting net follow as in the exact network. A gradient by the weights needs no second derivative of
an embedding net either: along a direction of the atoms' coordinates, dC/dτ is geometry again, and dT/dτ = dC/dτ N.
Everything is the exact derivative of the interpolated energy, which is off by the interpolation alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlekf_ext.potential.descriptor import _environment_matrix, _radial, run_networks
from rlekf_ext.potential.neighbors import Frame

if TYPE_CHECKING:
    from rlekf_ext.potential.model import DeepPotential

STENCIL = 8  # nodes per interpolation


@dataclass(frozen=True)
class Nodes:
    """K equidistant nodes from s = 0 to `last`, 1/Å."""

    number: int
    last: float

    @property
    def step(self) -> float:
        """1/Å."""
        return self.last / (self.number - 1)

    def stencil(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The first of the eight nodes around each s (E,), and the values and slopes of their polynomials, (E, 8)."""
        place = s / self.step
        first = (place.floor() - (STENCIL // 2 - 1)).clamp(0, self.number - STENCIL)
        t = (place - first).unsqueeze(-1)  # from the first node of the stencil, in steps
        offsets = torch.arange(STENCIL, dtype=s.dtype, device=s.device)
        away = t - offsets  # (E, 8)
        values, slopes = [], []
        for j in range(STENCIL):
            others = [i for i in range(STENCIL) if i != j]
            scale = 1.0
            for i in others:
                scale /= j - i
            value, slope = torch.full_like(s, scale), torch.zeros_like(s)
            for i in others:  # the product rule, factor by factor
                slope = slope * away[:, i] + value
                value = value * away[:, i]
            values.append(value)
            slopes.append(slope / self.step)
        return first.long(), torch.stack(values, 1), torch.stack(slopes, 1)


@dataclass(frozen=True, eq=False)
class Geometry:
    """A frame as the network on a table takes it: n atoms, sorted by element, E edges, T elements, K nodes."""

    order: Tensor  # (n,) int64, the atoms in the order of their elements
    counts: list[int]  # atoms of each element
    coefficients: Tensor  # (n, 4, T, K), C
    place: Tensor  # (E, 8) int64, where the stencil of an edge begins and ends in C[:, 0] flattened: see `_entries`
    values: Tensor  # (E, 8), φ
    slopes: Tensor  # (E, 8), φ', Å
    rows: Tensor  # (E, 4), R of the normalised environment matrix, over nnei
    row_jacobian: Tensor  # (E, 4, 3), dR/dr, 1/Å
    scalar_jacobian: Tensor  # (E, 3), ds/dr, 1/Å²
    edges: Tensor  # (E, 3), Å
    center: Tensor  # (E,) int64
    neighbor: Tensor  # (E,) int64


@torch.no_grad()
def geometry_of(model: DeepPotential, frame: Frame, nodes: Nodes) -> Geometry:
    """The frame with its coefficients. Raises DataError if it does not fit the network."""
    descriptor = model.descriptor
    architecture = descriptor.architecture
    num_types, nnei = descriptor.num_types, sum(architecture.sel)
    slot_element = torch.repeat_interleave(torch.arange(num_types), torch.tensor(frame.slots, dtype=torch.int64))
    near = frame.edges.square().sum(-1) < architecture.rcut**2
    center, slot = near.nonzero(as_tuple=True)
    edges, neighbor = frame.edges[center, slot], frame.neighbors[center, slot]
    element = slot_element.to(edges.device)[slot]

    order = torch.argsort(frame.types, stable=True)
    position = torch.empty_like(order)
    position[order] = torch.arange(len(order), device=order.device)
    counts = torch.bincount(frame.types, minlength=num_types).tolist()

    matrix, jacobian = _environment_matrix(edges, architecture.rcut, architecture.rcut_smth)
    davg, dstd = descriptor.davg[frame.types[center]], descriptor.dstd[frame.types[center]]
    rows = (matrix - davg) / dstd / nnei
    row_jacobian = jacobian / dstd.unsqueeze(-1) / nnei
    first, values, slopes = nodes.stencil(matrix[:, 0])

    shape = (len(order), 4, num_types, nodes.number)
    coefficients = edges.new_zeros(shape)
    place = ((position[center] * 4) * num_types + element) * nodes.number + first
    place = place.unsqueeze(1) + torch.arange(STENCIL, device=edges.device)
    _add(coefficients, place, rows, values)
    # Empty slots: s = 0, which is the first node.
    filled = torch.zeros(len(order), num_types, dtype=edges.dtype, device=edges.device)
    filled.index_put_((position[center], element), torch.ones_like(edges[:, 0]), accumulate=True)
    empty = edges.new_tensor(architecture.sel) - filled
    zero = (-descriptor.davg[:, 0] / descriptor.dstd[:, 0] / nnei)[frame.types[order]]
    coefficients[:, 0, :, 0] += zero.unsqueeze(1) * empty
    return Geometry(
        order, counts, coefficients, place, values, slopes, rows, row_jacobian, jacobian[:, 0], edges, center, neighbor
    )


def _add(coefficients: Tensor, place: Tensor, rows: Tensor, values: Tensor) -> None:
    """coefficients[atom, :, element, stencil] += rows ⊗ values, edge by edge."""
    stride = coefficients.shape[2] * coefficients.shape[3]
    where = place.unsqueeze(1) + stride * torch.arange(4, device=place.device).view(1, 4, 1)
    added = rows.unsqueeze(2) * values.unsqueeze(1)
    coefficients.view(-1).index_add_(0, where.flatten(), added.flatten())


class Table:
    """The nodes, and the geometry of the latest frame, which a filter visits several times."""

    def __init__(self, nodes: Nodes):
        self.nodes = nodes
        self._latest: tuple[Frame, Nodes, Geometry] | None = None

    def geometry(self, model: DeepPotential, frame: Frame) -> Geometry:
        if self._latest is None or self._latest[0] is not frame or self._latest[1] != self.nodes:
            self._latest = (frame, self.nodes, geometry_of(model, frame, self.nodes))
        return self._latest[2]


def node_values(model: DeepPotential, nodes: Nodes) -> list[Tensor]:
    """N of each centre element: (T K, M)."""
    descriptor = model.descriptor
    types = range(descriptor.num_types)
    s = torch.linspace(0, nodes.last, nodes.number, dtype=descriptor.davg.dtype, device=descriptor.davg.device)
    inputs = (s - descriptor.davg[:, :1]) / descriptor.dstd[:, :1]  # (C, K)
    networks = [descriptor._embedding(center, neighbor) for center in types for neighbor in types]
    found = run_networks(networks, inputs.repeat_interleave(len(types), 0).unsqueeze(-1))
    return list(found.view(len(types), -1, found.shape[-1]))


def moments(geometry: Geometry, coefficients: Tensor, values: Sequence[Tensor]) -> Tensor:
    """T = C N of all atoms, (n, 4, M)."""
    parts = [
        c.flatten(0, 1).flatten(1) @ n for c, n in zip(coefficients.split(geometry.counts), values, strict=True) if len(c)
    ]
    return torch.cat(parts).view(len(geometry.order), 4, -1)


def energies(model: DeepPotential, geometry: Geometry, moments: Tensor) -> Tensor:
    """The atomic energies without their bias, (n,), in the order of the elements."""
    axis = model.descriptor.architecture.axis_neuron
    parts = [
        run_networks([fitting], torch.bmm(t.mT, t[:, :, :axis]).flatten(1).unsqueeze(0)).flatten()  # type: ignore[list-item]
        for fitting, t in zip(model.fittings, moments.split(geometry.counts), strict=True)
        if len(t)
    ]
    return torch.cat(parts)


class Interpolated(torch.autograd.Function):
    """Atomic energies (n,) without bias, and the derivatives of their sum by the edges, (E, 3)."""

    @staticmethod
    def forward(ctx: Any, model: DeepPotential, geometry: Geometry, nodes: Nodes, forces: bool, *weights: Tensor) -> Any:
        values = node_values(model, nodes)
        t = moments(geometry, geometry.coefficients, values)
        by_edge = geometry.edges.new_zeros(0, 3)
        if forces:
            with torch.enable_grad():
                t.requires_grad_()
                atomic = energies(model, geometry, t)
                (t_bar,) = torch.autograd.grad(atomic.sum(), t)
            by_edge = _by_edge(geometry, t_bar, values)
        else:
            atomic = energies(model, geometry, t)
        ctx.model, ctx.geometry, ctx.nodes, ctx.forces, ctx.weights = model, geometry, nodes, forces, weights
        result = torch.empty_like(atomic)
        result[geometry.order] = atomic.detach()
        return result, by_edge

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_energy: Tensor, by_edge: Tensor) -> Any:
        model, geometry = ctx.model, ctx.geometry
        with torch.enable_grad():
            values = node_values(model, ctx.nodes)
            t = moments(geometry, geometry.coefficients, values)
            atomic = energies(model, geometry, t)
            target = atomic @ by_energy[geometry.order].to(atomic)
            if ctx.forces:
                (t_bar,) = torch.autograd.grad(atomic.sum(), t, create_graph=True)
                along = moments(geometry, _coefficients_along(geometry, by_edge), values)
                target = target + (t_bar * along).sum()
            gradients = torch.autograd.grad(target, ctx.weights, allow_unused=True)
        return None, None, None, None, *gradients


def _by_edge(geometry: Geometry, t_bar: Tensor, values: Sequence[Tensor]) -> Tensor:
    parts = [t @ n.T for t, n in zip(t_bar.split(geometry.counts), values, strict=True) if len(t)]
    y = torch.cat(parts)  # (n, 4, T K) = dE/dC
    stride = y.shape[2]
    where = geometry.place.unsqueeze(1) + stride * torch.arange(4, device=y.device).view(1, 4, 1)
    near = y.view(-1)[where]  # (E, 4, 8)
    by_row = (near @ geometry.values.unsqueeze(2)).squeeze(2)
    by_scalar = ((near @ geometry.slopes.unsqueeze(2)).squeeze(2) * geometry.rows).sum(1, keepdim=True)
    return (by_row.unsqueeze(1) @ geometry.row_jacobian).squeeze(1) + by_scalar * geometry.scalar_jacobian


def _coefficients_along(geometry: Geometry, direction: Tensor) -> Tensor:
    """dC/dτ as the edges move along `direction` (E, 3)."""
    rows = (geometry.row_jacobian @ direction.unsqueeze(2)).squeeze(2)
    scalar = (geometry.scalar_jacobian * direction).sum(1, keepdim=True)
    result = torch.zeros_like(geometry.coefficients)
    _add(result, geometry.place, rows, geometry.values)
    _add(result, geometry.place, geometry.rows * scalar, geometry.slopes)
    return result
