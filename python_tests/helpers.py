"""Builders shared by several test files."""

import copy
import importlib.util
import json
from pathlib import Path

import numpy as np
import torch

from rlekf_ext.potential.checkpoint import load_checkpoint
from rlekf_ext.potential.frames import survey
from rlekf_ext.potential.input import read_input
from rlekf_ext.potential.model import DeepPotential
from rlekf_ext.potential.train import train

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NACL = EXAMPLES / "nacl" / "gpaw_pbe_8"
RCUT = 3.5  # Å, of the runs
# An input file that trains a tiny network on three frames for four batches.
TINY = {
    "model": {
        "type_map": ["Na", "Cl"],
        "descriptor": {"rcut": 3.5, "neuron": [4, 4], "axis_neuron": 2},
        "fitting_net": {"neuron": [6, 6]},
    },
    "optimizer": {"type": "RLEKF", "block_size": 40},
    "training": {"training_data": {"systems": "data", "batch_size": 1}, "numb_steps": 4, "disp_freq": 1, "seed": 1},
}


def make_model(
    type_map=("A", "B"),
    sel=(30, 30),
    rcut=4.0,
    *,
    fitting_neuron=(5, 5),
    fitting_resnet_dt=False,
    precision="float64",
    seed=1,
    frames=(),
    energy_bias=None,
    **descriptor,
):
    """A small network, with statistics of the frames if there are any; other keywords are the descriptor's."""
    model = DeepPotential(
        {
            "type_map": type_map,
            "descriptor": {"sel": sel, "rcut": rcut, "neuron": (3, 6), "axis_neuron": 2, **descriptor},
            "fitting_net": {"neuron": fitting_neuron, "resnet_dt": fitting_resnet_dt},
            "precision": precision,
        },
        seed=seed,
    )
    if frames:
        model.descriptor.fit_statistics(survey(frames, model.architecture.descriptor).sums)
    if energy_bias is not None:
        model.energy_bias.copy_(torch.tensor(energy_bias, dtype=torch.float64))
    return model


# Short runs of the trainer


def write_data(folder, first=0, count=4, stretch=1.0):
    """Some frames of the NaCl set; stretched cells have fewer neighbours within the cutoff."""
    (folder / "set.000").mkdir(parents=True)
    for name in ("type.raw", "type_map.raw"):
        (folder / name).write_text((NACL / name).read_text())
    for file in (NACL / "set.000").glob("*.npy"):
        factor = stretch if file.stem in ("coord", "box") else 1.0
        np.save(folder / "set.000" / file.name, factor * np.load(file)[first : first + count])
    return str(folder)


def input_of(folder, optimizer=None, precision="default", **training):
    """An input file as a dict: three frames train, the fourth is held out, a batch is a frame; output in `folder`."""
    if not (folder / "data").exists():
        write_data(folder / "data")
    return {
        "model": {
            "type_map": ["Na", "Cl"],
            "descriptor": {"rcut": RCUT, "neuron": [4, 4], "axis_neuron": 2, "precision": precision},
            "fitting_net": {"neuron": [6, 6], "precision": precision},
        },
        "optimizer": {"type": "RLEKF", "block_size": 40} if optimizer is None else optimizer,
        "learning_rate": {"start_lr": 1e-2, "stop_lr": 1e-4, "decay_steps": 2},
        "training": {
            "training_data": {"systems": str(folder / "data"), "batch_size": 1},
            "validation_fraction": 0.25,
            "numb_steps": 9,
            "seed": 1,
            "disp_freq": 2,
            "save_freq": 100,
            "disp_file": str(folder / "out" / "lcurve.out"),
            "save_ckpt": str(folder / "out" / "model.ckpt"),
            **training,
        },
    }


def run(given, **arguments):
    return train(read_input(given), quiet=True, **arguments)


def checkpoint_of(folder):
    return load_checkpoint(folder / "out" / "model.ckpt.pt")


def weights_of(folder):
    return torch.cat([value.flatten().double() for value in checkpoint_of(folder)["weights"].values()])


def curve_of(folder):
    return np.genfromtxt(folder / "out" / "lcurve.out", names=True)  # as DeePMD-kit's documentation reads it


def write_input(folder, given, changes=None):
    """Write a dict as input.json, with changes by path, {"training/seed": 2}. Returns the name of the file."""
    given = copy.deepcopy(given)
    for path, value in (changes or {}).items():
        *sections, name = path.split("/")
        section = given
        for each in sections:
            section = section.setdefault(each, {})
        section[name] = value
    (folder / "input.json").write_text(json.dumps(given))
    return "input.json"


def run_file(path, name):
    """A new module from a file."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_example(name):
    return run_file(EXAMPLES / f"{name}.py", name)


def hdf5_contents(path):
    """What the file holds, without the time of writing, which HDF5 before 2.0 stores."""
    import h5py

    with h5py.File(path) as file:
        return dict(file.attrs), {name: (str(array.dtype), array[()].tolist()) for name, array in file.items()}
