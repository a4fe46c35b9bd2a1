"""The race of benchmarks/race.py: which runs it makes, and two short ones."""

from itertools import pairwise

import pytest
import race


def row(key, validation, seconds):
    named = dict(zip(race.KEY, race.name_of(key), strict=True))
    return {**named, "validation_E": str(validation), "validation_F": "1", "seconds": str(seconds)}


def test_later_runs_follow_from_the_earlier_ones():
    rows = {}
    ours = list(race.jobs("NaCl", "small", rows, full=False))
    assert [(key[2], key[4], seconds) for key, seconds in ours] == [("RLEKF", seed, None) for seed in race.SEEDS]
    for (key, _), seconds in zip(ours, (3, 1, 2), strict=True):  # the best look of each, and a later one
        rows[race.name_of(key)] = [row(key, 1, seconds), row(key, 2, 10)]
    short = list(race.jobs("NaCl", "small", rows, full=False))[len(ours) :]
    assert {key[2]: seconds for key, seconds in short} == dict.fromkeys(race.RIVALS, 2)
    assert len(short) == sum(len(rates) for _, rates in race.RIVALS.values())
    for i, (key, _) in enumerate(short):  # the last rate of each rival is the best, and the last rival
        rows[race.name_of(key)] = [row(key, 0.1, 1), row(key, 100 - i, 2)]
    long = list(race.jobs("NaCl", "small", rows, full=False))[len(ours) + len(short) :]
    assert [(key[2:], seconds) for key, seconds in long] == [
        (("SOAP", 8e-3, 1, race.LONG), 20),
        (("Muon", 3.2e-2, 1, race.LONG), 20),
    ]
    full = list(race.jobs("NaCl", "small", rows, full=True))[len(ours) + len(short) :]
    assert len(full) == len(race.RIVALS) * len(race.SEEDS)


@pytest.mark.parametrize(("method", "rate"), [("RLEKF", ""), ("Muon", 8e-3), ("AdamW", 2e-3)])
def test_a_run_is_looked_at_as_time_goes_by(method, rate, monkeypatch):
    monkeypatch.setattr(race, "LIMIT", 0.5)
    looks = race.looks_of(("NaCl", "small", method, rate, 1, ""), race.ROOT / "examples", 0.5)
    seconds = [look["seconds"] for look in looks]
    assert all(later >= race.FIRST_LOOK for later in seconds[:-1])  # the last one is at the end
    assert all(later >= 1.2 * earlier for earlier, later in pairwise(seconds[:-1]))
    assert looks[-1]["validation_F"] < 2 * looks[0]["validation_F"]
    assert set(looks[0]) == set(race.COLUMNS)
