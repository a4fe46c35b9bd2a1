"""This package's network on its table instead of DeePMD-kit's, on the very memory of DeePMD-kit's parameters.

A model of DeePMD-kit that `rlekf import` reads has a twin here. Which parameter is which is found by numbering: every
weight of DeePMD-kit's model becomes its own number for a moment, the model goes through a `.dp` file, and the twin's
weights say where they came from. Names and the order of modules do not matter, and nothing can be mistaken.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlekf_ext.errors import InputError
from rlekf_ext.potential.deepmd_format import import_model
from rlekf_ext.potential.model import DeepPotential
from rlekf_ext.potential.neighbors import Frame, collate, make_frame
from rlekf_ext.potential.table import Table, largest_scalar
from rlekf_ext.potential.train import refine
from rlekf_ext.processes import Processes

AGREEMENT = {"float64": 1e-9, "float32": 1e-3}  # eV/atom and eV/Å; of larger forces, relative to the largest


class OwnNetwork:
    """Measures batches of DeePMD-kit at the current weights of its model."""

    def __init__(self, save: Callable[[Path], Any], parameters: Sequence[Tensor], trained: Sequence[Tensor]):
        """`save` writes DeePMD-kit's model, whose parameters these are, as a `.dp` file; H is of the trained ones, in
        this order. Raises InputError if the model is of another kind, or trains parameters that a model here lacks."""
        self.model, theirs = _twin(save, parameters)
        starts = dict(zip(map(id, theirs), accumulate((p.numel() for p in theirs), initial=0), strict=False))
        trained = [p for p in trained if p.numel()]
        if any(id(p) not in starts for p in trained):
            raise InputError("the model trains parameters that the networks here do not have.")
        columns = torch.cat([torch.arange(p.numel()) + starts[id(p)] for p in trained])
        self._columns = None if torch.equal(columns, torch.arange(sum(p.numel() for p in theirs))) else columns

    def frame(self, inputs: dict[str, Any], labels: Any) -> Frame:
        """A batch of DeePMD-kit: coord (B, 3 n), atype (B, n), box (B, 9) or None, with the labels of Updates.frame().
        Raises DataError for structures that make no frame."""
        coordinates, types = inputs["coord"].detach().cpu().numpy(), inputs["atype"].cpu().numpy()
        boxes = None if inputs.get("box") is None else inputs["box"].detach().cpu().numpy()
        architecture, num_types, frames = self.model.architecture.descriptor, len(self.model.type_map), []
        for b in range(len(types)):
            own: dict[str, Any] = {
                "energy": None if labels.energy is None else labels.energy[b].cpu(),
                "forces": None if labels.forces is None else labels.forces[:, b].cpu(),
                "virial": None if labels.virial is None else labels.virial[b].cpu(),
            }
            box = None if boxes is None else boxes[b].reshape(3, 3)
            points = coordinates[b].reshape(-1, 3)
            frames.append(
                make_frame(points, box, types[b], architecture.rcut, num_types, dtype=self.model.dtype, **own)
            )
        frame = collate(frames)
        if self.model.table is None:
            self.model.table = Table(largest_scalar(architecture, frame))
        return frame

    def measured(self, frame: Frame) -> Callable[[Any], tuple[Tensor, Tensor]]:
        """What gives ε and H of updates of this frame, whose groups are of atoms that all structures have alike.
        Raises DataError for a frame that does not fit the network."""
        on_table, count = self.model.prepared(frame), len(frame.num_atoms)
        assert on_table is not None  # for mypy: there is a table
        starts = torch.arange(count)[:, None] * (len(frame.types) // count)

        def measure(updates: Sequence[tuple[str, Tensor | None]]) -> tuple[Tensor, Tensor]:
            own = [(kind, None if atoms is None else (starts.to(atoms) + atoms).flatten()) for kind, atoms in updates]
            errors, jacobians = on_table.measure(own)
            return errors, jacobians if self._columns is None else jacobians[:, self._columns]

        return measure

    def predict(self, frame: Frame) -> dict[str, Tensor]:
        """Energies (B, 1) and forces (B, n, 3), on the table."""
        found = self.model(frame, create_graph=True)
        assert found.forces is not None  # for mypy: asked for
        count = len(frame.num_atoms)
        return {"energy": found.energy.detach()[:, None], "force": found.forces.detach().view(count, -1, 3)}

    def check(self, frame: Frame, theirs: Any, say: Callable[[str], Any]) -> float:
        """The largest difference of the exact network here from what DeePMD-kit predicts for the same frame, in eV/atom
        and in eV/Å or, of larger forces, relative to the largest. Raises InputError beyond AGREEMENT. Refines the table
        if it is not exact enough."""
        ours = self.model(frame, create_graph=False)
        num_atoms, largest = frame.num_atoms.to(ours.energy.device), 1 + float(theirs.forces.detach().abs().max())
        apart = [(ours.energy - theirs.energy) / num_atoms]
        apart.append((ours.forces.view(len(num_atoms), -1, 3).transpose(0, 1) - theirs.forces) / largest)
        if theirs.virial is not None:
            apart.append((ours.virial - theirs.virial) / (largest * num_atoms[:, None, None]))
        worst = max(float(difference.detach().abs().max()) for difference in apart)
        allowed = AGREEMENT[self.model.architecture.precision]
        if not worst <= allowed:
            raise InputError(f"energies and forces differ by {worst:.1e} from dp's own, more than {allowed:.0e}.")
        refine(self.model, [frame], Processes(None), say)
        return worst


def _twin(save: Callable[[Path], Any], parameters: Sequence[Tensor]) -> tuple[DeepPotential, list[Tensor]]:
    """A model here whose weights are the memory of these parameters, and which parameter each of its own is."""
    parameters = [p for p in parameters if p.numel()]
    starts = list(accumulate((p.numel() for p in parameters), initial=0))
    kept = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            for p, start in zip(parameters, starts, strict=False):
                p.copy_(_numbers(p, start))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.dp"
            save(path)
            try:
                model = import_model(path)
            except InputError as error:
                raise InputError(str(error).removeprefix(f"{path}: ")) from error
    finally:
        with torch.no_grad():
            for p, values in zip(parameters, kept, strict=True):
                p.copy_(values)
    device, by_start, theirs = parameters[0].device, dict(zip(starts, parameters, strict=False)), []
    model.to(device)
    for own in model.parameters():
        start = int(own.flatten()[0])
        source = by_start.get(start)
        if source is None or not source.is_contiguous() or not torch.equal(own.detach(), _numbers(source, start)):
            raise InputError("its weights are stored in another way than those of the networks here.")
        own.data = source.data
        theirs.append(source)
    return model, theirs


def _numbers(p: Tensor, start: int) -> Tensor:
    return torch.arange(start, start + p.numel(), dtype=p.dtype, device=p.device).view(p.shape)
