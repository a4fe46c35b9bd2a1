"""Models in DeePMD-kit's `.dp` format: what `dp convert-backend` makes .pth and .pb files of, and back.

A `.dp` file is HDF5: one data set an array, and in the attribute `json` of the root a tree that names them: the
`serialize()` of DeePMD-kit's standard model. `_tree` is that tree of a model of ours; exporting writes it, and
importing compares the file with it, node by node. What is not in the comparison cannot slip through: a setting of
DeePMD-kit that we have no counterpart for is an error, whatever its name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlekf_ext import _C
from rlekf_ext.errors import InputError
from rlekf_ext.potential.checkpoint import check_writable, write_atomically
from rlekf_ext.potential.descriptor import Network
from rlekf_ext.potential.model import DeepPotential

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

    Raises InputError where the name does not end in .dp or cannot be written.
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
                """The tree with names in place of arrays."""
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
    except (OSError, RuntimeError) as error:  # h5py makes either of a full disk
        raise InputError(f"{path} cannot be written: {error}.") from error


def import_model(path: str | Path) -> DeepPotential:
    """Read DeePMD-kit's `.dp` file of an energy model with the descriptor se_e2_a and tanh networks.

    The model computes what DeePMD-kit computes from the file, up to rounding; but an atom with more neighbours than sel
    is an error here, where DeePMD-kit leaves out the farthest. No code of the file is run.

    Raises InputError where the file is none or is damaged, and where it asks for what this package has not: another
    descriptor or activation function, excluded types, spin, frame or atomic parameters, mixed precisions, compression.
    """
    import h5py

    path = _checked_name(path)
    try:
        with path.open("rb"):  # whose words are better than HDF5's
            pass
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        with h5py.File(path, "r") as file:
            return _built(json.loads(file.attrs["json"]), file)
    except UnfitError as error:
        raise InputError(f"{path}: {error}") from error
    except Exception as error:  # whatever a damaged file makes of HDF5: its own words help nobody
        raise InputError(
            f"{path} is not a whole .dp file of DeePMD-kit: take another copy, or make one of a .pth or .pb file by "
            "`dp convert-backend`."
        ) from error


class UnfitError(ValueError):
    """The file is readable, but no model of ours can be made of it; the message begins with the place in the tree."""


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
    config, descriptor, num_types = model.config(), model.descriptor, len(model.type_map)
    precision = config["dtype"]
    # DeePMD-kit keeps statistics of each neighbour slot, all equal; (num_types, nnei, 4)
    davg, dstd = (values[:, None].expand(-1, sum(descriptor.sel), -1) for values in (descriptor.davg, descriptor.dstd))
    bias = model.energy_bias.view(1, num_types, 1)
    return {
        "@class": "Model",
        "@version": VERSIONS["Model"][0],
        "type": "standard",
        "type_map": config["type_map"],
        "atom_exclude_types": [],
        "pair_exclude_types": [],
        "rcond": None,
        "preset_out_bias": None,
        # The energies of the elements stand here, in float64; bias_atom_e would be added in the model's precision.
        "@variables": {"out_bias": bias, "out_std": torch.ones_like(bias)},
        "descriptor": {
            "@class": "Descriptor",
            "@version": VERSIONS["Descriptor"][0],
            "type": "se_e2_a",
            "rcut": descriptor.rcut,
            "rcut_smth": descriptor.rcut_smth,
            "sel": config["sel"],
            "neuron": config["neuron"],
            "axis_neuron": config["axis_neuron"],
            "resnet_dt": config["resnet_dt"],
            "trainable": True,
            "type_one_side": config["type_one_side"],
            "exclude_types": [],
            "env_protection": 0.0,
            "set_davg_zero": False,
            "activation_function": "tanh",
            "precision": precision,
            "spin": None,
            "env_mat": {
                "rcut": descriptor.rcut,
                "rcut_smth": descriptor.rcut_smth,
                "protection": 0.0,
                "use_exp_switch": False,
            },
            "embeddings": _networks(
                descriptor.embeddings,  # type: ignore[arg-type]
                ndim=1 if config["type_one_side"] else 2,
                num_types=num_types,
                network_type="embedding_network",
                common={
                    "@class": "EmbeddingNetwork",
                    "@version": VERSIONS["EmbeddingNetwork"][0],
                    "in_dim": 1,
                    "neuron": config["neuron"],
                    "activation_function": "tanh",
                    "resnet_dt": config["resnet_dt"],
                    "bias": True,
                    "precision": precision,
                },
            ),
            "@variables": {"davg": davg, "dstd": dstd},
            "type_map": config["type_map"],
        },
        "fitting": {
            "@class": "Fitting",
            "@version": VERSIONS["Fitting"][0],
            "type": "ener",
            "var_name": "energy",
            "ntypes": num_types,
            "dim_descrpt": descriptor.num_outputs,
            "dim_out": 1,
            "neuron": config["fitting_neuron"],
            "resnet_dt": config["fitting_resnet_dt"],
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
                    "neuron": config["fitting_neuron"],
                    "activation_function": "tanh",
                    "resnet_dt": config["fitting_resnet_dt"],
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
            "type_map": config["type_map"],
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
    config = model.config()
    common = {"activation_function": "tanh", "precision": config["dtype"]}
    names = ("rcut", "rcut_smth", "sel", "neuron", "axis_neuron", "type_one_side", "resnet_dt")
    return {
        "type_map": config["type_map"],
        "descriptor": {"type": "se_e2_a", **{name: config[name] for name in names}, **common},
        "fitting_net": {
            "type": "ener",
            "neuron": config["fitting_neuron"],
            "resnet_dt": config["fitting_resnet_dt"],
            **common,
        },
    }


# Reading


class Match(NamedTuple):
    """An array of the tree and the name that stands in its place in the file."""

    place: str
    expected: Tensor  # without memory: its shape and dtype
    found: str


def _built(content: Any, file: Any) -> DeepPotential:
    """The model of a file's tree, its arrays read from the file."""
    tree = content["model"]
    config = _config(tree)
    try:
        with torch.device("meta"):  # a damaged size costs nothing
            model = DeepPotential(**config)
    except ValueError as error:
        raise UnfitError(str(error)) from error
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state: dict[str, Tensor] = {}
    others: dict[str, np.ndarray] = {}
    matches = list(_matches("model", _tree(model), tree))
    if len({match.found for match in matches}) < len(matches):
        raise UnfitError("two nodes of the model name the same array: the file is damaged.")
    for match in matches:
        array = _array(match, file)
        if id(match.expected) in names:
            state[names[id(match.expected)]] = torch.from_numpy(array)
        else:
            others[match.place.rpartition("/")[2]] = array
    for name in ("davg", "dstd"):
        values = others[name]
        if (values != values[:, :1]).any():
            raise UnfitError(
                f"{name} differs between the neighbour slots of an element; here it is one for all of them."
            )
        state[f"descriptor.{name}"] = torch.from_numpy(values[:, 0].copy())
    if (others["dstd"] <= 0).any():
        raise UnfitError("dstd has standard deviations that are not above 0.")
    state["energy_bias"] = torch.from_numpy(others["out_bias"][0, :, 0] + others["bias_atom_e"][:, 0])
    model.load_state_dict(state, assign=True)
    return model


def _config(tree: dict[str, Any]) -> dict[str, Any]:
    """The arguments of DeepPotential; sizes are compared with the number of networks that the file itself has."""

    def read(place: str, kind: type) -> Any:
        node: Any = tree
        for name in place.split("/"):
            if not isinstance(node, dict) or name not in node:
                raise UnfitError(f"model/{place} is missing.")
            node = node[name]
        wrong = [value for value in (node if isinstance(node, list) else [node]) if type(value) is not kind]
        if kind is float:
            wrong = [value for value in wrong if type(value) is not int]
        if wrong:
            raise UnfitError(f"model/{place} = {_shown(node)}, which is not of type {kind.__name__}.")
        return node

    # Before anything else, for the sake of what the message says of other kinds of models
    for place, expected in (("type", "standard"), ("descriptor/type", "se_e2_a"), ("fitting/type", "ener")):
        if (found := read(place, str)) != expected:
            raise UnfitError(f"model/{place} = {_shown(found)}, but only {_shown(expected)} is known here.")
    precision = read("descriptor/precision", str)
    config = {
        "type_map": read("type_map", str),
        "sel": read("descriptor/sel", int),
        "rcut": float(read("descriptor/rcut", float)),
        "rcut_smth": float(read("descriptor/rcut_smth", float)),
        "neuron": read("descriptor/neuron", int),
        "axis_neuron": read("descriptor/axis_neuron", int),
        "type_one_side": read("descriptor/type_one_side", bool),
        "resnet_dt": read("descriptor/resnet_dt", bool),
        "fitting_neuron": read("fitting/neuron", int),
        "fitting_resnet_dt": read("fitting/resnet_dt", bool),
        "dtype": SYNONYMS.get(precision, precision),
    }
    if config["dtype"] not in ("float32", "float64"):
        raise UnfitError(f'model/descriptor/precision = "{precision}", but here are only "float32" and "float64".')
    if not math.isfinite(config["rcut"]):
        raise UnfitError("model/descriptor/rcut is not a finite number.")
    num_types = len(config["type_map"])
    networks = tree["descriptor"]["embeddings"]["networks"]
    if len(networks) != num_types ** (1 if config["type_one_side"] else 2) or min(config["sel"]) < 0:
        raise UnfitError(
            f"{len(networks)} embedding nets for {num_types} elements, sel = {config['sel']} and type_one_side = "
            f"{config['type_one_side']} do not fit together: the file is damaged."
        )
    return config


def _matches(place: str, expected: Any, found: Any) -> Iterator[Match]:
    """Compare the file's tree with that of a model of ours, and return its arrays."""
    if isinstance(expected, Tensor):
        if not isinstance(found, str):
            raise UnfitError(f"{place} = {_shown(found)}, which is no array of the file.")
        yield Match(place, expected, found.lstrip("/"))
    elif isinstance(expected, dict) and isinstance(found, dict):
        if "@class" in expected:
            known = VERSIONS[expected["@class"]][1]
            version = found.get("@version", 1)
            if type(version) is not int or version > known:
                raise UnfitError(f"{place}/@version = {_shown(version)}, but versions are known up to {known}.")
        for key, value in expected.items():
            if key in found:
                if key != "@version" and key not in IRRELEVANT:
                    yield from _matches(f"{place}/{key}", value, found[key])
            elif not _neutral(value) and key not in IRRELEVANT:
                raise UnfitError(f"{place}/{key} is missing.")
        for key in sorted(found.keys() - expected.keys() - IRRELEVANT - {"@version"}):
            if not _neutral(found[key]):
                raise UnfitError(f"{place}/{key} = {_shown(found[key])}, which has no counterpart here.")
    elif isinstance(expected, list) and expected and isinstance(found, list) and len(found) == len(expected):
        for k, (mine, theirs) in enumerate(zip(expected, found, strict=True)):
            yield from _matches(f"{place}/{k}", mine, theirs)
    elif not (_same(expected, found) or (place.endswith("/type_map") and found is None)):
        raise UnfitError(f"{place} = {_shown(found)}, but only {_shown(expected)} is known here.")


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
    text = json.dumps(value, default=lambda _: "array")
    return text if len(text) <= 60 else f"{text[:60]}..."


def _array(match: Match, file: Any) -> np.ndarray:
    """Read an array of the shape, dtype and kind that is expected, from the file itself."""
    import h5py

    place, expected, name = match
    own = "/" not in name and isinstance(file.get(name, getlink=True), h5py.HardLink)
    stored = file[name] if own else None
    if not isinstance(stored, h5py.Dataset) or stored.external or stored.is_virtual:
        raise UnfitError(f"{place} is not in the file.")
    dtype = str(expected.dtype).removeprefix("torch.")
    if stored.shape != tuple(expected.shape) or stored.dtype != np.dtype(dtype):
        raise UnfitError(
            f"{place} must be {dtype} of shape {tuple(expected.shape)} but is {stored.dtype} of shape {stored.shape}."
        )
    array = stored[()]
    if not np.isfinite(array).all():
        raise UnfitError(f"{place} has numbers that are not finite.")
    return array
