"""When float32 storage of P loses positive definiteness in training, and when its guard warns. `make soak` runs it.

    python benchmarks/bench_storage.py [--updates 6000] [--output rows.csv]

NaCl as in the demo, but with the settings of the paper, which forget much more than the default. A row, every 250
updates, has the condition number that `guard_storage` sees and the exact extreme eigenvalues of all blocks.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path

import torch
from rows import MACHINE, append, machine

from rlekf_ext.potential.batches import load_frames
from rlekf_ext.potential.input import read_input
from rlekf_ext.potential.optimizers import build_optimizer
from rlekf_ext.potential.train import build_model
from rlekf_ext.updates import UPDATES_PER_GUARD

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results/storage.csv"
COLUMNS = ["updates", "condition seen", "condition", "smallest eigenvalue", "largest eigenvalue", "guard", *MACHINE]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=6000)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    output, common = arguments.output.resolve(), machine(arguments.output)
    os.chdir(HERE.parent / "examples/nacl")
    given = json.loads(Path("rlekf.json").read_text())
    options = {"type": "RLEKF", "block_size": 1024, "preset": "paper", "covariance_dtype": "float32"}
    config = read_input({**given, "optimizer": options})
    training, _ = load_frames(config, quiet=True)
    model = build_model(config, training.every)
    batches = training.batches(config.training.seed or 0)
    optimize = build_optimizer(config, model, 1, say=lambda _: None)
    done, shown = 0, 0
    while done < arguments.updates:
        done += optimize(next(batches), 0)
        if done - shown < UPDATES_PER_GUARD:
            continue
        shown = done
        kalman = optimize.optimizer.filter
        values = [torch.linalg.eigvalsh(block) for block in kalman.covariance.dense()]
        smallest, largest = min(float(v[0]) for v in values), max(float(v[-1]) for v in values)
        row = {
            "condition seen": kalman.diagnostics().condition,
            "condition": largest / smallest if smallest > 0 else math.inf,
            "smallest eigenvalue": smallest,
            "largest eigenvalue": largest,
        }
        row = {name: f"{value:.3e}" for name, value in row.items()}
        said = "speaks" if kalman.guard_storage() else ""
        print(f"{done:6d} updates" + "".join(f"   {name} {value}" for name, value in row.items()), said, flush=True)
        append(output, COLUMNS, [{"updates": done, **row, "guard": said, **common}])
        if smallest <= 0:
            break


if __name__ == "__main__":
    main()
