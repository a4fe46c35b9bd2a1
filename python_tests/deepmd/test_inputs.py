"""What DeePMD-kit makes of an input, all defaults filled in, is read here, and means the same."""

import copy
import json
from pathlib import Path

import pytest

from rlekf_ext.potential.input import read_input

pytestmark = pytest.mark.deepmd

MODEL = {
    "type_map": ["O", "H"],
    "descriptor": {"type": "se_e2_a", "sel": [46, 92], "rcut_smth": 0.5, "rcut": 6.0, "neuron": [25, 50, 100]},
    "fitting_net": {"neuron": [240, 240, 240]},
}
DATA = {"training_data": {"systems": ["a", "b"], "batch_size": [1, 2]}, "numb_steps": 10}
V1 = {"systems": ["a", "b"], "set_prefix": "set", "stop_batch": 10, "batch_size": [1, 2], "numb_test": 2}
INPUTS = {
    "Adam": {"training": DATA},
    "validation": {"training": {**DATA, "validation_data": {"systems": "c"}}},
    "LKF": {"training": DATA, "optimizer": {"type": "LKF"}},
    "virials": {"training": DATA, "loss": {"type": "ener", "start_pref_v": 1.0, "limit_pref_v": 1.0}},
    "patterns": {"training": {**DATA, "training_data": {**DATA["training_data"], "rglob_patterns": ["x*"]}}},
    "probabilities": {"training": {**DATA, "training_data": {**DATA["training_data"], "sys_probs": [0.2, 0.8]}}},
    "v1": {
        "training": V1,
        "learning_rate": {"type": "exp", "start_lr": 1e-3, "decay_steps": 5000, "decay_rate": 0.95},
    },
}


@pytest.mark.parametrize("name", INPUTS)
def test_normalized_inputs_are_read(name):
    from deepmd.utils.argcheck import normalize
    from deepmd.utils.compat import update_deepmd_input

    rate = {"type": "exp", "start_lr": 1e-3, "stop_lr": 1e-8, "decay_steps": 5000}
    given = {"model": MODEL, "learning_rate": rate, "loss": {"type": "ener"}, **copy.deepcopy(INPUTS[name])}
    ours = read_input(copy.deepcopy(given))
    theirs = read_input(normalize(update_deepmd_input(copy.deepcopy(given), warning=False)))
    assert theirs.training.training_data == ours.training.training_data
    assert theirs.training.numb_steps == ours.training.numb_steps == 10
    assert theirs.loss == ours.loss
    assert theirs.model.descriptor.sel == ours.model.descriptor.sel
    assert theirs.model.fitting_net.resnet_dt  # DeePMD-kit's default; the paper's network, ours, has none
    assert theirs.optimizer.type == (name if name == "LKF" else "Adam")


def test_the_input_that_dpgen_writes():
    """From examples/dpgen: systems, batch sizes and seeds are what DP-GEN fills in."""
    import deepmd.pt  # noqa: F401  with its plugins
    from deepmd.utils.argcheck import normalize
    from deepmd.utils.compat import update_deepmd_input

    folder = Path(__file__).resolve().parents[2] / "examples/dpgen"
    given = json.loads((folder / "param.json").read_text())["default_training_param"]
    given["training"]["training_data"] |= {"systems": ["../data.init/gpaw_pbe_8"], "batch_size": [1]}
    given["model"]["descriptor"]["seed"] = given["model"]["fitting_net"]["seed"] = given["training"]["seed"] = (
        3069278058
    )
    theirs = normalize(update_deepmd_input(copy.deepcopy(given), warning=False))
    assert theirs["optimizer"]["type"] == read_input(given).optimizer.type == "RLEKF"
    assert read_input(theirs).optimizer.type == "RLEKF"
