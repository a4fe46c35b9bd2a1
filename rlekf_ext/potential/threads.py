"""How many threads train: as many as there is work for, since waking one takes some 60 µs.

An update of the network and a step of the filter wake them a few times each, for work of different size. So each has
its own number. The constants lie between sizes at which two threads were not faster than one and sizes at which they
were, on 2 cores of an AMD EPYC with OMP_WAIT_POLICY=passive.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rlekf_ext.potential.model import DeepPotential
from rlekf_ext.potential.optimizers import AdamSteps, KalmanSteps
from rlekf_ext.processes import ALONE, Processes

NETWORK_PER_THREAD = 2.5e6  # atoms evaluated at once, times the weights of the net of an atom
BYTES_PER_THREAD = 32e6  # of P


def use_threads(
    optimize: KalmanSteps | AdamSteps,
    model: DeepPotential,
    num_atoms: Sequence[int] | np.ndarray,
    num_batches: int,
    most: int,
    processes: Processes = ALONE,
) -> str:
    """Set how many threads train on frames of these numbers of atoms in this many batches per epoch: each number of
    threads is at most `most`, and the same on all processes. Returns a sentence that gives them."""
    own = optimize.optimizer.filter if isinstance(optimize, KalmanSteps) else None
    apart = isinstance(optimize, KalmanSteps) and optimize.updater.options.batch == "joint"
    atoms = float(np.sum(num_atoms)) / (len(num_atoms) if apart else num_batches * processes.size)
    weights = sum(p.numel() for p in model.parameters()) / len(model.type_map)
    network = worth(atoms * weights / NETWORK_PER_THREAD, most, processes)
    torch.set_num_threads(network)
    of_filter = ""
    if own:
        own.threads = worth(own.covariance.num_bytes / BYTES_PER_THREAD, most, processes)
        of_filter = f", {own.threads} for P"
    return (
        f"Threads: {network} for the network{of_filter}; this process may use {most}. OMP_NUM_THREADS or --threads "
        "changes that."
    )


def worth(threads: float, most: int, processes: Processes = ALONE) -> int:
    """A whole number of threads from 1 to `most`, the smallest of all processes."""
    return min(min(row) for row in processes.gather([max(1, min(int(threads), most))]))
