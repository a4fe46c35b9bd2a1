"""The network for training, with its embedding nets on a table: all that depends on the geometry is summed first.

An embedding net is a function G of one number, s(r). Interpolated on K nodes x_k by polynomials of degree 7,

    G(s) = Σ_k φ_k(s) G(x_k),

it is linear in its values at the nodes. So the sum over the neighbours of an atom does not wait for the weights:

    T = Σ_edges R G(s)ᵀ = C N        C = Σ_edges R φ(s)ᵀ (4, K), of the geometry;  N = G(nodes) (K, M), of the weights

D = Tᵀ T_< and the fitting net follow as in the exact network. A gradient by the weights needs no second derivative of
an embedding net either: as the atoms move along a direction, dC/dτ is geometry again, and dT/dτ = dC/dτ N. Everything
is the exact derivative of the interpolated energy, which is off by the interpolation alone. csrc/cpu/network.cpp
computes it on CPUs, csrc/cuda/network.cuh on GPUs, ops/network_torch.py elsewhere. Frames are tabulated on the CPU,
then moved to the model.
"""

from __future__ import annotations

import copy
import math
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlekf_ext.environment import moved
from rlekf_ext.errors import DataError
from rlekf_ext.ops import network_torch
from rlekf_ext.ops.native import OPS, why_absent
from rlekf_ext.ops.network_torch import STENCIL, with_room
from rlekf_ext.options import KINDS
from rlekf_ext.potential.architecture import DescriptorArchitecture
from rlekf_ext.potential.descriptor import switched
from rlekf_ext.potential.neighbors import Frame

if TYPE_CHECKING:
    from rlekf_ext.potential.model import DeepPotential

# csrc/network.h: the number of nodes is a multiple of NODES_AT_ONCE; of the parts of a geometry, the first atoms of
# each element, the edges, and all that are as long as these; of the numbers of an edge, its place within its stencil.
# csrc/cuda/network_plan.h: on a GPU a net has at most MOST_LAYERS.
NODES_AT_ONCE, FIRST_ATOM, EDGES, OF_EDGES, WHERE, MOST_LAYERS = 16, 1, 3, (3, 4, 6), 6, 8
MOST_NODES = 4096
ROUNDING = 1e-3  # of the distance of two nodes
KEPT = 4  # frames: some MB each
EDGES_AT_ONCE = 512  # on a GPU, the number of edges is a multiple of it
TABULATING = threading.Lock()  # a thread may make the next frames ready
LEAST_FORCE = 1e-3  # eV/Å: smaller forces, as in a perfect lattice, are not what the table is judged by


@dataclass(frozen=True)
class Nodes:
    """K equidistant nodes from s = 0 to `last`, 1/Å."""

    number: int
    last: float


class Results(NamedTuple):
    """For n atoms in B structures; forces and virials are empty if not wanted."""

    energies: Tensor  # (n,), eV, without bias
    forces: Tensor  # (n, 3), eV/Å
    virials: Tensor  # (B, 3, 3), eV


class Table:
    """The nodes for the networks of a model: `model.table = Table(...)` makes training go through them.

    At least `number` nodes reach to `last` (1/Å), or farther if a frame needs it: nothing is extrapolated.
    """

    def __init__(self, last: float, number: int = 128):
        self.nodes = Nodes(-(-number // NODES_AT_ONCE) * NODES_AT_ONCE, last)
        self.most_nodes = MOST_NODES
        self.num_kept = KEPT
        self._kept: list[TabulatedFrame] = []
        self._weights: tuple[DeepPotential, list[Tensor]] | None = None
        self.most_edges: dict[tuple[int, ...], int] = {}  # that a GPU has met, by the numbers of atoms of the elements

    @property
    def saved(self) -> list[Any]:
        """What a checkpoint has of it."""
        return [self.nodes.number, self.nodes.last, self.most_nodes]

    @classmethod
    def restored(cls, saved: Sequence[Any]) -> Table:
        number, last, *most = saved
        table = cls(float(last), int(number))
        table.most_nodes = int(most[0]) if most else MOST_NODES
        return table

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": [], "_weights": None}  # a copy of the model tabulates its frames again

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

    @property
    def refined(self) -> Nodes:
        """Half as many nodes again: the error falls by 1.5^8 = 26."""
        return Nodes(-(-3 * self.nodes.number // (2 * NODES_AT_ONCE)) * NODES_AT_ONCE, self.nodes.last)

    def weights_of(self, model: DeepPotential) -> list[Tensor]:
        """Its parameters, listed once: for a small cell the walk through the modules takes a noticeable time."""
        if self._weights is None or self._weights[0] is not model or self._weights[1][0] is not _first(model):
            self._weights = model, list(model.parameters())
        return self._weights[1]

    def with_frame(self, model: DeepPotential, frame: Frame) -> TabulatedFrame:
        """The frame on the table; kept for the latest few. Raises DataError if it does not fit the network."""
        if found := self._found(model, frame):
            return found
        with TABULATING:
            if found := self._found(model, frame):
                return found
            model.descriptor.check(frame)
            made = TabulatedFrame(model, frame, self)
            if made.is_beyond:
                largest = largest_scalar(model.descriptor.architecture, frame)
                spacing = self.nodes.last / (self.nodes.number - 1)
                number = -(-(math.ceil(largest / spacing) + 1) // NODES_AT_ONCE) * NODES_AT_ONCE
                self.nodes = Nodes(number, spacing * (number - 1))
                made = TabulatedFrame(model, frame, self)
            self._kept = [made, *self._kept[: self.num_kept - 1]]
            return made

    def _found(self, model: DeepPotential, frame: Frame) -> TabulatedFrame | None:
        key = TabulatedFrame.key(model, frame, self.nodes)
        return next((kept for kept in self._kept if kept.made_of == key), None)


def _first(model: DeepPotential) -> Tensor:
    """A parameter: load_state_dict(..., assign=True) puts others in the place of all."""
    return next(model.parameters())


class Parts(list[Tensor]):
    """A frame on its table as the compiled ops take it: what `tabulate` returns, then the structures of the atoms."""

    bounds = None  # first atoms of the elements: nothing on the host depends on them

    @property
    def tensors(self) -> list[Tensor]:
        return list(self)

    def around(self, tensors: Sequence[Tensor]) -> Parts:
        """The same with other tensors."""
        return Parts(tensors)

    def on(self, device: torch.device, num_edges: int) -> Parts:
        """Moved, with edges that no atom has, so that there are `num_edges`."""
        padded = (with_room(part, num_edges) if i in OF_EDGES else part for i, part in enumerate(self))
        return Parts(moved(part, device) for part in padded)


class TabulatedFrame:
    """A frame on the table of a model."""

    @staticmethod
    def key(model: DeepPotential, frame: Frame, nodes: Nodes) -> tuple[Any, ...]:
        """What it is made of: the objects, and what may change in them."""
        return id(model), id(_first(model)), id(frame), nodes, *model.descriptor.statistics()

    def __init__(self, model: DeepPotential, frame: Frame, table: Table):
        nodes = table.nodes
        self.model, self.frame, self.made_of = model, frame, self.key(model, frame, nodes)
        geometry = geometry_of(model, frame, nodes)
        where = geometry[EDGES][:, WHERE]
        # Whether some edge is shorter than the nodes reach.
        self.is_beyond = bool(where.numel()) and float(where.max()) > STENCIL - 1 + ROUNDING
        descriptor = model.descriptor
        architecture, fitting = descriptor.architecture, model.architecture.fitting_net
        device = descriptor.davg.device
        self._parameters = table.weights_of(model)
        self._ops: Any = OPS
        self._geometry: Any = geometry
        kernels = has_kernels(device, max(len(architecture.neuron), len(fitting.neuron) + 1))
        if not kernels or device.type != "cpu":
            # As many edges as a frame of these atoms has had so far: frames of a system have the same shapes.
            atoms, count = tuple(geometry[FIRST_ATOM].tolist()), len(geometry[EDGES])
            most = max(table.most_edges.get(atoms, 0), -(-count // EDGES_AT_ONCE) * EDGES_AT_ONCE)
            table.most_edges[atoms] = most
            if kernels:
                self._geometry = geometry.on(device, most)
            else:
                self._ops, normal = network_torch, [descriptor.davg, descriptor.dstd]
                self._geometry = network_torch.placed(geometry, normal, architecture.sel, nodes.last, most)
        own = frame.types, frame.num_atoms, frame.energy, frame.forces, frame.virial, torch.arange(len(frame.types))
        *labels, self._all_atoms = (None if t is None else moved(t, device) for t in own)
        self._labels, self.types, self.structure = labels, labels[0], moved(frame.structure, device)
        sizes = [
            len(descriptor.embeddings),
            len(architecture.neuron),
            len(fitting.neuron) + 1,
            architecture.axis_neuron,
        ]
        self._network = (
            [descriptor.davg, descriptor.dstd],
            architecture.sel,
            nodes.last,
            sizes,
            [architecture.resnet_dt, fitting.resnet_dt],
        )

    @property
    def tensors(self) -> list[Tensor]:
        """All that is different from frame to frame."""
        return [*self._geometry.tensors, *(label for label in self._labels if label is not None)]

    @property
    def form(self) -> tuple[Any, ...]:
        """What else a measurement depends on, and not on the device."""
        return self._geometry.bounds, self.made_of[0], *self.made_of[2:], tuple(label is None for label in self._labels)

    def around(self, tensors: Sequence[Tensor]) -> TabulatedFrame:
        """The same frame with other tensors of these shapes."""
        left, made = iter(tensors), copy.copy(self)
        made._geometry = self._geometry.around([next(left) for _ in self._geometry.tensors])
        made._labels = [None if label is None else next(left) for label in self._labels]
        return made

    def results(self, forces: bool) -> Results:
        """What autograd can differentiate by the weights."""
        return Results(*TabulatedResults.apply(self, forces, *self._parameters))

    @torch.no_grad()
    def predict(self, forces: bool, virials: bool) -> tuple[Results, Any]:
        """The results at the current weights, and what `gradients` needs at the same weights."""
        *results, saved = self._ops.predict(
            self._parameters, self._geometry, *self._network, len(self.frame.num_atoms), forces, virials
        )
        return Results(*results), saved

    @torch.no_grad()
    def gradients(self, saved: Any, by_energies: Tensor, by_forces: Tensor | None, by_virials: Tensor | None) -> Tensor:
        """For M sums of the results with factors (M, n), (M, n, 3) and (M, B, 3, 3), their derivatives by the weights
        (M, N): each parameter in turn, with its dimensions reversed. Both forces and virials have factors if they were
        predicted, or neither."""
        factors = (None if by is None else by.contiguous() for by in (by_energies, by_forces, by_virials))
        return self._ops.gradients(self._parameters, self._geometry, *self._network, saved, *factors)

    @torch.no_grad()
    def measure(self, updates: Sequence[tuple[str, Tensor | None]]) -> tuple[Tensor, Tensor]:
        """ε (U,) and H = -dε/dw (U, N) of updates at the current weights, each a kind and the atoms of its group: see
        rlekf_ext.updates.ERRORS. H has the parameters in turn, each with its dimensions reversed."""
        kinds = [KINDS.index(kind) for kind, _ in updates]
        atoms = [self._all_atoms if atoms is None else atoms for _, atoms in updates]
        network = self._parameters, self._geometry, *self._network
        return self._ops.measure(*network, self.model.energy_bias, *self._labels, kinds, atoms)


def has_kernels(device: torch.device, num_layers: int) -> bool:
    """Whether the compiled ops there can compute a network whose nets have at most this many layers."""
    if device.type == "cpu":
        return True
    return num_layers <= MOST_LAYERS and os.environ.get("RLEKF_NETWORK_KERNELS") != "0" and not why_absent(device.type)


class TabulatedResults(torch.autograd.Function):
    """The results of a tabulated frame, from the weights."""

    @staticmethod
    def forward(ctx: Any, frame: TabulatedFrame, forces: bool, *weights: Tensor) -> Any:
        results, ctx.saved = frame.predict(forces, forces)
        ctx.frame, ctx.forces = frame, forces
        ctx.save_for_backward(*weights)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_energies: Tensor, by_forces: Tensor, by_virials: Tensor) -> Any:
        weights = ctx.saved_tensors  # raises if they have changed since
        forces = (by_forces[None], by_virials[None]) if ctx.forces else (None, None)
        flat = ctx.frame.gradients(ctx.saved, by_energies[None], *forces)[0]
        both = zip(flat.split([w.numel() for w in weights]), weights, strict=True)
        return None, None, *(piece.view(w.shape[::-1]).mT if w.dim() == 2 else piece for piece, w in both)


@torch.no_grad()
def geometry_of(model: DeepPotential, frame: Frame, nodes: Nodes) -> Parts:
    """The frame on the table, as csrc/network.h has it, on the CPU. Raises DataError if it is of another dtype than the
    network."""
    descriptor = model.descriptor
    architecture = descriptor.architecture
    if frame.edges.dtype != descriptor.davg.dtype:
        raise DataError(f"The network is {descriptor.davg.dtype}, the frame {frame.edges.dtype}: call frame.to(dtype).")
    frame = frame.to(device="cpu")
    parts = OPS.tabulate(
        frame.edges.contiguous(),
        frame.neighbors.contiguous(),
        frame.types,
        frame.slots,
        descriptor.normal_on_cpu(),
        architecture.sel,
        nodes.number,
        architecture.rcut,
        architecture.rcut_smth,
        nodes.last,
    )
    return Parts([*parts, frame.structure])


def largest_scalar(architecture: DescriptorArchitecture, frame: Frame) -> float:
    """The largest s(r) of a frame, 1/Å; at least 1/rcut, so that a table has a length."""
    return scalar_at(architecture, frame.shortest_edge(), frame.edges.dtype)


def scalar_at(architecture: DescriptorArchitecture, shortest: float, dtype: torch.dtype) -> float:
    """s(r) at this distance in Å, 1/Å; at least 1/rcut."""
    nearest = torch.tensor([[min(shortest, architecture.rcut), 0.0, 0.0]], dtype=dtype)
    return max(float(switched(nearest, architecture.rcut, architecture.rcut_smth)[2]), 1 / architecture.rcut)


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
    flat = [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), gradients, strict=True)]
    return prediction.forces.detach(), torch.cat([g.flatten() for g in flat])
