"""A few steps on a GPU and nothing else, for compute-sanitizer and ncu: small blocks, or with --paper the paper's.
Then a few measurements of the network."""

import sys

import torch
from gpu_smoke import frame_of, model_on

from rlekf_ext import BlockPlan, KalmanFilter

paper = "--paper" in sys.argv
plan = BlockPlan((1350, 10240, 9810, 5151) if paper else (130, 1, 65, 300))
for dtype in (torch.float64, torch.float32):
    for count in (1,) if paper else (1, 2, 3, 8):
        kalman = KalmanFilter(
            plan, covariance_dtype=dtype, max_pending=32 if paper else 9, backend="native", device="cuda"
        )
        weights = torch.zeros(plan.num_weights, dtype=torch.float64, device="cuda")
        for _ in range(40 if paper else 12):
            h = torch.randn(count, plan.num_weights, dtype=torch.float64, device="cuda")
            weights += kalman.update(h, torch.ones(count, dtype=torch.float64, device="cuda"))
        assert weights.isfinite().all()
frame = frame_of(0)
on_table = model_on(torch.device("cuda"), [frame]).prepared(frame)
for _ in range(3):
    for group in (None, torch.arange(16, device="cuda")):
        _, jacobian = on_table.measure([("energy" if group is None else "force", group)])
        assert jacobian.isfinite().all()
torch.cuda.synchronize()
