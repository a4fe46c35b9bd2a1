"""Which frames train and which are held out, and the batches that they are drawn in."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from rlekf_ext.environment import torch_threads
from rlekf_ext.errors import DataError, InputError
from rlekf_ext.options import KINDS, Options
from rlekf_ext.potential.data import System, split
from rlekf_ext.potential.frames import Cache, FrameList, check_neighbors, look_once
from rlekf_ext.potential.input import Adam, Config, TrainingData
from rlekf_ext.potential.load import load_systems
from rlekf_ext.potential.neighbors import Frame
from rlekf_ext.processes import ALONE, Processes
from rlekf_ext.schema import counted, shown


@dataclass(frozen=True)
class Frames:
    """Frames of systems, and how they make batches."""

    every: FrameList
    data: TrainingData

    @property
    def batch_sizes(self) -> list[int]:
        """Frames in a batch of each system."""
        return batch_sizes(self.data, [system for system, _ in self.every.parts()])

    def batches(self, seed: int) -> Batches:
        """Batches without end. Raises InputError for probabilities that do not fit the systems."""
        _, parts, sizes, chances = self._drawn()
        return Batches(parts, sizes, seed, chances)

    def never_drawn(self) -> list[str]:
        """The names of the systems whose probability is 0."""
        systems, _, _, chances = self._drawn()
        never = {
            self._alike(system) for system, chance in zip(systems, chances or (), strict=bool(chances)) if not chance
        }
        return [system.name for system, _ in self.every.parts() if self._alike(system) in never] if never else []

    def _drawn(self) -> tuple[Sequence[System], Sequence[FrameList], list[int], list[float] | None]:
        """The systems, and of each its frames, how many make a batch, and how likely it is. Systems that may share a
        batch are one."""
        systems, parts = zip(*self.every.parts(self._alike), strict=True)
        sizes = batch_sizes(self.data, systems)
        return systems, parts, sizes, probabilities(self.data, systems, num_batches(parts, sizes))

    def _alike(self, system: System) -> Hashable:
        """The same for systems whose frames may share a batch."""
        labels = system.labels, system.boxes is None
        return system.types.tobytes(), labels, *batch_sizes(self.data, [system]), pool(self.data, system)


def load_frames(
    config: Config,
    quiet: bool = False,
    say: Callable[[str], Any] = tqdm.write,
    processes: Processes = ALONE,
    threads: int | None = None,
) -> tuple[Frames, Frames]:
    """Training and held-out frames, surveyed with this many threads. They share a cache, which has no room yet."""
    settings, network = config.training, config.model.architecture()
    num_types, rcut, rcut_smth = len(network.type_map), network.descriptor.rcut, network.descriptor.rcut_smth

    def load(data: TrainingData) -> list[System]:
        found = load_systems(data.systems, network.type_map, data.rglob_patterns or ())
        check_lists(data, found)
        rule, _, number = str(data.batch_size).partition(":")
        if rule == "mix":
            say(f"batch_size {data.batch_size}: batches hold frames of one composition, as with max.")
        if rule != "filter":
            return found
        kept = [system for system in found if len(system.types) <= int(number)]
        if not kept:
            raise DataError(f"No system has at most {number} atoms, as batch_size = {data.batch_size} asks: raise it.")
        if len(kept) < len(found):
            say(f"Systems of more than {number} atoms, left out (batch_size): {len(found) - len(kept)}")
        return kept

    data, apart = settings.training_data, settings.validation_data
    found = load(data)
    labelled = [system for system in found if set(system.labels) & set(kinds_used(config))]
    if labelled and len(labelled) < len(found):
        say(f"Frames without a label that is used, left out: {sum(map(len, found)) - sum(map(len, labelled))}")
    training = labelled or found
    training, validation = (training, load(apart)) if apart else split(training, 1 - settings.validation_fraction)
    if apart and (apart.sys_probs is not None or apart.auto_prob != TrainingData.auto_prob):
        say("validation_data: sys_probs and auto_prob play no part, since all of its frames are evaluated.")
    cache = Cache()
    whole = [FrameList(systems, rcut, num_types, network.dtype, cache) for systems in (training, validation)]
    with (
        tqdm(total=sum(map(len, whole)), desc="data", unit="frame", disable=quiet or None, leave=False) as bar,
        torch_threads(threads),
    ):
        known = Path(f"{settings.save_ckpt}.data.npz")
        if look_once(whole, rcut_smth, known, processes, bar.update):
            say(f"{known} has the survey of these data: they have been searched for neighbours before.")

    def near_enough(frames: FrameList, data: TrainingData) -> Frames:
        near = frames[frames.shortest() >= data.min_pair_dist] if len(frames) else frames
        if left_out := len(frames) - len(near):
            say(f"Frames with atoms closer than min_pair_dist = {data.min_pair_dist} Å, left out: {left_out}")
        if len(frames) and not len(near):
            raise DataError(f"All frames have atoms closer than min_pair_dist = {data.min_pair_dist} Å: lower it.")
        return Frames(near, data)

    result = near_enough(whole[0], data), near_enough(whole[1], apart or data)
    if never := result[0].never_drawn():
        some = f"{', '.join(never[:3])}{' and others' * (len(never) > 3)}"
        say(f"Systems that auto_prob or sys_probs never draws: {len(never)} ({some})")
    if sentence := check_neighbors(result[0].every):
        say(sentence)
    return result


def kinds_used(config: Config) -> Sequence[str]:
    """The kinds of label that train."""
    options = config.optimizer.options
    if isinstance(options, Options):
        return options.order
    return [kind for kind in config.loss.kinds() if kind != "virial" or isinstance(options, Adam)]


def labels_used(config: Config, counts: Mapping[str, int]) -> str:
    """Which labels train, in a sentence, if this many frames have each kind. Raises DataError if none does."""
    used: list[str] = []
    other: list[str] = []
    without = "optimizer/order leaves it out" if config.optimizer.has_order else "LKF does not take it"
    for kind in KINDS:
        count = counts.get(kind, 0)
        if kind in kinds_used(config) and count:
            used.append(f"{kind} ({counted(count, 'frame')})")
        elif kind in kinds_used(config):
            other.append(f"{kind}: no frame has it")
        elif count:
            wanted = kind in config.loss.kinds()
            off = f"loss/start_pref_{kind[0]} and limit_pref_{kind[0]} are 0"
            other.append(f"{kind}: {without if wanted else off}")
    if not used:
        raise DataError(f"No training frame has a label that is used: {'; '.join(other)}.")
    rest = f" Not used: {'; '.join(other)}." if other else ""
    return f"Labels used: {', '.join(used)}.{rest}"


def batch_sizes(data: TrainingData, systems: Sequence[System]) -> list[int]:
    """Frames in a batch of each system."""
    if isinstance(data.batch_size, tuple):
        return _of_each(data.batch_size, data, systems)
    if isinstance(data.batch_size, int):
        return [data.batch_size] * len(systems)
    rule, _, number = data.batch_size.partition(":")
    limit = int(number or 32)
    atoms = [len(system.types) for system in systems]
    return [math.ceil(limit / n) if rule == "auto" else max(1, limit // n) for n in atoms]


def num_batches(systems: Sequence[Sequence[Frame]], sizes: Sequence[int]) -> list[int]:
    """How many batches of at most this size hold the frames of each system."""
    return [math.ceil(len(some) / size) for some, size in zip(systems, sizes, strict=True)]


def pool(data: TrainingData, system: System) -> Hashable:
    """The same for systems whose frames are all equally likely to be drawn."""
    if data.sys_probs is not None:
        return system.entry if _by_path(data.sys_probs, data) else system.number
    if data.auto_prob.startswith("prob_sys_size"):
        return tuple(first <= system.number < end for first, end, _ in _blocks(data.auto_prob))
    return system.number


def _blocks(auto_prob: str) -> list[tuple[float, float, float]]:
    """First system, end and weight of each block."""
    return [tuple(map(float, block.split(":"))) for block in auto_prob.split(";")[1:]]  # type: ignore[misc]


def probabilities(data: TrainingData, systems: Sequence[System], counts: Sequence[int]) -> list[float] | None:
    """How likely each system, which has `counts` batches, is when a batch is drawn; None: each batch once per epoch.

    Raises InputError for a block of auto_prob without systems, and if no system is likely at all.
    """
    if data.sys_probs is None and data.auto_prob == "prob_sys_size":
        return None
    numbers, batches = np.array([system.number for system in systems]), np.array(counts, dtype=float)
    found = np.zeros(len(systems))

    def share(weight: float, among: np.ndarray) -> None:
        found[among] += weight * batches[among] / batches[among].sum()

    if data.sys_probs is not None:
        given = np.array(_of_each(data.sys_probs, data, systems))
        of_path = np.array([system.entry for system in systems]) if _by_path(data.sys_probs, data) else numbers
        for place in np.unique(of_path[given >= 0]):
            share(given[of_path == place][0], of_path == place)
        if (given < 0).any():
            share(1 - sum(p for p in data.sys_probs if p >= 0), given < 0)
    elif data.auto_prob == "prob_uniform":
        for number in np.unique(numbers):
            share(1.0, numbers == number)
    else:
        for first, end, weight in _blocks(data.auto_prob):
            inside = (numbers >= first) & (numbers < end)
            if not inside.any():
                raise InputError(
                    f"The block {first:g}:{end:g}:{weight:g} of auto_prob must hold a system, but none has such a "
                    "number (they count from 0)."
                )
            share(weight, inside)
    if not found.sum() > 0:
        raise InputError("The probability of some system must be above 0, but auto_prob or sys_probs makes all 0.")
    return (found / found.sum()).tolist()


def check_lists(data: TrainingData, systems: Sequence[System]) -> None:
    """Raise InputError if a list has a value neither for each path nor for each of these systems, which are all that
    were found, or if the probabilities do not add up to 1."""
    count = max(system.number for system in systems) + 1
    for name in ("batch_size", "sys_probs"):
        values = getattr(data, name)
        if isinstance(values, tuple) and len(values) not in (len(data.systems), count):
            raise InputError(
                f"{name} must have a value for each of the {len(data.systems)} paths in systems, or of the {count} "
                f"systems found there, but has {len(values)}: {shown(values)}; a single number is for all."
            )
    if data.sys_probs is not None:
        total = sum(p for p in data.sys_probs if p >= 0)
        if total > 1 + 1e-8 or (total < 1 - 1e-8 and min(data.sys_probs) >= 0):
            raise InputError(f"The sum of sys_probs must be 1 but is: {total:g}.")


def _of_each(values: tuple, data: TrainingData, systems: Sequence[System]) -> list:
    """The value of each system, of a list with one for each path in `data.systems`, or for each system found there."""
    by_path = _by_path(values, data)
    return [values[system.entry if by_path else system.number] for system in systems]


def _by_path(values: tuple, data: TrainingData) -> bool:
    return len(values) == len(data.systems)


class Batches:
    """Batches without end, drawn again each epoch.

    Each holds frames of one entry of `systems`, at most that of `sizes`. An epoch has each frame once, or, with
    `probabilities` of the systems, as many batches drawn by them.
    """

    def __init__(
        self,
        systems: Sequence[Sequence[Frame]],
        sizes: Sequence[int],
        seed: int,
        probabilities: Sequence[float] | None = None,
    ):
        self._systems, self._sizes, self._probabilities = systems, sizes, probabilities
        self._length = sum(num_batches(systems, sizes))
        self._generator = torch.Generator().manual_seed(seed)
        self._shuffle()

    def __len__(self) -> int:
        """Batches per epoch."""
        return self._length

    @property
    def on_demand(self) -> bool:
        """Whether frames are made when they are asked for."""
        return any(isinstance(system, FrameList) for system in self._systems)

    @property
    def most_frames(self) -> int:
        """Frames in the largest batch."""
        return max(min(len(some), size) for some, size in zip(self._systems, self._sizes, strict=True))

    def __next__(self) -> Sequence[Frame]:
        if self._place >= len(self._order):  # above it if a restart has fewer frames
            self._shuffle()
        self._place += 1
        number, own = self._order[self._place - 1]
        system = self._systems[number]
        return system[own] if isinstance(system, FrameList) else [system[i] for i in own]

    def _shuffle(self) -> None:
        self._epoch_state, self._place = self._generator.get_state(), 0
        batches: list[tuple[int, np.ndarray]] = []
        if self._probabilities is None:
            for number in range(len(self._systems)):
                batches += self._batches_of(number)
        else:
            chances = torch.tensor(self._probabilities, dtype=torch.float64)
            drawn = torch.multinomial(chances, self._length, replacement=True, generator=self._generator)
            for number, count in enumerate(torch.bincount(drawn, minlength=len(chances)).tolist()):
                some: list[tuple[int, np.ndarray]] = []
                while len(some) < count:
                    some += self._batches_of(number)
                batches += some[:count]
        self._order = [batches[i] for i in torch.randperm(len(batches), generator=self._generator).tolist()]

    def _batches_of(self, number: int) -> list[tuple[int, np.ndarray]]:
        """The number of the system, and which of its frames."""
        count, size = len(self._systems[number]), self._sizes[number]
        order = torch.randperm(count, generator=self._generator).numpy()
        return [(number, order[first : first + size]) for first in range(0, count, size)]

    def state_dict(self) -> dict[str, Any]:
        return {"epoch_state": self._epoch_state, "place": self._place}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self._generator.set_state(saved["epoch_state"])
        self._shuffle()
        self._place = saved["place"]


class Feed:
    """The batches, each with what `ready` makes of it. With `ahead`, a thread makes the next one ready meanwhile."""

    def __init__(self, batches: Batches, ready: Callable[[Sequence[Frame]], Any], ahead: bool):
        self._batches, self._ready = batches, ready
        self._worker = ThreadPoolExecutor(1) if ahead else None
        self._next: tuple[Sequence[Frame], Future | None, dict[str, Any]] | None = None
        self._state = batches.state_dict()

    def __next__(self) -> tuple[Any, Any]:
        batch, future, state = self._next or self._drawn()
        if self._worker is None or future is None:
            made = self._ready(batch)
        else:
            made = future.result()
            self._next = self._drawn()
        self._state = state  # not before: a restart begins with a batch that could not be made
        return batch, made

    def _drawn(self) -> tuple[Sequence[Frame], Future | None, dict[str, Any]]:
        batch = next(self._batches)
        future = self._worker.submit(self._ready, batch) if self._worker else None
        return batch, future, self._batches.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """That of the batches, as if none had been drawn ahead."""
        return self._state
