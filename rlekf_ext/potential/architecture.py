"""The settings of a network, once: DeePMD-kit's names for them, with types, defaults and ranges.

Input files, models, checkpoints and DeePMD-kit's .dp files all go through the fields of these classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

import torch

from rlekf_ext.errors import OptionError
from rlekf_ext.schema import join, option, shown


@dataclass(frozen=True)
class DescriptorArchitecture:
    """The se_e2_a descriptor."""

    sel: tuple[int, ...] = option(help="Neighbour slots of each element: the most neighbours an atom may have.", low=0)
    rcut: float = option(6.0, "The cutoff radius in Å.", above=0, high=100)
    rcut_smth: float = option(0.5, "Where the switching function begins, in Å.", low=0)
    neuron: tuple[int, ...] = option((25, 25, 25), "Widths of the embedding nets.", low=1, high=10_000)
    axis_neuron: int = option(
        16,
        "Outputs of the embedding nets that form the second factor. Default: 16, or the last of `neuron` if less.",
        low=1,
        also=("n_axis_neuron",),
    )
    resnet_dt: bool = option(False, "Whether shortcuts of the embedding nets have a trainable time step.")
    type_one_side: bool = option(False, "Whether embedding nets depend on the neighbour's element alone.")


@dataclass(frozen=True)
class FittingArchitecture:
    """The fitting nets, from the descriptor to the atomic energy."""

    neuron: tuple[int, ...] = option(
        (50, 50, 50), "Widths of the hidden layers.", low=1, high=10_000, also=("n_neuron",)
    )
    resnet_dt: bool = option(False, "Whether shortcuts have a trainable time step.")


@dataclass(frozen=True)
class Architecture:
    """All settings that fix what a network computes from its weights; the defaults are the RLEKF paper's network.

    `schema.read(Architecture, mapping, "model")` makes one from a mapping and checks ranges. Raises OptionError if
    settings do not fit together. `type_map` has the elements in the order of their numbers.
    """

    type_map: tuple[str, ...]
    descriptor: DescriptorArchitecture
    fitting_net: FittingArchitecture = FittingArchitecture()
    precision: str = option(
        "float64", "Of weights, edges and forces; energies are float64.", choices=("float64", "float32")
    )

    def __post_init__(self) -> None:
        names, d = self.type_map, self.descriptor
        rules = [
            (len(set(names)) == len(names), f"model/type_map must name each element once but is: {shown(names)}."),
            (
                len(d.sel) == len(names),
                f"model/descriptor/sel must have a number for each of the {len(names)} elements of model/type_map but "
                f'is: {shown(d.sel)}; "auto" counts the neighbours for you.',
            ),
            (any(d.sel), f"model/descriptor/sel must have a number above 0 but is: {shown(d.sel)}."),
            (
                d.rcut_smth < d.rcut,
                f"model/descriptor/rcut_smth must be < rcut = {d.rcut} Å but is: {d.rcut_smth} Å.",
            ),
            (
                d.axis_neuron <= d.neuron[-1],
                f"model/descriptor/axis_neuron must be <= {d.neuron[-1]}, the last number of neuron, but is: "
                f"{d.axis_neuron}.",
            ),
        ]
        for holds, sentence in rules:
            if not holds:
                raise OptionError(sentence)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, edges and forces."""
        return getattr(torch, self.precision)


def plain(section: Any) -> dict[str, Any]:
    """A section as JSON has it: dicts, lists, strings, numbers; `schema.read` makes the section of it again."""
    return asdict(section, dict_factory=lambda items: {k: list(v) if isinstance(v, tuple) else v for k, v in items})


def differences(one: Any, other: Any, path: str = "model") -> Iterator[tuple[str, Any, Any]]:
    """The settings in which two architectures differ: path in an input file, value in `one`, value in `other`."""
    for f in fields(one):
        mine, theirs, place = getattr(one, f.name), getattr(other, f.name), join(path, f.name)
        if is_dataclass(mine):
            yield from differences(mine, theirs, place)
        elif mine != theirs:
            yield place, mine, theirs
