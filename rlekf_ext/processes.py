"""The processes that work on one filter: sums over them, and the name of one that no longer responds."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from rlekf_ext.errors import LostProcessError

TIMEOUT = timedelta(minutes=5)  # a process that is silent for this long is lost


class Processes:
    """The processes of a torch.distributed group; without a group, this process alone, and sums change nothing."""

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = group
        self.rank, self.size = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum in place over all processes, with the same bits on each. Raises LostProcessError."""
        if self.group is None:
            return tensor
        started = time.monotonic()
        try:
            dist.all_reduce(tensor, group=self.group)
        except RuntimeError as error:
            raise LostProcessError(self._who_is_lost(started, tensor.device)) from error
        return tensor

    def gather(self, numbers: Sequence[int]) -> list[list[int]]:
        """The numbers of each process, the same count from each, in the order of the ranks. Raises LostProcessError.

        They are sent from CPU to CPU if the group can do that, and otherwise wait for the device."""
        if self.group is None:
            return [list(numbers)]
        rows = torch.zeros(self.size, len(numbers), dtype=torch.int64)
        rows[self.rank] = torch.tensor(numbers)
        kinds = {device.type for device in self.group._device_types}
        return self.sum(rows if "cpu" in kinds else rows.to(min(kinds))).tolist()

    def any(self, flag: object) -> bool:
        return any(row[0] for row in self.gather([bool(flag)]))

    @torch.no_grad()
    def agree(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the values of rank 0, in place."""
        for tensor in tensors:
            if self.rank:
                tensor.zero_()
            self.sum(tensor)

    def _who_is_lost(self, started: float, device: torch.device) -> str:
        """A roll call. A process expecting a message from one that has ended learns of it at once or at the
        timeout, and then comes here too; one that has not come by then is lost."""
        assert self.group is not None
        seconds = self.group._get_backend(device).options._timeout.total_seconds()
        closed = time.monotonic() - started < seconds  # a process has ended: the wait was shorter than the timeout
        others = set(range(self.size)) - {self.rank}
        store = self.group.get_group_store()

        def absent(call: str, deadline: float, enough: int) -> set[int]:
            store.set(f"rlekf_ext/{call}/{self.rank}", "")
            missing = others
            while len(missing) > enough and time.monotonic() < deadline:
                time.sleep(0.05)
                missing = {rank for rank in missing if not store.check([f"rlekf_ext/{call}/{rank}"])}
            return missing

        try:
            lost = absent("here", started + seconds + 5, enough=int(closed))
            if self.rank == 0:  # the store may end with this process: all others must have read it first
                absent("heard", time.monotonic() + 5, enough=len(lost))
            else:
                store.set(f"rlekf_ext/heard/{self.rank}", "")
        except RuntimeError:  # nobody holds the store any more
            lost = {0}
        if not lost:
            return f"A message among the {self.size} processes failed, but all of them still respond: see the cause."
        names = ", ".join(f"rank {rank}" for rank in sorted(lost))
        return (
            f"Lost {names} of {self.size} processes: ended, or silent for {seconds:g} s, the group's timeout. "
            "Restart all of them from the last checkpoint."
        )


ALONE = Processes()


@contextmanager
def torchrun_group(gpus: bool = False) -> Iterator[dist.ProcessGroup | None]:
    """A group of all processes that torchrun has started, or None if this one is alone: gloo and, with `gpus`, NCCL for
    what is on them."""
    if not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ) or os.environ.get("WORLD_SIZE", "1") == "1":
        yield None
        return
    # First: some of its functions take the default group of that moment as a default argument, and a group that is kept
    # beyond destroy_process_group may abort the process when it exits.
    import_module("torch.distributed.nn")
    store, rank, size = next(dist.rendezvous("env://"))
    # After torchrun's restart the store is as it was left: without a prefix, with addresses of processes that are gone.
    store = dist.PrefixStore(f"attempt {torchrun_restarts()}", store)
    kind = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    dist.init_process_group(kind, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def torchrun_name() -> str:
    """A name that the processes of torchrun share with those that it restarts after a failure."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # "none" is torchrun's default for --rdzv-id
    return f"agent {os.getppid()}" if name == "none" else name


def torchrun_started() -> float:
    """When the torchrun on this machine, the parent of this process, began: seconds since 1970, to the second."""
    ticks = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]  # since the machine started
    machine = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
    return int(machine.split()[1]) + int(ticks) // os.sysconf("SC_CLK_TCK")


def torchrun_restarts() -> int:
    """How often torchrun has restarted this process after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
