"""What fp32, fp16 and int8 mean, operator by operator.

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

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rsedge.export.graphs.builder import MICROSOFT, GraphBuilder

if TYPE_CHECKING:
    from numpy.typing import NDArray

Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")

WEIGHT_LEVELS = 63
"""Largest magnitude of an int8 weight (7 bits)."""


def float_type(precision: Precision) -> str:
    """The type that a precision's floating-point values have."""
    return "float16" if precision == "fp16" else "float32"


class Layers:
    """Neural-network layers over a graph builder, each honouring one precision.

    Args:
        graph: The graph to append to.
        precision: ``fp32``, ``fp16`` or ``int8``.
    """

    def __init__(self, graph: GraphBuilder, precision: Precision) -> None:
        self.graph = graph
        self.precision = precision
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

    def linear(self, value: str, name: str, weight: NDArray[np.float32], bias: NDArray[np.float32]) -> str:
        """``value @ weight.T + bias`` for ``value`` [M, K], torch's ``weight`` [N, K] and ``bias`` [N]."""
        if self.precision == "int8":
            return self._linear_int8(value, name, weight, bias)
        kernel = self.array(f"{name}.weight", weight.T)
        return self.graph.op("Gemm", value, kernel, self.array(f"{name}.bias", bias))

    def linear_from_table(self, value: str, name: str, table: NDArray[np.float32], bias: NDArray[np.float32]) -> str:
        """A linear layer whose weight [N, K] is the table of ``embedding(…, name, …)``, stored once where it can be."""
        if self.precision == "int8":  # the product wants another layout and scale than the look-up
            return self._linear_int8(value, f"{name}.head", table, bias)
        return self.graph.op(
            "Gemm", value, self.array(f"{name}.table", table), self.array(f"{name}.head.bias", bias), transB=1
        )

    def _linear_int8(self, value: str, name: str, weight: NDArray[np.float32], bias: NDArray[np.float32]) -> str:
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
            rows = graph.op(
                "QuantizeLinear",
                graph.op("Div", value, peak),
                graph.const(1.0 / 127.0, "float32"),
                graph.const(128, "uint8"),
            )
            self._quantized[value] = (rows, peak)
        return self._quantized[value]

    def cache_codes(self, value: str, axis: int) -> tuple[str, str]:
        """``value`` as int8 of 7 bits, and what a unit of each channel along ``axis``, kept as one, is worth."""
        graph = self.graph
        peak = graph.op("ReduceMax", graph.op("Abs", value), graph.ints(axis), keepdims=1)
        peak = graph.op("Max", peak, graph.const(1e-12, "float32"))
        codes = graph.op(
            "QuantizeLinear",
            graph.op("Div", value, peak),
            graph.const(1.0 / WEIGHT_LEVELS, "float32"),
            graph.const(0, "int8"),
        )
        return codes, graph.op("Mul", peak, graph.const(1.0 / WEIGHT_LEVELS, "float32"))

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

    def embedding(self, indices: str, name: str, table: NDArray[np.float32]) -> str:
        """Rows of ``table`` [V, D] by ``indices``; int8 stores the table in 8 bits with a scale per row."""
        graph = self.graph
        if self.precision != "int8":
            return graph.op("Gather", self.array(f"{name}.table", table), indices)
        scale = np.maximum(np.abs(table).max(axis=1, keepdims=True), np.float32(1e-12)) / 127
        codes = graph.weight(f"{name}.table", np.rint(table / scale).astype(np.int8))
        scales = graph.weight(f"{name}.table.scale", scale.astype(np.float32))
        rows = graph.cast(graph.op("Gather", codes, indices), "float32")
        return graph.op("Mul", rows, graph.op("Gather", scales, indices))

    def layer_norm(
        self, value: str, name: str, weight: NDArray[np.float32], bias: NDArray[np.float32], epsilon: float
    ) -> str:
        """LayerNorm over the last axis, computed in float32."""
        graph = self.graph
        normed = graph.op(
            "LayerNormalization",
            self.to_float32(value),
            graph.weight(f"{name}.weight", weight),
            graph.weight(f"{name}.bias", bias),
            axis=-1,
            epsilon=epsilon,
        )
        return self.from_float32(normed)

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


ACTIVATIONS = {
    "gelu": "none",
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "relu": "",
    "quick_gelu": "",
}
"""Activations a graph can hold, by their name in transformers."""
