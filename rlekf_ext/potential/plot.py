"""Pictures of training: learning curves, parity, errors against predicted deviations. Computes nothing itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

from rlekf_ext.errors import InputError
from rlekf_ext.options import KINDS
from rlekf_ext.potential.evaluate import UNITS, Comparison
from rlekf_ext.potential.files import reading, write_atomically
from rlekf_ext.potential.select import Selection
from rlekf_ext.potential.uncertainty import Uncertainty

PICTURES = ("png", "pdf", "svg", "eps", "jpg", "tif", "webp")
COLORS = ["#c2410c", "#1d4ed8", "#15803d", "#7e22ce", "#525252"]


def read_curve(path: str | Path) -> dict[str, np.ndarray]:
    """Columns of an lcurve.out (DeePMD-kit's too), or of the held-out curve in the trainer's JSON, by name.

    Raises InputError for a file that cannot be read or is neither.
    """
    path = Path(path)
    with reading(path):
        text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return _epochs(path, text)
    header, *rows = text[: text.rfind("\n") + 1].splitlines() or [""]  # a kill may have cut the last row
    names = header.lstrip("# ").split()
    numbers = [row.split() for row in rows if not row.startswith("#")]
    if names[:1] != ["step"] or any(len(row) != len(names) for row in numbers):
        raise _unfit(path)
    return _columns(path, names, numbers)


def _epochs(path: Path, text: str) -> dict[str, np.ndarray]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}.") from error
    rows = content.get("epochs", []) if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and row.keys() == rows[0].keys() for row in rows):
        raise _unfit(path)
    names = list(rows[0]) if rows else []
    return _columns(path, names, [[row[name] for name in names] for row in rows])


def _columns(path: Path, names: list[str], rows: list[list[Any]]) -> dict[str, np.ndarray]:
    try:
        values = np.array(rows, dtype=float).reshape(-1, len(names)) if names else np.empty((0, 0))
    except (TypeError, ValueError) as error:
        raise _unfit(path) from error
    return dict(zip(names, values.T, strict=True))


def _unfit(path: Path) -> InputError:
    return InputError(f"{path} is not an lcurve.out: it should have a line of names, first step, and rows of numbers.")


def plot_lcurve(path: str | Path, output: str | Path) -> Path:
    """RMSE of energies, forces and virials of an lcurve.out against the batch number, as far as they are in it."""
    curve = read_curve(path)
    if "epoch" in curve:  # the summary of `rlekf train`
        found = {kind: curve[f"{kind}_rmse"] for kind in KINDS if f"{kind}_rmse" in curve}
        return _panels({"held out": {"x": curve["epoch"], **found}}, "epoch", output)
    lines = {
        label: {"x": curve["step"]}
        | {kind: curve[f"rmse_{kind[0]}_{part}"] for kind in KINDS if f"rmse_{kind[0]}_{part}" in curve}
        for label, part in (("training batch", "trn"), ("held out", "val"))
        if "step" in curve
    }
    lines = {label: line for label, line in lines.items() if len(line) > 1}  # DeePMD-kit may have no val
    if not lines:
        raise InputError(f"{path} has no columns step and rmse_e_trn or rmse_f_trn: give an lcurve.out.")
    return _panels(lines, "batch", output)


def plot_epochs(runs: Mapping[str, Sequence[Mapping[str, Any]]], output: str | Path, against: str = "seconds") -> Path:
    """Held-out RMSE of several runs; `runs` maps a label to the trainer's rows, one per epoch."""
    lines = {
        label: {"x": np.array([row[against] for row in rows])}
        | {kind: np.array([row.get(f"{kind}_rmse", np.nan) for row in rows]) for kind in KINDS}
        for label, rows in runs.items()
    }
    return _panels(lines, {"seconds": "training time (s)"}.get(against, against), output)


def plot_parity(comparisons: Mapping[str, Comparison], output: str | Path) -> Path:
    """Predicted against labelled energies, forces and virials, as far as there are labels; one colour per model."""
    shown = [kind for kind in PARITY if any(len(getattr(one, kind)) for one in comparisons.values())]
    figure, panels = plt.subplots(
        1, len(shown), figsize=(4.5 * len(shown), 4.2), constrained_layout=True, squeeze=False
    )
    for axes, kind in zip(panels[0], shown, strict=True):
        what, factor, dots = PARITY[kind]
        for order, (color, (label, comparison)) in enumerate(zip(COLORS, comparisons.items(), strict=False)):
            pairs = getattr(comparison, kind)
            center = pairs[:, 0].mean() if kind == "energy" else 0.0
            axes.scatter(
                *(factor * (pairs.T - center)),
                color=color,
                zorder=9 - order,
                label=f"{label}: {1e3 * getattr(comparison, f'{kind}_rmse'):.3g} m{UNITS[kind]}",
                **dots,
            )
        axes.axline((0, 0), slope=1, color="black", linewidth=0.8, zorder=0)
        axes.set(xlabel=f"DFT {what}", ylabel=f"predicted {what}")
        axes.legend(title="RMSE", fontsize="small")
    return _save(figure, output)


PARITY: dict[str, tuple[str, float, dict[str, Any]]] = {
    "energy": ("energy − DFT mean (meV/atom)", 1e3, {"s": 12, "alpha": 0.7}),
    "force": ("force component (eV/Å)", 1.0, {"s": 6, "alpha": 0.4}),
    "virial": ("virial component (eV/atom)", 1.0, {"s": 6, "alpha": 0.4}),
}


def plot_uncertainty(found: Mapping[str, Uncertainty], output: str | Path) -> Path:
    """Errors against the filter's predicted deviations, one point per frame, one colour per set of frames.

    A dashed line is error = factor × deviation, the factor that of `Uncertainty.factors`.
    """
    figure, panels = plt.subplots(1, 2, figsize=(9, 4.2), constrained_layout=True)
    for axes, (kind, ylabel) in zip(
        panels, (("energy", "|energy error| (meV/atom)"), ("force", "force RMSE (meV/Å)")), strict=True
    ):
        which = ("energy", "force").index(kind)
        for color, (label, one) in zip(COLORS, found.items(), strict=False):
            error, deviation = abs(getattr(one, kind).T)
            shown = f"{label}: {one.spearman[which]:.2f}"
            axes.scatter(deviation, 1e3 * error, s=12, color=color, alpha=0.7, label=shown)
            ends = np.array([deviation.min(), deviation.max()])
            axes.plot(ends, 1e3 * one.factors[which] * ends, "--", color=color, linewidth=0.8)
        axes.set(xlabel=f"predicted {kind} deviation (relative)", ylabel=ylabel, xscale="log", yscale="log")
        axes.grid(True, which="both", alpha=0.25)
        axes.legend(title="Spearman", fontsize="small")
    return _save(figure, output)


def plot_selection(found: Selection, output: str | Path) -> Path:
    """The predicted deviations of the frames of a pool, and which were chosen."""
    figure, panels = plt.subplots(2, 1, figsize=(8, 5.4), constrained_layout=True, sharex=True)
    frames = np.arange(len(found.deviations))
    for axes, which, label in zip(panels, (0, 1), ("energy, meV/atom", "force, meV/Å"), strict=True):
        axes.scatter(frames, 1e3 * found.deviations[:, which], s=8, color=COLORS[-1], alpha=0.5)
        rank = np.arange(1, len(found.chosen) + 1)
        chosen = 1e3 * found.deviations[found.chosen, which]
        marks = axes.scatter(found.chosen, chosen, s=26, c=rank, cmap="plasma")
        axes.set(ylabel=label, yscale="log" if (found.deviations[:, which] > 0).any() else "linear")
        axes.grid(True, which="both", alpha=0.25)
    panels[0].set_title("Predicted deviations of the pool; chosen frames are coloured")
    panels[-1].set_xlabel("frame")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(marks, ax=panels, label="order of choice", ticks=MaxNLocator(integer=True))
    return _save(figure, output)


def _panels(lines: Mapping[str, Mapping[str, np.ndarray]], xlabel: str, output: str | Path) -> Path:
    """A panel for each kind of error that some line has."""
    absent = np.array(np.nan)
    kinds = [kind for kind in UNITS if any(np.isfinite(line.get(kind, absent)).any() for line in lines.values())]
    kinds = kinds or ["energy", "force"]
    size = (4.5 * len(kinds), 3.8)
    figure, panels = plt.subplots(1, len(kinds), figsize=size, constrained_layout=True, squeeze=False)
    for axes, kind in zip(panels[0], kinds, strict=True):
        for color, (label, line) in zip(COLORS, lines.items(), strict=False):
            if kind in line:
                axes.plot(line["x"], 1e3 * line[kind], "o-", markersize=3, color=color, label=label)
        axes.set(xlabel=xlabel, ylabel=f"{kind} RMSE (m{UNITS[kind]})", yscale="log")
        axes.grid(True, which="both", alpha=0.25)
        axes.legend()
    return _save(figure, output)


def _save(figure: Any, output: str | Path) -> Path:
    """Raises InputError for a kind of picture that is unknown, or a file that cannot be written."""
    output = Path(output)
    form = output.suffix[1:].lower()
    try:
        if form not in PICTURES:
            raise InputError(f"The name of a picture must end in one of .{', .'.join(PICTURES)} but is: {output}.")
        write_atomically(output, lambda path: figure.savefig(path, dpi=150, format=form))
    finally:
        plt.close(figure)
    return output
