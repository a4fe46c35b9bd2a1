"""The study: what is run, that it continues where it stopped, and that docs/study.md matches the rows."""

import csv
import math
import sys
from pathlib import Path

import bench_training
import numpy as np
import plot_study
import pytest
import study

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "examples"  # NaCl, which is in the project; copper is not
GROUP = {
    "systems": ["Cu", "NaCl"],
    "network": "small",
    "methods": ["RLEKF"],
    "seeds": [1, 2],
    "frames": 4,
    "epochs": 1,
    "looks": 2,
}
TUNED = {**GROUP, "methods": ["Adam 5e-4", "Adam 2e-3", "Adam 8e-3"], "tuned": True, "seeds": [1, 2, 3]}


def names(plan, rows=(), **options):
    return [job.name[2:4] for job in study.jobs(plan, DATA, rows, **options)]


def test_systems_without_data_are_left_out():
    assert {job.name[0] for job in study.jobs([GROUP], DATA, {})} == {"NaCl"}
    assert names([GROUP]) == [("RLEKF", "1"), ("RLEKF", "2")]


def test_the_best_of_tuned_methods_gets_the_other_seeds():
    first = [("Adam 5e-4", "1"), ("Adam 2e-3", "1"), ("Adam 8e-3", "1")]
    assert names([TUNED]) == first
    assert len(names([TUNED], guess=True)) == 5
    rows = {}
    for job, error in zip(study.jobs([TUNED], DATA, {}), (3, 1, 2), strict=True):
        rows[job.name] = {"validation_E": str(error), "validation_F": "1", "test_E": str(-error), "test_F": "1"}
    assert names([TUNED], rows) == [*first, ("Adam 2e-3", "2"), ("Adam 2e-3", "3")]


@pytest.mark.parametrize("plan", study.PLANS)
def test_the_plan_names_what_there_is(plan):
    for group in bench_training.STUDY[plan]:
        labels = group["methods"] if isinstance(group["methods"], list) else bench_training.STUDY[group["methods"]]
        systems = bench_training.STUDY["system"] if group["systems"] == "all" else group["systems"]
        for label in labels:
            for system in systems:
                if "folders" in bench_training.SYSTEMS[system]:
                    method = bench_training.method_of(label)
                    config = bench_training.config_of(system, group["network"], method, seed=1)
                    assert config.optimizer.type == method["optimizer"]["type"]


def test_a_label_has_one_meaning():
    labels = [*bench_training.LABELS, *bench_training.STUDY["past"]]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("label", ["8 frames", "1 force group", "Adam 2e-3"])
def test_the_estimate_takes_any_size_of_batch(label):
    assert 0 < study.pace(("NaCl", "small", label), DATA) < 5
    assert study.Job(("NaCl", "small", label, 1, 100, 1), 1).kind == ("NaCl", "small", label)


def test_parts_share_no_frame():
    points = {}
    for part, (system,) in bench_training.chosen("NaCl", DATA, None).items():
        points[part] = {tuple(frame.ravel()) for frame in system.coordinates}
    assert [len(p) for p in points.values()] == [210, 30, 60]
    assert not points["train"] & points["validation"]
    assert not points["test"] & (points["train"] | points["validation"])
    few = bench_training.chosen("NaCl", DATA, 21)
    assert [len(system) for (system,) in few.values()] == [21, 3, 6]
    for part, (system,) in few.items():
        assert {tuple(frame.ravel()) for frame in system.coordinates} <= points[part]


def test_a_run(tmp_path):
    key = dict(zip(bench_training.KEY, ("NaCl", "small", "RLEKF", 1, 8, 1), strict=True))
    rows, found = bench_training.rows_of(key, bench_training.method_of("RLEKF"), DATA, looks=2)
    assert [row["epoch"] for row in rows] == [0.5, 1.0]
    assert [row["updates"] for row in rows] == [8, 16]
    assert set(rows[0]) == set(bench_training.COLUMNS)
    assert 0 < rows[0]["cpu_seconds"] < rows[1]["cpu_seconds"]
    assert rows[1]["test_F"] == pytest.approx(1e3 * found.force_rmse, rel=1e-4)
    assert all(math.isfinite(rows[1][name]) for name in bench_training.ERRORS)


def test_skip_connections_are_drawn():
    config = bench_training.config_of("NaCl", "small", bench_training.method_of("skip N(2, 0.1²)"), seed=1)
    model = bench_training.build_model(config, bench_training.load("NaCl", DATA, 3)["train"])
    bench_training.draw_skip_connections(model, 2.0, 0.1, seed=1)
    factors = np.concatenate([p.detach().ravel() for name, p in model.named_parameters() if "timestep" in name])
    assert len(factors) > 100
    assert factors.mean() == pytest.approx(2.0, abs=0.05)
    assert factors.std() == pytest.approx(0.1, abs=0.02)


def test_it_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    group = {**GROUP, "frames": 2, "looks": 1, "parity": True}
    monkeypatch.setitem(study.STUDY, "small", [{**group, "seeds": [1]}])
    command = ["study.py", "--data", str(DATA), "--output", str(tmp_path / "rows.csv"), "--workers", "1"]

    def run():
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            study.main()
        assert ended.value.code == 0
        return list(csv.DictReader((tmp_path / "rows.csv").open()))

    first = run()
    assert [row["seed"] for row in first] == ["1"]
    assert len(list(csv.DictReader((tmp_path / "rows_parity.csv").open()))) > 10
    monkeypatch.setitem(study.STUDY, "small", [group])
    both = run()
    assert both[:1] == first
    assert [row["seed"] for row in both] == ["1", "2"]
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", command)
    study.main()
    assert "All runs" in capsys.readouterr().out


@pytest.fixture
def rows(tmp_path):
    """Two seeds each, errors that fall from 10 by 1 (RLEKF) and by 0.5 (Adam) per epoch, and not at all."""
    file = tmp_path / "rows.csv"
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, bench_training.COLUMNS, restval=0)
        writer.writeheader()
        for method, fall, seeds in (("RLEKF", 1.0, 2), ("Adam 2e-3", 0.5, 2), ("Adam 8e-3", 0.0, 1)):
            for seed in range(seeds):
                for epoch in range(1, 9):
                    look = {"system": "Cu", "network": "small", "method": method, "seed": seed, "epoch": epoch}
                    look |= {"updates": 10 * epoch, "cpu_seconds": 2 * epoch}
                    writer.writerow({**look, **dict.fromkeys(bench_training.ERRORS, 10 - fall * epoch)})
    return plot_study.Study(file)


def test_costs_are_those_of_the_first_look_at_the_mark(rows):
    assert rows.method("Cu", "Adam") == "Adam 2e-3"
    assert rows.error("Cu", "RLEKF", "test_E") == 2
    assert rows.error("Cu", "RLEKF", "test_E", epoch=4) == 6
    assert rows.mark("Cu", "test_E", "small") == pytest.approx(2.4)
    assert rows.cost("Cu", "RLEKF", "test_E", "epoch", "small") == 8
    assert rows.cost("Cu", "Adam", "test_E", "epoch", "small") == math.inf
    assert "| Cu | 2e-3 | 8 : never | 80 : never | 16 : never |" in plot_study.costs(rows)


@pytest.mark.parametrize("page", plot_study.PAGES, ids=lambda page: page.name)
def test_the_pages_are_what_the_rows_say(page):
    text, rows = page.read_text(), plot_study.Study(ROOT / "benchmarks/results/study.csv")
    assert plot_study.write_tables(text, rows) == text, f"run benchmarks/plot_study.py: {page.name} is not up to date"
