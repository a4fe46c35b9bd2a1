"""What a training does to each kind of layer, as rows: how far its weights move, and how sure the filter is of them.

    python benchmarks/bench_layers.py [--systems H2O LiGePS] [--network paper] [--data DIR]

A row is a kind of layer after an epoch (0: before the first batch), over all nets that have it. `size`: RMS of its
weights at the start. `moved`: RMS of what they have moved by. `variance`: mean of the diagonal of P. `energy` and
`force`: HᵀPH of its weights, in units of the squared mean error, the mean over some training frames; `gain`: the RMS of
P H for forces. The last four are of the filter alone. Sixty training frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from bench_training import ROOT, SYSTEMS, Run, asked, config_of, load, method_of
from rows import MACHINE, append, machine
from torch import Tensor

from rlekf_ext.potential.model import DeepPotential
from rlekf_ext.updates import FrameUpdater

RESULTS = ROOT / "benchmarks/results/layers.csv"
MEASURED = ("size", "moved", "variance", "energy", "force", "gain")
COLUMNS = ("system", "network", "method", "epoch", "layer", "weights", *MEASURED, *MACHINE)
METHODS = {"four groups": 4, "R = L, P_0 = I": 4, "Adam 2e-3": 100}  # and their epochs
FRAMES = 60
SAMPLED = 6  # frames of which HᵀPH is taken


def kinds_of(model: DeepPotential) -> dict[str, list[slice]]:
    """The weights of each kind of layer, in the order of the filter."""
    found: dict[str, list[slice]] = {}
    first = 0
    for name, p in model.named_parameters():
        net, layer = ("fitting" if "fittings" in name else "embedding"), name.split(".")[-2]
        found.setdefault(f"{net} {layer}", []).append(slice(first, first + p.numel()))
        first += p.numel()
    return found


def flat(model: DeepPotential) -> Tensor:
    """The weights, each tensor with its dimensions reversed, as in the filter."""
    return torch.cat([p.detach().double().permute(*range(p.dim())[::-1]).reshape(-1) for p in model.parameters()])


def variances(updater: FrameUpdater, run: Run) -> dict[str, Tensor]:
    """H P H of each weight, mean over frames, for energies and forces, and (P H)² for forces: (N,) each."""
    some = run.training[:: -(-len(run.training) // SAMPLED)]
    whole = {"energy": [], "force": [], "gain": []}
    for frame in some:
        atoms = torch.arange(0, len(frame.types), updater.options.num_groups)
        errors, jacobians = updater._of_frame(frame, [("energy", None), ("force", atoms)])
        h = jacobians / errors[:, None]
        for kind, one in zip(("energy", "force"), h, strict=True):
            ph = gain(updater, one)
            whole[kind].append(one * ph)
        whole["gain"].append(ph.square())
    return {name: torch.stack(values).mean(0) for name, values in whole.items()}


def gain(updater: FrameUpdater, h: Tensor) -> Tensor:
    """P H (N,), without changing P."""
    filter_ = updater.optimizer.filter
    return filter_.covariance.scale * filter_._projector()(h[None])[0][0]


def measured(run: Run, start: Tensor, kinds: dict[str, list[slice]]) -> Iterator[dict[str, Any]]:
    moved, updater = flat(run.model) - start, getattr(run.optimize, "updater", None)
    of_filter = {}
    if updater:
        of_filter = {**variances(updater, run), "variance": updater.optimizer.filter.covariance.diagonal()}
    for kind, places in kinds.items():

        def here(values: Tensor, places: list[slice] = places) -> Tensor:
            return torch.cat([values[place] for place in places])

        row = {"layer": kind, "weights": len(here(start))}
        row["size"], row["moved"] = here(start).square().mean().sqrt(), here(moved).square().mean().sqrt()
        for name, values in of_filter.items():
            row[name] = here(values).sum() if name in ("energy", "force") else here(values).mean()
        if updater:
            row["gain"] = row["gain"].sqrt()
        yield {name: f"{float(value):.3g}" if name in MEASURED else value for name, value in row.items()}


def main() -> None:
    known = [n for n, s in SYSTEMS.items() if "folders" in s]
    given = asked(__doc__, known, ["H2O", "LiGePS"], "paper", RESULTS)
    torch.set_num_threads(1)
    where = machine(given.output)
    for system in given.systems:
        training = load(system, given.data, FRAMES)["train"]
        for method, epochs in METHODS.items():
            run = Run(config_of(system, given.network, method_of(method), seed=1), training, epochs)
            start, kinds = flat(run.model), kinds_of(run.model)
            named = {"system": system, "network": given.network, "method": method, **where}
            for epoch in range(epochs + 1):
                if epoch < 5 or epoch == epochs:
                    found = [{**named, "epoch": epoch, **row} for row in measured(run, start, kinds)]
                    append(given.output, COLUMNS, found)
                if epoch < epochs:
                    run.epoch()
            for row in found:
                print(*(row.get(name, "") for name in COLUMNS[: -len(MACHINE)]), sep="  ", flush=True)


if __name__ == "__main__":
    main()
