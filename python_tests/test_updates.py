"""Algorithm 1 around the filter, on a model whose gradients are known by hand."""

import copy
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import make_model
from oracles import DenseFilter, relative
from torch import nn

from rlekf_ext import RLEKF
from rlekf_ext.batch_parts import force_groups
from rlekf_ext.errors import DataError, OptionError
from rlekf_ext.potential import neighbors
from rlekf_ext.updates import FrameUpdater, energy_error, force_error, schedule, virial_error

E, F, V = "energy", "force", "virial"


def recipe(group_size=6, num_groups=4, order=(E, F, F, F, F), **options):
    return {"preset": "paper", "group_size": group_size, "num_groups": num_groups, "order": order, **options}


class Quadratic(nn.Module):
    """Energies, forces and virials linear in v = w + w²/10 of nine weights; the bias is only in the energy."""

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


class Recorder(RLEKF):
    """An optimizer that records what it is given and moves nothing."""

    def __init__(self, model, **options):
        super().__init__(model.parameters(), **options)
        self.errors, self.jacobians = [], []

    def update(self, jacobian, innovation):
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
    """On two structures of different size, with predictions on both sides of the labels."""
    model = Quadratic()
    frame = make_frame(model, counts=(5, 2))
    atoms = ATOMS if kind == F else None
    wanted, jacobian = by_hand(model, frame, kind, atoms)
    prediction = model(frame, forces=kind != E)
    error = {E: energy_error, F: force_error, V: virial_error}[kind](prediction, frame, atoms)
    assert error.item() == pytest.approx(wanted, rel=1e-13)
    assert wanted > 0.01
    error.backward()
    assert model.bias.grad is None or kind == E
    gradient = torch.cat([torch.zeros(1) if p.grad is None else p.grad.flatten() for p in model.parameters()])
    assert relative(-gradient, jacobian) < 1e-13


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
    # Every atom is drawn at some time: 24 of 40 each time.
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
    assert schedule(order, num_groups) == kinds


def test_frame_updater_goes_through_the_groups_in_order():
    model = Quadratic()
    frames = [make_frame(model, seed, counts=(7,)) for seed in range(2)]
    recorder = Recorder(model)
    updater = FrameUpdater(model, recorder, **recipe(3, 4, (F, E, V)), seed=11)
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
    model = Quadratic()
    updater = FrameUpdater(model, preset="paper")
    options = updater.options
    assert (options.memory_factor, options.group_size, options.num_groups) == (0.98, 6, 4)
    assert (options.energy_scale, options.force_scale, options.virial_scale) == (1, 1, 1)
    assert not options.adaptive_scale
    assert [kind for kind, _ in updater(make_frame(model, counts=(30,)))] == [E, F, F, F, F]
    assert [kind for kind, _ in updater(make_frame(model, counts=(8,)))] == [E, F, F]
    assert updater.result is model


class WithBias(Quadratic):
    """A model whose energy bias can be fitted: a weight, and a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.zeros(()))

    def fit_energy_bias(self, frames, with_network):
        assert with_network
        errors = [(frame.energy - self(frame, forces=False).energy) / frame.num_atoms for frame in frames]
        self.bias.data += torch.cat(errors).mean()
        self.shift += torch.cat(errors).mean()


def test_robust_preset_is_whole():
    """Every atom, an energy update at the end, and what is not an update: λ, warm start and the mean of the weights."""
    model = WithBias()
    updater, frame = FrameUpdater(model), make_frame(model, counts=(30,))
    assert updater.optimizer.filter.memory_factor == pytest.approx(0.998)
    with pytest.raises(OptionError, match="Call warm_start"):
        updater(frame)
    before = flat(model)
    updater.warm_start([frame])
    assert not torch.equal(flat(model)[-1], before[-1])
    # The bias and the others are one layer: P is the share of the bias in |H|² of the energy per atom.
    _, h = by_hand(model, frame, E)
    share = h[-1].square() / h.square().sum()
    assert relative(updater.optimizer.filter.covariance.diagonal(), share.expand(10)) < 1e-13
    assert [kind for kind, _ in updater(frame)] == [F, E]
    assert updater.options.group_size is None
    first = flat(model)
    updater(frame)
    assert relative(flat(updater.result), first + (flat(model) - first) / 8) < 1e-13


def test_the_result_has_what_the_warm_start_fitted():
    model = WithBias()
    updater = FrameUpdater(model)
    updater.warm_start([make_frame(model)])
    assert torch.equal(updater.result.shift, model.shift)
    assert model.shift.abs() > 0.01


def test_a_batch_is_a_frame_or_any_frames_but_not_none():
    model = Quadratic()
    frames = [make_frame(model, seed, counts=(9,)) for seed in range(2)]
    found = []
    for batch in (frames, tuple(frames), iter(frames)):
        own = copy.deepcopy(model)
        FrameUpdater(own, RLEKF(own.parameters()), **recipe(batch="joint"))(batch)
        found.append(flat(own))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    for batch in ("mean", "sum", "joint"):
        with pytest.raises(DataError, match="must have a frame, on one process at least"):
            FrameUpdater(model, RLEKF(model.parameters()), **recipe(batch=batch))([])


@pytest.mark.parametrize(("kind", "name"), [(E, "energy"), (F, "forces"), (V, "virial")])
def test_a_prediction_of_another_shape_than_its_label_is_refused(kind, name):
    """(B, 1) would broadcast to (B, B)."""
    model = Quadratic()
    frame = make_frame(model, counts=(5, 4))
    setattr(frame, name, getattr(frame, name)[..., None])
    with pytest.raises(DataError, match=rf"The model's {name} should have the shape of the label \("):
        FrameUpdater(model, RLEKF(model.parameters()), **recipe(order=(kind,)))(frame)


def test_an_inherited_run_has_left_its_early_scale_behind():
    """Also if the earlier run had none: the paper's preset, LKF."""
    model = Quadratic()
    earlier, frame = FrameUpdater(model, RLEKF(model.parameters()), **recipe()), make_frame(model, counts=(30,))
    for _ in range(200):
        earlier(frame)
    again = FrameUpdater(model, RLEKF(model.parameters()), **recipe(early_scale=5.0))
    again.inherit(earlier.optimizer.state_dict(), earlier.state_dict())
    assert 0 < again._early < 0.9987**1000 * 1.001


def test_half_a_preset_is_an_error():
    model, own = Quadratic(), {"memory_factor": 0.998, "measurement_noise": 1.0}
    with pytest.raises(OptionError, match=r"memory_factor must be 0.998, for the preset robust.* made with 0.98"):
        FrameUpdater(model, RLEKF(model.parameters()))
    with pytest.raises(OptionError, match="block_size must be 20"):
        FrameUpdater(model, RLEKF(model.parameters()), preset="paper", block_size=20)
    with pytest.raises(OptionError, match="model with a method fit_energy_bias"):
        FrameUpdater(model).warm_start([make_frame(model)])
    with pytest.raises(OptionError, match="average_frames must be 1"):
        FrameUpdater(lambda frame, forces: model(frame, forces=forces), RLEKF(model.parameters(), **own))
    updater = FrameUpdater(model, RLEKF(model.parameters(), **own), warm_start=False, prior="identity")
    assert len(updater(make_frame(model))) == 2


# Against the dense filter


def dense_of(optimizer, model):
    return DenseFilter(optimizer.filter.plan.sizes, 0.98, 0.9987), in_order_of(optimizer, model, flat(model))


@pytest.mark.parametrize("transpose", [False, True])
def test_relinearized_updates_are_algorithm_1(transpose):
    """Each update at the weights that the previous one left."""
    model = Quadratic()
    optimizer = RLEKF(model.parameters(), block_size=4, transpose=transpose)
    dense, weights = dense_of(optimizer, model)
    assert optimizer.filter.plan.num_blocks == 3
    updater = FrameUpdater(model, optimizer, **recipe(2, 3, (E, F, V)), seed=1)
    source = generator(1)
    for frame in [make_frame(model, seed, counts=(5, 2)) for seed in range(4)]:
        before = copy.deepcopy(model)
        kinds = [kind for kind, _ in updater(frame)]
        groups = force_groups(7, 2 * 2, 3, source)  # two structures
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
    """More of them (13) than go into one pass of the filter, with a parameter that most of them do not depend on."""
    model = Quadratic()
    optimizer = RLEKF(model.parameters(), block_size=4, transpose=transpose)
    dense, weights = dense_of(optimizer, model)
    measurement = recipe(
        1, 11, (E, V, *[F] * 11), energy_scale=2.0, force_scale=0.5, virial_scale=3.0, relinearize=False
    )
    updater = FrameUpdater(model, optimizer, **measurement, seed=1)
    source = generator(1)
    for frame in [make_frame(model, seed, counts=(16, 8)) for seed in range(3)]:
        groups = force_groups(24, 1 * 2, 11, source)
        pairs = [(E, None), (V, None), *((F, group) for group in groups)]
        wanted = [by_hand(model, frame, kind, atoms) for kind, atoms in pairs]
        scales = [measurement[f"{kind}_scale"] for kind, _ in pairs]
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
    """w += a s² ε PH with a = 1 / (L λ + s² HᵀPH): equivalent to a measurement noise of L / s²."""
    model = Quadratic()
    optimizer = RLEKF(model.parameters(), block_size=4)
    frame, start = make_frame(model), flat(model)
    atoms = force_groups(5, 2, 1, generator())[0]
    error, h = by_hand(model, frame, kind, atoms)
    updater = FrameUpdater(model, optimizer, **recipe(2, 1, (kind,), **{f"{kind}_scale": scale / 2}))
    updater(frame, {kind: 2.0})
    wanted = scale**2 * error * h / (3 * 0.98 + scale**2 * float(h @ h))  # P = I
    assert relative(flat(model) - start, wanted) < 1e-11
    reference = DenseFilter([10], 0.98, 0.9987, noise=3 / scale**2)
    weights = start.clone()
    reference.step(weights, h[None], [error])
    assert relative(flat(model), weights) < 1e-13


def test_force_per_atom_divides_by_the_atoms_of_a_structure():
    model = Quadratic()
    frame = make_frame(model, counts=(5, 7))
    found = []
    for options in ({"force_per_atom": True}, {"force_scale": 1 / 6}):
        recorder = Recorder(model)
        FrameUpdater(model, recorder, **recipe(2, 1, (F,), **options))(frame)
        found.append((recorder.errors[0], recorder.jacobians[0]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-14)
    assert relative(found[0][1], found[1][1]) < 1e-14


@pytest.mark.parametrize("relinearize", [True, False])
def test_virial_is_left_out_where_there_is_no_label(relinearize):
    model = Quadratic()
    other = copy.deepcopy(model)
    frame = make_frame(model, virial=False)
    for one, order in ((model, (V, E, F, V)), (other, (E, F))):
        measurement = recipe(2, 2, order, relinearize=relinearize)
        found = FrameUpdater(one, RLEKF(one.parameters()), **measurement)(frame)
        assert [kind for kind, _ in found] == [E, F, E, F]
    assert torch.equal(flat(model), flat(other))
    optimizer = RLEKF(model.parameters())
    only = FrameUpdater(model, optimizer, **recipe(2, 2, (V,), relinearize=relinearize))
    with pytest.raises(DataError, match="needs labels for some of virial but has none"):
        only(frame)
    assert optimizer.health()["num_updates"] == 0


# Adaptive scales


def energies_away(model, errors):
    """Frames of one atom whose energies are this far from the model's."""
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
    measurement = recipe(6, 4, (E,), energy_scale=3.0, adaptive_scale=True)
    updater = FrameUpdater(model, recorder, **measurement)
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
    updater = FrameUpdater(model, recorder, **recipe(6, 4, (E,), **settings))
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
        def update(self, jacobian, innovation):
            innovations.extend(torch.as_tensor(innovation).reshape(-1).tolist())

    scales = {"energy_scale": 2.0, "force_scale": 0.5, "virial_scale": 7.0}
    measurement = recipe(6, 1, (E, F, V), adaptive_scale=True, relinearize=relinearize, **scales)
    FrameUpdater(model, Kept(model.parameters()), **measurement)(make_frame(model))
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
        updater = FrameUpdater(one, optimizers[-1], **recipe(6, 4, (E,), adaptive_scale=True, early_scale=5))
        for frame in used:
            updater(frame)
    assert torch.equal(flat(model), flat(other))
    assert flat(model).isfinite().all()
    health = optimizers[0].health()
    assert (health["num_updates"], sum(health.values())) == (3, 4)  # one was skipped


def test_an_error_of_zero_scales_to_zero():
    model = Quadratic()
    recorder = Recorder(model)
    updater = FrameUpdater(model, recorder, **recipe(6, 4, (E,), adaptive_scale=True))
    for frame in energies_away(model, [0.0, 0.5]):
        updater(frame)
    assert recorder.errors == pytest.approx([0.0, 1 / 0.05])
    assert recorder.jacobians[0].isfinite().all()


@pytest.mark.parametrize("relinearize", [True, False])
@pytest.mark.parametrize("learned", [True, False])
def test_balance_bounds_the_say_of_energies(relinearize, learned):
    """By HᵀPH of the first energy and the first force update, and only once energies are about as good as forces."""
    torch.manual_seed(0)
    model = Quadratic()
    frame = make_frame(model)
    with torch.no_grad():
        frame.energy = model(frame, forces=False).energy + (0.01 if learned else 2.0)
    settings = {"energy_scale": 3.0, "adaptive_scale": True, "measurement_noise": 9.0, "relinearize": relinearize}
    found = {}
    for balance in (None, 1e-3):
        recorder = Recorder(model, measurement_noise=9.0)
        recorder.filter.covariance.set(measurement_noise=0.5)  # a P that was loaded has its own
        updater = FrameUpdater(model, recorder, **recipe(5, 1, (F, E), balance=balance, **settings))
        for _ in range(2):
            updater(frame)
        found[balance] = recorder
    free, bound = found[None], found[1e-3]
    of_force, of_energy = (free.filter.variance(h) for h in free.jacobians[:2])
    share = min(1.0, (1e-3 * (of_force / 0.5) ** 2 / (of_energy / 0.5)).sqrt().item()) if learned else 1.0
    assert (share < 0.5) == learned
    for i, kind in enumerate((F, E, F, E)):
        left = 1.0 if kind == F else share
        assert bound.errors[i] == pytest.approx(left * free.errors[i], rel=1e-12)
        assert relative(bound.jacobians[i], left * free.jacobians[i]) < 1e-12


def test_the_jacobian_that_a_frame_keeps_stays_as_it_is():
    model = Quadratic()
    kept = torch.ones(1, 10, dtype=torch.float64)
    frame = make_frame(model)
    frame.measure = lambda updates: (torch.ones(1, dtype=torch.float64), kept)
    FrameUpdater(model, **recipe(5, 1, (E,), energy_scale=2.0))(frame)
    assert torch.equal(kept, torch.ones(1, 10, dtype=torch.float64))


def test_a_model_may_have_parameters_that_are_whole_numbers():
    model = Quadratic()
    model.places = nn.Parameter(torch.arange(3), requires_grad=False)
    updater = FrameUpdater(model, **recipe(5, 1, (F, E), average_frames=8))
    for _ in range(3):
        updater(make_frame(model))
    assert torch.equal(updater.result.places, torch.arange(3))


def test_balance_ignores_forces_without_a_gradient():
    """Those of an isolated atom: HᵀPH = 0 is no reason to drop its energy."""
    model, recorded = Quadratic(), []
    frame = make_frame(model)
    frame.features[F] = torch.zeros_like(frame.features[F])
    frame.energy = model(frame, forces=False).energy.detach() + 0.01
    for balance in (None, 1e-3):
        recorder = Recorder(model)
        FrameUpdater(model, recorder, **recipe(5, 1, (F, E), balance=balance, adaptive_scale=True))(frame)
        recorded.append(recorder.errors)
    assert recorded[0] == recorded[1]


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
    scales = {"adaptive_scale": True, "early_scale": 5.0, "balance": 0.01}
    measurement = recipe(2, 3, (F, E), relinearize=relinearize, **scales)
    optimizer = RLEKF(model.parameters())
    updater = FrameUpdater(model, optimizer, **measurement, seed=1)
    for frame in frames[:3]:
        updater(frame)
    state, (other, another) = kept(updater.state_dict()), copy.deepcopy((model, optimizer))
    wanted = [error.item() for frame in frames[3:] for _, error in updater(frame)]

    resumed = FrameUpdater(other, another, **measurement, seed=99)
    resumed.load_state_dict(state)
    assert [error.item() for frame in frames[3:] for _, error in resumed(frame)] == wanted
    assert torch.equal(flat(model), flat(other))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": ()}, "order must be a list of strings, not empty, but is"),
        ({"order": (E, "stress")}, r'order\[1\] = "stress" is not supported; supported: "energy", "force", "virial"'),
        ({"group_size": 0}, "group_size must be >= 1 but is: 0"),
        ({"num_groups": 0}, "num_groups must be >= 1 but is: 0"),
        ({"batch": "max"}, 'batch = "max" is not supported; supported: "mean", "sum", "joint"'),
        ({"early_scale": 0.0}, "early_scale must be > 0 but is: 0.0"),
        ({"average_frames": 0}, "average_frames must be >= 1 but is: 0"),
        ({"virial_scale": float("nan")}, "virial_scale must be a number but is: NaN"),
        ({"memory_factor": 1.5}, "memory_factor must be <= 1 but is: 1.5"),
        ({"preset": "best"}, 'preset = "best" is not supported; supported: "paper", "robust", "lkf"'),
        ({"num_group": 2}, "num_group is not a known option; did you mean num_groups"),
    ],
)
def test_options_out_of_range(change, message):
    with pytest.raises(OptionError, match=message):
        FrameUpdater(Quadratic(), **change)


def test_virial_updates_fit_the_stress_of_an_ase_calculator():
    """No public set here has virials, so their sign and units are compared with ASE: W = -V stress."""
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

    sizes = {"neuron": (6, 6), "axis_neuron": 3, "fitting_neuron": (8, 8)}
    model = make_model(("Cu",), (100,), 4.0, seed=0, frames=labelled, **sizes)
    model.fit_energy_bias(labelled)

    def rmse(kind):
        with torch.no_grad():
            errors = [(getattr(model(f), kind) - getattr(f, kind)).square().mean() for f in labelled]
        return torch.stack(errors).mean().sqrt().item()

    options = recipe(None, 1, ("energy", "virial"), adaptive_scale=True, memory_factor=0.998)
    update = FrameUpdater(model, transpose=True, **options)
    before = {kind: rmse(kind) for kind in ("energy", "virial")}
    for _ in range(25):
        for frame in labelled:
            assert [kind for kind, _ in update(frame)] == ["energy", "virial"]
    # With a wrong sign the two could not be fitted together.
    assert rmse("energy") < 0.1 * before["energy"]
    assert rmse("virial") < 0.1 * before["virial"]
