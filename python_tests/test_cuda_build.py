"""The CUDA sources compile for every supported architecture, without a spilled register. Needs nvcc but no GPU."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CUDA = Path(__file__).resolve().parents[1] / "csrc/cuda"
KERNELS = {
    "step": {("filter_step", scalar, count) for scalar in "df" for count in (1, 2, 4, 8)},
    "part": {("multiply_tiles", scalar, count) for scalar in "df" for count in (1, 2, 4, 8)}
    | {("finish_projection", "", count) for count in (1, 2, 4, 8)},
}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", [pytest.param(80, marks=pytest.mark.soak), 90])
@pytest.mark.parametrize("source", KERNELS)
def test_no_register_is_spilled(tmp_path, source, architecture, record_property):
    command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-Xptxas=-v", "-cubin", "-o", "kernels.cubin"]
    command += [f"-DRLEKF_CUDA_ARCHITECTURES={architecture}", str(CUDA / f"{source}.cu")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pattern = (
        r"rlekf_([a-z_]+)I([df]?)Li(\d)E.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    found = re.findall(pattern, done.stderr, re.DOTALL)
    assert {(name, scalar, int(count)) for name, scalar, count, *_ in found} == KERNELS[source]
    for name, scalar, count, stores, loads, registers in found:
        record_property(f"registers, {name} {scalar} {count}", int(registers))
        print(f"sm_{architecture} {name} {scalar} M = {count}: {registers} registers, {stores} + {loads} bytes spilled")
        assert (int(stores), int(loads)) == (0, 0), f"M = {count} spills"
        # Two thread blocks of 256 threads share 65 536 registers if the launch plan counts on it.
        assert int(registers) <= (128 if int(count) <= 2 else 255)
