"""Rows of results: what every row says of where it comes from, how they are kept, and how a table is written."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rlekf_ext.environment import this_machine

MACHINE = ("threads", "cpu", "cpu_isa", "torch", "version", "commit")


def machine() -> dict[str, object]:
    """The columns of MACHINE, now."""

    def git(*words: str) -> str:
        root = Path(__file__).resolve().parents[1]
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", ":!benchmarks/results", ":!docs")
    return {**this_machine(), "commit": git("describe", "--always") + ("-dirty" if changed else "")}


def append(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Add rows to a CSV file, which gets its header when it is new."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
