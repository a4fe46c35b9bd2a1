"""What a row of results needs to be read later: the machine and the versions it comes from."""

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
