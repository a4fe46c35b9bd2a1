"""LKFOptimizer as a drop-in, against the stand-in's dense one."""

import copy

import pytest
import torch
import torch.distributed as dist
from integrations.standin_training import LKFOptimizer as DenseLKF
from spawn import spawn

from rlekf_ext.integrations.lkf import LKFOptimizer

SHAPES = ((3, 7), (7,), (7, 5), (5,), (5, 1))


def parameters():
    generator = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in SHAPES]


def run(optimizer, params, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        optimizer.set_grad_prefactor(18)
        optimizer.step(torch.rand((), generator=generator, dtype=torch.float64))


def flat(params):
    return torch.cat([p.detach().reshape(-1) for p in params])


@pytest.mark.parametrize("block_size", [12, 24, 5120])
def test_same_weights_as_lkf(block_size):
    mine, theirs = parameters(), parameters()
    run(LKFOptimizer(mine, 0.98, 0.9987, block_size), mine, 50)
    run(DenseLKF(theirs, 0.98, 0.9987, block_size), theirs, 50)
    torch.testing.assert_close(flat(mine), flat(theirs), rtol=0, atol=1e-10)


def test_set_kalman_p_takes_over_a_running_lkf():
    mine, theirs = parameters(), parameters()
    theirs_optimizer = DenseLKF(theirs, block_size=24)
    run(theirs_optimizer, theirs, 20)
    optimizer = LKFOptimizer(mine, block_size=24)
    run(optimizer, mine, 3, seed=9)  # some vectors are pending
    optimizer.set_kalman_P(theirs_optimizer.blocks, theirs_optimizer.memory)
    with torch.no_grad():
        for p, q in zip(mine, theirs, strict=True):
            p.copy_(q)
    run(theirs_optimizer, theirs, 20, seed=1)
    run(optimizer, mine, 20, seed=1)
    torch.testing.assert_close(flat(mine), flat(theirs), rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="block_size"):
        optimizer.set_kalman_P(theirs_optimizer.blocks[1:])


def test_state_dict_restores(tmp_path):
    whole, half = parameters(), parameters()
    optimizer = LKFOptimizer(half, block_size=24)
    run(optimizer, half, 10)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    restored = LKFOptimizer(half, block_size=24)
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    run(restored, half, 10, seed=1)
    optimizer = LKFOptimizer(whole, block_size=24)
    run(optimizer, whole, 10)
    run(optimizer, whole, 10, seed=1)
    assert torch.equal(flat(whole), flat(half))


def test_a_copy_goes_on():
    params = parameters()
    optimizer = LKFOptimizer(params, block_size=24)
    run(optimizer, params, 3)
    copied = copy.deepcopy(optimizer)
    for p, q in zip(params, copied.parameters(), strict=True):
        q.grad = p.grad
    for each in (optimizer, copied):
        each.step(torch.tensor(0.1))
    assert torch.equal(flat(copied.parameters()), flat(params))


def on_two_ranks(rank, wanted):
    theirs, mine = parameters(), parameters()
    dense = DenseLKF(theirs, block_size=24)
    run(dense, theirs, 20)
    optimizer = LKFOptimizer(mine, block_size=24, process_group=dist.group.WORLD)
    optimizer.set_kalman_P(dense.blocks, dense.memory)
    assert "P" not in optimizer.state_dict()["state"][0]  # no process has all of it
    run(optimizer, mine, 5)
    assert torch.allclose(flat(mine), wanted, rtol=0, atol=1e-12)


def test_p_spread_over_processes():
    theirs, mine = parameters(), parameters()
    dense = DenseLKF(theirs, block_size=24)
    run(dense, theirs, 20)
    optimizer = LKFOptimizer(mine, block_size=24)
    optimizer.set_kalman_P(dense.blocks, dense.memory)
    run(optimizer, mine, 5)
    spawn(on_two_ranks, 2, flat(mine))


def test_options_of_pwmlff():
    optimizer = LKFOptimizer(parameters(), p0_weight=0.01, kalman_lambda_weight=2.0, covariance_dtype=torch.float32)
    assert float(optimizer.filter.covariance.diagonal()[0]) == pytest.approx(0.01)
    assert optimizer.filter.covariance.scalars().measurement_noise == 2 * optimizer.filter.plan.num_blocks
    with pytest.raises(ValueError, match="process_noise"):
        LKFOptimizer(parameters(), q0=0.1, qmin=1e-6)
    with pytest.raises(ValueError, match="kalman_lambda_weight"):
        LKFOptimizer(parameters(), kalman_lambda_weight=-1.0)
