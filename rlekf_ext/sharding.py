"""P spread over the processes of a group: which tiles are mine, and the one all_reduce of a step.

All tiles of all blocks stand in one row, and every rank keeps a run of it, all runs of one length (the last ones may be
shorter): any number of ranks shares any number of blocks, and a block may lie on several ranks. All vectors (weights,
Jacobians, the u_i that wait) and all scalars are on every rank. A step is

    z = S h of the own tiles   ->   all_reduce of z and of h·z by block   ->   the O(N) rest, the same on every rank

so the weights stay the same, bit for bit, on all ranks, and one message of 8 M (N + L M) bytes is all that is sent.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from rlekf_ext import _C
from rlekf_ext.covariance import STATE, Covariance
from rlekf_ext.partition import BlockPlan
from rlekf_ext.processes import Processes


class Shard:
    """The tiles of a plan that this process keeps: torch.chunk's part of its rank in the group."""

    def __init__(self, plan: BlockPlan, processes: Processes):
        layout = _C.layout(list(plan.sizes))
        total = sum(_C.num_tiles(n) for n in plan.sizes)
        chunk = -(-total // processes.size)
        self.processes, self.plan, self.num_tiles = processes, plan, total
        self.tiles = range(total)[processes.rank * chunk :][:chunk]
        mine = [
            i
            for i, (_, n, tile) in enumerate(layout)
            if self.tiles and tile < self.tiles.stop and tile + _C.num_tiles(n) > self.tiles.start
        ]
        self._blocks = slice(mine[0], mine[-1] + 1) if mine else slice(0)
        # A block that begins on an earlier rank has a first tile below zero.
        rows = [(weight, n, tile - self.tiles.start) for weight, n, tile in layout[self._blocks]]
        self._layout = torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)
        self._weights = slice(rows[0][0], rows[-1][0] + rows[-1][1]) if rows else slice(0)

    def project(self, ops: ModuleType, p: Covariance, jacobian: Tensor) -> tuple[Tensor, Tensor]:
        """`project` of all tiles, from each rank's own; every rank must call it, with the same but for `p.tiles`."""
        count, num_weights = jacobian.shape
        num_blocks = self.plan.num_blocks
        message = jacobian.new_zeros(count * num_weights + num_blocks * count * count)
        z, inner = message.split([count * num_weights, num_blocks * count * count])
        z, inner = z.view(count, num_weights), inner.view(num_blocks, count, count)
        if self.tiles:
            # S alone: the shift and the pending vectors are counted once, below. They only matter if they fold.
            self._layout = self._layout.to(jacobian.device)
            own = replace(p, state=p.state.clone(), layout=self._layout)
            num_pending = p.state[STATE["num_pending"]]
            own.set(num_pending=num_pending * (num_pending + count > len(p.pending)), shift=0.0)
            cross, gram = ops.project(own, jacobian)
            z[:, self._weights] = cross[:, self._weights]
            inner[self._blocks] = gram[0]
        cross, gram = ops.project(replace(p, tiles=p.tiles[:0]), jacobian)
        self.processes.sum(message)
        cross += z
        gram[0] += inner
        return cross, gram

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
