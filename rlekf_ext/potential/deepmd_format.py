"""Models in DeePMD-kit's `.dp` format: what `dp convert-backend` makes .pth and .pb files of, and back.

A `.dp` file is HDF5: one data set an array, and in the attribute `json` of the root a tree that names them: the
`serialize()` of DeePMD-kit's standard model. `_tree` is that tree of a model of ours; exporting writes it, and
importing compares the file with it, node by node. What is not in the comparison cannot slip through: a setting of
DeePMD-kit that we have no counterpart for is an error, whatever its name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlekf_ext import _C
from rlekf_ext.errors import InputError
from rlekf_ext.potential.architecture import Architecture, DescriptorArchitecture, FittingArchitecture, plain
from rlekf_ext.potential.descriptor import Network
from rlekf_ext.potential.files import check_writable, reading, write_atomically
from rlekf_ext.potential.model import DeepPotential
from rlekf_ext.schema import read, shown

# The versions that DeePMD-kit 3.0 writes, which every later one reads, and the newest whose meaning is known here.
VERSIONS = {
    "Model": (2, 2),
    "Descriptor": (2, 3),
    "Fitting": (2, 4),
    "NetworkCollection": (1, 1),
    "EmbeddingNetwork": (2, 2),
    "FittingNetwork": (1, 1),
    "Layer": (1, 2),
}
# Nodes that say how a model was trained or is to be trained, not what it computes.
IRRELEVANT = {"trainable", "rcond", "preset_out_bias", "set_davg_zero", "out_std"}
SYNONYMS = {"default": "float64", "double": "float64", "single": "float32", "linear": "none"}


def export_model(model: DeepPotential, path: str | Path) -> None:
    """Write the model as DeePMD-kit's `.dp` file; `dp convert-backend model.dp model.pth` makes one for LAMMPS of it.

    DeePMD-kit >= 3.0 computes the same energies, forces and virials from it, up to rounding, as long as no atom has
    more neighbours than sel: there this package raises an error, while DeePMD-kit leaves out the farthest. The weights
    and statistics are written as they are, bit for bit, with HDF5's checksums.

    Raises InputError if the name does not end in .dp or the file cannot be written.
    """
    import h5py  # an optional package: only those who exchange models need it

    path = _checked_name(path)
    check_writable(path)
    described = {
        "software": "rlekf_ext",
        "version": _C.build_info()["version"],
        "model": _tree(model),
        "model_def_script": _input_section(model),
        "@variables": {},
    }

    def write(temporary: Path) -> None:
        with h5py.File(temporary, "w", libver=("v110", "v110")) as file:  # whose metadata have checksums

            def stored(node: Any) -> Any:
                """The tree with names instead of arrays."""
                if isinstance(node, dict):
                    return {key: stored(value) for key, value in node.items()}
                if isinstance(node, list):
                    return [stored(value) for value in node]
                if not isinstance(node, Tensor):
                    return node
                array = node.detach().cpu().numpy()
                name = f"variable_{len(file):04d}"
                return file.create_dataset(name, data=array, chunks=array.shape, fletcher32=True).name

            file.attrs["json"] = json.dumps(stored(described), separators=(",", ":"))

    try:
        write_atomically(path, write)
    except RuntimeError as error:  # h5py makes an OSError or this of a full disk
        raise InputError(f"{path} cannot be written: {error}.") from error


def import_model(path: str | Path) -> DeepPotential:
    """Read DeePMD-kit's `.dp` file of an energy model with the descriptor se_e2_a and tanh networks.

    The model computes what DeePMD-kit computes from the file, up to rounding; but an atom with more neighbours than sel
    is an error here, where DeePMD-kit leaves out the farthest. No code of the file is run.

    Raises InputError if the file is missing or damaged, or asks for what this package does not have: another
    descriptor or activation function, excluded types, spin, frame or atomic parameters, mixed precisions, compression.
    """
    import h5py

    path = _checked_name(path)
    with reading(path), path.open("rb"):  # the system's words are better than HDF5's
        pass
    try:
        with _damage_named():
            file = h5py.File(path, "r")
        with file:
            return _built(file)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


@contextmanager
def _damage_named() -> Iterator[None]:
    """Inside, whatever a damaged file makes of h5py is one InputError: HDF5's own words help nobody."""
    try:
        yield
    except Exception as error:
        raise InputError(
            "not a whole .dp file of DeePMD-kit: take another copy, or make one of a .pth or .pb file by "
            "`dp convert-backend`."
        ) from error


def _checked_name(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix != ".dp":
        raise InputError(
            f"Models are exchanged with DeePMD-kit in files that end in .dp, but this one is called {path}: "
            "`dp convert-backend` turns .pth and .pb files into .dp files, and back."
        )
    return path


# The tree


def _tree(model: DeepPotential) -> dict[str, Any]:
    """DeePMD-kit's serialized form, with tensors as arrays."""
    architecture, descriptor, type_map = model.architecture, model.descriptor, list(model.type_map)
    ours, fitting, precision = architecture.descriptor, architecture.fitting_net, architecture.precision
    num_types = len(type_map)
    # DeePMD-kit keeps statistics of each neighbour slot, all equal; (num_types, nnei, 4)
    davg, dstd = (values[:, None].expand(-1, sum(ours.sel), -1) for values in (descriptor.davg, descriptor.dstd))
    bias = model.energy_bias.view(1, num_types, 1)
    return {
        "@class": "Model",
        "@version": VERSIONS["Model"][0],
        "type": "standard",
        "type_map": type_map,
        "atom_exclude_types": [],
        "pair_exclude_types": [],
        "rcond": None,
        "preset_out_bias": None,
        # The energies of the elements are here, in float64; bias_atom_e would be added in the model's precision.
        "@variables": {"out_bias": bias, "out_std": torch.ones_like(bias)},
        "descriptor": {
            "@class": "Descriptor",
            "@version": VERSIONS["Descriptor"][0],
            "type": "se_e2_a",
            **plain(ours),
            "trainable": True,
            "exclude_types": [],
            "env_protection": 0.0,
            "set_davg_zero": False,
            "activation_function": "tanh",
            "precision": precision,
            "spin": None,
            "env_mat": {
                "rcut": ours.rcut,
                "rcut_smth": ours.rcut_smth,
                "protection": 0.0,
                "use_exp_switch": False,
            },
            "embeddings": _networks(
                descriptor.embeddings,  # type: ignore[arg-type]
                ndim=1 if ours.type_one_side else 2,
                num_types=num_types,
                network_type="embedding_network",
                common={
                    "@class": "EmbeddingNetwork",
                    "@version": VERSIONS["EmbeddingNetwork"][0],
                    "in_dim": 1,
                    "neuron": list(ours.neuron),
                    "activation_function": "tanh",
                    "resnet_dt": ours.resnet_dt,
                    "bias": True,
                    "precision": precision,
                },
            ),
            "@variables": {"davg": davg, "dstd": dstd},
            "type_map": type_map,
        },
        "fitting": {
            "@class": "Fitting",
            "@version": VERSIONS["Fitting"][0],
            "type": "ener",
            "var_name": "energy",
            "ntypes": num_types,
            "dim_descrpt": descriptor.num_outputs,
            "dim_out": 1,
            **plain(fitting),
            "numb_fparam": 0,
            "numb_aparam": 0,
            "rcond": None,
            "activation_function": "tanh",
            "precision": precision,
            "mixed_types": False,
            "exclude_types": [],
            "nets": _networks(
                model.fittings,  # type: ignore[arg-type]
                ndim=1,
                num_types=num_types,
                network_type="fitting_network",
                common={
                    "@class": "FittingNetwork",
                    "@version": VERSIONS["FittingNetwork"][0],
                    "in_dim": descriptor.num_outputs,
                    "out_dim": 1,
                    "neuron": list(fitting.neuron),
                    "activation_function": "tanh",
                    "resnet_dt": fitting.resnet_dt,
                    "bias_out": True,
                    "precision": precision,
                },
            ),
            "@variables": {
                "bias_atom_e": torch.zeros_like(bias[0]),
                "fparam_avg": None,
                "fparam_inv_std": None,
                "aparam_avg": None,
                "aparam_inv_std": None,
            },
            "type_map": type_map,
            "atom_ener": [],
            "tot_ener_zero": False,
            "trainable": True,
            "layer_name": None,
            "use_aparam_as_mask": False,
            "spin": None,
        },
    }


def _networks(
    networks: list[Network], ndim: int, num_types: int, network_type: str, common: dict[str, Any]
) -> dict[str, Any]:
    """A NetworkCollection; DeePMD-kit's order of the networks is ours."""
    return {
        "@class": "NetworkCollection",
        "@version": VERSIONS["NetworkCollection"][0],
        "ndim": ndim,
        "ntypes": num_types,
        "network_type": network_type,
        "networks": [{**common, "layers": _layers(network, common["precision"])} for network in networks],
    }


def _layers(network: Network, precision: str) -> list[dict[str, Any]]:
    return [
        {
            "@class": "Layer",
            "@version": VERSIONS["Layer"][0],
            "bias": True,
            "use_timestep": layer.timestep is not None,
            "activation_function": "tanh" if layer.hidden else "none",
            "resnet": layer.hidden,
            "precision": precision,
            "@variables": {"w": layer.weight, "b": layer.bias, "idt": layer.timestep},
        }
        for layer in network.layers
    ]


def _input_section(model: DeepPotential) -> dict[str, Any]:
    """The section `model` of an input file for this model: DeePMD-kit keeps it in its .pth and .pb files."""
    described = plain(model.architecture)
    common = {"activation_function": "tanh", "precision": described.pop("precision")}
    described["descriptor"] |= {"type": "se_e2_a", **common}
    described["fitting_net"] |= {"type": "ener", **common}
    return described


# Reading


class Match(NamedTuple):
    """An array of the tree and the name that the file has for it."""

    place: str
    expected: Tensor  # without memory: its shape and dtype
    found: str


def _built(file: Any) -> DeepPotential:
    """The model of a file's tree, its arrays read from the file."""
    with _damage_named():
        content = json.loads(file.attrs["json"])
    architecture = _architecture(content)
    with torch.device("meta"):  # a damaged size costs nothing
        model = DeepPotential(architecture)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state: dict[str, Tensor] = {}
    others: dict[str, np.ndarray] = {}
    matches = list(_matches("model", _tree(model), content["model"]))
    if len({match.found for match in matches}) < len(matches):
        raise InputError("two nodes of the model name the same array: the file is damaged.")
    for match in matches:
        array = _array(match, file)
        if id(match.expected) in names:
            state[names[id(match.expected)]] = torch.from_numpy(array)
        else:
            others[match.place.rpartition("/")[2]] = array
    for name in ("davg", "dstd"):
        values = others[name]
        if (values != values[:, :1]).any():
            raise InputError(
                f"{name} differs between the neighbour slots of an element; here it is one for all of them."
            )
        state[f"descriptor.{name}"] = torch.from_numpy(values[:, 0].copy())
    if (others["dstd"] <= 0).any():
        raise InputError("dstd has standard deviations that are not above 0.")
    state["energy_bias"] = torch.from_numpy(others["out_bias"][0, :, 0] + others["bias_atom_e"][:, 0])
    model.load_state_dict(state, assign=True)
    return model


def _architecture(content: Any) -> Architecture:
    """The settings in the file; sizes are compared with the number of networks that the file itself has.

    A setting that is missing takes its default here, and `_matches` finds that it is missing.
    """
    # Before anything else, for the sake of what the message says of other kinds of models
    for place, expected in (("type", "standard"), ("descriptor/type", "se_e2_a"), ("fitting/type", "ener")):
        if (found := _node(content, f"model/{place}")) != expected:
            raise InputError(f"model/{place} = {_shown(found)}, but only {_shown(expected)} is known here.")
    precision = _node(content, "model/descriptor/precision")
    precision = SYNONYMS.get(precision, precision) if isinstance(precision, str) else precision
    if precision not in ("float32", "float64"):
        raise InputError(
            f'model/descriptor/precision = {_shown(precision)}, but here are only "float32" and "float64".'
        )
    tree = content["model"]
    given = {"type_map": _node(content, "model/type_map"), "precision": precision}
    for name, theirs, section in (
        ("descriptor", tree["descriptor"], DescriptorArchitecture),
        ("fitting_net", tree["fitting"], FittingArchitecture),
    ):
        given[name] = {f.name: theirs[f.name] for f in fields(section) if f.name in theirs}
    architecture: Architecture = read(Architecture, given, "model")
    one_side, num_types = architecture.descriptor.type_one_side, len(architecture.type_map)
    networks, needed = _node(content, "model/descriptor/embeddings/networks"), num_types ** (1 if one_side else 2)
    if not isinstance(networks, list) or len(networks) != needed:
        raise InputError(
            f"model/descriptor/embeddings/networks should be a list of {needed} for {num_types} elements and "
            f"type_one_side = {_shown(one_side)} but is: {_shown(networks)}; the file is damaged."
        )
    return architecture


def _node(content: Any, place: str) -> Any:
    """What the tree has at a place."""
    for name in place.split("/"):
        if not isinstance(content, dict) or name not in content:
            raise InputError(f"{place} is missing: the file is damaged, or of another kind of model.")
        content = content[name]
    return content


def _matches(place: str, expected: Any, found: Any) -> Iterator[Match]:
    """Compare the file's tree with that of a model of ours, and return its arrays."""
    if isinstance(expected, Tensor):
        if not isinstance(found, str):
            raise InputError(f"{place} = {_shown(found)}, which is no array of the file.")
        yield Match(place, expected, found.lstrip("/"))
    elif isinstance(expected, dict) and isinstance(found, dict):
        if "@class" in expected:
            known = VERSIONS[expected["@class"]][1]
            version = found.get("@version", 1)
            if type(version) is not int or version > known:
                raise InputError(f"{place}/@version = {_shown(version)}, but versions are known up to {known}.")
        for key, value in expected.items():
            if key in found:
                if key != "@version" and key not in IRRELEVANT:
                    yield from _matches(f"{place}/{key}", value, found[key])
            elif not _neutral(value) and key not in IRRELEVANT:
                raise InputError(f"{place}/{key} is missing.")
        for key in sorted(found.keys() - expected.keys() - IRRELEVANT - {"@version"}):
            if not _neutral(found[key]):
                raise InputError(f"{place}/{key} = {_shown(found[key])}, which has no counterpart here.")
    elif isinstance(expected, list) and expected and isinstance(found, list) and len(found) == len(expected):
        for k, (mine, theirs) in enumerate(zip(expected, found, strict=True)):
            yield from _matches(f"{place}/{k}", mine, theirs)
    elif not (_same(expected, found) or (place.endswith("/type_map") and found is None)):
        raise InputError(f"{place} = {_shown(found)}, but only {_shown(expected)} is known here.")


def _same(expected: Any, found: Any) -> bool:
    found = SYNONYMS.get(found, found) if isinstance(found, str) else found
    return expected == found or (_neutral(expected) and _neutral(found))


def _neutral(value: Any) -> bool:
    """Whether a setting asks for nothing: none, zero, switched off, an empty list, or a section of such."""
    if isinstance(value, dict):
        return all(map(_neutral, value.values()))
    if isinstance(value, list):
        return all(item is None for item in value)  # [0] would be a list of the first element
    return value is None or value is False or (type(value) in (int, float) and value == 0)


def _shown(value: Any) -> str:
    text = shown(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _array(match: Match, file: Any) -> np.ndarray:
    """Read an array of the shape, dtype and kind that is expected, from the file itself."""
    import h5py

    place, expected, name = match
    with _damage_named():
        own = "/" not in name and isinstance(file.get(name, getlink=True), h5py.HardLink)
        stored = file[name] if own else None
    if not isinstance(stored, h5py.Dataset) or stored.external or stored.is_virtual:
        raise InputError(f"{place} is not in the file.")
    dtype = str(expected.dtype).removeprefix("torch.")
    if stored.shape != tuple(expected.shape) or stored.dtype != np.dtype(dtype):
        raise InputError(
            f"{place} must be {dtype} of shape {tuple(expected.shape)} but is {stored.dtype} of shape {stored.shape}."
        )
    with _damage_named():
        array = stored[()]
    if not np.isfinite(array).all():
        raise InputError(f"{place} has numbers that are not finite.")
    return array
