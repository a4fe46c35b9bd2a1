"""How several frames per batch affect convergence, as rows: the same epochs with 1, 4, 8 and 16 frames, "mean", "sum"
and "joint".

    python benchmarks/bench_batches.py [--data DIR] [--systems NaCl Cu] [--seeds 1 2] [--output FILE]

Frames divided over processes give the weights of one process (test_updates_on_processes.py), so one process
shows what several processes would learn. A run that was stopped continues.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from statistics import median

from bench_training import COLUMNS, KEY, ROOT, available, method_of, rows_of
from rows import append, machine
from rows import table as markdown

RESULTS = ROOT / "benchmarks/results/batches.csv"
BATCHES = [(1, "mean"), *((size, batch) for size in (4, 8, 16) for batch in ("mean", "sum", "joint"))]
SYSTEMS = ("NaCl", "Al", "Li", "Si", "Cu")
FRAMES, EPOCHS = 100, 6


def label(size: int, batch: str) -> str:
    return "1 frame" if size == 1 else f"{size} frames, {batch}"


def read(path: Path) -> dict[tuple[str, str, str], dict[str, str]]:
    """The last row of each run, by system, method and seed."""
    with path.open(newline="") as file:
        return {(row["system"], row["method"], row["seed"]): row for row in csv.DictReader(file)}


def table(path: Path) -> str:
    """Energy and force RMSE on test frames at the end, medians over the seeds."""
    rows = read(path).values()
    systems = [name for name in SYSTEMS if any(row["system"] == name for row in rows)]
    lines = []
    for size, batch in BATCHES:
        cells = []
        for name in systems:
            own = [row for row in rows if (row["system"], row["method"]) == (name, label(size, batch))]
            pair = (median(float(row[f"test_{kind}"]) for row in own) for kind in "EF")
            cells.append(" / ".join(f"{value:.3g}" for value in pair) if own else "")
        lines.append([label(size, batch), *cells])
    return markdown(["E meV/atom / F meV/Å", *systems], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "examples", help="folder of the sets; NaCl needs none")
    parser.add_argument("--systems", nargs="+", default=SYSTEMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    machine(given.output)
    base = method_of("first default")
    done = read(given.output) if given.output.exists() else {}
    for seed in given.seeds:
        for name in given.systems:
            for size, batch in BATCHES:
                if (name, label(size, batch), str(seed)) in done or not available(name, given.data):
                    continue
                method = {**base, "optimizer": {**base["optimizer"], "batch": batch}, "batch_size": size}
                key = dict(zip(KEY, (name, "small", label(size, batch), seed, FRAMES, EPOCHS), strict=True))
                rows, _ = rows_of(key, method, given.data, EPOCHS)
                append(given.output, COLUMNS, rows)
                print(*(f"{name} {rows[-1][name]}" for name in (*KEY[:4], "seconds", "test_E", "test_F")), flush=True)
    print(table(given.output))


if __name__ == "__main__":
    main()
