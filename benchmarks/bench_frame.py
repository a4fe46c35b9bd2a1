"""Where the time of one frame goes: network, force Jacobian and filter, against an iteration of Adam.

    python benchmarks/bench_frame.py [--system Cu] [--network paper] [--data DIR] [--repeat 15] [--threads 1]
                                     [--cutoff ANGSTROM] [--beside CHECKOUT]

A row is the median time, in ms, of one part of an update on a training frame of study.toml. Parts are timed in turn,
each right after an untimed call of it, so that a slow moment of the machine affects all of them. `--beside` times the
parts of another checkout, with its library built in place, in turn with these.
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
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from bench_training import ROOT, STUDY, available, chosen, config_of, load, method_of
from rows import MACHINE, append, commit, machine

from rlekf_ext import RLEKF
from rlekf_ext.batch_parts import force_groups
from rlekf_ext.potential.data import frame_of
from rlekf_ext.potential.input import Config
from rlekf_ext.potential.model import DeepPotential
from rlekf_ext.potential.neighbors import Frame, make_frame
from rlekf_ext.potential.optimizers import AdamSteps, KalmanSteps, build_optimizer
from rlekf_ext.potential.table import geometry_of
from rlekf_ext.potential.train import build_model, build_table
from rlekf_ext.updates import ERRORS

RESULTS = ROOT / "benchmarks/results/frame.csv"
COLUMNS = ["system", "network", "weights", "part", "ms", *MACHINE]
BLOCK_SIZES = 1024, 5120
FOUR_FRAMES = "on the table: RLEKF: four frames, jointly, N_b = 1024"
TWICE_AS_MANY = f"{FOUR_FRAMES}, half of the elements of the network in no frame"
MATMUL, MATMUL_FLOPS = "matrix product, 1024³", 2 * 1024**3


def flops(model: DeepPotential, frame: Frame) -> dict[str, float]:
    """The flops that an energy and a force update need on the table: those of the products with coefficients (T and its
    way back; with forces also Y, T along a direction, and another way back), of the fitting nets (forward, back and
    gradient; with forces twice that), and of the embedding nets at the nodes."""
    descriptor = model.architecture.descriptor
    columns = model.table.nodes.number * len(model.type_map)
    products = 2 * 4 * columns * descriptor.neuron[-1] * len(frame.types)
    weights = [sum(p.numel() for p in net.parameters() if p.dim() == 2) for net in model.fittings]
    fitting = 2 * sum(weights[t] for t in frame.types.tolist())
    embedding = 2 * sum(p.numel() for p in model.descriptor.embeddings[0].parameters() if p.dim() == 2)
    nodes = 3 * embedding * columns * len(model.type_map)
    return {"energy": 2 * products + 3 * fitting + nodes, "force": 5 * products + 6 * fitting + nodes}


def update(model: DeepPotential, frame: Frame, kind: str, atoms: torch.Tensor, gradient: bool) -> object:
    """What the network does in an update: its prediction and, with `gradient`, ε and H."""
    if gradient and (on_table := model.prepared(frame)):
        return on_table.measure([(kind, atoms)])
    error = ERRORS[kind](model(frame, forces=kind == "force"), frame, atoms)
    return torch.autograd.grad(error, list(model.parameters()), allow_unused=True) if gradient else error


def parts(system: str, network: str, data: Path) -> tuple[int, dict[str, Callable[[], object]]]:
    """The number of weights, and every part as a function."""
    frames = load(system, data, 8)["train"]
    config = config_of(system, network, method_of("RLEKF"), seed=1)
    frame = frames[0]
    atoms = force_groups(len(frame.types), 6, 4, torch.Generator().manual_seed(1))[0]
    found: dict[str, Callable[[], object]] = {}
    for label in ("", "on the table: "):
        model = build_model(config, frames)
        model.table = build_table(model, [frames], wanted=bool(label))
        for kind, gradient in itertools.product(("energy", "force"), (False, True)):
            name = f"{label}{kind}: forward{' and gradient' * gradient}"
            found[name] = partial(update, model, frame, kind, atoms, gradient)
    parameters = list(model.parameters())
    points, box = positions(system, data)
    cutoff = STUDY["system"][system]["cutoff"]
    kinds = frame.types.numpy()
    found["neighbour list"] = lambda: make_frame(points, box, kinds, cutoff, len(frame.slots))
    found["environment"] = lambda: model.descriptor._environment(frame)
    found["on the table: environment"] = lambda: geometry_of(model, frame, model.table.nodes)
    square = torch.randn(1024, 1024, dtype=torch.float64)
    found[MATMUL] = lambda: square @ square
    jacobian = torch.randn(sum(p.numel() for p in parameters), dtype=torch.float64)
    for size in BLOCK_SIZES:
        optimizer = RLEKF(parameters, block_size=size, transpose=True)
        found[f"filter, N_b = {size}"] = lambda o=optimizer: o.update(jacobian, 0.0)  # type: ignore[misc]

    def steps_of(label: str, table: bool) -> KalmanSteps | AdamSteps:
        other = config_of(system, network, method_of(label), seed=1)
        model = build_model(other, frames)
        steps = build_optimizer(other, model, 10**6)
        steps.start(frames)
        model.table = build_table(model, [frames], wanted=table)
        return steps

    names = {
        "paper's settings": "paper's settings: a frame, N_b = 1024",
        "four groups": "RLEKF: a frame, N_b = 1024",
        "Adam 2e-3": "Adam: an iteration",
    }
    for label, table in itertools.product(names, (False, True)):
        found["on the table: " * table + names[label]] = partial(steps_of(label, table), [frame], 0)
    found[FOUR_FRAMES] = partial(steps_of("4 frames", table=True), frames[:4], 0)
    found[TWICE_AS_MANY] = among_others(config_of(system, network, method_of("4 frames"), 1), system, data)
    return len(jacobian), found


def among_others(config: Config, system: str, data: Path) -> Callable[[], object]:
    """Four frames, jointly, with a network that knows twice as many elements as they have."""
    names = config.model.type_map
    config = replace(config, model=replace(config.model, type_map=(*names, *(f"other {name}" for name in names))))
    descriptor = config.model.descriptor
    own = chosen(system, data, 8)["train"][0]
    frames = [frame_of(own, i, descriptor.rcut, 2 * len(names)) for i in range(4)]
    model = build_model(config, frames)
    steps = build_optimizer(config, model, 10**6)
    steps.start(frames)
    model.table = build_table(model, [frames])
    return partial(steps, frames, 0)


def positions(system: str, data: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Coordinates and box of the first training frame."""
    first = chosen(system, data, 8)["train"][0]
    return first.coordinates[0], None if first.boxes is None else first.boxes[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", choices=list(STUDY["system"]), default="Cu")
    parser.add_argument("--network", choices=list(STUDY["network"]), default="paper")
    parser.add_argument("--data", type=Path, default=ROOT / "examples", help="folder of the sets; NaCl needs none")
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cutoff", type=float, help="Å (default: that of the study)")
    parser.add_argument("--beside", type=Path, metavar="CHECKOUT", help="time its parts, too")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    if not available(given.system, given.data):
        parser.error(f"{given.data} should have the data of {given.system} but does not; name their folder by --data.")
    asked = STUDY["system"][given.system]
    given.cutoff = asked["cutoff"] = given.cutoff or asked["cutoff"]
    torch.set_num_threads(given.threads)
    where = machine(given.output)
    count, timed = parts(given.system, given.network, given.data)
    floors = flops(*timed["on the table: force: forward"].args[:2])
    calls = {(name, where["commit"]): partial(timed_here, call) for name, call in timed.items()}
    if given.beside:
        calls |= beside(given.beside, [given.system, given.network, given.data.resolve(), given.threads, given.cutoff])
    times: dict[tuple[str, object], list[float]] = defaultdict(list)
    for _ in range(given.repeat + 2):
        for key, call in calls.items():
            times[key].append(call())
    name = "on the table: RLEKF: a frame, N_b = 1024"
    times[f"{name}, outside of ops", where["commit"]] = outside_of_ops(timed[name], given.repeat + 2)
    rate = MATMUL_FLOPS / median(times[MATMUL, where["commit"]][2:])
    for kind, count_of_flops in floors.items():  # the time that they take at the rate of a matrix product
        times[f"on the table: {kind}: floor", where["commit"]] = [count_of_flops / rate] * 3
    for (name, of_sources), found in times.items():
        row = {
            "system": f"{given.system}, {given.cutoff:g} Å",
            "network": given.network,
            "weights": count,
            "part": name,
        }
        row["ms"] = f"{median(found[2:]):.2f}"
        append(given.output, COLUMNS, [{**row, **where, "commit": of_sources}])
        print(*(f"{row[column]}" for column in COLUMNS[:5]), of_sources, sep="   ")


def outside_of_ops(call: Callable[[], object], repeat: int) -> list[float]:
    """The times in ms that calls spend outside of the compiled ops: in Python and in small operations of torch."""
    spent = 0.0

    def counted(op: Callable[..., object], *arguments: object) -> object:
        nonlocal spent
        started = time.perf_counter()
        try:
            return op(*arguments)
        finally:
            spent += 1e3 * (time.perf_counter() - started)

    ops = {name: getattr(torch.ops.rlekf, name) for name in ("measure", "step", "tabulate")}
    found = []
    try:
        for name, op in ops.items():
            setattr(torch.ops.rlekf, name, partial(counted, op))
        for _ in range(repeat):
            spent = 0.0
            found.append(timed_here(call, before=False) - spent)
    finally:
        for name, op in ops.items():
            setattr(torch.ops.rlekf, name, op)
    return found


def timed_here(call: Callable[[], object], before: bool = True) -> float:
    if before:
        call()  # what other parts have left in the caches is not this one's
    started = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - started)


OTHER = """
import sys, time, torch
from pathlib import Path
import bench_frame
torch.set_num_threads(int(sys.argv[4]))
bench_frame.STUDY["system"][sys.argv[1]]["cutoff"] = float(sys.argv[5])
_, timed = bench_frame.parts(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
print(*timed, sep="\\t", flush=True)
for line in sys.stdin:
    call = timed[line.rstrip()]
    call()
    started = time.perf_counter()
    call()
    print(1e3 * (time.perf_counter() - started), flush=True)
"""


def beside(checkout: Path, arguments: list[object]) -> dict[tuple[str, object], Callable[[], float]]:
    """The parts of another checkout, each a function that returns its time in ms, by name and commit."""
    path = os.pathsep.join(str(checkout.resolve() / part) for part in ("", "benchmarks"))
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", OTHER, *map(str, arguments)]
    server = subprocess.Popen(command, cwd=checkout, env={**os.environ, "PYTHONPATH": path}, **pipe)
    names = server.stdout.readline().rstrip("\n").split("\t")
    of_other = commit(checkout)

    def ask(name: str) -> float:
        print(name, file=server.stdin, flush=True)
        return float(server.stdout.readline())

    return {(name, of_other): partial(ask, name) for name in names}


if __name__ == "__main__":
    main()
