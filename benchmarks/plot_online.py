"""The tables and the picture of docs/online.md, from the rows of bench_online.py and bench_select.py.

    python benchmarks/plot_online.py

Errors are those of test frames at the end of a run, medians over seeds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from statistics import median

from bench_online import METHODS
from bench_online import RESULTS as ONLINE
from bench_select import COUNTS
from bench_select import METHODS as WAYS
from bench_select import RESULTS as SELECT
from bench_training import ROOT
from matplotlib.ticker import FormatStrFormatter, NullLocator
from plot_step import read
from plot_study import COLORS, grid, save, short
from rows import fill, table

from rlekf_ext.schema import counted

PAGE = ROOT / "docs/online.md"
Row = dict[str, str]


SHOWN = {
    "RLEKF from scratch": "scratch",
    "old P": "old P",
    "old P, inflated": "inflated",
    "fresh P": "fresh P",
    "Adam 2e-3": "Adam",
    "old P, 1/4 old frames": "+ 1/4: old P",
    "old P, inflated, 1/4 old frames": "+ 1/4: inflated",
    "fresh P, 1/4 old frames": "+ 1/4: fresh P",
    "Adam 2e-3, 9/10 old frames": "+ 9/10: Adam",
}


def online(network: str = "small") -> str:
    """What became of old and new errors, by case and method, in the cases that have all methods."""
    runs: dict[tuple[str, str], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in read(ONLINE.name):
        if row["network"] == network:
            runs[row["case"], row["method"]][row["seed"]].append(row)
    lines = []
    for case in dict.fromkeys(case for case, _ in runs):
        if not all((case, method) in runs for method in METHODS):
            continue
        before = [looks[0] for looks in runs[case, "old P"].values()]
        last = [[looks[-1] for looks in runs[case, method].values()] for method in SHOWN]
        frames = [short(median(float(row["frames"]) for row in rows)) for rows in last]
        seeds = len({seed for method in METHODS for seed in runs[case, method]})
        lines.append([f"**{case}**, {counted(seeds, 'seed')}: frames", "0", *frames])
        for kind in ("old", "new"):
            lines.append([kind, *(_errors(rows, kind) for rows in (before, *last))])
    header = ["E / F", "before", *SHOWN.values()]
    return table(header, lines)


def _errors(rows: list[Row], kind: str) -> str:
    return " / ".join(short(median(float(row[f"{kind}_test_{e}"]) for row in rows)) for e in "EF")


def selection(network: str = "small") -> str:
    """Test errors by the number of frames chosen, and how they were chosen."""
    found: dict[tuple[str, str, int], list[Row]] = defaultdict(list)
    for row in read(SELECT.name):
        if row["network"] == network:
            count = 10**6 if row["method"] == "all" else int(row["chosen"])
            found[row["system"], row["method"], count].append(row)
    lines = []
    for system in dict.fromkeys(system for system, _, _ in found):
        if not all((system, way, n) in found for way in WAYS for n in COUNTS):
            continue
        lines.append([f"**{system}**", "none", _both(found[system, "start", 0]), *[""] * (len(COUNTS) - 1)])
        lines += [["", way, *(_both(found[system, way, n]) for n in COUNTS)] for way in WAYS]
        lines.append(["", "all", *[""] * (len(COUNTS) - 1), _both(found[system, "all", 10**6])])
    return table(["E / F", "chosen by", *(f"{n} frames" for n in COUNTS)], lines)


def _both(rows: list[Row]) -> str:
    return " / ".join(short(median(float(row[name]) for row in rows)) for name in ("test_E", "test_F"))


def picture() -> None:
    """Test errors against the number of chosen frames."""
    found: dict[str, dict[str, dict[int, list[Row]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in read(SELECT.name):
        found[row["system"]][row["method"]][int(row["chosen"])].append(row)
    figure, places = grid(list(found))
    colors = dict(zip(WAYS, [COLORS["RLEKF"], "#7e22ce", COLORS["Adam"], "#15803d", "#525252"], strict=True))
    for axes, kind, system in places:
        column = f"test_{kind}"
        for way, color in colors.items():
            of_way = sorted(found[system][way].items())
            middle = [median(float(row[column]) for row in rows) for _, rows in of_way]
            axes.plot([n for n, _ in of_way], middle, "o-", markersize=3, color=color, label=way)
        (whole,) = found[system]["all"].values()
        axes.axhline(median(float(row[column]) for row in whole), color="black", linewidth=0.8, linestyle="--")
        axes.set(xscale="log", yscale="log", xticks=COUNTS, xticklabels=COUNTS)
        axes.xaxis.set_minor_locator(NullLocator())
        for of_ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            of_ticks(FormatStrFormatter("%.3g"))
        axes.tick_params(axis="y", which="both", labelsize=7)
        axes.grid(True, which="both", alpha=0.25)
    figure.axes[-1].legend(fontsize=7)
    save(figure, ROOT / "docs/selection.png")


TABLES: dict[str, Callable[[], str]] = {"old and new": online, "selection": selection}


def main() -> None:
    PAGE.write_text(fill(PAGE.read_text(), TABLES))
    picture()


if __name__ == "__main__":
    main()
