"""Energy models of DeePMD-kit, most of which no network here can compute: each trains with RLEKF and restarts."""

import shutil

import numpy as np
import pytest
import torch

from rlekf_ext.covariance import STATE

pytestmark = pytest.mark.deepmd

NEAR = {"rcut": 3.5, "rcut_smth": 0.5}
NET = {"seed": 1, "precision": "float64"}
FITTING = {"fitting_net": {"neuron": [8, 8], **NET}}
ANGULAR = {"type": "se_e2_a", "sel": [30, 30], "neuron": [4, 8], "axis_neuron": 3, **NEAR, **NET}
RADIAL = {"type": "se_e2_r", "sel": [30, 30], "neuron": [4, 8], **NEAR, **NET}
ATTENTION = {"type": "dpa1", "sel": 60, "neuron": [4, 8], "axis_neuron": 3, "attn": 8, "tebd_dim": 4, **NEAR, **NET}
REPINIT = {"nsel": 60, "neuron": [4, 8], "axis_neuron": 3, "tebd_dim": 4, **NEAR}
REPFORMER = {
    "rcut": 3.0,
    "rcut_smth": 0.5,
    "nsel": 30,
    "nlayers": 2,
    "g1_dim": 8,
    "g2_dim": 4,
    "attn2_hidden": 4,
    "attn2_nhead": 2,
    "attn1_hidden": 4,
    "attn1_nhead": 2,
}
REPFLOW = {
    "n_dim": 8,
    "e_dim": 6,
    "a_dim": 4,
    "nlayers": 2,
    "e_rcut": 3.5,
    "e_rcut_smth": 0.5,
    "e_sel": 60,
    "a_rcut": 3.0,
    "a_rcut_smth": 0.5,
    "a_sel": 20,
    "axis_neuron": 2,
}
MODELS = {
    "se_e2_a": {"descriptor": ANGULAR},
    "se_e2_a, float32": {
        "descriptor": {**ANGULAR, "precision": "float32"},
        "fitting_net": {"neuron": [8, 8], "seed": 1, "precision": "float32"},
    },
    "se_e2_a, silu": {"descriptor": {**ANGULAR, "activation_function": "silu"}},
    "se_e2_r": {"descriptor": RADIAL},
    "se_e3": {"descriptor": {**RADIAL, "type": "se_e3", "neuron": [2, 4]}},
    "hybrid": {"descriptor": {"type": "hybrid", "list": [ANGULAR, RADIAL]}},
    "dpa1, attn_layer 0": {"descriptor": {**ATTENTION, "attn_layer": 0}},
    "dpa1, attn_layer 2": {"descriptor": {**ATTENTION, "attn_layer": 2}},
    "dpa2": {"descriptor": {"type": "dpa2", "repinit": REPINIT, "repformer": REPFORMER, **NET}},
    "dpa3": {"descriptor": {"type": "dpa3", "repflow": REPFLOW, **NET}},
    "parameters of frames": {"descriptor": ANGULAR, "fitting_net": {"neuron": [8, 8], "numb_fparam": 1, **NET}},
}


@pytest.mark.parametrize("name", MODELS)
def test_trains_and_restarts(dp, tmp_path, name):
    system = tmp_path / "salt"
    shutil.copytree(dp.salt, system)
    if name == "parameters of frames":
        count = len(np.load(system / "set.000/energy.npy"))
        np.save(system / "set.000/fparam.npy", np.linspace(0, 1, count)[:, None])
    own = name.startswith("se_e2_a") and "silu" not in name
    model, asked = {**FITTING, **MODELS[name]}, {"type": "RLEKF", "block_size": 256}
    text = dp(asked, steps=20, system=system, model=model)
    assert ("a network of its own on dp's weights" in text) == own
    assert ("RLEKF makes its updates with dp's own network" in text) != own
    dp(asked, "--restart", "model.ckpt-20.pt", steps=22, system=system, model=model)
    saved = torch.load(dp.folder / "model.ckpt-22.pt", weights_only=True)
    state = saved["optimizer"]["state"][0]["state"]
    assert state[STATE["num_updates"]] == 2 * 22 + 2  # the last batch before a restart is repeated
    assert state[STATE["skipped_in_a_row"]] == 0
    rows = [line.split() for line in (dp.folder / "lcurve.out").read_text().splitlines() if line[0] != "#"]
    assert all(np.isfinite([float(number) for number in row]).all() for row in rows)
