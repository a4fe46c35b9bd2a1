"""The real dp as a command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WATER = ROOT.parent / "shared" / "data" / "H2O" / "deepmd_water_192"
SALT = ROOT / "examples" / "nacl" / "gpaw_pbe_8"


@pytest.fixture
def dp(tmp_path):
    """Run dp on an input in a separate folder; returns what it printed."""
    pytest.importorskip("deepmd", reason="runs in the environment of make test-deepmd")

    def run(
        optimizer,
        *options,
        steps=4,
        batch_size=1,
        program=("-m", "deepmd"),
        fails=False,
        system=None,
        prefactors=None,
        neuron=(5, 10),
        trainer="pt",
        model=None,
        training=None,
        **environment,
    ):
        system = Path(system or (WATER if WATER.is_dir() else SALT))
        types = (system / "type_map.raw").read_text().split()
        sel = [46, 92] if types == ["O", "H"] else [60, 60]
        network = {"resnet_dt": False, "seed": 1, "precision": "float64"}
        config = {
            "model": {
                "type_map": types,
                "descriptor": {
                    "type": "se_e2_a",
                    "sel": sel,
                    "rcut": 4.5,
                    "rcut_smth": 0.5,
                    "neuron": neuron,
                    "axis_neuron": 3,
                    **network,
                },
                "fitting_net": {"neuron": [10, 10], **network},
            },
            "learning_rate": {"type": "exp", "start_lr": 1e-3, "stop_lr": 1e-8},
            "loss": {
                "type": "ener",
                "start_pref_e": 0.02,
                "limit_pref_e": 1,
                "start_pref_f": 1000,
                "limit_pref_f": 1,
                **(prefactors or {}),
            },
            "optimizer": optimizer,
            "training": {
                "training_data": {"systems": [str(system)], "batch_size": batch_size},
                "numb_steps": steps,
                "seed": 1,
                "disp_freq": 1,
                "save_freq": 1000,
                **(training or {}),
            },
        }
        config["model"].update(model or {})
        (tmp_path / "input.json").write_text(json.dumps(config))
        threads = {
            "OMP_NUM_THREADS": "1",
            "DP_INTRA_OP_PARALLELISM_THREADS": "1",
            "DP_INTER_OP_PARALLELISM_THREADS": "1",
            "NUM_WORKERS": "0",  # threads of dp's data loader, which in Python 3.11 sometimes fail
        }
        done = subprocess.run(
            [sys.executable, *program, f"--{trainer}", "train", "input.json", "--skip-neighbor-stat", *options],
            cwd=tmp_path,
            env={**os.environ, **threads, **environment},
            capture_output=True,
            text=True,
        )
        text = done.stdout + done.stderr
        assert (done.returncode != 0) == fails, text
        return text

    run.folder, run.salt = tmp_path, SALT
    return run
