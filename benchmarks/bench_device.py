"""Training on a GPU, or on a CPU, as rows: the time of a frame, and errors as time goes by.

    python benchmarks/bench_device.py [--device cuda] [--data DIR] [--systems Cu H2O] [--seconds 30] [--output rows.csv]

RLEKF with the defaults of `rlekf train`, on a GPU also without the network's kernels, and Adam in batches of one frame,
on all of the first 70 % of the frames of a set. Each trains for that long; a row is one epoch of it: the seconds of
training so far, the time of a frame in this epoch, and the errors on test frames. Times end when the device has done
what was asked of it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bench_step import Gpu
from bench_training import ROOT, SYSTEMS, Run, available, config_of, load, significant
from rows import MACHINE, append, machine

from rlekf_ext.ops import find_device
from rlekf_ext.potential.evaluate import compare
from rlekf_ext.potential.input import JOINT_FRAMES

RESULTS = ROOT / "benchmarks/results/training_device.csv"
IN_TORCH = "RLEKF, network in torch"  # without its kernels: only of interest on a GPU
METHODS: dict[str, dict[str, Any]] = {
    "RLEKF": {"optimizer": {"type": "RLEKF"}, "batch_size": JOINT_FRAMES},
    IN_TORCH: {"optimizer": {"type": "RLEKF"}, "batch_size": JOINT_FRAMES},
    "Adam": {"optimizer": {"type": "Adam"}, "learning_rate": {"start_lr": 2e-3, "stop_lr": 2e-6}},
}
EPOCHS, ADAM_EPOCHS = 40.0, 400.0  # at most; the learning rate of Adam falls over as many
KEY = ("system", "network", "method", "device")
COLUMNS = (*KEY, "epoch", "seconds", "ms_per_frame", "test_E", "test_F", "gpu", "driver", "cuda", *MACHINE)


def rows_of(system: str, network: str, method: str, device: torch.device, data: Path, seconds: float) -> list[dict]:
    where: dict[str, Any] = {**machine(), **(Gpu().facts() if device.type == "cuda" else {})}
    parts = load(system, data, None)
    config = config_of(system, network, METHODS[method], 1)
    os.environ["RLEKF_NETWORK_KERNELS"] = "0" if method == IN_TORCH else "1"
    epochs = ADAM_EPOCHS if method == "Adam" else EPOCHS
    run = Run(config, parts["train"], epochs, device=device)
    run.step()  # what is made only once
    spent, rows = 0.0, []
    for epoch in range(round(epochs)):
        wait_for(device)
        started = time.perf_counter()
        run.epoch()
        wait_for(device)
        took = time.perf_counter() - started
        spent += took
        found = compare(run.optimize.result, parts["test"])
        row = {
            "epoch": epoch + 1,
            "seconds": round(spent, 3),
            "ms_per_frame": f"{1e3 * took / len(parts['train']):.4g}",
        }
        row |= {"test_E": significant(found.energy_rmse), "test_F": significant(found.force_rmse)}
        key = dict(zip(KEY, (system, network, method, device.type), strict=True))
        rows.append({**key, **row, **{name: where.get(name, "") for name in COLUMNS[-len(MACHINE) - 3 :]}})
        if spent > seconds:
            break
    return rows


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cpu or cuda (a GPU if there is one)")
    parser.add_argument("--data", type=Path, default=ROOT / "examples", help="folder of the sets; NaCl needs none")
    parser.add_argument("--systems", choices=list(SYSTEMS), nargs="+", default=["Cu", "H2O", "NaCl"])
    parser.add_argument("--network", default="paper")
    parser.add_argument("--seconds", type=float, default=30.0, help="of training with each method")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    machine(given.output)
    device, data, failed = find_device(given.device), given.data.resolve(), []
    for system in given.systems:
        if not available(system, data):
            print(f"{system}: not in {data}")
            continue
        for method in METHODS:
            if method == IN_TORCH and device.type == "cpu":
                continue
            try:
                found = rows_of(system, given.network, method, device, data, given.seconds)
            except Exception as error:  # a GPU may not be free again soon: the others continue
                failed.append(f"{system} {method}: {type(error).__name__}: {error}")
                continue
            append(given.output, COLUMNS, found)
            best = min(row["test_F"] for row in found)
            until = next(row["seconds"] for row in found if row["test_F"] <= 1.2 * best)
            text = "{system} {method} on {device}: {ms_per_frame} ms per frame, epoch {epoch}, {seconds} s".format(
                **found[-1]
            )
            print(f"{text}; F {best} meV/Å, within 1.2 times that after {until} s", flush=True)
    if failed:
        sys.exit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
