"""Tables and pictures of what was measured without training, from rows; measures nothing itself.

    python benchmarks/plot_step.py

Pictures are docs/step_*.png. Tables go into README.md, docs/performance.md and docs/deepmd.md, each between the two
comments that name it. Rows are those of benchmarks/results; of several with the same meaning the last one counts.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from cases import CASES, PAPER_TWO_ELEMENTS, deepmd_water, triangle_bytes
from rows import RESULTS, ROOT, fill, table

from rlekf_ext.covariance import required_bytes
from rlekf_ext.partition import partition

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
BLAS = "openblas symv", "openblas spmv", "mkl symv", "mkl spmv"
SHOWN = [  # provider, metric, label
    ("naive", "step", "naive: LKF's operations in torch"),
    ("torch", "step", "torch: mv, addr_ in place"),
    ("openblas symv", "step", "OpenBLAS symv + syr"),
    ("openblas spmv", "step", "OpenBLAS spmv + spr"),
    ("mkl symv", "step", "MKL symv + syr"),
    ("mkl spmv", "step", "MKL spmv + spr"),
    ("ours float64", "step", "**ours, float64** (mean of a fold cycle)"),
    ("ours float64", "step without fold", "ours, float64, steps without a fold"),
    ("ours float32", "step", "**ours, float32** (mean of a fold cycle)"),
    ("ours float32", "step without fold", "ours, float32, steps without a fold"),
    ("read", "step", "limit: the packed float64 triangle read once"),
]
MAIN = "paper-10240"


class Steps:
    """Medians of step.csv, NaN for missing ones."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str, str, bool, int], float] = {}
        for row in read("step.csv"):
            if row["value"]:
                key = row["case"], row["provider"], row["metric"].partition(",")[0]
                self.values[(*key, row["huge_pages"] == "1", int(row["threads"]))] = float(row["value"])
        self.threads = max(threads for *_, threads in self.values)

    def of(self, case: str, provider: str, metric: str = "step", huge_pages: bool = False, threads: int = 0) -> float:
        """Milliseconds, or bytes, by default with the largest number of threads."""
        return self.values.get((case, provider, metric, huge_pages, threads or self.threads), math.nan)

    def best_blas(self, case: str, huge_pages: bool = False) -> float:
        known = (self.of(case, name, huge_pages=huge_pages) for name in BLAS)
        return min((value for value in known if not math.isnan(value)), default=math.nan)

    def shown(self) -> dict[tuple[str, str], float]:
        """Of the pictures: {(case, provider): ms}; `naive` with and without huge pages are two providers."""
        found = {}
        for (case, provider, metric, huge_pages, threads), value in self.values.items():
            if metric == "step" and threads == self.threads and (provider == "naive" or not huge_pages):
                found[case, f"{provider}, huge pages" if huge_pages else provider] = value
        return found


def read(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def short(value: float) -> str:
    """Three digits."""
    return "" if math.isnan(value) else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def times(value: float) -> str:
    """A ratio: two digits."""
    return "" if math.isnan(value) else f"{value:.2g}" if value < 10 else f"{value:.0f}"


def summary(steps: Steps) -> str:
    """For the README."""
    triangle = triangle_bytes(CASES[MAIN])

    def memory(*names: str) -> str:
        return " / ".join(f"{steps.of(MAIN, name, 'peak memory') / triangle:.3g}" for name in names)

    blas = min(BLAS, key=lambda name: steps.of(MAIN, name))
    label = next(label for name, _, label in SHOWN if name == blas)
    ours = "ours float64", "ours float32"
    fast = " / ".join(short(steps.of(MAIN, name)) for name in ours)
    naive = f"{short(steps.of(MAIN, 'naive'))} ({short(steps.of(MAIN, 'naive', huge_pages=True))})"
    rows = [
        ["the operations of DeePMD-kit's LKF, in torch (with huge pages)", naive, memory("naive")],
        ["torch in place (mv, addr_)", short(steps.of(MAIN, "torch")), memory("torch")],
        [f"the best BLAS ({label})", short(steps.of(MAIN, blas)), memory(blas)],
        ["**rlekf_ext, float64 / float32**", f"**{fast}**", memory(*ours)],
        ["limit: reading the packed triangle once", short(steps.of(MAIN, "read")), "1"],
    ]
    return table(["", "ms per step", "memory of P, in triangles"], rows)


def providers(steps: Steps) -> str:
    """Everything that was timed on the paper's network."""
    rows = []
    for name, metric, label in SHOWN:
        cells, half = [label], "float32" in name
        for huge_pages in (False, True):
            value, limit = (steps.of(MAIN, *what, huge_pages) for what in ((name, metric), ("read", "step")))
            share = f"{100 * limit / value / (1 + half):.0f} %{' of half the bytes' * half}"
            cells += [short(value), *([] if huge_pages else [share])]
            cells += [times(steps.of(MAIN, "naive", huge_pages=huge_pages) / value)]
            cells += [times(steps.best_blas(MAIN, huge_pages) / value)]
        peak = steps.of(MAIN, name, "peak memory") if metric == "step" else math.nan
        rows.append([*cells, short(peak / triangle_bytes(CASES[MAIN]))])
    ratios = ["naive / it", "best BLAS / it"]
    header = ["ms per step", "step", "of the limit", *ratios, "step, huge pages", *ratios, "peak memory / triangle"]
    return table(header, rows)


def cases(steps: Steps) -> str:
    """The same for other blocks and networks, and several measurements in one pass."""
    labels = {f"paper-{n}": f"paper's network, N_b = {n}" for n in (1024, 2048, 5120, 10240)}
    labels["water-1024"] = "DeePMD-kit's water example, N_b = 1024"
    rows = []
    for case, label in labels.items():
        cells = [short(steps.of(case, name)) for name in ("read", "naive", "torch")]
        cells.append(short(steps.best_blas(case)))
        for name in ("ours float64", "ours float32"):
            step, eight = steps.of(case, name), steps.of(case, name, "step of 8 measurements")
            cells += [short(step), times(eight / step / 8)]
        rows.append([label, *cells])
    ours = [cell for kind in ("float64", "float32") for cell in (f"ours, {kind}", "each of eight / a step")]
    return table(["ms per step", "limit", "naive", "torch", "best BLAS", *ours], rows)


def threads(steps: Steps) -> str:
    rows = []
    for name, label in (("read", "limit"), ("ours float64", "ours, float64"), ("ours float32", "ours, float32")):
        one, all_ = (steps.of(MAIN, name, threads=count) for count in (1, steps.threads))
        rows.append([label, short(one), short(all_), f"{one / all_:.2f}"])
    return table(["ms per step", "1 thread", f"{steps.threads} threads", "times faster"], rows)


def drift() -> str:
    """Differences in units of the largest entry."""
    found = {(int(r["steps"]), int(r["size"]), r["H"], r["covariance_dtype"]): r for r in read("accuracy.csv")}
    names = {"isotropic": "isotropic", "1/k": "entry k falls as 1/k", "exp(-k/32)": "entry k falls as exp(-k/32)"}
    rows = []
    for steps, size, kind in sorted({key[:3] for key in found}, key=lambda key: (*key[:2], list(names).index(key[2]))):
        double, single = (found[steps, size, kind, f"torch.{name}"] for name in ("float64", "float32"))
        cells = [double["P"], double["w"], double["smallest eigenvalue"], single["P"], single["w"]]
        rows.append([f"{steps}", f"{size}", names[kind], *(f"{float(cell):.1e}" for cell in cells)])
    ends = ["P, float64", "w, float64", "smallest / largest eigenvalue of P", "P, float32", "w, float32"]
    return table(["steps", "weights", "H", *ends], rows)


def memory() -> str:
    """Of P, for DeePMD-kit's networks with two elements; counted, not allocated."""
    networks = {"[25, 25, 25] / [50, 50, 50]": PAPER_TWO_ELEMENTS}
    networks["DeePMD-kit's water example: [25, 50, 100] / [240, 240, 240]"] = deepmd_water()
    rows = []
    for name, sizes in networks.items():
        for block_size in (1024, 5120, 10240):
            dense = sum(8 * n**2 for n in partition(sizes, block_size, "deepmd").sizes)
            plan = partition(sizes, block_size)
            ours = (required_bytes(plan, dtype=dtype) for dtype in (torch.float64, torch.float32))
            rows.append([name, str(sum(sizes)), str(block_size), *(f"{n / 1e9:.2f} GB" for n in (dense, *ours))])
    return table(["network", "weights", "N_b", "dense, LKF", "ours, float64", "ours, float32"], rows)


def against_lkf() -> str:
    """Seconds per batch in dp, and the filter's share of them."""
    found = {(int(r["block_size"]), int(r["threads"]), r["optimizer"]): r for r in read("deepmd.csv")}
    labels = {
        "LKF": "type LKF",
        "RLEKF preset lkf": "type RLEKF, preset `lkf`",
        "RLEKF float32, preset lkf": 'the same, `"covariance_dtype": "float32"`',
        "RLEKF preset robust": "type RLEKF (preset `robust`)",
    }
    runs = sorted({key[:2] for key in found})
    rows = [[label] for label in labels.values()]
    for row, name in zip(rows, labels, strict=True):
        one = (found.get((*run, name)) for run in runs)
        row += [f"{short(float(r['s_batch']))} s, {100 * float(r['share']):.0f} %" if r else "" for r in one]
    return table(["", *(f"N_b = {n}, {t} thread{'s' * (t > 1)}" for n, t in runs)], rows)


def dp_trainers() -> str:
    """Milliseconds per frame in both trainers of dp, by optimizer and frames per batch."""
    key_of = ("system", "threads", "trainer", "optimizer", "network", "frames")
    found = {tuple(r[name] for name in key_of): r for r in read("deepmd_trainers.csv")}
    columns = sorted(dict.fromkeys(key[:3] for key in found), key=lambda c: (c[0] != "Cu", c[1], c[2]))
    kinds = sorted(dict.fromkeys(key[3:] for key in found), key=lambda kind: int(kind[2]))
    header = ["ms per frame", *(f"{s}, {t} thread{'s' * (t != '1')}, `{trainer}`" for s, t, trainer in columns)]
    rows = []
    for optimizer, network, frames in kinds:
        label = f"type {optimizer}"
        label += {"dp": ", network of dp", "ours": ", network of rlekf_ext"}[network] if optimizer == "RLEKF" else ""
        label += f", {frames} frames per batch" if frames != "1" else ""
        cells = (found.get((*column, optimizer, network, frames)) for column in columns)
        rows.append([label, *(short(float(r["ms_batch"]) / int(frames)) if r else "–" for r in cells)])
    return table(header, rows)


def dp_models() -> str:
    """P of the models that dp offers."""
    found: dict[str, dict[str, str]] = {}
    for row in read("deepmd_models.csv"):
        found.setdefault(row["model"], {"weights": row["weights"]})[row["block_size"]] = row["bytes"]
    sizes = ("1024", "5120")
    rows = [[m, own["weights"], *(f"{float(own[n]) / 1e9:.2f} GB" for n in sizes)] for m, own in found.items()]
    return table(["descriptor", "weights", *(f"P, N_b = {n}" for n in sizes)], rows)


TABLES: dict[str, Callable[[], str]] = {
    "step": lambda: summary(Steps()),
    "providers": lambda: providers(Steps()),
    "cases": lambda: cases(Steps()),
    "threads": lambda: threads(Steps()),
    "drift": drift,
    "memory": memory,
    "against LKF": against_lkf,
    "dp's trainers": dp_trainers,
    "dp's models": dp_models,
}
PAGES = ROOT / "README.md", ROOT / "docs/performance.md", ROOT / "docs/deepmd.md"


def write_tables(text: str) -> str:
    return fill(text, TABLES)


def style(provider: str) -> dict[str, object]:
    color, marker = STYLES[provider]
    return {"color": color, "marker": marker, "markersize": 5, **({"linestyle": "--"} if provider == "read" else {})}


def roofline(steps: Steps, output: Path) -> None:
    """Time of a step against the least time that reading the packed triangle takes in the same run."""
    figure, axes = plt.subplots(figsize=(8, 5), constrained_layout=True)
    values = steps.shown()
    providers = [p for p in dict.fromkeys(p for _, p in values) if p != "read"]
    for provider in providers:
        some = [c for c, p in values if p == provider and (c, "read") in values]
        points = [values[c, "read"] for c in some], [values[c, provider] for c in some]
        axes.plot(*points, linestyle="", label=provider, **style(provider))
    reads = [value for (_, provider), value in values.items() if provider == "read"]
    ends = [min(reads), max(reads)]
    axes.plot(ends, ends, "k-", linewidth=0.8, label="limit: the packed float64 triangle read once")
    axes.set(xscale="log", yscale="log", xlabel="limit (ms)", ylabel="time of a step (ms)")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(output, dpi=150)


def against_block_size(steps: Steps, output: Path) -> None:
    """Time of a step of the paper's network against N_b."""
    figure, axes = plt.subplots(figsize=(8, 4.4), constrained_layout=True)
    values = steps.shown()
    sizes = sorted({int(c.partition("-")[2]) for c, _ in values if c.startswith("paper-")})
    for provider in dict.fromkeys(p for c, p in values if c.startswith("paper-")):
        points = [(n, values.get((f"paper-{n}", provider))) for n in sizes]
        points = [(n, t) for n, t in points if t is not None]
        axes.plot(*zip(*points, strict=True), label="limit" if provider == "read" else provider, **style(provider))
    axes.set(xscale="log", yscale="log", xlabel="N_b", ylabel="time of a step (ms)", xticks=sizes)
    axes.set_xticklabels(sizes)
    axes.minorticks_off()
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(output, dpi=150)


if __name__ == "__main__":
    roofline(Steps(), ROOT / "docs/step_roofline.png")
    against_block_size(Steps(), ROOT / "docs/step_block_size.png")
    for page in PAGES:
        page.write_text(write_tables(page.read_text()))
