"""From training here to LAMMPS and to `dp test`: `rlekf train`, `rlekf export`, `dp convert-backend`, `lmp`.

LAMMPS comes with DeePMD-kit's extra `lmp`.
"""

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

from rlekf_ext.potential.deepmd_format import import_model
from rlekf_ext.potential.neighbors import make_frame

pytestmark = pytest.mark.deepmd

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
SETS = {  # folder, elements, masses, Å, fs, K
    "copper": (DATA / "Cu/pwmlff_aimd_72", ["Cu"], [63.55], 5.0, 1.0, 400),
    "water": (DATA / "H2O/deepmd_water_192", ["O", "H"], [16.0, 1.008], 4.5, 0.5, 300),
}
STEPS = 1000


def command(folder, *words, **environment):
    libraries = Path(np.__file__).parents[1] / "nvidia/cuda_runtime/lib"  # which dp's LAMMPS asks for, GPU or not
    path = os.pathsep.join([str(libraries), os.environ.get("LD_LIBRARY_PATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LD_LIBRARY_PATH": path, **environment}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def rlekf(folder, *words):
    return command(folder, sys.executable, "-m", "rlekf_ext", *words)


def deepmd(folder, *words):
    return command(folder, sys.executable, "-m", "deepmd", *words)


def trained(folder, system, elements, rcut, steps=60):
    """The model, which is model.ckpt.pt, for dp model.dp and for LAMMPS model.pth in the folder."""
    config = {
        "model": {
            "type_map": elements,
            "descriptor": {"sel": "auto", "rcut": rcut, "neuron": [6, 12], "axis_neuron": 4},
            "fitting_net": {"neuron": [16, 16]},
        },
        "optimizer": {"type": "RLEKF"},
        "training": {"training_data": {"systems": str(system)}, "numb_steps": steps, "seed": 1, "disp_freq": steps},
    }
    (folder / "input.json").write_text(json.dumps(config))
    rlekf(folder, "train", "input.json")
    rlekf(folder, "export", "model.ckpt.pt", "-o", "model.dp")
    deepmd(folder, "convert-backend", "model.dp", "model.pth")
    return import_model(folder / "model.dp")


def lammps_input(elements, masses, femtoseconds, kelvin):
    return f"""
units metal
boundary p p p
atom_style atomic
read_data start.data
{"".join(f"mass {i} {mass}{chr(10)}" for i, mass in enumerate(masses, 1))}
pair_style deepmd model.pth
pair_coeff * * {" ".join(elements)}
velocity all create {kelvin} 1
timestep {femtoseconds / 1000}
fix 1 all nve
thermo_style custom step temp pe ke etotal
thermo_modify format float %.12g
thermo 100
dump 1 all custom {STEPS} end.dump id type x y z fx fy fz
dump_modify 1 sort id format float %.16g
run {STEPS}
"""


@pytest.mark.parametrize("name", SETS)
def test_a_thousand_steps_in_lammps(tmp_path, name):
    system, elements, masses, rcut, femtoseconds, kelvin = SETS[name]
    if not system.is_dir():
        pytest.skip(f"needs {system}")
    model = trained(tmp_path, system, elements, rcut)
    points, box = (np.load(system / f"set.000/{array}.npy")[0].reshape(-1, 3) for array in ("coord", "box"))
    types = np.loadtxt(system / "type.raw", dtype=int)
    assert np.abs(box - np.diag(np.diag(box))).max() < 1e-6  # LAMMPS has other conventions for inclined cells
    lines = ["", f"{len(types)} atoms", f"{len(elements)} atom types", ""]
    lines += [f"0 {length!r} {axis}lo {axis}hi" for axis, length in zip("xyz", np.diag(box).tolist(), strict=True)]
    lines += ["", "Atoms", ""]
    lines += [
        f"{i} {t + 1} {x!r} {y!r} {z!r}" for i, (t, (x, y, z)) in enumerate(zip(types, points.tolist(), strict=True), 1)
    ]
    (tmp_path / "start.data").write_text("\n".join(lines) + "\n")
    (tmp_path / "in.lmp").write_text(lammps_input(elements, masses, femtoseconds, kelvin))
    text = command(tmp_path, str(Path(sys.executable).with_name("lmp")), "-in", "in.lmp")

    thermo = np.array([[float(word) for word in line.split()] for line in text.splitlines() if is_row(line)])
    assert thermo[-1, 0] == STEPS
    per_atom = thermo[:, [3, 4]] / len(types)
    drift, kinetic = np.ptp(per_atom[:, 1]), per_atom[1:, 0].mean()
    rows = np.array([line.split() for line in (tmp_path / "end.dump").read_text().splitlines()[-len(types) :]], float)
    frame = make_frame(rows[:, 2:5], box, types, rcut, len(elements))
    found, forces = model(frame), rows[:, 5:]
    apart = np.abs(found.forces.detach().numpy() - forces).max()
    energy = abs(float(found.energy) - thermo[-1, 2]) / len(types)
    print(f"\n{name}, {STEPS} steps: the total energy moves by {drift:.1e} eV/atom, the kinetic is {kinetic:.1e}")
    print(f"forces up to {np.abs(forces).max():.2g} eV/Å differ by {apart:.1e}, energies by {energy:.1e} eV/atom")
    assert drift < 0.02 * kinetic
    assert apart < 1e-6
    assert energy < 1e-8


def is_row(line):
    return bool(re.fullmatch(r"\s*\d+(\s+-?[\d.]+(e[-+]?\d+)?){4}\s*", line))


def errors_of(text, pattern):
    return [float(number) for number in re.findall(pattern, text)]


def test_dp_test_agrees_with_ours(tmp_path):
    salt = tmp_path / "salt"
    shutil.copytree(ROOT / "examples/nacl/gpaw_pbe_8", salt)
    trained(tmp_path, salt, ["Na", "Cl"], 4.5, 30)
    number = r"\s*:\s*([-+.\de]+)"
    ours = rlekf(tmp_path, "test", "-m", "model.ckpt.pt", "-s", "salt")
    theirs = deepmd(tmp_path, "--pt", "test", "-m", "model.pth", "-s", "salt", "-n", "10000")
    print(ours, theirs)
    theirs = [errors_of(theirs, name + number)[-1] for name in (r"Energy RMSE/Natoms", r"Force\s+RMSE")]
    assert theirs == pytest.approx(rmse_of(ours), rel=2e-3)


def rmse_of(text):
    """Energies per atom and forces, from what `rlekf test` prints."""
    return [errors_of(text, pattern)[-1] / 1000 for pattern in (r"([-+.\de]+) meV/atom", r"([-+.\de]+) meV/Å")]


def test_frozen_and_compressed_models_are_those_that_were_trained(dp):
    """Trained in dp with RLEKF, frozen, and compressed."""
    from deepmd.infer import DeepPot

    salt = dp.salt
    dp({"type": "RLEKF", "block_size": 256}, steps=30, system=salt)
    deepmd(dp.folder, "--pt", "freeze", "-o", "frozen.pth")
    deepmd(dp.folder, "--pt", "compress", "-i", "frozen.pth", "-o", "compressed.pth", "-t", "input.json")
    points, cells = np.load(salt / "set.000/coord.npy")[:5], np.load(salt / "set.000/box.npy")[:5]
    types = np.loadtxt(salt / "type.raw", dtype=int)
    found = [
        DeepPot(str(dp.folder / name)).eval(points, cells, types, atomic=False)[:2]
        for name in ("model.ckpt-30.pt", "frozen.pth", "compressed.pth")
    ]
    for i, name, allowed in ((1, "frozen", 1e-10), (2, "compressed", 1e-5)):
        apart = [float(np.abs(a - b).max()) for a, b in zip(found[0], found[i], strict=True)]
        print(f"\n{name}: energies and forces differ by {apart[0]:.1e} eV and {apart[1]:.1e} eV/Å")
        assert max(apart) < allowed
    assert torch.isfinite(torch.as_tensor(found[0][1])).all()
