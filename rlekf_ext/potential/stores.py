"""Where systems in DeePMD-kit's layout lie: folders, and groups of HDF5 files. Both classes have the same methods."""

from __future__ import annotations

import os
import posixpath
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import numpy as np

from rlekf_ext.errors import DataError
from rlekf_ext.potential.stored import FileArray


@contextmanager
def _readable(place: str, what: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # numpy's reader of headers and the HDF5 library raise whatever they stumble over
        raise DataError(f"{place} is not {what}: {str(error).rstrip('.')}.") from error


class Folder:
    """A folder of the file system; links in it are followed."""

    kind = "folder"

    def __init__(self, path: Path):
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def __contains__(self, name: str) -> bool:
        try:
            os.lstat(self.path / name)  # a link to nowhere is an error when it is read, not an absent file
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def file(self, name: str) -> str:
        """What messages call a file in it."""
        return str(self.path / name)

    def chain(self) -> list[Any]:
        """What identifies it, whatever the way to it, and then each folder that holds it."""
        path = Path(os.path.realpath(self.path))
        return [path, *path.parents]

    def folders(self) -> dict[str, Folder]:
        """The folders in it, sorted by name; also a set that is a link to nowhere."""
        with os.scandir(self.path) as entries:
            names = sorted(e.name for e in entries if e.is_dir() or (e.name.startswith("set.") and not e.is_file()))
        return {name: Folder(self.path / name) for name in names}

    def words(self, name: str) -> list[str]:
        with _readable(self.file(name), "readable text"):
            return (self.path / name).read_text(encoding="utf-8-sig").split()

    def array(self, name: str) -> np.ndarray:
        """The numbers of a text or .npy file as float64."""
        file = self.path / name
        with _readable(str(file), "a readable array"):
            if file.suffix != ".npy":
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "loadtxt: input contained no data")  # an error follows
                    return np.loadtxt(file, ndmin=1 if file.stem == "type" else 2, encoding="utf-8-sig")
            return self._mapped(name).astype(np.float64)

    def stored(self, name: str) -> FileArray | np.ndarray:
        """The same, left in its file if its frames can be read from there."""
        file = self.path / name
        if file.suffix != ".npy":
            return self.array(name)
        with _readable(str(file), "a readable array"):
            array = self._mapped(name)
            if array.dtype.kind not in "biuf" or not array.flags.c_contiguous or not array.ndim:
                return array.astype(np.float64)
            return FileArray(file, str(file), array.offset, array.dtype, array.shape)

    def _mapped(self, name: str) -> np.memmap:
        # Mapped, so that a shape larger than the file is an error before memory is asked for; never unpickled.
        array = np.lib.format.open_memmap(self.path / name, mode="r")
        if array.dtype.kind in "cmMV":
            raise ValueError(f"its numbers are {array.dtype}")
        return array


class Group:
    """A group of an open HDF5 file."""

    kind = "group"

    def __init__(self, path: Path, group: Any):
        self.path, self.group = path, group
        with _readable(str(path), "a readable HDF5 file"):
            self.name, self.names = str(group.name), sorted(group)

    def __str__(self) -> str:
        return f"{self.path}#{self.name}"

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def file(self, name: str) -> str:
        return f"{self.path}#{posixpath.join(self.name, name)}"

    def chain(self) -> list[Any]:
        with _readable(str(self), "a readable group"):
            groups = [self.group]  # these compare by their address in the file
            while groups[-1].name != "/":
                groups.append(groups[-1].parent)
            return groups

    def folders(self) -> dict[str, Group]:
        found = {}
        with _readable(str(self), "a readable group"):
            for name in self.names:
                child = self.group.get(name)
                if isinstance(child, Mapping):
                    found[name] = Group(self.path, child)
                elif child is None and name.startswith("set."):
                    raise ValueError(f"{name} is a link to nowhere")
        return found

    def words(self, name: str) -> list[str]:
        with _readable(self.file(name), "readable text"):
            words = np.ravel(self._values(name, kinds="OSU"))
            return " ".join(word.decode() if isinstance(word, bytes) else word for word in words).split()

    def array(self, name: str) -> np.ndarray:
        with _readable(self.file(name), "a readable array"):
            return self._values(name, kinds="biuf").astype(np.float64)

    def stored(self, name: str) -> FileArray | np.ndarray:
        """The same, left in the file if it lies there in one piece, neither compressed nor in chunks."""
        with _readable(self.file(name), "a readable array"):
            data = self._dataset(name, kinds="biuf")
            offset = data.id.get_offset()  # None for the others
            if not os.path.samefile(data.file.filename, self.path):  # behind an external link
                offset = None
            if offset is None or not data.ndim or not data.size or data.id.get_storage_size() != data.nbytes:
                return np.asarray(data[()], np.float64)
            found = FileArray(self.path, self.file(name), offset, data.dtype, data.shape)
            first = found.read(np.arange(1))
            return found if np.array_equal(first, data[:1], equal_nan=True) else np.asarray(data[()], np.float64)

    def _values(self, name: str, kinds: str) -> np.ndarray:
        return np.asarray(self._dataset(name, kinds)[()])

    def _dataset(self, name: str, kinds: str) -> Any:
        data = self.group[name]
        if isinstance(data, Mapping):
            raise ValueError("it is a group")
        if data.dtype.kind not in kinds:
            raise ValueError(f"its values are {data.dtype}")
        stored = data.id.get_storage_size()
        if data.nbytes > max(2**24, 1100 * stored):  # 1100: more than gzip ever saves. HDF5 fills up what is missing.
            raise ValueError(f"its shape is {data.shape}, but only {stored} bytes of it are in the file")
        return data


Store: TypeAlias = Folder | Group


@contextmanager
def open_hdf5(path: Path, inside: str) -> Iterator[Group]:
    """The group `inside` (or "") of an HDF5 file."""
    try:
        import h5py
    except ImportError as error:
        raise DataError(f"{path} is read by h5py, which is not installed: pip install h5py.") from error
    with _readable(str(path), "a readable HDF5 file"):
        file = h5py.File(path, "r")
    with file:
        with _readable(f"{path}#{inside}", "a readable group"):
            if inside.strip("/") and inside not in file:
                names = ", ".join(f"{path}#/{name}" for name in file)
                raise DataError(f"{path} has no group {inside}; it has {names or 'none'}.")
            group = file[inside or "/"]
        if not isinstance(group, Mapping):
            raise DataError(f"{path}#{inside} is no group but an array.")
        yield Group(path, group)


def find_systems(root: Store, patterns: Sequence[str]) -> Iterator[Store]:
    """The folders with a type.raw at any depth, in order, `root` first; with patterns, only those that one matches.

    A link is followed unless it leads back to a folder that holds it. Two links to a system are two systems, as in
    DeePMD-kit, but what is below a folder is searched once.
    """
    wanted = [("**", *PurePosixPath(pattern).parts) for pattern in patterns]
    searched = set()
    stack: list[tuple[Store, tuple[str, ...], frozenset]] = [(root, (), frozenset())]
    while stack:
        folder, names, above = stack.pop()
        chain = folder.chain()
        if chain[0] in above:
            continue
        if "type.raw" in folder and (not wanted or any(_match(names, pattern) for pattern in wanted)):
            yield folder
        if chain[0] not in searched:
            searched.add(chain[0])
            children: Mapping[str, Store] = folder.folders()
            stack += [(children[name], (*names, name), above.union(chain)) for name in reversed(list(children))]


def _match(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the names of a path match the parts of a pattern, of which "**" stands for any number of names."""
    if not pattern:
        return not names
    if pattern[0] == "**":
        return any(_match(names[i:], pattern[1:]) for i in range(len(names) + 1))
    return bool(names) and fnmatchcase(names[0], pattern[0]) and _match(names[1:], pattern[1:])
