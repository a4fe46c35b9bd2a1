"""The stepper, and the examples that use it."""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers import load_example

from rlekf_ext import RLEKF
from rlekf_ext.stepper import Stepper


def test_a_step_is_that_of_the_closure():
    x, y = torch.randn(20, 3), torch.randn(20, 2)
    one, two = (torch.nn.Linear(3, 2, dtype=torch.float32) for _ in range(2))
    two.load_state_dict(one.state_dict())
    stepper, optimizer = Stepper(RLEKF(one.parameters())), RLEKF(two.parameters())
    for _ in range(5):
        error = stepper(one(x), y, scale=2.0)

        def closure():
            optimizer.zero_grad()
            loss = 2 * (two(x) - y).abs().mean()
            loss.backward()
            return loss

        assert float(optimizer.step(closure).detach()) == pytest.approx(2 * float(error))
    assert torch.equal(one.weight, two.weight)


def test_shapes_must_agree():
    w = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"\(3,\) but has \(3, 1\)"):
        Stepper(RLEKF([w]))(2 * w, torch.ones(3, 1))


def test_bare_loop(capsys):
    load_example("bare_loop").main()
    first, *_, last = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert last < 0.3 * first


def test_lightning(monkeypatch):
    """The example's module, driven by the calls that Lightning makes under manual optimization."""
    if importlib.util.find_spec("lightning") is None:

        class Module(torch.nn.Module):
            def optimizers(self, use_pl_optimizer=True):
                assert not use_pl_optimizer
                return self.made

            def manual_backward(self, loss):
                loss.backward()

            def log(self, name, value, **_):
                self.logged = float(value)

        lightning = ModuleType("lightning")
        lightning.LightningModule, lightning.Trainer = Module, SimpleNamespace
        monkeypatch.setitem(sys.modules, "lightning", lightning)
        example = load_example("lightning_module")
        model = example.Regression()
        model.made = model.configure_optimizers()
        errors = []
        for i in range(100):
            model.training_step(example.batch(i), i)
            errors.append(model.logged)
        assert sum(errors[-10:]) < 0.3 * sum(errors[:10])
    else:
        load_example("lightning_module").main()
