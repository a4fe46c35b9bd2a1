"""The filter's predicted deviations, against a dense P, difference quotients and every force component."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import make_model

from rlekf_ext.errors import InputError
from rlekf_ext.potential.checkpoint import load_checkpoint, restored_model, save_checkpoint
from rlekf_ext.potential.evaluate import compare
from rlekf_ext.potential.input import read_input
from rlekf_ext.potential.model import DeepPotential
from rlekf_ext.potential.neighbors import make_frame
from rlekf_ext.potential.optimizers import build_optimizer
from rlekf_ext.potential.uncertainty import DRAWS, Uncertainty, filter_of, jacobian_of, spearman, uncertainty

RCUT = 4.0


def labelled(seed, num_atoms=12, dtype=torch.float64):
    random = np.random.default_rng(seed)
    grid = np.array(list(itertools.product(range(3), repeat=3)))[:num_atoms] * 2.0
    points = grid + random.uniform(-0.3, 0.3, (num_atoms, 3))
    labels = {"energy": random.normal(scale=num_atoms), "forces": random.normal(size=(num_atoms, 3))}
    return make_frame(points, 6 * np.eye(3), np.arange(num_atoms) % 2, RCUT, 2, dtype=dtype, **labels)


def trained(folder, optimizer, num_batches=5, precision="float64"):
    """What trained a tiny network on a few batches, and the checkpoint, as the trainer writes it."""
    training = {"training_data": {"systems": "a"}, "numb_steps": num_batches, "seed": 3}
    config = read_input({"model": {"type_map": ["A", "B"]}, "training": training, "optimizer": optimizer})
    model = make_model(rcut=RCUT, precision=precision, energy_bias=[1.0, -2.0])
    frames = [labelled(seed, dtype=model.dtype) for seed in range(num_batches)]
    steps = build_optimizer(config, model, num_batches)
    steps.start(frames)
    for i, frame in enumerate(frames):
        steps([frame], i)
    file = folder / "model.ckpt.pt"
    save_checkpoint(file, steps.result, optimizer=steps.state_dict())
    return steps, file


@pytest.fixture
def checkpoint(tmp_path):
    _, file = trained(tmp_path, {"type": "RLEKF", "block_size": 70})
    return load_checkpoint(file)


def dense(optimizer):
    return torch.block_diag(*optimizer.filter.covariance.dense())


def weights_in_order(optimizer, model):
    return optimizer.flatten(list(model.parameters()))


def set_weights(model, flat):
    """The other way: weights as the filter has them, matrices [in, out] transposed."""
    with torch.no_grad():
        for p, part in zip(model.parameters(), flat.split([p.numel() for p in model.parameters()]), strict=True):
            p.copy_(part.view(p.shape[::-1]).T if p.dim() == 2 else part.view(p.shape))


def difference_quotients(optimizer, model, quantity, step=1e-5):
    """Central differences of quantity(model) by every weight: (values, N)."""
    weights = weights_in_order(optimizer, model)
    columns = []
    for k in range(len(weights)):
        moved = torch.zeros_like(weights)
        moved[k] = step
        set_weights(model, weights + moved)
        above = quantity(model)
        set_weights(model, weights - moved)
        columns.append((above - quantity(model)) / (2 * step))
    set_weights(model, weights)
    return torch.stack(columns, 1)


def test_energy_and_force_against_dense_p_and_difference_quotients(checkpoint):
    model = restored_model(checkpoint)
    optimizer = filter_of(checkpoint, model)
    frame = labelled(77, num_atoms=5)
    p = dense(optimizer)
    found = uncertainty(optimizer, model, [frame])

    with torch.no_grad():
        energy = difference_quotients(optimizer, model, lambda m: m(frame).energy / 5)
        forces = difference_quotients(optimizer, model, lambda m: m(frame).forces.flatten())
    assert found.energy[0, 1] == pytest.approx(float(energy[0] @ p @ energy[0]) ** 0.5, rel=1e-6)
    signs = torch.randint(2, (DRAWS, 15), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    draws = signs.double() @ forces / math.sqrt(15)
    assert found.force[0, 1] == pytest.approx(float((draws @ p * draws).sum(1).mean()) ** 0.5, rel=1e-6)

    # Over all signs, the mean is that of the components' own variances: s and -s are one, so half of 2^15 say all.
    every = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=14)), dtype=torch.float64)
    every = torch.cat([every, torch.ones(len(every), 1, dtype=torch.float64)], 1)
    covariance = forces @ p @ forces.T
    expected = (every @ covariance * every).sum(1).mean() / 15
    torch.testing.assert_close(expected, covariance.trace() / 15, rtol=1e-12, atol=0)


def test_a_few_draws_are_near_the_mean_over_all_components(checkpoint):
    model = restored_model(checkpoint)
    optimizer = filter_of(checkpoint, model)
    frames = [labelled(seed) for seed in range(20, 26)]
    p, exact = dense(optimizer), []
    for frame in frames:
        components = model(frame).forces.flatten()
        rows = torch.stack(
            [
                optimizer.flatten(
                    torch.autograd.grad(c, list(model.parameters()), retain_graph=True, allow_unused=True)
                )
                for c in components
            ]
        )
        exact.append(float((rows @ p * rows).sum(1).mean()) ** 0.5)
    estimated = uncertainty(optimizer, model, frames).force[:, 1]
    np.testing.assert_allclose(estimated, exact, rtol=0.4)
    assert np.mean(estimated / exact) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(
    "options",
    [
        {"type": "RLEKF", "block_size": 1000, "strategy": "gekf", "covariance_dtype": "float32"},
        {"type": "RLEKF", "block_size": 40, "preset": "paper"},
        {"type": "LKF", "kf_blocksize": 50},
    ],
)
def test_the_variance_is_that_of_the_filter_that_trained(tmp_path, options):
    steps, file = trained(tmp_path, options)
    before, checkpoint = file.read_bytes(), load_checkpoint(file)
    model = restored_model(checkpoint)
    optimizer = filter_of(checkpoint, model)
    jacobian = jacobian_of(optimizer, model, labelled(0))
    assert jacobian.shape == (1 + DRAWS, sum(p.numel() for p in model.parameters()))
    torch.testing.assert_close(optimizer.variance(jacobian), steps.optimizer.variance(jacobian), rtol=1e-12, atol=0)
    assert file.read_bytes() == before  # P is used where it lies in the file, which stays as it is


def test_errors_are_those_of_compare_and_no_frame_disturbs_another(checkpoint):
    model = restored_model(checkpoint)
    optimizer = filter_of(checkpoint, model)
    frames = [labelled(seed, num_atoms) for seed, num_atoms in enumerate((12, 5, 27, 2))]
    found, comparison = uncertainty(optimizer, model, frames), compare(model, frames)
    np.testing.assert_allclose(found.energy[:, 0], comparison.energy[:, 1] - comparison.energy[:, 0], rtol=1e-9)
    squares = np.split(np.square(np.subtract(*comparison.force.T)), 3 * np.cumsum([12, 5, 27]))
    np.testing.assert_allclose(found.force[:, 0], [np.sqrt(part.mean()) for part in squares], rtol=1e-9)
    turned = uncertainty(optimizer, model, frames[::-1])
    np.testing.assert_allclose(turned.energy[::-1], found.energy, rtol=1e-12)
    np.testing.assert_allclose(turned.force[::-1], found.force, rtol=1e-12)
    assert all(p.grad is None for p in model.parameters())
    frames[1] = replace(frames[1], forces=None)
    rest = uncertainty(optimizer, model, frames)
    assert rest.frame.tolist() == [0, 2, 3]
    np.testing.assert_array_equal(rest.energy, found.energy[[0, 2, 3]])


def test_float32_model(tmp_path):
    _, file = trained(tmp_path, {"type": "RLEKF", "block_size": 70}, precision="float32")
    checkpoint = load_checkpoint(file)
    model = restored_model(checkpoint)
    optimizer = filter_of(checkpoint, model)
    single = uncertainty(optimizer, model, [labelled(9, dtype=torch.float32)])
    model = DeepPotential(replace(model.architecture, precision="float64"))
    model.load_state_dict(checkpoint["weights"])
    double = uncertainty(filter_of(checkpoint, model), model, [labelled(9)])
    np.testing.assert_allclose(single.energy, double.energy, rtol=1e-4)
    np.testing.assert_allclose(single.force, double.force, rtol=1e-4)


def test_a_lone_atom_has_forces_without_variance(checkpoint):
    model = restored_model(checkpoint)
    frame = make_frame([[0, 0, 0]], None, [0], RCUT, 2, energy=1.0, forces=np.zeros((1, 3)))
    found = uncertainty(filter_of(checkpoint, model), model, [frame])
    assert found.energy[0, 1] > 0
    np.testing.assert_array_equal(found.force, [[0, 0]])


@pytest.mark.parametrize("without", [(), ("optimizer",)])
def test_without_a_filter(tmp_path, without):
    adam = load_checkpoint(trained(tmp_path, {"type": "Adam"})[1])
    checkpoint = {name: value for name, value in adam.items() if name not in without}
    with pytest.raises(
        InputError,
        match=r"needs the covariance P .* a run with the optimizer RLEKF or LKF \(NAME\.pt; NAME\.best\.pt is",
    ):
        filter_of(checkpoint, restored_model(checkpoint))


@pytest.mark.parametrize("spoilt", [-1.0, math.nan, math.inf])
def test_a_spoilt_p_is_an_error(checkpoint, spoilt):
    model = restored_model(checkpoint)
    optimizer = filter_of(checkpoint, model)
    optimizer.filter.covariance.tiles.fill_(spoilt)
    with pytest.raises(InputError, match=r"variance HᵀPH of frame 0 should be at least 0 and finite but is .*float64"):
        uncertainty(optimizer, model, [labelled(0)])


# Spearman, the file, the picture


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ([1, 2, 3, 4], [1, 10, 100, 1000], 1.0),
        ([1, 2, 3, 4], [5, 3, 2, -1], -1.0),
        # no ties: 1 - 6 Σd²/(n(n²-1)); d = 0, 1, -1, 1, -1
        ([1, 2, 3, 4, 5], [0.1, 0.3, 0.2, 0.5, 0.4], 1 - 6 * 4 / (5 * 24)),
        # ranks 1, 2.5, 2.5, 4 and 1, 2, 3.5, 3.5: deviations (-1.5, 0, 0, 1.5) and (-1.5, -0.5, 1, 1)
        ([7, 8, 8, 9], [1, 2, 3, 3], 3.75 / math.sqrt(4.5 * 4.5)),
        ([1, 1, 1], [1, 2, 3], math.nan),
        ([1], [2], math.nan),
    ],
)
def test_spearman(x, y, expected):
    x, y = np.array(x, dtype=float), np.array(y, dtype=float)
    assert spearman(x, y) == pytest.approx(expected, rel=1e-12, nan_ok=True)
    assert spearman(y, x) == pytest.approx(expected, rel=1e-12, nan_ok=True)
    assert spearman(np.exp(x / 10), -y) == pytest.approx(-expected, rel=1e-12, nan_ok=True)


def made_up(count=30):
    """Errors drawn from the deviations: four times them for energies, half of them for forces."""
    random = np.random.default_rng(0)
    energy, force = np.exp(random.normal(size=(2, count)))
    drawn = energy * random.choice([-4, 4], count)
    return Uncertainty(np.arange(len(energy)), np.column_stack([drawn, energy]), np.column_stack([force / 2, force]))


def test_sign_of_an_error_does_not_count_and_factors_undo_the_scale():
    assert made_up().spearman == pytest.approx((1, 1))
    assert made_up().factors == pytest.approx((4, 0.5))


def test_columns_of_the_file(tmp_path):
    found = made_up(3)
    path = found.save(tmp_path / "cu")
    assert path == tmp_path / "cu.uncertainty.out"
    names = path.read_text(encoding="utf-8").splitlines()[0].split()
    assert names[:6] == ["#", "frame", "error_e", "deviation_e", "rmse_f", "deviation_f"]
    columns = np.loadtxt(path)
    np.testing.assert_array_equal(columns[:, 0], [0, 1, 2])
    np.testing.assert_array_equal(columns[:, 1:3], found.energy)  # to the last digit
    np.testing.assert_array_equal(columns[:, 3:5], found.force)
    assert np.loadtxt(made_up(1).save(tmp_path / "one"), ndmin=2).shape == (1, 5)
    with pytest.raises(InputError, match=r"cu\.uncertainty\.out/cu\.uncertainty\.out cannot be written: "):
        found.save(path / "cu")


def test_picture(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'rlekf_ext[plot]'")
    from rlekf_ext.potential import plot

    figures, save = [], plot._save
    monkeypatch.setattr(plot, "_save", lambda figure, output: figures.append(figure) or save(figure, output))
    found = made_up()
    path = plot.plot_uncertainty({"held out": found, "liquid": made_up(9)}, tmp_path / "cu.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    for axes, pairs in zip(figures[0].axes, (found.energy, found.force), strict=True):
        points = axes.collections[0].get_offsets()
        np.testing.assert_allclose(points, np.column_stack([pairs[:, 1], 1e3 * abs(pairs[:, 0])]))
        assert [text.get_text() for text in axes.get_legend().texts] == ["held out: 1.00", "liquid: 1.00"]
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        line = axes.lines[0].get_xydata()  # error = factor × deviation passes through these points
        np.testing.assert_allclose(line[:, 1] / line[:, 0], points[0, 1] / points[0, 0])
