import copy
import io
import pickle

import pytest
import torch
from oracles import DenseFilter, relative
from torch import nn

from rlekf_ext import RLEKF
from rlekf_ext.covariance import Covariance
from rlekf_ext.ops import backend


def network(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, 1)).to(dtype)


def batches(count, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(4, 3, generator=generator, dtype=dtype)
        yield x, x.sum(1, keepdim=True).sin()


def train(model, optimizer, data):
    losses = []
    for x, y in data:

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = (model(x) - y).abs().mean()
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
    return losses


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def test_step_is_algorithm_2():
    """Against the paper's lines 1 to 14, with the sign flip done as it is written."""
    model, reference = network(), network()
    optimizer = RLEKF(model.parameters(), block_size=50)
    dense = DenseFilter(optimizer.filter.plan.sizes, 0.98, 0.9987)
    weights = flat(reference)
    for x, y in batches(20):
        train(model, optimizer, [(x, y)])

        nn.utils.vector_to_parameters(weights, reference.parameters())
        reference.zero_grad()
        prediction = reference(x)
        flipped = torch.where(prediction >= y, -prediction, prediction)  # lines 1 to 5
        flipped.mean().backward()  # line 7
        h = torch.cat([p.grad.reshape(-1) for p in reference.parameters()])
        dense.step(weights, h[None], [(y - prediction).abs().mean().item()])
    assert optimizer.filter.plan.num_blocks == 3
    assert relative(flat(model), weights) < 1e-12


def test_update_takes_gradients_of_the_prediction():
    """What DeePMD-kit and MatPL leave in .grad: +H, with any innovation."""
    one, other = network(), network()
    by_step, by_update = RLEKF(one.parameters()), RLEKF(other.parameters())
    for x, y in batches(5):
        train(one, by_step, [(x, y)])
        by_update.zero_grad()
        error = (y - other(x)).abs().mean()
        (-error).backward()
        by_update.update(by_update.jacobian(), error.detach())
    assert relative(flat(one), flat(other)) < 1e-14


def test_update_takes_many_jacobians():
    model = network()
    optimizer = RLEKF(model.parameters(), block_size=50)
    dense, weights = DenseFilter(optimizer.filter.plan.sizes, 0.98, 0.9987), flat(model)
    x, y = next(batches(1))
    rows = [torch.autograd.grad(value, list(model.parameters()), retain_graph=True) for value in model(x)]
    jacobian = torch.stack([optimizer.flatten(row) for row in rows])
    innovation = (y - model(x)).detach()[:, 0]
    optimizer.update(jacobian, innovation)
    dense.step(weights, jacobian, innovation)
    assert relative(flat(model), weights) < 1e-13


def test_learns():
    model = network()
    losses = train(model, RLEKF(model.parameters()), batches(600))
    assert sum(losses[-20:]) < 0.05 * sum(losses[:20])


def test_parameter_without_gradient_counts_as_zero():
    used, unused = nn.Parameter(torch.randn(4, dtype=torch.float64)), nn.Parameter(torch.randn(3, dtype=torch.float64))
    before = unused.detach().clone()
    optimizer = RLEKF([used, unused])
    used.square().sum().backward()
    optimizer.update(optimizer.jacobian(), 1.0)
    assert optimizer.filter.plan.num_weights == 7
    assert torch.equal(unused, before)


def test_frozen_parameters_are_left_out():
    model = network()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    optimizer = RLEKF(model.parameters())
    train(model, optimizer, batches(3))
    assert optimizer.filter.plan.num_weights == 20 + 20 + 1
    assert torch.equal(model[0].weight, before)


def test_a_group_may_be_frozen_altogether():
    model, other = network(), network()
    for one in (model, other):
        one[0].requires_grad_(False)
    grouped = RLEKF([{"params": list(layer.parameters())} for layer in (model[0], model[2])])
    train(model, grouped, batches(3))
    train(other, RLEKF(other.parameters()), batches(3))
    assert torch.equal(flat(model), flat(other))


def test_float32_is_guarded_in_plain_steps(monkeypatch):
    """With "auto" P is in float64 before float32 is too coarse; with "float32" there is a warning."""
    monkeypatch.setattr("rlekf_ext.filter.FLOAT32_CONDITION", 2.0)
    for dtype, after, sentence in (
        ("auto", torch.float64, "is stored in float64 from now on"),
        ("float32", torch.float32, "Use covariance_dtype float64 or auto"),
    ):
        model = network()
        optimizer = RLEKF(model.parameters(), covariance_dtype=dtype)
        with pytest.warns(UserWarning, match=sentence):
            train(model, optimizer, batches(251))
        assert optimizer.filter.covariance.tiles.dtype == after


def test_a_resumed_run_is_guarded_at_the_same_updates(monkeypatch):
    monkeypatch.setattr("rlekf_ext.optim.UPDATES_PER_GUARD", 5)
    guarded = []
    monkeypatch.setattr(RLEKF, "guard_storage", lambda optimizer: guarded.append(optimizer))
    model = network()
    optimizer = RLEKF(model.parameters(), covariance_dtype="auto")
    train(model, optimizer, batches(3))
    again = RLEKF(model.parameters(), covariance_dtype="auto")
    again.load_state_dict(optimizer.state_dict())
    train(model, again, batches(1))
    assert not guarded
    train(model, again, batches(1))
    assert guarded == [again]


def test_transpose_makes_neurons_adjacent():
    """A model that stores [in, out] with transpose=True is the one that stores [out, in]."""

    class Transposed(nn.Module):
        def __init__(self, model):
            super().__init__()
            values = [model[0].weight.T, model[0].bias, model[2].weight.T, model[2].bias]
            self.p = nn.ParameterList([nn.Parameter(v.detach().clone()) for v in values])

        def forward(self, x):
            return torch.tanh(x @ self.p[0] + self.p[1]) @ self.p[2] + self.p[3]

    model = network()
    transposed = Transposed(model)
    # Blocks of 7 cut through the first matrix, so that the order of its weights matters.
    train(model, RLEKF(model.parameters(), block_size=7), batches(20))
    train(transposed, RLEKF(transposed.parameters(), block_size=7, transpose=True), batches(20))
    assert relative(transposed.p[0].T.detach(), model[0].weight.detach()) < 1e-12


def test_float32_model_with_float64_covariance():
    model, exact = network(torch.float32), network(torch.float32).double()
    optimizer = RLEKF(model.parameters())
    assert optimizer.filter.covariance.tiles.dtype == torch.float64
    train(model, optimizer, batches(20, torch.float32))
    train(exact, RLEKF(exact.parameters()), ((x.double(), y.double()) for x, y in batches(20, torch.float32)))
    assert flat(model).dtype == torch.float32
    assert relative(flat(model).double(), flat(exact)) < 1e-4


def test_lr_scales_the_increment():
    one, half = network(), network()
    start = flat(one)
    train(one, RLEKF(one.parameters()), batches(1))
    train(half, RLEKF(half.parameters(), lr=0.5), batches(1))
    assert relative(flat(half) - start, 0.5 * (flat(one) - start)) < 1e-13


@pytest.mark.parametrize("named", [False, True])
def test_lekf_has_a_block_per_layer_when_names_are_known(named):
    model = network()
    params = model.named_parameters() if named else model.parameters()
    optimizer = RLEKF(params, strategy="lekf")
    assert optimizer.filter.plan.sizes == ((80, 21) if named else (60, 20, 20, 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("covariance_dtype", [torch.float64, torch.float32])
def test_resume_goes_on_bit_for_bit(dtype, covariance_dtype):
    data = list(batches(40, dtype))
    settings = {"block_size": 50, "covariance_dtype": covariance_dtype, "max_pending": 7}
    whole = network(dtype)
    optimizer = RLEKF(whole.parameters(), **settings)
    train(whole, optimizer, data[:25])
    saved = io.BytesIO()
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    train(whole, optimizer, data[25:])

    saved.seek(0)
    checkpoint = torch.load(saved, weights_only=True)
    resumed = network(dtype, seed=5)
    resumed.load_state_dict(checkpoint["model"])
    again = RLEKF(resumed.parameters(), memory_factor=0.5, **settings)  # λ comes from the checkpoint
    train(resumed, again, data[:3])  # used before: nothing of that may remain
    resumed.load_state_dict(checkpoint["model"])
    again.load_state_dict(checkpoint["optimizer"])
    train(resumed, again, data[25:])
    assert torch.equal(flat(resumed), flat(whole))
    assert torch.equal(again.filter.covariance.tiles, optimizer.filter.covariance.tiles)
    assert torch.equal(again.filter.covariance.state, optimizer.filter.covariance.state)


BACKENDS = [
    ("native", "cpu"),
    ("reference", "cpu"),
    ("triton", "cpu"),
    pytest.param(("native", "cuda"), marks=pytest.mark.gpu),
    pytest.param(("triton", "cuda"), marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("loader", BACKENDS, ids=str)
@pytest.mark.parametrize("saver", BACKENDS, ids=str)
def test_backends_load_each_others_checkpoints(saver, loader):
    for name, device in (saver, loader):
        try:
            backend(name, torch.device(device))
        except RuntimeError as error:
            pytest.skip(str(error))
    data, settings = list(batches(20)), {"block_size": 50, "max_pending": 7}

    def start(name, device):
        model = network().to(device)
        optimizer = RLEKF(model.parameters(), backend=name, **settings)
        return model, optimizer, [(x.to(device), y.to(device)) for x, y in data]

    model, optimizer, here = start(*saver)
    train(model, optimizer, here[:10])
    assert optimizer.filter.covariance.scalars().num_pending == 3
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, here[10:])

    file.seek(0)
    checkpoint = torch.load(file, weights_only=True, map_location="cpu")
    other, resumed, there = start(*loader)
    other.load_state_dict(checkpoint["model"])
    resumed.load_state_dict(checkpoint["optimizer"])
    train(other, resumed, there[10:])
    assert relative(flat(other).cpu(), flat(model).cpu()) < 1e-12
    p, q = (torch.block_diag(*o.filter.covariance.dense()).cpu() for o in (resumed, optimizer))
    assert relative(p, q) < 1e-12


def test_a_checkpoint_that_does_not_fit_changes_nothing_and_can_be_reblocked():
    model = network()
    optimizer = RLEKF(model.parameters(), block_size=50, covariance_dtype=torch.float32, lr=0.5)
    data = list(batches(10))
    train(model, optimizer, data)
    saved = optimizer.state_dict()

    other = RLEKF(model.parameters(), max_pending=3)
    with pytest.raises(ValueError, match=r"3 blocks .* but this filter has 1 blocks .* take_over"):
        other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] == 1.0
    assert other.health()["num_updates"] == 0
    with pytest.raises(ValueError, match=r"The saved pending have .* the same max_pending .* take_over"):
        RLEKF(model.parameters(), block_size=50, covariance_dtype=torch.float32).load_state_dict(
            RLEKF(model.parameters(), block_size=50, covariance_dtype=torch.float32, max_pending=3).state_dict()
        )
    other.take_over(Covariance.from_state_dict(saved["state"][0]))
    train(model, other, data)
    assert other.health()["num_updates"] == 20


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_on_alike_and_apart(copier):
    model = network()
    optimizer = RLEKF(model.parameters())
    data = list(batches(20))
    train(model, optimizer, data[:10])
    other_model, other = copier((model, optimizer))
    train(other_model, other, data[10:])
    assert not torch.equal(flat(model), flat(other_model))
    train(model, optimizer, data[10:])
    assert torch.equal(flat(model), flat(other_model))


def test_a_loaded_learning_rate_holds():
    """Also in an optimizer that has stepped before: torch puts other groups in the place of its own."""
    one, fresh = network(), network()
    optimizer, other = RLEKF(one.parameters()), RLEKF(fresh.parameters())
    train(one, optimizer, batches(1))
    fresh.load_state_dict(one.state_dict())
    for each in (optimizer, other):
        each.load_state_dict({**optimizer.state_dict(), "param_groups": [{"lr": 0.5, "params": [0, 1, 2, 3]}]})
    for model, each in ((one, optimizer), (fresh, other)):
        scheduler = torch.optim.lr_scheduler.ExponentialLR(each, 0.5)
        train(model, each, batches(1))
        scheduler.step()
        train(model, each, batches(1))
        assert each.param_groups[0]["lr"] == 0.25
    assert torch.equal(flat(one), flat(fresh))


def test_scheduler_and_hooks_of_torch_work():
    model = network()
    optimizer = RLEKF(model.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    train(model, optimizer, batches(1))
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert calls == [1]


def test_repr_says_what_it_holds():
    text = repr(RLEKF(network().parameters(), block_size=50))
    for part in (
        "101 weights in 3 blocks",
        "at most 50",
        "block_size 50",
        "backend auto",
        "MB in torch.float64",
    ):
        assert part in text


def test_variance_and_health():
    model = network()
    optimizer = RLEKF(model.parameters())
    h = torch.randn(101, dtype=torch.float64)
    assert float(optimizer.variance(h)) == pytest.approx(float(h @ h))
    assert optimizer.health() == {
        "num_updates": 0,
        "skipped_innovation": 0,
        "skipped_jacobian": 0,
        "skipped_variance": 0,
        "skipped_in_a_row": 0,
    }


def test_errors():
    model = network()
    optimizer = RLEKF(model.parameters())
    with pytest.raises(ValueError, match="needs a closure"):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"No parameter of this optimizer has a gradient: call backward\(\)"):
        optimizer.update(optimizer.jacobian(), 1.0)
    with pytest.raises(RuntimeError, match="give it all parameters then"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(ValueError, match="at least one parameter that requires a gradient"):
        RLEKF([torch.zeros(3)])
    with pytest.raises(ValueError, match="lr must be > 0 but is: 0"):
        RLEKF(model.parameters(), lr=0)
    with pytest.raises(ValueError, match="The saved covariance has 1 blocks"):
        RLEKF(model.parameters(), block_size=50).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="not a saved covariance of RLEKF: it has no sizes"):
        optimizer.load_state_dict(torch.optim.Adam(model.parameters()).state_dict())
    with pytest.raises(MemoryError, match="lower block_size"):
        RLEKF([nn.Parameter(torch.zeros(4_000_000))], block_size=4_000_000)
