"""Every option of RLEKF, once: its name, type, default, range and help, and which class takes it.

This table is the source of the checks of KalmanFilter, RLEKF and FrameUpdater and their signatures in `help()`, the
section `optimizer` of an input file, DeePMD-kit's checks and help, and the table in docs/options.md. Defaults are the
paper's; a preset holds only what it changes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch

from rlekf_ext.partition import STRATEGIES
from rlekf_ext.schema import option, range_text, read, values

KINDS = ("energy", "force", "virial")
BATCHES = ("mean", "sum", "joint")
PRIORS = ("identity", "layers")
COVARIANCES = ("keep", "inflate", "fresh")
PRESETS: dict[str, dict[str, Any]] = {
    # Hu et al. 2023: x = 6, y = 4, λ_1 = 0.98, energy first.
    "paper": {},
    # Leaves the first plateau of liquids and keeps energies right across volumes; trials: docs/algorithm.md.
    "robust": {
        "block_size": 1024,
        "memory_factor": 0.998,
        "prior": "layers",
        "measurement_noise": 1.0,  # H and ε are in units of the mean error
        "group_size": None,
        "num_groups": 1,
        "order": ("force", "energy"),
        "energy_scale": 3.0,
        "adaptive_scale": True,
        "early_scale": 5.0,
        "balance": 1000.0,
        "batch": "joint",
        "warm_start": True,
        "average_frames": 8,
    },
    # DeePMD-kit's own LKF, number for number.
    "lkf": {"strategy": "deepmd", "batch": "sum", "force_per_atom": True},
}


@dataclass(frozen=True)
class BlockOptions:
    """How the weights are cut into the blocks of P."""

    block_size: int = option(
        5120, "N_b, the largest size of a block of P; memory and time grow with it. LKF calls it `kf_blocksize`.", low=1
    )
    strategy: str = option(
        "rlekf",
        "How weights become blocks: `rlekf` of the paper, `deepmd` (the blocks of LKF), `lekf` (a block per layer), "
        "`sekf` (blocks of equal size) or `gekf` (one block).",
        choices=tuple(STRATEGIES),
    )


@dataclass(frozen=True)
class FilterOptions:
    """What KalmanFilter takes."""

    memory_factor: float = option(0.98, "λ at the first update (λ_1 in the paper); it tends to 1.", above=0, high=1)
    forgetting_rate: float = option(
        0.9987,
        "ν in λ <- ν λ + 1 - ν: each update multiplies 1 - λ by ν. A larger ν forgets for longer.",
        low=0,
        high=1,
    )
    initial_covariance: float = option(1.0, "p_0: P starts as this times the identity; see `prior`.", above=0)
    measurement_noise: float | None = option(
        None, "R, the noise of a measurement (α²R in the paper). null: the number of blocks, L.", above=0
    )
    process_noise: float = option(0.0, "q, added to the diagonal of P after every update.", low=0)
    covariance_dtype: str = option(
        "float64",
        "How P is stored: `float64`, `float32` (half the memory) or `auto`, float32 until that becomes too coarse. "
        "Around `RLEKF.update` and `KalmanFilter.update`, call `guard_storage()` every few hundred updates.",
        choices=("float64", "float32", "auto"),
    )
    max_pending: int = option(
        32, "How many rank-1 updates may be pending before they are folded into the stored P.", low=1
    )


@dataclass(frozen=True)
class OptimizerOptions(FilterOptions, BlockOptions):
    """What RLEKF takes."""


@dataclass(frozen=True)
class UpdateOptions:
    """How the frames of a batch become updates of the filter."""

    group_size: int | None = option(
        6, "Atoms per structure in a force update (x in the paper). null: all atoms, in `num_groups` groups.", low=1
    )
    num_groups: int = option(
        4,
        "Force updates per batch (y in the paper), over disjoint random groups of atoms; fewer if atoms run out.",
        low=1,
    )
    order: tuple[str, ...] = option(
        ("energy", "force", "force", "force", "force"),
        "The updates of a batch, repeated until no force group is left. Kinds without labels are omitted.",
        choices=KINDS,
    )
    energy_scale: float = option(1.0, "Multiplies H and ε of energy updates.", above=0)
    force_scale: float = option(1.0, "Multiplies H and ε of force updates.", above=0)
    virial_scale: float = option(1.0, "Multiplies H and ε of virial updates.", above=0)
    force_per_atom: bool = option(
        False, "Whether H and ε of force updates are divided by the number of atoms once more, as in LKF."
    )
    adaptive_scale: bool = option(False, "Whether each scale is divided by the running mean of ε of its kind.")
    early_scale: float = option(
        1.0, "Multiplies all scales at the first update; each update closes 0.13 % of its gap to 1.", above=0
    )
    balance: float | None = option(
        None,
        "κ: HᵀPH/R of energies and virials is at most κ times the square of that of forces; where it would be larger, "
        "their scale is lowered, unless their mean error is above 0.05 Å times that of forces. null: no bound.",
        above=0,
    )
    relinearize: bool = option(
        True, "Whether the model is evaluated again before each update; if not, one evaluation serves a whole batch."
    )
    batch: str = option(
        "mean",
        "What B frames form: `mean`, one measurement of the mean error; `sum`, one whose H is summed and whose ε is √B "
        "times the mean, as in LKF; `joint`, B measurements at the same weights.",
        choices=BATCHES,
    )
    prior: str = option(
        "identity",
        "How P starts: `identity`, as p_0 I; `layers`, with p_0 / (1 + x·x) for the weights and the bias of a layer "
        "whose inputs are x, so that what they add up to has the variance p_0 in every layer.",
        choices=PRIORS,
    )
    warm_start: bool = option(
        False, "Whether, before training, the energy bias is fitted again, to the residuals of the untrained network."
    )
    covariance: str = option(
        "keep",
        "P in a run that begins with the model of an earlier one (`--init-model`): `keep` that run's P, `inflate` it "
        "by `inflation`, so that the new data count for more, or start with a `fresh` one.",
        choices=COVARIANCES,
    )
    inflation: float = option(3.0, "What `inflate` multiplies P by.", above=0)
    average_frames: int = option(
        1, "The weights that are evaluated and saved are a running mean over about this many batches.", low=1
    )
    max_skipped: int = option(
        20,
        "Training stops after this many measurements in a row that were not finite or had a negative variance.",
        low=1,
    )


@dataclass(frozen=True)
class Options(UpdateOptions, OptimizerOptions):
    """All options: what FrameUpdater takes, and section `optimizer` of an input file."""

    preset: str = option("robust", "Sets the defaults of the options that are not given.", choices=tuple(PRESETS))


def resolve(given: Mapping[str, Any], path: str = "") -> Options:
    """The named preset ("robust" if none is), changed by the given options.

    Raises OptionError for an option that is unknown or out of range; `path` is the place of the options in the input.
    """
    found = values(Options, named_dtypes(given), path)
    preset = found.get("preset", "robust")
    return Options(**{**PRESETS[preset], **found, "preset": preset})


def order_of(order: Sequence[str], kinds: Iterable[str]) -> tuple[str, ...]:
    """`order` with virials before each energy unless it has them, and of that the updates of these kinds alone."""
    if "virial" not in order:
        order = [new for kind in order for new in (("virial", kind) if kind == "energy" else (kind,))]
    return tuple(kind for kind in order if kind in kinds)


def part(section: type, options: Any) -> dict[str, Any]:
    """The options that `section` has, by name."""
    return {f.name: getattr(options, f.name) for f in fields(section)}


def checked(section: type, given: Mapping[str, Any]) -> Any:
    """A section from keyword arguments. Raises OptionError."""
    return read(section, named_dtypes(given))


def named_dtypes(given: Mapping[str, Any]) -> dict[str, Any]:
    """The same with dtypes by name: "float32" for torch.float32."""
    return {
        name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        for name, value in given.items()
    }


Class = TypeVar("Class", bound=type)


def takes(section: type) -> Callable[[Class], Class]:
    """Show the fields of a section as keywords of a class, instead of its `**options`: in its signature, and with their
    help in its docstring."""

    def decorate(cls: Class) -> Class:
        signature = inspect.signature(cls.__init__)  # type: ignore[misc]
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        listed = fields(section)
        keywords = [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
            for f in listed
        ]
        cls.__init__.__signature__ = signature.replace(parameters=[*own, *keywords])  # type: ignore[misc]
        lines = [f"    {f.name} = {f.default!r}: {f.metadata['help']}" for f in listed]
        cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__ or ""), "", "Options:", *lines])
        return cls

    return decorate


def help_text(name: str) -> str:
    """The help of an option and its defaults, in sentences."""
    f = next(f for f in fields(Options) if f.name == name)
    changed = [f"`{preset}`: {_cell(values[name])}" for preset, values in PRESETS.items() if name in values]
    return f"{f.metadata['help']} Default: {_cell(f.default)}{''.join(f', {text}' for text in changed)}."


PAGE = """\
# Options

<!-- written by `make docs` -->

Set these options in the section `optimizer` of the input of `rlekf train` or of `dp --pt train` (all but
{not_in_dp}), or as keywords of `RLEKF`, `KalmanFilter` and `FrameUpdater`. An option that is unknown or out of range
is an error that names it.

`preset` chooses the defaults; the table has those of `paper` and, if they differ, of the others. The default is
`robust`. `RLEKF` and `KalmanFilter` by themselves take no preset: their defaults are those of `paper`.
"""
TAKERS = {
    BlockOptions: "Blocks of P: `RLEKF`, `FrameUpdater`",
    FilterOptions: "The filter: `KalmanFilter`, `RLEKF`, `FrameUpdater`",
    UpdateOptions: "Updates of a batch: `FrameUpdater`",
}
NOT_IN_DP = ("average_frames",)  # DeePMD-kit has enable_ema


def page() -> str:
    """docs/options.md."""
    others = [name for name, preset in PRESETS.items() if preset]
    parts = [PAGE.format(not_in_dp=", ".join(f"`{name}`" for name in NOT_IN_DP))]
    for section, title in TAKERS.items():
        header = ["option", "`paper`", *(f"`{name}`" for name in others), "range", "what it does"]
        rows = [header, ["---"] * len(header)]
        for f in fields(section):
            changed = [_cell(PRESETS[name][f.name]) if f.name in PRESETS[name] else "" for name in others]
            rows.append([f"`{f.name}`", _cell(f.default), *changed, range_text(f.metadata), f.metadata["help"]])
        table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
        parts.append(f"\n## {title}\n\n{table}\n")
    return "".join(parts)


def _cell(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(value)
    if isinstance(value, float):
        return f"{value:g}"
    return "null" if value is None else str(value).lower()
