"""The picture and the tables of the race, from its rows.

    python benchmarks/plot_race.py [--rows benchmarks/results/race.csv]

docs/race.png, and tables in README.md, docs/study.md and docs/deepmd.md. A time is when an error of a run, or both,
falls to a given multiple of the lowest final one on that system and stays there for as long again (before that,
energies dip below it by chance): seconds of training on one thread, without evaluations. For RLEKF it is the median
over seeds, for a rival that of its fastest run, whatever the rate and length. All errors are those of test frames.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median

from bench_training import ROOT
from plot_study import COLORS, KINDS, grid, save, short
from race import LONG, RACED, RESULTS, RIVALS
from rows import fill, table
from study import validation

PAGES = ROOT / "README.md", ROOT / "docs/study.md", ROOT / "docs/deepmd.md"
MARKS = 1.2, 1.05  # times the lowest final error
RIVAL_COLORS = {"Adam": COLORS["Adam"], "AdamW": "#0e7490", "Muon": "#15803d", "SOAP": "#7e22ce"}
DP_COLORS = {"dp: Adam": "#60a5fa", "dp: HybridMuon": "#86efac", "dp: LKF": "#a3a3a3", "dp: RLEKF": "#fdba74"}
Curve = list[dict[str, float]]


class Race:
    """The curves of each system and method."""

    def __init__(self, path: Path):
        self._runs: dict[tuple[str, str], dict[tuple[str, ...], Curve]] = defaultdict(lambda: defaultdict(list))
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                numbers = ("seconds", "cpu_seconds", "epoch", "validation_E", "validation_F", "test_E", "test_F")
                look = {name: float(row[name]) for name in numbers if row[name]}  # dp has no validation frames
                key = (row["rate"], row["seed"], row["times"])
                self._runs[row["system"], row["method"]][key].append(look)

    @property
    def systems(self) -> list[str]:
        """Those of which a rival has run to its end."""
        ended = {system for (system, _), runs in self._runs.items() if any(times == str(LONG) for _, _, times in runs)}
        return [system for system in RACED if system in ended]

    def curves(self, system: str, method: str) -> list[Curve]:
        return list(self._runs[system, method].values()) if (system, method) in self._runs else []

    def final(self, system: str, method: str, column: str) -> float:
        """The error at the end: of RLEKF at the best look on validation frames, the median over seeds; of a rival that
        of its best run."""
        curves = self.curves(system, method)
        ends = [(min(curve, key=validation) if method == "RLEKF" else curve[-1])[column] for curve in curves]
        return math.nan if not ends else median(ends) if method == "RLEKF" else min(ends)

    def lowest(self, system: str, column: str) -> float:
        return min(self.final(system, method, column) for method in ("RLEKF", *RIVALS) if self.curves(system, method))

    def time(self, system: str, method: str, bounds: dict[str, float], cost: str = "seconds") -> float:
        first = [_held(curve, bounds, cost) for curve in self.curves(system, method)]
        return math.nan if not first else median(first) if method == "RLEKF" else min(first)

    def best_rival(self, system: str, bounds: dict[str, float], cost: str = "seconds") -> float:
        """The time of the fastest rival."""
        return min(self.time(system, r, bounds, cost) for r in RIVALS if self.curves(system, r))


def _held(curve: Curve, bounds: dict[str, float], cost: str) -> float:
    """When the errors come within these bounds to stay there until twice that time, or the end."""
    for place, look in enumerate(curve):
        following = (later for later in curve[place:] if later["seconds"] <= 2 * look["seconds"])
        if all(later[column] <= bound for later in following for column, bound in bounds.items()):
            return look[cost]
    return math.inf


def columns_of(race: Race, system: str, mark: float, cost: str = "seconds") -> Iterator[str]:
    """RLEKF : fastest rival, for energies, for forces, and for both."""
    bounds = {f"test_{kind}": mark * race.lowest(system, f"test_{kind}") for kind in KINDS}
    for asked in (*({name: bound} for name, bound in bounds.items()), bounds):
        times = race.time(system, "RLEKF", asked, cost), race.best_rival(system, asked, cost)
        yield " : ".join(map(short, times))


def for_readme(race: Race) -> str:
    header = ["system", "final E, meV/atom", "final F, meV/Å", "seconds to 1.2 × the lower E", "F", "both"]
    return table(header, [[s, *finals(race, s), *columns_of(race, s, MARKS[0])] for s in race.systems])


def finals(race: Race, system: str) -> list[str]:
    found = []
    for kind in KINDS:
        ends = {m: race.final(system, m, f"test_{kind}") for m in RIVALS if race.curves(system, m)}
        best = min(ends, key=ends.__getitem__)
        found.append(f"{short(race.final(system, 'RLEKF', f'test_{kind}'))} : {short(ends[best])} ({best})")
    return found


def all_times(race: Race) -> str:
    kinds = (*KINDS, "both")
    header = ["system", *(f"{kind}, {mark:g} ×{unit}" for unit in ("", ", CPU") for mark in MARKS for kind in kinds)]
    costs = ("seconds", "cpu_seconds")
    rows = [
        [s, *(c for cost in costs for mark in MARKS for c in columns_of(race, s, mark, cost))] for s in race.systems
    ]
    return table(header, rows)


def rivals(race: Race) -> str:
    """Final errors of every method, E / F."""
    methods = ["RLEKF", *RIVALS]
    rows = [
        [s, *(" / ".join(short(race.final(s, m, f"test_{kind}")) for kind in KINDS) for m in methods)]
        for s in race.systems
    ]
    return table(["E meV/atom / F meV/Å", *methods], rows)


def inside_dp(race: Race) -> str:
    """dp's trainers: final errors, when they were, and when `rlekf train` has both."""
    header = ["system", "trainer", "s per epoch", "final E, meV/atom", "final F, meV/Å", "after s", "`rlekf train`, s"]
    rows = []
    for system in race.systems:
        for method in DP_COLORS:
            for curve in race.curves(system, method):
                last = curve[-1]
                ours = race.time(system, "RLEKF", {f"test_{kind}": last[f"test_{kind}"] for kind in KINDS})
                cells = [short(last["seconds"] / last["epoch"]), *(short(last[f"test_{kind}"]) for kind in KINDS)]
                rows.append([system, method.replace("dp: ", "dp, type "), *cells, short(last["seconds"]), short(ours)])
    return table(header, rows)


TABLES = {"race": for_readme, "race, times": all_times, "race, rivals": rivals, "race, dp": inside_dp}


def picture(race: Race, path: Path) -> None:
    """Test errors against seconds of training, a line per run."""
    figure, places = grid(race.systems)
    figure.set_size_inches(max(6.0, 2.6 * len(race.systems)), 7.0)
    colors = {**RIVAL_COLORS, **DP_COLORS, "RLEKF": COLORS["RLEKF"]}
    for axis, kind, system in places:
        for method, color in colors.items():
            for i, curve in enumerate(race.curves(system, method)):
                x, y = ([look[c] for look in curve] for c in ("seconds", f"test_{kind}"))
                line = {"linewidth": 1.4, "zorder": 3} if method == "RLEKF" else {"linewidth": 0.7}
                axis.loglog(x, y, color=color, label=None if i else method, **line)
        axis.grid(alpha=0.3)
    figure.supxlabel("seconds of training, one thread")
    figure.axes[0].legend(fontsize=6)
    save(figure, path)


def write_tables(text: str, race: Race) -> str:
    return fill(text, {name: partial(make, race) for name, make in TABLES.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=RESULTS)
    race = Race(parser.parse_args().rows)
    picture(race, ROOT / "docs/race.png")
    for page in PAGES:
        page.write_text(write_tables(page.read_text(), race))


if __name__ == "__main__":
    main()
