"""Pictures and tables of the study, from its rows; trains nothing.

    python benchmarks/plot_study.py [--rows benchmarks/results/study.csv] [--docs docs]

Pictures are docs/study_*.png. Tables go into README.md and docs/study.md, each between the two comments that name it. A
number is the median over seeds; errors are those of the test frames at the end of the run, unless stated otherwise.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import geometric_mean, median

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from bench_training import ROOT, STUDY, SYSTEMS
from rows import RESULTS, fill, table

MARK = 1.2  # times the lower final RMSE of RLEKF and Adam counts as reached: the paper's rule
KINDS = {"E": "energy, meV/atom", "F": "force, meV/Å"}
VALIDATION = [f"validation_{kind}" for kind in KINDS]
COLORS = {"RLEKF": "#c2410c", "paper's settings": "#a3a3a3", "Adam": "#1d4ed8"}
COSTS = {"epoch": "epochs", "updates": "updates", "cpu_seconds": "CPU seconds"}
SPLITTINGS = ["RLEKF", "GEKF", "LEKF", "SEKF", "DeePMD-kit's blocks"]
ABREAST = 8  # systems side by side in a picture
BEFORE = "cdd8672"  # the last commit before the network on a table
Look = dict[str, float]
Curve = list[Look]


class Study:
    """The rows: a curve per seed of every system, network and method. `frames`: only of runs on at most this many
    frames, 0 for those on all."""

    def __init__(self, path: Path, frames: int | None = None):
        self._runs: dict[tuple[str, str, str], dict[str, Curve]] = defaultdict(lambda: defaultdict(list))
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if frames is not None and row["frames"] != f"{frames or ''}":
                    continue
                look = {k: float(v) for k, v in row.items() if k in COSTS or k.endswith(("_E", "_F"))}
                self._runs[row["system"], row["network"], row["method"]][row["seed"]].append(look)

    def method(self, system: str, method: str, network: str = "small") -> str:
        """ "Adam" is the chosen learning rate: the one with the most seeds."""
        if method != "Adam":
            return method
        rates = [m for s, n, m in self._runs if (s, n) == (system, network) and m.startswith("Adam ")]
        return max(rates, key=lambda m: len(self._runs[system, network, m]), default=method)

    def curves(self, system: str, method: str, network: str = "small") -> list[Curve]:
        return list(self._runs.get((system, network, self.method(system, method, network)), {}).values())

    def systems(self, *methods: str, network: str = "small") -> list[str]:
        """The systems that have runs of all these methods."""
        return [s for s in SYSTEMS if all(self.curves(s, m, network) for m in methods)]

    def error(self, system: str, method: str, column: str, network: str = "small", epoch: float = math.inf) -> float:
        """The median over seeds at the last look up to an epoch; NaN if there is none."""
        curves = self.curves(system, method, network)
        ends = [[look for look in curve if look["epoch"] <= epoch + 1e-6][-1][column] for curve in curves]
        return median(ends) if ends else math.nan

    def mark(self, system: str, column: str, network: str) -> float:
        return MARK * min(self.error(system, method, column, network) for method in ("RLEKF", "Adam"))

    def cost(self, system: str, method: str, column: str, cost: str, network: str) -> float:
        """What it takes until a curve first reaches the mark; infinite if half of the seeds never do."""
        mark = self.mark(system, column, network)
        first = [
            next((look[cost] for look in curve if look[column] <= mark), math.inf)
            for curve in self.curves(system, method, network)
        ]
        return median(first) if first else math.nan


def short(value: float) -> str:
    """Three digits; a dash for what is missing, "never" for what was not reached."""
    if math.isnan(value):
        return "–"
    return "never" if math.isinf(value) else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def table_1(study: Study) -> str:
    methods = ["RLEKF", "Adam", "paper's settings"]
    header = ["system", *(f"{kind} {m}" for kind in KINDS for m in methods), "paper: E", "paper: F"]
    rows = []
    for system, asked in SYSTEMS.items():
        found = [study.error(system, m, f"test_{kind}") for kind in KINDS for m in methods]
        papers = [" / ".join(short(v) for v in asked["paper"][kind]) if "paper" in asked else "–" for kind in KINDS]
        rows.append([system, *map(short, found), *papers])
    return table(header, rows)


def summary(study: Study) -> str:
    """For the README: accuracy and cost on every system."""
    header = ["E meV/atom / F meV/Å", "RLEKF, 40 epochs", "Adam, 100 epochs", "CPU seconds"]
    rows = []
    for system in study.systems("RLEKF", "Adam"):
        cells = [" / ".join(short(study.error(system, m, f"test_{kind}")) for kind in KINDS) for m in ("RLEKF", "Adam")]
        cells.append(" : ".join(short(study.error(system, m, "cpu_seconds")) for m in ("RLEKF", "Adam")))
        rows.append([system, *cells])
    return table(header, rows)


def training_errors(study: Study) -> str:
    header = ["system", *(f"{kind} {m}" for kind in KINDS for m in ("RLEKF", "Adam"))]
    rows = [
        [
            s,
            *(
                f"{short(study.error(s, m, f'train_{k}'))} / {short(study.error(s, m, f'test_{k}'))}"
                for k in KINDS
                for m in ("RLEKF", "Adam")
            ),
        ]
        for s in study.systems("RLEKF", "Adam")
    ]
    return table(header, rows)


def paper_network(study: Study) -> str:
    """Final errors of everything that was run with the paper's network on copper."""
    rows = []
    for method in STUDY["method"]:
        curves = study.curves("Cu", method, "paper")
        if curves:
            ends = [curve[-1] for curve in curves]
            errors = (short(median(end[f"test_{kind}"] for end in ends)) for kind in KINDS)
            seconds = median(end["cpu_seconds"] for end in ends)
            rows.append([method, str(len(ends)), short(ends[0]["epoch"]), short(seconds), *errors])
    return table(["method", "seeds", "epochs", "CPU seconds", *KINDS.values()], rows)


def long_adam(study: Study) -> str:
    """For the first seed of each."""
    rows = []
    for system in study.systems("long Adam 2e-3"):
        for method in ("RLEKF", "Adam 2e-3", "long Adam 2e-3"):
            end = study.curves(system, method)[0][-1]
            errors = (short(end[f"test_{kind}"]) for kind in KINDS)
            rows.append([system, method, short(end["epoch"]), short(end["cpu_seconds"]), *errors])
    return table(["system", "method", "epochs", "CPU seconds", *KINDS], rows)


def splittings(study: Study) -> str:
    systems = study.systems(*SPLITTINGS)
    rows = [
        [m, *(f"{short(study.error(s, m, 'test_E'))} / {short(study.error(s, m, 'test_F'))}" for s in systems)]
        for m in SPLITTINGS
    ]
    return table(["blocks", *systems], rows)


def costs(study: Study, network: str = "small") -> str:
    header = ["system", "Adam's rate", *(f"{kind}: {name}" for kind in KINDS for name in COSTS.values())]
    rows = []
    for system in study.systems("RLEKF", "Adam", network=network):
        cells = []
        for kind in KINDS:
            for cost in COSTS:
                ours, adams = (study.cost(system, m, f"test_{kind}", cost, network) for m in ("RLEKF", "Adam"))
                ratio = "" if math.isinf(ours + adams) else f" ({short(adams / ours)})"
                cells.append(f"{short(ours)} : {short(adams)}{ratio}")
        rows.append([system, study.method(system, "Adam", network).removeprefix("Adam "), *cells])
    return table(header, rows)


def variants(_: Study) -> str:
    study = Study(RESULTS / "study_parts.csv")
    systems = study.systems(*STUDY["variant"])
    return relative_to("first default", study, [*STUDY["variant"], *STUDY["past"]], systems)


def changed(section: str, network: str) -> str:
    """The changes of a section of study.toml, on the systems that have rows of all that were run with a network."""
    study = Study(RESULTS / "study_noise.csv")
    labels = [label for label in STUDY[section] if any(study.curves(system, label, network) for system in SYSTEMS)]
    systems = [system for system in SYSTEMS if all(study.curves(system, label, network) for label in labels)]
    return relative_to("four groups", study, labels, systems, network)


def layers(network: str) -> str:
    """What three methods do to each kind of layer, at the end; the first two columns are of the start."""
    found: dict[tuple[str, str], dict[str, list[dict[str, str]]]] = defaultdict(lambda: defaultdict(list))
    with (RESULTS / "layers.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["network"] == network:
                found[row["system"], row["layer"]][row["method"]].append(row)
    methods = ["four groups", "R = L, P_0 = I", "Adam 2e-3"]
    rows = []
    for (system, layer), of_method in found.items():
        first, last = ([of_method[method][place] for method in methods] for place in (0, -1))
        moved = [row["moved"] for row in last]
        forces = [f"{row['force']} to {end['force']}" for row, end in zip(first[:2], last[:2], strict=True)]
        rows.append([system, layer, first[0]["weights"], first[0]["size"], first[0]["variance"], *moved, *forces])
    header = ["system", "layer", "weights", "RMS", "P_0", "moved: four groups", "R = L, P_0 = I", "Adam"]
    return table([*header, "HᵀPH of forces: four groups", "R = L, P_0 = I"], rows)


def elements(_: Study) -> str:
    """Test errors of the forces of each element; of the two rates of Adam, the one with the smaller sum of them."""
    found: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    shares = {}
    with (RESULTS / "elements.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            found[row["system"]][row["method"]][row["element"]] = float(row["force"])
            shares[row["system"], row["element"]] = row["share_of_atoms"]
    rows = []
    for system, of_method in found.items():
        adam = min((m for m in of_method if m.startswith("Adam")), key=lambda m: sum(of_method[m].values()))
        for element, force in of_method["four groups"].items():
            share = f"{float(shares[system, element]):.1%}"
            rows.append([system, element, share, short(force), short(of_method[adam][element])])
    return table(["system", "element", "of all atoms", "RLEKF, 8 epochs", "Adam, 100 epochs"], rows)


def long_runs(network: str, frames: int, ours: Sequence[tuple[str, int]], adams: int) -> str:
    """Test errors of ours, each at an epoch, and at the end of the better Adam; 0 frames: all."""
    study = Study(RESULTS / "study_long.csv", frames)
    rows, ratios = [], defaultdict(list)
    for system in SYSTEMS:
        rates = [m for m in STUDY["method"] if m.startswith("Adam") and study.curves(system, m, network)]
        if not rates:
            continue
        adam = min(rates, key=lambda m: math.prod(study.error(system, m, column, network) for column in VALIDATION))
        runs = [*ours, (adam, math.inf)]
        found = [[study.error(system, m, f"test_{kind}", network, epoch) for kind in KINDS] for m, epoch in runs]
        seconds = [study.error(system, m, "cpu_seconds", network, epoch) for m, epoch in (ours[0], runs[-1])]
        for i, errors in enumerate(found):
            ratios[i].append([mine / best for mine, best in zip(errors, found[-1], strict=True)])
        rows.append([system, *(" / ".join(map(short, errors)) for errors in found), " : ".join(map(short, seconds))])
    means = [" / ".join(short(geometric_mean(r)) for r in zip(*ratios[i], strict=True)) for i in range(len(ratios))]
    seconds = f"CPU seconds, {ours[0][1]} : Adam's {adams}"
    header = ["test E / F, epoch", *(f"{label}, {epoch}" for label, epoch in ours), f"Adam, {adams}", seconds]
    return table(header, [*rows, ["times Adam's", *means, ""]] if len(rows) > 1 else rows)


def relative_to(base: str, study: Study, labels: Sequence[str], systems: Sequence[str], network: str = "small") -> str:
    """Validation errors at epoch 4, and relative to those of `base`."""

    def errors(system: str, label: str) -> list[float]:
        return [study.error(system, label, column, network, epoch=4) for column in VALIDATION]

    return table(["setting", *systems, "times the first"], relative([base, *labels], systems, errors))


def at_the_same_time(_: Study) -> str:
    """Validation errors of small networks at the CPU time that the first setting needs for eight epochs, and relative
    to its own. What ended before that time is left out."""
    study = Study(RESULTS / "study_time.csv")
    base, *others = STUDY["cost"]
    systems = [system for system in SYSTEMS if study.curves(system, base)]
    limits = {system: study.error(system, base, "cpu_seconds", epoch=8) for system in systems}

    def errors(system: str, label: str) -> list[float]:
        curve = next(iter(study.curves(system, label)), [])
        looks = [look for look in curve if look["cpu_seconds"] <= limits[system]]
        ended = not looks or curve[-1]["cpu_seconds"] < limits[system]
        return [math.nan if ended else looks[-1][column] for column in VALIDATION]

    known = [label for label in others if not all(math.isnan(errors(system, label)[0]) for system in systems)]
    return table(["setting", *systems, "times the first"], relative([base, *known], systems, errors))


def force_groups(network: str) -> str:
    """Validation errors after a quarter of the updates that all runs made, and after all, relative to those with four
    groups: the mean over systems and seeds; and the system where it is worst at the end."""
    study = Study(RESULTS / "study_time.csv")
    base, *others = STUDY["groups"]
    rows = []
    for label in others:
        means: dict[str, list[float]] = {}  # of each system over its seeds, E and F at a quarter, E and F at the end
        for system in SYSTEMS:
            pairs = zip(study.curves(system, label, network), study.curves(system, base, network), strict=False)
            ratios = [
                [_after(own, share, name) / _after(wanted, share, name) for share in (0.25, 1) for name in VALIDATION]
                for own, wanted in pairs
            ]
            if ratios:
                means[system] = [geometric_mean(each) for each in zip(*ratios, strict=True)]
        quarter_e, quarter_f, end_e, end_f = (short(geometric_mean(each)) for each in zip(*means.values(), strict=True))
        worst = [max(means, key=lambda system, i=i: means[system][i]) for i in (2, 3)]  # type: ignore[misc]
        ends = " / ".join(f"{short(means[system][i])} ({system})" for i, system in zip((2, 3), worst, strict=True))
        rows.append([label, str(len(means)), f"{quarter_e} / {quarter_f}", f"{end_e} / {end_f}", ends])
    return table(["E / F, times those of 4", "systems", "a quarter", "the end", "worst at the end"], rows)


def _after(curve: Curve, share: float, column: str) -> float:
    """The error after this share of the updates, interpolated on logarithms of both."""
    updates, errors = ([math.log(look[name]) for look in curve] for name in ("updates", column))
    return math.exp(np.interp(updates[-1] + math.log(share), updates, errors))


def relative(
    labels: Sequence[str], systems: Sequence[str], errors: Callable[[str, str], list[float]]
) -> list[list[str]]:
    """A row for each label: its errors on each system, and the geometric mean of their ratios to those of the first
    label, over the systems that have both."""
    base, rows = {system: errors(system, labels[0]) for system in systems}, []
    for label in labels:
        found = {system: errors(system, label) for system in systems}
        ratios = [[e / b for e, b in zip(found[s], base[s], strict=True)] for s in systems]
        known = list(zip(*(pair for pair in ratios if not any(map(math.isnan, pair))), strict=True))
        means = [short(geometric_mean(each)) for each in known] or ["–"] * len(KINDS)
        cells = ["–" if all(map(math.isnan, found[s])) else " / ".join(map(short, found[s])) for s in systems]
        rows.append([label, *cells, " / ".join(means)])
    return rows


def skip_connections(study: Study) -> str:
    rows = [
        [label.removeprefix("skip "), *(short(study.error("Cu", label, f"test_{kind}")) for kind in KINDS)]
        for label in STUDY["skip"]
    ]
    return table(["factors drawn from", *KINDS.values()], rows)


def columns(file: str, names: Sequence[str]) -> str:
    """Some columns of other rows of results, unchanged."""
    with (ROOT / "benchmarks/results" / file).open(newline="") as rows:
        return table(names, [[row[name] for name in names] for row in csv.DictReader(rows)])


def table_against_exact(_: Study) -> str:
    """Medians of three seeds and, in brackets, the smallest and largest."""
    study, methods = Study(RESULTS / "study_parts.csv"), ["first default", "first default on the table"]
    rows = []
    for system in study.systems(*methods):
        cells = []
        for kind in KINDS:
            for method in methods:
                ends = [curve[-1][f"test_{kind}"] for curve in study.curves(system, method)]
                cells.append(f"{short(median(ends))} ({short(min(ends))} to {short(max(ends))})")
        rows.append([system, *cells])
    return table(["system", *(f"{kind}, {name}" for kind in KINDS for name in ("exact", "on the table"))], rows)


FRAMES = {
    "a frame, paper's settings": "paper's settings: a frame, N_b = 1024",
    "a frame, four force groups": "RLEKF: a frame, N_b = 1024",
    "an iteration of Adam": "Adam: an iteration",
}


def on_the_table(_: Study) -> str:
    """Times before the table and on it, "before : now"; before is the commit that has no table."""
    with (ROOT / "benchmarks/results/network.csv").open(newline="") as file:
        ms: dict[tuple[str, str, bool, str], float] = {}
        for row in csv.DictReader(file):  # of a part, "on the table" comes after the exact one, and replaces it
            case, part = f"{row['system']}, {row['network']}", row["part"].removeprefix("on the table: ")
            ms[case, row["threads"], row["commit"] != BEFORE, part] = float(row["ms"])
    cases = list(dict.fromkeys(case for case, *_ in ms))

    def time(case: str, threads: str, now: bool, *parts: str) -> float:
        return sum(ms.get((case, threads, now, part), math.nan) for part in parts)

    rows = []
    updates = [f"{kind}: forward and gradient" for kind in ("energy", "force")]
    floors = [f"{kind}: floor" for kind in ("energy", "force")]
    for threads, suffix in (("1", ""), ("2", ", two threads")):
        both = [[4 * time(case, threads, now, *updates) for now in (False, True)] for case in cases]
        rows.append([f"4 energy + 4 force updates: network{suffix}", *(" : ".join(map(short, pair)) for pair in both)])
        if threads == "1":
            least = [4 * time(case, threads, True, *floors) for case in cases]
            shares = [f"{short(x)} ({x / pair[1]:.0%})" for x, pair in zip(least, both, strict=True)]
            rows.append(["floor of its flops (share)", *shares])
            for part in ("neighbour list", "environment", "filter, N_b = 1024"):
                rows.append([part, *(short(time(case, threads, True, part)) for case in cases)])
            outside = [
                time(case, threads, True, f"{FRAMES['a frame, four force groups']}, outside of ops") for case in cases
            ]
        joint = [time(case, threads, True, "RLEKF: four frames, jointly, N_b = 1024") / 4 for case in cases]
        if not all(map(math.isnan, joint)):
            rows.append([f"a frame, four force groups, four jointly{suffix}", *map(short, joint)])
        for name, part in FRAMES.items():
            pairs = ([time(case, threads, now, part) for now in (False, True)] for case in cases)
            rows.append([name + suffix, *(" : ".join(map(short, pair)) for pair in pairs)])
            if threads == "1" and name == "a frame, four force groups":
                rows.append(["of it outside of the kernels", *map(short, outside)])
    return table(["ms, before : now", *cases], rows)


def absent_elements(_: Study) -> str:
    """The time of a frame, in batches of four, with a network that knows more elements than the frames have."""
    rows = []
    with (ROOT / "benchmarks/results/absent.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if "jointly" in row["part"]:
                elements = "twice as many" if "half of the elements" in row["part"] else "those of the frames"
                rows.append([row["system"], row["network"], elements, short(float(row["ms"]) / 4), row["commit"]])
    return table(["system", "network", "elements in the network", "ms per frame", "commit"], rows)


def threads_of_a_training(_: Study) -> str:
    """ "before : now", for each number of threads and neighbour."""
    with (ROOT / "benchmarks/results/threads.csv").open(newline="") as file:
        ms = {
            (row["method"], row["asked"], row["neighbour"], row["commit"] == BEFORE): float(row["ms"])
            for row in csv.DictReader(file)
        }
    neighbours = list(dict.fromkeys(neighbour for _, _, neighbour, _ in ms))
    rows = []
    for method, asked in dict.fromkeys((method, asked) for method, asked, *_ in ms):
        pairs = [[ms[method, asked, neighbour, before] for before in (True, False)] for neighbour in neighbours]
        rows.append([f"{method}, {'own choice' if asked == 'chosen' else f'{asked} threads'}"])
        rows[-1] += [" : ".join(map(short, pair)) for pair in pairs]
    return table(["ms per batch, before : now", "alone", "beside a busy process"], rows)


def passes(_: Study) -> str:
    """Milliseconds per measurement, of the last commit that has rows."""
    with (RESULTS / "passes.csv").open(newline="") as file:
        every = list(csv.DictReader(file))
    found: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    for row in every:
        if row["commit"] == every[-1]["commit"]:
            case = row["weights"], row["block_size"], row["dtype"], registers(row["cpu_isa"])
            found[case][row["measurements"]] = float(row["ms"])
    counts = list(next(iter(found.values())))
    header = ["weights", "N_b", "P in", "vectors of", *(f"M = {count}" for count in counts)]
    return table(header, [[*case, *(short(of[count]) for count in counts)] for case, of in found.items()])


def registers(cpu_isa: str) -> str:
    return "64 bytes" if "AVX-512" in cpu_isa else "32 bytes" if "AVX2" in cpu_isa else "16 bytes"


def instruction_sets(_: Study) -> str:
    """Milliseconds of the parts of a frame, by the width of the vectors."""
    with (RESULTS / "isa.csv").open(newline="") as file:
        every = list(csv.DictReader(file))
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for row in every:
        found[row["part"]][registers(row["cpu_isa"])] = float(row["ms"])
    widths = list(dict.fromkeys(registers(row["cpu_isa"]) for row in every))
    parts = {
        "environment": "on the table: environment",
        "an energy update: network": "on the table: energy: forward and gradient",
        "a force update: network": "on the table: force: forward and gradient",
        "an iteration of Adam": "on the table: Adam: an iteration",
        "filter, N_b = 1024, one measurement": "filter, N_b = 1024",
        "a frame, four force groups, four jointly": "on the table: RLEKF: four frames, jointly, N_b = 1024",
    }
    rows = [
        [label, *(short(found[part][width] / (4 if part.endswith("jointly, N_b = 1024") else 1)) for width in widths)]
        for label, part in parts.items()
    ]
    return table(["ms, vectors of", *widths], rows)


TABLES: dict[str, Callable[[Study], str]] = {
    "summary": summary,
    "table 1": table_1,
    "training errors": training_errors,
    "paper's network": paper_network,
    "long Adam": long_adam,
    "splittings": splittings,
    "costs": costs,
    "costs, paper's network": lambda study: costs(study, "paper"),
    "a frame": lambda _: columns("frame.csv", ["network", "part", "ms"]),
    "network on a table": on_the_table,
    "table against exact": table_against_exact,
    "absent elements": absent_elements,
    "threads of a training": threads_of_a_training,
    "passes": passes,
    "instruction sets": instruction_sets,
    "variants": variants,
    "noise and prior, paper's network": lambda _: changed("prior", "paper"),
    "noise and prior, small networks": lambda _: changed("prior", "small"),
    "sizes of blocks, paper's network": lambda _: changed("blocks", "paper"),
    "sizes of blocks, small networks": lambda _: changed("blocks", "small"),
    "layers": lambda _: layers("paper"),
    "layers, small networks": lambda _: layers("small"),
    "elements": elements,
    "at the same time": at_the_same_time,
    "force groups": lambda _: force_groups("small"),
    "force groups, paper's network": lambda _: force_groups("paper"),
    "long runs": lambda _: long_runs(
        "small", 100, [(label, epoch) for label in ("four groups", "no balance") for epoch in (8, 16)], 100
    ),
    "long runs, paper's network": lambda _: long_runs("paper", 60, [("four groups", 8), ("four groups", 4)], 100),
    "long runs, few frames": lambda _: long_runs("small", 20, [("four groups", 8), ("four groups", 16)], 300),
    "long runs, many frames": lambda _: long_runs("small", 0, [("four groups", 8), ("four groups", 4)], 100),
    "skip connections": skip_connections,
    "theorem 1": lambda _: columns(
        "theorem.csv", ["blocks", "sigma", "updates", "distance of P S σ²/L from I", "|ε K|", "|ε K| t"]
    ),
}


PAGES = tuple(ROOT / page for page in ("README.md", "docs/study.md", "docs/choices.md", "docs/performance.md"))


def write_tables(text: str, study: Study) -> str:
    return fill(text, {name: partial(make, study) for name, make in TABLES.items()})


def grid(systems: Sequence[str], label: str = "{}") -> tuple[plt.Figure, Iterator[tuple[plt.Axes, str, str]]]:
    """A picture with a row per kind of error and a column per system, and its (axes, kind, system); more than ABREAST
    systems go on below."""
    bands = [systems[i : i + ABREAST] for i in range(0, len(systems), ABREAST)]
    shape = len(KINDS) * len(bands), len(bands[0])
    figure, axes = plt.subplots(*shape, figsize=(2.3 * shape[1], 2.5 * shape[0]), squeeze=False)
    places = []
    for row, (band, kind) in zip(axes, ((band, kind) for band in bands for kind in KINDS), strict=True):
        row[0].set_ylabel(label.format(KINDS[kind]))
        for axis, system in zip(row, band, strict=False):
            axis.set_title(system)
            places.append((axis, kind, system))
        for axis in row[len(band) :]:
            axis.remove()
    return figure, iter(places)


def convergence(study: Study, path: Path) -> None:
    """Fig. 5: test errors against CPU seconds, a line per seed."""
    figure, places = grid(study.systems("RLEKF", "Adam"))
    for axis, kind, system in places:
        for method, color in COLORS.items():
            for i, curve in enumerate(study.curves(system, method)):
                x, y = ([look[c] for look in curve] for c in ("cpu_seconds", f"test_{kind}"))
                axis.loglog(x, y, color=color, linewidth=1, label=None if i else method)
        axis.grid(alpha=0.3)
    figure.supxlabel("CPU seconds of training")
    figure.axes[0].legend(fontsize=7)
    save(figure, path)


def splitting_picture(study: Study, path: Path) -> None:
    """Fig. 2: a point per seed."""
    figure, places = grid(study.systems(*SPLITTINGS))
    for axis, kind, system in places:
        most = 0.0
        for i, method in enumerate(SPLITTINGS):
            ends = [curve[-1][f"test_{kind}"] for curve in study.curves(system, method)]
            most = max(most, *ends)
            axis.plot([i] * len(ends), ends, "o", color=COLORS["RLEKF"] if method == "RLEKF" else "#525252")
        axis.set_xticks(range(len(SPLITTINGS)), [m.split()[0] for m in SPLITTINGS], rotation=60, fontsize=7)
        axis.set_ylim(0, 1.1 * most)
        axis.grid(alpha=0.3)
    save(figure, path)


def speed_picture(study: Study, path: Path) -> None:
    """Fig. 4: how many times less RLEKF takes than Adam; a bar to the edge if Adam never gets there."""
    systems = study.systems("RLEKF", "Adam")
    figure, axes = plt.subplots(1, len(KINDS), figsize=(11, 3.5), sharey=True)
    for axis, (kind, title) in zip(axes, KINDS.items(), strict=True):
        for i, (cost, name) in enumerate(COSTS.items()):
            ratios = []
            for system in systems:
                ours, adams = (study.cost(system, m, f"test_{kind}", cost, "small") for m in ("RLEKF", "Adam"))
                ratios.append(1000.0 if math.isinf(adams) else adams / ours)
            axis.bar([k + 0.27 * (i - 1) for k in range(len(systems))], ratios, 0.27, label=name)
        axis.set_xticks(range(len(systems)), systems, rotation=60)
        axis.set_yscale("log")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_title(title)
        axis.grid(alpha=0.3, axis="y")
    axes[0].set_ylabel("Adam's cost / RLEKF's (1000: never)")
    axes[1].legend(fontsize=8, loc="upper right")
    save(figure, path)


def parity_picture(points: Path, path: Path) -> None:
    """Fig. 3: predictions against labels of test frames, RLEKF, first seed."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    with points.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["method"] == "RLEKF":
                found[row["kind"], row["system"]].append((float(row["label"]), float(row["prediction"])))
    figure, places = grid([s for s in SYSTEMS if ("E", s) in found], "RLEKF: {}")
    for axis, kind, system in places:
        labels, predictions = zip(*found[kind, system], strict=True)
        ends = [min(labels), max(labels)]
        axis.plot(ends, ends, color="black", linewidth=0.6)
        axis.plot(labels, predictions, ".", markersize=3, color=COLORS["RLEKF"])
    figure.supxlabel("DFT")
    save(figure, path)


def save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


PICTURES = {"convergence": convergence, "splitting": splitting_picture, "speed": speed_picture}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=ROOT / "benchmarks/results/study.csv")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where the pictures go")
    given = parser.parse_args()
    study = Study(given.rows)
    for name, draw in PICTURES.items():
        draw(study, given.docs / f"study_{name}.png")
    parity_picture(given.rows.with_name(f"{given.rows.stem}_parity.csv"), given.docs / "study_parity.png")
    for page in PAGES:
        page.write_text(write_tables(page.read_text(), study))


if __name__ == "__main__":
    main()
