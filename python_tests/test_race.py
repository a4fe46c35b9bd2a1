"""The race of benchmarks/race.py: which runs it makes, two short ones, its tables, and what dp gets to read."""

import csv
import math
from itertools import pairwise

import numpy as np
import plot_race
import pytest
import race
import race_deepmd

from rlekf_ext.potential.load import load_systems


def row(key, validation, seconds):
    named = dict(zip(race.KEY, race.name_of(key), strict=True))
    return {**named, "validation_E": str(validation), "validation_F": "1", "seconds": str(seconds)}


def test_later_runs_follow_from_the_earlier_ones():
    rows = {}

    def waiting(full):
        return [job for job in race.jobs("NaCl", "small", rows, full) if race.name_of(job[0]) not in rows]

    ours = list(race.jobs("NaCl", "small", rows, full=False))
    assert [(key[2], key[4], seconds) for key, seconds in ours] == [("RLEKF", seed, None) for seed in race.SEEDS]
    for (key, _), seconds in zip(ours, (3, 1, 2), strict=True):  # the best look of each, and a later one
        rows[race.name_of(key)] = [row(key, 1, seconds), row(key, 2, 10)]
    short = waiting(full=False)
    assert {key[2]: seconds for key, seconds in short} == dict.fromkeys(race.RIVALS, 2)
    assert len(short) == sum(len(rates) for _, rates in race.RIVALS.values())
    errors = dict.fromkeys(race.RIVALS, (100, 50, math.nan)) | {"SOAP": (90, 80, 10)}  # at the end, by rate
    for key, _ in short:
        error = errors[key[2]][race.RIVALS[key[2]][1].index(key[3])]
        rows[race.name_of(key)] = [row(key, 0.1, 1), row(key, error, 2)]
    added = waiting(full=False)
    assert [(key[2:], seconds) for key, seconds in added] == [(("SOAP", 3.2e-2, 1, 1), 2)]  # 8e-3 was the highest
    rows[race.name_of(added[0][0])] = [row(added[0][0], 20, 2)]
    assert [(key[2:], seconds) for key, seconds in waiting(full=False)] == [(("SOAP", 8e-3, 1, race.LONG), 20)]
    assert len(waiting(full=True)) == len(race.RIVALS) * len(race.SEEDS)


def test_the_number_of_rates_is_bounded():
    rows = {}
    for key in (("NaCl", "small", "RLEKF", "", seed, "") for seed in race.SEEDS):
        rows[race.name_of(key)] = [row(key, 1, 2)]
    while new := [key for key, _ in race.jobs("NaCl", "small", rows, full=False) if race.name_of(key) not in rows]:
        for key in new:
            rows[race.name_of(key)] = [row(key, key[3] or 1, 2)]  # the lower the rate the better
    rates = sorted(float(name[3]) for name in rows if name[2] == "Muon" and name[5] == "1")
    assert rates == [1.25e-4, 5e-4, 2e-3, 8e-3, 3.2e-2]


@pytest.mark.parametrize(("method", "rate"), [("RLEKF", ""), ("Muon", 8e-3), ("AdamW", 2e-3)])
def test_a_run_is_looked_at_as_time_goes_by(method, rate):
    seconds, pace = None if method == "RLEKF" else 2.0, race.Pace({128: (0.01, 0.02), 1024: (0.02, 0.04)})
    looks = race.looks_of(("NaCl", "small", method, rate, 1, ""), race.ROOT / "examples", pace, seconds, 2.0)
    frames = race.num_training("NaCl", race.ROOT / "examples", None)
    assert looks[-1]["seconds"] == pytest.approx(2.0, abs=0.05)
    for look in looks:
        assert look["seconds"] == pytest.approx(0.01 * look["epoch"] * frames, abs=2e-3)
        assert look["cpu_seconds"] == pytest.approx(2 * look["seconds"], abs=2e-3)
    seconds = [look["seconds"] for look in looks]
    assert all(later >= race.FIRST_LOOK for later in seconds[:-1])  # the last one is at the end
    assert all(later >= 1.2 * earlier for earlier, later in pairwise(seconds[:-1]))
    assert looks[-1]["validation_F"] < 2 * looks[0]["validation_F"]
    assert set(looks[0]) == set(race.COLUMNS)


def test_the_time_of_a_frame_of_each_method(monkeypatch, tmp_path):
    monkeypatch.setattr(race, "ROUNDS", 1)
    monkeypatch.setattr(race, "FRAMES_IN_ROUND", 4)
    monkeypatch.delitem(race.RIVALS, "SOAP")  # its package is one of the benchmarks'
    assert race.read_paces(tmp_path / "pace.csv", "small") == {}
    for nodes in race.NODES:
        rows = race.measure_paces("NaCl", "small", nodes, race.ROOT / "examples")
        race.append(tmp_path / "pace.csv", race.PACE_COLUMNS, rows)
    paces = race.read_paces(tmp_path / "pace.csv", "small")
    assert set(paces["NaCl"]) == {"RLEKF", *race.RIVALS}
    assert all(0 < one < 1 for pace in paces["NaCl"].values() for both in pace.measured.values() for one in both)
    between = race.Pace({128: (1.0, 10.0), 1024: (3.0, 20.0)}).at(576)
    assert between == [2.0, 15.0]
    assert race.estimate(paces, ["NaCl"], race.ROOT / "examples", full=False, limit=race.LIMIT) > 0
    assert race.read_paces(tmp_path / "pace.csv", "paper") == {}


def rows_of(method, rate, times, errors):
    """One a second, with a force error a hundred times that of the energy."""
    for i, error in enumerate(errors, 1):
        values = ("Cu", "paper", method, rate, 1, times, i, i, i, i, error, error, error, 100 * error)
        yield dict(zip(race.COLUMNS, values, strict=False))


def test_times_are_those_to_the_lowest_final_error(tmp_path):
    with (tmp_path / "race.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, race.COLUMNS)
        writer.writeheader()
        writer.writerows(rows_of("RLEKF", "", "", [4, 1.1, 1.02, 1]))
        writer.writerows(rows_of("Adam", 0.002, 1, [9, 0.9, 8, 7]))  # a dip by chance
        writer.writerows(rows_of("Adam", 0.002, 10, [9, 8, 7, 3, 2, 1.1]))
        writer.writerows(rows_of("SOAP", 0.002, 1, [9, 8, 1.4]))
        writer.writerows(rows_of("dp: Adam", 0.001, "", [9, 1.15]))
    found = plot_race.Race(tmp_path / "race.csv")
    assert found.systems == ["Cu"]
    assert (
        plot_race.for_readme(found).splitlines()[-1]
        == "| Cu | 1 : 1.1 (Adam) | 100 : 110 (Adam) | 2 : 6 | 2 : 6 | 2 : 6 |"
    )
    times = "| Cu | 2 : 6 | 2 : 6 | 2 : 6 | 3 : never | 3 : never | 3 : never |"
    assert plot_race.all_times(found).splitlines()[-1] == times + times.removeprefix("| Cu |")
    assert plot_race.inside_dp(found).splitlines()[-1] == "| Cu | dp, type Adam | 1 | 1.15 | 115 | 2 | 2 |"


def test_dp_reads_the_frames_of_the_race(tmp_path):
    config = race_deepmd.config_of("NaCl", race.ROOT / "examples", tmp_path, {"type": "Adam"})
    parts = race_deepmd.chosen("NaCl", race.ROOT / "examples", None)
    for part, section in (("train", "training_data"), ("test", "validation_data")):
        (folder,) = config["training"][section]["systems"]
        (read,), (own,) = load_systems(folder, config["model"]["type_map"]), parts[part]
        for name in ("types", "coordinates", "boxes", "energies", "forces"):
            np.testing.assert_array_equal(getattr(read, name), getattr(own, name))
    assert config["training"]["validation_data"]["batch_size"] == len(parts["test"][0])
