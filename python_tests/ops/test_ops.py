"""Every backend against the dense oracle. A new backend is one more word in BACKENDS."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import DenseFilter, relative

from rlekf_ext import BlockPlan, KalmanFilter
from rlekf_ext.covariance import LEAST_VARIANCE
from rlekf_ext.ops import backend, backends, native
from rlekf_ext.packing import TILE, unpack

BACKENDS = ["native", "reference", "triton"]
ODD_SIZES = (1, 63, 64, 65, 1, 130)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def fewer(name, many, few):
    """Triton's interpreter takes about 5 ms for the work of one GPU program."""
    return few if name == "triton" else many


def random_measurements(count, num_weights):
    return torch.randn(count, num_weights, dtype=torch.float64), torch.randn(count, dtype=torch.float64)


def run(plan, *, steps, count=1, oracle=True, nu=0.9987, lam=0.98, **settings):
    """A filter after `steps` random steps, its weights, and the oracle's."""
    kalman = KalmanFilter(plan, memory_factor=lam, forgetting_rate=nu, **settings)
    dense = DenseFilter(plan.sizes, lam, nu, q=settings.get("process_noise", 0.0))
    weights = torch.zeros(plan.num_weights, dtype=torch.float64)
    wanted = weights.clone()
    for _ in range(steps):
        h, e = random_measurements(count, plan.num_weights)
        weights += kalman.update(h, e)
        if oracle:
            dense.step(wanted, h, e)
    return kalman, weights, dense, wanted


def assert_same(kalman, weights, dense, wanted, tolerance):
    assert relative(weights, wanted) < tolerance
    for mine, block in zip(kalman.covariance.dense(), dense.blocks, strict=True):
        assert relative(mine, block) < tolerance
        assert torch.equal(mine, mine.T)


@pytest.mark.parametrize(
    ("name", "process_noise"), [(name, q) for name in BACKENDS for q in fewer(name, (0.0, 1e-3), (1e-3,))]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("count", range(1, 9))
def test_oracle_over_200_steps(name, dtype, count, process_noise):
    kalman, weights, dense, wanted = run(
        BlockPlan(fewer(name, ODD_SIZES, (65, 3))),
        steps=fewer(name, 200, 11 // count + 2),
        count=count,
        max_pending=11,  # folds at every phase: 11 is a multiple of none of 2 ... 8
        process_noise=process_noise,
        covariance_dtype=dtype,
        backend=name,
    )
    assert_same(kalman, weights, dense, wanted, TOLERANCE[dtype])
    assert kalman.memory_factor == pytest.approx(dense.lam, rel=1e-14)


@given(
    sizes=st.lists(st.integers(1, 140), min_size=1, max_size=5),
    count=st.integers(1, 8),
    pending=st.integers(8, 40),
    process_noise=st.sampled_from([0.0, 1e-6, 0.1]),
    lam=st.floats(0.9, 1.0),
    name=st.sampled_from(BACKENDS),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_oracle_on_any_plan(sizes, count, pending, process_noise, lam, name, seed):
    torch.manual_seed(seed)
    result = run(
        BlockPlan(tuple(sizes)),
        steps=fewer(name, 12, 2),
        count=count,
        max_pending=pending,
        process_noise=process_noise,
        lam=lam,
        backend=name,
    )
    assert_same(*result, 1e-12)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("pending", range(1, 9))
def test_folds_at_every_phase(name, pending):
    result = run(BlockPlan((70, 3)), steps=fewer(name, 20, pending + 2), max_pending=pending, backend=name)
    assert_same(*result, 1e-12)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("pending", [1, 3])
def test_more_measurements_than_a_pass_takes(name, pending):
    """20 rows in passes of 8 (or of `pending`) are still the batch filter at the weights before the call."""
    result = run(BlockPlan((70, 3)), steps=fewer(name, 3, 1), count=20, max_pending=pending, backend=name)
    assert_same(*result, 1e-12)


@pytest.mark.parametrize(("sizes", "steps"), [pytest.param((3,), 100_000, marks=pytest.mark.soak), ((5, 2), 20_000)])
def test_constant_forgetting_does_not_overflow(sizes, steps):
    """ν = 1 keeps λ at 0.98: the scale grows as 0.98^-t, past any float64, unless it is moved into S."""
    plan = BlockPlan(sizes)
    kalman, weights, dense, wanted = run(plan, steps=steps, nu=1.0, max_pending=4)
    assert_same(kalman, weights, dense, wanted, 1e-12)
    assert kalman.covariance.scalars().scale < 2.0**42
    assert steps * -math.log2(0.98) > 500


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("count", [1, 3])
def test_large_process_noise_and_measurements_that_say_little(name, count):
    plan = BlockPlan((70, 3))
    kalman = KalmanFilter(plan, memory_factor=0.98, max_pending=5, process_noise=0.1, backend=name)
    dense = DenseFilter(plan.sizes, 0.98, 0.9987, q=0.1)
    weights, wanted = (torch.zeros(73, dtype=torch.float64) for _ in range(2))
    for t in range(fewer(name, 60, 7)):
        h, e = random_measurements(count, 73)
        h[:, :20] *= t % 3 == 0  # some directions are excited only now and then
        h[0] *= t % 2
        weights += kalman.update(h, e)
        dense.step(wanted, h, e)
    assert_same(kalman, weights, dense, wanted, 1e-12)


@pytest.mark.parametrize("name", BACKENDS)
def test_diagonal_tiles_stay_symmetric(name):
    kalman, *_ = run(BlockPlan((130,)), steps=fewer(name, 50, 10), oracle=False, max_pending=4, backend=name)
    for tile in kalman.covariance.tiles[[0, 2, 5]]:
        if name != "reference":
            assert torch.equal(tile, tile.T)
    (block,) = unpack(kalman.covariance.tiles, kalman.plan)
    assert block.shape == (130, 130)


@pytest.mark.parametrize("name", BACKENDS)
def test_padding_stays_zero(name):
    kalman, *_ = run(BlockPlan((70,)), steps=fewer(name, 20, 10), oracle=False, max_pending=4, backend=name)
    tiles = kalman.covariance.tiles
    assert not tiles[1][6:].any()
    assert not tiles[2][6:].any()
    assert not tiles[2][:, 6:].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("threads", [1, 2])
def test_same_bits_on_every_run(dtype, threads):  # test_triton.py has the same for triton
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = []
        for _ in range(3):
            torch.manual_seed(1)
            kalman, weights, *_ = run(BlockPlan((300, 65, 129)), steps=40, oracle=False, covariance_dtype=dtype)
            results.append((weights, kalman.covariance.tiles, kalman.covariance.pending))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", BACKENDS)
def test_step_is_project_then_correct(name):
    """Also from scratch memory that earlier calls left full of other numbers."""
    plan, ops = BlockPlan(ODD_SIZES), backend(name, torch.device("cpu"))
    one, other = (KalmanFilter(plan, max_pending=5, process_noise=1e-3, backend=name) for _ in range(2))
    w_other = torch.zeros(plan.num_weights, dtype=torch.float64)
    for count in (1, 4, 2, 3, 1):
        h, e = random_measurements(count, plan.num_weights)
        increment, p = one.update(h, e), other.covariance
        w_other.zero_()
        cross, gram = ops.project(p, h)
        ops.correct(p, w_other, cross, gram, h, e)
        assert torch.equal(increment, w_other)
        assert torch.equal(one.covariance.state, p.state)


@pytest.mark.parametrize("name", BACKENDS)
def test_project_is_multiply_tiles_then_finish_projection(name):
    """Also when the tiles are shared out, folds included."""
    plan, ops = BlockPlan((130, 3, 70)), backend(name, torch.device("cpu"))
    one, two, shared = (
        KalmanFilter(plan, max_pending=5, process_noise=1e-3, backend=name).covariance for _ in range(3)
    )
    weights = [torch.zeros(plan.num_weights, dtype=torch.float64) for _ in range(3)]
    for count in (1, 4, 2, 3, 1):
        h, e = random_measurements(count, plan.num_weights)
        cross, gram = ops.project(one, h)
        z = ops.multiply_tiles(two, h)
        inner = ops.finish_projection(two, z, h)
        assert torch.equal(z, cross)
        assert torch.equal(inner, gram)
        results = [(one, cross, gram), (two, z, inner)]
        if name != "reference":  # which takes whole blocks
            parts = [(shared.tiles[:4], 0), (shared.tiles[4:6], 4), (shared.tiles[6:], 6), (shared.tiles[:0], 10)]
            z = torch.zeros_like(h)
            for tiles, first in parts:
                layout = shared.layout - torch.tensor([0, 0, first])
                z += ops.multiply_tiles(replace(shared, tiles=tiles, layout=layout), h)
            results.append((shared, z, ops.finish_projection(shared, z, h)))
            assert relative(z, cross) < 1e-13
        for w, (p, *projection) in zip(weights, results, strict=False):
            ops.correct(p, w, *projection, h, e)
    assert torch.equal(one.tiles, two.tiles)
    assert torch.equal(one.state, two.state)
    if name != "reference":
        assert relative(weights[2], weights[0]) < 1e-13
        assert relative(shared.tiles, one.tiles) < 1e-13


@pytest.mark.parametrize("name", BACKENDS)
def test_projection_is_ph_and_its_products(name):
    kalman, _, dense, _ = run(BlockPlan((70, 3)), steps=fewer(name, 10, 3), process_noise=1e-2, backend=name)
    p, scale = kalman.covariance, kalman.covariance.scalars().scale
    h, _ = random_measurements(3, 73)
    ops = backend(name, torch.device("cpu"))
    cross, gram = ops.project(p, h)
    ph = torch.cat([part @ block for part, block in zip(h.split([70, 3], 1), dense.blocks, strict=True)], 1)
    assert relative(scale * cross, ph) < 1e-12
    for index, part in enumerate(h.split([70, 3], 1)):
        assert relative(scale * gram[0, index], part @ dense.blocks[index] @ part.T) < 1e-12
        assert relative(gram[1, index], part @ part.T) < 1e-12


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("poison", "cause"),
    [
        (lambda h, e: e.fill_(math.nan), "skipped_innovation"),
        (lambda h, e: e.fill_(math.inf), "skipped_innovation"),
        (lambda h, e: h[-1, 7].fill_(math.nan), "skipped_jacobian"),
        (lambda h, e: h[-1, 7].fill_(math.inf), "skipped_jacobian"),
        (lambda h, e: h[-1].fill_(1e200), "skipped_jacobian"),
    ],
)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter
def test_bad_numbers_are_skipped(name, poison, cause, count):
    """The filter that met them ends as one that never did."""
    plan = BlockPlan((70, 3))
    before, bad = fewer(name, (5, 4), (1, 3))
    (met, weights, dense, wanted) = run(plan, steps=before, count=count, max_pending=7, backend=name)
    for _ in range(bad):
        h, e = random_measurements(count, 73)
        good_h, good_e = h[: count - 1].clone(), e[: count - 1].clone()
        poison(h, e[-1:])
        weights += met.update(h, e)
        dense.step(wanted, good_h, good_e)
    assert met.health()[cause] == bad
    assert met.health()["num_updates"] == before * count + bad * (count - 1)
    assert_same(met, weights, dense, wanted, 1e-12)


@pytest.mark.parametrize("name", BACKENDS)
def test_negative_variance_is_skipped(name):
    kalman, weights, *_ = run(BlockPlan((70,)), steps=2, oracle=False, backend=name)
    kalman.covariance.tiles.neg_()
    before = weights.clone(), kalman.covariance.scalars()
    weights += kalman.update(*random_measurements(1, 70))
    assert torch.equal(weights, before[0])
    assert kalman.covariance.scalars() == before[1]._replace(skipped_variance=1, skipped_in_a_row=1)


@pytest.mark.parametrize("name", BACKENDS)
def test_zero_jacobian_moves_nothing(name):
    kalman, weights, dense, wanted = run(BlockPlan((70, 3)), steps=5, backend=name)
    h, e = torch.zeros(1, 73, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    weights += kalman.update(h, e)
    dense.step(wanted, h, e)
    assert_same(kalman, weights, dense, wanted, 1e-12)


class TestSchema:
    """torch.library's own checks, and the messages of the argument checks."""

    plan = BlockPlan((70, 3))

    def arguments(self, count=2):
        p = KalmanFilter(self.plan, max_pending=4).covariance
        h, e = random_measurements(count, 73)
        return {
            "weights": torch.zeros(73, dtype=torch.float64),
            "tiles": p.tiles,
            "pending": p.pending,
            "state": p.state,
            "layout": p.layout,
            "jacobian": h,
            "innovation": e,
        }

    def test_opcheck(self):
        step = self.arguments()
        torch.library.opcheck(torch.ops.rlekf.step.default, tuple(step.values()))
        project = [step[name] for name in ("tiles", "pending", "state", "layout", "jacobian")]
        torch.library.opcheck(torch.ops.rlekf.project.default, project)
        torch.library.opcheck(torch.ops.rlekf.multiply_tiles.default, project)
        torch.library.opcheck(torch.ops.rlekf.finish_projection.default, [step["jacobian"].clone(), *project[1:]])
        cross, gram = torch.ops.rlekf.project(*project)
        correct = [step[name] for name in ("weights", "pending", "state", "layout")]
        correct += [cross, gram, step["jacobian"], step["innovation"]]
        torch.library.opcheck(torch.ops.rlekf.correct.default, correct)

    def test_autograd_sees_what_changed(self):
        p, weights = KalmanFilter(self.plan).covariance, torch.zeros(73, dtype=torch.float64)
        before = p.tiles._version
        backend("native", torch.device("cpu")).step(p, weights, *random_measurements(2, 73))
        assert p.tiles._version > before
        assert weights._version > 0

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("weights", torch.zeros(72, dtype=torch.float64), r"weights should have shape \(73\) but has \(72\)"),
            ("weights", torch.zeros(73), "weights should be float64"),
            ("jacobian", torch.zeros(2, 74, dtype=torch.float64), r"jacobian should have shape \(any, 73\)"),
            ("jacobian", torch.zeros(73, 2, dtype=torch.float64).T, "jacobian should be contiguous"),
            (
                "jacobian",
                torch.zeros(9, 73, dtype=torch.float64),
                "a pass takes 1 to 8 measurements but jacobian has 9",
            ),
            ("jacobian", torch.zeros(5, 73, dtype=torch.float64), "at least as many rows in pending but it has 4"),
            ("innovation", torch.zeros(3, dtype=torch.float64), r"innovation should have shape \(2\) but has \(3\)"),
            ("layout", torch.zeros(2, 3), "layout should be int64"),
            ("layout", torch.zeros(0, 3, dtype=torch.int64), "at least one block"),
            ("tiles", torch.zeros(4, TILE, TILE, dtype=torch.int64), "tiles should be float64 or float32"),
            ("tiles", torch.zeros(4, TILE, dtype=torch.float64), "tiles should be contiguous with shape"),
            ("state", torch.zeros(3, dtype=torch.float64), "state should have shape"),
        ],
    )
    def test_checks_say_rule_and_value(self, name, value, message):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.rlekf.step(**{**self.arguments(), name: value})


def test_backend_is_chosen_by_name(monkeypatch):
    assert backends()["cpu"] == ""
    with pytest.raises(ValueError, match="backend must be 'auto', 'native', 'triton' or 'reference' but is: 'fast'"):
        KalmanFilter(BlockPlan((3,)), backend="fast")
    assert backend("auto", torch.device("cpu")) is backend("native", torch.device("cpu"))
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert all(backends()[name] for name in ("cuda", "triton"))
    with pytest.raises(RuntimeError, match=r"no kernels for cuda.* backend='reference' runs anywhere"):
        backend("native", gpu)
    with pytest.raises(RuntimeError, match=r"no kernels for cuda.* triton backend cannot run on cuda: .* finds no GPU"):
        backend("auto", gpu)
    with pytest.raises(RuntimeError, match="triton backend cannot run on xpu: none are written for xpu"):
        backend("triton", torch.device("xpu"))


def test_auto_is_triton_on_a_gpu_without_compiled_kernels(monkeypatch):
    monkeypatch.setattr(native, "why_absent", lambda device_type: "left out of this build.")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backend("auto", torch.device("cuda")) is backend("triton", torch.device("cuda"))
    with pytest.raises(RuntimeError, match=r"no kernels for cpu: left out of this build\. backend='reference'"):
        backend("auto", torch.device("cpu"))


@pytest.mark.parametrize("name", ["native", "reference"])
@pytest.mark.parametrize("count", [1, 2])
def test_no_measurement_makes_p_indefinite(name, count):
    """Few directions, and Jacobians that grow: rounding alone would leave P with negative eigenvalues."""
    plan = BlockPlan((24, 6))
    kalman = KalmanFilter(plan, memory_factor=0.998, max_pending=5, backend=name)
    directions = torch.randn(3, plan.num_weights, dtype=torch.float64)
    for step in range(400):
        h = 10 ** (9 * step / 400) * torch.randn(count, 3, dtype=torch.float64) @ directions
        kalman.update(h, torch.randn(count, dtype=torch.float64))
    assert kalman.health()["num_updates"] == 400 * count
    for block in kalman.covariance.dense():
        assert torch.linalg.eigvalsh(block).min() > 0


@pytest.mark.parametrize("name", BACKENDS)
def test_the_least_variance(name):
    """A measurement that would leave less leaves this much; one that finds no more moves nothing."""
    plan = BlockPlan((70,))
    kalman = KalmanFilter(plan, memory_factor=1.0, backend=name)
    h = 1e9 * torch.randn(plan.num_weights, dtype=torch.float64)
    moved = kalman.update(h, 1.0)
    assert float(h @ moved) == pytest.approx(1.0)
    least = LEAST_VARIANCE * float(h @ h)
    assert float(kalman.variance(h)) == pytest.approx(least, rel=1e-3)  # rounding: eps over 2^-40 is 2e-4
    moved = kalman.update(h, 1.0)
    assert float(h @ moved) < 1e-3
    assert float(kalman.variance(h)) == pytest.approx(least, rel=1e-3)
    assert kalman.health()["num_updates"] == 2


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("80-real 90", (8, 0), True),
        ("80-real 90", (8, 9), True),
        ("80-real 90", (7, 5), False),
        ("80-real 90", (9, 0), True),
        ("80-real 90", (12, 0), True),
        ("90-real", (8, 0), False),
        ("90-real", (10, 0), False),
        ("80-virtual", (9, 0), True),
        ("86-real", (8, 0), False),
        ("native", (8, 6), True),
    ],
)
def test_which_gpus_a_build_runs_on(built, capability, runs):
    assert native.covers(built, capability) == runs


def test_a_gpu_that_the_build_does_not_cover(monkeypatch):
    monkeypatch.setitem(native.HAS_KERNELS, "CUDA", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(native._C, "build_info", lambda: {"cuda_architectures": "90-real"})
    for capability, way_out in (((7, 5), "its kernels need 8.0"), ((8, 6), "reinstall rlekf_ext with CMAKE_ARGS")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        reason = native.why_absent("cuda")
        assert "code for 90-real, but a card has compute capability {}.{}; ".format(*capability) in reason
        assert way_out in reason
