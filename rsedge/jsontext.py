"""JSON from outside, read value by value, so that memory does not grow with the document.

``json.loads`` needs up to 50 bytes of memory for one byte of text. So no value of more than 2 MiB is parsed at once; a
collection of items, which may have 64 MiB, is read item by item. What decides the time is how many values there are,
and that is counted first.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

LARGEST = 64 * 2**20
"""Bytes that a document may have."""
MOST_ELEMENTS = 10_000
"""Elements that the long list of a document may have."""

MOST_VALUES = 2_500_000
"""Lists, objects and commas that a document may have, as many as 2,200 items of Sentinel-2 have."""

_WINDOWS = (2**16, 2**21)  # bytes that are parsed at once; nearly every value fits the first
_MOST_MEMBERS = 1000
_BLANK = re.compile(rb"[ \t\r\n]*")
_BOM = b"\xef\xbb\xbf"


def parse_json(data: str | bytes) -> Any:
    """Return the value of a small document.

    Raises:
        ValueError: It is no JSON, is nested too deeply, or has more than 2 MiB.
    """
    reader = _Reader(data)
    reader.skip()
    value = reader.value()
    if reader.skip():
        raise reader.error("Extra data")
    return value


def json_members(data: str | bytes, streamed: str) -> Iterator[tuple[str, Any]]:
    """Yield the members of the object in a document: names and values, in order.

    Args:
        data: The document, UTF-8.
        streamed: Name of a member that may be a long list: each of its elements is yielded alone, under this name.

    Raises:
        ValueError: The document is no JSON object, a value in it is nested too deeply or has more than 2 MiB, or there
            are too many bytes, values, members or elements.
    """
    if len(data) > LARGEST:
        raise ValueError(f"it has {len(data)} bytes, and at most {LARGEST} are read")
    reader = _Reader(data)
    if (values := sum(map(reader.data.count, (b"[", b"{", b",")))) > MOST_VALUES:
        raise ValueError(f"it has about {values} values, and at most {MOST_VALUES} are read")
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
                if number == MOST_ELEMENTS:
                    raise ValueError(f"{name} has more than {MOST_ELEMENTS} elements")
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
