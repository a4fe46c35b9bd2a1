"""The settings of a network: what is read, what is refused, and that plain values lose nothing."""

import json

import pytest

from rlekf_ext.errors import OptionError
from rlekf_ext.potential.architecture import (
    Architecture,
    DescriptorArchitecture,
    FittingArchitecture,
    differences,
    plain,
)
from rlekf_ext.potential.model import DeepPotential
from rlekf_ext.schema import read

EXAMPLE = Architecture(
    ("Na", "Cl"),
    DescriptorArchitecture((30, 40), 5.0, neuron=(4, 8), axis_neuron=3),
    FittingArchitecture((6,)),
    "float32",
)


def test_plain_values_are_read_back():
    assert read(Architecture, json.loads(json.dumps(plain(EXAMPLE))), "model") == EXAMPLE


def test_defaults_are_the_papers_network():
    found = read(Architecture, {"type_map": ["Cu"], "descriptor": {"sel": [100]}})
    assert found == Architecture(
        ("Cu",),
        DescriptorArchitecture((100,), 6.0, 0.5, (25, 25, 25), 16, False, False),
        FittingArchitecture((50, 50, 50), False),
        "float64",
    )


def test_differences_name_the_setting():
    other = plain(EXAMPLE)
    assert list(differences(EXAMPLE, read(Architecture, other))) == []
    other["descriptor"]["rcut"], other["precision"] = 4.5, "float64"
    assert list(differences(EXAMPLE, read(Architecture, other))) == [
        ("model/descriptor/rcut", 5.0, 4.5),
        ("model/precision", "float32", "float64"),
    ]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("type_map", ["Na", "Na"], 'model/type_map must name each element once but is: ["Na", "Na"].'),
        ("type_map", None, "model/type_map must be a list of strings"),
        ("descriptor/sel", [1], "model/descriptor/sel must have a number for each of the 2 elements of model/type_map"),
        ("descriptor/sel", [1, -2], "model/descriptor/sel[1] must be >= 0 but is: -2."),
        ("descriptor/sel", [0, 0], "model/descriptor/sel must have a number above 0 but is: [0, 0]."),
        ("descriptor/rcut", 0, "model/descriptor/rcut must be > 0 but is: 0."),
        ("descriptor/rcut_smth", 5.0, "model/descriptor/rcut_smth must be < rcut = 5.0 Å but is: 5.0 Å."),
        ("descriptor/axis_neuron", 9, "axis_neuron must be <= 8, the last number of neuron, but is: 9."),
        ("descriptor/activation_function", "relu", "model/descriptor/activation_function is not a known option"),
        ("fitting_net/neuron", [], "model/fitting_net/neuron must be a list of whole numbers, not empty"),
        ("precision", "float16", 'model/precision = "float16" is not supported; supported: "float64", "float32".'),
    ],
)
def test_what_a_network_cannot_be(place, value, message):
    given = plain(EXAMPLE)
    section, _, name = place.rpartition("/")
    (given[section] if section else given)[name] = value
    with pytest.raises(OptionError) as caught:
        DeepPotential(given)
    assert message in str(caught.value)


def test_a_network_checks_ranges_of_an_architecture_made_by_hand():
    with pytest.raises(OptionError, match="model/descriptor/neuron"):
        DeepPotential(Architecture(("Na",), DescriptorArchitecture((3,), neuron=(0, 16))))
