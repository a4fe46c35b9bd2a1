"""P spread over the processes of a group: which tiles are mine, and the one all_reduce of a step.

All tiles of all blocks form one list, and every rank keeps a run of it, all runs of one length (the last ones may be
shorter): any number of ranks shares any number of blocks, and a block may lie on several ranks. All vectors (weights,
Jacobians, pending vectors) and all scalars are on every rank. A step is

    z = S h of the own tiles   ->   all_reduce of z   ->   the O(N) rest, the same on every rank

so the weights stay the same, bit for bit, on all ranks, and one message of 8 M N bytes is all that is sent.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from rlekf_ext import _C
from rlekf_ext.partition import BlockPlan
from rlekf_ext.processes import Processes


class Shard:
    """The tiles of a plan that this process keeps: torch.chunk's part of its rank in the group."""

    def __init__(self, plan: BlockPlan, processes: Processes):
        total = sum(_C.num_tiles(n) for n in plan.sizes)
        chunk = -(-total // processes.size)
        self.processes, self.num_tiles = processes, total
        self.tiles = range(total)[processes.rank * chunk :][:chunk]
        # First tiles count from this rank's first: a block that begins on an earlier rank has one below zero.
        rows = [(weight, n, tile - self.tiles.start) for weight, n, tile in _C.layout(list(plan.sizes))]
        self._layout = torch.tensor(rows, dtype=torch.int64)

    def project(
        self, ops: ModuleType, tiles: Tensor, pending: Tensor, state: Tensor, layout: Tensor, jacobian: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`project` of all tiles, from each rank's own `tiles`; every rank must call it, with the same of all else."""
        self._layout = self._layout.to(jacobian.device)
        z = self.processes.sum(ops.multiply_tiles(tiles, pending, state, self._layout, jacobian))
        gram = ops.finish_projection(z, pending, state, layout, jacobian)
        return z, gram

    def spread(self, tiles: Tensor) -> Tensor:
        """This rank's tiles as a part of a DTensor of all tiles, which torch.distributed.checkpoint saves and loads."""
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor import Shard as Rows

        mesh = DeviceMesh.from_group(self.processes.group, tiles.device.type)  # type: ignore[arg-type]
        shape = torch.Size((self.num_tiles, *tiles.shape[1:]))
        return DTensor.from_local(tiles, mesh, [Rows(0)], run_check=False, shape=shape, stride=tiles.stride())

    def gather(self, tiles: Tensor) -> Tensor:
        """All tiles, on every rank."""
        return self.spread(tiles).full_tensor()  # type: ignore[attr-defined]
