"""The ops of the network on a table in plain torch, differentiated by autograd: for devices without kernels, and what
the kernels are tested against. Arguments are those of torch.ops.rlekf.tabulate, predict and gradients (csrc/ops.cpp).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STENCIL = 8  # nodes per interpolation


def tabulate(
    edges: Tensor,
    neighbors: Tensor,
    types: Tensor,
    slots: Sequence[int],
    normal: Sequence[Tensor],
    sel: Sequence[int],
    num_nodes: int,
    rcut: float,
    rcut_smth: float,
    last: float,
) -> list[Tensor]:
    """Edges (n, slots, 3), neighbors (n, slots) and types (n,) of a frame -> order (n,), first_atom (T + 1,),
    first_edge (n + 1,), edges (E, 8), neighbor (E,), first_incoming (n + 1,), incoming (E,), coefficients
    (n, 4, T, K): see csrc/network.h."""
    num_types, device = len(sel), edges.device
    order = torch.argsort(types, stable=True)
    first_atom = _starts(torch.bincount(types, minlength=num_types))
    vectors = edges[order]
    near = vectors.square().sum(-1) < rcut**2
    first_edge = _starts(near.sum(1))
    row, slot = near.nonzero(as_tuple=True)
    element = torch.repeat_interleave(torch.arange(num_types), torch.tensor(slots)).to(device)[slot]
    neighbor = neighbors[order][row, slot]
    vectors = vectors[row, slot].double()
    length = vectors.norm(dim=1)
    u = ((length - rcut_smth) / (rcut - rcut_smth)).clamp(0, 1)
    s = (u**3 * (-6 * u**2 + 15 * u - 10) + 1) / length
    slope = (-30 * (u * (1 - u)) ** 2 / (rcut - rcut_smth) - s) / length
    t = s * ((num_nodes - 1) / last)
    first = (t.floor() - (STENCIL // 2 - 1)).clamp(0, num_nodes - STENCIL)
    columns = [
        *(vectors / length[:, None]).unbind(1),
        length,
        s / length,
        slope,
        t - first,
        element * num_nodes + first,
    ]
    records = torch.stack(columns, 1).to(edges.dtype)

    center = types[order]
    scale, values, _ = _scale(normal, sel)[center[row]], *_polynomials(records[:, 6])
    own = _rows(records, normal[0][center[row]], scale)[:, :, None] * values[:, None, :]
    coefficients = edges.new_zeros(len(order), 4, num_types * num_nodes)
    coefficients.view(-1).index_add_(0, _places(records, row, num_types * num_nodes).flatten(), own.flatten())
    empty = torch.tensor(sel, device=device) - _counts(row * num_types + element, len(order) * num_types).view(
        -1, num_types
    )
    rows = -normal[0][center] * _scale(normal, sel)[center]  # of a slot without neighbour, s = 0
    coefficients = coefficients.view(len(order), 4, num_types, num_nodes)
    coefficients[..., 0] += rows[:, :, None] * empty[:, None, :]
    incoming = torch.argsort(neighbor, stable=True)
    first_incoming = _starts(_counts(neighbor, len(order)))
    return [order, first_atom, first_edge, records, neighbor, first_incoming, incoming, coefficients]


def predict(
    parameters: Sequence[Tensor],
    geometry: Sequence[Tensor],
    normal: Sequence[Tensor],
    sel: Sequence[int],
    last: float,
    sizes: Sequence[int],
    timesteps: Sequence[bool],
    num_structures: int,
    forces: bool,
    virials: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Energies (n,) without bias, forces (n, 3), virials (B, 3, 3), and nothing saved; (0, ...) if not wanted."""
    with torch.enable_grad():
        found = _results(parameters, geometry, normal, sel, last, sizes, timesteps, num_structures, forces)
    energies, force, virial = (value.detach() for value in found)
    return energies, force, virial if virials else virial[:0], energies.new_empty(0)


def gradients(
    parameters: Sequence[Tensor],
    geometry: Sequence[Tensor],
    normal: Sequence[Tensor],
    sel: Sequence[int],
    last: float,
    sizes: Sequence[int],
    timesteps: Sequence[bool],
    saved: Tensor,
    by_energies: Tensor,
    by_forces: Tensor | None,
    by_virials: Tensor | None,
) -> Tensor:
    """For factors (M, n), (M, n, 3) and (M, B, 3, 3) of a sum of all results, its derivatives by the weights (M, N),
    each parameter with its dimensions reversed."""
    leaves = [p.detach().requires_grad_() for p in parameters]
    count = 1 if by_virials is None else by_virials.shape[1]
    with torch.enable_grad():
        results = _results(leaves, geometry, normal, sel, last, sizes, timesteps, count, by_forces is not None)
        rows = []
        for i in range(len(by_energies)):
            total = (by_energies[i] * results[0]).sum()
            if by_forces is not None and by_virials is not None:
                total = total + (by_forces[i] * results[1]).sum() + (by_virials[i] * results[2]).sum()
            found = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
            both = zip(leaves, found, strict=True)
            rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).t().flatten() for p, g in both]))
    return torch.stack(rows)


def _results(parameters, geometry, normal, sel, last, sizes, timesteps, num_structures, forces):
    order, first_atom, first_edge, records, neighbor, _, _, coefficients, structure = geometry
    num_embeddings, embedding_layers, fitting_layers, axis = sizes
    num_types, num_nodes = coefficients.shape[2:]
    left = list(parameters)
    embeddings = [_net(left, embedding_layers, timesteps[0], False) for _ in range(num_embeddings)]
    fittings = [_net(left, fitting_layers, timesteps[1], True) for _ in range(num_types)]
    davg, dstd = normal
    s = torch.linspace(0, last, num_nodes, dtype=coefficients.dtype, device=coefficients.device)
    coefficients = coefficients.flatten(2).requires_grad_(forces)
    energies = []
    bounds = first_atom.tolist()
    for c in range(num_types):
        x = ((s - davg[c, 0]) / dstd[c, 0])[:, None]
        nets = [embeddings[t if num_embeddings == num_types else t * num_types + c] for t in range(num_types)]
        t = coefficients[bounds[c] : bounds[c + 1]] @ torch.cat([_run(net, x) for net in nets])
        d = t.mT @ t[:, :, :axis]
        energies.append(_run(fittings[c], d.flatten(1))[:, 0])
    atomic = torch.cat(energies)
    energy = torch.zeros_like(atomic).index_copy(0, order, atomic)
    if not forces:
        return energy, atomic.new_zeros(0, 3), atomic.new_zeros(0, 3, 3)
    (by_coefficient,) = torch.autograd.grad(atomic.sum(), coefficients, create_graph=True)
    row = torch.repeat_interleave(torch.arange(len(order), device=order.device), first_edge.diff())
    types = torch.repeat_interleave(torch.arange(num_types, device=order.device), first_atom.diff())[row]
    scale = _scale(normal, sel)[types]
    values, slopes = _polynomials(records[:, 6])
    y = by_coefficient.flatten()[_places(records, row, num_types * num_nodes)]
    by_column = (y * values[:, None, :]).sum(-1) * scale
    rows = _rows(records, davg[types], scale)
    by_s = ((rows[:, :, None] * y).sum(1) * slopes).sum(-1) * ((num_nodes - 1) / last)
    direction, length, ratio, slope = records[:, :3], records[:, 3:4], records[:, 4:5], records[:, 5:6]
    inner = (by_column[:, 1:] * direction).sum(1, keepdim=True)
    radial = (by_column[:, :1] + by_s[:, None]) * slope + inner * (slope - ratio)
    by_edge = radial * direction + ratio * by_column[:, 1:]
    force = by_edge.new_zeros(len(order), 3).index_add(0, order[row], by_edge).index_add(0, neighbor, -by_edge)
    outer = -(length * direction)[:, :, None] * by_edge[:, None, :]
    return energy, force, by_edge.new_zeros(num_structures, 3, 3).index_add(0, structure[order[row]], outer)


def _net(left: list[Tensor], num_layers: int, timesteps: bool, output: bool):
    """The layers of a net, as (W, b, idt or None, hidden, copies of the input in the shortcut)."""
    layers = []
    for number in range(num_layers):
        weight, bias = left.pop(0), left.pop(0)
        inputs, outputs = weight.shape
        hidden = not output or number + 1 < num_layers
        copies = outputs // inputs if hidden and outputs in (inputs, 2 * inputs) else 0
        layers.append((weight, bias, left.pop(0) if timesteps and copies else None, hidden, copies))
    return layers


def _run(layers, x: Tensor) -> Tensor:
    for weight, bias, timestep, hidden, copies in layers:
        y = x @ weight + bias
        y = torch.tanh(y) if hidden else y
        y = y if timestep is None else y * timestep
        x = y + torch.cat([x] * copies, dim=1) if copies else y
    return x


def _scale(normal: Sequence[Tensor], sel: Sequence[int]) -> Tensor:
    return 1 / (normal[1] * sum(sel))


def _rows(records: Tensor, davg: Tensor, scale: Tensor) -> Tensor:
    """R / nnei, (E, 4)."""
    s = (records[:, 3] * records[:, 4])[:, None]
    return (torch.cat([s, s * records[:, :3]], 1) - davg) * scale


def _places(records: Tensor, row: Tensor, num_columns: int) -> Tensor:
    """Where the coefficients of an edge are among all, (E, 4, 8)."""
    columns = records[:, 7].long()[:, None] + torch.arange(STENCIL, device=row.device)
    return (4 * row[:, None] + torch.arange(4, device=row.device))[:, :, None] * num_columns + columns[:, None, :]


def _polynomials(where: Tensor) -> tuple[Tensor, Tensor]:
    """Lagrange's polynomials on the nodes 0 ... 7, (E, 8), and their slopes."""
    nodes = torch.arange(STENCIL, dtype=where.dtype, device=where.device)
    distance = where[:, None] - nodes
    values, slopes = [], []
    for j in range(STENCIL):
        others = [i for i in range(STENCIL) if i != j]
        denominator = torch.prod(nodes[j] - nodes[others])
        values.append(torch.prod(distance[:, others], 1) / denominator)
        terms = [torch.prod(distance[:, [i for i in others if i != k]], 1) for k in others]
        slopes.append(torch.stack(terms).sum(0) / denominator)
    return torch.stack(values, 1), torch.stack(slopes, 1)


def _starts(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _counts(numbers: Tensor, size: int) -> Tensor:
    return torch.bincount(numbers, minlength=size)
