"""One filter on several processes of this machine (gloo, one thread each): bytes per process, messages, time per step.

    python benchmarks/bench_sharded.py [--processes 1 2 4 8] [--cycles 5] [--output FILE]

strong  the paper's network at N_b = 10240, on more and more processes
weak    a block of 5120 weights per process
message all_reduce alone, of several sizes

A step is the mean over a cycle: 32 measurements, one pass of which folds. The rows hold the median over the cycles, for
the process that holds most. own: P's own tiles; reduce: the message, and waiting for the slowest; rest: vectors. If
there are more processes than cores, bytes and messages are still valid but times are not.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import CASES
from rows import MACHINE, append, machine

from rlekf_ext import BlockPlan, KalmanFilter
from rlekf_ext.ops import native
from rlekf_ext.processes import Processes

RESULTS = Path(__file__).parent / "results/sharded.csv"
PENDING = 32
MESSAGES = (2, 1000, 10_000, 100_000, 1_000_000, 4_000_000)
FIGURES = ("p_bytes", "vector_bytes", "messages", "message_bytes", "step_ms", "own_ms", "reduce_ms", "rest_ms")
COLUMNS = ("kind", "processes", "weights", "blocks", "measurements", *FIGURES, *MACHINE)
Rows = list[dict[str, Any]]


class Clock:
    """Seconds by part, and messages, of the calls that a sharded step makes; all of them are blocking."""

    def __init__(self) -> None:
        self.seconds = {"own": 0.0, "reduce": 0.0, "rest": 0.0}
        self.messages, self.message_bytes = 0, 0
        self._originals: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Clock:
        self._wrap(native, "multiply_tiles", lambda *_: "own")
        self._wrap(native, "finish_projection", lambda *_: "rest")
        self._wrap(native, "correct", lambda *_: "rest")
        self._wrap(Processes, "sum", self._message)
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, original in self._originals:
            setattr(owner, name, original)

    def _message(self, _: Processes, tensor: torch.Tensor) -> str:
        self.messages += 1
        self.message_bytes += tensor.nbytes
        return "reduce"

    def _wrap(self, owner: Any, name: str, part: Any) -> None:
        original = getattr(owner, name)

        def timed(*arguments: Any) -> Any:
            key, started = part(*arguments), time.perf_counter()
            found = original(*arguments)
            self.seconds[key] += time.perf_counter() - started
            return found

        self._originals.append((owner, name, original))
        setattr(owner, name, timed)


def cycle(kalman: KalmanFilter, weights: torch.Tensor, jacobian: torch.Tensor) -> dict[str, float]:
    """Milliseconds per step, in total and by part, and messages per step."""
    steps = PENDING // len(jacobian)
    dist.barrier()
    with Clock() as clock:
        started = time.perf_counter()
        for _ in range(steps):
            weights += kalman.update(jacobian, torch.full((len(jacobian),), 1e-3, dtype=torch.float64))
        whole = time.perf_counter() - started
    found = {f"{part}_ms": 1e3 * seconds / steps for part, seconds in clock.seconds.items()}
    found |= {"step_ms": 1e3 * whole / steps}
    return found | {"messages": clock.messages / steps, "message_bytes": clock.message_bytes / steps}


def scaling(kind: str, plan: BlockPlan, num_cycles: int) -> Rows:
    kalman = KalmanFilter(plan, max_pending=PENDING, process_group=dist.group.WORLD)
    p, rows = kalman.covariance, []
    weights = torch.zeros(plan.num_weights, dtype=torch.float64)
    for count in (1, 8):
        source = torch.Generator().manual_seed(0)
        jacobian = torch.randn(count, plan.num_weights, generator=source, dtype=torch.float64)
        cycle(kalman, weights, jacobian)  # pages and caches
        found = [cycle(kalman, weights, jacobian) for _ in range(num_cycles)]
        row = {name: median(one[name] for one in found) for name in found[0]}
        sizes = {"p_bytes": p.tiles.nbytes, "vector_bytes": p.pending.nbytes}
        common = {"kind": kind, "weights": plan.num_weights, "blocks": plan.num_blocks, "measurements": count}
        rows.append({**common, **sizes, **row})
    return rows


def messages(num_cycles: int) -> Rows:
    rows = []
    for count in MESSAGES:
        tensor = torch.ones(count, dtype=torch.float64)
        repeat = max(2, min(200, 4_000_000 // count))
        found = []
        for _ in range(num_cycles):
            dist.barrier()
            started = time.perf_counter()
            for _ in range(repeat):
                dist.all_reduce(tensor)
            found.append(1e3 * (time.perf_counter() - started) / repeat)
        rows.append({"kind": "message", "messages": 1, "message_bytes": tensor.nbytes, "reduce_ms": median(found)})
    return rows


def process(rank: int, size: int, folder: str, num_cycles: int, output: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{size}", rank=rank, world_size=size)
    rows = messages(num_cycles) + scaling("strong", CASES["paper-10240"], num_cycles)
    rows += scaling("weak", BlockPlan((5120,) * size), num_cycles)
    if rank == 0:  # rank 0 has the longest run of tiles
        where = machine()
        rows = [{"processes": size, **row, **where} for row in rows]
        rows = [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows]
        append(output, COLUMNS, rows)
        for row in rows:
            print(*(f"{name} {row[name]}" for name in COLUMNS[: -len(MACHINE)] if name in row), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--cycles", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    machine(given.output)
    for size in given.processes:
        with TemporaryDirectory() as folder:
            mp.spawn(process, (size, folder, given.cycles, given.output), nprocs=size)


if __name__ == "__main__":
    main()
