"""The machine: what a row of results records of it, and its free memory."""

from __future__ import annotations

import platform
import resource
from collections.abc import Iterator
from contextlib import suppress
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
    """Free memory of `device` in bytes: of a GPU as its driver reports it, of a CPU the least of what the kernel, the
    cgroups (containers, SLURM) and `ulimit -v` allow."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [2**63]
    with suppress(OSError, ValueError), open("/proc/meminfo") as lines:  # not Linux: no limit from there
        limits += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    limits += _left_in_cgroups(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))
    with suppress(OSError, ValueError):  # ulimit -v, as job systems set it
        allowed = resource.getrlimit(resource.RLIMIT_AS)[0]
        if allowed != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limits.append(allowed - pages * resource.getpagesize())
    return max(min(limits), 0)


CGROUP_NAMES = {  # limit, use, and the part of the use that gives way, of version 2 and version 1
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def _left_in_cgroups(root: Path, own: Path) -> Iterator[int]:
    """What each cgroup of memory that this process is in has left, the outer ones too, in both versions.

    In a container `own` may name a group that `root` does not show: then `root` is the container's own.
    """
    with suppress(OSError, ValueError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            kind = "memory" if controllers else ""
            base, (limit, used, cached) = root / kind, CGROUP_NAMES[kind]
            group = base / path.lstrip("/")
            for folder in (group, *group.parents):
                if not folder.is_relative_to(base):
                    break
                with suppress(OSError, ValueError):  # absent, or "max"
                    most = int((folder / limit).read_text())
                    stat = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
                    yield most - int((folder / used).read_text()) + int(stat.get(cached, 0))  # the cache gives way
