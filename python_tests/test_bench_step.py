"""The benchmark of a step: its providers agree, and its way of timing a GPU, on a stand-in for torch.cuda."""

import csv
import itertools

import bench_step
import pytest
import torch
from providers import CYCLE, Naive, Ours, Torch, providers

from rlekf_ext import BlockPlan

PLAN = BlockPlan((70, 1, 33))
CPU = torch.device("cpu")
NAMED = {"naive": Naive, "cuda float64": Ours}


class StandIn:
    """torch.cuda of a GPU whose clock advances by 1 ms at every event; `log` is what was called."""

    def __init__(self):
        self.log, clock = [], itertools.count()
        log = self.log

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                log.append("event")
                self.time = next(clock)

            def synchronize(self):
                log.append("wait")

            def elapsed_time(self, later):
                return later.time - self.time

        class CUDAGraph:
            def replay(self):
                log.append("replay")

        class Graph:
            def __init__(self, graph):
                log.append("capture")

            __enter__ = __exit__ = lambda *_: None

        self.Event, self.CUDAGraph, self.graph = Event, CUDAGraph, Graph

    def _sleep(self, cycles):
        self.log.append("sleep")

    def memory_allocated(self):
        return 100

    def max_memory_allocated(self):
        return 1100

    def synchronize(self):
        pass

    reset_peak_memory_stats = empty_cache = synchronize

    def get_device_properties(self, device):
        return type("Properties", (), {"name": "stand-in"})


@pytest.fixture
def gpu():
    on = bench_step.Gpu(StandIn())
    on.device = CPU
    return on


@pytest.mark.parametrize("name", [name for name in providers("cpu")[0] if name != "ours float64"])
def test_providers_agree(name):
    known, _ = providers("cpu")
    source = torch.Generator().manual_seed(0)
    jacobians = torch.randn(40, PLAN.num_weights, generator=source, dtype=torch.float64)
    both = [known[one](PLAN, CPU) for one in (name, "ours float64")]
    for jacobian in jacobians:
        for provider in both:
            provider.step(jacobian, torch.tensor(0.1, dtype=torch.float64))
    error = (both[0].weights - both[1].weights).abs().max() / both[1].weights.abs().max()
    assert error < (1e-6 if "float32" in name else 1e-13)


def test_every_provider_of_a_gpu_is_there_or_has_a_reason():
    found, absent = providers("cuda")
    assert {*found, *absent} == {
        *("naive", "torch", "cublas symv", "cublas spmv"),
        *("cuda float64", "cuda float32", "triton float64", "triton float32"),
    }
    assert all(absent.values())


def test_the_gpu_sleeps_until_all_steps_are_launched(gpu):
    times = gpu.times(lambda: gpu.cuda.log.append("step"), 3)
    assert gpu.cuda.log == ["sleep", "event", *["step", "event"] * 3, "wait"]
    assert times == pytest.approx([1e-3] * 3)


def test_a_run_on_a_gpu(gpu):
    run = bench_step.Run(PLAN, NAMED, gpu, rounds=2)
    ours = {metric for name, metric in run.samples if name == "cuda float64"}
    kinds = ("", " with fold", " without fold")
    assert ours == {f"step{graph}{kind}" for graph in ("", " in a graph") for kind in kinds} | {
        f"step of {m} measurements" for m in (2, 4, 8)
    }
    assert len(run.samples["cuda float64", "step without fold"]) == 2 * (CYCLE - 1)
    assert len(run.samples["naive", "step"]) == 2
    assert gpu.cuda.log.count("capture") == 1
    assert run.peaks == {"naive": 1000, "cuda float64": 1000}
    # Besides the timed cycles, three steps at first and one that was captured: whole cycles fold once.
    assert run.providers["cuda float64"].filter.health()["num_updates"] == 4 + 2 * 4 * CYCLE


def test_the_longest_step_of_a_cycle_is_the_fold():
    on = bench_step.Cpu()
    run = bench_step.Run(PLAN, {"ours float64": Ours}, on, rounds=0)
    on.times = lambda call, count: [1.0] * 10 + [33.0] + [1.0] * (count - 11)
    run.cycle("ours", "step", lambda: None)
    assert run.samples["ours", "step"] == [2.0]
    assert run.samples["ours", "step with fold"] == [33.0]
    assert run.samples["ours", "step without fold"] == [1.0] * (CYCLE - 1)


def test_much_is_read_in_pieces(monkeypatch, gpu):
    monkeypatch.setattr(bench_step, "BUFFER_BYTES", 1000)
    reader = bench_step.Reader(4000, CPU)
    assert (reader.passes, len(reader.data)) == (4, 125)
    assert reader.seconds(gpu) == pytest.approx(4e-3)
    assert gpu.cuda.log.count("sleep") == 3  # dot, sum and max
    assert float(reader.data.sum()) == 125
    for num_bytes in (8, 1008, 2000):
        reader = bench_step.Reader(num_bytes, CPU)
        assert num_bytes <= 8 * reader.passes * len(reader.data) < num_bytes + 8 * reader.passes


def test_providers_that_do_not_fit_together_take_turns():
    need = {"ours": 10, "naive": 30, "torch": 20, "symv": 20, "spmv": 5}
    assert bench_step.groups(need, 100) == ([list(need)], [])
    assert bench_step.groups(need, 35) == ([["ours", "torch"], ["ours", "symv", "spmv"]], ["naive"])
    assert bench_step.groups(need, 5) == ([], list(need))


class Greedy(Torch):
    def block(self, n, device):
        if n == 64:
            raise torch.OutOfMemoryError("no memory left")
        return super().block(n, device)


class Wrong(Torch):
    def forget(self):
        pass


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_fails_does_not_stop_the_others(device, monkeypatch, gpu, tmp_path, capsys):
    class Late(Ours):
        """Fails for a case in which the others need it."""

        def __init__(self, plan, device):
            if plan.sizes == (30,):
                raise RuntimeError("no kernel")
            super().__init__(plan, device)

    cases = {"small": BlockPlan((20, 3)), "large": BlockPlan((64,)), "odd": BlockPlan((30,)), "last": BlockPlan((9,))}
    monkeypatch.setattr(bench_step, "CASES", cases)
    on, output = bench_step.Cpu() if device == "cpu" else gpu, tmp_path / "rows.csv"
    named = {"naive": Naive, "greedy": Greedy, "ours": Late}
    assert bench_step.measure(on, list(cases), named, 1, output) == ["large", "odd"]
    said = capsys.readouterr().err
    assert "large failed: RuntimeError: greedy: OutOfMemoryError: no memory left" in said
    assert "odd failed: RuntimeError: no kernel" in said
    with output.open() as file:
        rows = list(csv.DictReader(file))
    names = {case: {row["provider"] for row in rows if row["case"] == case} for case in cases}
    everyone = {"read", *named}
    assert names == {"small": everyone, "large": everyone - {"greedy"}, "odd": set(), "last": everyone}
    assert all(float(row["value"]) > 0 for row in rows)


def test_a_provider_that_disagrees_is_left_out():
    run = bench_step.Run(PLAN, {"ours": Ours, "wrong": Wrong}, bench_step.Cpu(), rounds=0)
    assert list(run.providers) == ["ours"]
    assert run.failed[0].startswith("wrong: ValueError: It should agree with ours to 1e-10")


def test_rows_of_the_cpu_have_the_columns_of_those_that_are_there(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_step, "CASES", {"small": BlockPlan((20, 3))})
    bench_step.measure(bench_step.Cpu(), ["small"], {"ours float64": Ours}, 1, tmp_path / "rows.csv")
    headers = [path.read_text().splitlines()[0] for path in (tmp_path / "rows.csv", bench_step.Cpu.output)]
    assert headers[0] == headers[1]
