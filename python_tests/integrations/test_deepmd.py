"""DeePMD-kit's plugin against stand-ins for its argument checker and its trainer; the real ones: ../deepmd/."""

import copy
import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import run_file
from spawn import spawn

from rlekf_ext.batch_parts import force_groups
from rlekf_ext.integrations.deepmd import optimizer as deepmd
from rlekf_ext.integrations.deepmd import patch as plugin
from rlekf_ext.options import Options, help_text
from rlekf_ext.updates import FrameUpdater

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]


def fake_argcheck():
    module = ModuleType("deepmd.utils.argcheck")
    plugins = {"Adam": None, "LKF": None}

    def argument(name, dtype, optional, doc, extra_check=None, extra_check_errmsg=""):
        assert optional
        assert doc.endswith(".")
        return SimpleNamespace(name=name, kinds=tuple(dtype if isinstance(dtype, list) else [dtype]), check=extra_check)

    def normalize(data, multi_task=False, *, check=True):
        options = dict(data["optimizer"])
        kind = options.pop("type")
        if kind not in plugins:
            raise ValueError(f"get invalid choice `{kind}`")
        known = {a.name: a for a in plugins[kind]()} if plugins[kind] else {}
        for name, value in options.items() if known else ():
            if not isinstance(value, known[name].kinds) or (known[name].check and not known[name].check(value)):
                raise ValueError(f"{name} gets bad value {value}")
        return copy.deepcopy(data)

    def register(name, doc):
        return lambda function: plugins.__setitem__(name, function)

    module.Argument, module.normalize = argument, normalize
    module.opt_args_plugin = SimpleNamespace(register=register)
    return module


@pytest.fixture
def dp(monkeypatch):
    return stand_in(monkeypatch)


def stand_in(monkeypatch):
    """What `dp --pt train` does with an input and batches, with a freshly loaded plugin."""
    monkeypatch.delenv("RLEKF_DEEPMD", raising=False)
    names = ("deepmd", "deepmd.utils", "deepmd.pt", "deepmd.pt.train")
    modules = {name: ModuleType(name) for name in names}
    modules["deepmd"].__version__ = "3.2.0"
    modules["deepmd.utils.argcheck"] = fake_argcheck()
    modules["deepmd.pt.train.training"] = run_file(FOLDER / "standin_training.py", "deepmd.pt.train.training")
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            monkeypatch.setattr(modules[name.rpartition(".")[0]], name.rpartition(".")[2], module, raising=False)

    def load():
        run_file(ROOT / "rlekf_ext_deepmd.py", "rlekf_ext_deepmd")

    def trainer(optimizer, batches, steps=3, loss="ener", **given):
        config = {
            "model": {},
            "loss": {"type": loss},
            "optimizer": optimizer,
            "training": {"numb_steps": steps, "seed": 5},
        }
        config = modules["deepmd.utils.argcheck"].normalize(config)
        return modules["deepmd.pt.train.training"].Trainer(config, batches, **given)

    return SimpleNamespace(load=load, trainer=trainer, modules=modules, training=modules["deepmd.pt.train.training"])


def batches(count=4, frames=2, atoms=30, virial=False, **changed):
    """Batches (inputs, labels) from a teacher model of the stand-in's form."""
    standin = run_file(FOLDER / "standin_training.py", "teacher")
    teacher, made = standin.Wrapper(seed=1), []
    for _ in range(count):
        coord = torch.randn(frames, atoms, 3, dtype=torch.float64)
        inputs = {"coord": coord, "atype": torch.zeros(frames, atoms, dtype=torch.int64), "box": None}
        predicted = {name: value.detach() for name, value in teacher(**inputs)[0].items()}
        labels = {"energy": predicted["energy"], "find_energy": 1.0, "force": predicted["force"], "find_force": 1.0}
        if virial:
            labels |= {"virial": predicted["virial"], "find_virial": 1.0}
        made.append((inputs, labels | changed))
    return made


def weights(trainer):
    return torch.cat([p.detach().reshape(-1) for p in trainer.wrapper.parameters()])


def lkf(**prefactors):
    factors = {f"kf_{end}_pref_{kind}": 1.0 for end in ("start", "limit") for kind in "ef"}
    return {"type": "LKF", "kf_blocksize": 24, **factors, **prefactors}


def test_trains(dp):
    dp.load()
    data = batches(8)
    trainer = dp.trainer({"type": "RLEKF", "block_size": 40}, data, steps=25)
    inputs, labels = data[0]

    def error():
        return float((trainer.wrapper(**inputs)[0]["force"] - labels["force"]).detach().abs().mean())

    before = error()
    trainer.run()
    assert error() < 0.5 * before
    # robust: forces, then energies, of two frames
    assert trainer.optimizer.health()["num_updates"] == 25 * 2 * 2
    assert [tuple(t.shape) for t in trainer.shown] == [(2, 1), (2, 30, 3)]


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("name", ["RLEKF", "LKF"])
def test_lkf_preset_is_lkf(dp, monkeypatch, frames, name):
    """The weights of a dense LKF after 50 steps, from type RLEKF with LKF's scales and from LKF taken over."""
    data = batches(5, frames)
    generator = torch.Generator().manual_seed(5)
    monkeypatch.setattr(dp.training, "draw", lambda atoms: force_groups(atoms, 6, 4, generator))
    factors = {"kf_start_pref_e": 2.0, "kf_limit_pref_e": 0.5, "kf_limit_pref_f": 3.0} if name == "LKF" else {}
    theirs = dp.trainer(lkf(**factors), data, steps=50)
    theirs.run()
    if name == "LKF":
        monkeypatch.setenv("RLEKF_DEEPMD", "LKF")
    dp.load()
    asked = lkf(**factors) if name == "LKF" else {"type": "RLEKF", "preset": "lkf", "block_size": 24}
    ours = dp.trainer(asked, data, steps=50)
    assert isinstance(ours.optimizer, deepmd.DeepmdRLEKF)
    assert ours.optimizer.filter.plan.sizes == theirs.optimizer.sizes
    ours.run()
    assert (weights(ours) - weights(theirs)).abs().max() < 1e-10
    assert (weights(ours) - weights(dp.trainer(lkf(), data))).abs().max() > 1e-2  # and they have moved


def test_other_types_run_their_own_code(dp):
    before = dict(vars(dp.training))
    dp.load()
    data = batches(2, 1)
    for optimizer in (lkf(), {"type": "Adam"}):
        trainer = dp.trainer(optimizer, data)
        trainer.run()
        assert type(trainer) is before["Trainer"]
        assert vars(dp.training) == before
    dp.trainer({"type": "RLEKF"}, data).run()  # and after a run with RLEKF in the same process
    trainer = dp.trainer(lkf(), data)
    trainer.run()
    assert type(trainer.optimizer) is dp.training.LKFOptimizer is before["LKFOptimizer"]


def test_restart_is_exact(dp, tmp_path):
    dp.load()
    data = batches(3, 2, virial=True)
    asked = {"type": "RLEKF", "block_size": 40, "adaptive_scale": True, "covariance_dtype": "float32"}
    whole = dp.trainer(asked, data, steps=7)
    whole.run()
    half = dp.trainer(asked, data, steps=4)
    half.run()
    half.save_model(tmp_path / "model.pt")
    rest = dp.trainer(asked, data, steps=7, restart_model=tmp_path / "model.pt")
    p, q = (t.optimizer.filter.covariance for t in (half, rest))
    assert torch.equal(p.tiles, q.tiles)
    assert torch.equal(p.state, q.state)
    rest.run()
    assert torch.equal(weights(rest), weights(whole))


ALL_ATOMS = {"group_size": 30, "num_groups": 1}  # several processes draw other groups than one does
AS_ONE = [
    {"batch": "mean", "num_groups": 1, "warm_start": False},
    {"preset": "lkf", **ALL_ATOMS},
    {"preset": "paper", **ALL_ATOMS},
]
UNLIKE = [{}, {"batch": "joint", "group_size": 5}, {"preset": "lkf"}, {"order": ["force"], "group_size": 1}]


def frame_of(batch, rank):
    return tuple(
        {name: value[rank : rank + 1] if torch.is_tensor(value) else value for name, value in part.items()}
        for part in batch
    )


def bits(trainer):
    p = trainer.optimizer.filter.covariance
    return torch.cat([weights(trainer), trainer.model.bias.reshape(1), p.tiles.reshape(-1), p.state])


def assert_same_on_all_ranks(tensor):
    everywhere = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, tensor)
    assert all(torch.equal(one, tensor) for one in everywhere)


def on_two_ranks(rank, folder):
    data, wanted = torch.load(folder / "wanted.pt")
    mine, said = [frame_of(batch, rank) for batch in data], []
    unlike = batches(1, frames=1, atoms=20 * (rank + 1), virial=rank == 0)
    unlike += batches(1, frames=1, atoms=20 * (rank + 1), find_energy=float(rank))
    with pytest.MonkeyPatch.context() as patch:
        dp = stand_in(patch)
        dp.load()
        deepmd.log.setLevel(logging.INFO)
        patch.setattr(deepmd.log, "callHandlers", said.append)
        for options, weights_of_one in zip(AS_ONE, wanted, strict=True):
            trainer = dp.trainer({"type": "RLEKF", "block_size": 40, "network": "dp", **options}, mine)
            trainer.run()
            assert (weights(trainer) - weights_of_one).abs().max() < 1e-12
            assert_same_on_all_ranks(bits(trainer))
        assert len(said) == (0 if rank else len(AS_ONE))
        for options in UNLIKE:
            trainer = dp.trainer({"type": "RLEKF", **options}, unlike, steps=4)
            assert_same_on_all_ranks(bits(trainer))
            trainer.run()
            assert_same_on_all_ranks(bits(trainer))
            assert trainer.shown[1].shape == (1, 20 * (rank + 1), 3)
        if rank == 0:
            trainer.save_model(folder / "model.pt")
        dist.barrier()
        rest = dp.trainer({"type": "RLEKF", **options}, unlike, steps=6, restart_model=folder / "model.pt")
        rest.run()
        whole = dp.trainer({"type": "RLEKF", **options}, unlike, steps=6)
        whole.run()
        assert torch.equal(bits(rest), bits(whole))


def test_two_processes(dp, tmp_path):
    """The weights of one process with the frames of both; the same bits on both, also if the frames differ in atoms
    and labels, and after a restart."""
    dp.load()
    data, wanted = batches(3), []
    for options in AS_ONE:
        trainer = dp.trainer({"type": "RLEKF", "block_size": 40, **options}, data)
        trainer.run()
        wanted.append(weights(trainer))
    torch.save((data, wanted), tmp_path / "wanted.pt")
    spawn(on_two_ranks, 2, tmp_path)


def test_restart_from_lkf(dp, tmp_path):
    dp.load()
    trainer = dp.trainer({"type": "RLEKF", "preset": "lkf", "block_size": 24}, batches(1))
    blocks = [(3.0 + i) * torch.eye(n, dtype=torch.float64) for i, n in enumerate(trainer.optimizer.filter.plan.sizes)]
    state = {"P": blocks, "kalman_lambda": 0.99, "params_packed_index": [len(b) for b in blocks]}
    trainer.optimizer.load_state_dict({"state": {0: state}, "param_groups": [{"kalman_nue": 0.9987}]})
    assert trainer.optimizer.filter.memory_factor == pytest.approx(0.99)
    for mine, theirs in zip(trainer.optimizer.filter.covariance.dense(), blocks, strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(ValueError, match="--init-model"):
        trainer.optimizer.load_state_dict({"state": {0: {"exp_avg": 0}}, "param_groups": [{}]})


@pytest.mark.parametrize(
    ("given", "changed", "kinds"),
    [
        ({}, {}, ["force", "energy"]),
        ({}, {"num_groups": 4}, ["force", "energy"] * 4),
        ({}, {"num_groups": 4, "find_energy": 0.0}, ["force"] * 4),
        ({}, {"find_force": 0.0}, ["energy"]),
        ({"virial": True}, {"num_groups": 4}, ["force", "virial", "energy"] * 4),
        ({"virial": True}, {"num_groups": 4, "order": ["energy", "force"]}, ["energy", "force"] * 4),
        ({"virial": True}, {"preset": "paper"}, ["virial", "energy"] + ["force"] * 4),
    ],
)
def test_updates_follow_the_labels(dp, monkeypatch, given, changed, kinds):
    dp.load()
    options = {name: value for name, value in changed.items() if "find" not in name}
    labels = {name: value for name, value in changed.items() if "find" in name}
    frames = 2 if options.get("preset") == "paper" else 1
    assert updates_of(dp, monkeypatch, options, batches(1, frames, **given, **labels)) == kinds


def test_jointly_each_structure_is_a_measurement(dp, monkeypatch):
    dp.load()
    kinds = [kind for kind in ["force", "energy"] * 2 for _ in range(3)]
    assert updates_of(dp, monkeypatch, {"num_groups": 2}, batches(1, 3)) == kinds
    assert updates_of(dp, monkeypatch, {"num_groups": 2, "batch": "mean"}, batches(1, 3)) == ["force", "energy"] * 2


def updates_of(dp, monkeypatch, options, data):
    """The kinds of the measurements of one batch."""
    trainer = dp.trainer({"type": "RLEKF", **options}, data, steps=1)
    found, call = [], FrameUpdater.__call__

    def recording(self, *given):
        done = call(self, *given)
        found.extend(done)
        return done

    with monkeypatch.context() as patch:
        patch.setattr(FrameUpdater, "__call__", recording)
        trainer.run()
    return [kind for kind, _ in found]


def test_nan_labels_are_skipped_and_then_stop(dp, caplog):
    dp.load()
    data = batches(1, 1)
    data[0][1]["force"][:] = float("nan")
    trainer = dp.trainer({"type": "RLEKF", "max_skipped": 6, "num_groups": 4, "order": ["force"]}, data, steps=5)
    before = weights(trainer).clone()
    with caplog.at_level(logging.WARNING), pytest.raises(Exception, match="max_skipped"):
        trainer.run()
    assert torch.equal(weights(trainer), before)
    assert "skipped" in caplog.text


def test_memory_is_said_first(dp, caplog):
    dp.load()
    with caplog.at_level(logging.INFO):
        dp.trainer({"type": "RLEKF"}, batches(1))
    assert "MB in torch.float64" in caplog.text
    assert "dense" in caplog.text


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 0},
        {"block_size": "many"},
        {"strategy": "other"},
        {"memory_factor": 1.5},
        {"covariance_dtype": "float16"},
        {"group_size": 0},
        {"order": ["energy", "charge"]},
        {"preset": "best"},
        {"initial_covariance": 0},
    ],
)
def test_options_are_checked(dp, options):
    dp.load()
    with pytest.raises(ValueError, match="bad value"):
        dp.trainer({"type": "RLEKF", **options}, batches(1))


def test_options_arrive(dp):
    dp.load()
    options = {"strategy": "lekf", "memory_factor": 1, "group_size": 3, "num_groups": 2, "covariance_dtype": "float32"}
    options |= {"energy_scale": 2, "process_noise": 1e-6, "preset": "paper", "order": ["force", "energy"]}
    optimizer = dp.trainer({"type": "RLEKF", **options}, batches(1)).optimizer
    assert optimizer.filter.plan.sizes == (28, 40, 5)  # layers
    assert optimizer.filter.memory_factor == 1
    assert optimizer.filter.covariance.tiles.dtype == torch.float32
    options = optimizer.updater.options
    assert (options.group_size, options.num_groups, options.energy_scale) == (3, 2, 2)
    assert options.order == ("force", "energy")


def test_every_option_is_an_argument_with_help(dp):
    made = plugin.arguments(dp.modules["deepmd.utils.argcheck"].Argument)
    options = [name for name in Options.__dataclass_fields__ if name != "average_frames"]
    assert [one.name for one in made] == ["network", *options]
    assert "`robust`: 0.998" in help_text("memory_factor")


def test_unsupported_inputs(dp):
    dp.load()
    with pytest.raises(ValueError, match="loss of type ener"):
        dp.trainer({"type": "RLEKF"}, batches(1), loss="dos")


def test_switched_off(dp, monkeypatch):
    monkeypatch.setenv("RLEKF_DEEPMD", "0")
    dp.load()
    with pytest.raises(ValueError, match="invalid choice"):
        dp.trainer({"type": "RLEKF"}, batches(1))


@pytest.mark.parametrize("damage", ["version", "argcheck", "package"])
def test_the_entry_point_never_raises(dp, monkeypatch, caplog, damage):
    if damage == "version":
        dp.modules["deepmd"].__version__ = "4.0.0"
    elif damage == "argcheck":
        del dp.modules["deepmd.utils.argcheck"].opt_args_plugin
    else:
        monkeypatch.setitem(sys.modules, "rlekf_ext.integrations.deepmd.patch", None)
    dp.load()
    assert len(caplog.messages) == 1
    assert "\n" not in caplog.messages[0]
    dp.trainer(lkf(), batches(1)).run()


def test_an_unknown_trainer_is_left_alone(dp, caplog):
    dp.load()
    del dp.training.Trainer._next_training_batch
    with pytest.raises(ValueError, match="Not supported optimizer"):
        dp.trainer({"type": "RLEKF"}, batches(1))
    assert "_next_training_batch" in caplog.messages[-1]
