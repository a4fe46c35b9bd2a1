"""Systems: slices, the cut into training and validation, frames with neighbours, sel."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_load import TYPE_MAP, arrays, write

from rlekf_ext.errors import DataError, OptionError
from rlekf_ext.potential.data import auto_sel, frames, split
from rlekf_ext.potential.frames import FrameList, check_neighbors
from rlekf_ext.potential.load import load_systems

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "nacl" / "gpaw_pbe_8"


def test_slices_and_split(tmp_path):
    (system,) = load_systems(write(tmp_path, [arrays(10)]), TYPE_MAP)
    some = system[np.array([7, 1])]
    assert some.energies.tolist() == system.energies[[7, 1]].tolist()
    assert [len(part) for part in (system[2:5], some, system[::2])] == [3, 2, 5]
    assert system[2:5].boxes.shape == (3, 3, 3)
    train, validation = split([system, system[:1], system[:2]])
    assert [len(s) for s in train] == [8, 1, 1]
    assert [len(s) for s in validation] == [2, 1]
    np.testing.assert_array_equal(validation[0].energies, system.energies[8:])
    alone = [system[i : i + 1] for i in range(5)]
    other = replace(alone[0], types=alone[0].types[::-1].copy())
    train, validation = split([alone[0], other, *alone[1:]])  # five of the same atoms
    assert [s.energies[0] for s in train] == system.energies[[0, 1, 2, 3, 0]].tolist()
    assert [s.energies[0] for s in validation] == system.energies[[4]].tolist()
    assert split([system], 1.0)[1] == []
    with pytest.raises(OptionError, match=r"must be in \(0, 1\] but is: 0"):
        split([system], 0)


def looked(systems, cutoff):
    found = FrameList(systems, cutoff, 2)
    found.look(0.5)
    return found


def test_frames_and_sel(tmp_path):
    part = arrays(2)
    part["coord"][:] = [0, 0, 0, 2.5, 0, 0]
    systems = load_systems(write(tmp_path / "a", [part]), TYPE_MAP)
    both = frames(systems, cutoff=3.0, num_types=2, dtype=torch.float32)
    assert len(both) == 2
    assert both[0].slots == (2, 2)  # a chain along x: two neighbours of the other element, none of its own
    assert both[0].edges.dtype == torch.float32
    assert both[1].energy.item() == part["energy"][1]
    np.testing.assert_allclose(both[1].forces.numpy().ravel(), part["force"][1], rtol=1e-6)
    np.testing.assert_allclose(both[1].virial.numpy().ravel(), part["virial"][1], rtol=1e-6)
    assert auto_sel(looked(systems, 3.0).survey().slots) == (4, 4)
    part["coord"][1] = [0, 0, 0, 0.05, 0, 0]
    with pytest.raises(DataError, match=r"b, frame 1: .*0\.1"):
        frames(load_systems(write(tmp_path / "b", [part]), TYPE_MAP), cutoff=3.0, num_types=2)


def test_a_cutoff_that_does_not_fit_the_data(tmp_path):
    systems = load_systems(write(tmp_path, [arrays(2)]), TYPE_MAP)
    with pytest.raises(DataError, match=r"within rcut = 0\.6 Å: in .*, frame 0 the nearest atoms are 2\.\d+ Å apart\."):
        check_neighbors(looked(systems, 0.6))
    assert check_neighbors(looked(systems, 3.5)) == ""
    with pytest.raises(DataError, match=r"An atom of .*, frame \d has \d+ neighbours within rcut = 50\.0 Å, more than"):
        check_neighbors(looked(systems, 50.0))


def test_frames_without_neighbours_beside_others(tmp_path):
    """Lone atoms are references in some sets."""
    far = {"coord": np.array([[0.0, 0, 0, 9, 0, 0], [0, 0, 0, 2, 0, 0]]), "energy": np.zeros(2)}
    folder = write(tmp_path, [far])
    (folder / "nopbc").touch()
    systems = load_systems(folder, TYPE_MAP)
    said = check_neighbors(looked(systems, 3.0))
    assert said == f"Frames in which no atom has a neighbour within 3.0 Å: 1; the first: {folder}, frame 0"
    with pytest.raises(DataError, match=r"the nearest atoms are 9 Å apart"):
        check_neighbors(looked([systems[0][:1]], 3.0))


def test_frames_keep_their_numbers_in_the_file(tmp_path):
    """Through several sets, other labels, and the cut into training and validation."""
    first, second = arrays(3), arrays(4, seed=1)
    del second["virial"]
    systems = load_systems(write(tmp_path, [first, second]), TYPE_MAP)
    _, held_out = split(systems, 0.5)
    assert [frame.name for frame in frames(held_out, 3.0, 2)] == [f"{tmp_path}, frame {i}" for i in (2, 5, 6)]


def test_auto_sel_rounds_as_deepmd_kit():
    assert auto_sel((38, 72)) == (44, 80)  # 41.8 and 79.2
    assert auto_sel((40, 0)) == (44, 0)  # 40 * 1.1 = 44.000000000000006 is 44, not 48
    assert auto_sel((40, 10), factor=1.5) == (60, 16)


def test_the_example_is_periodic_to_several_images():
    train, validation = split(load_systems(EXAMPLE, ["Na", "Cl"]))
    assert (len(train[0]), len(validation[0])) == (240, 60)
    (frame,) = frames([validation[0][:1]], 6.0, 2)
    assert frame.slots[0] > 8  # more than there are atoms
