"""Small weightless graphs that keep the caches on a device: what NumPy does in place on the CPU.

Both work on all layers at once; shapes as in :mod:`rsedge.export.blip`.
"""

from __future__ import annotations

from rsedge.export.graph import GraphBuilder


def self_cache_graph(*, layers: int, heads: int, head_dim: int, dtype: str) -> GraphBuilder:
    """Append the new column to every row's self cache, widen the cache, and let rows continue others' caches.

    Inputs: ``self_k.l``, ``self_v.l`` [P, H, C, d], ``new_kv`` [2·L, P, H, d], ``lengths`` int64 [P] (the column each
    row's new token goes to), ``grow`` int64 [1] (columns to add), ``parents`` int64 [R].
    Outputs: ``next_self_k.l``, ``next_self_v.l`` [R, H, C + grow, d].
    """
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


def cross_cache_graph(
    *, layers: int, heads: int, head_dim: int, image_tokens: int, dtype: str, start: int | None = None
) -> GraphBuilder:
    """Choose the images of the next round from those in work and those just encoded.

    Inputs: ``cross_k.l`` [B, H, d, S], ``cross_v.l`` [B, H, S, d], ``fresh_cross_k.l``, ``fresh_cross_v.l`` of M
    images, ``sources`` int64 [N]: 0 to B − 1 is an image in work, B + j the j-th fresh one. With ``start``, the width
    of the decoder's first input where that is the image's own, ``start`` [B, width] and ``fresh_start`` besides.
    Outputs: ``next_cross_k.l``, ``next_cross_v.l`` and ``next_start`` of N images.
    """
    graph = GraphBuilder("cross_cache")
    sources = graph.input("sources", "int64", ["next"])
    tails: dict[str, list[int]] = {}
    for kind, tail in (("k", [head_dim, image_tokens]), ("v", [image_tokens, head_dim])):
        tails |= {f"cross_{kind}.{layer}": [heads, *tail] for layer in range(layers)}
    if start is not None:
        tails["start"] = [start]
    for name, tail in tails.items():
        present = graph.input(name, dtype, ["images", *tail])
        fresh = graph.input(f"fresh_{name}", dtype, ["fresh", *tail])
        both = graph.op("Concat", present, fresh, axis=0)
        graph.output(graph.op("Gather", both, sources, axis=0), f"next_{name}", dtype, ["next", *tail])
    return graph
