"""Files that are whole or not there, and errors that name the file."""

import os
import resource
from pathlib import Path

import pytest

from rlekf_ext.errors import InputError
from rlekf_ext.potential.files import check_writable, reading, write_atomically, writing


class HalfwayError(Exception):
    pass


@pytest.mark.parametrize("old", [b"old", None])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, old):
    file = tmp_path / "file"
    if old:
        file.write_bytes(old)

    def half(path):
        path.write_bytes(b"ne")
        raise HalfwayError

    with pytest.raises(HalfwayError):
        write_atomically(file, half)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([old] if old else [])


def test_the_old_file_is_there_while_the_new_one_is_written(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")

    def write(path):
        assert path.parent == file.parent  # on one file system, or the move would copy
        path.write_text("new")
        assert file.read_text() == "old"

    write_atomically(file, write)
    assert file.read_text() == "new"


def test_file_and_folder_reach_the_disk_in_order(tmp_path, monkeypatch):
    file, fsync, seen = tmp_path / "file", os.fsync, []

    def record(descriptor):
        seen.append((os.readlink(f"/proc/self/fd/{descriptor}"), file.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    write_atomically(file, lambda path: path.write_text("new"))
    assert seen == [(str(tmp_path / ".file.tmp"), False), (str(tmp_path), True)]


def test_a_full_disk_is_named(tmp_path):
    """A limit on the size of files is used instead."""
    file = tmp_path / "file"
    file.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(InputError, match=r"file cannot be written: File too large\.$"):
            write_atomically(file, lambda path: path.write_text("x" * 5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none cannot be read: No such file or directory\.$"), reading("none"):
        Path("none").read_text()
    with pytest.raises(InputError, match=r"run cannot be read: run/data: No such file or directory\.$"), reading("run"):
        Path("run/data").read_text()
    (tmp_path / "text").write_bytes(b"abc\xff")
    with pytest.raises(InputError, match=r"text is not text in UTF-8: byte 3\.$"), reading(tmp_path / "text"):
        (tmp_path / "text").read_text(encoding="utf-8")


@pytest.mark.parametrize("manager", [reading, writing])
def test_other_errors_are_left_alone(manager):
    with pytest.raises(ValueError, match="zip") as caught, manager("file"):
        list(zip([1], [1, 2], strict=True))
    assert not isinstance(caught.value, InputError)


@pytest.mark.parametrize("place", ["file/model.pt", "file/below/model.pt"])
def test_where_nothing_can_be_written(tmp_path, place):
    (tmp_path / "file").write_text("a file, not a folder")
    with pytest.raises(InputError, match=rf"{place} cannot be written: .*file.*: (File exists|Not a directory)\."):
        check_writable(tmp_path / place)


def test_where_a_folder_takes_no_file():
    with pytest.raises(InputError, match=r"/proc/model\.pt cannot be written: "):
        check_writable(Path("/proc/model.pt"))


def test_check_writable_makes_the_folder_and_leaves_what_is_there(tmp_path):
    file = tmp_path / "a" / "b" / "model.pt"
    check_writable(file)
    assert os.listdir(file.parent) == []
    file.write_text("old")
    check_writable(file)
    assert os.listdir(file.parent) == ["model.pt"]
    assert file.read_text() == "old"


@pytest.mark.parametrize("name", ["folder", "\0"])
def test_what_is_no_name_of_a_file(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot be written: it is no name of a file"):
        check_writable(tmp_path / name)
