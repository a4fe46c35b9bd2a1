"""How the weights are cut into the blocks of P: the split and gather of the paper, and the strategies it compares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from math import ceil

from rlekf_ext.errors import OptionError

Layers = Sequence[int] | None


@dataclass(frozen=True)
class BlockPlan:
    """The sizes n_1 ... n_L of the diagonal blocks of P, in the order of the weights."""

    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(self.sizes))
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(
                f"A block plan needs at least one block, each of at least one weight, but got {self.sizes}."
            )

    @property
    def num_blocks(self) -> int:
        """L in the paper."""
        return len(self.sizes)

    @property
    def num_weights(self) -> int:
        """N."""
        return sum(self.sizes)

    @property
    def offsets(self) -> tuple[int, ...]:
        """The first weight of each block."""
        return (0, *accumulate(self.sizes[:-1]))


def partition(
    sizes: Sequence[int],
    block_size: int = 5120,  # N_b in the paper
    strategy: str = "rlekf",
    layers: Layers = None,
) -> BlockPlan:
    """Cut parameter tensors of these sizes into blocks of at most `block_size` weights.

    `sizes` are the numbers of weights of the parameter tensors in order (W_0, b_0, W_1, ...). `layers`, used only
    by "lekf", names the layer of each tensor: neighbours with the same id share a block.

    Strategies ("The Splitting Strategy of RLEKF" and Fig. 2 of the paper):
    "rlekf"   split tensors above N_b, gather small neighbours; the rest of a split tensor starts the next gather
    "deepmd"  the same, but the rest of a split tensor stays alone, as in DeePMD-kit's LKF
    "lekf"    one block per layer, whatever its size
    "sekf"    L = ceil(N / N_b) blocks of equal size, the first N mod L of them one larger
    "gekf"    one block

    Raises ValueError for an unknown strategy, a block size below 1, or sizes that are empty or not positive.
    """
    if strategy not in STRATEGIES:
        raise OptionError(f"strategy must be one of {', '.join(STRATEGIES)} but is: {strategy!r}.")
    if block_size < 1:
        raise OptionError(f"block_size must be >= 1 but is: {block_size}.")
    if not sizes or min(sizes) < 1:
        raise ValueError(f"sizes should hold at least one number, each at least 1, but is {list(sizes)}.")
    return BlockPlan(tuple(STRATEGIES[strategy](sizes, block_size, layers)))


def _split_and_gather(sizes: Sequence[int], block_size: int, gather_rest: bool) -> Iterator[int]:
    """`gather_rest`: whether the rest of a split tensor starts the next gather or is a separate block."""
    gathered = 0
    for size in sizes:
        if gathered and gathered + size > block_size:
            yield gathered
            gathered = 0
        if size > block_size:
            whole, rest = divmod(size, block_size)
            yield from [block_size] * whole
            if gather_rest:
                gathered = rest
            elif rest:
                yield rest
        else:
            gathered += size
    if gathered:
        yield gathered


def _rlekf(sizes: Sequence[int], block_size: int, _: Layers) -> Iterator[int]:
    return _split_and_gather(sizes, block_size, gather_rest=True)


def _deepmd(sizes: Sequence[int], block_size: int, _: Layers) -> Iterator[int]:
    return _split_and_gather(sizes, block_size, gather_rest=False)


def _lekf(sizes: Sequence[int], _: int, layers: Layers) -> Iterator[int]:
    if layers is None:
        layers = range(len(sizes))
    if len(layers) != len(sizes):
        raise ValueError(
            f"layers should name a layer for each of the {len(sizes)} tensors but has {len(layers)} entries."
        )
    for _, members in groupby(zip(layers, sizes, strict=True), key=lambda member: member[0]):
        yield sum(size for _, size in members)


def _sekf(sizes: Sequence[int], block_size: int, _: Layers) -> Iterator[int]:
    num_weights = sum(sizes)
    num_blocks = ceil(num_weights / block_size)
    size, larger = divmod(num_weights, num_blocks)
    yield from [size + 1] * larger + [size] * (num_blocks - larger)


def _gekf(sizes: Sequence[int], block_size: int, _: Layers) -> Iterator[int]:
    yield sum(sizes)


STRATEGIES: dict[str, Callable[[Sequence[int], int, Layers], Iterator[int]]] = {
    "rlekf": _rlekf,
    "deepmd": _deepmd,
    "lekf": _lekf,
    "sekf": _sekf,
    "gekf": _gekf,
}
