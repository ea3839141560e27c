"""An ONNX file, read without the onnx package: what it computes, and which outside files its loader would open.

A graph may come from a stranger, and the edge install has no ``onnx`` package. Hence this reader of the protobuf wire
format. It works on a memory map, steps over weights without touching their pages, and reads the part of the format that
``rsedge export`` writes. A field outside that part (a subgraph, a function, a sparse tensor) is an error, so that
nothing can be hidden where nobody looks.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rsedge.errors import BundleError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

_MOST_FIELDS = 2_000_000  # of a whole file; BLIP large has 60,000
_LONGEST_TEXT = 1024
_MOST_VALUES_READ = 64  # of a constant; only shapes and the like are looked at

ITEM_SIZES: Final = {1: 4, 2: 1, 3: 1, 6: 4, 7: 8, 9: 1, 10: 2}
"""TensorProto.DataType → bytes of an element, for the types that ``rsedge export`` writes."""
DTYPES: Final = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16"}
"""TensorProto.DataType → the name that a manifest has for it."""
_INT64 = 7


@dataclass(frozen=True, slots=True)
class Node:
    """A node: its operator, and the names of the values it takes (empty: not given) and makes."""

    domain: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def kind(self) -> str:
        """The operator with its domain, such as ``com.microsoft.MatMulIntegerToFloat``; ONNX's own have none."""
        return f"{self.domain}.{self.operator}" if self.domain else self.operator


@dataclass(frozen=True, slots=True)
class Initializer:
    """A tensor of weights.

    Attributes:
        name: Of the value it gives.
        shape: Lengths of its axes.
        nbytes: Bytes that its type and shape need.
        external: Where its bytes lie (``location``, ``offset``, ``length``) if in another file; else None, and
            ``nbytes`` lie in the file itself.
        values: Its numbers if it is a short int64 tensor of the file itself, else None.
    """

    name: str
    shape: tuple[int, ...]
    nbytes: int
    external: dict[str, str] | None
    values: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Value:
    """An input or output; a string in ``shape`` names a dimension that varies."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Model:
    """What an ONNX file holds. ``opsets``: operator domain → version; ONNX's own domain is the empty text."""

    opsets: dict[str, int]
    nodes: tuple[Node, ...]
    initializers: tuple[Initializer, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


# The part of onnx/onnx.proto that rsedge export writes: message → field number → (name, content). Content is "int",
# "number" (a float, passed over), "text", "bytes" (passed over) or a message; "*" where the field may come repeatedly.
_FORMAT: Final[dict[str, dict[int, tuple[str, str]]]] = {
    "Model": {
        1: ("ir_version", "int"),
        2: ("producer_name", "text"),
        3: ("producer_version", "text"),
        4: ("domain", "text"),
        5: ("model_version", "int"),
        6: ("doc_string", "text"),
        7: ("graph", "Graph"),
        8: ("opset_import", "OperatorSet*"),
    },
    "OperatorSet": {1: ("domain", "text"), 2: ("version", "int")},
    "Graph": {
        1: ("node", "Node*"),
        2: ("name", "text"),
        5: ("initializer", "Tensor*"),
        10: ("doc_string", "text"),
        11: ("input", "Value*"),
        12: ("output", "Value*"),
    },
    "Node": {
        1: ("input", "text*"),
        2: ("output", "text*"),
        3: ("name", "text"),
        4: ("op_type", "text"),
        5: ("attribute", "Attribute*"),
        6: ("doc_string", "text"),
        7: ("domain", "text"),
    },
    "Attribute": {
        1: ("name", "text"),
        2: ("f", "number"),
        3: ("i", "int"),
        4: ("s", "text"),
        7: ("floats", "number*"),
        8: ("ints", "int*"),
        13: ("doc_string", "text"),
        20: ("type", "int"),
    },
    "Tensor": {
        1: ("dims", "int*"),
        2: ("data_type", "int"),
        8: ("name", "text"),
        9: ("raw_data", "bytes"),
        12: ("doc_string", "text"),
        13: ("external_data", "Entry*"),
        14: ("data_location", "int"),
    },
    "Entry": {1: ("key", "text"), 2: ("value", "text")},
    "Value": {1: ("name", "text"), 2: ("type", "Type"), 3: ("doc_string", "text")},
    "Type": {1: ("tensor_type", "TensorType"), 6: ("denotation", "text")},
    "TensorType": {1: ("elem_type", "int"), 2: ("shape", "Shape")},
    "Shape": {1: ("dim", "Dimension*")},
    "Dimension": {1: ("dim_value", "int"), 2: ("dim_param", "text"), 3: ("denotation", "text")},
}


def read_model(path: Path) -> Model:
    """The model in the ONNX file ``path``.

    Raises:
        BundleError: It is not a readable ONNX file, is cut short, holds something that ``rsedge export`` never writes,
            or an initializer has other bytes than its type and shape need.
    """
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            reader = _Reader(data)
            return _model(reader, reader.message("Model", 0, len(data)))
    except (ValueError, IndexError) as error:  # ValueError: mmap of an empty file, or a malformed field below
        raise BundleError(
            f"{path.name} is not a readable ONNX file of rsedge ({error}): do not use it, export again"
        ) from error


def external_locations(path: Path) -> frozenset[str]:
    """The ``location`` of every tensor of the ONNX file ``path`` that is kept in another file, as written there.

    Raises:
        BundleError: As :func:`read_model`.
    """
    return frozenset(
        tensor.external["location"] for tensor in read_model(path).initializers if tensor.external is not None
    )


class _Reader:
    """Messages of a file as dictionaries of field name → value, or list of values where it may come repeatedly."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self._left = _MOST_FIELDS

    def message(self, kind: str, start: int, end: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for number, wire, value in self._fields(start, end):
            if number not in _FORMAT[kind]:
                raise ValueError(f"its {kind} has the field {number}, which rsedge never writes")
            name, content = _FORMAT[kind][number]
            many = content.endswith("*")
            for item in self._content(f"{kind}.{name}", content.rstrip("*"), wire, value, many=many):
                if many:
                    found.setdefault(name, []).append(item)
                elif name in found:  # loaders differ in what they make of it
                    raise ValueError(f"its {kind} gives {name} twice")
                else:
                    found[name] = item
        return found

    def _content(self, place: str, content: str, wire: int, value: Any, *, many: bool) -> Iterator[Any]:
        """The values in one field; numbers that may come repeatedly may also come packed."""
        if content == "int" and wire == _VARINT:
            yield value
        elif content == "int" and wire == _BYTES and many:
            position, end = value
            while position < end:
                self._spend()
                number, position = _varint(self.data, position, end)
                yield number
        elif content == "number" and (wire == _FIXED32 or (wire == _BYTES and many)):
            yield None
        elif content in ("int", "number") or wire != _BYTES:
            raise ValueError(f"its {place} is of the wrong wire type {wire}")
        elif content == "text":
            if value[1] - value[0] > _LONGEST_TEXT:
                raise ValueError(f"its {place} is longer than {_LONGEST_TEXT} bytes")
            yield self.data[value[0] : value[1]].decode()
        else:
            yield value if content == "bytes" else self.message(content, *value)

    def _fields(self, position: int, end: int) -> Iterator[tuple[int, int, Any]]:
        """Number, wire type and value of each field of ``data[position:end]``; the value of bytes is their range."""
        data = self.data
        while position < end:
            self._spend()
            tag, position = _varint(data, position, end)
            number, wire = tag >> 3, tag & 7
            value: Any = None
            if wire == _VARINT:
                value, position = _varint(data, position, end)
            elif wire in (_FIXED64, _FIXED32):
                position += 8 if wire == _FIXED64 else 4
            elif wire == _BYTES:
                length, position = _varint(data, position, end)
                if not 0 <= length <= end - position:
                    raise ValueError(f"field {number} needs {length} bytes at {position}, {end - position} are left")
                value, position = (position, position + length), position + length
            else:
                raise ValueError(f"unknown wire type {wire} at byte {position}")
            if position > end:
                raise ValueError(f"a field runs past byte {end}")
            yield number, wire, value

    def _spend(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise ValueError(f"it has more than {_MOST_FIELDS} fields")


def _varint(data: mmap.mmap, position: int, end: int) -> tuple[int, int]:
    """A whole number, int64, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            raise ValueError(f"a number is cut short at byte {position}")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            value &= (1 << 64) - 1
            return value - (1 << 64) if value >> 63 else value, position
    raise ValueError(f"a number is longer than 10 bytes at byte {position}")


def _model(reader: _Reader, values: dict[str, Any]) -> Model:
    graph = values.get("graph")
    if graph is None:
        raise ValueError("it holds no graph")
    opsets: dict[str, int] = {}
    for entry in values.get("opset_import", []):
        if opsets.setdefault(entry.get("domain", ""), entry.get("version", 0)) != entry.get("version", 0):
            raise ValueError(f"it imports two versions of the operators of {entry.get('domain', '')!r}")
    nodes = tuple(
        Node(
            domain=node.get("domain", ""),
            operator=node.get("op_type", ""),
            inputs=tuple(node.get("input", ())),
            outputs=tuple(node.get("output", ())),
        )
        for node in graph.get("node", ())
    )
    initializers = tuple(_initializer(reader.data, tensor) for tensor in graph.get("initializer", ()))
    names = [tensor.name for tensor in initializers]
    if len(set(names)) != len(names):
        raise ValueError("it gives an initializer twice")
    return Model(
        opsets=opsets,
        nodes=nodes,
        initializers=initializers,
        inputs=tuple(_value(value) for value in graph.get("input", ())),
        outputs=tuple(_value(value) for value in graph.get("output", ())),
    )


def _initializer(data: mmap.mmap, tensor: dict[str, Any]) -> Initializer:
    name, kind, shape = tensor.get("name", ""), tensor.get("data_type", 0), tuple(tensor.get("dims", ()))
    what = f"its initializer {name[:80]!r}"
    if kind not in ITEM_SIZES:
        raise ValueError(f"{what} has the data type {kind}, which rsedge never writes")
    # Before the product: a thousand large lengths would make a number of thousands of digits.
    if len(shape) > 8 or any(not 0 <= length < 1 << 40 for length in shape):
        raise ValueError(f"{what} has the impossible shape {list(shape)[:8]}")
    needed = math.prod(shape) * ITEM_SIZES[kind]
    entries = tensor.get("external_data", [])
    begin, stop = tensor.get("raw_data", (0, 0))
    if tensor.get("data_location", 0) == 1 or entries:
        external: dict[str, str] = {}
        for entry in entries:
            if entry.get("key", "") in external:  # loaders differ in which they take
                raise ValueError(f"{what} gives {entry.get('key', '')[:80]!r} of its external data twice")
            external[entry.get("key", "")] = entry.get("value", "")
        if tensor.get("data_location", 0) != 1 or "location" not in external or begin != stop:
            raise ValueError(f"{what} is kept both here and elsewhere, or nowhere")
        return Initializer(name, shape, needed, external, None)
    if stop - begin != needed:
        raise ValueError(f"{what} has {stop - begin} bytes, its shape {list(shape)} needs {needed}")
    values = None
    if kind == _INT64 and needed <= 8 * _MOST_VALUES_READ:
        values = tuple(
            int.from_bytes(data[place : place + 8], "little", signed=True) for place in range(begin, stop, 8)
        )
    return Initializer(name, shape, needed, None, values)


def _value(values: dict[str, Any]) -> Value:
    name, tensor = values.get("name", ""), values.get("type", {}).get("tensor_type", {})
    kind = tensor.get("elem_type", 0)
    if kind not in DTYPES:
        raise ValueError(f"{name[:80]!r} has the data type {kind}, which rsedge never writes")
    dimensions = tensor.get("shape", {}).get("dim", [])
    return Value(name, DTYPES[kind], tuple(item.get("dim_param") or item.get("dim_value", 0) for item in dimensions))
