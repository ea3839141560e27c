"""JSON of strangers: bounded before memory is taken, and built into frozen dataclasses led by their annotations.

:func:`parse` and :func:`read_object` read a whole file, and :func:`build` makes a dataclass of it, so that there is no
second list of fields to forget. ``json.loads`` needs up to 50 bytes of memory for one byte of text, so
:func:`parse_json` reads no more than 2 MiB, and :func:`json_members` reads a collection of items, which may have
64 MiB, item by item.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import difflib
import json
import math
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from rsedge.errors import BundleError, OptionError

T = TypeVar("T")

MOST_BYTES = 64 << 20
"""Largest JSON file that is read: a tokenizer of 256,000 tokens takes 35 MB."""
MOST_VALUES = 4_000_000
"""Most values in one file; parsed, they take about 300 MB."""
LARGEST = MOST_BYTES
"""Bytes that a document read item by item may have."""
_DEEPEST = 32
_LONGEST_NUMBER = 40

_MOST_ELEMENTS = 10_000  # of the list that is read item by item
_MOST_STREAMED = 2_500_000  # lists, objects and commas of the document, as many as 2,200 items of Sentinel-2 have
_WINDOWS = (2**16, 2**21)  # bytes that are parsed at once; nearly every value fits the first
_MOST_MEMBERS = 1000
_BLANK = re.compile(rb"[ \t\r\n]*")
_BOM = b"\xef\xbb\xbf"

_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def describe_type(hint: Any) -> str:
    """The values that a field of this type takes, in words."""
    if get_origin(hint) is Literal:
        return " | ".join(json.dumps(choice) for choice in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(describe_type(option) for option in get_args(hint))
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
    report(f"{where} must be {describe_type(hint)}, got {json.dumps(value)[:80]}")
    return None


def build(cls: type[T], values: dict[str, Any], where: str, report: Callable[[str], None]) -> T | None:
    """A ``cls`` from a JSON object, or None after at least one report, each a sentence that names the field.

    Args:
        cls: A dataclass whose fields are text, numbers, truth values, literals, dataclasses of this kind,
            ``tuple[X, ...]``, ``dict[str, X]`` or ``Any``; it raises BundleError or OptionError on impossible values.
        values: The JSON object.
        where: Path of the object in the file, empty for the whole.
        report: Called once per problem.
    """
    prefix = f"{where}." if where else ""
    trouble: list[str] = []
    hints = get_type_hints(cls)
    fields = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            meant = "".join(f"; did you mean {near}?" for near in difflib.get_close_matches(name, fields, n=1))
            trouble.append(f"{prefix}{name} is not a field rsedge knows{meant}")
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
    """The values of a JSON text; they are counted from its commas and brackets before any is made.

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

    ValueError where it is no JSON, or nests deeper than Python can follow.
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


def parse_json(data: str | bytes) -> Any:
    """Return the value of a small document; ValueError where it is no JSON, nested too deeply, or above 2 MiB."""
    reader = _Reader(data)
    reader.skip()
    value = reader.value()
    if reader.skip():
        raise reader.error("Extra data")
    return value


def json_members(data: str | bytes, streamed: str) -> Iterator[tuple[str, Any]]:
    """Yield the members of the object in a UTF-8 document: names and values, in order.

    Each element of the member ``streamed``, if that is a list, is yielded alone, under this name.

    Raises:
        ValueError: The document is no JSON object, a value in it is nested too deeply or has more than 2 MiB, or there
            are too many bytes, values, members or elements.
    """
    if len(data) > LARGEST:
        raise ValueError(f"it has {len(data)} bytes, and at most {LARGEST} are read")
    reader = _Reader(data)
    if (values := sum(map(reader.data.count, (b"[", b"{", b",")))) > _MOST_STREAMED:
        raise ValueError(f"it has about {values} values, and at most {_MOST_STREAMED} are read")
    if reader.skip() != b"{":
        reader.value()  # says what is wrong where it is no JSON
        raise ValueError("it is no JSON object")
    kept = 0
    for count, _ in enumerate(reader.entries(b"}")):
        name = reader.value()
        if not isinstance(name, str):
            raise reader.error("Expecting property name enclosed in double quotes")
        if reader.skip() != b":":
            raise reader.error("Expecting ':' delimiter")
        reader.at += 1
        start = reader.at
        if reader.skip() == b"[" and name == streamed:
            for number, _ in enumerate(reader.entries(b"]")):
                if number == _MOST_ELEMENTS:
                    raise ValueError(f"{name} has more than {_MOST_ELEMENTS} elements")
                yield name, reader.value()
        else:
            value = reader.value()
            kept += reader.at - start
            if kept > _WINDOWS[-1] or count == _MOST_MEMBERS:
                raise ValueError(f"what it holds beside {streamed} has more than {_WINDOWS[-1]} bytes, or is too much")
            yield name, value
    if reader.skip():
        raise reader.error("Extra data")


class _Reader:
    """A document and where in it one is."""

    def __init__(self, data: str | bytes) -> None:
        data = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
        self.data = data
        self.at = len(_BOM) if data.startswith(_BOM) else 0

    def skip(self) -> bytes:
        """Go to the next byte that is no blank, and return it; empty at the end."""
        self.at = _BLANK.match(self.data, self.at).end()  # type: ignore[union-attr]  # it matches nothing too
        return self.data[self.at : self.at + 1]

    def entries(self, close: bytes) -> Iterator[None]:
        """Stop before each entry of the list or object that begins here; the caller reads the entry."""
        self.at += 1
        if self.skip() == close:
            self.at += 1
            return
        while True:
            yield
            found = self.skip()
            if found not in (b",", close) or not found:
                raise self.error("Expecting ',' delimiter")
            self.at += 1
            if found == close:
                return
            self.skip()

    def value(self) -> Any:
        """Read the value that begins here."""
        for size in _WINDOWS:
            piece = self.data[self.at : self.at + size]
            last = self.at + size >= len(self.data)
            try:
                # Not final where the piece may end within a letter.
                text = codecs.getincrementaldecoder("utf-8")().decode(piece, final=last)
                value, end = json.JSONDecoder().raw_decode(text)
            except json.JSONDecodeError as error:
                if last:
                    self.at += len(text[: error.pos].encode())
                    raise self.error(error.msg) from error
                continue
            except RecursionError as error:
                raise ValueError("it is nested too deeply") from error
            if end + 2 < len(text) or last:  # else a number may go on, as 1.5 does in 1.5e+3
                self.at += end if text.isascii() else len(text[:end].encode())
                return value
        raise self.error(f"a value has more than {_WINDOWS[-1]} bytes")

    def error(self, message: str) -> ValueError:
        """What is wrong here."""
        line = self.data.count(b"\n", 0, self.at) + 1
        column = self.at - self.data.rfind(b"\n", 0, self.at)
        return ValueError(f"{message}: line {line} column {column}")
