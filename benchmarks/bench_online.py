"""New data after old: what a network loses of the old and how fast it learns the new, as rows.

    python benchmarks/bench_online.py --data DIR [--cases CASE ...] [--seeds 1 2 3] [--network small]

A network is trained on the old frames of a case. Then it is trained on, in one of the ways of METHODS, and a row is one
evaluation: frames trained on since then, updates, seconds, and the RMSE on held-out frames of both kinds, in meV/atom
and meV/Å: `validation`, for choosing settings, and `test`. Frames are cut in time as in bench_training.py, and at most
100 of a kind are for training. Rows go to results/online.csv; an interrupted study continues where it stopped.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_training import PARTS, ROOT, Run, config_of, folder, significant, thinned
from bench_uncertainty import COLD, Some, everything, others, segments, solid
from rows import MACHINE, append, keys_of, machine

from rlekf_ext.potential.data import System, frames
from rlekf_ext.potential.evaluate import compare
from rlekf_ext.potential.load import load_systems
from rlekf_ext.potential.neighbors import Frame

RESULTS = ROOT / "benchmarks/results/online.csv"
KEY = ("case", "network", "method", "seed")
ERRORS = tuple(f"{kind}_{part}_{e}" for kind in ("old", "new") for part in ("validation", "test") for e in "EF")
COLUMNS = (*KEY, "frames", "updates", "seconds", "cpu_seconds", *ERRORS, *MACHINE)
MOST = 100  # training frames of a kind
EPOCHS = 30  # of a first run


class Case(NamedTuple):
    system: str  # of study.toml: elements and cutoff
    old: tuple[str, Some]  # a folder, and which of its frames
    new: tuple[str, Some]


NACL, SI, CU, MG = "NaCl/gpaw_pbe_8", "Si/mlearn_64", "Cu/mvl_snap_aimd_108", "Mg/mgcu_aimd_120"
WATER = "H2O/deepmd_water_192"
CASES = {
    "NaCl, 300 K to 600 K": Case("NaCl", (NACL, COLD), (NACL, others(COLD))),
    "NaCl, ideal to strained": Case("NaCl", (NACL, segments(0, 1)), (NACL, others(segments(0, 1)))),
    "Cu, solid to liquid": Case("Cu", (CU, solid(-3.8)), (CU, others(solid(-3.8)))),
    "Cu, bulk to vacancy": Case("Cu", (CU, everything), ("Cu/mvl_snap_vacancy_107", everything)),
    "Si, solid to liquid": Case("Si", (SI, solid(-5.0)), (SI, others(solid(-5.0)))),
    "Si, bulk to vacancy": Case("Si", (SI, everything), ("Si/mlearn_63", everything)),
    "Mg, cold to hot": Case("Mg", (MG, solid(-1.46)), (MG, others(solid(-1.46)))),
    "water, low to high energies": Case("H2O", (WATER, solid(-155.956)), (WATER, others(solid(-155.956)))),
}


class Method(NamedTuple):
    optimizer: dict[str, Any]
    epochs: float  # of the new frames, or of all
    rate: float = 0.0  # of Adam
    scratch: bool = False  # all frames, from the start
    share: float = 0.0  # of batches of old frames


RLEKF, ADAM = {"type": "RLEKF", "num_groups": 4, "block_size": 1024}, {"type": "Adam"}  # as in the first rows
INFLATE, FRESH = ({**RLEKF, "covariance": how} for how in ("inflate", "fresh"))
METHODS = {
    "RLEKF from scratch": Method(RLEKF, EPOCHS, scratch=True),
    "Adam from scratch": Method(ADAM, 300, 2e-3, scratch=True),
    "old P": Method(RLEKF, 8),
    "old P, inflated": Method(INFLATE, 8),
    "fresh P": Method(FRESH, 8),
    "Adam 2e-3": Method(ADAM, 80, 2e-3),
    "Adam 3e-4": Method(ADAM, 80, 3e-4),
    "old P, 1/4 old frames": Method(RLEKF, 8, share=0.25),
    "old P, inflated, 1/4 old frames": Method(INFLATE, 8, share=0.25),
    "fresh P, 1/4 old frames": Method(FRESH, 8, share=0.25),
    "Adam 2e-3, 9/10 old frames": Method(ADAM, 80, 2e-3, share=0.9),
}


def parts_of(data: Path, system: str, where: tuple[str, Some]) -> dict[str, list[Frame]]:
    """Frames of one kind for training, choosing and judging."""
    asked = config_of(system, "small", {}, 0).model
    (found,) = load_systems(folder(data, where[0]), asked.type_map)
    some: System = found[where[1](found).nonzero()[0]]
    cuts = {part: (int(first * len(some)), int(last * len(some))) for part, (first, last) in PARTS.items()}
    share = min(1.0, MOST / cuts["train"][1])
    thin = {part: thinned(some, *cut, share) for part, cut in cuts.items()}
    return {part: frames([each], asked.descriptor.rcut, len(asked.type_map)) for part, each in thin.items()}


def config(case: Case, network: str, method: Method, seed: int) -> Any:
    adam = method.optimizer["type"] == "Adam"
    sections = {"optimizer": method.optimizer, "batch_size": 1 if adam else 4}
    if adam:
        sections["learning_rate"] = {"start_lr": method.rate, "stop_lr": method.rate / 1000}
    return config_of(case.system, network, sections, seed)


def looks(num_steps: int, per_epoch: int) -> set[int]:
    """After half an epoch, and whenever the length has doubled."""
    stops, step = {num_steps}, max(1, per_epoch // 2)
    while step < num_steps:
        stops.add(step)
        step *= 2
    return stops


def curve(run: Run, kinds: dict[str, dict[str, list[Frame]]]) -> Iterator[dict[str, Any]]:
    """Train a run to its end; a row at each look."""
    stops, row = looks(run.num_steps, run.per_epoch), {"frames": 0, "updates": 0, "seconds": 0.0, "cpu_seconds": 0.0}
    yield {**row, **errors(run, kinds)}
    for step in range(run.num_steps):
        started = time.perf_counter(), time.process_time()
        updates = run.step()
        row["seconds"] = round(row["seconds"] + time.perf_counter() - started[0], 3)
        row["cpu_seconds"] = round(row["cpu_seconds"] + time.process_time() - started[1], 3)
        row["updates"] += updates
        row["frames"] += run.latest
        if step + 1 in stops:
            yield {**row, **errors(run, kinds)}
            run.refine()


def errors(run: Run, kinds: dict[str, dict[str, list[Frame]]]) -> dict[str, float]:
    found = {}
    for kind, parts in kinds.items():
        for part in ("validation", "test"):
            both = compare(run.optimize.result, parts[part])
            found[f"{kind}_{part}_E"], found[f"{kind}_{part}_F"] = map(significant, (both.energy_rmse, both.force_rmse))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets; NaCl needs none")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--network", choices=["small", "paper"], default="small")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    where, done = machine(given.output), keys_of(given.output, KEY)
    for name in given.cases:
        case = CASES[name]
        kinds = {kind: parts_of(given.data, case.system, getattr(case, kind)) for kind in ("old", "new")}
        old, new = (parts["train"] for parts in kinds.values())
        all_frames = [frame for parts in kinds.values() for some in parts.values() for frame in some]
        for seed in given.seeds:
            waiting = [m for m in given.methods if (name, given.network, m, str(seed)) not in done]
            if not waiting:
                continue
            first = Run(
                config(case, given.network, METHODS["RLEKF from scratch"], seed), old, EPOCHS, room_for=all_frames
            )
            for _ in range(first.num_steps):
                first.step()
            first.refine()
            print(f"{name}, seed {seed}: {len(old)} old and {len(new)} new frames", flush=True)
            for method in waiting:
                made = METHODS[method]
                if made.scratch:
                    own, more, epochs = [*old, *new], [], made.epochs
                else:  # the new frames come as often with old ones as without
                    own, more = new, [old] if made.share else []
                    epochs = made.epochs * len(new) / (len(new) + len(more) * len(old)) / (1 - made.share)
                run = Run(
                    config(case, given.network, made, seed if made.scratch else seed + 100),
                    own,
                    epochs,
                    earlier=None if made.scratch else first.state,
                    more=more,
                    chances=[1 - made.share, made.share] if made.share else None,
                    room_for=all_frames,
                )
                key = dict(zip(KEY, (name, given.network, method, seed), strict=True))
                rows = [{**key, **row, **{n: where[n] for n in MACHINE}} for row in curve(run, kinds)]
                append(given.output, COLUMNS, rows)
                last = rows[-1]
                print(f"  {method:<34}", *(f"{last[n]:9.3g}" for n in ("frames", "cpu_seconds", *ERRORS)), flush=True)


if __name__ == "__main__":
    main()
