"""The real `dp --pt train` with type RLEKF: `make test-deepmd`, which makes the environment for it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlekf_ext.covariance import STATE

pytestmark = pytest.mark.deepmd

ROOT = Path(__file__).parents[2]
WATER = ROOT.parent / "shared" / "data" / "H2O" / "deepmd_water_192"
SALT = ROOT / "examples" / "nacl" / "gpaw_pbe_8"
# Runs dp in a Python where LKF draws the atoms that RLEKF draws.
SAME_ATOMS = """
import sys, torch
from types import SimpleNamespace
from rlekf_ext.measurement import force_groups
generator = torch.Generator().manual_seed(int(sys.argv.pop(1)))
def choice(atoms, count):
    return torch.cat(force_groups(len(atoms), 6, count // 6, generator)).numpy()
import deepmd.pt.optimizer.KFWrapper as wrapper
wrapper.np = SimpleNamespace(random=SimpleNamespace(default_rng=lambda: SimpleNamespace(choice=choice)))
from deepmd.main import main
main()
"""


@pytest.fixture
def dp(tmp_path):
    """Run dp on an input in a folder of its own; returns what it printed."""
    pytest.importorskip("deepmd", reason="runs in the environment of make test-deepmd")

    def run(
        optimizer, *options, steps=4, frames=1, seed=1, program=("-m", "deepmd"), fails=False, salt=False, **environment
    ):
        system, types, sel = (
            (WATER, ["O", "H"], [46, 92]) if WATER.is_dir() and not salt else (SALT, ["Na", "Cl"], [60, 60])
        )
        network = {"resnet_dt": False, "seed": 1, "precision": "float64"}
        config = {
            "model": {
                "type_map": types,
                "descriptor": {
                    "type": "se_e2_a",
                    "sel": sel,
                    "rcut": 4.5,
                    "rcut_smth": 0.5,
                    "neuron": [5, 10],
                    "axis_neuron": 3,
                    **network,
                },
                "fitting_net": {"neuron": [10, 10], **network},
            },
            "learning_rate": {"type": "exp", "start_lr": 1e-3, "stop_lr": 1e-8},
            "loss": {"type": "ener", "start_pref_e": 0.02, "limit_pref_e": 1, "start_pref_f": 1000, "limit_pref_f": 1},
            "optimizer": optimizer,
            "training": {
                "training_data": {"systems": [str(system)], "batch_size": frames},
                "numb_steps": steps,
                "seed": seed,
                "disp_freq": 1,
                "save_freq": 1000,
            },
        }
        (tmp_path / "input.json").write_text(json.dumps(config))
        threads = {
            "OMP_NUM_THREADS": "1",
            "DP_INTRA_OP_PARALLELISM_THREADS": "1",
            "DP_INTER_OP_PARALLELISM_THREADS": "1",
        }
        done = subprocess.run(
            [sys.executable, *program, "--pt", "train", "input.json", "--skip-neighbor-stat", *options],
            cwd=tmp_path,
            env={**os.environ, **threads, **environment},
            capture_output=True,
            text=True,
        )
        text = done.stdout + done.stderr
        assert (done.returncode != 0) == fails, text
        return text

    run.folder = tmp_path
    return run


def checkpoint(dp, step):
    return torch.load(dp.folder / f"model.ckpt-{step}.pt", weights_only=True)


def weights(dp, step):
    model = checkpoint(dp, step)["model"]
    return {name: value for name, value in model.items() if name.endswith(("matrix", "bias")) and "net" in name}


def force_errors(dp):
    rows = (dp.folder / "lcurve.out").read_text().splitlines()
    return [float(row.split()[3]) for row in rows if not row.startswith("#")]


def test_trains_and_restarts(dp):
    """NaCl, which learns within seconds; water stays on its first plateau for the first hundred batches."""
    asked = {"type": "RLEKF", "block_size": 256}
    text = dp(asked, steps=80, salt=True)
    errors = force_errors(dp)
    assert sum(errors[-10:]) < 0.5 * sum(errors[:10])
    assert "in torch.float64" in text
    before = checkpoint(dp, 80)["optimizer"]
    # dp goes on from the step that it saved, which it does again; so the filter makes one more batch of updates.
    dp(asked, "--restart", "model.ckpt-80.pt", steps=80, salt=True)
    after = checkpoint(dp, 80)["optimizer"]
    memory, rate = 1 - float(before["state"][0]["state"][STATE["forgetting"]]), 0.9987
    for _ in range(8):
        memory = rate * memory + 1 - rate
    assert 1 - float(after["state"][0]["state"][STATE["forgetting"]]) == pytest.approx(memory, abs=1e-14)
    assert not torch.equal(before["updater"]["generator"], after["updater"]["generator"])


def test_restart_restores_every_bit(dp):
    asked = {"type": "RLEKF", "block_size": 256}
    dp(asked, steps=3)
    before = checkpoint(dp, 3)
    program = ("-c", LOAD_AND_SAVE)
    dp(asked, "--restart", "model.ckpt-3.pt", steps=3, program=program)
    after = torch.load(dp.folder / "again.pt", weights_only=True)
    for name, tensor in before["optimizer"]["state"][0].items():
        assert torch.equal(tensor, after["optimizer"]["state"][0][name]), name
    assert torch.equal(before["optimizer"]["updater"]["generator"], after["optimizer"]["updater"]["generator"])
    for name in weights(dp, 3):
        assert torch.equal(before["model"][name], after["model"][name])


LOAD_AND_SAVE = """
import deepmd.pt
from deepmd.pt.train import training
from deepmd.pt.entrypoints import main
main.get_trainer, get_trainer = (lambda *a, **k: saved(get_trainer(*a, **k))), main.get_trainer
def saved(trainer):
    trainer.save_model("again.pt")
    raise SystemExit(0)
from deepmd.main import main
main()
"""


@pytest.mark.parametrize("frames", [1, 2])
def test_lkf_parity(dp, frames):
    """After 50 batches with the same atoms drawn, 250 updates, the weights are those of DeePMD-kit's own LKF."""
    dp({"type": "LKF", "kf_blocksize": 256}, steps=50, frames=frames, program=("-c", SAME_ATOMS, "1"))
    theirs = weights(dp, 50)
    dp({"type": "RLEKF", "preset": "lkf", "block_size": 256}, steps=50, frames=frames)
    ours = weights(dp, 50)
    assert len(ours) == len(theirs) >= 10
    difference = max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)
    print(f"\nLKF parity, {frames} frames a batch: the largest difference of a weight is {difference:.1e}")
    assert difference < 1e-10
    dp({"type": "LKF", "kf_blocksize": 256}, steps=1, frames=frames)
    first = weights(dp, 1)
    assert max(float((first[name] - theirs[name]).abs().max()) for name in theirs) > 1e-3  # and they have moved
    dp({"type": "LKF", "kf_blocksize": 256}, steps=50, frames=frames, RLEKF_DEEPMD="LKF")
    taken = weights(dp, 50)
    assert max(float((taken[name] - theirs[name]).abs().max()) for name in theirs) < 1e-10


def test_restart_from_lkf(dp):
    dp({"type": "LKF", "kf_blocksize": 256}, steps=3)
    text = dp({"type": "RLEKF", "preset": "lkf", "block_size": 256}, "--restart", "model.ckpt-3.pt", steps=4)
    assert "come from LKF's checkpoint" in text
    assert "updater" in checkpoint(dp, 4)["optimizer"]


def test_other_types_and_switching_off(dp):
    text = dp({"type": "LKF", "kf_blocksize": 256}, steps=1)
    assert "RLEKF" not in text
    assert "P" in checkpoint(dp, 1)["optimizer"]["state"][0]
    text = dp({"type": "RLEKF"}, steps=1, fails=True, RLEKF_DEEPMD="0")
    assert "invalid choice" in text


def test_options_are_checked_with_their_names(dp):
    assert re.search("block_size.*at least 1", dp({"type": "RLEKF", "block_size": 0}, fails=True))
    assert "blocksize" in dp({"type": "RLEKF", "blocksize": 8}, fails=True)
