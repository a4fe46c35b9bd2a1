"""DeePMD-kit's .dp files, without DeePMD-kit: python_tests/deepmd compares the two programs."""

import itertools
import json
import random
from contextlib import suppress

import helpers
import numpy as np
import pytest
import torch

from rlekf_ext.errors import InputError, RlekfError
from rlekf_ext.potential import deepmd_format
from rlekf_ext.potential.deepmd_format import export_model, import_model
from rlekf_ext.potential.neighbors import make_frame

h5py = pytest.importorskip("h5py")


def make_model(**changes):
    model = helpers.make_model(["Na", "Cl"], [7, 9], 4.0, rcut_smth=1.0, energy_bias=[-1300.25, 404.1], **changes)
    generator = torch.Generator().manual_seed(0)
    model.descriptor.davg[:, 0].uniform_(-1, 1, generator=generator)
    model.descriptor.dstd.uniform_(0.1, 0.3, generator=generator)
    return model


@pytest.fixture
def file(tmp_path):
    """A model, exported."""
    export_model(make_model(resnet_dt=True), tmp_path / "model.dp")
    return tmp_path / "model.dp"


def tree_of(path):
    with h5py.File(path) as file:
        return json.loads(file.attrs["json"])


def change(path, place, value):
    """Set what stands at a place of the tree."""
    with h5py.File(path, "r+") as file:
        tree = json.loads(file.attrs["json"])
        *sections, name = place.split("/")
        node = tree
        for section in sections:
            node = node[int(section) if isinstance(node, list) else section]
        node[int(name) if isinstance(node, list) else name] = value
        file.attrs["json"] = json.dumps(tree)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize(("one_side", "resnet_dt", "fitting"), list(itertools.product([False, True], repeat=3)))
def test_what_is_exported_is_imported_bit_for_bit(tmp_path, one_side, resnet_dt, fitting, precision):
    settings = {"type_one_side": one_side, "resnet_dt": resnet_dt, "fitting_resnet_dt": fitting}
    model = make_model(**settings, precision=precision)
    export_model(model, tmp_path / "model.dp")
    again = import_model(str(tmp_path / "model.dp"))
    assert again.architecture == model.architecture
    assert [name for name, _ in again.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert all(p.requires_grad and p.is_leaf for p in again.parameters())
    for (name, value), (_, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert value.dtype == other.dtype, name
        assert torch.equal(value, other), name
    frame = make_frame([[0, 0, 0], [1.5, 0, 0.3], [0, 2.0, 0]], None, [0, 1, 1], 4.0, 2, dtype=model.dtype)
    for mine, other in zip(model(frame), again(frame), strict=True):
        assert torch.equal(mine, other)
    export_model(again, tmp_path / "again.dp")
    assert helpers.hdf5_contents(tmp_path / "again.dp") == helpers.hdf5_contents(tmp_path / "model.dp")


def test_an_imported_model_can_be_trained(file):
    model = import_model(file)
    frame = make_frame([[0, 0, 0], [1.5, 0, 0.3]], None, [0, 1], 4.0, 2)
    model(frame).forces.square().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if not name.endswith("2.bias"))


def test_the_file_has_the_keys_of_deepmd(file):
    """As DeePMD-kit 3.0 writes them; later versions add keys, whose defaults are what we mean."""
    content = tree_of(file)
    assert set(content) == {"software", "version", "model", "model_def_script", "@variables"}
    model = content["model"]
    assert set(model) == {
        "@class", "@version", "type", "type_map", "atom_exclude_types", "pair_exclude_types", "rcond",
        "preset_out_bias", "@variables", "descriptor", "fitting",
    }  # fmt: skip
    assert set(model["descriptor"]) == {
        "@class", "@version", "type", "rcut", "rcut_smth", "sel", "neuron", "axis_neuron", "resnet_dt", "trainable",
        "type_one_side", "exclude_types", "env_protection", "set_davg_zero", "activation_function", "precision", "spin",
        "env_mat", "embeddings", "@variables", "type_map",
    }  # fmt: skip
    assert set(model["fitting"]) == {
        "@class", "@version", "type", "var_name", "ntypes", "dim_descrpt", "dim_out", "neuron", "resnet_dt",
        "numb_fparam", "numb_aparam", "rcond", "activation_function", "precision", "mixed_types", "exclude_types",
        "nets", "@variables", "type_map", "atom_ener", "tot_ener_zero", "trainable", "layer_name",
        "use_aparam_as_mask", "spin",
    }  # fmt: skip
    networks = model["descriptor"]["embeddings"]
    assert {**networks, "networks": None} == {
        "@class": "NetworkCollection", "@version": 1, "ndim": 2, "ntypes": 2, "network_type": "embedding_network",
        "networks": None,
    }  # fmt: skip
    assert len(networks["networks"]) == 4
    first, second = networks["networks"][0]["layers"]
    assert (first["@variables"]["idt"], first["use_timestep"]) == (None, False)  # 1 -> 3: no shortcut
    assert (second["@variables"]["idt"] is not None, second["use_timestep"]) == (True, True)
    layers = model["fitting"]["nets"]["networks"][1]["layers"]
    assert [layer["activation_function"] for layer in layers] == ["tanh", "tanh", "none"]
    assert [layer["resnet"] for layer in layers] == [True, True, False]
    assert content["model_def_script"]["descriptor"]["sel"] == [7, 9]


def test_the_arrays_have_the_shapes_of_deepmd(file):
    model, ours = tree_of(file)["model"], make_model(resnet_dt=True)
    with h5py.File(file) as stored:
        arrays = {name: stored[name][()] for name in stored}
    descriptor = model["descriptor"]["@variables"]
    davg = arrays[descriptor["davg"].lstrip("/")]
    assert davg.shape == (2, 16, 4)
    np.testing.assert_array_equal(davg, np.repeat(ours.descriptor.davg.numpy()[:, None], 16, axis=1))
    bias = arrays[model["@variables"]["out_bias"].lstrip("/")]
    assert bias.dtype == np.float64
    np.testing.assert_array_equal(bias, [[[-1300.25], [404.1]]])
    # (centre Na, neighbour Cl) is number 0 + 1 * 2
    weight = arrays[model["descriptor"]["embeddings"]["networks"][2]["layers"][1]["@variables"]["w"].lstrip("/")]
    np.testing.assert_array_equal(weight, ours.descriptor.embeddings[2].layers[1].weight.detach().numpy())


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("model/descriptor/type", "dpa1", 'model/descriptor/type = "dpa1", but only "se_e2_a" is known here.'),
        ("model/type", "zbl", 'model/type = "zbl", but only "standard" is known here.'),
        ("model/fitting/type", "dipole", 'model/fitting/type = "dipole", but only "ener" is known here.'),
        ("model/descriptor/activation_function", "gelu", 'activation_function = "gelu", but only "tanh"'),
        ("model/fitting/nets/networks/1/layers/0/activation_function", "relu", '0/activation_function = "relu"'),
        ("model/descriptor/exclude_types", [[0, 1]], r"exclude_types = \[\[0, 1\]\], but only \[\] is known"),
        ("model/pair_exclude_types", [[0, 1]], r"pair_exclude_types = \[\[0, 1\]\]"),
        ("model/atom_exclude_types", [1], r"atom_exclude_types = \[1\]"),
        ("model/atom_exclude_types", [0], r"atom_exclude_types = \[0\]"),
        ("model/fitting/exclude_types", [0], r"fitting/exclude_types = \[0\]"),
        ("model/fitting/default_fparam", [0.0], r"default_fparam = \[0.0\]"),
        ("model/fitting/atom_ener", [0.0, 0.0], r"atom_ener = \[0.0, 0.0\]"),
        ("model/descriptor/spin", {"use_spin": [True]}, r'model/descriptor/spin = {"use_spin": \[true\]}'),
        ("model/descriptor/env_protection", 0.01, "env_protection = 0.01, but only 0.0 is known here"),
        ("model/descriptor/compress", {"@variables": ["variable_0001"]}, "compress = .*, which has no counterpart"),
        ("model/fitting/numb_fparam", 2, "numb_fparam = 2, but only 0 is known here"),
        ("model/fitting/dim_case_embd", 3, "dim_case_embd = 3, which has no counterpart here"),
        ("model/fitting/atom_ener", [None, -3.5], r"atom_ener = \[null, -3.5\], but only \[\] is known here"),
        ("model/fitting/mixed_types", True, "mixed_types = true, but only false is known here"),
        ("model/fitting/precision", "float32", 'precision = "float32", but only "float64" is known here'),
        ("model/descriptor/precision", "bfloat16", 'precision = "bfloat16", but here are only "float32" and "float64"'),
        ("model/descriptor/@version", 4, "model/descriptor/@version = 4, but versions are known up to 3"),
        ("model/some_day", "new", 'model/some_day = "new", which has no counterpart here'),
        ("model/descriptor/sel", [7, 8], r"davg must be float64 of shape \(2, 15, 4\) but is float64 of shape"),
        (
            "model/descriptor/sel",
            [7, "9"],
            r'model/descriptor/sel must be a list of whole numbers, not empty, but is: \[7, "9"\]',
        ),
        ("model/descriptor/rcut", float("inf"), "model/descriptor/rcut must be a number but is: Infinity"),
        ("model/descriptor/rcut_smth", 5.0, "model/descriptor/rcut_smth must be < rcut = 4.0 Å but is: 5.0"),
        ("model/descriptor/neuron", [3, 10**9], r"model/descriptor/neuron\[1\] must be <= 10000 but is: 1000000000"),
        (
            "model/descriptor/type_one_side",
            True,
            "networks should be a list of 2 for 2 elements and type_one_side = true",
        ),
        ("model/type_map", ["Na"], "model/descriptor/sel must have a number for each of the 1 elements"),
        ("model/descriptor/type_map", ["Cl", "Na"], "type_map/0 = "),
        ("model/fitting/nets/networks/0/layers/1/@variables/w", "/variable_0000", "two nodes .* name the same array"),
        ("model/fitting/nets/networks/0/layers/1/@variables/w", "/none", "w is not in the file"),
        ("model/fitting/nets/networks/0/layers/1/@variables/w", None, "w = null, which is no array"),
        ("model/fitting/nets/networks/0", None, "networks/0 = null, but only"),
    ],
)
def test_what_has_no_counterpart_is_refused(file, place, value, message):
    change(file, place, value)
    with pytest.raises(InputError, match=message) as caught:
        import_model(file)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{file}: ")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("model/descriptor/trainable", False),
        ("model/descriptor/set_davg_zero", True),
        ("model/descriptor/precision", "default"),
        ("model/descriptor/type_map", None),
        ("model/descriptor/env_mat/use_exp_switch", None),
        ("model/fitting/atom_ener", None),
        ("model/fitting/atom_ener", [None, None]),
        ("model/fitting/layer_name", [None, None, None]),
        ("model/fitting/default_fparam", None),
        ("model/fitting/trainable", [True, True, False]),
        ("model/fitting/@variables/case_embd", None),
        ("model/fitting/@version", 4),
        ("@variables/min_nbor_dist", 1.5),
    ],
)
def test_what_other_versions_write_is_read(file, place, value):
    change(file, place, value)
    weights = import_model(file).state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in make_model(resnet_dt=True).state_dict().items())


def set_array(path, place, array):
    with h5py.File(path, "r+") as file:
        node = json.loads(file.attrs["json"])["model"]
        for name in place.split("/"):
            node = node[name]
        del file[node]
        if array is not None:
            file[node] = array


def test_energies_of_the_fitting_net_are_added(file):
    set_array(file, "fitting/@variables/bias_atom_e", np.array([[0.5], [0.25]]))
    assert import_model(file).energy_bias.tolist() == [-1300.25 + 0.5, 404.1 + 0.25]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((2, 16, 4), np.float32), "davg must be float64 .* but is float32"),
        (np.ones((2, 16, 3)), r"davg must be float64 of shape \(2, 16, 4\) but is float64 of shape \(2, 16, 3\)"),
        (np.full((2, 16, 4), np.nan), "davg has numbers that are not finite"),
        (np.arange(128.0).reshape(2, 16, 4), "davg differs between the neighbour slots"),
        (None, "davg is not in the file"),
        (h5py.ExternalLink("other.dp", "/variable_0000"), "davg is not in the file"),
        (h5py.SoftLink("/variable_0000"), "davg is not in the file"),
    ],
)
def test_arrays_are_checked(file, array, message):
    set_array(file, "descriptor/@variables/davg", array)
    with pytest.raises(InputError, match=message):
        import_model(file)


def test_deviations_must_be_positive(file):
    set_array(file, "descriptor/@variables/dstd", np.zeros((2, 16, 4)))
    with pytest.raises(InputError, match="dstd has standard deviations that are not above 0"):
        import_model(file)


def test_files_that_are_none(tmp_path, file):
    cases = {
        "model.pth": "files that end in .dp, but this one is called .*model.pth: `dp convert-backend` turns",
        "none.dp": "none.dp cannot be read: No such file or directory.",
        "folder.dp": "folder.dp cannot be read: Is a directory.",
        "text.dp": "text.dp: not a whole .dp file of DeePMD-kit: take another copy",
        "empty.dp": "empty.dp: not a whole .dp file",
        "other.dp": "other.dp: not a whole .dp file",
        "list.dp": "list.dp: model/type is missing",
    }
    (tmp_path / "folder.dp").mkdir()
    (tmp_path / "text.dp").write_text("hello\n" * 100)
    (tmp_path / "empty.dp").write_bytes(b"")
    for name, attributes in (("other.dp", {}), ("list.dp", {"json": "[1, 2]"})):
        with h5py.File(tmp_path / name, "w") as other:
            other.attrs.update(attributes)
    for name, message in cases.items():
        with pytest.raises(InputError, match=message) as caught:
            import_model(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_truncated_files_are_refused(tmp_path, file):
    content, copy = file.read_bytes(), tmp_path / "copy.dp"
    for length in [0, 1, 8, 100, *random.Random(0).sample(range(len(content)), 20), len(content) - 1]:
        copy.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"copy\.dp: not a whole .dp file"):
            import_model(copy)


def test_an_altered_weight_is_noticed(tmp_path, file):
    """Each data set has a checksum."""
    content, copy = bytearray(file.read_bytes()), tmp_path / "copy.dp"
    for value in list(make_model(resnet_dt=True).parameters())[::5]:
        place = content.find(value.detach().numpy().tobytes())
        assert place > 0
        altered = bytearray(content)
        altered[place] ^= 1
        copy.write_bytes(altered)
        with pytest.raises(InputError, match=r"copy\.dp: not a whole .dp file"):
            import_model(copy)


def test_a_damaged_file_is_an_error_or_the_same_model(tmp_path, file):
    content, copy, generator = file.read_bytes(), tmp_path / "copy.dp", random.Random(0)
    expected, refused = make_model(resnet_dt=True), 0
    for _ in range(60):
        found = None
        damaged = bytearray(content)
        for place in generator.sample(range(len(content)), 4):
            damaged[place] = generator.randrange(256)
        copy.write_bytes(damaged)
        with suppress(InputError):
            found = import_model(copy)
        if found is None:
            refused += 1
            continue
        assert found.architecture == expected.architecture
        weights = found.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in expected.state_dict().items())
    assert refused > 30


def test_export_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for name, message in (("file/model.dp", "cannot be written"), ("model.pth", "files that end in .dp")):
        with pytest.raises(InputError, match=message):
            export_model(make_model(), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failing_export_leaves_the_old_file(file, monkeypatch):
    old = file.read_bytes()

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(h5py.Group, "create_dataset", full)
    with pytest.raises(InputError, match=r"model.dp cannot be written: No space left on device\."):
        export_model(make_model(), file)
    assert file.read_bytes() == old
    assert [path.name for path in file.parent.iterdir()] == ["model.dp"]


def test_a_fault_of_our_own_is_not_the_users(file, monkeypatch):
    monkeypatch.setattr(deepmd_format, "_matches", lambda *_: zip([1], [1, 2], strict=True))
    with pytest.raises(ValueError, match="zip") as caught:
        import_model(file)
    assert not isinstance(caught.value, RlekfError)
