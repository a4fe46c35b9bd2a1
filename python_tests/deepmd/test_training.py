"""The real `dp --pt` and `dp --pt-expt train` with type RLEKF: `make test-deepmd`, which sets up the environment."""

import re
import shutil

import helpers
import numpy as np
import pytest
import torch

from rlekf_ext.covariance import STATE
from rlekf_ext.potential.data import frames
from rlekf_ext.potential.load import load_systems

pytestmark = pytest.mark.deepmd

# Runs dp in a Python where LKF draws the atoms that RLEKF draws.
SAME_ATOMS = """
import sys, torch
from types import SimpleNamespace
from rlekf_ext.batch_parts import force_groups
generator = torch.Generator().manual_seed(int(sys.argv.pop(1)))
def choice(atoms, count):
    return torch.cat(force_groups(len(atoms), 6, count // 6, generator)).numpy()
import deepmd.pt.optimizer.KFWrapper as wrapper
wrapper.np = SimpleNamespace(random=SimpleNamespace(default_rng=lambda: SimpleNamespace(choice=choice)))
from deepmd.main import main
main()
"""

# Runs dp with a Trainer that records, for each rank, what it starts with, its batches and what it ends with. dp cannot
# run several processes without GPUs: it asks for NCCL, for a CUDA device, and for DDP on that device. Without GPUs
# these three are removed here; all else is dp's.
RECORDED = """
import os, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import deepmd.pt.train.training as training
if not torch.cuda.is_available():
    init = dist.init_process_group
    dist.init_process_group = lambda backend: init("gloo")
    torch.cuda.set_device = lambda device: None
    training.DDP = lambda module, find_unused_parameters, **_: DistributedDataParallel(
        module, find_unused_parameters=find_unused_parameters
    )
rank = os.environ.get("RANK", "alone")
class Trainer(training.Trainer):
    batches = []  # those of the prior come before run
    def run(self):
        if rank == "alone":
            self.model.load_state_dict(torch.load("start.0.pt"))
            self.kept = [torch.load(f"batches.{rank}.pt", weights_only=False) for rank in range(2)]
        torch.save(self.model.state_dict(), f"start.{rank}.pt")
        self.batches = []
        super().run()
        torch.save(self.batches, f"batches.{rank}.pt")
        filter = self.optimizer.state_dict()
        torch.save([self.model.state_dict(), filter["state"], filter["updater"]], f"end.{rank}.pt")
    def _next_training_batch(self, *args, **kwargs):
        batch = super()._next_training_batch(*args, **kwargs)
        if rank == "alone":  # the frames of both ranks side by side
            both = [kept[len(self.batches)][:2] for kept in self.kept]
            for place, parts in enumerate(zip(*both)):
                for name, value in parts[0].items():
                    if isinstance(value, torch.Tensor) and value.dim():
                        batch[place][name] = torch.cat([part[name] for part in parts])
        self.batches.append(batch)
        return batch
training.Trainer = Trainer
from deepmd.main import main
main()
"""


def checkpoint(dp, step):
    return torch.load(dp.folder / f"model.ckpt-{step}.pt", weights_only=True)


def weights(dp, step):
    return trained(checkpoint(dp, step)["model"])


def trained(model):
    """Weights by their names, those of pt_expt included."""
    return {name: value for name, value in model.items() if re.search(r"net.*\.(matrix|bias|w|b|idt)$", name)}


def difference(ours, theirs):
    assert len(ours) == len(theirs) >= 10
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)


def learned(dp, column):
    """A column of lcurve.out."""
    header, *rows = (dp.folder / "lcurve.out").read_text().splitlines()
    place = header[1:].split().index(column)
    return [float(row.split()[place]) for row in rows if not row.startswith("#")]


@pytest.mark.parametrize(("trainer", "network"), [("pt", "auto"), ("pt", "dp"), ("pt-expt", "auto")])
def test_trains_and_restarts(dp, trainer, network):
    """Water, which leaves its first plateau after about fifty batches."""
    asked = {"type": "RLEKF", "block_size": 1024, "num_groups": 4, "force_scale": 3, "network": network}
    text = dp(asked, steps=220, neuron=[8, 16], trainer=trainer)
    assert ("a network of its own on dp's weights" in text) == (network == "auto")
    errors = learned(dp, "rmse_f_trn")
    print(f"\nRMSE of forces, eV/Å: {sum(errors[:10]) / 10:.3f} at first, {sum(errors[-10:]) / 10:.3f} at last")
    assert sum(errors[-10:]) < 0.3 * sum(errors[:10])
    assert "in torch.float64" in text
    before = checkpoint(dp, 220)["optimizer"]
    # pt restarts with the step that it saved, and so repeats it; pt_expt restarts with the next one.
    last = 220 if trainer == "pt" else 221
    dp(asked, "--restart", "model.ckpt-220.pt", steps=last, neuron=[8, 16], trainer=trainer)
    after = checkpoint(dp, last)["optimizer"]
    memory, rate = 1 - float(before["state"][0]["state"][STATE["forgetting"]]), 0.9987
    for _ in range(8):
        memory = rate * memory + 1 - rate
    assert 1 - float(after["state"][0]["state"][STATE["forgetting"]]) == pytest.approx(memory, abs=1e-14)
    assert not torch.equal(before["updater"]["generator"], after["updater"]["generator"])


@pytest.mark.parametrize("trainer", ["pt", "pt-expt"])
@pytest.mark.parametrize("earlier", ["RLEKF", "LKF", "Adam"])
def test_begins_with_an_earlier_model_and_its_p(dp, tmp_path, trainer, earlier):
    """--init-model: λ continues, P is inflated and in other blocks; without an earlier P it starts fresh."""
    if (trainer, earlier) == ("pt-expt", "LKF"):
        pytest.skip("pt_expt has no LKF")
    first = {"type": earlier, **{"RLEKF": {"block_size": 256}, "LKF": {"kf_blocksize": 256}, "Adam": {}}[earlier]}
    dp(first, steps=3, system=dp.salt, trainer=trainer)
    shutil.copy(dp.folder / "model.ckpt-3.pt", dp.folder / "old.pt")
    asked = {"type": "RLEKF", "block_size": 300, "covariance": "inflate", "inflation": 2.0}
    text = dp(asked, "--init-model", "old.pt", steps=1, system=dp.salt, trainer=trainer)
    assert ("P is that of the earlier run times 2" in text) == (earlier != "Adam")
    assert ("the initial model has no P" in text) == (earlier == "Adam")
    state = checkpoint(dp, 1)["optimizer"]["state"][0]["state"]
    updates = {"RLEKF": 4 * 2, "LKF": 3 * 5, "Adam": 2}[earlier] + (2 if earlier == "LKF" else 0)
    start = {"RLEKF": 0.002, "LKF": 0.02, "Adam": 0.002}[earlier]
    assert float(state[STATE["forgetting"]]) == pytest.approx(start * 0.9987**updates, rel=1e-6)
    assert int(state[STATE["num_updates"]]) == 2


@pytest.mark.parametrize(("trainer", "batch"), [("pt", "joint"), ("pt-expt", "mean")])
def test_both_networks_make_the_same_updates(dp, tmp_path, trainer, batch):
    """As far as the table is exact: two batches of the same two frames, which pt_expt draws in any order."""
    system = tmp_path / "two"
    shutil.copytree(dp.salt, system)
    for file in (system / "set.000").glob("*.npy"):
        np.save(file, np.load(file)[:2])
    asked, ended = {"type": "RLEKF", "block_size": 256, "batch": batch}, []
    for network, steps in (("auto", 2), ("dp", 2), ("dp", 1)):
        dp({**asked, "network": network}, steps=steps, batch_size=2, system=system, trainer=trainer)
        ended.append(weights(dp, steps))
    apart, moved = (difference(other, ended[1]) for other in (ended[0], ended[2]))
    print(f"\n{trainer}: a batch moves weights by up to {moved:.1e}; they differ by {apart:.1e} with dp's own network")
    assert apart < 1e-4 < 1e-2 < moved


def test_a_model_that_the_networks_here_are_not(dp):
    radial = {"type": "se_e2_r", "sel": [46, 92], "rcut": 4.5, "rcut_smth": 0.5, "neuron": [5, 10], "seed": 1}
    text = dp({"type": "RLEKF", "block_size": 256}, steps=2, model={"descriptor": radial})
    assert "RLEKF makes its updates with dp's own network: model/" in text


def test_pt_expt_runs_its_own_types_as_without_us(dp):
    text = dp({"type": "Adam"}, steps=2, trainer="pt-expt")
    assert "RLEKF" not in text
    text = dp({"type": "RLEKF"}, steps=1, fails=True, trainer="pt-expt", RLEKF_DEEPMD="0")
    assert "invalid choice" in text


def test_two_processes_of_pt_expt(dp):
    """The same bits on both ranks, with the network here."""
    (dp.folder / "two.py").write_text(TWO)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "two.py")
    asked = {"type": "RLEKF", "block_size": 256}
    dp(asked, steps=3, batch_size=2, system=dp.salt, trainer="pt-expt", program=torchrun)
    one, other = (torch.load(dp.folder / f"end.{rank}.pt", weights_only=False) for rank in range(2))
    assert one[2] != other[2]  # their frames
    assert one[1][0].pop("names") == other[1][0].pop("names")
    torch.testing.assert_close(one[:2], other[:2], rtol=0, atol=0, equal_nan=True)
    text = dp(asked, "--restart", "model.ckpt-3.pt", steps=4, system=dp.salt, trainer="pt-expt")
    assert "Batch       4" in text


# dp asks for NCCL unless the processes have already met.
TWO = """
import os, torch, torch.distributed as dist
if not torch.cuda.is_available():
    dist.init_process_group("gloo")
import deepmd.pt_expt.train.training as training
class Trainer(training.Trainer):
    def run(self):
        super().run()
        filter = self.optimizer.state_dict()["state"]
        energies = self.optimizer.labels["energy"].flatten().tolist()
        torch.save([self.model.state_dict(), filter, energies], f"end.{os.environ['RANK']}.pt")
training.Trainer = Trainer
from deepmd.main import main
main()
"""


@pytest.mark.parametrize("trainer", ["pt", "pt-expt"])
def test_averaged_weights(dp, trainer):
    dp({"type": "RLEKF", "block_size": 256}, steps=3, trainer=trainer, training={"enable_ema": True, "ema_decay": 0.5})
    assert any("ema" in name for name in checkpoint(dp, 3)) or list(dp.folder.glob("*ema*"))


def test_virials_are_learned(dp, tmp_path):
    """From nothing else: NaCl with the energies, forces and virials of a network of ours instead of its labels."""
    from deepmd.infer import DeepPot

    system = tmp_path / "salt"
    shutil.copytree(dp.salt, system)
    salt = frames(load_systems(system, ["Na", "Cl"]), 4.5, 2)
    settings = {"neuron": (5, 10), "axis_neuron": 3, "fitting_neuron": (10, 10), "seed": 7}
    teacher = helpers.make_model(["Na", "Cl"], [60, 60], 4.5, frames=salt, **settings)
    with torch.no_grad():
        found = [teacher(frame) for frame in salt]
    np.save(system / "set.000/energy.npy", np.array([float(f.energy) for f in found]))
    np.save(system / "set.000/force.npy", np.array([f.forces.numpy().ravel() for f in found]))
    np.save(system / "set.000/virial.npy", np.array([f.virial.numpy().ravel() for f in found]))
    prefactors = {"start_pref_v": 1, "limit_pref_v": 1}
    labels = np.array([f.virial.numpy().ravel() for f in found])
    points, cells = np.load(system / "set.000/coord.npy"), np.load(system / "set.000/box.npy")
    dp({"type": "RLEKF", "order": ["virial"]}, steps=100, system=system, prefactors=prefactors)
    model = DeepPot(str(dp.folder / "model.ckpt-100.pt"))
    predicted = model.eval(points, cells, salt[0].types.numpy(), atomic=False)[2]
    error, spread = np.sqrt(np.mean((predicted - labels) ** 2)) / 8, np.sqrt(labels.var(axis=0).mean()) / 8
    print(f"\nRMSE of virials, eV/atom: {error:.1e}; they scatter by {spread:.1e}")
    assert error < 0.2 * spread


def test_restart_restores_every_bit(dp):
    asked = {"type": "RLEKF", "block_size": 256}
    dp(asked, steps=3)
    before = checkpoint(dp, 3)
    program = ("-c", LOAD_AND_SAVE)
    dp(asked, "--restart", "model.ckpt-3.pt", steps=3, program=program)
    after = torch.load(dp.folder / "again.pt", weights_only=True)
    for name, value in before["optimizer"]["state"][0].items():
        there = after["optimizer"]["state"][0][name]
        assert torch.equal(value, there) if torch.is_tensor(value) else value == there, name
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


@pytest.mark.parametrize("batch_size", [1, 2])
def test_lkf_parity(dp, batch_size):
    """After 50 batches with the same atoms drawn, 250 updates, the weights are those of DeePMD-kit's own LKF."""
    dp({"type": "LKF", "kf_blocksize": 256}, steps=50, batch_size=batch_size, program=("-c", SAME_ATOMS, "1"))
    theirs = weights(dp, 50)
    dp({"type": "RLEKF", "preset": "lkf", "block_size": 256}, steps=50, batch_size=batch_size)
    ours = weights(dp, 50)
    apart = difference(ours, theirs)
    print(f"\nLKF parity, {batch_size} frames per batch: the largest difference of a weight is {apart:.1e}")
    assert apart < 1e-10
    dp({"type": "LKF", "kf_blocksize": 256}, steps=1, batch_size=batch_size)
    assert difference(weights(dp, 1), theirs) > 1e-3  # and they have moved
    dp({"type": "LKF", "kf_blocksize": 256}, steps=50, batch_size=batch_size, RLEKF_DEEPMD="LKF")
    assert difference(weights(dp, 50), theirs) < 1e-10


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
    assert re.search("block_size.*must be >= 1", dp({"type": "RLEKF", "block_size": 0}, fails=True))
    assert "blocksize" in dp({"type": "RLEKF", "blocksize": 8}, fails=True)


def test_two_processes(dp):
    """Under torchrun, one frame per rank: the same bits on both ranks, and the weights of one process with both frames.

    On a machine without GPUs three calls of dp are replaced: see RECORDED. A force group is all atoms, so that it does
    not matter that several processes draw other groups than one does. The prior is the identity, since two frames in
    one batch have other squared gradients than each by itself; at the end both ranks start with a prior by layers, and
    measure jointly.
    """
    (dp.folder / "recorded.py").write_text(RECORDED)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "recorded.py")
    asked = {"type": "RLEKF", "block_size": 256, "batch": "mean", "num_groups": 1, "prior": "identity", "network": "dp"}

    def same_on_both(moment):
        one, other = (torch.load(dp.folder / f"{moment}.{rank}.pt") for rank in range(2))
        if moment == "end":  # assert_close compares no strings
            assert one[1][0].pop("names") == other[1][0].pop("names")
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        return one

    text = dp(asked, steps=4, program=torchrun)
    assert text.count("in torch.float64") == 1
    start, (ours, *_) = same_on_both("start"), same_on_both("end")
    batches = [torch.load(dp.folder / f"batches.{rank}.pt", weights_only=False) for rank in range(2)]
    assert all(not torch.equal(one[0]["coord"], other[0]["coord"]) for one, other in zip(*batches, strict=True))
    assert all(torch.equal(value, ours[name.split(".", 2)[2]]) for name, value in weights(dp, 4).items())

    dp(asked, steps=4, program=("recorded.py",))
    alone, *_ = torch.load(dp.folder / "end.alone.pt")
    moved, apart = (difference(trained(ours), trained(other)) for other in (start, alone))
    print(f"\nTwo processes: weights move by up to {moved:.1e}, and differ by {apart:.1e} from those of one process")
    assert apart < 1e-10 < 1e-3 < moved

    before = checkpoint(dp, 4)["optimizer"]["state"][0]["state"][STATE["forgetting"]]
    dp(asked, "--restart", "model.ckpt-4.pt", steps=6, program=torchrun)
    _, filtered, _ = same_on_both("end")
    assert filtered[0]["state"][STATE["forgetting"]] < before

    dp({**asked, "batch": "joint", "prior": "layers", "network": "auto"}, steps=2, program=torchrun)
    same_on_both("end")
