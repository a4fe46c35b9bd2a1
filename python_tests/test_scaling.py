"""The tables of docs/scaling.md match their rows, and its model is the documented sum."""

import bench_batches
import plot_scaling
import pytest


def test_the_page_is_what_the_rows_say():
    text = plot_scaling.PAGE.read_text()
    assert plot_scaling.write_tables(text) == text, "run benchmarks/plot_scaling.py: scaling.md is not up to date"


def test_the_fit_finds_the_constants_of_rows_that_follow_the_model(monkeypatch):
    wanted = {"byte": 6e-8, "more": 2e-8, "vector": 3e-6, "latency": 0.2, "message": 1e-6}
    rows = []
    for processes in (1, 2, 4):
        for weights, m in ((5120, 1), (26551, 8), (10240, 1)):
            row = {"processes": processes, "measurements": m, "weights": weights, "p_bytes": 1e8 * weights / processes}
            row |= {"message_bytes": 8 * m * weights, "rest_ms": m * weights * wanted["vector"]}
            row["own_ms"] = row["p_bytes"] * (wanted["byte"] + wanted["more"] * (m - 1))
            row["reduce_ms"] = wanted["latency"] + wanted["message"] * row["message_bytes"]
            rows.append(row)
    monkeypatch.setattr(plot_scaling, "rows_of", lambda kind: rows)
    found = plot_scaling.fitted()
    assert found == pytest.approx(wanted)
    for row in rows[:6]:
        parts = row["own_ms"] + row["rest_ms"] + (row["reduce_ms"] if row["processes"] > 1 else 0)
        assert plot_scaling.predicted(row, found) == pytest.approx(parts)


def test_the_batches_table_takes_medians_of_the_last_rows(tmp_path):
    lines = ["system,method,seed,epoch,test_E,test_F"]
    for seed, energy in ((1, 3), (2, 5), (3, 4)):
        lines += [f"Al,1 frame,{seed},5,9,9", f'Al,"4 frames, joint",{seed},6,{energy},{10 * energy}']
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(lines))
    table = bench_batches.table(path)
    assert "| 1 frame | 9 / 9 |" in table
    assert "| 4 frames, joint | 4 / 40 |" in table
