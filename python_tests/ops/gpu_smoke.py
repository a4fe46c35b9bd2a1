"""Does it load, run and agree with the CPU on this GPU? One line each, so that a hang shows where. For `make gpu`."""

import faulthandler
import itertools
import os
import sys
import time

import numpy as np
import torch

from rlekf_ext import BlockPlan, KalmanFilter
from rlekf_ext.potential.frames import survey
from rlekf_ext.potential.model import DeepPotential
from rlekf_ext.potential.neighbors import Frame, make_frame
from rlekf_ext.potential.table import Table, largest_scalar
from rlekf_ext.updates import FrameUpdater

PLANS = {"70 + 3": (70, 3), "the paper's": (1350, 10240, 9810, 5151)}
PATIENCE = 30  # seconds without a line

failed = []


def say(what: str, error: float, allowed: float, started: float) -> None:
    right = error <= allowed
    if not right:
        failed.append(what)
    took = time.perf_counter() - started
    print(f"{'ok  ' if right else 'FAIL'} {what}: off by {error:.1e} (at most {allowed:.0e}), {took:.2f} s", flush=True)
    faulthandler.dump_traceback_later(PATIENCE, exit=True)


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    wanted = wanted.to(found.device)
    return float((found - wanted).norm() / wanted.norm()) if found.isfinite().all() else float("inf")


def steps(sizes: tuple[int, ...], dtype: torch.dtype, count: int, device: torch.device) -> list[torch.Tensor]:
    """The third of these steps folds."""
    plan, draw = BlockPlan(sizes), torch.Generator().manual_seed(0)
    kalman = KalmanFilter(plan, covariance_dtype=dtype, max_pending=2 * count, backend="native", device=device)
    weights = torch.zeros(plan.num_weights, dtype=torch.float64, device=device)
    for _ in range(3):
        h = torch.randn(count, plan.num_weights, dtype=torch.float64, generator=draw).to(device)
        weights += kalman.update(h, torch.ones(count, dtype=torch.float64, device=device))
    return [weights, kalman.covariance.tiles, kalman.covariance.state]


def check_filter(name: str, device: torch.device) -> None:
    for dtype, count in itertools.product((torch.float64, torch.float32), (1, 2, 4, 8)):
        started = time.perf_counter()
        found = steps(PLANS[name], dtype, count, device)
        wanted = steps(PLANS[name], dtype, count, torch.device("cpu"))
        error = max(apart(a, b) for a, b in zip(found, wanted, strict=True))
        what = f"{name} blocks, {str(dtype).removeprefix('torch.')}, M = {count}"
        say(what, error, 1e-11 if dtype == torch.float64 else 1e-5, started)
        if name != "70 + 3":
            continue
        again = steps(PLANS[name], dtype, count, device)
        same = all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
        say(f"{what}, the same bits again", 0.0 if same else 1.0, 0.0, started)


def frame_of(seed: int) -> Frame:
    random = np.random.default_rng(seed)
    points = np.array(list(itertools.product(range(4), repeat=3))) * 2.4 + random.normal(scale=0.1, size=(64, 3))
    labels = {"energy": random.normal(), "forces": random.normal(size=(64, 3))}
    return make_frame(points, 9.6 * np.eye(3), np.arange(64) % 2, 5.0, 2, **labels)


def model_on(device: torch.device, frames: list[Frame]) -> DeepPotential:
    slots = [max(frame.slots[t] for frame in frames) for t in range(2)]
    model = DeepPotential({"type_map": ["A", "B"], "descriptor": {"sel": slots, "rcut": 5.0}}, seed=1)
    model.descriptor.fit_statistics(survey(frames, model.architecture.descriptor).sums)
    model.to(device)
    model.table = Table(max(largest_scalar(model.architecture.descriptor, frame) for frame in frames))
    return model


def check_network(device: torch.device) -> None:
    """By the kernels, the same bits twice, and in torch operations."""
    frame, found = frame_of(0), []
    for where, kernels in ((torch.device("cpu"), "1"), (device, "1"), (device, "1"), (device, "0")):
        os.environ["RLEKF_NETWORK_KERNELS"] = kernels
        model, started = model_on(where, [frame]), time.perf_counter()
        groups = torch.arange(12, device=where)
        on_table = model.prepared(frame)
        measured = on_table.measure([("energy", None), ("force", groups)])
        prediction = model(frame)
        by_weight = torch.autograd.grad(
            prediction.energy.sum() + (prediction.forces**3).sum(), list(model.parameters())
        )
        found.append([*measured, *(value.detach() for value in prediction[:3]), *by_weight])
        if len(found) > 1:
            what = f"the network {'by kernels' if kernels == '1' else 'in torch operations'}"
            say(what, max(apart(a, b) for a, b in zip(found[-1], found[0], strict=True)), 1e-9, started)
    os.environ.pop("RLEKF_NETWORK_KERNELS")
    same = all(torch.equal(a, b) for a, b in zip(found[1], found[2], strict=True))
    say("the network by kernels, the same bits again", 0.0 if same else 1.0, 0.0, time.perf_counter())


def check_training(device: torch.device) -> None:
    """Batches of two frames, the later ones from CUDA graphs, in which nothing may wait for the GPU."""
    frames, found = [frame_of(seed) for seed in range(6)], []
    started = time.perf_counter()
    for where in (torch.device("cpu"), device):
        model = model_on(where, frames)
        update = FrameUpdater(model, transpose=True, block_size=1024, say=print)
        update.warm_start(frames)
        for step in range(12):
            if where.type == "cuda" and step == 10:  # both graphs have been made
                torch.cuda.set_sync_debug_mode("error")
            update(frames[step % 3 :: 3])
        if where.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        found.append(torch.cat([p.detach().flatten() for p in update.result.parameters()]))
    say("weights after twelve batches", apart(found[1], found[0]), 1e-6, started)


def main() -> None:
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    device = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda")
    check_filter("70 + 3", device)
    check_network(device)
    check_training(device)
    check_filter("the paper's", device)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
