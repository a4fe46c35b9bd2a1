"""Which frames train, in which batches, and with which labels."""

import copy
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from helpers import input_of, write_data

from rlekf_ext.errors import DataError, InputError
from rlekf_ext.potential.batches import Frames, batch_sizes, check_lists, labels_used, load_frames, probabilities
from rlekf_ext.potential.data import System
from rlekf_ext.potential.frames import FrameList
from rlekf_ext.potential.input import TrainingData, read_input


def numbers(batch):
    return tuple(int(frame.energy) for frame in batch)


def system(num_atoms, number, entry=0, count=1):
    """Frames whose energies are 100 times the number of the system, plus their own."""
    points = np.arange(3.0 * num_atoms).reshape(-1, 3) * np.ones((count, 1, 1))
    energies, types = 100.0 * number + np.arange(count), np.zeros(num_atoms, dtype=int)
    return System(str(number), types, points, None, energies, entry=entry, number=number)


def batches_of(seed=0, **data):
    """Of five frames of 6 atoms, numbered 0, 1, ..., and seven of 4 atoms, numbered 100, 101, ..."""
    settings, systems = TrainingData(("a",), **data), [system(6, 0, count=5), system(4, 1, count=7)]
    check_lists(settings, systems)
    return Frames(FrameList(systems, 2.0, 1), settings).batches(seed)


@pytest.mark.parametrize(
    ("batch_size", "sizes"),
    [
        (1, [1] * 12),
        (2, [1, 1, 2, 2, 2, 2, 2]),
        (100, [5, 7]),
        ("auto:12", [1, 1, 2, 2, 3, 3]),
        ("auto", [5, 7]),
        ("max:11", [1, 1, 1, 1, 1, 1, 2, 2, 2]),
        ("mix:3", [1] * 12),
        ((5, 1), [1, 1, 1, 1, 1, 1, 1, 5]),
    ],
)
def test_every_frame_is_in_one_batch_an_epoch(batch_size, sizes):
    batches = batches_of(batch_size=batch_size)
    assert batches.most_frames == max(sizes)
    epochs = [[numbers(next(batches)) for _ in range(len(batches))] for _ in range(3)]
    for epoch in epochs:
        assert sorted(len(batch) for batch in epoch) == sizes
        assert sorted(number for batch in epoch for number in batch) == [*range(5), *range(100, 107)]
        assert all(len({number // 100 for number in batch}) == 1 for batch in epoch)  # of one system
    assert epochs[0] != epochs[1] != epochs[2]
    systems_in_turn = [batch[0] // 100 for batch in epochs[0]]
    assert len(sizes) != 7 or systems_in_turn not in (sorted(systems_in_turn), sorted(systems_in_turn, reverse=True))
    again = batches_of(batch_size=batch_size)
    assert [numbers(next(again)) for _ in range(len(again))] == epochs[0]


@pytest.mark.parametrize(
    ("how", "together"),
    [
        ({}, {"0123"}),
        ({"batch_size": "auto:10"}, {"012"}),  # three frames of four atoms
        ({"sys_probs": (0.5, 0.5)}, {"01", "23"}),  # of paths
        ({"sys_probs": (0.25, 0.25, 0.25, 0.25, 0.0)}, {"0", "1", "2", "3"}),  # of systems
        ({"auto_prob": "prob_sys_size;0:3:0.9;3:5:0.1"}, {"012", "3"}),
        ({"auto_prob": "prob_uniform"}, {"0", "1", "2", "3"}),
    ],
)
def test_frames_of_the_same_atoms_share_batches(how, together):
    """Also if each is a file of its own, unless they are not equally likely; those of other atoms or labels do not."""
    systems = [system(4, i, entry=i // 2) for i in range(4)]
    systems.append(replace(system(4, 4, entry=1), forces=np.zeros((1, 4, 3))))
    settings = TrainingData(("a", "b"), **({"batch_size": 4} | how))
    check_lists(settings, systems)
    batches = Frames(FrameList(systems, 2.0, 1), settings).batches(0)
    drawn = {"".join(sorted(str(number // 100) for number in numbers(next(batches)))) for _ in range(300)}
    assert {batch for batch in drawn if batch != "4"} >= together
    assert all("4" not in batch or batch == "4" for batch in drawn)
    assert max(map(len, drawn)) == max(map(len, together))


@pytest.mark.parametrize("how", [{}, {"auto_prob": "prob_uniform"}])
def test_batches_go_on_from_the_middle_of_an_epoch(how):
    batches, ahead = batches_of(batch_size=1, **how), batches_of(batch_size=1, **how)
    wanted = [numbers(next(ahead)) for _ in range(46)]
    for place in range(26):  # beyond two epochs, and at each of their ends
        resumed = batches_of(seed=9, batch_size=1, **how)
        resumed.load_state_dict(copy.deepcopy(batches.state_dict()))
        assert [numbers(next(resumed)) for _ in range(20)] == wanted[place : place + 20], place
        next(batches)


@pytest.mark.parametrize(
    ("how", "share"),
    [
        ({"auto_prob": "prob_uniform"}, 0.5),
        ({"auto_prob": "prob_sys_size;0:1:0.9;1:2:0.1"}, 0.9),
        ({"auto_prob": "prob_sys_size; 0:1:0.9; 1:2:0.1"}, 0.9),  # as DP-GEN writes it
        ({"auto_prob": "prob_sys_size;0:2:1"}, 5 / 12),
        ({"auto_prob": "prob_sys_size;1:2:3"}, 0.0),
        ({"sys_probs": (0.2, 0.8)}, 0.2),
        ({"sys_probs": (0.25, -1.0)}, 0.25),
    ],
)
def test_systems_are_drawn_with_their_probabilities(how, share):
    batches = batches_of(batch_size=1, **how)
    assert len(batches) == 12
    drawn = [numbers(next(batches))[0] for _ in range(12 * 100)]
    found = sum(number < 100 for number in drawn) / len(drawn)
    assert found == pytest.approx(share, abs=4 * 0.5 / len(drawn) ** 0.5)
    if share:
        counts = Counter(number for number in drawn if number < 100)
        assert max(counts.values()) < 1.5 * min(counts.values())  # each frame of a system as often as the others


def test_lists_are_of_systems_or_of_paths():
    found = [system(4, 0, entry=0), system(4, 1, entry=0), system(4, 2, entry=1)]
    assert batch_sizes(TrainingData(("a", "b"), batch_size=(2, 7)), found) == [2, 2, 7]
    assert batch_sizes(TrainingData(("a", "b"), batch_size=(2, 3, 7)), found) == [2, 3, 7]
    assert batch_sizes(TrainingData(("a", "b"), batch_size=(2, 3, 7)), found[:2]) == [2, 3]  # the third was left out
    sentence = "each of the 2 paths in systems, or of the 3 systems found there, but has 4"
    for lists in ({"batch_size": (2, 3, 7, 1)}, {"sys_probs": (0.5, 0.1, 0.2, 0.2)}):
        with pytest.raises(InputError, match=sentence):
            check_lists(TrainingData(("a", "b"), **lists), found)
    of_paths = probabilities(TrainingData(("a", "b"), sys_probs=(0.6, 0.4)), found, [1, 2, 5])
    assert of_paths == pytest.approx([0.2, 0.4, 0.4])
    of_some = probabilities(TrainingData(("a", "b"), sys_probs=(0.6, 0.4)), found[:2], [1, 2])
    assert of_some == pytest.approx([1 / 3, 2 / 3])
    # A folder whose frames differ in their labels is two systems here, and one for DeePMD-kit.
    parts = [system(4, 0), system(4, 0), system(4, 1)]
    assert probabilities(TrainingData(("a",), auto_prob="prob_uniform"), parts, [1, 3, 9]) == [0.125, 0.375, 0.5]


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ({"auto_prob": "prob_sys_size;5:6:1"}, "The block 5:6:1 of auto_prob must hold a system, but none"),
        ({"auto_prob": "prob_sys_size;0:2:0"}, "must be above 0, but auto_prob or sys_probs makes all 0"),
        ({"sys_probs": (0.2, 0.9)}, "sum of sys_probs must be 1 but is: 1.1"),
        ({"sys_probs": (0.2, 0.3)}, "sum of sys_probs must be 1 but is: 0.5"),
    ],
)
def test_probabilities_that_do_not_fit(how, sentence):
    with pytest.raises(InputError, match=sentence):
        batches_of(**how)


def config_of(folder, loss=None, data=None, **training):
    given = input_of(folder, **training)
    given["training"]["training_data"].update(data or {})
    return read_input({**given, "loss": loss} if loss else given)


def test_systems_that_are_never_drawn_are_named(tmp_path):
    """Blocks of auto_prob count folders with a type.raw, not paths."""
    paths = [tmp_path / "old", tmp_path / "new"]
    for name in ("old/a", "old/b", "new/a", "new/b"):
        write_data(tmp_path / name)
    blocks = {"systems": list(map(str, paths)), "auto_prob": "prob_sys_size; 0:1:0.25; 1:2:0.75"}
    said = []
    load_frames(config_of(tmp_path, data=blocks), True, said.append)
    assert f"never draws: 2 ({paths[1]}/a, {paths[1]}/b)" in " ".join(said)
    by_path = {"systems": blocks["systems"], "sys_probs": [0.25, 0.75]}
    said.clear()
    load_frames(config_of(tmp_path, data=by_path), True, said.append)
    assert "never" not in " ".join(said)


def test_close_pairs_and_large_systems_are_left_out(tmp_path):
    write_data(tmp_path / "data")
    said = []
    shortest = min(frame.shortest_edge() for frame in load_frames(config_of(tmp_path), True)[0].every)
    training, held_out = load_frames(config_of(tmp_path, data={"min_pair_dist": shortest + 1e-9}), True, said.append)
    assert len(training.every) + len(held_out.every) < 4
    assert ", left out: " in said[0]
    with pytest.raises(DataError, match="All frames have atoms closer than min_pair_dist"):
        load_frames(config_of(tmp_path, data={"min_pair_dist": 3.4}), True, said.append)
    with pytest.raises(DataError, match="No system has at most 2 atoms"):
        load_frames(config_of(tmp_path, data={"batch_size": "filter:2"}), True, said.append)


@pytest.mark.parametrize(
    ("loss", "optimizer", "sentence"),
    [
        (None, None, r"Labels used: energy \(3 frames\), force \(3 frames\)\. Not used: virial: loss/start_pref_v and"),
        ({"start_pref_v": 1}, None, r"energy \(3 frames\), force \(3 frames\), virial \(3 frames\)\.$"),
        (
            {"start_pref_e": 0, "limit_pref_e": 0},
            None,
            r"used: force \(3 frames\)\. Not used: energy: loss/start_pref_e and",
        ),
        ({"start_pref_v": 1}, {"type": "LKF"}, r"Not used: virial: LKF does not take it"),
        ({"start_pref_v": 1}, {"type": "Adam"}, r"virial \(3 frames\)\.$"),
        (
            {"start_pref_v": 1},
            {"type": "RLEKF", "order": ["energy"]},
            r"energy \(3 frames\)\. Not used: force: optimizer/order",
        ),
    ],
)
def test_the_labels_used_are_said(tmp_path, loss, optimizer, sentence):
    config = read_input({**input_of(tmp_path, optimizer), "loss": loss or {}})
    assert re.search(sentence, labels_used(config, {"energy": 3, "force": 3, "virial": 3}))


def test_no_label_that_is_used(tmp_path):
    config = read_input({**input_of(tmp_path), "loss": {"start_pref_e": 0, "limit_pref_e": 0}})
    with pytest.raises(DataError, match=r"has a label that is used: energy: loss/start.*force: no frame"):
        labels_used(config, {"energy": 1})
