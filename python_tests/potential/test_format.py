"""data/checkpoint_format_1.pt was written once, and loads for as long as 1 is the format: five batches of NaCl, 58
weights, preset robust."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rlekf_ext import covariance
from rlekf_ext.cli import main
from rlekf_ext.errors import InputError
from rlekf_ext.potential.checkpoint import load_checkpoint, restored_model
from rlekf_ext.potential.uncertainty import filter_of

FILE = Path(__file__).parent / "data" / "checkpoint_format_1.pt"
NACL = Path(__file__).resolve().parents[2] / "examples" / "nacl" / "gpaw_pbe_8"
DESCRIPTOR = {"rcut": 3.5, "neuron": [2, 2], "axis_neuron": 1, "sel": [8, 8]}


def scalars():
    checkpoint = load_checkpoint(FILE)
    return filter_of(checkpoint, restored_model(checkpoint)).filter.covariance.scalars()


def test_it_loads():
    found = scalars()
    assert (found.num_updates, found.num_pending) == (5 * 8, 8)
    assert found.forgetting == pytest.approx(0.002 * 0.9987**40, rel=1e-12)
    assert found.measurement_noise == 1


def test_it_loads_when_a_scalar_has_been_added_and_moved(monkeypatch):
    """In another order, with one that it does not have: that one starts as it does in a new filter."""
    before = scalars()
    names = ["added", *reversed(covariance.STATE)]
    monkeypatch.setattr(covariance, "STATE", {name: i for i, name in enumerate(names)})
    saved = load_checkpoint(FILE)["optimizer"]["filter"]["state"][0]
    state = dict(zip(names, covariance.Covariance.from_state_dict(saved).state.tolist(), strict=True))
    assert state.pop("added") == 0
    assert state == before._asdict()


def test_another_format_is_refused(tmp_path):
    checkpoint = torch.load(FILE, weights_only=True)
    torch.save({**checkpoint, "format": 2}, tmp_path / "later.pt")
    with pytest.raises(InputError, match="has format 2 but this version of rlekf_ext reads format 1"):
        load_checkpoint(tmp_path / "later.pt")


def test_training_continues_from_it(tmp_path, monkeypatch):
    (tmp_path / "data" / "set.000").mkdir(parents=True)
    for name in ("type.raw", "type_map.raw"):
        (tmp_path / "data" / name).write_text((NACL / name).read_text())
    for file in (NACL / "set.000").glob("*.npy"):
        np.save(tmp_path / "data" / "set.000" / file.name, np.load(file)[:4])
    training = {"training_data": {"systems": "data", "batch_size": 1}, "validation_fraction": 0.25, "numb_steps": 7}
    given = {
        "model": {"type_map": ["Na", "Cl"], "descriptor": DESCRIPTOR, "fitting_net": {"neuron": [2]}},
        "optimizer": {"type": "RLEKF", "block_size": 64},
        "training": {**training, "seed": 1},
    }
    monkeypatch.chdir(tmp_path)
    (tmp_path / "input.json").write_text(json.dumps(given))
    (tmp_path / "model.ckpt.pt").write_bytes(FILE.read_bytes())
    assert main(["train", "input.json", "--restart"]) == 0
    found = load_checkpoint("model.ckpt.pt")
    assert found["progress"]["step"] == 7
    before = load_checkpoint(FILE)["progress"]  # that run had another default
    assert found["progress"]["updates"] == before["updates"] + (7 - before["step"]) * 2
