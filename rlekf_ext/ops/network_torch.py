"""The network on a table in torch operations, every derivative written out, for devices without kernels of it.

Nothing here waits for the device: all sizes are known on the host, and no value decides what is computed. The notation
is that of potential/table.py; a tangent is a derivative along a direction in which the atoms move. csrc/cpu/network.cpp
is the same for CPUs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlekf_ext.environment import moved
from rlekf_ext.options import KINDS

STENCIL = 8  # nodes per interpolation
MIDDLE = (STENCIL - 1) / 2  # of a stencil, in units of the distance of two nodes


@dataclass(frozen=True)
class Placed:
    """A frame on its table, on a device: n atoms sorted by element, E edges in the order of their first atoms, the last
    of which may be zeros, which change nothing."""

    bounds: tuple[int, ...]  # (T + 1), the first sorted atom of each element
    order: Tensor  # (n,) int64, where the sorted atoms are in the frame
    center: Tensor  # (E,) int64, atom of the frame
    neighbor: Tensor  # (E,) int64, atom of the frame
    structure: Tensor  # (n,) int64, of the atoms of the frame
    edge_structure: Tensor  # (E,) int64
    coefficients: Tensor  # (n, 4, T K), C
    places: Tensor  # (E, 4, 8) int64, of the coefficients of an edge among all
    values: Tensor  # (E, 8), φ
    slopes: Tensor  # (E, 8), dφ/ds, Å
    rows: Tensor  # (E, 4), R / nnei
    scale: Tensor  # (E, 4), 1 / (dstd nnei)
    direction: Tensor  # (E, 3), of the edge
    length: Tensor  # (E, 1), Å
    ratio: Tensor  # (E, 1), s / r, 1/Å²
    slope: Tensor  # (E, 1), ds/dr, 1/Å²

    @property
    def tensors(self) -> list[Tensor]:
        return [getattr(self, f.name) for f in fields(self) if f.name != "bounds"]

    def around(self, tensors: Sequence[Tensor]) -> Placed:
        """The same with other tensors."""
        return Placed(self.bounds, *tensors)

    @property
    def elements(self) -> Iterator[slice]:
        """The sorted atoms of each element; of some elements there may be none."""
        return (slice(*ends) for ends in zip(self.bounds, self.bounds[1:], strict=False))


class Layer(NamedTuple):
    """The same layer of P nets of one shape."""

    weight: Tensor  # (P, in, out)
    bias: Tensor  # (P, 1, out)
    timestep: Tensor | None  # (P, 1, out)
    hidden: bool
    copies: int  # of the input in the shortcut


class Passed(NamedTuple):
    """What a layer keeps of its forward pass."""

    inputs: Tensor  # (P, rows, in)
    hidden: Tensor  # (P, rows, out), tanh(x W + b), or x W + b of an output layer


class Back(NamedTuple):
    """What a layer keeps of the first backward pass, that of the sum of all energies."""

    by_output: Tensor  # (P, rows, out)
    by_sum: Tensor  # (P, rows, out), by x W + b


class Saved(NamedTuple):
    """What `gradients` needs of `predict`; of each element in the lists. The last three are empty without forces."""

    embedding: list[Layer]
    nodes: list[Passed]
    node_values: Tensor  # (T, T K, M), N of each centre element
    fittings: list[list[Layer]]
    fitted: list[list[Passed]]
    sums: list[Tensor]  # (n_c, 4, M), T
    back: list[list[Back]]
    by_sums: list[Tensor]  # (n_c, 4, M), dE/dT
    by_descriptors: list[Tensor]  # (n_c, M, M_<), dE/dD


@torch.no_grad()
def placed(
    geometry: Sequence[Tensor], normal: Sequence[Tensor], sel: Sequence[int], last: float, num_edges: int
) -> Placed:
    """A frame on the CPU, as torch.ops.rlekf.tabulate returns it, followed by the structures of its atoms, is moved to
    the device of `normal`. It gets edges of zeros, so that there are `num_edges`."""
    device = normal[0].device
    bounds = tuple(geometry[1].tolist())
    order, first_edge, records, neighbor, coefficients, structure = (
        moved(geometry[i], device) for i in (0, 2, 3, 4, 7, 8)
    )
    num_types, num_nodes = coefficients.shape[2:]
    count = len(records)

    def padded(of_edges: Tensor) -> Tensor:
        return with_room(of_edges, num_edges)

    davg, dstd = normal
    scale = 1 / (dstd * sum(sel))
    numbers = torch.arange(len(order), device=device)
    row = torch.repeat_interleave(numbers, first_edge.diff(), output_size=count)
    center = order[row]
    elements = torch.bucketize(row, moved(torch.tensor(bounds[1:-1], dtype=torch.int64), device), right=True)
    s = (records[:, 3] * records[:, 4])[:, None]
    powers = (records[:, 6:7] - MIDDLE) ** torch.arange(STENCIL, device=device)
    values, slopes = (powers @ basis for basis in _lagrange(records.dtype, device))
    columns = (4 * row[:, None] + torch.arange(4, device=device)) * (num_types * num_nodes) + records[:, 7:].long()
    return Placed(
        bounds=bounds,
        order=order,
        center=padded(center),
        neighbor=padded(neighbor),
        structure=structure,
        edge_structure=padded(structure[center]),
        coefficients=coefficients.flatten(2),
        places=padded(columns[:, :, None] + torch.arange(STENCIL, device=device)),
        values=padded(values),
        slopes=padded(slopes * ((num_nodes - 1) / last)),
        rows=padded((torch.cat([s, s * records[:, :3]], 1) - davg[elements]) * scale[elements]),
        scale=padded(scale[elements]),
        direction=padded(records[:, :3]),
        length=padded(records[:, 3:4]),
        ratio=padded(records[:, 4:5]),
        slope=padded(records[:, 5:6]),
    )


def with_room(of_edges: Tensor, num_edges: int) -> Tensor:
    """Followed by zeros, so that there are `num_edges`."""
    return torch.cat([of_edges, of_edges.new_zeros(num_edges - len(of_edges), *of_edges.shape[1:])])


@cache
def _lagrange(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Lagrange's polynomials on a stencil and their slopes, by powers of the distance from its middle, (8, 8) each."""
    nodes = torch.arange(STENCIL, dtype=torch.float64) - MIDDLE
    coefficients = torch.linalg.inv(nodes[:, None] ** torch.arange(STENCIL))
    slopes = torch.zeros_like(coefficients)
    slopes[:-1] = coefficients[1:] * torch.arange(1, STENCIL, dtype=torch.float64)[:, None]
    return coefficients.to(device, dtype), slopes.to(device, dtype)


@torch.no_grad()
def predict(
    parameters: Sequence[Tensor],
    geometry: Placed,
    normal: Sequence[Tensor],
    sel: Sequence[int],
    last: float,
    sizes: Sequence[int],
    timesteps: Sequence[bool],
    num_structures: int,
    forces: bool,
    virials: bool,
) -> tuple[Tensor, Tensor, Tensor, Saved]:
    """Energies (n,) without bias, forces (n, 3), virials (B, 3, 3), the latter (0, ...) if not wanted; and what
    `gradients` needs."""
    g, (num_embeddings, embedding_layers, fitting_layers, axis) = geometry, sizes
    left, num_types = list(parameters), len(sel)
    embedding = _layers(left, num_embeddings, embedding_layers, timesteps[0], False)
    fittings = [_layers(left, 1, fitting_layers, timesteps[1], True) for _ in range(num_types)]
    # Nets of (neighbour t, centre c) lie in the order t T + c; one-sided nets see the nodes of all centres in turn.
    davg, dstd = normal
    ends = torch.linspace(0, last, g.coefficients.shape[2] // num_types, dtype=davg.dtype, device=davg.device)
    inputs = ((ends - davg[:, :1]) / dstd[:, :1]).expand(num_types, -1, -1).reshape(num_embeddings, -1, 1)
    nodes, found = _forward(embedding, inputs)
    node_values = found.view(num_types, num_types, -1, found.shape[-1]).transpose(0, 1).flatten(1, 2)
    sums = [g.coefficients[atoms] @ values for atoms, values in zip(g.elements, node_values, strict=True)]
    fitted, energies = [], []
    for own, layers in zip(sums, fittings, strict=True):
        passed, energy = _forward(layers, (own.mT @ own[:, :, :axis]).flatten(1)[None])
        fitted.append(passed)
        energies.append(energy.flatten())
    energy = torch.cat(energies)
    energy = torch.empty_like(energy).index_copy_(0, g.order, energy)
    saved = Saved(embedding, nodes, node_values, fittings, fitted, sums, [], [], [])
    if not forces:
        return energy, energy.new_empty(0, 3), energy.new_empty(0, 3, 3), saved
    by_coefficients = []
    for own, layers, passed, values in zip(sums, fittings, fitted, node_values, strict=True):
        by_descriptor, back = _backward(layers, passed)
        by_descriptor = by_descriptor[0].unflatten(-1, (own.shape[2], axis))
        by_sum = _through_product(by_descriptor, own)
        saved.back.append(back)
        saved.by_sums.append(by_sum)
        saved.by_descriptors.append(by_descriptor)
        by_coefficients.append((by_sum @ values.mT).flatten())
    y = torch.cat(by_coefficients)[g.places]
    by_column = (y * g.values[:, None]).sum(-1) * g.scale
    by_s = ((g.rows[:, :, None] * y).sum(1) * g.slopes).sum(-1, keepdim=True)
    inner = (by_column[:, 1:] * g.direction).sum(1, keepdim=True)
    radial = (by_column[:, :1] + by_s) * g.slope + inner * (g.slope - g.ratio)
    by_edge = radial * g.direction + g.ratio * by_column[:, 1:]
    force = by_edge.new_zeros(len(energy), 3).index_add_(0, g.center, by_edge).index_add_(0, g.neighbor, -by_edge)
    virial = by_edge.new_zeros(num_structures * virials, 3, 3)
    if virials:
        virial.index_add_(0, g.edge_structure, -(g.length * g.direction)[:, :, None] * by_edge[:, None, :])
    return energy, force, virial, saved


@torch.no_grad()
def gradients(
    parameters: Sequence[Tensor],
    geometry: Placed,
    normal: Sequence[Tensor],
    sel: Sequence[int],
    last: float,
    sizes: Sequence[int],
    timesteps: Sequence[bool],
    saved: Saved,
    by_energies: Tensor,
    by_forces: Tensor | None,
    by_virials: Tensor | None,
) -> Tensor:
    """For factors (M, n), (M, n, 3) and (M, B, 3, 3) of a sum of all results, its derivatives by the weights (M, N),
    each parameter with its dimensions reversed. Both forces and virials have factors, or neither."""
    g, count, axis = geometry, len(by_energies), sizes[3]
    num_types, shape = len(sel), (saved.node_values.shape[2], axis)  # of a descriptor
    sorted_energies = by_energies[:, g.order]
    tangents = None
    if by_forces is not None and by_virials is not None:
        tangents = _tangents_of_coefficients(g, by_forces, by_virials)
    by_nodes, of_fittings = [], []
    for c, atoms in enumerate(g.elements):
        layers, passed, sums = saved.fittings[c], saved.fitted[c], saved.sums[c]
        by_output = sorted_energies[:, None, atoms, None]
        if tangents is None:
            by_input, pieces = _reverse(layers, passed, by_output)
            by_sum = _through_product(by_input[:, 0].unflatten(-1, shape), sums)
            by_node = _over_atoms(g.coefficients[atoms], by_sum)
        else:
            tangent = tangents[:, atoms]
            moving = tangent @ saved.node_values[c]
            rate = (moving.mT @ sums[:, :, :axis] + sums.mT @ moving[..., :axis]).flatten(2)[:, None]
            by_input, pieces = _reverse(layers, passed, by_output, rate, saved.back[c])
            by_sum = _through_product(by_input[:, 0].unflatten(-1, shape), sums)
            by_sum += _through_product(saved.by_descriptors[c], moving)
            by_node = _over_atoms(g.coefficients[atoms], by_sum) + _over_atoms(tangent, saved.by_sums[c])
        by_nodes.append(by_node)
        of_fittings.append(pieces)
    by_output = torch.stack(by_nodes, 1).unflatten(2, (num_types, -1))  # (M, T, T, K, M) by centre and neighbour
    by_output = by_output.transpose(1, 2).reshape(count, *saved.nodes[-1].hidden.shape)
    _, of_embedding = _reverse(saved.embedding, saved.nodes, by_output)
    return torch.cat([torch.cat(pieces, 2).flatten(1) for pieces in (of_embedding, *of_fittings)], 1)


@torch.no_grad()
def measure(
    parameters: Sequence[Tensor],
    geometry: Placed,
    normal: Sequence[Tensor],
    sel: Sequence[int],
    last: float,
    sizes: Sequence[int],
    timesteps: Sequence[bool],
    bias: Tensor,
    types: Tensor,
    num_atoms: Tensor,
    energy: Tensor,
    forces: Tensor,
    virial: Tensor,
    kinds: Sequence[int],
    atoms: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """ε (U,) and H = -dε/dw (U, N), float64, of updates at the same weights, each a kind and the atoms of its group.
    Labels of other kinds may be None."""
    network = parameters, geometry, normal, sel, last, sizes, timesteps
    names, num_structures, count = [KINDS[kind] for kind in kinds], len(num_atoms), len(kinds)
    with_forces = set(names) != {"energy"}
    energies, found_forces, virials, saved = predict(*network, num_structures, with_forces, "virial" in names)
    by_energies = energies.new_zeros(count, len(energies))
    by_forces = energies.new_zeros(count, len(energies), 3) if with_forces else None
    by_virials = energies.new_zeros(count, num_structures, 3, 3) if with_forces else None
    num_atoms = num_atoms.double()
    errors = []
    for i, (kind, group) in enumerate(zip(names, atoms, strict=True)):
        if kind == "energy":
            atomic = energies.double() + bias[types]
            found = atomic.new_zeros(num_structures).index_add_(0, geometry.structure, atomic)
            error, by_found = _absolute(found - energy, 1 / (num_atoms * num_structures))
            by_energies[i] = by_found.to(energies.dtype)[geometry.structure]
        elif kind == "force":
            assert by_forces is not None  # for mypy
            error, by_found = _absolute((found_forces[group] - forces[group]).double(), 1 / max(3 * len(group), 1))
            by_forces[i].index_copy_(0, group, by_found.to(energies.dtype))
        else:
            assert by_virials is not None  # for mypy
            share = 1 / (9 * num_structures * num_atoms)
            error, by_found = _absolute((virials - virial).double(), share[:, None, None])
            by_virials[i] = by_found.to(energies.dtype)
        errors.append(error)
    return torch.stack(errors), gradients(*network, saved, by_energies, by_forces, by_virials).double()


def _absolute(difference: Tensor, share: Any) -> tuple[Tensor, Tensor]:
    """The sum of the absolute differences times their shares, and its derivatives by what was predicted, times -1."""
    return (difference.abs() * share).sum(), -difference.sign() * share


def _layers(left: list[Tensor], num_nets: int, num_layers: int, timesteps: bool, output: bool) -> list[Layer]:
    """The layers of the next nets, whose parameters are taken out of `left`."""
    nets: list[list[list[Tensor]]] = []
    shortcuts = []
    for _ in range(num_nets):
        nets.append([])
        for number in range(num_layers):
            inputs, outputs = left[0].shape
            hidden = not output or number + 1 < num_layers
            copies = outputs // inputs if hidden and outputs in (inputs, 2 * inputs) else 0
            taken = 3 if timesteps and copies else 2
            nets[-1].append(left[:taken])
            shortcuts.append((hidden, copies))
            del left[:taken]
    layers = []
    for same, (hidden, copies) in zip(zip(*nets, strict=True), shortcuts, strict=False):
        weight, bias, *timestep = (torch.stack(tensors) for tensors in zip(*same, strict=True))
        layers.append(Layer(weight, bias[:, None], timestep[0][:, None] if timestep else None, hidden, copies))
    return layers


def _forward(layers: list[Layer], x: Tensor) -> tuple[list[Passed], Tensor]:
    """(P, rows, in) -> (P, rows, out)."""
    passed = []
    for layer in layers:
        y = torch.baddbmm(layer.bias, x, layer.weight)
        if layer.hidden:
            y = y.tanh()
        passed.append(Passed(x, y))
        x = _output(layer, y, x)
    return passed, x


def _output(layer: Layer, hidden: Tensor, inputs: Tensor) -> Tensor:
    y = hidden if layer.timestep is None else hidden * layer.timestep
    return y + torch.cat([inputs] * layer.copies, -1) if layer.copies else y


def _backward(layers: list[Layer], passed: list[Passed]) -> tuple[Tensor, list[Back]]:
    """Of the sum of all outputs: its derivatives by the inputs (P, rows, in), and what each layer keeps."""
    back = []
    by_output = torch.ones_like(passed[-1].hidden)
    for layer, own in zip(reversed(layers), reversed(passed), strict=True):
        by_sum = _by_sum(layer, own, by_output)
        back.append(Back(by_output, by_sum))
        by_output = _by_input(layer, by_output, by_sum)
    return by_output, back[::-1]


def _reverse(
    layers: list[Layer],
    passed: list[Passed],
    by_output: Tensor,
    tangent: Tensor | None = None,
    back: Sequence[Back] = (),
) -> tuple[Tensor, list[Tensor]]:
    """For M sums: their derivatives by the inputs (M, P, rows, in), and by the weights, a list of (M, P, size).

    A sum is that of the outputs times `by_output` (M, P, rows, out) and, with a tangent of the inputs (M, P, rows, in),
    of the tangents of the outputs, whose first backward pass is `back`.
    """
    tangents, rates = [], []  # of the inputs, and of x W + b
    for layer, own in zip(layers, passed, strict=True):
        if tangent is None:
            break
        tangents.append(tangent)
        rates.append(tangent @ layer.weight)
        hidden = rates[-1] * (1 - own.hidden.square()) if layer.hidden else rates[-1]
        tangent = _output(layer, hidden, tangent)
    pieces: list[Tensor] = []
    for i in reversed(range(len(layers))):
        layer, own = layers[i], passed[i]
        by_sum = _by_sum(layer, own, by_output)
        by_timestep = None if layer.timestep is None else own.hidden * by_output
        if tangents and layer.hidden:
            by_sum = by_sum - 2 * own.hidden * rates[i] * back[i].by_sum  # (1 - h²) of the tangent depends on h
        by_weight = own.inputs.mT @ by_sum
        if tangents:
            by_weight = by_weight + tangents[i].mT @ back[i].by_sum
            if by_timestep is not None:
                by_timestep = by_timestep + rates[i] * (1 - own.hidden.square()) * back[i].by_output
        own_pieces = [by_weight.mT.flatten(2), by_sum.sum(2)]
        if by_timestep is not None:
            own_pieces.append(by_timestep.sum(2))
        pieces = own_pieces + pieces
        by_output = _by_input(layer, by_output, by_sum)
    return by_output, pieces


def _by_sum(layer: Layer, own: Passed, by_output: Tensor) -> Tensor:
    """The derivatives by x W + b, of those by the output."""
    by_hidden = by_output if layer.timestep is None else by_output * layer.timestep
    return by_hidden * (1 - own.hidden.square()) if layer.hidden else by_hidden


def _by_input(layer: Layer, by_output: Tensor, by_sum: Tensor) -> Tensor:
    by_input = by_sum @ layer.weight.mT
    for copy in by_output.split(by_input.shape[-1], -1) if layer.copies else ():
        by_input = by_input + copy
    return by_input


def _through_product(by_descriptor: Tensor, sums: Tensor) -> Tensor:
    """The derivatives by T (..., 4, M) of D = Tᵀ T_<, of those by D (..., M, M_<)."""
    axis = by_descriptor.shape[-1]
    result = sums[..., :axis] @ by_descriptor.mT
    result[..., :axis] += sums @ by_descriptor
    return result


def _over_atoms(coefficients: Tensor, by_sums: Tensor) -> Tensor:
    """Σ_a C_aᵀ T_a: (..., n, 4, T K) and (..., n, 4, M) -> (..., T K, M)."""
    return coefficients.flatten(-3, -2).mT @ by_sums.flatten(-3, -2)


def _tangents_of_coefficients(g: Placed, by_forces: Tensor, by_virials: Tensor) -> Tensor:
    """dC/dτ (M, n, 4, T K) as edges move along what the sum has as factors of their derivatives."""
    along = by_forces[:, g.center] - by_forces[:, g.neighbor]
    edges = g.length * g.direction
    along = along - (edges[:, None, :] @ by_virials[:, g.edge_structure]).squeeze(2)
    radial = (along * g.direction).sum(-1, keepdim=True)
    of_s = g.slope * radial
    of_rows = torch.cat([of_s, (of_s - g.ratio * radial) * g.direction + g.ratio * along], -1) * g.scale
    own = of_rows[..., None] * g.values[:, None] + g.rows[..., None] * (of_s * g.slopes)[:, :, None]
    result = own.new_zeros(len(own), g.coefficients.numel())
    result.index_add_(1, g.places.flatten(), own.flatten(1))
    return result.view(-1, *g.coefficients.shape)
