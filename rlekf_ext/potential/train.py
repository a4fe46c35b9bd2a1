"""The trainer, to be read from top to bottom: `train` is the story, the rest are its parts in the order they appear."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from rlekf_ext.environment import this_machine
from rlekf_ext.errors import DataError, InputError, NotEnoughMemoryError, RlekfError, StoppedError
from rlekf_ext.potential.architecture import differences
from rlekf_ext.potential.batches import Batches, Feed, kinds_used, labels_used, load_frames
from rlekf_ext.potential.checkpoint import load_checkpoint, restored_model, run_of, save_checkpoint
from rlekf_ext.potential.data import auto_sel
from rlekf_ext.potential.evaluate import UNITS, rmse, watched
from rlekf_ext.potential.files import check_writable, reading, write_atomically, writing
from rlekf_ext.potential.frames import FrameList, survey
from rlekf_ext.potential.input import Config
from rlekf_ext.potential.model import DeepPotential
from rlekf_ext.potential.neighbors import Frame
from rlekf_ext.potential.optimizers import AdamSteps, KalmanSteps, build_optimizer, prefactors
from rlekf_ext.potential.table import Nodes, Table, scalar_at
from rlekf_ext.potential.threads import use_threads
from rlekf_ext.processes import ALONE, Processes, torchrun_name, torchrun_restarts, torchrun_started
from rlekf_ext.schema import counted, shown

CPU = torch.device("cpu")
MOST_EVALUATED = 2000  # held-out frames at the end of an epoch
REPEATED = 1.0  # seconds in which a second Ctrl-C is the same one
MOST_FITTED = 200  # frames that the energies of the elements are fitted to, beside the network


def train(
    config: Config,
    *,
    restart: bool = False,
    quiet: bool = False,
    processes: Processes = ALONE,
    most_threads: int | None = None,
    device: torch.device = CPU,
) -> dict[str, Any]:
    """Train a Deep Potential as an input file says, and return the summary that is also written as JSON.

    Writes DeePMD-kit's lcurve.out, a checkpoint, the model with the lowest held-out errors so far, and in
    lcurve.out.json a summary with the held-out RMSE at the end of every epoch. Ctrl-C writes the checkpoint and ends
    after the batch at hand. `restart` continues from the checkpoint, bit for bit; a new run begins with `init_model` of
    the input file if there is one. Several processes share the frames of each batch and P, and the first writes the
    files. With `most_threads`, the numbers of threads follow from the work that there is, up to this many; see
    threads.py. Frames stay on the CPU; those of a batch are moved to the `device`, where the model and P are, ahead of
    their use.

    Raises InputError and DataError before a curve or a checkpoint is written, and, with the checkpoint written,
    StoppedError when the filter has skipped `max_skipped` measurements in a row, and DataError for a file that has
    changed meanwhile.
    """
    settings = config.training
    curve_file, checkpoint_file = Path(settings.disp_file), Path(f"{settings.save_ckpt}.pt")
    summary_file, best_file = Path(f"{settings.disp_file}.json"), Path(f"{settings.save_ckpt}.best.pt")
    quiet = quiet or processes.rank > 0
    restart = restart or processes.any(torchrun_restarts() and _is_of_this_torchrun(checkpoint_file))
    checkpoint = load_checkpoint(checkpoint_file, processes) if restart else None
    earlier = load_checkpoint(settings.init_model, processes) if settings.init_model and not restart else None
    say = (lambda *_: None) if quiet else tqdm.write
    training, validation = load_frames(config, quiet, say, processes, most_threads)
    everything, validating = training.every, validation.every
    held_out = validating if len(validating) else everything
    sample = held_out.sample(MOST_EVALUATED)

    say(f"Device: {device_name(device)}")
    why = "--restart" if restart else "init_model"
    model = build_model(config, everything, validating, checkpoint or earlier, why)
    model.to(device)
    try:
        for some in (everything, held_out):  # more neighbours than sel has slots for: an error now, not hours later
            for frame in some.with_more_than(model.architecture.descriptor.sel):
                model.descriptor.check(frame)
    except DataError as error:
        if not (checkpoint or earlier):
            raise
        source = checkpoint_file if checkpoint else settings.init_model
        fixed = f"The sel of {source} cannot change: train from scratch, or leave such frames out."
        raise DataError(f"{error} {fixed}") from error
    batches = training.batches(settings.seed or 0)
    num_steps = settings.numb_steps or length(settings.num_epochs or 1, len(batches))
    disp_freq = settings.disp_freq or min(len(batches), 1000)
    kinds = sorted(set(kinds_used(config)))
    present = survey(everything, model.architecture.descriptor).elements
    unseen = model.descriptor.without_statistics()
    absent = ", ".join(model.type_map[element] for element in unseen if element not in present)
    if checkpoint and (new := ", ".join(model.type_map[element] for element in unseen if element in present)):
        raise InputError(
            f"The training data have {new}, which the run of {checkpoint_file} had not: begin another run with its "
            "model (--init-model, and another save_ckpt), which fits statistics and energies of new elements."
        )
    try:
        optimize = build_optimizer(config, model, num_steps, processes, say)
    except NotEnoughMemoryError as error:
        fewer = f" No training frame has {absent}: without them in type_map P is smaller." if absent else ""
        raise NotEnoughMemoryError(f"{error}{fewer}") from error
    everything.cache.limit(settings.cache)  # of what P leaves
    if most_threads and device.type == "cpu":
        say(use_threads(optimize, model, everything.num_atoms, len(batches), most_threads, processes))
    elif most_threads:
        torch.set_num_threads(most_threads)  # for what is made ready on the CPU
    progress: dict[str, Any] = {"step": 0, "updates": 0, "seconds": 0.0, "epochs": []}
    if checkpoint:
        if set(optimize.saved_as) != set(checkpoint.get("optimizer", ())):
            raise InputError(
                f"The checkpoint {checkpoint_file} is of {checkpoint_kind(checkpoint)} but the input file asks for the "
                f"optimizer {config.optimizer.type}; start without --restart, or restore the input file."
            )
        optimize.load_state_dict(checkpoint["optimizer"])
        batches.load_state_dict(checkpoint["batches"])
        progress = checkpoint["progress"]
        if (before := progress.get("per_epoch", len(batches))) != len(batches):
            say(f"An epoch had {before} batches so far and now has {len(batches)}: epochs are counted in those of now.")
        del checkpoint  # its tensors are parts of the file, which is about to be replaced
    elif earlier:
        say(f"Begins with the model of {settings.init_model}.")
        begin_with(earlier, optimize, model, everything, config, say)
    else:
        optimize.start(everything.spread(MOST_FITTED))
    nodes = progress.get("nodes") or (earlier or {}).get("progress", {}).get("nodes")
    del earlier
    model.table = build_table(model, (everything, held_out), settings.table, nodes)
    processes.agree(model.state_dict().values())  # the last bit may differ between kinds of CPU
    if processes.size > 1:
        say(f"{processes.size} processes share P and the frames of each batch.")
        if (idle := processes.size - batches.most_frames) > 0:
            say(f"Frames in the largest batch: {batches.most_frames}; processes without any: {idle}. Raise batch_size.")
    say(
        f"{counted(len(everything), 'frame')} for training, {len(validating)} held out; "
        f"{counted(len(batches), 'batch', 'batches')} per epoch, {num_steps} in all"
    )
    if len(sample) < len(held_out):
        say(f"While training, errors are those of {len(sample)} held-out frames drawn at random; at the end, of all.")
    if not len(validating):
        say("No frame is held out: the errors shown are those of the training frames.")
    say(labels_used(config, everything.labels))
    if absent:
        say(f"No training frame has {absent}: what the model says of it means nothing.")
    if not config.optimizer.given:
        say("The input has no section optimizer: RLEKF trains, and learning_rate is not used.")
    say(repr(optimize))
    if progress["step"]:
        say(f"Restarted from {checkpoint_file}, batch {progress['step']} of {num_steps}.")
        if progress["step"] >= num_steps:
            say("Nothing is left to do: raise numb_steps or num_epochs to go on.")
    elif os.path.exists(checkpoint_file):
        say(f"{checkpoint_file} exists and will be replaced; --restart would continue from it.")

    feed = feed_of(batches, optimize, model)
    best: list[DeepPotential] = []  # the model of lowest held-out errors, until it is written

    def save() -> None:
        if best:
            save_checkpoint(best_file, best[0], processes)
            best.clear()
        elif "best" not in progress and processes.rank == 0:
            with writing(best_file):
                best_file.unlink(missing_ok=True)  # of an earlier run, whose checkpoint is about to be replaced
        if model.table:
            progress["nodes"] = model.table.saved
        progress["per_epoch"] = len(batches)
        state = {"optimizer": optimize.state_dict(), "batches": feed.state_dict(), "progress": progress}
        save_checkpoint(checkpoint_file, optimize.result, processes, **state, run=torchrun_name())

    def finish_epoch() -> None:
        some = held_out if progress["step"] == num_steps else sample
        row = end_of_epoch(progress, len(batches), optimize.result, some, processes, quiet)
        progress["epochs"].append(row)
        by_kind = {kind: row[f"{kind}_rmse"] for kind in kinds if f"{kind}_rmse" in row}
        product, lowest = math.prod(by_kind.values()), progress.get("best", {}).get("product", math.inf)
        if processes.any(len(validating) and by_kind and product < lowest):
            progress["best"] = {"epoch": row["epoch"], "product": product}
            best[:] = [copy.deepcopy(optimize.result)]
        refine(model, everything, processes, say)
        say(f"epoch {row['epoch']:<5.4g} {row['seconds']:8.1f} s   {error_text(by_kind, '.3e', '   ')}")
        if skipped := optimize.skipped():
            say(f"skipped so far: {skipped}")

    if processes.rank == 0:
        for path in (curve_file, summary_file, checkpoint_file, best_file):
            check_writable(path)
    shown_at_once = (validation if len(validating) else training).batch_sizes[0]
    curve = LearningCurve(curve_file, config, held_out, shown_at_once, progress["step"], processes)
    bar = tqdm(total=num_steps, initial=progress["step"], unit="batch", disable=quiet or None, mininterval=0.5)
    with interruption() as interrupted:
        with bar, saved_when_it_ends(save, processes, say, checkpoint_file):
            ended = progress["step"] and (progress["step"] == num_steps or progress["step"] % len(batches) == 0)
            if ended and progress["step"] / len(batches) not in [row["epoch"] for row in progress["epochs"]]:
                finish_epoch()  # the run that wrote the checkpoint had stopped before this
            while progress["step"] < num_steps and not processes.any(interrupted()):
                started = time.perf_counter()
                batch, frames = next(feed)
                try:
                    progress["updates"] += optimize(batch, progress["step"], frames)
                finally:  # the batch is used up, even if the filter stops at it
                    progress["step"] += 1
                last = progress["step"] == num_steps
                display, whole = (last or progress["step"] % every == 0 for every in (disp_freq, len(batches)))
                if device.type == "cuda" and (display or whole):
                    torch.cuda.synchronize(device)  # the time of what has been asked for so far
                progress["seconds"] += time.perf_counter() - started
                bar.update()
                if display:
                    errors = curve.write(progress["step"], optimize.result, batch, optimize.learning_rate)
                    bar.set_postfix_str(f"{progress['updates'] / progress['seconds']:.0f} updates/s, {errors}")
                if whole:
                    if last and len(sample) < len(held_out):
                        save()  # evaluating all frames may take a while
                    finish_epoch()
                if progress["step"] % settings.save_freq == 0:
                    save()
        save()
        say(f"wrote {checkpoint_file}, {curve_file}, {summary_file}")
        if "best" in progress:
            epoch = progress["best"]["epoch"]
            say(f"{best_file} is the model of epoch {epoch:.4g}, with the lowest held-out errors")
        stopped = processes.any(interrupted())
        if stopped:
            say(f"Interrupted after batch {progress['step']}; --restart continues from {checkpoint_file}.")
        machine = {"processes": processes.size, **this_machine()}
        if isinstance(optimize, KalmanSteps):
            machine["threads_of_p"] = optimize.optimizer.filter.threads or machine["threads"]
        summary = {**progress, "interrupted": stopped, "optimizer": repr(optimize), **machine}
        if processes.rank == 0:
            write_atomically(summary_file, lambda path: path.write_text(json.dumps(summary, indent=1)))
    return summary


def length(num_epochs: float, num_batches: int) -> int:
    """The number of batches in this many epochs: 1.1 epochs of 100 are 110, although 1.1 * 100 is above 110."""
    return max(1, math.ceil(round(num_epochs * num_batches, 6)))


def _is_of_this_torchrun(checkpoint_file: Path) -> bool:
    """Whether a checkpoint was written by the run that torchrun has restarted, not by an earlier one of that name."""
    own = run_of(checkpoint_file) == torchrun_name()
    return own and checkpoint_file.stat().st_mtime >= torchrun_started()


def device_name(device: torch.device) -> str:
    return "CPU" if device.type == "cpu" else f"{torch.cuda.get_device_name(device)} ({device})"


def checkpoint_kind(checkpoint: dict[str, Any]) -> str:
    """What a checkpoint can be restarted as."""
    saved = checkpoint.get("optimizer")
    if not saved:
        return "a model without training state (`rlekf import` writes such)"
    return "RLEKF or LKF" if "filter" in saved else "Adam"


def build_model(
    config: Config,
    training: Sequence[Frame],
    validating: Sequence[Frame] = (),
    checkpoint: dict[str, Any] | None = None,
    why: str = "--restart",
) -> DeepPotential:
    """The network of the input file, with statistics of the training frames and room for the neighbours of all frames,
    or that of the checkpoint, which is read because of `why`."""
    descriptor, fitting = config.model.descriptor, config.model.fitting_net
    factor = descriptor.sel_factor
    if checkpoint:
        model = restored_model(checkpoint)
        for name, wanted, saved in differences(config.model.architecture(), model.architecture):
            if name != "model/descriptor/sel" or factor is None:
                raise InputError(
                    f"The checkpoint has {name} = {shown(saved)} but the input file asks for {shown(wanted)}; start "
                    f"without {why}, or make the input file agree."
                )
        return model
    found, room = (survey(frames, config.model.architecture().descriptor) for frames in (training, validating))
    most = [max(slots) for slots in zip(found.slots, room.slots or found.slots, strict=True)]
    architecture = config.model.architecture(None if factor is None else auto_sel(most, factor))
    seed = next((s for s in (descriptor.seed, fitting.seed, config.training.seed) if s is not None), 0)
    model = DeepPotential(architecture, seed=seed)
    model.descriptor.fit_statistics(found.sums)
    if descriptor.set_davg_zero:
        model.descriptor.davg.zero_()
    if "energy" in kinds_used(config) and len(found.counts):
        weights = found.num_energies.sqrt()
        model.solve_energy_bias(weights[:, None] * found.counts, weights * found.energies, range(len(model.type_map)))
    return model


def begin_with(
    earlier: dict[str, Any],
    optimize: KalmanSteps | AdamSteps,
    model: DeepPotential,
    frames: Sequence[Frame],
    config: Config,
    say: Callable[[str], Any],
) -> None:
    """What a run takes over of the checkpoint of an earlier one, besides its model."""
    saved = earlier.get("optimizer", {})
    optimize.inherit_weights(saved)
    add_elements(model, frames, config, say)  # fits energies to what these weights leave
    optimize.inherit(saved, frames)


def add_elements(model: DeepPotential, frames: Sequence[Frame], config: Config, say: Callable[[str], Any]) -> None:
    """Statistics, and energies, of the elements that these frames have and those of an earlier run did not."""
    found = survey(frames, model.architecture.descriptor)
    if new := [element for element in model.descriptor.without_statistics() if element in found.elements]:
        model.descriptor.fit_statistics(found.sums, new)
        if config.model.descriptor.set_davg_zero:
            model.descriptor.davg[new] = 0
        say(f"New elements: {', '.join(model.type_map[element] for element in new)}.")
    unfitted = [element for element in found.elements if element in new or not model.energy_bias[element]]
    if unfitted:  # an energy of 0: all frames so far had forces alone
        some = frames.spread(MOST_FITTED) if isinstance(frames, FrameList) else frames
        model.fit_energy_bias(some, with_network=True, elements=unfitted)


def build_table(
    model: DeepPotential, sets: Iterable[Sequence[Frame]], wanted: bool = True, nodes: Sequence[Any] | None = None
) -> Table | None:
    """The table for these sets of frames, or that of a checkpoint; None if it is not wanted."""
    if not wanted:
        return None
    if nodes:
        return Table.restored(nodes)
    descriptor = model.architecture.descriptor
    return Table(scalar_at(descriptor, min(survey(frames, descriptor).shortest for frames in sets), model.dtype))


def feed_of(batches: Batches, optimize: KalmanSteps | AdamSteps, model: DeepPotential) -> Feed:
    """The batches, each with the frames that this process evaluates. While the batch before them trains, these are made
    and, for a model on a GPU, made ready and moved there."""
    elsewhere, table = model.energy_bias.device.type != "cpu", model.table

    def ready(batch: Sequence[Frame]) -> list[Frame]:
        frames = optimize.arranged(batch)
        if table:
            table.num_kept = max(table.num_kept, (1 + elsewhere) * len(frames))
            for frame in frames if elsewhere else ():
                table.with_frame(model, frame)
        return frames

    return Feed(batches, ready, ahead=elsewhere or batches.on_demand)


def refine(model: DeepPotential, frames: Sequence[Frame], processes: Processes, say: Callable[[str], Any]) -> None:
    """Add nodes to the table until it is exact enough on a few frames. In float32 rounding grows with their number: if
    more make it worse, they are taken back."""
    table, few = model.table, frames[:: -(-len(frames) // CHECKED)]
    precision = model.architecture.precision
    limit, rounded = TABLE_ERROR[precision], precision == "float32"
    before: tuple[Nodes, float] | None = None
    while table:
        error = table.error(model, few)
        if processes.any(rounded and before and error >= before[1]):  # all ask, and refine together
            assert before  # for mypy
            table.nodes, table.most_nodes = before[0], before[0].number
            say(f"That did not help: it has {table.nodes.number} nodes again.")
            return
        if not processes.any(error > limit and table.refined.number <= table.most_nodes):
            return
        before = table.nodes, error
        table.nodes = table.refined
        say(f"The table of the embedding nets was off by {error:.1e}: from now on it has {table.nodes.number} nodes.")


CHECKED = 3  # frames
TABLE_ERROR = {"float64": 1e-5, "float32": 1e-4}  # evaluation is exact


class LearningCurve:
    """DeePMD-kit's lcurve.out; a restart keeps the rows up to the batch that it continues from."""

    def __init__(
        self, path: Path, config: Config, held_out: FrameList, batch_size: int, step: int, processes: Processes
    ):
        self._path, self._loss, self._held_out, self._processes = path, config.loss, held_out, processes
        self._start_rate = config.learning_rate.start_lr if config.optimizer.type == "Adam" else None
        data = config.training.validation_data
        self._count = batch_size * (data.numb_btch if data else 1)
        self._kinds = ["energy", "force"] + ["virial"] * ("virial" in config.loss.kinds())
        names = ["rmse", *(f"rmse_{kind[0]}" for kind in self._kinds)]
        columns = [f"{name}_{part}" for name in names for part in ("val", "trn")]
        rows, before = ["#  step" + "".join(f"{name:>12}" for name in columns) + f"{'lr':>9}"], columns
        if step and os.path.exists(path):
            with reading(path):
                old = path.read_text(encoding="utf-8").splitlines()
            for row in old:
                values = row.split()
                if row.startswith("#  step"):  # virials may be new, or gone
                    before = values[2:-1]
                elif len(values) == len(before) + 2 and values[0].isdigit() and int(values[0]) <= step:  # else cut off
                    by_name = dict(zip(before, values[1:-1], strict=True))
                    found = "".join(f"{by_name.get(name, 'nan'):>12}" for name in columns)
                    rows.append(f"{values[0]:>7}{found}{values[-1]:>9}")
        if processes.rank == 0:
            write_atomically(path, lambda temporary: temporary.write_text("\n".join(rows) + "\n"))

    def write(self, step: int, model: DeepPotential, batch: FrameList, rate: float) -> str:
        """Add a row: RMSE on the batch just used and on held-out frames, taken in turn. Returns the latter as text."""
        count = min(self._count, len(self._held_out))
        taken = self._held_out[(step + np.arange(count)) % len(self._held_out)]
        factor = prefactors(self._loss, rate / self._start_rate if self._start_rate else 0.0)
        found = []  # of the held-out frames, of the batch
        for part in (taken, batch):
            errors = rmse(model, part[self._processes.rank :: self._processes.size], self._processes)
            atoms = part.num_atoms.mean()
            weights = {"energy": factor["e"] * atoms, "force": factor["f"], "virial": factor["v"] * atoms}
            terms = [weights[kind] * errors[kind] ** 2 for kind in self._kinds if not math.isnan(errors[kind])]
            found.append([math.sqrt(sum(terms)), *(errors[kind] for kind in self._kinds)])
        row = [value for pair in zip(*found, strict=True) for value in pair]
        if self._processes.rank == 0:
            with writing(self._path), self._path.open("a", encoding="utf-8") as file:
                file.write(f"{step:7d}" + "".join(f"{value:12.2e}" for value in row) + f"{rate:9.1e}\n")
        return error_text(dict(zip(self._kinds, found[0][1:], strict=True)), ".1e")


def error_text(errors: Mapping[str, float], digits: str, between: str = ", ") -> str:
    """Errors with their units, of the kinds that have labels."""
    shown = [(kind, value) for kind, value in errors.items() if not math.isnan(value)]
    return between.join(f"{kind[0].upper()} {value:{digits}} {UNITS[kind]}" for kind, value in shown)


def end_of_epoch(
    progress: dict[str, Any],
    batches_per_epoch: int,
    model: DeepPotential,
    held_out: Sequence[Frame],
    processes: Processes,
    quiet: bool,
) -> dict[str, float]:
    """A row of the summary: the progress of training, and the RMSE on these frames."""
    errors = rmse(model, watched(held_out[processes.rank :: processes.size], quiet), processes)
    return {
        "epoch": progress["step"] / batches_per_epoch,
        "updates": progress["updates"],
        "seconds": progress["seconds"],
        **{f"{kind}_rmse": value for kind, value in errors.items() if not math.isnan(value)},
    }


@contextmanager
def saved_when_it_ends(
    save: Callable[[], None], processes: Processes, say: Callable[[str], Any], checkpoint_file: Path
) -> Iterator[None]:
    """A filter that has stopped, a file that has changed or one that cannot be written leaves a checkpoint."""
    try:
        yield
    except (RlekfError, OSError) as error:  # OSError: whoever read what we print has gone
        if processes.size == 1 or isinstance(error, StoppedError):  # other processes know only of these
            with suppress(RlekfError, OSError):  # the error to show is the first one
                save()
                say(f"wrote {checkpoint_file}; --restart continues from it.")
        raise


@contextmanager
def interruption() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C (or SIGTERM) only makes the yielded function return True; a later Ctrl-C interrupts. A
    signal may come twice: torchrun passes on to its processes what the terminal, or a scheduler, sends to all."""
    seen: list[float] = []

    def handler(number: int, _: Any) -> None:
        if seen and number == signal.SIGINT and time.monotonic() - seen[0] > REPEATED:
            raise KeyboardInterrupt
        seen.append(time.monotonic())

    try:
        before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are somebody else's
        before = {}
    try:
        yield lambda: bool(seen)
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
