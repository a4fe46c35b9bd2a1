"""Reading input.json: what is understood, what is read over, and what each mistake is told."""

import copy
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from rlekf_ext.errors import InputError
from rlekf_ext.options import resolve
from rlekf_ext.potential.batches import batch_sizes
from rlekf_ext.potential.data import System
from rlekf_ext.potential.deepmd_keys import IGNORED, LACKING
from rlekf_ext.potential.input import LKF, Adam, Config, LearningRate, read_input

NACL = Path(__file__).resolve().parents[2] / "examples" / "nacl"

# As a user of DeePMD-kit has it: liquid water, se_e2_a.
WATER = {
    "_comment": "water",
    "model": {
        "type_map": ["O", "H"],
        "descriptor": {
            "type": "se_e2_a",
            "sel": [46, 92],
            "rcut_smth": 0.5,
            "rcut": 6,
            "neuron": [25, 50, 100],
            "resnet_dt": False,
            "axis_neuron": 16,
            "type_one_side": True,
            "precision": "float64",
            "seed": 1,
            "_comment": "embedding",
        },
        "fitting_net": {
            "neuron": [240, 240, 240],
            "resnet_dt": True,
            "precision": "default",
            "numb_fparam": 0,
            "trainable": True,
            "rcond": None,
            "atom_ener": [],
            "seed": 1,
        },
        "data_stat_nbatch": 20,
        "pair_exclude_types": [],
    },
    "learning_rate": {
        "type": "exp",
        "decay_steps": 5000,
        "start_lr": 0.001,
        "stop_lr": 3.51e-8,
        "scale_by_worker": "none",
        "warmup_steps": 0,
    },
    "loss": {
        "type": "ener",
        "start_pref_e": 0.02,
        "limit_pref_e": 1,
        "start_pref_f": 1000,
        "limit_pref_f": 1,
        "start_pref_v": 0,
        "limit_pref_v": 0,
        "start_pref_h": 0.0,
    },
    "training": {
        "training_data": {"systems": ["../data/data_0/", "../data/data_1/"], "batch_size": "auto", "_comment": ""},
        "validation_data": {"systems": "../data/data_3", "batch_size": 1, "numb_btch": 3},
        "numb_steps": 1000000,
        "seed": 10,
        "disp_file": "lcurve.out",
        "disp_freq": 100,
        "save_freq": 1000,
        "stat_file": "./se_e2_a.hdf5",
        "max_ckpt_keep": 5,
        "tensorboard": False,
        "gradient_max_norm": 0.0,
        "zero_stage": 0,
    },
    "validating": {"full_validation": False, "validation_freq": 5000},
}

SMALL = {"model": {"type_map": ["Na", "Cl"]}, "training": {"training_data": {"systems": "a"}, "num_epochs": 3}}


def changed(path, value, base=SMALL):
    """A copy of `base` with the key at `path` set."""
    given = copy.deepcopy(base)
    *sections, name = path.split("/")
    section = given
    for each in sections:
        section = section.setdefault(each, {})
    section[name] = value
    return given


def test_water_as_deepmd_kit_reads_it(tmp_path):
    file = tmp_path / "input.json"
    file.write_text(json.dumps(WATER))
    config = read_input(file)
    assert config == read_input(WATER)
    descriptor, fitting, training = config.model.descriptor, config.model.fitting_net, config.training
    assert config.model.type_map == ("O", "H")
    assert (descriptor.sel, descriptor.rcut, descriptor.neuron) == ((46, 92), 6.0, (25, 50, 100))
    assert isinstance(descriptor.rcut, float)
    assert descriptor.sel_factor is None
    assert (descriptor.type_one_side, descriptor.resnet_dt, descriptor.axis_neuron) == (True, False, 16)
    assert (fitting.neuron, fitting.resnet_dt, fitting.seed) == ((240, 240, 240), True, 1)
    of_adam = read_input({**WATER, "optimizer": {"type": "Adam"}}).learning_rate
    assert (of_adam.start_lr, of_adam.stop_lr) == (1e-3, 3.51e-8)
    assert (config.loss.start_pref_f, config.loss.limit_pref_f) == (1000.0, 1.0)
    assert training.training_data.systems == ("../data/data_0/", "../data/data_1/")
    assert training.validation_data.systems == ("../data/data_3",)
    assert training.validation_data.numb_btch == 3
    assert (training.numb_steps, training.num_epochs, training.seed) == (1000000, None, 10)
    assert (training.disp_file, training.disp_freq, training.save_freq) == ("lcurve.out", 100, 1000)
    json.dumps(asdict(config))  # a checkpoint can hold it


def test_defaults_are_the_papers_network():
    config = read_input(SMALL)
    descriptor, fitting = config.model.descriptor, config.model.fitting_net
    assert (descriptor.neuron, descriptor.axis_neuron, descriptor.resnet_dt) == ((25, 25, 25), 16, False)
    assert (descriptor.rcut, descriptor.rcut_smth, descriptor.sel, descriptor.sel_factor) == (6.0, 0.5, "auto", 1.1)
    assert (fitting.neuron, fitting.resnet_dt) == ((50, 50, 50), False)
    assert (config.optimizer.type, config.optimizer.options) == ("RLEKF", resolve({}))
    assert (config.training.validation_data, config.training.validation_fraction) == (None, 0.2)
    assert isinstance(config, Config)


@pytest.mark.parametrize(
    ("batch_size", "counts"),
    [
        (3, [3, 3]),
        ("auto", [4, 1]),
        ("auto:100", [13, 1]),
        ("max:100", [12, 1]),
        ("filter:100", [12, 1]),
        ([5, 2], [5, 2]),
    ],
)
def test_batch_sizes(batch_size, counts):
    data = read_input(changed("training/training_data/batch_size", batch_size)).training.training_data
    systems = [System(str(n), np.zeros(n), np.zeros((1, n, 3)), None, number=i) for i, n in enumerate((8, 192))]
    assert batch_sizes(data, systems) == counts


@pytest.mark.parametrize(
    ("optimizer", "size"),
    [
        ({"type": "RLEKF"}, 4),
        ({"type": "RLEKF", "batch": "mean"}, 1),
        ({"type": "RLEKF", "preset": "paper"}, 1),
        ({"type": "LKF"}, 1),
        ({"type": "Adam"}, "auto"),
    ],
)
def test_batch_size_that_is_not_given(optimizer, size):
    given = changed("optimizer", optimizer)
    given["training"]["training_data"].pop("batch_size", None)
    assert read_input(given).training.training_data.batch_size == size


@pytest.mark.parametrize(
    ("path", "value", "read"),
    [
        ("model/descriptor/sel", "auto:1.2", lambda c: c.model.descriptor.sel_factor == 1.2),
        ("model/descriptor/type", "se_a", lambda c: c.model.descriptor.type == "se_a"),
        ("model/descriptor/n_axis_neuron", 8, lambda c: c.model.descriptor.axis_neuron == 8),
        ("model/fitting_net/n_neuron", [5], lambda c: c.model.fitting_net.neuron == (5,)),
        ("model/fitting_net/seed", None, lambda c: c.model.fitting_net.seed is None),
        ("training/validation_data", None, lambda c: c.training.validation_data is None),
        ("training/training_data/auto_prob_style", "prob_sys_size", lambda c: True),
    ],
)
def test_other_forms_of_a_key(path, value, read):
    assert read(read_input(changed(path, value)))


@pytest.mark.parametrize("name", ["num_epochs", "numb_epoch", "num_epoch", "numb_epochs"])
def test_names_of_the_number_of_epochs(name):
    given = {"training_data": {"systems": "a"}, name: 2.5}
    assert read_input(SMALL | {"training": given}).training.num_epochs == 2.5


@pytest.mark.parametrize("name", ["numb_steps", "stop_batch", "num_step", "num_steps", "numb_step"])
def test_names_of_the_number_of_steps(name):
    given = {"training_data": {"systems": "a"}, name: 10}
    assert read_input(SMALL | {"training": given}).training.numb_steps == 10


RLEKF = {
    "block_size": 1024,
    "strategy": "gekf",
    "memory_factor": 0.998,
    "forgetting_rate": 1,
    "initial_covariance": 0.5,
    "measurement_noise": 4.0,
    "process_noise": 0,
    "covariance_dtype": "float32",
    "preset": "paper",
    "group_size": 2,
    "num_groups": 4,
    "order": ["energy", "force", "energy"],
    "energy_scale": 3.0,
    "force_scale": 1.0,
    "virial_scale": 1.0,
    "adaptive_scale": True,
    "relinearize": False,
    "warm_start": True,
}


def test_optimizer_options_are_the_given_ones():
    optimizer = read_input(changed("optimizer", {"type": "RLEKF", **RLEKF, "_comment": ""})).optimizer
    assert optimizer.type == "RLEKF"
    assert optimizer.options == resolve(RLEKF)
    assert optimizer.options.order == ("energy", "force", "energy")
    assert optimizer.options.batch == "mean"  # of the preset
    optimizer = read_input(changed("optimizer", {"type": "LKF", "kf_blocksize": 2048, "kf_start_pref_f": 2})).optimizer
    assert (optimizer.type, optimizer.options) == ("LKF", LKF(kf_blocksize=2048, kf_start_pref_f=2.0))
    given = {"type": "Adam", "adam_beta1": 0.8, "beta2": 0.99, "weight_decay": 1e-4}
    optimizer = read_input(changed("optimizer", given)).optimizer
    assert optimizer.options == Adam(beta1=0.8, beta2=0.99, weight_decay=1e-4)


def test_optimizer_of_deepmd_kit_3_1_stands_in_training():
    training = SMALL["training"] | {"opt_type": "LKF", "kf_blocksize": 1024}
    optimizer = read_input(SMALL | {"training": training}).optimizer
    assert (optimizer.type, optimizer.options) == ("LKF", LKF(kf_blocksize=1024))
    with pytest.raises(InputError, match="training/opt_type and the section optimizer exclude each other"):
        read_input(SMALL | {"training": training, "optimizer": {"type": "LKF"}})
    with pytest.raises(InputError, match='training/opt_type = "AdamW" is not supported; supported: "RLEKF", "LKF"'):
        read_input(changed("training/opt_type", "AdamW"))
    with pytest.raises(InputError, match="training/kf_blocksize must be >= 1 but is: 0"):
        read_input(SMALL | {"training": training | {"kf_blocksize": 0}})


def test_systems_are_found_from_the_file(tmp_path, monkeypatch):
    (tmp_path / "run" / "data").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    (tmp_path / "run" / "OUTCAR").touch()
    systems = ["data", "here", "vasp/outcar:OUTCAR", "d*", "nowhere", "nowhere*"]
    (tmp_path / "run" / "input.json").write_text(json.dumps(changed("training/training_data/systems", systems)))
    monkeypatch.chdir(tmp_path)
    found = read_input("run/input.json").training.training_data.systems
    assert found == ("run/data", "here", "vasp/outcar:run/OUTCAR", "run/d*", "nowhere", "nowhere*")


@pytest.mark.parametrize(
    ("descriptor", "axis_neuron"),
    [({}, 16), ({"neuron": [5, 10]}, 10), ({"neuron": [25, 50]}, 16), ({"neuron": [5, 10], "axis_neuron": 3}, 3)],
)
def test_axis_neuron_is_at_most_the_last_of_neuron_unless_it_is_given(descriptor, axis_neuron):
    assert read_input(changed("model/descriptor", descriptor)).model.descriptor.axis_neuron == axis_neuron


@pytest.mark.parametrize(("name", "kind"), [("rlekf.json", "RLEKF"), ("adam.json", "Adam")])
def test_the_examples(name, kind):
    config = read_input(NACL / name)
    assert config.optimizer.type == kind
    assert config.model == read_input(NACL / "rlekf.json").model
    assert Path(config.training.training_data.systems[0]).is_dir()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        # keys
        ("model/descriptor/neurn", [1], "model/descriptor/neurn is not a known option; did you mean neuron?"),
        ("optimizer/blocksize", 1, "optimizer/blocksize is not a known option; did you mean block_size?"),
        ("optimizer/xyz", 1, "optimizer/xyz is not a known option; known options are block_size, strategy,"),
        ("learning", {}, "learning is not a known option; did you mean learning_rate?"),
        ("training/disp_frq", 1, "training/disp_frq is not a known option; did you mean disp_freq?"),
        ("training/num_epoch", 3, "training/num_epochs and training/num_epoch mean the same; keep one."),
        # types
        ("model", [], "model must be a JSON object {...} but is: []."),
        ("model/type_map", [], "model/type_map must be a list of strings, not empty, but is: []."),
        ("model/descriptor/rcut", "6", 'model/descriptor/rcut must be a number but is: "6".'),
        ("model/descriptor/rcut", True, "model/descriptor/rcut must be a number but is: true."),
        ("model/descriptor/rcut", float("nan"), "model/descriptor/rcut must be a number but is: NaN."),
        ("model/descriptor/neuron", [10, 2.5], "must be a list of whole numbers, not empty, but is: [10, 2.5]."),
        ("model/descriptor/resnet_dt", 0, "model/descriptor/resnet_dt must be true or false but is: 0."),
        ("model/descriptor/sel", "aut", 'must be "auto", "auto:FACTOR" or a list of whole numbers but is: "aut".'),
        ("model/fitting_net/seed", "x", 'model/fitting_net/seed must be a whole number but is: "x".'),
        ("training/seed", True, "training/seed must be a whole number but is: true."),
        ("training/training_data/systems", [], "systems must be a path or a list of paths but is: []."),
        (
            "training/training_data/batch_size",
            "mixed:2",
            'whole number, one for each system, "auto", "auto:N", "max:N"',
        ),
        ("training/training_data/batch_size", [1, 0], "training/training_data/batch_size[1] must be >= 1 but is: 0."),
        ("optimizer/order", "energy", 'optimizer/order must be a list of strings, not empty, but is: "energy".'),
        ("optimizer/warm_start", 1, "optimizer/warm_start must be true or false but is: 1."),
        # ranges
        ("model/descriptor/rcut", 0, "model/descriptor/rcut must be > 0 but is: 0."),
        ("model/descriptor/neuron", [10, 0], "model/descriptor/neuron[1] must be >= 1 but is: 0."),
        ("optimizer/memory_factor", 1.1, "optimizer/memory_factor must be <= 1 but is: 1.1."),
        ("optimizer/process_noise", -1, "optimizer/process_noise must be >= 0 but is: -1."),
        ("training/validation_fraction", 1, "training/validation_fraction must be < 1 but is: 1."),
        ("training/training_data/batch_size", 0, "training/training_data/batch_size must be >= 1 but is: 0."),
        # choices
        ("model/type", "hybrid", 'model/type = "hybrid" is not supported; supported: "standard".'),
        ("model/descriptor", {"type": "dpa2", "repinit": {}}, 'type = "dpa2" is not supported; supported: "se_e2_a", '),
        ("model/descriptor", {"sel": 120, "type": "se_atten"}, 'descriptor/type = "se_atten" is not supported'),
        ("model/descriptor/activation_function", "gelu", '= "gelu" is not supported; supported: "tanh".'),
        ("model/descriptor/precision", "float16", '= "float16" is not supported; supported: "default", "float64", "fl'),
        ("model/descriptor/trainable", False, "model/descriptor/trainable = false is not supported; supported: true."),
        ("model/fitting_net", {"type": "dos", "numb_dos": 2}, 'type = "dos" is not supported; supported: "ener"'),
        ("loss", {"type": "tensor"}, 'loss/type = "tensor" is not supported; supported: "ener".'),
        ("loss/loss_func", "mae", 'loss/loss_func = "mae" is not supported; supported: "mse".'),
        ("optimizer/type", "AdamW", 'optimizer/type = "AdamW" is not supported; supported: "RLEKF", "LKF", "Adam".'),
        ("optimizer/strategy", "ekf", '"ekf" is not supported; supported: "rlekf", "deepmd", "lekf", "sekf", "gekf".'),
        ("optimizer/preset", "fast", '"fast" is not supported; supported: "paper", "robust", "lkf".'),
        ("optimizer/order", ["energy", "dipole"], 'optimizer/order[1] = "dipole" is not supported'),
        ("training/training_data/auto_prob", "prob_sys_size;0:1", 'must be "prob_uniform", "prob_sys_size" or'),
        ("training/training_data/set_prefix", "train", '"train" is not supported; supported: "set"'),
        # two keys at once
        ("model/type_map", ["Na", "Na"], 'model/type_map must name each element once but is: ["Na", "Na"].'),
        ("model/descriptor/sel", [40], 'a number for each of the 2 elements of model/type_map but is: [40]; "auto"'),
        ("model/descriptor/sel", "auto:0.5", "The factor in model/descriptor/sel must be >= 1 but is: 0.5."),
        ("model/descriptor/rcut_smth", 6.0, "model/descriptor/rcut_smth must be < rcut = 6.0 Å but is: 6.0 Å."),
        ("model/descriptor/axis_neuron", 26, "axis_neuron must be <= 25, the last number of neuron, but is: 26."),
        ("model/descriptor/precision", "float32", "that of model/descriptor/precision, float32, but is: default."),
        ("training/numb_steps", 5, "training/numb_steps and training/num_epochs exclude each other; keep one."),
    ],
)
def test_mistakes(path, value, message):
    with pytest.raises(InputError) as error:
        read_input(changed(path, value))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_keys():
    with pytest.raises(InputError, match="model is missing; it has no default"):
        read_input({"training": SMALL["training"]})
    with pytest.raises(InputError, match="model/type_map is missing"):
        read_input(SMALL | {"model": {}})
    with pytest.raises(InputError, match="training/training_data is missing"):
        read_input(SMALL | {"training": {"numb_steps": 1}})
    with pytest.raises(InputError, match="training/training_data/systems is missing"):
        read_input(SMALL | {"training": {"training_data": {}, "numb_steps": 1}})
    with pytest.raises(InputError, match="training/numb_steps or training/num_epochs is missing"):
        read_input(SMALL | {"training": {"training_data": {"systems": "a"}}})
    both = SMALL["training"] | {"validation_data": {"systems": "b"}, "validation_fraction": 0.1}
    with pytest.raises(InputError, match="validation_fraction and training/validation_data exclude each other"):
        read_input(SMALL | {"training": both})


@pytest.mark.parametrize("path", sorted(LACKING))
def test_what_is_lacking_is_named_unless_it_is_off(path):
    of_adam = {"optimizer": {"type": "Adam"}} if path.startswith("learning_rate/") else {}
    with pytest.raises(InputError) as error:
        read_input({**changed(path, {"enable": True}), **of_adam})
    assert str(error.value) == f'{path} is not supported (got {{"enable": true}}): {LACKING[path]}; leave the key out.'
    for off in (0, False, None, [], {}, {"enable": False}):
        read_input({**changed(path, off), **of_adam})


def test_validation_data_lacks_what_training_data_lacks():
    given = changed("training/validation_data", {"systems": "b", "set_prefix": "other"})
    with pytest.raises(InputError, match='training/validation_data/set_prefix = "other" is not supported'):
        read_input(given)


@pytest.mark.parametrize("path", sorted(IGNORED))
def test_what_changes_nothing_is_read_over(path):
    assert read_input(changed(path, 7)) == read_input(SMALL)


def test_files_that_are_not_input(tmp_path):
    file = tmp_path / "input.json"
    with pytest.raises(InputError, match=r"The input file .*input.json cannot be read: No such file"):
        read_input(file)
    file.write_text('{\n  "model": {,}\n}')
    with pytest.raises(InputError, match=r"input.json, line 2, column 13: not JSON: "):
        read_input(str(file))
    file.write_text("[1]")
    with pytest.raises(InputError, match=r"must hold a JSON object \{...\} but holds: \[1\]"):
        read_input(file)
    file.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(InputError, match="is not text in UTF-8: byte 7"):
        read_input(file)


def test_learning_rate_is_read_for_adam_alone():
    """Another optimizer uses none, so that whatever schedule stands there is no reason to stop."""
    given = changed("learning_rate", {"type": "cosine", "start_lr": "high", "warmup_steps": 100})
    assert read_input(given).learning_rate == LearningRate()
    with pytest.raises(InputError, match='learning_rate/type = "cosine" is not supported; supported: "exp"'):
        read_input({**given, "optimizer": {"type": "Adam"}})
    given = {**changed("learning_rate", {"decay_rate": 0.95}), "optimizer": {"type": "Adam"}}
    assert read_input(given).learning_rate.decay_rate == 0.95
