"""The trainer on a few frames of NaCl: what it writes, how it stops and goes on, and what it refuses."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields

import numpy as np
import pytest
import torch
from helpers import RCUT, checkpoint_of, curve_of, input_of, run, weights_of, write_data

import rlekf_ext.updates
from rlekf_ext.cli import main
from rlekf_ext.covariance import STATE
from rlekf_ext.errors import DataError, InputError, OptionError, StoppedError
from rlekf_ext.options import Options, resolve
from rlekf_ext.potential import train as trainer
from rlekf_ext.potential.batches import Feed, load_frames
from rlekf_ext.potential.checkpoint import load_checkpoint, restored_model, save_checkpoint
from rlekf_ext.potential.data import frames
from rlekf_ext.potential.evaluate import compare
from rlekf_ext.potential.input import read_input
from rlekf_ext.potential.load import load_systems
from rlekf_ext.potential.optimizers import build_optimizer
from rlekf_ext.potential.train import build_model, interruption, length, train
from rlekf_ext.processes import torchrun_started


def same(one, other):
    """Whether two checkpoints hold the same bits, times apart."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(key == "seconds" or same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one == other


@pytest.fixture
def before_batch(monkeypatch):
    """before_batch(n, do): `do` is called when the trainer fetches its n-th batch."""

    def patch(number, do):
        count, fetch = iter(range(1, 10**6)), Feed.__next__

        def counted(self):
            if next(count) == number:
                do()
            return fetch(self)

        monkeypatch.setattr(Feed, "__next__", counted)
        return lambda: monkeypatch.setattr(Feed, "__next__", fetch)

    return patch


# What it writes


FILES = ["lcurve.out", "lcurve.out.json", "model.ckpt.best.pt", "model.ckpt.pt"]
COLUMNS = ("step", "rmse_val", "rmse_trn", "rmse_e_val", "rmse_e_trn", "rmse_f_val", "rmse_f_trn", "lr")


def test_a_run_writes_curve_summary_and_checkpoint(tmp_path, capsys):
    given = input_of(tmp_path)
    summary = run(given)
    assert capsys.readouterr() == ("", "")
    assert sorted(os.listdir(tmp_path / "out")) == FILES

    curve = curve_of(tmp_path)
    assert curve.dtype.names == COLUMNS
    assert curve["step"].tolist() == [2, 4, 6, 8, 9]  # and the last
    assert set(curve["lr"]) == {1.0}

    model = restored_model(checkpoint_of(tmp_path))
    (system,) = load_systems(tmp_path / "data", ["Na", "Cl"])
    held_out = compare(model, frames([system[3:]], RCUT, 2))
    assert curve["rmse_e_val"][-1] == pytest.approx(held_out.energy_rmse, rel=1e-2)
    assert curve["rmse_f_val"][-1] == pytest.approx(held_out.force_rmse, rel=1e-2)
    total = np.sqrt(8 * held_out.energy_rmse**2 + held_out.force_rmse**2)  # the loss in its limit
    assert curve["rmse_val"][-1] == pytest.approx(total, rel=1e-2)
    assert (curve["rmse_f_trn"] != curve["rmse_f_val"]).any()

    assert json.loads((tmp_path / "out" / "lcurve.out.json").read_text()) == summary
    assert (summary["step"], summary["updates"], summary["interrupted"]) == (9, 9 * 2, False)
    assert [row["epoch"] for row in summary["epochs"]] == [1, 2, 3]
    assert [row["updates"] for row in summary["epochs"]] == [6, 12, 18]
    assert summary["epochs"][-1]["energy_rmse"] == held_out.energy_rmse
    assert summary["epochs"][-1]["force_rmse"] == held_out.force_rmse
    assert 0 < summary["epochs"][0]["seconds"] < summary["seconds"]
    assert "memory_factor 0.998" in summary["optimizer"]
    assert {"version", "torch", "threads", "cpu", "cpu_isa"} <= set(summary)


@pytest.mark.parametrize("optimizer", [None, {"type": "RLEKF", "preset": "paper"}, {"type": "LKF"}, {"type": "Adam"}])
def test_training_lowers_the_errors(tmp_path, optimizer):
    config = read_input(input_of(tmp_path, optimizer, numb_steps=30))
    training = load_frames(config, quiet=True)[0].every
    before = compare(build_model(config, training), training)
    train(config, quiet=True)
    after = compare(restored_model(checkpoint_of(tmp_path)), training)
    assert after.force_rmse < 0.6 * before.force_rmse


def test_the_best_model_is_kept(tmp_path, monkeypatch):
    """That of the epoch with the lowest held-out errors, also if the run is in parts; none without held-out frames."""
    true, seen = trainer.end_of_epoch, {}

    def with_errors(progress, batches, model, *rest):
        row = true(progress, batches, model, *rest)
        seen[progress["step"]] = [w.clone() for w in model.state_dict().values()]
        return {**row, "energy_rmse": 1.0, "force_rmse": [4.0, 1.0, 2.0, 3.0][progress["step"] // 3 - 1]}

    monkeypatch.setattr(trainer, "end_of_epoch", with_errors)
    whole, parts, without = (tmp_path / name for name in ("whole", "parts", "without"))
    assert run(input_of(whole, numb_steps=12))["best"] == {"epoch": 2, "product": 1.0}
    run(input_of(parts, numb_steps=8))
    run(input_of(parts, numb_steps=12), restart=True)
    for folder in (whole, parts):
        best = restored_model(load_checkpoint(folder / "out" / "model.ckpt.best.pt")).state_dict().values()
        assert all(map(torch.equal, best, seen[6]))
    run(input_of(without))
    assert sorted(os.listdir(without / "out")) == FILES
    assert "best" not in run(input_of(without, numb_steps=6, validation_fraction=0.0))
    assert sorted(os.listdir(without / "out")) == [name for name in FILES if "best" not in name]  # nor an earlier one


def test_curve_of_adam_has_its_rate_and_its_weights(tmp_path):
    given = input_of(tmp_path, {"type": "Adam"}, disp_freq=1)
    given["loss"] = {"start_pref_e": 0.5, "limit_pref_e": 2, "start_pref_f": 100, "limit_pref_f": 1}
    run(given)
    curve = curve_of(tmp_path)
    share = 0.01 ** (np.arange(9) // 2 * 2 / 9)  # 1e-2 to 1e-4 in stairs of two
    np.testing.assert_allclose(curve["lr"], 1e-2 * share, rtol=6e-2)  # two digits are written
    energy, force = 2 - 1.5 * share, 1 + 99 * share
    for part in ("val", "trn"):
        squares = 8 * energy * curve[f"rmse_e_{part}"] ** 2 + force * curve[f"rmse_f_{part}"] ** 2
        np.testing.assert_allclose(curve[f"rmse_{part}"], np.sqrt(squares), rtol=2e-2)


def test_epochs_may_end_in_the_middle(tmp_path):
    given = input_of(tmp_path)
    del given["training"]["numb_steps"]
    summary = run({**given, "training": {**given["training"], "num_epochs": 1.5}})
    assert summary["step"] == 5  # of three batches per epoch
    assert [row["epoch"] for row in summary["epochs"]] == pytest.approx([1, 5 / 3])


def test_epochs_become_whole_batches():
    found = [length(epochs, batches) for epochs, batches in ((1.1, 100), (2.2, 100), (0.55, 100), (1.5, 3), (1e-9, 3))]
    assert found == [110, 220, 55, 5, 1]


def test_output_goes_to_new_folders_and_names_without_suffix(tmp_path):
    run(
        input_of(
            tmp_path, disp_file=str(tmp_path / "a" / "b" / "curve"), save_ckpt=str(tmp_path / "c" / "net"), numb_steps=1
        )
    )
    assert sorted(os.listdir(tmp_path / "a" / "b")) == ["curve", "curve.json"]
    assert sorted(os.listdir(tmp_path / "c")) == ["net.best.pt", "net.pt"]


def test_a_new_run_begins_a_new_curve(tmp_path):
    run(input_of(tmp_path, numb_steps=4))
    run(input_of(tmp_path, numb_steps=2))
    assert curve_of(tmp_path)["step"].tolist() == 2
    assert checkpoint_of(tmp_path)["progress"]["step"] == 2


# What it trains on


def test_validation_data_validates(tmp_path):
    given = input_of(tmp_path, disp_freq=1, numb_steps=2)
    del given["training"]["validation_fraction"]
    other = write_data(tmp_path / "other", first=10, count=3)
    given["training"]["validation_data"] = {"systems": other, "batch_size": 1, "numb_btch": 3}
    summary = run(given)
    held_out = compare(restored_model(checkpoint_of(tmp_path)), frames(load_systems(other, ["Na", "Cl"]), RCUT, 2))
    assert summary["epochs"][-1]["epoch"] == 0.5  # four batches: all frames of the other system train
    assert summary["epochs"][-1]["force_rmse"] == held_out.force_rmse
    assert curve_of(tmp_path)["rmse_f_val"][-1] == pytest.approx(held_out.force_rmse, rel=1e-2)


def test_a_single_frame_validates_itself(tmp_path):
    write_data(tmp_path / "data", count=1)
    run(input_of(tmp_path, numb_steps=3))
    curve = curve_of(tmp_path)
    assert curve["rmse_f_val"].tolist() == curve["rmse_f_trn"].tolist()


def test_batches_of_two_frames(tmp_path):
    given = input_of(tmp_path, numb_steps=4)
    given["training"]["training_data"]["batch_size"] = 2
    summary = run(given)
    assert [row["epoch"] for row in summary["epochs"]] == [1, 2]  # batches of two frames and of one
    assert summary["updates"] == (2 + 1 + 2 + 1) * 2
    single = tmp_path / "single"
    run(input_of(single, numb_steps=4))
    assert not torch.equal(weights_of(tmp_path), weights_of(single))


def test_the_seed_decides(tmp_path):
    weights = []
    for k, (training, descriptor) in enumerate([(1, None), (1, None), (2, None), (1, 5), (2, 5)]):
        given = input_of(tmp_path / str(k), numb_steps=4, seed=training)
        given["model"]["descriptor"]["seed"] = descriptor
        run(given)
        weights.append(weights_of(tmp_path / str(k)))
    assert torch.equal(weights[0], weights[1])
    for one, other in [(0, 2), (0, 3), (3, 4)]:  # the last two begin alike, but see the frames in another order
        assert not torch.equal(weights[one], weights[other])


def test_precision_and_statistics_reach_the_model(tmp_path):
    given = input_of(tmp_path, precision="float32")
    given["model"]["descriptor"]["set_davg_zero"] = True
    config = read_input(given)
    training, held_out = load_frames(config, quiet=True)
    assert [len(part.every) for part in (training, held_out)] == [3, 1]
    model = build_model(config, training.every)
    assert {p.dtype for p in model.parameters()} == {training.every[0].edges.dtype} == {torch.float32}
    assert not model.descriptor.davg.any()
    assert (model.descriptor.dstd != 1).all()
    assert model.architecture.descriptor.sel == (8, 8)  # of 6 neighbours at most, times 1.1, to a multiple of 4


def test_warm_start_leaves_no_mean_energy_error(tmp_path):
    config = read_input(input_of(tmp_path))
    training = load_frames(config, quiet=True)[0].every
    model = build_model(config, training)
    errors = compare(model, training).energy
    before = float((errors[:, 1] - errors[:, 0]).mean())
    build_optimizer(config, model, 9).start(training)
    errors = compare(model, training).energy
    assert abs(before) > 1e-3
    assert abs(float((errors[:, 1] - errors[:, 0]).mean())) < 1e-12


def with_labels(folder, *parts):
    """A set for each list of labels, of two frames each; virials are made up."""
    write_data(folder, count=2 * len(parts))
    whole = {file.stem: np.load(file) for file in (folder / "set.000").glob("*.npy")}
    whole["virial"] = np.random.default_rng(0).normal(size=(2 * len(parts), 9))
    shutil.rmtree(folder / "set.000")
    for i, labels in enumerate(parts):
        (folder / f"set.{i:03d}").mkdir()
        for label in ("coord", "box", *labels):
            np.save(folder / f"set.{i:03d}" / f"{label}.npy", whole[label][2 * i : 2 * i + 2])


@pytest.mark.parametrize("optimizer", [None, {"type": "RLEKF", "batch": "joint"}, {"type": "LKF"}, {"type": "Adam"}])
def test_frames_with_different_labels(tmp_path, optimizer, capsys):
    with_labels(tmp_path / "data", ["energy", "force", "virial"], ["energy"], ["force"], ["energy", "virial"])
    given = {**input_of(tmp_path, optimizer, numb_steps=8), "loss": {"start_pref_v": 1, "limit_pref_v": 1}}
    given["training"]["validation_fraction"] = 0
    given["training"]["training_data"]["batch_size"] = 2
    train(read_input(given))
    said = capsys.readouterr().out
    assert "8 frames for training, 0 held out; 4 batches per epoch" in said
    assert "Labels used: energy (6 frames), force (4 frames)" in said
    assert "virial (4 frames)." in said or "virial: LKF does not take it" in said
    names = ("energy_rmse", "force_rmse", "virial_rmse")
    assert all(np.isfinite(json.loads((tmp_path / "out/lcurve.out.json").read_text())["epochs"][-1][n]) for n in names)


def test_frames_without_a_label_that_is_used_are_left_out(tmp_path, capsys):
    with_labels(tmp_path / "data", ["energy", "force"], ["virial"])
    train(read_input(input_of(tmp_path, numb_steps=1)))
    said = capsys.readouterr().out
    assert "Frames without a label that is used, left out: 2" in said
    assert "1 frame for training, 1 held out" in said


# Stopping and going on


def other_values():
    """Of every option of RLEKF in the table: each other choice, or one value that is not the default's."""
    defaults = resolve({})
    for option in fields(Options):
        choices, default = option.metadata.get("choices"), getattr(defaults, option.name)
        tried = choices or (True, False, 3, 2, 0.5, 0.25, 1e-3)
        if isinstance(default, tuple):
            tried = [["energy", "force"]]
        allowed = [value for value in tried if value != default and is_allowed(option.name, value)]
        assert allowed, f"no other value for {option.name}"
        for value in allowed if choices and not isinstance(default, tuple) else allowed[:1]:
            yield option.name, value


def is_allowed(name, value):
    try:
        resolve({name: value})
    except OptionError:
        return False
    return True


RUNS = {
    "RLEKF": {},
    "RLEKF, float32": {"precision": "float32"},
    **{
        f"RLEKF, {name} = {value}": {"optimizer": {"type": "RLEKF", "block_size": 40, name: value}}
        for name, value in other_values()
    },
    "RLEKF, one pass": {"optimizer": {"type": "RLEKF", "relinearize": False, "preset": "paper"}},
    "LKF": {"optimizer": {"type": "LKF", "kf_blocksize": 50, "kf_start_pref_e": 2.0, "kf_limit_pref_f": 0.5}},
    "Adam": {"optimizer": {"type": "Adam"}},
    "Adam, float32": {"optimizer": {"type": "Adam"}, "precision": "float32"},
}


@pytest.mark.parametrize("name", RUNS)
def test_interrupted_and_restarted_is_the_whole_run_bit_for_bit(tmp_path, before_batch, monkeypatch, name):
    """Stopped in the middle of the second epoch, between two rows of the curve; with every option there is.

    "auto" turns to float64 after the sixth batch: what decides that was counted before the stop, too.
    """
    monkeypatch.setattr("rlekf_ext.filter.FLOAT32_CONDITION", 1.5)
    monkeypatch.setattr("rlekf_ext.updates.UPDATES_PER_GUARD", 11)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(input_of(whole, **RUNS[name]))
    given = input_of(parts, **RUNS[name])
    undo = before_batch(5, lambda: signal.raise_signal(signal.SIGINT))
    summary = run(given)
    undo()
    assert (summary["step"], summary["interrupted"]) == (5, True)
    assert checkpoint_of(parts)["progress"]["step"] == 5
    summary = run(given, restart=True)
    assert (summary["step"], summary["interrupted"]) == (9, False)
    one, other = checkpoint_of(whole), checkpoint_of(parts)
    assert same(one, other)
    if name.endswith("= auto"):
        assert one["optimizer"]["filter"]["state"][0]["tiles"].dtype == torch.float64
    assert (parts / "out" / "lcurve.out").read_text() == (whole / "out" / "lcurve.out").read_text()
    assert [row["epoch"] for row in summary["epochs"]] == [1, 2, 3]


def test_restart_after_a_crash_drops_the_rows_behind_the_checkpoint(tmp_path, before_batch):
    """As after a power cut: the checkpoint is of batch 4, the curve has a row for batch 5."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(input_of(whole, disp_freq=1, save_freq=2))
    given = input_of(parts, disp_freq=1, save_freq=2)

    def crash():
        raise RuntimeError("power cut")

    undo = before_batch(6, crash)
    with pytest.raises(RuntimeError, match="power cut"):
        run(given)
    undo()
    assert checkpoint_of(parts)["progress"]["step"] == 4
    assert curve_of(parts)["step"].tolist() == [1, 2, 3, 4, 5]
    run(given, restart=True)
    assert (parts / "out" / "lcurve.out").read_text() == (whole / "out" / "lcurve.out").read_text()
    assert same(checkpoint_of(parts), checkpoint_of(whole))


def test_restart_of_a_finished_run_changes_nothing_and_more_steps_go_on(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(input_of(whole, numb_steps=8))
    given = input_of(parts, numb_steps=6)
    run(given)
    before, rows = weights_of(parts), (parts / "out" / "lcurve.out").read_text()
    run(given, restart=True)
    assert torch.equal(weights_of(parts), before)
    assert (parts / "out" / "lcurve.out").read_text() == rows
    given["training"]["numb_steps"] = 8
    run(given, restart=True)
    assert same(checkpoint_of(parts), checkpoint_of(whole))


def test_restart_without_the_old_curve(tmp_path):
    given = input_of(tmp_path, numb_steps=4)
    run(given)
    (tmp_path / "out" / "lcurve.out").unlink()
    given["training"]["numb_steps"] = 6
    run(given, restart=True)
    assert curve_of(tmp_path)["step"].tolist() == 6


def test_restart_with_a_torn_curve(tmp_path):
    """A kill may cut the last row."""
    given = input_of(tmp_path, numb_steps=4)
    run(given)
    with (tmp_path / "out" / "lcurve.out").open("a") as file:
        file.write("      4    6.60e+00")
    given["training"]["numb_steps"] = 6
    run(given, restart=True)
    assert curve_of(tmp_path)["step"].tolist() == [2, 4, 6]


@pytest.mark.parametrize(("first", "second"), [(8, 1), (1, 8), (8, 2)])
def test_restart_with_another_mean_of_the_weights(tmp_path, first, second):
    """The mean is evaluated and saved; training goes on from the filter's own weights."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    filter_of = {"type": "RLEKF", "block_size": 40}
    run(input_of(whole, {**filter_of, "average_frames": 1}, numb_steps=7))
    run(input_of(parts, {**filter_of, "average_frames": first}, numb_steps=4))
    run(input_of(parts, {**filter_of, "average_frames": second}, numb_steps=7), restart=True)
    one, other = checkpoint_of(whole), checkpoint_of(parts)
    assert same(other["optimizer"].get("weights", other["weights"]), one["weights"])
    assert same(other["optimizer"]["filter"], one["optimizer"]["filter"])
    assert same(other["weights"], one["weights"]) == (second == 1)


def test_restart_with_fewer_frames(tmp_path, before_batch):
    """The checkpoint stands at the third batch of an epoch, the new data have one."""
    given = input_of(tmp_path, save_freq=2, numb_steps=2)
    run(given)
    given["training"]["training_data"]["systems"] = write_data(tmp_path / "fewer", count=2)
    given["training"]["numb_steps"] = 5
    assert run(given, restart=True)["step"] == 5


def test_restart_with_other_batches_counts_epochs_in_them_and_says_so(tmp_path, capsys):
    given = input_of(tmp_path, numb_steps=3)
    run(given)
    given["training"]["training_data"]["batch_size"] = 2
    given["training"]["numb_steps"] = 5
    train(read_input(given), restart=True)
    assert re.search(r"An epoch had \d+ batches so far and now has \d+: epochs are", capsys.readouterr().out)


def test_restart_of_adam_takes_its_options_from_the_input(tmp_path):
    run(input_of(tmp_path, {"type": "Adam"}, numb_steps=1))
    run(input_of(tmp_path, {"type": "Adam", "beta1": 0.5, "weight_decay": 0.25}, numb_steps=2), restart=True)
    (group,) = checkpoint_of(tmp_path)["optimizer"]["param_groups"]
    assert (group["betas"][0], group["weight_decay"]) == (0.5, 0.25)


def test_probabilities_of_held_out_frames_play_no_part_and_that_is_said(tmp_path, capsys):
    given = input_of(tmp_path, numb_steps=1)
    systems = given["training"]["training_data"]["systems"]
    given["training"]["validation_data"] = {"systems": systems, "auto_prob": "prob_uniform"}
    del given["training"]["validation_fraction"]
    train(read_input(given))
    assert "validation_data: sys_probs and auto_prob play no part" in capsys.readouterr().out


def wait_for_rows(process, file, rows):
    deadline = time.monotonic() + 120
    while not file.exists() or len(file.read_text().splitlines()) < rows + 1:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_ctrl_c_leaves_a_checkpoint_from_which_restart_goes_on(tmp_path):
    """The command itself; it would run for hours, so that the signal surely comes in the middle."""
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    given = input_of(parts, disp_freq=1, numb_steps=10**6)
    file = tmp_path / "input.json"
    file.write_text(json.dumps(given))
    process = subprocess.Popen(
        [sys.executable, "-m", "rlekf_ext", "train", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    try:
        wait_for_rows(process, parts / "out" / "lcurve.out", 3)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors
    step = checkpoint_of(parts)["progress"]["step"]
    assert step >= 3
    assert f"Interrupted after batch {step}; --restart continues from {parts}/out/model.ckpt.pt" in output
    assert curve_of(parts)["step"].tolist() == [*range(1, step + 1)]
    assert json.loads((parts / "out" / "lcurve.out.json").read_text())["interrupted"] is True

    given["training"]["numb_steps"] = step + 3
    file.write_text(json.dumps(given))
    assert main(["train", str(file), "--restart"]) == 0
    run(input_of(whole, disp_freq=1, numb_steps=step + 3))
    assert torch.equal(weights_of(parts), weights_of(whole))
    one, other = (checkpoint_of(folder)["optimizer"] for folder in (parts, whole))
    assert same(one, other)
    assert curve_of(parts)["step"].tolist() == [*range(1, step + 4)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_a_later_ctrl_c_interrupts(number, monkeypatch):
    """But not the same signal a second time: torchrun passes it on to processes that have already had it."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with interruption() as interrupted:
        assert not interrupted()
        signal.raise_signal(number)
        assert interrupted()
        signal.raise_signal(number)
        monkeypatch.setattr(trainer, "REPEATED", -1.0)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert interrupted()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_ctrl_c_while_the_last_checkpoint_is_written(tmp_path, monkeypatch):
    def interrupted(*args, **rest):
        signal.raise_signal(signal.SIGINT)
        save_checkpoint(*args, **rest)

    monkeypatch.setattr(trainer, "save_checkpoint", interrupted)
    assert run(input_of(tmp_path))["interrupted"]
    assert checkpoint_of(tmp_path)["progress"]["step"] == 9
    assert sorted(os.listdir(tmp_path / "out")) == FILES


def test_a_run_that_torchrun_restarts_does_not_take_an_earlier_one_for_its_own(tmp_path, monkeypatch):
    """Even with the same --rdzv-id: it continues only from a checkpoint that is newer than torchrun itself."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "train")
    given = input_of(tmp_path)
    run(given)
    first = weights_of(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    given["training"]["seed"] = 2
    run(given)
    assert torch.equal(weights_of(tmp_path), first)  # nothing was left to do
    file = tmp_path / "out" / "model.ckpt.pt"
    os.utime(file, (torchrun_started() - 60,) * 2)
    run(given)
    assert not torch.equal(weights_of(tmp_path), first)


def test_signals_are_left_alone_outside_the_main_thread():
    seen = []

    def work():
        with interruption() as interrupted:
            seen.append(interrupted())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


# What it refuses


CHANGES = {
    "neuron": ("descriptor", [5, 5], r"neuron = \[4, 4\] but the input file asks for \[5, 5\]"),
    "rcut": ("descriptor", 3.4, "rcut = 3.5 but the input file asks for 3.4"),
    "sel": ("descriptor", [40, 40], r"sel = \[8, 8\] but the input file asks for \[40, 40\]"),
    "resnet_dt": ("descriptor", True, "resnet_dt = false but the input file asks for true"),
    "type_one_side": ("descriptor", True, "type_one_side = false"),
    "precision": (None, "float32", 'precision = "float64" but the input file asks for "float32"'),
    "type_map": (None, ["Cl", "Na"], r'type_map = \["Na", "Cl"\]'),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of two batches, not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    run(input_of(folder, numb_steps=2))
    return folder


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", CHANGES)
def test_restart_with_another_network(finished, name):
    section, value, message = CHANGES[name]
    given, before = input_of(finished), contents(finished)
    if name == "precision":
        given = input_of(finished, precision=value)
    elif section is None:
        given["model"][name] = value
    else:
        given["model"][section][name] = value
    with pytest.raises(InputError, match=f"The checkpoint has model/.*{message}.*; start without --restart"):
        run(given, restart=True)
    assert contents(finished) == before


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"type": "Adam"}, r"model\.ckpt\.pt is of RLEKF or LKF but .* the optimizer Adam; start without --restart"),
        ({"type": "RLEKF", "block_size": 50}, "P of the checkpoint was made with another block_size, .*--init-model"),
        (
            {"type": "RLEKF", "block_size": 40, "covariance_dtype": "float32"},
            "covariance_dtype than the input file asks",
        ),
        ({"type": "LKF", "kf_blocksize": 50}, "P of the checkpoint was made with another kf_blocksize than"),
    ],
)
def test_restart_with_another_optimizer(finished, optimizer, message):
    before = contents(finished)
    with pytest.raises(InputError, match=message):
        run(input_of(finished, optimizer), restart=True)
    assert contents(finished) == before


def test_restart_of_adam_with_rlekf_and_of_a_model_alone(tmp_path):
    run(input_of(tmp_path, {"type": "Adam"}, numb_steps=1))
    with pytest.raises(InputError, match="is of Adam but the input file asks for the optimizer RLEKF"):
        run(input_of(tmp_path), restart=True)
    save_checkpoint(tmp_path / "out" / "model.ckpt.pt", restored_model(checkpoint_of(tmp_path)))
    with pytest.raises(InputError, match="is of a model without training state"):
        run(input_of(tmp_path), restart=True)


def test_restart_without_a_checkpoint(tmp_path):
    with pytest.raises(InputError, match=r"The checkpoint .*model\.ckpt\.pt does not exist"):
        run(input_of(tmp_path), restart=True)
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_when_the_data_are_wrong(tmp_path):
    given = input_of(tmp_path)
    file = tmp_path / "data" / "set.000" / "force.npy"
    forces = np.load(file)
    forces[2, 4] = np.nan
    np.save(file, forces)
    with pytest.raises(DataError, match=r"force\.npy: frame 2, atom 1 has the value nan"):
        run(given)
    given["training"]["training_data"]["systems"] = str(tmp_path / "none")
    with pytest.raises(DataError, match="none does not exist"):
        run(given)
    assert not (tmp_path / "out").exists()


def test_a_sel_that_is_too_small_is_named(tmp_path):
    given = input_of(tmp_path)
    given["model"]["descriptor"]["sel"] = [5, 12]
    with pytest.raises(
        ValueError, match=r"data, frame 0, atom 4 has 6 neighbours of element Na within 3\.5 Å, more than sel = 5"
    ):
        run(given)
    assert not (tmp_path / "out").exists()


def test_sel_auto_has_room_for_held_out_frames(tmp_path):
    write_data(tmp_path / "data", stretch=1.3)
    given = input_of(tmp_path)
    del given["training"]["validation_fraction"]
    given["training"]["validation_data"] = {"systems": write_data(tmp_path / "dense")}
    run(given)
    assert checkpoint_of(tmp_path)["model"]["descriptor"]["sel"] == [8, 8]
    given["model"]["descriptor"]["sel"] = [4, 4]
    with pytest.raises(
        ValueError, match=r"dense, frame 0, atom \d has 6 neighbours of element Na .* more than sel = 4"
    ):
        run(given)


def test_a_curve_that_cannot_be_written_any_more_leaves_a_checkpoint(tmp_path, before_batch):
    undisturbed = run(input_of(tmp_path / "other"))
    given = input_of(tmp_path, disp_file=str(tmp_path / "curves" / "lcurve.out"))
    undo = before_batch(4, lambda: shutil.rmtree(tmp_path / "curves"))
    with pytest.raises(InputError, match=r"curves/lcurve\.out cannot be written: No such file or directory"):
        run(given)
    undo()
    assert checkpoint_of(tmp_path)["progress"]["step"] == 4
    assert run(given, restart=True)["epochs"][-1]["force_rmse"] == undisturbed["epochs"][-1]["force_rmse"]


def test_a_restart_keeps_the_curve_when_virials_come_or_go(tmp_path):
    run(input_of(tmp_path, numb_steps=2, disp_freq=1))
    old = curve_of(tmp_path)
    with_virials = {**input_of(tmp_path, numb_steps=3, disp_freq=1), "loss": {"start_pref_v": 1, "limit_pref_v": 1}}
    run(with_virials, restart=True)
    curve = curve_of(tmp_path)
    assert curve["step"].tolist() == [1, 2, 3]
    assert np.isnan(curve["rmse_v_val"]).all()  # no frame has one
    np.testing.assert_array_equal(curve["rmse_f_val"][:2], old["rmse_f_val"])
    run(input_of(tmp_path, numb_steps=4, disp_freq=1), restart=True)
    curve = curve_of(tmp_path)
    assert curve.dtype.names == COLUMNS
    assert curve["step"].tolist() == [1, 2, 3, 4]
    np.testing.assert_array_equal(curve["rmse_e_trn"][:2], old["rmse_e_trn"])


@pytest.mark.parametrize("key", ["disp_file", "save_ckpt"])
def test_output_that_cannot_be_written_is_found_before_training(tmp_path, monkeypatch, key):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr(trainer, "end_of_epoch", None)  # reaching it would be a TypeError
    with pytest.raises(InputError, match=r"file/(model\.pt|model) cannot be written"):
        run(input_of(tmp_path, **{key: str(tmp_path / "file" / "model")}))
    assert (tmp_path / "file").read_text() == "not a folder"
    assert not list((tmp_path / "out").glob("*"))


def test_without_held_out_frames_the_errors_are_those_of_training(tmp_path, capsys):
    given = input_of(tmp_path, numb_steps=1)
    given["training"]["validation_fraction"] = 0
    train(read_input(given))
    assert "No frame is held out: the errors shown are those of the training frames." in capsys.readouterr().out


def test_virial_updates_alone_need_virials(tmp_path):
    with pytest.raises(DataError, match=r"No training frame has a label that is used: .*; virial: no frame has it"):
        run(input_of(tmp_path, {"type": "RLEKF", "block_size": 40, "order": ["virial"]}, numb_steps=1))


def spoil(monkeypatch, from_update):
    """Energies that are not finite from the update of this number on; for trainings without a table."""
    original, calls = rlekf_ext.updates.energy_error, []

    def spoilt(prediction, frame, _):
        calls.append(1)
        return original(prediction, frame) * (np.nan if len(calls) > from_update else 1.0)

    monkeypatch.setitem(rlekf_ext.updates.ERRORS, "energy", spoilt)


def test_skipped_measurements_are_told(tmp_path, capsys, monkeypatch):
    spoil(monkeypatch, 0)
    options = {"type": "RLEKF", "block_size": 40, "preset": "paper"}
    train(read_input(input_of(tmp_path, options, numb_steps=2, table=False)))
    assert "skipped so far: error not finite: 2" in capsys.readouterr().out


@pytest.mark.parametrize("max_skipped", [1, 3])
def test_training_stops_when_everything_is_skipped_and_can_go_on(tmp_path, monkeypatch, max_skipped):
    options = {"type": "RLEKF", "block_size": 40, "order": ["energy"], "max_skipped": max_skipped}
    given = input_of(tmp_path, options, numb_steps=20, table=False)
    with monkeypatch.context() as patched:
        spoil(patched, 4)
        with pytest.raises(StoppedError, match=f"last {max_skipped} .* all skipped.* error not finite: {max_skipped}"):
            train(read_input(given), quiet=True)
    saved = load_checkpoint(tmp_path / "out" / "model.ckpt.pt")
    step = saved["progress"]["step"]
    assert step == 4 + max_skipped  # as many as have been used up, so that epochs still end where batches are shuffled
    assert saved["batches"]["place"] % 3 == step % 3
    assert saved["optimizer"]["filter"]["state"][0]["state"][STATE["num_updates"]] == 4
    summary = train(read_input(given), restart=True, quiet=True)
    assert summary["step"] == 20
    assert [row["epoch"] for row in summary["epochs"]] == [*range(1, 7), 20 / 3]


def test_a_few_skipped_measurements_do_not_stop_training(tmp_path, monkeypatch):
    """Every second update is bad: never two in a row."""
    original, calls = rlekf_ext.updates.energy_error, []

    def every_second(prediction, frame, _):
        calls.append(1)
        return original(prediction, frame) * (np.nan if len(calls) % 2 else 1.0)

    monkeypatch.setitem(rlekf_ext.updates.ERRORS, "energy", every_second)
    options = {"type": "RLEKF", "block_size": 40, "order": ["energy"], "max_skipped": 2}
    assert train(read_input(input_of(tmp_path, options, numb_steps=10, table=False)), quiet=True)["step"] == 10


def test_float32_storage_is_guarded_while_training(tmp_path, monkeypatch, capsys):
    """With a limit that any P is beyond: a warning, or with "auto" float64 from then on, also after a restart."""
    monkeypatch.setattr("rlekf_ext.filter.FLOAT32_CONDITION", 1.0)
    monkeypatch.setattr("rlekf_ext.updates.UPDATES_PER_GUARD", 10)
    for dtype, said in (("float32", "about to lose positive definiteness"), ("auto", "stored in float64 from now on")):
        options = {"type": "RLEKF", "block_size": 40, "covariance_dtype": dtype}
        given = input_of(tmp_path, options, numb_steps=6, save_ckpt=str(tmp_path / dtype))
        train(read_input(given))
        assert said in capsys.readouterr().out
    saved = load_checkpoint(tmp_path / "auto.pt")["optimizer"]["filter"]["state"][0]
    assert saved["tiles"].dtype == torch.float64
    given["training"]["numb_steps"] = 8
    assert "torch.float64" in train(read_input(given), restart=True, quiet=True)["optimizer"]
