"""The kernels on a GPU: run by `make gpu`. Needs only torch, pytest and, for some of the tests, triton."""

import functools
from dataclasses import replace

import pytest
import torch
from oracles import DenseFilter, relative

from rlekf_ext import RLEKF, BlockPlan, KalmanFilter
from rlekf_ext.covariance import STATE, required_bytes
from rlekf_ext.ops import backend, backends

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch sees"),
]
ABSENT = backends()
BACKENDS = [
    pytest.param("native", marks=pytest.mark.skipif(bool(ABSENT["cuda"]), reason=ABSENT["cuda"])),
    pytest.param("triton", marks=pytest.mark.skipif(bool(ABSENT["triton"]), reason=ABSENT["triton"])),
]
ODD_SIZES = (1, 63, 64, 65, 1, 130, 700)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
GPU = torch.device("cuda")


def measurements(count, num_weights, device=GPU):
    """Drawn on the CPU, so that every device gets the same."""
    draw = torch.randn(count, num_weights, dtype=torch.float64), torch.randn(count, dtype=torch.float64)
    return tuple(tensor.to(device) for tensor in draw)


def run(name, sizes, *, steps, count=1, process_noise=0.0, device=GPU, **settings):
    torch.manual_seed(0)
    plan = BlockPlan(tuple(sizes))
    kalman = KalmanFilter(plan, backend=name, device=device, process_noise=process_noise, **settings)
    weights = torch.zeros(plan.num_weights, dtype=torch.float64, device=device)
    for _ in range(steps):
        weights += kalman.update(*measurements(count, plan.num_weights, device))
    return kalman, weights


def poison(num_bytes=1 << 28):
    """Leaves the caching allocator's memory full of NaN for the next tensors."""
    for size in (1 << 10, 1 << 16, 1 << 20, num_bytes):
        torch.full((size // 8,), float("nan"), dtype=torch.float64, device=GPU)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("process_noise", [0.0, 1e-3])
@pytest.mark.parametrize("count", range(1, 9))
def test_oracle_over_many_steps(name, dtype, count, process_noise):
    poison()
    settings = {"max_pending": 11, "covariance_dtype": dtype, "process_noise": process_noise}
    kalman, weights = run(name, ODD_SIZES, steps=steps_of(count), count=count, **settings)
    wanted, blocks = oracle(count, process_noise)
    assert relative(weights.cpu(), wanted) < TOLERANCE[dtype]
    for mine, block in zip(kalman.covariance.dense(), blocks, strict=True):
        assert relative(mine.cpu(), block) < TOLERANCE[dtype]


def steps_of(count):
    return 200 if count in (1, 8) else 60


@functools.cache
def oracle(count, process_noise):
    """Weights and blocks of P of a dense filter on the CPU, which takes longer than all the rest."""
    torch.manual_seed(0)
    dense = DenseFilter(ODD_SIZES, 0.98, 0.9987, q=process_noise)
    wanted = torch.zeros(sum(ODD_SIZES), dtype=torch.float64)
    for _ in range(steps_of(count)):
        dense.step(wanted, *measurements(count, sum(ODD_SIZES), "cpu"))
    return wanted, dense.blocks


@pytest.mark.parametrize("name", BACKENDS)
def test_more_vectors_than_a_fold_takes_at_once_and_a_large_scale(name):
    """A fold of 40 vectors that also moves a power of two out of the scale."""
    plan = BlockPlan((200, 70))
    found = []
    for device in (GPU, torch.device("cpu")):
        torch.manual_seed(0)
        kalman = KalmanFilter(
            plan, backend=name if device == GPU else "native", device=device, max_pending=40, memory_factor=0.5
        )
        weights = torch.zeros(270, dtype=torch.float64, device=device)
        for _ in range(90):
            weights += kalman.update(*measurements(1, 270, device))
        found.append((weights.cpu(), kalman.covariance.state.cpu()))
    assert found[1][1][list(STATE).index("scale")] < 2.0**60  # 2^90 without
    assert relative(found[0][0], found[1][0]) < 1e-10
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("sizes", [(1,), (3000, 17, 1, 900), (1350, 5000), tuple([40] * 300)])
def test_same_as_the_cpu(name, dtype, count, sizes):
    """Plans of every kind, long enough for several folds, from memory full of NaN."""
    poison()
    settings = {"steps": 25, "count": count, "max_pending": 8, "covariance_dtype": dtype}
    kalman, weights = run(name, sizes, **settings)
    cpu, wanted = run("native", sizes, device=torch.device("cpu"), **settings)
    assert relative(weights.cpu(), wanted) < TOLERANCE[dtype]
    assert relative(kalman.covariance.tiles.cpu().double(), cpu.covariance.tiles.double()) < TOLERANCE[dtype]
    assert torch.allclose(kalman.covariance.state.cpu(), cpu.covariance.state, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_same_bits_on_every_run(name, dtype):
    settings = {"steps": 70, "count": 2, "covariance_dtype": dtype}
    kalman, weights = run(name, (3000, 65, 129), **settings)
    for _ in range(5):
        poison()
        other, again = run(name, (3000, 65, 129), **settings)
        assert torch.equal(weights, again)
        for part in ("tiles", "pending", "state"):
            assert torch.equal(getattr(kalman.covariance, part), getattr(other.covariance, part))


@pytest.mark.parametrize("name", BACKENDS)
def test_a_captured_step_goes_on_exactly(name):
    """Replays with new numbers in the same tensors match the steps of eager calls, folds included."""
    plan = BlockPlan((900, 65))
    kalman, eager = (KalmanFilter(plan, backend=name, device=GPU, max_pending=5) for _ in range(2))
    weights, wanted = (torch.zeros(plan.num_weights, dtype=torch.float64, device=GPU) for _ in range(2))
    h, e = measurements(2, plan.num_weights)
    inputs = h.clone(), e.clone()
    for _ in range(3):  # what is made only once is made before the capture
        weights += kalman.update(*inputs)
        wanted += eager.update(h, e)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weights += kalman.update(*inputs)
    for _ in range(20):
        h, e = measurements(2, plan.num_weights)
        inputs[0].copy_(h)
        inputs[1].copy_(e)
        graph.replay()
        wanted += eager.update(h, e)
    assert torch.equal(weights, wanted)
    assert torch.equal(kalman.covariance.tiles, eager.covariance.tiles)
    assert torch.equal(kalman.covariance.state, eager.covariance.state)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_step_waits_for_nothing(name):
    kalman, weights = run(name, (900, 65), steps=3)
    h, e = measurements(1, 965)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(40):
            weights += kalman.update(h, e)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", BACKENDS)
def test_work_goes_to_the_current_stream(name):
    """Behind a long wait on another stream, a step must not have run before its own stream has come to it."""
    kalman, weights = run(name, (900, 65), steps=3)
    before = weights.clone()
    stream = torch.cuda.Stream()
    h, e = measurements(1, 965)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(int(2e8))
        weights += kalman.update(h, e)
    assert torch.equal(weights, before)
    stream.synchronize()
    assert not torch.equal(weights, before)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("processes", [1, 3, 50])
def test_parts_of_the_tiles_are_all_of_them(name, dtype, count, processes):
    """As processes that share P would: z of each part, their sum, and the rest; through a fold."""
    sizes = (700, 65, 1, 130)
    settings = {"steps": 3, "count": count, "max_pending": 4 * count, "covariance_dtype": dtype}
    whole, _ = run(name, sizes, **settings)
    shared, weights = run(name, sizes, **settings)
    ops = backend(name, GPU)
    for _ in range(3):
        h, e = measurements(count, sum(sizes))
        wanted = whole.update(h, e)
        p = shared.covariance
        z = torch.zeros_like(h)
        for own in torch.arange(len(p.tiles)).tensor_split(processes):
            first = int(own[0]) if len(own) else len(p.tiles)
            part = replace(
                p, tiles=p.tiles[first : first + len(own)], layout=p.layout - torch.tensor([0, 0, first]).to(GPU)
            )
            z += ops.multiply_tiles(part, h)
        increment = torch.zeros_like(weights)
        ops.correct(p, increment, z, ops.finish_projection(p, z, h), h, e)
        assert relative(increment, wanted) < TOLERANCE[dtype]
    assert torch.allclose(shared.covariance.state, whole.covariance.state, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", BACKENDS)
def test_bad_numbers_are_skipped(name):
    kalman, weights = run(name, (70, 3), steps=5)
    before = weights.clone(), kalman.covariance.tiles.clone()
    for value in (float("nan"), float("inf"), 1e200):
        h, e = measurements(1, 73)
        h[0, 7] = value
        weights += kalman.update(h, e)
    weights += kalman.update(measurements(1, 73)[0], float("nan"))
    assert torch.equal(weights, before[0])
    assert torch.equal(kalman.covariance.tiles, before[1])
    assert kalman.health() == {
        "num_updates": 5,
        "skipped_innovation": 1,
        "skipped_jacobian": 3,
        "skipped_variance": 0,
        "skipped_in_a_row": 4,
    }


class VectorFilter:
    """Algorithm 2 for P that starts as I, kept only as vectors: P = scale (I - Σ u uᵀ). One block, no dense matrix."""

    def __init__(self, lam, nu):
        self.lam, self.nu, self.scale, self.vectors = lam, nu, 1.0, []

    def step(self, weights, h, innovation):
        y = h.clone()
        for u in self.vectors:
            y -= u * (u @ h)
        variance = self.scale * float(h @ y)
        a = 1 / (self.lam + variance)
        weights += a * self.scale * innovation * y
        self.vectors.append((a * self.scale) ** 0.5 * y)
        self.scale /= self.lam
        self.lam = self.nu * self.lam + 1 - self.nu


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_largest_block(name, dtype):
    """65 536 weights: more numbers in the tiles than 32 bits can index, through two folds."""
    plan = BlockPlan((65536,))
    if required_bytes(plan, dtype=dtype, max_pending=8) > 0.8 * torch.cuda.mem_get_info()[0]:
        pytest.skip("P does not fit on this GPU")
    assert sum(n * (n + 64) // 2 for n in plan.sizes) > 2**31
    kalman = KalmanFilter(plan, backend=name, device=GPU, covariance_dtype=dtype, max_pending=8)
    weights, wanted = (torch.zeros(65536, dtype=torch.float64, device=GPU) for _ in range(2))
    oracle = VectorFilter(0.98, 0.9987)
    for _ in range(20):
        h, _ = measurements(1, 65536)
        weights += kalman.update(h, 0.5)
        oracle.step(wanted, h[0], 0.5)
    assert relative(weights, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", BACKENDS)
def test_an_optimizer_on_the_gpu_is_that_on_the_cpu(name):
    def trained(device, backend):
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(8, 30), torch.nn.Tanh(), torch.nn.Linear(30, 1)).double()
        x = torch.randn(50, 8, dtype=torch.float64)
        y = x.prod(1, keepdim=True)
        model, x, y = model.to(device), x.to(device), y.to(device)
        optimizer = RLEKF(model.parameters(), block_size=100, backend=backend)
        for i in range(50):

            def closure(i=i):
                optimizer.zero_grad()
                loss = (model(x[i]) - y[i]).abs().mean()
                loss.backward()
                return loss

            optimizer.step(closure)
        return torch.cat([p.detach().cpu().flatten() for p in model.parameters()])

    assert relative(trained(GPU, name), trained("cpu", "native")) < 1e-9


@pytest.mark.skipif(bool(ABSENT["cuda"]), reason=ABSENT["cuda"])
class TestErrors:
    """Wrong arguments raise a Python exception that says what is wrong."""

    def arguments(self):
        p = KalmanFilter(BlockPlan((70, 3)), device=GPU, max_pending=4, backend="native").covariance
        h, e = measurements(2, 73)
        weights = torch.zeros(73, dtype=torch.float64, device=GPU)
        names = ("weights", "tiles", "pending", "state", "layout", "jacobian", "innovation")
        return dict(zip(names, (weights, p.tiles, p.pending, p.state, p.layout, h, e), strict=True))

    @pytest.mark.parametrize("name", ["weights", "pending", "state", "layout", "jacobian", "innovation"])
    def test_a_tensor_on_another_device(self, name):
        arguments = self.arguments()
        arguments[name] = arguments[name].cpu()
        with pytest.raises(RuntimeError, match=rf"{name} should be on GPU 0 .* but is on the CPU; move it there"):
            torch.ops.rlekf.step(**arguments)

    def test_tiles_between_16_bytes(self):
        arguments = self.arguments()
        room = torch.zeros(arguments["tiles"].numel() + 1, dtype=torch.float64, device=GPU)
        arguments["tiles"] = room[1:].view(arguments["tiles"].shape)
        with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
            torch.ops.rlekf.step(**arguments)

    def test_opcheck(self):
        torch.library.opcheck(torch.ops.rlekf.step.default, tuple(self.arguments().values()))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", BACKENDS)
def test_another_gpu_than_the_current_one(name):
    kalman, weights = run(name, (900, 65), steps=40, device=torch.device("cuda:1"))
    other, wanted = run(name, (900, 65), steps=40, device=torch.device("cuda:0"))
    assert torch.cuda.current_device() == 0
    assert torch.equal(weights.cpu(), wanted.cpu())
    assert torch.equal(kalman.covariance.tiles.cpu(), other.covariance.tiles.cpu())
