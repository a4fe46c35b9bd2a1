"""Time of one measurement in passes of 1, 2, 4 and 8, as rows.

    python benchmarks/bench_passes.py [--beside CHECKOUT] [--threads 1] [--rounds 3]

Blocks of the paper's network and of the small one, for one element. A time is that of whole fold cycles, divided by
their measurements; the median over rounds, each in a process of its own, in turn with those of another checkout, whose
library is built in place.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import torch
from rows import MACHINE, RESULTS, ROOT, append, commit, machine

COLUMNS = ("weights", "block_size", "dtype", "measurements", "ms", *MACHINE)
CASES = [(26551, 1024), (26551, 2048), (2321, 1024)]  # numbers of weights, N_b
MEASUREMENTS = (1, 2, 4, 8)
MANY = 64  # measurements in a timing: two fold cycles


def time_all(threads: int) -> None:
    """Print a line for each case: its names, and ms per measurement."""
    from rlekf_ext.filter import KalmanFilter
    from rlekf_ext.partition import partition

    torch.set_num_threads(threads)
    for weights, block_size in CASES:
        for dtype in ("float64", "float32"):
            plan = partition([weights], block_size)
            for count in MEASUREMENTS:
                filter_ = KalmanFilter(plan, memory_factor=0.998, measurement_noise=1.0, covariance_dtype=dtype)
                jacobian = 0.1 * torch.randn(MANY, weights, dtype=torch.float64)
                innovation, out = torch.rand(MANY, dtype=torch.float64), torch.zeros(weights, dtype=torch.float64)
                found = []
                for _ in range(6):
                    started = time.perf_counter()
                    for first in range(0, MANY, count):
                        rows = slice(first, first + count)
                        filter_.update(jacobian[rows], innovation[rows], out=out)
                    found.append(1e3 * (time.perf_counter() - started) / MANY)
                print(weights, block_size, dtype, count, median(found[1:]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", type=Path, metavar="CHECKOUT", help="time another checkout, too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "passes.csv")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    where = machine(given.output)
    times: dict[tuple[str, ...], list[float]] = defaultdict(list)
    checkouts = [path.resolve() for path in (given.beside, ROOT) if path]
    code = f"import bench_passes; bench_passes.time_all({given.threads})"
    for _ in range(given.rounds):
        for checkout in checkouts:
            path = os.pathsep.join([str(checkout), str(ROOT / "benchmarks")])
            where_to = {
                "cwd": checkout,
                "env": {**os.environ, "PYTHONPATH": path},
            }  # python -c looks in its folder first
            lines = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, **where_to)
            for line in lines.stdout.splitlines():
                *case, ms = line.split()
                times[(*case, commit(checkout))].append(float(ms))
    for (*case, of_sources), found in times.items():
        row = dict(zip(COLUMNS, (*case, f"{median(found):.3f}"), strict=False))
        append(given.output, COLUMNS, [{**row, **where, "commit": of_sources}])
        print(*row.values(), of_sources, sep="   ")


if __name__ == "__main__":
    main()
