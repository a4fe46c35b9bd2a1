"""The block plans that a step is timed on, and the networks that they come from."""

from __future__ import annotations

from rlekf_ext import BlockPlan
from rlekf_ext.partition import partition

EMBEDDING, FITTING = [25, 25, 625, 25, 625, 25], [20000, 50, 2500, 50, 2500, 50, 50, 1]
PAPER = EMBEDDING + FITTING
PAPER_TWO_ELEMENTS = EMBEDDING * 4 + FITTING * 2


def deepmd_water() -> list[int]:
    """DeePMD-kit's water example: 2 elements, one-sided [25, 50, 100], M< = 16, [240, 240, 240], resnet_dt."""
    embedding = [25, 25, 1250, 50, 5000, 100]
    fitting = [1600 * 240, 240, 240 * 240, 240, 240, 240 * 240, 240, 240, 240, 1]
    return embedding * 2 + fitting * 2


CASES = {f"paper-{n}": partition(PAPER, n) for n in (1024, 2048, 5120, 10240)}
CASES |= {f"block-{n}": BlockPlan((n,)) for n in (512, 1024, 2048, 5120, 10240, 20480)}
CASES |= {f"water-{n}": partition(deepmd_water(), n) for n in (1024, 10240)}


def triangle_bytes(plan: BlockPlan) -> int:
    """Bytes of the packed triangle in float64: the least that a step must read."""
    return 4 * sum(n * (n + 1) for n in plan.sizes)
