"""One filter step on a GPU, side by side: ours (CUDA, Triton), DeePMD-kit's operations, torch in place, and cuBLAS.
`make gpu` runs it.

    python benchmarks/bench_step_gpu.py [--case paper-10240 ...] [--rounds 7] [--output rows.csv]

Providers take turns within each round of one process. A sample is the mean of 32 steps between two device events: a
whole fold cycle of ours. Before it is timed, each provider does three steps and must agree with ours in float64 in w.
"read" is the fastest of torch's own sums over as many bytes as the packed triangle has: the limit of any exact step.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from cases import CASES
from rows import append, machine
from torch import Tensor

from rlekf_ext import BlockPlan, KalmanFilter, ops
from rlekf_ext.covariance import required_bytes

RESULTS = Path(__file__).resolve().parent / "results/step_gpu.csv"
COLUMNS = ["case", "provider", "metric", "unit", "value", "min", "max", "samples"]
COLUMNS += ["gpu", "driver", "cuda", "torch", "triton", "version", "commit"]
DEFAULT_CASES = ["paper-10240", "paper-5120", "paper-1024", "block-10240", "block-1024", "water-1024", "water-10240"]
LAMBDA, NU, CYCLE = 0.98, 0.9987, 32
GPU = torch.device("cuda")


class Provider:
    """A filter of one block plan; `step` does Algorithm 2, lines 8 to 14, for one measurement, and never waits."""

    def __init__(self, plan: BlockPlan):
        self.plan, self.memory_factor = plan, LAMBDA
        self.weights = torch.zeros(plan.num_weights, dtype=torch.float64, device=GPU)
        self.p = [self.block(n) for n in plan.sizes]

    def block(self, n: int) -> Tensor:
        return torch.eye(n, dtype=torch.float64, device=GPU)

    @staticmethod
    def num_bytes(plan: BlockPlan) -> int:
        return 8 * sum(n * n for n in plan.sizes)

    def forget(self) -> None:
        self.memory_factor = NU * self.memory_factor + 1 - NU


class Naive(Provider):
    """The operations of DeePMD-kit's LKF, in its order."""

    @staticmethod
    def num_bytes(plan: BlockPlan) -> int:
        return Provider.num_bytes(plan) + 16 * max(plan.sizes) ** 2

    def step(self, jacobian: Tensor, innovation: Tensor) -> None:
        lam = self.memory_factor
        columns = [part[:, None] for part in jacobian.split(self.plan.sizes)]
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


class Cublas:
    """The functions of cuBLAS that torch has loaded, with scalars on the device, on torch's stream."""

    LOWER = 0

    def __init__(self) -> None:
        torch.mm(torch.ones(2, 2, device=GPU), torch.ones(2, 2, device=GPU))  # loads the library
        with open("/proc/self/maps") as maps:
            paths = {line.split()[-1] for line in maps if "libcublas.so" in line}
        self.library = ctypes.CDLL(paths.pop())
        self.handle = ctypes.c_void_p()
        assert self.library.cublasCreate_v2(ctypes.byref(self.handle)) == 0
        self.library.cublasSetPointerMode_v2(self.handle, 1)
        self.library.cublasSetStream_v2(self.handle, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))
        self.one, self.zero = (torch.full((1,), x, dtype=torch.float64, device=GPU) for x in (1.0, 0.0))

    def call(self, name: str, *arguments: int | Tensor) -> None:
        made = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int(a) for a in arguments]
        status = getattr(self.library, f"cublas{name}")(self.handle, *made)
        assert status == 0, f"cublas{name} returned {status}"


class CublasFull(Provider):
    """symv and syr on one triangle; 1/λ goes into a scalar factor, which only helps it."""

    cublas: Cublas

    def __init__(self, plan: BlockPlan):
        super().__init__(plan)
        self.scale = 1.0
        if not hasattr(CublasFull, "cublas"):
            CublasFull.cublas = Cublas()

    def multiply(self, p: Tensor, h: Tensor, k: Tensor) -> None:
        n, c = len(h), self.cublas
        c.call("Dsymv_v2", c.LOWER, n, c.one, p, n, h, 1, c.zero, k, 1)

    def add(self, p: Tensor, k: Tensor, factor: Tensor) -> None:
        n = len(k)
        self.cublas.call("Dsyr_v2", self.cublas.LOWER, n, factor, k, 1, p, n)

    def step(self, jacobian: Tensor, innovation: Tensor) -> None:
        parts = jacobian.split(self.plan.sizes)
        gains = [torch.empty_like(part) for part in parts]
        for p, h, k in zip(self.p, parts, gains, strict=True):
            self.multiply(p, h, k)
        variance = self.scale * sum(torch.dot(h, k) for h, k in zip(parts, gains, strict=True))
        a = 1 / (len(parts) * self.memory_factor + variance)
        factor = -a * self.scale
        for p, k, w in zip(self.p, gains, self.weights.split(self.plan.sizes), strict=True):
            w.sub_(factor * innovation * k)
            self.add(p, k, factor)
        self.scale /= self.memory_factor
        self.forget()


class CublasPacked(CublasFull):
    """spmv and spr: half the memory."""

    @staticmethod
    def num_bytes(plan: BlockPlan) -> int:
        return 4 * sum(n * (n + 1) for n in plan.sizes)

    def block(self, n: int) -> Tensor:
        packed = torch.zeros(n * (n + 1) // 2, dtype=torch.float64, device=GPU)
        column = torch.arange(n, device=GPU)
        packed[column * n - column * (column - 1) // 2] = 1.0  # lower triangle, column after column
        return packed

    def multiply(self, p: Tensor, h: Tensor, k: Tensor) -> None:
        c = self.cublas
        c.call("Dspmv_v2", c.LOWER, len(h), c.one, p, h, 1, c.zero, k, 1)

    def add(self, p: Tensor, k: Tensor, factor: Tensor) -> None:
        self.cublas.call("Dspr_v2", self.cublas.LOWER, len(k), factor, k, 1, p)


class Ours:
    """The packed, scaled, deferred form."""

    backend, dtype = "native", torch.float64

    def __init__(self, plan: BlockPlan):
        settings = {"covariance_dtype": self.dtype, "pending": CYCLE, "backend": self.backend, "device": GPU}
        self.filter = KalmanFilter(plan, memory_factor=LAMBDA, forgetting_rate=NU, **settings)
        self.weights = torch.zeros(plan.num_weights, dtype=torch.float64, device=GPU)

    @classmethod
    def num_bytes(cls, plan: BlockPlan) -> int:
        return required_bytes(plan, dtype=cls.dtype)

    def step(self, jacobian: Tensor, innovation: Tensor) -> None:
        self.filter.step(self.weights, jacobian, innovation)


def ours(name: str, data_type: torch.dtype) -> type:
    return type(name, (Ours,), {"backend": name, "dtype": data_type})


PROVIDERS: dict[str, type] = {
    "naive": Naive,
    "torch": Torch,
    "cublas symv": CublasFull,
    "cublas spmv": CublasPacked,
    "cuda float64": ours("native", torch.float64),
    "cuda float32": ours("native", torch.float32),
    "triton float64": ours("triton", torch.float64),
    "triton float32": ours("triton", torch.float32),
}
OURS = {name for name, kind in PROVIDERS.items() if issubclass(kind, Ours)}


def timed(call: Callable[[], object], count: int) -> float:
    """Milliseconds a call takes on the device, over `count` of them."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / count


class Case:
    """Samples of one block plan, by (provider, metric), in ms."""

    def __init__(self, plan: BlockPlan, names: list[str], rounds: int):
        self.plan, self.samples = plan, {}
        generator = torch.Generator(GPU).manual_seed(0)
        self.jacobians = torch.randn(8, plan.num_weights, generator=generator, dtype=torch.float64, device=GPU)
        self.innovations = torch.full((8,), 0.1, dtype=torch.float64, device=GPU)
        self.peaks: dict[str, float] = {}
        self.providers = {name: self.made(name) for name in names}
        self.check()
        numbers = sum(n * (n + 1) // 2 for n in plan.sizes)
        self.buffer = torch.ones(numbers, dtype=torch.float64, device=GPU)
        for turn in range(rounds):
            self.read()
            for name, provider in self.providers.items():
                self.round(name, provider)
            print(f"  round {turn + 1} of {rounds}", file=sys.stderr, flush=True)

    def made(self, name: str) -> Provider | Ours:
        """The provider, after three steps; notes the memory that these needed beyond what it keeps."""
        provider = PROVIDERS[name](self.plan)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for jacobian in self.jacobians[:3]:
            provider.step(jacobian, self.innovations[0])
        torch.cuda.synchronize()
        self.peaks[name] = torch.cuda.max_memory_allocated() - before
        return provider

    def check(self) -> None:
        wanted = self.providers["cuda float64"].weights
        for name, provider in self.providers.items():
            error = float((provider.weights - wanted).abs().max() / wanted.abs().max())
            allowed = 1e-5 if "float32" in name else 1e-10
            if not error < allowed:
                sys.exit(f"{name} disagrees with cuda float64: {error:.1e} of the largest weight, allowed {allowed}.")

    def note(self, name: str, metric: str, milliseconds: float) -> None:
        self.samples.setdefault((name, metric), []).append(milliseconds)

    def read(self) -> None:
        x = self.buffer
        for _ in range(2):  # the first of a round warms up
            times = [timed(call, 8) for call in (lambda: torch.dot(x, x), lambda: x.sum(), lambda: x.max())]
        self.note("read", "step", min(times))

    def round(self, name: str, provider: Provider | Ours) -> None:
        steps = iter(range(10**9))
        one = lambda: provider.step(self.jacobians[next(steps) % 8], self.innovations[0])  # noqa: E731
        timed(one, 3 if name in OURS else 1)
        if name not in OURS:
            self.note(name, "step", timed(one, 4))
            return
        self.note(name, "step", timed(one, CYCLE))
        singles = [timed(one, 1) for _ in range(CYCLE)]
        fold = max(range(CYCLE), key=singles.__getitem__)
        self.note(name, "fold step", singles[fold])
        self.note(name, "step without fold", statistics.median(singles[:fold] + singles[fold + 1 :]))
        for count in (2, 4, 8):
            many = lambda m=count: provider.step(self.jacobians[:m], self.innovations[:m])  # noqa: E731
            self.note(name, f"step of {count} measurements", timed(many, CYCLE // count))
        graph, static = torch.cuda.CUDAGraph(), self.jacobians[:1].clone()
        with torch.cuda.graph(graph):
            for _ in range(CYCLE):
                provider.step(static, self.innovations[:1])
        graph.replay()
        self.note(name, "step in a graph", timed(graph.replay, 2) / CYCLE)


def rows_of(name: str, case: Case, common: dict[str, object]) -> list[dict[str, object]]:
    rows = []
    for (provider, metric), values in case.samples.items():
        spread = {"value": statistics.median(values), "min": min(values), "max": max(values)}
        rows.append({"provider": provider, "metric": metric, "unit": "ms", "samples": len(values), **spread})
    for provider, value in case.peaks.items():
        rows.append({"provider": provider, "metric": "transient memory", "unit": "B", "samples": 1, "value": value})
    numbers = ("value", "min", "max")
    return [{"case": name, **{k: f"{v:.6g}" if k in numbers else v for k, v in row.items()}, **common} for row in rows]


def report(name: str, case: Case) -> None:
    median = {key: statistics.median(values) for key, values in case.samples.items()}
    limit_bytes, read = 4 * sum(n * (n + 1) for n in case.plan.sizes), median["read", "step"]
    rivals = [value for (rival, _), value in median.items() if rival.startswith("cublas")]
    print(f"{name}: read {limit_bytes / read / 1e6:.0f} GB/s, limit {read:.4f} ms (float64)")
    for (provider, metric), value in median.items():
        if provider == "read":
            continue
        limit = read / 2 if "float32" in provider else read
        line = f"  {provider:<15}{metric:<24}{value:9.4f} ms  {value / limit:7.2f} x limit"
        if metric == "step":
            if ("naive", "step") in median:
                line += f"{median['naive', 'step'] / value:8.1f} x naive"
            if rivals:
                line += f"{min(rivals) / value:7.2f} x best cuBLAS"
            line += f"   transient {100 * case.peaks[provider] / limit_bytes:6.2f} % of P in float64"
        elif (provider, "step") in median:
            line += f"{value / median[provider, 'step']:8.2f} x one step"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=DEFAULT_CASES)
    parser.add_argument("--provider", nargs="+", choices=list(PROVIDERS), default=list(PROVIDERS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_step_gpu needs a GPU that torch sees; bench_step.py measures the CPU.")
    absent = {name: ops.backends()["triton" if "triton" in name else "cuda"] for name in OURS}
    names = [name for name in arguments.provider if not absent.get(name)]
    for name in set(arguments.provider) - set(names):
        print(f"left out: {name}: {absent[name]}")
    common = {key: value for key, value in {**machine(), **gpu()}.items() if key in COLUMNS}
    print(", ".join(f"{key} {value}" for key, value in common.items()))
    for name in arguments.case:
        plan = CASES[name]
        free, fitting = 0.9 * torch.cuda.mem_get_info()[0], []
        for provider in sorted(names, key=lambda n: n not in OURS):  # ours first
            need = PROVIDERS[provider].num_bytes(plan)
            if need < free:
                free -= need
                fitting.append(provider)
            else:
                print(f"{name}: {provider} needs {need / 1e9:.1f} GB beside the others: left out")
        case = Case(plan, fitting, arguments.rounds)
        append(arguments.output, COLUMNS, rows_of(name, case, common))
        report(name, case)
        del case
        gc.collect()
        torch.cuda.empty_cache()


def gpu() -> dict[str, object]:
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = ""
    properties = torch.cuda.get_device_properties(GPU)
    driver = Path("/proc/driver/nvidia/version")
    text = driver.read_text().split() if driver.exists() else []
    numbers = [word for word in text if word.count(".") >= 1 and word[0].isdigit()]
    return {"gpu": properties.name, "driver": (numbers or [""])[0], "cuda": torch.version.cuda, "triton": version}


if __name__ == "__main__":
    main()
