"""Builders shared by several test files."""

import torch

from rlekf_ext.potential.model import DeepPotential


def make_model(
    type_map=("A", "B"),
    sel=(30, 30),
    rcut=4.0,
    *,
    fitting_neuron=(5, 5),
    fitting_resnet_dt=False,
    precision="float64",
    seed=1,
    frames=(),
    energy_bias=None,
    **descriptor,
):
    """A small network, with statistics of the frames if there are any; other keywords are the descriptor's."""
    model = DeepPotential(
        {
            "type_map": type_map,
            "descriptor": {"sel": sel, "rcut": rcut, "neuron": (3, 6), "axis_neuron": 2, **descriptor},
            "fitting_net": {"neuron": fitting_neuron, "resnet_dt": fitting_resnet_dt},
            "precision": precision,
        },
        seed=seed,
    )
    if frames:
        model.descriptor.fit_statistics(frames)
    if energy_bias is not None:
        model.energy_bias.copy_(torch.tensor(energy_bias, dtype=torch.float64))
    return model
