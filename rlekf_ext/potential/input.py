"""DeePMD-kit's input.json, as far as `rlekf train` understands it.

Each section is a dataclass: a field is a key of the file, with its type, its default and its range on one line.
Defaults are DeePMD-kit's, with the exceptions that PAGE lists; the optimizer's options are in rlekf_ext/options.py.
"""

from __future__ import annotations

import glob
import json
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from rlekf_ext.errors import InputError
from rlekf_ext.options import KINDS, Options, order_of, part, resolve
from rlekf_ext.potential.architecture import Architecture, DescriptorArchitecture, FittingArchitecture
from rlekf_ext.potential.deepmd_keys import IGNORED, LACKING
from rlekf_ext.potential.load import split_format
from rlekf_ext.schema import check_choice, join, json_object, option, range_text, read, shown, unknown

PRECISIONS = ("default", "float64", "float32")
JOINT_FRAMES = 4  # in a batch; more cost as much per frame and learn less: docs/study.md


@dataclass(frozen=True)
class NetworkKeys:
    """DeePMD-kit's keys of model/descriptor and model/fitting_net that are not in the architecture."""

    type: str  # first, so that another type is reported before the keys that come with it
    activation_function: str = option("tanh", choices=("tanh",))
    precision: str = option("default", "The same in both sections; `default` is float64.", choices=PRECISIONS)
    trainable: bool = option(True, choices=(True,))
    seed: int | None = option(None, "Of the initial weights: the first seed given counts, here or in `training`.")


@dataclass(frozen=True)
class Descriptor(DescriptorArchitecture, NetworkKeys):
    """model/descriptor: the se_e2_a descriptor; lengths in Å."""

    type: str = option("se_e2_a", choices=("se_e2_a", "se_a"))
    sel: str | tuple[int, ...] = option(  # type: ignore[assignment]
        "auto",
        "Neighbour slots of each element. `auto` counts the neighbours in all frames, times 1.1 or FACTOR.",
        low=0,
        pattern=r"auto(:\d+(\.\d*)?)?",
        form='"auto", "auto:FACTOR" or a list of whole numbers',
    )
    set_davg_zero: bool = option(False, "Whether the mean of the environment is taken as 0.")

    @property
    def sel_factor(self) -> float | None:
        """The factor of `sel = "auto:FACTOR"` (1.1 for "auto"), None for a list."""
        if not isinstance(self.sel, str):
            return None
        return float(self.sel.partition(":")[2] or 1.1)


@dataclass(frozen=True)
class FittingNet(FittingArchitecture, NetworkKeys):
    """model/fitting_net: from the descriptor to the atomic energy."""

    type: str = option("ener", choices=("ener",))


@dataclass(frozen=True)
class Model:
    """model: elements, descriptor and fitting net."""

    type_map: tuple[str, ...] = option(help="The elements, in the order of their numbers.")
    type: str = option("standard", choices=("standard",))
    descriptor: Descriptor = Descriptor()
    fitting_net: FittingNet = FittingNet()

    def architecture(self, auto_sel: Sequence[int] | None = None) -> Architecture:
        """The network; `auto_sel` replaces sel = "auto" and is 1 per element if not given, before data are read.

        Raises OptionError if settings do not fit together.
        """
        sel = self.descriptor.sel
        if isinstance(sel, str):
            sel = (1,) * len(self.type_map) if auto_sel is None else tuple(auto_sel)
        return Architecture(
            self.type_map,
            DescriptorArchitecture(**{**part(DescriptorArchitecture, self.descriptor), "sel": sel}),
            FittingArchitecture(**part(FittingArchitecture, self.fitting_net)),
            self.descriptor.precision.replace("default", "float64"),
        )


@dataclass(frozen=True)
class LearningRate:
    """learning_rate: the exponential schedule of Adam."""

    type: str = option("exp", choices=("exp",))
    start_lr: float = option(1e-3, above=0)
    stop_lr: float = option(5e-8, above=0)
    decay_steps: int = option(5000, "Batches per change of the rate.", low=1)
    decay_rate: float | None = option(None, "The factor of a change. null: the one that leads to `stop_lr`.", above=0)


@dataclass(frozen=True)
class Loss:
    """loss: the prefactors of Adam's mean squared error, at the first step and in the limit of many steps.

    RLEKF and LKF use the labels whose prefactor is above 0 at either end.
    """

    type: str = option("ener", choices=("ener",))
    start_pref_e: float = option(0.02, "Weight of energies at first. RLEKF: used if one end is above 0.", low=0)
    limit_pref_e: float = option(1.0, low=0)
    start_pref_f: float = option(1000.0, "The same for forces.", low=0)
    limit_pref_f: float = option(1.0, low=0)
    start_pref_v: float = option(0.0, "The same for virials: set it to 1 to train stresses.", low=0)
    limit_pref_v: float = option(0.0, low=0)
    loss_func: str = option("mse", choices=("mse",))

    def kinds(self) -> tuple[str, ...]:
        """The kinds of label that count."""
        ends = {kind: (f"start_pref_{kind[0]}", f"limit_pref_{kind[0]}") for kind in KINDS}
        return tuple(kind for kind, names in ends.items() if any(getattr(self, name) > 0 for name in names))


@dataclass(frozen=True)
class TrainingData:
    """training/training_data: where the data are, and how many frames make a batch."""

    systems: tuple[str, ...] = option(
        help="[Where the data are](training_data.md).", single=True, form="a path or a list of paths"
    )
    rglob_patterns: tuple[str, ...] | None = option(None, "Only folders that match one of these are read.")
    batch_size: int | str | tuple[int, ...] = option(
        "auto",
        "Frames in a batch, of the same atoms, if need be from several files; without it 4 for RLEKF (1 unless its "
        "`batch` is `joint`), 1 for LKF, `auto` for Adam. "
        "`auto:N`: the least with N atoms (`auto`: 32); `max:N`: the most with N atoms; `filter:N`: the same without "
        "larger structures; `mix:N`: as `max:N`; a list: for each path or each system.",
        low=1,
        pattern=r"auto|(auto|max|filter|mix):[1-9]\d{0,17}",
        form='a whole number, one for each system, "auto", "auto:N", "max:N", "filter:N" or "mix:N"',
    )
    auto_prob: str = option(
        "prob_sys_size",
        "How often each system is drawn. `prob_sys_size`: every frame once per epoch.",
        pattern=r"prob_uniform|prob_sys_size(; *\d+:\d+:\d+(\.\d*)?(e-?\d+)? *)*",
        form='"prob_uniform", "prob_sys_size" or "prob_sys_size;FIRST:END:WEIGHT;..."',
        also=("auto_prob_style",),
    )
    sys_probs: tuple[float, ...] | None = option(
        None, "The probability of each path or system; those below 0 share the rest.", high=1, also=("sys_weights",)
    )
    min_pair_dist: float = option(0.0, "Frames with atoms nearer than this, in Å, are left out.", low=0)
    set_prefix: str = option("set", choices=("set",))


@dataclass(frozen=True)
class ValidationData(TrainingData):
    """training/validation_data: as training_data, though all frames are evaluated, whatever `sys_probs` and `auto_prob`
    say; and the number of batches of one validation."""

    numb_btch: int = option(1, "Batches of one validation.", low=1, also=("numb_batch",))


@dataclass(frozen=True)
class Training:
    """training: data, length and output; without validation_data the last `validation_fraction` of each system
    validates (ours, not DeePMD-kit's)."""

    training_data: TrainingData
    validation_data: ValidationData | None = None
    validation_fraction: float = option(
        0.2,
        "Without `validation_data`, this part at the end of each system validates; systems of one frame with the same "
        "atoms count as one.",
        low=0,
        below=1,
    )
    numb_steps: int | None = option(
        None,
        "Length in batches: this or `num_epochs` is required.",
        low=1,
        also=("stop_batch", "num_step", "num_steps", "numb_step"),
    )
    num_epochs: float | None = option(
        None, "Length in epochs.", above=0, high=1_000_000, also=("numb_epoch", "num_epoch", "numb_epochs")
    )
    init_model: str | None = option(
        None,
        "A checkpoint of `rlekf train` to [begin with](online.md): weights, statistics and P; not a key of dp's.",
        pattern=r"(?s).+",
        form="the name of a file",
    )
    seed: int | None = option(None, "Of the order of frames and of the atoms in force groups.")
    disp_file: str = option("lcurve.out", "The learning curve; a summary goes to the same name with `.json`.")
    disp_freq: int | None = option(None, "Batches per row of `disp_file`. null: an epoch, at most 1000.", low=1)
    save_freq: int = option(1000, "Batches per checkpoint.", low=1)
    save_ckpt: str = option("model.ckpt", "The checkpoint is this with `.pt`.")
    cache: float | None = option(
        None,
        "GB of memory for [frames that are kept](training_data.md#large-data) with their neighbours; not a key of "
        "dp's. null: a quarter of what is free.",
        low=0,
    )
    table: bool = option(
        True,
        "Whether embedding nets are interpolated in training ([why](performance.md#the-network-on-a-table)). "
        "Evaluation is always exact. Not a key of dp's.",
    )


@dataclass(frozen=True)
class LKF:
    """optimizer, type LKF: DeePMD-kit's own Kalman filter, which is RLEKF with the preset `lkf`."""

    kf_blocksize: int = option(Options.block_size, low=1)
    kf_start_pref_e: float = option(1.0, above=0)
    kf_limit_pref_e: float = option(1.0, above=0)
    kf_start_pref_f: float = option(1.0, above=0)
    kf_limit_pref_f: float = option(1.0, above=0)

    def options(self, kinds: Sequence[str]) -> dict[str, Any]:
        """Those of FrameUpdater. LKF has no virial updates."""
        order = [kind for kind in Options.order if kind in kinds]
        if not order:
            raise InputError("optimizer/type LKF uses energies and forces, but both have prefactors of 0 in loss.")
        return {"preset": "lkf", "block_size": self.kf_blocksize, "order": order}

    def prefactors(self, progress: float) -> dict[str, float]:
        """What the scales are multiplied by when this part of the run is done: they change geometrically."""
        ends = {
            "energy": (self.kf_start_pref_e, self.kf_limit_pref_e),
            "force": (self.kf_start_pref_f, self.kf_limit_pref_f),
        }
        return {kind: start ** (1 - progress) * limit**progress for kind, (start, limit) in ends.items()}


@dataclass(frozen=True)
class Adam:
    """optimizer, type Adam; its rate is in the section learning_rate."""

    beta1: float = option(0.9, low=0, below=1, also=("adam_beta1",))
    beta2: float = option(0.999, low=0, below=1, also=("adam_beta2",))
    weight_decay: float = option(0.0, low=0)


@dataclass(frozen=True)
class Optimizer:
    """The optimizer's type, and its options: those of RLEKF, of LKF or of Adam."""

    type: str = "RLEKF"
    options: Options | LKF | Adam = field(default_factory=lambda: resolve({}))
    has_order: bool = False  # whether the file itself gives `order`, which then holds whatever the loss says
    given: bool = True  # whether the file names an optimizer


@dataclass(frozen=True)
class Config:
    """A whole input file, checked and with defaults filled in."""

    model: Model
    training: Training
    learning_rate: LearningRate = LearningRate()
    loss: Loss = Loss()
    optimizer: Optimizer = field(default_factory=Optimizer)


def read_input(source: str | Path | dict[str, Any]) -> Config:
    """Read an input file, or a dict of the same form.

    Paths in `systems`, and `init_model`, that are not found from the current directory, DeePMD-kit's rule, are looked
    for from the folder of the file. Raises InputError.
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
        raise InputError(f"{path} must hold a JSON object {{...}} but holds: {shown(given)}.")
    return _read_config(given, path.parent)


def _read_config(given: dict[str, Any], folder: Path) -> Config:
    given, optimizer = _optimizer_apart(_with_axes(_converted(given)))
    if optimizer.type != "Adam" and isinstance(given.get("learning_rate"), Mapping):
        del given["learning_rate"]  # whatever schedule it asks for: nothing uses it
    config: Config = read(Config, given, other=_other_key)
    training = config.training
    training = replace(training, training_data=_found(training.training_data, folder))
    if training.init_model and not os.path.exists(training.init_model):
        there = str(folder / training.init_model)
        training = replace(training, init_model=there if os.path.exists(there) else training.init_model)
    if training.validation_data is not None:
        training = replace(training, validation_data=_found(training.validation_data, folder))
        if "validation_fraction" in given["training"]:
            raise InputError("training/validation_fraction and training/validation_data exclude each other; keep one.")
    if optimizer.type != "Adam" and "batch_size" not in given["training"]["training_data"]:
        joint = isinstance(optimizer.options, Options) and optimizer.options.batch == "joint"
        size = JOINT_FRAMES if joint else 1
        training = replace(training, training_data=replace(training.training_data, batch_size=size))
    if isinstance(optimizer.options, Options) and not optimizer.has_order:
        order = order_of(optimizer.options.order, config.loss.kinds())
        optimizer = replace(optimizer, options=replace(optimizer.options, order=order))
    config = replace(config, training=training, optimizer=optimizer)
    _check_together(config)
    return config


def _converted(given: dict[str, Any]) -> dict[str, Any]:
    """The file with the keys of DeePMD-kit 1.x in their places of today, as DeePMD-kit itself moves them."""
    training = given.get("training")
    if not isinstance(training, Mapping):
        return given
    old = {name: training[name] for name in V1 if name in training}
    if not old:
        return given
    if training.get("training_data") is not None:
        raise InputError(
            f"training/{next(iter(old))} (of DeePMD-kit 1.x) and training/training_data exclude each other; keep the "
            "latter."
        )
    rest = {name: value for name, value in training.items() if name not in old and name != "training_data"}
    data = {"sys_probs" if name == "sys_prob" else name: value for name, value in old.items()}
    return {**given, "training": {**rest, "training_data": data}}


def _with_axes(given: dict[str, Any]) -> dict[str, Any]:
    """The file with `axis_neuron`, if it only gives `neuron`, and that is narrower than the default."""
    model = given.get("model")
    descriptor = model.get("descriptor") if isinstance(model, Mapping) else None
    if not isinstance(model, Mapping) or not isinstance(descriptor, Mapping):
        return given
    neuron, most = descriptor.get("neuron"), DescriptorArchitecture.axis_neuron
    last = neuron[-1] if isinstance(neuron, list) and neuron else None
    if not isinstance(last, int) or not 0 < last < most or {"axis_neuron", "n_axis_neuron"} & set(descriptor):
        return given
    return {**given, "model": {**model, "descriptor": {**descriptor, "axis_neuron": last}}}


def _found(data, folder: Path):
    """`data` with each path of its systems that only exists below `folder` rewritten to it."""

    def find(text: str) -> str:
        form, path = split_format(text)
        there = folder / path
        file = path.partition("#")[0]  # of "water.hdf5#/group"
        if os.path.exists(path) or os.path.exists(file) or glob.glob(path):
            return text
        if not os.path.exists(folder / file):
            there = Path(glob.escape(str(folder))) / path
            if not glob.glob(str(there)):
                return text
        return f"{form}:{there}" if form else str(there)

    return replace(data, systems=tuple(find(text) for text in data.systems))


# Keys of training_data that stood in "training" in DeePMD-kit 1.x.
V1 = ("systems", "set_prefix", "batch_size", "auto_prob", "auto_prob_style", "sys_prob", "sys_probs", "sys_weights")
# DeePMD-kit 3.2 has a section "optimizer"; up to 3.1 these keys stood in "training".
LEGACY = ("opt_type", *(f.name for f in fields(LKF)), "weight_decay", "adam_beta1", "adam_beta2")
TYPES = ("RLEKF", "LKF", "Adam")


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
    section = json_object({} if section is None else section, path)
    name = "opt_type" if legacy else "type"
    kind = section.pop(name, default)
    check_choice(kind, TYPES, f"{path}/{name}")
    if kind == "RLEKF":
        return rest, Optimizer(
            kind, resolve(section, path), "order" in section, given=bool(legacy or "optimizer" in given)
        )
    return rest, Optimizer(kind, read({"LKF": LKF, "Adam": Adam}[kind], section, path, other=_other_key))


def _check_together(config: Config) -> None:
    """The rules that concern two keys at once; those of the network alone are in Architecture."""
    config.model.architecture()
    descriptor, fitting, training = config.model.descriptor, config.model.fitting_net, config.training
    both = training.numb_steps is not None and training.num_epochs is not None
    neither = training.numb_steps is None and training.num_epochs is None
    rules = [
        (
            (descriptor.sel_factor or 1) >= 1,
            f"The factor in model/descriptor/sel must be >= 1 but is: {descriptor.sel_factor}.",
        ),
        (
            (descriptor.sel_factor or 1) <= 100,
            f"The factor in model/descriptor/sel must be <= 100 but is: {descriptor.sel_factor}.",
        ),
        (
            descriptor.precision.replace("default", "float64") == fitting.precision.replace("default", "float64"),
            f"model/fitting_net/precision must be that of model/descriptor/precision, {descriptor.precision}, "
            f"but is: {fitting.precision}.",
        ),
        (
            config.loss.kinds(),
            "loss: a prefactor of energy, force or virial must be above 0, but all are 0; raise one.",
        ),
        (
            training.training_data.min_pair_dist < descriptor.rcut,
            f"training/training_data/min_pair_dist must be below rcut, {descriptor.rcut} Å, but is: "
            f"{training.training_data.min_pair_dist} Å.",
        ),
        (
            Path(training.save_ckpt).name and not training.save_ckpt.endswith("/"),
            f"training/save_ckpt must be the name of a file but is: {shown(training.save_ckpt)}.",
        ),
        (
            os.path.abspath(training.disp_file) != os.path.abspath(f"{training.save_ckpt}.pt"),
            f"training/disp_file is {training.disp_file}, the checkpoint itself; choose another name.",
        ),
        (not both, "training/numb_steps and training/num_epochs exclude each other; keep one."),
        (not neither, "training/numb_steps or training/num_epochs is missing; give one of them."),
    ]
    for holds, sentence in rules:
        if not holds:
            raise InputError(sentence)


def _other_key(section: Any, name: str, value: Any, path: str) -> None:
    """Accept a key that is not a field if it changes nothing."""
    where = join(path, name)
    listed = where.replace("validation_data", "training_data")  # the two sections lack the same
    if listed in LACKING and _is_on(value):
        raise InputError(f"{where} is not supported (got {shown(value)}): {LACKING[listed]}; leave the key out.")
    if listed not in LACKING and listed not in IGNORED:
        unknown(section, name, value, path)


def _is_on(value: Any) -> bool:
    """Whether a key asks for anything; DeePMD-kit's sections validating and nvnmd have a switch inside."""
    if isinstance(value, Mapping):
        switches = [value[name] for name in ("full_validation", "enable") if name in value]
        return any(switches or value)
    return bool(value) and value != "None"


# docs/input.md

PAGE = """\
# The input file

<!-- written by `make docs` -->

`rlekf train` reads DeePMD-kit's `input.json`, of its versions 1 to 3, also with all defaults written out (`out.json`).
Names and meanings are [DeePMD-kit's](https://docs.deepmodeling.com/projects/deepmd/en/stable/train/train-input.html).
Defaults are too, with these exceptions: each key of the network that is left out has the value of the RLEKF paper's
network (DeePMD-kit's `neuron`, `axis_neuron` and `resnet_dt` differ: write them out if you want those), RLEKF is the
optimizer if the file has no section `optimizer`, `batch_size` is 4 with it, a row of `disp_file` comes every epoch, and
`cache`, `init_model`, `table` and `validation_fraction` are ours. Keys that begin with `_` are
comments. A key that is unknown or out of range is an error that names it. Inputs of version 1 have the keys of
`training/training_data` in `training`.

The least that trains ([another example](../examples/nacl/rlekf.json)):

```json
{
  "model": {"type_map": ["O", "H"]},
  "training": {"training_data": {"systems": "data"}, "num_epochs": 24}
}
```

`disp_file` has a row every `disp_freq` batches: RMSE on held-out frames (`val`) and on the batch just used (`trn`), of
energies and virials in eV/atom and of forces in eV/Å; `rmse_val` and `rmse_trn` are roots of the loss, `lr` is Adam's
rate, or 1.
"""
SECTIONS: dict[str, type] = {
    "model": Model,
    "model/descriptor": Descriptor,
    "model/fitting_net": FittingNet,
    "training": Training,
    "training/training_data": TrainingData,
    "loss": Loss,
    "learning_rate (of Adam)": LearningRate,
    "optimizer, type LKF": LKF,
    "optimizer, type Adam": Adam,
}


def page() -> str:
    """docs/input.md."""
    parts = [PAGE]
    for title, section in SECTIONS.items():
        rows = [["key", "default", "allowed", "what it does"], ["---"] * 4]
        for f in fields(section):
            if is_dataclass(f.default) or f.name in SUBSECTIONS:
                continue
            default = "required" if f.default is MISSING else f"`{shown(f.default)}`"
            allowed = f.metadata.get("form") or range_text(f.metadata)
            also = "".join(f", `{name}`" for name in f.metadata.get("also", ()))
            rows.append([f"`{f.name}`{also}", default, allowed, f.metadata.get("help", "")])
        if section is TrainingData:
            title += " and training/validation_data, which also has `numb_btch`, the batches of one validation"
        table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
        parts.append(f"\n## {title}\n\n{table}\n")
    parts.append("\n## optimizer, type RLEKF\n\nThe default: see [options](options.md).\n")
    parts.append(
        "\n## Not supported\n\nThese keys are accepted while they are off.\n\n| key | instead |\n| --- | --- |\n"
    )
    for instead in dict.fromkeys(LACKING.values()):
        names = ", ".join(f"`{name}`" for name, other in LACKING.items() if other == instead)
        parts.append(f"| {names} | {instead} |\n")
    without = f"Accepted without effect: {', '.join(f'`{name}`' for name in sorted(IGNORED))}."
    parts.append(f"\n{textwrap.fill(without, 120)}\n")
    return "".join(parts)


SUBSECTIONS = ("training_data", "validation_data")
