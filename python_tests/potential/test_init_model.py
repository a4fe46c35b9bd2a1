"""A run that begins with the model of an earlier one: what is taken over of it, and what is refused."""

import numpy as np
import pytest
import torch
from helpers import checkpoint_of, input_of, run, weights_of, write_data
from spawn import spawn

from rlekf_ext import FrameUpdater
from rlekf_ext.covariance import Covariance
from rlekf_ext.errors import DataError, InputError, OptionError
from rlekf_ext.potential.batches import load_frames
from rlekf_ext.potential.checkpoint import restored_model
from rlekf_ext.potential.input import read_input
from rlekf_ext.potential.optimizers import build_optimizer
from rlekf_ext.potential.train import add_elements, begin_with, build_model, train

RLEKF = {"type": "RLEKF", "block_size": 40}


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("earlier")
    run(input_of(folder))
    return folder


def with_new_data(folder, earlier, optimizer=RLEKF, **changes):
    """An input file that begins with the earlier model, with four other frames."""
    write_data(folder / "data", first=20)
    return input_of(folder, optimizer, init_model=str(earlier / "out" / "model.ckpt.pt"), **changes)


def begun(given, earlier):
    """The optimizer of a run before its first batch, and what it has said."""
    config, said, checkpoint = read_input(given), [], checkpoint_of(earlier)
    frames = load_frames(config, quiet=True, say=said.append)[0].every
    model = build_model(config, frames, (), checkpoint, "init_model")
    steps = build_optimizer(config, model, 9, say=said.append)
    begin_with(checkpoint, steps, model, frames, config, said.append)
    return steps, " ".join(said)


def p_of(folder):
    return Covariance.from_state_dict(checkpoint_of(folder)["optimizer"]["filter"]["state"][0])


def test_p_and_the_weights_are_those_of_the_earlier_run(tmp_path, earlier):
    given = with_new_data(tmp_path, earlier, {**RLEKF, "measurement_noise": 2.0})
    steps, said = begun(given, earlier)
    p, old = steps.optimizer.filter.covariance, p_of(earlier)
    for own, kept in zip(p.dense(), old.dense(), strict=True):
        assert torch.equal(own, kept)
    now, before = p.scalars(), old.scalars()
    assert now.forgetting == before.forgetting < 0.002
    assert (now.measurement_noise, before.measurement_noise) == (2.0, 1.0)  # an option of this run
    assert (now.num_updates, before.num_updates) == (0, 9 * 2)
    saved = checkpoint_of(earlier)["optimizer"]["weights"]
    assert all(torch.equal(tensor, saved[name]) for name, tensor in steps._model.state_dict().items())
    assert torch.equal(
        weights_of(earlier), torch.cat([t.flatten().double() for t in steps.result.state_dict().values()])
    )
    assert f"P is that of the earlier run; 1 - λ continues from {before.forgetting:.2g}." in said


def test_p_is_inflated(tmp_path, earlier):
    given = with_new_data(tmp_path, earlier, {**RLEKF, "covariance": "inflate", "inflation": 5.0})
    steps, said = begun(given, earlier)
    for own, kept in zip(steps.optimizer.filter.covariance.dense(), p_of(earlier).dense(), strict=True):
        assert torch.allclose(own, 5 * kept, rtol=1e-14, atol=0)
    assert "times 5" in said


@pytest.mark.parametrize(
    ("changes", "dtype", "capacity"),
    [
        ({"block_size": 64}, torch.float64, 32),
        ({"covariance_dtype": "float32"}, torch.float32, 32),
        ({"max_pending": 5}, torch.float64, 5),
        ({"block_size": 64, "covariance_dtype": "auto", "max_pending": 40}, torch.float64, 40),  # it was float64
    ],
)
def test_p_is_taken_over_into_other_blocks_and_storage(tmp_path, earlier, changes, dtype, capacity):
    """Within blocks of both, P is the same."""
    steps, _ = begun(with_new_data(tmp_path, earlier, {**RLEKF, **changes}), earlier)
    p, old = steps.optimizer.filter.covariance, p_of(earlier)
    assert (p.tiles.dtype, len(p.pending)) == (dtype, capacity)
    found, wanted = (torch.block_diag(*each.dense()) for each in (p, old))
    inside, before = (torch.block_diag(*(torch.ones(n, n) for n in each.plan.sizes)) for each in (p, old))
    exact = 1e-6 if dtype == torch.float32 else 1e-14
    assert torch.allclose(found, wanted * (inside * before), rtol=0, atol=exact * float(wanted.abs().max()))


def test_a_p_that_float32_cannot_hold(tmp_path, earlier, monkeypatch):
    monkeypatch.setattr("rlekf_ext.filter.FLOAT32_CONDITION", 10.0)
    with pytest.raises(OptionError, match=r"condition number of the old P is above .*: use covariance_dtype float64"):
        begun(with_new_data(tmp_path, earlier, {**RLEKF, "covariance_dtype": "float32"}), earlier)


def test_fresh_is_not_inherited_nor_another_order_of_weights(earlier):
    model = restored_model(checkpoint_of(earlier))
    saved = checkpoint_of(earlier)["optimizer"]
    for options, message in (
        ({"transpose": True, "covariance": "fresh"}, "call warm_start"),
        ({"transpose": False}, "in the order of transpose=True, its own in that of transpose=False"),
    ):
        updater = FrameUpdater(model, block_size=40, **options)
        with pytest.raises(OptionError, match=message):
            updater.inherit(saved["filter"], saved["updater"])
    with pytest.raises(OptionError, match="in the order of transpose=True"):
        updater.optimizer.load_state_dict(saved["filter"])


def test_a_frame_with_more_neighbours(tmp_path, earlier):
    given = with_new_data(tmp_path, earlier)
    write_data(tmp_path / "dense", first=0, count=2, stretch=0.6)
    given["training"]["training_data"]["systems"] = str(tmp_path / "dense")
    with pytest.raises(DataError, match=r"more than sel = .*The sel of .* cannot change"):
        run(given)


def test_a_fresh_p_is_the_prior_at_the_earlier_weights(tmp_path, earlier):
    steps, _ = begun(with_new_data(tmp_path, earlier, {**RLEKF, "covariance": "fresh"}), earlier)
    p = steps.optimizer.filter.covariance
    assert all(torch.equal(block, block.diagonal().diag()) for block in p.dense())
    assert p.scalars().forgetting == pytest.approx(0.002)
    assert torch.equal(
        weights_of(earlier), torch.cat([t.flatten().double() for t in steps.result.state_dict().values()])
    )


def test_adam_leaves_no_p(tmp_path):
    run(input_of(tmp_path / "adam", {"type": "Adam"}))
    steps, said = begun(with_new_data(tmp_path / "new", tmp_path / "adam"), tmp_path / "adam")
    assert "has no P (NAME.best.pt is the model alone): starting with a fresh one" in said
    assert steps.optimizer.filter.covariance.scalars().num_updates == 0


def test_adam_begins_with_the_model_of_rlekf(tmp_path, earlier):
    given = with_new_data(tmp_path, earlier, {"type": "Adam"}, numb_steps=1)
    run({**given, "learning_rate": {"start_lr": 1e-12, "stop_lr": 1e-12}})
    assert torch.allclose(weights_of(tmp_path), weights_of(earlier), rtol=0, atol=1e-10)


def test_a_run_goes_on_and_can_be_restarted(tmp_path, earlier):
    """The restart continues from its own checkpoint, not from init_model."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(with_new_data(whole, earlier))
    assert not torch.allclose(weights_of(whole), weights_of(earlier), rtol=0, atol=1e-6)
    given = with_new_data(parts, earlier, numb_steps=4)
    run(given)
    given["training"]["numb_steps"] = 9
    assert run(given, restart=True)["step"] == 9
    assert torch.equal(weights_of(whole), weights_of(parts))


def test_its_own_checkpoint_may_be_the_model_to_begin_with(tmp_path):
    given = input_of(tmp_path, numb_steps=2)
    run(given)
    given["training"]["init_model"] = given["training"]["save_ckpt"] + ".pt"
    assert run(given)["step"] == 2
    assert p_of(tmp_path).scalars().forgetting < 0.002 * 0.9987**7  # 8 updates in all


@pytest.mark.parametrize(
    ("section", "key", "value", "name"),
    [
        ("fitting_net", "neuron", [7, 7], "model/fitting_net/neuron"),
        ("descriptor", "sel", [90, 90], "model/descriptor/sel"),
        (None, "type_map", ["Na", "Cl", "K"], "model/type_map"),
    ],
)
def test_another_network_is_refused(tmp_path, earlier, section, key, value, name):
    given = with_new_data(tmp_path, earlier)
    (given["model"][section] if section else given["model"])[key] = value
    with pytest.raises(InputError, match=f"The checkpoint has {name} = .*start without init_model"):
        run(given)


def test_a_file_that_is_not_there(tmp_path, earlier):
    given = with_new_data(tmp_path, earlier)
    given["training"]["init_model"] = "nowhere.pt"
    with pytest.raises(InputError, match=r"nowhere\.pt does not exist"):
        run(given)


def test_an_element_that_comes_later(tmp_path, capsys):
    """type_map has it from the first run on; its statistics and energy come from the first frames that have it."""
    old = input_of(tmp_path / "old")
    old["model"]["type_map"] = ["Na", "Cl", "K"]
    old["model"]["descriptor"]["sel"] = [8, 8, 8]  # auto would leave no room for K
    run(old)
    model = checkpoint_of(tmp_path / "old")["weights"]
    assert model["energy_bias"][2] == 0
    given = with_new_data(tmp_path / "new", tmp_path / "old", numb_steps=1)
    given["model"] = old["model"]
    data = tmp_path / "new" / "data"
    (data / "type_map.raw").write_text("K\nCl\n")
    config, said = read_input(given), []
    frames = load_frames(config, quiet=True)[0].every
    found = build_model(config, frames, (), checkpoint_of(tmp_path / "old"), "init_model")
    add_elements(found, frames, config, said.append)
    assert said == ["New elements: K."]
    for name in ("descriptor.davg", "descriptor.dstd", "energy_bias"):
        own = found.state_dict()[name]
        assert torch.equal(own[:2], model[name][:2])
        assert not torch.equal(own[2], model[name][2])
    steps, _ = begun(given, tmp_path / "old")  # with the filter's own weights
    off = [float(steps._model(frame, False, forces=False).energy - frame.energy) for frame in frames]
    assert np.mean(off) == pytest.approx(0, abs=1e-9)
    assert torch.equal(steps.result.energy_bias, steps._model.energy_bias)
    assert train(read_input(given))["step"] == 1
    assert "No training frame has" not in capsys.readouterr().out  # the model knows Na from the first run
    assert torch.equal(checkpoint_of(tmp_path / "new")["weights"]["energy_bias"], steps._model.energy_bias)
    old["training"]["training_data"]["systems"] = str(data)
    with pytest.raises(InputError, match=r"The training data have K, which the run of .* had not.*--init-model"):
        run(old, restart=True)
    given["model"]["descriptor"]["set_davg_zero"] = True
    steps, _ = begun(given, tmp_path / "old")
    assert steps._model.descriptor.davg[2, 0] == 0


def test_energies_that_come_later(tmp_path):
    """The first run had forces alone: the energies of its elements are fitted when there are some."""
    old = input_of(tmp_path / "old")
    (tmp_path / "old" / "data" / "set.000" / "energy.npy").unlink()
    run(old)
    assert not checkpoint_of(tmp_path / "old")["weights"]["energy_bias"].any()
    given = with_new_data(tmp_path / "new", tmp_path / "old")
    energies = tmp_path / "new" / "data" / "set.000" / "energy.npy"
    np.save(energies, np.load(energies) - 4e4)
    steps, said = begun(given, tmp_path / "old")
    assert "New elements" not in said
    frames = load_frames(read_input(given), quiet=True)[0].every
    off = [float(steps._model(frame, False, forces=False).energy - frame.energy) for frame in frames]
    assert np.mean(off) == pytest.approx(0, abs=1e-7)


def test_energies_are_fitted_if_the_order_has_them(tmp_path):
    """Whatever the prefactors of the loss."""
    optimizer = {"type": "RLEKF", "preset": "paper", "block_size": 40, "order": ["energy", "force"]}
    run({**input_of(tmp_path, optimizer), "loss": {"start_pref_e": 0, "limit_pref_e": 0}})
    assert checkpoint_of(tmp_path)["weights"]["energy_bias"].all()


def test_elements_without_statistics_in_either_backend_of_deepmd(earlier):
    descriptor = restored_model(checkpoint_of(earlier)).descriptor
    assert descriptor.without_statistics() == []
    descriptor.davg[1] = 0
    for std, found in ((0.1, [1]), (1 / descriptor.architecture.rcut, [1]), (0.01, [])):
        descriptor.dstd[1] = std
        assert descriptor.without_statistics() == found


def continues(rank, given, wanted):
    import torch.distributed as dist

    from rlekf_ext.processes import Processes

    run(given, processes=Processes(dist.group.WORLD))
    if rank == 0:
        from pathlib import Path

        folder = Path(given["training"]["save_ckpt"]).parents[1]
        assert torch.allclose(weights_of(folder), torch.load(wanted), rtol=0, atol=1e-9)


def test_several_processes_share_the_earlier_p(tmp_path, earlier):
    """That of one process, into other blocks; then that which they have written themselves."""
    for name, before in (("first", earlier), ("second", tmp_path / "first")):
        given = [
            with_new_data(tmp_path / each, before, {**RLEKF, "block_size": 50}, numb_steps=2)
            for each in (f"{name} alone", name)
        ]
        run(given[0])
        torch.save(weights_of(tmp_path / f"{name} alone"), tmp_path / "wanted.pt")
        spawn(continues, 2, given[1], tmp_path / "wanted.pt")
