"""What an optimizer does with a batch: LKF and Adam against DeePMD-kit's formulas, written out here once more."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from helpers import make_model
from oracles import DenseFilter, relative

from rlekf_ext.batch_parts import force_groups
from rlekf_ext.partition import partition
from rlekf_ext.potential.input import read_input
from rlekf_ext.potential.neighbors import collate, make_frame
from rlekf_ext.potential.optimizers import build_optimizer, mean_squared_loss, prefactors

RCUT, NUM_STEPS = 4.0, 8


def config_of(optimizer, **sections):
    training = {"training_data": {"systems": "a"}, "numb_steps": NUM_STEPS, "seed": 3}
    return read_input({"model": {"type_map": ["A", "B"]}, "training": training, "optimizer": optimizer, **sections})


def labelled(model, seed, num_atoms=12, virial=True):
    """A frame whose labels are the model's own predictions and some noise."""
    random = np.random.default_rng(seed)
    cell = 6.0 * np.eye(3)
    grid = np.array(list(itertools.product(range(3), repeat=3)))[:num_atoms] * 2.0
    points = grid + random.uniform(-0.3, 0.3, (num_atoms, 3))
    types = random.permutation(np.arange(num_atoms) % 2)
    prediction = model(make_frame(points, cell, types, RCUT, 2))
    labels = {
        "energy": prediction.energy.item() + random.normal(),
        "forces": prediction.forces.detach().numpy() + random.normal(scale=0.3, size=(num_atoms, 3)),
        "virial": prediction.virial[0].detach().numpy() + random.normal(size=(3, 3)) if virial else None,
    }
    return make_frame(points, cell, types, RCUT, 2, **labels)


def built(config, model, frames, *, fresh=True, num_steps=NUM_STEPS):
    optimize = build_optimizer(config, model, num_steps)
    if fresh:
        optimize.start(frames)
    return optimize


@pytest.fixture
def model():
    return make_model(rcut=RCUT)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def in_filter(steps, model):
    return steps.optimizer.flatten([p.detach() for p in model.parameters()])


# LKF: the formulas of KFWrapper.py and LKF.py of DeePMD-kit 3.2


def deepmd_lkf(model, optimizer, dense, weights, frame, groups, energy_pref, force_pref):
    """An energy update and a force update for each group, on a copy of the model that follows `weights`."""
    model = copy.deepcopy(model)
    parameters = list(model.parameters())
    num_atoms, num_frames = float(frame.num_atoms[0]), len(frame.num_atoms)

    def update(error, flipped):
        gradients = torch.autograd.grad(flipped, parameters, allow_unused=True)
        dense.step(weights, optimizer.flatten(gradients)[None], [error * math.sqrt(num_frames)])
        parts = weights.split([p.numel() for p in parameters])
        for p, part in zip(parameters, parts, strict=True):
            p.data.copy_(part.view(p.shape[::-1]).T if p.dim() == 2 else part)

    energy = model(frame).energy
    sign = torch.where(frame.energy - energy < 0, -1.0, 1.0)
    error = energy_pref * (frame.energy - energy).abs().mean() / num_atoms
    update(float(error.detach()), energy_pref * (sign * energy).sum() / num_atoms)
    for group in groups:
        forces = model(frame).forces[group]
        sign = torch.where(frame.forces[group] - forces < 0, -1.0, 1.0)
        error = force_pref * (frame.forces[group] - forces).abs().mean() / num_atoms
        update(float(error.detach()), force_pref * num_frames * (sign * forces).sum() / (num_atoms * sign.numel()))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_lkf_is_deepmd_kits(model, batch_size):
    """With its blocks, its division of forces by the number of atoms, and prefactors that change geometrically.

    Of B frames, H is a sum over frames and ε the mean times √B; a group has six atoms of a frame in the mean.
    """
    keys = {"kf_start_pref_e": 2.0, "kf_limit_pref_e": 8.0, "kf_start_pref_f": 3.0, "kf_limit_pref_f": 0.5}
    config = config_of({"type": "LKF", "kf_blocksize": 60, **keys})
    frames = [labelled(model, seed) for seed in range(3)]
    steps = built(config, model, frames)
    sizes = partition([p.numel() for p in model.parameters()], 60, "deepmd").sizes
    assert steps.optimizer.filter.plan.sizes == sizes
    dense, weights = DenseFilter(sizes, 0.98, 0.9987), in_filter(steps, model)
    source = torch.Generator().manual_seed(3)
    for step in (0, 3, 7):
        batch = collate(frames[:batch_size])
        groups = force_groups(12 * batch_size, 6 * batch_size, 4, source)
        energy_pref = 2.0 * (8.0 / 2.0) ** (step / NUM_STEPS)
        force_pref = 3.0 * (0.5 / 3.0) ** (step / NUM_STEPS)
        before = copy.deepcopy(model)
        assert steps(frames[:batch_size], step) == 1 + len(groups)
        deepmd_lkf(before, steps.optimizer, dense, weights, batch, groups, energy_pref, force_pref)
        assert relative(in_filter(steps, model), weights) < 1e-10
    assert not torch.equal(flat(before), flat(model))


def test_lkf_defaults_are_deepmd_kits(model):
    steps = built(config_of({"type": "LKF"}), model, [])
    assert "strategy deepmd" in repr(steps)
    assert steps.optimizer.options.block_size == 5120
    assert steps.optimizer.filter.memory_factor == pytest.approx(0.98)
    assert steps.learning_rate == 1.0
    frame = labelled(model, 0)
    weights, dense = in_filter(steps, model), DenseFilter(steps.optimizer.filter.plan.sizes, 0.98, 0.9987)
    groups, before = force_groups(12, 6, 4, torch.Generator().manual_seed(3)), copy.deepcopy(model)
    steps([frame], 5)
    deepmd_lkf(before, steps.optimizer, dense, weights, frame, groups, 1.0, 1.0)
    assert relative(in_filter(steps, model), weights) < 1e-10


# RLEKF


def test_rlekf_is_robust_unless_told_otherwise(model):
    frame = labelled(model, 0)
    assert built(config_of({"type": "RLEKF"}), model, [frame])([frame], 0) == 2
    paper = config_of({"type": "RLEKF", "preset": "paper"})
    assert built(paper, model, [frame])([frame], 0) == 3  # 12 atoms are two groups of 6
    changed = config_of({"type": "RLEKF", "preset": "paper", "group_size": None, "order": ["force", "energy"]})
    assert built(changed, model, [frame])([frame], 0) == 8


def test_rlekf_settings_reach_the_filter(model):
    options = {
        "block_size": 50,
        "strategy": "sekf",
        "memory_factor": 0.9,
        "forgetting_rate": 0.5,
        "initial_covariance": 4.0,
        "measurement_noise": 2.0,
        "process_noise": 0.125,
        "covariance_dtype": "float32",
        "warm_start": False,
        "prior": "identity",
        "order": ["energy"],
        "energy_scale": 1.0,
        "early_scale": 1.0,
        "adaptive_scale": False,
    }
    frame = labelled(model, 0)
    steps = built(config_of({"type": "RLEKF", **options}), model, [frame])
    kalman = steps.optimizer.filter
    assert kalman.covariance.tiles.dtype == torch.float32
    dense = DenseFilter(kalman.plan.sizes, 0.9, 0.5, p0=4.0, noise=2.0, q=0.125)
    assert max(dense.sizes) <= 50
    assert max(dense.sizes) - min(dense.sizes) <= 1
    weights = in_filter(steps, model)
    for _ in range(2):
        energy = model(frame).energy
        error = (frame.energy - energy) / 12
        gradients = torch.autograd.grad(energy.sum() / 12, list(model.parameters()))
        dense.step(weights, steps.optimizer.flatten(gradients)[None], [float(error.detach())])
        steps([frame], 0)
    assert relative(in_filter(steps, model), weights) < 1e-6
    assert kalman.memory_factor == pytest.approx(dense.lam)


@pytest.mark.parametrize(("batch", "of_jacobian", "of_innovation"), [("mean", 1, 1), ("sum", 3, math.sqrt(3))])
@pytest.mark.parametrize("relinearize", [True, False])
def test_frames_of_a_batch(model, batch, of_jacobian, of_innovation, relinearize):
    frames = collate([labelled(model, seed) for seed in range(3)])
    asked = {"type": "RLEKF", "preset": "paper", "order": ["energy"], "batch": batch, "relinearize": relinearize}
    steps = built(config_of(asked), model, [frames])
    weights, dense = in_filter(steps, model), DenseFilter(steps.optimizer.filter.plan.sizes, 0.98, 0.9987)
    error = ((frames.energy - model(frames).energy).abs() / 12).mean()
    jacobian = steps.optimizer.flatten(torch.autograd.grad(-error, list(model.parameters())))
    dense.step(weights, of_jacobian * jacobian[None], [of_innovation * float(error.detach())])
    assert steps([frames], 0) == 1
    assert relative(in_filter(steps, model), weights) < 1e-10


def test_warm_start_moves_the_mean_energy_error_into_the_bias(model):
    frames = [labelled(model, seed) for seed in range(3)]

    def mean_error():
        with torch.no_grad():
            return sum(float(model(frame).energy - frame.energy) for frame in frames) / 3

    model.energy_bias.add_(5.0)
    before = mean_error()
    assert abs(before) > 1
    paper = config_of({"type": "RLEKF", "preset": "paper"})
    robust = config_of({"type": "RLEKF"})
    built(paper, model, frames)
    built(robust, model, frames, fresh=False)  # a restart brings its own bias
    assert mean_error() == before
    built(robust, model, frames)
    assert abs(mean_error()) < 1e-12 * abs(before)


@pytest.mark.parametrize("average_frames", [1, 2, 8])
def test_result_is_a_running_mean_of_the_weights(model, average_frames):
    """It begins at the weights that the first batch left, and takes 1/average_frames of each later ones'."""
    config = config_of({"type": "RLEKF", "average_frames": average_frames})
    frames = [labelled(model, seed) for seed in range(4)]
    alone = copy.deepcopy(model)
    steps = built(config, model, frames)
    plain = built(config_of({"type": "RLEKF", "average_frames": 1}), alone, frames)
    mean = None
    for step, frame in enumerate(frames):
        steps([frame], step)
        plain([frame], step)
        assert torch.equal(flat(model), flat(alone))  # the mean does not reach the filter
        mean = flat(model) if mean is None else mean + (flat(model) - mean) / average_frames
        assert relative(flat(steps.result), mean) < 1e-13
    assert (steps.result is model) == (average_frames == 1)
    for name, buffer in model.named_buffers():  # among them the bias that the warm start moved
        assert torch.equal(dict(steps.result.named_buffers())[name], buffer)


# Adam


@pytest.mark.parametrize(
    ("section", "num_steps", "rates"),
    [
        # 1e-3 to 1e-5 in ten stairs
        ({"decay_steps": 10}, 100, {0: 1e-3, 9: 1e-3, 10: 1e-3 * 0.01**0.1, 95: 1e-3 * 0.01**0.9, 100: 1e-5}),
        ({"decay_steps": 10, "decay_rate": 0.5}, 100, {0: 1e-3, 35: 1e-3 / 8, 69: 1e-3 / 64, 70: 1e-5, 99: 1e-5}),
        # decay_steps = 5000 is too long for these; DeePMD-kit takes 100, or a hundredth of the run and one
        ({}, 2000, {0: 1e-3, 99: 1e-3, 100: 1e-3 * 0.01 ** (100 / 2000)}),
        ({}, 1000, {10: 1e-3, 11: 1e-3 * 0.01 ** (11 / 1000), 22: 1e-3 * 0.01 ** (22 / 1000)}),
        ({}, 50, {0: 1e-3, 1: 1e-3 * 0.01 ** (1 / 50)}),
        ({"decay_steps": 1000}, 1000, {11: 1e-3 * 0.01 ** (11 / 1000)}),
    ],
)
def test_learning_rate_is_deepmd_kits(model, section, num_steps, rates):
    config = config_of({"type": "Adam"}, learning_rate={"start_lr": 1e-3, "stop_lr": 1e-5, **section})
    frame = labelled(model, 0, num_atoms=2)
    steps = built(config, model, [frame], num_steps=num_steps)
    for step, rate in rates.items():
        assert steps([frame], step) == 1
        assert steps.learning_rate == pytest.approx(rate, rel=1e-12)


def loss_by_hand(model, frames, factor):
    """DeePMD-kit's `ener` loss of frames of one size, number by number."""
    with torch.no_grad():
        predictions = [model(frame) for frame in frames]
    energy = np.mean([float(p.energy - f.energy) ** 2 for p, f in zip(predictions, frames, strict=True)])
    force = np.mean([(p.forces - f.forces).numpy() ** 2 for p, f in zip(predictions, frames, strict=True)])
    virial = np.mean([(p.virial - f.virial).numpy() ** 2 for p, f in zip(predictions, frames, strict=True)])
    num_atoms = len(frames[0].types)
    return factor["e"] * energy / num_atoms + factor["f"] * force + factor["v"] * virial / num_atoms


@pytest.mark.parametrize("batch_size", [1, 3])
def test_loss_by_hand(model, batch_size):
    frames = [labelled(model, seed) for seed in range(batch_size)]
    factor = {"e": 0.7, "f": 11.0, "v": 0.3}
    loss = mean_squared_loss(model, collate(frames), factor)
    assert loss.item() == pytest.approx(loss_by_hand(model, frames, factor), rel=1e-12)


def test_loss_without_a_virial_label(model):
    with_label, without = (labelled(model, 0, virial=virial) for virial in (True, False))
    factor = {"e": 0.7, "f": 11.0, "v": 0.3}
    wanted = loss_by_hand(model, [with_label], {**factor, "v": 0.0})
    assert mean_squared_loss(model, without, factor).item() == pytest.approx(wanted, rel=1e-12)


def test_prefactors_follow_the_learning_rate():
    loss = config_of(
        {"type": "Adam"},
        loss={"start_pref_e": 0.02, "limit_pref_e": 1, "start_pref_f": 1000, "limit_pref_f": 1, "limit_pref_v": 8},
    ).loss
    assert prefactors(loss, 1.0) == {"e": 0.02, "f": 1000.0, "v": 0.0}
    assert prefactors(loss, 0.0) == {"e": 1.0, "f": 1.0, "v": 8.0}
    assert prefactors(loss, 0.25) == pytest.approx({"e": 0.755, "f": 250.75, "v": 6.0})


def test_adam_by_hand(model):
    """Its moments, with prefactors at the rate of the step and all of beta1, beta2 and weight_decay."""
    config = config_of(
        {"type": "Adam", "adam_beta1": 0.8, "adam_beta2": 0.95, "weight_decay": 0.01},
        learning_rate={"start_lr": 1e-2, "stop_lr": 1e-3, "decay_steps": 1},
        loss={"start_pref_e": 0.5, "limit_pref_e": 1, "start_pref_f": 10, "limit_pref_f": 1},
    )
    other, frame = copy.deepcopy(model), labelled(model, 0)
    steps = built(config, model, [frame])
    weights = flat(other)
    first, second = torch.zeros_like(weights), torch.zeros_like(weights)
    for step in range(3):
        steps([frame], step)
        rate = 1e-2 * 0.1 ** (step / NUM_STEPS)
        share = rate / 1e-2
        prediction = other(frame)
        loss = (1 - 0.5 * share) * (prediction.energy - frame.energy).square().mean() / 12
        loss = loss + (1 + 9 * share) * (prediction.forces - frame.forces).square().mean()
        gradients = torch.autograd.grad(loss, list(other.parameters()))
        gradient = torch.cat([g.flatten() for g in gradients]) + 0.01 * weights
        first = 0.8 * first + 0.2 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        corrected = (second / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8
        weights = weights - rate * first / (1 - 0.8 ** (step + 1)) / corrected
        torch.nn.utils.vector_to_parameters(weights, other.parameters())
        assert relative(flat(model), weights) < 1e-12
