"""The real `dp --pt train` by time: Adam, HybridMuon, LKF and RLEKF of dp on a set of the race, as rows beside ours.

    make bench-deepmd DATA=DIR
    .venv-deepmd/bin/python benchmarks/race_deepmd.py --data DIR [--systems Cu] [--seconds 1200] [--batches 40]

The paper's network, one thread, batches of one frame, all training frames of race.py; learning rate and prefactors are
those of DeePMD-kit's examples. A run has as many batches as fit into the given seconds: a first, short run of at least
`--batches` of them, without any evaluation, finds out how long one takes. dp evaluates on the test frames, all of one
composition at once, at even steps; the time of a row is the number of batches before it times that of one.

Rows go to results/race.csv, with the methods "dp: ...".
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from bench_deepmd import dp_train, set_threads
from bench_training import ROOT, STUDY, SYSTEMS, System, available, chosen, num_training
from race import COLUMNS, KEY, RACED, RESULTS, name_of, read_rows
from rows import MACHINE, append, machine

METHODS = "Adam", "HybridMuon", "LKF", "RLEKF"
RATE = 1e-3
LOOKS = 40
# dp with a clock: the times at which it draws batches.
CLOCK = """
import json, time
import deepmd.pt
from deepmd.pt.train import training
times = []
draw = training.Trainer._next_training_batch
def marked(self, *args):
    times.append((time.perf_counter(), time.process_time()))
    return draw(self, *args)
training.Trainer._next_training_batch = marked
from deepmd.main import main
main()
print("CLOCK", json.dumps(times))
"""


def write(systems: list[System], elements: list[str], folder: Path) -> list[str]:
    """The systems as deepmd/npy; returns their folders."""
    folders = []
    for i, system in enumerate(s for s in systems if len(s)):
        own = folder / f"{i:03}"
        (own / "set.000").mkdir(parents=True)
        np.savetxt(own / "type.raw", system.types, fmt="%d")
        (own / "type_map.raw").write_text("\n".join(elements))
        count = len(system)
        arrays = {"coord": system.coordinates, "box": system.boxes, "energy": system.energies, "force": system.forces}
        for name, array in arrays.items():
            if array is not None:
                np.save(own / "set.000" / f"{name}.npy", array if name == "energy" else np.reshape(array, (count, -1)))
        folders.append(str(own))
    return folders


def config_of(system: str, data: Path, folder: Path, optimizer: dict[str, Any]) -> dict[str, Any]:
    asked, net = SYSTEMS[system], STUDY["network"]["paper"]
    own = {"resnet_dt": False, "seed": 1, "precision": "float64"}
    descriptor = {"type": "se_e2_a", "sel": "auto:1.5", "rcut": asked["cutoff"], "rcut_smth": 0.5, **own}
    parts = chosen(system, data, None)
    return {
        "model": {
            "type_map": asked["elements"],
            "descriptor": {**descriptor, "neuron": net["neuron"], "axis_neuron": net["axis_neuron"]},
            "fitting_net": {"neuron": net["fitting"], **own},
        },
        "learning_rate": {"type": "exp", "start_lr": RATE, "stop_lr": 1e-8},
        "loss": {"type": "ener", "start_pref_e": 0.02, "limit_pref_e": 1, "start_pref_f": 1000, "limit_pref_f": 1},
        "optimizer": optimizer,
        "training": {
            "training_data": {
                "systems": write(parts["train"], asked["elements"], folder / "train"),
                "batch_size": 1,
                "auto_prob": "prob_sys_size",
            },
            "validation_data": {
                "systems": write(parts["test"], asked["elements"], folder / "test"),
                "batch_size": max(map(len, parts["test"])),
                "numb_btch": len(parts["test"]),
            },
            "seed": 1,
            "save_freq": 10**9,
        },
    }


def looks_of(key: tuple[Any, ...], data: Path, seconds: float, batches: int) -> list[dict[str, Any]]:
    system, _, method, *_ = key
    with tempfile.TemporaryDirectory() as name:
        config = config_of(system, data, Path(name), {"type": method.removeprefix("dp: ")})
        config["training"] |= {"numb_steps": batches, "disp_freq": batches}
        times, _ = dp_train(config, CLOCK, Path(name))
        wall, cpu = (median(np.diff(column)) for column in zip(*times[batches // 4 :], strict=True))
        steps = max(batches, round(seconds / wall))
        config["training"] |= {"numb_steps": steps, "disp_freq": max(1, steps // LOOKS)}
        _, curve = dp_train(config, CLOCK, Path(name))
    per_epoch = num_training(system, data, None)
    rows = []
    for look in curve:
        step, energy, force = (float(look[column]) for column in ("step", "rmse_e_val", "rmse_f_val"))
        row = dict(zip(KEY, key, strict=True)) | {"epoch": round(step / per_epoch, 4), "updates": ""}
        row |= {"seconds": round(step * wall, 3), "cpu_seconds": round(step * cpu, 3)}
        rows.append({**row, "test_E": f"{1e3 * energy:.5g}", "test_F": f"{1e3 * force:.5g}"})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "examples", help="folder of the sets; NaCl needs none")
    parser.add_argument("--systems", choices=RACED, nargs="+", default=["Cu"])
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS))
    parser.add_argument("--seconds", type=float, default=1200, help="of training, for each")
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    set_threads("1")
    where = {**machine(given.output), "threads": 1}
    done = read_rows(given.output)
    for system in given.systems:
        if not available(system, given.data):
            continue
        for method in given.methods:
            key = (system, "paper", f"dp: {method}", RATE, 1, "")
            if name_of(key) in done:
                continue
            started = time.perf_counter()
            rows = looks_of(key, given.data.resolve(), given.seconds, given.batches)
            append(given.output, COLUMNS, [{**row, **{name: where[name] for name in MACHINE}} for row in rows])
            end = "E {test_E} meV/atom, F {test_F} meV/Å after {seconds} s and {epoch} epochs".format(**rows[-1])
            print(f"{system} dp: {method}: {end}; {time.perf_counter() - started:.0f} s with evaluations", flush=True)


if __name__ == "__main__":
    main()
