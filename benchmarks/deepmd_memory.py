"""The memory of P for DeePMD-kit's networks: the table of docs/deepmd.md. No P is made."""

from __future__ import annotations

import torch

from rlekf_ext.covariance import required_bytes
from rlekf_ext.partition import partition
from rlekf_ext.potential.model import DeepPotential

NETWORKS = (
    ("small: [25, 25, 25] / [50, 50, 50]", [25, 25, 25], 16, [50, 50, 50], False, False),
    ("DeePMD-kit's water example: [25, 50, 100] / [240, 240, 240]", [25, 50, 100], 16, [240, 240, 240], True, False),
)


def main() -> None:
    print("| network, two elements | weights | N_b | dense, LKF | ours, float64 | ours, float32 |")
    print("|---|---|---|---|---|---|")
    for name, neuron, axis, fitting, resnet_dt, one_side in NETWORKS:
        model = DeepPotential(
            {
                "type_map": ["O", "H"],
                "descriptor": {"sel": [46, 92], "neuron": neuron, "axis_neuron": axis, "type_one_side": one_side},
                "fitting_net": {"neuron": fitting, "resnet_dt": resnet_dt},
            }
        )
        sizes = [p.numel() for p in model.parameters()]
        for block_size in (1024, 5120, 10240):
            dense = sum(8 * n**2 for n in partition(sizes, block_size, "deepmd").sizes)
            plan = partition(sizes, block_size)
            ours = [required_bytes(plan, dtype=dtype) for dtype in (torch.float64, torch.float32)]
            columns = [f"{n / 1e9:.2f} GB" for n in (dense, *ours)]
            print(f"| {name} | {sum(sizes)} | {block_size} | {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
