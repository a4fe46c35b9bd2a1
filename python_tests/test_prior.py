from itertools import pairwise

import pytest
import torch
from torch import nn

from rlekf_ext import RLEKF
from rlekf_ext.errors import OptionError
from rlekf_ext.prior import layer_factors


def squares_of(model, inputs):
    grads = torch.autograd.grad(model(inputs).sum(), list(model.parameters()), allow_unused=True)
    return torch.stack([torch.zeros(()) if g is None else g.square().sum() for g in grads]).double()


def network(*widths):
    layers = [layer for ends in pairwise(widths) for layer in (nn.Linear(*ends), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).double()


def test_the_prior_of_a_layer_is_in_units_of_its_inputs():
    """For a single row of inputs the factor is 1 / (1 + |x|²) in every layer, and H P H is p_0 |δ|²."""
    torch.manual_seed(0)
    model, x = network(5, 4, 3, 1), 0.1 * torch.randn(1, 5, dtype=torch.float64)
    optimizer = RLEKF(model.named_parameters(), initial_covariance=3.0, block_size=7)
    squares = squares_of(model, x)
    optimizer.start_by_layers(squares)
    p = optimizer.filter.covariance.diagonal().split([q.numel() for q in model.parameters()])
    for layer, place in ((0, 0), (2, 2), (4, 4)):
        factor = 1 / (1 + float(model[:layer](x).detach().square().sum()))
        for found in p[place : place + 2]:
            torch.testing.assert_close(found, torch.full_like(found, 3 * factor), rtol=1e-12, atol=0)
        assert float(p[place][0]) * float(squares[place : place + 2].sum()) == pytest.approx(
            3 * float(squares[place + 1])
        )
    # and it does not depend on the unit of the energy
    optimizer.start_by_layers(1e12 * squares)
    torch.testing.assert_close(optimizer.filter.covariance.diagonal(), torch.cat(p), rtol=1e-12, atol=0)


def test_a_bias_without_gradient_does_not_freeze_its_layer():
    """Where δ cancels |H_b|² is small whatever x is: the factor is at least that of n inputs of 1."""
    assert layer_factors([1.0, 1e-9], [0, 0], [False, True], [(7, 3), (3,)]) == [1 / 8] * 2


def test_layers_of_the_same_shapes_have_one_factor():
    """So a net whose element is in no frame has that of the others; without a bias or a finite gradient it is 1."""
    layers = [0, 0, 1, 1, 2, 2, 3, 4, 4]
    biases = [False, True, False, True, False, True, False, False, True]
    shapes = [(2, 3), (3,), (2, 3), (3,), (2, 3), (3,), (3, 3), (3, 3), (3,)]
    squares = [3.0, 1.0, 1.0, 1.0, 0.0, 0.0, 5.0, 0.0, 0.0]
    assert layer_factors(squares, layers, biases, shapes) == [1 / 3] * 6 + [1.0] * 3
    squares[0] = float("inf")
    assert layer_factors(squares, layers, biases, shapes) == [1.0] * 9


def test_a_group_has_its_own_initial_covariance():
    model = network(5, 4, 1)
    named = list(model.named_parameters())
    groups = [{"params": named[:2], "initial_covariance": 0.25}, {"params": named[2:]}]
    optimizer = RLEKF(groups, initial_covariance=2.0)
    assert optimizer.filter.covariance.diagonal().tolist() == [0.25] * 24 + [2.0] * 5
    optimizer.start_by_layers(torch.tensor([3.0, 1.0, 1.0, 1.0]))
    assert optimizer.filter.covariance.diagonal().tolist() == [0.0625] * 24 + [1.0] * 5
    with pytest.raises(OptionError, match="initial_covariance must be > 0"):
        RLEKF([{"params": list(model.parameters()), "initial_covariance": 0.0}])


def test_names_are_needed():
    model = network(5, 4, 1)
    with pytest.raises(OptionError, match="needs named parameters"):
        RLEKF(model.parameters()).start_by_layers(torch.ones(4))
