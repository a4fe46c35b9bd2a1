"""Whether the filter's predicted deviations rank frames as their errors do, on DFT data, as rows.

    python benchmarks/bench_uncertainty.py --data DIR [--case nacl ...] [--seeds 1 2 3] [--picture FILE.png]

For each case a small network is trained with the default settings of `rlekf train` on the first 60 % of some frames,
and a row is one set of other frames: Spearman correlations of |energy error| and of the force RMSE of a frame with

    kalman      sqrt(HᵀPH)
    calibrated  the same, if every error were drawn from a normal distribution of exactly that deviation: what a perfect
                filter would reach on frames whose deviations are spread like these
    identity    sqrt(HᵀH): the sensitivity of the network, without P
    size        the RMS of the predicted forces, which needs no filter at all

and the ratio of RMS error to RMS deviation. DIR holds the data sets (docs/data.md); NaCl is in examples/.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rows import MACHINE, append, machine

from rlekf_ext import RLEKF
from rlekf_ext.potential.checkpoint import load_checkpoint, restored_model
from rlekf_ext.potential.data import System, frames
from rlekf_ext.potential.input import read_input
from rlekf_ext.potential.load import load_systems
from rlekf_ext.potential.model import DeepPotential
from rlekf_ext.potential.neighbors import Frame
from rlekf_ext.potential.plot import plot_uncertainty
from rlekf_ext.potential.train import train
from rlekf_ext.potential.uncertainty import Uncertainty, filter_of, jacobian_of, spearman, uncertainty

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/uncertainty.csv"
PREDICTORS = ("kalman", "calibrated", "identity", "size")
COLUMNS = ["case", "frames_of", "seed", "train_frames", "test_frames", "energy_meV_per_atom", "force_meV_per_A"]
COLUMNS += [f"{kind}_{name}" for kind in ("energy", "force") for name in (*PREDICTORS, "factor")] + [*MACHINE]

Some = Callable[[System], np.ndarray]  # which frames of a system, as a mask


def everything(system: System) -> np.ndarray:
    return np.ones(len(system), dtype=bool)


def segments(*numbers: int) -> Some:
    """NaCl: six segments of molecular dynamics, whose frames alternate."""
    return lambda system: np.isin(np.arange(len(system)) % 6, numbers)


def solid(most: float) -> Some:
    """Frames whose energy in eV/atom is below `most`: of copper and silicon, those that are not molten."""
    return lambda system: system.energies / len(system.types) < most


def others(some: Some) -> Some:
    return lambda system: ~some(system)


class Case(NamedTuple):
    folder: str  # in DIR
    type_map: list[str]
    cutoff: float  # Å
    epochs: float
    trained: Some
    elsewhere: dict[str, tuple[str, Some]]  # label -> folder and frames: other kinds of frames than the trained ones


NACL = str(ROOT / "examples/nacl/gpaw_pbe_8")
COLD = segments(0, 2, 5)
CASES = {
    "nacl": Case(NACL, ["Na", "Cl"], 6.0, 6, everything, {}),
    "nacl 300 K": Case(NACL, ["Na", "Cl"], 6.0, 6, COLD, {"600 K": (NACL, others(COLD))}),
    "li": Case("Li/mlearn_54", ["Li"], 6.0, 4, everything, {}),
    "si": Case("Si/mlearn_64", ["Si"], 5.0, 4, everything, {"vacancy": ("Si/mlearn_63", everything)}),
    "si solid": Case("Si/mlearn_64", ["Si"], 5.0, 4, solid(-5.0), {"liquid": ("Si/mlearn_64", others(solid(-5.0)))}),
    "cu": Case(
        "Cu/mvl_snap_aimd_108", ["Cu"], 5.0, 4, everything, {"vacancy": ("Cu/mvl_snap_vacancy_107", everything)}
    ),
    "cu solid": Case(
        "Cu/mvl_snap_aimd_108", ["Cu"], 5.0, 4, solid(-3.8), {"liquid": ("Cu/mvl_snap_aimd_108", others(solid(-3.8)))}
    ),
}
SHOWN = "nacl 300 K", "cu solid"  # in the picture


def write_frames(source: Path, target: Path, chosen: np.ndarray) -> str:
    """A copy of a deepmd/npy folder with the chosen frames."""
    (target / "set.000").mkdir(parents=True)
    for name in ("type.raw", "type_map.raw"):
        shutil.copy(source / name, target)
    for file in (source / "set.000").glob("*.npy"):
        np.save(target / "set.000" / file.name, np.load(file)[chosen])
    return str(target)


def input_of(case: Case, training: str, held_out: str, seed: int) -> dict:
    descriptor = {
        "type": "se_e2_a",
        "sel": "auto:2",
        "rcut": case.cutoff,
        "neuron": [10, 10, 10],
        "axis_neuron": 6,
        "seed": seed,
    }
    return {
        "model": {
            "type_map": case.type_map,
            "descriptor": descriptor,
            "fitting_net": {"neuron": [20, 20, 20], "seed": seed},
        },
        "optimizer": {"type": "RLEKF", "block_size": 1024},
        "training": {
            "training_data": {"systems": training, "batch_size": 1},
            "validation_data": {"systems": held_out},
            "num_epochs": case.epochs,
            "seed": seed,
            "disp_freq": 1000000,
            "save_freq": 1000000,
        },
    }


class Predictors(NamedTuple):
    """What is known of some frames: errors with deviations, and the other predictors; see the top of this file."""

    found: Uncertainty
    identity: np.ndarray  # (frames, 2): energy, force
    size: np.ndarray  # (frames,)
    components: np.ndarray  # (frames,): of the forces

    def correlations(self, kind: str) -> tuple[float, ...]:
        """In the order of PREDICTORS."""
        which = ("energy", "force").index(kind)
        error, deviation = abs(getattr(self.found, kind).T)
        freedom = self.components if kind == "force" else np.ones(len(error))
        return (
            self.found.spearman[which],
            calibrated(deviation, freedom),
            spearman(error, self.identity[:, which]),
            spearman(error, self.size),
        )


def predictors(optimizer: RLEKF, model: DeepPotential, test: list[Frame]) -> Predictors:
    identity, size = [], []
    for frame in test:
        squares = jacobian_of(optimizer, model, frame).square().sum(1)
        identity.append((float(squares[0]), float(squares[1:].mean())))
        size.append(float(model(frame, create_graph=False).forces.square().mean()))
    components = np.array([3 * len(frame.types) for frame in test])
    return Predictors(uncertainty(optimizer, model, test), np.array(identity), np.array(size), components)


def pooled(parts: Iterable[Predictors]) -> Predictors:
    found, *rest = zip(*parts, strict=True)
    names = ("frame", "energy", "force")
    together = Uncertainty(*(np.concatenate([getattr(one, name) for one in found]) for name in names))
    return Predictors(together, *map(np.concatenate, rest))


def calibrated(deviation: np.ndarray, freedom: np.ndarray, draws: int = 200) -> float:
    """Mean Spearman correlation of deviations with the RMS of `freedom` normal numbers of exactly that deviation."""
    generator = np.random.default_rng(0)
    drawn = [deviation * np.sqrt(generator.chisquare(freedom) / freedom) for _ in range(draws)]
    return float(np.mean([spearman(one, deviation) for one in drawn]))


def run(name: str, data: Path, seed: int) -> tuple[list[dict], dict[str, Uncertainty]]:
    """Train one network. Its rows, and errors with deviations by label, of frames that it did not see."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (system,) = load_systems(data / case.folder, case.type_map)
        chosen = np.flatnonzero(case.trained(system))
        seen, held_out = np.split(chosen, [round(0.6 * len(chosen))])
        tests = {"held out": write_frames(data / case.folder, folder / "held out", held_out)}
        for label, (place, some) in case.elsewhere.items():
            (other,) = load_systems(data / place, case.type_map)
            tests[label] = write_frames(data / place, folder / label, np.flatnonzero(some(other)))
        training = write_frames(data / case.folder, folder / "training", seen)
        os.chdir(folder)
        train(read_input(input_of(case, training, tests["held out"], seed)))
        os.chdir(ROOT)
        checkpoint = load_checkpoint(folder / "model.ckpt.pt")
        model = restored_model(checkpoint)
        optimizer = filter_of(checkpoint, model)
        known = {
            label: predictors(
                optimizer, model, frames(load_systems(path, case.type_map), case.cutoff, len(case.type_map))
            )
            for label, path in tests.items()
        }
    if len(known) > 1:
        known["all of these"] = pooled(known.values())
    rows = []
    for label, one in known.items():
        rmse = [1e3 * np.sqrt(np.mean(pairs[:, 0] ** 2)) for pairs in (one.found.energy, one.found.force)]
        row = {"case": name, "frames_of": label, "seed": seed, "train_frames": len(seen), "test_frames": len(one.size)}
        row |= {"energy_meV_per_atom": f"{rmse[0]:.4g}", "force_meV_per_A": f"{rmse[1]:.4g}"}
        for kind, factor in zip(("energy", "force"), one.found.factors, strict=True):
            row |= {f"{kind}_{p}": f"{c:.3f}" for p, c in zip(PREDICTORS, one.correlations(kind), strict=True)}
            row[f"{kind}_factor"] = f"{factor:.4g}"
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        rows.append(row)
    return rows, {label: known[label].found for label in tests}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets (docs/data.md)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument(
        "--picture",
        type=Path,
        help=f"picture to write (from the root of the repository), of the first seed of {' and '.join(SHOWN)}",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # run() changes the working directory
    data, output, where = arguments.data.resolve(), arguments.output.resolve(), machine(arguments.output)
    shown: dict[str, Uncertainty] = {}
    for name in arguments.case:
        for seed in arguments.seeds:
            rows, found = run(name, data, seed)
            append(output, COLUMNS, [{**row, **where} for row in rows])
            if name in SHOWN and seed == arguments.seeds[0]:
                shown |= {f"{name}, {label}": one for label, one in found.items()}
    if arguments.picture:
        print(plot_uncertainty(shown, ROOT / arguments.picture))


if __name__ == "__main__":
    main()
