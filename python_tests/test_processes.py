"""Sums over processes, and the error when one of them is gone."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from spawn import spawn

from rlekf_ext.processes import LostProcessError, Processes


def test_one_process_alone():
    alone = Processes()
    x = torch.ones(3)
    assert (alone.rank, alone.size) == (0, 1)
    assert alone.sum(x) is x
    assert alone.gather([3, 4]) == [[3, 4]]
    assert alone.any(True)
    assert not alone.any(False)


def sums(rank):
    processes = Processes(dist.group.WORLD)
    assert processes.sum(torch.full((2,), float(rank))).tolist() == [3.0, 3.0]
    assert processes.gather([rank, 10]) == [[0, 10], [1, 10], [2, 10]]
    assert processes.any(rank == 1)
    assert not processes.any(False)


def test_sums_over_processes():
    spawn(sums, 3)


TIMEOUT = 4


def loses(rank, victim, ends):
    """The victim ends, or hangs, before the tenth sum; all others name it, within the timeout."""
    processes = Processes(dist.group.WORLD)
    for step in range(10):
        if rank == victim and step == 9:
            if ends:
                os._exit(9)
            time.sleep(3 * TIMEOUT)
            os._exit(9)
        started = time.monotonic()
        if step < 9:
            processes.sum(torch.ones(1000))
            continue
        others = dist.get_world_size() - 1
        with pytest.raises(LostProcessError, match=f"^Lost rank {victim} of {others + 1} processes: ended, or silent"):
            processes.sum(torch.ones(1000))
        seconds = time.monotonic() - started
        assert seconds < (3 if ends and others == 1 else TIMEOUT + 7)
        os._exit(0)


@pytest.mark.parametrize(("size", "victim", "ends"), [(2, 1, True), (4, 2, True), (4, 0, True), (3, 1, False)])
def test_a_lost_process_is_named(size, victim, ends):
    codes = [9 if rank == victim else 0 for rank in range(size)]
    spawn(loses, size, victim, ends, timeout=TIMEOUT, exit_codes=codes)
