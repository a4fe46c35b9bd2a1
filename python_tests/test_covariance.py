import copy
import io
from typing import get_type_hints

import pytest
import torch
from oracles import DenseFilter, relative

from rlekf_ext import _C, BlockPlan, KalmanFilter
from rlekf_ext.covariance import Covariance, Scalars, identity, required_bytes
from rlekf_ext.integrations.lkf import from_lkf
from rlekf_ext.packing import TILE, pack, unpack
from rlekf_ext.partition import partition

PLAN = BlockPlan((1, 63, 64, 65, 200))


def symmetric_blocks(plan):
    blocks = [torch.randn(n, n, dtype=torch.float64) for n in plan.sizes]
    return [block + block.T for block in blocks]


def test_pack_and_unpack_are_inverse():
    blocks = symmetric_blocks(PLAN)
    tiles = pack(blocks)
    assert tiles.shape == (1 + 1 + 1 + 3 + 10, TILE, TILE)
    for there, back in zip(blocks, unpack(tiles, PLAN), strict=True):
        assert torch.equal(there, back)


def test_tiles_stand_where_the_header_says():
    (block,) = symmetric_blocks(BlockPlan((200,)))
    tiles = pack([block])
    first, size, first_tile = _C.layout([65, 200])[1]
    assert (first, size, first_tile) == (65, 200, 3)
    assert torch.equal(tiles[4][:, :], block[128:192, 64:128])  # (0,0) (1,0) (1,1) (2,0) (2,1)


def test_padding_is_zero():
    tiles = pack(symmetric_blocks(BlockPlan((65,))))
    assert not tiles[1][1:].any()
    assert not tiles[2][1:].any()
    assert not tiles[2][:, 1:].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_identity(dtype):
    p = identity(PLAN, initial_covariance=0.25, dtype=dtype)
    for block in p.dense():
        assert torch.equal(block, 0.25 * torch.eye(len(block), dtype=torch.float64))
    assert p.num_bytes == required_bytes(PLAN, dtype=dtype)
    assert int(p.tiles.count_nonzero()) == PLAN.num_weights


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_starts_over_as_a_diagonal(dtype):
    """Whatever was there: S, pending vectors, scale and shift. Each process writes its own tiles."""
    variances = torch.rand(PLAN.num_weights, dtype=torch.float64) + 0.1
    for own in (range(16), range(5, 11)):
        p = identity(PLAN, dtype=dtype, tiles=own)
        p.tiles.normal_()
        p.pending.normal_()
        p.set(scale=2.0, shift=0.5, num_pending=2, forgetting=0.25)
        p.set_diagonal(variances)
        whole = pack([torch.diag(v / variances.max()) for v in variances.split(PLAN.sizes)], dtype)
        assert torch.equal(p.tiles, whole[own.start : own.stop])
        assert p.scalars().forgetting == 0.25
    p = identity(PLAN, dtype=dtype)
    p.set_diagonal(variances)
    assert relative(p.diagonal(), variances) < torch.finfo(dtype).eps
    assert p.scalars().largest >= float(p.stored_diagonal().max())


def test_scalars_are_those_of_the_kernels():
    assert Scalars._fields == tuple(_C.STATE)
    assert {name for name, kind in get_type_hints(Scalars).items() if kind is int} == _C.COUNTERS
    p = identity(PLAN)
    p.set(num_pending=2, shift=torch.tensor(0.5))
    assert p.scalars() == Scalars(*(0,) * 15)._replace(scale=1.0, largest=1.0, shift=0.5, num_pending=2)
    assert isinstance(p.scalars().num_pending, int)
    assert p.scale == 1.0


def test_dense_is_the_formula():
    p = identity(PLAN, max_pending=3)
    p.tiles.copy_(pack(symmetric_blocks(PLAN)))
    p.pending.normal_()
    p.set(scale=2.0, shift=0.5, num_pending=2)
    parts = zip(unpack(p.tiles, PLAN), p.pending[:2].split(PLAN.sizes, 1), p.dense(), strict=True)
    for s, u, block in parts:
        wanted = 2.0 * (s + 0.5 * torch.eye(len(s)) - torch.outer(u[0], u[0]) - torch.outer(u[1], u[1]))
        assert torch.allclose(block, wanted, rtol=1e-14, atol=1e-13)
        assert torch.equal(block, block.T)


def test_size_is_known_before_it_is_allocated():
    with pytest.raises(MemoryError, match=r"needs \d+\.\d+ GB but cpu has .* lower block_size .* covariance_dtype"):
        identity(BlockPlan((10_000_000,)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": torch.float16}, "dtype should be torch.float64 or torch.float32 but is torch.float16"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        identity(PLAN, **settings)


def test_load_refuses_another_plan_or_dtype():
    p = identity(PLAN)
    with pytest.raises(ValueError, match="The saved covariance has 1 blocks"):
        p.load_state_dict(identity(BlockPlan((393,))).state_dict())
    with pytest.raises(ValueError, match=r"The saved tiles have .*float32"):
        p.load_state_dict(identity(PLAN, dtype=torch.float32).state_dict())


def test_load_refuses_what_is_no_covariance():
    p = identity(PLAN)
    with pytest.raises(ValueError, match="it has no sizes, pending, names"):
        p.load_state_dict({"tiles": p.tiles, "state": p.state})
    with pytest.raises(ValueError, match=r"The saved state should have shape \(15,\) .* the checkpoint is damaged"):
        p.load_state_dict({**p.state_dict(), "state": p.state[:-1]})
    with pytest.raises(ValueError, match=r"has format 2, which this version of rlekf_ext does not know"):
        p.load_state_dict({**p.state_dict(), "format": 2})
    names = p.state_dict()["names"]
    with pytest.raises(ValueError, match=r"has scalars new_one, which this version of rlekf_ext does not know"):
        p.load_state_dict({**p.state_dict(), "names": [*names[1:], "new_one"]})
    with pytest.raises(ValueError, match=r"The saved tiles should have shape \(16, 64, 64\)"):
        p.load_state_dict({**p.state_dict(), "tiles": p.tiles[:-1]})


def used(plan=PLAN, steps=11, **settings):
    """A filter after some steps, with pending vectors besides folded ones."""
    filter_ = KalmanFilter(plan, **{"max_pending": 7, "initial_covariance": 0.5, "process_noise": 1e-4, **settings})
    go_on(filter_, steps, seed=1)
    assert 0 < filter_.covariance.scalars().num_pending < 7
    return filter_


def go_on(filter_, steps, seed=2):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.zeros(filter_.plan.num_weights, dtype=torch.float64)
    for _ in range(steps):
        h = torch.randn(len(weights), generator=generator, dtype=torch.float64)
        weights += filter_.update(h, 0.3)
    return weights


OTHER_PLANS = {
    "refined": (1, 63, 64, 5, 60, 100, 100),
    "merged": (128, 265),
    "one": (393,),
    "shifted": (40, 90, 130, 133),
    "single weights": (*(1,) * 20, 373),
}


@pytest.mark.parametrize("sizes", OTHER_PLANS.values(), ids=OTHER_PLANS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_reblock_keeps_what_both_plans_hold(sizes, dtype):
    p = used().covariance
    before = copy.deepcopy(p)
    new = p.reblock(BlockPlan(sizes), dtype=dtype)
    whole = torch.block_diag(*p.dense())
    in_new = torch.block_diag(*[torch.ones(n, n, dtype=torch.float64) for n in sizes])
    wanted = whole * in_new
    assert relative(torch.block_diag(*new.dense()), wanted) < (1e-14 if dtype == torch.float64 else 1e-7)
    assert torch.linalg.eigvalsh(torch.block_diag(*new.dense())).min() > 0
    assert (new.plan.sizes, new.tiles.dtype) == (sizes, dtype)
    assert new.tiles.shape == identity(new.plan).tiles.shape
    for tile, same in zip(new.tiles, pack(unpack(new.tiles, new.plan), dtype), strict=True):
        assert torch.equal(tile, same)  # diagonal tiles whole and symmetric, padding zero
    assert new.scalars() == p.scalars()._replace(num_pending=0)
    for name in ("tiles", "pending", "state"):
        assert torch.equal(getattr(p, name), getattr(before, name))


def test_reblock_to_the_same_blocks_is_exact():
    filter_ = used()
    p = filter_.covariance
    new = p.reblock(PLAN)
    for name in ("tiles", "pending", "state"):
        one, other = getattr(p, name), getattr(new, name)
        assert torch.equal(one, other)
        assert one.data_ptr() != other.data_ptr()
    single = p.reblock(PLAN, dtype=torch.float32)
    assert torch.equal(single.tiles, p.tiles.float())
    assert torch.equal(single.pending, p.pending)


def test_a_filter_goes_on_with_the_reblocked_covariance():
    """Against the dense filter set to the same P."""
    saved = used().covariance.state_dict()
    filter_ = KalmanFilter(BlockPlan((128, 265)))
    filter_.take_over(Covariance.from_state_dict(saved))
    p = filter_.covariance
    lam, nu = filter_.memory_factor, p.scalars().forgetting_rate
    dense = DenseFilter(p.plan.sizes, lam, nu, noise=PLAN.num_blocks, q=p.scalars().process_noise)
    dense.blocks = p.dense()
    weights, wanted = go_on(filter_, 20), torch.zeros(393, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    for _ in range(20):
        dense.step(wanted, torch.randn(1, 393, generator=generator, dtype=torch.float64), [0.3])
    assert relative(weights, wanted) < 1e-12


def test_reblock_refuses_another_model():
    with pytest.raises(ValueError, match="should hold the 393 weights of the covariance but hold 392"):
        identity(PLAN).reblock(BlockPlan((392,)))
    with pytest.raises(ValueError, match="dtype should be"):
        identity(PLAN).reblock(PLAN, dtype=torch.float16)


TENSORS = (60, 20, 300, 13)  # of LKF's model; 300 are split and their rest stays alone


def lkf(steps, dtype=torch.float64):
    """LKF after some steps, and its state dict, in the form that `dp --pt train` saves."""
    plan = partition(TENSORS, 128, "deepmd")
    dense = DenseFilter(plan.sizes, 0.98, 0.9987)
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        h = torch.randn(1, plan.num_weights, generator=generator, dtype=torch.float64)
        dense.step(torch.zeros(plan.num_weights, dtype=torch.float64), h, [0.3])
    blocks = [block.to(dtype) for block in dense.blocks]
    own = {
        "kalman_lambda": dense.lam,
        "P": blocks,
        "weights_num": len(blocks),
        "params_packed_index": list(plan.sizes),
    }
    group = {"lr": 0.1, "kalman_nue": 0.9987, "block_size": 128, "params": [0, 1, 2, 3]}
    file = io.BytesIO()
    torch.save({"model": {}, "optimizer": {"state": {0: own}, "param_groups": [group]}}, file)
    file.seek(0)
    return dense, torch.load(file, weights_only=True)["optimizer"]


def test_lkf_goes_on_from_its_checkpoint():
    dense, saved = lkf(9)
    p = from_lkf(saved)
    assert p.plan.sizes == (80, 128, 128, 44, 13)
    assert p.tiles.dtype == torch.float64
    assert relative(torch.block_diag(*p.dense()), torch.block_diag(*dense.blocks)) < 1e-14
    filter_ = KalmanFilter(p.plan, memory_factor=0.5, max_pending=3)
    filter_.covariance = p.reblock(filter_.plan)
    weights, wanted = go_on(filter_, 40), torch.zeros(393, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    for _ in range(40):
        dense.step(wanted, torch.randn(1, 393, generator=generator, dtype=torch.float64), [0.3])
    assert relative(weights, wanted) < 1e-12
    assert filter_.memory_factor == pytest.approx(dense.lam, abs=1e-15)


def test_lkf_in_float32_and_on_the_blocks_of_rlekf():
    dense, saved = lkf(9, torch.float32)
    saved["state"][0]["P"][0][3, 4] *= 1.25  # its matmul is not symmetric to the last bit
    plan = partition(TENSORS, 128, "rlekf")
    assert plan.sizes == (80, 128, 128, 57)
    p = from_lkf(saved).reblock(plan)
    wanted = torch.block_diag(*dense.blocks)
    wanted[3, 4] *= 1.125
    wanted[4, 3] = wanted[3, 4]
    assert relative(torch.block_diag(*p.dense()), wanted) < 1e-6


def test_what_is_no_state_of_lkf():
    _, saved = lkf(1)
    with pytest.raises(
        ValueError,
        match=r"is not the state of an LKFOptimizer of DeePMD-kit, PWMLFF or MatPL \(KeyError\('P'\)\): pass the",
    ):
        from_lkf({"state": {0: identity(PLAN).state_dict()}, "param_groups": [{}]})
    del saved["state"][0]["P"][2:]
    with pytest.raises(ValueError, match=r"\[80, 128, 128, 44, 13\] but holds \[80, 128\]: a distributed run"):
        from_lkf(saved)
