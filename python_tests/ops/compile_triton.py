"""Compile the triton kernels for an H100 or H200, as one step launches them; needs no GPU. Prints rows of JSON.

python python_tests/ops/compile_triton.py float64 1      # storage of the tiles, measurements
"""

import json
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rlekf_ext import BlockPlan
from rlekf_ext.covariance import identity
from rlekf_ext.ops import triton as ours

POINTERS = {torch.float64: "*fp64", torch.float32: "*fp32", torch.int64: "*i64"}


def compile_launch(kernel, *args, grid, warmup, num_warps=4, **constants):
    """Called instead of a launch."""
    values = dict(zip(kernel.arg_names, args, strict=False))
    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    signature |= {name: POINTERS[v.dtype] if isinstance(v, torch.Tensor) else "i32" for name, v in values.items()}
    aligned = [i for i, name in enumerate(kernel.arg_names) if isinstance(values.get(name), torch.Tensor)]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    row = {key: int(number) for key, number in re.findall(r"(REG|STACK):(\d+)", usage)}
    print(json.dumps({"kernel": kernel.__name__, **row, "shared": compiled.metadata.shared, "warps": num_warps}))


def main(dtype, count):
    triton.JITFunction.run = compile_launch
    p = identity(BlockPlan((70, 3)), dtype=getattr(torch, dtype))
    h, e = torch.zeros(int(count), 73, dtype=torch.float64), torch.zeros(int(count), dtype=torch.float64)
    ours.step(p, torch.zeros(73, dtype=torch.float64), h, e)


if __name__ == "__main__":
    main(*sys.argv[1:])
