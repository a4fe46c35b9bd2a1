"""Pictures of benchmarks/results/step.csv: time against the limit, and against N_b. Reads rows, measures nothing.

python benchmarks/plot_step.py [rows.csv] [--output docs]
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
STYLES = {  # colour and marker: ours warm, the others by library
    "read": ("black", ""),
    "naive": ("#525252", "o"),
    "naive, huge pages": ("#a3a3a3", "o"),
    "torch": ("#7e22ce", "s"),
    "openblas symv": ("#15803d", "^"),
    "openblas spmv": ("#15803d", "v"),
    "mkl symv": ("#1d4ed8", "^"),
    "mkl spmv": ("#1d4ed8", "v"),
    "ours float64": ("#c2410c", "D"),
    "ours float32": ("#f59e0b", "D"),
}


def style(provider: str) -> dict[str, object]:
    color, marker = STYLES[provider]
    return {"color": color, "marker": marker, "markersize": 5, **({"linestyle": "--"} if provider == "read" else {})}


def read_rows(path: Path) -> dict[tuple[str, str, str], float]:
    """{(case, provider, metric): value} of the steps; `naive` with and without huge pages are two providers."""
    values = {}
    with path.open() as file:
        rows = list(csv.DictReader(file))
        most_threads = max(int(row["threads"]) for row in rows)
        for row in rows:
            if int(row["threads"]) < most_threads:  # rows that show the scaling
                continue
            provider, metric = row["provider"], row["metric"].partition(",")[0]
            if provider == "naive" and row["huge_pages"] == "1":
                provider = "naive, huge pages"
            elif row["huge_pages"] == "1" and provider != "naive":
                continue
            if row["value"]:
                values[row["case"], provider, metric] = float(row["value"])
    return values


def roofline(values: dict[tuple[str, str, str], float], output: Path) -> None:
    """Time of a step against the least time that reading the packed triangle takes in the same run."""
    figure, axes = plt.subplots(figsize=(8, 5), constrained_layout=True)
    providers = [p for p in dict.fromkeys(p for _, p, m in values if m == "step") if p != "read"]
    for provider in providers:
        cases = [c for c, p, m in values if p == provider and m == "step" and (c, "read", "step") in values]
        limits, times = [values[c, "read", "step"] for c in cases], [values[c, provider, "step"] for c in cases]
        axes.plot(limits, times, linestyle="", label=provider, **style(provider))
    ends = [
        min(v for (_, p, _), v in values.items() if p == "read"),
        max(v for (_, p, _), v in values.items() if p == "read"),
    ]
    axes.plot(ends, ends, "k-", linewidth=0.8, label="limit: the packed float64 triangle read once")
    axes.set(xscale="log", yscale="log", xlabel="limit (ms)", ylabel="time of a step (ms)")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(output, dpi=150)


def against_block_size(values: dict[tuple[str, str, str], float], output: Path) -> None:
    """Time of a step of the paper's network against N_b."""
    figure, axes = plt.subplots(figsize=(8, 4.4), constrained_layout=True)
    sizes = sorted({int(c.partition("-")[2]) for c, _, _ in values if c.startswith("paper-")})
    providers = dict.fromkeys(p for c, p, m in values if c.startswith("paper-") and m == "step")
    for provider in providers:
        points = [(n, values.get((f"paper-{n}", provider, "step"))) for n in sizes]
        points = [(n, t) for n, t in points if t is not None]
        axes.plot(*zip(*points, strict=True), label="limit" if provider == "read" else provider, **style(provider))
    axes.set(xscale="log", yscale="log", xlabel="N_b", ylabel="time of a step (ms)", xticks=sizes)
    axes.set_xticklabels(sizes)
    axes.minorticks_off()
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(output, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="?", default=HERE / "results/step.csv")
    parser.add_argument("--output", type=Path, default=HERE.parent / "docs")
    arguments = parser.parse_args()
    values = read_rows(arguments.rows)
    roofline(values, arguments.output / "step_roofline.png")
    against_block_size(values, arguments.output / "step_block_size.png")


if __name__ == "__main__":
    main()
