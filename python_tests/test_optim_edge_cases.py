"""RLEKF in unusual uses: odd parameters, copies, threads, torch.compile. Each works or says why not."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import DenseFilter, relative
from test_optim import batches, flat, network, train
from torch import nn

from rlekf_ext import RLEKF
from rlekf_ext.errors import OptionError

DOUBLE = torch.float64


def parameter(*shape, dtype=DOUBLE):
    return nn.Parameter(torch.randn(shape, dtype=DOUBLE).to(dtype))


def update(optimizer, parameters, seed=0):
    """One update with seeded gradients for all parameters."""
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator, dtype=DOUBLE).to(p.dtype)
    optimizer.update(optimizer.jacobian(), 0.5)


def values(parameters):
    return [p.detach().clone() for p in parameters]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# Parameters


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: [parameter(3, dtype=torch.complex128)], r"real, .* is torch.complex128; .* .torch.view_as_real"),
        (
            lambda: [parameter(2), parameter(3, dtype=torch.float8_e4m3fn)],
            "Parameters should be .* torch.float8_e4m3fn",
        ),
        (lambda: [nn.Parameter(torch.eye(3).to_sparse())], r"dense but one is torch.sparse_coo; .* to_dense\(\)"),
        (lambda: [nn.Parameter(torch.eye(3).to_sparse_csr())], "dense but one is torch.sparse_csr"),
        (lambda: [nn.Parameter(torch.zeros(3, device="meta"))], r"one is on the meta device; call to_empty\(\) first"),
        (lambda: [parameter(3), nn.Parameter(torch.zeros(3, device="meta"))], "on one device but are on .*meta"),
        (lambda: [parameter(0), parameter(0, 4)], "at least one parameter that requires a gradient and is not empty"),
        (lambda: [{"params": [p := parameter(3)]}, {"params": [p]}], "appear in more than one parameter group"),
        (lambda: nn.LazyLinear(3).parameters(), "uninitialized parameter"),
        (lambda: [parameter(3) * 2], "non-leaf"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_parameters_that_cannot_be_trained_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        RLEKF(make())


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_given_twice_is_refused():
    p = parameter(3)
    with pytest.raises(ValueError, match="given once but one is given twice"):
        RLEKF([p, p])


def test_tied_parameters_of_a_module_count_once():
    one = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).to(DOUBLE)
    one[2].weight = one[0].weight
    optimizer = RLEKF(one.parameters())
    assert optimizer.filter.plan.num_weights == 9 + 3 + 3
    dense, weights = DenseFilter((15,), 0.98, 0.9987), flat(one)
    one(torch.ones(3, dtype=DOUBLE)).sum().backward()
    dense.step(weights, torch.cat([p.grad.reshape(-1) for p in one.parameters()])[None], [0.5])
    optimizer.update(optimizer.jacobian(), 0.5)
    assert relative(flat(one), weights) < 1e-14
    assert one[2].weight is one[0].weight


def test_empty_parameters_change_nothing():
    with_empty, without = (
        [parameter(0, 4), parameter(3), parameter(0), parameter(2, 2)],
        [parameter(3), parameter(2, 2)],
    )
    for p, q in zip(with_empty[1::2], without, strict=True):
        p.data.copy_(q.data)
    one, other = RLEKF(with_empty, strategy="lekf"), RLEKF(without, strategy="lekf")
    assert one.filter.plan == other.filter.plan
    for seed in range(3):
        update(one, with_empty, seed)
        update(other, without, seed)
    assert same(values(with_empty[1::2]), values(without))


@pytest.mark.parametrize("transpose", [False, True])
def test_a_parameter_that_is_a_view_is_trained_as_its_copy(transpose):
    storage = torch.randn(2, 8, 6, dtype=DOUBLE)
    views = [nn.Parameter(storage[0, :5, ::2].T), nn.Parameter(storage[1].permute(1, 0)[1])]
    copies = [nn.Parameter(v.detach().clone(memory_format=torch.contiguous_format)) for v in views]
    assert not any(v.is_contiguous() for v in views)
    around = storage[0, 5:].clone(), storage[0, :, 1::2].clone()
    one, other = (RLEKF(p, block_size=4, transpose=transpose) for p in (views, copies))
    for seed in range(3):
        update(one, views, seed)
        update(other, copies, seed)
    assert same(values(views), values(copies))
    assert same((storage[0, 5:], storage[0, :, 1::2]), around)


def test_a_parameter_of_memory_that_overlaps_is_refused():
    p = nn.Parameter(torch.zeros(1).expand(4))
    with pytest.raises(RuntimeError, match="refers to a single memory location"):
        update(RLEKF([p]), [p])


def test_sparse_gradients_are_made_dense():
    rows = torch.tensor([1, 3, 1])
    sparse, dense = nn.Embedding(5, 2, sparse=True), nn.Embedding(5, 2)
    dense.load_state_dict(sparse.state_dict())
    for table in (sparse, dense):
        optimizer = RLEKF(table.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            table(rows).square().sum().backward()
            optimizer.update(optimizer.jacobian(), 0.5)
    assert sparse.weight.grad.is_sparse
    assert torch.equal(sparse.weight, dense.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_each_parameter_is_rounded_once_to_its_own_type(dtype):
    mixed = [parameter(4, dtype=dtype), parameter(3), parameter(2, 2, dtype=dtype)]
    optimizer = RLEKF(mixed)
    dense = DenseFilter(optimizer.filter.plan.sizes, 0.98, 0.9987)
    for seed in range(3):
        weights = torch.cat([p.detach().to(DOUBLE).reshape(-1) for p in mixed])
        update(optimizer, mixed, seed)
        dense.step(weights, torch.cat([p.grad.to(DOUBLE).reshape(-1) for p in mixed])[None], [0.5])
        wanted = [part.view(p.shape).to(p.dtype) for p, part in zip(mixed, weights.split([4, 3, 4]), strict=True)]
        for p, w in zip(mixed, wanted, strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=1e-12 if p.dtype == DOUBLE else 0, atol=0)


def test_a_change_of_what_is_trained_is_an_error():
    p, q = parameter(3), parameter(2)
    optimizer = RLEKF([p, q])
    before = values([p, q])
    q.requires_grad_(False)
    with pytest.raises(RuntimeError, match="Other parameters require a gradient than when P was made"):
        update(optimizer, [p])
    q.requires_grad_(True)
    assert same(values([p, q]), before)
    update(optimizer, [p, q])
    q.data = torch.zeros(4, dtype=DOUBLE)
    q.grad = None
    with pytest.raises(RuntimeError, match="have 7 weights but P has 5"):
        update(optimizer, [p, q])


def test_freezing_another_of_the_same_size_is_an_error():
    p, q = parameter(3), parameter(3)
    q.requires_grad_(False)
    optimizer = RLEKF([p, q])
    update(optimizer, [p])
    p.requires_grad_(False)
    q.requires_grad_(True)
    with pytest.raises(RuntimeError, match="make a new RLEKF after changing requires_grad"):
        update(optimizer, [q])


@pytest.mark.parametrize("lr", [-1.0, 0, "1", float("nan")])
def test_a_learning_rate_must_be_above_zero(lr):
    with pytest.raises(OptionError, match="lr must be > 0 but is"):
        RLEKF([parameter(3)], lr=lr)
    with pytest.raises(OptionError, match="lr must be > 0 but is"):
        RLEKF([{"params": [parameter(3)], "lr": lr}])


def test_a_state_of_other_groups_changes_nothing():
    p, q = parameter(3), parameter(2)
    two = RLEKF([{"params": [p]}, {"params": [q]}])
    update(two, [p, q])
    one = RLEKF([parameter(3), parameter(2)])
    before = one.filter.covariance.state.clone(), one.filter.covariance.tiles.clone()
    with pytest.raises(ValueError, match=r"has groups of \[1, 1\] parameters but this one has \[2\]"):
        one.load_state_dict(two.state_dict())
    assert same(before, (one.filter.covariance.state, one.filter.covariance.tiles))


def test_without_any_gradient_nothing_changes():
    model = network()
    optimizer = RLEKF(model.parameters())
    before, state = flat(model), optimizer.filter.covariance.state.clone()
    with pytest.raises(RuntimeError, match=r"No parameter of this optimizer has a gradient: call backward\(\)"):
        optimizer.step(lambda: 1.0)
    assert torch.equal(flat(model), before)
    assert torch.equal(optimizer.filter.covariance.state, state)


@pytest.mark.parametrize("shape", [(3, 2), (6,), (2, 1, 3), (4,), ()])
def test_a_jacobian_of_another_shape_is_refused(shape):
    optimizer = RLEKF([parameter(3)])
    for use in (lambda h: optimizer.update(h, torch.ones(2)), optimizer.variance):
        with pytest.raises(ValueError, match=r"jacobian should have shape \(3,\) or \(M, 3\) but has"):
            use(torch.ones(shape))


# Modes


def test_an_update_under_inference_mode_is_an_update():
    one = [parameter(3), parameter(2)]
    other = [nn.Parameter(p.detach().clone()) for p in one]
    optimizers = RLEKF(one), RLEKF(other)
    for seed in range(3):
        update(optimizers[0], one, seed)
        with torch.inference_mode():
            update(optimizers[1], other, seed)
    assert same(values(one), values(other))
    (grad,) = torch.autograd.grad(other[0].sum(), other[0])  # they still train
    assert torch.equal(grad, torch.ones(3, dtype=DOUBLE))


def test_a_step_under_inference_mode_is_an_error_that_changes_nothing():
    model = network()
    optimizer, before = RLEKF(model.parameters()), flat(model)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="does not require grad"):
        train(model, optimizer, batches(1))
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.soak)])
def test_a_compiled_training_step_is_the_plain_one(backend):
    def train_step(model, optimizer, x, y):
        optimizer.zero_grad()
        prediction = model(x).mean()
        prediction.backward()
        optimizer.update(optimizer.jacobian(), (y.mean() - prediction).detach())

    plain, compiled = network(), network()
    settings = {"block_size": 50, "max_pending": 3}
    one, other = RLEKF(plain.parameters(), **settings), RLEKF(compiled.parameters(), **settings)
    torch.compiler.reset()
    compiled_step = torch.compile(train_step, backend=backend)
    for x, y in batches(4):
        train_step(plain, one, x, y)
        compiled_step(compiled, other, x, y)
    assert relative(flat(compiled), flat(plain)) <= (0.0 if backend == "aot_eager" else 1e-13)
    assert other.health()["num_updates"] == 4


# Several optimizers at once


def trained(seed, size=200, steps=15):
    """The weights after a separate training; large enough for the kernels to divide their work among threads."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Linear(size, 2).to(DOUBLE)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=DOUBLE)
    optimizer = RLEKF(model.parameters(), block_size=150 + seed, max_pending=5)
    for _ in range(steps):
        x = torch.randn(size, generator=generator, dtype=DOUBLE)
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.update(optimizer.jacobian(), 0.5)
        yield
    yield flat(model)


def last(training):
    *_, weights = training
    return weights


def test_two_optimizers_in_turn_are_two_optimizers():
    alone = [last(trained(seed)) for seed in (0, 1)]
    *_, together = zip(trained(0), trained(1), strict=True)
    assert same(together, alone)
    assert not torch.equal(*alone)


def test_four_threads_train_the_bits_of_one():
    alone = [last(trained(seed)) for seed in range(4)]
    for _ in range(3):
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda seed: last(trained(seed)), range(4)))
        assert same(together, alone)


# Copies


def saved(optimizer):
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o)), saved])
def test_a_copy_of_the_optimizer_alone_goes_on_with_parameters_of_its_own(copied):
    first, second = parameter(4, 3), parameter(3, dtype=torch.float32)
    groups = [{"params": [("a.weight", first)], "lr": 0.5}, {"params": [("a.bias", second)]}]
    optimizer = RLEKF(groups, strategy="lekf", max_pending=3, transpose=True, backend="reference", process_noise=1e-3)
    for seed in range(5):
        update(optimizer, [first, second], seed)
    other = copied(optimizer)
    assert repr(other) == repr(optimizer)
    theirs = [p for group in other.param_groups for p in group["params"]]
    before = values([first, second])
    for seed in range(5, 10):
        update(other, theirs, seed)
    assert same(values([first, second]), before)
    for seed in range(5, 10):
        update(optimizer, [first, second], seed)
    assert same(values(theirs), values([first, second]))
    assert torch.equal(other.filter.covariance.state, optimizer.filter.covariance.state)
    with pytest.raises(RuntimeError, match="give it all parameters then"):
        other.add_param_group({"params": [parameter(1)]})


# Everything at once, against the dense filter


@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=5),
    cut=st.integers(0, 5),
    rates=st.tuples(*[st.sampled_from([1.0, 0.5, 1e-3])] * 2),
    frozen=st.integers(0, 5),
    strategy=st.sampled_from(["rlekf", "deepmd", "lekf", "sekf", "gekf"]),
    block_size=st.integers(20, 150),
    pending=st.integers(1, 12),
    count=st.integers(1, 10),
    model_dtype=st.sampled_from([torch.float64, torch.float32]),
    covariance_dtype=st.sampled_from([torch.float64, torch.float32]),
    transpose=st.booleans(),
    process_noise=st.sampled_from([0.0, 1e-3]),
    backend=st.sampled_from(["native", "reference"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_oracle_on_any_model(
    shapes, cut, rates, frozen, strategy, block_size, pending, count, model_dtype, covariance_dtype, transpose,
    process_noise, backend, seed,
):  # fmt: skip
    """Groups with different rates, frozen and empty parameters, matrices stored either way, several rows at once."""
    torch.manual_seed(seed)
    parameters = [parameter(*shape, dtype=model_dtype) for shape in shapes] + [parameter(2, 3, dtype=model_dtype)]
    if frozen < len(shapes):
        parameters[frozen].requires_grad_(False)
    trained = [p for p in parameters if p.requires_grad]
    groups = [{"params": part, "lr": lr} for part, lr in zip((parameters[:cut], parameters[cut:]), rates, strict=True)]
    optimizer = RLEKF(
        [group for group in groups if group["params"]],
        strategy=strategy,
        block_size=block_size,
        max_pending=pending,
        covariance_dtype=covariance_dtype,
        transpose=transpose,
        process_noise=process_noise,
        backend=backend,
    )
    lr = torch.cat(
        [
            torch.full((p.numel(),), group["lr"], dtype=DOUBLE)
            for group in groups
            for p in group["params"]
            if p.requires_grad
        ]
    )
    dense = DenseFilter(optimizer.filter.plan.sizes, 0.98, 0.9987, q=process_noise)

    def stored(tensors):
        """As one vector, in the order in which the network computes."""
        return torch.cat(
            [(t.permute(tuple(range(t.dim())[::-1])) if transpose else t).reshape(-1).to(DOUBLE) for t in tensors]
        )

    with torch.no_grad():
        for _ in range(4):
            rows = [[torch.randn(p.shape, dtype=model_dtype) for p in trained] for _ in range(count)]
            innovation = torch.randn(count, dtype=DOUBLE)
            jacobian = torch.stack([stored(row) for row in rows])
            before, increment = stored(trained), torch.zeros(jacobian.shape[1], dtype=DOUBLE)
            dense.step(increment, jacobian, innovation)
            optimizer.update(torch.stack([optimizer.flatten(row) for row in rows]), innovation)
            wanted = (before + lr * increment).to(model_dtype).to(DOUBLE)
            exact = torch.float32 not in (model_dtype, covariance_dtype)
            assert relative(stored(trained), wanted) < (1e-12 if exact else 1e-5)
    torch.testing.assert_close(
        torch.block_diag(*optimizer.filter.covariance.dense()),
        torch.block_diag(*dense.blocks),
        atol=1e-12 if covariance_dtype == DOUBLE else 1e-5,
        rtol=0,
    )
