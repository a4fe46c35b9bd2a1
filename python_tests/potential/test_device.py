"""Training on a device: which one, the batches that are made ready ahead, and that nothing of a batch waits for it.

A meta tensor has no values: whatever would wait for them raises an error, and so does an operation that mixes devices.
"""

import pytest
import torch
from helpers import make_model
from oracles import relative
from test_batches import batches_of, numbers
from test_optimizers import config_of, labelled

from rlekf_ext.errors import BackendError, OptionError
from rlekf_ext.ops import find_device, native
from rlekf_ext.potential.batches import Feed
from rlekf_ext.potential.optimizers import build_optimizer
from rlekf_ext.potential.table import Table, largest_scalar

META = torch.device("meta")
STEPS = {
    "RLEKF": {"type": "RLEKF"},
    "the paper's preset": {"type": "RLEKF", "preset": "paper"},
    "in one pass": {"type": "RLEKF", "relinearize": False},
    "with virials": {"type": "RLEKF", "order": ["energy", "force", "virial"]},
    "float32": {"type": "RLEKF", "covariance_dtype": "float32"},
    "a mean over the batch": {"type": "RLEKF", "batch": "mean"},
    "LKF": {"type": "LKF"},
    "Adam": {"type": "Adam"},
}


@pytest.fixture
def on_meta(monkeypatch):
    """The meta device counts as one that has room for P, kernels of the filter, and parameters with values."""
    monkeypatch.setattr("rlekf_ext.covariance.available_bytes", lambda device: 2**40)
    monkeypatch.setattr("rlekf_ext.ops.backend", lambda *_: native)
    monkeypatch.setattr("rlekf_ext.optim._check", lambda parameters: None)


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("steps", STEPS)
def test_a_step_does_not_wait_for_the_device(on_meta, steps, precision):
    model = make_model(rcut=4.0, precision=precision)
    frames = [labelled(make_model(rcut=4.0), seed).to(model.dtype) for seed in range(4)]
    virials = {"start_pref_v": 1.0, "limit_pref_v": 1.0}
    config = config_of(STEPS[steps], loss={"start_pref_e": 1, "limit_pref_e": 1, "start_pref_f": 1, **virials})
    normal = model.descriptor.normal_on_cpu()
    model.to(META)
    model.descriptor._on_cpu = model.descriptor.statistics(), normal
    model.table = Table(max(largest_scalar(model.descriptor.architecture, frame) for frame in frames), 32)
    optimize = build_optimizer(config, model, 8)
    if hasattr(optimize, "updater"):
        optimize.updater._started = True  # a warm start, once a run, may wait
    else:
        optimize.optimizer.param_groups[0]["fused"] = False  # torch's kernel of a GPU, which meta tensors do not have
    for _ in range(3):  # running means exist from the second batch on
        assert optimize(frames, 0) > 0
    assert all(p.device == META for p in optimize.result.parameters())


@pytest.mark.parametrize("steps", [name for name in STEPS if name != "float32"])
def test_the_steps_are_those_of_a_cpu(monkeypatch, steps):
    """What a GPU computes, on the CPU: the network in torch operations, and no number on the host."""
    ended = []
    for gpu in (False, True):
        if gpu:
            monkeypatch.setattr("rlekf_ext.potential.table.has_kernels", lambda device: False)
            monkeypatch.setattr("rlekf_ext.updates._numbers_of", lambda _: lambda x: torch.as_tensor(x).double())
        model = make_model(rcut=4.0)
        frames = [labelled(make_model(rcut=4.0), seed) for seed in range(4)]
        model.table = Table(max(largest_scalar(model.descriptor.architecture, frame) for frame in frames), 32)
        optimize = build_optimizer(config_of(STEPS[steps]), model, 8)
        optimize.start(frames)
        for step in range(4):
            optimize(frames[step % 2 :: 2], step)
        ended.append(torch.cat([p.detach().flatten() for p in optimize.result.parameters()]))
    assert relative(ended[1], ended[0]) < 1e-7  # rounding errors grow from update to update


def test_a_wait_would_be_seen(on_meta):
    model = make_model(rcut=4.0)
    optimize = build_optimizer(config_of({"type": "RLEKF"}), model.to(META), 8)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        optimize.updater._look_after(250)


@pytest.mark.parametrize("ahead", [False, True])
def test_batches_made_ready_are_those_of_the_epoch(ahead):
    plain, feed = batches_of(batch_size=2), Feed(batches_of(batch_size=2), lambda batch: len(batch), ahead)
    for step in range(20):
        batch, made = next(feed)
        assert numbers(batch) == numbers(next(plain))
        assert made == len(batch)
        if step == 11:
            saved = feed.state_dict()
            following = [numbers(next(plain)) for _ in range(5)]
            again = batches_of(batch_size=2)
            again.load_state_dict(saved)
            assert [numbers(next(again)) for _ in range(5)] == following
            for _ in range(5):
                assert numbers(next(feed)[0]) == following.pop(0)


def test_what_fails_ahead_fails_here():
    def ready(batch):
        raise ValueError("unusable")

    with pytest.raises(ValueError, match="unusable"):
        next(Feed(batches_of(), ready, True))


def test_which_device(monkeypatch):
    assert find_device("cpu").type == "cpu"
    for name in ("tpu", "meta", "cuda:x"):
        with pytest.raises(OptionError, match=f"The device must be cpu, cuda or cuda:N but is: {name}"):
            find_device(name)
    if not torch.cuda.is_available():
        assert find_device(None).type == "cpu"
        with pytest.raises(BackendError, match=r"^cuda:1 cannot be used: torch .* The device cpu runs anywhere\."):
            find_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(BackendError, match=r"finds 2 GPU\(s\), so that the last is cuda:1"):
        find_device("cuda:2")
    monkeypatch.setattr("rlekf_ext.ops.backend", lambda *_: native)
    assert find_device(None) == torch.device("cuda", 0)
    assert find_device("cuda:1") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert find_device(None) == find_device("cuda") == torch.device("cuda", 1)

    def absent(*_):
        raise BackendError("There are no kernels.")

    monkeypatch.setattr("rlekf_ext.ops.backend", absent)
    assert find_device(None).type == "cpu"
    with pytest.raises(BackendError, match=r"There are no kernels\. The device cpu"):
        find_device("cuda")
