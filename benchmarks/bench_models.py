"""The memory of P for energy models of DeePMD-kit in their default sizes, two elements, as rows.

Runs in the environment of `make test-deepmd`:

    .venv-deepmd/bin/python benchmarks/bench_models.py

Rows go to results/deepmd_models.csv: trained weights and bytes of P in float64.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from rows import MACHINE, append, machine

from rlekf_ext.covariance import required_bytes
from rlekf_ext.partition import partition

RESULTS = Path(__file__).resolve().parent / "results/deepmd_models.csv"
COLUMNS = ("model", "weights", "block_size", "bytes", *MACHINE)
BLOCK_SIZES = 1024, 5120
CUTOFF = {"rcut": 6.0, "rcut_smth": 0.5}
ANGULAR = {"type": "se_e2_a", "sel": [46, 92], "neuron": [25, 50, 100], "axis_neuron": 16, **CUTOFF}
RADIAL = {"type": "se_e2_r", "sel": [46, 92], "neuron": [25, 50, 100], **CUTOFF}
ATTENTION = {"type": "dpa1", "sel": 120, **CUTOFF}
REPFLOW = {"e_sel": 120, "e_rcut": 6.0, "e_rcut_smth": 5.3, "a_sel": 40, "a_rcut": 4.0, "a_rcut_smth": 3.5}
DESCRIPTORS: dict[str, dict[str, Any]] = {
    "se_e2_a": ANGULAR,
    "se_e2_r": RADIAL,
    "se_e3": {"type": "se_e3", "sel": [20, 40], "neuron": [2, 4, 8], **CUTOFF},
    "hybrid of se_e2_a and se_e2_r": {"type": "hybrid", "list": [ANGULAR, RADIAL]},
    "dpa1, attn_layer 0": {**ATTENTION, "attn_layer": 0},
    "dpa1, attn_layer 2": {**ATTENTION, "attn_layer": 2},
    "dpa2": {
        "type": "dpa2",
        "repinit": {"nsel": 120, **CUTOFF},
        "repformer": {"nsel": 40, "rcut": 4.0, "rcut_smth": 0.5},
    },
    "dpa3": {"type": "dpa3", "repflow": REPFLOW},
}


def sizes_of(descriptor: dict[str, Any]) -> list[int]:
    """The numbers of weights of the trained parameters."""
    from deepmd.pt.model.model import get_model
    from deepmd.utils.argcheck import normalize

    config = {
        "model": {"type_map": ["O", "H"], "descriptor": descriptor, "fitting_net": {"neuron": [240, 240, 240]}},
        "learning_rate": {"type": "exp", "start_lr": 1e-3, "stop_lr": 1e-8},
        "loss": {"type": "ener"},
        "training": {"training_data": {"systems": ["none"]}, "numb_steps": 1},
    }
    model = get_model(normalize(copy.deepcopy(config))["model"])
    return [p.numel() for p in model.parameters() if p.requires_grad and p.numel()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    where = machine(given.output)
    for name, descriptor in DESCRIPTORS.items():
        sizes = sizes_of(descriptor)
        for block_size in BLOCK_SIZES:
            size = required_bytes(partition(sizes, block_size), dtype=torch.float64)
            row = {"model": name, "weights": sum(sizes), "block_size": block_size, "bytes": size, **where}
            append(given.output, COLUMNS, [row])
            print(name, sum(sizes), block_size, f"{size / 1e9:.2f} GB", flush=True)


if __name__ == "__main__":
    main()
