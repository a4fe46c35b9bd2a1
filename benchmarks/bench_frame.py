"""Where the time of one frame goes: network, force Jacobian and filter, against an iteration of Adam.

    python benchmarks/bench_frame.py [--system Cu] [--network paper] [--data DIR] [--repeat 15]

One thread. A row is the median time, in ms, of one part of an update on a training frame of study.toml. Parts are timed
in turn, so that a slow moment of the machine affects all of them.
"""

from __future__ import annotations

import argparse
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
from rlekf_ext.potential.train import build_model
from rlekf_ext.updates import energy_error, force_error

RESULTS = ROOT / "benchmarks/results/frame.csv"
COLUMNS = ["system", "network", "weights", "part", "ms", *MACHINE]
BLOCK_SIZES = 1024, 5120


def parts(system: str, network: str, data: Path) -> tuple[int, dict[str, Callable[[], object]]]:
    """The number of weights, and every part as a function."""
    frames = load(system, data, 8)["train"]
    config = config_of(system, network, method_of("RLEKF"), seed=1)
    model, frame = build_model(config, frames), frames[0]
    parameters = list(model.parameters())
    groups = force_groups(len(frame.types), 6, 4, torch.Generator().manual_seed(1))

    def gradient(error: torch.Tensor) -> object:
        return torch.autograd.grad(error, parameters, allow_unused=True)

    found: dict[str, Callable[[], object]] = {
        "energy: forward": lambda: energy_error(model, frame),
        "energy: forward and gradient": lambda: gradient(energy_error(model, frame)),
        "force: forward": lambda: force_error(model, frame, groups[0]),
        "force: forward and gradient": lambda: gradient(force_error(model, frame, groups[0])),
    }
    jacobian = torch.randn(sum(p.numel() for p in parameters), dtype=torch.float64)
    for size in BLOCK_SIZES:
        optimizer = RLEKF(parameters, block_size=size, transpose=True)
        found[f"filter, N_b = {size}"] = lambda o=optimizer: o.update(jacobian, 0.0)  # type: ignore[misc]
    for label in ("paper's settings", "RLEKF", "Adam 2e-3"):
        other = config_of(system, network, method_of(label), seed=1)
        steps = build_optimizer(other, build_model(other, frames), 10**6)
        steps.start(frames)
        name = "Adam: an iteration" if label.startswith("Adam") else f"{label}: a frame, N_b = 1024"
        found[name] = lambda s=steps: s([frame], 0)  # type: ignore[misc]
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
