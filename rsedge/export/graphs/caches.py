"""Small weightless graphs that keep the caches on a device: what NumPy does in place on the CPU.

All work on all layers at once; shapes as in :mod:`rsedge.export.models.blip`. ``self_cache`` and ``cross_cache`` make
new caches of old ones, for any backend. ``self_write`` and ``cross_write`` change caches that stay where they are:
whoever runs them binds each output to the address of the input it is named after, so that only what changes is moved.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rsedge.export.graphs.builder import GraphBuilder


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheGraphs:
    """The cache graphs of one captioner."""

    layers: int
    heads: int
    head_dim: int
    image_tokens: int
    """Of an image in the cross cache."""
    dtype: str
    """Of the self cache, and of the cross cache without ``codes``."""
    start: int | None = None
    """Width of the decoder's first input where that is the image's own: ``start`` [B, width] is cached besides."""
    codes: bool = False
    """The cross caches are int8, and ``cross_scales`` [B, 2·L, H, d] is cached besides."""

    def by_role(self) -> dict[str, GraphBuilder]:
        """Role → graph."""
        return {
            "self_cache": self._self_cache(),
            "cross_cache": self._cross_cache(),
            "self_write": self._self_write(),
            "cross_write": self._cross_write(),
        }

    def _self_cache(self) -> GraphBuilder:
        """Append the new column to every row's self cache, widen the cache, and let rows continue others' caches.

        Inputs: ``self_k.l``, ``self_v.l`` [P, H, C, d], ``new_kv`` [2·L, P, H, d], ``lengths`` int64 [P] (the column
        of each row's new token), ``grow`` int64 [1] (columns to add), ``parents`` int64 [R].
        Outputs: ``next_self_k.l``, ``next_self_v.l`` [R, H, C + grow, d].
        """
        layers, heads, head_dim, dtype = self.layers, self.heads, self.head_dim, self.dtype
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
            written = graph.op("Where", here, column, wide)
            following = graph.op("Gather", written, parents, axis=0)
            graph.output(following, f"next_{name}", dtype, ["rows", heads, "wide", head_dim])
        return graph

    def _cross_cache(self) -> GraphBuilder:
        """Choose the images of the next round from those in work and those just encoded.

        Inputs: ``cross_k.l`` [B, H, d, S], ``cross_v.l`` [B, H, S, d] and the rest of :meth:`_per_image`, the same of M
        images with ``fresh_`` before the name, ``sources`` int64 [N]: 0 to B − 1 is an image in work, B + j the j-th
        fresh one.
        Outputs: the same of N images with ``next_`` before the name.
        """
        graph = GraphBuilder("cross_cache")
        sources = graph.input("sources", "int64", ["next"])
        for name, (kind, tail) in self._per_image().items():
            present = graph.input(name, kind, ["images", *tail])
            fresh = graph.input(f"fresh_{name}", kind, ["fresh", *tail])
            both = graph.op("Concat", present, fresh, axis=0)
            graph.output(graph.op("Gather", both, sources, axis=0), f"next_{name}", kind, ["next", *tail])
        return graph

    def _self_write(self) -> GraphBuilder:
        """Write the new column into every row's self cache, then copy some rows over others, all in place.

        Running it again changes nothing, as long as no row is both copied from and to another: CUDA graphs are captured
        by running several times.

        Inputs: ``self_k.l``, ``self_v.l`` [R, H, C, d], ``new_kv`` [2·L, R, H, d], ``lengths`` int64 [R] (the column of
        each row's new token), ``origins`` and ``targets`` int64 [M] (row ``targets[i]`` becomes a copy of row
        ``origins[i]``).
        Outputs: ``written_self_k.l``, ``written_self_v.l`` (with the column) and ``next_self_k.l``, ``next_self_v.l``
        (with the copies besides), [R, H, C, d]; bind both to the input's address.
        """
        layers, heads, head_dim, dtype = self.layers, self.heads, self.head_dim, self.dtype
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
        for index in range(2 * layers):
            name = f"self_{'kv'[index >= layers]}.{index % layers}"
            past = graph.input(name, dtype, ["rows", heads, "columns", head_dim])
            column = graph.op("Gather", new, graph.const(index, "int64"), axis=0)
            written = graph.op("ScatterND", past, where, column)
            copied = graph.op("ScatterND", written, targets, graph.op("Gather", written, origins, axis=0))
            graph.output(written, f"written_{name}", dtype, ["rows", heads, "columns", head_dim])
            graph.output(copied, f"next_{name}", dtype, ["rows", heads, "columns", head_dim])
        return graph

    def _cross_write(self) -> GraphBuilder:
        """Put images just encoded into places of the cross cache, in place.

        Inputs: those of :meth:`_per_image`, the same of M images with ``fresh_`` before the name, ``places`` int64 [M]:
        the place of each.
        Outputs: those of B images with ``next_`` before the name; bind them to the inputs' addresses.
        """
        graph = GraphBuilder("cross_write")
        places = graph.op("Unsqueeze", graph.input("places", "int64", ["fresh"]), graph.ints(1))
        for name, (kind, tail) in self._per_image().items():
            present = graph.input(name, kind, ["images", *tail])
            fresh = graph.input(f"fresh_{name}", kind, ["fresh", *tail])
            graph.output(graph.op("ScatterND", present, places, fresh), f"next_{name}", kind, ["images", *tail])
        return graph

    def _per_image(self) -> dict[str, tuple[str, list[int]]]:
        """The step graph's inputs that exist once per image, by name: type, and shape behind the images."""
        layers, heads, head_dim, tokens = self.layers, self.heads, self.head_dim, self.image_tokens
        inputs: dict[str, tuple[str, list[int]]] = {}
        cross = "int8" if self.codes else self.dtype
        for kind, tail in (("k", [head_dim, tokens]), ("v", [tokens, head_dim])):
            inputs |= {f"cross_{kind}.{layer}": (cross, [heads, *tail]) for layer in range(layers)}
        if self.codes:
            inputs["cross_scales"] = ("float32", [2 * layers, heads, head_dim])
        if self.start is not None:
            inputs["start"] = (self.dtype, [self.start])
        return inputs
