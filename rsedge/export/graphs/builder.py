"""Write an ONNX graph node by node.

Graphs are written out from the weights rather than traced from the torch model: every operator, dtype and tensor name
is then ours to choose (that is where fp16 typing, int8 and the cache layout are decided), the result does not move
with the versions of a tracer, and a model need not fit into memory twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

if TYPE_CHECKING:
    from numpy.typing import NDArray

OPSET = 20
"""First opset with Gelu and LayerNormalization both; TensorRT reads it from 10.3 on."""

IR_VERSION = 10
MICROSOFT = "com.microsoft"
"""Domain of ONNX Runtime's own operators, used only where the bundle is for its CPU provider (int8)."""

# protobuf cannot hold 2 GiB; above this the weights go beside the graph.
EXTERNAL_DATA_FROM = 1_500_000_000

_DTYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
    "uint8": TensorProto.UINT8,
    "int8": TensorProto.INT8,
    "bool": TensorProto.BOOL,
}


class GraphBuilder:
    """Nodes, weights, inputs and outputs of one graph, in the order they are added.

    Values are plain strings, the names of tensors. Constants of equal content share one initialiser.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._names: dict[str, str] = {}  # value that a node makes → its name, or that of the output that it is
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._count = 0

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> str:
        """Declare a graph input; strings in ``shape`` are symbolic dimensions."""
        self._inputs.append(helper.make_tensor_value_info(name, _DTYPES[dtype], list(shape)))
        return name

    def output(self, value: str, name: str, dtype: str, shape: Sequence[int | str]) -> None:
        """Declare ``value`` as the graph output ``name``.

        The node that makes it will give it under that name: an ``Identity`` behind it would copy it at every run, and
        what is written in place could not be.
        """
        if self._names.get(value) == value:
            self._names[value] = name
        else:  # an input, a weight, or another output already
            self._nodes.append(helper.make_node("Identity", [value], [name], name=f"{name}/output"))
        self._outputs.append(helper.make_tensor_value_info(name, _DTYPES[dtype], list(shape)))

    def op(self, kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Append a node with one output and return that output's name; an empty input name means "not given"."""
        return self.multi(kind, *inputs, outputs=1, domain=domain, **attributes)[0]

    def multi(self, kind: str, *inputs: str, outputs: int, domain: str = "", **attributes: Any) -> list[str]:
        """Append a node with several outputs and return their names."""
        self._count += 1
        base = f"{kind}_{self._count}"
        names = [base] if outputs == 1 else [f"{base}:{index}" for index in range(outputs)]
        self._nodes.append(helper.make_node(kind, list(inputs), names, name=base, domain=domain, **attributes))
        self._names.update(zip(names, names, strict=True))
        return names

    def weight(self, name: str, array: NDArray[Any]) -> str:
        """Add a named initialiser (kept once under its name) and return the name."""
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(np.asarray(array, order="C"), name)
        return name

    def const(self, value: Any, dtype: str) -> str:
        """A small constant tensor, shared by content."""
        array = np.asarray(value, dtype=dtype)
        key = (dtype, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.weight(f"const_{len(self._constants)}", array)
        return self._constants[key]

    def ints(self, *values: int) -> str:
        """A constant int64 vector: shapes, axes, slice bounds."""
        return self.const(list(values), "int64")

    def reshape(self, value: str, *shape: int) -> str:
        """Reshape; 0 copies the input's dimension, −1 is inferred."""
        return self.op("Reshape", value, self.ints(*shape))

    def transpose(self, value: str, *axes: int) -> str:
        """Permute the axes."""
        return self.op("Transpose", value, perm=list(axes))

    def cast(self, value: str, dtype: str) -> str:
        """Convert to ``dtype``."""
        return self.op("Cast", value, to=_DTYPES[dtype])

    def model(self) -> onnx.ModelProto:
        """The finished model."""
        nodes, weights = [_renamed(node, self._names) for node in self._nodes], list(self._initializers.values())
        graph = helper.make_graph(nodes, self.name, self._inputs, self._outputs, weights)
        opsets = [helper.make_opsetid("", OPSET)]
        if any(node.domain == MICROSOFT for node in self._nodes):
            opsets.append(helper.make_opsetid(MICROSOFT, 1))
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="rsedge")

    def save(self, path: Path) -> list[Path]:
        """Write the model to ``path``, weights beside it if protobuf could not hold them.

        Returns:
            Every file written, the graph first.
        """
        model = self.model()
        size = sum(len(tensor.raw_data) for tensor in self._initializers.values())
        if size < EXTERNAL_DATA_FROM:
            onnx.save_model(model, path)
            return [path]
        data = path.with_name(f"{path.name}.data")
        onnx.save_model(model, path, save_as_external_data=True, location=data.name, size_threshold=1024)
        return [path, data]


def _renamed(node: onnx.NodeProto, names: Mapping[str, str]) -> onnx.NodeProto:
    """A copy of a node whose inputs and outputs have new names."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.input[:] = [names.get(name, name) for name in node.input]
    copy.output[:] = [names.get(name, name) for name in node.output]
    return copy
