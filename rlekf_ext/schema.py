"""Options as dataclasses: a field is an option, with its type, default, range and help on one line.

The same fields check keyword arguments, the sections of an input file, and the options in DeePMD-kit's input.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np

from rlekf_ext.errors import OptionError


def option(default: Any = MISSING, help: str = "", **rule: Any) -> Any:
    """A field; without a default it must be given. Rules: low, above, high, below (the range), choices, also (other
    names for it), pattern (of a string), form (how a message describes it), single (one value means a list of one)."""
    return field(default=default, metadata={**rule, "help": help})


def read(section: type, given: Any, path: str = "", **how: Any) -> Any:
    """A section from a mapping of names to values, with defaults filled in. See `values`.

    Raises OptionError, which names the option by its path.
    """
    found = values(section, given, path, **how)
    for f in fields(section):
        if f.name not in found and f.default is MISSING and f.default_factory is MISSING:
            raise OptionError(f"{join(path, f.name)} is missing; it has no default.")
    return section(**found)


def values(
    section: type,
    given: Any,
    path: str = "",
    *,
    other: Callable[[type, str, Any, str], None] | None = None,
) -> dict[str, Any]:
    """The given options of a section, checked, in the order of the fields: an unsupported `type` is reported before
    the options that come with it. `other` is called for names that are not fields; by default they are errors.

    Raises OptionError.
    """
    other = other or unknown
    given, found = json_object(given, path), {}
    types = get_type_hints(section)
    for f in fields(section):
        names = [name for name in (f.name, *f.metadata.get("also", ())) if name in given]
        if len(names) > 1:
            raise OptionError(f"{join(path, names[0])} and {join(path, names[1])} mean the same; keep one.")
        for name in names:
            found[f.name] = _value(given.pop(name), types[f.name], f.metadata, join(path, name), other)
    for name, value in given.items():
        other(section, name, value, path)
    return found


def unknown(section: Any, name: str, value: Any, path: str) -> None:
    """Raises OptionError for a name that no field has, and suggests the nearest one."""
    known = [f.name for f in fields(section)]
    aliases = [alias for f in fields(section) for alias in f.metadata.get("also", ())]
    close = difflib.get_close_matches(name, [*known, *aliases], n=1)
    hint = f"did you mean {close[0]}?" if close else f"known options are {', '.join(known)}."
    raise OptionError(f"{join(path, name)} is not a known option; {hint}")


def check_choice(value: Any, choices: tuple, path: str) -> None:
    """Raises OptionError for a value that is not among the choices."""
    if value not in choices:
        near = [choice for choice in choices if str(choice).lower() == str(value).lower()]
        hint = f"did you mean {shown(near[0])}?" if near else f"supported: {', '.join(map(shown, choices))}."
        raise OptionError(f"{path} = {shown(value)} is not supported; {hint}")


def json_object(given: Any, path: str) -> dict[str, Any]:
    """A copy of a JSON object without comments, which are keys that begin with "_"."""
    if not isinstance(given, Mapping):
        raise OptionError(f"{path or 'this'} must be a JSON object {{...}} but is: {shown(given)}.")
    return {name: value for name, value in given.items() if not name.startswith("_")}


def join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number and its noun: 1 frame, 2 frames."""
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"


def shown(value: Any) -> str:
    """A value as JSON, for a message."""
    try:
        return json.dumps(value, default=str, ensure_ascii=False)
    except RecursionError:
        return "nested too deeply to be shown"


def range_text(rule: Mapping[str, Any]) -> str:
    """The range or the choices of an option in words, "" if any value is allowed."""
    if rule.get("choices"):
        return ", ".join(map(str, rule["choices"]))
    return " and ".join(f"{sign} {rule[name]}" for name, sign, _ in LIMITS if rule.get(name) is not None)


LIMITS: tuple[tuple[str, str, Callable[[Any, Any], bool]], ...] = (
    ("low", ">=", lambda value, limit: value >= limit),
    ("above", ">", lambda value, limit: value > limit),
    ("high", "<=", lambda value, limit: value <= limit),
    ("below", "<", lambda value, limit: value < limit),
)
WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    tuple[float, ...]: "a list of numbers, not empty,",
    tuple[int, ...]: "a list of whole numbers, not empty,",
    tuple[str, ...]: "a list of strings, not empty,",
}


def _value(value: Any, kind: Any, rule: Mapping[str, Any], path: str, other: Callable[..., None]) -> Any:
    """A value as `kind`: a section, a scalar, tuple[..., ...] or a union of these."""
    if isinstance(value, np.generic):  # a number of numpy
        value = value.item()
    if get_origin(kind) in (Union, UnionType):
        kinds = [k for k in get_args(kind) if k is not NoneType]
        if value is None and NoneType in get_args(kind):
            return None
        kind = next((k for k in kinds if _fits(value, k)), kinds[0])
    if is_dataclass(kind):
        return read(kind, value, path, other=other)  # type: ignore[arg-type]
    if rule.get("single") and not isinstance(value, list | tuple):
        value = [value]
    pattern = rule.get("pattern")
    if not _fits(value, kind) or (pattern and isinstance(value, str) and not re.fullmatch(pattern, value)):
        raise OptionError(f"{path} must be {rule.get('form') or WORDS[kind]} but is: {shown(value)}.")
    if get_origin(kind) is tuple:
        return tuple(_in_range(one, get_args(kind)[0], rule, f"{path}[{i}]") for i, one in enumerate(value))
    return _in_range(value, kind, rule, path)


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and len(value) > 0 and all(_fits(v, get_args(kind)[0]) for v in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    # in Python true is an int; in JSON it is not a number
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _in_range(value: Any, kind: type, rule: Mapping[str, Any], path: str) -> Any:
    if rule.get("choices"):
        check_choice(value, rule["choices"], path)
    if kind is int and not -(2**63) <= value < 2**63:
        raise OptionError(f"{path} must be a whole number of 64 bits but is: {shown(value)}.")
    for name, sign, holds in LIMITS:
        limit = rule.get(name)
        if limit is not None and not isinstance(value, str) and not holds(value, limit):
            raise OptionError(f"{path} must be {sign} {limit} but is: {shown(value)}.")
    return float(value) if kind is float else value
