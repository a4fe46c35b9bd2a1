"""The study of the paper on real data: all runs of study.toml that have no rows yet.

    python benchmarks/study.py [--data DIR] [--plan small | parts | noise | long | time | full]
    [--estimate] [--workers 2]

Rows go to benchmarks/results/study.csv as each run ends, so an interrupted study continues where it stopped; systems
without a folder in DIR are left out. Other plans than `small` have rows of their own, in study_PLAN.csv: `parts`, of
each part of the first default, and of the table; `noise`, of measurement noise and prior; `long`, of long runs on all
systems; `time`, of what alters the time of a frame; `full`, the study at the size of the paper. All begin with an
estimate of the time, from three batches of each kind of run; `--estimate` stops there.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_training import (
    COLUMNS,
    KEY,
    ROOT,
    STUDY,
    SYSTEMS,
    Run,
    available,
    base_of,
    config_of,
    load,
    method_of,
    num_training,
    rows_of,
)
from rows import append, machine
from runs import Name, run_all

from rlekf_ext.potential.evaluate import Comparison

PARITY = ("system", "network", "method", "seed", "kind", "label", "prediction")
POINTS = 200
TIMED = 3  # batches
PLANS = ("small", "parts", "noise", "long", "time", "full")
Rows = dict[tuple[str, ...], dict[str, str]]  # the last row of each run that is done


@dataclass(frozen=True)
class Job:
    """One run: what identifies it, as in its rows, and how often it is evaluated."""

    key: tuple[Any, ...]
    looks: int
    parity: bool = False  # whether predictions are kept

    @property
    def name(self) -> tuple[str, ...]:
        return tuple("" if part is None else str(part) for part in self.key)

    @property
    def kind(self) -> tuple[str, str, str]:
        """System, network and a method that takes as long per batch."""
        system, network, label = self.key[:3]
        if label.startswith("Adam"):
            label = "Adam 2e-3"
        return system, network, label if label in STUDY["cost"] | STUDY["groups"] else base_of(label)

    def num_batches(self, data: Path) -> float:
        system, _, label, _, most, epochs = self.key
        return num_training(system, data, most) * epochs / method_of(label).get("batch_size", 1)


def read_rows(path: Path) -> Rows:
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {
            tuple(row[name] for name in KEY): row
            for row in csv.DictReader(file)
            if float(row["epoch"]) > float(row["epochs"]) - 1e-3
        }


def jobs(plan: list[dict[str, Any]], data: Path, rows: Rows, guess: bool = False) -> Iterator[Job]:
    """The runs of a plan, including those that are done.

    In a tuned group, the seeds after the first come once the best method is known; `guess`: any method will do.
    """
    for group in plan:
        labels = group["methods"] if isinstance(group["methods"], list) else list(STUDY[group["methods"]])
        systems = list(SYSTEMS) if group["systems"] == "all" else group["systems"]
        first, *others = group["seeds"]
        for system in systems:
            if not available(system, data):
                continue
            keep = group.get("parity", False)
            trials = {label: job_of(group, system, label, first, keep) for label in labels}
            yield from trials.values()
            chosen = labels
            if group.get("tuned"):
                known = all(trial.name in rows for trial in trials.values())
                best = min(labels, key=lambda label: validation(rows[trials[label].name])) if known else labels[0]
                chosen = [best] if known or guess else []
            for seed in others:
                yield from (job_of(group, system, label, seed) for label in chosen)


def job_of(group: dict[str, Any], system: str, label: str, seed: int, keep: bool = False) -> Job:
    epochs = group["epochs"]
    epochs = epochs[label] if isinstance(epochs, dict) else epochs
    return Job((system, group["network"], label, seed, group.get("frames"), epochs), group["looks"], keep)


def validation(row: dict[str, str]) -> float:
    """What settings are chosen by: energy and force error on the validation frames, with equal weight."""
    return float(row["validation_E"]) * float(row["validation_F"])


def do(job: Job, data: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the run, and of its predictions."""
    key = dict(zip(KEY, job.key, strict=True))
    rows, found = rows_of(key, method_of(key["method"]), data, job.looks)
    return rows, list(parity(key, found)) if job.parity else []


def parity(key: dict[str, Any], found: Comparison) -> Iterator[dict[str, Any]]:
    """At most POINTS labels and predictions of a kind, evenly chosen: meV/atom about the mean label, and meV/Å."""
    mean = found.energy[:, 0].mean()
    for kind, points in (("E", found.energy - mean), ("F", found.force)):
        for label, prediction in 1e3 * points[:: -(-len(points) // POINTS)]:
            named = {name: key[name] for name in PARITY[:4]}
            yield {**named, "kind": kind, "label": f"{label:.5g}", "prediction": f"{prediction:.5g}"}


def pace(kind: tuple[str, str, str], data: Path) -> float:
    """Seconds per batch, without the first, which takes longer."""
    torch.set_num_threads(1)
    system, network, label = kind
    run = Run(config_of(system, network, method_of(label), seed=1), load(system, data, 8)["train"], epochs=TIMED)
    run.step()
    started = time.perf_counter()
    for _ in range(TIMED):
        run.step()
    return (time.perf_counter() - started) / TIMED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "examples", help="folder of the sets; NaCl needs none")
    parser.add_argument("--plan", choices=PLANS, default=PLANS[0], help="which runs of study.toml")
    parser.add_argument("--estimate", action="store_true", help="print the estimated time, and stop")
    parser.add_argument("--workers", type=int, default=2, help="runs at once, each on one core")
    parser.add_argument("--output", type=Path, help="rows (default: benchmarks/results/study[_PLAN].csv)")
    given = parser.parse_args()
    data, plan = given.data.resolve(), STUDY[given.plan]
    output = given.output or ROOT / f"benchmarks/results/study{'' if given.plan == PLANS[0] else f'_{given.plan}'}.csv"

    if not given.estimate:
        machine(output)
    rows = read_rows(output)
    todo = [job for job in jobs(plan, data, rows, guess=True) if job.name not in rows]
    if not todo:
        print(f"All runs with data in {data} have rows in {output}.")
        return
    with ProcessPoolExecutor(given.workers, multiprocessing.get_context("spawn")) as pool:
        kinds = sorted({job.kind for job in todo})
        print(f"{len(todo)} runs to do; timing {TIMED} batches of each of {len(kinds)} kinds:", flush=True)
        paces = dict(zip(kinds, pool.map(pace, kinds, [data] * len(kinds)), strict=True))
        seconds = {job.name: paces[job.kind] * job.num_batches(data) / given.workers for job in todo}
        left = sum(seconds.values())
        print(f"about {left / 3600:.1f} hours, {given.workers} runs at once", flush=True)
        if given.estimate:
            return

        def waiting() -> Iterator[tuple[Name, Callable[..., Any], tuple[Any, ...]]]:
            return ((job.name, do, (job, data)) for job in jobs(plan, data, rows) if job.name not in rows)

        def ended(name: Name, result: Any) -> None:
            nonlocal left
            left -= seconds.get(name, 0.0)
            if result is None:
                return
            found, points = result
            append(output, COLUMNS, found)
            append(output.with_name(f"{output.stem}_parity.csv"), PARITY, points)
            rows[name] = {column: str(value) for column, value in found[-1].items()}
            errors = "E {test_E} meV/atom, F {test_F} meV/Å after {cpu_seconds} s".format(**found[-1])
            print(f"{' '.join(name)}: {errors}; {max(left, 0) / 60:.0f} minutes left", flush=True)

        done = run_all(pool, given.workers, waiting, ended)
    sys.exit(0 if done else 1)


if __name__ == "__main__":
    main()
