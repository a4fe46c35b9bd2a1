"""The filters that bench_step.py compares, each on a CPU or a GPU: DeePMD-kit's operations, torch in place, the BLAS
libraries of the device, and ours."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlekf_ext import BlockPlan, KalmanFilter, ops
from rlekf_ext.covariance import required_bytes

LAMBDA, NU, CYCLE = 0.98, 0.9987, 32


class Provider:
    """A filter of one block plan; `step` does Algorithm 2, lines 8 to 14, and never waits for a GPU."""

    def __init__(self, plan: BlockPlan, device: torch.device):
        self.plan, self.memory_factor = plan, LAMBDA
        self.weights = torch.zeros(plan.num_weights, dtype=torch.float64, device=device)
        self.p = [self.block(n, device) for n in plan.sizes]

    @classmethod
    def num_bytes(cls, plan: BlockPlan) -> int:
        return 8 * sum(n * n for n in plan.sizes)

    def block(self, n: int, device: torch.device) -> Tensor:
        return torch.eye(n, dtype=torch.float64, device=device)

    def forget(self) -> None:
        self.memory_factor = NU * self.memory_factor + 1 - NU


class Naive(Provider):
    """The operations of DeePMD-kit's LKF, in its order: 10 n² numbers per step and block, two temporaries of n²."""

    @classmethod
    def num_bytes(cls, plan: BlockPlan) -> int:
        return super().num_bytes(plan) + 16 * max(plan.sizes) ** 2

    def step(self, jacobian: Tensor, innovation: Tensor) -> None:
        lam, columns = self.memory_factor, [part[:, None] for part in jacobian.split(self.plan.sizes)]
        a = 1 / sum(lam + h.T @ p @ h for h, p in zip(columns, self.p, strict=True))
        for i, (h, w) in enumerate(zip(columns, self.weights.split(self.plan.sizes), strict=True)):
            k = self.p[i] @ h
            w += (a * innovation * k)[:, 0]
            self.p[i] = (1 / lam) * (self.p[i] - a * torch.matmul(k, k.T))
        self.forget()


class Torch(Provider):
    """torch at its best: mv, then addr_ in place."""

    def step(self, jacobian: Tensor, innovation: Tensor) -> None:
        lam, parts = self.memory_factor, jacobian.split(self.plan.sizes)
        gains = [torch.mv(p, h) for p, h in zip(self.p, parts, strict=True)]
        a = 1 / (len(parts) * lam + sum(torch.dot(h, k) for h, k in zip(parts, gains, strict=True)))
        for p, k, w in zip(self.p, gains, self.weights.split(self.plan.sizes), strict=True):
            w.add_(a * innovation * k)
            p.addr_(k * (-a / lam), k, beta=1 / lam)
        self.forget()


class Cblas:
    """OpenBLAS or MKL by the C interface, which takes scalars by value."""

    COLUMN_MAJOR, LOWER = 102, 122

    def __init__(self, library: Path, prefix: str):
        self.library, self.prefix = ctypes.CDLL(str(library)), prefix

    def __call__(self, name: str, *arguments: Any) -> None:
        kinds = {Tensor: lambda a: ctypes.c_void_p(a.data_ptr()), float: ctypes.c_double, int: ctypes.c_int}
        # Scalars come as tensors without dimensions.
        made = [float(a) if isinstance(a, Tensor) and a.dim() == 0 else a for a in arguments]
        call = getattr(self.library, f"{self.prefix}cblas_d{name}")
        call(self.COLUMN_MAJOR, self.LOWER, *(kinds[type(a)](a) for a in made))


class Cublas:
    """The cuBLAS that torch has loaded, with scalars on the device, on torch's stream."""

    DEVICE_POINTERS, LOWER = 1, 0

    def __init__(self) -> None:
        torch.mm(*torch.ones(2, 2, 2, device="cuda"))  # loads the library
        with open("/proc/self/maps") as maps:
            paths = {line.split()[-1] for line in maps if "libcublas.so" in line}
        self.library, self.handle = ctypes.CDLL(paths.pop()), ctypes.c_void_p()
        self.checked("Create_v2", ctypes.byref(self.handle))
        self.checked("SetPointerMode_v2", self.handle, self.DEVICE_POINTERS)
        self.checked("SetStream_v2", self.handle, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))

    def checked(self, name: str, *arguments: Any) -> None:
        if status := getattr(self.library, f"cublas{name}")(*arguments):
            raise RuntimeError(f"cublas{name} should return 0 but returned {status}.")

    def __call__(self, name: str, *arguments: Any) -> None:
        made = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int(a) for a in arguments]
        self.checked(f"D{name}_v2", self.handle, self.LOWER, *made)


class Blas(Provider):
    """symv and syr on one triangle; 1/λ goes into a scalar factor, which only helps it."""

    load: Callable[[], Callable[..., None]]  # the library

    def __init__(self, plan: BlockPlan, device: torch.device):
        super().__init__(plan, device)
        self.blas, self.scale = self.load(), 1.0
        self.one, self.zero = (torch.tensor(x, dtype=torch.float64, device=device) for x in (1.0, 0.0))

    def block(self, n: int, device: torch.device) -> Tensor:
        return torch.from_numpy(np.eye(n)).to(device)  # from NumPy, which asks for huge pages

    def multiply(self, p: Tensor, h: Tensor, k: Tensor) -> None:
        self.blas("symv", len(h), self.one, p, len(h), h, 1, self.zero, k, 1)

    def add(self, p: Tensor, k: Tensor, factor: Tensor) -> None:
        self.blas("syr", len(k), factor, k, 1, p, len(k))

    def step(self, jacobian: Tensor, innovation: Tensor) -> None:
        parts = jacobian.split(self.plan.sizes)
        gains = [torch.empty_like(part) for part in parts]  # K / scale
        for p, h, k in zip(self.p, parts, gains, strict=True):
            self.multiply(p, h, k)
        variance = self.scale * sum(torch.dot(h, k) for h, k in zip(parts, gains, strict=True))
        factor = -self.scale / (len(parts) * self.memory_factor + variance)
        for p, k, w in zip(self.p, gains, self.weights.split(self.plan.sizes), strict=True):
            w.sub_(factor * innovation * k)
            self.add(p, k, factor)
        self.scale /= self.memory_factor
        self.forget()


class PackedBlas(Blas):
    """spmv and spr: half the memory, but rows of every length."""

    @classmethod
    def num_bytes(cls, plan: BlockPlan) -> int:
        return 4 * sum(n * (n + 1) for n in plan.sizes)

    def block(self, n: int, device: torch.device) -> Tensor:
        packed, column = np.zeros(n * (n + 1) // 2), np.arange(n)
        packed[column * n - column * (column - 1) // 2] = 1.0  # lower triangle, column after column
        return torch.from_numpy(packed).to(device)

    def multiply(self, p: Tensor, h: Tensor, k: Tensor) -> None:
        self.blas("spmv", len(h), self.one, p, h, 1, self.zero, k, 1)

    def add(self, p: Tensor, k: Tensor, factor: Tensor) -> None:
        self.blas("spr", len(k), factor, k, 1, p)


class Ours(Provider):
    """The packed, scaled, deferred form."""

    backend, dtype = "native", torch.float64

    def __init__(self, plan: BlockPlan, device: torch.device):
        self.weights = torch.zeros(plan.num_weights, dtype=torch.float64, device=device)
        options = {"covariance_dtype": self.dtype, "max_pending": CYCLE, "backend": self.backend, "device": device}
        self.filter = KalmanFilter(plan, memory_factor=LAMBDA, forgetting_rate=NU, **options)

    @classmethod
    def num_bytes(cls, plan: BlockPlan) -> int:
        return required_bytes(plan, dtype=cls.dtype, max_pending=CYCLE)

    def step(self, jacobian: Tensor, innovation: Tensor) -> None:
        """One measurement, or several: jacobian (M, N), innovation (M,)."""
        self.weights += self.filter.update(jacobian, innovation)


def variant(kind: type[Provider], **attributes: Any) -> type[Provider]:
    return type(kind.__name__, (kind,), attributes)


def blas(label: str, load: Callable[[], Callable[..., None]]) -> dict[str, type[Provider]]:
    once = staticmethod(cache(load))
    return {f"{label} symv": variant(Blas, load=once), f"{label} spmv": variant(PackedBlas, load=once)}


def ours(label: str, backend: str) -> dict[str, type[Provider]]:
    dtypes = {"float64": torch.float64, "float32": torch.float32}
    return {f"{label} {name}": variant(Ours, backend=backend, dtype=dtype) for name, dtype in dtypes.items()}


def cpu_libraries() -> dict[str, tuple[list[Path], str]]:
    """The BLAS libraries that requirements-bench.txt installs, and the prefix of their functions' names."""
    scipy = find_spec("scipy")
    beside = Path(scipy.origin).parents[1] / "scipy.libs" if scipy and scipy.origin else Path("no SciPy")
    openblas, mkl = beside.glob("libscipy_openblas*.so"), Path(sys.prefix, "lib").glob("libmkl_rt.so*")
    return {"openblas": (sorted(openblas), "scipy_"), "mkl": (sorted(mkl), "")}


def providers(device: str) -> tuple[dict[str, type[Provider]], dict[str, str]]:
    """The providers of a device by name, and the reason for each that is absent."""
    found: dict[str, type[Provider]] = {"naive": Naive, "torch": Torch}
    if device == "cuda":
        reasons = ops.backends()
        found |= {**blas("cublas", Cublas), **ours("cuda", "native"), **ours("triton", "triton")}
    else:
        reasons = {}
        for label, (libraries, prefix) in cpu_libraries().items():
            reasons[label] = "" if libraries else "it is not installed (requirements-bench.txt)"
            found |= blas(label, partial(Cblas, next(iter(libraries), Path()), prefix))
        found |= ours("ours", "native")
    absent = {name: reason for name in found if (reason := reasons.get(name.split()[0]))}
    return {name: kind for name, kind in found.items() if name not in absent}, absent
