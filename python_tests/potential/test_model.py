"""The network: derivatives against finite differences, symmetries, batches, weights, and saving."""

import itertools
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch

from rlekf_ext import optim
from rlekf_ext.errors import DataError, OptionError
from rlekf_ext.potential.architecture import plain
from rlekf_ext.potential.model import DeepPotential
from rlekf_ext.potential.neighbors import Frame, collate, make_frame

RCUT, SEL = 4.0, (30, 20)
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def structure(seed: int = 0, counts: tuple[int, int] = (4, 2), box: float = 4.6):
    rng = np.random.default_rng(seed)
    n = sum(counts)
    cell = box * np.eye(3) + rng.uniform(-0.4, 0.4, (3, 3))
    grid = np.array(list(itertools.product(range(2), repeat=3)))[:n] / 2
    types = np.repeat(np.arange(2), counts)
    return grid @ cell + rng.uniform(-0.3, 0.3, (n, 3)), cell, rng.permutation(types)


def frame_of(points, cell, types, **labels) -> Frame:
    return make_frame(points, cell, types, RCUT, 2, **labels)


def make_model(**changes) -> DeepPotential:
    settings = {"neuron": (5, 10), "axis_neuron": 4, "fitting_neuron": (8, 8), "rcut_smth": 1.0, "seed": 3, **changes}
    frames = [frame_of(*structure(k)) for k in range(2)]
    return helpers.make_model(["A", "B"], SEL, RCUT, frames=frames, energy_bias=[1.5, -2.0], **settings)


def energy(model: DeepPotential, points, cell, types) -> float:
    with torch.no_grad():
        return model(frame_of(points, cell, types), forces=False).energy.item()


def derivative(function, step: float = 1e-3) -> float:
    """Central difference of fourth order at 0."""
    return (8 * (function(step) - function(-step)) - (function(2 * step) - function(-2 * step))) / (12 * step)


CELLS = [
    pytest.param((4, 2), True, id="small-cell"),
    pytest.param((7, 1), True, id="unlike-counts"),
    pytest.param((3, 3), False, id="molecule"),
    pytest.param((5, 0), True, id="one-element"),
]


@pytest.mark.parametrize(("counts", "periodic"), CELLS)
@pytest.mark.parametrize("changes", [{}, {"type_one_side": True, "resnet_dt": True, "fitting_resnet_dt": True}])
def test_forces_are_the_negative_gradient_of_the_energy(counts, periodic, changes) -> None:
    model = make_model(**changes)
    points, cell, types = structure(1, counts)
    box = cell if periodic else None
    forces = model(frame_of(points, box, types)).forces.detach().numpy()
    scale = np.abs(forces).max()
    for atom, axis in itertools.product(range(len(points)), range(3)):
        unit = np.zeros_like(points)
        unit[atom, axis] = 1.0
        slope = derivative(lambda h, unit=unit: energy(model, points + h * unit, box, types))
        assert forces[atom, axis] == pytest.approx(-slope, abs=1e-6 * scale)


@pytest.mark.parametrize(("counts", "periodic"), CELLS)
def test_virial_is_the_negative_derivative_by_the_strain(counts, periodic) -> None:
    model = make_model()
    points, cell, types = structure(1, counts)
    virial = model(frame_of(points, cell if periodic else None, types)).virial[0].detach().numpy()
    np.testing.assert_allclose(virial, virial.T, atol=1e-12)
    for i, j in itertools.product(range(3), repeat=2):

        def strained(h: float, i: int = i, j: int = j) -> float:
            deformation = np.eye(3)
            deformation[i, j] += h
            return energy(model, points @ deformation, cell @ deformation if periodic else None, types)

        assert virial[i, j] == pytest.approx(-derivative(strained, 3e-4), abs=1e-6 * np.abs(virial).max())


def test_invariance_under_translation_rotation_and_permutation() -> None:
    model = make_model()
    points, cell, types = structure(2)
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    order = rng.permutation(len(points))
    base = model(frame_of(points, cell, types))
    moved = model(frame_of(points + [1.3, -7.1, 0.4], cell, types))
    turned = model(frame_of(points @ rotation, cell @ rotation, types))
    permuted = model(frame_of(points[order], cell, types[order]))
    like = np.flatnonzero(types == 0)
    swapped = points.copy()
    swapped[like] = points[like[::-1]]
    for other in (moved, turned, permuted, model(frame_of(swapped, cell, types))):
        torch.testing.assert_close(other.energy, base.energy, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(moved.forces, base.forces, rtol=0, atol=1e-10)
    torch.testing.assert_close(turned.forces, base.forces @ torch.tensor(rotation), rtol=0, atol=1e-10)
    torch.testing.assert_close(permuted.forces, base.forces[order], rtol=0, atol=1e-10)
    torch.testing.assert_close(permuted.atomic_energy, base.atomic_energy[order], rtol=0, atol=1e-10)
    assert base.forces.sum(0).abs().max() < 1e-10


def test_energy_is_continuous_where_a_neighbor_leaves() -> None:
    model = make_model()
    assert model.descriptor.davg[:, 0].min() > 0.01  # an empty slot then counts
    pair = np.array([[0.0, 0, 0], [0, 1.7, 0], [RCUT, 0, 0]])

    def at(h: float) -> tuple[float, tuple[int, ...]]:
        frame = frame_of(pair + [[0, 0, 0], [0, 0, 0], [h, 0, 0]], None, [0, 0, 1])
        return model(frame).energy.item(), frame.slots

    (inside, slots), (outside, fewer) = at(-1e-9), at(1e-9)
    assert slots != fewer
    assert abs(inside - outside) < 1e-10


@pytest.mark.parametrize("mixed", [[(4, 2), (3, 3)], [(7, 1), (0, 5), (2, 2)]])
def test_frames_side_by_side_are_predicted_as_one_by_one(mixed) -> None:
    model = make_model()
    frames = [frame_of(*structure(k, counts)) for k, counts in enumerate(mixed)]
    together = model(collate(frames))
    each = [model(frame) for frame in frames]
    for name in ("energy", "forces", "virial", "atomic_energy"):
        expected = torch.cat([getattr(prediction, name) for prediction in each])
        torch.testing.assert_close(getattr(together, name), expected, rtol=1e-10, atol=1e-10)


def weight_gradient(model: DeepPotential, loss) -> torch.Tensor:
    model.zero_grad()
    loss().backward()
    # No loss of forces depends on the last bias: such a gradient stays None.
    return torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()]
    )


@pytest.mark.parametrize("counts", [(4, 2), (7, 1), (3, 3)])
def test_gradient_of_losses_by_the_weights(counts) -> None:
    model = make_model(resnet_dt=True)
    points, cell, types = structure(1, counts)
    frame = frame_of(points, cell, types)
    target = torch.randn(len(points), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def loss(part: str = "forces") -> torch.Tensor:
        prediction = model(frame)
        return (prediction.forces - target)[:3].square().sum() if part == "forces" else prediction.virial.sin().sum()

    direction = [torch.randn_like(p) for p in model.parameters()]
    for part in ("forces", "virial"):
        gradient = weight_gradient(model, lambda part=part: loss(part))
        slope = gradient @ torch.cat([d.flatten() for d in direction])
        start = [p.detach().clone() for p in model.parameters()]

        def along(h: float, part: str = part, start: list[torch.Tensor] = start) -> float:
            with torch.no_grad():
                for p, w, d in zip(model.parameters(), start, direction, strict=True):
                    p.copy_(w + h * d)
                return loss(part).item()

        assert slope.item() == pytest.approx(derivative(along, 2e-4), rel=1e-6)
        along(0.0)


def test_energy_alone_has_the_same_gradient_and_no_second_order_graph() -> None:
    model = make_model()
    frame = frame_of(*structure())
    alone = model(frame, forces=False)
    assert alone.forces is None
    assert alone.virial is None
    assert alone.energy.dtype == torch.float64
    full = weight_gradient(model, lambda: model(frame).energy.sum())
    torch.testing.assert_close(weight_gradient(model, lambda: model(frame, forces=False).energy.sum()), full)


def test_prediction_without_a_graph() -> None:
    model = make_model()
    frame = frame_of(*structure())
    graph = model(frame)
    with torch.no_grad():
        silent = model(frame)
    for prediction in (silent, model(frame, create_graph=False)):
        for value, expected in zip(prediction, graph, strict=True):
            assert not value.requires_grad
            torch.testing.assert_close(value, expected.detach())
    assert graph.forces.requires_grad


def test_inference_mode_has_energies_but_says_why_it_has_no_forces() -> None:
    model, frame = make_model(), frame_of(*structure())
    with torch.inference_mode():
        assert torch.isfinite(model(frame, forces=False).energy).all()
        with pytest.raises(OptionError, match=r"use torch.no_grad\(\)"):
            model(frame)


def test_a_changed_statistic_or_frame_is_never_answered_from_the_past() -> None:
    model = make_model()
    first, second = (frame_of(*structure(k)) for k in range(2))
    before = model(first).energy.item()
    model(second)
    assert model(first).energy.item() == before
    model.descriptor.dstd.mul_(1.1)
    assert model(first).energy.item() != before


def test_the_paper_network_has_26551_weights() -> None:
    model = DeepPotential({"type_map": ["Cu"], "descriptor": {"sel": [100]}}, seed=0)
    sizes = [p.numel() for p in model.parameters()]
    assert sizes == [25, 25, 625, 25, 625, 25, 20000, 50, 2500, 50, 2500, 50, 50, 1]
    assert sum(sizes) == 26551


def test_weights_follow_the_seed() -> None:
    model = make_model(resnet_dt=True)
    same, other = make_model(resnet_dt=True), make_model(resnet_dt=True, seed=4)
    weights = [torch.cat([p.flatten() for p in m.parameters()]) for m in (model, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("neuron", "axis_neuron", "fitting_neuron", "sizes"),
    [
        ((25, 25, 25), 16, (50, 50, 50), (50, 650, 650, 20050, 2550, 2550, 51)),
        ((10, 10, 10), 6, (20, 20, 20), (20, 110, 110, 1220, 420, 420, 21)),
    ],
)
def test_lekf_has_a_block_per_layer(neuron, axis_neuron, fitting_neuron, sizes, monkeypatch) -> None:
    plans = []
    # The filter itself would fill 1.6 GB with P.
    monkeypatch.setattr(optim, "KalmanFilter", lambda plan, **_: plans.append(plan))
    model = helpers.make_model(["Cu"], [100], neuron=neuron, axis_neuron=axis_neuron, fitting_neuron=fitting_neuron)
    optim.RLEKF(model.named_parameters(), transpose=True, strategy="lekf")
    assert plans[0].sizes == sizes


def test_save_and_load() -> None:
    model = make_model(type_one_side=True, fitting_resnet_dt=True, precision="float32")
    for given in (model.architecture, plain(model.architecture)):
        restored = DeepPotential(given)
        restored.load_state_dict(model.state_dict())
        assert restored.architecture == model.architecture
    frame = frame_of(*structure()).to(torch.float32)
    assert torch.equal(restored(frame).energy, model(frame).energy)


def test_float32_agrees_with_float64() -> None:
    model, single = make_model(), make_model(precision="float32")
    frame = frame_of(*structure())
    expected, result = model(frame), single(frame.to(torch.float32))
    assert result.forces.dtype == torch.float32
    assert result.energy.dtype == torch.float64
    torch.testing.assert_close(result.energy, expected.energy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.forces.double(), expected.forces, rtol=1e-4, atol=1e-4)


def test_energy_bias_is_the_least_squares_solution() -> None:
    model = make_model()
    rng = np.random.default_rng(0)
    counts = [(4, 2), (2, 3), (5, 1), (1, 1)]
    energies = np.array(counts) @ [-4000.0, 3.0] + rng.normal(size=4)
    frames = [frame_of(*structure(k, c), energy=e) for k, (c, e) in enumerate(zip(counts, energies, strict=True))]
    expected = np.linalg.lstsq(np.array(counts, dtype=float), energies, rcond=None)[0]
    model.fit_energy_bias(frames)
    np.testing.assert_allclose(model.energy_bias, expected, rtol=1e-12)
    model.fit_energy_bias([collate(frames[:2]), collate(frames[2:])])
    np.testing.assert_allclose(model.energy_bias, expected, rtol=1e-12)
    model.fit_energy_bias([frame_of(*structure(k, (4, 2)), energy=10.0) for k in range(3)])
    np.testing.assert_allclose(model.energy_bias, [2, 1], rtol=1e-12)  # rank 1: the smallest solution
    model.fit_energy_bias([frame_of(*structure())])  # no energy: nothing to fit
    np.testing.assert_allclose(model.energy_bias, [2, 1], rtol=1e-12)


def test_too_many_neighbors_are_refused_by_name() -> None:
    model = helpers.make_model(["Na", "Cl"], [4, 20], RCUT)
    with pytest.raises(DataError, match="element Na"):
        model(frame_of(*structure()))


def test_forces_of_a_real_cell() -> None:
    folder = DATA / "NaCl" / "gpaw_pbe_8"
    if not folder.exists():
        pytest.skip(f"The NaCl data set is not at {folder}.")
    points = np.load(folder / "set.000" / "coord.npy")[0].reshape(-1, 3).astype(float)
    cell = np.load(folder / "set.000" / "box.npy")[0].reshape(3, 3)
    types = np.loadtxt(folder / "type.raw", dtype=int)

    def at(points: np.ndarray) -> Frame:
        return make_frame(points, cell, types, 6.0, 2)

    model = helpers.make_model(["Na", "Cl"], [40, 40], 6.0, neuron=(5, 10), axis_neuron=4, frames=[at(points)])
    unit = np.random.default_rng(0).normal(size=points.shape)
    slope = derivative(lambda h: model(at(points + h * unit), forces=False).energy.item())
    assert (model(at(points)).forces.detach().numpy() * unit).sum() == pytest.approx(-slope, rel=1e-6)
