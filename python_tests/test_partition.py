import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlekf_ext.partition import STRATEGIES, BlockPlan, partition

PAPER = [25, 25, 625, 25, 625, 25, 20000, 50, 2500, 50, 2500, 50, 50, 1]
LAYERS = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]


@pytest.mark.parametrize(
    ("strategy", "block_size", "sizes"),
    [
        ("rlekf", 10240, (1350, 10240, 9810, 5151)),
        ("rlekf", 5120, (1350, 5120, 5120, 5120, 4690, 5100, 51)),
        ("deepmd", 10240, (1350, 10240, 9760, 5201)),
        ("deepmd", 5120, (1350, 5120, 5120, 5120, 4640, 5100, 101)),
        ("gekf", 5120, (26551,)),
        ("sekf", 10240, (8851, 8850, 8850)),
        ("lekf", 5120, (50, 650, 650, 20050, 2550, 2550, 51)),
    ],
)
def test_paper_network(strategy, block_size, sizes):
    assert partition(PAPER, block_size, strategy, LAYERS).sizes == sizes


def test_a_plan_may_be_given_as_a_list():
    assert BlockPlan([3, 4]) == BlockPlan((3, 4))
    assert hash(BlockPlan([3, 4])) == hash(BlockPlan((3, 4)))


def test_lekf_without_layers_is_a_block_per_tensor():
    assert partition([3, 1, 4], 2, "lekf").sizes == (3, 1, 4)


@pytest.mark.parametrize("strategy", ["rlekf", "deepmd"])
def test_exact_multiples_leave_no_empty_block(strategy):
    assert partition([20, 10, 5], 10, strategy).sizes == (10, 10, 10, 5)
    assert partition([10, 10], 10, strategy).sizes == (10, 10)
    assert partition([4, 6, 1], 10, strategy).sizes == (10, 1)


@given(
    sizes=st.lists(st.integers(1, 500), min_size=1, max_size=30),
    block_size=st.integers(1, 300),
    strategy=st.sampled_from(sorted(STRATEGIES)),
)
def test_blocks_cover_all_weights_once(sizes, block_size, strategy):
    plan = partition(sizes, block_size, strategy)
    assert plan.num_weights == sum(sizes)
    assert [a + n for a, n in zip(plan.offsets, plan.sizes, strict=True)] == [*plan.offsets[1:], sum(sizes)]
    assert min(plan.sizes) >= 1
    if strategy not in ("gekf", "lekf"):
        assert max(plan.sizes) <= block_size
    if strategy == "sekf":
        assert max(plan.sizes) - min(plan.sizes) <= 1


@given(sizes=st.lists(st.integers(1, 500), min_size=1, max_size=30), block_size=st.integers(1, 300))
def test_rlekf_gathers_all_that_fits(sizes, block_size):
    """Rule 2 of the paper: a gathered block ends only where the next part would not fit."""
    ends = set(partition(sizes, block_size, "rlekf").offsets[1:])
    block_start = part_start = 0
    for size in sizes:
        part_end = part_start + size
        fits = part_end - block_start <= block_size
        assert (part_start in ends) == (part_start > 0 and not fits)
        if not fits:
            wanted = set(range(part_start + block_size, part_end, block_size))
            assert {end for end in ends if part_start < end < part_end} == wanted
            block_start = part_end - (size % block_size or (size if size <= block_size else block_size))
        part_start = part_end


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([3], 0), "block_size must be >= 1 but is: 0"),
        (([3], 1, "kalman"), "strategy must be one of rlekf, deepmd, lekf, sekf, gekf but is: 'kalman'"),
        (([], 1), "sizes should hold at least one number"),
        (([3, 0], 1), "each at least 1"),
        (([3, 2], 1, "lekf", [0]), "layers should name a layer for each of the 2 tensors but has 1"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        partition(*arguments)


def test_plan_needs_blocks():
    with pytest.raises(ValueError, match="at least one block"):
        BlockPlan(())
