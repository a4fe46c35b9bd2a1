"""P before the first measurement: a variance for each kind of layer, from the gradients at the start.

With P = p_0 I the inputs of a layer decide how far the filter lets it move. The descriptor's entries are a few
hundredths and those of a hidden layer about 1, so that the sums W x + b of a hidden layer may move ten times as far as
those of the first fitting layer, which holds most of the weights. Here those of all layers may move equally far.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, prod


def layer_factors(
    squares: Sequence[float], layers: Sequence[int], biases: Sequence[bool], shapes: Sequence[tuple[int, ...]]
) -> list[float]:
    """What multiplies p_0 in each parameter: 1 / (1 + |x|²) in a layer with inputs x.

    `squares` are the sums of H² over each parameter, of energies at the start. With δ the gradient by W x + b, that by
    W is δ xᵀ and that by b is δ. So the factor is |H_b|² / (|H_b|² + |H_W|²), and HᵀPH of the layer is p_0 |δ|²
    whatever its inputs are. Where δ nearly cancels among the neighbours of an atom this says little of x: the factor is
    at least 1 / (1 + n), as for n inputs of 1.

    `layers` and `biases` say of each parameter which layer it is of, and whether it is a bias. Layers of the same
    shapes have one factor, from their sums, so that a rare element has that of the others. It is 1 without a bias or
    without gradients.
    """
    members: dict[int, list[int]] = {}
    for i, layer in enumerate(layers):
        members.setdefault(layer, []).append(i)
    alike: dict[tuple, list[int]] = {}  # the parameters of layers of the same shapes
    for places in members.values():
        alike.setdefault(tuple(shapes[i] for i in places), []).extend(places)
    factors = [1.0] * len(layers)
    for places in alike.values():
        own_biases = [i for i in places if biases[i]]
        of_bias, of_all = (sum(squares[i] for i in some) for some in (own_biases, places))
        if of_bias > 0 and of_all < inf:
            inputs = max(prod(shapes[i]) for i in places) / prod(shapes[own_biases[0]])
            for i in places:
                factors[i] = max(of_bias / of_all, 1 / (1 + inputs))
    return factors
