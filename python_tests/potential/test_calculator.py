"""The calculator of ASE: derivatives against finite differences, all kinds of periodicity, a short run."""

import helpers
import numpy as np
import pytest
import torch

pytest.importorskip("ase")
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from ase.md.verlet import VelocityVerlet

from rlekf_ext.errors import BackendError, DataError, InputError
from rlekf_ext.potential import Calculator
from rlekf_ext.potential.checkpoint import save_checkpoint
from rlekf_ext.potential.neighbors import make_frame

RCUT = 3.8
TYPE_MAP = ("Cl", "Na")


def crystal(pbc=True, seed=0):
    atoms = bulk("NaCl", "rocksalt", 5.2, cubic=True)
    atoms.rattle(0.15, seed=seed)
    atoms.set_cell(atoms.cell.array + np.random.default_rng(seed).uniform(-0.2, 0.2, (3, 3)), scale_atoms=True)
    atoms.pbc = pbc
    return atoms


def make_model(**changes):
    settings = {"neuron": (4, 8), "axis_neuron": 4, "fitting_neuron": (10, 10), "rcut_smth": 1.0, "seed": 3, **changes}
    atoms = crystal()
    frame = make_frame(atoms.positions, atoms.cell.array, [TYPE_MAP.index(s) for s in atoms.symbols], RCUT, 2)
    return helpers.make_model(TYPE_MAP, [20, 20], RCUT, frames=[frame], energy_bias=[-2.0, -1.0], **settings)


def test_it_says_what_the_model_says():
    model, atoms = make_model(), crystal()
    types = [model.type_map.index(symbol) for symbol in atoms.symbols]
    with torch.no_grad():
        expected = model(make_frame(atoms.positions, atoms.cell.array, types, RCUT, 2))
    atoms.calc = Calculator(model)
    assert atoms.get_potential_energy() == expected.energy.item()
    assert atoms.get_potential_energy(force_consistent=True) == expected.energy.item()
    np.testing.assert_array_equal(atoms.get_forces(), expected.forces)
    np.testing.assert_array_equal(atoms.get_potential_energies(), expected.atomic_energy)
    stress = atoms.get_stress(voigt=False)
    np.testing.assert_allclose(stress, -expected.virial[0].numpy() / atoms.get_volume(), atol=1e-14)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("pbc", [True, False, (True, True, False), (False, False, True)])
def test_forces_and_stress_are_derivatives(pbc):
    atoms = crystal(pbc)
    atoms.calc = Calculator(make_model())
    forces, stress = atoms.get_forces(), atoms.get_stress()
    assert np.abs(forces).max() > 0.01
    some = [0, 5]
    difference = calculate_numerical_forces(atoms, eps=1e-4, iatoms=some) - forces[some]
    assert np.abs(difference).max() < 1e-7 * np.abs(forces).max()
    assert np.abs(stress).max() > 1e-4
    difference = calculate_numerical_stress(atoms, eps=1e-5) - stress
    assert np.abs(difference).max() < 1e-7 * np.abs(stress).max()


def test_a_slab_and_a_wire_see_no_images_where_they_are_not_periodic():
    """As in a large cell that is periodic everywhere."""
    for pbc in ((True, True, False), (False, True, False), (False, False, False)):
        atoms, padded = crystal(pbc), crystal(True)
        cell = np.diag([5.2, 5.2, 5.2])
        atoms.set_cell(cell)
        padded.set_cell(np.where(np.array(pbc)[:, None], cell, np.eye(3) * 50))
        atoms.calc, padded.calc = (Calculator(make_model()) for _ in range(2))
        assert atoms.get_potential_energy() == pytest.approx(padded.get_potential_energy(), abs=1e-11)
        np.testing.assert_allclose(atoms.get_forces(), padded.get_forces(), atol=1e-11)
        atoms.cell[~np.array(pbc)] = 0  # a cell vector that is not periodic may be missing
        np.testing.assert_allclose(atoms.get_forces(), padded.get_forces(), atol=1e-11)


def test_an_atom_alone_without_a_cell():
    atom = Atoms("Na", [[1.0, 2.0, 3.0]], calculator=Calculator(make_model()))
    assert np.isfinite(atom.get_potential_energy())
    np.testing.assert_array_equal(atom.get_forces(), np.zeros((1, 3)))
    with pytest.raises(PropertyNotImplementedError, match="stress"):
        atom.get_stress()


def test_energy_is_conserved_in_a_run():
    atoms = crystal()
    atoms.calc = Calculator(make_model())
    atoms.set_momenta(np.random.default_rng(0).normal(scale=0.8, size=(len(atoms), 3)))
    run = VelocityVerlet(atoms, 0.5 * units.fs)
    total, kinetic = [], []
    for _ in run.irun(100):
        total.append(atoms.get_total_energy())
        kinetic.append(atoms.get_kinetic_energy())
    assert np.ptp(kinetic) > 1e-3
    assert np.ptp(total) < 1e-2 * np.ptp(kinetic)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_a_sentence():
    with pytest.raises(BackendError, match="cuda cannot be used: "):
        Calculator(make_model(), device="cuda")


def test_a_checkpoint_and_float32(tmp_path):
    save_checkpoint(tmp_path / "model.pt", make_model())
    save_checkpoint(tmp_path / "single.pt", make_model(precision="float32"))
    results = []
    for model in (make_model(), tmp_path / "model.pt", str(tmp_path / "single.pt")):
        atoms = crystal()
        atoms.calc = Calculator(model, device="cpu")
        results.append((atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()))
        assert results[-1][1].dtype == results[-1][2].dtype == np.float64
    for exact, read, single in zip(*results, strict=True):
        np.testing.assert_array_equal(exact, read)
        np.testing.assert_allclose(exact, single, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match=r"The checkpoint none\.pt does not exist"):
        Calculator("none.pt")


def test_structures_it_cannot_take():
    calculator = Calculator(make_model())
    with pytest.raises(DataError, match=r"knows the elements Cl, Na, but the atoms are also \['K'\]"):
        Atoms("NaK", [[0, 0, 0], [2, 0, 0]], calculator=calculator).get_potential_energy()
    with pytest.raises(DataError, match="periodic along a cell vector of length 0"):
        Atoms("Na", pbc=(True, False, False), calculator=calculator).get_forces()
    with pytest.raises(DataError, match=r"closer than 0\.1 Å"):
        Atoms("Na2", [[0, 0, 0], [0, 0, 0.05]], calculator=calculator).get_forces()
    dense = bulk("NaCl", "rocksalt", 3.2)
    dense.calc = calculator
    with pytest.raises(DataError, match="more than sel = 20"):
        dense.get_forces()


def test_dp_has_nothing_else():
    import rlekf_ext.potential

    with pytest.raises(AttributeError, match="no attribute 'Calculater'"):
        _ = rlekf_ext.potential.Calculater
