"""One filter step, side by side: ours, DeePMD-kit's operations, torch in place, and BLAS (OpenBLAS and MKL, or cuBLAS).
`make bench` runs it on the CPU, `make gpu` on a GPU.

    python benchmarks/bench_step.py [--device cuda] [--case paper-10240 ...] [--rounds 5] [--output rows.csv]

Providers take turns within each round of one process, so that a noisy machine affects all equally; a step of ours is
the mean over a whole fold cycle. Before it is timed, each provider does three steps, and its w must agree with ours in
float64. "read" is the limit: torch itself reading as many bytes as the packed triangle has. Rows are appended to
benchmarks/results/step.csv or step_gpu.csv. A provider or a case that fails is reported, and the others continue.

On a CPU the whole set runs twice: with default settings, and with huge pages for torch's own allocations
(THP_MEM_ALLOC_ENABLE=1), which is the best case of `naive`.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import CASES, triangle_bytes
from providers import CYCLE, Ours, Provider, providers
from rows import append, machine

from rlekf_ext import BlockPlan
from rlekf_ext.covariance import identity
from rlekf_ext.environment import available_bytes

RESULTS = Path(__file__).resolve().parent / "results"
MEMORY_CASE = "paper-10240"
BUFFER_BYTES = 2 * 10**9  # more is read in pieces: torch.dot takes 2^31 numbers on a GPU, and P needs memory, too
Named = Mapping[str, type[Provider]]


class Cpu:
    """How a step is timed on a CPU, and what its rows say."""

    device = torch.device("cpu")
    output, where = RESULTS / "step.csv", ["threads", "cpu", "cpu_isa", "torch", "numpy"]
    cases = tuple(name for name in CASES if name != "water-10240")
    room, samples, counts = 0.7, 1, (8,)  # of free memory; steps of others per sample; measurements per pass
    reads: tuple[Callable[[torch.Tensor], object], ...] = (lambda x: torch.dot(x, x),)
    rest = 0.05  # seconds: threads of the previous provider (OpenBLAS, OpenMP) may still spin

    def times(self, call: Callable[[], object], count: int) -> list[float]:
        """Seconds of each of `count` calls."""
        ends = [time.perf_counter()]
        for _ in range(count):
            call()
            ends.append(time.perf_counter())
        return [end - start for start, end in itertools.pairwise(ends)]

    def free(self) -> None:
        """Give back the memory of what is no longer used."""
        gc.collect()

    def facts(self) -> dict[str, object]:
        return {"huge_pages": int(os.environ.get("THP_MEM_ALLOC_ENABLE") == "1"), "numpy": np.__version__}


class Gpu(Cpu):
    """The same on a GPU, by an event after each call. `cuda` is torch.cuda, or a test's stand-in."""

    device = torch.device("cuda")
    output, where = RESULTS / "step_gpu.csv", ["gpu", "driver", "cuda", "torch", "triton"]
    cases = ("paper-10240", "paper-5120", "paper-1024", "block-10240", "block-1024", "water-1024", "water-10240")
    room, samples, counts = 0.9, 4, (2, 4, 8)
    reads = (*Cpu.reads, torch.sum, torch.max)
    rest = 0.0
    # While the host launches what is timed, the GPU sleeps (5 ms at 2 GHz; 32 steps of ours take the host about 2 ms).
    # Otherwise the events would measure Python.
    sleep_cycles = 10**7

    def __init__(self, cuda: Any = torch.cuda):
        self.cuda = cuda

    def times(self, call: Callable[[], object], count: int) -> list[float]:
        events = [self.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        self.cuda._sleep(self.sleep_cycles)
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        events[-1].synchronize()
        return [1e-3 * start.elapsed_time(end) for start, end in itertools.pairwise(events)]

    def captured(self, step: Callable[[], object]) -> Callable[[], object]:
        """A replay of the step. Each capture collects garbage and empties torch's cache: one per provider."""
        graph = self.cuda.CUDAGraph()
        with self.cuda.graph(graph):
            step()
        return graph.replay

    def free(self) -> None:
        gc.collect()
        self.cuda.empty_cache()

    def facts(self) -> dict[str, object]:
        try:
            from triton import __version__ as triton
        except ImportError:
            triton = ""
        driver = Path("/proc/driver/nvidia/version")
        words = driver.read_text().split() if driver.exists() else []
        version = next((word for word in words if "." in word and word[0].isdigit()), "")
        name = self.cuda.get_device_properties(self.device).name
        return {"gpu": name, "driver": version, "cuda": torch.version.cuda, "triton": triton}


class Reader:
    """Reads as many bytes as a step must, from a buffer whose pages are like those of P."""

    def __init__(self, num_bytes: int, device: torch.device):
        self.passes = -(-num_bytes // BUFFER_BYTES)
        size = -(-num_bytes // (8 * self.passes))
        plan = BlockPlan((math.isqrt(2 * size) + 1,))
        self.data = identity(plan, max_pending=1, device=device).tiles.view(-1)[:size].fill_(1.0)

    def seconds(self, on: Cpu) -> float:
        return min(sum(on.times(lambda r=read: r(self.data), self.passes)) for read in on.reads)


class Run:
    """Providers of one block plan that take turns; seconds of the samples, by (provider, metric)."""

    def __init__(self, plan: BlockPlan, named: Named, on: Cpu, rounds: int):
        self.on, self.samples, self.peaks = on, defaultdict(list), {}
        generator = torch.Generator(on.device).manual_seed(0)
        kind = {"dtype": torch.float64, "device": on.device}
        self.jacobians = torch.randn(8, plan.num_weights, generator=generator, **kind)
        self.innovations = torch.full((8,), 0.1, **kind)
        self.reader = Reader(triangle_bytes(plan), on.device)
        self.providers, self.failed = {}, []
        for name, make in named.items():
            try:
                self.providers[name] = self.made(name, make, plan)
                self.check(name)
            except Exception as error:  # the others continue
                self.providers.pop(name, None)
                if not self.providers:  # nothing to agree with
                    raise
                self.failed.append(f"{name}: {type(error).__name__}: {error}")
        self.replays = {}
        if isinstance(on, Gpu):
            mine = {name: p for name, p in self.providers.items() if isinstance(p, Ours)}
            self.replays = {name: on.captured(self.step(provider)) for name, provider in mine.items()}
        for turn in range(rounds):
            self.round()
            print(f"  round {turn + 1} of {rounds}", file=sys.stderr, flush=True)

    def made(self, name: str, make: type[Provider], plan: BlockPlan) -> Provider:
        """A provider after three steps; on a GPU, the memory that it took at most."""
        cuda = self.on.cuda if isinstance(self.on, Gpu) else None
        if cuda:
            cuda.synchronize()
            cuda.reset_peak_memory_stats()
            before = cuda.memory_allocated()
        provider = make(plan, self.on.device)
        for jacobian in self.jacobians[:3]:
            provider.step(jacobian, self.innovations[0])
        if cuda:
            cuda.synchronize()
            self.peaks[name] = cuda.max_memory_allocated() - before
        return provider

    def check(self, name: str) -> None:
        """Raises ValueError unless its weights are those of the first provider, one of ours if there is one."""
        first, *_ = self.providers
        wanted, found = (self.providers[one].weights for one in (first, name))
        error, allowed = float((found - wanted).abs().max() / wanted.abs().max()), 1e-10
        if "float32" in name + first:
            allowed = 1e-5
        if not error < allowed:
            raise ValueError(
                f"It should agree with {first} to {allowed} of the largest weight but is off by {error:.1e}."
            )

    def step(self, provider: Provider) -> Callable[[], None]:
        """One measurement, with a different Jacobian each time."""
        turns = itertools.cycle(self.jacobians)
        return lambda: provider.step(next(turns), self.innovations[0])

    def round(self) -> None:
        self.samples["read", "step"] += [self.reader.seconds(self.on) for _ in range(5)]
        for name, provider in self.providers.items():
            time.sleep(self.on.rest)
            if not isinstance(provider, Ours):
                times = self.on.times(self.step(provider), self.on.samples)
                self.samples[name, "step"].append(statistics.mean(times))
                continue
            self.cycle(name, "step", self.step(provider))
            if name in self.replays:
                self.cycle(name, "step in a graph", self.replays[name])
            for m in self.on.counts:
                many = lambda p=provider, m=m: p.step(self.jacobians[:m], self.innovations[:m])  # noqa: E731
                mean = statistics.mean(self.on.times(many, CYCLE // m))
                self.samples[name, f"step of {m} measurements"].append(mean)

    def cycle(self, name: str, metric: str, step: Callable[[], object]) -> None:
        """As many steps as have one fold: the longest step."""
        *others, fold = sorted(self.on.times(step, CYCLE))
        self.samples[name, metric].append(statistics.mean([*others, fold]))
        self.samples[name, f"{metric} without fold"] += others
        self.samples[name, f"{metric} with fold"].append(fold)


def peak_bytes(case: str, name: str) -> int:
    """Growth of the resident memory of a new process that makes a provider on the CPU and does three steps."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import cases, providers, torch\n"
        "read = lambda key: next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith(key)) * 1024\n"
        "plan = cases.CASES[sys.argv[2]]; h = torch.ones(plan.num_weights, dtype=torch.float64)\n"
        "make, e = providers.providers('cpu')[0][sys.argv[3]], torch.tensor(0.1, dtype=torch.float64)\n"
        "before = read('VmRSS'); p = make(plan, h.device); [p.step(h, e) for _ in range(3)]\n"
        "print(read('VmHWM') - before)"
    )
    arguments = [sys.executable, "-c", code, str(Path(__file__).parent), case, name]
    return int(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)


def groups(need: Mapping[str, float], room: float) -> tuple[list[list[str]], list[str]]:
    """Which providers share a run (the first with as many others as fit), and which do not fit at all."""
    first, *others = need
    if need[first] > room:
        return [], list(need)
    sets, left_out = [[first]], []
    for name in others:
        if need[first] + need[name] > room:
            left_out.append(name)
        elif sum(need[one] for one in sets[-1]) + need[name] > room:
            sets.append([first, name])
        else:
            sets[-1].append(name)
    return sets, left_out


def rows_of(case: str, named: Named, on: Cpu, rounds: int) -> Iterator[dict[str, object]]:
    plan = CASES[case]
    need = {name: named[name].num_bytes(plan) for name in sorted(named, key=lambda n: not issubclass(named[n], Ours))}
    room = on.room * available_bytes(on.device) - min(BUFFER_BYTES, triangle_bytes(plan))
    sets, left_out = groups(need, room)
    failed = []

    def row(provider: str, metric: str, unit: str, values: list[float]) -> dict[str, object]:
        spread = {"value": statistics.median(values), "min": min(values), "max": max(values)} if values else {}
        spread = {key: f"{value:.6g}" for key, value in spread.items()}
        return {"case": case, "provider": provider, "metric": metric, "unit": unit, "samples": len(values), **spread}

    for together in sets:
        run = Run(plan, {name: named[name] for name in together}, on, rounds)
        suffix = "" if len(sets) == 1 else f", beside {together[-1]}"
        for (provider, metric), values in run.samples.items():
            yield row(provider, metric + suffix, "ms", [1e3 * value for value in values])
        report(case, run, triangle_bytes(plan))
        peaks = run.peaks
        if case == MEMORY_CASE and not peaks:
            peaks = {name: peak_bytes(case, name) for name in run.providers}
        failed += run.failed
        for name in run.providers:
            yield row(name, "bytes", "B", [need[name]])
            if name in peaks:
                print(f"  {name:<15}peak memory {peaks[name] / triangle_bytes(plan):.3f} times the packed triangle")
                yield row(name, "peak memory", "B", [peaks[name]])
        del run
        on.free()
    for name in left_out:
        yield row(name, f"does not fit: {need[name] / 1e9:.1f} GB", "", [])
    if failed:
        raise RuntimeError("; ".join(failed))


def report(case: str, run: Run, num_bytes: int) -> None:
    median = {key: statistics.median(values) for key, values in run.samples.items()}
    read = median.pop(("read", "step"))
    blas = [value for (name, _), value in median.items() if name.endswith(("symv", "spmv"))]
    print(f"{case}: read {num_bytes / read / 1e9:.1f} GB/s, limit {1e3 * read:.4g} ms (float64)")
    for (name, metric), value in median.items():
        limit = read / 2 if "float32" in name else read
        line = f"  {name:<15}{metric:<29}{1e3 * value:10.4g} ms{100 * limit / value:6.0f} % of limit"
        if ("naive", "step") in median:
            line += f"{median['naive', 'step'] / value:8.1f} x naive"
        print(line + (f"{min(blas) / value:7.2f} x best BLAS" if blas else ""), flush=True)


def measure(on: Cpu, cases: Sequence[str], named: Named, rounds: int, output: Path) -> list[str]:
    """Append the rows of all cases. Returns the cases that failed."""
    columns = ["case", "provider", *(["huge_pages"] if on.device.type == "cpu" else []), "metric", "unit"]
    columns += ["value", "min", "max", "samples", *on.where, "version", "commit"]
    common = {key: value for key, value in {**machine(output), **on.facts()}.items() if key in columns}
    print(", ".join(f"{key} {value}" for key, value in common.items()), flush=True)
    failed = []
    for case in cases:
        try:
            append(output, columns, ({**row, **common} for row in rows_of(case, named, on, rounds)))
        except Exception as error:  # a GPU may not be free again soon: the other cases continue
            print(f"{case} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            failed.append(case)
        on.free()
    return failed


def main() -> None:
    names = dict.fromkeys(name for device in ("cpu", "cuda") for some in providers(device) for name in some)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--case", nargs="+", choices=list(CASES))
    parser.add_argument("--provider", nargs="+", choices=list(names), default=list(names))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path)
    parser.add_argument("--huge-pages", choices=["off", "on", "both"], default="both", help="for torch on a CPU")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda needs a GPU that torch sees.")
    if given.device == "cpu" and given.huge_pages == "both":  # the setting is read once, when torch starts
        for value in ("off", "on"):
            # KMP_BLOCKTIME: otherwise MKL's threads spin after their work, on the cores of the next provider.
            environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": str(int(value == "on")), "KMP_BLOCKTIME": "0"}
            subprocess.run([sys.executable, *sys.argv, "--huge-pages", value], env=environment, check=True)
        return
    torch.set_num_threads(given.threads)
    found, absent = providers(given.device)
    for name, reason in absent.items():
        print(f"left out: {name}: {reason}")
    on = Gpu() if given.device == "cuda" else Cpu()
    named = {name: kind for name, kind in found.items() if name in given.provider}
    if failed := measure(on, given.case or on.cases, named, given.rounds, given.output or on.output):
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
