"""Frames: neighbour lists against ase, the layout of slots, several frames side by side, and what is refused."""

import ase
import ase.neighborlist
import numpy as np
import pytest
import torch

from rlekf_ext.errors import DataError, OptionError
from rlekf_ext.ops.native import OPS
from rlekf_ext.potential.descriptor import switched
from rlekf_ext.potential.neighbors import Frame, collate, make_frame

CUTOFF = 4.0


def random_structure(kind: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Coordinates, box and types: atoms on a jittered grid in a triclinic cell, or without one."""
    rng = np.random.default_rng(seed)
    counts = {"small": (2, 1, 1), "flat": (4, 3, 1), "large": (5, 4, 4), "molecule": (3, 2, 2)}[kind]
    box = np.diag(counts) * 2.4 + rng.uniform(-0.5, 0.5, (3, 3))
    grid = np.stack(np.meshgrid(*map(np.arange, counts), indexing="ij"), -1).reshape(-1, 3) / counts
    points = grid @ box + rng.uniform(-0.3, 0.3, grid.shape)
    points += rng.integers(-1, 2, grid.shape) @ box if kind != "molecule" else 0.0  # not all inside the cell
    return points, None if kind == "molecule" else box, rng.integers(0, 3, len(points))


def pairs_of(frame: Frame) -> np.ndarray:
    """Sorted rows (atom, neighbour, vector) of the slots that are filled."""
    edges, neighbors = frame.edges.numpy(), frame.neighbors.numpy()
    atom, slot = np.nonzero(np.linalg.norm(edges, axis=-1) < CUTOFF)
    rows = np.column_stack([atom, neighbors[atom, slot], edges[atom, slot]])
    return rows[np.lexsort(rows.round(6).T[::-1])]


@pytest.mark.parametrize("kind", ["small", "flat", "large", "molecule"])
@pytest.mark.parametrize("seed", range(3))
def test_neighbors_equal_those_of_ase(kind: str, seed: int) -> None:
    points, box, types = random_structure(kind, seed)
    atoms = ase.Atoms(numbers=types + 1, positions=points, cell=box, pbc=box is not None)
    i, j, vectors = ase.neighborlist.neighbor_list("ijD", atoms, CUTOFF)
    expected = np.column_stack([i, j, vectors])
    expected = expected[np.lexsort(expected.round(6).T[::-1])]
    np.testing.assert_allclose(pairs_of(make_frame(points, box, types, CUTOFF, 3)), expected, atol=1e-12)


def test_slots_are_grouped_by_element_with_the_nearest_first() -> None:
    points, box, types = random_structure("large")
    frame = make_frame(points, box, types, CUTOFF, 4)
    assert frame.slots[3] == 0
    assert frame.edges.shape == (len(points), sum(frame.slots), 3)
    distance = frame.edges.norm(dim=-1)
    own = torch.arange(len(points))[:, None]
    start = 0
    for element, count in enumerate(frame.slots):
        block = slice(start, start + count)
        start += count
        real = distance[:, block] < CUTOFF
        assert (distance[:, block].diff(dim=1) >= 0).all()
        assert (types[frame.neighbors[:, block]][real.numpy()] == element).all()
        assert not count or real.sum(1).max() == count
        assert torch.where(real, own, frame.neighbors[:, block]).eq(own).all()
        assert distance[:, block][~real].eq(2 * CUTOFF).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["small", "flat", "large", "molecule"])
def test_the_shortest_edge_is_that_of_the_nearest_atoms(kind: str, dtype: torch.dtype) -> None:
    frame = make_frame(*random_structure(kind), CUTOFF, 3, dtype=dtype)
    assert frame.shortest_edge() == frame.edges.norm(dim=-1).min()


def test_neighbours_equally_far_are_in_the_order_of_their_index() -> None:
    points = np.stack(np.meshgrid(*[2.5 * np.arange(4)] * 3, indexing="ij"), -1).reshape(-1, 3)
    shuffled = np.random.default_rng(0).permutation(points)
    frame = make_frame(shuffled, 10 * np.eye(3), [0] * 64, CUTOFF, 1)
    assert frame.slots == (18,)  # a simple cubic lattice: 6 nearest, 12 next
    for shell in frame.neighbors.split((6, 12), dim=1):
        assert (shell.diff(dim=1) > 0).all()


@pytest.mark.parametrize("kind", ["small", "flat", "large", "molecule"])
def test_a_survey_says_what_the_frames_would(kind: str) -> None:
    structures = [random_structure(kind, seed) for seed in range(3)]
    types = structures[0][2]
    points, boxes = (np.stack([s[k] for s in structures]) if structures[0][k] is not None else None for k in (0, 1))
    cells = None if boxes is None else torch.from_numpy(boxes)
    slots, shortest, sums = OPS.survey(torch.from_numpy(points), cells, torch.from_numpy(types), 3, CUTOFF, 0.5)
    for i, coordinates in enumerate(points):
        frame = make_frame(coordinates, None if boxes is None else boxes[i], types, CUTOFF, 3)
        assert tuple(slots[i].tolist()) == frame.slots
        assert float(shortest[i]) == frame.shortest_edge()
        _, direction, s, _ = switched(frame.edges, CUTOFF, 0.5)
        per_atom = torch.stack([s.sum((1, 2)), s.square().sum((1, 2)), (s * direction).sum((1, 2))], 1)
        wanted = torch.zeros(3, 3, dtype=torch.float64).index_add_(0, frame.types, per_atom)
        torch.testing.assert_close(sums[i], wanted, rtol=1e-12, atol=1e-12 * float(s.sum()))


def test_a_structure_that_cannot_be_searched_has_a_survey_of_nan() -> None:
    points = torch.tensor([[[0.0, 0, 0]], [[0, 0, torch.nan]], [[1, 2, 3]]], dtype=torch.float64)
    cells = 3 * torch.eye(3, dtype=torch.float64).repeat(3, 1, 1)
    cells[2] = 0
    slots, shortest, _ = OPS.survey(points, cells, torch.tensor([0]), 1, CUTOFF, 0.5)
    assert slots.tolist() == [[6], [0], [0]]
    assert shortest.isnan().tolist() == [False, True, True]


def test_schemas_and_fake_kernels() -> None:
    points, _, types = random_structure("molecule")
    i, j = np.triu_indices(len(points), 1)
    arguments = (np.stack([i, j], 1), points[j] - points[i], types)
    tensors = (torch.from_numpy(array) for array in arguments)
    torch.library.opcheck(torch.ops.rlekf.place_neighbors.default, (*tensors, 3, 100.0))
    atoms, cell = torch.from_numpy(points), 9 * torch.eye(3, dtype=torch.float64)
    for box in (None, cell):
        torch.library.opcheck(torch.ops.rlekf.find_pairs.default, (atoms, box, CUTOFF))
        boxes = None if box is None else box[None]
        torch.library.opcheck(
            torch.ops.rlekf.survey.default, (atoms[None], boxes, torch.from_numpy(types), 3, CUTOFF, 0.5)
        )


def test_a_lone_atom_has_no_slots_and_its_images_in_a_cell_do_count() -> None:
    alone = make_frame([[0, 0, 0]], None, [0], CUTOFF, 1)
    assert alone.slots == (0,)
    assert alone.edges.shape == (1, 0, 3)
    assert make_frame([[0, 0, 0]], 3 * np.eye(3), [0], CUTOFF, 1).slots == (6,)


def test_labels_and_dtypes() -> None:
    points, box, types = random_structure("small")
    frame = make_frame(
        points, box, types, CUTOFF, 3, energy=-1e5 - 1e-4, forces=points, virial=np.eye(3).ravel(), dtype=torch.float32
    )
    assert frame.energy is not None
    assert frame.virial is not None
    assert frame.forces is not None
    assert frame.energy.tolist() == [-1e5 - 1e-4]  # float32 would lose the last digits
    assert frame.virial.shape == (1, 3, 3)
    assert frame.edges.dtype == frame.forces.dtype == frame.num_atoms.dtype == torch.float32
    moved = frame.to(torch.float64)
    assert moved.edges.dtype == torch.float64
    assert moved.types.dtype == torch.int64
    assert frame.to(torch.float32).energy.dtype == torch.float64  # type: ignore[union-attr]


def test_collate_puts_frames_side_by_side() -> None:
    structures = [random_structure(kind) for kind in ("small", "molecule", "flat")]
    frames = [make_frame(*s, CUTOFF, 3, energy=k, forces=s[0]) for k, s in enumerate(structures)]
    joined = collate(frames)
    assert joined.slots == tuple(np.max([f.slots for f in frames], axis=0))
    assert joined.num_atoms.tolist() == [len(s[0]) for s in structures]
    assert joined.energy is not None
    assert joined.energy.tolist() == [0, 1, 2]
    assert joined.virial is None
    assert joined.structure.tolist() == [k for k, s in enumerate(structures) for _ in s[0]]
    first, together = 0, pairs_of(joined)
    for frame in frames:
        n = len(frame.types)
        part = together[(together[:, 0] >= first) & (together[:, 0] < first + n)]
        part[:, :2] -= first
        np.testing.assert_array_equal(part, pairs_of(frame))
        first += n
    unlabelled = make_frame(*structures[0], CUTOFF, 3)
    assert collate([frames[0], unlabelled]).energy is None


def test_what_cannot_be_a_frame_is_refused() -> None:
    box = 5 * np.eye(3)
    with pytest.raises(DataError, match=r"Atoms [01] and [01] are 0\.05 Å apart, closer than 0\.1 Å"):
        make_frame([[0, 0, 0], [4.95, 0, 0]], box, [0, 0], CUTOFF, 1)
    with pytest.raises(DataError, match=r"Atoms [01] and [01] are 0 Å apart"):
        make_frame([[0, 0, 0], [0, 0, 0]], None, [0, 0], CUTOFF, 1)
    with pytest.raises(DataError, match=r"0 \.\.\. 0"):
        make_frame([[0, 0, 0]], box, [1], CUTOFF, 1)
    with pytest.raises(DataError, match="finite"):
        make_frame([[0, 0, np.nan]], box, [0], CUTOFF, 1)
    with pytest.raises(DataError, match="one per atom"):
        make_frame([[0, 0, 0]], box, [0, 0], CUTOFF, 1)
    with pytest.raises(DataError, match="rows the cell vectors"):
        make_frame([[0, 0, 0]], np.ones(9), [0], CUTOFF, 1)
    with pytest.raises(DataError, match="forces"):
        make_frame([[0, 0, 0]], box, [0], CUTOFF, 1, forces=[1.0])
    with pytest.raises(ValueError, match="no frame"):
        collate([])
    with pytest.raises(ValueError, match="one cutoff"):
        collate([make_frame([[0, 0, 0]], box, [0], r, 1) for r in (3.0, 4.0)])
    with pytest.raises(OptionError, match=r"The cutoff must be above 0\.1 Å"):
        make_frame([[0, 0, 0]], box, [0], 0.05, 1)
