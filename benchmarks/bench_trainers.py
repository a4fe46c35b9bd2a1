"""The time of a batch in the real DeePMD-kit, in both of its PyTorch trainers, with its optimizers and with RLEKF.

Runs in the environment of `make test-deepmd`, on a quiet machine, a quarter of an hour:

    .venv-deepmd/bin/python benchmarks/bench_trainers.py --data DIR

Copper (72 atoms, the paper's network) and water (192 atoms, r_c 6 Å, [25, 25, 25] / [50, 50, 50]), N_b = 1024, one
frame per batch, and four for Adam and RLEKF with our network. RLEKF makes 8 updates per frame (4 of energies, 4 of
forces), with DeePMD-kit's own network and with ours. Rows go to results/deepmd_trainers.csv: the median time of a
batch, without the first three.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from bench_deepmd import dp_input, dp_train, set_threads
from bench_training import ROOT
from rows import MACHINE, append, machine

RESULTS = ROOT / "benchmarks/results/deepmd_trainers.csv"
KEY = ("system", "trainer", "optimizer", "network", "frames")
COLUMNS = (*KEY, "ms_batch", "batches", *MACHINE)
SYSTEMS: dict[str, dict[str, Any]] = {
    "Cu": {"folder": "Cu/pwmlff_aimd_72", "type_map": ["Cu"], "sel": [100], "rcut": 6.0},
    "H2O": {"folder": "H2O/deepmd_water_192", "type_map": ["O", "H"], "sel": [46, 92], "rcut": 6.0},
}
TRAINERS = {"pt": "deepmd.pt.train.training", "pt-expt": "deepmd.pt_expt.train.training"}
OPTIMIZERS: dict[tuple[str, str], dict[str, Any]] = {
    ("Adam", "dp"): {"type": "Adam"},
    ("HybridMuon", "dp"): {"type": "HybridMuon"},
    ("LKF", "dp"): {"type": "LKF", "kf_blocksize": 1024},
    ("RLEKF", "dp"): {"type": "RLEKF", "block_size": 1024, "network": "dp"},
    ("RLEKF", "ours"): {"type": "RLEKF", "block_size": 1024},
}
WITH_FRAMES = {1: tuple(OPTIMIZERS), 4: (("Adam", "dp"), ("RLEKF", "ours"))}
CLOCK = """
import importlib, json, time
importlib.import_module("{package}")
module = importlib.import_module("{module}")
draw, started, running = getattr(module.Trainer, "{draw}"), [], []
def marked(self, *args, **kwargs):
    if running and kwargs.get("is_train", True):
        started.append(time.perf_counter())
    return draw(self, *args, **kwargs)
setattr(module.Trainer, "{draw}", marked)
run = module.Trainer.run
def runs(self, *args):
    running.append(True)  # batches of the prior come before
    return run(self, *args)
module.Trainer.run = runs
from deepmd.main import main
main()
print("CLOCK", json.dumps([b - a for a, b in zip(started, started[1:])]))
"""


def times(system: str, trainer: str, optimizer: dict[str, Any], frames: int, batches: int, data: Path) -> list[float]:
    own = SYSTEMS[system]
    config = dp_input(
        own["type_map"],
        own["sel"],
        own["rcut"],
        optimizer,
        training_data={"systems": [str(data / own["folder"])], "batch_size": frames},
        numb_steps=batches,
        disp_freq=10**6,
    )
    module = TRAINERS[trainer]
    draw = "get_data" if trainer == "pt-expt" else "_next_training_batch"
    clock = CLOCK.replace("{package}", module.split(".train.")[0])
    clock = clock.replace("{module}", module).replace("{draw}", draw)
    with tempfile.TemporaryDirectory() as folder:
        found, _ = dp_train(config, clock, Path(folder), "--skip-neighbor-stat", trainer=trainer)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets")
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--threads", nargs="+", default=["1", "2"])
    parser.add_argument("--frames", nargs="+", type=int, choices=list(WITH_FRAMES), default=list(WITH_FRAMES))
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument(
        "--only", default="", help="only optimizers whose name, or the name of their network, contains this"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    where = machine(given.output)
    runs = itertools.product(given.threads, given.systems, given.frames, OPTIMIZERS, TRAINERS)
    for threads, system, frames, name, trainer in runs:
        if (name[0] == "LKF" and trainer != "pt") or name not in WITH_FRAMES[frames]:
            continue
        if given.only not in " ".join(name):
            continue
        set_threads(threads)
        batches = 10 if name[0] == "LKF" else given.batches
        found = times(system, trainer, OPTIMIZERS[name], frames, batches, given.data.resolve())[3:]
        row = dict(zip(KEY, (system, trainer, *name, frames), strict=True))
        row |= {"ms_batch": f"{1e3 * median(found):.4g}", "batches": len(found)}
        append(given.output, COLUMNS, [{**row, **where, "threads": threads}])
        print(*row.values(), threads, sep="  ", flush=True)


if __name__ == "__main__":
    main()
