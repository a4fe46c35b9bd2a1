"""The smooth descriptor of Deep Potential (DeePMD-kit's `se_e2_a`) and the small networks it is made of.

Networks of several elements run as one batched product per layer if their inputs are of similar size: on small
cells the number of operations, not their size, decides the time. Atoms and slots are padded to a common number for it.
A padded atom is read by nobody; a padded slot is an empty slot, of which DeePMD-kit's sum holds sel - neighbours
anyway. Every neighbour block therefore ends in one empty slot whose weight is that of all missing slots together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from rlekf_ext.errors import DataError
from rlekf_ext.potential.architecture import DescriptorArchitecture
from rlekf_ext.potential.neighbors import Frame

WITHOUT_ATOMS = 0.1  # dstd of an element without atoms


class Layer(nn.Module):
    """One layer: tanh(x W + b), times idt if there is one, plus its shortcut; the output layer is x W + b.

    The shortcut adds the input if the width stays the same, and the input twice side by side if the width doubles.
    Parameters in order: W (in, out), b (out,) and, with `resnet_dt` on a layer with a shortcut, idt (out,); drawn as in
    DeePMD-kit, W ~ N(0, 1/(in + out)), b ~ N(0, 1), idt ~ N(0.1, 0.001²).
    """

    weight: Tensor
    bias: Tensor
    timestep: Tensor | None  # DeePMD-kit's idt

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        *,
        hidden: bool = True,
        resnet_dt: bool = False,
        dtype: torch.dtype = torch.float64,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.hidden = hidden
        self.copies = num_outputs // num_inputs if hidden and num_outputs in (num_inputs, 2 * num_inputs) else 0

        def drawn(mean: float, std: float, *shape: int) -> nn.Parameter:
            value = torch.randn(shape, dtype=torch.float64, generator=generator) * std + mean
            return nn.Parameter(value.to(dtype))

        self.weight = drawn(0.0, (num_inputs + num_outputs) ** -0.5, num_inputs, num_outputs)
        self.bias = drawn(0.0, 1.0, num_outputs)
        self.timestep = drawn(0.1, 0.001, num_outputs) if resnet_dt and self.copies else None


class Network(nn.Module):
    """Fully connected layers, DeePMD-kit's `EmbeddingNet` and, with `output`, a linear layer of width 1 at the end, its
    `FittingNet`. The widths of the hidden layers are `neuron`; see Layer for `resnet_dt`.
    """

    def __init__(
        self,
        num_inputs: int,
        neuron: Sequence[int],
        *,
        output: bool = False,
        resnet_dt: bool = False,
        dtype: torch.dtype = torch.float64,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        widths = [num_inputs, *neuron] + [1] * output
        self.layers = nn.ModuleList(
            Layer(*ends, hidden=k < len(neuron), resnet_dt=resnet_dt, dtype=dtype, generator=generator)
            for k, ends in enumerate(pairwise(widths))
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (rows, in) to (rows, out)."""
        return run_networks([self], inputs[None])[0]


def run_networks(networks: Sequence[Network], inputs: Tensor) -> Tensor:
    """Map inputs (P, rows, in) to (P, rows, out), row block p by network p; all networks have one shape."""
    # _modules and _parameters: a module's ordinary attribute access would cost as much as the arithmetic.
    layers_of = [network._modules["layers"]._modules.values() for network in networks]  # type: ignore[union-attr]
    values = inputs
    for layers in zip(*layers_of, strict=True):
        tensors = zip(*(layer._parameters.values() for layer in layers), strict=True)
        weight, bias, *timestep = [torch.stack(same) if len(same) > 1 else same[0].unsqueeze(0) for same in tensors]
        result = torch.baddbmm(bias.unsqueeze(1), values, weight)
        if layers[0].hidden:
            result = torch.tanh(result)
        if timestep:
            result = result * timestep[0].unsqueeze(1)
        if layers[0].copies == 1:
            result = result + values
        elif layers[0].copies == 2:
            result = result + torch.cat([values, values], dim=-1)
        values = result
    return values


@dataclass(frozen=True)
class NeighborBlock:
    """The neighbours of T elements around atoms of C elements: P = C·T networks run in it side by side."""

    centers: list[int]  # C elements
    neighbors: list[int]  # T elements
    num_atoms: int  # A, of each centre element, padded
    num_slots: int  # S, of each neighbour element, padded


@dataclass(frozen=True, eq=False)
class Environment:
    """A frame's geometry as the network takes it; N edges in all blocks, padded ones included.

    The lists hold one tensor per block: the scalar that an embedding net sees of each slot; the slot's row of the
    normalised environment matrix, times the number of slots it represents over nnei; the derivative of both by the
    edge.
    """

    batches: list[list[NeighborBlock]]  # per batch of centre elements its blocks of neighbour elements
    scalars: list[Tensor]  # (P, A·S, 1)
    rows: list[Tensor]  # (P·A, S, 4)
    jacobians: list[Tensor]  # (P·A·S, 5, 3), 1/Å
    position: Tensor  # (n,) int64, row of each atom among the padded atoms of all batches
    edges: Tensor  # (N, 3), Å
    center: Tensor  # (N,) int64, the atom an edge starts from
    neighbor: Tensor  # (N,) int64, the atom it points to


class SeE2A(nn.Module):
    """Deep Potential's smooth descriptor with radial and angular information, DeePMD-kit's `se_e2_a`.

    sel[t] is DeePMD-kit's number of neighbour slots of element t: it fixes the norm nnei = sum(sel) and the number of
    empty slots. Embedding net of (centre c, neighbour t): `embeddings[t * num_types + c]`, DeePMD-kit's order, or
    `embeddings[t]` with type_one_side. The settings are those of an Architecture, which has checked them.
    """

    davg: Tensor  # (num_types, 4), 1/Å
    dstd: Tensor  # (num_types, 4), 1/Å

    def __init__(
        self,
        architecture: DescriptorArchitecture,
        type_map: Sequence[str],
        dtype: torch.dtype = torch.float64,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.architecture, self.type_map, self.num_types = architecture, tuple(type_map), len(type_map)
        neuron = architecture.neuron
        self.num_outputs = neuron[-1] * architecture.axis_neuron
        self.embeddings = nn.ModuleList(
            Network(1, neuron, resnet_dt=architecture.resnet_dt, dtype=dtype, generator=generator)
            for _ in range(self.num_types if architecture.type_one_side else self.num_types**2)
        )
        self.register_buffer("davg", torch.zeros(self.num_types, 4, dtype=dtype))
        self.register_buffer("dstd", torch.ones(self.num_types, 4, dtype=dtype))
        self._latest: tuple[Frame, tuple[int, ...], Environment] | None = None
        self._on_cpu: tuple[tuple[int, ...], list[Tensor]] | None = None

    def without_statistics(self) -> list[int]:
        """The elements of which `fit_statistics`, or DeePMD-kit, had no atoms."""
        # DeePMD-kit's dstd is then 0.1 with PyTorch and 1/rcut with TensorFlow.
        of_tensorflow = torch.isclose(self.dstd, torch.full_like(self.dstd, 1 / self.architecture.rcut), 1e-6, 0)
        none = (self.dstd == WITHOUT_ATOMS).all(1) | of_tensorflow.all(1)
        return (none & (self.davg == 0).all(1)).nonzero().flatten().tolist()

    @torch.no_grad()
    def fit_statistics(self, sums: Tensor, elements: Sequence[int] | None = None) -> None:
        """Set davg and dstd, of some elements or of all, from sums over the neighbours in all frames (DeePMD-kit's
        `EnvMatStatSe`): (T, 4) float64, as in `frames.Survey`.

        Over all sel slots of all atoms of a centre element, empty slots being zeros: mean and standard deviation of the
        radial column; mean 0 and one standard deviation for the three angular columns together. Standard deviations
        are at least 0.01, and 0.1 for an element without atoms.
        """
        atoms, total, squares, angular = sums.unbind(1)
        number = (atoms * sum(self.architecture.sel)).clamp(min=1)
        mean = total / number
        # DeePMD-kit subtracts the small mean of the angular columns here, although their davg is 0.
        radial = squares / number - mean**2
        others = squares / (3 * number) - (angular / (3 * number)) ** 2
        variance = torch.stack([radial, others, others, others])
        std = variance.clamp(min=0).sqrt().clamp(min=1e-2)
        some = list(range(self.num_types) if elements is None else elements)
        self.dstd[some] = torch.where(atoms > 0, std, WITHOUT_ATOMS).T[some].to(self.dstd)
        self.davg[some] = 0
        self.davg[some, 0] = mean[some].to(self.davg)

    def forward(self, frame: Frame) -> Tensor:
        """Return the descriptors (n, neuron[-1] * axis_neuron). Raises DataError if the frame does not fit."""
        environment = self.environment(frame)
        batches = self.descriptors(environment, environment.scalars, environment.rows)
        return torch.cat([batch.flatten(0, 1) for batch in batches])[environment.position]

    @torch.no_grad()
    def environment(self, frame: Frame) -> Environment:
        """Return the frame's environment matrices; kept for the latest frame, which a filter visits several times.

        Raises DataError if the frame's cutoff, elements, dtype or number of neighbours do not fit the network.
        """
        if self._latest is None or self._latest[0] is not frame or self._latest[1] != self.statistics():
            self.check(frame)
            self._latest = (frame, self.statistics(), self._environment(frame))
        return self._latest[2]

    def statistics(self) -> tuple[int, ...]:
        """Of davg and dstd: which tensors they are, and how often they have changed."""
        return id(self.davg), self.davg._version, id(self.dstd), self.dstd._version

    def normal_on_cpu(self) -> list[Tensor]:
        """davg and dstd on the CPU. Waits for the device, but only once."""
        if self._on_cpu is None or self._on_cpu[0] != self.statistics():
            self._on_cpu = self.statistics(), [self.davg.cpu(), self.dstd.cpu()]
        return self._on_cpu[1]

    def descriptors(self, environment: Environment, scalars: Sequence[Tensor], rows: Sequence[Tensor]) -> list[Tensor]:
        """Return each batch's descriptors (C, A, neuron[-1] * axis_neuron) from the environment's scalars and rows."""
        inputs = zip(scalars, rows, strict=True)
        results = []
        for blocks in environment.batches:
            # D = (Gᵀ R / nnei) (Rᵀ G_< / nnei): the products Rᵀ G of all neighbour elements are added up before.
            products = [self._product(block, *next(inputs)) for block in blocks]
            product = products[0] if len(products) == 1 else torch.stack(products).sum(0)
            descriptor = torch.bmm(product.mT, product[:, :, : self.architecture.axis_neuron])
            results.append(descriptor.view(len(blocks[0].centers), -1, self.num_outputs))
        return results

    def _product(self, block: NeighborBlock, scalars: Tensor, rows: Tensor) -> Tensor:
        """Rᵀ G / nnei, (C·A, 4, M), summed over the block's neighbour elements."""
        networks = [self._embedding(center, neighbor) for center in block.centers for neighbor in block.neighbors]
        embedded = run_networks(networks, scalars)
        product = torch.bmm(rows.mT, embedded.view(-1, block.num_slots, embedded.shape[-1]))
        if len(block.neighbors) == 1:
            return product
        return product.view(len(block.centers), -1, block.num_atoms, *product.shape[1:]).sum(1).flatten(0, 1)

    def _embedding(self, center: int, neighbor: int) -> Network:
        index = neighbor if self.architecture.type_one_side else neighbor * self.num_types + center
        return self.embeddings[index]  # type: ignore[return-value]

    def check(self, frame: Frame) -> None:
        """Raise DataError if the frame's cutoff, elements or number of neighbours do not fit the network."""
        rcut = self.architecture.rcut
        if len(frame.slots) != self.num_types:
            raise DataError(f"The network has {self.num_types} elements, but the frame has {len(frame.slots)}.")
        if frame.cutoff is not None and frame.cutoff != rcut:
            raise DataError(f"The network's cutoff is {rcut} Å, but the frame was made with {frame.cutoff} Å.")
        slots = zip(self.type_map, frame.slots, self.architecture.sel, strict=True)
        for element, (name, count, sel) in enumerate(slots):
            if count > sel:
                first = sum(frame.slots[:element])
                near = frame.edges[:, first : first + count].norm(dim=-1) < rcut
                atom = int(near.sum(1).argmax())
                where = f"{frame.name}, atom {atom}" if frame.name else f"Atom {atom}"
                raise DataError(
                    f"{where} has {count} neighbours of element {name} within {rcut} Å, more than sel = {sel}: train "
                    f'with frames like it and "sel": "auto" (this frame needs {list(frame.slots)}).'
                )

    def _environment(self, frame: Frame) -> Environment:
        if frame.edges.dtype != self.davg.dtype:
            raise DataError(f"The network is {self.davg.dtype}, the frame {frame.edges.dtype}: call frame.to(dtype).")
        device = frame.edges.device
        n, num_slots = frame.neighbors.shape
        # Row n and slot num_slots are what padding points to.
        far = frame.edges.new_tensor([2 * self.architecture.rcut, 0.0, 0.0])
        padded_edges = far.repeat(n + 1, num_slots + 1, 1)
        padded_edges[:n, :num_slots] = frame.edges
        padded_neighbors = frame.neighbors.new_zeros(n + 1, num_slots + 1)
        padded_neighbors[:n, :num_slots] = frame.neighbors

        rows = [(frame.types == t).nonzero()[:, 0] for t in range(self.num_types)]
        columns = torch.arange(num_slots, device=device).split(frame.slots)
        position = torch.empty(n + 1, dtype=torch.int64, device=device)
        # An element without slots in this frame still has empty ones, unless its sel is 0.
        used = [count + 1 if sel else 0 for count, sel in zip(frame.slots, self.architecture.sel, strict=True)]
        neighbor_elements = _similar(used)
        batches: list[list[NeighborBlock]] = []
        inputs: list[tuple[Tensor, Tensor, Tensor]] = []
        edges, center, neighbor = [], [], []
        first = 0
        for elements in _similar([len(row) for row in rows]):
            atoms = _pad([rows[c] for c in elements], n)
            position[atoms.flatten()] = torch.arange(first, first + atoms.numel(), device=device)
            first += atoms.numel()
            batches.append([])
            for others in neighbor_elements:
                slots = _pad([columns[t] for t in others], num_slots, extra=1)
                where = (atoms[:, None, :, None], slots[None, :, None, :])
                block = NeighborBlock(elements, others, atoms.shape[1], slots.shape[1])
                block_edges = padded_edges[where]
                batches[-1].append(block)
                inputs.append(self._inputs(block, block_edges))
                edges.append(block_edges.view(-1, 3))
                center.append((atoms % n)[:, None, :, None].expand(block_edges.shape[:-1]).flatten())
                neighbor.append(padded_neighbors[where].flatten())
        return Environment(
            batches,
            scalars=[scalars for scalars, _, _ in inputs],
            rows=[block_rows for _, block_rows, _ in inputs],
            jacobians=[jacobian for _, _, jacobian in inputs],
            position=position[:n],
            edges=torch.cat(edges),
            center=torch.cat(center),
            neighbor=torch.cat(neighbor),
        )

    def _inputs(self, block: NeighborBlock, edges: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The scalars, rows and jacobian of a block with edges (C, T, A, S, 3)."""
        nnei = sum(self.architecture.sel)
        davg, dstd = (value[block.centers, None, None, None] for value in (self.davg, self.dstd))  # (C, 1, 1, 1, 4)
        matrix, jacobian = _environment_matrix(edges, self.architecture.rcut, self.architecture.rcut_smth)
        matrix = (matrix - davg) / dstd
        jacobian = jacobian / dstd.unsqueeze(-1)
        scalars = matrix[..., :1].reshape(len(block.centers) * len(block.neighbors), -1, 1)
        # The last slot of each element is empty and represents all that are missing.
        share = edges.new_full((len(block.neighbors), 1, block.num_slots, 1), 1 / nnei)
        for k, element in enumerate(block.neighbors):
            share[k, 0, -1] = (self.architecture.sel[element] - block.num_slots + 1) / nnei
        # Empty slots do not depend on their edges: for the jacobian every share is 1/nnei.
        jacobian = torch.cat([jacobian[..., :1, :], jacobian / nnei], dim=-2)
        return scalars, (matrix * share).view(-1, block.num_slots, 4), jacobian.view(-1, 5, 3)


def switched(edges: Tensor, rcut: float, rcut_smth: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Distance r, direction, s(r) and s'(r), each (..., 1) but the direction (..., 3)."""
    r = torch.linalg.vector_norm(edges, dim=-1, keepdim=True)
    u = ((r - rcut_smth) / (rcut - rcut_smth)).clamp(0, 1)
    smooth = u**3 * (-6 * u**2 + 15 * u - 10) + 1
    slope = -30 * (u * (1 - u)) ** 2 / (rcut - rcut_smth)
    return r, edges / r, smooth / r, (slope - smooth / r) / r


def _environment_matrix(edges: Tensor, rcut: float, rcut_smth: float) -> tuple[Tensor, Tensor]:
    """R = s (1, x/r, y/r, z/r) of edges (..., 3) as (..., 4), and its derivative (..., 4, 3)."""
    r, direction, s, slope = switched(edges, rcut, rcut_smth)
    matrix = torch.cat([s, s * direction], dim=-1)
    radial = (slope * direction).unsqueeze(-2)
    along = direction.unsqueeze(-1) * direction.unsqueeze(-2)
    identity = torch.eye(3, dtype=edges.dtype, device=edges.device)
    angular = (slope - s / r).unsqueeze(-1) * along + (s / r).unsqueeze(-1) * identity
    return matrix, torch.cat([radial, angular], dim=-2)


def _similar(sizes: Sequence[int]) -> list[list[int]]:
    """Batches of the indices of similar size (within 30 %: the padding then costs less than the operations saved)."""
    batches: list[list[int]] = []
    for index in sorted((i for i, size in enumerate(sizes) if size), key=lambda i: -sizes[i]):
        if batches and sizes[index] >= 0.7 * sizes[batches[-1][0]]:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _pad(rows: Sequence[Tensor], value: int, extra: int = 0) -> Tensor:
    """The rows below each other, filled up with `value` to the longest and `extra` more."""
    padded = rows[0].new_full((len(rows), max(map(len, rows)) + extra), value)
    for k, row in enumerate(rows):
        padded[k, : len(row)] = row
    return padded
