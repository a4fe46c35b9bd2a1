"""P spread over the processes of a group: which tiles each process keeps, and the one all_reduce per step.

The tiles of all blocks are in one sequence, and every rank keeps a run of it, all runs of equal length (the last ones
may be shorter): any number of ranks can share any number of blocks, and a block may be on several ranks. All vectors
(weights, Jacobians, the pending u_i) and all scalars are on every rank. A step is

    z = S h of the own tiles   ->   all_reduce of z and of h·z by block   ->   the O(N) rest, the same on every rank

so the weights stay the same, bit for bit, on all ranks, and one message of 8 M (N + L M) bytes is all that is sent.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from rlekf_ext.covariance import STATE, Covariance
from rlekf_ext.packing import layout_of, num_tiles
from rlekf_ext.partition import BlockPlan
from rlekf_ext.processes import Processes


class TileShare:
    """The tiles of a plan that this process keeps: the chunk for its rank, as torch.chunk would cut them."""

    def __init__(self, plan: BlockPlan, processes: Processes):
        total = num_tiles(plan)
        chunk = -(-total // processes.size)
        self.processes, self.plan, self.num_tiles = processes, plan, total
        self.tiles = range(total)[processes.rank * chunk :][:chunk]
        # A block that begins on an earlier rank has a first tile below zero.
        layout = layout_of(plan, self.tiles.start)
        ends = [*layout[1:, 2].tolist(), total - self.tiles.start]
        mine = [i for i, end in enumerate(ends) if end > 0 and int(layout[i, 2]) < len(self.tiles)]
        self._blocks = slice(mine[0], mine[-1] + 1) if mine else slice(0)
        self._layout = layout[self._blocks]
        offsets = [*plan.offsets, plan.num_weights]
        self._weights = slice(offsets[mine[0]], offsets[mine[-1] + 1]) if mine else slice(0)

    def project(self, ops: ModuleType, p: Covariance, jacobian: Tensor) -> tuple[Tensor, Tensor]:
        """`project` for all tiles, from each rank's own; every rank must call it, with only `p.tiles` different."""
        count, num_weights = jacobian.shape
        num_blocks = self.plan.num_blocks
        message = jacobian.new_zeros(count * num_weights + num_blocks * count * count)
        z, inner = message.split([count * num_weights, num_blocks * count * count])
        z, inner = z.view(count, num_weights), inner.view(num_blocks, count, count)
        if self.tiles:
            # S alone: the shift and the pending vectors are counted once, below. Only a fold needs the vectors here.
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
        from torch.distributed.tensor import DTensor, Shard

        mesh = DeviceMesh.from_group(self.processes.group, tiles.device.type)  # type: ignore[arg-type]
        shape = torch.Size((self.num_tiles, *tiles.shape[1:]))
        return DTensor.from_local(tiles, mesh, [Shard(0)], run_check=False, shape=shape, stride=tiles.stride())

    def gather(self, tiles: Tensor) -> Tensor:
        """All tiles, on every rank."""
        return self.spread(tiles).full_tensor()  # type: ignore[attr-defined]
