"""Rows of results name the commit that they come from; scripts refuse others."""

import csv
import subprocess

import pytest
import rows

FILES = sorted(rows.RESULTS.glob("*.csv"))
PREDICTIONS = "study_parity.csv"  # of runs whose rows are in study.csv


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("path", [path for path in FILES if path.name != PREDICTIONS], ids=lambda path: path.name)
def test_each_row_names_a_commit_that_has_its_sources(path):
    wrong = {
        f"line {line}: {row['commit']!r}"
        for line, row in enumerate(read(path), 2)
        if rows.why_refused(path, row["commit"])
    }
    assert not wrong, f"measure these again: {', '.join(sorted(wrong))}"


def test_predictions_are_those_of_runs_that_have_rows():
    runs = [
        {tuple(row[name] for name in ("system", "network", "method", "seed")) for row in read(rows.RESULTS / name)}
        for name in (PREDICTIONS, "study.csv")
    ]
    assert runs[0] <= runs[1]


@pytest.mark.parametrize(("commit", "said"), [("abc1234-dirty", 'is "abc1234-dirty"'), ("", "is unknown")])
def test_results_take_no_rows_without_a_commit(commit, said, monkeypatch, tmp_path):
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(rows, "ROOT", tmp_path)
    monkeypatch.setattr(rows, "commit", lambda: commit)
    (tmp_path / "results").mkdir()
    inside, outside = tmp_path / "results/rows.csv", tmp_path / "rows.csv"
    with pytest.raises(SystemExit, match=f"{said}: commit first"):
        rows.machine(inside)
    with pytest.raises(ValueError, match="write to another file with --output"):
        rows.append(inside, ["commit"], [{"commit": commit}])
    assert rows.machine(outside) == rows.machine()
    rows.append(outside, ["commit"], [{"commit": commit}])
    rows.append(inside, ["commit"], [{"commit": "abc1234"}])
    assert [read(path)[-1]["commit"] for path in (outside, inside)] == [commit, "abc1234"]


def test_the_commit_is_that_of_git(monkeypatch):
    answers = {"describe": "abc1234\n", "status": ""}

    def git(command, **_):
        return subprocess.CompletedProcess(command, 0, stdout=answers[command[1]])

    monkeypatch.setattr(subprocess, "run", git)
    monkeypatch.setenv("RLEKF_COMMIT", "1111111")
    assert rows.commit() == "abc1234"
    answers["status"] = " M setup.py\n"
    assert rows.commit() == "abc1234-dirty"
    answers["describe"] = ""
    assert rows.commit() == "1111111"


def test_without_git_the_commit_is_that_of_the_environment(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("RLEKF_COMMIT", "1111111")
    assert rows.machine()["commit"] == "1111111"
    monkeypatch.delenv("RLEKF_COMMIT")
    assert rows.machine()["commit"] == ""
