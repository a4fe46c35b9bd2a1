"""Algorithm 1 around the filter, on a model whose gradients are known by hand."""

import copy
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracles import DenseFilter, relative
from torch import nn

from rlekf_ext import RLEKF
from rlekf_ext.potential import neighbors
from rlekf_ext.potential.model import DeepPotential
from rlekf_ext.updates import (
    PRESETS,
    FrameUpdater,
    Measurement,
    energy_error,
    energy_update,
    force_error,
    force_groups,
    force_updates,
    virial_error,
    virial_update,
)

E, F, V = "energy", "force", "virial"


class Quadratic(nn.Module):
    """Energies, forces and virials linear in v = w + w²/10 of nine weights; the bias is in the energy alone."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(2, 3, dtype=torch.float64))
        self.vector = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(1, dtype=torch.float64))

    def forward(self, frame, *, forces):
        w = torch.cat([self.matrix.flatten(), self.vector])
        v = w + w.square() / 10
        energy = frame.features[E] @ v + frame.num_atoms * self.bias
        if not forces:
            return SimpleNamespace(energy=energy)
        return SimpleNamespace(energy=energy, forces=frame.features[F] @ v, virial=frame.features[V] @ v)


def make_frame(model, seed=0, counts=(5,), virial=True):
    """A frame whose labels lie above and below the model's predictions in turn, 0.1 to 0.5 away."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    structures, atoms = len(counts), sum(counts)
    features = {E: draw(structures, 9), F: draw(atoms, 3, 9), V: draw(structures, 3, 3, 9)}
    frame = SimpleNamespace(features=features, num_atoms=torch.tensor(counts, dtype=torch.float64))
    with torch.no_grad():
        predicted = model(frame, forces=True)
    for name in ("energy", "forces", "virial"):
        values = getattr(predicted, name)
        away = 0.1 + 0.4 * torch.rand(values.shape, generator=generator, dtype=torch.float64)
        turns = torch.where(torch.arange(values.numel()) % 2 == 0, 1.0, -1.0).view(values.shape)
        setattr(frame, name, values + away * turns)
    if not virial:
        frame.virial = None
    return frame


def by_hand(model, frame, kind, atoms=None):
    """ε and H of Algorithm 2, lines 1 to 7, one component after another; H in the order the weights are stored."""
    with torch.no_grad():
        predicted = model(frame, forces=True)
    w = torch.cat([model.matrix.detach().flatten(), model.vector.detach()])
    slope = 1 + w / 5
    rows = []  # prediction, label, gradient by the weights
    if kind == E:
        for b, n in enumerate(frame.num_atoms.tolist()):
            gradient = torch.cat([frame.features[E][b] * slope, torch.tensor([n])])
            rows.append((predicted.energy[b] / n, frame.energy[b] / n, gradient / n))
    elif kind == F:
        for i in atoms.tolist():
            for axis in range(3):
                gradient = torch.cat([frame.features[F][i, axis] * slope, torch.zeros(1)])
                rows.append((predicted.forces[i, axis], frame.forces[i, axis], gradient))
    else:
        for b, n in enumerate(frame.num_atoms.tolist()):
            for i in range(3):
                for j in range(3):
                    gradient = torch.cat([frame.features[V][b, i, j] * slope, torch.zeros(1)])
                    rows.append((predicted.virial[b, i, j] / n, frame.virial[b, i, j] / n, gradient / n))
    error, jacobian = 0.0, torch.zeros(10, dtype=torch.float64)
    for y_hat, y, gradient in rows:
        flipped = -gradient if y_hat >= y else gradient
        jacobian += flipped / len(rows)
        error += float(abs(y - y_hat)) / len(rows)
    return error, jacobian


class Recorder:
    """An optimizer that keeps what it is given and moves nothing."""

    def __init__(self, model):
        self.param_groups = [{"params": list(model.parameters())}]
        self.errors, self.jacobians = [], []

    def flatten(self, tensors):
        parameters = self.param_groups[0]["params"]
        return torch.cat(
            [(torch.zeros_like(p) if t is None else t).flatten() for p, t in zip(parameters, tensors, strict=True)]
        )

    def update(self, innovation, jacobian):
        self.errors += innovation.reshape(-1).tolist()
        self.jacobians += list(jacobian.detach().reshape(innovation.numel(), -1))


def flat(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def in_order_of(optimizer, model, vector):
    """A vector in the order the weights are stored, in the order of the filter."""
    parts = vector.split([p.numel() for p in model.parameters()])
    return optimizer.flatten([part.view_as(p) for part, p in zip(parts, model.parameters(), strict=True)])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


ATOMS = torch.tensor([4, 1, 6])


@pytest.mark.parametrize("kind", [E, F, V])
def test_error_and_jacobian_are_lines_1_to_7(kind):
    """On two structures of unlike size, with predictions on both sides of the labels."""
    model = Quadratic()
    frame = make_frame(model, counts=(5, 2))
    atoms = ATOMS if kind == F else None
    wanted, jacobian = by_hand(model, frame, kind, atoms)
    arguments = (model, frame, atoms) if kind == F else (model, frame)
    error = {E: energy_error, F: force_error, V: virial_error}[kind](*arguments)
    assert error.item() == pytest.approx(wanted, rel=1e-13)
    assert wanted > 0.01
    error.backward()
    assert model.bias.grad is None or kind == E
    gradient = torch.cat([torch.zeros(1) if p.grad is None else p.grad.flatten() for p in model.parameters()])
    assert relative(-gradient, jacobian) < 1e-13


def test_public_updates_hand_error_and_jacobian_to_the_optimizer():
    model = Quadratic()
    frame, recorder = make_frame(model), Recorder(model)
    found = [
        energy_update(recorder, model, frame),
        *force_updates(recorder, model, frame, generator(3), group_size=2, num_groups=2),
        virial_update(recorder, model, frame, torch.tensor(4.0)),
    ]
    groups = force_groups(5, 2, 2, generator(3))
    wanted = [
        by_hand(model, frame, kind, atoms) for kind, atoms in zip([E, F, F, V], [None, *groups, None], strict=True)
    ]
    assert [error.item() for error in found] == pytest.approx([error for error, _ in wanted], rel=1e-13)
    assert not any(error.requires_grad for error in found)
    for place, scale in enumerate([1, 1, 1, 4]):
        assert recorder.errors[place] == pytest.approx(scale * wanted[place][0], rel=1e-13)
        assert relative(recorder.jacobians[place], scale * wanted[place][1]) < 1e-13


@pytest.mark.parametrize(
    ("num_atoms", "group_size", "num_groups", "sizes"),
    [
        (30, 6, 4, [6, 6, 6, 6]),
        (24, 6, 4, [6, 6, 6, 6]),
        (15, 6, 4, [6, 6, 3]),
        (4, 6, 4, [4]),
        (1, 1, 1, [1]),
        (10, None, 4, [3, 3, 2, 2]),
        (3, None, 4, [1, 1, 1]),
        (9, None, 1, [9]),
    ],
)
def test_force_groups_are_disjoint(num_atoms, group_size, num_groups, sizes):
    groups = force_groups(num_atoms, group_size, num_groups, generator())
    assert [len(group) for group in groups] == sizes
    atoms = torch.cat(groups).tolist()
    assert len(set(atoms)) == len(atoms)
    assert set(atoms) <= set(range(num_atoms))


def test_force_groups_are_random_and_seeded():
    def drawn(source):
        return torch.cat(force_groups(40, 6, 4, source)).tolist()

    source = generator(5)
    first, second = drawn(source), drawn(source)
    assert first == drawn(generator(5))
    assert first != second
    assert first != drawn(generator(6))
    # Every atom is taken sometimes: 24 of 40 each time.
    assert {atom for _ in range(20) for atom in drawn(source)} == set(range(40))


@pytest.mark.parametrize(
    ("order", "num_groups", "kinds"),
    [
        ((E, F, F, F, F), 4, [E, F, F, F, F]),
        ((E, F, F, F, F), 2, [E, F, F]),
        ((E, F, F, F, F), 1, [E, F]),
        ((E, F, F, F, F), 5, [E, F, F, F, F, E, F]),
        ((F, E), 4, [F, E, F, E, F, E, F, E]),
        ((F, E), 1, [F, E]),
        ((F, F, F, F, E), 4, [F, F, F, F, E]),
        ((F, F, F, F, E), 2, [F, F, E]),
        ((E,), 4, [E]),
        ((F,), 3, [F, F, F]),
        ((E, V, F), 2, [E, V, F, E, V, F]),
        ((V,), 4, [V]),
    ],
)
def test_schedule(order, num_groups, kinds):
    assert Measurement(0.98, 6, 4, order).schedule(num_groups) == kinds


def test_frame_updater_goes_through_the_groups_in_order():
    model = Quadratic()
    frames = [make_frame(model, seed, counts=(7,)) for seed in range(2)]
    recorder = Recorder(model)
    updater = FrameUpdater(recorder, model, Measurement(0.98, 3, 4, (F, E, V)), seed=11)
    source = generator(11)
    for frame in frames:
        kinds, found = zip(*updater(frame), strict=True)
        groups = force_groups(7, 3, 4, source)  # three: seven atoms
        assert kinds == (F, E, V) * 3
        wanted = [
            by_hand(model, frame, kind, atoms)[0] for group in groups for kind, atoms in ((F, group), (E, 0), (V, 0))
        ]
        assert [error.item() for error in found] == pytest.approx(wanted, rel=1e-13)
        assert not any(error.requires_grad for error in found)


def test_paper_preset():
    paper = PRESETS["paper"]
    assert (paper.memory_factor, paper.group_size, paper.num_groups) == (0.98, 6, 4)
    assert (paper.energy_scale, paper.force_scale, paper.virial_scale) == (1, 1, 1)
    assert (paper.adaptive_scale, paper.relinearize, paper.warm_start, paper.average_frames) == (False, True, False, 1)
    model = Quadratic()
    updater = FrameUpdater(Recorder(model), model, paper)
    assert [kind for kind, _ in updater(make_frame(model, counts=(30,)))] == [E, F, F, F, F]
    assert [kind for kind, _ in updater(make_frame(model, counts=(8,)))] == [E, F, F]


def test_robust_preset_uses_every_atom_and_ends_with_an_energy():
    robust = PRESETS["robust"]
    model = Quadratic()
    updater = FrameUpdater(Recorder(model), model, robust)
    found = updater(make_frame(model, counts=(30,)))
    assert [kind for kind, _ in found] == [F, E] * 4
    assert robust.group_size is None
    assert robust.adaptive_scale


# Against the dense filter


def dense_of(optimizer, model):
    return DenseFilter(optimizer.filter.plan.sizes, 0.98, 0.9987), in_order_of(optimizer, model, flat(model))


@pytest.mark.parametrize("transpose", [False, True])
def test_relinearized_updates_are_algorithm_1(transpose):
    """Each update at the weights that the one before it left."""
    model = Quadratic()
    optimizer = RLEKF(model.parameters(), block_size=4, transpose=transpose)
    dense, weights = dense_of(optimizer, model)
    assert optimizer.filter.plan.num_blocks == 3
    updater = FrameUpdater(optimizer, model, Measurement(0.98, 2, 3, (E, F, V)), seed=1)
    source = generator(1)
    for frame in [make_frame(model, seed, counts=(5, 2)) for seed in range(4)]:
        before = copy.deepcopy(model)
        kinds = [kind for kind, _ in updater(frame)]
        groups = force_groups(7, 2, 3, source)
        for kind in kinds:
            error, h = by_hand(before, frame, kind, groups.pop(0) if kind == F else None)
            dense.step(weights, in_order_of(optimizer, model, h)[None], [error])
            put(before, weights, transpose)
    assert relative(in_order_of(optimizer, model, flat(model)), weights) < 1e-12
    assert optimizer.filter.memory_factor == pytest.approx(dense.lam, rel=1e-14)


def put(model, weights, transpose):
    """Weights in the order of the filter into the model."""
    for p, part in zip(model.parameters(), weights.split([p.numel() for p in model.parameters()]), strict=True):
        p.data.copy_(part.view(p.mT.shape).mT if transpose and p.dim() == 2 else part.view(p.shape))


@pytest.mark.parametrize("transpose", [False, True])
def test_one_pass_takes_all_measurements_at_one_w(transpose):
    """More of them (13) than go into one pass of the filter, with a parameter that most do not depend on."""
    model = Quadratic()
    optimizer = RLEKF(model.parameters(), block_size=4, transpose=transpose)
    dense, weights = dense_of(optimizer, model)
    measurement = Measurement(
        0.98, 1, 11, (E, V, *[F] * 11), energy_scale=2.0, force_scale=0.5, virial_scale=3.0, relinearize=False
    )
    updater = FrameUpdater(optimizer, model, measurement, seed=1)
    source = generator(1)
    for frame in [make_frame(model, seed, counts=(8, 4)) for seed in range(3)]:
        groups = force_groups(12, 1, 11, source)
        pairs = [(E, None), (V, None), *((F, group) for group in groups)]
        wanted = [by_hand(model, frame, kind, atoms) for kind, atoms in pairs]
        scales = [measurement.scale(kind) for kind, _ in pairs]
        found = updater(frame)
        assert [kind for kind, _ in found] == [kind for kind, _ in pairs]
        assert [error.item() for _, error in found] == pytest.approx([error for error, _ in wanted], rel=1e-12)
        jacobian = torch.stack([s * in_order_of(optimizer, model, h) for s, (_, h) in zip(scales, wanted, strict=True)])
        dense.step(weights, jacobian, [s * error for s, (error, _) in zip(scales, wanted, strict=True)])
        assert relative(in_order_of(optimizer, model, flat(model)), weights) < 1e-11
    assert optimizer.health()["num_updates"] == 3 * 13


@pytest.mark.parametrize("kind", [E, F, V])
@pytest.mark.parametrize("scale", [0.25, 3.0])
def test_a_scale_multiplies_error_and_jacobian_alike(kind, scale):
    """w += a s² ε PH with a = 1 / (L λ + s² HᵀPH): worth a measurement noise of L / s²."""
    model = Quadratic()
    optimizer = RLEKF(model.parameters(), block_size=4)
    frame, start = make_frame(model), flat(model)
    atoms = force_groups(5, 2, 1, generator())[0]
    error, h = by_hand(model, frame, kind, atoms)
    if kind == E:
        energy_update(optimizer, model, frame, scale)
    elif kind == F:
        force_updates(optimizer, model, frame, generator(), group_size=2, num_groups=1, scale=scale)
    else:
        virial_update(optimizer, model, frame, scale)
    wanted = scale**2 * error * h / (3 * 0.98 + scale**2 * float(h @ h))  # P = I
    assert relative(flat(model) - start, wanted) < 1e-11
    reference = DenseFilter([10], 0.98, 0.9987, noise=3 / scale**2)
    weights = start.clone()
    reference.step(weights, h[None], [error])
    assert relative(flat(model), weights) < 1e-13


def test_frame_updater_is_the_public_updates_one_after_another():
    model = Quadratic()
    other = copy.deepcopy(model)
    measurement = Measurement(0.98, 2, 2, (E, F, F, V), energy_scale=2.0, force_scale=0.5, virial_scale=3.0)
    optimizer, another = RLEKF(model.parameters(), block_size=4), RLEKF(other.parameters(), block_size=4)
    updater, source = FrameUpdater(optimizer, model, measurement, seed=2), generator(2)
    for frame in [make_frame(model, seed) for seed in range(3)]:
        found = [error for _, error in updater(frame)]
        singly = [
            energy_update(another, other, frame, 2.0),
            *force_updates(another, other, frame, source, group_size=2, num_groups=2, scale=0.5),
            virial_update(another, other, frame, 3.0),
        ]
        assert [error.item() for error in found] == [error.item() for error in singly]
    assert torch.equal(flat(model), flat(other))


@pytest.mark.parametrize("relinearize", [True, False])
def test_virial_is_left_out_where_there_is_no_label(relinearize):
    model = Quadratic()
    other = copy.deepcopy(model)
    frame = make_frame(model, virial=False)
    for one, order in ((model, (V, E, F, V)), (other, (E, F))):
        measurement = Measurement(0.98, 2, 2, order, relinearize=relinearize)
        found = FrameUpdater(RLEKF(one.parameters()), one, measurement)(frame)
        assert [kind for kind, _ in found] == [E, F, E, F]
    assert torch.equal(flat(model), flat(other))
    optimizer = RLEKF(model.parameters())
    only = FrameUpdater(optimizer, model, Measurement(0.98, 2, 2, (V,), relinearize=relinearize))
    assert only(frame) == []
    assert optimizer.health()["num_updates"] == 0


# Adaptive scales


def energies_away(model, errors):
    """Frames of one atom whose energies lie this far from the model's."""
    frames = []
    for seed, error in enumerate(errors):
        frame = make_frame(model, seed, counts=(1,))
        with torch.no_grad():
            frame.energy = model(frame, forces=False).energy + error
        frames.append(frame)
    return frames


def test_adaptive_scale_is_the_scale_over_the_running_mean():
    model = Quadratic()
    recorder = Recorder(model)
    measurement = Measurement(0.98, 6, 4, (E,), energy_scale=3.0, adaptive_scale=True)
    updater = FrameUpdater(recorder, model, measurement)
    errors = [0.4, 0.1, 2.0, 0.3]
    found = [updater(frame)[0][1].item() for frame in energies_away(model, errors)]
    assert found == pytest.approx(errors)  # as they are, not scaled
    mean, wanted = 0.4, [3.0]
    for error in errors[1:]:
        mean = 0.95 * mean + 0.05 * error
        wanted.append(3.0 * error / mean)
    assert recorder.errors == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("adaptive", [True, False])
def test_early_scale_goes_to_one(adaptive):
    model, error = Quadratic(), 0.5
    recorder = Recorder(model)
    settings = {"energy_scale": 2.0, "early_scale": 5.0, "adaptive_scale": adaptive}
    updater = FrameUpdater(recorder, model, Measurement(0.98, 6, 4, (E,), **settings))
    frames = energies_away(model, [error] * 4000)
    for frame in frames:
        updater(frame)
    wanted = [2.0 * (1 if adaptive else error) * (1 + 4 * 0.9987**i) for i in range(len(frames))]
    assert recorder.errors == pytest.approx(wanted, rel=1e-9)
    assert wanted[-1] == pytest.approx(2.0 * (1 if adaptive else error), rel=0.05)


@pytest.mark.parametrize("relinearize", [True, False])
def test_each_kind_has_its_own_running_mean(relinearize):
    """The first update of each kind has ε = scale, whatever its size."""
    model = Quadratic()
    innovations = []

    class Kept(RLEKF):
        def _apply(self, jacobian, innovation):
            innovations.extend(torch.as_tensor(innovation).reshape(-1).tolist())

    scales = {"energy_scale": 2.0, "force_scale": 0.5, "virial_scale": 7.0}
    measurement = Measurement(0.98, 6, 1, (E, F, V), adaptive_scale=True, relinearize=relinearize, **scales)
    FrameUpdater(Kept(model.parameters()), model, measurement)(make_frame(model))
    assert innovations == pytest.approx([2.0, 0.5, 7.0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 1])
def test_an_error_that_is_not_finite_leaves_no_trace(bad, place):
    """Neither in the running mean, not even as its first value, nor through the filter's guard."""
    model = Quadratic()
    other = copy.deepcopy(model)
    frames = energies_away(model, [0.4, 0.1, 0.3])
    optimizers = []
    for one, used in ((model, frames[:place] + energies_away(model, [bad]) + frames[place:]), (other, frames)):
        optimizers.append(RLEKF(one.parameters()))
        updater = FrameUpdater(optimizers[-1], one, Measurement(0.98, 6, 4, (E,), adaptive_scale=True, early_scale=5))
        for frame in used:
            updater(frame)
    assert torch.equal(flat(model), flat(other))
    assert flat(model).isfinite().all()
    health = optimizers[0].health()
    assert (health["num_updates"], sum(health.values())) == (3, 4)  # one was skipped


def test_an_error_of_zero_scales_to_zero():
    model = Quadratic()
    recorder = Recorder(model)
    updater = FrameUpdater(recorder, model, Measurement(0.98, 6, 4, (E,), adaptive_scale=True))
    for frame in energies_away(model, [0.0, 0.5]):
        updater(frame)
    assert recorder.errors == pytest.approx([0.0, 1 / 0.05])
    assert recorder.jacobians[0].isfinite().all()


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("relinearize", [True, False])
@pytest.mark.parametrize("kept", [through_file, lambda state: state])
def test_saved_and_loaded_it_goes_on_exactly(relinearize, kept):
    model = Quadratic()
    frames = [make_frame(model, seed, counts=(9,)) for seed in range(6)]
    measurement = Measurement(0.98, 2, 3, (F, E), adaptive_scale=True, early_scale=5.0, relinearize=relinearize)
    optimizer = RLEKF(model.parameters())
    updater = FrameUpdater(optimizer, model, measurement, seed=1)
    for frame in frames[:3]:
        updater(frame)
    state, (other, another) = kept(updater.state_dict()), copy.deepcopy((model, optimizer))
    wanted = [error.item() for frame in frames[3:] for _, error in updater(frame)]

    resumed = FrameUpdater(another, other, measurement, seed=99)
    resumed.load_state_dict(state)
    assert [error.item() for frame in frames[3:] for _, error in resumed(frame)] == wanted
    assert torch.equal(flat(model), flat(other))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": ()}, "order should name at least one kind of update but is empty"),
        ({"order": (E, "stress", "dipole")}, "order should hold only energy, force, virial but holds dipole, stress"),
        ({"group_size": 0}, "group_size should be at least 1, or null for all atoms, but is 0"),
        ({"num_groups": 0}, "num_groups should be at least 1 but is 0"),
        ({"batch": "max"}, "batch should be one of mean, sum, joint but is max"),
        ({"early_scale": 0.0}, "early_scale should be above 0 but is 0.0"),
        ({"average_frames": 0}, "average_frames should be at least 1 but is 0"),
        ({"energy_scale": 0.0}, "energy_scale should be above 0 but is 0.0"),
        ({"force_scale": -1.0}, "force_scale should be above 0 but is -1.0"),
        ({"virial_scale": float("nan")}, "virial_scale should be above 0 but is nan"),
    ],
)
def test_settings_out_of_range(change, message):
    settings = {"memory_factor": 0.98, "group_size": 6, "num_groups": 4, "order": (E, F), **change}
    with pytest.raises(ValueError, match=message):
        Measurement(**settings)


def test_virial_updates_fit_the_stress_of_an_ase_calculator():
    """No public set here has virials, so their sign and units are held to those of ASE: W = -V stress."""
    build, emt = pytest.importorskip("ase.build"), pytest.importorskip("ase.calculators.emt")
    random = np.random.default_rng(0)
    labelled = []
    for _ in range(6):
        atoms = build.bulk("Cu", cubic=True)
        atoms.set_cell(atoms.cell @ (np.eye(3) + random.uniform(-0.04, 0.04, (3, 3))), scale_atoms=True)
        atoms.positions += random.normal(0, 0.05, atoms.positions.shape)
        atoms.calc = emt.EMT()
        labels = {
            "energy": atoms.get_potential_energy(),
            "forces": atoms.get_forces(),
            "virial": -atoms.get_volume() * atoms.get_stress(voigt=False),
        }
        types = np.zeros(len(atoms), int)
        labelled.append(neighbors.make_frame(atoms.positions, atoms.cell.array, types, 4.0, 1, **labels))

    model = DeepPotential(["Cu"], [100], 4.0, 0.5, [6, 6], 3, fitting_neuron=[8, 8], seed=0)
    model.fit_statistics(labelled)
    model.fit_energy_bias(labelled)

    def rmse(kind):
        with torch.no_grad():
            errors = [(getattr(model(f), kind) - getattr(f, kind)).square().mean() for f in labelled]
        return torch.stack(errors).mean().sqrt().item()

    optimizer = RLEKF(model.parameters(), transpose=True, memory_factor=0.998)
    measurement = Measurement(0.998, None, 1, ("energy", "virial"), adaptive_scale=True)
    update = FrameUpdater(optimizer, model, measurement)
    before = {kind: rmse(kind) for kind in ("energy", "virial")}
    for _ in range(25):
        for frame in labelled:
            assert [kind for kind, _ in update(frame)] == ["energy", "virial"]
    # With a wrong sign the two could not both be fitted.
    assert rmse("energy") < 0.1 * before["energy"]
    assert rmse("virial") < 0.1 * before["virial"]
