"""Coordinates and forces left in their files: what is read equals the file, and a file that has changed is named."""

import os

import numpy as np
import pytest
from test_load import arrays as arrays_of
from test_load import lmdb_frames, write, write_lmdb

from rlekf_ext.errors import DataError
from rlekf_ext.potential.data import frame_of
from rlekf_ext.potential.load import load_systems
from rlekf_ext.potential.stored import FileArray, Rows

h5py = pytest.importorskip("h5py", reason="h5py is not installed")

TYPE_MAP = ["O", "Na", "Cl"]


def stored(path, array) -> Rows:
    np.save(path, array)
    mapped = np.load(path, mmap_mode="r")
    return Rows.of(FileArray(path, str(path), mapped.offset, mapped.dtype, array.shape))


@pytest.mark.parametrize("dtype", ["<f8", "<f4", ">f8", "<f2", "<i4"])
def test_any_choice_of_frames_is_as_in_the_array(dtype, tmp_path):
    whole = np.arange(7 * 4 * 3).reshape(7, 4, 3).astype(dtype)
    rows = stored(tmp_path / "a.npy", whole)
    assert rows.shape == whole.shape
    assert np.asarray(rows).dtype == np.float64
    for which in (slice(None), slice(2, 5), slice(None, None, -2), [3], [6, 0, 1, 2, 2], np.arange(7) % 2 == 0, []):
        chosen = np.array(which, dtype=np.int64) if isinstance(which, list) else which
        np.testing.assert_array_equal(rows[chosen], whole[chosen])
    np.testing.assert_array_equal(rows[-1], whole[-1])
    np.testing.assert_array_equal(rows[2:][np.array([1, 3])][1], whole[5])
    with pytest.raises(IndexError):
        rows[7]


def test_rows_of_several_files_with_an_order_of_the_atoms(tmp_path):
    first, second = np.random.default_rng(0).normal(size=(2, 5, 3, 3))
    both = Rows.joined([stored(tmp_path / f"{i}.npy", array) for i, array in enumerate((first, second))])
    wanted = np.concatenate([first, second])
    np.testing.assert_array_equal(both[np.array([8, 1, 9, 0])], wanted[[8, 1, 9, 0]])
    order = np.array([[2, 0], [1, 2]], dtype=np.int32)
    found = both.ordered(np.array([7, 3]), order)
    np.testing.assert_array_equal(found, [wanted[7][order[0]], wanted[3][order[1]]])
    np.testing.assert_array_equal(found[1], wanted[3][order[1]])


def kinds(root):
    """A path of every kind whose arrays stay in their files, and the file that holds the forces."""
    part = arrays_of()
    folder = write(root / "folder", [part])
    yield folder, folder / "set.000/force.npy"
    with h5py.File(root / "a.hdf5", "w") as file:
        for name in ("type.raw", "type_map.raw"):
            words = (folder / name).read_text().split()
            file[name] = np.array(words, dtype="S") if name == "type_map.raw" else np.array(words, dtype=int)
        for label, array in part.items():
            file[f"set.000/{label}.npy"] = array
    yield root / "a.hdf5", root / "a.hdf5"
    write_lmdb(root / "a.lmdb", lmdb_frames(part))
    yield root / "a.lmdb", root / "a.lmdb/data.mdb"


@pytest.mark.parametrize("kind", range(3), ids=["npy", "hdf5", "lmdb"])
@pytest.mark.parametrize("change", ["touched", "cut off", "gone"])
def test_a_file_that_has_changed_is_named(kind, change, tmp_path):
    path, file = list(kinds(tmp_path))[kind]
    (system,) = load_systems(path, TYPE_MAP)
    assert isinstance(system.coordinates, Rows)
    frame_of(system, 1, 3.0, 3)
    if change == "touched":
        os.utime(file, ns=(1, 1))
    elif change == "cut off":
        os.truncate(file, 100)
    else:
        file.unlink()
    message = "can no longer be read: No such file" if change == "gone" else "has changed since it was first read"
    with pytest.raises(DataError, match=f"{file.name} {message}"):
        frame_of(system, 1, 3.0, 3)


def test_relative_paths_hold_when_the_directory_changes(tmp_path, monkeypatch):
    paths = [path.relative_to(tmp_path) for path, _ in kinds(tmp_path)]
    monkeypatch.chdir(tmp_path)
    systems = load_systems(paths, TYPE_MAP)
    monkeypatch.chdir("/")
    for system in systems:
        np.testing.assert_array_equal(np.sort(system.forces, axis=None), np.sort(systems[0].forces, axis=None))


def test_compressed_arrays_and_arrays_in_other_orders_are_read_whole(tmp_path):
    (path, _), (hdf5, _), _ = kinds(tmp_path)
    expected = np.asarray(load_systems(path, TYPE_MAP)[0].coordinates)
    coordinates = np.load(path / "set.000/coord.npy")
    np.save(path / "set.000/coord.npy", np.asfortranarray(coordinates))
    with h5py.File(hdf5, "a") as file:
        del file["set.000/coord.npy"]
        file.create_dataset("set.000/coord.npy", data=coordinates, compression="gzip", chunks=(1, coordinates.shape[1]))
    for other in (path, hdf5):
        (system,) = load_systems(other, TYPE_MAP)
        assert isinstance(system.coordinates, np.ndarray)
        np.testing.assert_array_equal(system.coordinates, expected)


def test_a_store_of_many_shapes(tmp_path):
    """Frames of other atoms in turn, as in sets of many compositions: each is read by its own number."""
    frames = lmdb_frames(arrays_of(6))
    for i in (1, 3):  # an atom less
        frames[i] |= {name: frames[i][name][:1] for name in ("coords", "forces", "atom_types") if name in frames[i]}
    systems = load_systems(write_lmdb(tmp_path / "a.lmdb", frames), TYPE_MAP)
    assert [list(system.places) for system in systems] == [[0, 2, 4, 5], [1, 3]]
    for system in systems:
        for own, number in enumerate(system.places):
            wanted = np.sort(np.reshape(frames[number]["coords"], (-1, 3)), axis=None)
            np.testing.assert_array_equal(np.sort(system.coordinates[own], axis=None), wanted)


def test_hdf5_behind_an_external_link_is_read(tmp_path):
    path, _ = list(kinds(tmp_path))[1]
    expected = np.asarray(load_systems(path, TYPE_MAP)[0].forces)
    with h5py.File(path, "a") as file, h5py.File(tmp_path / "other.h5", "w") as other:
        other["padding"] = np.zeros(9)
        other["force"] = file["set.000/force.npy"][()]
        del file["set.000/force.npy"]
        file["set.000/force.npy"] = h5py.ExternalLink("other.h5", "/force")
    np.testing.assert_array_equal(load_systems(path, TYPE_MAP)[0].forces, expected)
