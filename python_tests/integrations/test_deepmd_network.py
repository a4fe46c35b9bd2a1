"""The network of this package on the parameters of another model, with models of ours in the part of DeePMD-kit's."""

from types import SimpleNamespace

import pytest
import torch
from helpers import make_model

from rlekf_ext.errors import DataError, InputError
from rlekf_ext.integrations.deepmd.network import OwnNetwork
from rlekf_ext.integrations.deepmd.optimizer import DeepmdRLEKF, Settings
from rlekf_ext.potential.deepmd_format import export_model
from rlekf_ext.potential.neighbors import make_frame
from rlekf_ext.updates import ERRORS

RCUT = 4.0


def dp_model(num_atoms=7, **settings):
    torch.manual_seed(3)
    inputs, _ = batch(1, num_atoms=num_atoms)
    frame = make_frame(inputs["coord"].reshape(-1, 3), inputs["box"].reshape(3, 3), inputs["atype"][0].numpy(), RCUT, 2)
    model = make_model(rcut=RCUT, frames=[frame], **settings)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def own_of(model, trained=None):
    parameters = list(model.parameters())
    save = lambda path: export_model(model, path)  # noqa: E731
    return OwnNetwork(save, parameters[::-1], parameters if trained is None else trained)


def batch(count=2, seed=0, num_atoms=7):
    """As DeePMD-kit has it, and the labels in the form of Updates.frame()."""
    draw = torch.Generator().manual_seed(seed)
    grid = torch.cartesian_prod(*[torch.arange(2.0, dtype=torch.float64)] * 3)[:num_atoms]
    coord = 2.1 * grid + 0.3 * torch.rand(count, num_atoms, 3, dtype=torch.float64, generator=draw)
    box = (8.5 * torch.eye(3, dtype=torch.float64)).reshape(1, 9).repeat(count, 1)
    labels = SimpleNamespace(
        energy=torch.randn(count, dtype=torch.float64, generator=draw),
        forces=torch.randn(num_atoms, count, 3, dtype=torch.float64, generator=draw),
        virial=torch.randn(count, 3, 3, dtype=torch.float64, generator=draw),
        num_atoms=torch.full((count,), num_atoms),
    )
    types = (torch.arange(num_atoms) % 2).repeat(count, 1)
    return {"coord": coord.reshape(count, -1), "atype": types, "box": box}, labels


def exact(model, inputs, labels):
    """What the model predicts for the batch, in the form of Updates.frame()."""
    found = [
        model(make_frame(points.reshape(-1, 3), box.reshape(3, 3), types.numpy(), RCUT, 2, dtype=model.dtype))
        for points, box, types in zip(inputs["coord"], inputs["box"], inputs["atype"], strict=True)
    ]
    return SimpleNamespace(
        energy=torch.cat([f.energy for f in found]),
        forces=torch.stack([f.forces for f in found], 1),
        virial=torch.cat([f.virial for f in found]),
    )


def test_weights_are_shared_and_unchanged():
    model = dp_model()
    before = [p.detach().clone() for p in model.parameters()]
    own = own_of(model)
    for mine, theirs, value in zip(own.model.parameters(), model.parameters(), before, strict=True):
        assert mine.data_ptr() == theirs.data_ptr()
        assert torch.equal(theirs, value)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("kind", ["energy", "force", "virial"])
def test_measurements_are_those_of_the_model(kind, shuffled):
    model = dp_model(type_one_side=True, fitting_resnet_dt=True)
    trained = list(model.parameters())
    if shuffled:  # and some are not trained
        trained = trained[3:][::-1]
    own = own_of(model, trained)
    inputs, labels = batch()
    frame = own.frame(inputs, labels)
    assert own.check(frame, exact(model, inputs, labels), print) < 1e-9
    own.model.table.nodes = own.model.table.refined
    atoms = torch.tensor([5, 0, 2]) if kind == "force" else None
    error, jacobian = own.measured(own.frame(inputs, labels))([(kind, atoms)])
    wanted = ERRORS[kind](exact(model, inputs, labels), labels, atoms)
    gradients = torch.autograd.grad(-wanted, trained, allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for p, g in zip(trained, gradients, strict=True)]
    flat = torch.cat([(g.mT if g.dim() == 2 else g).flatten() for g in filled])
    assert float(error[0]) == pytest.approx(wanted.item(), rel=1e-5)
    assert float((jacobian[0] - flat).norm() / flat.norm()) < 1e-4


def test_predictions():
    model = dp_model()
    own, (inputs, labels) = own_of(model), batch()
    found, wanted = own.predict(own.frame(inputs, labels)), exact(model, inputs, labels)
    assert found["energy"].shape == (2, 1)
    torch.testing.assert_close(found["energy"][:, 0], wanted.energy, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["force"].transpose(0, 1), wanted.forces, rtol=1e-4, atol=1e-4)


def test_another_model_is_seen():
    model = dp_model()
    own, (inputs, labels) = own_of(model), batch()
    theirs = exact(model, inputs, labels)
    theirs.energy[1] += 1e-6
    with pytest.raises(InputError, match=r"differ by 1\.4e-07 from dp's own, more than 1e-09"):
        own.check(own.frame(inputs, labels), theirs, print)


def test_what_the_networks_here_do_not_have():
    model = dp_model()
    with pytest.raises(InputError, match="trains parameters that the networks here do not have"):
        own_of(model, [*model.parameters(), torch.nn.Parameter(torch.zeros(2))])

    def save(path):
        path.write_bytes(b"no file of DeePMD-kit")

    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(InputError, match=r"^not a whole \.dp file"):
        OwnNetwork(save, list(model.parameters()), [])
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), before, strict=True))


def test_more_neighbours_than_sel():
    model = dp_model(4, sel=[3, 3])
    own, (inputs, labels) = own_of(model), batch()
    with pytest.raises(DataError, match="sel"):
        own.measured(own.frame(inputs, labels))


def test_a_model_that_cannot_be_read_is_for_dp(caplog):
    def make():
        raise NotImplementedError("serialize")

    options = Settings.of({"optimizer": {"type": "RLEKF", "prior": "identity"}, "training": {}})
    optimizer = DeepmdRLEKF(dp_model().named_parameters(), options)
    optimizer.make_network, (inputs, labels) = make, batch()
    with caplog.at_level("INFO", "deepmd.rlekf_ext"):
        for _ in range(2):
            optimizer.on_own_network(labels, inputs)
    assert labels.measure is None
    said = [record.getMessage() for record in caplog.records if "own network" in record.getMessage()]
    assert said == [
        "RLEKF makes its updates with dp's own network: dp's model cannot be read (NotImplementedError('serialize'))."
    ]
