"""One filter step on a CPU, side by side: ours, DeePMD-kit's operations, torch in place, and BLAS. `make bench`
runs it.

    python benchmarks/bench_step.py [--case paper-10240 ...] [--rounds 5] [--output rows.csv]

Providers take turns within each round of one process, so that a noisy machine disturbs all alike; a sample of ours
is the mean over a whole fold cycle. Before it is timed, each provider does three steps and must agree with ours
in float64 in w. Rows are appended to benchmarks/results/step.csv; `plot_step.py` draws them. The whole set runs
twice: as it is, and with huge pages for torch's own allocations (THP_MEM_ALLOC_ENABLE=1), which is the best case of
`naive`.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.linalg.blas as openblas
import torch
from cases import CASES
from rows import append, machine

from rlekf_ext import BlockPlan, KalmanFilter
from rlekf_ext.covariance import available_bytes, identity, required_bytes

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/step.csv"
MEMORY_CASE, OF_EIGHT = "paper-10240", "step of 8 measurements"
COLUMNS = ["case", "provider", "huge_pages", "metric", "unit", "value", "min", "max", "samples", "threads"]
COLUMNS += ["cpu", "cpu_isa", "torch", "numpy", "version", "commit"]
LAMBDA, NU = 0.98, 0.9987
REST = 0.05  # seconds: threads of the provider before (OpenBLAS, OpenMP) may still spin for work


class Provider:
    """A filter of one block plan; `step` does Algorithm 2, lines 8 to 14, for one measurement."""

    cycle = 1  # steps of one sample

    def __init__(self, plan: BlockPlan):
        self.plan, self.weights, self.memory_factor = plan, torch.zeros(plan.num_weights, dtype=torch.float64), LAMBDA

    @staticmethod
    def num_bytes(plan: BlockPlan) -> int:
        return 8 * sum(n * n for n in plan.sizes)

    def dense(self) -> list[torch.Tensor]:
        return [torch.eye(n, dtype=torch.float64) for n in self.plan.sizes]

    def forget(self) -> None:
        self.memory_factor = NU * self.memory_factor + 1 - NU


class Naive(Provider):
    """The operations of DeePMD-kit's LKF, in its order: 10 n² numbers a step and block, two temporaries of n²."""

    def __init__(self, plan: BlockPlan):
        super().__init__(plan)
        self.p = self.dense()

    @staticmethod
    def num_bytes(plan: BlockPlan) -> int:
        return Provider.num_bytes(plan) + 16 * max(plan.sizes) ** 2

    def step(self, jacobian: torch.Tensor, innovation: float) -> None:
        lam, parts = self.memory_factor, jacobian.split(self.plan.sizes)
        columns = [part[:, None] for part in parts]
        total = sum(lam + h.T @ p @ h for h, p in zip(columns, self.p, strict=True))
        a = 1 / total
        for i, (h, w) in enumerate(zip(columns, self.weights.split(self.plan.sizes), strict=True)):
            k = self.p[i] @ h
            w += (a * innovation * k)[:, 0]
            self.p[i] = (1 / lam) * (self.p[i] - a * torch.matmul(k, k.T))
        self.forget()


class Torch(Provider):
    """torch at its best: mv, then addr_ in place."""

    def __init__(self, plan: BlockPlan):
        super().__init__(plan)
        self.p = self.dense()

    def step(self, jacobian: torch.Tensor, innovation: float) -> None:
        lam, parts = self.memory_factor, jacobian.split(self.plan.sizes)
        gains = [torch.mv(p, h) for p, h in zip(self.p, parts, strict=True)]
        a = 1 / (len(parts) * lam + sum(float(h @ k) for h, k in zip(parts, gains, strict=True)))
        for p, k, w in zip(self.p, gains, self.weights.split(self.plan.sizes), strict=True):
            w.add_(k, alpha=a * innovation)
            p.addr_(k, k, beta=1 / lam, alpha=-a / lam)
        self.forget()


class Blas(Provider):
    """symv and syr of a BLAS on one triangle; 1/λ goes into a scalar factor, which only helps it."""

    def __init__(self, plan: BlockPlan):
        super().__init__(plan)
        self.scale = 1.0
        self.p = [self.block(n) for n in plan.sizes]

    def block(self, n: int) -> np.ndarray:
        return np.eye(n, order="F")

    def multiply(self, p: np.ndarray, h: np.ndarray) -> np.ndarray:
        return openblas.dsymv(1.0, p, h, lower=1)

    def subtract(self, p: np.ndarray, k: np.ndarray, factor: float) -> None:
        assert openblas.dsyr(-factor, k, lower=1, a=p, overwrite_a=1) is p

    def step(self, jacobian: torch.Tensor, innovation: float) -> None:
        parts = [part.numpy() for part in jacobian.split(self.plan.sizes)]
        gains = [self.multiply(p, h) for p, h in zip(self.p, parts, strict=True)]  # K / scale
        variance = self.scale * sum(h @ k for h, k in zip(parts, gains, strict=True))
        a = 1 / (len(parts) * self.memory_factor + variance)
        for p, k, w in zip(self.p, gains, self.weights.split(self.plan.sizes), strict=True):
            w.add_(torch.from_numpy(k), alpha=a * innovation * self.scale)
            self.subtract(p, k, a * self.scale)
        self.scale /= self.memory_factor
        self.forget()


class BlasPacked(Blas):
    """spmv and spr: half the memory, but rows of every length."""

    @staticmethod
    def num_bytes(plan: BlockPlan) -> int:
        return 4 * sum(n * (n + 1) for n in plan.sizes)

    def block(self, n: int) -> np.ndarray:
        packed = np.zeros(n * (n + 1) // 2)
        column = np.arange(n)
        packed[column * n - column * (column - 1) // 2] = 1.0  # lower triangle, column after column
        return packed

    def multiply(self, p: np.ndarray, h: np.ndarray) -> np.ndarray:
        return openblas.dspmv(len(h), 1.0, p, h, lower=1)

    def subtract(self, p: np.ndarray, k: np.ndarray, factor: float) -> None:
        assert openblas.dspr(len(k), -factor, k, p, lower=1, overwrite_ap=1) is p


def mkl() -> ctypes.CDLL | None:
    """MKL's runtime from the package `mkl`, if it is installed."""
    for library in sorted(Path(sys.prefix, "lib").glob("libmkl_rt.so*")):
        return ctypes.CDLL(str(library))
    return None


MKL = mkl()
COLUMN_MAJOR, LOWER = 102, 122


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


class Mkl(Blas):
    """symv and syr of MKL."""

    def multiply(self, p: np.ndarray, h: np.ndarray) -> np.ndarray:
        k, n = np.empty_like(h), len(h)
        one, zero = ctypes.c_double(1), ctypes.c_double(0)
        MKL.cblas_dsymv(COLUMN_MAJOR, LOWER, n, one, pointer(p), n, pointer(h), 1, zero, pointer(k), 1)
        return k

    def subtract(self, p: np.ndarray, k: np.ndarray, factor: float) -> None:
        n = len(k)
        MKL.cblas_dsyr(COLUMN_MAJOR, LOWER, n, ctypes.c_double(-factor), pointer(k), 1, pointer(p), n)


class MklPacked(BlasPacked):
    """spmv and spr of MKL."""

    def multiply(self, p: np.ndarray, h: np.ndarray) -> np.ndarray:
        k, n = np.empty_like(h), len(h)
        one, zero = ctypes.c_double(1), ctypes.c_double(0)
        MKL.cblas_dspmv(COLUMN_MAJOR, LOWER, n, one, pointer(p), pointer(h), 1, zero, pointer(k), 1)
        return k

    def subtract(self, p: np.ndarray, k: np.ndarray, factor: float) -> None:
        MKL.cblas_dspr(COLUMN_MAJOR, LOWER, len(k), ctypes.c_double(-factor), pointer(k), 1, pointer(p))


class Ours(Provider):
    """The packed, scaled, deferred form."""

    dtype = torch.float64

    def __init__(self, plan: BlockPlan):
        super().__init__(plan)
        self.filter = KalmanFilter(plan, memory_factor=LAMBDA, forgetting_rate=NU, covariance_dtype=self.dtype)
        self.cycle = len(self.filter.covariance.pending)

    @classmethod
    def num_bytes(cls, plan: BlockPlan) -> int:
        return required_bytes(plan, dtype=cls.dtype)

    def step(self, jacobian: torch.Tensor, innovation: float | list[float]) -> None:
        self.filter.step(self.weights, jacobian, innovation)


class OursFloat32(Ours):
    dtype = torch.float32


PROVIDERS: dict[str, type] = {
    "naive": Naive,
    "torch": Torch,
    "openblas symv": Blas,
    "openblas spmv": BlasPacked,
    **({"mkl symv": Mkl, "mkl spmv": MklPacked} if MKL else {}),
    "ours float64": Ours,
    "ours float32": OursFloat32,
}


class ReadBandwidth:
    """Reads as many bytes as a step of ours must, from a buffer of that size."""

    def __init__(self, plan: BlockPlan):
        p = identity(plan, pending=1)  # the same pages, advised and touched in the same way
        self.data = p.tiles.view(-1)[: sum(n * (n + 1) // 2 for n in plan.sizes)].fill_(1.0)

    def read(self) -> None:
        torch.dot(self.data, self.data)


def measured(plan: BlockPlan, names: list[str], rounds: int) -> dict[tuple[str, str], list[float]]:
    """Seconds a step of each provider (and "read"), interleaved: {(provider, metric): samples}."""
    generator = torch.Generator().manual_seed(0)
    jacobians = torch.randn(8, plan.num_weights, generator=generator, dtype=torch.float64)
    providers = {name: PROVIDERS[name](plan) for name in names}
    reader = ReadBandwidth(plan)
    check(providers, jacobians)
    samples: dict[tuple[str, str], list[float]] = {}

    def note(name: str, metric: str, seconds: float) -> None:
        samples.setdefault((name, metric), []).append(seconds)

    for turn in range(rounds):
        for _ in range(5):
            note("read", "step", timed(reader.read))
        for name, provider in providers.items():
            time.sleep(REST)
            steps = [timed(lambda p=provider, i=i: p.step(jacobians[i % 8], 0.1)) for i in range(provider.cycle)]
            note(name, "step", statistics.mean(steps))
            if provider.cycle > 1:
                fold = max(range(len(steps)), key=steps.__getitem__)
                for i, seconds in enumerate(steps):
                    if i != fold:
                        note(name, "step without fold", seconds)
                # A fold comes every fourth time.
                eight = [timed(lambda p=provider: p.step(jacobians, [0.1] * 8)) for _ in range(provider.cycle // 8)]
                note(name, OF_EIGHT, statistics.mean(eight))
        print(f"  round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
    return samples


def check(providers: dict, jacobians: torch.Tensor) -> None:
    """Three steps of each; all must end with the same weights."""
    for provider in providers.values():
        for jacobian in jacobians[:3]:
            provider.step(jacobian, 0.1)
    ours = next((p for p in providers.values() if type(p) is Ours), None)
    for name, provider in providers.items():
        tolerance = 1e-5 if "float32" in name else 1e-10
        if ours is not None:
            error = float((provider.weights - ours.weights).abs().max() / ours.weights.abs().max())
            if not error < tolerance:
                sys.exit(f"{name} disagrees with ours float64: {error:.1e} of the largest weight, allowed {tolerance}.")


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak_bytes(case: str, name: str) -> int:
    """Growth of the resident memory of a process of its own that makes the provider and does three steps."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import bench_step as b, torch\n"
        "read = lambda key: next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith(key)) * 1024\n"
        "plan = b.CASES[sys.argv[2]]; h = torch.ones(plan.num_weights, dtype=torch.float64); before = read('VmRSS')\n"
        "p = b.PROVIDERS[sys.argv[3]](plan); [p.step(h, 0.1) for _ in range(3)]; print(read('VmHWM') - before)"
    )
    arguments = [sys.executable, "-c", code, str(Path(__file__).parent), case, name]
    return int(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)


def groups(plan: BlockPlan, names: list[str]) -> tuple[list[list[str]], list[str]]:
    """Which providers share a run: all, or ours with one other at a time; and those that cannot fit at all."""
    room = 0.7 * available_bytes(torch.device("cpu"))
    need = {name: PROVIDERS[name].num_bytes(plan) for name in names}
    own = [name for name in names if name.startswith("ours")]
    base = sum(need[name] for name in own) + Ours.num_bytes(plan)  # and the buffer that is read
    if base + sum(need[name] for name in names if name not in own) <= room:
        return [names], []
    others = [name for name in names if name not in own]
    fitting = [name for name in others if base + need[name] <= room]
    return [[name, *own] for name in fitting] or [own], [name for name in others if name not in fitting]


def rows_of(case: str, names: list[str], rounds: int, common: dict[str, object]) -> list[dict[str, object]]:
    plan, rows = CASES[case], []

    def row(provider: str, metric: str, unit: str, values: list[float]) -> dict[str, object]:
        spread = {"value": statistics.median(values), "min": min(values), "max": max(values)} if values else {}
        spread = {key: f"{value:.6g}" for key, value in spread.items()}
        return {
            "case": case,
            "provider": provider,
            "metric": metric,
            "unit": unit,
            "samples": len(values),
            **spread,
            **common,
        }

    sets, absent = groups(plan, names)
    limit_bytes = 4 * sum(n * (n + 1) for n in plan.sizes)
    for together in sets:
        samples = measured(plan, together, rounds)
        gc.collect()
        suffix = "" if len(sets) == 1 else f", beside {together[0]}"
        for (provider, metric), values in samples.items():
            rows.append(row(provider, metric + suffix, "ms", [1e3 * value for value in values]))
        rows.append(row("read", "bandwidth" + suffix, "GB/s", [limit_bytes / v / 1e9 for v in samples["read", "step"]]))
        report(case, samples, limit_bytes)
    for name in absent:
        rows.append(row(name, f"does not fit: {PROVIDERS[name].num_bytes(plan) / 1e9:.1f} GB", "", []))
    for name in names:
        if name not in absent:
            rows.append(row(name, "bytes", "B", [PROVIDERS[name].num_bytes(plan)]))
        if case == MEMORY_CASE:
            rows.append(row(name, "peak memory", "B", [peak_bytes(case, name)]))
            print(
                f"  {name:<15}peak memory {float(rows[-1]['value']) / limit_bytes:.3f} times the packed triangle",
                flush=True,
            )
    return rows


def report(case: str, samples: dict[tuple[str, str], list[float]], limit_bytes: int) -> None:
    median = {key: statistics.median(values) for key, values in samples.items()}
    read = median["read", "step"]
    blas = [value for (name, metric), value in median.items() if ("blas" in name or "mkl" in name) and metric == "step"]
    print(f"{case}: read {limit_bytes / read / 1e9:.1f} GB/s, limit {1e3 * read:.2f} ms (float64)")
    for (name, metric), value in median.items():
        if name == "read":
            continue
        if metric == OF_EIGHT:
            print(
                f"  {name:<15}{metric:<24}{1e3 * value:9.2f} ms, {value / median[name, 'step'] / 8:.2f} of a step each"
            )
            continue
        limit = read / 2 if "float32" in name else read
        line = f"  {name:<15}{metric:<24}{1e3 * value:9.2f} ms{limit_bytes / value / 1e9 * limit / read:8.1f} GB/s"
        line += f"{100 * limit / value:7.0f} % of limit"
        if ("naive", "step") in median:
            line += f"{median['naive', 'step'] / value:8.1f} x naive"
        if blas:
            line += f"{min(blas) / value:7.2f} x best BLAS"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--case", nargs="+", choices=list(CASES), default=[name for name in CASES if name != "water-10240"]
    )
    parser.add_argument("--provider", nargs="+", choices=list(PROVIDERS), default=list(PROVIDERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--huge-pages", choices=["off", "on", "both"], default="both", help="for torch's allocations")
    arguments = parser.parse_args()
    if arguments.huge_pages == "both":  # the setting is read once, when torch starts
        for value in ("off", "on"):
            # KMP_BLOCKTIME: else threads of MKL spin on after their work, on the cores of the next provider.
            environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": str(int(value == "on")), "KMP_BLOCKTIME": "0"}
            subprocess.run([sys.executable, *sys.argv, "--huge-pages", value], env=environment, check=True)
        return
    torch.set_num_threads(arguments.threads)
    huge_pages = int(os.environ.get("THP_MEM_ALLOC_ENABLE") == "1")
    common = {"huge_pages": huge_pages, "numpy": np.__version__, **machine()}
    print(f"{common['cpu']}, {common['threads']} threads, huge pages for torch: {common['huge_pages']}")
    for case in arguments.case:
        rows = rows_of(case, arguments.provider, arguments.rounds, common)
        append(arguments.output, COLUMNS, rows)


if __name__ == "__main__":
    main()
