"""The CUDA sources compile for every supported architecture, without a spilled register. Needs nvcc but no GPU."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CUDA = Path(__file__).resolve().parents[1] / "csrc/cuda"
COUNTS = 1, 2, 4, 8  # of measurements, for which there is a kernel each
KERNELS = {
    "step": {("filter_step", scalar, count) for scalar in "df" for count in COUNTS},
    "part": {("multiply_tiles", scalar, count) for scalar in "df" for count in COUNTS}
    | {("finish_projection", "", count) for count in COUNTS},
    "network": {("network", scalar, phase) for scalar in "df" for phase in range(8)},
}
INSTANCES = {
    "step": r"rlekf_([a-z_]+)I([df]?)Li(\d)E",
    "part": r"rlekf_([a-z_]+)I([df]?)Li(\d)E",
    "network": r"rlekf_(network)ILNS0_5PhaseE(?=\dE([df]))(\d)E",
}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", [pytest.param(80, marks=pytest.mark.soak), 90])
@pytest.mark.parametrize("source", KERNELS)
def test_no_register_is_spilled(tmp_path, source, architecture, record_property):
    command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-Xptxas=-v", "-cubin", "-o", "kernels.cubin"]
    command += [f"-DRLEKF_CUDA_ARCHITECTURES={architecture}", str(CUDA / f"{source}.cu")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pattern = INSTANCES[source] + r".*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    found = re.findall(pattern, done.stderr, re.DOTALL)
    assert {(name, scalar, int(count)) for name, scalar, count, *_ in found} == KERNELS[source]
    for name, scalar, number, stores, loads, registers in found:
        which = f"{name} {scalar} {'phase' if source == 'network' else 'M ='} {number}"
        record_property(f"registers, {which}", int(registers))
        print(f"sm_{architecture} {which}: {registers} registers, {stores} + {loads} bytes spilled")
        assert (int(stores), int(loads)) == (0, 0), f"{which} spills"
        # Two thread blocks of 256 threads share 65 536 registers if the launch plan counts on it.
        assert int(registers) <= (128 if source == "network" or int(number) <= 2 else 255)
