"""The tables of README, performance.md and deepmd.md match their rows."""

import math

import plot_step
import pytest


@pytest.mark.parametrize("page", plot_step.PAGES, ids=lambda page: page.name)
def test_the_pages_are_what_the_rows_say(page):
    text = page.read_text()
    assert plot_step.write_tables(text) == text, f"run benchmarks/plot_step.py: {page.name} is not up to date"


@pytest.fixture
def steps(monkeypatch):
    def row(provider, value, *, metric="step", huge_pages=0, threads=2):
        known = {"case": plot_step.MAIN, "provider": provider, "metric": metric, "value": str(value)}
        return {**known, "huge_pages": str(huge_pages), "threads": str(threads)}

    rows = [row("read", 10), row("naive", 900), row("naive", 600, huge_pages=1), row("mkl spmv", 70)]
    rows += [row("openblas symv", 60, metric="step, beside naive"), row("openblas symv", "", metric="does not fit")]
    rows += [row("ours float32", 99), row("ours float32", 8), row("ours float32", 15, threads=1)]
    monkeypatch.setattr(plot_step, "read", lambda name: rows)
    return plot_step.Steps()


def test_values_are_those_of_the_last_rows_with_most_threads(steps):
    assert steps.of(plot_step.MAIN, "ours float32") == 8
    assert steps.of(plot_step.MAIN, "ours float32", threads=1) == 15
    assert math.isnan(steps.of(plot_step.MAIN, "torch"))
    assert steps.best_blas(plot_step.MAIN) == 60
    assert steps.shown()[plot_step.MAIN, "naive, huge pages"] == 600


def test_ratios(steps):
    table = plot_step.providers(steps)
    assert "| naive: LKF's operations in torch | 900 | 1 % | 1 | 0.067 | 600 | 1 |  |  |" in table
    assert "| **ours, float32** (mean of a fold cycle) | 8 | 62 % of half the bytes | 112 | 7.5 |" in table
