"""RLEKF and first-order rivals, by the time that each takes to the same accuracy, as rows.

    python benchmarks/race.py --data DIR [--systems Cu Si] [--network paper] [--estimate] [--full] [--workers 2]

All train the same network on its table, on all of the first 70 % of the frames of each set, one thread each, batches of
one frame; RLEKF has the defaults of `rlekf train`.

0. The time of a frame with each method, all in turn, with a small table and with a large one: the machine must be quiet
   for this, about a minute for each set. Later it need not be: the seconds of a run are the sum of these times, linear
   in the number of nodes that the table has by then.
1. RLEKF, three seeds, until neither of its validation errors has improved in the second half of the run so far (at most
   EPOCHS epochs, or `--limit` seconds). T is the median time of its best look, that with the smallest product of the
   two.
2. Each rival at three learning rates, for T seconds each, and at others, STEP times as high or as low, while the best
   on validation frames is the highest or the lowest (MOST_RATES at most). A rate starts where it is said, and falls
   exponentially to a thousandth of that.
3. The rival and rate with the smallest product on validation frames, for 10 T. With `--full`: all rivals, each at its
   best rate, and three seeds.

A row is one look at one run, at LOOKED_AT frames of each part; looks are at even steps of the logarithm of time. Rows
go to results/race.csv as each run ends, those of 0 to results/race_pace.csv. A second call continues where the first
stopped.
"""

from __future__ import annotations

import argparse
import csv
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_training import ERRORS, ROOT, STUDY, Run, available, config_of, load, num_training, significant
from rows import MACHINE, append, machine
from runs import Name, run_all
from study import validation
from torch import nn

from rlekf_ext.potential.evaluate import compare
from rlekf_ext.potential.input import JOINT_FRAMES
from rlekf_ext.potential.table import Table

RESULTS = ROOT / "benchmarks/results/race.csv"
PACES = ROOT / "benchmarks/results/race_pace.csv"
PACE_COLUMNS = ("system", "network", "method", "nodes", "ms", "cpu_ms", *MACHINE)  # of a frame
NODES = 128, 1024
ROUNDS, FRAMES_IN_ROUND = 7, 20
KEY = ("system", "network", "method", "rate", "seed", "times")  # times: how many T the run lasts; of RLEKF ""
COLUMNS = (*KEY, "epoch", "updates", "seconds", "cpu_seconds", *ERRORS[2:], *MACHINE)
RACED = ("Cu", "Si", "C", "Ag", "Mg", "NaCl", "Li", "Al", "MgAlCu", "H2O", "Cu+C", "EC", "LiGePS", "TiS2")
SEEDS = (1, 2, 3)
EPOCHS = 160
LIMIT = 180.0  # seconds
LOOKS_PER_DOUBLING = 3
FIRST_LOOK = 0.25  # seconds
LOOKED_AT = 80  # frames of a part at most, evenly spread
LONG = 10


class Together:
    """Several optimizers that share a learning rate, as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self._optimizers = optimizers
        self.param_groups: list[dict[str, Any]] = [{"lr": 0.0}]

    def zero_grad(self) -> None:
        for optimizer in self._optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.param_groups[0]["lr"]
            optimizer.step()


def muon(weights: list[nn.Parameter], rate: float) -> Together:
    """Muon for the matrices, AdamW for biases, first and last layers."""
    matrices = [w for w in weights if w.dim() == 2 and min(w.shape) > 1]
    others = [w for w in weights if w.dim() != 2 or min(w.shape) == 1]
    first = torch.optim.Muon(matrices, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return Together(first, torch.optim.AdamW(others, lr=rate, weight_decay=0.0, fused=True))


def soap(weights: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    from pytorch_optimizer import SOAP

    return SOAP(weights, lr=rate, weight_decay=0.0)


STEP, MOST_RATES = 4, 5
RIVALS: dict[str, tuple[Callable[[list[nn.Parameter], float], Any], tuple[float, ...]]] = {
    "Adam": (lambda weights, rate: torch.optim.Adam(weights, rate, fused=True), (5e-4, 2e-3, 8e-3)),
    "AdamW": (lambda weights, rate: torch.optim.AdamW(weights, rate, fused=True), (5e-4, 2e-3, 8e-3)),
    "Muon": (muon, (2e-3, 8e-3, 3.2e-2)),
    "SOAP": (soap, (5e-4, 2e-3, 8e-3)),
}
Rows = dict[Name, list[dict[str, str]]]  # the looks of each run


def run_of(
    system: str, network: str, method: str, rate: float, seed: int, data: Path, epochs: float
) -> tuple[Run, Any]:
    """A run, and the frames of each part."""
    parts = load(system, data, None)
    if method == "RLEKF":
        sections: dict[str, Any] = {"optimizer": {"type": "RLEKF"}, "batch_size": JOINT_FRAMES}
    else:
        sections = {"optimizer": {"type": "Adam"}, "learning_rate": {"start_lr": rate, "stop_lr": rate / 1000}}
    run = Run(config_of(system, network, sections, seed), parts["train"], epochs)
    if method != "RLEKF":
        run.optimize.optimizer = RIVALS[method][0](list(run.model.parameters()), rate)
    return run, parts


def measure_paces(system: str, network: str, nodes: int, data: Path) -> list[dict[str, Any]]:
    """The time of a frame with each method, as rows: the median over rounds in which they take turns."""
    torch.set_num_threads(1)
    rates = {"RLEKF": 0.0, **{method: rates[0] for method, (_, rates) in RIVALS.items()}}
    runs = {method: run_of(system, network, method, rate, 1, data, 1000.0)[0] for method, rate in rates.items()}
    for run in runs.values():
        run.model.table = Table(run.model.table.nodes.last, nodes)
    frames = {method: JOINT_FRAMES if method == "RLEKF" else 1 for method in runs}
    times: dict[str, list[tuple[float, float]]] = {method: [] for method in runs}
    for _ in range(ROUNDS + 1):
        for method, run in runs.items():
            started = time.perf_counter(), time.process_time()
            for _ in range(FRAMES_IN_ROUND // frames[method]):
                run.step()
            ended = time.perf_counter(), time.process_time()
            times[method].append((ended[0] - started[0], ended[1] - started[1]))
    where, rows = machine(), []
    for method, found in times.items():
        ms, cpu_ms = (significant(median(t) / FRAMES_IN_ROUND) for t in zip(*found[1:], strict=True))
        row = {"system": system, "network": network, "method": method, "nodes": nodes, "ms": ms, "cpu_ms": cpu_ms}
        rows.append({**row, **{name: where[name] for name in MACHINE}})
    return rows


@dataclass(frozen=True)
class Pace:
    """Seconds and CPU seconds of a frame, by the number of nodes of the table."""

    measured: dict[int, tuple[float, float]]

    def at(self, nodes: int) -> list[float]:
        (few, many), share = NODES, (nodes - NODES[0]) / (NODES[1] - NODES[0])
        return [a + share * (b - a) for a, b in zip(self.measured[few], self.measured[many], strict=True)]


Paces = dict[str, dict[str, Pace]]  # of each system and method


def read_paces(path: Path, network: str) -> Paces:
    found: Paces = {}
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if row["network"] == network:
                    pace = found.setdefault(row["system"], {}).setdefault(row["method"], Pace({}))
                    pace.measured[int(row["nodes"])] = float(row["ms"]) / 1e3, float(row["cpu_ms"]) / 1e3
    return found


def looks_of(key: tuple[Any, ...], data: Path, pace: Pace, seconds: float | None, limit: float) -> list[dict[str, Any]]:
    """The rows of a run. RLEKF, without `seconds`, has at most `limit`. A rival lasts this many seconds, or longer if
    its table grows: its learning rate is made to fall over a number of epochs."""
    torch.set_num_threads(1)
    system, network, method, rate, seed, _ = key
    where, num_frames = machine(), num_training(system, data, None)
    longest = limit if seconds is None else seconds
    epochs = max(1, round(longest / pace.at(NODES[0])[0])) / num_frames
    run, parts = run_of(system, network, method, rate, seed, data, min(epochs, EPOCHS) if seconds is None else epochs)
    rows, updates, spent, cpu, next_look = [], 0, 0.0, 0.0, FIRST_LOOK
    best = dict.fromkeys(("validation_E", "validation_F"), (math.inf, 0.0))  # on validation frames, and when that was
    for step in range(run.num_steps):
        updates += run.step()
        epoch = (step + 1) / run.per_epoch
        each = [num_frames / run.per_epoch * t for t in pace.at(run.model.table.nodes.number)]
        spent, cpu = spent + each[0], cpu + each[1]
        last = step + 1 == run.num_steps or (seconds is None and spent >= longest)
        if spent >= next_look or last:
            next_look = spent * 2 ** (1 / LOOKS_PER_DOUBLING)
            row: dict[str, Any] = {"epoch": round(epoch, 4), "updates": updates}
            row |= {"seconds": round(spent, 3), "cpu_seconds": round(cpu, 3)}
            for part in ("validation", "test"):
                frames = parts[part]
                found = compare(run.optimize.result, frames[:: -(-len(frames) // LOOKED_AT)])
                row[f"{part}_E"], row[f"{part}_F"] = significant(found.energy_rmse), significant(found.force_rmse)
            rows.append({**dict(zip(KEY, key, strict=True)), **row, **{name: where[name] for name in MACHINE}})
            best = {name: min(old, (row[name], spent)) for name, old in best.items()}
            improved = max(when for _, when in best.values())
            if last or (method == "RLEKF" and spent > 2 * improved and epoch > 2):
                break
        if (step + 1) % run.per_epoch == 0:
            run.refine()
    return rows


def read_rows(path: Path) -> Rows:
    found: Rows = {}
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                found.setdefault(tuple(row[name] for name in KEY), []).append(row)
    return found


def name_of(key: tuple[Any, ...]) -> Name:
    return tuple(map(str, key))


def end_of(key: tuple[Any, ...], rows: Rows) -> float:
    """The product of the validation errors at the end of a run; infinite if it has diverged."""
    found = validation(rows[name_of(key)][-1])
    return found if math.isfinite(found) else math.inf


def rates_tried(system: str, network: str, method: str, rows: Rows) -> list[tuple[Any, ...]]:
    """The short runs of a rival, in the order of their rates: another one while the best is the first or the last."""
    rates = RIVALS[method][1]
    while True:
        keys = [(system, network, method, rate, 1, 1) for rate in rates]
        if len(rates) == MOST_RATES or not all(name_of(key) in rows for key in keys):
            return keys
        best = min(keys, key=lambda key: end_of(key, rows))
        if best not in (keys[0], keys[-1]):
            return keys
        rates = (rates[0] / STEP, *rates) if best == keys[0] else (*rates, rates[-1] * STEP)


def jobs(system: str, network: str, rows: Rows, full: bool) -> Iterator[tuple[tuple[Any, ...], float | None]]:
    """The runs on a system as (key, seconds), of which the later ones need the rows of the earlier ones."""
    ours = [(system, network, "RLEKF", "", seed, "") for seed in SEEDS]
    yield from ((key, None) for key in ours)
    if not all(name_of(key) in rows for key in ours):
        return
    t = median(float(min(rows[name_of(key)], key=validation)["seconds"]) for key in ours)
    best = []
    for method in RIVALS:
        keys = rates_tried(system, network, method, rows)
        yield from ((key, t) for key in keys)
        if all(name_of(key) in rows for key in keys):
            best.append(min(keys, key=lambda key: end_of(key, rows)))
    if len(best) < len(RIVALS):
        return
    best.sort(key=lambda key: end_of(key, rows))
    for key in best if full else best[:1]:
        for seed in SEEDS if full else SEEDS[:1]:
            yield (*key[:4], seed, LONG), LONG * t


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "examples", help="folder of the sets; NaCl needs none")
    parser.add_argument("--systems", choices=RACED, nargs="+", default=RACED)
    parser.add_argument("--network", choices=list(STUDY["network"]), default="paper")
    parser.add_argument("--full", action="store_true", help="all rivals for 10 T, three seeds")
    parser.add_argument("--estimate", action="store_true", help="print the estimated time, and stop")
    parser.add_argument("--limit", type=float, default=LIMIT, help="the longest that RLEKF may train, in seconds")
    parser.add_argument("--workers", type=int, default=2, help="runs at once, each on one core")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--paces", type=Path, default=PACES)
    given = parser.parse_args()
    data, systems = given.data.resolve(), [s for s in given.systems if available(s, given.data)]
    machine(given.output)
    rows, known = read_rows(given.output), read_paces(given.paces, given.network)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for system, nodes in ((s, nodes) for s in systems for nodes in NODES):
            if any(nodes not in known.get(system, {}).get(method, Pace({})).measured for method in ("RLEKF", *RIVALS)):
                found = pool.submit(measure_paces, system, given.network, nodes, data).result()
                append(given.paces, PACE_COLUMNS, found)
    paces = read_paces(given.paces, given.network)
    for system in systems:
        print(
            system, ", ".join(f"{method} {1e3 * pace.at(NODES[0])[0]:.1f} ms" for method, pace in paces[system].items())
        )
    seconds = estimate(paces, systems, data, given.full, given.limit) / given.workers
    print(f"about {seconds / 3600:.1f} hours", flush=True)
    if given.estimate:
        return
    with ProcessPoolExecutor(given.workers, multiprocessing.get_context("spawn")) as pool:

        def waiting() -> Iterator[tuple[Name, Callable[..., Any], tuple[Any, ...]]]:
            every = (job for s in systems for job in jobs(s, given.network, rows, given.full))
            return (
                (name_of(key), looks_of, (key, data, paces[key[0]][key[2]], t, given.limit))
                for key, t in every
                if name_of(key) not in rows
            )

        def ended(name: Name, found: Any) -> None:
            if found is None:
                return
            append(given.output, COLUMNS, found)
            rows[name] = [{column: str(value) for column, value in row.items()} for row in found]
            end = "E {test_E} meV/atom, F {test_F} meV/Å, {seconds} s, epoch {epoch}".format(**found[-1])
            print(f"{' '.join(name)}: {end}", flush=True)

        done = run_all(pool, given.workers, waiting, ended)
    sys.exit(0 if done else 1)


def estimate(paces: Paces, systems: list[str], data: Path, full: bool, limit: float) -> float:
    """Seconds of one core of a quiet machine, if RLEKF stops after twelve epochs and its best look is at eight."""
    rates = sum(len(rates) for _, rates in RIVALS.values())
    total = 0.0
    for system in systems:
        epoch = paces[system]["RLEKF"].at(NODES[0])[0] * num_training(system, data, None)
        t = min(8 * epoch, limit)
        total += 1.5 * len(SEEDS) * t + (rates + LONG * (len(RIVALS) * len(SEEDS) if full else 1)) * t
    return total


if __name__ == "__main__":
    main()
