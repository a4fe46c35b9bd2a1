"""The network for training, with its embedding nets on a table: all that depends on the geometry is summed first.

An embedding net is a function G of one number, s(r). Interpolated on K nodes x_k by polynomials of degree 7,

    G(s) = Σ_k φ_k(s) G(x_k),

it is linear in its values at the nodes. So the sum over the neighbours of an atom does not wait for the weights:

    T = Σ_edges R G(s)ᵀ = C N        C = Σ_edges R φ(s)ᵀ (4, K), of the geometry;  N = G(nodes) (K, M), of the weights

D = Tᵀ T_< and the fitting net follow as in the exact network. A gradient by the weights needs no second derivative of
an embedding net either: as the atoms move along a direction, dC/dτ is geometry again, and dT/dτ = dC/dτ N. Everything
is the exact derivative of the interpolated energy, which is off by the interpolation alone.

Derivatives are written out: `x_bar` is the derivative of a result by x, `x_dot` that of x along the direction.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rlekf_ext.errors import DataError
from rlekf_ext.potential.architecture import DescriptorArchitecture
from rlekf_ext.potential.descriptor import Network, switched
from rlekf_ext.potential.neighbors import Frame

if TYPE_CHECKING:
    from rlekf_ext.potential.model import DeepPotential

OPS = torch.ops.rlekf
LEAST_FORCE = 1e-3  # eV/Å: smaller forces, as in a perfect lattice, are not what the table is judged by


@dataclass(frozen=True)
class Nodes:
    """K equidistant nodes from s = 0 to `last`, 1/Å."""

    number: int
    last: float


@dataclass(frozen=True, eq=False)
class Geometry:
    """A frame as the network on a table takes it: n atoms, sorted by element, E edges, T elements, K nodes."""

    order: Tensor  # (n,) int64, the atoms in the order of their elements
    counts: list[int]  # atoms of each element
    coefficients: Tensor  # (n, 4, T, K), C
    edges: Tensor  # (E, 3), Å, in the order of the sorted atoms that they start from
    center: Tensor  # (E,) int64
    neighbor: Tensor  # (E,) int64
    stencils: tuple[Tensor, ...]  # csrc/table.h, Edges: first_edge, place, values, slopes, rows, jacobian


@torch.no_grad()
def geometry_of(model: DeepPotential, frame: Frame, nodes: Nodes) -> Geometry:
    """The frame with its coefficients. Raises DataError if it does not fit the network."""
    descriptor = model.descriptor
    architecture, device = descriptor.architecture, frame.edges.device
    if frame.edges.dtype != descriptor.davg.dtype:
        raise DataError(f"The network is {descriptor.davg.dtype}, the frame {frame.edges.dtype}: call frame.to(dtype).")
    order = torch.argsort(frame.types, stable=True)
    types, edges = frame.types[order], frame.edges[order]
    near = edges.square().sum(-1) < architecture.rcut**2
    row, slot = near.nonzero(as_tuple=True)
    element = torch.repeat_interleave(torch.arange(descriptor.num_types), torch.tensor(frame.slots)).to(device)
    edges = edges[row, slot]
    first_edge = torch.zeros(len(order) + 1, dtype=torch.int64, device=device)
    torch.cumsum(near.sum(1), 0, out=first_edge[1:])
    coefficients, *stencils = OPS.tabulate(
        edges,
        first_edge,
        element[slot],
        types,
        descriptor.davg,
        descriptor.dstd,
        torch.tensor(architecture.sel, device=device),
        nodes.number,
        architecture.rcut,
        architecture.rcut_smth,
        nodes.last,
    )
    return Geometry(
        order,
        torch.bincount(types, minlength=descriptor.num_types).tolist(),
        coefficients,
        edges,
        order[row],
        frame.neighbors[order][row, slot],
        (first_edge, *stencils),
    )


class EdgeForces(NamedTuple):
    """The E edges of a frame, and the derivatives of its energy by them."""

    edges: Tensor  # (E, 3), Å
    center: Tensor  # (E,) int64, the atom an edge starts from
    neighbor: Tensor  # (E,) int64, the atom it points to
    by_edge: Tensor  # (E, 3), eV/Å


class Table:
    """The nodes for the networks of a model: `model.table = Table(...)` makes autograd go through them.

    `number` nodes reach to `last` (1/Å), or farther if a frame needs it: nothing is extrapolated.
    """

    def __init__(self, last: float, number: int = 128):
        self.nodes = Nodes(number, last)
        self._latest: tuple[Frame, Nodes, Geometry] | None = None

    def atomic_energies(self, model: DeepPotential, frame: Frame, forces: bool) -> tuple[Tensor, EdgeForces | None]:
        """The atomic energies (n,) without their bias, and the derivatives of their sum. Raises DataError if the frame
        does not fit the network."""
        geometry = self._geometry(model, frame)
        atomic, by_edge = Interpolated.apply(model, geometry, self.nodes, forces, *model.parameters())
        return atomic, EdgeForces(geometry.edges, geometry.center, geometry.neighbor, by_edge) if forces else None

    def error(self, model: DeepPotential, frames: Iterable[Frame]) -> float:
        """The largest relative difference (RMS) from the exact network over the frames: of forces, and of the
        derivatives of the energy by the weights."""
        worst = 0.0
        for frame in frames:
            (forces, by_weight), (exact_forces, exact_by_weight) = (
                _derivatives(model, frame, table) for table in (self, None)
            )
            for own, exact, least in ((forces, exact_forces, LEAST_FORCE), (by_weight, exact_by_weight, 0.0)):
                size = max(float(exact.square().mean().sqrt()), least)
                worst = max(worst, float((own - exact).square().mean().sqrt()) / size) if size else worst
        return worst

    def refine(self) -> None:
        """Double the nodes."""
        self.nodes = Nodes(2 * self.nodes.number, self.nodes.last)

    def _geometry(self, model: DeepPotential, frame: Frame) -> Geometry:
        if self._latest is None or self._latest[0] is not frame or self._latest[1] != self.nodes:
            model.descriptor.check(frame)
            largest = largest_scalar(model.descriptor.architecture, frame)
            if largest > self.nodes.last:
                more = math.ceil((self.nodes.number - 1) * largest / self.nodes.last)
                self.nodes = Nodes(more + 1, self.nodes.last * more / (self.nodes.number - 1))
            self._latest = (frame, self.nodes, geometry_of(model, frame, self.nodes))
        return self._latest[2]


def largest_scalar(architecture: DescriptorArchitecture, frame: Frame) -> float:
    """The largest s(r) of a frame, 1/Å."""
    nearest = frame.edges.new_tensor([[min(frame.shortest_edge(), architecture.rcut), 0.0, 0.0]])
    return float(switched(nearest, architecture.rcut, architecture.rcut_smth)[2])


def _derivatives(model: DeepPotential, frame: Frame, table: Table | None) -> tuple[Tensor, Tensor]:
    """The forces, and the derivatives of the energy by all weights, with this table or without any."""
    before, model.table = model.table, table
    try:
        with torch.enable_grad():
            prediction = model(frame)
            gradients = torch.autograd.grad(prediction.energy.sum(), list(model.parameters()), allow_unused=True)
    finally:
        model.table = before
    assert prediction.forces is not None  # for mypy: asked for
    return prediction.forces.detach(), torch.cat([g.flatten() for g in gradients if g is not None])


@dataclass(eq=False)
class Pass:
    """P networks of one shape, run side by side on inputs (P, rows, in), with what the derivatives need."""

    networks: Sequence[Network]
    weights: list[Tensor] = field(default_factory=list)  # of each layer (P, in, out)
    timesteps: list[Tensor | None] = field(default_factory=list)  # (P, 1, out)
    inputs: list[Tensor] = field(default_factory=list)  # (P, rows, in)
    activations: list[Tensor] = field(default_factory=list)  # (P, rows, out), before time step and shortcut
    tangents: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # of the inputs, and of x W

    def forward(self, x: Tensor) -> Tensor:
        """(P, rows, out)."""
        self.layers: list[Any] = [network._modules["layers"]._modules.values() for network in self.networks]  # type: ignore[union-attr]
        for layers in zip(*self.layers, strict=True):
            tensors = zip(*(layer._parameters.values() for layer in layers), strict=True)
            weight, bias, *timestep = [torch.stack(same) if len(same) > 1 else same[0].unsqueeze(0) for same in tensors]
            self.weights.append(weight)
            factor = timestep[0].unsqueeze(1) if timestep else None
            self.timesteps.append(factor)
            self.inputs.append(x)
            y = torch.baddbmm(bias.unsqueeze(1), x, weight)
            if layers[0].hidden:
                y = y.tanh_()
            self.activations.append(y)
            if factor is not None:
                y = y * factor
            x = _with_shortcut(y, x, layers[0].copies)
        return x

    def forward_along(self, x_dot: Tensor) -> Tensor:
        """The tangent of the output along that of the input."""
        for layer, weight, timestep, activation in self._each():
            z_dot = torch.bmm(x_dot, weight)
            self.tangents.append((x_dot, z_dot))
            y_dot = z_dot * (1 - activation.square()) if layer.hidden else z_dot
            if timestep is not None:
                y_dot = y_dot * timestep
            x_dot = _with_shortcut(y_dot, x_dot, layer.copies)
        return x_dot

    def backward(self, y_bar: Tensor) -> Tensor:
        """The derivatives by the inputs."""
        for layer, weight, timestep, activation in reversed(list(self._each())):
            shortcut, y_bar = y_bar, y_bar if timestep is None else y_bar * timestep
            z_bar = y_bar * (1 - activation.square()) if layer.hidden else y_bar
            y_bar = _of_shortcut(torch.bmm(z_bar, weight.mT), shortcut, layer.copies)
        return y_bar

    def gradients(self, y_bar: Tensor, y_dot_bar: Any = None, *, inputs: bool = True) -> tuple[Any, list[Tensor]]:
        """The derivatives by the inputs (None unless asked for) and, one (P, ...) for each, by the parameters, of
        ⟨y_bar, y⟩ + ⟨y_dot_bar, y_dot⟩."""
        found: list[list[Tensor]] = []
        along: Sequence[Any] = self.tangents if y_dot_bar is not None else [None] * len(self.weights)
        each = list(zip(self._each(), self.inputs, along, strict=True))
        for place, ((layer, weight, timestep, activation), x, tangent) in reversed(list(enumerate(each))):
            slope = 1 - activation.square() if layer.hidden else None
            parts = []
            h_bar, h_dot_bar, z_dot_bar = y_bar, y_dot_bar, y_dot_bar
            if timestep is not None:
                h_bar = y_bar * timestep
                by_timestep = (y_bar * activation).sum(1)
                if tangent is not None:
                    h_dot_bar = y_dot_bar * timestep
                    h_dot = tangent[1] * slope if slope is not None else tangent[1]
                    by_timestep = by_timestep + (y_dot_bar * h_dot).sum(1)
                parts = [by_timestep]
            z_bar = h_bar * slope if slope is not None else h_bar
            if tangent is None:
                by_weight = torch.bmm(x.mT, z_bar)
            else:
                x_dot, z_dot = tangent
                z_dot_bar = h_dot_bar * slope if slope is not None else h_dot_bar
                if slope is not None:
                    z_bar = torch.addcmul(z_bar, activation * z_dot, z_dot_bar, value=-2)
                by_weight = torch.baddbmm(torch.bmm(x.mT, z_bar), x_dot.mT, z_dot_bar)
            found.append([by_weight, z_bar.sum(1), *parts])
            if place or inputs:
                y_bar = _of_shortcut(torch.bmm(z_bar, weight.mT), y_bar, layer.copies)
                if tangent is not None:
                    y_dot_bar = _of_shortcut(torch.bmm(z_dot_bar, weight.mT), y_dot_bar, layer.copies)
        return (y_bar if inputs else None), [part for layer in reversed(found) for part in layer]

    def parameters(self) -> list[list[nn.Parameter]]:
        """Of each network, in the order of `gradients`."""
        return [[p for layer in layers for p in layer._parameters.values() if p is not None] for layers in self.layers]

    def _each(self) -> Iterable[tuple[Any, Tensor, Tensor | None, Tensor]]:
        return zip(self.layers[0], self.weights, self.timesteps, self.activations, strict=True)


def _with_shortcut(y: Tensor, x: Tensor, copies: int) -> Tensor:
    if copies == 1:
        return y + x
    return y + torch.cat([x, x], dim=-1) if copies == 2 else y


def _of_shortcut(x_bar: Tensor, y_bar: Tensor, copies: int) -> Tensor:
    if copies == 1:
        return x_bar + y_bar
    if copies == 2:
        left, right = y_bar.chunk(2, dim=-1)
        return x_bar + left + right
    return x_bar


def _product_bar(t: Tensor, d_bar: Tensor, axis: int) -> Tensor:
    """The derivative by the left T of ⟨d_bar, leftᵀ T_< + Tᵀ left_<⟩, (A, 4, M)."""
    result = torch.bmm(t[:, :, :axis], d_bar.mT)
    result[:, :, :axis] += torch.bmm(t, d_bar)
    return result


class Interpolated(torch.autograd.Function):
    """Atomic energies (n,) without bias, and the derivatives of their sum by the edges, (E, 3)."""

    @staticmethod
    def forward(
        ctx: Any, model: DeepPotential, geometry: Geometry, nodes: Nodes, forces: bool, *weights: Tensor
    ) -> Any:
        descriptor = model.descriptor
        types, axis = range(descriptor.num_types), descriptor.architecture.axis_neuron
        s = torch.linspace(0, nodes.last, nodes.number, dtype=geometry.edges.dtype, device=geometry.edges.device)
        inputs = ((s - descriptor.davg[:, :1]) / descriptor.dstd[:, :1]).unsqueeze(-1)  # (C, K, 1)
        embedding = Pass([descriptor._embedding(center, neighbor) for center in types for neighbor in types])
        values = embedding.forward(inputs.repeat_interleave(len(types), 0)).view(
            len(types), -1, descriptor.architecture.neuron[-1]
        )
        atomic, by_moment, by_product, moments, fittings = [], [], [], [], []
        for center, c in enumerate(geometry.coefficients.split(geometry.counts)):
            t = (c.view(4 * len(c), values.shape[1]) @ values[center]).view(len(c), 4, values.shape[2])
            fitting = Pass([model.fittings[center]])  # type: ignore[list-item]
            d = torch.bmm(t.mT, t[:, :, :axis])
            atomic.append(fitting.forward(d.view(1, len(c), descriptor.num_outputs)).view(-1))
            moments.append(t)
            fittings.append(fitting)
            if forces:
                d_bar = fitting.backward(t.new_ones(1, len(c), 1)).view(d.shape)
                by_product.append(d_bar)
                by_moment.append(_product_bar(t, d_bar, axis))
        by_edge = geometry.edges.new_zeros(0, 3)
        if forces:
            y = [t_bar.view(4 * len(t_bar), values.shape[2]) @ n.T for t_bar, n in zip(by_moment, values, strict=True)]
            by_edge = OPS.by_edge(torch.cat(y).view(geometry.coefficients.shape), *geometry.stencils)
        ctx.weights, ctx.axis, ctx.geometry, ctx.forces = weights, axis, geometry, forces
        ctx.saved = embedding, values, moments, fittings, by_moment, by_product
        result = torch.empty_like(geometry.coefficients[:, 0, 0, 0])
        result[geometry.order] = torch.cat(atomic)
        return result, by_edge

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_energy: Tensor, by_edge: Tensor) -> Any:
        geometry: Geometry = ctx.geometry
        embedding, values, moments, fittings, by_moment, by_product = ctx.saved
        found: dict[int, Tensor] = {}

        def note(part: Pass, gradients: Sequence[Tensor]) -> None:
            for number, parameters in enumerate(part.parameters()):
                for p, gradient in zip(parameters, gradients, strict=True):
                    own = gradient[number].view(p.shape)
                    found[id(p)] = found[id(p)] + own if id(p) in found else own

        coefficients = geometry.coefficients.split(geometry.counts)
        energies = by_energy[geometry.order].split(geometry.counts)
        if ctx.forces:
            shape = geometry.coefficients.shape
            along = OPS.along(by_edge.contiguous(), *geometry.stencils, *shape[2:]).split(geometry.counts)
        values_bar = torch.zeros_like(values)
        for center, (t, fitting, c) in enumerate(zip(moments, fittings, coefficients, strict=True)):
            if not len(c):
                continue
            y_bar, flat = energies[center].view(1, -1, 1), c.view(4 * len(c), -1)
            if not ctx.forces:
                d_bar, gradients = fitting.gradients(y_bar)
                t_bar = _product_bar(t, d_bar.view(len(c), t.shape[2], -1), ctx.axis)
                torch.mm(flat.T, t_bar.view(4 * len(c), -1), out=values_bar[center])
            else:
                c_dot = along[center].view(4 * len(c), -1)
                t_dot = (c_dot @ values[center]).view(t.shape)
                d_dot = torch.bmm(t_dot.mT, t[:, :, : ctx.axis]).baddbmm_(t.mT, t_dot[:, :, : ctx.axis])
                fitting.tangents = []
                fitting.forward_along(d_dot.view(1, len(c), -1))
                d_bar, gradients = fitting.gradients(y_bar, torch.ones_like(y_bar))
                t_bar = _product_bar(t, d_bar.view(d_dot.shape), ctx.axis)
                t_bar += _product_bar(t_dot, by_product[center], ctx.axis)
                torch.mm(flat.T, t_bar.view(4 * len(c), -1), out=values_bar[center])
                values_bar[center].addmm_(c_dot.T, by_moment[center].view(4 * len(c), -1))
            note(fitting, gradients)
        number = len(embedding.networks)
        _, gradients = embedding.gradients(values_bar.view(number, -1, values.shape[-1]), inputs=False)
        note(embedding, gradients)
        return None, None, None, None, *(found.get(id(p)) for p in ctx.weights)
