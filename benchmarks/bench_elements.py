"""Errors of the forces of each element, however rare it is, as rows: the default of `rlekf train` beside Adam.

    python benchmarks/bench_elements.py --data DIR [--systems Cu+C LiGePS] [--network small]

RMSE over the test frames, in meV/Å, of RLEKF after eight epochs of 100 training frames and of Adam after 100 epochs.
One seed, one thread.
"""

from __future__ import annotations

import torch
from bench_training import ROOT, SYSTEMS, Run, asked, config_of, load, method_of, significant
from rows import MACHINE, append, machine

RESULTS = ROOT / "benchmarks/results/elements.csv"
COLUMNS = ("system", "network", "method", "epochs", "element", "share_of_atoms", "force", *MACHINE)
METHODS = {"four groups": 8, "Adam 2e-3": 100, "Adam 8e-3": 100}  # and their epochs
FRAMES = 100


def main() -> None:
    several = [name for name, s in SYSTEMS.items() if "folders" in s and len(s["elements"]) > 1]
    given = asked(__doc__, several, several, "small", RESULTS)
    torch.set_num_threads(1)
    where = machine(given.output)
    for system in given.systems:
        parts = load(system, given.data, FRAMES)
        for method, epochs in METHODS.items():
            run = Run(config_of(system, given.network, method_of(method), seed=1), parts["train"], epochs)
            for _ in range(epochs):
                run.epoch()
            types = torch.cat([frame.types for frame in parts["test"]])
            with torch.enable_grad():
                forces = [run.optimize.result(frame).forces.detach() for frame in parts["test"]]
            off = torch.cat([mine - frame.forces for mine, frame in zip(forces, parts["test"], strict=True)])
            for number, element in enumerate(SYSTEMS[system]["elements"]):
                own = types == number
                row = {"system": system, "network": given.network, "method": method, "epochs": epochs}
                row |= {"element": element, "share_of_atoms": f"{float(own.double().mean()):.3g}", **where}
                row["force"] = significant(float(off[own].square().mean().sqrt()))
                append(given.output, COLUMNS, [row])
                print(*(row[name] for name in COLUMNS[: -len(MACHINE)]), sep="  ", flush=True)


if __name__ == "__main__":
    main()
