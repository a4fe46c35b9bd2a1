"""P stays positive definite whatever the data: one frame, labels fitted exactly, labels that are zero or contradict."""

import numpy as np
import pytest
import torch
from helpers import NACL, RCUT, make_model

from rlekf_ext.covariance import Covariance
from rlekf_ext.potential.checkpoint import load_checkpoint, restored_model
from rlekf_ext.potential.data import System, frames
from rlekf_ext.potential.input import read_input
from rlekf_ext.potential.train import train

BOX = 5.6 * np.eye(3)
LATTICE = 5.6 * np.array([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5], [0.5, 0, 0], [0, 0.5, 0]])


def nacl(count, first=0):
    """Frames of the DFT set: coord, box, energy, force."""
    return {name: np.load(NACL / "set.000" / f"{name}.npy")[first : first + count] for name in ALL}


ALL = ("coord", "box", "energy", "force")


def changed(count, **factors):
    return {name: array * factors.get(name, 1.0) for name, array in nacl(count).items()}


def without(count, *names):
    return {name: array for name, array in nacl(count).items() if name not in names}


def labelled_by_a_network(count, seed):
    """Labels that a network of the same form has exactly."""
    data = nacl(count)
    types = np.loadtxt(NACL / "type.raw", dtype=int)
    system = System("", types, data["coord"].reshape(count, -1, 3), data["box"].reshape(count, 3, 3), data["energy"])
    made = frames([system], RCUT, 2)
    model = make_model(["Na", "Cl"], [8, 8], RCUT, fitting_neuron=(6, 6), seed=seed, frames=made, neuron=(4, 4))
    found = [model(frame, create_graph=False) for frame in made]
    return {
        **data,
        "energy": np.array([one.energy.item() for one in found]),
        "force": np.stack([one.forces.numpy().reshape(-1) for one in found]),
    }


def lattice(count):
    """One symmetric cell, again and again: all forces are zero by symmetry, and stay so in every network."""
    return {
        "coord": np.tile(LATTICE.reshape(-1), (count, 1)),
        "box": np.tile(BOX.reshape(-1), (count, 1)),
        "energy": np.full(count, -20.0),
        "force": np.zeros((count, 18)),
    }


def dimers(count):
    """Two atoms at distances beyond which there is no neighbour; not periodic."""
    coordinates = np.zeros((count, 6))
    coordinates[:, 3] = np.linspace(2.0, RCUT + 1, count)
    return {"coord": coordinates, "energy": np.linspace(-3, -1, count), "force": np.zeros((count, 6))}


def contradicting(count):
    """The same structure with different labels."""
    data = nacl(1)
    random = np.random.default_rng(0)
    return {
        "coord": np.repeat(data["coord"], count, 0),
        "box": np.repeat(data["box"], count, 0),
        "energy": data["energy"].ravel() + random.normal(size=count),
        "force": data["force"] + random.normal(size=(count, data["force"].shape[1])),
    }


SETS = {
    "one frame": (nacl(1), {}),
    "two frames": (nacl(2), {}),
    "five frames": (nacl(5), {}),
    "five frames, preset paper": (nacl(5), {"preset": "paper"}),
    "five frames, preset lkf": (nacl(5), {"preset": "lkf"}),
    "five frames, small blocks": (nacl(5), {"block_size": 40}),
    "two frames, a force at a time": (nacl(2), {"group_size": 1, "num_groups": 8}),
    "two frames, no forgetting": (nacl(2), {"memory_factor": 1.0}),
    "two frames, no relinearization": (nacl(2), {"relinearize": False}),
    "forces are zero": (changed(3, force=0.0), {}),
    "energies are zero": (changed(3, energy=0.0), {}),
    "all is zero": (changed(3, force=0.0, energy=0.0), {}),
    "forces are tiny": (changed(3, force=1e-9), {}),
    "forces are huge": (changed(3, force=1e6), {}),
    "energies alone": (without(3, "force"), {}),
    "forces alone": (without(3, "energy"), {}),
    "a network's labels": (labelled_by_a_network(4, seed=3), {}),
    "a symmetric lattice": (lattice(3), {}),
    "dimers": (dimers(4), {}),
    "labels that contradict": (contradicting(4), {}),
}


def final_run(folder, data, optimizer, num_batches):
    atoms = data["coord"].shape[1] // 3
    types = {8: NACL.joinpath("type.raw").read_text(), 6: "0\n0\n0\n0\n1\n1\n", 2: "0\n1\n"}[atoms]
    (folder / "set.000").mkdir()
    (folder / "type.raw").write_text(types)
    if "box" not in data:
        (folder / "nopbc").touch()
    for name, array in data.items():
        np.save(folder / "set.000" / f"{name}.npy", array)
    config = {
        "model": {
            "type_map": ["Na", "Cl"],
            "descriptor": {"rcut": RCUT, "neuron": [4, 4], "axis_neuron": 2},
            "fitting_net": {"neuron": [6, 6]},
        },
        "optimizer": {"type": "RLEKF", **optimizer},
        "training": {
            "training_data": {"systems": str(folder), "batch_size": 1},
            "validation_fraction": 0,
            "numb_steps": num_batches,
            "seed": 1,
            "disp_freq": 10**9,
            "save_freq": 10**9,
            "disp_file": str(folder / "lcurve.out"),
            "save_ckpt": str(folder / "model"),
        },
    }
    summary = train(read_input(config), quiet=True)
    return summary, load_checkpoint(folder / "model.pt")


def check(folder, name, num_batches):
    data, optimizer = SETS[name]
    summary, checkpoint = final_run(folder, data, optimizer, num_batches)
    assert summary["step"] == num_batches
    covariance = Covariance.from_state_dict(checkpoint["optimizer"]["filter"]["state"][0])
    scalars = covariance.scalars()._asdict()
    assert {cause: count for cause, count in scalars.items() if cause.startswith("skipped") and count} == {}
    smallest = min(float(torch.linalg.eigvalsh(block)[0]) for block in covariance.dense())
    largest = max(float(torch.linalg.eigvalsh(block)[-1]) for block in covariance.dense())
    print(f"{name}: {num_batches} batches, eigenvalues of P {smallest:.1e} ... {largest:.1e}, {summary['epochs'][-1]}")
    assert smallest > 0
    model = restored_model(checkpoint)
    assert all(p.isfinite().all() for p in model.parameters())
    return summary


@pytest.mark.parametrize("name", SETS)
def test_training_goes_on(tmp_path, name):
    check(tmp_path, name, 40)


@pytest.mark.soak
@pytest.mark.parametrize("name", SETS)
def test_training_goes_on_for_long(tmp_path, name):
    check(tmp_path, name, 2000)
