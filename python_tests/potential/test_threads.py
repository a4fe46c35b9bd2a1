"""How many threads `rlekf train` uses, and how they wait."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import TINY, make_model, write_data, write_input

from rlekf_ext import cli
from rlekf_ext.potential import threads
from rlekf_ext.potential.input import read_input
from rlekf_ext.potential.optimizers import build_optimizer


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_data(tmp_path / "data", count=3)
    write_input(tmp_path, TINY, {"training/numb_steps": 2})
    monkeypatch.chdir(tmp_path)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def used():
    """Threads for the network, and for P if there is one."""
    summary = json.loads(Path("lcurve.out.json").read_text())
    return tuple(summary[name] for name in ("threads", "threads_of_p") if name in summary)


@pytest.fixture
def torch_has():
    """Sets torch's number of threads until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("optimizer", "batches", "most", "said"),
    [
        ({"type": "RLEKF", "batch": "mean"}, 1, 8, "4 for the network, 3 for P; this process may use 8."),
        ({"type": "RLEKF", "batch": "mean"}, 2, 8, "2 for the network, 3 for P; this process may use 8."),
        ({"type": "RLEKF", "batch": "mean"}, 1, 2, "2 for the network, 2 for P; this process may use 2."),
        ({"type": "RLEKF"}, 1, 8, "1 for the network, 3 for P; this process may use 8."),
        ({"type": "LKF"}, 4, 8, "1 for the network, 3 for P; this process may use 8."),
        ({"type": "Adam"}, 1, 8, "4 for the network; this process may use 8."),
    ],
)
def test_threads_follow_the_work(monkeypatch, torch_has, optimizer, batches, most, said):
    model = make_model()
    config = read_input({**TINY, "optimizer": optimizer})
    optimize = build_optimizer(config, model, 10)
    monkeypatch.setattr(threads, "NETWORK_PER_THREAD", 8 * sum(p.numel() for p in model.parameters()) / 2)  # a frame
    own = optimize.optimizer.filter if optimizer["type"] != "Adam" else None
    if own:
        monkeypatch.setattr(threads, "BYTES_PER_THREAD", own.covariance.num_bytes / 3)
    found = threads.use_threads(optimize, model, [8] * 4, batches, most)
    assert found == f"Threads: {said} OMP_NUM_THREADS or --threads changes that."
    assert torch.get_num_threads() == int(said[0])
    assert own is None or own.threads == min(3, most)


def test_threads_are_the_fewest_of_all_processes():
    others = SimpleNamespace(gather=lambda own: [[5], own, [3]])
    assert [threads.worth(wanted, 8, others) for wanted in (2.9, 4, 0.1)] == [2, 3, 1]


def test_a_small_training_takes_one_thread_and_says_so(folder, capsys, torch_has):
    torch_has(2)
    assert cli.main(["train", "input.json"]) == 0
    assert "Threads: 1 for the network, 1 for P; this process may use " in capsys.readouterr().out
    assert used() == (1, 1)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("cores", "of_torch", "most"), [(3, 2, 2), (1, 2, 1), (2, 3, 2)])
def test_a_large_one_takes_what_the_machine_allows(folder, monkeypatch, torch_has, cores, of_torch, most):
    torch_has(of_torch)
    monkeypatch.setattr(cli, "usable_cores", lambda: cores)
    monkeypatch.setattr(threads, "BYTES_PER_THREAD", 1)
    assert cli.main(["train", "input.json"]) == 0
    assert used() == (1, most)


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_the_number_of_the_environment_stays(folder, name, monkeypatch, capsys, torch_has):
    torch_has(2)  # as it does itself when it is loaded
    monkeypatch.setenv(name, "2")
    assert cli.main(["train", "input.json"]) == 0
    assert used() == (2, 2)
    assert "Threads" not in capsys.readouterr().out


def test_the_option_is_above_all(folder, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert cli.main(["train", "input.json", "--threads", "2"]) == 0
    assert used() == (2, 2)


@pytest.mark.parametrize("number", [0, -3])
def test_no_threads_are_refused(folder, number, capsys):
    assert cli.main(["train", "input.json", "--threads", str(number)]) == 2
    said = capsys.readouterr().err
    assert said == f"rlekf: --threads must be >= 1 but is: {number}; without it, rlekf chooses.\n"
    assert not Path("lcurve.out").exists()


# The wait policy: OpenMP's own account of it.

COMMANDS = {
    "module": [sys.executable, "-m", "rlekf_ext"],
    "script": [sys.executable, "-c", "import sys; from rlekf_ext.__main__ import main; sys.exit(main())"],
}


def environment_of_openmp(command, **environment):
    """What OpenMP says that it has found; "" where torch is built without GNU's."""
    asked = {**os.environ, "OMP_DISPLAY_ENV": "verbose", **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=asked)
    assert done.returncode == 0, done.stderr
    found = dict(re.findall(r"^ *(?:\[\w+\] )?(\w+) *= *'(.*)'$", done.stderr, re.MULTILINE))
    if "GOMP_SPINCOUNT" not in found:
        pytest.skip("needs a torch with GNU's OpenMP")
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_threads_of_the_command_sleep_while_they_wait(folder, command):
    found = environment_of_openmp([*COMMANDS[command], "train", "input.json"])
    assert (found["OMP_WAIT_POLICY"], found["GOMP_SPINCOUNT"]) == ("PASSIVE", "0")


@pytest.mark.parametrize(("name", "value"), [("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "12345")])
def test_what_the_user_has_set_stays(folder, name, value):
    assert environment_of_openmp([*COMMANDS["module"], "info"], **{name: value})[name] == value


def test_other_programs_keep_their_policy(folder):
    found = environment_of_openmp([sys.executable, "-c", "import rlekf_ext.cli"])
    assert found["GOMP_SPINCOUNT"] != "0"


def test_the_console_script_is_the_same(folder):
    project = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    assert 'rlekf = "rlekf_ext.__main__:main"' in project


def test_torch_is_not_loaded_before_it_is_needed():
    code = "import sys, rlekf_ext.__main__; assert 'torch' not in sys.modules; from rlekf_ext import RLEKF"
    subprocess.run([sys.executable, "-c", code], check=True)
