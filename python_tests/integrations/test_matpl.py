"""The calls that MatPL's and PWMLFF's trainers make of LKFOptimizer, in their order, against a dense LKF.

`Dense` is LKF as those trainers see it: its constructor, its methods, and what it saves.
"""

import math
import os

import pytest
import torch
from oracles import DenseFilter, relative

from rlekf_ext import RLEKF
from rlekf_ext.integrations.lkf import LKFOptimizer

# The tensors have 36, 72, 6, 6 and 1 weights. LKF gathers neighbours, splits large ones and leaves the rest alone.
BLOCKS = {30: [30, 6, 30, 30, 12, 13], 40: [36, 40, 32, 13], 5120: [121]}
ATOMS, GROUP = 5, 6


def reverse(tensor):
    return tensor.permute(tuple(reversed(range(tensor.dim()))))


class Dense(torch.optim.Optimizer):
    """LKF's equations (oracles.py) behind LKF's calls; each tensor is flattened with its dimensions reversed."""

    def __init__(self, params, kalman_lambda=0.98, kalman_nue=0.9987, block_size=5120, p0_weight=None):
        super().__init__(params, {"lr": 0.1, "kalman_nue": kalman_nue, "block_size": block_size})
        self.params = self.param_groups[0]["params"]
        p0 = 1.0 if p0_weight is None else p0_weight
        self.filter = DenseFilter(BLOCKS[block_size], kalman_lambda, kalman_nue, p0)

    def set_grad_prefactor(self, grad_prefactor):
        self.grad_prefactor = grad_prefactor

    def flat(self, tensors):
        return torch.cat([reverse(t).reshape(-1) for t in tensors])

    def jacobian(self):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        return self.flat(gradients) / self.grad_prefactor

    @torch.no_grad()
    def step(self, error):
        moved = self.flat(self.params)
        self.filter.step(moved, self.jacobian()[None], [error])
        for p, piece in zip(self.params, moved.split([p.numel() for p in self.params]), strict=True):
            reverse(p).copy_(piece.view(reverse(p).shape))

    def cal_kpu(self):
        h = self.jacobian()
        return (h @ torch.block_diag(*self.filter.blocks) @ h).reshape(1, 1)

    def state_dict(self):
        f = self.filter
        state = {"kalman_lambda": f.lam, "P": f.blocks, "weights_num": len(f.sizes), "params_packed_index": f.sizes}
        return {**super().state_dict(), "state": {0: state}}


class Network(torch.nn.Module):
    """Energies, forces and virials; like NEP's, its first parameter has four dimensions."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        for name, shape in {"c": (2, 3, 2, 3), "w": (12, 6), "b": (6,), "v": (6, 1), "shift": (1,)}.items():
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64) / 2
            self.register_parameter(name, torch.nn.Parameter(drawn))

    def forward(self, position):
        x = position.clone().requires_grad_()
        features = torch.einsum("fni,aicj->fnacj", x, self.c).tanh().flatten(2)
        energy = ((features @ self.w + self.b).tanh() @ self.v + self.shift).sum(1)
        (gradient,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return energy, -gradient, -(gradient.mT @ x).flatten(1)


class Updates:
    """One batch, as the trainers' KFOptimizerWrapper makes it."""

    def __init__(self, model, optimizer):
        self.model, self.optimizer = model, optimizer

    def update(self, part, label, grad_prefactor, update_prefactor):
        """The update of one part of the prediction; the error keeps its graph, as theirs does."""
        self.optimizer.set_grad_prefactor(grad_prefactor)
        self.optimizer.zero_grad()
        predicted = part(self.model(self.position))
        error = (part(label) - predicted) / ATOMS
        mask = error < 0
        error = error * update_prefactor
        error[mask] = -1 * error[mask]
        signed = update_prefactor * predicted
        signed[mask] = -1.0 * signed[mask]
        signed.sum().backward(retain_graph=True)
        self.optimizer.step(error.mean() * math.sqrt(len(self.position)))

    def batch(self, position, label):
        self.position = position
        self.update(lambda out: out[2][:, [0, 1, 2, 4, 5, 8]], label, ATOMS, 0.5)
        self.update(lambda out: out[0], label, ATOMS, 1.0)
        for group in torch.arange(2 * GROUP).view(-1, GROUP) % ATOMS:
            self.update(lambda out, group=group: out[1][:, group], label, ATOMS * GROUP * 3, 2.0)


def load_model_optimizer(kind, block_size=40, file=None, takes_p=True, **loading):
    """The trainers' function of this name. `takes_p`: MatPL's nn_network stops after load_state_dict."""
    checkpoint = torch.load(file, **loading) if file else None
    model = Network()
    if checkpoint:
        model.load_state_dict(checkpoint["state_dict"])
    optimizer = kind(model.parameters(), 0.98, 0.9987, block_size, 0.01)
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        if takes_p and "P" in checkpoint["optimizer"]["state"][0]:
            load_p = checkpoint["optimizer"]["state"][0]["P"]
            optimizer.set_kalman_P(load_p, checkpoint["optimizer"]["state"][0]["kalman_lambda"])
    return model, optimizer


def train(model, optimizer, epochs):
    updates = Updates(model, optimizer)
    for epoch in epochs:
        generator = torch.Generator().manual_seed(epoch)
        position = torch.randn(3, ATOMS, 3, generator=generator, dtype=torch.float64)
        x = position.flatten(1)
        energy, virial = x.sin().sum(1, keepdim=True), torch.randn(3, 9, generator=generator, dtype=torch.float64)
        updates.batch(position, (energy, -position.cos(), virial))


def save(model, optimizer, file):
    torch.save({"epoch": 1, "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    return file


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("block_size", BLOCKS)
def test_trains_as_lkf_does(block_size):
    model, optimizer = load_model_optimizer(LKFOptimizer, block_size)
    theirs, dense = load_model_optimizer(Dense, block_size)
    assert torch.equal(optimizer.state_dict()["state"][0]["P"][-1], dense.filter.blocks[-1])  # p0_weight I
    for network, kind in ((model, optimizer), (theirs, dense)):
        train(network, kind, range(10))
    start = flat(Network())
    assert relative(flat(model) - start, flat(theirs) - start) < 1e-10
    state = optimizer.state_dict()["state"][0]
    assert [len(block) for block in state["P"]] == BLOCKS[block_size]
    assert relative(torch.block_diag(*state["P"]), torch.block_diag(*dense.filter.blocks)) < 1e-12
    assert state["kalman_lambda"] == pytest.approx(dense.filter.lam, abs=1e-14)


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("takes_p", [True, False])
def test_restart_goes_on_bit_for_bit(tmp_path, takes_p, weights_only):
    model, optimizer = load_model_optimizer(LKFOptimizer)
    train(model, optimizer, range(3))
    file = save(model, optimizer, tmp_path / "dp_model.ckpt")
    train(model, optimizer, range(3, 6))
    again, restarted = load_model_optimizer(LKFOptimizer, 40, file, takes_p, weights_only=weights_only)
    train(again, restarted, range(3, 6))
    assert torch.equal(flat(again), flat(model))
    assert torch.equal(restarted.filter.covariance.state, optimizer.filter.covariance.state)


def test_p_and_lambda_alone_go_on(tmp_path):
    model, optimizer = load_model_optimizer(LKFOptimizer)
    train(model, optimizer, range(3))
    state = torch.load(save(model, optimizer, tmp_path / "dp_model.ckpt"))["optimizer"]["state"][0]
    dense = [block.cpu() for block in state["P"]]
    for p in (state["P"], dense, state["P"][:]):
        again, restarted = load_model_optimizer(LKFOptimizer)
        again.load_state_dict(model.state_dict())
        restarted.set_kalman_P(p, 0.99)
        assert restarted.filter.memory_factor == pytest.approx(0.99, abs=1e-15)
        assert relative(torch.block_diag(*restarted.filter.covariance.dense()), torch.block_diag(*dense)) < 1e-14
    with pytest.raises(IndexError):
        state["P"][4]


@pytest.mark.parametrize("takes_p", [True, False])
def test_restart_from_a_checkpoint_of_lkf(tmp_path, takes_p):
    theirs, dense = load_model_optimizer(Dense)
    dense.filter.nu = dense.param_groups[0]["kalman_nue"] = 0.99
    train(theirs, dense, range(3))
    file = save(theirs, dense, tmp_path / "dp_model.ckpt")
    start = flat(theirs)
    train(theirs, dense, range(3, 8))
    model, optimizer = load_model_optimizer(LKFOptimizer, 40, file, takes_p)
    train(model, optimizer, range(3, 8))
    assert relative(flat(model) - start, flat(theirs) - start) < 1e-10
    assert optimizer.filter.memory_factor == pytest.approx(dense.filter.lam, abs=1e-14)
    _, other = load_model_optimizer(LKFOptimizer, 30)
    before = other.state_dict()["state"][0]["P"][0]
    with pytest.raises(ValueError, match=r"sizes \[30, 6, 30, 30, 12, 13\] but has \[36, 40, 32, 13\]; use the"):
        other.load_state_dict(torch.load(file)["optimizer"])
    assert torch.equal(other.state_dict()["state"][0]["P"][0], before)


def test_uncertainty():
    """The energy's, then each component's of a few forces, as MatPL's cal_kpu_etot and cal_kpu_force ask for it."""
    values, frame = [], torch.randn(1, ATOMS, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    for kind in (LKFOptimizer, Dense):
        model, optimizer = load_model_optimizer(kind)
        train(model, optimizer, range(5))
        before, found = flat(model), []
        optimizer.set_grad_prefactor(ATOMS)
        optimizer.zero_grad()
        (model(frame)[0] / ATOMS).backward()
        kpu = optimizer.cal_kpu()
        assert kpu.shape == (1, 1)
        found.append(float(kpu))
        optimizer.set_grad_prefactor(1)
        for atom in (0, 3):
            for axis in range(3):
                optimizer.zero_grad()
                energy, force, _ = model(frame)
                (force[0][atom][axis] + force.sum() * 0 + energy.sum() * 0).backward()
                found.append(float(optimizer.cal_kpu()))
        values.append(torch.tensor(found))
        assert torch.equal(flat(model), before)
    torch.testing.assert_close(*values, rtol=1e-10, atol=0)
    assert values[0].min() > 0


def test_a_checkpoint_stores_p_once(tmp_path):
    model = torch.nn.Linear(40, 25)
    for kind in (LKFOptimizer, RLEKF):
        torch.save(kind(model.parameters()).state_dict(), tmp_path / kind.__name__)
    dense = 8 * 1025**2
    sizes = [os.path.getsize(tmp_path / kind.__name__) for kind in (LKFOptimizer, RLEKF)]
    assert sizes[0] < sizes[1] + 5000 < dense
