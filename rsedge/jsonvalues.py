"""JSON objects → frozen dataclasses, led by their annotations, so that there is no second list of fields to forget.

Files come from strangers, so :func:`parse` and :func:`read_object` bound what a file may hold before memory is taken.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from rsedge.errors import BundleError, OptionError

T = TypeVar("T")

MOST_BYTES = 64 << 20
"""Largest JSON file that is read: a tokenizer of 256,000 tokens takes 35 MB."""
MOST_VALUES = 4_000_000
"""Most values in one file; parsed, they take about 300 MB."""
_DEEPEST = 32
_LONGEST_NUMBER = 40

_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " | ".join(json.dumps(choice) for choice in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        return "a list"
    return _WORDS.get(hint, "an object")


def _scalar(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(hint))
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is hint


def _convert(hint: Any, value: Any, where: str, report: Callable[[str], None]) -> Any:
    """``value`` as ``hint``, or None after a report."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return build(hint, value, where, report)
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(arguments[0], item, f"{where}[{i}]", report) for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _convert(arguments[1], item, f"{where}.{key}", report) for key, item in value.items()}
    if origin in (Union, types.UnionType):
        containers = [option for option in arguments if option not in _WORDS and get_origin(option) is not Literal]
        for option in containers:
            if isinstance(value, list if get_origin(option) is tuple else dict):
                return _convert(option, value, where, report)
        if any(_scalar(value, option) for option in arguments):
            return value
    elif _scalar(value, hint):
        return float(value) if hint is float else value
    report(f"{where} must be {_describe(hint)}, got {json.dumps(value)[:80]}")
    return None


def _meant(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def build(cls: type[T], values: dict[str, Any], where: str, report: Callable[[str], None]) -> T | None:
    """A ``cls`` from a JSON object, or None after at least one report.

    Args:
        cls: A dataclass whose fields are text, numbers, truth values, literals, dataclasses of this kind,
            ``tuple[X, ...]``, ``dict[str, X]`` or ``Any``; it raises BundleError or OptionError on impossible values.
        values: The JSON object.
        where: Path of the object in the file, empty for the whole.
        report: Called once per problem with a sentence that names the field.
    """
    prefix = f"{where}." if where else ""
    trouble: list[str] = []
    hints = get_type_hints(cls)
    fields = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    trouble += [
        f"{prefix}{name} is not a field rsedge knows{_meant(name, fields)}" for name in values if name not in fields
    ]
    trouble += [
        f"{prefix}{name} is missing"
        for name, item in fields.items()
        if name not in values and item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    ]
    converted = {
        name: _convert(hints[name], values[name], f"{prefix}{name}", trouble.append)
        for name in fields
        if name in values
    }
    if not trouble:
        try:
            return cls(**converted)
        except (BundleError, OptionError) as error:
            trouble.append(f"{where}: {error}" if where else str(error))
    for problem in trouble:
        report(problem)
    return None


def parse(data: bytes, *, most_values: int = MOST_VALUES) -> Any:
    """The values that the JSON text ``data`` holds.

    Args:
        data: The text, as bytes.
        most_values: Values it may hold; counted from its commas and brackets, before any is made.

    Raises:
        ValueError: It is no JSON, is not UTF-8, holds more values, nests deeper than 32, or holds a number that is not
            finite or has more than 40 characters.
    """
    if len(data) > MOST_BYTES:
        raise ValueError(f"it has {len(data)} bytes, at most {MOST_BYTES} are read")
    count = sum(data.count(mark) for mark in (b",", b"[", b"{"))
    if count > most_values:
        raise ValueError(f"it holds about {count} values, at most {most_values} are read")
    try:
        values = json.loads(data.decode("utf-8-sig"), parse_constant=_number, parse_float=_number, parse_int=_number)
    except RecursionError:
        raise ValueError(f"it nests deeper than {_DEEPEST}") from None
    level, depth = [values], 0
    while level:
        depth += 1
        if depth > _DEEPEST:
            raise ValueError(f"it nests deeper than {_DEEPEST}")
        # Only lists and objects go on: a vocabulary of a million words is one look at each.
        inner = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list))
        level = [value for group in inner for value in group if isinstance(value, dict | list)]
    return values


def loads(data: str | bytes) -> Any:
    """``json.loads`` for texts of any size that are trusted to fit the memory, but not to be well made.

    Raises:
        ValueError: It is no JSON, or nests deeper than Python can follow.
    """
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it nests too deeply") from None


def _number(text: str) -> int | float:
    """A number of a JSON text; the words NaN and Infinity, and 1e999, are none."""
    if len(text) <= _LONGEST_NUMBER:
        with contextlib.suppress(ValueError):
            return int(text)
        value = float(text)
        if math.isfinite(value):
            return value
    raise ValueError(f"{text[:_LONGEST_NUMBER]} is not a JSON number that is read: it must be finite and short")


def read_object(path: Path, report: Callable[[str], None], remedy: str) -> dict[str, Any] | None:
    """The JSON object in ``path``, or None after a report that ends in ``remedy``.

    What it may hold is bounded as in :func:`parse`.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for without end
            raise ValueError("it is no file")
        with path.open("rb") as stream:
            values = parse(stream.read(MOST_BYTES + 1))
    except FileNotFoundError:
        report(f"{path.name} is missing: {remedy}")
        return None
    except (OSError, ValueError) as error:
        report(f"{path.name} is not readable JSON ({error}): {remedy}")
        return None
    if not isinstance(values, dict):
        report(f"{path.name} must hold a JSON object: {remedy}")
        return None
    return values
