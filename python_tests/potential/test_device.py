"""Training on a device: which one, the batches that are made ready ahead, and that nothing of a batch waits for it.

A meta tensor has no values: whatever would wait for them raises an error, and so does an operation that mixes devices.
"""

import pytest
import torch
from helpers import make_model
from oracles import relative
from test_batches import batches_of, numbers
from test_optimizers import config_of, labelled
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map

from rlekf_ext.errors import BackendError, OptionError
from rlekf_ext.graphs import Graphs
from rlekf_ext.ops import find_device, native
from rlekf_ext.potential.batches import Feed
from rlekf_ext.potential.optimizers import build_optimizer
from rlekf_ext.potential.table import Table, largest_scalar
from rlekf_ext.updates import FrameUpdater

META = torch.device("meta")
FEW = {"type": "RLEKF", "num_groups": 1}  # updates: an operation on meta tensors, or traced, takes 100 µs
STEPS = {
    "RLEKF": FEW,
    "the paper's preset": {**FEW, "preset": "paper"},
    "in one pass": {**FEW, "relinearize": False},
    "with virials": {**FEW, "order": ["energy", "force", "virial"]},
    "float32": {**FEW, "covariance_dtype": "float32"},
    "a mean over the batch": {**FEW, "batch": "mean"},
    "LKF": {"type": "LKF"},
    "Adam": {"type": "Adam"},
}


@pytest.fixture
def on_meta(monkeypatch):
    """The meta device counts as one that has room for P, kernels of the filter, and parameters with values."""
    monkeypatch.setattr("rlekf_ext.covariance.available_bytes", lambda device: 2**40)
    monkeypatch.setattr("rlekf_ext.ops.backend", lambda *_: native)
    monkeypatch.setattr("rlekf_ext.optim._check", lambda parameters: None)


# Of what the kernels' `predict` keeps for Adam, nothing but the kernels knows the size.
@pytest.mark.parametrize(
    ("steps", "kernels"), [*((name, False) for name in STEPS), *((name, True) for name in STEPS if name != "Adam")]
)
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_a_step_does_not_wait_for_the_device(on_meta, monkeypatch, steps, precision, kernels):
    monkeypatch.setattr("rlekf_ext.potential.table.has_kernels", lambda *_: kernels)
    model = make_model(rcut=4.0, precision=precision)
    frames = [labelled(make_model(rcut=4.0), seed).to(model.dtype) for seed in range(2)]
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
    for _ in range(2):  # running means exist from the second batch on
        assert optimize(frames, 0) > 0
    assert all(p.device == META for p in optimize.result.parameters())


def as_a_gpu_computes(monkeypatch):
    """The network in torch operations, and no number on the host."""
    monkeypatch.setattr("rlekf_ext.potential.table.has_kernels", lambda *_: False)
    monkeypatch.setattr("rlekf_ext.updates._numbers_of", lambda _: lambda x: torch.as_tensor(x).double())


@pytest.mark.parametrize("steps", [name for name in STEPS if name != "float32"])
def test_the_steps_are_those_of_a_cpu(monkeypatch, steps):
    """What a GPU computes, on the CPU."""
    ended = []
    for gpu in (False, True):
        if gpu:
            as_a_gpu_computes(monkeypatch)
        model = make_model(rcut=4.0)
        frames = [labelled(make_model(rcut=4.0), seed) for seed in range(4)]
        model.table = Table(max(largest_scalar(model.descriptor.architecture, frame) for frame in frames), 32)
        optimize = build_optimizer(config_of(STEPS[steps]), model, 8)
        optimize.start(frames)
        for step in range(4):
            optimize(frames[step % 2 :: 2], step)
        ended.append(torch.cat([p.detach().flatten() for p in optimize.result.parameters()]))
    assert relative(ended[1], ended[0]) < 1e-7  # rounding errors grow from update to update


def traced(body):
    """In place of rlekf_ext.graphs.capture: a replay does the operations of one run again, with the same addresses and
    the same numbers of the host, as a CUDA graph does."""
    found = []

    def run(_):
        found.append(body())
        return [leaf for leaf in tree_leaves(found[0]) if isinstance(leaf, torch.Tensor)]

    with torch.no_grad():
        again = make_fx(run)(torch.zeros(()))
    results = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, found[0])
    places = [leaf for leaf in tree_leaves(results) if isinstance(leaf, torch.Tensor)]
    has_run = [True]  # by being traced

    def replay():
        if has_run:
            has_run.clear()
            return
        with torch.no_grad():
            for place, value in zip(places, again(torch.zeros(())), strict=True):
                place.copy_(value)

    return replay, results


SLOW = [pytest.param(name, marks=pytest.mark.soak) for name in ("in one pass", "with virials", "the paper's preset")]


@pytest.mark.parametrize("steps", ["RLEKF", "a mean over the batch", *SLOW])
def test_replayed_batches_are_those_that_are_launched(monkeypatch, steps):
    graphs, ended, all_errors = [], [], []
    as_a_gpu_computes(monkeypatch)
    monkeypatch.setattr("rlekf_ext.graphs.capture", lambda body, device: graphs.append(body) or traced(body))
    for replayed in (False, True):
        monkeypatch.setattr("rlekf_ext.updates._uses_graphs", lambda _, replayed=replayed: replayed)
        model = make_model(rcut=4.0)
        frames = [labelled(make_model(rcut=4.0), seed) for seed in range(6)]
        model.table = Table(max(largest_scalar(model.descriptor.architecture, frame) for frame in frames), 32)
        optimize = build_optimizer(config_of(STEPS[steps]), model, 8)
        optimize.start(frames)
        errors = []
        for step in range(20):  # the kinds of update are balanced in the first, ninth and seventeenth
            batch = frames[step % 3 :: 3]
            errors += [error.clone() for _, error in optimize.updater(optimize.arranged(batch))]
        ended.append(torch.cat([p.detach().flatten() for p in optimize.result.parameters()]))
        all_errors.append(torch.stack(errors))
        assert optimize.optimizer.health()["num_updates"] == len(errors)
    assert 1 <= len(graphs) <= 3
    assert relative(ended[1], ended[0]) < 1e-7
    assert relative(all_errors[1], all_errors[0]) < 1e-7


def test_without_graphs_if_they_cannot_be_made(monkeypatch):
    def fails(body, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    as_a_gpu_computes(monkeypatch)
    monkeypatch.setattr("rlekf_ext.graphs.capture", fails)
    ended, said = [], []
    for graphs in (False, True):
        monkeypatch.setattr("rlekf_ext.updates._uses_graphs", lambda _, graphs=graphs: graphs)
        model = make_model(rcut=4.0)
        frame = labelled(make_model(rcut=4.0), 0)
        model.table = Table(largest_scalar(model.descriptor.architecture, frame), 32)
        update = FrameUpdater(model, num_groups=1, transpose=True, say=said.append)
        update.warm_start([frame])
        for _ in range(4):
            update(frame)
        ended.append(torch.cat([p.detach().flatten() for p in update.result.parameters()]))
    assert len(said) == 1
    assert said[0].startswith("From now on without CUDA graphs, which is slower: operation not permitted")
    assert relative(ended[1], ended[0]) < 1e-12


def test_shapes_and_graphs_beyond_the_most_are_launched_piece_by_piece(monkeypatch):
    monkeypatch.setattr("rlekf_ext.graphs.MOST", 2)
    monkeypatch.setattr("rlekf_ext.graphs.capture", lambda body, device: (lambda: None, "replayed"))
    graphs = Graphs()
    assert [graphs.run(key, lambda: "launched", META) for key in (1, 2, 3, 1, 3)] == [
        *["launched"] * 3,
        "replayed",
        "launched",
    ]
    first = graphs.placed([torch.ones(2)])
    assert graphs.placed([torch.zeros(2)])[0] is first[0]
    assert first[0].tolist() == [0, 0]
    assert graphs.placed([torch.ones(3)])
    assert graphs.placed([torch.ones(4)]) is None


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
