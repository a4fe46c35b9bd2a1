"""A trained model as a calculator of ASE, for quick use: a new neighbour list is made for each structure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ase.calculators.calculator as ase_calculator
import numpy as np
import torch
from ase import Atoms
from ase.stress import full_3x3_to_voigt_6_stress

from rlekf_ext.errors import DataError, InputError, OptionError
from rlekf_ext.ops import find_device
from rlekf_ext.potential.checkpoint import load_checkpoint, restored_model
from rlekf_ext.potential.model import DeepPotential
from rlekf_ext.potential.neighbors import make_frame, thick_box
from rlekf_ext.potential.uncertainty import deviations, filter_of, jacobian_of


class Calculator(ase_calculator.Calculator):
    """ASE calculator of a Deep Potential: `atoms.calc = Calculator("model.ckpt.pt")`.

    `model` is a checkpoint of `rlekf train` or `rlekf import`, or a DeepPotential. It is moved to `device`; by default
    it stays, and a checkpoint is loaded on the CPU. Energy and free energy (the same number) and energies of the atoms
    in eV, forces in eV/Å, stress in eV/Å³ in ASE's order xx, yy, zz, yz, xz, xy; stress needs three cell vectors.
    Structures may be periodic in any of the three directions.

    With `uncertainty`, every n-th calculation (True: every one) also has, in `results`, what the filter expects of the
    errors, sqrt(HᵀPH): `energy_deviation` of the energy per atom, eV/atom, and `force_deviation`, the root mean square
    over the force components, eV/Å; on a relative scale. It takes eight derivatives by the weights and a pass over P.
    ASE's SinglePointCalculator refuses these two names.

    Raises InputError for a file that is no checkpoint or, with `uncertainty`, has no P, OptionError for another
    `uncertainty`, and DataError for elements that the model does not know, for more neighbours than its sel, for atoms
    closer than 0.1 Å and for a periodic cell vector of length 0.
    """

    # No ClassVar: ASE declares it without.
    implemented_properties: list[str] = ["energy", "free_energy", "energies", "forces", "stress"]  # noqa: RUF012

    def __init__(
        self,
        model: str | Path | DeepPotential,
        device: torch.device | str | None = None,
        *,
        uncertainty: bool | int = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(uncertainty, int | np.integer) or uncertainty < 0:
            raise OptionError(f"uncertainty must be True, False or a number of calculations but is: {uncertainty}.")
        if uncertainty and isinstance(model, DeepPotential):
            raise InputError("uncertainty needs P: give the checkpoint of `rlekf train`, not its model.")
        checkpoint = {} if isinstance(model, DeepPotential) else load_checkpoint(model, model_only=not uncertainty)
        self.model = model if isinstance(model, DeepPotential) else restored_model(checkpoint)
        self._every, self._calculations = int(uncertainty), 0
        self._filter = filter_of(checkpoint, self.model) if uncertainty else None
        if device is not None:
            self.model.to(find_device(str(device)))

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(ase_calculator.all_changes),
    ) -> None:
        """Compute everything that is implemented; ASE calls this."""
        super().calculate(atoms, properties, system_changes)
        structure: Any = self.atoms  # a copy of atoms, or those of the latest call
        model = self.model
        rcut = model.architecture.descriptor.rcut
        frame = make_frame(
            structure.positions,
            thick_box(structure.cell.array, structure.pbc, structure.positions, 2 * rcut),
            self._types(structure),
            rcut,
            len(model.type_map),
            dtype=model.dtype,
        ).to(device=model.energy_bias.device)
        prediction = model(frame, create_graph=False)
        energy = prediction.energy.item()
        self.results = {
            "energy": energy,
            "free_energy": energy,
            "energies": prediction.atomic_energy.cpu().numpy(),
            "forces": prediction.forces.double().cpu().numpy(),
        }
        if self._filter and self._calculations % self._every == 0:
            jacobian = jacobian_of(self._filter, model, frame)
            names = ("energy_deviation", "force_deviation")
            self.results |= zip(names, deviations(self._filter, jacobian, "the atoms"), strict=True)
        self._calculations += 1
        if structure.cell.rank == 3:
            virial = prediction.virial[0].double().cpu().numpy()
            self.results["stress"] = full_3x3_to_voigt_6_stress(-virial / structure.get_volume())

    def _types(self, atoms: Atoms) -> list[int]:
        known = {name: index for index, name in enumerate(self.model.type_map)}
        symbols = atoms.get_chemical_symbols()
        if unknown := sorted(set(symbols) - set(known)):
            raise DataError(f"The model knows the elements {', '.join(known)}, but the atoms are also {unknown}.")
        return [known[symbol] for symbol in symbols]
