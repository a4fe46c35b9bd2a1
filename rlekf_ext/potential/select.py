"""The next frames to label: of a pool, those from which the filter would learn most, chosen one after another.

P does not depend on labels. So once a frame is chosen, P is updated as if the frame had been measured, and the next
choice is not its twin.
"""

from __future__ import annotations

import heapq
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from rlekf_ext.errors import DataError, InputError
from rlekf_ext.potential.data import System, frame_of
from rlekf_ext.potential.files import write_atomically, writing
from rlekf_ext.potential.model import DeepPotential
from rlekf_ext.potential.neighbors import Frame
from rlekf_ext.potential.uncertainty import DRAWS, deviations, filter_of, jacobian_of
from rlekf_ext.updates import LEAST_ERROR

EPOCHS = 10  # how often training with four force groups would measure a frame
FILES = {"coordinates": "coord", "boxes": "box", "energies": "energy", "forces": "force", "virials": "virial"}


@dataclass(frozen=True)
class Selection:
    """The frames of a pool that were chosen, and what was known of all.

    Frames are counted over all systems in turn; deviations are sqrt(HᵀPH) of E/n in eV/atom and of the force components
    in eV/Å.
    """

    systems: list[System]
    chosen: list[int]  # in the order of choice
    deviations: np.ndarray  # (frames, 2) before any choice; NaN for a frame that was left out
    when_chosen: np.ndarray  # (chosen, 2), after the choices before it
    left_out: list[str]  # why, for each frame that the network cannot take

    def save(self, folder: str | Path, type_map: Sequence[str]) -> Path:
        """Write the chosen frames as deepmd/npy, a folder for each system, and deviations.csv, a line for each frame.

        The table is first: if there is no room for the frames it says which they are, and none of them is there. Raises
        InputError if something cannot be written, DataError if the folder holds anything.
        """
        folder = Path(folder)
        order = {frame: rank for rank, frame in enumerate(self.chosen, 1)}
        with writing(folder):
            check_empty(folder)
        lines = ["frame,name,chosen,deviation_e,deviation_f,when_chosen_e,when_chosen_f"]
        for frame, (system, i) in enumerate(_places(self.systems)):
            rank = order.get(frame)
            then = [f"{x:.6g}" for x in self.when_chosen[rank - 1]] if rank else ["", ""]
            before = [f"{x:.6g}" for x in self.deviations[frame]]
            lines.append(",".join([str(frame), f'"{system.frame_name(i)}"', str(rank or ""), *before, *then]))
        path = folder / "deviations.csv"
        write_atomically(path, lambda file: file.write_text("\n".join(lines) + "\n", encoding="utf-8"))
        made: list[Path] = []
        try:
            with writing(folder):
                first = 0
                for number, system in enumerate(self.systems):
                    own = [frame - first for frame in sorted(self.chosen) if first <= frame < first + len(system)]
                    first += len(system)
                    if own:
                        made.append(folder / f"{number:03d}.{_formula(system, type_map)}")
                        _write(made[-1], system[np.array(own)], type_map)
        except InputError as error:
            for each in made:
                shutil.rmtree(each, ignore_errors=True)
            raise InputError(f"{error} Which frames were chosen is in {path}.") from error
        return path


def check_empty(folder: Path) -> None:
    """Raises DataError if the folder holds anything."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} should be a new or an empty folder; choose another.")


def select(
    checkpoint: dict[str, Any],
    model: DeepPotential,
    systems: Sequence[System],
    count: int,
    *,
    epochs: float = EPOCHS,
    quiet: bool = False,
) -> Selection:
    """Choose `count` frames, the one with the largest predicted variance first, and the others in turn, with P updated
    as if those before had been measured in this many epochs of training.

    The variances of energy and forces are added as the filter scales its measurements at the end of training. It takes
    the Jacobians of every frame once and one pass over P for each; then, for every choice, those of the frames that may
    still be the largest. No more than one frame has its neighbours in memory. On a terminal it shows its progress,
    unless `quiet`.

    Raises InputError for a checkpoint without P, and DataError if no frame can be evaluated.
    """
    optimizer = filter_of(checkpoint, model)
    p = optimizer.filter.covariance
    # The old one lies in the file. As-if updates in float32 would make it indefinite.
    optimizer.filter.covariance = p = p.reblock(p.plan, dtype=torch.float64)
    p.set(forgetting=0.0, process_noise=0.0)
    updater = checkpoint["optimizer"]["updater"]
    saved = updater.get("scales") or {kind: 1 / max(float(x), LEAST_ERROR) for kind, x in updater["means"].items()}
    of_energy, of_force = (float(saved.get(kind, 1.0)) for kind in ("energy", "force"))
    per_atom = updater.get("force_per_atom", False)
    places = _places(systems)

    def scales(num_atoms: int) -> tuple[float, float]:
        return of_energy, of_force / num_atoms if per_atom else of_force

    def look(frame: int) -> tuple[float, tuple[float, float], Tensor, int]:
        system, i = places[frame]
        made = _made(model, system, i)
        jacobian = jacobian_of(optimizer, model, made)
        found = deviations(optimizer, jacobian, system.frame_name(i))
        n = len(made.types)
        return sum((s * d) ** 2 for s, d in zip(scales(n), found, strict=True)), found, jacobian, n

    before, left_out = np.full((len(places), 2), math.nan), []
    waiting: list[tuple[float, int]] = []  # minus the variance as last seen, the frame
    bar = partial(tqdm, unit="frame", disable=quiet or None, leave=False)
    for frame in bar(range(len(places)), desc="frames"):
        try:
            variance, before[frame], _, _ = look(frame)
        except DataError as error:
            left_out.append(str(error))
            continue
        waiting.append((-variance, frame))
    if not waiting:
        raise DataError(f"No frame can be evaluated: {left_out[0] if left_out else 'there is none'}")
    heapq.heapify(waiting)
    chosen: list[int] = []
    when_chosen = []
    for _ in bar(range(min(count, len(waiting))), desc="choices"):
        while True:
            # Variances only fall, so the largest is found as soon as one of now is above all others of before.
            _, frame = heapq.heappop(waiting)
            variance, found, jacobian, num_atoms = look(frame)
            if not waiting or variance >= -waiting[0][0]:
                break
            heapq.heappush(waiting, (-variance, frame))
        chosen.append(frame)
        when_chosen.append(found)
        if epochs:
            rows = as_measured(jacobian, scales(num_atoms), num_atoms, epochs)
            optimizer.filter.update(rows, torch.zeros(1 + DRAWS))
    return Selection(list(systems), chosen, before, np.array(when_chosen), left_out)


def as_measured(jacobian: Tensor, scales: Sequence[float], num_atoms: int, epochs: float) -> Tensor:
    """The rows of `jacobian_of`, scaled so that they tell P as much as a frame does in this many epochs of training.

    In an epoch with `num_groups` = 4 that is four updates of energies and four of forces of a quarter of the atoms,
    Σ ± F_i / (3n/4): in all 16/(3n) times the mean variance of a component.
    """
    rows = jacobian.clone()
    rows[0] *= scales[0] * math.sqrt(4 * epochs)
    rows[1:] *= scales[1] * math.sqrt(16 * epochs / (3 * num_atoms * DRAWS))
    return rows


def _places(systems: Sequence[System]) -> list[tuple[System, int]]:
    """The system of each frame, and the frame's number in it."""
    return [(system, i) for system in systems for i in range(len(system))]


def _made(model: DeepPotential, system: System, i: int) -> Frame:
    made = frame_of(system, i, model.architecture.descriptor.rcut, len(model.type_map), model.dtype)
    model.descriptor.check(made)
    return made


def _formula(system: System, type_map: Sequence[str]) -> str:
    numbers, counts = np.unique(system.types, return_counts=True)
    return "".join(f"{type_map[t]}{n}" for t, n in zip(numbers, counts, strict=True))


def _write(folder: Path, system: System, type_map: Sequence[str]) -> None:
    """A system as deepmd/npy."""
    (folder / "set.000").mkdir(parents=True)
    np.savetxt(folder / "type.raw", system.types, "%d")
    (folder / "type_map.raw").write_text("\n".join(type_map) + "\n", encoding="utf-8")
    if system.boxes is None:
        (folder / "nopbc").touch()
    for name, file in FILES.items():
        if getattr(system, name) is not None:
            array = np.asarray(getattr(system, name))
            flat = array if array.ndim == 1 else array.reshape(len(array), -1)
            np.save(folder / "set.000" / f"{file}.npy", flat)
