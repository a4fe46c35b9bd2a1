"""The block plans that a step is timed on."""

from __future__ import annotations

from rlekf_ext import BlockPlan
from rlekf_ext.partition import partition

PAPER = [25, 25, 625, 25, 625, 25, 20000, 50, 2500, 50, 2500, 50, 50, 1]


def deepmd_water() -> list[int]:
    """DeePMD-kit's default water network: 2 elements, one-sided [25, 50, 100], M< = 16, [240, 240, 240], resnet_dt."""
    embedding = [25, 25, 1250, 50, 5000, 100]
    fitting = [1600 * 240, 240, 240 * 240, 240, 240, 240 * 240, 240, 240, 240, 1]
    return embedding * 2 + fitting * 2


CASES = {f"paper-{n}": partition(PAPER, n) for n in (1024, 2048, 5120, 10240)}
CASES |= {f"block-{n}": BlockPlan((n,)) for n in (512, 1024, 2048, 5120, 10240, 20480)}
CASES |= {f"water-{n}": partition(deepmd_water(), n) for n in (1024, 10240)}
