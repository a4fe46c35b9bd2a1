"""The command, called as a user calls it: what it does, and its messages for wrong input."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, hdf5_contents, write_data, write_input

from rlekf_ext import cli
from rlekf_ext.cli import main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with data and an input file."""
    write_data(tmp_path / "data", count=3)
    write_input(tmp_path, TINY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which `rlekf train` ran."""
    folder = tmp_path_factory.mktemp("trained")
    write_data(folder / "data", count=3)
    write_input(folder, TINY)
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["train", "input.json"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def in_trained(trained, tmp_path, monkeypatch):
    """A copy of `trained` as the working directory."""
    shutil.copytree(trained, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    return tmp_path / "run"


def complaint(capsys, arguments):
    """What a command with exit code 2 says: one line, without a traceback."""
    assert main(arguments) == 2
    errors = capsys.readouterr().err
    assert re.fullmatch(r"rlekf: [^\n]+[.?]\n", errors), errors
    assert not re.search(r"\b[A-Z]\w+(Error|Exception)\b|<class|None", errors), errors  # Python's words, not the user's
    return errors.removeprefix("rlekf: ").rstrip("\n")


# What it does


def test_train_writes_its_files_where_it_was_called(folder, capsys):
    assert main(["train", "input.json"]) == 0
    assert {"lcurve.out", "lcurve.out.json", "model.ckpt.pt"} < set(os.listdir(folder))
    output, errors = capsys.readouterr()
    assert errors == ""
    assert "2 frames for training, 1 held out; 2 batches per epoch, 4 in all" in output
    assert re.search(r"RLEKF\(\d+ weights in \d+ blocks? of at most 40", output)
    assert re.search(r"^epoch 2 .* E \d\.\d+e[-+]\d+ eV/atom   F \d\.\d+e[-+]\d+ eV/Å$", output, re.M)
    assert main(["train", "input.json", "--restart"]) == 0


def test_python_m_rlekf_ext_is_the_command(folder):
    done = subprocess.run(
        [sys.executable, "-m", "rlekf_ext", "train", "none.json"], capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 2
    assert done.stderr == "rlekf: The input file none.json cannot be read: No such file or directory.\n"


def test_test_prints_and_writes_what_the_summary_says(in_trained, capsys):
    held_out = in_trained / "held_out"
    shutil.copytree("data", held_out)
    for file in (held_out / "set.000").glob("*.npy"):
        np.save(file, np.load(file)[2:])
    assert main(["test", "-s", "held_out", "-d", "detail"]) == 0
    output = capsys.readouterr().out
    last = json.loads(Path("lcurve.out.json").read_text())["epochs"][-1]
    assert "frames       1\n" in output
    assert f"energy RMSE  {1e3 * last['energy_rmse']:.4g} meV/atom\n" in output
    assert f"force RMSE   {1e3 * last['force_rmse']:.4g} meV/Å\n" in output
    assert "wrote        detail.e_peratom.out, detail.f.out, detail.png\n" in output
    label, predicted = (part.ravel() for part in np.hsplit(np.loadtxt("detail.f.out"), 2))
    np.testing.assert_allclose(label, np.load("held_out/set.000/force.npy").ravel())
    assert np.sqrt(np.mean((label - predicted) ** 2)) == pytest.approx(last["force_rmse"], rel=1e-12)
    assert Path("detail.png").read_bytes().startswith(b"\x89PNG")
    assert main(["test", "-m", "model.ckpt.pt", "-s", "data", "held_out"]) == 0
    assert "frames       4\n" in capsys.readouterr().out


def test_test_compares_errors_with_predicted_deviations(in_trained, capsys):
    assert main(["test", "-s", "data", "--uncertainty", "u"]) == 0
    output = capsys.readouterr().out
    for kind in ("energy", "force"):
        pattern = rf"^{kind} +error against predicted deviation: Spearman -?\d\.\d{{3}}, RMS ratio \d\S*$"
        assert re.search(pattern, output, re.M), output
    assert output.endswith("wrote        u.uncertainty.out, u.uncertainty.png\n")
    columns = np.loadtxt("u.uncertainty.out")
    assert columns.shape == (3, 5)
    rmse = np.sqrt(np.mean(columns[:, [1, 3]] ** 2, axis=0))
    assert f"energy RMSE  {1e3 * rmse[0]:.4g} meV/atom\nforce RMSE   {1e3 * rmse[1]:.4g} meV/Å\n" in output
    assert (columns[:, [2, 4]] > 0).all()
    assert Path("u.uncertainty.png").read_bytes().startswith(b"\x89PNG")


def test_uncertainty_needs_a_filter(folder, capsys):
    write_input(folder, TINY, {"optimizer": {"type": "Adam"}})
    assert main(["train", "input.json"]) == 0
    capsys.readouterr()
    said = complaint(capsys, ["test", "-s", "data", "-u", "u"])
    assert said.startswith("The predicted uncertainty needs the covariance P of a Kalman filter")
    assert not list(folder.glob("u.*"))


def test_a_model_to_deepmd_and_back(in_trained, capsys):
    assert main(["export", "-o", "out/trained.dp"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(
        "wrote out/trained.dp; `dp convert-backend out/trained.dp model.pth` makes a file for LAMMPS"
    )
    assert main(["import", "out/trained.dp", "-o", "back/model.pt"]) == 0
    said = capsys.readouterr().out
    assert re.fullmatch(
        r"wrote back/model.pt: \d+ weights for Na, Cl; no P, so --init-model starts a fresh one\n", said
    )
    results = []
    for model in ("model.ckpt.pt", "back/model.pt"):
        assert main(["test", "-m", model, "-s", "data"]) == 0
        results.append(capsys.readouterr().out)
    assert results[0] == results[1]
    assert main(["export", "back/model.pt"]) == 0
    assert hdf5_contents("model.dp") == hdf5_contents("out/trained.dp")


def test_plot_draws_the_curve(in_trained, capsys):
    assert main(["plot"]) == 0
    assert capsys.readouterr().out == "wrote lcurve.png\n"
    assert Path("lcurve.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plot", "lcurve.out", "-o", "curve.pdf"]) == 0
    assert Path("curve.pdf").read_bytes().startswith(b"%PDF")


def test_info_lists_every_backend_with_its_reason(capsys, monkeypatch):
    reasons = {"reference": "", "cpu": "", "cuda": "no nvcc was found.", "triton": "not written yet."}
    monkeypatch.setattr(cli, "backends", lambda: reasons)
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[13:27].strip() for line in lines if line.startswith("backend")] == [
        "reference", "native (cpu)", "native (cuda)", "triton"
    ]  # fmt: skip
    assert "backend      native (cpu)  available" in lines
    assert "backend      native (cuda) absent: no nvcc was found." in lines
    assert any(line.split()[:2] == ["torch", f"{torch.__version__},"] for line in lines)
    assert any(line.startswith("CUDA") and len(line.split()) > 1 for line in lines)


def test_info_of_this_build(capsys):
    assert main(["info"]) == 0
    output = capsys.readouterr().out
    for name in ("reference", "cpu", "cuda", "triton"):
        assert re.search(rf"^backend      (native \()?{name}\)? +(available|absent: \w.*)$", output, re.M)
    assert re.search(r"^rlekf_ext    \d+\.\d+\.\d+ \(compiled by .+ against torch \d", output, re.M)
    assert re.search(r"^CPU          \w", output, re.M)
    assert re.search(r"^             architectures: \w", output, re.M)


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["train"], ["test"], ["import", "model.dp"], ["train", "input.json", "--resart"]]
)
def test_wrong_arguments_are_exit_code_2_with_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: rlekf" in capsys.readouterr().err


def test_ctrl_c_before_training_begins(folder, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("rlekf_ext.potential.train.load_frames", interrupted)
    try:
        code = main(["train", "input.json"])
    except KeyboardInterrupt:  # it would end pytest, too
        pytest.fail("Ctrl-C would end in a traceback.")
    assert code == 130
    assert capsys.readouterr().err == ""


def test_a_terminal_that_does_not_know_all_characters_is_no_reason_to_stop(folder):
    def rlekf(*arguments):
        command = [sys.executable, "-m", "rlekf_ext", *arguments]
        return subprocess.run(command, capture_output=True, cwd=folder, env={**os.environ, "PYTHONIOENCODING": "ascii"})

    trained, tested, helped = rlekf("train", "input.json"), rlekf("test", "-s", "data"), rlekf("test", "-h")
    assert [done.returncode for done in (trained, tested, helped)] == [0, 0, 0], trained.stderr + tested.stderr
    assert b"eV/?" in trained.stdout
    assert b"meV/?" in tested.stdout


def test_a_reader_that_goes_away_leaves_a_checkpoint(folder):
    write_input(folder, TINY, {"training/numb_steps": 100_000})
    command = [sys.executable, "-m", "rlekf_ext", "train", "input.json"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder)
    assert any(line.startswith(b"epoch") for line in iter(running.stdout.readline, b""))  # reads no further
    running.stdout.close()
    assert (running.wait(timeout=120), running.stderr.read()) == (1, b"")
    running.stderr.close()
    assert (folder / "model.ckpt.pt").exists()


# What it says if the input is wrong


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training/numb_setps": 5}, "training/numb_setps is not a known option; did you mean numb_steps?"),
        ({"optimizer/blocksize": 5}, "optimizer/blocksize is not a known option; did you mean block_size?"),
        ({"model/descriptor/type": "dpa2"}, 'model/descriptor/type = "dpa2" is not supported; supported: "se_e2_a"'),
        ({"model/type": "pairtab"}, 'model/type = "pairtab" is not supported; supported: "standard"'),
        ({"optimizer/type": "SGD"}, 'optimizer/type = "SGD" is not supported; supported: "RLEKF", "LKF", "Adam"'),
        (
            {"optimizer/preset": "best"},
            'optimizer/preset = "best" is not supported; supported: "paper", "robust", "lkf"',
        ),
        ({"optimizer/order": []}, "optimizer/order must be"),
        ({"model/descriptor/rcut": -1}, "model/descriptor/rcut must be > 0.* but is: -1"),
        ({"model/type_map": ["Na", "K"]}, r"data has the element Cl, which is not in type_map \['Na', 'K'\]; add it"),
        ({"training/training_data/systems": "none"}, r"none does not exist \(current directory: /"),
        ({"model/descriptor/sel": [2, 60]}, "6 neighbours of element Na within 3.5 Å, more than sel = 2"),
        ({"training/disp_file": "input.json/lcurve.out"}, "input.json/lcurve.out cannot be written: "),
        ({"training/save_ckpt": "input.json/below/model"}, "input.json/below/model.pt cannot be written: "),
        ({"training/save_ckpt": "out/"}, 'training/save_ckpt must be the name of a file but is: "out/"'),
        ({"training/save_ckpt": ""}, 'training/save_ckpt must be the name of a file but is: ""'),
        ({"training/save_ckpt": "x" * 300}, "cannot be written: File name too long"),
        ({"training/disp_file": "model.ckpt.pt"}, "training/disp_file is model.ckpt.pt, the checkpoint itself"),
    ],
)
def test_wrong_input_is_named(folder, capsys, change, message):
    write_input(folder, TINY, change)
    before = sorted(folder.rglob("*"))
    said = complaint(capsys, ["train", "input.json"])
    assert re.search(message, said), said
    assert sorted(folder.rglob("*")) == before


def test_a_file_that_is_not_json(folder, capsys):
    Path("input.json").write_text('{\n  "model": {,}\n}')
    assert complaint(capsys, ["train", "input.json"]).startswith("input.json, line 2, column 13: not JSON: ")


@pytest.mark.parametrize(
    ("label", "place", "value", "message"),
    [
        (
            "force",
            (2, 4),
            np.nan,
            r"data/set.000/force.npy: frame 2, atom 1 has the value nan; all values must be finite",
        ),
        ("energy", (1, 0), np.inf, r"data/set.000/energy.npy: frame 1 has the value inf"),
        ("coord", (1, slice(3, 6)), 0.05, r"data, frame 1: Atoms \d and \d are .* Å apart, closer than 0.1 Å"),
    ],
)
def test_wrong_data_are_named_with_their_frame(folder, capsys, label, place, value, message):
    file = folder / "data" / "set.000" / f"{label}.npy"
    array = np.load(file)
    if label == "coord":
        array[1, 0:3] = 0.0
    array[place] = value
    np.save(file, array)
    assert re.search(message, complaint(capsys, ["train", "input.json"]))
    assert not (folder / "lcurve.out").exists()


def test_an_empty_name_of_a_model_to_begin_with(folder, capsys):
    said = complaint(capsys, ["train", "input.json", "--init-model", ""])
    assert said == "--init-model must be the name of a checkpoint but is empty."
    write_input(folder, TINY, {"training/init_model": ""})
    assert "training/init_model must be the name of a file but is" in complaint(capsys, ["train", "input.json"])


def test_restart_without_a_checkpoint(folder, capsys):
    assert "The checkpoint model.ckpt.pt does not exist;" in complaint(capsys, ["train", "input.json", "--restart"])


def test_restart_with_another_network_or_optimizer(in_trained, capsys):
    write_input(in_trained, TINY, {"model/fitting_net/neuron": [7, 7]})
    said = complaint(capsys, ["train", "input.json", "--restart"])
    assert "model/fitting_net/neuron = [6, 6] but the input file asks for [7, 7]; start without --restart" in said
    write_input(in_trained, TINY, {"optimizer": {"type": "Adam"}})
    said = complaint(capsys, ["train", "input.json", "--restart"])
    assert "model.ckpt.pt is of RLEKF or LKF but the input file asks for the optimizer Adam" in said


def test_test_needs_a_checkpoint_and_data(in_trained, capsys):
    said = complaint(capsys, ["test", "-m", "none.pt", "-s", "data"])
    assert said == "The checkpoint none.pt does not exist; `rlekf train` without --restart and --init-model makes one."
    Path("text.pt").write_text("hello\n" * 100)
    said = complaint(capsys, ["test", "-m", "text.pt", "-s", "data"])
    assert said.startswith("text.pt is not a checkpoint of `rlekf train`: ")
    assert "none does not exist" in complaint(capsys, ["test", "-s", "none"])
    said = complaint(capsys, ["test", "-s", "data", "-d", "input.json/detail"])
    assert said.startswith("input.json/detail.png cannot be written: ")
    said = complaint(capsys, ["test", "-s", "data", "-d", "detail/"])
    assert said == "The prefix of files must end in a name but is: detail/."
    said = complaint(capsys, ["test", "-s", "data", "-u", "input.json/u"])
    assert said.startswith("input.json/u.uncertainty.out cannot be written: ")


def test_test_on_elements_the_model_does_not_know(in_trained, capsys):
    Path("data/type_map.raw").write_text("Na\nK\n")
    assert "data has the element K, which is not in type_map" in complaint(capsys, ["test", "-s", "data"])


def test_export_and_import_need_files_that_fit(in_trained, capsys):
    said = complaint(capsys, ["export", "none.pt"])
    assert said == "The checkpoint none.pt does not exist; `rlekf train` without --restart and --init-model makes one."
    assert "files that end in .dp, but this one is called model.pth" in complaint(capsys, ["export", "-o", "model.pth"])
    said = complaint(capsys, ["export", "-o", "input.json/model.dp"])
    assert said.startswith("input.json/model.dp cannot be written: ")
    assert (
        complaint(capsys, ["import", "none.dp", "-o", "new.pt"]) == "none.dp cannot be read: No such file or directory."
    )
    Path("text.dp").write_text("hello\n" * 100)
    said = complaint(capsys, ["import", "text.dp", "-o", "new.pt"])
    assert said.startswith("text.dp: not a whole .dp file of DeePMD-kit: ")
    assert main(["export"]) == 0
    said = complaint(capsys, ["import", "model.dp", "-o", "input.json/model.pt"])
    assert said.startswith("input.json/model.pt cannot be written: ")
    assert not Path("new.pt").exists()


def test_an_imported_model_is_no_place_to_restart_from(in_trained, capsys):
    assert main(["export"]) == 0
    assert main(["import", "model.dp", "-o", "model.ckpt.pt"]) == 0
    said = complaint(capsys, ["train", "input.json", "--restart"])
    assert "model.ckpt.pt is of a model without training state (`rlekf import` writes such) but the input" in said


def test_plot_needs_a_curve(folder, capsys):
    assert complaint(capsys, ["plot"]) == "lcurve.out cannot be read: No such file or directory."
    assert "input.json has no columns step" in complaint(capsys, ["plot", "input.json"])
    Path("lcurve.out").write_text("")
    assert complaint(capsys, ["plot"]).startswith("lcurve.out is not an lcurve.out")


def test_plot_where_nothing_can_be_written(in_trained, capsys):
    said = complaint(capsys, ["plot", "-o", "input.json/lcurve.png"])
    assert said.startswith("input.json/lcurve.png cannot be written: ")
    assert "must end in one of .png, " in complaint(capsys, ["plot", "-o", "lcurve.xyz"])


def test_an_absent_package_names_its_extra(folder, capsys, monkeypatch):
    for package, arguments, extra in (
        ("matplotlib", ["plot"], "plot"),
        ("h5py", ["import", "model.dp", "-o", "model.pt"], "potential"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            patch.delitem(sys.modules, "rlekf_ext.potential.plot", raising=False)
            said = complaint(capsys, arguments)
        assert f"`rlekf {arguments[0]}` needs {package}: run `pip install 'rlekf_ext[{extra}]'`." in said


def test_a_fault_of_our_own_shows_its_traceback(folder, monkeypatch):
    monkeypatch.setattr("rlekf_ext.potential.batches.load_systems", lambda *_: list(zip([1], [1, 2], strict=True)))
    with pytest.raises(ValueError, match="zip"):
        main(["train", "input.json"])
