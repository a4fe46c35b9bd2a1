"""`torchrun -m rlekf_ext train`: one run, one curve, one checkpoint; it stops, dies and goes on as one process does."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import checkpoint_of, curve_of, input_of, run, weights_of, write_data, write_input

from rlekf_ext.cli import main
from rlekf_ext.errors import InputError
from rlekf_ext.potential.checkpoint import load_checkpoint

OPTIMIZER = {"type": "RLEKF", "block_size": 150}


def torchrun(folder, processes, *options, restarts=0, wait=True):
    """`rlekf train` on the input file in `folder`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [f"--max-restarts={restarts}", "-m", "rlekf_ext", "train", str(folder / "input.json"), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return finished(started) if wait else started


def finished(started, code=0):
    text = started.communicate(timeout=120)[0]
    assert (started.returncode != 0) == (code != 0), text
    return text


def prepare(folder, optimizer=None, frames=9, **training):
    folder.mkdir(exist_ok=True)
    if not (folder / "data").exists():
        write_data(folder / "data", count=frames)
    batches = {"systems": str(folder / "data"), "batch_size": 3}
    given = input_of(folder, optimizer or OPTIMIZER, training_data=batches, **training)
    write_input(folder, given)
    return given


def difference(one, other):
    return float((one - other).abs().max() / other.abs().max())


def shards(folder):
    return sorted((folder / "out" / "model.ckpt.pt.shards").glob("*/*.distcp"))


@pytest.mark.parametrize("batch", ["mean", "joint"])
def test_several_processes_train_what_one_does(tmp_path, batch, capsys):
    """And write the same files; the checkpoint is good for one process, for more, and for `rlekf test -u`."""
    optimizer = {**OPTIMIZER, "batch": batch}
    alone, several = tmp_path / "alone", tmp_path / "several"
    run(prepare(alone, optimizer, numb_steps=8))
    given = prepare(several, optimizer, numb_steps=5)
    text = torchrun(several, 2)
    assert text.count("2 processes share P and the frames of each batch.") == 1
    assert text.count("frames for training") == 1
    assert len(re.findall(r"^epoch 1 ", text, re.MULTILINE)) == 1
    assert sorted(path.name for path in (several / "out").iterdir()) == [
        "lcurve.out",
        "lcurve.out.json",
        "model.ckpt.best.pt",
        "model.ckpt.pt",
        "model.ckpt.pt.shards",
    ]
    assert [path.name for path in shards(several)] == ["__0_0.distcp", "__1_0.distcp"]
    assert curve_of(several)["step"].tolist() == [2, 4, 5]
    assert json.loads((several / "out" / "lcurve.out.json").read_text())["processes"] == 2

    checkpoint = str(several / "out" / "model.ckpt.pt")
    assert (
        main(["test", "-m", checkpoint, "-s", given["training"]["training_data"]["systems"], "-u", str(several)]) == 0
    )
    assert "Spearman" in capsys.readouterr().out

    prepare(several, optimizer, numb_steps=7)
    torchrun(several, 3, "--restart")  # one more process than before
    run(prepare(several, optimizer, numb_steps=8), restart=True)  # and then one alone
    assert not (several / "out" / "model.ckpt.pt.shards").exists()
    assert difference(weights_of(several), weights_of(alone)) < 1e-9
    ours, theirs = (checkpoint_of(folder)["optimizer"]["filter"]["state"][0] for folder in (several, alone))
    for name in ("tiles", "pending"):
        assert difference(ours[name], theirs[name]) < 1e-7


def test_adam_on_several_processes(tmp_path):
    optimizer = {"type": "Adam"}
    alone, several = tmp_path / "alone", tmp_path / "several"
    run(prepare(alone, optimizer))
    prepare(several, optimizer)
    assert "Frames in the largest batch: 3; processes without any: 1. Raise batch_size." in torchrun(several, 4)
    assert difference(weights_of(several), weights_of(alone)) < 1e-9


def workers(launcher):
    """The processes that torchrun has started, in the order of their ranks."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher.pid)], capture_output=True, text=True).stdout
    return sorted(map(int, listed.split()))


def wait_for(path):
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.1)
    raise TimeoutError(path)


@pytest.mark.soak
def test_torchrun_restarts_after_a_kill(tmp_path):
    """A worker is killed after the first checkpoint: torchrun starts all again, and they end where an undisturbed run
    does, bit for bit."""
    steady, killed = tmp_path / "steady", tmp_path / "killed"
    settings = {"numb_steps": 120, "save_freq": 10, "disp_freq": 1}
    prepare(steady, **settings)
    torchrun(steady, 2)
    prepare(killed, **settings)
    started = torchrun(killed, 2, restarts=1, wait=False)
    wait_for(killed / "out" / "model.ckpt.pt")
    time.sleep(0.3)
    victim = workers(started)[1]
    os.kill(victim, signal.SIGKILL)
    text = finished(started)
    assert f"exitcode: -9 (pid: {victim})" in text or str(victim) in text
    assert "Interrupted" not in text
    assert torch.equal(weights_of(killed), weights_of(steady))
    assert curve_of(killed)["step"].tolist() == list(range(1, 121))
    assert (killed / "out" / "lcurve.out").read_text() == (steady / "out" / "lcurve.out").read_text()


def test_a_kill_without_restarts_ends_the_run_and_names_the_rank(tmp_path):
    prepare(tmp_path, numb_steps=100000, save_freq=10)
    started = torchrun(tmp_path, 2, wait=False)
    wait_for(tmp_path / "out" / "model.ckpt.pt")
    victim = workers(started)[1]
    os.kill(victim, signal.SIGKILL)
    text = finished(started, code=1)
    assert re.search(rf"rank\s+: 1 \(local_rank: 1\)\s+exitcode\s+: -9 \(pid: {victim}\)", text)
    prepare(tmp_path, numb_steps=checkpoint_of(tmp_path)["progress"]["step"] + 2)
    torchrun(tmp_path, 2, "--restart")


def test_ctrl_c_writes_the_checkpoint_and_ends(tmp_path):
    prepare(tmp_path, numb_steps=100000, save_freq=10)
    started = torchrun(tmp_path, 2, wait=False)
    wait_for(tmp_path / "out" / "model.ckpt.pt")
    started.send_signal(signal.SIGINT)
    text = finished(started, code=1)
    assert text.count("Interrupted after batch") == 1
    step = int(re.search(r"Interrupted after batch (\d+)", text)[1])
    assert checkpoint_of(tmp_path)["progress"]["step"] == step
    assert len(list((tmp_path / "out" / "model.ckpt.pt.shards").iterdir())) == 1


def test_a_missing_or_altered_shard_is_named(tmp_path):
    """And missed only where P is needed."""
    given = prepare(tmp_path)
    torchrun(tmp_path, 2)
    model, data = str(tmp_path / "out" / "model.ckpt.pt"), given["training"]["training_data"]["systems"]
    file = shards(tmp_path)[1]
    for altered in (file.with_name(".metadata"), file):
        content = altered.read_bytes()
        altered.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        with pytest.raises(InputError, match=rf"{altered.name}, a part of the checkpoint, .*its checksum is wrong"):
            load_checkpoint(model)
        altered.write_bytes(content)
    file.unlink()
    with pytest.raises(InputError, match=r"__1_0\.distcp, a part of the checkpoint, .*it is missing"):
        load_checkpoint(model)
    assert main(["test", "-m", model, "-s", data]) == 0
    assert main(["test", "-m", model, "-s", data, "-u", str(tmp_path / "errors")]) == 2
    started = torchrun(tmp_path, 2, "--restart", wait=False)
    text = finished(started, code=2)
    assert re.search(
        r"^rlekf(, rank 1)?: .*__1_0\.distcp, a part of the checkpoint, .*it is missing", text, re.MULTILINE
    )
    assert Path(model).exists()
