"""Spoilt input files and data: a config or systems, or one sentence that says what is wrong. No third thing."""

import copy
import io
import json
import math
import os
import pickle
import resource
import signal
import tempfile
import warnings
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_input import RLEKF, SMALL, WATER, changed
from test_load import arrays

from rlekf_ext.errors import DataError, InputError
from rlekf_ext.potential.batches import batch_sizes
from rlekf_ext.potential.data import System, frames
from rlekf_ext.potential.input import Config, read_input
from rlekf_ext.potential.load import load_systems

quick = settings(max_examples=400, derandomize=True, deadline=None)
long = settings(max_examples=30_000, deadline=None)


class HungError(BaseException):
    """Not an Exception: a reader that catches those must not catch this."""


@contextmanager
def bounds(seconds=20, num_bytes=3 * 2**30):
    """A limit on the time, and on the memory beyond what the process has."""

    def hung(*_):
        raise HungError

    handler, limits = signal.signal(signal.SIGALRM, hung), resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + num_bytes, limits[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def assert_readable(error):
    """One line with a full stop, neither empty nor long; and not the end of the memory in disguise."""
    said = str(error)
    assert 20 < len(said) < 2100, said[:3000]
    assert said.isprintable(), ascii(said)
    assert said[-1] in ".?", said
    assert not isinstance(error.__cause__, MemoryError) or "Unable to allocate" in said, said  # refused beforehand
    assert "Traceback" not in said, said


# Input files: accidents of the tree, then of its text.

FULL = {**SMALL, "optimizer": {"type": "RLEKF", **RLEKF}}
ODD_VALUES = [
    *(None, True, False, 0, 1, -1, 0.5, -0.0, 7.0, math.nan, math.inf, -math.inf, 5e-324, 1e308),
    *(2**31, 2**63, -(2**70), 10**400, "", "auto", "auto:", "auto:0", "auto:1e5", "auto:" + "9" * 400, "auto:٣"),
    *("RLEKF", "LKF", "Adam", "energy", "a\nb", "\0", "\ud800", "Å" * 300, "x" * 200_000, "~", "extxyz:", "a:b"),
    *([], [[]], [None], [0], [1, 2.5], ["a", "a"], [3] * 50_000, {}, {"": {}}, {"type": []}, {"_comment": 1}),
]
ODD_NAMES = ["type", "_", "", "\ud800", "a\nb", "k" * 100_000, "opt_type", "kf_blocksize", "systems"]
STRAY = ["// why\n", "/* why */", "# why\n", ",", "'", '"', "NaN", "-", "\0", "\ufeff", "[" * 100_000, "6" * 5000]
CODINGS = ["utf-8"] * 6 + ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-7"]


def places(tree):
    """Every (container, key) below a JSON value."""
    for name, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, name
        if isinstance(value, dict | list):
            yield from places(value)


@st.composite
def spoilt_trees(draw):
    tree = json.loads(json.dumps(draw(st.sampled_from([WATER, SMALL, FULL]))))
    for _ in range(draw(st.integers(0, 3))):
        if not tree:
            break
        container, name = draw(st.sampled_from(list(places(tree))))
        accident = draw(st.sampled_from(["drop", "retype", "rename", "wrap", "move", "random"]))
        value = container[name]
        if accident == "drop":
            del container[name]
        elif accident == "retype":
            container[name] = copy.deepcopy(draw(st.sampled_from(ODD_VALUES)))  # later accidents befall it, too
        elif accident == "wrap":
            container[name] = draw(st.sampled_from([[value], {"type": value}, {str(name): value}, [value] * 3]))
        elif accident == "random":
            container[name] = draw(st.integers() | st.floats() | st.text(max_size=8) | st.lists(st.integers()))
        elif isinstance(container, dict):
            del container[name]
            target = tree if accident == "move" else container
            target[draw(st.sampled_from([name[1:], f"{name}x", *ODD_NAMES]))] = value
    return tree


@st.composite
def spoilt_inputs(draw):
    """The bytes of an input file after a few accidents."""
    text = json.dumps(draw(spoilt_trees()), indent=draw(st.sampled_from([None, 2])), ensure_ascii=draw(st.booleans()))
    accident = draw(st.sampled_from(["none"] * 4 + ["twice", "stray", "nest", "number", "splice", "cut"]))
    at = draw(st.integers(0, len(text)))
    if accident == "twice":
        text = text.replace("{", '{"model": {}, "training": 3, "model": [],', 1)
    elif accident == "stray":
        text = text[:at] + draw(st.sampled_from(STRAY)) + text[at:]
    elif accident == "nest":
        depth = draw(st.sampled_from([1, 400, 900, 990, 2000, 100_000]))
        text = text.replace("[", "[" * depth).replace("]", "]" * depth)
    elif accident == "number":
        text = text.replace("6", draw(st.sampled_from(["6" * 5000, "6e999", "-6e-999", "06", "6.", "0x6"])), 1)
    elif accident == "splice":
        text = text[:at] + text[draw(st.integers(0, len(text))) :]
    elif accident == "cut":
        text = text[:at]
    data = bytearray(text.encode(draw(st.sampled_from(CODINGS)), errors="surrogatepass"))
    for _ in range(draw(st.sampled_from([0, 0, 0, 0, 1, 5])) if data else 0):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


EIGHT_ATOMS = System("", np.zeros(8, dtype=int), np.zeros((1, 8, 3)), None)


def assert_config_or_sentence(data):
    with tempfile.TemporaryDirectory() as folder, bounds():
        file = Path(folder) / "input.json"
        file.write_bytes(data)
        try:
            config = read_input(file)
        except InputError as error:
            assert_readable(error)
        else:
            assert isinstance(config, Config)
            json.dumps(asdict(config), allow_nan=False)  # a checkpoint can hold it
            assert 1 <= (config.model.descriptor.sel_factor or 1) <= 100
            for part in (config.training.training_data, config.training.validation_data):
                assert part is None or batch_sizes(part, [EIGHT_ATOMS])[0] >= 1


@quick
@given(spoilt_inputs())
def test_a_spoilt_input_file_is_read_or_named(data):
    assert_config_or_sentence(data)


@pytest.mark.soak
@long
@given(spoilt_inputs())
def test_many_spoilt_input_files(data):
    assert_config_or_sentence(data)


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[", b"null", b"[" * 100_000, b"1" * 5000, b"\xff\xfe", b"\xef\xbb\xbf{}", b'{"\\ud800": 1}']
)
def test_what_is_hardly_an_input_file(data, tmp_path):
    (tmp_path / "input.json").write_bytes(data)
    with bounds(), pytest.raises(InputError) as caught:
        read_input(tmp_path / "input.json")
    assert_readable(caught.value)


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model/descriptor/rcut", 10**400, "must be a number but is: 1000"),
        ("model/descriptor/rcut", 1e6, "must be <= 100 but is: 1000000"),
        ("model/descriptor/rcut", nested(5000), "must be a number but is: nested too deeply to be shown"),
        ("model/descriptor/sel", "auto:" + "9" * 400, "The factor in model/descriptor/sel must be <= 100 but is: inf"),
        ("training/training_data/batch_size", "auto:" + "9" * 5000, '"auto", "auto:N", "max:N"'),
        ("training/seed", 2**63, "must be a whole number of 64 bits but is: 9223372036854775808"),
        ("training/a\nb" + "x" * 5000, 1, r"training/a\nbxxx"),
    ],
)
def test_values_out_of_all_proportion_are_named(path, value, message):
    with bounds(), pytest.raises(InputError) as caught:
        read_input(changed(path, value))
    assert message in str(caught.value)
    assert_readable(caught.value)


@pytest.mark.parametrize("path", ["x" * 5000, "a/" * 3000, "\0", "\ud800"])
def test_paths_that_cannot_exist_are_left_to_the_reader_of_data(path, tmp_path):
    file = tmp_path / "input.json"
    file.write_text(json.dumps(changed("training/training_data/systems", path)))
    assert read_input(file).training.training_data.systems == (path,)


def test_a_byte_order_mark_is_read_over(tmp_path):
    (tmp_path / "input.json").write_text(json.dumps(SMALL), encoding="utf-8-sig")
    assert read_input(tmp_path / "input.json") == read_input(SMALL)


# Data folders: a dict of what stands where, spoilt, then written.

EXPLODED = []


def explode():
    EXPLODED.append("unpickled")


class Bomb:
    """Says so when it is unpickled."""

    def __reduce__(self):
        return explode, ()


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def npz(array):
    file = io.BytesIO()
    np.savez(file, array)
    return file.getvalue()


def header(descr="'<f8'", order="False", shape="(2, 4)"):
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}}}"


def with_header(text):
    """A .npy file of 8 numbers with this header."""
    text = text.ljust(100) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(64)


PART = arrays(2)
PART["coord"][:] = [0, 0, 0, 2.5, 0, 0]
FOLDER = {
    "type.raw": b"0\n1\n",
    "type_map.raw": b"Na\nCl\n",
    **{f"set.{i:03d}/{label}.npy": npy(array) for i in range(2) for label, array in PART.items()},
}
ARRAYS = {npy(array): array for array in PART.values()}
TOO_LARGE = with_header(header(shape="(1000000000000,)"))
HEADERS = [
    *(header(shape=shape) for shape in ("(-1,)", "(2, -3)", "(True, 6)", "()", "(8,)", "'8'", "8", "(1e3,)", "(0, 4)")),
    *(header(descr, "True") for descr in ("'O'", "'<f16'", "'V8'", "[('a', 'O')]", "7", "'<U99999999'", "'M8[s]'")),
    *("", "{", "(" * 5000, "{'descr':" * 2000, "0", "__import__('os')", "9" * 5000, "\0", "x" * 20_000, '"""', "\n 1"),
]
PICKLED = [
    pickle.dumps(Bomb()),
    npy(np.array([Bomb(), Bomb()], dtype=object), allow_pickle=True),
    npz(np.array([Bomb()], dtype=object)),
]
DTYPES = ["f2", "f4", ">f8", "g", "i1", "u8", "?", "c16", "S4", "U4", "M8[s]", "m8[D]", "V8", "f8,i4"]
SHAPES = [(), (0,), (1,), (2,), (6,), (9,), (0, 6), (2, 0), (2, 1), (2, 6), (6, 2), (2, 9), (2, 2, 3), (1, 2, 6, 1)]
NUMBERS = [0.0, -1.0, math.nan, math.inf, 1e-300, 1e-3, 0.09, 40.0, 1e4, 7e5, 1e10, 1e154, 1e308]
TEXTS = [
    *("", " ", "0", "0 1", "1\n0\n1", "0 2", "-1 0", "nan 1", "1e300 0", "0x1 1", "# 0\n1", "0 1\n0", "1,1", "٠ ١"),
    *(
        "Na Cl",
        "Na K",
        "9" * 5000,
        "Na " * 3000,
        "Na" * 300_000,
        "\0\0",
        "\x1b[31m Cl",
        "Å ß",
        "Na\x85Cl",
        "Na\u2028Cl",
    ),
]
LINKS = ["..", ".", "nowhere", "../type.raw"]
ADDED = ["nopbc", "set.002", "set.x/coord.npy", *(f"set.00{i}/real_atom_types.npy" for i in "01"), "coord.raw"]
COPIES = ["b/type.raw", "set.000/type.raw", "ﬀ\udcff\n/type.raw", "type.raw/type.raw"]


@st.composite
def spoilt_bytes(draw, data):
    """A file of a folder after an accident."""
    kinds = ["cut", "byte", "array", "header", "pickle", "text", "random"]
    kind = draw(st.sampled_from(kinds + ["number", "scale", "scale"] * (data in ARRAYS)))
    number = draw(st.sampled_from(NUMBERS))
    at = draw(st.integers(0, len(data)))
    if kind == "cut":
        return data[:at]
    if kind == "byte":
        return data[:at] + draw(st.binary(max_size=3)) + data[at + 1 :]
    if kind == "array":
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return npy(np.full(draw(st.sampled_from(SHAPES)), number).astype(draw(st.sampled_from(DTYPES))))
    if kind == "number":
        array = ARRAYS[data].copy()
        array.flat[at % array.size] = number
        return npy(array)
    if kind == "scale":
        array = ARRAYS[data]
        factors = np.resize([1.0, number, 1.0], array.shape) if draw(st.booleans()) else number
        with np.errstate(all="ignore"):
            return npy(array * factors)
    if kind == "header":
        return with_header(draw(st.sampled_from(HEADERS)))
    if kind == "pickle":
        return draw(st.sampled_from([TOO_LARGE, npz(PART["coord"]), *PICKLED]))
    if kind == "text":
        return draw(st.sampled_from(TEXTS)).encode(draw(st.sampled_from(["utf-8", "utf-16"])))
    return draw(st.binary(max_size=64))


@st.composite
def spoilt_folders(draw):
    """name -> bytes, None for a folder, a Path for a link to it."""
    folder = dict(FOLDER)
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(sorted(folder)))
        accident = draw(st.sampled_from(["drop", "folder", "link", "add", "copy", *["bytes"] * 6]))
        if accident == "drop":
            del folder[name]
        elif accident == "folder":
            folder[name] = None
        elif accident == "link":
            folder[name] = Path(draw(st.sampled_from([Path(name).name, *LINKS])))
        elif accident == "add":
            added = [None, b"", Path("."), Path(".."), npy(np.array([[0, 1], [1, -1]])), npy(np.array([0, 1]))]
            folder[draw(st.sampled_from(ADDED))] = draw(st.sampled_from(added))
        elif accident == "copy":
            folder[draw(st.sampled_from(COPIES))] = FOLDER["type.raw"]
        elif isinstance(folder[name], bytes):
            folder[name] = draw(spoilt_bytes(folder[name]))
    return folder


def write(root, folder):
    root.mkdir(exist_ok=True)
    for name, content in folder.items():
        file = root / name
        if os.path.lexists(file) or any(p.is_symlink() or p.is_file() for p in file.parents):
            continue  # another accident took its place
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            file.symlink_to(content)
        elif content is None:
            file.mkdir()
        else:
            file.write_bytes(content)


def assert_systems_or_sentence(path, type_map):
    with bounds(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's and dpdata's
        try:
            systems = load_systems(path, type_map)
            made = frames(systems, 4.0, len(type_map))
        except DataError as error:
            assert_readable(error)
        else:
            assert len(made) == sum(map(len, systems)) >= 1
            for system in systems:
                labels = [a for a in (system.energies, system.forces, system.virials) if a is not None]
                assert labels
                assert all(len(a) == len(system) and np.isfinite(a).all() for a in (system.coordinates, *labels))
                assert system.forces is None or system.forces.shape == system.coordinates.shape
    assert not EXPLODED


TYPE_MAPS = st.sampled_from([["Cl", "Na"], ["Na", "Cl", "K"], ["Na"], ["Å"]])
FORMATS = st.sampled_from(["", "", "", "deepmd/npy:", "deepmd/raw:", "deepmd/npy/mixed:", "extxyz:"])


def assert_folder_is_read_or_named(folder, form, type_map):
    with tempfile.TemporaryDirectory() as root:
        write(Path(root) / "data", folder)
        assert_systems_or_sentence(f"{form}{root}/data", type_map)


@quick
@given(spoilt_folders(), FORMATS, TYPE_MAPS)
def test_a_spoilt_folder_is_read_or_named(folder, form, type_map):
    assert_folder_is_read_or_named(folder, form, type_map)


@pytest.mark.soak
@long
@given(spoilt_folders(), FORMATS, TYPE_MAPS)
def test_many_spoilt_folders(folder, form, type_map):
    assert_folder_is_read_or_named(folder, form, type_map)


@pytest.mark.parametrize(
    "data",
    [
        TOO_LARGE,
        npz(PART["force"]),
        npy(PART["force"] + 1j),
        *PICKLED,
        *map(with_header, ("(", "(" * 5000, "\0", "-1")),
    ],
)
def test_files_that_hold_no_plain_array_are_refused(data, tmp_path):
    write(tmp_path, {**FOLDER, "set.001/force.npy": data})
    with bounds(), pytest.raises(DataError, match=r"set.001/force.npy is not a readable array: ") as caught:
        load_systems(tmp_path, ["Na", "Cl"])
    assert not isinstance(caught.value.__cause__, MemoryError | AttributeError)
    assert_readable(caught.value)
    assert not EXPLODED


@pytest.mark.parametrize("path", ["", "x" * 5000, "a/" * 3000, "\0", "\udcff", "\n", "extxyz:" + "x" * 300, "a:b"])
def test_paths_that_are_no_data(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with bounds(), pytest.raises(DataError) as caught:
        load_systems(path, ["Na"])
    assert_readable(caught.value)


# The same in HDF5 files: arrays that are spoilt, links, and bytes of the file.

GROUPS = {
    "type.raw": np.array([0, 1]),
    "type_map.raw": np.array([b"Na", b"Cl"]),
    **{f"set.{i:03d}/{label}.npy": array for i in range(2) for label, array in PART.items()},
}
NOT_NUMBERS = [
    np.array(["Na", "K"], dtype=object),
    np.array(b"Na Cl"),
    np.array([b"\xff"]),
    np.array([1 + 2j]),
    TOO_LARGE,
]


@st.composite
def spoilt_hdf5(draw):
    """The bytes of an HDF5 file after a few accidents."""
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    groups = dict(GROUPS)
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(sorted(groups)))
        accident = draw(st.sampled_from(["drop", "group", "link", "add", "shape", "kind", "number", "number"]))
        number = draw(st.sampled_from(NUMBERS))
        if accident == "drop":
            del groups[name]
        elif accident == "group":
            groups[name] = None
        elif accident == "link":
            target = draw(st.sampled_from(["/", "/type.raw", "/set.000", "/nowhere", ".", ""]))
            link = h5py.SoftLink(target) if target else h5py.ExternalLink("nowhere.hdf5", "/")
            groups[draw(st.sampled_from([name, "set.002", "b", "set.000/b"]))] = link
        elif accident == "add":
            groups[draw(st.sampled_from(ADDED + COPIES[:2]))] = draw(st.sampled_from([None, [0, 1], [[0, 1], [1, -1]]]))
        elif accident == "shape":
            groups[name] = np.full(draw(st.sampled_from(SHAPES)), number)
        elif accident == "kind":
            groups[name] = draw(st.sampled_from(NOT_NUMBERS))
        elif isinstance(groups[name], np.ndarray) and groups[name].dtype.kind == "f" and groups[name].size:
            groups[name] = groups[name].copy()
            groups[name].flat[draw(st.integers(0, groups[name].size - 1))] = number
    file = io.BytesIO()
    with h5py.File(file, "w") as hdf5:
        for name, content in groups.items():
            parents = [str(parent) for parent in Path(name).parents][:-1]
            if name in hdf5 or any(
                isinstance(groups.get(p), np.ndarray | h5py.SoftLink | h5py.ExternalLink) for p in parents
            ):
                continue  # another accident took its place
            if content is None:
                hdf5.require_group(name)
            elif content is TOO_LARGE:
                hdf5.create_dataset(name, shape=(10**12,), dtype="f8", chunks=(1000,))
            elif isinstance(content, np.ndarray) and content.dtype.kind == "O":
                hdf5.create_dataset(name, data=content, dtype=h5py.string_dtype())
            else:
                hdf5[name] = content
    data = bytearray(file.getvalue())
    for _ in range(draw(st.sampled_from([0, 0, 1, 5, 50]))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.none() | st.integers(0, len(data)))])


def assert_hdf5_is_read_or_named(data, inside, type_map):
    with tempfile.TemporaryDirectory() as root:
        file = Path(root) / "a.hdf5"
        file.write_bytes(data)
        assert_systems_or_sentence(f"{file}{inside}", type_map)


INSIDE = st.sampled_from(["", "", "", "#/", "#b", "#/set.000", "#/type.raw", "#/nowhere", "#"])


@settings(quick, max_examples=100)
@given(spoilt_hdf5(), INSIDE, TYPE_MAPS)
def test_a_spoilt_hdf5_file_is_read_or_named(data, inside, type_map):
    assert_hdf5_is_read_or_named(data, inside, type_map)


@pytest.mark.soak
@long
@given(spoilt_hdf5(), INSIDE, TYPE_MAPS)
def test_many_spoilt_hdf5_files(data, inside, type_map):
    assert_hdf5_is_read_or_named(data, inside, type_map)


HUGE_BOX = 1.7e308 * np.array([1, 1, 1, -1, 1, 1, -1, -1, 1])


def stray_atom(part):
    part["coord"][0, 0] = 7e5
    del part["box"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda part: part["box"].__imul__([1e3, 1, 1, 1, 0.002, 1, 1, 1, 0.002]), "0.01 Å apart, closer than 0.1 Å"),
        (lambda part: part["box"].__imul__(0.007), "2 atoms in 0.035 × 0.035 × 0.035 Å cannot be searched"),
        (lambda part: part["coord"].__iadd__(1e300), "must stay within 1e+06 Å, but reach 1e+300 Å"),
        (lambda part: part["box"].__imul__(1e160), "must stay within 1e+06 Å, but reach 5e+160 Å"),
        (lambda part: part["box"].fill(0) or part["box"].__iadd__(HUGE_BOX), "has volume nan Å^3; it must be > 0"),
    ],
)
def test_boxes_and_coordinates_that_no_search_ends_with_are_refused(spoil, message, tmp_path):
    part = {label: array.copy() for label, array in PART.items()}
    spoil(part)
    nopbc = {} if "box" in part else {"nopbc": b""}
    folder = {"type.raw": b"0\n1\n", **nopbc, **{f"set.0/{label}.npy": npy(array) for label, array in part.items()}}
    write(tmp_path, folder)
    with bounds(), pytest.raises(DataError) as caught:
        frames(load_systems(tmp_path, ["Na", "Cl"]), 4.0, 2)
    assert message in str(caught.value)
    assert_readable(caught.value)


# Files that dpdata reads: extended xyz.

XYZ = """2
energy=-1.5 pbc="T T T" Lattice="5 0 0 0 5 0 0 0 5" Properties=species:S:1:pos:R:3:forces:R:3 virial="1 0 0 0 1 0 0 0 1"
Na 0.0 0.0 0.0 0.1 0.0 0.0
Cl 2.5 0.0 0.0 -0.1 0.0 0.0
1
energy=-0.5 Lattice="5 0 0 0 5 0 0 0 5" Properties=species:S:1:pos:R:3:Z:I:1:forces:R:3
Na 0.0 0.0 0.0 11 0.1 0.0 0.0
"""
TOKENS = [
    *("", "0", "1", "2", "3", "-1", "999999999999", "9" * 5000, "nan", "inf", "1e999", "1e300", "1e-9", "x", "=", "'"),
    *("Na", "K", "Å", "\0", "\x1b", "\u2028", "energy=", "energy=x", 'Lattice="', "Properties=", "Properties=pos:R:3"),
    *('"', "R", "x=" * 5000, "x" * 5000),
]


@st.composite
def spoilt_xyz(draw):
    """The bytes of an extended xyz file after a few accidents."""
    lines = [line.split(" ") for line in XYZ.splitlines()]
    for _ in range(draw(st.integers(0, 4))):
        line = draw(st.sampled_from(lines))
        at = draw(st.integers(0, len(line) - 1))
        token = draw(st.sampled_from(TOKENS))
        accident = draw(st.sampled_from(["token", "token", "char", "insert", "drop", "line", "twice"]))
        if accident == "token":
            line[at] = token
        elif accident == "char":
            cut = draw(st.integers(0, len(line[at])))
            line[at] = line[at][:cut] + token + line[at][cut + 1 :]
        elif accident == "insert":
            line.insert(at, token)
        elif accident == "drop" and len(line) > 1:
            del line[at]
        elif accident == "line" and len(lines) > 1:
            lines.remove(line)
        elif accident == "twice":
            lines.insert(draw(st.integers(0, len(lines))), list(line))
    text = "\n".join(map(" ".join, lines)) + "\n"
    data = text.encode(draw(st.sampled_from(CODINGS)))
    return data[: draw(st.none() | st.integers(0, len(data)))]


def assert_xyz_is_read_or_named(data, type_map):
    pytest.importorskip("dpdata", reason="dpdata is not installed")
    with tempfile.TemporaryDirectory() as root:
        file = Path(root) / "a.xyz"
        file.write_bytes(data)
        assert_systems_or_sentence(file, type_map)


@quick
@given(spoilt_xyz(), TYPE_MAPS)
def test_a_spoilt_xyz_file_is_read_or_named(data, type_map):
    assert_xyz_is_read_or_named(data, type_map)


@pytest.mark.soak
@long
@given(spoilt_xyz(), TYPE_MAPS)
def test_many_spoilt_xyz_files(data, type_map):
    assert_xyz_is_read_or_named(data, type_map)
