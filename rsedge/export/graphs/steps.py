"""Graphs that the captioners share: the inputs and outputs of their step graphs, and the graphs that keep their caches.

Shapes as in :mod:`rsedge.export.models.blip`: R rows, B images with equally many adjacent rows each, S cached image
positions, H heads of d, C columns of the self cache, L layers, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from rsedge.export.graphs.builder import GraphBuilder

if TYPE_CHECKING:
    from rsedge.bundle import DecoderSpec
    from rsedge.export.graphs.builder import Float32, Layers

PerImage = dict[str, tuple[str, list[int]]]
"""The step graph's inputs that exist once per image, by name: type, and shape behind the images."""


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


class Step:
    """A step graph: one token per row against the self cache and the image's cross cache.

    Args:
        nn: Layers of the graph.
        spec: Sizes of the caches.
        codes: Whether the cross caches are int8.

    Attributes:
        tokens, lengths: int64 [R], each row's latest token and how many it has in its self cache.
        top: int64 [1], candidates wanted.
        watch: int64 [R, W], tokens whose logits are wanted besides.
        caches: Of each layer.
        images: int64 [1], B.
        by_image: int64 [4], the shape [B, R / B, H, d]: how rows fall to images.
    """

    def __init__(self, nn: Layers, spec: DecoderSpec, *, codes: bool = False) -> None:
        self.nn, self.graph, self.spec = nn, nn.graph, spec
        graph, layers, heads, head_dim, tokens = nn.graph, spec.layers, spec.heads, spec.head_dim, spec.image_tokens
        self._keys: list[str] = []
        self._values: list[str] = []
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
                graph.input(f"cross_k.{layer}", cross, ["images", heads, head_dim, tokens]),
                graph.input(f"cross_v.{layer}", cross, ["images", heads, tokens, head_dim]),
            )
            for layer in range(layers)
        ]
        if codes:
            scales = graph.input("cross_scales", "float32", ["images", 2 * layers, heads, head_dim])

            def scale(index: int) -> str:
                """One cache's of all scales, [B, 2·L, H, d] → [B, H, 1, d]."""
                one = graph.op("Gather", scales, graph.const(index, "int64"), axis=1)
                return graph.op("Unsqueeze", one, graph.ints(2))

            self.caches = [
                replace(caches, scale_k=scale(layer), scale_v=scale(layers + layer))
                for layer, caches in enumerate(self.caches)
            ]
        self.images = graph.op("Shape", self.caches[0].cross_k, start=0, end=1)
        self.by_image = graph.op("Concat", self.images, graph.ints(-1, heads, head_dim), axis=0)

    def cache_mask(self) -> str:
        """0 where a cache column holds a token of the row, very negative elsewhere; float32 [R, 1, 1, C]."""
        graph = self.graph
        columns = graph.op("Squeeze", graph.op("Shape", self.caches[0].self_k, start=2, end=3), graph.ints(0))
        index = graph.op("Range", graph.const(0, "int64"), columns, graph.const(1, "int64"))
        filled = graph.op("Less", index, graph.op("Unsqueeze", self.lengths, graph.ints(1, 2, 3)))
        return graph.op("Where", filled, graph.const(0.0, "float32"), graph.const(-1e30, "float32"))

    def self_scores(self, layer: int, qkv: str, mask: str) -> tuple[str, str, str, str]:
        """Keep the new key and value of a layer's projections ``qkv`` [R, 3·H·d], and score the row's own tokens.

        Returns:
            The query and the new value [R, H, 1, d], the scores of the self cache float32 [R, H, 1, C], and that of the
            new token [R, H, 1, 1].
        """
        graph, heads, head_dim = self.graph, self.spec.heads, self.spec.head_dim
        q, k, v = graph.multi("Split", graph.reshape(qkv, -1, 3 * heads, 1, head_dim), outputs=3, axis=1, num_outputs=3)
        self._keys.append(graph.reshape(k, 1, -1, heads, head_dim))
        self._values.append(graph.reshape(v, 1, -1, heads, head_dim))
        past = graph.op("MatMul", q, graph.transpose(self.caches[layer].self_k, 0, 1, 3, 2))
        past = graph.op("Add", self.nn.to_float32(past), mask)
        return q, v, past, graph.op("ReduceSum", graph.op("Mul", q, k), graph.ints(-1), keepdims=1)

    def give(self, logits: str, vocab_size: int) -> GraphBuilder:
        """Declare the outputs, of ``logits`` [R, V] in the graph's precision, and return the graph.

        Outputs: ``top_logits`` float32 and ``top_ids`` int64 [R, top] in descending order, ``logsumexp`` float32 [R],
        ``watched`` float32 [R, W], ``logits`` float32 [R, V], and ``new_kv`` [2·L, R, H, d]: the new token's keys of
        all layers, then its values.
        """
        graph, nn, logits = self.graph, self.nn, self.nn.to_float32(logits)
        values, ids = graph.multi("TopK", logits, self.top, outputs=2, axis=-1)
        graph.output(values, "top_logits", "float32", ["rows", "top"])
        graph.output(ids, "top_ids", "int64", ["rows", "top"])
        # ReduceLogSumExp would say the same, several times slower on ONNX Runtime's CPU provider.
        peak = graph.op("Slice", values, graph.ints(0), graph.ints(1), graph.ints(1))
        total = graph.op("ReduceSum", graph.op("Exp", graph.op("Sub", logits, peak)), graph.ints(1), keepdims=1)
        sums = graph.op("Squeeze", graph.op("Add", graph.op("Log", total), peak), graph.ints(1))
        graph.output(sums, "logsumexp", "float32", ["rows"])
        watched = graph.op("GatherElements", logits, self.watch, axis=1)
        graph.output(watched, "watched", "float32", ["rows", "watched"])
        graph.output(logits, "logits", "float32", ["rows", vocab_size])
        new = graph.op("Concat", *self._keys, *self._values, axis=0)
        graph.output(new, "new_kv", nn.dtype, [2 * self.spec.layers, "rows", self.spec.heads, self.spec.head_dim])
        return graph


def scaled_query(weight: Float32, bias: Float32, width: int, scale: float) -> tuple[Float32, Float32]:
    """Fold attention's scale into the query rows (the first ``width``) of a projection [N, K] and its bias [N]."""
    scales = np.ones((weight.shape[0], 1), np.float32)
    scales[:width] = scale
    return weight * scales, bias * scales[:, 0]


def cache_graphs(
    spec: DecoderSpec, dtype: str, *, start: int | None = None, codes: bool = False
) -> dict[str, GraphBuilder]:
    """Small weightless graphs that keep the caches on a device, what NumPy does in place on the CPU: role → graph.

    All work on all layers at once. ``self_cache`` and ``cross_cache`` make new caches of old ones, for any backend.
    ``self_write`` and ``cross_write`` change caches that stay where they are: whoever runs them binds each output to
    the address of the input it is named after, so that only what changes is moved.

    Args:
        spec: Sizes of the caches.
        dtype: Of the self cache, and of the cross cache without ``codes``.
        start: Width of the decoder's first input where that is the image's own: ``start`` [B, width] is cached besides.
        codes: The cross caches are int8, and ``cross_scales`` [B, 2·L, H, d] is cached besides.
    """
    heads, head_dim, tokens = spec.heads, spec.head_dim, spec.image_tokens
    per_image: PerImage = {}
    for kind, tail in (("k", [head_dim, tokens]), ("v", [tokens, head_dim])):
        cross = "int8" if codes else dtype
        per_image |= {f"cross_{kind}.{layer}": (cross, [heads, *tail]) for layer in range(spec.layers)}
    if codes:
        per_image["cross_scales"] = ("float32", [2 * spec.layers, heads, head_dim])
    if start is not None:
        per_image["start"] = (dtype, [start])
    return {
        "self_cache": _self_cache(spec, dtype),
        "cross_cache": _cross_cache(per_image),
        "self_write": _self_write(spec, dtype),
        "cross_write": _cross_write(per_image),
    }


def _self_cache(spec: DecoderSpec, dtype: str) -> GraphBuilder:
    """Append the new column to every row's self cache, widen the cache, and let rows continue others' caches.

    Inputs: ``self_k.l``, ``self_v.l`` [P, H, C, d], ``new_kv`` [2·L, P, H, d], ``lengths`` int64 [P] (the column of
    each row's new token), ``grow`` int64 [1] (columns to add), ``parents`` int64 [R].
    Outputs: ``next_self_k.l``, ``next_self_v.l`` [R, H, C + grow, d].
    """
    layers, heads, head_dim = spec.layers, spec.heads, spec.head_dim
    graph = GraphBuilder("self_cache")
    new = graph.input("new_kv", dtype, [2 * layers, "previous", heads, head_dim])
    lengths = graph.input("lengths", "int64", ["previous"])
    grow = graph.input("grow", "int64", [1])
    parents = graph.input("parents", "int64", ["rows"])
    pads = graph.op("Concat", graph.ints(0, 0, 0, 0, 0, 0), grow, graph.ints(0), axis=0)
    # A one at each row's column: writing is then a choice between two values, which every backend does in place.
    for index in range(2 * layers):
        name = f"self_{'kv'[index >= layers]}.{index % layers}"
        past = graph.input(name, dtype, ["previous", heads, "columns", head_dim])
        wide = graph.op("Pad", past, pads, graph.const(0, dtype), mode="constant")
        columns = graph.op("Squeeze", graph.op("Shape", wide, start=2, end=3), graph.ints(0))
        steps = graph.op("Range", graph.const(0, "int64"), columns, graph.const(1, "int64"))
        here = graph.op("Equal", graph.reshape(steps, 1, 1, -1, 1), graph.reshape(lengths, -1, 1, 1, 1))
        column = graph.op("Unsqueeze", graph.op("Gather", new, graph.const(index, "int64"), axis=0), graph.ints(2))
        following = graph.op("Gather", graph.op("Where", here, column, wide), parents, axis=0)
        graph.output(following, f"next_{name}", dtype, ["rows", heads, "wide", head_dim])
    return graph


def _self_write(spec: DecoderSpec, dtype: str) -> GraphBuilder:
    """Write the new column into every row's self cache, then copy some rows over others, all in place.

    Running it again changes nothing, as long as no row is both copied from and to another: CUDA graphs are captured by
    running several times.

    Inputs: ``self_k.l``, ``self_v.l`` [R, H, C, d], ``new_kv`` [2·L, R, H, d], ``lengths`` int64 [R] (the column of
    each row's new token), ``origins`` and ``targets`` int64 [M] (row ``targets[i]`` becomes a copy of row
    ``origins[i]``).
    Outputs: ``written_self_k.l``, ``written_self_v.l`` (with the column) and ``next_self_k.l``, ``next_self_v.l`` (with
    the copies besides), [R, H, C, d]; bind both to the input's address.
    """
    layers, heads, head_dim = spec.layers, spec.heads, spec.head_dim
    graph = GraphBuilder("self_write")
    new = graph.input("new_kv", dtype, [2 * layers, "rows", heads, head_dim])
    lengths = graph.input("lengths", "int64", ["rows"])
    origins = graph.input("origins", "int64", ["moved"])
    targets = graph.op("Unsqueeze", graph.input("targets", "int64", ["moved"]), graph.ints(1))
    # [R, H, 3]: row, head and column of each vector of the new column.
    count = graph.op("Squeeze", graph.op("Shape", lengths), graph.ints(0))
    rows = graph.op("Range", graph.const(0, "int64"), count, graph.const(1, "int64"))
    shape = graph.op("Concat", graph.op("Shape", lengths), graph.ints(heads, 1), axis=0)
    parts = (graph.reshape(rows, -1, 1, 1), graph.const(np.arange(heads).reshape(1, heads, 1), "int64"))
    places = [graph.op("Expand", part, shape) for part in (*parts, graph.reshape(lengths, -1, 1, 1))]
    where = graph.op("Concat", *places, axis=2)
    sizes: list[int | str] = ["rows", heads, "columns", head_dim]
    for index in range(2 * layers):
        name = f"self_{'kv'[index >= layers]}.{index % layers}"
        past = graph.input(name, dtype, sizes)
        column = graph.op("Gather", new, graph.const(index, "int64"), axis=0)
        written = graph.op("ScatterND", past, where, column)
        copied = graph.op("ScatterND", written, targets, graph.op("Gather", written, origins, axis=0))
        graph.output(written, f"written_{name}", dtype, sizes)
        graph.output(copied, f"next_{name}", dtype, sizes)
    return graph


def _cross_cache(per_image: PerImage) -> GraphBuilder:
    """Choose the images of the next round from those in work and those just encoded.

    Inputs: ``per_image`` of B images, the same of M images with ``fresh_`` before the name, ``sources`` int64 [N]: 0 to
    B − 1 is an image in work, B + j the j-th fresh one.
    Outputs: the same of N images with ``next_`` before the name.
    """
    graph = GraphBuilder("cross_cache")
    sources = graph.input("sources", "int64", ["next"])
    for name, (kind, tail) in per_image.items():
        present = graph.input(name, kind, ["images", *tail])
        fresh = graph.input(f"fresh_{name}", kind, ["fresh", *tail])
        both = graph.op("Concat", present, fresh, axis=0)
        graph.output(graph.op("Gather", both, sources, axis=0), f"next_{name}", kind, ["next", *tail])
    return graph


def _cross_write(per_image: PerImage) -> GraphBuilder:
    """Put images just encoded into places of the cross cache, in place.

    Inputs: ``per_image`` of B images, the same of M images with ``fresh_`` before the name, ``places`` int64 [M]: the
    place of each.
    Outputs: those of B images with ``next_`` before the name; bind them to the inputs' addresses.
    """
    graph = GraphBuilder("cross_write")
    places = graph.op("Unsqueeze", graph.input("places", "int64", ["fresh"]), graph.ints(1))
    for name, (kind, tail) in per_image.items():
        present = graph.input(name, kind, ["images", *tail])
        fresh = graph.input(f"fresh_{name}", kind, ["fresh", *tail])
        graph.output(graph.op("ScatterND", present, places, fresh), f"next_{name}", kind, ["images", *tail])
    return graph
