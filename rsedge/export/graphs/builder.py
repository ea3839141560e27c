"""Write an ONNX graph node by node, in one precision.

Graphs are written out from the weights rather than traced from the torch model: every operator, dtype and tensor name
is then ours to choose (that is where fp16 typing, int8 and the cache layout are decided), the result does not move
with the versions of a tracer, and a model need not fit into memory twice.

==========  =====================================================================================================
fp32        everything in float32
fp16        weights, activations and caches in float16, typed in the graph itself (strongly typed TensorRT needs
            it so); LayerNorm, softmax and log-softmax in float32
int8        linear layers on int8 weights (per output channel) and activations (per row, measured at run time);
            BLIP's cross cache in int8 (per image, head and channel); the rest in float32. For CPUs: it uses ONNX
            Runtime's MatMulIntegerToFloat.
==========  =====================================================================================================

Activations are quantised per row, not per tensor, so that a tile's result does not depend on which tiles are computed
beside it. Weights keep 7 bits: x86 CPUs without VNNI add pairs of 8-bit products into 16 bits, which 8-bit weights
can overflow and 7-bit weights cannot; the bundle must give the same captions on all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")

Float32 = NDArray[np.float32]
Tensors = Mapping[str, Float32]
"""A checkpoint's weights by name."""

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


WEIGHT_LEVELS = 63
"""Largest magnitude of an int8 weight (7 bits)."""


ACTIVATIONS = {
    "gelu": "none",
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "relu": "",
    "quick_gelu": "",
}
"""Activations a graph can hold, by their name in transformers."""


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
        nodes = []
        for made in self._nodes:
            node = onnx.NodeProto()
            node.CopyFrom(made)
            node.input[:] = [self._names.get(name, name) for name in made.input]
            node.output[:] = [self._names.get(name, name) for name in made.output]
            nodes.append(node)
        weights = list(self._initializers.values())
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


def float_type(precision: Precision) -> str:
    """The type that a precision's floating-point values have."""
    return "float16" if precision == "fp16" else "float32"


class Layers:
    """Neural-network layers over a graph builder, each honouring one precision.

    Args:
        graph: The graph to append to.
        precision: ``fp32``, ``fp16`` or ``int8``.
        tensors: The checkpoint's weights, by the names that layers go by.
    """

    def __init__(self, graph: GraphBuilder, precision: Precision, tensors: Tensors) -> None:
        self.graph, self.precision, self.tensors = graph, precision, tensors
        self.dtype = float_type(precision)
        self._quantized: dict[str, tuple[str, str]] = {}

    def array(self, name: str, values: NDArray[np.floating[Any]]) -> str:
        """A weight in the precision's floating-point type."""
        return self.graph.weight(name, values.astype(self.dtype))

    def from_float32(self, value: str) -> str:
        """Bring a float32 value into the precision's type."""
        return self.graph.cast(value, self.dtype) if self.precision == "fp16" else value

    def to_float32(self, value: str) -> str:
        """Bring a value of the precision's type to float32."""
        return self.graph.cast(value, "float32") if self.precision == "fp16" else value

    def linear(self, value: str, name: str, weight: Float32 | None = None, bias: Float32 | None = None) -> str:
        """``value @ weight.T + bias`` for ``value`` [M, K], torch's ``weight`` [N, K] and ``bias`` [N].

        Without them the checkpoint's layer ``name``, which may have no bias.
        """
        if weight is None:
            weight, bias = self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias")
        if bias is None:
            bias = np.zeros(len(weight), np.float32)
        if self.precision == "int8":
            return self._linear_int8(value, name, weight, bias)
        kernel = self.array(f"{name}.weight", weight.T)
        return self.graph.op("Gemm", value, kernel, self.array(f"{name}.bias", bias))

    def linear_from_table(self, value: str, name: str, table: Float32, bias: Float32) -> str:
        """A linear layer whose weight [N, K] is the table of ``embedding(…, name, …)``, stored once where it can be."""
        if self.precision == "int8":  # the product wants another layout and scale than the look-up
            return self._linear_int8(value, f"{name}.head", table, bias)
        return self.graph.op(
            "Gemm", value, self.array(f"{name}.table", table), self.array(f"{name}.head.bias", bias), transB=1
        )

    def _linear_int8(self, value: str, name: str, weight: Float32, bias: Float32) -> str:
        graph = self.graph
        rows, row_scale = self._quantize_rows(value)
        scale = np.maximum(np.abs(weight).max(axis=1), np.float32(1e-12)) / WEIGHT_LEVELS
        kernel = np.rint(weight / scale[:, None]).astype(np.int8).T
        product = graph.op(
            "MatMulIntegerToFloat",
            rows,
            graph.weight(f"{name}.weight", kernel),
            graph.const(1.0 / 127.0, "float32"),
            graph.weight(f"{name}.scale", scale.astype(np.float32)),
            graph.const(128, "uint8"),
            "",
            domain=MICROSOFT,
        )
        return graph.op("Add", graph.op("Mul", product, row_scale), graph.weight(f"{name}.bias", bias))

    def _quantize_rows(self, value: str) -> tuple[str, str]:
        """``value`` [M, K] as uint8 around 128, and each row's largest magnitude [M, 1]; once per value."""
        if value not in self._quantized:
            graph = self.graph
            peak = graph.op("ReduceMax", graph.op("Abs", value), graph.ints(-1), keepdims=1)
            peak = graph.op("Max", peak, graph.const(1e-12, "float32"))
            scaled = graph.op("Div", value, peak)
            step, zero = graph.const(1.0 / 127.0, "float32"), graph.const(128, "uint8")
            self._quantized[value] = (graph.op("QuantizeLinear", scaled, step, zero), peak)
        return self._quantized[value]

    def cache_codes(self, value: str, axis: int) -> tuple[str, str]:
        """``value`` as int8 of 7 bits, and what a unit of each channel along ``axis``, kept as one, is worth."""
        graph = self.graph
        peak = graph.op("ReduceMax", graph.op("Abs", value), graph.ints(axis), keepdims=1)
        peak = graph.op("Max", peak, graph.const(1e-12, "float32"))
        scaled, step = graph.op("Div", value, peak), graph.const(1.0 / WEIGHT_LEVELS, "float32")
        codes = graph.op("QuantizeLinear", scaled, step, graph.const(0, "int8"))
        return codes, graph.op("Mul", peak, step)

    def times_codes(self, value: str, codes: str) -> str:
        """``value`` [B, H, r, K], quantised per row, times int8 ``codes`` [B, H, K, N] as :meth:`cache_codes` gives."""
        rows, peak = self._quantize_rows(value)
        return self._integer_product(rows, codes, peak, 1.0 / 127.0, 128)

    def weights_times_codes(self, weights: str, codes: str) -> str:
        """As :meth:`times_codes` for attention weights, which are never negative: all 8 bits count upwards."""
        graph = self.graph
        peak = graph.op("ReduceMax", weights, graph.ints(-1), keepdims=1)
        step = graph.const(1.0 / 255.0, "float32")
        rows = graph.op("QuantizeLinear", graph.op("Div", weights, peak), step, graph.const(0, "uint8"))
        return self._integer_product(rows, codes, peak, 1.0 / 255.0, 0)

    def _integer_product(self, rows: str, codes: str, peak: str, step: float, zero: int) -> str:
        # Not MatMulIntegerToFloat, which takes twice the time for many small products (bench/LOG.md).
        graph = self.graph
        product = graph.op("MatMulInteger", rows, codes, graph.const(zero, "uint8"))
        return graph.op("Mul", graph.cast(product, "float32"), graph.op("Mul", peak, graph.const(step, "float32")))

    def embedding(self, indices: str, name: str, table: Float32) -> str:
        """Rows of ``table`` [V, D] by ``indices``; int8 stores the table in 8 bits with a scale per row."""
        graph = self.graph
        if self.precision != "int8":
            return graph.op("Gather", self.array(f"{name}.table", table), indices)
        scale = np.maximum(np.abs(table).max(axis=1, keepdims=True), np.float32(1e-12)) / 127
        codes = graph.weight(f"{name}.table", np.rint(table / scale).astype(np.int8))
        scales = graph.weight(f"{name}.table.scale", scale.astype(np.float32))
        rows = graph.cast(graph.op("Gather", codes, indices), "float32")
        return graph.op("Mul", rows, graph.op("Gather", scales, indices))

    def norm(self, value: str, name: str, epsilon: float) -> str:
        """The checkpoint's LayerNorm ``name`` over the last axis, computed in float32."""
        graph, value = self.graph, self.to_float32(value)
        parts = (graph.weight(f"{name}.{part}", self.tensors[f"{name}.{part}"]) for part in ("weight", "bias"))
        return self.from_float32(graph.op("LayerNormalization", value, *parts, axis=-1, epsilon=epsilon))

    def softmax(self, scores: str, mask: str | None = None) -> str:
        """Softmax over the last axis in float32; ``mask`` (float32, added first) broadcasts to ``scores``."""
        scores = self.to_float32(scores)
        if mask is not None:
            scores = self.graph.op("Add", scores, mask)
        return self.from_float32(self.graph.op("Softmax", scores, axis=-1))

    def activation(self, value: str, kind: str) -> str:
        """One of the activations of ``ACTIVATIONS``."""
        graph = self.graph
        if kind == "relu":
            return graph.op("Relu", value)
        if kind == "quick_gelu":
            gate = graph.op("Sigmoid", graph.op("Mul", value, graph.const(1.702, self.dtype)))
            return graph.op("Mul", value, gate)
        return graph.op("Gelu", value, approximate=ACTIVATIONS[kind])
