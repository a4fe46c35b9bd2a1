"""The errors that the user can fix. Each message gives the rule, the value and the way out.

`rlekf` prints them as one line and exits with code 2; any other exception is a bug in this package and shows its
traceback. Each is also the built-in exception that a caller would expect.
"""

from __future__ import annotations


class RlekfError(Exception):
    """The base class. Messages are one line of bounded length, whatever the files that they quote contain."""

    def __init__(self, message: str):
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        super().__init__(line if len(line) <= 2000 else f"{line[:1500]} ... {line[-400:]}")


class InputError(RlekfError, ValueError):
    """An input file, a checkpoint or another file that cannot be used, or one that cannot be written."""


class OptionError(InputError):
    """An option that is unknown, out of range, or at odds with another."""


class DataError(RlekfError, ValueError):
    """A structure or labels that cannot be used; the message names the file, the frame or the atom."""


class StoppedError(RlekfError, RuntimeError):
    """Training cannot continue."""


class BackendError(RlekfError, RuntimeError):
    """The requested backend is not available."""


class LostProcessError(RlekfError, RuntimeError):
    """A process of the group has ended or hangs; the message names it. The group can no longer be used."""


class NotEnoughMemoryError(RlekfError, MemoryError):
    """P, or what is made of it, does not fit; raised before anything is allocated."""
