"""RLEKF against Adam: the same network, the same frames of DFT NaCl, the same training time. `make demo` runs it.

Writes demo/: both trainings as `rlekf train` leaves them, results.csv, curves.png and parity.png.
"""

from __future__ import annotations

import csv
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rlekf_ext.potential.checkpoint import load_checkpoint, restored_model
from rlekf_ext.potential.data import frames, split
from rlekf_ext.potential.evaluate import compare
from rlekf_ext.potential.input import Config, read_input
from rlekf_ext.potential.load import load_systems
from rlekf_ext.potential.plot import plot_epochs, plot_parity
from rlekf_ext.potential.train import train

EXAMPLE = Path(__file__).resolve().parent / "nacl"
OUTPUT = EXAMPLE.parents[1] / "demo"
TRIAL_STEPS = 500
ATTEMPTS, TOLERANCE = 3, 0.03  # of Adam, to take as long as RLEKF
RESULT = ("epoch", "updates", "seconds", "energy_rmse", "force_rmse")  # in eV/atom and eV/Å
MACHINE = ("threads", "cpu", "cpu_isa", "torch", "version")


def run(config: Config, folder: str) -> dict[str, Any]:
    """Train in a separate folder."""
    (OUTPUT / folder).mkdir(parents=True, exist_ok=True)
    os.chdir(OUTPUT / folder)
    return train(config)


def with_steps(config: Config, steps: int) -> Config:
    return replace(config, training=replace(config.training, numb_steps=steps, num_epochs=None))


def main() -> None:
    torch.set_num_threads(1)  # cells of 8 atoms leave nothing for a second one, which would only wait
    kalman, adam = (read_input(EXAMPLE / name) for name in ("rlekf.json", "adam.json"))
    print(f"RLEKF, {kalman.training.num_epochs:g} epochs", flush=True)
    summaries = {"RLEKF": run(kalman, "rlekf")}

    # Adam's learning rate must fall to its end within the time that RLEKF took, so its speed is measured first. A
    # machine that has other work may change its speed: then Adam trains again, for as many batches as fit now.
    seconds = summaries["RLEKF"]["seconds"]
    speed = run(with_steps(adam, TRIAL_STEPS), "adam-trial")
    for _ in range(ATTEMPTS):
        steps = max(round(seconds * speed["step"] / speed["seconds"]), 1)
        print(f"Adam, {steps} batches: the same {seconds:.0f} s", flush=True)
        speed = summaries["Adam"] = run(with_steps(adam, steps), "adam")
        if abs(speed["seconds"] / seconds - 1) < TOLERANCE:
            break

    descriptor, type_map = kalman.model.descriptor, kalman.model.type_map
    _, held_out = split(load_systems(kalman.training.training_data.systems, type_map))
    test = frames(held_out, descriptor.rcut, len(type_map))
    models = {name: restored_model(load_checkpoint(OUTPUT / name.lower() / "model.ckpt.pt")) for name in summaries}
    comparisons = {name: compare(model, test) for name, model in models.items()}

    print(f"\n{'held-out frames':<16}{'epochs':>8}{'updates':>9}{'seconds':>9}{'E meV/atom':>12}{'F meV/Å':>9}")
    for name, summary in summaries.items():
        last, errors = summary["epochs"][-1], comparisons[name]
        print(
            f"{name:<16}{last['epoch']:>8.1f}{last['updates']:>9}{last['seconds']:>9.1f}"
            f"{1e3 * errors.energy_rmse:>12.3f}{1e3 * errors.force_rmse:>9.2f}"
        )
    with (OUTPUT / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["optimizer", *RESULT, *MACHINE])
        writer.writeheader()
        for name, summary in summaries.items():
            machine = {key: summary[key] for key in MACHINE}
            writer.writerow({"optimizer": name, **{key: summary["epochs"][-1][key] for key in RESULT}, **machine})
    pictures = [
        plot_epochs({name: summary["epochs"] for name, summary in summaries.items()}, OUTPUT / "curves.png"),
        plot_parity(comparisons, OUTPUT / "parity.png"),
    ]
    print("\npictures: " + ", ".join(str(picture.relative_to(OUTPUT.parent)) for picture in pictures))


if __name__ == "__main__":
    main()
