"""Where the time of one frame goes: network, force Jacobian and filter, against an iteration of Adam.

    python benchmarks/bench_frame.py [--system Cu] [--network paper] [--data DIR] [--repeat 15] [--threads 1]
                                     [--beside CHECKOUT]

A row is the median time, in ms, of one part of an update on a training frame of study.toml. Parts are timed in turn, so
that a slow moment of the machine affects all of them. `--beside` times the parts of another checkout, with its library
built in place, in turn with these.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from bench_training import ROOT, STUDY, available, config_of, load, method_of
from rows import MACHINE, append, machine

from rlekf_ext import RLEKF
from rlekf_ext.batch_parts import force_groups
from rlekf_ext.potential.model import DeepPotential
from rlekf_ext.potential.neighbors import Frame
from rlekf_ext.potential.optimizers import build_optimizer
from rlekf_ext.potential.table import geometry_of
from rlekf_ext.potential.train import build_model, build_table
from rlekf_ext.updates import ERRORS, PREDICTED

RESULTS = ROOT / "benchmarks/results/frame.csv"
COLUMNS = ["system", "network", "weights", "part", "ms", *MACHINE]
BLOCK_SIZES = 1024, 5120


def update(model: DeepPotential, frame: Frame, kind: str, atoms: torch.Tensor, gradient: bool) -> object:
    """What the network does in an update: its prediction and, with `gradient`, the derivative of ε."""
    forces = kind == "force"
    if linearized := model.linearized(frame, forces, False):
        _, factor = ERRORS[kind](linearized.prediction, frame, atoms)
        return linearized.jacobian(kind, factor) if gradient else None
    prediction = model(frame, forces=forces)
    _, factor = ERRORS[kind](prediction, frame, atoms)
    total = (factor * getattr(prediction, PREDICTED[kind])).sum()
    return torch.autograd.grad(total, list(model.parameters()), allow_unused=True) if gradient else None


def parts(system: str, network: str, data: Path) -> tuple[int, dict[str, Callable[[], object]]]:
    """The number of weights, and every part as a function."""
    frames = load(system, data, 8)["train"]
    config = config_of(system, network, method_of("RLEKF"), seed=1)
    frame = frames[0]
    atoms = force_groups(len(frame.types), 6, 4, torch.Generator().manual_seed(1))[0]
    found: dict[str, Callable[[], object]] = {}
    for label in ("", "on the table: "):
        model = build_model(config, frames)
        model.table = build_table(model, frames, wanted=bool(label))
        for kind, gradient in itertools.product(("energy", "force"), (False, True)):
            name = f"{label}{kind}: forward{' and gradient' * gradient}"
            found[name] = partial(update, model, frame, kind, atoms, gradient)
    parameters = list(model.parameters())
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
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--beside", type=Path, metavar="CHECKOUT", help="time its parts, too")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    if not available(given.system, given.data):
        parser.error(f"{given.data} should have the data of {given.system} but does not; name their folder by --data.")
    torch.set_num_threads(given.threads)
    where = machine(given.output)
    count, timed = parts(given.system, given.network, given.data)
    calls = {(name, where["commit"]): partial(timed_here, call) for name, call in timed.items()}
    if given.beside:
        calls |= beside(given.beside, [given.system, given.network, str(given.data.resolve()), str(given.threads)])
    times: dict[tuple[str, object], list[float]] = defaultdict(list)
    for _ in range(given.repeat + 2):
        for key, call in calls.items():
            times[key].append(call())
    for (name, commit), found in times.items():
        row = {"system": given.system, "network": given.network, "weights": count, "part": name}
        row["ms"] = f"{median(found[2:]):.2f}"
        append(given.output, COLUMNS, [{**row, **where, "commit": commit}])
        print(*(f"{row[column]}" for column in COLUMNS[:5]), commit, sep="   ")


def timed_here(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - started)


OTHER = """
import sys, time, torch
from pathlib import Path
import bench_frame
torch.set_num_threads(int(sys.argv[4]))
_, timed = bench_frame.parts(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
print(*timed, sep="\\t", flush=True)
for line in sys.stdin:
    started = time.perf_counter()
    timed[line.rstrip()]()
    print(1e3 * (time.perf_counter() - started), flush=True)
"""


def beside(checkout: Path, arguments: list[str]) -> dict[tuple[str, object], Callable[[], float]]:
    """The parts of another checkout, each a function that returns its time in ms, by name and commit."""
    path = os.pathsep.join(str(checkout.resolve() / part) for part in ("", "benchmarks"))
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen([sys.executable, "-c", OTHER, *arguments], env={**os.environ, "PYTHONPATH": path}, **pipe)
    names = server.stdout.readline().rstrip("\n").split("\t")
    described = subprocess.run(["git", "-C", checkout, "describe", "--always"], capture_output=True, text=True)

    def ask(name: str) -> float:
        print(name, file=server.stdin, flush=True)
        return float(server.stdout.readline())

    return {(name, described.stdout.strip()): partial(ask, name) for name in names}


if __name__ == "__main__":
    main()
