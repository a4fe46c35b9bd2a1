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
    """A deepmd/npy folder with one set for each dict of arrays; without boxes, it has a file nopbc."""
    folder.mkdir(parents=True, exist_ok=True)
    if parts and not any("box" in part for part in parts):
        (folder / "nopbc").touch()
    (folder / "type.raw").write_text(types.replace(" ", "\n"))
    if names:
        (folder / "type_map.raw").write_text(names.replace(" ", "\n"))
    for i, part in enumerate(parts):
        (folder / f"set.{i:03d}").mkdir(exist_ok=True)
        for label, array in part.items():
            np.save(folder / f"set.{i:03d}" / f"{label}.npy", array)
    return folder


def pack(folder, file):
    """The same files as groups and arrays of an HDF5 file, as DeePMD-kit has them there."""
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    with h5py.File(file, "a") as hdf5:
        for path in sorted(folder.rglob("*")):
            name = str(path.relative_to(folder))
            if path.suffix == ".npy":
                hdf5[name] = np.load(path)
            elif path.name == "type.raw":
                hdf5[name] = np.loadtxt(path, ndmin=1).astype(int)
            elif path.name == "type_map.raw":
                hdf5[name] = np.array(path.read_text().split(), dtype="S")
            elif path.name == "nopbc":
                hdf5[name] = True
    return file


def write_lmdb(path, frames, type_map=("Na", "Cl")):
    """A store as DeePMD-kit reads it: a table for each frame, with arrays as bytes."""
    lmdb = pytest.importorskip("lmdb", reason="lmdb is not installed")
    msgpack = pytest.importorskip("msgpack", reason="msgpack is not installed")

    def packed(value):
        value = np.asarray(value)
        return {"type": str(value.dtype), "shape": list(value.shape), "data": value.tobytes()}

    about = {"nframes": len(frames), "frame_idx_fmt": "012d", "type_map": list(type_map)}
    about |= {"frame_nlocs": [2] * len(frames), "frame_system_ids": [0] * len(frames)}
    with lmdb.open(str(path), map_size=2**22) as store, store.begin(write=True) as transaction:
        transaction.put(b"__metadata__", msgpack.packb(about))
        for i, frame in enumerate(frames):
            table = {key: packed(value) for key, value in frame.items()}
            transaction.put(f"{i:012d}".encode(), msgpack.packb(table))
    return path


def lmdb_frames(part, types=(0, 1)):
    names = {"coord": "coords", "box": "cells", "energy": "energies", "force": "forces", "virial": "virials"}
    shapes = {"coord": (-1, 3), "box": (3, 3), "energy": (), "force": (-1, 3), "virial": (3, 3)}
    return [
        {names[label]: array[i].reshape(shapes[label]) for label, array in part.items() if label in names}
        | {"atom_types": np.array(types, dtype=np.int32)}
        for i in range(len(part["coord"]))
    ]


def mixed(part):
    """Of Cl and Na, as Cl, nothing, Na in the first frame and Na, Cl, nothing in the others."""
    types = np.tile([0, 1, -1], (len(part["coord"]), 1))
    types[0] = [1, -1, 0]
    spread = {label: np.zeros((len(types), 3, 3)) for label in ("coord", "force") if label in part}
    for label, array in spread.items():
        array[:, :2] = part[label].reshape(-1, 2, 3)
        array[0] = array[0, [1, 2, 0]]
        spread[label] = array.reshape(len(types), 9)
    return part | spread | {"real_atom_types": types}


def ase_atoms(part, formulas=("NaCl",)):
    ase = pytest.importorskip("ase", reason="ase is not installed")
    from ase.calculators.singlepoint import SinglePointCalculator

    for i in range(len(part["coord"])):
        box = part["box"][i].reshape(3, 3)
        atoms = ase.Atoms(formulas[i % len(formulas)], part["coord"][i].reshape(2, 3), cell=box, pbc=True)
        results = {"energy": part["energy"][i], "forces": part["force"][i].reshape(2, 3)}
        if "virial" in part:
            results["stress"] = -part["virial"][i].reshape(3, 3) / atoms.get_volume()
        atoms.calc = SinglePointCalculator(atoms, **results)
        yield atoms


def same(one: System, other: System) -> bool:
    """Equal, whatever the order of the atoms."""
    a, b = np.argsort(one.types), np.argsort(other.types)
    pairs = [
        (one.types[a], other.types[b]),
        (np.asarray(one.coordinates)[:, a], np.asarray(other.coordinates)[:, b]),
        (one.energies, other.energies),
        (one.boxes, other.boxes),
        (one.virials, other.virials),
    ]
    if one.forces is not None and other.forces is not None:
        pairs.append((np.asarray(one.forces)[:, a], np.asarray(other.forces)[:, b]))
    else:
        pairs.append((one.forces, other.forces))
    if any((x is None) != (y is None) for x, y in pairs):
        return False
    return all(np.allclose(x, y, atol=1e-6) for x, y in pairs if x is not None)


def as_raw(root, part):
    folder = write(root / "a", [part])
    for label, array in part.items():
        np.savetxt(folder / f"{label}.raw", array)
    return f"deepmd/raw:{folder}"


def as_hdf5(root, part):
    return pack(write(root / "a", [part]), root / "a.hdf5")


def as_hdf5_group(root, part):
    write(root / "a" / "deep" / "b", [part])
    write(root / "a" / "other", [arrays(1)])
    return f"{pack(root / 'a', root / 'data')}#/deep"


def as_mixed_hdf5(root, part):
    return pack(write(root / "a", [mixed(part)], types="0 0 0"), root / "a.h5")


def as_extxyz(root, part):
    import ase.io

    atoms = list(ase_atoms(part))
    for i in range(len(atoms)):
        del atoms[i].calc.results["stress"]
        atoms[i].info["virial"] = part["virial"][i].reshape(3, 3)
    ase.io.write(root / "a.xyz", atoms, format="extxyz")
    return root / "a.xyz"


def as_traj(root, part):
    import ase.io

    ase.io.write(root / "a.traj", list(ase_atoms(part)))
    return f"ase/traj:{root / 'a.traj'}"


OUR_FORMS = {
    "raw": as_raw,
    "npy without a type map": lambda root, part: write(root / "a", [part], types="1 0", names=None),
    "npy of two sets": lambda root, part: write(
        root / "a", [{k: v[:3] for k, v in part.items()}, {k: v[3:] for k, v in part.items()}]
    ),
    "npy in float32": lambda root, part: write(root / "a", [{k: v.astype("f4") for k, v in part.items()}]),
    "hdf5": as_hdf5,
    "deepmd/hdf5:": lambda root, part: f"deepmd/hdf5:{as_hdf5(root, part)}",
    "hdf5#group": as_hdf5_group,
    "deepmd/hdf5:hdf5#group": lambda root, part: f"deepmd/hdf5:{as_hdf5_group(root, part)}/b",
    "mixed": lambda root, part: write(root / "a", [mixed(part)], types="0 0 0"),
    "deepmd/npy/mixed:": lambda root, part: f"deepmd/npy/mixed:{write(root / 'a', [mixed(part)], types='0 0 0')}",
    "mixed hdf5": as_mixed_hdf5,
    "lmdb": lambda root, part: write_lmdb(root / "a.lmdb", lmdb_frames(part)),
    "deepmd/lmdb:": lambda root, part: f"deepmd/lmdb:{write_lmdb(root / 'a', lmdb_frames(part))}",
    "lmdb by its file": lambda root, part: write_lmdb(root / "a", lmdb_frames(part)),
}


@pytest.mark.parametrize("missing", [(), ("energy",), ("force",), ("virial",), ("energy", "virial"), ("box",)], ids=str)
@pytest.mark.parametrize("form", OUR_FORMS)
def test_every_form_equals_the_folder(tmp_path, form, missing):
    part = {label: array for label, array in arrays().items() if label not in missing}
    (tmp_path / "form").mkdir()
    folder = write(tmp_path / "folder", [part])
    path = OUR_FORMS[form](tmp_path / "form", part)
    expected, got = load_systems([folder, path], TYPE_MAP)
    assert same(expected, got)
    assert (got.energies is None, got.forces is None, got.virials is None, got.boxes is None) == tuple(
        label in missing for label in ("energy", "force", "virial", "box")
    )
    assert (expected.entry, expected.number, got.entry, got.number) == (0, 0, 1, 1)


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


@pytest.mark.parametrize("form", ["extxyz", "ase/traj"])
def test_files_of_frames_equal_the_folder(tmp_path, form):
    pytest.importorskip("dpdata", reason="dpdata is not installed")
    pytest.importorskip("ase", reason="ase is not installed")
    part = arrays()
    part["virial"] += part["virial"].reshape(4, 3, 3).transpose(0, 2, 1).reshape(4, 9)  # these formats have half of it
    path = {"extxyz": as_extxyz, "ase/traj": as_traj}[form](tmp_path, part)
    expected, got = load_systems([write(tmp_path / "a", [part]), path], TYPE_MAP)
    assert same(expected, got)


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("extxyz", {}),
        ("deepmd/raw", {}),
        ("deepmd/npy", {"set_size": 3}),
        ("deepmd/hdf5", {}),
        ("deepmd/npy/mixed", {"atom_numb_pad": 4}),
        ("deepmd/hdf5/mixed", {"atom_numb_pad": 4}),
        ("deepmd/lmdb", {}),
    ],
)
def test_what_dpdata_writes_is_read(tmp_path, form, options):
    dpdata = pytest.importorskip("dpdata", reason="dpdata is not installed")
    pair = write(tmp_path / "pair", [arrays()])
    triple = arrays(2) | {label: np.random.default_rng(1).normal(size=(2, 9)) for label in ("coord", "force")}
    triple = write(tmp_path / "triple", [triple], types="1 0 1")
    both = [dpdata.LabeledSystem(str(folder), fmt="deepmd/npy") for folder in (pair, triple)]
    dpdata.MultiSystems(*both).to(form, str(tmp_path / "there"), **options)
    expected = load_systems([pair, triple], TYPE_MAP)
    found = sorted(load_systems(f"{form}:{tmp_path / 'there'}", TYPE_MAP), key=len, reverse=True)
    assert [same(*systems) for systems in zip(expected, found, strict=True)] == [True, True]


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


def test_an_empty_path():
    for paths in ("", ["", "a"]):
        with pytest.raises(DataError, match=r"^The path of a system must not be empty\.$"):
            load_systems(paths, TYPE_MAP)


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


@pytest.mark.parametrize("pbc", ["T T F", "F F T"])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("form", ["extxyz", "ase/traj"])
def test_slabs_and_wires_get_a_cell_without_images(tmp_path, form, labelled, pbc):
    pytest.importorskip("dpdata", reason="dpdata is not installed")
    pytest.importorskip("ase", reason="ASE is not installed")
    import ase.io
    from ase.calculators.singlepoint import SinglePointCalculator

    periodic, file = np.array([flag == "T" for flag in pbc.split()]), tmp_path / "slabs"

    def read(cell):
        slabs = [ase.Atoms("NaCl", [[0, 0, 0], [2.5, 0, 3]], cell=cell, pbc=flags) for flags in (True, periodic)]
        if labelled:
            for slab in slabs:
                slab.calc = SinglePointCalculator(slab, energy=-1.0, forces=np.zeros((2, 3)))
        ase.io.write(file, slabs, format="extxyz" if form == "extxyz" else "traj")
        return load_systems(f"{form}:{file}", TYPE_MAP, labelled=labelled)

    (system,) = read([5, 5, 9])
    bulk, slab = system.boxes
    assert bulk.tolist() == np.diag([5.0, 5, 9]).tolist()
    assert slab[periodic].tolist() == bulk[periodic].tolist()
    assert np.linalg.norm(slab[~periodic], axis=1).min() >= 50
    np.testing.assert_allclose(slab @ slab.T, np.diag(np.diag(slab @ slab.T)), atol=1e-12)
    assert np.ptp(system.coordinates[1] @ np.linalg.inv(slab), axis=0)[~periodic].max() < 0.1
    with pytest.raises(DataError, match="periodic along a cell vector of length 0"):
        read(np.where(periodic, 0, [5, 5, 9]))


@pytest.mark.parametrize(
    "pbc", ["[T,T,F]", "[True, True, False]", "{T T F}", "'1 1 0'", '" true true false "', "[T,T]", '"T T X"', '"T F"']
)
def test_other_ways_of_writing_which_directions_are_periodic(tmp_path, pbc):
    """As the specification of extended xyz has them; anything else is refused, not read as a bulk cell."""
    pytest.importorskip("dpdata", reason="dpdata is not installed")
    head = f'2\nenergy=-1.5 Lattice="5 0 0 0 5 0 0 0 5" pbc={pbc} Properties=species:S:1:pos:R:3:forces:R:3\n'
    (tmp_path / "a.xyz").write_text(head + "Na 0 0 0 0.1 0 0\nCl 2.5 0 0 -0.1 0 0\n")
    if pbc in ("[T,T]", '"T T X"', '"T F"'):
        with pytest.raises(DataError, match=r'a.xyz, line 2: pbc should be three of T and F, as in pbc="T T F"'):
            load_systems(tmp_path / "a.xyz", TYPE_MAP)
    else:
        (system,) = load_systems(tmp_path / "a.xyz", TYPE_MAP)
        assert np.diag(system.boxes[0])[:2].tolist() == [5, 5]
        assert system.boxes[0, 2, 2] >= 50


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


@pytest.mark.parametrize("kind", ["folder", "hdf5"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop("coord"), r"set.000/coord.npy is missing"),
        (drop("box"), r"set.000/box.npy is missing; .* an empty file nopbc"),
        (
            lambda part: [part.pop(label) for label in ("energy", "force", "virial")],
            r"a(\.hdf5#/)?, frame 0 has no label: neither an energy nor forces nor a virial",
        ),
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
        (
            lambda part: part.update(real_atom_types=np.full((4, 2), 2)),
            r"real_atom_types.npy must number .* from 0 to 1, or -1 for no atom, but frame 0, atom 0 has 2",
        ),
        (
            lambda part: part.update(real_atom_types=np.zeros((3, 2))),
            r"coord.npy has 4 frames, but there are elements for 3",
        ),
        (
            lambda part: part.update(real_atom_types=np.zeros(3)),
            r"types.npy has shape \(3,\), but type.raw has 2 atoms",
        ),
        (lambda part: part.update(real_atom_types=np.full((4, 2), -1)), r"coord.npy: frame 0 has no atom"),
    ],
)
def test_flaws_of_a_set_name_the_file(tmp_path, spoil, message, kind):
    part = arrays()
    spoil(part)
    path = write(tmp_path / "a", [part])
    (path / "nopbc").unlink(missing_ok=True)
    if kind == "hdf5":
        path = pack(path, tmp_path / "a.hdf5")
        message = message.replace("set.000", "hdf5#/set.000")
    with pytest.raises(DataError, match=message) as error:
        load_systems(path, TYPE_MAP)
    assert "\n" not in str(error.value)


def test_flaws_of_a_folder(tmp_path):
    good = write(tmp_path / "good", [arrays()])
    with pytest.raises(DataError, match=r"nowhere does not exist \(current directory: "):
        load_systems(tmp_path / "nowhere", TYPE_MAP)
    with pytest.raises(DataError, match="list of paths is empty"):
        load_systems([], TYPE_MAP)
    with pytest.raises(DataError, match=r"has the element Na, which is not in type_map \['Cl'\]; add it there"):
        load_systems(good, ["Cl"])
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"none holds no system: .* a folder in it has a type.raw"):
        load_systems(tmp_path / "none", TYPE_MAP)
    with pytest.raises(DataError, match=r"type.raw is not a readable array"):
        load_systems(write(tmp_path / "words", [arrays()], types="Na Cl"), TYPE_MAP)
    (good / "set.000" / "force.npy").write_text("not an array")
    with pytest.raises(DataError, match=r"force.npy is not a readable array"):
        load_systems(good, TYPE_MAP)
    np.save(good / "set.000" / "force.npy", np.array(["a", "b"]))
    with pytest.raises(DataError, match=r"force.npy is not a readable array: could not convert string"):
        load_systems(good, TYPE_MAP)
    (good / "set.000" / "force.npy").unlink()
    (good / "set.000" / "force.npy").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"force.npy is not a readable array: .*No such file"):
        load_systems(good, TYPE_MAP)
    (good / "set.000" / "force.npy").unlink()
    (good / "set.001").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"set.001/coord.npy is missing"):
        load_systems(good, TYPE_MAP)
    with pytest.raises(DataError, match=r"mixed/set.001/real_atom_types.npy is missing; other sets have one"):
        load_systems(write(tmp_path / "mixed", [mixed(arrays()), arrays()], types="0 0 0"), TYPE_MAP)


@pytest.mark.parametrize("kind", ["folder", "hdf5"])
@pytest.mark.parametrize(
    ("types", "sets", "message"),
    [
        ("0 2", 1, r"type.raw must number the 2 elements .* but atom 1 has 2"),
        ("0 -1", 1, r"type.raw must number .* but atom 1 has -1"),
        ("0 1", 0, r"has a type.raw but no frames: neither (folder|group)s set.\* nor a coord.raw"),
    ],
)
def test_flaws_of_a_system(tmp_path, kind, types, sets, message):
    path = write(tmp_path / "a", [arrays()] * sets, types=types)
    with pytest.raises(DataError, match=message):
        load_systems(path if kind == "folder" else pack(path, tmp_path / "a.hdf5"), TYPE_MAP)


def test_flaws_of_an_hdf5_file(tmp_path):
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    file = pack(write(tmp_path / "a", [arrays()]), tmp_path / "a.hdf5")
    with pytest.raises(DataError, match=r"a.hdf5 has no group /b; it has .*a.hdf5#/set.000,"):
        load_systems(f"{file}#/b", TYPE_MAP)
    with pytest.raises(DataError, match=r"a.hdf5#/type.raw is no group but an array"):
        load_systems(f"{file}#/type.raw", TYPE_MAP)
    with pytest.raises(DataError, match=r"a.hdf5#/set.000 holds no system: neither it nor a group in it"):
        load_systems(f"{file}#/set.000", TYPE_MAP)
    with pytest.raises(DataError, match=r"a#/set.000 does not exist"):
        load_systems(f"{tmp_path / 'a'}#/set.000", TYPE_MAP)
    for values, message in [
        (["x", "y"], r"a.hdf5#/set.000/force.npy is not a readable array: its values are object"),
        (np.array([1, 2j]), r"force.npy is not a readable array: its values are complex128"),
        (None, r"force.npy is not a readable array: it is a group"),
    ]:
        with h5py.File(file, "a") as hdf5:
            del hdf5["set.000/force.npy"]
            hdf5.create_group("set.000/force.npy") if values is None else hdf5.create_dataset(
                "set.000/force.npy", data=values
            )
        with pytest.raises(DataError, match=message):
            load_systems(file, TYPE_MAP)
    with h5py.File(file, "a") as hdf5:
        del hdf5["set.000/force.npy"]
        hdf5.create_dataset("set.000/force.npy", shape=(10**12, 6), dtype="f8")
    with pytest.raises(DataError, match=r"its shape is \(1000000000000, 6\), but only 0 bytes of it are in the file"):
        load_systems(file, TYPE_MAP)
    with h5py.File(file, "a") as hdf5:
        hdf5["set.001"] = h5py.SoftLink("/nowhere")
    with pytest.raises(DataError, match=r"a.hdf5#/ is not a readable group: set.001 is a link to nowhere"):
        load_systems(file, TYPE_MAP)
    with h5py.File(file, "a") as hdf5:
        del hdf5["set.001"], hdf5["set.000/force.npy"]
        hdf5["set.000/force.npy"] = h5py.SoftLink("/nowhere")
    with pytest.raises(DataError, match=r"force.npy is not a readable array: .*component not found"):
        load_systems(file, TYPE_MAP)
    whole = file.read_bytes()
    for spoilt in (whole[:1000], whole[: len(whole) - 100], b"text"):
        file.write_bytes(spoilt)
        with pytest.raises(DataError, match=r"a.hdf5 is not a readable HDF5 file: "):
            load_systems(file, TYPE_MAP)


def test_hdf5_groups_at_any_depth_and_links_between_them(tmp_path):
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    write(tmp_path / "a" / "b" / "c", [arrays(1)])
    write(tmp_path / "a" / "d", [arrays(2)])
    file = pack(tmp_path / "a", tmp_path / "a.hdf5")
    with h5py.File(file, "a") as hdf5:
        hdf5["b/up"] = h5py.SoftLink("/")
        hdf5["d/again"] = hdf5["d"]
        hdf5["e"] = h5py.SoftLink("/d")
        hdf5["f"] = h5py.SoftLink("/nowhere")
        hdf5["g"] = h5py.ExternalLink("nowhere.hdf5", "/")
    systems = load_systems([file, f"{file}#/b", f"{file}#d"], TYPE_MAP)
    assert [system.name for system in systems[:3]] == [f"{file}#/b/c", f"{file}#/d", f"{file}#/e"]
    assert [(len(system), system.entry, system.number) for system in systems] == [
        *((1, 0, 0), (2, 0, 1), (2, 0, 2), (1, 1, 3), (2, 2, 4))
    ]


def test_links_in_folders_are_followed(tmp_path):
    write(tmp_path / "elsewhere" / "one", [arrays(1)])
    write(tmp_path / "elsewhere" / "deep" / "two", [arrays(2)])
    write(tmp_path / "data" / "own", [arrays(3)])
    (tmp_path / "data" / "a").symlink_to("../elsewhere/one")
    (tmp_path / "data" / "b").symlink_to(tmp_path / "elsewhere" / "deep")
    for name, target in {"itself": ".", "up": "../..", "gone": "nowhere", "file": "own/type.raw"}.items():
        (tmp_path / "data" / "own" / name).symlink_to(target)
    (tmp_path / "elsewhere" / "deep" / "round").symlink_to("../../data")
    (tmp_path / "elsewhere" / "deep" / "up").symlink_to("..")
    names = [str(Path(system.name).relative_to(tmp_path)) for system in load_systems(tmp_path / "data", TYPE_MAP)]
    assert names == ["data/a", "data/b/two", "data/own"]
    (tmp_path / "data" / "c").symlink_to("a")
    (tmp_path / "data" / "d").symlink_to("b")
    names = [str(Path(system.name).relative_to(tmp_path)) for system in load_systems(tmp_path / "data", TYPE_MAP)]
    assert names == ["data/a", "data/b/two", "data/c", "data/own"]  # each link to a system is one, as in DeePMD-kit
    twice = load_systems([tmp_path / "data" / "a", tmp_path / "elsewhere" / "one"], TYPE_MAP)
    assert [system.number for system in twice] == [0, 1]


@pytest.mark.parametrize("kind", ["folder", "hdf5"])
@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        ([], "a a/x b/c/x b/y"),
        (["*"], "a a/x b/c/x b/y"),
        (["x"], "a/x b/c/x"),
        (["b/**"], "b/c/x b/y"),
        (["b/*"], "b/y"),
        (["[ab]", "c/x"], "a b/c/x"),
        (["b/**/x", "b"], "b/c/x"),
    ],
)
def test_patterns_are_those_of_rglob(tmp_path, kind, patterns, found):
    root = tmp_path / "data"
    for name in ("a", "a/x", "b/c/x", "b/y"):
        write(root / name, [arrays(1)])
    expected = {str(path.relative_to(root)) for p in patterns for path in root.rglob(p) if (path / "type.raw").exists()}
    assert not patterns or expected == set(found.split())
    path = root if kind == "folder" else pack(root, tmp_path / "a.hdf5")
    systems = load_systems(path, TYPE_MAP, patterns)
    assert [system.name.removeprefix(str(path)).lstrip("/#") for system in systems] == found.split()
    with pytest.raises(DataError, match=r"holds no system, a \w+ with a type.raw, that one of \['z\*'\] matches"):
        load_systems(path, TYPE_MAP, ["z*"])


@pytest.mark.parametrize("kind", ["folder", "hdf5"])
def test_sets_with_other_labels_are_systems_of_their_own(tmp_path, kind):
    whole = arrays(4)
    sets = [{label: array[i : i + 1] for label, array in whole.items()} for i in range(4)]
    del sets[1]["virial"], sets[2]["force"], sets[2]["virial"], sets[3]["virial"]
    path = write(tmp_path / "a", sets)
    write(tmp_path / "b", [arrays(1)])
    path = tmp_path if kind == "folder" else pack(tmp_path, tmp_path / "c.hdf5")
    full, plain, energy, other = load_systems(path, TYPE_MAP)
    assert [len(system) for system in (full, plain, energy, other)] == [1, 2, 1, 1]
    assert full.name == plain.name == energy.name
    assert [(s.entry, s.number) for s in (full, plain, energy, other)] == [(0, 0), (0, 0), (0, 0), (0, 1)]
    np.testing.assert_array_equal(plain.energies, whole["energy"][[1, 3]])
    np.testing.assert_array_equal(full.virials, whole["virial"][:1].reshape(1, 3, 3))
    assert plain.virials is None
    assert energy.forces is None


def test_empty_sets_are_passed_over(tmp_path):
    empty = {label: array[:0] for label, array in arrays().items()}
    (system,) = load_systems(write(tmp_path / "a", [empty, arrays(), empty]), TYPE_MAP)
    assert len(system) == 4
    with pytest.raises(DataError, match=r"b/set.000/coord.npy holds no frames nor do its like"):
        load_systems(write(tmp_path / "b", [empty, empty]), TYPE_MAP)


@pytest.mark.parametrize("kind", ["folder", "hdf5", "lmdb"])
def test_compositions_are_systems_of_their_own(tmp_path, kind):
    part = mixed(arrays(6))
    part["real_atom_types"][2] = [1, 1, 0]
    part["real_atom_types"][4] = [1, 0, 1]
    path = write(tmp_path / "a", [part], types="0 0 0")
    if kind == "hdf5":
        path = pack(path, tmp_path / "a.hdf5")
    if kind == "lmdb":
        frames = [lmdb_frames(part, types)[i] for i, types in enumerate(part["real_atom_types"])]
        path = write_lmdb(tmp_path / "lmdb", frames)
    pair, triple = load_systems([path], TYPE_MAP)
    assert (pair.number, triple.number) == (0, 0)
    assert pair.name.endswith("(Cl1Na1)")
    assert triple.name.endswith("(Cl2Na1)")
    assert triple.types.tolist() == [0, 0, 1]
    np.testing.assert_array_equal(pair.energies, part["energy"][[0, 1, 3, 5]])
    np.testing.assert_array_equal(triple.energies, part["energy"][[2, 4]])
    np.testing.assert_array_equal(triple.forces[1].ravel(), part["force"][4][[0, 1, 2, 6, 7, 8, 3, 4, 5]])
    np.testing.assert_array_equal(triple.coordinates[0].ravel(), part["coord"][2])
    np.testing.assert_array_equal(triple.boxes[1].ravel(), part["box"][4])


def test_lmdb_frames_may_lack_labels_and_boxes(tmp_path):
    frames = lmdb_frames(arrays(5))
    del frames[1]["forces"]
    frames[2]["find_force"] = 0.0
    frames[3]["cells"][:] = 0
    frames[4] = {"atype" if k == "atom_types" else k[:-1] if k == "coords" else k: v for k, v in frames[4].items()}
    whole, no_force, molecule = load_systems(write_lmdb(tmp_path / "a.lmdb", frames), TYPE_MAP)
    assert [len(system) for system in (whole, no_force, molecule)] == [2, 2, 1]
    assert no_force.forces is None
    assert molecule.boxes is None
    assert whole.types.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda frame: frame.pop("atom_types"), "a.lmdb, frame 1 is not readable as LMDB of DeePMD-kit: .*no atype"),
        (lambda frame: frame.pop("coords"), "a.lmdb, frame 1 is not readable as LMDB of DeePMD-kit: .*no coord"),
        (
            lambda frame: frame.update(atom_types=np.array([0, 7])),
            r"a.lmdb must number the 2 elements .*frame 1, atom 1 has 7",
        ),
        (lambda frame: frame.update(atom_types=np.array(["a", "O"])), "a.lmdb, frame 1 is not readable as LMDB"),
        (lambda frame: frame["forces"].fill(np.nan), "force in .*a.lmdb: frame 1, atom 0 has the value nan"),
        (lambda frame: frame.update(virials=np.ones(6)), r"virial in .*a.lmdb, frame 1, has shape \(1, 6\)"),
        (lambda frame: frame.update(forces=np.array("x" * 9)), "frame 1 is not readable as LMDB"),
        (
            lambda frame: [frame.pop(key) for key in ("energies", "forces", "virials")],
            "a.lmdb, frame 1 has no label: neither an energy nor",
        ),
    ],
)
def test_flaws_of_an_lmdb_store(tmp_path, spoil, message):
    frames = lmdb_frames(arrays(2))
    spoil(frames[1])
    path = write_lmdb(tmp_path / "a.lmdb", frames)
    with pytest.raises(DataError, match=message):
        load_systems(path, TYPE_MAP)


def test_an_lmdb_store_that_is_cut_off(tmp_path):
    path = write_lmdb(tmp_path / "a.lmdb", lmdb_frames(arrays(200)))
    data = (path / "data.mdb").read_bytes()
    (path / "data.mdb").write_bytes(data[: len(data) // 2])
    with pytest.raises(
        DataError, match=r"a.lmdb is not readable as LMDB of DeePMD-kit: ValueError: the file has been cut"
    ):
        load_systems(path, TYPE_MAP)
    (tmp_path / "b.lmdb").write_text("nothing")
    with pytest.raises(DataError, match=r"b.lmdb is not readable as LMDB"):
        load_systems(tmp_path / "b.lmdb", TYPE_MAP)


def test_flaws_of_a_file(tmp_path, monkeypatch):
    pytest.importorskip("dpdata", reason="dpdata is not installed")
    (tmp_path / "OUTCAR").write_text("nothing")
    with pytest.raises(DataError, match=r"OUTCAR cannot be read by dpdata as outcar: .*potcar"):
        load_systems(tmp_path / "OUTCAR", TYPE_MAP)
    (tmp_path / "OUTCAR").write_text(OUTCAR.format(scf=60))
    with pytest.warns(UserWarning, match="unconverged"), pytest.raises(DataError, match="OUTCAR holds no frames"):
        load_systems(tmp_path / "OUTCAR", TYPE_MAP)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=r"is a folder, but extxyz is read from a file: give the files in it"):
        load_systems(f"extxyz:{tmp_path}", TYPE_MAP)
    with pytest.raises(DataError, match=r'dpdata has no format "txt"; put its format before it, as in "vasp/outcar:'):
        load_systems(tmp_path / "notes.txt", TYPE_MAP)
    with pytest.raises(DataError, match=r'dpdata has no format "vasp/outcr"; did you mean vasp/outcar\?'):
        load_systems(f"vasp/outcr:{tmp_path / 'OUTCAR'}", TYPE_MAP)
    with pytest.raises(DataError, match=r"holds no system: .*; give the files in it one by one, such as .*OUTCAR"):
        load_systems(tmp_path, TYPE_MAP)
    monkeypatch.setitem(sys.modules, "dpdata.format", None)
    with pytest.raises(DataError, match="not installed: pip install dpdata"):
        load_systems(tmp_path / "OUTCAR", TYPE_MAP)


def test_extxyz_frames_without_forces_or_energies(tmp_path):
    pytest.importorskip("dpdata", reason="dpdata is not installed")
    cell = 'Lattice="5 0 0 0 5 0 0 0 5" Properties=species:S:1:pos:R:3'
    plain = f"1\nenergy=1 {cell}\nNa 0 0 0\n"
    full = f"1\nenergy=2 {cell}:forces:R:3\nNa 0 0 0 0 0 1\n"
    (tmp_path / "a.xyz").write_text(plain + full + plain)
    energies, forces = load_systems(tmp_path / "a.xyz", TYPE_MAP)
    assert (len(energies), energies.forces, len(forces)) == (2, None, 1)
    assert forces.forces.tolist() == [[[0, 0, 1]]]
    assert energies.number == forces.number
    (tmp_path / "a.xyz").write_text(full + full.replace("energy=2", ""))
    with pytest.raises(DataError, match=r"a.xyz, frame 1 cannot be read by dpdata as extxyz: .*No energy"):
        load_systems(tmp_path / "a.xyz", TYPE_MAP)
    (tmp_path / "a.xyz").write_text(full + full.replace("0 0 1", "0 0 nan"))
    with pytest.raises(DataError, match=r"force in .*a.xyz: frame 1, atom 0 has the value nan"):
        load_systems(tmp_path / "a.xyz", TYPE_MAP)


def test_trajectories_of_several_formulas(tmp_path):
    pytest.importorskip("dpdata", reason="dpdata is not installed")
    pytest.importorskip("ase", reason="ase is not installed")
    import ase.io

    # as many atoms: dpdata's LabeledSystem would take both for NaCl
    ase.io.write(tmp_path / "a.traj", list(ase_atoms(arrays(2), ["NaCl", "Na2"])))
    one, other = load_systems(f"ase/traj:{tmp_path / 'a.traj'}", TYPE_MAP)
    assert one.types.tolist() == [0, 1]
    assert other.types.tolist() == [1, 1]


def test_wildcards(tmp_path):
    pytest.importorskip("dpdata", reason="dpdata is not installed")
    for name in ("run2", "run1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "OUTCAR.old").write_text(OUTCAR.format(scf=1))
    found = load_systems([f"{tmp_path}/run*/OUTCAR.old", f"vasp/outcar:{tmp_path}/run?/*"], TYPE_MAP)
    assert [(Path(one.name).parent.name, one.entry, one.number) for one in found] == [
        ("run1", 0, 0), ("run2", 0, 1), ("run1", 1, 2), ("run2", 1, 3)
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"run\*/none does not exist"):
        load_systems(f"{tmp_path}/run*/none", TYPE_MAP)


def test_split_format(tmp_path, monkeypatch):
    assert split_format("vasp/outcar:run/OUTCAR") == ("vasp/outcar", "run/OUTCAR")
    assert split_format("run/OUTCAR") == (None, "run/OUTCAR")
    assert split_format(r"C:\data") == (None, r"C:\data")
    monkeypatch.chdir(tmp_path)
    Path("xyz:odd").touch()
    assert split_format("xyz:odd") == (None, "xyz:odd")


@pytest.mark.parametrize(("module", "name"), [(load, "_types"), (load, "_checked"), (data, "make_frame")])
def test_a_fault_of_our_own_is_not_the_users(tmp_path, monkeypatch, module, name):
    folder = write(tmp_path, [arrays(2)])
    monkeypatch.setattr(module, name, lambda *_, **__: list(zip([1], [1, 2], strict=True)))
    with pytest.raises(ValueError, match="zip") as caught:
        frames(load_systems(folder, TYPE_MAP), cutoff=3.0, num_types=2)
    assert not isinstance(caught.value, RlekfError)


@pytest.mark.parametrize("form", ["lmdb", "hdf5", "dpdata"])
def test_a_fault_of_our_own_after_a_reader_is_not_the_users(tmp_path, monkeypatch, form):
    if form == "dpdata":
        pytest.importorskip("dpdata", reason="dpdata is not installed")
        path = tmp_path / "MOVEMENT"
        path.write_text(MOVEMENT)
    else:
        path = OUR_FORMS[form](tmp_path, arrays())
    monkeypatch.setattr(load, "_parts", lambda *_: list(zip([1], [1, 2], strict=True)))
    with pytest.raises(ValueError, match="zip") as caught:
        load_systems(path, TYPE_MAP)
    assert not isinstance(caught.value, RlekfError)


@pytest.mark.skipif(not SHARED.exists(), reason="the shared data sets are not here")
def test_shared_sets():
    systems = load_systems([SHARED / "H2O", SHARED / "CuC"], ["O", "H", "C", "Cu"])
    assert len(systems) == 10
    assert (len(systems[0]), systems[0].types.shape) == (400, (192,))
    assert np.bincount(systems[0].types).tolist() == [64, 128]
    assert abs(systems[0].energies.mean() / 192 + 155.9562) < 1e-4
