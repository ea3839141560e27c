"""Whether a bundle's ONNX graph is one that ``rsedge export`` could have written, seen before a loader opens it.

A loader runs what it is given: operators of other libraries, compiled blobs (EPContext), loops without end, tensors
from any file of the machine. So the graph of a bundle may hold the operators and the parts of the format that the
exporter uses, and its weights must lie in the bundle. What this cannot bound is how much memory and time a graph of
ordinary operators takes when it runs.

The edge install has no ``onnx`` package, so :func:`read_model` reads the protobuf wire format. It works on a memory
map, steps over weights without touching their pages, and refuses every field that ``rsedge export`` does not write (a
subgraph, a function, a sparse tensor), so that nothing can be hidden where nobody looks.
"""

from __future__ import annotations

import math
import mmap
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rsedge.errors import BundleError

if TYPE_CHECKING:
    from rsedge.manifest import Graph

OPERATORS = frozenset({
    "Abs", "Add", "ArgMax", "Cast", "Concat", "Div", "Equal", "Exp", "Expand", "Gather", "GatherElements", "GatherND",
    "Gelu", "Gemm", "Identity", "LayerNormalization", "Less", "Log", "MatMul", "MatMulInteger", "Max", "Mul", "Pad",
    "QuantizeLinear", "Range", "ReduceL2", "ReduceLogSumExp", "ReduceMax", "ReduceSum", "Relu", "Reshape", "ScatterND",
    "Shape", "Sigmoid", "Slice", "Softmax", "Split", "Squeeze", "Sub", "Tanh", "TopK", "Transpose", "Unsqueeze",
    "Where", "com.microsoft.MatMulIntegerToFloat",
})  # fmt: skip
"""Every operator that this version of the exporter, or an earlier one, writes."""

_DOMAINS = ("", "com.microsoft")
_MOST_NODES = 100_000
# Of what decides how large a result is: in a constant of Expand, Range, Pad or Reshape.
_LARGEST_LENGTH = 1 << 24
_SIZED = {"Expand": (1,), "Range": (0, 1, 2), "Pad": (1,), "Reshape": (1,)}
# The exporter joins the class token's position with those of the patches, and leaves that to the loader.
_MOST_JOINED = 16

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MOST_FIELDS = 2_000_000  # of a whole file; BLIP large has 60,000
_LONGEST_TEXT = 1024
_MOST_VALUES_READ = 64  # of a constant; only shapes and the like are looked at
_TYPES: Final = {
    1: ("float32", 4), 2: ("uint8", 1), 3: ("int8", 1), 6: ("int32", 4), 7: ("int64", 8), 9: ("bool", 1),
    10: ("float16", 2),
}  # fmt: skip
"""TensorProto.DataType → its name in a manifest, bytes of an element; the types that ``rsedge export`` writes."""
_INT64 = 7

# The part of onnx/onnx.proto that rsedge export writes: message → field number → (name, content). Content is "int",
# "number" (a float, passed over), "text", "bytes" (passed over) or a message; "*" where the field may come repeatedly.
_FORMAT: Final[dict[str, dict[int, tuple[str, str]]]] = {
    "Model": {
        1: ("ir_version", "int"), 2: ("producer_name", "text"), 3: ("producer_version", "text"),
        4: ("domain", "text"), 5: ("model_version", "int"), 6: ("doc_string", "text"), 7: ("graph", "Graph"),
        8: ("opset_import", "OperatorSet*"),
    },
    "OperatorSet": {1: ("domain", "text"), 2: ("version", "int")},
    "Graph": {
        1: ("node", "Node*"), 2: ("name", "text"), 5: ("initializer", "Tensor*"), 10: ("doc_string", "text"),
        11: ("input", "Value*"), 12: ("output", "Value*"),
    },
    "Node": {
        1: ("input", "text*"), 2: ("output", "text*"), 3: ("name", "text"), 4: ("op_type", "text"),
        5: ("attribute", "Attribute*"), 6: ("doc_string", "text"), 7: ("domain", "text"),
    },
    "Attribute": {
        1: ("name", "text"), 2: ("f", "number"), 3: ("i", "int"), 4: ("s", "text"), 7: ("floats", "number*"),
        8: ("ints", "int*"), 13: ("doc_string", "text"), 20: ("type", "int"),
    },
    "Tensor": {
        1: ("dims", "int*"), 2: ("data_type", "int"), 8: ("name", "text"), 9: ("raw_data", "bytes"),
        12: ("doc_string", "text"), 13: ("external_data", "Entry*"), 14: ("data_location", "int"),
    },
    "Entry": {1: ("key", "text"), 2: ("value", "text")},
    "Value": {1: ("name", "text"), 2: ("type", "Type"), 3: ("doc_string", "text")},
    "Type": {1: ("tensor_type", "TensorType"), 6: ("denotation", "text")},
    "TensorType": {1: ("elem_type", "int"), 2: ("shape", "Shape")},
    "Shape": {1: ("dim", "Dimension*")},
    "Dimension": {1: ("dim_value", "int"), 2: ("dim_param", "text"), 3: ("denotation", "text")},
}  # fmt: skip


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


def graph_problems(root: Path, graph: Graph) -> list[str]:
    """Everything that keeps a graph from being loaded, each a sentence.

    The bundle's directory ``root`` has the graph's file and its external data, of the sizes and hashes in the manifest.
    """
    try:
        model = read_model(root / graph.file)
    except BundleError as error:
        return [str(error)]
    found = [*_structure_problems(model, graph), *_weight_problems(model, graph), *_growth_problems(model)]
    return [f"{graph.file} {problem}: do not use this bundle, export again" for problem in dict.fromkeys(found)]


def beside(file: str, location: str) -> str:
    """The bundle path of an external data location, which ONNX counts from the directory of the graph's file."""
    # Only the canonical spelling can equal a listed file, so '..' and absolute paths can never match one.
    return posixpath.join(posixpath.dirname(file), location)


def _structure_problems(model: Model, graph: Graph) -> Iterator[str]:
    """Foreign operators, and inputs and outputs other than the manifest says: buffers are made by what it says."""
    if foreign := sorted(set(model.opsets) - set(_DOMAINS)):
        yield f"imports operators of {', '.join(map(repr, foreign))[:200]}, which rsedge never does"
    if model.opsets.get("") != graph.opset:
        yield f"imports version {model.opsets.get('')} of ONNX's operators, the manifest says {graph.opset}"
    if len(model.nodes) > _MOST_NODES:
        yield f"has {len(model.nodes)} nodes, at most {_MOST_NODES} are accepted"
    if unknown := sorted({node.kind for node in model.nodes} - OPERATORS):
        yield f"has the operator {', '.join(map(repr, unknown))[:200]}, which rsedge never writes"
    for what, there, said in (("inputs", model.inputs, graph.inputs), ("outputs", model.outputs, graph.outputs)):
        found = [(value.name, value.dtype, value.shape) for value in there]
        if found != [(tensor.name, tensor.dtype, tensor.shape) for tensor in said]:
            yield f"has other {what} than the manifest says"


def _weight_problems(model: Model, graph: Graph) -> Iterator[str]:
    """External data that the manifest does not vouch for, or that the file does not have."""
    listed = {ref.file: ref for ref in graph.external_data}
    declared: dict[str, int] = {}
    for tensor in model.initializers:
        if (external := tensor.external) is None:
            continue
        ref = listed.get(beside(graph.file, external["location"]))
        if ref is None:
            yield (
                f"takes external data from {external['location']!r}, which the manifest does not list for it "
                f"(listed: {', '.join(sorted(listed)) or 'none'})"
            )
            continue
        numbers = external.get("offset", "0"), external.get("length", str(tensor.nbytes))
        if not all(text.isascii() and text.isdigit() and len(text) <= 18 for text in numbers):
            yield f"takes {tensor.name[:80]!r} from {ref.file} at an offset or length that is no number"
        elif int(numbers[1]) != tensor.nbytes or sum(map(int, numbers)) > ref.size:
            yield (
                f"takes {tensor.name[:80]!r} from bytes {int(numbers[0])} to {sum(map(int, numbers))} of {ref.file}, "
                f"which has {ref.size}; its shape {list(tensor.shape)} needs {tensor.nbytes}"
            )
        declared[ref.file] = declared.get(ref.file, 0) + tensor.nbytes
    for file, total in declared.items():
        # One stretch of a file given to a thousand tensors would be loaded a thousand times.
        if total > listed[file].size:
            yield f"takes {total} bytes of weights from {file}, which has {listed[file].size}"


def _growth_problems(model: Model) -> Iterator[str]:
    """Constants from which a loader would make tensors larger than the file, before anything runs."""
    weights = {tensor.name: tensor for tensor in model.initializers}
    computed: set[str] = set()
    for node in model.nodes:
        inputs = [name for name in node.inputs if name]
        for index in _SIZED.get(node.operator, ()):
            tensor = weights.get(node.inputs[index]) if index < len(node.inputs) else None
            if tensor is not None and (
                tensor.values is None or max(map(abs, tensor.values), default=0) > _LARGEST_LENGTH
            ):
                yield f"has a node {node.kind} with a constant length that is no int64 up to {_LARGEST_LENGTH}"
        if not all(name in weights or name in computed for name in inputs):
            continue
        if node.operator != "Concat" or len(inputs) > _MOST_JOINED or any(name in computed for name in inputs):
            yield f"has a node {node.kind} that makes a constant of constants, which rsedge never writes"
        computed.update(node.outputs)


def read_model(path: Path) -> Model:
    """The model in the ONNX file ``path``.

    Raises:
        BundleError: It is not a readable ONNX file, is cut short, holds something that ``rsedge export`` never writes,
            or an initializer has other bytes than its type and shape need.
    """
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            values = _Reader(data).message("Model", 0, len(data))
            graph = values.get("graph")
            if graph is None:
                raise ValueError("it holds no graph")
            opsets: dict[str, int] = {}
            for entry in values.get("opset_import", []):
                domain, version = entry.get("domain", ""), entry.get("version", 0)
                if opsets.setdefault(domain, version) != version:
                    raise ValueError(f"it imports two versions of the operators of {domain!r}")
            nodes = tuple(
                Node(
                    domain=node.get("domain", ""),
                    operator=node.get("op_type", ""),
                    inputs=tuple(node.get("input", ())),
                    outputs=tuple(node.get("output", ())),
                )
                for node in graph.get("node", ())
            )
            initializers = tuple(_initializer(data, tensor) for tensor in graph.get("initializer", ()))
            if len({tensor.name for tensor in initializers}) != len(initializers):
                raise ValueError("it gives an initializer twice")
            inputs, outputs = (tuple(map(_value, graph.get(end, ()))) for end in ("input", "output"))
            return Model(opsets, nodes, initializers, inputs, outputs)
    except (ValueError, IndexError) as error:  # ValueError: mmap of an empty file, or a malformed field below
        raise BundleError(
            f"{path.name} is not a readable ONNX file of rsedge ({error}): do not use it, export again"
        ) from error


def external_locations(path: Path) -> frozenset[str]:
    """The ``location`` of every tensor of the ONNX file ``path`` that is kept in another file, as written there;
    BundleError as :func:`read_model`.
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


def _initializer(data: mmap.mmap, tensor: dict[str, Any]) -> Initializer:
    name, kind, shape = tensor.get("name", ""), tensor.get("data_type", 0), tuple(tensor.get("dims", ()))
    what = f"its initializer {name[:80]!r}"
    if kind not in _TYPES:
        raise ValueError(f"{what} has the data type {kind}, which rsedge never writes")
    # Before the product: a thousand large lengths would make a number of thousands of digits.
    if len(shape) > 8 or any(not 0 <= length < 1 << 40 for length in shape):
        raise ValueError(f"{what} has the impossible shape {list(shape)[:8]}")
    needed = math.prod(shape) * _TYPES[kind][1]
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
    if kind not in _TYPES:
        raise ValueError(f"{name[:80]!r} has the data type {kind}, which rsedge never writes")
    dimensions = tensor.get("shape", {}).get("dim", [])
    return Value(name, _TYPES[kind][0], tuple(item.get("dim_param") or item.get("dim_value", 0) for item in dimensions))
