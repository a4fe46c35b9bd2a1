"""The machine: what a row of results records of it, its free memory, and the cores that this process may use."""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
    limits += _left_in_cgroups(CGROUP_ROOT, OWN_CGROUPS)
    with suppress(OSError, ValueError):  # ulimit -v, as job systems set it
        allowed = resource.getrlimit(resource.RLIMIT_AS)[0]
        if allowed != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limits.append(allowed - pages * resource.getpagesize())
    return max(min(limits), 0)


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on the device; a copy from a CPU to a GPU waits for nothing."""
    device = torch.device(device)
    if tensor.is_cpu and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@contextmanager
def torch_threads(number: int | None) -> Iterator[None]:
    """Inside, torch has this number of threads; None: the number that it has."""
    before = torch.get_num_threads()
    if number:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        if number:
            torch.set_num_threads(before)


CGROUP_ROOT, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
MEMORY_FILES = {  # limit, use, and the part of the use that gives way, of version 2 and version 1
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def usable_cores(root: Path = CGROUP_ROOT, own: Path = OWN_CGROUPS) -> int:
    """The cores that this process may use, at least 1: those of its affinity, within the CPU quotas of its cgroups,
    shared with the other processes that torchrun has started on this machine."""
    cores = min([len(os.sched_getaffinity(0)), *_cpu_quotas(root, own)])
    return max(1, int(cores / int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def _cpu_quotas(root: Path, own: Path) -> Iterator[float]:
    """Cores that each cgroup of this process may use."""
    for version, folder in _cgroups("cpu", root, own):
        with suppress(OSError, ValueError):  # absent, or "max"
            if version:
                quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            else:
                quota, period = map(int, (folder / "cpu.max").read_text().split())
            if quota > 0:  # -1: no limit
                yield quota / period


def _left_in_cgroups(root: Path, own: Path) -> Iterator[int]:
    """Bytes that each cgroup of this process has left."""
    for version, folder in _cgroups("memory", root, own):
        limit, used, cached = MEMORY_FILES[version]
        with suppress(OSError, ValueError):  # absent, or "max"
            most = int((folder / limit).read_text())
            stat = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
            yield most - int((folder / used).read_text()) + int(stat.get(cached, 0))  # the cache gives way


def _cgroups(controller: str, root: Path, own: Path) -> Iterator[tuple[str, Path]]:
    """The cgroups of a controller that this process is in, the outer ones too: "" and the folder in version 2,
    the controller's name and the folder in version 1.

    In a container `own` may name a group that `root` does not show: then `root` is the container's own.
    """
    with suppress(OSError, ValueError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            version = controller if controllers else ""
            base = root / version
            group = base / path.lstrip("/")
            for folder in (group, *group.parents):
                if not folder.is_relative_to(base):
                    break
                yield version, folder
