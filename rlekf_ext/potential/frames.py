"""Frames that are made when they are asked for, and what is known of all of them before: a survey.

A frame with its neighbours takes a hundred times the room of its coordinates. So a `FrameList` makes one when a batch
needs it, and keeps as many as its `Cache` has room for. What statistics, checks and "sel": "auto" need of every frame
comes from its coordinates, in one pass over the data without neighbour lists.
"""

from __future__ import annotations

import copy
import hashlib
import os
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from rlekf_ext.environment import available_bytes, torch_threads
from rlekf_ext.errors import DataError
from rlekf_ext.ops.native import OPS
from rlekf_ext.potential.architecture import DescriptorArchitecture
from rlekf_ext.potential.data import System, frame_of
from rlekf_ext.potential.descriptor import switched
from rlekf_ext.potential.files import write_atomically
from rlekf_ext.potential.neighbors import FARTHEST, SHORTEST_DISTANCE, Frame, shortest_distance
from rlekf_ext.potential.stored import Rows
from rlekf_ext.processes import ALONE, Processes

FORMAT = 1  # of what look_once writes
WORTH_KEEPING = 5.0  # seconds
MOST_NEIGHBORS = 3000  # some twenty times what usual cutoffs give
ATOMS_AT_ONCE = 50_000  # surveyed in one call: a tenth of a second


class Cache:
    """Frames that have been made, until there is no room for more. As batches come in random order, it does not matter
    which ones are kept, and none gives way to another."""

    def __init__(self, num_bytes: float = 0.0):
        self.num_bytes, self.used = num_bytes, 0
        self._lock = threading.Lock()

    def keep(self, kept: dict[int, Frame], number: int, frame: Frame) -> None:
        """Put the frame among those of its list that are kept, if there is room."""
        size = bytes_of(frame)
        with self._lock:  # two threads may have made the same frame
            if number not in kept and self.used + size <= self.num_bytes:
                self.used += size
                kept[number] = frame

    def limit(self, gigabytes: float | None) -> None:
        """Set the room, or a quarter of the memory that is free; processes on one machine share it."""
        free = available_bytes(torch.device("cpu")) / 4 if gigabytes is None else 1e9 * gigabytes
        self.num_bytes = free / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def bytes_of(frame: Frame) -> int:
    tensors = [value for value in vars(frame).values() if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True)
class Survey:
    """What the frames of a set say together, for T elements and S compositions."""

    slots: tuple[int, ...]  # (T), the most neighbours of each element that an atom has
    shortest: float  # Å, between two atoms; infinite if none has a neighbour within the cutoff
    sums: Tensor  # (T, 4), over the atoms of each element: 1; and over their neighbours s, s² and s (x + y + z) / r
    counts: Tensor  # (S, T), atoms of each element in a frame
    energies: Tensor  # (S,), eV, the mean of the frames that have an energy; these are:
    num_energies: Tensor  # (S,)

    @property
    def elements(self) -> set[int]:
        """The elements that some atom is of."""
        return set(self.sums[:, 0].nonzero().flatten().tolist())


def survey(frames: Sequence[Frame], architecture: DescriptorArchitecture) -> Survey:
    """What is known of a FrameList, after its `look`, or of any frames that have been made."""
    if isinstance(frames, FrameList):
        return frames.survey()
    num_types = len(frames[0].slots) if frames else 0
    sums = torch.zeros(num_types, 4, dtype=torch.float64)
    counts, energies = [torch.empty(0, num_types, dtype=torch.float64)], [torch.empty(0, dtype=torch.float64)]
    for frame in frames:
        types = frame.types.cpu()
        _, direction, s, _ = switched(frame.edges.double(), architecture.rcut, architecture.rcut_smth)
        angular = (s * direction).sum((1, 2))
        per_atom = [torch.ones_like(angular), s.sum((1, 2)), s.square().sum((1, 2)), angular]
        sums.index_add_(0, types, torch.stack(per_atom, dim=1).cpu())
        if frame.energy is not None:
            count = torch.zeros(len(frame.num_atoms), num_types, dtype=torch.float64)
            one = torch.ones(len(types), dtype=torch.float64)
            counts.append(count.index_put_((frame.structure.cpu(), types), one, accumulate=True))
            energies.append(frame.energy.double().cpu())
    return Survey(
        slots=tuple(np.max([frame.slots for frame in frames], axis=0).tolist()) if frames else (),
        shortest=min((frame.shortest_edge() for frame in frames), default=np.inf),
        sums=sums,
        counts=torch.cat(counts),
        energies=torch.cat(energies),
        num_energies=torch.ones(sum(map(len, energies)), dtype=torch.float64),
    )


def look_once(
    lists: Sequence[FrameList],
    rcut_smth: float,
    file: Path,
    processes: Processes = ALONE,
    show: Callable[[int], Any] | None = None,
) -> bool:
    """`look` at the frames, unless the file has what this gave for the same data; it is written if that took long.
    Returns whether it was read. Raises InputError if it cannot be written."""
    digest = hashlib.blake2b(f"{FORMAT} {rcut_smth}".encode())
    for frames in lists:
        digest.update(frames.fingerprint())
    key = np.frombuffer(digest.digest(), np.uint8)
    found: dict[str, np.ndarray] = {}
    with suppress(OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile), np.load(file) as saved:
        if np.array_equal(saved["key"], key):
            found = {name: saved[name] for name in saved.files}
    if not processes.any(not found):
        for number, frames in enumerate(lists):
            each = range(len(frames.systems))
            frames.surveyed = [Surveyed(*(found[f"{number} {i} {name}"] for name in Surveyed._fields)) for i in each]
        return True
    started = time.monotonic()
    for frames in lists:
        frames.look(rcut_smth, processes, show)
    if processes.rank == 0 and time.monotonic() - started > WORTH_KEEPING:
        arrays = {
            f"{number} {i} {name}": array
            for number, frames in enumerate(lists)
            for i, each in enumerate(frames.surveyed)
            for name, array in each._asdict().items()
        }

        def write(path: Path) -> None:
            with path.open("wb") as target:
                np.savez(target, key=key, **arrays)

        write_atomically(file, write)
    return False


class Surveyed(NamedTuple):
    """What is known of each of the F frames of a system, which has P elements."""

    elements: np.ndarray  # (P,)
    atoms: np.ndarray  # (P,)
    slots: np.ndarray  # (F, P)
    shortest: np.ndarray  # (F,), Å
    sums: np.ndarray  # (F, P, 3), as in Survey


class FrameList(Sequence[Frame]):
    """The frames of systems, in turn. A frame is made when it is asked for, and kept if the cache has room.

    frames[i] is a frame; frames[a:b] and frames[indices] are FrameLists, which share the frames that are kept. Raises
    DataError for a frame that cannot be made.
    """

    def __init__(
        self,
        systems: Sequence[System],
        cutoff: float,
        num_types: int,
        dtype: torch.dtype = torch.float64,
        cache: Cache | None = None,
    ):
        self.systems, self.cutoff, self.num_types, self.dtype = list(systems), cutoff, num_types, dtype
        self.cache = cache or Cache()
        self._kept: dict[int, Frame] = {}
        self._starts = np.cumsum([0] + [len(system) for system in systems])
        self._numbers = np.arange(self._starts[-1])
        self.surveyed: list[Surveyed] = []

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, which: int) -> Frame: ...
    @overload
    def __getitem__(self, which: slice | np.ndarray) -> FrameList: ...
    def __getitem__(self, which: Any) -> Any:
        if not isinstance(which, int | np.integer):
            part = copy.copy(self)
            part._numbers = self._numbers[which]
            return part
        number = int(self._numbers[which])
        if (frame := self._kept.get(number)) is None:
            frame = frame_of(*self._place(number), self.cutoff, self.num_types, self.dtype)
            self.cache.keep(self._kept, number, frame)
        return frame

    def _place(self, number: int) -> tuple[System, int]:
        system = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self.systems[system], number - int(self._starts[system])

    def _systems_of(self) -> np.ndarray:
        """(F,), the system of each frame."""
        return np.searchsorted(self._starts, self._numbers, side="right") - 1

    def parts(self, alike: Callable[[System], Hashable] = id) -> list[tuple[System, FrameList]]:
        """The systems that frames are of, each with its frames. Systems that are `alike` count as the first of them."""
        groups: dict[Hashable, list[tuple[int, np.ndarray]]] = {}
        for number, where in self._by_system():
            groups.setdefault(alike(self.systems[number]), []).append((number, where))
        return [(self.systems[own[0][0]], self[np.concatenate([where for _, where in own])]) for own in groups.values()]

    def _by_system(self) -> Iterator[tuple[int, np.ndarray]]:
        """The systems that frames are of, and where these are in the list."""
        of = self._systems_of()
        order = np.argsort(of, kind="stable")
        for where in np.split(order, np.flatnonzero(np.diff(of[order])) + 1) if len(order) else ():
            yield int(of[where[0]]), where

    def name(self, i: int) -> str:
        """Frame i, as a message names it."""
        system, own = self._place(int(self._numbers[i]))
        return system.frame_name(own)

    @property
    def num_atoms(self) -> np.ndarray:
        """(F,), the atoms of each frame."""
        sizes = np.array([len(system.types) for system in self.systems], dtype=np.int64)
        return sizes[self._systems_of()]

    @property
    def labels(self) -> Counter[str]:
        """How many frames have each kind of label."""
        found: Counter[str] = Counter()
        for system, where in self._by_system():
            found.update(dict.fromkeys(self.systems[system].labels, len(where)))
        return found

    def sample(self, most: int, seed: int = 0) -> FrameList:
        """At most this many frames, drawn at random, in their order."""
        if len(self) <= most:
            return self
        return self[np.sort(np.random.default_rng(seed).choice(len(self), most, replace=False))]

    def spread(self, most: int) -> FrameList:
        """At most this many frames at even intervals, and more if these lack a composition, or one with some kinds of
        label: a frame of each."""
        if len(self) <= most:
            return self
        step = -(-len(self) // most)
        others: list[int] = []
        have = {self._composition(system) for system in np.unique(self._systems_of()[::step])}
        for system, where in self._by_system():
            if (composition := self._composition(system)) not in have:
                have.add(composition)
                others.append(int(where[0]))
        return self[np.union1d(np.arange(0, len(self), step), np.array(others, dtype=np.int64))]

    def _composition(self, system: int) -> tuple:
        return np.sort(self.systems[system].types).tobytes(), self.systems[system].labels

    # What is known before frames are made

    def look(self, rcut_smth: float, processes: Processes = ALONE, show: Callable[[int], Any] | None = None) -> None:
        """Survey all frames, with as many threads as torch has; the processes share the work. `show` is called with how
        many frames are done since the last call. Raises DataError for the first frame that cannot be made."""
        elements = [np.unique(system.types, return_counts=True) for system in self.systems]
        sizes = [len(system) * len(kinds) for system, (kinds, _) in zip(self.systems, elements, strict=True)]
        ends = np.cumsum(sizes)
        slots, sums = torch.zeros(sum(sizes), dtype=torch.int64), torch.zeros(3 * sum(sizes), dtype=torch.float64)
        shortest = torch.zeros(int(self._starts[-1]), dtype=torch.float64)

        def look_at(number: int, first: int, end: int) -> int:
            system, (kinds, _) = self.systems[number], elements[number]
            points = np.ascontiguousarray(system.coordinates[first:end], dtype=np.float64)
            cells = None if system.boxes is None else np.ascontiguousarray(system.boxes[first:end], dtype=np.float64)
            far = max(np.abs(array).max() for array in (points, cells) if array is not None) > FARTHEST
            own = slice(self._starts[number] + first, self._starts[number] + end)
            if far:
                shortest[own] = torch.nan
                return end - first
            box = None if cells is None else torch.from_numpy(cells)
            places = torch.from_numpy(np.searchsorted(kinds, system.types))
            found = OPS.survey(torch.from_numpy(points), box, places, len(kinds), self.cutoff, rcut_smth)
            begin = ends[number] - sizes[number] + first * len(kinds)
            slots[begin : begin + found[0].numel()] = found[0].flatten()
            sums[3 * begin : 3 * begin + found[2].numel()] = found[2].flatten()
            shortest[own] = found[1]
            return end - first

        work = []
        for number, system in enumerate(self.systems):
            at_once = max(1, ATOMS_AT_ONCE // len(system.types))
            work += [(number, i, min(i + at_once, len(system))) for i in range(0, len(system), at_once)]
        threads = torch.get_num_threads()
        with torch_threads(1), ThreadPoolExecutor(threads) as pool:
            for count in pool.map(lambda part: look_at(*part), work[processes.rank :: processes.size]):
                if show:
                    show(processes.size * count)
        for array in (slots, shortest, sums):
            processes.sum(array)
        for frame in np.flatnonzero(~(shortest.numpy() >= SHORTEST_DISTANCE)):
            frame_of(*self._place(int(frame)), self.cutoff, self.num_types, self.dtype)
        self.surveyed = []
        for number, (kinds, counts) in enumerate(elements):
            own = slice(ends[number] - sizes[number], ends[number])
            found = (
                slots[own].view(-1, len(kinds)),
                shortest[self._starts[number] : self._starts[number + 1]],
                sums.view(-1, 3)[own].view(-1, len(kinds), 3),
            )
            self.surveyed.append(Surveyed(kinds, counts, *(array.numpy() for array in found)))

    def fingerprint(self) -> bytes:
        """Of all that a survey depends on, but for rcut_smth: of arrays in files, what their system says of them."""
        digest = hashlib.blake2b(f"{self.cutoff} {self.num_types}".encode())
        for system in self.systems:
            for array in (system.types, system.boxes, system.coordinates):
                found = array.fingerprint() if isinstance(array, Rows) else np.ascontiguousarray(array).data
                digest.update(b"" if array is None else found)
        return digest.digest()

    def shortest(self) -> np.ndarray:
        """(F,), the distance of the two nearest atoms of each frame in Å, infinite without neighbours."""
        return np.concatenate([each.shortest for each in self.surveyed])[self._numbers]

    def num_neighbors(self) -> np.ndarray:
        """(F,), the neighbour slots of each frame."""
        return np.concatenate([each.slots.sum(1) for each in self.surveyed])[self._numbers]

    def with_more_than(self, sel: Sequence[int]) -> FrameList:
        """The frames with an atom that has more neighbours of some element."""
        limit = np.array(sel)
        beyond = [(each.slots > limit[each.elements]).any(1) for each in self.surveyed]
        return self[np.concatenate(beyond)[self._numbers]]

    def survey(self) -> Survey:
        """What the frames say together; after `look`."""
        slots, shortest = np.zeros(self.num_types, dtype=np.int64), np.inf
        sums = np.zeros((self.num_types, 4))
        rows = []
        for system, where in self._by_system():
            each, energies = self.surveyed[system], self.systems[system].energies
            own = self._numbers[where] - self._starts[system]
            slots[each.elements] = np.maximum(slots[each.elements], each.slots[own].max(0))
            shortest = min(shortest, each.shortest[own].min())
            sums[each.elements, 0] += len(own) * each.atoms
            sums[each.elements, 1:] += each.sums[own].sum(0)
            if energies is not None:
                counts = np.zeros(self.num_types)
                counts[each.elements] = each.atoms
                rows.append((counts, energies[own].mean(), len(own)))
        none = np.zeros((0, self.num_types)), np.zeros(0), np.zeros(0)
        every = [np.array(column) for column in zip(*rows, strict=True)] or none
        return Survey(
            slots=tuple(slots.tolist()),
            shortest=float(shortest),
            sums=torch.from_numpy(sums),
            counts=torch.from_numpy(every[0]),
            energies=torch.from_numpy(every[1]),
            num_energies=torch.from_numpy(every[2]).double(),
        )


def check_neighbors(frames: FrameList) -> str:
    """A sentence if the cutoff looks wrong for some of the frames, after `look`; else "".

    Raises DataError if no atom of any frame has a neighbour.
    """
    number = frames.num_neighbors()
    if not number.any():
        first = frames.systems[0]
        nearest = shortest_distance(np.asarray(first.coordinates[0]), None if first.boxes is None else first.boxes[0])
        raise DataError(
            f"No atom has a neighbour within rcut = {frames.cutoff} Å: in {first.frame_name(0)} the nearest "
            f"atoms are {nearest} apart. Check rcut and the units of coordinates and boxes: all are in Å."
        )
    if number.max() > MOST_NEIGHBORS:
        raise DataError(
            f"An atom of {frames.name(int(number.argmax()))} has {number.max()} neighbours within rcut = "
            f"{frames.cutoff} Å, more than {MOST_NEIGHBORS}: lower rcut (usual are 4 to 10 Å), or check the units of "
            "coordinates and boxes; all are in Å."
        )
    if not number.all():
        lonely = np.flatnonzero(number == 0)
        return (
            f"Frames in which no atom has a neighbour within {frames.cutoff} Å: {len(lonely)}; the first: "
            f"{frames.name(int(lonely[0]))}"
        )
    return ""
