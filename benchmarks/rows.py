"""Rows of results: what each records about its origin, how rows are kept, and how tables are written."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from rlekf_ext.environment import this_machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
MACHINE = ("threads", "cpu", "cpu_isa", "torch", "version", "commit")
PLACE = re.compile(r"<!-- table: (?P<name>[^\n]*) -->\n(?P<table>.*?\n)??<!-- end -->", re.DOTALL)


def commit(checkout: Path = ROOT) -> str:
    """The commit of the sources in a checkout, with "-dirty" if they differ from it; without git or a repository,
    RLEKF_COMMIT."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=checkout, capture_output=True, text=True).stdout.strip()

    try:
        found = git("describe", "--always")
        changed = found and git("status", "--porcelain", "--", ":!benchmarks/results", ":!docs", ":!*.md")
    except OSError:
        found = changed = ""
    return found + ("-dirty" if changed else "") or os.environ.get("RLEKF_COMMIT", "")


def machine(output: Path | None = None) -> dict[str, object]:
    """The columns of MACHINE, now. A script passes its `output` at the start, and exits if `append` would refuse the
    rows."""
    found = {**this_machine(), "commit": commit()}
    if output and (reason := why_refused(output, found["commit"])):
        sys.exit(reason)
    return found


def why_refused(path: Path, commit: object) -> str:
    """Why a file cannot take rows of this commit, or ""."""
    if not path.resolve().is_relative_to(RESULTS) or (commit and not str(commit).endswith("-dirty")):
        return ""
    found = f'is "{commit}"' if commit else "is unknown"
    return (
        f"Rows in {RESULTS.relative_to(ROOT)} should name the commit of their sources, which {found}: commit first "
        "(without git: set RLEKF_COMMIT), or write to another file with --output."
    )


def append(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Add rows to a CSV file, which gets its header when it is new.

    Raises ValueError for rows in benchmarks/results whose sources are not committed.
    """
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            if "commit" in columns and (reason := why_refused(path, row["commit"])):
                raise ValueError(reason)
            writer.writerow(row)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def keys_of(path: Path, key: Sequence[str]) -> set[tuple[str, ...]]:
    """The columns `key` of the rows that a file has."""
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        return {tuple(row[name] for name in key) for row in csv.DictReader(file)}


def fill(text: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """The page with those of these tables that it has, each between <!-- table: NAME --> and <!-- end -->, updated."""

    def made(place: re.Match[str]) -> str:
        name = place["name"]
        return f"<!-- table: {name} -->\n{tables[name]()}\n<!-- end -->" if name in tables else place[0]

    return PLACE.sub(made, text)
