"""One filter on many processes: gloo on this machine's CPU. The result is that of one process."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from spawn import spawn

from rlekf_ext import RLEKF, BlockPlan, KalmanFilter
from rlekf_ext.sharding import TileShare

PLANS = [BlockPlan((330,)), BlockPlan((200, 70)), BlockPlan((65, 1, 130, 64, 3, 77, 128, 20, 9, 40))]  # L = 1, 2, 10


def run(kalman, weights, steps, first=0):
    """Steps of one to three measurements, the same for every filter with as many weights."""
    for step in range(first, first + steps):
        source = torch.Generator().manual_seed(step)
        count = 1 + step % 3
        jacobian = torch.randn(count, len(weights), generator=source, dtype=torch.float64)
        weights += kalman.update(jacobian, torch.randn(count, generator=source, dtype=torch.float64))
    return weights


def distance(a, b):
    return float((a - b).abs().max() / b.abs().max())


def the_same_answer(rank):
    for plan in PLANS:
        for options in ({}, {"covariance_dtype": torch.float32}, {"process_noise": 1e-4, "max_pending": 4}):
            alone = KalmanFilter(plan, **options)
            ours = KalmanFilter(plan, process_group=dist.group.WORLD, **options)
            wanted = run(alone, torch.zeros(plan.num_weights, dtype=torch.float64), 100)
            found = run(ours, torch.zeros(plan.num_weights, dtype=torch.float64), 100)
            coarse = "covariance_dtype" in options
            assert distance(found, wanted) < (1e-6 if coarse else 1e-12)
            others = [torch.empty_like(found) for _ in range(dist.get_world_size())]
            dist.all_gather(others, found)
            assert all(torch.equal(found, other) for other in others)  # bit for bit on every rank
            for mine, theirs in zip(ours.gathered().dense(), alone.covariance.dense(), strict=True):
                assert distance(mine, theirs) < (1e-5 if coarse else 1e-11)
            assert ours.health() == alone.health()
            h = torch.randn(3, plan.num_weights, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            assert distance(ours.variance(h), alone.variance(h)) < (1e-5 if coarse else 1e-11)
            assert ours.diagnostics().trace == pytest.approx(alone.diagnostics().trace, rel=1e-5 if coarse else 1e-11)


@pytest.mark.parametrize("size", [2, 3, pytest.param(8, marks=pytest.mark.soak)])
def test_the_same_answer_on_every_number_of_processes(size):
    spawn(the_same_answer, size)


def triton_too(rank):
    """In Triton's interpreter, which is slow: a few steps, two of them with folds."""
    group = dist.group.WORLD
    for plan in (PLANS[1], BlockPlan((65, 1, 70))):
        for options in ({}, {"covariance_dtype": torch.float32}):
            alone = KalmanFilter(plan, max_pending=4, **options)
            ours = KalmanFilter(plan, max_pending=4, process_group=group, backend="triton", **options)
            wanted = run(alone, torch.zeros(plan.num_weights, dtype=torch.float64), 6)
            found = run(ours, torch.zeros(plan.num_weights, dtype=torch.float64), 6)
            coarse = 1e6 if options else 1
            assert distance(found, wanted) < 1e-13 * coarse
            assert len(ours.covariance.tiles) < len(alone.covariance.tiles)
            for mine, theirs in zip(ours.gathered().dense(), alone.covariance.dense(), strict=True):
                assert distance(mine, theirs) < 1e-13 * coarse


@pytest.mark.soak
def test_triton_kernels_take_parts_of_blocks():
    spawn(triton_too, 3)


def one_message_a_step(rank):
    plan, sent = PLANS[2], []
    kalman = KalmanFilter(plan, process_group=dist.group.WORLD)
    reduce = dist.all_reduce

    def counted(tensor, **options):
        sent.append(tensor.numel())
        reduce(tensor, **options)

    dist.all_reduce = counted
    run(kalman, torch.zeros(plan.num_weights, dtype=torch.float64), 6)
    assert sent == [m * plan.num_weights for m in (1, 2, 3, 1, 2, 3)]


def test_one_message_a_step():
    spawn(one_message_a_step, 2)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("plan", PLANS)
def test_every_tile_is_on_one_rank_and_shares_are_equal(plan, size):
    shards = [TileShare(plan, SimpleNamespace(rank=rank, size=size)) for rank in range(size)]
    total = shards[0].num_tiles
    assert [tile for shard in shards for tile in shard.tiles] == list(range(total))
    assert max(len(shard.tiles) for shard in shards) == -(-total // size)


def parameters(plan):
    source = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(n, generator=source, dtype=torch.float64)) for n in plan.sizes]


def optimizer_of(plan, group=None):
    params = parameters(plan)
    return params, RLEKF(params, block_size=max(plan.sizes), process_group=group)


def update(optimizer, steps, first):
    for step in range(first, first + steps):
        source = torch.Generator().manual_seed(step)
        n = optimizer.filter.plan.num_weights
        optimizer.update(torch.randn(n, generator=source, dtype=torch.float64), 1.0)


def state_of(params, optimizer):
    return {"weights": params, "optimizer": optimizer.state_dict()["state"][0]}


def saves(rank, folder):
    params, optimizer = optimizer_of(PLANS[1], dist.group.WORLD)
    update(optimizer, 40, 0)
    dcp.save(state_of(params, optimizer), checkpoint_id=folder)
    update(optimizer, 20, 40)
    torch.save([p.detach() for p in params], f"{folder}-{dist.get_world_size()}.{rank}")


def loads(rank, folder, wanted):
    params, optimizer = optimizer_of(PLANS[1], dist.group.WORLD)
    go_on(params, optimizer, folder, wanted, 0.0 if dist.get_world_size() == 3 else 1e-13)


def go_on(params, optimizer, folder, wanted, tolerance):
    state = state_of(params, optimizer)
    with torch.no_grad():
        dcp.load(state, checkpoint_id=folder)
    update(optimizer, 20, 40)
    for mine, theirs in zip(params, torch.load(wanted), strict=True):
        assert distance(mine.detach(), theirs) <= tolerance


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_loads_on_another_number_of_processes(tmp_path):
    """And continues exactly on the same number."""
    folder = str(tmp_path / "checkpoint")
    spawn(saves, 3, folder)
    wanted = f"{folder}-3.0"
    sizes = [path.stat().st_size for path in Path(folder).glob("*.distcp")]
    assert len(sizes) == 3  # every rank writes its tiles
    for size in (3, 2):
        spawn(loads, size, folder, wanted)
    params, optimizer = optimizer_of(PLANS[1])
    go_on(params, optimizer, folder, wanted, 1e-13)
    Path(folder, "__1_0.distcp").unlink()
    with pytest.raises(dcp.api.CheckpointException, match=r"__1_0\.distcp"):
        go_on(*optimizer_of(PLANS[1]), folder, wanted, 0.0)


def loads_whole(rank, saved, wanted):
    _, optimizer = optimizer_of(PLANS[1], dist.group.WORLD)
    optimizer.load_state_dict(torch.load(saved))
    update(optimizer, 20, 40)
    full, alone = optimizer.filter.gathered().dense(), torch.load(wanted)
    for mine, theirs in zip(full, alone, strict=True):
        assert distance(mine, theirs) < 1e-13


def test_a_checkpoint_of_one_process_loads_on_several(tmp_path):
    _, optimizer = optimizer_of(PLANS[1])
    update(optimizer, 40, 0)
    torch.save(optimizer.state_dict(), tmp_path / "saved")
    update(optimizer, 20, 40)
    torch.save(optimizer.filter.covariance.dense(), tmp_path / "wanted")
    spawn(loads_whole, 2, tmp_path / "saved", tmp_path / "wanted")


def refuses(rank):
    group = dist.group.WORLD
    with pytest.raises(RuntimeError, match=r"reference backend needs whole blocks, .* backend='auto' finds another"):
        KalmanFilter(PLANS[0], process_group=group, backend="reference")
    kalman = KalmanFilter(PLANS[0], process_group=group)
    with pytest.raises(ValueError, match="gathered"):
        kalman.covariance.reblock(BlockPlan((300, 30)))
    with pytest.raises(ValueError, match=r"torch\.distributed\.checkpoint"):
        kalman.covariance.from_state_dict(kalman.state_dict())
    auto = KalmanFilter(PLANS[0], process_group=group, covariance_dtype="auto")
    auto.covariance = auto.covariance.reblock(PLANS[0], dtype=torch.float64)
    assert auto.covariance.tiles.dtype == torch.float64


def test_what_needs_all_tiles_says_so():
    spawn(refuses, 2)
