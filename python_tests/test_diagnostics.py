"""The diagnostics of P, and what is done about storage that is too coarse for it."""

import math

import pytest
import torch
from oracles import DenseFilter, relative

from rlekf_ext import RLEKF, BlockPlan, KalmanFilter
from rlekf_ext.diagnostics import FLOAT32_CONDITION, ritz_values

PLAN = BlockPlan((70, 3, 130))


def run(steps=40, **settings):
    kalman, weights = KalmanFilter(PLAN, max_pending=7, **settings), torch.zeros(203, dtype=torch.float64)
    for _ in range(steps):
        h = torch.randn(203, dtype=torch.float64)
        weights += kalman.update(h, 0.1)
    return kalman, weights, h


def test_every_number_is_that_of_the_dense_matrix():
    kalman, *_ = run(process_noise=1e-3)
    told, p = kalman.diagnostics(lanczos_steps=203), torch.block_diag(*kalman.covariance.dense())
    eigenvalues = torch.linalg.eigvalsh(p)
    assert told.trace == pytest.approx(float(p.trace()))
    assert told.smallest_diagonal == pytest.approx(float(p.diagonal().min()))
    assert told.largest_diagonal == pytest.approx(float(p.diagonal().max()))
    assert told.smallest_eigenvalue == pytest.approx(float(eigenvalues[0]), rel=1e-6)
    assert told.largest_eigenvalue == pytest.approx(float(eigenvalues[-1]), rel=1e-6)
    assert told.condition == pytest.approx(float(eigenvalues[-1] / eigenvalues[0]), rel=1e-5)
    assert told.scale * told.shift > 0
    assert told.memory_factor == kalman.memory_factor


def test_gain_and_variance_are_those_of_the_last_update():
    kalman, weights, _ = run()
    before, h = weights.clone(), torch.randn(203, dtype=torch.float64)
    variance = float(kalman.variance(h))
    weights += kalman.update(h, 2.0)
    told = kalman.diagnostics()
    assert told.variance == pytest.approx(variance, rel=1e-12)
    assert told.gain_norm == pytest.approx(float((weights - before).norm()) / 2, rel=1e-12)


def test_few_lanczos_steps_are_inside_the_spectrum():
    kalman, *_ = run()
    eigenvalues = torch.linalg.eigvalsh(torch.block_diag(*kalman.covariance.dense()))
    told = kalman.diagnostics(lanczos_steps=4)
    assert float(eigenvalues[0]) <= told.smallest_eigenvalue <= told.smallest_diagonal
    assert told.largest_diagonal <= told.largest_eigenvalue <= float(eigenvalues[-1]) * (1 + 1e-12)


def test_ritz_values_of_a_matrix_with_few_different_eigenvalues():
    """The Krylov space ends early, and does so exactly."""
    values = ritz_values(lambda x: torch.tensor([2.0, 2.0, 5.0, 5.0], dtype=x.dtype) * x, torch.ones(4).double(), 4)
    assert torch.allclose(values, torch.tensor([2.0, 5.0], dtype=torch.float64))


@pytest.mark.parametrize("waiting", range(8))
def test_looking_changes_no_bit(waiting):
    """Also when the next pass would fold: diagnostics and variance work on copies of the pending vectors."""
    kalman, *_ = run(steps=7 + waiting)
    p = kalman.covariance
    before = [tensor.clone() for tensor in (p.tiles, p.pending, p.state)]
    kalman.diagnostics()
    kalman.variance(torch.randn(3, 203, dtype=torch.float64))
    assert all(torch.equal(a, b) for a, b in zip(before, (p.tiles, p.pending, p.state), strict=True))


def test_before_any_update():
    told = KalmanFilter(PLAN, initial_covariance=2.0).diagnostics()
    assert (told.trace, told.variance, told.gain_norm) == (406.0, 0.0, 0.0)
    assert told.condition == pytest.approx(1.0)


def test_a_bad_last_jacobian_is_no_start():
    kalman, weights, _ = run()
    weights += kalman.update(torch.full((203,), math.nan), 0.1)
    assert math.isfinite(kalman.diagnostics().condition)


def rotated_decay(size=128):
    """H whose deviations decay exponentially in directions off the axes: P's small eigenvalues drown in float32."""
    basis, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))
    deviation = torch.exp(-torch.arange(size, dtype=torch.float64) / (size / 16))
    return lambda: basis @ (deviation * torch.randn(size, dtype=torch.float64))


def smallest(kalman):
    return float(torch.linalg.eigvalsh(kalman.covariance.dense()[0])[0])


def test_the_guard_speaks_before_float32_fails():
    """The same H in float32, which fails, and in float64, which does not; the guard is called as in the trainer."""
    draw, plan = rotated_decay(), BlockPlan((128,))
    single, double, auto = (KalmanFilter(plan, covariance_dtype=d) for d in (torch.float32, torch.float64, "auto"))
    weights = [torch.zeros(128, dtype=torch.float64) for _ in range(3)]
    spoke = failed = 0
    for step in range(1, 3001):
        h = draw()
        for kalman, w in zip((single, double, auto), weights, strict=True):
            w += kalman.update(h, 0.1)
        if step % 250 == 0:
            said = auto.guard_storage()
            if not spoke and single.guard_storage():
                spoke = step
                assert "stored in float64 from now on" in said
                assert smallest(single) > 0
            if not failed and smallest(single) <= 0:
                failed = step
    assert 0 < spoke < failed
    assert smallest(double) > 0
    assert smallest(auto) > 0
    assert auto.covariance.tiles.dtype == torch.float64
    assert double.diagnostics().condition > FLOAT32_CONDITION
    assert double.guard_storage() == ""


def test_a_promoted_filter_goes_on_with_the_p_it_had():
    kalman, weights, _ = run(covariance_dtype="auto")
    p = [block.clone() for block in kalman.covariance.dense()]
    kalman.covariance = kalman.covariance.reblock(PLAN, dtype=torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(p, kalman.covariance.dense(), strict=True))
    dense = DenseFilter(PLAN.sizes, kalman.memory_factor, 0.9987)
    dense.blocks, wanted = p, weights.clone()
    for _ in range(20):
        h = torch.randn(1, 203, dtype=torch.float64)
        weights += kalman.update(h, 0.3)
        dense.step(wanted, h, [0.3])
    assert relative(weights, wanted) < 1e-12


def test_auto_takes_over_a_promoted_checkpoint():
    def made():
        return RLEKF([torch.nn.Parameter(torch.ones(30))], covariance_dtype="auto")

    optimizer, other = made(), made()
    optimizer.filter.covariance = optimizer.filter.covariance.reblock(optimizer.filter.plan, dtype=torch.float64)
    other.load_state_dict(optimizer.state_dict())
    assert other.filter.covariance.tiles.dtype == torch.float64
    with pytest.raises(ValueError, match="this filter needs"):
        RLEKF([torch.nn.Parameter(torch.ones(30))], covariance_dtype=torch.float32).load_state_dict(
            optimizer.state_dict()
        )


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (lambda g: g.fill_(math.nan), "skipped_jacobian"),
        (lambda g: g[:3].fill_(math.inf), "skipped_jacobian"),
        (lambda g: g.fill_(1e200), "skipped_jacobian"),
        (lambda g: None, "skipped_innovation"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_bad_steps_at_random_leave_no_trace(bad, what, dtype):
    """The optimizer that met them ends with the weights and P of one that never did, bit for bit."""
    torch.manual_seed(3)
    start = torch.randn(90, dtype=torch.float64)
    met, never = (torch.nn.Parameter(start.clone()) for _ in range(2))
    with_bad, without = (RLEKF([p], block_size=40, covariance_dtype=dtype, max_pending=5) for p in (met, never))
    count = 0
    for _ in range(60):
        gradient = torch.randn(90, dtype=torch.float64)
        if torch.rand(()) < 0.3:
            spoilt = gradient.clone()
            bad(spoilt)
            met.grad = spoilt
            with_bad.update(with_bad.jacobian(), math.nan if what == "skipped_innovation" else 0.2)
            count += 1
        met.grad, never.grad = gradient.clone(), gradient.clone()
        with_bad.update(with_bad.jacobian(), 0.2)
        without.update(without.jacobian(), 0.2)
    assert torch.equal(met, never)
    for part in ("tiles", "pending"):
        assert torch.equal(getattr(with_bad.filter.covariance, part), getattr(without.filter.covariance, part))
    assert count > 5
    assert with_bad.health() == {**without.health(), what: count}


def test_a_zero_gradient_is_a_measurement_of_nothing():
    """It is no error: w stays, and P forgets as after any other."""
    parameter = torch.nn.Parameter(torch.randn(20, dtype=torch.float64))
    optimizer, before = RLEKF([parameter]), parameter.detach().clone()
    parameter.grad = torch.zeros_like(parameter)
    optimizer.update(optimizer.jacobian(), 0.5)
    assert torch.equal(parameter, before)
    assert optimizer.health()["num_updates"] == 1
    assert torch.allclose(optimizer.filter.covariance.dense()[0], torch.eye(20, dtype=torch.float64) / 0.98)
