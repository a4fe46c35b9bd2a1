"""Data of any size: how soon training starts, in how much memory, and what frames cost that are made when needed.

    python benchmarks/bench_data.py --data DIR [--frames 200000] [--network paper] [--cache 0.5] [--pairs 10]

First the water set, repeated and rattled, is written in float32 to a temporary folder (1 GB for 200 000 frames), and
`rlekf train` runs two batches on it, twice: the second time it restarts, and reads the survey that the first has left.
A row has the seconds until the first batch, the most memory that was resident, and that of P and of the cache. Then the
trainer takes turns between frames that are all kept and frames that are made for every batch, one thread each besides
the thread that makes frames: ms per frame, medians. Rows go to results/data.csv, tables to docs/training_data.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from bench_training import ROOT, STUDY, SYSTEMS, chosen, config_of, folder
from plot_step import read
from rows import MACHINE, append, fill, machine, table

from rlekf_ext.potential.batches import Batches
from rlekf_ext.potential.checkpoint import load_checkpoint
from rlekf_ext.potential.frames import Cache, FrameList
from rlekf_ext.potential.load import load_systems
from rlekf_ext.potential.optimizers import build_optimizer
from rlekf_ext.potential.train import build_model, build_table, feed_of

RESULTS = ROOT / "benchmarks/results/data.csv"
PAGE = ROOT / "docs/training_data.md"
COLUMNS = ["case", "network", "frames", "atoms", "disk_GB", "start_s", "peak_GB", "P_GB", "cache_GB", "ms", *MACHINE]
SYSTEM, FRAMES_IN_A_SET, BATCH_SIZE, AT_ONCE = "H2O", 2000, 4, 10


def write_frames(source: Path, target: Path, count: int) -> float:
    """Rattled copies of the frames of a deepmd/npy folder; returns the GB that they take."""
    (system,) = load_systems(source, SYSTEMS[SYSTEM]["elements"])
    random = np.random.default_rng(0)
    target.mkdir()
    for name in ("type.raw", "type_map.raw"):
        (target / name).write_bytes((source / name).read_bytes())
    for first in range(0, count, FRAMES_IN_A_SET):
        own = target / f"set.{first // FRAMES_IN_A_SET:03}"
        own.mkdir()
        some = np.arange(first, min(first + FRAMES_IN_A_SET, count)) % len(system)
        points = np.asarray(system.coordinates)[some]
        for name, array in (
            ("coord", points + random.normal(0, 0.01, points.shape)),
            ("box", system.boxes[some]),
            ("energy", system.energies[some]),
            ("force", np.asarray(system.forces)[some]),
        ):
            np.save(own / f"{name}.npy", array.reshape(len(some), -1).astype(np.float32))
    return sum(file.stat().st_size for file in target.rglob("*.npy")) / 1e9


def start(work: Path, network: str, cache: float, *options: str) -> dict[str, float]:
    """Seconds until the first batch, and GB, of `rlekf train` in this folder."""
    net, asked = STUDY["network"][network], SYSTEMS[SYSTEM]
    descriptor = {"rcut": asked["cutoff"], "neuron": net["neuron"], "axis_neuron": net["axis_neuron"]}
    training = {
        "training_data": {"systems": "data"},
        "validation_data": {"systems": "validation"},
        "numb_steps": 2 if options else 1,
        "cache": cache,
    }
    model = {"type_map": asked["elements"], "descriptor": descriptor, "fitting_net": {"neuron": net["fitting"]}}
    (work / "input.json").write_text(json.dumps({"model": model, "training": training}))
    before = _seconds(work)
    started = time.monotonic()
    command = [
        sys.executable,
        "-c",
        "import sys; from rlekf_ext.cli import main; sys.exit(main())",
        "train",
        "input.json",
    ]
    process = subprocess.Popen([*command, *options], cwd=work)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"rlekf train ended with {status}.")
    whole = time.monotonic() - started
    tiles = load_checkpoint(work / "model.ckpt.pt")["optimizer"]["filter"]["state"][0]["tiles"]
    return {
        "start_s": round(whole - (_seconds(work) - before), 1),
        "peak_GB": round(usage.ru_maxrss * 1024 / 1e9, 3),
        "P_GB": round(tiles.numel() * tiles.element_size() / 1e9, 3),
        "cache_GB": cache,
    }


def _seconds(work: Path) -> float:
    summary = work / "lcurve.out.json"
    return json.loads(summary.read_text())["seconds"] if summary.exists() else 0.0


class Trainer:
    """RLEKF on the training frames of the set."""

    def __init__(self, data: Path, network: str, kept: bool):
        config = config_of(SYSTEM, network, {"optimizer": {"type": "RLEKF"}}, seed=1)
        asked = config.model.architecture()
        cache = Cache(1e12 if kept else 0)
        frames = FrameList(chosen(SYSTEM, data, None)["train"], asked.descriptor.rcut, len(asked.type_map), cache=cache)
        frames.look(asked.descriptor.rcut_smth)
        self.model = build_model(config, frames)
        self.optimize = build_optimizer(config, self.model, 1000)
        self.optimize.start(frames.spread(20))
        self.model.table = build_table(self.model, [frames])
        batches = Batches([part for _, part in frames.parts()], [BATCH_SIZE] * len(frames.parts()), seed=1)
        self.feed, self.step = feed_of(batches, self.optimize, self.model), 0
        for _ in frames if kept else ():
            pass

    def train(self, count: int) -> float:
        """Train on this many batches; ms per frame."""
        started = time.perf_counter()
        for _ in range(count):
            batch, made = next(self.feed)
            self.optimize(batch, self.step, made)
            self.step += 1
        return (time.perf_counter() - started) * 1e3 / (count * BATCH_SIZE)


def starts() -> str:
    """How soon training starts."""
    lines = []
    for row in _latest("start_s"):
        disk, peak, p, cache = (f"{float(row[name]):.2g} GB" for name in ("disk_GB", "peak_GB", "P_GB", "cache_GB"))
        what = f"{int(row['frames']):,}".replace(",", " ") + f" frames of {row['atoms']} atoms"
        lines.append([row["case"], what, disk, f"{float(row['start_s']):.0f} s", peak, p, cache])
    return table(["", "", "on disk", "first batch after", "resident at most", "of it P", "cache"], lines)


def speeds() -> str:
    """What it costs to make frames."""
    lines = [[row["case"], f"{float(row['ms']):.1f} ms"] for row in _latest("ms")]
    return table(
        ["frames of water (192 atoms), the paper's network, one thread and one that makes frames", "a frame"], lines
    )


def _latest(column: str) -> list[dict[str, str]]:
    """The latest row of each case that has a value there."""
    return list({row["case"]: row for row in read(RESULTS.name) if row[column]}.values())


TABLES = {"data start": starts, "data speed": speeds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets")
    parser.add_argument("--frames", type=int, default=200_000)
    parser.add_argument("--network", default="paper", choices=list(STUDY["network"]))
    parser.add_argument("--cache", type=float, default=0.5, help="GB, of the runs that start")
    parser.add_argument("--pairs", type=int, default=10, help="turns of ten batches, with and without kept frames")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    where = machine(given.output)
    source = folder(given.data, SYSTEMS[SYSTEM]["folders"][0])
    (system,) = load_systems(source, SYSTEMS[SYSTEM]["elements"])
    common: dict[str, Any] = {"network": given.network, "atoms": len(system.types)}

    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        disk = write_frames(source, work / "data", given.frames)
        write_frames(source, work / "validation", 10)
        for case, options in (("start", ()), ("restart", ("--restart",))):
            found = start(work, given.network, given.cache, *options)
            row = {"case": case, **common, "frames": given.frames, "disk_GB": round(disk, 3), **found}
            append(given.output, COLUMNS, [{**row, **where}])
            print(row)

    torch.set_num_threads(1)
    trainers = {case: Trainer(given.data, given.network, case == "kept") for case in ("kept", "made for every batch")}
    found: dict[str, list[float]] = {case: [] for case in trainers}
    for turn in range(given.pairs + 1):
        for case in list(trainers)[:: 1 if turn % 2 else -1]:
            ms = trainers[case].train(AT_ONCE)
            found[case] += [ms] if turn else []  # the first turn warms up
    for case, times in found.items():
        row = {"case": case, **common, "frames": sum(map(len, chosen(SYSTEM, given.data, None)["train"]))}
        append(given.output, COLUMNS, [{**row, "ms": round(median(times), 2), **where, "threads": 1}])
        print(f"{case:<22}{median(times):8.2f} ms per frame")
    if given.output == RESULTS:
        PAGE.write_text(fill(PAGE.read_text(), TABLES))


if __name__ == "__main__":
    main()
