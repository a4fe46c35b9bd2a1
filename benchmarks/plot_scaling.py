"""docs/scaling.md's tables, from rows of bench_sharded.py and bench_batches.py and from a model of a sharded step.

    python benchmarks/plot_scaling.py

The model of a step of M measurements on W processes, in seconds:

    own      P_bytes / (W memory) (1 + extra (M - 1))      the process's own tiles, read once
    vectors  M N vector                                    what every process does with all N weights
    reduce   latency + M (N + L M) 8 bytes / network       one all_reduce

Its constants are fitted to the rows of one and two processes; for GPUs they are datasheet figures.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import bench_batches
import numpy as np
from rows import fill, table

from rlekf_ext.covariance import required_bytes
from rlekf_ext.partition import BlockPlan

ROOT = Path(__file__).resolve().parents[1]
PAGE, ROWS = ROOT / "docs/scaling.md", ROOT / "benchmarks/results/sharded.csv"
PENDING = 32

# One H200: 4.8 TB/s and 141 GB of memory, 450 GB/s of NVLink each way; 8 of them and 8 x 400 Gb/s of network a node
# (datasheets). 85 % of the memory's rate, as on CPUs; 80 % of the links'; 20 µs a message in a node, 40 beyond.
MEMORY, NVLINK, NETWORK, GPUS = 0.85 * 4.8e12, 0.8 * 450e9, 0.8 * 8 * 50e9, 8
CAPACITY = 141e9
# Bytes a weight of the O(N) part: half of the waiting vectors on average, read twice, and ten numbers more.
VECTOR_BYTES = 8 * (PENDING // 2 * 2 + 10)
BLOCK = 10240


def rows_of(kind: str) -> list[dict[str, Any]]:
    with ROWS.open(newline="") as file:
        found = [row for row in csv.DictReader(file) if row["kind"] == kind]
    return [
        {name: float(value) if value and is_number(value) else value for name, value in row.items()} for row in found
    ]


def is_number(text: str) -> bool:
    return text.replace(".", "", 1).replace("e-", "", 1).isdigit()


def fitted() -> dict[str, float]:
    """The model's constants on this machine, by least squares of relative errors over one and two processes."""
    rows = [row for kind in ("strong", "weak") for row in rows_of(kind) if row["processes"] <= 2]

    def solve(columns: list[list[float]], values: list[float]) -> np.ndarray:
        a, b = np.array(columns), np.array(values)
        return np.linalg.lstsq(a / b[:, None], np.ones(len(b)), rcond=None)[0]

    own = solve([[r["p_bytes"], r["p_bytes"] * (r["measurements"] - 1)] for r in rows], [r["own_ms"] for r in rows])
    (vector,) = solve([[r["measurements"] * r["weights"]] for r in rows], [r["rest_ms"] for r in rows])
    two = [row for row in rows if row["processes"] == 2]
    latency, each = solve([[1, row["message_bytes"]] for row in two], [row["reduce_ms"] for row in two])
    return {"byte": own[0], "more": own[1], "vector": vector, "latency": latency, "message": each}


def predicted(row: dict[str, Any], constants: dict[str, float]) -> float:
    """Milliseconds a step."""
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
            if size <= 2:
                cells += [f"{row[name]:.2f}" for name in ("step_ms", "own_ms", "reduce_ms", "rest_ms")]
                cells += [f"{predicted(row, constants):.2f}"]
            else:
                cells += [""] * 5
            lines.append(cells)
    header = "|processes|P, MB a process|vectors, MB|messages a step|kB a message|ms a step|own|reduce|rest|model"
    return table(header.split("|"), lines)


def constants() -> str:
    found = fitted()
    return table(
        ["constant", "here"],
        [
            ["reading P", f"{1e-6 / found['byte']:.1f} GB/s a process"],
            ["each further measurement of a pass", f"{found['more'] / found['byte']:.2f} of the first"],
            ["vectors", f"{1e6 * found['vector']:.1f} ns a weight and measurement"],
            ["a message", f"{1e3 * found['latency']:.0f} µs and {1e-6 / found['message']:.2f} GB/s"],
        ],
    )


def predictions() -> str:
    lines = []
    for weights in (10**6, 10**7, 10**8):
        for gpus in (8, 64, 1024):
            blocks = -(-weights // BLOCK)
            plan = BlockPlan((BLOCK,) * (weights // BLOCK) + ((weights % BLOCK,) if weights % BLOCK else ()))
            vectors = 8.0 * PENDING * weights
            share = (required_bytes(plan, pending=PENDING) - vectors) / gpus
            own, rest = share / MEMORY, VECTOR_BYTES * weights / MEMORY
            message = 8 * (weights + blocks)
            reduce = 20e-6 + 2 * message * (1 - 1 / GPUS) / NVLINK
            if gpus > GPUS:
                reduce += 20e-6 + 2 * message * (1 - GPUS / gpus) / NETWORK
            total = own + rest + reduce
            fits = share + vectors < CAPACITY
            cells = [f"{weights:.0e}".replace("e+0", "e"), str(gpus), f"{share / 1e9:.3g}", f"{vectors / 1e9:.3g}"]
            times = (
                [f"{1e3 * part:.2f}" for part in (own, rest, reduce, total)] if fits else ["does not fit", "", "", ""]
            )
            lines.append([*cells, *times, f"{message / 1e6:.3g}"])
    header = "weights|GPUs|P, GB a GPU|vectors, GB|own, ms|vectors, ms|reduce, ms|step, ms|MB a message"
    return table(header.split("|"), lines)


TABLES = {
    "batches": lambda: bench_batches.table(bench_batches.RESULTS),
    "sharded": measured,
    "constants": constants,
    "predictions": predictions,
}


def write_tables(text: str) -> str:
    return fill(text, TABLES)


if __name__ == "__main__":
    PAGE.write_text(write_tables(PAGE.read_text()))
