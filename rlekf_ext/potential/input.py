"""DeePMD-kit's input.json, as far as `rlekf train` understands it.

Each section is a dataclass: a field is a key of the file, with its type, its default and its range on one line.
Defaults are DeePMD-kit's, except that an absent network is the RLEKF paper's and an absent optimizer is RLEKF. Below
the sections stand DeePMD-kit's other keys, and below those the reader.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import sys
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from rlekf_ext.potential.data import OneLineError, split_format


class InputError(OneLineError):
    """An input file that cannot be used; the message is one sentence that names the key by its path."""


def key(default: Any = MISSING, **rule: Any) -> Any:
    """A field of a section; without a default the key must be given. Rules: low, above, high, below (the range),
    choices, also (DeePMD-kit's other names for it), pattern (of a string), form (its words in a message), single (one
    value stands for a list of one)."""
    return field(default=default, metadata=rule)


PRECISIONS = ("default", "float64", "float32")


@dataclass(frozen=True)
class Descriptor:
    """model/descriptor: the se_e2_a descriptor; lengths in Å."""

    type: str = key("se_e2_a", choices=("se_e2_a", "se_a"))
    sel: str | tuple[int, ...] = key(
        "auto", low=0, pattern=r"auto(:\d+(\.\d*)?)?", form='"auto", "auto:FACTOR" or a list of whole numbers'
    )
    rcut: float = key(6.0, above=0, high=100)
    rcut_smth: float = key(0.5, low=0)
    neuron: tuple[int, ...] = key((25, 25, 25), low=1)
    axis_neuron: int = key(16, low=1, also=("n_axis_neuron",))
    resnet_dt: bool = False
    type_one_side: bool = False
    activation_function: str = key("tanh", choices=("tanh",))
    precision: str = key("default", choices=PRECISIONS)
    trainable: bool = key(True, choices=(True,))
    seed: int | None = None
    set_davg_zero: bool = False

    @property
    def sel_factor(self) -> float | None:
        """The factor of `sel = "auto:FACTOR"` (1.1 for "auto"), None for a list."""
        if not isinstance(self.sel, str):
            return None
        return float(self.sel.partition(":")[2] or 1.1)


@dataclass(frozen=True)
class FittingNet:
    """model/fitting_net: from the descriptor to the atomic energy."""

    type: str = key("ener", choices=("ener",))
    neuron: tuple[int, ...] = key((50, 50, 50), low=1, also=("n_neuron",))
    resnet_dt: bool = False
    activation_function: str = key("tanh", choices=("tanh",))
    precision: str = key("default", choices=PRECISIONS)
    trainable: bool = key(True, choices=(True,))
    seed: int | None = None


@dataclass(frozen=True)
class Model:
    """model: elements, descriptor and fitting net."""

    type_map: tuple[str, ...]
    type: str = key("standard", choices=("standard",))
    descriptor: Descriptor = Descriptor()
    fitting_net: FittingNet = FittingNet()


@dataclass(frozen=True)
class LearningRate:
    """learning_rate: the exponential schedule of Adam."""

    type: str = key("exp", choices=("exp",))
    start_lr: float = key(1e-3, above=0)
    stop_lr: float = key(5e-8, above=0)
    decay_steps: int = key(5000, low=1)
    decay_rate: float | None = key(None, above=0)


@dataclass(frozen=True)
class Loss:
    """loss: the prefactors of Adam's mean squared error, at the first step and in the limit of many steps."""

    type: str = key("ener", choices=("ener",))
    start_pref_e: float = key(0.02, low=0)
    limit_pref_e: float = key(1.0, low=0)
    start_pref_f: float = key(1000.0, low=0)
    limit_pref_f: float = key(1.0, low=0)
    start_pref_v: float = key(0.0, low=0)
    limit_pref_v: float = key(0.0, low=0)
    loss_func: str = key("mse", choices=("mse",))


@dataclass(frozen=True)
class TrainingData:
    """training/training_data: where the data are, and how many frames make a batch."""

    systems: tuple[str, ...] = key(single=True, form="a path or a list of paths")
    batch_size: int | str = key(
        "auto",
        low=1,
        pattern=r"auto(:[1-9]\d{0,17})?",
        form='a whole number, "auto" or "auto:N" (rlekf_ext has no other)',
    )
    auto_prob: str = key("prob_sys_size", choices=("prob_sys_size",), also=("auto_prob_style",))

    def frames_per_batch(self, num_atoms: int) -> int:
        """Frames of a system of `num_atoms` atoms in a batch; "auto:N" is the least with N atoms ("auto": 32)."""
        if isinstance(self.batch_size, int):
            return self.batch_size
        return math.ceil(int(self.batch_size.partition(":")[2] or 32) / num_atoms)


@dataclass(frozen=True)
class ValidationData(TrainingData):
    """training/validation_data: as training_data, and the number of batches of one validation."""

    numb_btch: int = key(1, low=1, also=("numb_batch",))


@dataclass(frozen=True)
class Training:
    """training: data, length and output; without validation_data the last `validation_fraction` of each system
    validates (ours, not DeePMD-kit's)."""

    training_data: TrainingData
    validation_data: ValidationData | None = None
    validation_fraction: float = key(0.2, low=0, below=1)
    numb_steps: int | None = key(None, low=1, also=("stop_batch", "num_step", "num_steps", "numb_step"))
    num_epochs: float | None = key(None, above=0, also=("numb_epoch", "num_epoch", "numb_epochs"))
    seed: int | None = None
    disp_file: str = "lcurve.out"
    disp_freq: int = key(1000, low=1)
    save_freq: int = key(1000, low=1)
    save_ckpt: str = "model.ckpt"
    disp_training: bool = True
    time_training: bool = True


@dataclass(frozen=True)
class RLEKFKeys:
    """optimizer, type RLEKF: the filter's keys, then those of the measurements, which override the preset."""

    block_size: int = key(low=1)
    strategy: str = key(choices=("rlekf", "gekf", "lekf", "sekf", "deepmd"))
    memory_factor: float = key(above=0, high=1)
    forgetting_rate: float = key(above=0, high=1)
    initial_covariance: float = key(above=0)
    measurement_noise: float = key(above=0)
    process_noise: float = key(low=0)
    process_noise_decay: float = key(low=0, high=1)
    least_process_noise: float = key(low=0)
    diagonal_ceiling: float = key(above=0)
    least_excitation: float = key(low=0)
    covariance_dtype: str = key(choices=("float64", "float32", "auto"))
    max_skipped: int = key(low=1)
    preset: str = key(choices=("robust", "paper"))
    group_size: int | None = key(low=1)
    num_groups: int = key(low=1)
    order: tuple[str, ...] = key(choices=("energy", "force", "virial"))
    energy_scale: float = key(above=0)
    force_scale: float = key(above=0)
    virial_scale: float = key(above=0)
    adaptive_scale: bool = key()
    early_scale: float = key(above=0)
    relinearize: bool = key()
    warm_start: bool = key()
    average_frames: int = key(low=1)
    batch: str = key(choices=("mean", "sum", "joint"))


@dataclass(frozen=True)
class LKFKeys:
    """optimizer, type LKF: DeePMD-kit's own Kalman filter."""

    kf_blocksize: int = key(low=1)
    kf_start_pref_e: float = key(above=0)
    kf_limit_pref_e: float = key(above=0)
    kf_start_pref_f: float = key(above=0)
    kf_limit_pref_f: float = key(above=0)


@dataclass(frozen=True)
class AdamKeys:
    """optimizer, type Adam; its rate is the section learning_rate."""

    beta1: float = key(low=0, below=1, also=("adam_beta1",))
    beta2: float = key(low=0, below=1, also=("adam_beta2",))
    weight_decay: float = key(low=0)


OPTIMIZERS = {"RLEKF": RLEKFKeys, "LKF": LKFKeys, "Adam": AdamKeys}


@dataclass(frozen=True)
class Optimizer:
    """The optimizer's type and the options that the file gives; the others are the optimizer's own defaults."""

    type: str = "RLEKF"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Config:
    """A whole input file, checked and with defaults filled in."""

    model: Model
    training: Training
    learning_rate: LearningRate = LearningRate()
    loss: Loss = Loss()
    optimizer: Optimizer = field(default_factory=Optimizer)


# DeePMD-kit's keys (deepmd/utils/argcheck.py of 3.2) that ask for something we do not have, and what we have in its
# place. They are accepted while they are off: 0, false, null or empty.
LACKING = {
    f"{section}/{name}".lstrip("/"): instead
    for section, names, instead in (
        ("", "loss_dict", "one model is trained at a time"),
        ("", "validating", "validation is training/validation_data"),
        ("", "nvnmd", "there is no NVNMD hardware model"),
        ("model", "model_dict shared_dict", "one model is trained at a time"),
        ("model", "use_srtab", "there is no tabulated short-range energy"),
        ("model", "pair_exclude_types", "every pair of elements within rcut interacts"),
        ("model", "atom_exclude_types", "every atom has an energy"),
        ("model", "preset_out_bias", "the energy of each element comes from the training data"),
        ("model", "type_embedding", "se_e2_a has a net per element in place of a type embedding"),
        ("model", "modifier", "the energy is the fitting net's alone"),
        ("model", "compress", "models are not compressed"),
        ("model", "spin", "atoms have no spin"),
        ("model", "finetune_head", "training starts from random weights"),
        ("model/descriptor", "exclude_types", "every pair of elements within rcut interacts"),
        ("model/descriptor", "env_protection", "the environment matrix is not shifted"),
        (
            "model/fitting_net",
            "numb_fparam numb_aparam default_fparam use_aparam_as_mask dim_case_embd",
            "the fitting net takes the descriptor alone",
        ),
        ("model/fitting_net", "atom_ener", "the energy of each element comes from the training data"),
        ("model/fitting_net", "layer_name", "every element has layers of its own"),
        ("learning_rate", "stop_lr_ratio", "the schedule ends at stop_lr"),
        ("learning_rate", "warmup_steps warmup_ratio", "the schedule begins at start_lr"),
        ("learning_rate", "smooth", "the rate changes every decay_steps"),
        (
            "loss",
            "start_pref_h limit_pref_h start_pref_ae limit_pref_ae start_pref_pf limit_pref_pf start_pref_gf "
            "limit_pref_gf use_default_pf numb_generalized_coord enable_atom_ener_coeff",
            "the loss has terms for energy, force and virial",
        ),
        ("loss", "relative_f use_huber f_use_norm", "the loss is a mean squared error"),
        ("loss", "intensive_ener_virial", "squared energy errors are divided by the number of atoms once"),
        ("training/training_data", "rglob_patterns", "every folder with a type.raw below systems is read"),
        ("training/training_data", "sys_probs sys_weights", "every frame is drawn as often as any other"),
        ("training/training_data", "min_pair_dist", "no frame is left out"),
        ("training/training_data", "set_prefix", "sets are named set.*"),
        ("training", "systems set_prefix batch_size", "the data stand in training/training_data"),
        ("training", "data_dict model_prob num_epoch_dict", "one model is trained at a time"),
        ("training", "mixed_precision", "the precision is model/descriptor/precision"),
        ("training", "save_dir", "checkpoints go to save_ckpt, which may hold a folder"),
        ("training", "enable_ema", "the weights are not averaged"),
        ("training", "change_bias_after_training", "the energy bias stays as trained"),
        ("training", "profiling enable_profiler", "a profiler is run from outside"),
        ("training", "tensorboard", "the learning curve is written to disp_file"),
        ("training", "gradient_max_norm", "gradients are not clipped"),
        ("training", "zero_stage", "the Kalman filter shards its covariance by itself"),
        ("training", "enable_compile", "kernels are compiled at installation"),
        ("training", "warmup_steps warmup_ratio", "the schedule begins at start_lr"),
    )
    for name in names.split()
}

# DeePMD-kit's keys that change nothing in the model that results: read over.
IGNORED = {
    f"{section}/{name}"
    for section, names in (
        ("model", "data_stat_nbatch data_stat_protect data_bias_nsample info model_branch_alias"),
        ("model", "smin_alpha sw_rmin sw_rmax srtab_add_bias"),  # without effect where use_srtab is absent
        ("model/fitting_net", "rcond"),
        ("learning_rate", "scale_by_worker warmup_start_factor"),
        ("loss", "huber_delta"),  # without effect where use_huber is off
        ("training", "stat_file stat_file_mode numb_test disp_avg acc_freq neighbor_graph_method warmup_start_factor"),
        ("training", "max_ckpt_keep ckpt_keep_ratio ema_decay ema_ckpt_keep"),
        ("training", "profiling_file tensorboard_log_dir tensorboard_freq"),
    )
    for name in names.split()
}


def read_input(source: str | Path | dict[str, Any]) -> Config:
    """Read an input file, or a dict of the same form.

    Paths in `systems` that are not found from the current directory, DeePMD-kit's rule, are looked for from the folder
    of the file. Raises InputError.
    """
    if isinstance(source, dict):
        return _read_config(source, Path())
    path = Path(source)
    try:
        given = json.loads(path.read_text(encoding="utf-8-sig"))  # Windows editors begin a file with a BOM
    except OSError as error:
        raise InputError(f"The input file {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"The input file {path} is not text in UTF-8: byte {error.start}.") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}.") from error
    except RecursionError as error:
        raise InputError(f"{path} cannot be read: its lists or objects are nested too deeply.") from error
    except ValueError as error:  # a number of more than 4300 digits
        raise InputError(f"{path} cannot be read: {str(error).partition(';')[0]}.") from error
    if not isinstance(given, dict):
        raise InputError(f"{path} must hold a JSON object {{...}} but holds: {_show(given)}.")
    return _read_config(given, path.parent)


def _read_config(given: dict[str, Any], folder: Path) -> Config:
    given, optimizer = _optimizer_apart(given)
    config: Config = _read(Config, given, "")
    training = config.training
    training = replace(training, training_data=_found(training.training_data, folder))
    if training.validation_data is not None:
        training = replace(training, validation_data=_found(training.validation_data, folder))
        if "validation_fraction" in given["training"]:
            raise InputError("training/validation_fraction and training/validation_data exclude each other; keep one.")
    config = replace(config, training=training, optimizer=optimizer)
    _check_together(config)
    return config


def _found(data, folder: Path):
    """`data` with each path of its systems that only exists below `folder` rewritten to it."""

    def find(text: str) -> str:
        form, path = split_format(text)
        there = folder / path
        if os.path.exists(path) or not os.path.exists(there):
            return text
        return f"{form}:{there}" if form else str(there)

    return replace(data, systems=tuple(find(text) for text in data.systems))


# DeePMD-kit 3.2 has a section "optimizer"; up to 3.1 these keys stood in "training".
LEGACY = ("opt_type", *(f.name for f in fields(LKFKeys)), "weight_decay", "adam_beta1", "adam_beta2")


def _optimizer_apart(given: dict[str, Any]) -> tuple[dict[str, Any], Optimizer]:
    """The file without its optimizer, and the optimizer."""
    rest = dict(given)
    section, path, default = rest.pop("optimizer", None), "optimizer", "RLEKF"
    training = rest.get("training")
    training = training if isinstance(training, dict) else {}
    legacy = {name: training[name] for name in LEGACY if name in training}
    if legacy and section is not None:
        raise InputError(
            f"training/{next(iter(legacy))} and the section optimizer exclude each other; keep the section."
        )
    if legacy:
        section, path, default = legacy, "training", "Adam"
        rest["training"] = {name: value for name, value in training.items() if name not in legacy}
    section = _object({} if section is None else section, path)
    name = "opt_type" if legacy else "type"
    kind = section.pop(name, default)
    _check_choice(kind, tuple(OPTIMIZERS), f"{path}/{name}")
    return rest, Optimizer(kind, _values(OPTIMIZERS[kind], section, path))


def _check_together(config: Config) -> None:
    """The rules that concern two keys at once."""
    names, descriptor, fitting = config.model.type_map, config.model.descriptor, config.model.fitting_net
    training, sel = config.training, descriptor.sel
    both = training.numb_steps is not None and training.num_epochs is not None
    neither = training.numb_steps is None and training.num_epochs is None
    rules = [
        (len(set(names)) == len(names), f"model/type_map must name each element once but is: {_show(names)}."),
        (
            isinstance(sel, str) or len(sel) == len(names),
            f"model/descriptor/sel must have a number for each of the {len(names)} elements of model/type_map "
            f'but is: {_show(sel)}; "auto" counts the neighbours for you.',
        ),
        (
            (descriptor.sel_factor or 1) >= 1,
            f"The factor in model/descriptor/sel must be >= 1 but is: {descriptor.sel_factor}.",
        ),
        (
            (descriptor.sel_factor or 1) <= 100,
            f"The factor in model/descriptor/sel must be <= 100 but is: {descriptor.sel_factor}.",
        ),
        (
            descriptor.rcut_smth < descriptor.rcut,
            f"model/descriptor/rcut_smth must be < rcut = {descriptor.rcut} but is: {descriptor.rcut_smth}.",
        ),
        (
            descriptor.axis_neuron <= descriptor.neuron[-1],
            f"model/descriptor/axis_neuron must be <= {descriptor.neuron[-1]}, the last number of neuron, "
            f"but is: {descriptor.axis_neuron}.",
        ),
        (
            descriptor.precision.replace("default", "float64") == fitting.precision.replace("default", "float64"),
            f"model/fitting_net/precision must be that of model/descriptor/precision, {descriptor.precision}, "
            f"but is: {fitting.precision}.",
        ),
        (not both, "training/numb_steps and training/num_epochs exclude each other; keep one."),
        (not neither, "training/numb_steps or training/num_epochs is missing; give one of them."),
    ]
    for holds, sentence in rules:
        if not holds:
            raise InputError(sentence)


# The reader: one section, its keys, one value.


def _read(section: type, given: Any, path: str) -> Any:
    values = _values(section, given, path)
    for f in fields(section):
        if f.name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise InputError(f"{_join(path, f.name)} is missing; it has no default.")
    return section(**values)


def _values(section: type, given: Any, path: str) -> dict[str, Any]:
    """The given keys of a section, checked. In the order of the fields, so that an unsupported `type` is reported
    before the keys that come with it."""
    given, values = _object(given, path), {}
    types = get_type_hints(section)
    for f in fields(section):
        names = [name for name in (f.name, *f.metadata.get("also", ())) if name in given]
        if len(names) > 1:
            raise InputError(f"{_join(path, names[0])} and {_join(path, names[1])} mean the same; keep one.")
        for name in names:
            values[f.name] = _value(given.pop(name), types[f.name], f.metadata, _join(path, name))
    for name, value in given.items():
        _check_other_key(section, name, value, path)
    return values


def _check_other_key(section: Any, name: str, value: Any, path: str) -> None:
    """Accept a key that is not a field if it changes nothing."""
    where = _join(path, name)
    listed = where.replace("validation_data", "training_data")  # the two sections lack the same
    if listed in LACKING and _is_on(value):
        raise InputError(f"{where} is not supported (got {_show(value)}): {LACKING[listed]}; leave the key out.")
    if listed in LACKING or listed in IGNORED:
        return
    known = [f.name for f in fields(section)]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known keys are {', '.join(known)}."
    raise InputError(f"{where} is not a known key; {hint}")


def _is_on(value: Any) -> bool:
    """Whether a key asks for anything; DeePMD-kit's sections validating and nvnmd have a switch inside."""
    if isinstance(value, dict):
        switches = [value[name] for name in ("full_validation", "enable") if name in value]
        return any(switches or value)
    return bool(value)


def _value(value: Any, kind: Any, rule: Any, path: str) -> Any:
    """A JSON value as `kind`: a section, a scalar, tuple[..., ...] or a union of these."""
    if get_origin(kind) in (Union, UnionType):
        kinds = [k for k in get_args(kind) if k is not NoneType]
        if value is None and NoneType in get_args(kind):
            return None
        kind = next((k for k in kinds if _fits(value, k)), kinds[0])
    if is_dataclass(kind):
        return _read(kind, value, path)  # type: ignore[arg-type]
    if rule.get("single") and not isinstance(value, list | tuple):
        value = [value]
    pattern = rule.get("pattern")
    if not _fits(value, kind) or (pattern and isinstance(value, str) and not re.fullmatch(pattern, value)):
        raise InputError(f"{path} must be {rule.get('form') or WORDS[kind]} but is: {_show(value)}.")
    if get_origin(kind) is tuple:
        return tuple(_in_range(one, get_args(kind)[0], rule, f"{path}[{i}]") for i, one in enumerate(value))
    return _in_range(value, kind, rule, path)


WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    tuple[int, ...]: "a list of whole numbers, not empty,",
    tuple[str, ...]: "a list of strings, not empty,",
}


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and len(value) > 0 and all(_fits(v, get_args(kind)[0]) for v in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    # in Python true is an int; in JSON it is not a number
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _in_range(value: Any, kind: type, rule: Any, path: str) -> Any:
    if rule.get("choices"):
        _check_choice(value, rule["choices"], path)
    if kind is int and not -(2**63) <= value < 2**63:
        raise InputError(f"{path} must be a whole number of 64 bits but is: {_show(value)}.")
    for name, sign, holds in (
        ("low", ">=", lambda limit: value >= limit),
        ("above", ">", lambda limit: value > limit),
        ("high", "<=", lambda limit: value <= limit),
        ("below", "<", lambda limit: value < limit),
    ):
        limit = rule.get(name)
        if limit is not None and not isinstance(value, str) and not holds(limit):
            raise InputError(f"{path} must be {sign} {limit} but is: {_show(value)}.")
    return float(value) if kind is float else value


def _check_choice(value: Any, choices: tuple, path: str) -> None:
    if value not in choices:
        raise InputError(f"{path} = {_show(value)} is not supported; supported: {', '.join(map(_show, choices))}.")


def _object(given: Any, path: str) -> dict[str, Any]:
    """A copy of a JSON object without DeePMD-kit's comments, which are keys that begin with "_"."""
    if not isinstance(given, dict):
        raise InputError(f"{path} must be a JSON object {{...}} but is: {_show(given)}.")
    return {name: value for name, value in given.items() if not name.startswith("_")}


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def _show(value: Any) -> str:
    try:
        return json.dumps(value, default=str)
    except RecursionError:
        return "nested too deeply to be shown"
