"""LKF and RLEKF in the real `dp --pt train`, side by side: the same water, network, blocks and number of updates.

Runs in the environment of `make test-deepmd`:

    .venv-deepmd/bin/python benchmarks/bench_deepmd.py --data FOLDER_OF_THE_WATER_SET

Rows go to results/deepmd.csv: seconds per batch (without the first), the share of it inside the optimizer, and the
final RMSE on the first ten of 80 held-out frames, in eV/atom and eV/Å.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rows import MACHINE, append, machine

RESULTS = Path(__file__).resolve().parent / "results" / "deepmd.csv"
COLUMNS = ("optimizer", "block_size", "batches", "updates", "s_batch", "share", "rmse_e", "rmse_f", *MACHINE)
# dp with a clock around every update of the filter, and one around every batch.
CLOCK = """
import json, time
import deepmd.pt
from deepmd.pt.optimizer import LKFOptimizer
from rlekf_ext.integrations.deepmd.optimizer import DeepmdRLEKF
from deepmd.pt.train import training
inside, batches = [], []
def timed(cls, name):
    call = getattr(cls, name)
    def run(*args):
        start = time.perf_counter()
        call(*args)
        inside.append(time.perf_counter() - start)
    setattr(cls, name, run)
timed(LKFOptimizer, "step")
timed(DeepmdRLEKF, "update")
draw = training.Trainer._next_training_batch
def marked(self, *args):
    batches.append((time.perf_counter(), len(inside)))
    return draw(self, *args)
training.Trainer._next_training_batch = marked
from deepmd.main import main
main()
(start, skip), (end, last) = batches[1], batches[-1]
print("CLOCK", json.dumps([(end - start) / (len(batches) - 2), sum(inside[skip:last]) / (end - start), len(inside)]))
"""


def split(source: Path, folder: Path) -> None:
    """The first 320 frames are for training, the last 80 for validation."""
    for name, part in (("train", slice(0, 320)), ("validate", slice(320, 400))):
        (folder / name / "set.000").mkdir(parents=True)
        for file in source.glob("*.raw"):
            (folder / name / file.name).write_text(file.read_text())
        for file in source.glob("set.000/*.npy"):
            np.save(folder / name / "set.000" / file.name, np.load(file)[part])


def dp_train(
    config: dict, clock: str, folder: Path, *options: str, trainer: str = "pt"
) -> tuple[Any, list[dict[str, str]]]:
    """Runs `dp --pt train` by code that prints CLOCK and JSON; returns that, and the rows of lcurve.out."""
    (folder / "input.json").write_text(json.dumps(config))
    command = [sys.executable, "-c", clock, f"--{trainer}", "train", "input.json", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    printed = [line for line in done.stdout.splitlines() if line.startswith("CLOCK")]
    if not printed:
        sys.exit(done.stderr)
    lines = (folder / "lcurve.out").read_text().splitlines()
    header, *rows = [line.split() for line in lines if "If there" not in line]
    return json.loads(printed[0].removeprefix("CLOCK")), [dict(zip(header[1:], row, strict=True)) for row in rows]


def set_threads(number: str) -> None:
    """Of dp, which is started afterwards."""
    for name in ("OMP_NUM_THREADS", "DP_INTRA_OP_PARALLELISM_THREADS", "DP_INTER_OP_PARALLELISM_THREADS"):
        os.environ[name] = number
    os.environ.setdefault("NUM_WORKERS", "0")  # of dp's data loader, whose threads sometimes fail in Python 3.11


def dp_input(type_map: list[str], sel: list[int], rcut: float, optimizer: dict, **training: Any) -> dict[str, Any]:
    """The input of a network [25, 25, 25] / [50, 50, 50]."""
    network = {"resnet_dt": False, "seed": 1, "precision": "float64"}
    return {
        "model": {
            "type_map": type_map,
            "descriptor": {
                "type": "se_e2_a",
                "sel": sel,
                "rcut": rcut,
                "rcut_smth": 0.5,
                "neuron": [25, 25, 25],
                "axis_neuron": 16,
                **network,
            },
            "fitting_net": {"neuron": [50, 50, 50], **network},
        },
        "learning_rate": {"type": "exp", "start_lr": 1e-3, "stop_lr": 1e-8},
        "loss": {"type": "ener", "start_pref_e": 0.02, "limit_pref_e": 1, "start_pref_f": 1000, "limit_pref_f": 1},
        "optimizer": optimizer,
        "training": {"seed": 1, "save_freq": 10**6, **training},
    }


def run(optimizer: dict, batches: int, folder: Path) -> dict[str, object]:
    config = dp_input(
        ["O", "H"],
        [46, 92],
        4.5,
        optimizer,
        training_data={"systems": ["train"], "batch_size": 1},
        validation_data={"systems": ["validate"], "batch_size": 1, "numb_btch": 10},
        numb_steps=batches,
        disp_freq=batches,
    )
    (seconds, share, updates), curve = dp_train(config, CLOCK, folder, "--skip-neighbor-stat")
    found = curve[-1]
    return {
        "batches": batches,
        "updates": updates,
        "s_batch": f"{seconds:.4g}",
        "share": f"{share:.3f}",
        "rmse_e": found["rmse_e_val"],
        "rmse_f": found["rmse_f_val"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of 400 frames of water with set.000")
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[1024, 5120])
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--only", default="", help="only optimizers whose name contains this")
    given = parser.parse_args()
    set_threads(os.environ.get("OMP_NUM_THREADS", "1"))
    where = {**machine(given.output), "threads": os.environ["OMP_NUM_THREADS"]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        split(given.data, folder)
        for size in given.block_sizes:
            asked = {
                "LKF": {"type": "LKF", "kf_blocksize": size},
                "RLEKF preset lkf": {"type": "RLEKF", "preset": "lkf", "block_size": size},
                "RLEKF float32, preset lkf": {
                    "type": "RLEKF",
                    "preset": "lkf",
                    "block_size": size,
                    "covariance_dtype": "float32",
                },
                "RLEKF preset robust": {"type": "RLEKF", "block_size": size},
            }
            for label, optimizer in asked.items():
                if given.only not in label:
                    continue
                batches = given.batches * 5 // 8 if label.endswith("robust") else given.batches  # 8 updates per batch
                row = {"optimizer": label, "block_size": size, **run(optimizer, batches, folder), **where}
                append(given.output, COLUMNS, [row])
                print(*(f"{row[column]}" for column in COLUMNS[:8]), sep="  ", flush=True)


if __name__ == "__main__":
    main()
