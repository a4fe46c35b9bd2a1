"""Checkpoints that are whole or not there."""

import multiprocessing
import os
import random
import resource
import time

import pytest
import torch
from helpers import make_model

from rlekf_ext import RLEKF
from rlekf_ext.errors import InputError, RlekfError
from rlekf_ext.potential import checkpoint
from rlekf_ext.potential.checkpoint import load_checkpoint, restored_model, save_checkpoint
from rlekf_ext.potential.files import check_writable
from rlekf_ext.potential.neighbors import make_frame


def small_model(**changes):
    model = make_model(sel=[9, 9], energy_bias=[1.5, -2.0], **changes)
    model.descriptor.davg.add_(0.25)
    return model


def weights(model):
    return torch.cat([value.flatten().double() for value in model.state_dict().values()])


@pytest.mark.parametrize(
    "changes", [{}, {"precision": "float32", "type_one_side": True, "resnet_dt": True, "fitting_resnet_dt": True}]
)
def test_what_is_saved_is_loaded(tmp_path, changes):
    model, file = small_model(**changes), tmp_path / "deep" / "down" / "model.pt"
    rest = {"progress": {"step": 3, "epochs": [{"epoch": 0.5}]}, "state": {"tiles": torch.arange(5.0)}}
    save_checkpoint(file, model, **rest)
    torch.load(file, weights_only=True)  # no code runs when somebody else's checkpoint is opened
    checkpoint = load_checkpoint(str(file))
    assert checkpoint["progress"] == rest["progress"]
    assert torch.equal(checkpoint["state"]["tiles"], torch.arange(5.0))
    restored = restored_model(checkpoint)
    assert restored.architecture == model.architecture
    assert torch.equal(weights(restored), weights(model))
    frame = make_frame([[0, 0, 0], [1.5, 0, 0.3]], None, [0, 1], 4.0, 2, dtype=model.dtype)
    assert torch.equal(restored(frame).forces, model(frame).forces)
    assert sorted(path.name for path in file.parent.iterdir()) == ["model.pt"]


@pytest.mark.parametrize("call", ["torch.save", "os.fsync", "pathlib.Path.replace"])
def test_a_failing_save_leaves_the_old_checkpoint(tmp_path, monkeypatch, call):
    file = tmp_path / "model.pt"
    save_checkpoint(file, small_model(), step=1)
    before = file.read_bytes()

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(call, fail)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(file, small_model(seed=2), step=2)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.pt"]
    save_checkpoint(file, small_model(seed=2), step=2)
    assert load_checkpoint(file)["step"] == 2


def test_a_full_disk_is_an_error_with_its_reason(tmp_path):
    """A limit on the size of files stands for it; torch.save makes a RuntimeError of both."""
    file = tmp_path / "model.pt"
    save_checkpoint(file, small_model(), step=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(InputError, match=r"model\.pt cannot be written: .*File too large"):
            save_checkpoint(file, small_model(), step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_checkpoint(file)["step"] == 1
    assert os.listdir(tmp_path) == ["model.pt"]


def saves_without_end(file, model, contents, progress):
    """Checkpoints of contents[step % 2]; progress: the step whose save has begun, the last whose save is over."""
    for step in range(1, 10**9):
        progress[0] = step
        save_checkpoint(file, model, step=step, state=contents[step % 2])
        progress[1] = step


@pytest.mark.parametrize("tries", [10, pytest.param(200, marks=pytest.mark.soak)])
def test_kill_9_leaves_the_old_checkpoint_or_the_new_one(tmp_path, tries):
    file, leftover, model = tmp_path / "model.pt", tmp_path / ".model.pt.tmp", small_model()
    contents = [torch.full((500_000,), float(value)) for value in range(2)]
    fork = multiprocessing.get_context("fork")  # no second import of torch: it would take far longer than the saves
    started = time.perf_counter()
    save_checkpoint(file, model, step=0, state=contents[0])
    one_save = time.perf_counter() - started
    draw, in_the_middle = random.Random(1), 0
    for _ in range(tries):
        save_checkpoint(file, model, step=0, state=contents[0])
        assert os.listdir(tmp_path) == ["model.pt"]  # what the last kill left is gone
        progress = fork.RawArray("q", 2)
        child = fork.Process(target=saves_without_end, args=(file, model, contents, progress))
        child.start()
        while not progress[0]:
            time.sleep(1e-4)
        time.sleep(draw.uniform(0, 4 * one_save))
        child.kill()
        child.join()
        begun, done = progress
        checkpoint = load_checkpoint(file)
        assert checkpoint["step"] in (begun, done)
        assert torch.equal(checkpoint["state"], contents[checkpoint["step"] % 2])
        assert torch.equal(weights(restored_model(checkpoint)), weights(model))
        assert set(tmp_path.iterdir()) <= {file, leftover}
        in_the_middle += leftover.exists()
    assert in_the_middle >= tries // 4  # or the kills did not fall where it matters
    check_writable(file)  # what a new run does first
    assert os.listdir(tmp_path) == ["model.pt"]
    print(f"{tries} kills, {in_the_middle} in the middle of a save: every checkpoint whole")


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint with a used covariance, and what is in it."""
    file, model = tmp_path_factory.mktemp("trained") / "model.pt", small_model()
    optimizer = RLEKF(model.parameters(), block_size=100)
    for _ in range(5):
        optimizer.update(torch.randn(optimizer.filter.plan.num_weights, dtype=torch.float64), 0.1)
    save_checkpoint(file, model, optimizer=optimizer.state_dict(), progress={"step": 3, "epochs": [{"epoch": 0.5}]})
    return file.read_bytes(), torch.load(file, weights_only=True)


@pytest.mark.parametrize("tries", [300, pytest.param(20_000, marks=pytest.mark.soak)])
def test_an_altered_byte_is_noticed(tmp_path, trained, tries):
    """Or means nothing, as the padding and the dates of a zip archive: then what is loaded is the same."""
    content, checkpoint = trained
    names_and_places = len(content) - content.index(b"PK\x01\x02")  # the directory of the archive, at its end
    file, draw = tmp_path / "model.pt", random.Random(2)
    unnoticed = 0
    for number in range(tries):
        place = draw.randrange(len(content) - (names_and_places if number % 2 else len(content)), len(content))
        altered = bytearray(content)
        altered[place] ^= draw.randrange(1, 256)
        file.write_bytes(altered)
        try:
            loaded = load_checkpoint(file)
        except InputError:
            continue
        assert same(loaded, checkpoint), place
        unnoticed += 1
    assert unnoticed < tries / 3
    print(f"{tries} altered bytes: {tries - unnoticed} refused, {unnoticed} without meaning")


def test_an_altered_number_is_noticed(tmp_path, trained):
    """torch.load itself would take it."""
    content, checkpoint = trained
    tiles = checkpoint["optimizer"]["state"][0]["tiles"]
    place = content.index(tiles.numpy().tobytes()) + 8 * 70 + 3
    file = tmp_path / "model.pt"
    file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    assert not same(torch.load(file, weights_only=True), checkpoint)
    with pytest.raises(InputError, match=r"is damaged, or another program wrote it\. Take another copy") as caught:
        load_checkpoint(file)
    assert "the checksum of archive/data/" in str(caught.value.__cause__)


@pytest.mark.parametrize("tries", [100, pytest.param(3000, marks=pytest.mark.soak)])
def test_a_truncated_file_is_noticed(tmp_path, trained, tries):
    content, _ = trained
    file, draw = tmp_path / "model.pt", random.Random(3)
    near_the_end = range(len(content) - tries // 2, len(content))
    for length in [*near_the_end, *(draw.randrange(len(content)) for _ in range(tries // 2))]:
        file.write_bytes(content[:length])
        with pytest.raises(InputError, match="it is damaged"):
            load_checkpoint(file)


def truncated(path):
    save_checkpoint(path, small_model())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


WRONG = {
    "truncated": truncated,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello\n" * 100),
    "numbers": lambda path: torch.save(torch.zeros(3), path),
    "deepmd-kit's": lambda path: torch.save({"model": {"weight": torch.zeros(3)}, "optimizer": {}}, path),
    "code": lambda path: torch.save({"format": 1, "model": os.system, "weights": 1}, path),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_file_that_is_no_checkpoint(tmp_path, kind):
    file = tmp_path / "other.pt"
    WRONG[kind](file)
    with pytest.raises(InputError) as caught:
        load_checkpoint(file)
    message = str(caught.value)
    assert message == (
        f"{file} is not a checkpoint of `rlekf train`: it is damaged, or another program wrote it. Take another copy, "
        "or train again."
    )
    assert caught.value.__cause__ is not None


def test_a_checkpoint_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"The checkpoint .*none\.pt does not exist;"):
        load_checkpoint(tmp_path / "none.pt")
    with pytest.raises(InputError, match=r"The checkpoint .* cannot be read: Is a directory\."):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (2, "The checkpoint .* has format 2 but this version of rlekf_ext reads format 1; use the version that wrote"),
        (None, "is not a checkpoint of this version of rlekf_ext: it has no format"),
    ],
)
def test_another_format_is_refused(tmp_path, form, message):
    file = tmp_path / "model.pt"
    save_checkpoint(file, small_model())
    checkpoint = torch.load(file, weights_only=True)
    assert checkpoint.pop("format") == 1
    torch.save(checkpoint if form is None else {**checkpoint, "format": form}, file)
    with pytest.raises(InputError, match=message):
        load_checkpoint(file)


def test_a_fault_of_our_own_is_not_the_users(tmp_path, monkeypatch):
    with pytest.raises(AttributeError):  # torch says that it cannot save a function: no file is to blame
        save_checkpoint(tmp_path / "model.pt", small_model(), function=lambda: None)
    monkeypatch.setattr(checkpoint, "_noted", lambda *_: list(zip([1], [1, 2], strict=True)))
    with pytest.raises(ValueError, match="zip") as caught:
        save_checkpoint(tmp_path / "model.pt", small_model())
    assert not isinstance(caught.value, RlekfError)
