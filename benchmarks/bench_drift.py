"""Energy drift of molecular dynamics with a model trained on the table, beside one trained with the exact network.

    python benchmarks/bench_drift.py [--system Cu] [--network small] [--epochs 6] [--steps 5000] [--data DIR]

A row is a run at constant energy (ASE, velocity Verlet, 1 fs) from a test frame, with velocities of 300 K. `drift` is
the slope of the total energy over the second half of the run, `fluctuation` the standard deviation about that line.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ase
import numpy as np
import torch
from ase import units
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet
from bench_training import ROOT, STUDY, Run, chosen, config_of, load, method_of
from rows import MACHINE, append, machine

from rlekf_ext.potential.calculator import Calculator

RESULTS = ROOT / "benchmarks/results/drift.csv"
COLUMNS = ["system", "network", "method", "epochs", "steps", "drift, meV/atom/ns", "fluctuation, meV/atom", *MACHINE]
METHODS = "first default", "first default on the table"


def trained(system: str, network: str, method: str, data: Path, epochs: int) -> Calculator:
    frames = load(system, data, 100)["train"]
    run = Run(config_of(system, network, method_of(method), seed=1), frames, epochs)
    for _ in range(run.num_steps):
        run.step()
    return Calculator(run.optimize.result)


def total_energies(calculator: Calculator, system: str, data: Path, steps: int) -> np.ndarray:
    """Total energy after each step, eV/atom."""
    asked = STUDY["system"][system]
    start = chosen(system, data, 100)["test"][0]
    names = [asked["elements"][t] for t in start.types]
    atoms = ase.Atoms(names, positions=start.coordinates[0], cell=start.boxes[0], pbc=True, calculator=calculator)
    MaxwellBoltzmannDistribution(atoms, temperature_K=300, rng=np.random.default_rng(0))
    dynamics = VelocityVerlet(atoms, units.fs)
    found = [atoms.get_total_energy() for _ in dynamics.irun(steps)]
    return np.array(found) / len(atoms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", choices=[n for n, s in STUDY["system"].items() if "folders" in s], default="Cu")
    parser.add_argument("--network", choices=list(STUDY["network"]), default="small")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--data", type=Path, default=ROOT / "examples", help="folder of the sets; NaCl needs none")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    where = machine(given.output)
    for method in METHODS:
        calculator = trained(given.system, given.network, method, given.data, given.epochs)
        energies = 1e3 * total_energies(calculator, given.system, given.data, given.steps)
        late = energies[len(energies) // 2 :]
        slope, offset = np.polyfit(np.arange(len(late)), late, 1)
        row = {name: value for name, value in vars(given).items() if name in COLUMNS} | {"method": method}
        row[COLUMNS[5]] = f"{1e6 * slope:.3g}"
        row[COLUMNS[6]] = f"{np.std(late - slope * np.arange(len(late)) - offset):.3g}"
        append(given.output, COLUMNS, [{**row, **where}])
        print(*(row[name] for name in COLUMNS[:7]), sep="   ")


if __name__ == "__main__":
    main()
