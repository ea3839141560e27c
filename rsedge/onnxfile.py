"""Which outside files an ONNX model would make its loader open, found without the onnx package.

An ONNX file may keep tensors in other files and names them by free text, so a model from elsewhere could point at any
file of this machine. The edge install has no ``onnx`` package, hence this reader of the protobuf wire format: it walks
only the messages that can hold a tensor, over a memory map, and steps over weights without touching their pages.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from rsedge.errors import BundleError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

# message → field number → message found there; only the fields on a path to a TensorProto (onnx/onnx.proto).
_FIELDS: Final[dict[str, dict[int, str]]] = {
    "Model": {7: "Graph", 20: "TrainingInfo", 25: "Function"},
    "TrainingInfo": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
    "Entry": {},
}
_GRAPH_FIELD = 7


def external_locations(path: Path) -> frozenset[str]:
    """The ``location`` of every tensor of the ONNX file ``path`` that is kept in another file, as written there.

    Initializers, sparse initializers, tensor attributes, subgraphs, functions and training graphs are all searched.

    Raises:
        BundleError: ``path`` is not a readable ONNX file, or it is cut short.
    """
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _locations(data)
    except (ValueError, IndexError) as error:  # ValueError: mmap of an empty file, or a malformed field below
        raise BundleError(f"{path.name} is not a readable ONNX file ({error}): it is damaged or cut short") from error


def _locations(data: mmap.mmap) -> frozenset[str]:
    found: set[str] = set()
    has_graph = False
    # A stack of byte ranges and not recursion: nesting is the file's choice, the depth of our stack is not.
    pending = [("Model", 0, len(data))]
    while pending:
        message, start, end = pending.pop()
        children = _FIELDS[message]
        for number, begin, stop in _length_delimited(data, start, end):
            if message == "Entry":
                continue
            child = children.get(number)
            if child == "Entry":
                found.update(_location(data, begin, stop))
            elif child is not None:
                has_graph |= message == "Model" and number == _GRAPH_FIELD
                pending.append((child, begin, stop))
    if not has_graph:
        raise ValueError("it holds no graph")
    return frozenset(found)


def _location(data: mmap.mmap, start: int, end: int) -> Iterator[str]:
    """The value of a StringStringEntryProto whose key is ``location``."""
    # Protobuf lets the last occurrence of a field win; every value is taken, so none can hide behind another.
    keys, values = set(), []
    for number, begin, stop in _length_delimited(data, start, end):
        if number == 1:
            keys.add(data[begin:stop])
        elif number == 2:
            values.append(data[begin:stop].decode("utf-8", "backslashreplace"))
    if b"location" in keys:
        yield from values


def _length_delimited(data: mmap.mmap, position: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Field number, begin and end of each length-delimited field of the message in ``data[position:end]``."""
    while position < end:
        tag, position = _varint(data, position, end)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            _, position = _varint(data, position, end)
        elif kind == _FIXED64:
            position += 8
        elif kind == _FIXED32:
            position += 4
        elif kind == _BYTES:
            length, position = _varint(data, position, end)
            if length > end - position:
                raise ValueError(f"field {number} needs {length} bytes at {position}, {end - position} are left")
            yield number, position, position + length
            position += length
        else:
            raise ValueError(f"unknown wire type {kind} at byte {position}")
    if position != end:
        raise ValueError(f"a field runs past byte {end}")


def _varint(data: mmap.mmap, position: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            raise ValueError(f"a number is cut short at byte {position}")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError(f"a number is longer than 10 bytes at byte {position}")
