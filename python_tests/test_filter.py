"""The Python side of KalmanFilter; ops/test_ops.py tests its numbers."""

from dataclasses import fields

import pytest
import torch
from oracles import DenseFilter, relative

from rlekf_ext import BlockPlan, KalmanFilter
from rlekf_ext.ops import native
from rlekf_ext.options import FilterOptions

PLAN = BlockPlan((70, 3))


def test_one_measurement_as_plain_vector_and_number():
    kalman, dense = KalmanFilter(PLAN), DenseFilter(PLAN.sizes, 0.98, 0.9987)
    weights, wanted = (torch.zeros(73, dtype=torch.float64) for _ in range(2))
    for _ in range(3):
        h = torch.randn(73)  # float32 is accepted and computed in float64
        weights += kalman.update(h, 0.25)
        dense.step(wanted, h.double()[None], [0.25])
    assert relative(weights, wanted) < 1e-14


def test_no_measurement_changes_nothing():
    kalman = KalmanFilter(PLAN)
    assert not kalman.update(torch.zeros(0, 73), torch.zeros(0)).any()
    assert kalman.health()["num_updates"] == 0


def test_settings_reach_the_filter():
    settings = {"memory_factor": 0.9, "forgetting_rate": 0.5, "initial_covariance": 3.0, "process_noise": 0.25}
    kalman = KalmanFilter(PLAN, measurement_noise=7.0, **settings)
    dense = DenseFilter(PLAN.sizes, 0.9, 0.5, p0=3.0, noise=7.0, q=0.25)
    weights, wanted = (torch.zeros(73, dtype=torch.float64) for _ in range(2))
    h = torch.randn(2, 73, dtype=torch.float64)
    weights += kalman.update(h, torch.ones(2))
    dense.step(wanted, h, [1.0, 1.0])
    assert relative(weights, wanted) < 1e-14
    assert kalman.memory_factor == pytest.approx(0.975)


@pytest.mark.parametrize(("own", "within"), [(None, 1), (2, 2)])
def test_updates_take_their_own_number_of_threads(monkeypatch, own, within):
    kalman, found, before = KalmanFilter(PLAN), [], torch.get_num_threads()
    monkeypatch.setattr(native, "step", lambda *_: found.append(torch.get_num_threads()))
    kalman.threads = own
    try:
        torch.set_num_threads(1)
        kalman.update(torch.ones(73), 1.0)
        assert (found, torch.get_num_threads()) == ([within], 1)
    finally:
        torch.set_num_threads(before)


def test_variance_is_h_p_h_and_changes_nothing():
    kalman, dense = KalmanFilter(PLAN, max_pending=2), DenseFilter(PLAN.sizes, 0.98, 0.9987)
    weights = torch.zeros(73, dtype=torch.float64)
    for _ in range(4):
        h = torch.randn(1, 73, dtype=torch.float64)
        weights += kalman.update(h, 0.0)
        dense.step(weights, h, [0.0])
    h = torch.randn(20, 73, dtype=torch.float64)
    parts = h.split(PLAN.sizes, 1)
    wanted = sum(((part @ p) * part).sum(1) for part, p in zip(parts, dense.blocks, strict=True))
    before = kalman.covariance.dense()
    assert relative(kalman.variance(h), wanted) < 1e-13
    assert kalman.variance(h[0]).shape == ()
    assert all(relative(a, b) < 1e-14 for a, b in zip(kalman.covariance.dense(), before, strict=True))
    assert kalman.health()["num_updates"] == 4


@pytest.mark.parametrize("name", [f.name for f in fields(FilterOptions)])
def test_every_option_makes_another_filter(name):
    """In its scalars, the number or storage of its numbers, or P itself."""

    def state(**options):
        p = KalmanFilter(PLAN, **options).covariance
        return p.scalars(), p.pending.shape, p.tiles.dtype, float(p.tiles.sum())

    other = {"covariance_dtype": "float32", "max_pending": 3}.get(name, 0.25)
    assert state(**{name: other}) != state()


def test_constants_that_a_loaded_p_has_otherwise_are_named():
    saved = KalmanFilter(PLAN, process_noise=0.5).state_dict()
    kalman = KalmanFilter(PLAN, process_noise=0.25, memory_factor=0.9)
    kalman.load_state_dict(saved)
    assert kalman.differing_constants() == {"process_noise": (0.5, 0.25)}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"memory_factor": 0.0}, "memory_factor must be > 0 but is: 0.0"),
        ({"max_pending": 0}, "max_pending must be >= 1 but is: 0"),
        ({"covariance_dtype": torch.float16}, 'covariance_dtype = "float16" is not supported'),
        ({"memory_factr": 1}, "memory_factr is not a known option; did you mean memory_factor"),
        ({"memory_factor": 1.1}, "memory_factor must be <= 1 but is: 1.1"),
        ({"forgetting_rate": -0.1}, "forgetting_rate must be >= 0 but is: -0.1"),
        ({"initial_covariance": 0.0}, "initial_covariance must be > 0"),
        ({"measurement_noise": 0.0}, "measurement_noise must be > 0"),
        ({"process_noise": -1.0}, "process_noise must be >= 0"),
        ({"process_noise": float("nan")}, "process_noise must be a number but is: NaN"),
    ],
)
def test_errors(setting, message):
    with pytest.raises(ValueError, match=message):
        KalmanFilter(PLAN, **setting)


def test_as_many_innovations_as_jacobians():
    with pytest.raises(ValueError, match="each of the 2 rows of the jacobian but there are 3"):
        KalmanFilter(PLAN).update(torch.zeros(2, 73), torch.zeros(3))
