"""The command `rlekf`: train | test | select | plot | export | import | info.

Exit code 2: the input was wrong, and the message says where. A bug in this package shows its traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path

import numpy as np
import torch

from rlekf_ext import _C
from rlekf_ext.environment import torch_threads, usable_cores
from rlekf_ext.errors import OptionError, RlekfError
from rlekf_ext.ops import backends, find_device
from rlekf_ext.processes import Processes, torchrun_group
from rlekf_ext.schema import counted

INTERRUPTED = 130
FEW = 20  # frames
EXTRAS = {"matplotlib": "plot", **dict.fromkeys(("dpdata", "tqdm", "h5py", "lmdb", "msgpack"), "potential")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may not know Å
    warnings.showwarning = _show_warning
    parser = argparse.ArgumentParser(prog="rlekf", description="Train Deep Potential networks with the RLEKF filter.")
    parser.add_argument("--version", action="version", version=f"rlekf_ext {_C.build_info()['version']}")
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser("train", help="train from an input.json of DeePMD-kit")
    train.add_argument("input", help="the input file, as for `dp --pt train`")
    begin = train.add_mutually_exclusive_group()
    begin.add_argument("--restart", action="store_true", help="continue from the checkpoint of the same input file")
    begin.add_argument("--init-model", metavar="CHECKPOINT", help="begin with the model of an earlier run, and its P")
    train.add_argument("--threads", type=int, metavar="N", help="threads to train on (as many as there is work for)")
    train.add_argument("--device", metavar="cpu|cuda|cuda:N", help="what to train on (a GPU if there is one)")
    train.set_defaults(run=run_train)

    test = commands.add_parser("test", help="RMSE of a trained model on labelled data")
    takes_model_and_systems(test, "folders or files, as in training_data/systems")
    test.add_argument(
        "-d",
        "--detail",
        metavar="PREFIX",
        help="write PREFIX.e_peratom.out, PREFIX.f.out, PREFIX.v_peratom.out (if there are such labels), PREFIX.png",
    )
    test.add_argument(
        "-u",
        "--uncertainty",
        metavar="PREFIX",
        help="compare the error of each frame with the deviation that the filter predicts, sqrt(HᵀPH). Its scale is "
        "relative: it ranks frames but is not an error bar. Writes PREFIX.uncertainty.out, PREFIX.uncertainty.png",
    )
    test.set_defaults(run=run_test)

    select = commands.add_parser("select", help="choose the next frames to label from a pool")
    takes_model_and_systems(select, "the pool: folders or files, as in training_data/systems; labels are not needed")
    select.add_argument("-n", "--number", type=int, default=50, help="how many frames (%(default)s)")
    select.add_argument("-o", "--output", default="chosen", help="new folder for deepmd/npy and tables (%(default)s)")
    select.set_defaults(run=run_select)

    plot = commands.add_parser("plot", help="draw lcurve.out")
    plot.add_argument("curve", nargs="?", default="lcurve.out", help="file to draw (%(default)s)")
    plot.add_argument("-o", "--output", default="lcurve.png", help="picture to write (%(default)s)")
    plot.set_defaults(run=run_plot)

    export = commands.add_parser("export", help="write a model for DeePMD-kit and, through it, for LAMMPS")
    export.add_argument("model", nargs="?", default="model.ckpt.pt", help="checkpoint of `rlekf train` (%(default)s)")
    export.add_argument("-o", "--output", default="model.dp", help="DeePMD-kit's .dp file to write (%(default)s)")
    export.set_defaults(run=run_export)

    import_ = commands.add_parser("import", help="read an se_e2_a model of DeePMD-kit")
    import_.add_argument("model", help=".dp file; `dp convert-backend` makes one of a .pth or .pb file")
    import_.add_argument("-o", "--output", required=True, help="checkpoint to write, for `rlekf test -m`")
    import_.set_defaults(run=run_import)

    info = commands.add_parser("info", help="versions, backends and build")
    info.set_defaults(run=run_info)

    parsed = parser.parse_args(arguments)
    try:
        return parsed.run(parsed)
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        return wrong(
            f"`rlekf {parsed.command}` needs {error.name}: run `pip install 'rlekf_ext[{EXTRAS[error.name]}]'`."
        )
    except RlekfError as error:  # anything else is a bug in this package and shows its traceback
        return wrong(str(error))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read what we print has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still in the buffer goes there
        return 1


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"rlekf: warning: {message}", file=sys.stderr)


def takes_model_and_systems(command: argparse.ArgumentParser, systems: str) -> None:
    command.add_argument("-m", "--model", default="model.ckpt.pt", help="checkpoint of `rlekf train` (%(default)s)")
    command.add_argument("-s", "--system", required=True, nargs="+", action="extend", help=systems)


def run_train(arguments: argparse.Namespace) -> int:
    from rlekf_ext.potential.input import read_input
    from rlekf_ext.potential.train import train

    threads = arguments.threads
    if threads is not None and threads < 1:
        raise OptionError(f"--threads must be >= 1 but is: {threads}; without it, rlekf chooses.")
    chooses = threads is None and not any(os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"))
    most = min(usable_cores(), torch.get_num_threads()) if chooses else None  # torch's number has no hyperthreads
    config, device = read_input(arguments.input), find_device(arguments.device)
    if arguments.init_model == "":
        raise OptionError("--init-model must be the name of a checkpoint but is empty.")
    if arguments.init_model is not None:
        config = replace(config, training=replace(config.training, init_model=arguments.init_model))
    if gpu := device.type == "cuda":
        torch.cuda.set_device(device)
    with torch_threads(1 if chooses else threads), torchrun_group(gpu) as group:
        summary = train(config, restart=arguments.restart, processes=Processes(group), most_threads=most, device=device)
    return INTERRUPTED if summary["interrupted"] else 0


def run_test(arguments: argparse.Namespace) -> int:
    from rlekf_ext.potential.checkpoint import load_checkpoint, restored_model
    from rlekf_ext.potential.evaluate import UNITS, compare, rmse, watched
    from rlekf_ext.potential.files import check_writable
    from rlekf_ext.potential.frames import FrameList
    from rlekf_ext.potential.load import load_systems
    from rlekf_ext.potential.uncertainty import check_labels, filter_of, uncertainty

    for prefix, name in ((arguments.detail, "png"), (arguments.uncertainty, "uncertainty.out")):
        if prefix:
            if not os.path.basename(prefix):
                raise OptionError(f"The prefix of files must end in a name but is: {prefix}.")
            check_writable(Path(f"{prefix}.{name}"))
    checkpoint = load_checkpoint(arguments.model, model_only=not arguments.uncertainty)
    model = restored_model(checkpoint)
    optimizer = filter_of(checkpoint, model) if arguments.uncertainty else None
    systems = load_systems(arguments.system, model.type_map)
    rcut = model.architecture.descriptor.rcut
    labelled = FrameList(systems, rcut, len(model.type_map), model.dtype)
    if optimizer:
        check_labels(labelled)
    shown = watched(labelled)
    comparison = compare(model, shown) if arguments.detail else None
    errors = {kind: getattr(comparison, f"{kind}_rmse") for kind in UNITS} if comparison else rmse(model, shown)
    print(f"frames       {len(labelled)}")
    for kind, unit in UNITS.items():
        if labelled.labels[kind]:
            print(f"{f'{kind} RMSE':<13}{1e3 * errors[kind]:.4g} m{unit}")
    if comparison:
        from rlekf_ext.potential.plot import plot_parity

        files = [*comparison.save(arguments.detail), plot_parity({"model": comparison}, f"{arguments.detail}.png")]
        print("wrote        " + ", ".join(map(str, files)))
    if optimizer:
        from rlekf_ext.potential.plot import plot_uncertainty

        found = uncertainty(optimizer, model, labelled)
        if without := len(labelled) - len(found.frame):
            print(f"left out     {counted(without, 'frame')} without an energy or forces")
        for kind, rank, factor in zip(("energy", "force"), found.spearman, found.factors, strict=True):
            print(f"{kind:<13}error against predicted deviation: Spearman {rank:.3f}, RMS ratio {factor:.4g}")
        if len(found.energy) < FEW:
            print(f"             of {counted(len(found.energy), 'frame')}: too few for a rank correlation to say much")
        table = found.save(arguments.uncertainty)
        print(f"wrote        {table}, {plot_uncertainty({'model': found}, f'{arguments.uncertainty}.uncertainty.png')}")
    return 0


def run_select(arguments: argparse.Namespace) -> int:
    from rlekf_ext.potential.checkpoint import load_checkpoint, restored_model
    from rlekf_ext.potential.files import check_writable, writing
    from rlekf_ext.potential.load import load_systems
    from rlekf_ext.potential.plot import plot_selection
    from rlekf_ext.potential.select import check_empty, select
    from rlekf_ext.potential.uncertainty import filter_of

    if arguments.number < 1:
        raise OptionError(f"--number must be >= 1 but is: {arguments.number}.")
    checkpoint = load_checkpoint(arguments.model)
    model = restored_model(checkpoint)
    filter_of(checkpoint, model)  # raises if it has no P
    systems = load_systems(arguments.system, model.type_map, labelled=False)
    output = Path(arguments.output)
    with writing(output):
        check_empty(output)
    check_writable(output / "deviations.csv")
    found = select(checkpoint, model, systems, arguments.number)
    if found.left_out:
        print(f"left out     {counted(len(found.left_out), 'frame')}; the first: {found.left_out[0]}")
    print(f"chosen       {len(found.chosen)} of {counted(len(found.deviations), 'frame')}")
    for kind, column, unit in (("energy", 0, "meV/atom"), ("force", 1, "meV/Å")):
        pool, first, last = (
            1e3 * x[column] for x in (np.nanmedian(found.deviations, 0), found.when_chosen[0], found.when_chosen[-1])
        )
        print(f"{kind:<13}predicted deviation, median {pool:.3g}; first choice {first:.3g}, last {last:.3g} {unit}")
    table = found.save(output, model.type_map)
    print(f"wrote        {output}, {table}, {plot_selection(found, output / 'deviations.png')}")
    return 0


def run_plot(arguments: argparse.Namespace) -> int:
    from rlekf_ext.potential.plot import plot_lcurve

    print(f"wrote {plot_lcurve(arguments.curve, arguments.output)}")
    return 0


def run_export(arguments: argparse.Namespace) -> int:
    from rlekf_ext.potential.checkpoint import load_checkpoint, restored_model
    from rlekf_ext.potential.deepmd_format import export_model

    export_model(restored_model(load_checkpoint(arguments.model, model_only=True)), arguments.output)
    print(f"wrote {arguments.output}; `dp convert-backend {arguments.output} model.pth` makes a file for LAMMPS")
    return 0


def run_import(arguments: argparse.Namespace) -> int:
    from rlekf_ext.potential.checkpoint import save_checkpoint
    from rlekf_ext.potential.deepmd_format import import_model
    from rlekf_ext.potential.files import check_writable

    model, output = import_model(arguments.model), Path(arguments.output)
    check_writable(output)
    save_checkpoint(output, model)
    number = sum(parameter.numel() for parameter in model.parameters())
    print(f"wrote {output}: {number} weights for {', '.join(model.type_map)}; no P, so --init-model starts a fresh one")
    return 0


def run_info(_: argparse.Namespace) -> int:
    build = _C.build_info()
    print(f"rlekf_ext    {build['version']} (compiled by {build['compiler']} against torch {build['torch']})")
    print(f"torch        {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"python       {sys.version.split()[0]}")
    print(f"CPU          {_C.cpu_isa()}")
    print(f"CUDA         {build['cuda_compiler'] or 'no nvcc was found when this was built'}")
    print(f"             architectures: {build['cuda_architectures'] or 'none'}")
    for name, reason in backends().items():
        shown = f"native ({name})" if name in ("cpu", "cuda") else name
        print(f"backend      {shown:<14}{'absent: ' + reason if reason else 'available'}")
    return 0


def wrong(message: str) -> int:
    rank = os.environ.get("RANK", "0")
    print(f"rlekf{f', rank {rank}' if rank != '0' else ''}: {message}", file=sys.stderr)
    return 2
