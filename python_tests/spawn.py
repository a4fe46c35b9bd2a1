"""Runs a test in several processes at once, on this machine."""

import os
import socket
import sys
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.multiprocessing as mp


def spawn(function, size, *arguments, timeout=60, exit_codes=None):
    """Run function(rank, *arguments) on each of `size` ranks of a gloo group; the first error of any is raised here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    errors = context.SimpleQueue()
    processes = [
        context.Process(target=_rank, args=(function, rank, size, port, timeout, errors, arguments))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if not errors.empty():
        pytest.fail(errors.get())
    assert [process.exitcode for process in processes] == (exit_codes or [0] * size)


def _rank(function, rank, size, port, timeout, errors, arguments):
    torch.set_num_threads(1)
    try:
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group(
            "gloo", init_method=address, rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
        )
        function(rank, *arguments)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        errors.put(f"rank {rank}: {traceback.format_exc()}")
        raise
    # torch's own threads may abort a busy interpreter that ends ("terminate called without an active exception").
    sys.stdout.flush()
    os._exit(0)
