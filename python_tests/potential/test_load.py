"""Reading data sets: every form gives the same system, and every flaw is named."""

import sys
from pathlib import Path

import numpy as np
import pytest

from rlekf_ext.errors import DataError, RlekfError
from rlekf_ext.potential import data, load
from rlekf_ext.potential.data import System, frames
from rlekf_ext.potential.load import load_systems, split_format

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
TYPE_MAP = ["Cl", "Na"]  # not the order of the files


def arrays(num_frames=4, seed=0):
    random = np.random.default_rng(seed)
    return {
        "coord": np.array([0, 0, 0, 2.5, 0, 0]) + random.uniform(-0.1, 0.1, (num_frames, 6)),
        "box": np.tile(5 * np.eye(3).reshape(9), (num_frames, 1)),
        "energy": random.normal(size=num_frames),
        "force": random.normal(size=(num_frames, 6)),
        "virial": random.normal(size=(num_frames, 9)),
    }


def write(folder, parts, types="0 1", names="Na Cl"):
    """A deepmd/npy folder with one set for each dict of arrays."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "type.raw").write_text(types.replace(" ", "\n"))
    if names:
        (folder / "type_map.raw").write_text(names.replace(" ", "\n"))
    for i, part in enumerate(parts):
        (folder / f"set.{i:03d}").mkdir(exist_ok=True)
        for label, array in part.items():
            np.save(folder / f"set.{i:03d}" / f"{label}.npy", array)
    return folder


def same(one: System, other: System) -> bool:
    """Equal, whatever the order of the atoms."""
    a, b = np.argsort(one.types), np.argsort(other.types)
    pairs = [
        (one.types[a], other.types[b]),
        (one.coordinates[:, a], other.coordinates[:, b]),
        (one.forces[:, a], other.forces[:, b]),
        (one.energies, other.energies),
        (one.boxes, other.boxes),
        (one.virials, other.virials),
    ]
    return all(np.allclose(x, y, atol=1e-6) for x, y in pairs)


def test_npy_folder_of_two_sets(tmp_path):
    whole = arrays()
    halves = [{k: v[:3] for k, v in whole.items()}, {k: v[3:] for k, v in whole.items()}]
    (system,) = load_systems(write(tmp_path / "a", halves), TYPE_MAP)
    assert len(system) == 4
    assert system.types.tolist() == [1, 0]
    assert system.types.dtype == np.int64
    assert system.name == str(tmp_path / "a")
    np.testing.assert_array_equal(system.coordinates, whole["coord"].reshape(4, 2, 3))
    np.testing.assert_array_equal(system.boxes, whole["box"].reshape(4, 3, 3))
    np.testing.assert_array_equal(system.energies, whole["energy"])
    np.testing.assert_array_equal(system.forces, whole["force"].reshape(4, 2, 3))
    np.testing.assert_array_equal(system.virials, whole["virial"].reshape(4, 3, 3))


def test_float32_files_flat_single_frames_and_columns(tmp_path):
    one = {label: array[0].astype(np.float32) for label, array in arrays().items()}
    (system,) = load_systems(write(tmp_path / "flat", [one]), TYPE_MAP)
    assert len(system) == 1
    assert system.forces.dtype == np.float64
    column = arrays() | {"energy": arrays()["energy"][:, None]}
    assert load_systems(write(tmp_path / "column", [column]), TYPE_MAP)[0].energies.shape == (4,)


def test_nopbc_no_virial_and_no_type_map_file(tmp_path):
    part = arrays()
    del part["virial"], part["box"]
    folder = write(tmp_path / "a", [part], names=None)
    (folder / "nopbc").touch()
    (system,) = load_systems(str(folder), TYPE_MAP)
    assert system.boxes is None
    assert system.virials is None
    assert system.types.tolist() == [0, 1]


def test_raw_folder_equals_npy_folder(tmp_path):
    part = arrays()
    folder = write(tmp_path / "a", [part])
    for label, array in part.items():
        np.savetxt(folder / f"{label}.raw", array)
    npy, raw = load_systems([folder, f"deepmd/raw:{folder}"], TYPE_MAP)
    assert same(npy, raw)
    for file in (folder / "set.000").iterdir():
        file.unlink()
    (folder / "set.000").rmdir()
    assert same(load_systems(folder, TYPE_MAP)[0], raw)


def test_a_folder_gives_all_systems_below_it(tmp_path):
    write(tmp_path / "b" / "deep", [arrays()])
    write(tmp_path / "a", [arrays(2)])
    assert [len(system) for system in load_systems(tmp_path, TYPE_MAP)] == [2, 4]
    assert [len(system) for system in load_systems([tmp_path / "b", tmp_path], TYPE_MAP)] == [4, 2, 4]


def test_dpdata_formats_equal_the_folder(tmp_path, monkeypatch):
    dpdata = pytest.importorskip("dpdata", reason="dpdata is not installed")
    folder = write(tmp_path / "a", [arrays()])
    theirs = dpdata.LabeledSystem(str(folder), fmt="deepmd/npy")
    theirs.to("extxyz", str(tmp_path / "a.xyz"))
    multi = dpdata.MultiSystems(theirs)
    multi.to("deepmd/npy/mixed", str(tmp_path / "mixed"))
    (mixed,) = (tmp_path / "mixed").iterdir()
    monkeypatch.chdir(tmp_path)
    ours, xyz, mix = load_systems(["a", "extxyz:a.xyz", f"deepmd/npy/mixed:{mixed}"], TYPE_MAP)
    assert same(ours, xyz)
    assert same(ours, mix)
    with pytest.raises(DataError, match=r"set.000 is a mixed-type set .* \"deepmd/npy/mixed:mixed/"):
        load_systems(mixed.relative_to(tmp_path), TYPE_MAP)
    next(mixed.glob("set.*/force.npy")).unlink()
    with pytest.raises(DataError, match="has no forces; training needs energies and forces"):
        load_systems(f"deepmd/npy/mixed:{mixed}", TYPE_MAP)


MOVEMENT = """ 2 atoms,Iteration (fs) =    0.0, Etot,Ep,Ek (eV) =   -9.0  -10.0   1.0, SCF =  10
 Lattice vector (Angstrom)
  5.0 0.0 0.0
  0.0 5.0 0.0
  0.0 0.0 5.0
 Position (normalized), move_x, move_y, move_z
 11 0.0 0.0 0.0 1 1 1
 17 0.5 0.0 0.0 1 1 1
 Force (-force, eV/Angstrom)
 11 -0.1 0.0 0.0
 17 0.1 0.0 0.0
 -------------------------------------------------
"""

OUTCAR = """   TITEL  = PAW_PBE Na 08Apr2002
   TITEL  = PAW_PBE Cl 06Sep2000
   NELM   =     60;   NELMIN=  2
   ions per type =               1   1
----- Iteration      1(   {scf})  -----
  VOLUME and BASIS-vectors are now :



      direct lattice vectors                 reciprocal lattice vectors
     5.0  0.0  0.0     0.2  0.0  0.0
     0.0  5.0  0.0     0.0  0.2  0.0
     0.0  0.0  5.0     0.0  0.0  0.2
 POSITION                                       TOTAL-FORCE (eV/Angst)
 -----------------------------------------------------------------------
      0.0  0.0  0.0   0.1  0.0  0.0
      2.5  0.0  0.0  -0.1  0.0  0.0
  free  energy   TOTEN  =       -10.0 eV
"""


@pytest.mark.parametrize(("name", "text"), [("MOVEMENT", MOVEMENT), ("OUTCAR", OUTCAR.format(scf=9))])
def test_files_known_by_their_name(tmp_path, name, text):
    pytest.importorskip("dpdata", reason="dpdata is not installed")
    (tmp_path / name).write_text(text)
    (system,) = load_systems(tmp_path / name, TYPE_MAP)
    assert system.types.tolist() == [1, 0]
    assert system.energies.tolist() == [-10.0]
    np.testing.assert_allclose(system.forces[0], [[0.1, 0, 0], [-0.1, 0, 0]], atol=1e-12)
    np.testing.assert_allclose(system.coordinates[0, 1] - system.coordinates[0, 0], [2.5, 0, 0], atol=1e-12)


def test_extxyz_of_two_formulas_and_without_a_cell(tmp_path):
    pytest.importorskip("dpdata", reason="dpdata is not installed")
    head = "energy=-1.5 Properties=species:S:1:pos:R:3:forces:R:3 "
    cell = 'pbc="T T T" Lattice="5 0 0 0 5 0 0 0 5"\n'
    two = "Na 0 0 0 0.1 0 0\nCl 2.5 0 0 -0.1 0 0\n"
    (tmp_path / "a.xyz").write_text("2\n" + head + cell + two + "1\n" + head + cell + "Cl 1 1 1 0 0 0\n")
    (tmp_path / "b.extxyz").write_text("2\n" + head + 'pbc="F F F"\n' + two)
    pair, single, molecule = load_systems([tmp_path / "a.xyz", tmp_path / "b.extxyz"], TYPE_MAP)
    assert sorted(pair.types) == [0, 1]
    assert single.types.tolist() == [0]
    assert "a.xyz (" in single.name
    assert molecule.boxes is None


def flaw(label, index, value):
    def spoil(part):
        part[label][index] = value

    return spoil


def drop(label):
    return lambda part: part.pop(label)


def cut(label):
    def spoil(part):
        part[label] = part[label][:, :5] if label != "energy" else part[label][:3]

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop("coord"), r"set.000/coord.npy is missing"),
        (drop("energy"), r"set.000/energy.npy is missing\."),
        (drop("force"), r"set.000/force.npy is missing"),
        (drop("box"), r"set.000/box.npy is missing; .* an empty file nopbc"),
        (cut("coord"), r"coord.npy has shape \(4, 5\), but 4 frames of 2 atoms want \(4, 6\) or \(4, 2, 3\)"),
        (cut("force"), r"force.npy has shape \(4, 5\), .* want \(4, 6\)"),
        (cut("energy"), r"energy.npy has shape \(3,\), .* want \(4, 1\) or \(4,\)"),
        (cut("virial"), r"virial.npy has shape \(4, 5\), .* want \(4, 9\)"),
        (flaw("coord", (2, 4), np.nan), r"coord.npy: frame 2, atom 1 has the value nan"),
        (flaw("force", (1, 0), np.inf), r"force.npy: frame 1, atom 0 has the value inf"),
        (flaw("energy", 3, -np.inf), r"energy.npy: frame 3 has the value -inf"),
        (flaw("virial", (0, 0), np.nan), r"virial.npy: frame 0 has the value nan"),
        (flaw("box", 2, 0.0), r"box.npy: the box of frame 2 has volume 0 Å\^3"),
        (lambda part: part.update(coord=np.zeros((0, 6))), r"coord.npy holds no frames"),
    ],
)
def test_flaws_of_a_set_name_the_file(tmp_path, spoil, message):
    part = arrays()
    spoil(part)
    with pytest.raises(DataError, match=message) as error:
        load_systems(write(tmp_path, [part]), TYPE_MAP)
    assert "\n" not in str(error.value)


def test_flaws_of_a_folder(tmp_path):
    good = write(tmp_path / "good", [arrays()])
    with pytest.raises(DataError, match=r"nowhere does not exist \(current directory: "):
        load_systems(tmp_path / "nowhere", TYPE_MAP)
    with pytest.raises(DataError, match="list of paths is empty"):
        load_systems([], TYPE_MAP)
    with pytest.raises(DataError, match=r"has the element Na, which is not in type_map \['Cl'\]; add it there"):
        load_systems(good, ["Cl"])
    with pytest.raises(DataError, match=r"type.raw must number the 2 elements .* but atom 1 has 2"):
        load_systems(write(tmp_path / "types", [arrays()], types="0 2"), TYPE_MAP)
    with pytest.raises(DataError, match=r"type.raw .* but atom 1 has 0.5"):
        load_systems(write(tmp_path / "half", [arrays()], types="0 0.5"), TYPE_MAP)
    with pytest.raises(DataError, match=r"type.raw is not a readable array"):
        load_systems(write(tmp_path / "words", [arrays()], types="Na Cl"), TYPE_MAP)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"none holds no system: .* type.raw"):
        load_systems(tmp_path / "none", TYPE_MAP)
    (good / "set.000" / "force.npy").write_text("not an array")
    with pytest.raises(DataError, match=r"force.npy is not a readable array"):
        load_systems(good, TYPE_MAP)
    np.save(good / "set.000" / "force.npy", np.array(["a", "b"]))
    with pytest.raises(DataError, match=r"force.npy is not a readable array: could not convert string"):
        load_systems(good, TYPE_MAP)
    with pytest.raises(DataError, match=r"empty has a type.raw but no frames: neither folders set.\* nor a coord.raw"):
        load_systems(write(tmp_path / "empty", []), TYPE_MAP)
    part = arrays()
    del part["virial"]
    with pytest.raises(DataError, match="virial file in some of its sets but not in all"):
        load_systems(write(tmp_path / "some", [arrays(), part]), TYPE_MAP)


def test_flaws_of_a_file(tmp_path, monkeypatch):
    pytest.importorskip("dpdata", reason="dpdata is not installed")
    (tmp_path / "OUTCAR").write_text("nothing")
    with pytest.raises(DataError, match=r"OUTCAR cannot be read by dpdata as outcar .*potcar"):
        load_systems(tmp_path / "OUTCAR", TYPE_MAP)
    (tmp_path / "OUTCAR").write_text(OUTCAR.format(scf=60))
    with pytest.warns(UserWarning, match="unconverged"), pytest.raises(DataError, match="OUTCAR holds no frames"):
        load_systems(tmp_path / "OUTCAR", TYPE_MAP)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=r"cannot be read: Is a directory\."):
        load_systems(f"extxyz:{tmp_path}", TYPE_MAP)
    with pytest.raises(DataError, match=r'dpdata has no format "txt"; give the path as "format:'):
        load_systems(tmp_path / "notes.txt", TYPE_MAP)
    (tmp_path / "a.xyz").write_text(
        '1\nenergy=1 Lattice="5 0 0 0 5 0 0 0 5" Properties=species:S:1:pos:R:3\nNa 0 0 0\n'
    )
    with pytest.raises(DataError, match=r"a.xyz cannot be read .* with energies and forces: .*forces"):
        load_systems(tmp_path / "a.xyz", TYPE_MAP)
    monkeypatch.setitem(sys.modules, "dpdata", None)
    with pytest.raises(DataError, match="not installed: pip install dpdata"):
        load_systems(tmp_path / "OUTCAR", TYPE_MAP)


def test_split_format(tmp_path, monkeypatch):
    assert split_format("vasp/outcar:run/OUTCAR") == ("vasp/outcar", "run/OUTCAR")
    assert split_format("run/OUTCAR") == (None, "run/OUTCAR")
    assert split_format(r"C:\data") == (None, r"C:\data")
    monkeypatch.chdir(tmp_path)
    Path("xyz:odd").touch()
    assert split_format("xyz:odd") == (None, "xyz:odd")


@pytest.mark.parametrize("function", ["_folder_types", "_checked", "make_frame"])
def test_a_fault_of_our_own_is_not_the_users(tmp_path, monkeypatch, function):
    folder = write(tmp_path, [arrays(2)])
    monkeypatch.setattr(load, function, lambda *_, **__: list(zip([1], [1, 2], strict=True)))
    with pytest.raises(ValueError, match="zip") as caught:
        frames(load_systems(folder, TYPE_MAP), cutoff=3.0, num_types=2)
    assert not isinstance(caught.value, RlekfError)


def test_a_fault_of_our_own_after_dpdata_is_not_the_users(tmp_path, monkeypatch):
    pytest.importorskip("dpdata", reason="dpdata is not installed")
    (tmp_path / "MOVEMENT").write_text(MOVEMENT)
    monkeypatch.setattr(load, "_from_dpdata", lambda *_: list(zip([1], [1, 2], strict=True)))
    with pytest.raises(ValueError, match="zip") as caught:
        load_systems(tmp_path / "MOVEMENT", TYPE_MAP)
    assert not isinstance(caught.value, RlekfError)


@pytest.mark.skipif(not SHARED.exists(), reason="the shared data sets are not here")
def test_shared_sets():
    systems = load_systems([SHARED / "H2O", SHARED / "CuC"], ["O", "H", "C", "Cu"])
    assert len(systems) == 10
    assert (len(systems[0]), systems[0].types.shape) == (400, (192,))
    assert np.bincount(systems[0].types).tolist() == [64, 128]
    assert abs(systems[0].energies.mean() / 192 + 155.9562) < 1e-4
