"""What the step graphs of all captioners share: their inputs, the mask of the self cache, and the candidates they give.

Shapes as in :mod:`rsedge.export.models.blip`: R rows, B images with equally many adjacent rows each, S cached image
positions, H heads of d, C columns of the self cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rsedge.export.graphs.builder import GraphBuilder
    from rsedge.export.graphs.precision import Layers


@dataclass(frozen=True, slots=True)
class LayerCaches:
    """One layer's cache inputs: ``self_k``, ``self_v`` [R, H, C, d], ``cross_k`` [B, H, d, S], ``cross_v`` [B, H, S,
    d]; and, where those are int8, what a unit of each channel is worth: ``scale_k``, ``scale_v`` [B, H, 1, d].
    """

    self_k: str
    self_v: str
    cross_k: str
    cross_v: str
    scale_k: str | None = None
    scale_v: str | None = None


class StepInputs:
    """The inputs of a step graph, declared.

    Attributes:
        tokens, lengths: int64 [R], each row's latest token and how many it has in its self cache.
        top: int64 [1], candidates wanted.
        watch: int64 [R, W], tokens whose logits are wanted besides.
        caches: Of each layer.
        images: int64 [1], B.
        by_image: int64 [4], the shape [B, R / B, H, d]: how rows fall to images.
    """

    def __init__(
        self, nn: Layers, *, layers: int, heads: int, head_dim: int, image_tokens: int, codes: bool = False
    ) -> None:
        graph = nn.graph
        self.tokens = graph.input("tokens", "int64", ["rows"])
        self.lengths = graph.input("lengths", "int64", ["rows"])
        self.top = graph.input("top", "int64", [1])
        self.watch = graph.input("watch", "int64", ["rows", "watched"])
        past: list[int | str] = ["rows", heads, "columns", head_dim]
        cross = "int8" if codes else nn.dtype
        self.caches = [
            LayerCaches(
                graph.input(f"self_k.{layer}", nn.dtype, past),
                graph.input(f"self_v.{layer}", nn.dtype, past),
                graph.input(f"cross_k.{layer}", cross, ["images", heads, head_dim, image_tokens]),
                graph.input(f"cross_v.{layer}", cross, ["images", heads, image_tokens, head_dim]),
            )
            for layer in range(layers)
        ]
        if codes:
            scales = graph.input("cross_scales", "float32", ["images", 2 * layers, heads, head_dim])
            self.caches = [
                replace(caches, scale_k=_scale(graph, scales, layer), scale_v=_scale(graph, scales, layers + layer))
                for layer, caches in enumerate(self.caches)
            ]
        self.images = graph.op("Shape", self.caches[0].cross_k, start=0, end=1)
        self.by_image = graph.op("Concat", self.images, graph.ints(-1, heads, head_dim), axis=0)

    def cache_mask(self, graph: GraphBuilder) -> str:
        """0 where a cache column holds a token of the row, very negative elsewhere; float32 [R, 1, 1, C]."""
        columns = graph.op("Squeeze", graph.op("Shape", self.caches[0].self_k, start=2, end=3), graph.ints(0))
        index = graph.op("Range", graph.const(0, "int64"), columns, graph.const(1, "int64"))
        filled = graph.op("Less", index, graph.op("Unsqueeze", self.lengths, graph.ints(1, 2, 3)))
        return graph.op("Where", filled, graph.const(0.0, "float32"), graph.const(-1e30, "float32"))


def _scale(graph: GraphBuilder, scales: str, index: int) -> str:
    """One cache's of all scales, [B, 2·L, H, d] → [B, H, 1, d]."""
    return graph.op("Unsqueeze", graph.op("Gather", scales, graph.const(index, "int64"), axis=1), graph.ints(2))


def give_candidates(graph: GraphBuilder, inputs: StepInputs, logits: str, vocab_size: int) -> None:
    """Declare the outputs that searches read, of float32 ``logits`` [R, V].

    Outputs: ``top_logits`` float32 and ``top_ids`` int64 [R, top] in descending order, ``logsumexp`` float32 [R],
    ``watched`` float32 [R, W], ``logits`` float32 [R, V].
    """
    values, ids = graph.multi("TopK", logits, inputs.top, outputs=2, axis=-1)
    graph.output(values, "top_logits", "float32", ["rows", "top"])
    graph.output(ids, "top_ids", "int64", ["rows", "top"])
    graph.output(_logsumexp(graph, logits, values), "logsumexp", "float32", ["rows"])
    watched = graph.op("GatherElements", logits, inputs.watch, axis=1)
    graph.output(watched, "watched", "float32", ["rows", "watched"])
    graph.output(logits, "logits", "float32", ["rows", vocab_size])


def _logsumexp(graph: GraphBuilder, logits: str, best: str) -> str:
    """Log of the sum of exponentials of each row, [R, V] → [R]; ``best`` [R, top] begins with the row's maximum.

    ``ReduceLogSumExp`` would say the same, several times slower on ONNX Runtime's CPU provider.
    """
    peak = graph.op("Slice", best, graph.ints(0), graph.ints(1), graph.ints(1))
    total = graph.op("ReduceSum", graph.op("Exp", graph.op("Sub", logits, peak)), graph.ints(1), keepdims=1)
    return graph.op("Squeeze", graph.op("Add", graph.op("Log", total), peak), graph.ints(1))


def give_new_column(nn: Layers, keys: Sequence[str], values: Sequence[str], *, heads: int, head_dim: int) -> None:
    """Declare the output ``new_kv`` [2·L, R, H, d]: the new token's ``keys`` of all layers, then its ``values``, each
    [1, R, H, d].
    """
    new = nn.graph.op("Concat", *keys, *values, axis=0)
    nn.graph.output(new, "new_kv", nn.dtype, [2 * len(keys), "rows", heads, head_dim])


def scaled_query(
    weight: NDArray[np.float32], bias: NDArray[np.float32], width: int, scale: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Fold attention's scale into the query rows (the first ``width``) of a projection [N, K] and its bias [N]."""
    scales = np.ones((weight.shape[0], 1), np.float32)
    scales[:width] = scale
    return weight * scales, bias * scales[:, 0]
