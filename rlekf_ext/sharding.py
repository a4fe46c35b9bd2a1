"""P spread over the processes of a group: which tiles each process keeps, and the one all_reduce per step.

The tiles of all blocks are in one sequence, and every rank keeps a run of it, all runs of equal length (the last ones
may be shorter): any number of ranks can share any number of blocks, and a block may be on several ranks. All vectors
(weights, Jacobians, the pending u_i) and all scalars are on every rank. A step is

    z = S h of the own tiles   ->   all_reduce of z   ->   the O(N) rest, the same on every rank

so the weights stay the same, bit for bit, on all ranks, and one message of 8 M N bytes is all that is sent.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

from torch import Size, Tensor

from rlekf_ext.covariance import Covariance
from rlekf_ext.packing import layout_of, num_tiles
from rlekf_ext.partition import BlockPlan
from rlekf_ext.processes import Processes


class TileShare:
    """The tiles of a plan that this process keeps: the chunk for its rank, as torch.chunk would cut them."""

    def __init__(self, plan: BlockPlan, processes: Processes):
        self.processes, self.num_tiles = processes, num_tiles(plan)
        chunk = -(-self.num_tiles // processes.size)
        self.tiles = range(self.num_tiles)[processes.rank * chunk :][:chunk]
        # First tiles count from this rank's first: a block that begins on an earlier rank has one below zero.
        self._layout = layout_of(plan, self.tiles.start)

    def project(self, ops: ModuleType, p: Covariance, jacobian: Tensor) -> tuple[Tensor, Tensor]:
        """`project` of all tiles, from each rank's own; every rank must call it, with the same but for `p.tiles`."""
        self._layout = self._layout.to(jacobian.device)
        z = self.processes.sum(ops.multiply_tiles(replace(p, layout=self._layout), jacobian))
        return z, ops.finish_projection(p, z, jacobian)

    def spread(self, tiles: Tensor) -> Tensor:
        """This rank's tiles as a part of a DTensor of all tiles, which torch.distributed.checkpoint saves and loads."""
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Shard

        mesh = DeviceMesh.from_group(self.processes.group, tiles.device.type)  # type: ignore[arg-type]
        shape = Size((self.num_tiles, *tiles.shape[1:]))
        return DTensor.from_local(tiles, mesh, [Shard(0)], run_check=False, shape=shape, stride=tiles.stride())

    def gather(self, tiles: Tensor) -> Tensor:
        """All tiles, on every rank."""
        return self.spread(tiles).full_tensor()  # type: ignore[attr-defined]
