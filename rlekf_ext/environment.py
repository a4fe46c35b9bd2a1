"""The machine: what a row of results records of it, and its free memory."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from rlekf_ext import _C


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def this_machine() -> dict[str, Any]:
    return {
        "version": _C.build_info()["version"],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        "cpu_isa": _C.cpu_isa(),
    }


def available_bytes(device: torch.device) -> int:
    """Free memory of `device` in bytes: of a GPU as its driver reports it, of a CPU what kernel and cgroup allow."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [2**63]
    try:
        with open("/proc/meminfo") as lines:
            limits += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as used:
            limits.append(int(limit.read()) - int(used.read()))
    except (OSError, ValueError):  # not Linux, no cgroup, or "max": no limit from there
        pass
    return min(limits)
