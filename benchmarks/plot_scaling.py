"""docs/scaling.md's tables, from rows of bench_sharded.py and bench_batches.py and from a model of a sharded step.

    python benchmarks/plot_scaling.py

The model of a step of M measurements on W processes, in seconds:

    own      P_bytes / (W memory) (1 + extra (M - 1))      the process's own tiles, read once
    vectors  M N vector                                    what every process does with all N weights
    reduce   latency + 8 M N bytes / network                one all_reduce

Its constants are fitted to the rows of one and two processes.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import bench_batches
import numpy as np
from rows import fill, table

ROOT = Path(__file__).resolve().parents[1]
PAGE, ROWS = ROOT / "docs/scaling.md", ROOT / "benchmarks/results/sharded.csv"
MOST = 2  # processes: this machine's cores, which more would share


def rows_of(kind: str) -> list[dict[str, Any]]:
    with ROWS.open(newline="") as file:
        found = [row for row in csv.DictReader(file) if row["kind"] == kind and int(row["processes"]) <= MOST]
    return [
        {name: float(value) if value and is_number(value) else value for name, value in row.items()} for row in found
    ]


def is_number(text: str) -> bool:
    return text.replace(".", "", 1).replace("e-", "", 1).isdigit()


def fitted() -> dict[str, float]:
    """The model's constants on this machine, by least squares of relative errors over one and two processes."""
    rows = [row for kind in ("strong", "weak") for row in rows_of(kind)]

    def solve(columns: list[list[float]], values: list[float]) -> np.ndarray:
        a, b = np.array(columns), np.array(values)
        return np.linalg.lstsq(a / b[:, None], np.ones(len(b)), rcond=None)[0]

    own = solve([[r["p_bytes"], r["p_bytes"] * (r["measurements"] - 1)] for r in rows], [r["own_ms"] for r in rows])
    (vector,) = solve([[r["measurements"] * r["weights"]] for r in rows], [r["rest_ms"] for r in rows])
    two = [row for row in rows if row["processes"] == 2]
    latency, each = solve([[1, row["message_bytes"]] for row in two], [row["reduce_ms"] for row in two])
    return {"byte": own[0], "more": own[1], "vector": vector, "latency": latency, "message": each}


def predicted(row: dict[str, Any], constants: dict[str, float]) -> float:
    """Milliseconds per step."""
    m = row["measurements"]
    found = (
        row["p_bytes"] * (constants["byte"] + constants["more"] * (m - 1)) + m * row["weights"] * constants["vector"]
    )
    return found + (constants["latency"] + row["message_bytes"] * constants["message"]) * (row["processes"] > 1)


def measured() -> str:
    constants, lines = fitted(), []
    for kind in ("strong", "weak"):
        for row in rows_of(kind):
            size, m = int(row["processes"]), int(row["measurements"])
            cells = [f"{kind}, {int(row['weights'])} weights, M = {m}", str(size), f"{row['p_bytes'] / 1e6:.1f}"]
            cells += [f"{row['vector_bytes'] / 1e6:.1f}", f"{row['messages']:g}", f"{row['message_bytes'] / 1e3:.0f}"]
            cells += [f"{row[name]:.2f}" for name in ("step_ms", "own_ms", "reduce_ms", "rest_ms")]
            cells += [f"{predicted(row, constants):.2f}"]
            lines.append(cells)
    header = "|processes|P, MB per process|vectors, MB|messages per step|kB each|ms per step|own|reduce|rest|model"
    return table(header.split("|"), lines)


def constants() -> str:
    found = fitted()
    return table(
        ["constant", "here"],
        [
            ["reading P", f"{1e-6 / found['byte']:.1f} GB/s per process"],
            ["each further measurement of a pass", f"{found['more'] / found['byte']:.2f} of the first"],
            ["vectors", f"{1e6 * found['vector']:.1f} ns per weight and measurement"],
            ["a message", f"{1e3 * found['latency']:.0f} µs and {1e-6 / found['message']:.2f} GB/s"],
        ],
    )


TABLES = {
    "batches": lambda: bench_batches.table(bench_batches.RESULTS),
    "sharded": measured,
    "constants": constants,
}


def write_tables(text: str) -> str:
    return fill(text, TABLES)


if __name__ == "__main__":
    PAGE.write_text(write_tables(PAGE.read_text()))
