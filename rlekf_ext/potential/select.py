"""The next frames to label: of a pool, those from which the filter would learn most, chosen one after another.

P does not depend on labels. So before a frame has any, P says how much its measurement would lower the predicted
variance of all frames; and once it is chosen, P is updated as if it had been measured.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from rlekf_ext.environment import available_bytes
from rlekf_ext.errors import DataError, InputError, NotEnoughMemoryError
from rlekf_ext.optim import RLEKF
from rlekf_ext.potential.data import System, frame_of
from rlekf_ext.potential.files import write_atomically, writing
from rlekf_ext.potential.model import DeepPotential
from rlekf_ext.potential.neighbors import Frame
from rlekf_ext.potential.uncertainty import DRAWS, deviations, filter_of, jacobian_of
from rlekf_ext.updates import LEAST_ERROR

CANDIDATES = 512  # frames
ROWS_AT_ONCE = 64
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
            name = system.frame_name(i).replace('"', '""')
            lines.append(",".join([str(frame), f'"{name}"', str(rank or ""), *before, *then]))
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
    quiet: bool = False,
) -> Selection:
    """Choose `count` frames, one after another: each time the one after whose measurement the predicted variance of the
    whole pool is least (active learning Cohn), with P updated as if those before had been measured in EPOCHS epochs of
    training.

    The variances of energy and forces are added as the filter scales its measurements at the end of training. It takes
    the Jacobians of every frame and one pass over P for each; the choice is then made among all frames or, of a
    pool that is larger than CANDIDATES and than twice `count`, among those of largest variance and others drawn at
    random, half each, fewer if memory is short. On a terminal it shows its progress, unless `quiet`.

    Raises InputError for a checkpoint without P, and DataError if no frame can be evaluated.
    """
    optimizer = filter_of(checkpoint, model)
    p = optimizer.filter.covariance
    # The old one lies in the file. What is as if measured is known better than float32 can say.
    optimizer.filter.covariance = p = p.reblock(p.plan, dtype=torch.float64)
    noise = math.sqrt(p.scalars().measurement_noise)
    updater = checkpoint["optimizer"]["updater"]
    saved = updater.get("scales") or {kind: 1 / max(float(x), LEAST_ERROR) for kind, x in updater["means"].items()}
    of_energy, of_force = (float(saved.get(kind, 1.0)) for kind in ("energy", "force"))
    places = _places(systems)
    bar = partial(tqdm, unit="frame", disable=quiet or None, leave=False)

    def jacobian(frame: int) -> tuple[Tensor, int]:
        system, i = places[frame]
        made = _made(model, system, i)
        return jacobian_of(optimizer, model, made), len(made.types)

    # A quarter of the memory for the Jacobians, another for the products of all with all, twice.
    free, of_frame = available_bytes(p.state.device) / 4, 8 * (1 + DRAWS)
    most = int(min(free / (of_frame * p.plan.num_weights), math.sqrt(free / (2 * of_frame * (1 + DRAWS)))))
    room = min(len(places), max(CANDIDATES, 2 * count), most)
    jacobians = torch.empty(room, 1 + DRAWS, p.plan.num_weights, dtype=torch.float64)
    before, left_out = np.full((len(places), 2), math.nan), []
    scales, num_usable = np.ones((len(places), 2)), 0
    for frame in bar(range(len(places)), desc="frames"):
        try:
            rows, num_atoms = jacobian(frame)
        except DataError as error:
            left_out.append(str(error))
            continue
        system, i = places[frame]
        before[frame] = deviations(optimizer, rows, system.frame_name(i))
        if len(places) == room:  # all will be candidates
            jacobians[num_usable] = rows
        num_usable += 1
        scales[frame] = of_energy, of_force / num_atoms if updater.get("force_per_atom", False) else of_force
    variances = np.square(scales * before).sum(1)
    usable = np.flatnonzero(~np.isnan(variances))
    if not num_usable:
        raise DataError(f"No frame can be evaluated: {left_out[0] if left_out else 'there is none'}")
    if most < min(count, num_usable):
        raise NotEnoughMemoryError(f"At most {most} frames can be chosen at once with the memory that is free.")
    candidates, stand_for = _candidates(variances, usable, room)
    if len(places) > room:
        for i, frame in enumerate(bar(candidates, desc="candidates")):
            jacobians[i], _ = jacobian(frame)
    as_if = [as_measured(scales[frame], len(places[frame][0].types)) / noise for frame in candidates]
    counted = [
        weight * np.square(scales[frame]) / (1, DRAWS) for frame, weight in zip(candidates, stand_for, strict=True)
    ]
    each = torch.tensor(np.repeat(np.array(counted), (1, DRAWS), axis=1))
    with bar(total=min(count, len(candidates)), desc="choices") as choices:
        chosen, then = least_left(
            _products(optimizer, jacobians[: len(candidates)].flatten(0, 1)),
            torch.stack(as_if),
            each,
            count,
            choices.update,
        )
    when_chosen = np.stack([then[:, 0].sqrt().numpy(), then[:, 1:].mean(1).sqrt().numpy()], axis=1)
    return Selection(list(systems), [int(candidates[i]) for i in chosen], before, when_chosen, left_out)


def as_measured(scales: Sequence[float], num_atoms: int) -> Tensor:
    """Factors (1 + DRAWS,) of the rows of `jacobian_of`, after which they tell P as much as a frame does in EPOCHS
    epochs of training.

    In an epoch with `num_groups` = 4 that is four updates of energies and four of forces of a quarter of the atoms,
    Σ ± F_i / (3n/4): in all 16/(3n) times the mean variance of a component.
    """
    of_energy = scales[0] * math.sqrt(4 * EPOCHS)
    of_force = scales[1] * math.sqrt(16 * EPOCHS / (3 * num_atoms * DRAWS))
    return torch.tensor([of_energy] + [of_force] * DRAWS, dtype=torch.float64)


def least_left(
    products: Tensor, as_if: Tensor, counted: Tensor, count: int, show: Callable[[], Any] = lambda: None
) -> tuple[list[int], Tensor]:
    """Of C frames with R rows each, `count` in the order of choice, and the variances (count, R) of their rows after
    the choices before them.

    `products` (C R, C R): those of all rows, H_iᵀPH_j, overwritten. A frame is measured by its rows times `as_if`
    (C, R), with noise 1; chosen is the one after which the sum of all variances, times `counted` (C, R), is least.
    """
    num_frames, num_rows = as_if.shape
    by_frame = products.view(num_frames, num_rows, num_frames * num_rows)
    frames, noise = torch.arange(num_frames), torch.eye(num_rows, dtype=torch.float64)
    own = as_if[:, :, None] * as_if[:, None, :]
    left = torch.ones(num_frames, dtype=torch.bool)
    chosen: list[int] = []
    then = []
    for _ in range(min(count, num_frames)):
        alone = by_frame.view(num_frames, num_rows, num_frames, num_rows)[frames, :, frames]  # (C, R, R)
        gained = torch.bmm(by_frame * counted.flatten(), by_frame.transpose(1, 2))
        fall = torch.linalg.solve(own * alone + noise, own * gained).diagonal(dim1=1, dim2=2).sum(1)
        best = int(torch.where(left, fall, -math.inf).argmax())
        then.append(alone[best].diagonal().clamp_min(0))
        chosen.append(best)
        left[best] = False
        factor = torch.linalg.cholesky(own[best] * alone[best] + noise)
        known = torch.linalg.solve_triangular(factor, as_if[best, :, None] * by_frame[best], upper=False)
        products.addmm_(known.T, known, alpha=-1)
        show()
    return chosen, torch.stack(then)


def _candidates(variances: np.ndarray, usable: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """At most this many of the usable frames, and how many each stands for: all, or half of them those of largest
    variance, and others at random, which stand for the rest."""
    if len(usable) <= most:
        return usable, np.ones(len(usable))
    order = usable[np.argsort(-variances[usable], kind="stable")]
    top, rest = order[: most // 2], order[most // 2 :]
    drawn = np.sort(np.random.default_rng(0).choice(rest, most - len(top), replace=False))
    share = len(rest) / len(drawn)
    return np.concatenate([top, drawn]), np.repeat([1.0, share], [len(top), len(drawn)])


def _products(optimizer: RLEKF, rows: Tensor) -> Tensor:
    """H_iᵀPH_j of all rows (R, N), as (R, R)."""
    project, scale = optimizer.filter.projector(), optimizer.filter.covariance.scale
    found = rows.new_empty(len(rows), len(rows))
    for first in range(0, len(rows), ROWS_AT_ONCE):
        some = slice(first, first + ROWS_AT_ONCE)
        found[:, some] = rows @ torch.cat([scale * project(each)[0] for each in rows[some].split(1 + DRAWS)]).T
    return (found + found.T) / 2


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
