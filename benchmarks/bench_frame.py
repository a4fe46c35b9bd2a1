"""Where the time of one frame goes: network, force Jacobian and filter, against an iteration of Adam.

    python benchmarks/bench_frame.py [--system Cu] [--network paper] [--data DIR] [--repeat 15]

One thread. A row is the median time, in ms, of one part of an update on a training frame of study.toml. Parts are timed
in turn, so that a slow moment of the machine affects all of them.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from bench_training import ROOT, STUDY, available, config_of, load, method_of
from rows import MACHINE, append, machine

from rlekf_ext import RLEKF
from rlekf_ext.batch_parts import force_groups
from rlekf_ext.potential.optimizers import build_optimizer
from rlekf_ext.potential.table import OnATable, geometry_of
from rlekf_ext.potential.train import build_model, build_table
from rlekf_ext.updates import energy_error, force_error

RESULTS = ROOT / "benchmarks/results/frame.csv"
COLUMNS = ["system", "network", "weights", "part", "ms", *MACHINE]
BLOCK_SIZES = 1024, 5120


def parts(system: str, network: str, data: Path) -> tuple[int, dict[str, Callable[[], object]]]:
    """The number of weights, and every part as a function."""
    frames = load(system, data, 8)["train"]
    config = config_of(system, network, method_of("RLEKF"), seed=1)
    frame = frames[0]
    groups = force_groups(len(frame.types), 6, 4, torch.Generator().manual_seed(1))
    found: dict[str, Callable[[], object]] = {}
    for label in ("", "on the table: "):
        model = build_model(config, frames)
        model.table = build_table(model, frames, wanted=bool(label))
        parameters = list(model.parameters())
        timed = {
            "energy": lambda m=model: energy_error(m, frame),
            "force": lambda m=model: force_error(m, frame, groups[0]),
        }
        for kind, error in timed.items():
            found[f"{label}{kind}: forward"] = error
            found[f"{label}{kind}: forward and gradient"] = lambda e=error, p=parameters: torch.autograd.grad(
                e(), p, allow_unused=True
            )
    found["environment"] = lambda: model.descriptor._environment(frame)
    found["on the table: environment"] = lambda: geometry_of(model, frame, model.table.nodes)
    jacobian = torch.randn(sum(p.numel() for p in parameters), dtype=torch.float64)
    for size in BLOCK_SIZES:
        optimizer = RLEKF(parameters, block_size=size, transpose=True)
        found[f"filter, N_b = {size}"] = lambda o=optimizer: o.update(jacobian, 0.0)  # type: ignore[misc]
    for label, table in itertools.product(("paper's settings", "RLEKF", "Adam 2e-3"), (False, True)):
        other = config_of(system, network, method_of(label), seed=1)
        model = build_model(other, frames)
        steps = build_optimizer(other, model, 10**6)
        steps.start(frames)
        model.table = build_table(model, frames, wanted=table)
        name = "Adam: an iteration" if label.startswith("Adam") else f"{label}: a frame, N_b = 1024"
        found["on the table: " * table + name] = lambda s=steps: s([frame], 0)  # type: ignore[misc]
    return len(jacobian), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", choices=list(STUDY["system"]), default="Cu")
    parser.add_argument("--network", choices=list(STUDY["network"]), default="paper")
    parser.add_argument("--data", type=Path, default=ROOT / "examples", help="folder of the sets; NaCl needs none")
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    if not available(given.system, given.data):
        parser.error(f"{given.data} should have the data of {given.system} but does not; name their folder by --data.")
    torch.set_num_threads(1)
    where = machine(given.output)
    count, timed = parts(given.system, given.network, given.data)
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(given.repeat + 2):
        for name, call in timed.items():
            started = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - started))
    for name, found in times.items():
        row = {"system": given.system, "network": given.network, "weights": count, "part": name}
        row["ms"] = f"{median(found[2:]):.2f}"
        append(given.output, COLUMNS, [{**row, **where}])
        print(*(f"{row[column]}" for column in COLUMNS[:5]), sep="   ")


if __name__ == "__main__":
    main()
