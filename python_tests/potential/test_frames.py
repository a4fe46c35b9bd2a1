"""Frames that are made when they are asked for: the cache, surveys, parts of lists, and training with any cache."""

import os

import numpy as np
import pytest
import torch
from helpers import checkpoint_of, curve_of, input_of, make_model, run, weights_of, write_data

from rlekf_ext.errors import DataError
from rlekf_ext.potential import frames as module
from rlekf_ext.potential import train as trainer
from rlekf_ext.potential.batches import Feed, load_frames
from rlekf_ext.potential.data import System, frame_of
from rlekf_ext.potential.frames import Cache, FrameList, bytes_of, look_once, survey
from rlekf_ext.potential.input import read_input
from rlekf_ext.potential.load import load_systems

RCUT, SMOOTH = 4.0, 0.5


def system(counts, seed, number_of_frames=3, energies=True, box=6.0):
    """Atoms on a jittered grid, so that none coincide."""
    random = np.random.default_rng(seed)
    types = np.repeat(np.arange(len(counts)), counts)
    grid = np.stack(np.meshgrid(*[np.arange(3)] * 3), -1).reshape(-1, 3)[: len(types)] * box / 3
    points = grid + random.uniform(-0.3, 0.3, (number_of_frames, len(types), 3))
    boxes = None if box is None else np.tile(box * np.eye(3), (number_of_frames, 1, 1))
    labels = (
        {"energies": random.normal(size=number_of_frames)}
        if energies
        else {"virials": np.zeros((number_of_frames, 3, 3))}
    )
    return System(str(seed), types, points, boxes, **labels)


SYSTEMS = [system((3, 2, 0), 0), system((0, 4, 0), 1, 5), system((1, 0, 7), 2, energies=False), system((3, 2, 0), 3)]


def made(cache=None):
    return FrameList(SYSTEMS, RCUT, 3, cache=cache)


def looked():
    frames = made()
    frames.look(SMOOTH)
    return frames


def names(frames):
    return [frame.name for frame in frames]


def test_frames_and_parts_of_them():
    frames = made()
    every = [frame_of(s, i, RCUT, 3) for s in SYSTEMS for i in range(len(s))]
    assert len(frames) == len(every) == 14
    assert names(frames) == names(every) == [frames.name(i) for i in range(14)]
    assert names(frames[2:9:3]) == names(every[2:9:3])
    assert names(frames[::-1][np.array([0, 5, 5])]) == [every[i].name for i in (13, 8, 8)]
    assert frames[-1].name == every[-1].name
    assert frames.num_atoms.tolist() == [len(frame.types) for frame in every]
    assert frames.labels == {"energy": 11, "virial": 3}
    some = frames[np.array([12, 4, 0, 13, 3])]
    assert [(each.name, names(part)) for each, part in some.parts()] == [
        ("0", ["0, frame 0"]),
        ("1", ["1, frame 1", "1, frame 0"]),
        ("3", ["3, frame 1", "3, frame 2"]),
    ]
    with pytest.raises(IndexError):
        frames[14]


def test_samples():
    frames = made()
    assert frames.sample(14) is frames.spread(14) is frames
    assert len(set(names(frames.sample(6)))) == 6
    assert names(frames.sample(6)) == names(frames.sample(6)) != names(frames.sample(6, seed=1))
    # Every seventh is of systems 0 and 1; then one of the composition of system 2. That of 3 is the one of 0.
    assert names(frames.spread(2)) == ["0, frame 0", "1, frame 4", "2, frame 0"]
    assert names(frames[::-1].spread(1)) == ["3, frame 2", "2, frame 2", "1, frame 4"]


def test_a_spread_has_each_composition_with_each_kind_of_labels():
    frames = FrameList([system((4, 0, 0), 0, 9, energies=False), system((4, 0, 0), 1, 1), SYSTEMS[0]], RCUT, 3)
    assert names(frames.spread(1)) == ["0, frame 0", "1, frame 0", "0, frame 0"]


@pytest.mark.parametrize("share", [0, 0.3, 1])
def test_the_cache_keeps_within_its_bytes_and_changes_nothing(share):
    whole = sum(map(bytes_of, made()))
    cache = Cache(share * whole)
    frames = made(cache)
    for _ in range(2):
        for i in np.random.default_rng(0).permutation(14):
            assert torch.equal(frames[i].edges, made()[int(i)].edges)
    assert cache.used == sum(map(bytes_of, frames._kept.values())) <= cache.num_bytes
    assert (share > 0) == bool(frames._kept)
    assert (share == 1) == (len(frames._kept) == 14)
    if share == 1:
        assert frames[::-1][0] is frames[13] is frames[np.array([13])][0]


def test_a_survey_equals_that_of_made_frames():
    frames, architecture = (
        looked(),
        make_model(("A", "B", "C"), [30] * 3, rcut=RCUT, rcut_smth=SMOOTH).architecture.descriptor,
    )
    for some in (frames, frames[1:12:2], frames[np.array([13, 4])], frames[8:11]):
        one, other = survey(some, architecture), survey(list(some), architecture)
        assert one.slots == other.slots
        assert one.shortest == pytest.approx(other.shortest, rel=1e-15)
        assert one.elements == other.elements
        torch.testing.assert_close(one.sums, other.sums, rtol=1e-12, atol=1e-12)
        assert one.num_energies.sum() == other.num_energies.sum()
        for number, row in ((one.num_energies, one), (other.num_energies, other)):
            assert row.counts.shape == (len(number), 3)
        models = [make_model(("A", "B", "C"), [30] * 3) for _ in range(2)]
        for found, each in zip((one, other), models, strict=True):
            if len(found.counts):
                weights = found.num_energies.sqrt()
                each.solve_energy_bias(weights[:, None] * found.counts, weights * found.energies, range(3))
        torch.testing.assert_close(models[0].energy_bias, models[1].energy_bias, rtol=1e-9, atol=1e-12)
    assert frames.shortest().tolist() == pytest.approx([frame.shortest_edge() for frame in frames], rel=1e-15)
    assert frames.num_neighbors().tolist() == [sum(frame.slots) for frame in frames]
    most = frames.survey().slots
    assert len(frames.with_more_than(most)) == 0
    assert len(frames.with_more_than((most[0] - 1, *most[1:]))) > 0


def test_a_frame_that_cannot_be_made_is_named():
    bad = system((4, 0, 0), 9)
    bad.coordinates[2, 1] = bad.coordinates[2, 0] + 0.05
    with pytest.raises(DataError, match=r"9, frame 2: Atoms 0 and 1 are .* apart, closer than 0\.1"):
        FrameList([SYSTEMS[0], bad], RCUT, 3).look(SMOOTH)
    bad.coordinates[2, 1] = 1e7
    with pytest.raises(DataError, match=r"9, frame 2: .* must stay within 1e\+06 Å"):
        FrameList([bad], RCUT, 3).look(SMOOTH)


def test_a_survey_that_took_long_is_kept_for_the_same_data(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WORTH_KEEPING", -1.0)
    file, folder = tmp_path / "a.npz", write_data(tmp_path / "data")

    def again(**changed):
        frames = FrameList(load_systems(folder, ["Na", "Cl"]), changed.get("cutoff", RCUT), 2)
        return look_once([frames], changed.get("smooth", SMOOTH), file), frames

    read, first = again()
    assert not read
    read, second = again()
    assert read
    assert first.survey().slots == second.survey().slots
    assert torch.equal(first.survey().sums, second.survey().sums)
    assert not again(smooth=1.0)[0]
    assert not again(cutoff=3.5)[0]
    assert again(cutoff=3.5)[0]
    os.utime(tmp_path / "data/set.000/coord.npy", ns=(1, 1))
    assert not again()[0]
    file.write_bytes(file.read_bytes()[:-100])
    assert not again()[0]
    assert again()[0]
    monkeypatch.setattr(module, "WORTH_KEEPING", 60.0)
    file.unlink()
    assert not again()[0]
    assert not file.exists()


@pytest.mark.parametrize("optimizer", [{"type": "RLEKF", "block_size": 64}, {"type": "Adam"}])
def test_training_does_not_depend_on_the_cache(optimizer, tmp_path):
    found = []
    for cache in (0, 8e-6, 1):
        given = input_of(tmp_path / str(cache), optimizer)
        given["training"] |= {"cache": cache, "numb_steps": 9}
        run(given)
        kept = load_frames(read_input(given), quiet=True)[0].every
        kept.cache.limit(cache)
        list(kept)
        assert {0: 0, 1: 3}.get(cache, 2) == len(kept._kept)
        found.append((weights_of(tmp_path / str(cache)), curve_of(tmp_path / str(cache))))
    for parameters, curve in found[1:]:
        assert torch.equal(parameters, found[0][0])
        assert (curve == found[0][1]).all()


def test_a_file_that_changes_during_training_ends_with_a_checkpoint(tmp_path, monkeypatch):
    """A restart with the file put back gives the weights of a run that was not disturbed."""
    undisturbed, disturbed = ({**input_of(tmp_path / name)} for name in ("a", "b"))
    for given in (undisturbed, disturbed):
        given["training"]["cache"] = 0
    run(undisturbed)
    coordinates = tmp_path / "b/data/set.000/coord.npy"
    before, fetch, count = coordinates.read_bytes(), Feed.__next__, iter(range(100))
    times = os.stat(coordinates)

    def counted(self):
        if next(count) == 5:
            coordinates.write_bytes(before[:-8])
        return fetch(self)

    monkeypatch.setattr(Feed, "__next__", counted)
    with pytest.raises(
        DataError, match=r"coord\.npy has changed since it was first read \(it had \d+ bytes, now \d+\)"
    ):
        run(disturbed)
    monkeypatch.undo()
    assert checkpoint_of(tmp_path / "b")["progress"]["step"] in (5, 6)  # the next batch had been made before
    coordinates.write_bytes(before)
    os.utime(coordinates, ns=(times.st_atime_ns, times.st_mtime_ns))
    summary = run(disturbed, restart=True)
    assert [row["epoch"] for row in summary["epochs"]] == [1, 2, 3]  # that of the second had come to nothing
    assert torch.equal(weights_of(tmp_path / "a"), weights_of(tmp_path / "b"))


def test_errors_of_many_held_out_frames_are_of_a_sample_until_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "MOST_EVALUATED", 2)
    given, seen = input_of(tmp_path, num_epochs=3, numb_steps=None, validation_fraction=0.75), []
    evaluate = trainer.end_of_epoch

    def noted(*arguments):
        seen.append(len(arguments[3]))
        return evaluate(*arguments)

    monkeypatch.setattr(trainer, "end_of_epoch", noted)
    run(given)
    assert seen == [2, 2, 3]
