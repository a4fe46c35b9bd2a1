"""A model of ours evaluated by DeePMD-kit, and the reverse. Needs deepmd-kit >= 3 with its PyTorch backend.

Not part of `make test`: run pytest on this folder, in an environment that has deepmd-kit, this package and its extra
`potential`.
"""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch

from rlekf_ext.potential.deepmd_format import export_model, import_model
from rlekf_ext.potential.neighbors import make_frame

pytest.importorskip("deepmd.pt", reason="needs deepmd-kit with its PyTorch backend")
from deepmd.dpmodel.utils.serialization import save_dp_model
from deepmd.entrypoints.convert_backend import convert_backend
from deepmd.infer import DeepPot
from deepmd.pt.model.model import get_model

pytestmark = pytest.mark.deepmd

RCUT, SEL = 4.0, (40, 40)
NACL = Path(__file__).resolve().parents[2] / "examples" / "nacl" / "gpaw_pbe_8"
COMBINATIONS = list(itertools.product([False, True], repeat=3))  # type_one_side, resnet_dt, fitting_resnet_dt


def structures():
    """(points, cell or None, types) of a small periodic cell, a larger skewed one, and a molecule."""
    rng = np.random.default_rng(0)
    for n, box in ((2, 4.3), (3, 8.1), (2, None)):
        length = box or 5.0
        cell = length * np.eye(3) + rng.uniform(-0.3, 0.3, (3, 3))
        grid = np.array(list(itertools.product(range(n), repeat=3))) / n
        points = grid @ cell + rng.uniform(-0.25, 0.25, grid.shape)
        yield points, cell if box else None, rng.integers(0, 2, len(points))


def ours(model, points, cell, types):
    with torch.no_grad():
        rcut = model.architecture.descriptor.rcut
        found = model(make_frame(points, cell, types, rcut, len(model.type_map), dtype=model.dtype))
    return found.energy.numpy(), found.forces.numpy(), found.virial.reshape(1, 9).numpy()


def theirs(model, points, cell, types):
    cells = None if cell is None else cell.reshape(1, 9)
    energy, forces, virial = model.eval(points.reshape(1, -1), cells, types, atomic=False)[:3]
    return energy[0], forces[0], virial


def check(model, deep_pot, frames, tolerance=1e-10):
    """Energies within tolerance eV/atom, forces within tolerance eV/Å, virials within tolerance eV/atom."""
    worst, strongest = np.zeros(3), 0.0
    for frame in frames:
        atoms, found = len(frame[0]), ours(model, *frame)
        strongest = max(strongest, np.abs(found[1]).max())
        pairs = zip(found, theirs(deep_pot, *frame), (atoms, 1, atoms), strict=True)
        worst = np.maximum(worst, [np.abs(mine - other).max() / scale for mine, other, scale in pairs])
    print(
        f"worst differences: {worst[0]:.1e} eV/atom, {worst[1]:.1e} eV/Å, virial {worst[2]:.1e} eV/atom; "
        f"forces up to {strongest:.2g} eV/Å"
    )
    assert worst.max() < tolerance


def make_model(type_one_side=False, resnet_dt=False, fitting_resnet_dt=False, precision="float64"):
    """A model with weights that matter: statistics of the frames, and davg that makes empty slots count."""
    settings = {"neuron": (6, 12), "axis_neuron": 4, "fitting_neuron": (10, 10, 10), "rcut_smth": 1.0, "seed": 1}
    return helpers.make_model(
        ["Na", "Cl"],
        SEL,
        RCUT,
        **settings,
        type_one_side=type_one_side,
        resnet_dt=resnet_dt,
        fitting_resnet_dt=fitting_resnet_dt,
        precision=precision,
        frames=[make_frame(*frame, RCUT, 2, dtype=getattr(torch, precision)) for frame in structures()],
        energy_bias=[-1300.25, 404.5],
    )


@pytest.mark.parametrize(("type_one_side", "resnet_dt", "fitting_resnet_dt"), COMBINATIONS)
def test_deepmd_evaluates_a_model_of_ours(tmp_path, type_one_side, resnet_dt, fitting_resnet_dt):
    model = make_model(type_one_side, resnet_dt, fitting_resnet_dt)
    export_model(model, tmp_path / "model.dp")
    convert_backend(INPUT=str(tmp_path / "model.dp"), OUTPUT=str(tmp_path / "model.pth"))
    frozen = DeepPot(str(tmp_path / "model.pth"))
    assert frozen.get_type_map() == ["Na", "Cl"]
    assert frozen.get_rcut() == RCUT
    check(model, frozen, structures())
    convert_backend(INPUT=str(tmp_path / "model.pth"), OUTPUT=str(tmp_path / "again.dp"))
    again = import_model(tmp_path / "again.dp")
    assert again.architecture == model.architecture
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_deepmd_reads_the_file_itself(tmp_path):
    """By its NumPy backend, which has no derivatives: energies only."""
    model = make_model()
    export_model(model, tmp_path / "model.dp")
    native = DeepPot(str(tmp_path / "model.dp"))
    for frame in structures():
        difference = np.abs(ours(model, *frame)[0] - theirs(native, *frame)[0]).max() / len(frame[0])
        print(f"energy: {difference:.1e} eV/atom")
        assert difference < 1e-10


def test_deepmd_evaluates_a_float32_model_of_ours(tmp_path):
    model = make_model(precision="float32")
    export_model(model, tmp_path / "model.dp")
    convert_backend(INPUT=str(tmp_path / "model.dp"), OUTPUT=str(tmp_path / "model.pth"))
    check(model, DeepPot(str(tmp_path / "model.pth")), structures(), tolerance=1e-4)


@pytest.mark.parametrize(("type_one_side", "resnet_dt", "fitting_resnet_dt"), COMBINATIONS)
def test_we_evaluate_a_model_that_deepmd_initialised(tmp_path, type_one_side, resnet_dt, fitting_resnet_dt):
    settings = {
        "type_map": ["Na", "Cl"],
        "descriptor": {
            "type": "se_e2_a",
            "sel": list(SEL),
            "rcut": RCUT,
            "rcut_smth": 1.0,
            "neuron": [6, 12],
            "axis_neuron": 4,
            "type_one_side": type_one_side,
            "resnet_dt": resnet_dt,
            "seed": 1,
        },
        "fitting_net": {"neuron": [10, 10, 10], "resnet_dt": fitting_resnet_dt, "seed": 2},
    }
    model = get_model(json.loads(json.dumps(settings)))
    content = {"model": model.serialize(), "model_def_script": settings, "@variables": {}}
    rng = np.random.default_rng(0)
    statistics = content["model"]["descriptor"]["@variables"]
    # As DeePMD-kit's own: one number for the three angular columns. Otherwise energies change with rotations, virials
    # are not symmetric, and DeePMD-kit's is the transpose of ours.
    for name, radial, angular in (("davg", rng.normal(size=2), 0.0), ("dstd", rng.uniform(0.1, 0.3, 2), 0.17)):
        statistics[name][:, :, 0] = radial[:, None]
        statistics[name][:, :, 1:] = angular
    content["model"]["@variables"]["out_bias"][0, :, 0] = [-3.25, 7.5]
    content["model"]["fitting"]["@variables"]["bias_atom_e"][:, 0] = [0.1, 0.2]
    save_dp_model(str(tmp_path / "model.dp"), content)
    convert_backend(INPUT=str(tmp_path / "model.dp"), OUTPUT=str(tmp_path / "model.pth"))
    check(import_model(tmp_path / "model.dp"), DeepPot(str(tmp_path / "model.pth")), structures())


def run(command, folder):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_a_model_that_deepmd_trained_by_the_commands(tmp_path):
    """`dp --pt train`, `freeze`, `convert-backend`, `rlekf import`, `rlekf export` and `convert-backend` again."""
    dp = [sys.executable, "-m", "deepmd"]
    rlekf = [sys.executable, "-m", "rlekf_ext"]
    shutil.copytree(NACL, tmp_path / "data")
    given = {
        "model": {
            "type_map": ["Na", "Cl"],
            "descriptor": {"type": "se_e2_a", "sel": [60, 60], "rcut": 5.0, "rcut_smth": 1.0, "neuron": [5, 10, 20]},
            "fitting_net": {"neuron": [20, 20, 20], "resnet_dt": True},
        },
        "learning_rate": {"type": "exp", "start_lr": 0.001, "stop_lr": 1e-5, "decay_steps": 10},
        "loss": {"type": "ener"},
        "training": {
            "training_data": {"systems": [str(tmp_path / "data")], "batch_size": 1},
            "numb_steps": 20,
            "seed": 1,
        },
    }
    (tmp_path / "input.json").write_text(json.dumps(given))
    run([*dp, "--pt", "train", "input.json"], tmp_path)
    run([*dp, "--pt", "freeze", "-o", "frozen.pth"], tmp_path)
    run([*dp, "convert-backend", "frozen.pth", "model.dp"], tmp_path)
    run([*rlekf, "import", "model.dp", "-o", "model.pt"], tmp_path)
    run([*rlekf, "test", "-m", "model.pt", "-s", "data"], tmp_path)
    run([*rlekf, "export", "model.pt", "-o", "back.dp"], tmp_path)
    run([*dp, "convert-backend", "back.dp", "back.pth"], tmp_path)
    coordinates, boxes = (np.load(NACL / "set.000" / f"{name}.npy").astype(float) for name in ("coord", "box"))
    types = np.loadtxt(NACL / "type.raw", dtype=int)
    frames = [(c.reshape(-1, 3), b.reshape(3, 3), types) for c, b in zip(coordinates[:5], boxes[:5], strict=True)]
    model = import_model(tmp_path / "model.dp")
    for frozen in ("frozen.pth", "back.pth"):
        check(model, DeepPot(str(tmp_path / frozen)), frames)
