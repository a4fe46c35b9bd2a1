"""What only the triton backend has: its loops and workspaces, kernels that compile without a GPU, absence."""

import gc
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracles import relative
from test_ops import assert_same, random_measurements, run

from rlekf_ext import BlockPlan, KalmanFilter, ops

triton = pytest.importorskip("triton", reason="needs triton: pip install 'rlekf_ext[triton]'")
ours = ops.backend("triton", torch.device("cpu"))


@pytest.mark.parametrize("count", [1, 3])
def test_every_loop_goes_round(count, monkeypatch):
    """Sizes that the interpreter can handle fit into one turn of most loops, unless a turn covers less."""
    for name, value in {"RUN": 2, "VECTORS": 2, "CHUNK": 32, "PARTS": 4, "BLOCKS": 2}.items():
        monkeypatch.setattr(ours, name, triton.language.constexpr(value))
    result = run(BlockPlan((330, 1, 70, 2, 1)), steps=3, count=count, max_pending=5, backend="triton")
    assert_same(*result, 1e-12)


def test_more_tiles_in_a_row_than_a_run():
    result = run(BlockPlan((600,)), steps=3, count=2, max_pending=3, backend="triton")
    assert_same(*result, 1e-12)


@pytest.mark.parametrize("scale", [3.7e15, 2.0**41, 2.0**40, 1e300])
def test_large_scale_moves_into_the_tiles_as_in_the_compiled_ops(scale):
    kept = []
    for name in ("native", "triton"):
        torch.manual_seed(1)
        kalman, *_ = run(BlockPlan((70,)), steps=2, max_pending=2, process_noise=1e-3, oracle=False, backend=name)
        p = kalman.covariance
        p.set(scale=scale)
        ops.backend(name, p.tiles.device).project(p, random_measurements(1, 70)[0])
        kept.append(p)
    native, mine = kept
    assert relative(mine.tiles, native.tiles) < 1e-14
    wanted, got = native.scalars(), mine.scalars()
    assert got.scale == wanted.scale <= 2.0**40
    assert got.num_pending == 0
    assert got.shift == pytest.approx(wanted.shift, rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_same_bits_whatever_the_workspaces_held(dtype, monkeypatch):
    results = []
    for fill in (0.0, math.nan, math.inf):
        torch.manual_seed(1)
        empty = torch.empty
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", lambda *shape, fill=fill, empty=empty, **o: empty(*shape, **o).fill_(fill))
            kalman, weights, *_ = run(
                BlockPlan((130, 3)),
                steps=4,
                count=3,
                max_pending=5,
                oracle=False,
                covariance_dtype=dtype,
                backend="triton",
            )
        p = kalman.covariance
        results.append((weights, p.tiles, p.pending, p.state))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("bad", [0, 1, 2])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_one_bad_measurement_leaves_the_others_as_the_compiled_ops_do(bad):
    """Also a bad one before good ones: none of its NaN reaches them."""
    kept = []
    for name in ("native", "triton"):
        torch.manual_seed(1)
        kalman, weights, *_ = run(BlockPlan((70, 3)), steps=1, max_pending=7, oracle=False, backend=name)
        h, e = random_measurements(3, 73)
        h[bad, 71] = math.nan
        weights += kalman.update(h, e)
        kept.append((kalman.covariance, weights))
    (native, wanted), (mine, weights) = kept
    assert relative(weights, wanted) < 1e-14
    assert relative(mine.pending, native.pending) < 1e-14
    assert mine.scalars().skipped_jacobian == 1
    torch.testing.assert_close(mine.state, native.state, rtol=1e-13, atol=0)


def test_work_is_planned_once_for_a_layout():
    covariance = KalmanFilter(BlockPlan((70, 3)), backend="triton").covariance
    before = len(ours._work_of_layout)
    assert ours._work(covariance.layout, 4) is ours._work(covariance.layout, 4)
    assert len(ours._work_of_layout) == before + 1
    del covariance
    gc.collect()
    assert len(ours._work_of_layout) == before


def test_autograd_sees_what_changed():
    p, weights = KalmanFilter(BlockPlan((70, 3)), backend="triton").covariance, torch.zeros(73, dtype=torch.float64)
    changed = {"weights": weights, "tiles": p.tiles, "pending": p.pending, "state": p.state}
    before = {name: tensor._version for name, tensor in changed.items()}
    h, e = random_measurements(2, 73)
    ours.step(p, weights, h, e)
    assert all(tensor._version > before[name] for name, tensor in changed.items())


def outside_the_interpreter(*command):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("dtype", "count"), [("float64", 1), ("float32", 1), ("float64", 8)])
def test_kernels_compile_without_a_gpu(dtype, count):
    try:
        tools = triton.knobs.nvidia.ptxas.path, triton.knobs.nvidia.cuobjdump.path
    except RuntimeError as missing:
        pytest.skip(f"needs the CUDA tools that triton brings: {missing}")
    assert all(Path(tool).is_file() for tool in tools)
    out = outside_the_interpreter(str(Path(__file__).parent / "compile_triton.py"), dtype, str(count))
    kernels = {row["kernel"]: row for row in map(json.loads, out.splitlines())}
    assert set(kernels) == {"_visit", "_reduce", "_gather", "_update", "_apply"}
    for name, row in kernels.items():
        assert row["STACK"] == 0 or (name == "_visit" and count > 4), f"{name} spills registers: {row}"


def test_cpu_needs_the_interpreter():
    code = "import torch; from rlekf_ext.ops import triton; print(triton.why_absent('cpu'))"
    assert "set TRITON_INTERPRET=1 before triton is imported" in outside_the_interpreter("-c", code)


def test_absent_package_is_an_error_with_its_reason(monkeypatch):
    monkeypatch.setattr(ops, "find_spec", lambda name: None)
    assert "pip install 'rlekf_ext[triton]'" in ops.backends()["triton"]
    with pytest.raises(RuntimeError, match=r"triton is not installed.* backend='reference' runs anywhere"):
        ops.backend("triton", torch.device("cpu"))
    monkeypatch.setattr(ops.native, "why_absent", lambda device_type: "left out of this build.")
    with pytest.raises(RuntimeError, match=r"native backend has no kernels for cuda.*triton is not installed"):
        ops.backend("auto", torch.device("cuda"))
