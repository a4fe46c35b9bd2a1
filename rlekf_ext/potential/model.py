"""The Deep Potential: descriptor, one fitting net per element, and energy, forces and virial from them.

Positions never enter the autograd graph. Its leaves are the environment matrices; one backward pass gives dE/dR, and
the analytic derivative of R by the edge turns that into forces with one small product per neighbour. A force loss is
then differentiated through the networks alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlekf_ext.errors import OptionError
from rlekf_ext.potential.architecture import Architecture, plain
from rlekf_ext.potential.descriptor import Environment, Network, SeE2A, run_networks
from rlekf_ext.potential.neighbors import Frame
from rlekf_ext.potential.table import Table, TabulatedFrame
from rlekf_ext.schema import read


class EdgeForces(NamedTuple):
    """The E edges of a frame, and the derivatives of its energy by them."""

    edges: Tensor  # (E, 3), Å
    center: Tensor  # (E,) int64, the atom an edge starts from
    neighbor: Tensor  # (E,) int64, the atom it points to
    by_edge: Tensor  # (E, 3), eV/Å


class Prediction(NamedTuple):
    """The prediction for a frame of n atoms in B structures; forces and virial are None if not asked for."""

    energy: Tensor  # (B,), eV, float64
    forces: Tensor | None  # (n, 3), eV/Å
    virial: Tensor | None  # (B, 3, 3), eV, -dE/dstrain
    atomic_energy: Tensor  # (n,), eV, float64


class DeepPotential(nn.Module):
    """Deep Potential network, number for number DeePMD-kit's `se_e2_a` descriptor with its `ener` fitting net.

    `architecture` is an Architecture or a mapping with its keys, {"type_map": ["Cu"], "descriptor": {"sel": [100]}},
    which is the paper's network of 26 551 weights. The weights are drawn with `seed`, or from torch's generator.
    Parameters are in the order W_0, b_0, W_1, ... of each net, embedding nets first.

    Raises OptionError for settings that are out of range or do not fit together.
    """

    energy_bias: Tensor  # (num_types,), eV, float64

    def __init__(self, architecture: Architecture | Mapping[str, Any], *, seed: int | None = None) -> None:
        super().__init__()
        given = plain(architecture) if isinstance(architecture, Architecture) else architecture
        self.architecture: Architecture = read(Architecture, given, "model")
        descriptor, fitting, dtype = self.architecture.descriptor, self.architecture.fitting_net, self.dtype
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        self.descriptor = SeE2A(descriptor, self.type_map, dtype, generator)
        self.fittings = nn.ModuleList(
            Network(
                self.descriptor.num_outputs,
                fitting.neuron,
                output=True,
                resnet_dt=fitting.resnet_dt,
                dtype=dtype,
                generator=generator,
            )
            for _ in self.type_map
        )
        self.table: Table | None = None  # what autograd goes through, if there is one; evaluation is always exact
        self.register_buffer("energy_bias", torch.zeros(len(self.type_map), dtype=torch.float64))

    @property
    def type_map(self) -> tuple[str, ...]:
        """The elements, in the order of their numbers."""
        return self.architecture.type_map

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, edges and forces; energies are float64."""
        return self.architecture.dtype

    @torch.no_grad()
    def fit_energy_bias(
        self, frames: Iterable[Frame], *, with_network: bool = False, elements: Sequence[int] | None = None
    ) -> None:
        """Set the energy of each element, or of some, by least squares of the energies on the element counts.

        `with_network` fits what the network, as it is, leaves of the energies. If the counts do not determine the
        solution, the smallest is taken. Frames without an energy are left out; if none has one, nothing changes.
        """
        counts, energies = [], []
        some = list(range(len(self.type_map)) if elements is None else elements)
        others = self.energy_bias.cpu().clone()
        others[some] = 0
        for frame in frames:
            if frame.energy is None:
                continue
            count = torch.zeros(len(frame.num_atoms), len(self.type_map), dtype=torch.float64)
            one = torch.ones(len(frame.types), dtype=torch.float64)
            count.index_put_((frame.structure.cpu(), frame.types.cpu()), one, accumulate=True)
            counts.append(count[:, some])
            network = self(frame, forces=False).energy.cpu() - count @ self.energy_bias.cpu() if with_network else 0.0
            energies.append(frame.energy.double().cpu() - network - count @ others)
        if counts:
            self.solve_energy_bias(torch.cat(counts), torch.cat(energies), some)

    def solve_energy_bias(self, counts: Tensor, energies: Tensor, elements: Sequence[int]) -> None:
        """The least squares of `fit_energy_bias`: counts (S, number of elements) and energies (S,), float64."""
        # gelsd, as numpy's lstsq: the minimum norm solution, whatever the rank.
        solution = torch.linalg.lstsq(counts, energies[:, None], driver="gelsd").solution
        self.energy_bias[list(elements)] = solution[:, 0].to(self.energy_bias.device)

    def forward(self, frame: Frame, create_graph: bool | None = None, *, forces: bool = True) -> Prediction:
        """Predict the energies, forces and virials of a frame.

        `create_graph`: whether the results can be differentiated by the weights; by default if autograd is enabled.
        `forces=False` gives energies alone, whose gradient then costs one forward and one plain backward pass.
        A frame that is on another device than the model is moved there. Raises DataError if the frame's cutoff,
        elements, dtype or number of neighbours do not fit the network.
        """
        create_graph = torch.is_grad_enabled() if create_graph is None else create_graph
        with torch.set_grad_enabled(create_graph):
            force = virial = None
            if self.table is not None and create_graph:
                tabulated = self.table.with_frame(self, frame)
                atomic, *found = tabulated.results(forces)
                types, structure = tabulated.types, tabulated.structure
                if forces:
                    force, virial = found
            else:
                frame = frame.to(device=self.energy_bias.device)
                atomic, edges = self._exact(frame, create_graph, forces)
                types, structure = frame.types, frame.structure
                if edges:
                    force, virial = _forces(frame, edges)
            atomic_energy = atomic.double() + self.energy_bias[types]
            energy = _sum_rows(atomic_energy, structure, len(frame.num_atoms))
        results = Prediction(energy, force, virial, atomic_energy)
        if create_graph:
            return results
        return Prediction(*(None if result is None else result.detach() for result in results))  # type: ignore[arg-type]

    def prepared(self, frame: Frame) -> TabulatedFrame | None:
        """The frame on the table, which `measure`s it: see rlekf_ext.updates. None without a table.
        Raises DataError if the frame does not fit the network."""
        return None if self.table is None else self.table.with_frame(self, frame)

    def _exact(self, frame: Frame, create_graph: bool, forces: bool) -> tuple[Tensor, EdgeForces | None]:
        """The atomic energies without their bias, and the derivatives of their sum."""
        environment = self.descriptor.environment(frame)
        # Fresh leaves each time: what one loss leaves in their .grad must not reach the next.
        leaves = [value.detach().requires_grad_(forces) for value in (*environment.scalars, *environment.rows)]
        if forces and torch.is_inference_mode_enabled():
            raise OptionError("Forces are derivatives, which torch.inference_mode() forbids: use torch.no_grad().")
        with torch.set_grad_enabled(create_graph or forces):
            atomic = self._atomic_energies(environment, leaves)
            if not forces:
                return atomic, None
            # Every atom's own share: padded atoms are not among `atomic`, nor is the constant bias.
            gradients = torch.autograd.grad(atomic.sum(), leaves, create_graph=create_graph)
            parts = []
            for scalar, row, jacobian in zip(*_halves(gradients), environment.jacobians, strict=True):
                gradient = torch.cat([scalar.view(*row.shape[:2], 1), row], dim=-1)
                parts.append(torch.bmm(gradient.view(-1, 1, 5), jacobian).squeeze(1))
        return atomic, EdgeForces(environment.edges, environment.center, environment.neighbor, _joined(parts))

    def _atomic_energies(self, environment: Environment, leaves: Sequence[Tensor]) -> Tensor:
        scalars, rows = _halves(leaves)
        descriptors = self.descriptor.descriptors(environment, scalars, rows)
        energies = [
            run_networks([self.fittings[c] for c in blocks[0].centers], descriptor).flatten()  # type: ignore[misc]
            for blocks, descriptor in zip(environment.batches, descriptors, strict=True)
        ]
        return _joined(energies)[environment.position]


def _forces(frame: Frame, edges: EdgeForces) -> tuple[Tensor, Tensor]:
    """Forces and virials from the derivatives of the energy by the edges."""
    num_atoms, by_edge = len(frame.types), edges.by_edge
    forces = _sum_rows(by_edge, edges.center, num_atoms) - _sum_rows(by_edge, edges.neighbor, num_atoms)
    if len(frame.num_atoms) == 1:
        return forces, -(edges.edges.T @ by_edge).unsqueeze(0)
    outer = edges.edges.unsqueeze(-1) * by_edge.unsqueeze(-2)
    return forces, -_sum_rows(outer, frame.structure[edges.center], len(frame.num_atoms))


def _sum_rows(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    return values.new_zeros(num_rows, *values.shape[1:]).index_add(0, rows, values)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _halves(values: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    return values[: len(values) // 2], values[len(values) // 2 :]
