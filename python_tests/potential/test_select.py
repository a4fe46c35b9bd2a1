"""The frames that `rlekf select` chooses, against a dense P; what it reads and writes; error bars in ASE."""

import csv

import numpy as np
import pytest
import torch
from helpers import RCUT, checkpoint_of, input_of, load_example, run, write_data

from rlekf_ext.cli import main
from rlekf_ext.errors import DataError, InputError, NotEnoughMemoryError, OptionError
from rlekf_ext.potential import Calculator
from rlekf_ext.potential.checkpoint import load_checkpoint, restored_model, save_checkpoint
from rlekf_ext.potential.data import frame_of, frames
from rlekf_ext.potential.load import load_systems
from rlekf_ext.potential.select import EPOCHS, _candidates, select
from rlekf_ext.potential.uncertainty import DRAWS, deviations, filter_of, jacobian_of


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    given = input_of(folder)
    given["model"]["descriptor"]["sel"] = "auto:2"
    run(given)
    return folder


@pytest.fixture
def pool(tmp_path):
    """Ten frames without labels."""
    folder = tmp_path / "pool"
    write_data(folder, first=20, count=10)
    for name in ("energy", "force", "virial"):
        (folder / "set.000" / f"{name}.npy").unlink(missing_ok=True)
    return folder


def test_the_table_gives_the_jacobians_of_autograd(trained):
    checkpoint = checkpoint_of(trained)
    model = restored_model(checkpoint)
    optimizer = filter_of(checkpoint, model)
    (frame,) = frames(load_systems(trained / "data", model.type_map), RCUT, 2)[:1]
    found = jacobian_of(optimizer, model, frame)
    model.table = None
    exact = jacobian_of(optimizer, model, frame)
    assert found.shape == (1 + DRAWS, sum(p.numel() for p in model.parameters()))
    assert torch.allclose(found, exact, rtol=0, atol=1e-5 * float(exact.abs().max()))


def dense_choices(checkpoint, model, systems, count, num_atoms=8):
    """Tries every frame: P conditioned on all its rows at once, and the scaled variances of all frames that it leaves.
    The choices, the deviations of all frames before, and those of the chosen ones when they were chosen."""
    optimizer = filter_of(checkpoint, model)
    p = torch.block_diag(*optimizer.filter.covariance.dense())
    updater = checkpoint["optimizer"]["updater"]
    of_energy, of_force = (float(updater["scales"][kind]) for kind in ("energy", "force"))
    of_force /= num_atoms if updater["force_per_atom"] else 1
    noise = optimizer.filter.covariance.scalars().measurement_noise
    rows = [jacobian_of(optimizer, model, frame) for frame in frames(systems, RCUT, 2)]
    of_forces = of_force * (16 * EPOCHS / (3 * num_atoms * DRAWS)) ** 0.5
    as_measured = torch.tensor([of_energy * (4 * EPOCHS) ** 0.5] + [of_forces] * DRAWS, dtype=torch.float64)[:, None]

    def deviations_of(h, p):
        variance = ((h @ p) * h).sum(1)
        return float(variance[0]) ** 0.5, float(variance[1:].mean()) ** 0.5

    def left(p):
        return sum((of_energy * e) ** 2 + (of_force * f) ** 2 for e, f in (deviations_of(h, p) for h in rows))

    def after(h):
        a = as_measured * h
        return p - p @ a.T @ torch.linalg.solve(a @ p @ a.T + noise * torch.eye(len(a), dtype=torch.float64), a @ p)

    before, chosen, then = [deviations_of(h, p) for h in rows], [], []
    for _ in range(count):
        tried = {i: after(h) for i, h in enumerate(rows) if i not in chosen}
        best = min(tried, key=lambda i: left(tried[i]))
        then.append(deviations_of(rows[best], p))
        chosen.append(best)
        p = tried[best]
    return chosen, before, then


def test_the_choice_is_that_of_a_dense_filter(trained, pool):
    checkpoint = checkpoint_of(trained)
    model = restored_model(checkpoint)
    systems = load_systems(pool, model.type_map, labelled=False)
    found = select(checkpoint, model, systems, 5)
    means, scales = (checkpoint["optimizer"]["updater"][name] for name in ("means", "scales"))
    wanted = [3 / float(means["energy"]), 1 / float(means["force"])]
    assert [float(scales[kind]) for kind in ("energy", "force")] == pytest.approx(wanted)
    chosen, before, then = dense_choices(checkpoint, model, systems, 5)
    np.testing.assert_allclose(found.deviations, before, rtol=1e-9)
    np.testing.assert_allclose(found.when_chosen, then, rtol=1e-7)
    assert found.chosen == chosen


def test_of_a_large_pool_some_frames_stand_for_others(trained, pool, monkeypatch):
    """Those of largest variance are candidates, and of the others some at random, which count for all of these."""
    monkeypatch.setattr("rlekf_ext.potential.select.CANDIDATES", 6)
    checkpoint = checkpoint_of(trained)
    model = restored_model(checkpoint)
    found = select(checkpoint, model, load_systems(pool, model.type_map, labelled=False), 2)
    assert len(found.deviations) == 10
    assert len(set(found.chosen)) == 2
    variances = np.arange(10.0)[::-1].copy()
    usable = np.array([0, 1, 2, 4, 5, 6, 7, 9])
    candidates, stand_for = _candidates(variances, usable, 4)
    assert candidates[:2].tolist() == [0, 1]
    assert set(candidates[2:]) < {2, 4, 5, 6, 7, 9}
    assert stand_for.tolist() == [1, 1, 3, 3]
    assert _candidates(variances, usable, 8)[0].tolist() == usable.tolist()


def test_without_memory_for_so_many_choices(trained, pool, monkeypatch):
    checkpoint = checkpoint_of(trained)
    model = restored_model(checkpoint)
    of_frame = 8 * (1 + DRAWS) * sum(w.numel() for w in model.parameters())
    monkeypatch.setattr("rlekf_ext.potential.select.available_bytes", lambda _: 4 * 3.5 * of_frame)
    with pytest.raises(NotEnoughMemoryError, match="At most 3 frames can be chosen at once"):
        select(checkpoint, model, load_systems(pool, model.type_map, labelled=False), 9)


def test_what_a_frame_has_told_its_twin_need_not_tell(trained, tmp_path):
    write_data(tmp_path / "a", first=20, count=3)
    for name in ("coord", "box", "energy", "force"):
        file = tmp_path / "a" / "set.000" / f"{name}.npy"
        np.save(file, np.concatenate([np.load(file)] * 2))
    checkpoint = checkpoint_of(trained)
    model = restored_model(checkpoint)
    found = select(checkpoint, model, load_systems(tmp_path / "a", model.type_map), 6)
    assert sorted(found.chosen) == list(range(6))
    for frame in range(3):
        _, second = (step for step, chosen in enumerate(found.chosen) if chosen % 3 == frame)
        assert (found.when_chosen[second] < 0.98 * found.deviations[frame]).all()


def test_the_checkpoint_stays_as_it_is(trained, pool):
    file = trained / "out" / "model.ckpt.pt"
    before = file.read_bytes()
    checkpoint = load_checkpoint(file)
    p = checkpoint["optimizer"]["filter"]["state"][0]["tiles"].clone()
    model = restored_model(checkpoint)
    select(checkpoint, model, load_systems(pool, model.type_map, labelled=False), 3)
    assert torch.equal(checkpoint["optimizer"]["filter"]["state"][0]["tiles"], p)
    assert file.read_bytes() == before


def test_the_command(trained, pool, tmp_path, monkeypatch, capsys):
    """Frames without and with labels, and one that the network cannot take: the rest is chosen from."""
    write_data(tmp_path / "labelled", first=40, count=4)
    write_data(tmp_path / "dense", first=0, count=1, stretch=0.5)
    monkeypatch.chdir(tmp_path)
    model = str(trained / "out" / "model.ckpt.pt")
    assert main(["select", "-m", model, "-s", "pool", "labelled", "dense", "-n", "8", "-o", "out/chosen"]) == 0
    said = capsys.readouterr().out
    assert "left out     1 frame; the first: dense, frame 0, atom" in said
    assert "chosen       8 of 15 frames" in said
    rows = list(csv.DictReader((tmp_path / "out/chosen/deviations.csv").open()))
    assert len(rows) == 15
    assert rows[14]["deviation_f"] == "nan"
    assert sorted(int(row["chosen"]) for row in rows if row["chosen"]) == list(range(1, 9))
    assert (tmp_path / "out/chosen/deviations.png").stat().st_size > 1000

    written = {system.name: system for system in load_systems("out/chosen", ["Na", "Cl"], labelled=False)}
    assert sorted(written) == ["out/chosen/000.Na4Cl4", "out/chosen/001.Na4Cl4"]
    (source,) = load_systems("labelled", ["Na", "Cl"])
    own = [int(row["frame"]) - 10 for row in rows[10:14] if row["chosen"]]
    found = written["out/chosen/001.Na4Cl4"]
    for name in ("coordinates", "boxes", "energies", "forces"):
        np.testing.assert_array_equal(getattr(found, name), getattr(source, name)[own])
    assert written["out/chosen/000.Na4Cl4"].energies is None

    assert main(["select", "-m", model, "-s", "pool", "-o", "out/chosen"]) == 2
    assert "should be a new or an empty folder" in capsys.readouterr().err
    assert main(["select", "-m", model, "-s", "dense", "-o", "other"]) == 2
    assert "No frame can be evaluated: dense, frame 0, atom" in capsys.readouterr().err
    save_checkpoint(tmp_path / "no_p.pt", restored_model(load_checkpoint(model)))
    assert main(["select", "-m", "no_p.pt", "-s", "pool", "-o", "third"]) == 2
    assert "needs the covariance P" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()
    assert main(["select", "-m", model, "-s", "pool", "-o", "x" * 300]) == 2
    assert "File name too long" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["select", "-m", model, "-s", "pool", "-o", "file/chosen"]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert main(["select", "-m", model, "-s", "pool", "-n", "0"]) == 2
    assert "--number must be >= 1" in capsys.readouterr().err


def test_without_room_for_the_frames_the_table_says_which_they_are(trained, pool, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save, calls = np.save, iter((True, False))

    def full(file, array):
        if not next(calls):
            raise OSError("4800 requested and 4080 written")
        save(file, array)

    model = str(trained / "out" / "model.ckpt.pt")
    monkeypatch.setattr(np, "save", full)
    assert main(["select", "-m", model, "-s", "pool", "-n", "3", "-o", "chosen"]) == 2
    assert "Which frames were chosen is in chosen/deviations.csv." in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "chosen").iterdir()] == ["deviations.csv"]


def test_a_p_in_float32_stays_positive(trained, pool, monkeypatch):
    """What is as if measured is in float64, whatever P was stored in."""
    monkeypatch.setattr("rlekf_ext.potential.select.EPOCHS", 1000)
    checkpoint = checkpoint_of(trained)
    model = restored_model(checkpoint)
    systems = load_systems(pool, model.type_map, labelled=False)
    wanted = select(checkpoint, model, systems, 10)
    filter_state = checkpoint["optimizer"]["filter"]["state"][0]
    filter_state["tiles"] = filter_state["tiles"].float()
    found = select(checkpoint, model, systems, 10)
    assert found.chosen == wanted.chosen
    np.testing.assert_allclose(found.when_chosen, wanted.when_chosen, rtol=1e-2)


def test_forces_of_lkf_count_as_it_scales_them(tmp_path, pool):
    """It divides their H by the number of atoms."""
    run(input_of(tmp_path / "lkf", {"type": "LKF", "kf_blocksize": 100}))
    checkpoint = checkpoint_of(tmp_path / "lkf")
    model = restored_model(checkpoint)
    systems = load_systems(pool, model.type_map, labelled=False)
    found = select(checkpoint, model, systems, 3)
    assert checkpoint["optimizer"]["updater"]["force_per_atom"]
    assert found.chosen == dense_choices(checkpoint, model, systems, 3)[0]


def test_more_than_there_are(trained, pool, tmp_path):
    checkpoint = checkpoint_of(trained)
    model = restored_model(checkpoint)
    found = select(checkpoint, model, load_systems(pool, model.type_map, labelled=False), 50)
    assert sorted(found.chosen) == list(range(10))


def dump(step, coordinates, box):
    """A frame of Na4Cl4 as LAMMPS writes it."""
    sides = "".join(f"0 {side!r}\n" for side in np.diag(box).tolist())
    rows = (f"{i + 1} {1 + i // 4} {x!r} {y!r} {z!r}\n" for i, (x, y, z) in enumerate(coordinates.tolist()))
    head = f"ITEM: TIMESTEP\n{step}\nITEM: NUMBER OF ATOMS\n8\nITEM: BOX BOUNDS pp pp pp\n{sides}"
    return f"{head}ITEM: ATOMS id type x y z\n{''.join(rows)}"


@pytest.mark.parametrize("form", ["extxyz", "traj", "xyz", "dat", "dump"])
def test_a_pool_without_labels_in_other_formats(pool, tmp_path, form):
    ase_io = pytest.importorskip("ase.io")
    from ase import Atoms

    (system,) = load_systems(pool, ["Na", "Cl"], labelled=False)
    names = np.array(["Na", "Cl"])[system.types]
    atoms = [
        Atoms(names, positions=x, cell=box, pbc=True) for x, box in zip(system.coordinates, system.boxes, strict=True)
    ]
    file = tmp_path / f"md.{form}"
    if form == "dump":
        file.write_text("".join(map(dump, range(10), system.coordinates, system.boxes)))
    else:
        ase_io.write(file, atoms, format="traj" if form == "traj" else "extxyz")
    prefix = {"traj": "ase/traj:", "dat": "extxyz:", "dump": "lammps/dump:"}.get(form, "")
    path = f"{prefix}{file}"
    with pytest.raises(DataError):
        load_systems(path, ["Na", "Cl"])
    if form == "dump":
        with pytest.raises(DataError, match=r"AssertionError \(types 1, 2, \.\.\. must be elements of the model"):
            load_systems(path, ["Na"], labelled=False)
    found = load_systems(path, ["Na", "Cl"], labelled=False)
    assert sum(map(len, found)) == 10
    apart = np.concatenate([each.coordinates for each in found])[3] - system.coordinates[3]
    sides = np.diag(system.boxes[3])
    np.testing.assert_allclose(apart - sides * np.round(apart / sides), 0, atol=1e-7)  # dumps are wrapped into the cell


def test_dumps_that_are_not_periodic_are_refused(tmp_path):
    """dpdata would take them for periodic."""
    file = tmp_path / "slab.dump"
    file.write_text(dump(0, np.ones((1, 3)), 5 * np.eye(3)).replace("pp pp pp", "pp pp fs"))
    with pytest.raises(DataError, match=r"line 5: the boundaries pp pp fs are not periodic"):
        load_systems(f"lammps/dump:{file}", ["Na", "Cl"], labelled=False)


def test_a_model_without_p(tmp_path, pool):
    run(input_of(tmp_path / "adam", {"type": "Adam"}))
    checkpoint = checkpoint_of(tmp_path / "adam")
    model = restored_model(checkpoint)
    with pytest.raises(InputError, match="needs the covariance P"):
        select(checkpoint, model, load_systems(pool, model.type_map, labelled=False), 3)


def test_error_bars_in_ase(trained, pool):
    ase = pytest.importorskip("ase")
    checkpoint = checkpoint_of(trained)
    model = restored_model(checkpoint)
    (system,) = load_systems(pool, model.type_map, labelled=False)
    found = select(checkpoint, model, [system], 1)
    calculator = Calculator(trained / "out" / "model.ckpt.pt", uncertainty=2)
    names = np.array(["Na", "Cl"])[system.types]
    for i in range(4):
        atoms = ase.Atoms(names, positions=system.coordinates[i], cell=system.boxes[i], pbc=True, calculator=calculator)
        atoms.get_forces()
        both = [calculator.results.get(f"{kind}_deviation") for kind in ("energy", "force")]
        if i % 2:
            assert both == [None, None]
        else:
            np.testing.assert_allclose(both, found.deviations[i], rtol=1e-9)
    calculator.model.table = None
    with torch.no_grad():
        calculator.calculate(atoms)
    np.testing.assert_allclose(calculator.results["force_deviation"], found.deviations[3, 1], rtol=1e-3)
    frame = frame_of(system, 3, RCUT, 2)
    assert calculator.results["energy"] == model(frame, create_graph=False).energy.item()
    with pytest.raises(InputError, match="give the checkpoint"):
        Calculator(model, uncertainty=True)
    for wrong in (-1, 2.5, float("nan"), "yes", None):
        with pytest.raises(OptionError, match="uncertainty must be"):
            Calculator(trained / "out" / "model.ckpt.pt", uncertainty=wrong)


def test_a_variance_that_is_not_finite(trained):
    checkpoint = checkpoint_of(trained)
    model = restored_model(checkpoint)
    optimizer = filter_of(checkpoint, model)
    jacobian = torch.zeros(1 + DRAWS, optimizer.filter.plan.num_weights, dtype=torch.float64)
    assert deviations(optimizer, jacobian, "x") == (0, 0)
    jacobian[3] = torch.nan
    with pytest.raises(InputError, match="The variance HᵀPH of x"):
        deviations(optimizer, jacobian, "x")


def test_the_loop_of_the_example(tmp_path, capsys):
    """Two short rounds: it labels frames that its own molecular dynamics has made, and continues with the old P."""
    pytest.importorskip("ase")
    model = load_example("active_learning").main(tmp_path, rounds=((300, 25), (600, 25)), steps=12)
    said = capsys.readouterr().out
    assert said.count("steps, ") == said.count("new frames: ") == 2
    old, new = (load_checkpoint(tmp_path / f"model{n}.pt")["optimizer"]["filter"]["state"][0] for n in (2, 3))
    assert model == str(tmp_path / "model3.pt")
    forgetting = [float(one["state"][0]) for one in (old, new)]
    assert forgetting[1] < forgetting[0] < 0.002  # λ continued
