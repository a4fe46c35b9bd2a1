"""Active learning of copper: molecular dynamics until the filter is unsure, the frames it knows least, labels, training
that continues with the old P.

    python examples/active_learning.py FOLDER

It uses ASE's EMT potential instead of DFT: put your own code in `label`. All files are in FOLDER.
"""

import sys
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from ase.md.langevin import Langevin

from rlekf_ext.potential import Calculator
from rlekf_ext.potential.checkpoint import load_checkpoint, restored_model
from rlekf_ext.potential.input import read_input
from rlekf_ext.potential.load import load_systems
from rlekf_ext.potential.select import select
from rlekf_ext.potential.train import train

ROUNDS = ((300, 200), (600, 300), (900, 400))  # temperature in K, longest run in steps of 5 fs
FRAMES, FAR = 8, 3.0  # to label per round; MD stops at this times the largest deviation of the labelled frames
MODEL = {
    "type_map": ["Cu"],
    "descriptor": {"rcut": 5.0, "sel": [70], "neuron": [10, 10, 10], "axis_neuron": 6},  # sel: room for what may come
    "fitting_net": {"neuron": [20, 20, 20]},
}


def label(atoms, file):
    """Energies and forces of the reference, which stay with the frames."""
    for frame in atoms:
        frame.calc = EMT()
        found = {"energy": frame.get_potential_energy(), "forces": frame.get_forces()}
        frame.calc = SinglePointCalculator(frame, **found)
    write(file, atoms, format="extxyz")
    return str(file)


def learn(folder, data, earlier=None, steps=480):
    """Train on all data; with an earlier model, three of four batches are of the latest frames."""
    systems = {"systems": data, "batch_size": 4}
    if earlier:
        systems["sys_probs"] = [-1.0] * (len(data) - 1) + [0.75]  # those below 0 share the rest
    training = {"training_data": systems, "validation_fraction": 0, "numb_steps": steps, "init_model": earlier}
    files = {"save_ckpt": str(folder / f"model{len(data)}"), "disp_file": str(folder / f"lcurve{len(data)}.out")}
    optimizer = {"type": "RLEKF", "covariance": "inflate"}
    train(read_input({"model": MODEL, "optimizer": optimizer, "training": training | files}), quiet=True)
    return files["save_ckpt"] + ".pt"


def explore(model, known, temperature, steps, file):
    """Molecular dynamics with the model, one frame in five, until its deviation is too large."""
    atoms = bulk("Cu", cubic=True) * (2, 2, 2)
    atoms.calc = Calculator(model, uncertainty=True)
    thermostat = {"temperature_K": temperature, "friction": 0.01 / units.fs, "fixcm": False}
    dynamics, frames = Langevin(atoms, 5 * units.fs, **thermostat), []
    for step, _ in enumerate(dynamics.irun(steps)):
        if step % 5 == 0:
            frames.append(Atoms(atoms.symbols, atoms.positions, cell=atoms.cell, pbc=True))
        if atoms.calc.results["force_deviation"] > FAR * known:
            break
    print(f"{temperature} K: stopped after {step} of {steps} steps, {len(frames)} frames")
    write(file, frames, format="extxyz")


def look(model, atoms):
    """The force error (eV/Å) of labelled frames, and the largest of their deviations."""
    calculator, errors, deviations = Calculator(model, uncertainty=True), [], []
    for frame in atoms:
        calculator.calculate(frame)
        errors.append(calculator.results["forces"] - frame.get_forces())
        deviations.append(calculator.results["force_deviation"])
    return np.sqrt(np.mean(np.square(errors))), max(deviations)


def main(folder, rounds=ROUNDS, steps=480):
    folder.mkdir(parents=True, exist_ok=True)
    known = [bulk("Cu", cubic=True) * (2, 2, 2) for _ in range(FRAMES)]
    for seed, atoms in enumerate(known):
        atoms.rattle(0.05, seed=seed)
    data = [label(known, folder / "labelled0.xyz")]
    model = learn(folder, data, steps=steps)
    for number, (temperature, longest) in enumerate(rounds, 1):
        pool = folder / f"pool{number}.xyz"
        explore(model, look(model, known)[1], temperature, longest, pool)
        checkpoint = load_checkpoint(model)
        systems = load_systems(pool, MODEL["type_map"], labelled=False)
        chosen = select(checkpoint, restored_model(checkpoint), systems, FRAMES).chosen
        new = [read(pool, ":")[i] for i in chosen]
        data.append(label(new, folder / f"labelled{number}.xyz"))
        before, model = look(model, new)[0], learn(folder, data, model, steps)
        of_new, of_old = look(model, new)[0], look(model, known)[0]
        print(f"force errors in eV/Å, new frames: {before:.4f} before, {of_new:.4f} after; old frames: {of_old:.4f}")
        known += new
    return model


if __name__ == "__main__":
    main(Path(sys.argv[1]))
