"""RMSE against a loop, whatever the grouping."""

import itertools

import numpy as np
import pytest
import torch
from helpers import make_model

from rlekf_ext.errors import InputError
from rlekf_ext.potential import evaluate
from rlekf_ext.potential.evaluate import compare
from rlekf_ext.potential.neighbors import collate, make_frame

RCUT = 4.0


def small_model(precision="float64"):
    return make_model(sel=[60, 60], rcut=RCUT, precision=precision)


def labelled(seed, num_atoms, dtype=torch.float64):
    random = np.random.default_rng(seed)
    grid = np.array(list(itertools.product(range(3), repeat=3)))[:num_atoms] * 2.0
    points = grid + random.uniform(-0.3, 0.3, (num_atoms, 3))
    labels = {"energy": random.normal(scale=num_atoms), "forces": random.normal(size=(num_atoms, 3))}
    return make_frame(points, 6 * np.eye(3), np.arange(num_atoms) % 2, RCUT, 2, dtype=dtype, **labels)


SIZES = (7, 27, 2, 2, 13)


def test_against_a_loop():
    model = small_model()
    frames = [labelled(seed, n) for seed, n in enumerate(SIZES)]
    energy_squares, force_squares, rows = [], [], []
    for frame in frames:
        prediction = model(frame)
        num_atoms = len(frame.types)
        energy_squares.append(((frame.energy.item() - prediction.energy.item()) / num_atoms) ** 2)
        rows.append((frame.energy.item() / num_atoms, prediction.energy.item() / num_atoms))
        for label, predicted in zip(frame.forces.tolist(), prediction.forces.tolist(), strict=True):
            force_squares += [(a - b) ** 2 for a, b in zip(label, predicted, strict=True)]
    comparison = compare(model, frames)
    assert len(force_squares) == 3 * sum(SIZES)
    assert comparison.energy_rmse == pytest.approx((sum(energy_squares) / 5) ** 0.5, rel=1e-12)
    assert comparison.force_rmse == pytest.approx((sum(force_squares) / len(force_squares)) ** 0.5, rel=1e-12)
    np.testing.assert_allclose(comparison.energy, rows, rtol=1e-12)
    np.testing.assert_array_equal(comparison.force[:, 0], torch.cat([f.forces.flatten() for f in frames]).numpy())


@pytest.mark.parametrize(
    ("at_once", "groups"),
    [(1, list(SIZES)), (9, [7, 27, 4, 13]), (29, [7, 29, 15]), (30, [7, 29, 15]), (10**6, [51])],
)
def test_grouping_changes_nothing_and_keeps_to_its_limit(monkeypatch, at_once, groups):
    """A frame above the limit goes alone."""
    model = small_model()
    frames = [labelled(seed, n) for seed, n in enumerate(SIZES)]
    singly = [compare(model, [frame]) for frame in frames]
    sizes = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda batch: sizes.append(len(batch.types)) or forward(batch))
    monkeypatch.setattr(evaluate, "ATOMS_AT_ONCE", at_once)
    together = compare(model, frames)
    np.testing.assert_allclose(together.energy, np.concatenate([one.energy for one in singly]), rtol=1e-11)
    np.testing.assert_allclose(together.force, np.concatenate([one.force for one in singly]), atol=1e-12)
    assert sizes == groups


def test_batches_of_training_count_frame_by_frame():
    model = small_model()
    frames = [labelled(seed, n) for seed, n in enumerate(SIZES)]
    batches = [collate(frames[:2]), frames[2], collate(frames[3:])]
    assert compare(model, batches).energy_rmse == pytest.approx(compare(model, frames).energy_rmse, rel=1e-12)
    assert compare(model, batches).energy.shape == (5, 2)


def test_no_gradient_is_left():
    model = small_model()
    compare(model, [labelled(0, 7)])
    assert all(p.grad is None for p in model.parameters())


def test_float32_model():
    model, exact = small_model("float32"), small_model()
    single = compare(model, [labelled(seed, n, torch.float32) for seed, n in enumerate(SIZES)])
    double = compare(exact, [labelled(seed, n) for seed, n in enumerate(SIZES)])
    assert single.energy_rmse == pytest.approx(double.energy_rmse, rel=1e-5)
    assert single.force_rmse == pytest.approx(double.force_rmse, rel=1e-5)


def test_saved_files_read_back(tmp_path):
    comparison = compare(small_model(), [labelled(seed, n) for seed, n in enumerate(SIZES)])
    paths = comparison.save(tmp_path / "detail")
    assert [path.name for path in paths] == ["detail.e_peratom.out", "detail.f.out"]
    np.testing.assert_array_equal(np.loadtxt(paths[0]), comparison.energy)  # to the last digit
    columns = np.loadtxt(paths[1])
    assert columns.shape == (len(comparison.force) // 3, 6)
    np.testing.assert_array_equal(columns[:, :3].ravel(), comparison.force[:, 0])
    np.testing.assert_array_equal(columns[:, 3:].ravel(), comparison.force[:, 1])
    assert paths[1].read_text(encoding="utf-8").startswith("# data_fx data_fy data_fz pred_fx")
    one = compare(small_model(), [labelled(0, 2)])
    assert np.loadtxt(one.save(tmp_path / "one")[0], ndmin=2).shape == (1, 2)


def test_files_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/detail\.e_peratom\.out cannot be written: "):
        compare(small_model(), [labelled(0, 2)]).save(tmp_path / "file" / "detail")
