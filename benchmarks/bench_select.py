"""Which frames of a pool are worth their labels: networks trained on frames that were chosen in several ways, as rows.

    python benchmarks/bench_select.py --data DIR [--systems NaCl ...] [--seeds 1 2 3] [--methods select ...]

A quarter of all frames, drawn at random, is for testing and the rest is the pool. A network is trained on START frames
of one kind (cold, or solid). By each of METHODS frames of the pool are chosen; a network trained on the START frames
and the first 10, 20, 40 or 80 of these, from scratch and in the same number of batches, is a row: the RMSE on the test
frames, in meV/atom and meV/Å. Rows go to results/select.csv; an interrupted study continues where it stopped.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from bench_online import CU, MG, NACL, RLEKF, SI, WATER
from bench_training import ROOT, Run, config_of, folder, significant
from bench_uncertainty import COLD, Some, everything, solid
from rows import MACHINE, append, keys_of, machine

from rlekf_ext.potential.checkpoint import restored_model
from rlekf_ext.potential.data import System, frames
from rlekf_ext.potential.evaluate import compare
from rlekf_ext.potential.load import load_systems
from rlekf_ext.potential.neighbors import Frame
from rlekf_ext.potential.select import Selection, select

RESULTS = ROOT / "benchmarks/results/select.csv"
KEY = ("system", "network", "method", "seed", "chosen")
COLUMNS = (*KEY, "start", "pool", "test", "test_E", "test_F", *MACHINE)
COUNTS = (10, 20, 40, 80)
START, BATCHES, COMMITTEE = 10, 600, 4
MOST = 400  # frames of a set


class Pool(NamedTuple):
    folders: tuple[str, ...]
    known: Some  # the frames of the first folder that the first network may be trained on


POOLS = {
    "NaCl": Pool((NACL,), COLD),
    "Cu": Pool((CU, "Cu/mvl_snap_vacancy_107"), solid(-3.9)),
    "Si": Pool((SI, "Si/mlearn_63"), solid(-5.2)),
    "Li": Pool(("Li/mlearn_54",), solid(-1.83)),
    "Mg": Pool((MG,), solid(-1.48)),
    "H2O": Pool((WATER,), everything),
}


class Split(NamedTuple):
    """Frames by their numbers over all folders in turn."""

    systems: list[System]
    start: list[int]
    pool: list[int]
    test: list[int]


def split_of(data: Path, system: str, seed: int) -> Split:
    asked = config_of(system, "small", {}, 0).model
    systems = [s for f in POOLS[system].folders for s in load_systems(folder(data, f), asked.type_map)]
    systems = [s[np.linspace(0, len(s) - 1, min(MOST, len(s))).round().astype(int)] for s in systems]
    generator, test, rest, first = np.random.default_rng(seed), [], [], 0
    for s in systems:
        order = first + generator.permutation(len(s))
        test += order[: len(s) // 4].tolist()
        rest += order[len(s) // 4 :].tolist()
        first += len(s)
    known = [i for i in rest if i < len(systems[0]) and POOLS[system].known(systems[0])[i]]
    start = known[:START]
    return Split(systems, start, sorted(set(rest) - set(start)), sorted(test))


class Trial:
    """A split with its frames, and what is trained on some of them."""

    def __init__(self, data: Path, system: str, network: str, seed: int):
        method = {"optimizer": RLEKF, "batch_size": 4}
        self.split, self.seed = split_of(data, system, seed), seed
        self.config = lambda seed: config_of(system, network, method, seed)
        asked = self.config(seed).model
        self.frames = frames(self.split.systems, asked.descriptor.rcut, len(asked.type_map))

    def trained(self, chosen: list[int], seed: int) -> Run:
        own = [self.frames[i] for i in [*self.split.start, *chosen]]
        run = Run(self.config(seed), own, 1, room_for=self.frames)  # RLEKF needs not know how long it trains
        for step in range(BATCHES):
            run.step()
            if (step + 1) % (BATCHES // 4) == 0:
                run.refine()
        return run

    def errors(self, run: Run) -> dict[str, float]:
        found = compare(run.optimize.result, [self.frames[i] for i in self.split.test])
        return {"test_E": significant(found.energy_rmse), "test_F": significant(found.force_rmse)}

    def by_random(self, _: Run) -> list[int]:
        return np.random.default_rng([self.seed, 1]).permutation(self.split.pool)[: COUNTS[-1]].tolist()

    def by_filter(self, first: Run) -> list[int]:
        """`rlekf select`."""
        return [self.split.pool[i] for i in self._selected(first, COUNTS[-1]).chosen]

    def by_variance(self, first: Run) -> list[int]:
        """The frames of the largest variance, energy and forces scaled as the filter scales them, P as it is."""
        scales = first.state["optimizer"]["updater"]["scales"]
        scaled = self._selected(first, 1).deviations * [float(scales[kind]) for kind in ("energy", "force")]
        order = np.argsort(-np.square(scaled).sum(1), kind="stable")
        return [self.split.pool[i] for i in order[: COUNTS[-1]]]

    def _selected(self, first: Run, count: int) -> Selection:
        starts = np.cumsum([0, *map(len, self.split.systems)])
        parts = [[i - low for i in self.split.pool if low <= i < high] for low, high in itertools.pairwise(starts)]
        pool = [s[np.array(own)] for s, own in zip(self.split.systems, parts, strict=True)]
        state = first.state
        return select(state, restored_model(state), pool, count, quiet=True)

    def by_distance(self, first: Run) -> list[int]:
        """Farthest points: mean descriptors of each element's atoms, from the first network."""
        model = first.optimize.result
        with torch.no_grad():
            places = {i: self._place(model, self.frames[i]) for i in [*self.split.start, *self.split.pool]}
        apart = {i: min(float((places[i] - places[j]).norm()) for j in self.split.start) for i in self.split.pool}
        chosen: list[int] = []
        while len(chosen) < min(COUNTS[-1], len(self.split.pool)):
            chosen.append(max(apart, key=lambda i: apart[i]))
            del apart[chosen[-1]]
            apart = {i: min(d, float((places[i] - places[chosen[-1]]).norm())) for i, d in apart.items()}
        return chosen

    @staticmethod
    def _place(model: Any, frame: Frame) -> torch.Tensor:
        found = model.descriptor(frame)
        return torch.cat([found[frame.types == element].mean(0) for element in range(len(model.type_map))])

    def by_committee(self, first: Run) -> list[int]:
        """The frames in which the forces of COMMITTEE networks differ most, by their atom that is worst (DP-GEN)."""
        runs = [first, *(self.trained([], self.seed + 1000 * k) for k in range(1, COMMITTEE))]
        worst = {}
        for i in self.split.pool:
            forces = [run.optimize.result(self.frames[i], create_graph=False).forces for run in runs]
            worst[i] = float(torch.stack(forces).var(0, correction=0).sum(1).max())
        return sorted(worst, key=lambda i: -worst[i])[: COUNTS[-1]]


METHODS: dict[str, Callable[[Trial, Run], list[int]]] = {
    "select": Trial.by_filter,
    "variance": Trial.by_variance,
    "random": Trial.by_random,
    "distance": Trial.by_distance,
    "committee": Trial.by_committee,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets; NaCl needs none")
    parser.add_argument("--systems", nargs="+", choices=list(POOLS), default=list(POOLS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--network", choices=["small", "paper"], default="small")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    where, done = machine(given.output), keys_of(given.output, KEY)

    def write(trial: Trial, key: tuple[Any, ...], run: Run) -> None:
        sizes = {name: len(getattr(trial.split, name)) for name in ("start", "pool", "test")}
        row = {**dict(zip(KEY, key, strict=True)), **sizes, **trial.errors(run), **{n: where[n] for n in MACHINE}}
        append(given.output, COLUMNS, [row])
        print(*(row[name] for name in (*KEY, "test_E", "test_F")), flush=True)

    for system in given.systems:
        for seed in given.seeds:
            name = (system, given.network)
            keys = {m: [(*name, m, seed, n) for n in COUNTS] for m in given.methods}
            keys = {m: [key for key in own if tuple(map(str, key)) not in done] for m, own in keys.items()}
            if not any(keys.values()):
                continue
            trial = Trial(given.data, system, given.network, seed)
            first = trial.trained([], seed)
            start, whole = (*name, "start", seed, 0), (*name, "all", seed, len(trial.split.pool))
            if tuple(map(str, start)) not in done:
                write(trial, start, first)
                write(trial, whole, trial.trained(trial.split.pool, seed))
            for method, waiting in keys.items():
                if waiting:
                    chosen = METHODS[method](trial, first)
                    for key in waiting:
                        write(trial, key, trial.trained(chosen[: key[-1]], seed))


if __name__ == "__main__":
    main()
