import pytest
import torch

from rlekf_ext import _C, BlockPlan
from rlekf_ext.covariance import STATE, TILE, identity, pack, required_bytes, unpack

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


def test_dense_is_the_formula():
    p = identity(PLAN, pending=3)
    p.tiles.copy_(pack(symmetric_blocks(PLAN)))
    p.pending.normal_()
    p.state[STATE["scale"]], p.state[STATE["shift"]], p.state[STATE["num_pending"]] = 2.0, 0.5, 2
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
        ({"dtype": torch.float16}, "covariance_dtype should be"),
        ({"pending": 0}, "pending should be at least 1 but is 0"),
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
