"""The descriptor against a fully padded loop in numpy, its statistics, its shapes and what it refuses."""

import itertools

import numpy as np
import pytest
import torch

from rlekf_ext.errors import DataError
from rlekf_ext.potential.architecture import DescriptorArchitecture
from rlekf_ext.potential.descriptor import Network, SeE2A, run_networks
from rlekf_ext.potential.frames import survey
from rlekf_ext.potential.neighbors import collate, make_frame

RCUT, RSMTH = 4.0, 1.5
SEL = (40, 24, 31)
TYPE_MAP = ("O", "H", "C")


def structure(seed: int = 0, counts: tuple[int, ...] = (3, 2, 1), box: float = 4.2):
    """Coordinates, a triclinic box smaller than the cutoff's sphere, and types in no order."""
    rng = np.random.default_rng(seed)
    n = sum(counts)
    cell = box * np.eye(3) + rng.uniform(-0.4, 0.4, (3, 3))
    grid = np.array(list(itertools.product(range(2), repeat=3)))[:n] / 2
    types = np.repeat(np.arange(len(counts)), counts)
    return grid @ cell + rng.uniform(-0.3, 0.3, (n, 3)), cell, rng.permutation(types)


def padded_matrices(points, cell, types, sel, rcut=RCUT, rsmth=RSMTH):
    """Environment matrices (n, sum(sel), 4) before normalisation, image by image."""
    matrices = []
    images = [np.array(k) @ cell for k in itertools.product(range(-3, 4), repeat=3)]
    for center in points:
        rows = []
        for element, number in enumerate(sel):
            found = []
            for other in points[types == element]:
                for image in images:
                    d = other + image - center
                    r = np.sqrt(d @ d)
                    if 0 < r < rcut:
                        u = (r - rsmth) / (rcut - rsmth)
                        s = 1 / r if r < rsmth else (u**3 * (-6 * u**2 + 15 * u - 10) + 1) / r
                        found.append((r, [s, *(s * d / r)]))
            found.sort(key=lambda pair: pair[0])
            rows += [row for _, row in found] + [[0.0] * 4] * (number - len(found))
        matrices.append(rows)
    return np.array(matrices)


def slow_network(network, x):
    for layer in network.layers:
        tensors = {name: value.detach().numpy() for name, value in layer.named_parameters()}
        y = np.tanh(x @ tensors["weight"] + tensors["bias"]) * tensors.get("timestep", 1.0)
        if y.shape[-1] == x.shape[-1]:
            y = y + x
        elif y.shape[-1] == 2 * x.shape[-1]:
            y = y + np.hstack([x, x])
        x = y
    return x


def slow_descriptor(descriptor, points, cell, types):
    settings = descriptor.architecture
    davg, dstd = descriptor.davg.numpy(), descriptor.dstd.numpy()
    results = []
    for center, matrix in zip(types, padded_matrices(points, cell, types, settings.sel), strict=True):
        matrix = (matrix - davg[center]) / dstd[center]
        embedded, start = [], 0
        for element, number in enumerate(settings.sel):
            index = element if settings.type_one_side else element * len(settings.sel) + center
            embedded.append(slow_network(descriptor.embeddings[index], matrix[start : start + number, :1]))
            start += number
        g = np.vstack(embedded) / len(matrix)
        results.append(((g.T @ matrix) @ (matrix.T @ g[:, : settings.axis_neuron])).ravel())
    return np.array(results)


def make_descriptor(**changes) -> SeE2A:
    settings = {"sel": SEL, "rcut": RCUT, "rcut_smth": RSMTH, "neuron": (6, 12, 12), "axis_neuron": 5, **changes}
    generator = torch.Generator().manual_seed(1)
    descriptor = SeE2A(DescriptorArchitecture(**settings), TYPE_MAP, generator=generator)
    descriptor.davg.copy_(torch.rand(3, 4, generator=torch.Generator().manual_seed(2)))
    descriptor.dstd.copy_(torch.rand(3, 4, generator=torch.Generator().manual_seed(3)) + 0.2)
    return descriptor


@pytest.mark.parametrize("counts", [(3, 2, 1), (2, 2, 2), (6, 0, 1), (0, 0, 5)])
@pytest.mark.parametrize("type_one_side", [False, True])
@pytest.mark.parametrize("resnet_dt", [False, True])
def test_descriptor_equals_the_padded_loop(counts, type_one_side, resnet_dt) -> None:
    descriptor = make_descriptor(type_one_side=type_one_side, resnet_dt=resnet_dt)
    points, cell, types = structure(counts=counts)
    result = descriptor(make_frame(points, cell, types, RCUT, 3)).detach().numpy()
    expected = slow_descriptor(descriptor, points, cell, types)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def test_frames_side_by_side_have_the_descriptors_of_each() -> None:
    descriptor = make_descriptor()
    frames = [make_frame(*structure(k, counts), RCUT, 3) for k, counts in enumerate([(3, 2, 1), (0, 5, 0), (1, 1, 6)])]
    expected = torch.cat([descriptor(frame) for frame in frames])
    torch.testing.assert_close(descriptor(collate(frames)), expected, rtol=1e-12, atol=1e-12)


def test_statistics_equal_those_of_all_padded_slots() -> None:
    structures = [structure(1, (3, 2, 0)), structure(2, (5, 0, 0), box=4.5)]
    descriptor = make_descriptor()
    descriptor.fit_statistics(survey([make_frame(*s, RCUT, 3) for s in structures], descriptor.architecture).sums)
    matrices = np.concatenate([padded_matrices(*s, SEL) for s in structures])
    types = np.concatenate([s[2] for s in structures])
    for element in range(2):
        own = matrices[types == element]
        radial, angular = own[..., 0], own[..., 1:]
        np.testing.assert_allclose(descriptor.davg[element], [radial.mean(), 0, 0, 0], atol=1e-14)
        np.testing.assert_allclose(descriptor.dstd[element], [radial.std()] + [angular.std()] * 3, rtol=1e-12)
    assert descriptor.davg[2].tolist() == [0] * 4  # an element without atoms
    assert descriptor.dstd[2].tolist() == [0.1] * 4


def test_standard_deviations_are_at_least_a_hundredth() -> None:
    descriptor = make_descriptor()
    frames = [make_frame([[0, 0, 0], [3.999, 0, 0]], None, [0, 0], RCUT, 3)]
    descriptor.fit_statistics(survey(frames, descriptor.architecture).sums)
    assert descriptor.dstd[0].tolist() == [0.01] * 4


def test_embedding_parameters_lie_in_order_as_in_out_and_follow_the_generator() -> None:
    network = Network(1, (4, 8, 8, 3), resnet_dt=True, generator=torch.Generator().manual_seed(0))
    names = [name.removeprefix("layers.") for name, _ in network.named_parameters()]
    assert names == ["0.weight", "0.bias"] + ["1.weight", "1.bias", "1.timestep"] + [
        "2.weight", "2.bias", "2.timestep", "3.weight", "3.bias"
    ]  # fmt: skip
    assert network.layers[1].weight.shape == (4, 8)
    again = Network(1, (4, 8, 8, 3), resnet_dt=True, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))


def test_initial_weights_have_the_spread_of_deepmd() -> None:
    network = Network(300, (300,), resnet_dt=True, generator=torch.Generator().manual_seed(0))
    weight, bias, timestep = network.parameters()
    assert weight.std().item() == pytest.approx(600**-0.5, rel=0.02)
    assert bias.std().item() == pytest.approx(1, rel=0.2)
    assert timestep.mean().item() == pytest.approx(0.1, rel=0.01)
    assert timestep.std().item() == pytest.approx(0.001, rel=0.2)


def test_networks_in_one_batch_equal_each_alone() -> None:
    networks = [Network(3, (3, 6, 4), output=True, resnet_dt=True) for _ in range(4)]
    inputs = torch.randn(4, 7, 3, dtype=torch.float64)
    expected = torch.stack([network(x) for network, x in zip(networks, inputs, strict=True)])
    torch.testing.assert_close(run_networks(networks, inputs), expected, rtol=1e-12, atol=1e-12)


def test_the_output_layer_is_linear() -> None:
    network = Network(3, (), output=True).requires_grad_(False)
    x = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(network(2 * x) - network(x), network(x) - network(0 * x), rtol=1e-12, atol=1e-12)


def test_what_the_descriptor_refuses() -> None:
    points, cell, types = structure()
    frame = make_frame(points, cell, types, RCUT, 3)
    small = make_descriptor(sel=(frame.slots[0] - 1, 99, 99))
    sentence = rf'{frame.slots[0]} neighbours of element O .* sel = {frame.slots[0] - 1}: .*"sel": "auto"'
    with pytest.raises(DataError, match=sentence):
        small(frame)
    descriptor = make_descriptor()
    with pytest.raises(DataError, match="cutoff"):
        descriptor(make_frame(points, cell, types, RCUT - 0.5, 3))
    with pytest.raises(DataError, match="elements"):
        descriptor(make_frame(points, cell, types, RCUT, 4))
    with pytest.raises(DataError, match=r"frame\.to"):
        descriptor(frame.to(torch.float32))
