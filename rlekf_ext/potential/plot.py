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

from rlekf_ext.errors import InputError
from rlekf_ext.potential.evaluate import Comparison
from rlekf_ext.potential.files import reading, write_atomically
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
    header, *rows = text.splitlines() or [""]
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
    """Energy and force RMSE of an lcurve.out against the batch number."""
    curve = read_curve(path)
    lines = {
        label: {"x": curve["step"], "energy": curve[f"rmse_e_{part}"], "force": curve[f"rmse_f_{part}"]}
        for label, part in (("training batch", "trn"), ("held out", "val"))
        if {"step", f"rmse_e_{part}", f"rmse_f_{part}"} <= set(curve)  # DeePMD-kit has no val without validation data
    }
    if not lines:
        raise InputError(f"{path} has no columns step, rmse_e_trn and rmse_f_trn: give an lcurve.out.")
    return _two_panels(lines, "batch", output)


def plot_epochs(runs: Mapping[str, Sequence[Mapping[str, Any]]], output: str | Path, against: str = "seconds") -> Path:
    """Held-out RMSE of several runs; `runs` maps a label to the trainer's rows, one per epoch."""
    lines = {
        label: {
            "x": np.array([row[against] for row in rows]),
            "energy": np.array([row["energy_rmse"] for row in rows]),
            "force": np.array([row["force_rmse"] for row in rows]),
        }
        for label, rows in runs.items()
    }
    return _two_panels(lines, {"seconds": "training time (s)"}.get(against, against), output)


def plot_parity(comparisons: Mapping[str, Comparison], output: str | Path) -> Path:
    """Predicted against labelled energies and forces, one colour per model."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.2), constrained_layout=True)
    for order, (color, (label, comparison)) in enumerate(zip(COLORS, comparisons.items(), strict=False)):
        center = comparison.energy[:, 0].mean()
        energy, force = 1e3 * comparison.energy_rmse, 1e3 * comparison.force_rmse
        left.scatter(
            *(1e3 * (comparison.energy.T - center)),
            s=12,
            color=color,
            alpha=0.7,
            label=f"{label}: {energy:.3g} meV/atom",
        )
        right.scatter(
            *comparison.force.T, s=6, color=color, alpha=0.4, zorder=9 - order, label=f"{label}: {force:.3g} meV/Å"
        )
    for axes, what in ((left, "energy − mean (meV/atom)"), (right, "force component (eV/Å)")):
        axes.axline((0, 0), slope=1, color="black", linewidth=0.8, zorder=0)
        axes.set(xlabel=f"DFT {what}", ylabel=f"predicted {what}")
        axes.legend(title="RMSE", fontsize="small")
    return _save(figure, output)


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


def _two_panels(lines: Mapping[str, Mapping[str, np.ndarray]], xlabel: str, output: str | Path) -> Path:
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), constrained_layout=True)
    for axes, kind, unit in zip(panels, ("energy", "force"), ("meV/atom", "meV/Å"), strict=True):
        for color, (label, line) in zip(COLORS, lines.items(), strict=False):
            axes.plot(line["x"], 1e3 * line[kind], "o-", markersize=3, color=color, label=label)
        axes.set(xlabel=xlabel, ylabel=f"{kind} RMSE ({unit})", yscale="log")
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
