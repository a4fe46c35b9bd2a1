"""Learning curves on DFT data, as rows: the default settings of `rlekf train`, or others given by --set.

    python benchmarks/bench_training.py --case cu --seeds 1 2 3 [--data DIR] [--epochs 3] [--set
    optimizer/preset=paper]

A row is one epoch of one run; rows are appended to benchmarks/results/training.csv. DIR holds the data sets under
the names of CASES (docs/study.md will name their public sources); NaCl is embedded in examples/.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from rows import MACHINE, append, machine

from rlekf_ext.dp.input import read_input
from rlekf_ext.dp.train import train

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/training.csv"
SMALL = {"neuron": [10, 10, 10], "axis_neuron": 6}, {"neuron": [20, 20, 20]}
PAPER = {"neuron": [25, 25, 25], "axis_neuron": 16}, {"neuron": [50, 50, 50]}
# folder, type map, cutoff in Å, network, frames that train and that are held out (None: all; else evenly spread)
CASES = {
    "nacl": ("NaCl/gpaw_pbe_8", ["Na", "Cl"], 6.0, SMALL, None, None),
    "cu": ("Cu/pwmlff_aimd_72", ["Cu"], 6.0, PAPER, None, None),
    "water": ("H2O/deepmd_water_192", ["O", "H"], 4.5, SMALL, 96, 24),
    "li": ("Li/mlearn_54", ["Li"], 6.0, PAPER, None, None),
    "si": ("Si/mlearn_64", ["Si"], 6.0, PAPER, None, None),
}
COLUMNS = [
    *("case", "label", "seed", "epoch", "updates", "seconds", "energy_meV_per_atom", "force_meV_per_A"),
    *MACHINE,
]


def thinned(source: Path, target: Path, first: int, last: int, count: int) -> str:
    """A copy of a deepmd/npy folder with `count` of the frames first ... last - 1, evenly spread."""
    (target / "set.000").mkdir(parents=True)
    for name in ("type.raw", "type_map.raw"):
        shutil.copy(source / name, target)
    for file in (source / "set.000").glob("*.npy"):
        frames = np.linspace(first, last - 1, count).round().astype(int)
        np.save(target / "set.000" / file.name, np.load(file)[frames])
    return str(target)


def input_of(case: str, data: Path, seed: int, epochs: float, folder: Path) -> dict:
    name, type_map, cutoff, (descriptor, fitting), num_train, num_test = CASES[case]
    source = data / name
    num_frames = len(np.load(source / "set.000/energy.npy"))
    cut = round(0.8 * num_frames)
    parts = ("train", 0, cut, num_train or cut), ("test", cut, num_frames, num_test or num_frames - cut)
    training, held_out = (thinned(source, folder / part, *rest) for part, *rest in parts)
    return {
        "model": {
            "type_map": type_map,
            "descriptor": {"type": "se_e2_a", "rcut": cutoff, "rcut_smth": 0.5, "seed": seed, **descriptor},
            "fitting_net": {"seed": seed, **fitting},
        },
        "optimizer": {"type": "RLEKF", "block_size": 1024},
        "training": {
            "training_data": {"systems": training, "batch_size": 1},
            "validation_data": {"systems": held_out},
            "num_epochs": epochs,
            "seed": seed,
            "disp_freq": 1000000,
            "save_freq": 1000000,
        },
    }


def run(case: str, data: Path, seed: int, epochs: float, changes: dict, label: str) -> list[dict]:
    with tempfile.TemporaryDirectory() as name:
        given = input_of(case, data, seed, epochs, Path(name))
        for path, value in changes.items():
            *sections, key = path.split("/")
            place = given
            for section in sections:
                place = place.setdefault(section, {})
            place[key] = value
        os.chdir(name)
        summary = train(read_input(given))
        os.chdir(ROOT)
    where = machine()
    return [
        {
            "case": case,
            "label": label,
            "seed": seed,
            "epoch": round(row["epoch"], 4),
            "updates": row["updates"],
            "seconds": round(row["seconds"], 2),
            "energy_meV_per_atom": round(1e3 * row["energy_rmse"], 4),
            "force_meV_per_A": round(1e3 * row["force_rmse"], 3),
            **{key: where[key] for key in MACHINE},
        }
        for row in summary["epochs"]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=sorted(CASES), required=True)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=JSON", help="changes to the input file")
    parser.add_argument("--label", default="default", help="what these settings are called in the rows")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    changes = {key: json.loads(value) for key, value in (item.split("=", 1) for item in arguments.set)}
    output = arguments.output.resolve()
    for seed in arguments.seeds:
        rows = run(arguments.case, arguments.data.resolve(), seed, arguments.epochs, changes, arguments.label)
        append(output, COLUMNS, rows)


if __name__ == "__main__":
    main()
