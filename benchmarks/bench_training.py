"""Learning curves on DFT data, as rows: one system of study.toml, one network, one optimizer, some seeds.

    python benchmarks/bench_training.py --system Cu --method RLEKF --seeds 1 2 3 [--network paper] [--epochs 3]
    [--data DIR] [--set optimizer/preset='"paper"' --label paper]

The first 70 % of the frames of every folder train, the next 10 % are for choosing settings (`validation`), the last
20 % are for judging (`test`). A row is one evaluation of one run: its progress, the seconds and CPU seconds of training
(without evaluations), and the RMSE on all three parts, in meV/atom and meV/Å; of the training frames, on SHOWN of them.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import MACHINE, append, machine

from rlekf_ext.potential.architecture import plain
from rlekf_ext.potential.batches import Batches
from rlekf_ext.potential.data import System, frames
from rlekf_ext.potential.evaluate import Comparison, compare
from rlekf_ext.potential.input import Config, read_input
from rlekf_ext.potential.load import load_systems
from rlekf_ext.potential.model import DeepPotential
from rlekf_ext.potential.neighbors import Frame
from rlekf_ext.potential.optimizers import build_optimizer
from rlekf_ext.potential.train import CPU, begin_with, build_model, build_table, feed_of, refine
from rlekf_ext.processes import ALONE

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
STUDY = tomllib.loads((ROOT / "benchmarks/study.toml").read_text())
RESULTS = ROOT / "benchmarks/results/training.csv"
PARTS = {"train": (0.0, 0.7), "validation": (0.7, 0.8), "test": (0.8, 1.0)}
SHOWN = 32
KEY = ("system", "network", "method", "seed", "frames", "epochs")  # what identifies a run
ERRORS = tuple(f"{part}_{kind}" for part in PARTS for kind in ("E", "F"))
CHANGES = {  # sections of study.toml, and the method that their entries change
    "variant": "first default",
    **dict.fromkeys(("prior", "blocks", "cost", "groups"), "four groups"),
    "skip": "RLEKF",
}
COLUMNS = (*KEY, "epoch", "updates", "seconds", "cpu_seconds", *ERRORS, *MACHINE)


def section_of(label: str) -> str:
    return next(section for section in ("method", *CHANGES) if label in STUDY[section])


def base_of(label: str) -> str:
    """The method that a label changes a part of; a method itself."""
    return CHANGES.get(section_of(label), label)


def method_of(label: str) -> dict[str, Any]:
    """The sections of the input file for a method of study.toml, and `skip` for its skip connections."""
    found, section = STUDY["method"][base_of(label)], section_of(label)
    if section == "skip":
        found = {**found, "skip": STUDY["skip"][label]}
    elif section != "method":
        changes = dict(STUDY[section][label])
        found = {**found, "batch_size": changes.pop("batch_size", 1), "optimizer": {**found["optimizer"], **changes}}
    options = {name: None if value == "null" else value for name, value in found["optimizer"].items()}
    return {**found, "optimizer": options}


LABELS = [label for section in ("method", *CHANGES) for label in STUDY[section]]
SYSTEMS = {**STUDY["system"], **STUDY["beyond"]}


def folder(data: Path, name: str) -> Path:
    """A data set of the project's own, or one below `data`."""
    own = ROOT / "examples" / name.lower()
    return own if own.is_dir() else data / name


def available(name: str, data: Path) -> bool:
    folders = SYSTEMS[name].get("folders", [])
    return bool(folders) and all(folder(data, path).is_dir() for path in folders)


def load(name: str, data: Path, most: int | None) -> dict[str, list[Frame]]:
    """The frames of each part; if more than `most` are for training, all parts are thinned evenly and equally."""
    asked, found = SYSTEMS[name], {}
    for part, systems in chosen(name, data, most).items():
        found[part] = frames(systems, asked["cutoff"], len(asked["elements"]))
    return found


def num_training(name: str, data: Path, most: int | None) -> int:
    return sum(map(len, chosen(name, data, most)["train"]))


@functools.cache
def chosen(name: str, data: Path, most: int | None) -> dict[str, list[System]]:
    asked = SYSTEMS[name]
    systems = [
        s[: asked.get("first", len(s))]
        for f in asked["folders"]
        for s in load_systems(folder(data, f), asked["elements"])
    ]
    total = sum(int(0.7 * len(s)) for s in systems)
    share = min(1.0, (most or total) / total)
    return {
        part: [thinned(s, int(first * len(s)), int(last * len(s)), share) for s in systems]
        for part, (first, last) in PARTS.items()
    }


def thinned(system: System, first: int, last: int, share: float) -> System:
    count = max(1, round(share * (last - first)))
    return system[np.linspace(first, last - 1, count).round().astype(int)]


def config_of(name: str, network: str, method: Mapping[str, Any], seed: int) -> Config:
    """The input file of a run; its data are passed separately."""
    asked, net = SYSTEMS[name], STUDY["network"][network]
    descriptor = {"type": "se_e2_a", "rcut": asked["cutoff"], "rcut_smth": 0.5, "sel": "auto:1.5", "seed": seed}
    descriptor |= {"neuron": net["neuron"], "axis_neuron": net["axis_neuron"], "resnet_dt": "skip" in method}
    fitting = {"neuron": net["fitting"], "seed": seed, "resnet_dt": "skip" in method}
    return read_input(
        {
            "model": {"type_map": asked["elements"], "descriptor": descriptor, "fitting_net": fitting},
            **{key: value for key, value in method.items() if key not in ("skip", "batch_size", "table")},
            "training": {
                "training_data": {"systems": "in memory", "batch_size": method.get("batch_size", 1)},
                "num_epochs": 1,
                "seed": seed,
                "table": method.get("table", True),
            },
        }
    )


class Run:
    """A training, batch after batch."""

    def __init__(
        self,
        config: Config,
        training: list[Frame],
        epochs: float,
        skip: tuple[float, float] | None = None,
        device: torch.device = CPU,
        earlier: dict[str, Any] | None = None,
        more: Sequence[list[Frame]] = (),
        chances: Sequence[float] | None = None,
        room_for: Sequence[Frame] = (),
    ) -> None:
        """`skip`: μ and σ of the skip connections' factors; `earlier`: the `state` of the run whose model to begin
        with; `more`: other frames to train on, with the `chances` of `training` and of each of these; `room_for`:
        frames that the model must be able to take."""
        seed = config.training.seed or 0
        self.model, self.training = build_model(config, training, room_for, earlier).to(device), training
        if skip:
            draw_skip_connections(self.model, *skip, seed)
        groups = [*by_composition(training), *more]
        sizes = [config.training.training_data.batch_size] * len(groups)
        batches = Batches(groups, sizes, seed, chances)
        self.per_epoch, self.num_steps = len(batches), round(epochs * len(batches))
        self.optimize = build_optimizer(config, self.model, self.num_steps)
        if earlier:
            begin_with(earlier, self.optimize, self.model, training, config, print)
        else:
            self.optimize.start(training)
        nodes = earlier["progress"]["nodes"] if earlier else None
        self.model.table = build_table(self.model, [training], config.training.table, nodes)
        self.latest = 0  # frames of the latest batch
        self._feed, self._done = feed_of(batches, self.optimize, self.model), 0

    @property
    def state(self) -> dict[str, Any]:
        """What another run may begin with, as a checkpoint has it."""
        result, table = self.optimize.result, self.model.table
        return {
            "model": plain(result.architecture),
            "weights": result.state_dict(),
            "optimizer": self.optimize.state_dict(),
            "progress": {"nodes": table.saved if table else None},
        }

    def step(self) -> int:
        """One batch; returns the number of updates."""
        self._done += 1
        batch, frames = next(self._feed)
        self.latest = len(batch)
        return self.optimize(batch, self._done - 1, frames)

    def epoch(self) -> None:
        """All batches of an epoch; then the table is refined, as the trainer does."""
        for _ in range(self.per_epoch):
            self.step()
        self.refine()

    def refine(self) -> None:
        refine(self.model, self.training, ALONE, print)


def curve(
    config: Config, parts: Mapping[str, list[Frame]], epochs: float, looks: int, skip: tuple[float, float] | None = None
) -> Iterator[tuple[dict[str, float], Comparison]]:
    """Train, and stop `looks` times at even intervals to evaluate: errors of all parts, and the test frames' points."""
    training = parts["train"]
    run = Run(config, training, epochs, skip)
    shown = {**parts, "train": training[:: -(-len(training) // SHOWN)]}
    stops = {round((i + 1) * run.num_steps / looks) for i in range(looks)}
    updates, seconds, cpu = 0, 0.0, 0.0
    for step in range(run.num_steps):
        started = time.perf_counter(), time.process_time()
        updates += run.step()
        if (step + 1) % run.per_epoch == 0:
            run.refine()
        seconds += time.perf_counter() - started[0]
        cpu += time.process_time() - started[1]
        if step + 1 in stops:
            row = {"epoch": round((step + 1) / run.per_epoch, 4), "updates": updates}
            row |= {"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2)}
            for part, some in shown.items():
                found = compare(run.optimize.result, some)
                row[f"{part}_E"], row[f"{part}_F"] = significant(found.energy_rmse), significant(found.force_rmse)
            yield row, found


@torch.no_grad()
def draw_skip_connections(model: DeepPotential, mean: float, deviation: float, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "timestep" in name:
            parameter.normal_(mean, deviation, generator=source)


def by_composition(training: list[Frame]) -> list[list[Frame]]:
    """Frames of the same atoms together: a batch holds one composition."""
    found: dict[tuple[int, ...], list[Frame]] = {}
    for frame in training:
        found.setdefault(tuple(frame.types.tolist()), []).append(frame)
    return list(found.values())


def significant(error: float) -> float:
    """eV to meV, five digits."""
    return float(f"{1e3 * error:.5g}")


def rows_of(
    key: Mapping[str, Any], method: Mapping[str, Any], data: Path, looks: int
) -> tuple[list[dict[str, Any]], Comparison]:
    """The rows of one run, named by KEY, and labels and predictions of the test frames at its end."""
    torch.set_num_threads(1)
    parts = load(key["system"], data, key["frames"])
    config = config_of(key["system"], key["network"], method, key["seed"])
    where = machine()
    found = list(curve(config, parts, key["epochs"], looks, method.get("skip")))
    rows = [{**key, **row, **{name: where[name] for name in MACHINE}} for row, _ in found]
    return rows, found[-1][1]


def asked(doc: str | None, known: list[str], systems: list[str], network: str, output: Path) -> argparse.Namespace:
    """The arguments of a script that trains on some of the known systems, with these defaults."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", choices=known, nargs="+", default=systems)
    parser.add_argument("--network", choices=list(STUDY["network"]), default=network)
    parser.add_argument("--data", type=Path, default=ROOT / "examples", help="folder of the sets; NaCl needs none")
    parser.add_argument("--output", type=Path, default=output)
    return parser.parse_args()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", choices=[n for n, s in SYSTEMS.items() if "folders" in s], required=True)
    parser.add_argument("--method", choices=LABELS, default="RLEKF")
    parser.add_argument("--network", choices=list(STUDY["network"]), default="small")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--frames", type=int, default=None, help="training frames (default: all of the first 70 %%)")
    parser.add_argument("--looks", type=int, default=None, help="evaluations (default: one per epoch)")
    parser.add_argument("--data", type=Path, default=ROOT / "examples", help="folder of the sets; NaCl needs none")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=JSON", help="changes to the input file")
    parser.add_argument("--label", help="name in the rows of a method changed by --set")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    if given.set and not given.label:
        parser.error("--set needs --label: rows of changed settings should not carry the name of unchanged ones.")
    method = copy.deepcopy(method_of(given.method))
    for item in given.set:
        path, value = item.split("=", 1)
        *sections, last = path.split("/")
        place = method
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = json.loads(value)
    machine(given.output)
    for seed in given.seeds:
        key = dict(zip(KEY, (given.system, given.network, given.label or given.method, seed), strict=False))
        key |= {"frames": given.frames, "epochs": given.epochs}
        found, _ = rows_of(key, method, given.data, given.looks or round(given.epochs))
        append(given.output, COLUMNS, found)
        for row in found:
            print(*(f"{name} {row[name]}" for name in COLUMNS[: -len(MACHINE)]), flush=True)


if __name__ == "__main__":
    main()
