"""Structures as the network takes them: atoms and, for each atom, the vectors to its neighbours within the cutoff."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from math import inf, isfinite, prod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rlekf_ext.environment import moved
from rlekf_ext.errors import DataError, OptionError
from rlekf_ext.ops.native import OPS
from rlekf_ext.options import KINDS

# Two nuclei this close are a mistake in the data, and 1/r would drown every other neighbour.
SHORTEST_DISTANCE = 0.1  # Å
FARTHEST = 1e6  # Å; so far out, too, is a mistake


@dataclass(frozen=True, eq=False)
class Frame:
    """One structure, or several side by side, with neighbours and, if known, labels.

    n atoms, B structures, K neighbour slots per atom. The slots are grouped by the neighbour's element: slots[t] slots
    for element t, sum(slots) = K, nearest first within an element. A slot without a neighbour points to its own atom
    and its edge is 2 r_c long, so that its weight s(r) and every derivative of it are exactly zero.
    """

    types: Tensor  # (n,) int64, index into the type map
    structure: Tensor  # (n,) int64, the structure each atom belongs to, 0 ... B-1, ascending
    edges: Tensor  # (n, K, 3), Å, from the atom to its neighbour
    neighbors: Tensor  # (n, K) int64, the neighbour's row in this frame
    slots: tuple[int, ...]  # neighbour slots of each element
    num_atoms: Tensor  # (B,), atoms of each structure, in the dtype of edges
    energy: Tensor | None = None  # (B,), eV, always float64: a total energy has more digits than float32
    forces: Tensor | None = None  # (n, 3), eV/Å
    virial: Tensor | None = None  # (B, 3, 3), eV
    cutoff: float | None = None  # Å, r_c of the neighbour list; None if the frame was put together by hand
    name: str = ""  # where the structure comes from, for messages

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Frame:
        """Return the frame with its real numbers in `dtype` (the energy stays float64) and every tensor on `device`; a
        copy to a GPU does not wait for it. The frame itself if nothing changes."""
        found: dict[str, Tensor] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                keep = field.name == "energy" or not value.is_floating_point()
                value = value if keep or dtype is None else value.to(dtype)
                found[field.name] = value if device is None else moved(value, device)
        if all(tensor is getattr(self, name) for name, tensor in found.items()):
            return self
        return replace(self, **found)  # type: ignore[arg-type]

    @property
    def labels(self) -> tuple[str, ...]:
        """The kinds of label that it has: of energy, force, virial."""
        given = zip(KINDS, (self.energy, self.forces, self.virial), strict=True)
        return tuple(kind for kind, label in given if label is not None)

    def shortest_edge(self) -> float:
        """The distance of the two nearest atoms in Å, infinite if no atom has a neighbour within the cutoff."""
        if not any(self.slots):
            return inf
        nearest = [start for start, count in zip(accumulate((0, *self.slots)), self.slots, strict=False) if count]
        return float(self.edges[:, nearest].norm(dim=-1).min())


def make_frame(
    coordinates: npt.ArrayLike,
    box: npt.ArrayLike | None,
    types: npt.ArrayLike,
    cutoff: float,
    num_types: int,
    *,
    energy: float | None = None,
    forces: npt.ArrayLike | None = None,
    virial: npt.ArrayLike | None = None,
    dtype: torch.dtype = torch.float64,
    name: str = "",
) -> Frame:
    """Build the frame of one structure: every pair within the cutoff, all periodic images included.

    coordinates (n, 3) Å, box (3, 3) Å with the cell vectors as rows or None for a structure that is not periodic,
    types (n,) below num_types, energy eV, forces (n, 3) eV/Å, virial (3, 3) eV.

    Raises DataError if a shape or a type is wrong, a number is not finite, two atoms are closer than 0.1 Å or the box
    is no box for the cutoff, and OptionError for a cutoff of 0.1 Å or less.
    """
    points, cell, elements = _checked(coordinates, box, types, num_types)
    if not cutoff > SHORTEST_DISTANCE:
        raise OptionError(f"The cutoff must be above {SHORTEST_DISTANCE} Å, but is {cutoff} Å.")
    n = len(points)
    pairs, vectors = _pairs(points, cell, cutoff)
    edges, neighbors, slots, shortest = OPS.place_neighbors(pairs, vectors, elements, num_types, cutoff)
    if shortest < SHORTEST_DISTANCE:
        i, j = pairs[vectors.norm(dim=1).argmin()].tolist()
        raise DataError(
            f"Atoms {i} and {j} are {float(shortest):.3g} Å apart, closer than {SHORTEST_DISTANCE} Å: "
            "check the coordinates, the box and their units."
        )

    def label(value: npt.ArrayLike | None, shape: tuple[int, ...], name: str, dtype: torch.dtype) -> Tensor | None:
        if value is None:
            return None
        array = np.asarray(value, dtype=np.float64)
        if array.size != prod(shape) or not np.isfinite(array).all():
            raise DataError(f"The {name} of a structure of {n} atoms needs finite numbers of shape {shape}.")
        return torch.tensor(array.reshape(shape), dtype=dtype)

    return Frame(
        types=elements,
        structure=torch.zeros(n, dtype=torch.int64),
        edges=edges.to(dtype),
        neighbors=neighbors,
        slots=tuple(slots.tolist()),
        num_atoms=torch.tensor([n], dtype=dtype),
        energy=label(energy, (1,), "energy", torch.float64),
        forces=label(forces, (n, 3), "forces", dtype),
        virial=label(virial, (1, 3, 3), "virial", dtype),
        cutoff=float(cutoff),
        name=name,
    )


def shortest_distance(coordinates: np.ndarray, box: np.ndarray | None) -> str:
    """The distance of the two nearest atoms or periodic images, with its unit; coordinates (n, 3) and box (3, 3) Å."""
    for cutoff in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0):
        _, vectors = _pairs(coordinates, box, cutoff)
        if len(vectors):
            return f"{float(vectors.norm(dim=1).min()):.3g} Å"
    return "more than 32 Å"


def thick_box(
    box: npt.ArrayLike, periodic: npt.ArrayLike, coordinates: npt.ArrayLike, vacuum: float
) -> np.ndarray | None:
    """A cell (3, 3) that is periodic everywhere, for n atoms that are `periodic` (3,) along some of its vectors only:
    the others are replaced by vectors across them, longer than the atoms' extent by `vacuum`. Without any, None.

    Lengths in Å, coordinates (n, 3). Raises DataError for a periodic cell vector of length 0.
    """
    cell, kept = np.array(box, dtype=np.float64), np.asarray(periodic, dtype=bool)
    if not np.linalg.norm(cell[kept], axis=1).all():
        raise DataError(f"Atoms are periodic along a cell vector of length 0: {cell.tolist()}; set the cell or pbc.")
    if not kept.any():
        return None
    if kept.all():
        return cell
    across = np.linalg.svd(cell[kept])[2][kept.sum() :]
    cell[~kept] = across * (np.ptp(np.asarray(coordinates) @ across.T, axis=0) + vacuum)[:, None]
    return cell


def collate(frames: Sequence[Frame]) -> Frame:
    """Put several frames side by side into one, with slots for the most neighbours of each element.

    A label that some frame lacks is dropped. Raises ValueError if there is no frame, or if cutoffs or numbers of
    elements differ.
    """
    if not frames:
        raise ValueError("There is no frame to collate: give at least one.")
    if len({(frame.cutoff, len(frame.slots)) for frame in frames}) > 1:
        raise ValueError("Frames side by side need one cutoff and one type map: make them with the same arguments.")
    if len(frames) == 1:
        return frames[0]
    slots = tuple(max(counts) for counts in zip(*(frame.slots for frame in frames), strict=True))
    first_atom = np.cumsum([0] + [len(frame.types) for frame in frames])
    first_structure = np.cumsum([0] + [len(frame.num_atoms) for frame in frames])
    wide = [_widen(frame, slots) for frame in frames]

    def joined(name: str) -> Tensor | None:
        values = [getattr(frame, name) for frame in frames]
        return None if any(value is None for value in values) else torch.cat(values)

    return Frame(
        types=torch.cat([frame.types for frame in frames]),
        structure=torch.cat([f.structure + int(b) for f, b in zip(frames, first_structure, strict=False)]),
        edges=torch.cat([edges for edges, _ in wide]),
        neighbors=torch.cat([rows + int(start) for (_, rows), start in zip(wide, first_atom, strict=False)]),
        slots=slots,
        num_atoms=torch.cat([frame.num_atoms for frame in frames]),
        energy=joined("energy"),
        forces=joined("forces"),
        virial=joined("virial"),
        cutoff=frames[0].cutoff,
    )


def _checked(
    coordinates: npt.ArrayLike, box: npt.ArrayLike | None, types: npt.ArrayLike, num_types: int
) -> tuple[np.ndarray, np.ndarray | None, Tensor]:
    points = np.asarray(coordinates, dtype=np.float64)
    elements = np.array(types, dtype=np.int64)
    cell = None if box is None else np.asarray(box, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 3 or len(points) == 0:
        raise DataError(f"Coordinates must have the shape (n, 3) with n >= 1, but have {points.shape}.")
    if elements.shape != (len(points),):
        raise DataError(f"Types must have the shape ({len(points)},), one per atom, but have {elements.shape}.")
    if elements.min() < 0 or elements.max() >= num_types:
        raise DataError(f"Types must lie in 0 ... {num_types - 1}, but reach {elements.min()} and {elements.max()}.")
    if cell is not None and cell.shape != (3, 3):
        raise DataError(f"A box must have the shape (3, 3), its rows the cell vectors, but has {cell.shape}.")
    reach = [float(np.abs(array).max()) for array in (points, cell) if array is not None]
    if not all(map(isfinite, reach)):
        raise DataError("Coordinates and box must be finite numbers, but some are not.")
    if max(reach) > FARTHEST:
        raise DataError(
            f"Coordinates and box must stay within {FARTHEST:g} Å, but reach {max(reach):g} Å: check their units."
        )
    return points, cell, torch.from_numpy(elements)


def _pairs(points: np.ndarray, cell: np.ndarray | None, cutoff: float) -> tuple[Tensor, Tensor]:
    """(i, j) and vectors from i to j of all pairs within the cutoff, each in one direction only. Raises DataError."""
    box = None if cell is None else torch.from_numpy(np.ascontiguousarray(cell))
    pairs, vectors, feasible = OPS.find_pairs(torch.from_numpy(np.ascontiguousarray(points)), box, cutoff)
    if not feasible:
        extent = np.ptp(points, axis=0)
        if cell is not None:  # from face to face
            faces = np.cross(cell[[1, 2, 0]], cell[[2, 0, 1]])
            extent = abs(cell[0] @ faces[0]) / np.maximum(np.linalg.norm(faces, axis=1), 1e-30)
        size = " × ".join(f"{length:.3g}" for length in extent)
        raise DataError(
            f"{len(points)} atoms in {size} Å cannot be searched for neighbours within {cutoff} Å: check the "
            "coordinates, the box, their units and rcut."
        )
    return pairs, vectors


def _widen(frame: Frame, slots: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The frame's edges and neighbours with `slots` neighbour slots."""
    if frame.slots == slots:
        return frame.edges, frame.neighbors
    if frame.cutoff is None:
        raise ValueError("A frame without its cutoff cannot be given empty slots: build it with make_frame.")
    starts = np.cumsum((0,) + slots)
    columns = np.concatenate([start + np.arange(used) for start, used in zip(starts, frame.slots, strict=False)])
    n = len(frame.types)
    edges = frame.edges.new_zeros((n, sum(slots), 3))
    edges[:, :, 0] = 2 * frame.cutoff
    neighbors = torch.arange(n, device=edges.device)[:, None].repeat(1, sum(slots))
    where = torch.from_numpy(columns.astype(np.int64)).to(edges.device)
    return edges.index_copy(1, where, frame.edges), neighbors.index_copy(1, where, frame.neighbors)
