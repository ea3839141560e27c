"""Whether a bundle's ONNX graph is one that ``rsedge export`` could have written, seen before a loader opens it.

A loader runs what it is given: operators of other libraries, compiled blobs (EPContext), loops without end, tensors
from any file of the machine. So the graph of a bundle may hold the operators and the parts of the format that the
exporter uses, and its weights must lie in the bundle. What this cannot bound is how much memory and time a graph of
ordinary operators takes when it runs.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rsedge.errors import BundleError
from rsedge.onnxfile import Initializer, Model, read_model

if TYPE_CHECKING:
    from rsedge.manifest import FileRef, Graph

OPERATORS = frozenset(
    {
        "Abs",
        "Add",
        "ArgMax",
        "Cast",
        "Concat",
        "Div",
        "Equal",
        "Exp",
        "Expand",
        "Gather",
        "GatherElements",
        "GatherND",
        "Gelu",
        "Gemm",
        "Identity",
        "LayerNormalization",
        "Less",
        "Log",
        "MatMul",
        "MatMulInteger",
        "Max",
        "Mul",
        "Pad",
        "QuantizeLinear",
        "Range",
        "ReduceL2",
        "ReduceLogSumExp",
        "ReduceMax",
        "ReduceSum",
        "Relu",
        "Reshape",
        "ScatterND",
        "Shape",
        "Sigmoid",
        "Slice",
        "Softmax",
        "Split",
        "Squeeze",
        "Sub",
        "Tanh",
        "TopK",
        "Transpose",
        "Unsqueeze",
        "Where",
        "com.microsoft.MatMulIntegerToFloat",
    }
)
"""Every operator that this version of the exporter, or an earlier one, writes."""

_DOMAINS = ("", "com.microsoft")
_MOST_NODES = 100_000
# Of what decides how large a result is: in a constant of Expand, Range, Pad or Reshape.
_LARGEST_LENGTH = 1 << 24
_SIZED = {"Expand": (1,), "Range": (0, 1, 2), "Pad": (1,), "Reshape": (1,)}
# The exporter joins the class token's position with those of the patches, and leaves that to the loader.
_MOST_JOINED = 16


def graph_problems(root: Path, graph: Graph) -> list[str]:
    """Everything that keeps a graph from being loaded, each a sentence.

    Args:
        root: The bundle's directory, with the graph's file and its external data, both of the sizes and hashes that the
            manifest gives.
        graph: What the manifest says of it.
    """
    try:
        model = read_model(root / graph.file)
    except BundleError as error:
        return [str(error)]
    found = [
        *_operator_problems(model, graph),
        *_end_problems(model, graph),
        *_weight_problems(model, graph),
        *_growth_problems(model),
    ]
    return [f"{graph.file} {problem}: do not use this bundle, export again" for problem in dict.fromkeys(found)]


def beside(file: str, location: str) -> str:
    """The bundle path of an external data location, which ONNX counts from the directory of the graph's file."""
    # Only the canonical spelling can equal a listed file, so '..' and absolute paths can never match one.
    return posixpath.join(posixpath.dirname(file), location)


def _operator_problems(model: Model, graph: Graph) -> Iterator[str]:
    foreign = sorted(set(model.opsets) - set(_DOMAINS))
    if foreign:
        yield f"imports operators of {', '.join(map(repr, foreign))[:200]}, which rsedge never does"
    if model.opsets.get("") != graph.opset:
        yield f"imports version {model.opsets.get('')} of ONNX's operators, the manifest says {graph.opset}"
    if len(model.nodes) > _MOST_NODES:
        yield f"has {len(model.nodes)} nodes, at most {_MOST_NODES} are accepted"
    unknown = sorted({node.kind for node in model.nodes} - OPERATORS)
    if unknown:
        yield f"has the operator {', '.join(map(repr, unknown))[:200]}, which rsedge never writes"


def _end_problems(model: Model, graph: Graph) -> Iterator[str]:
    """Inputs and outputs other than the manifest says: buffers are made by what it says."""
    for what, there, said in (("inputs", model.inputs, graph.inputs), ("outputs", model.outputs, graph.outputs)):
        found = [(value.name, value.dtype, value.shape) for value in there]
        if found != [(tensor.name, tensor.dtype, tensor.shape) for tensor in said]:
            yield f"has other {what} than the manifest says"


def _weight_problems(model: Model, graph: Graph) -> Iterator[str]:
    """External data that the manifest does not vouch for, or that the file does not have."""
    listed = {ref.file: ref for ref in graph.external_data}
    declared: dict[str, int] = {}
    for tensor in model.initializers:
        if tensor.external is None:
            continue
        location = tensor.external["location"]
        ref = listed.get(beside(graph.file, location))
        if ref is None:
            yield (
                f"takes external data from {location!r}, which the manifest does not list for it "
                f"(listed: {', '.join(sorted(listed)) or 'none'})"
            )
            continue
        if problem := _range_problem(tensor, tensor.external, ref):
            yield problem
        declared[ref.file] = declared.get(ref.file, 0) + tensor.nbytes
    for file, total in declared.items():
        # One stretch of a file given to a thousand tensors would be loaded a thousand times.
        if total > listed[file].size:
            yield f"takes {total} bytes of weights from {file}, which has {listed[file].size}"


def _range_problem(tensor: Initializer, external: Mapping[str, str], ref: FileRef) -> str:
    numbers = {name: external.get(name, default) for name, default in (("offset", "0"), ("length", str(tensor.nbytes)))}
    if any(not (text.isascii() and text.isdigit() and len(text) <= 18) for text in numbers.values()):
        return f"takes {tensor.name[:80]!r} from {ref.file} at an offset or length that is no number"
    offset, length = int(numbers["offset"]), int(numbers["length"])
    if length != tensor.nbytes or offset + length > ref.size:
        return (
            f"takes {tensor.name[:80]!r} from bytes {offset} to {offset + length} of {ref.file}, which has {ref.size}; "
            f"its shape {list(tensor.shape)} needs {tensor.nbytes}"
        )
    return ""


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
