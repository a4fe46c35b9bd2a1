"""CUDA graphs of whole batches: what was launched once for tensors of some shapes is launched again as one piece.

A batch of a small network is some thousand short kernels, which the host launches more slowly than a GPU runs them. A
graph repeats them with the same addresses and the same numbers of the host. So its inputs are copied to where they were
when it was made, and whatever else decides what is launched is in its key.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

MOST = 16  # graphs, and sets of inputs: a batch of another shape is launched piece by piece


class CaptureError(Exception):
    """A graph could not be made; none of its work has been done."""


def capture(body: Callable[[], Any], device: torch.device) -> tuple[Callable[[], Any], Any]:
    """What runs the work of `body` on the GPU, which has not run yet, and what it returns: tensors that each run
    overwrites. Other threads may use the GPU meanwhile."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            results = body()
    return graph.replay, results


class Graphs:
    """The graphs of one training."""

    def __init__(self) -> None:
        self._places: dict[Hashable, list[Tensor]] = {}
        self._graphs: dict[Hashable, tuple[Callable[[], Any], Any] | None] = {}
        self._missed = 0  # batches in a row without a graph

    def placed(self, tensors: Sequence[Tensor]) -> list[Tensor] | None:
        """Copies of the tensors, at the same addresses for all of the same shapes; None if there are too many."""
        if self._missed > 4 * MOST:  # nothing has the shapes or addresses of before any more
            self._places, self._graphs, self._missed = {}, {}, 0
        key = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        if key in self._places:
            for place, tensor in zip(self._places[key], tensors, strict=True):
                place.copy_(tensor, non_blocking=True)
        elif len(self._places) < MOST:
            self._places[key] = [tensor.clone() for tensor in tensors]
        self._missed += 1
        return self._places.get(key)

    def run(self, key: Hashable, body: Callable[[], Any], device: torch.device) -> Any:
        """What `body` returns: the first time from running it, which also makes what is made only once, later from a
        graph. `key` is all that decides what it launches, addresses included."""
        if key not in self._graphs:
            if len(self._graphs) < MOST:
                self._graphs[key] = None
            return body()
        found = self._graphs[key]
        if found is None:
            try:
                found = self._graphs[key] = capture(body, device)
            except RuntimeError as error:
                raise CaptureError(str(error)) from error
        self._missed = 0
        replay, results = found
        replay()
        return results
