"""CLIP and SigLIP as two graphs: vision (pixels → embedding) and text (token ids → embedding), both of unit length.

Weights are the tensors of ``CLIPModel`` and ``SiglipModel`` by their names there; shapes use B images or texts, S image
tokens, T text tokens, D numbers to an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rsedge.export.graphs.builder import GraphBuilder
from rsedge.export.graphs.encoder import (
    Encoder,
    Reading,
    attend,
    embed_patches,
    interpolate_positions,
    linear,
    mlp,
    norm,
    prepend_token,
    unit_length,
)
from rsedge.export.graphs.precision import Layers, Precision

if TYPE_CHECKING:
    from rsedge.bundle import ImageSpec
    from rsedge.export.models.clip_layout import TextSettings, VisionSettings

Tensors = Mapping[str, NDArray[np.float32]]


def vision_graph(settings: VisionSettings, tensors: Tensors, image: ImageSpec, precision: Precision) -> GraphBuilder:
    """The image encoder.

    Inputs: ``pixels`` uint8 [B, size, size, 3].
    Outputs: ``image_embeds`` float32 [B, D] of unit length.

    Args:
        settings: The encoder's numbers.
        tensors: Weights.
        image: Size to export at (position embeddings are interpolated), mean and deviation.
        precision: What the linear layers run in.
    """
    graph = GraphBuilder("vision")
    nn = Layers(graph, precision)
    embeds = unit_length(nn, encode_images(nn, settings, tensors, image))
    graph.output(embeds, "image_embeds", "float32", ["batch", settings.dim])
    return graph


def encode_images(nn: Layers, settings: VisionSettings, tensors: Tensors, image: ImageSpec) -> str:
    """Declare the input ``pixels`` and encode it, [B, D] as the model gives it; arguments as :func:`vision_graph`."""
    graph, tower, name = nn.graph, settings.tower, "vision_model.embeddings"
    grid = image.size // settings.patch_size
    tokens = grid**2 + settings.extra_tokens
    clip = settings.kind == "clip"
    bias = None if clip else tensors[f"{name}.patch_embedding.bias"]
    x = embed_patches(nn, image, settings.patch_size, tensors[f"{name}.patch_embedding.weight"], bias)
    if clip:
        x = prepend_token(nn, x, tensors[f"{name}.class_embedding"])
    positions = tensors[f"{name}.position_embedding.weight"]
    positions = interpolate_positions(positions, grid, extra=settings.extra_tokens)
    x = graph.op("Add", x, nn.array("positions", positions))
    x = graph.reshape(x, -1, tower.width)
    encoder = Encoder(nn, tower, tensors, "vision_model", graph.ints(-1, tokens))
    if not clip:
        x = norm(nn, encoder.run(x), tensors, "vision_model.post_layernorm", tower.eps)
        return _attention_pool(nn, settings, tensors, x, tokens)

    def class_token(rows: str) -> str:
        return graph.op("Gather", graph.reshape(rows, -1, tokens, tower.width), graph.const(0, "int64"), axis=1)

    x = norm(nn, x, tensors, "vision_model.pre_layrnorm", tower.eps)
    x = encoder.run(x, reading=Reading(class_token))
    x = norm(nn, x, tensors, "vision_model.post_layernorm", tower.eps)
    return linear(nn, x, tensors, "visual_projection")


def _attention_pool(nn: Layers, settings: VisionSettings, tensors: Tensors, x: str, tokens: int) -> str:
    """SigLIP's head: a learnt query over all tokens, then an MLP, [B·S, W] → [B, W]."""
    graph, tower, name = nn.graph, settings.tower, "vision_model.head"
    width, heads, head_dim = tower.width, tower.heads, tower.head_dim
    weight, bias = tensors[f"{name}.attention.in_proj_weight"], tensors[f"{name}.attention.in_proj_bias"]
    # The query is the same for every image, so it is worked out here.
    query = (tensors[f"{name}.probe"].reshape(width) @ weight[:width].T + bias[:width]) * np.float32(head_dim**-0.5)
    both = nn.linear(x, f"{name}.attention.in_proj", weight[width:], bias[width:])
    both = graph.transpose(graph.reshape(both, -1, tokens, 2, heads, head_dim), 2, 0, 3, 1, 4)
    k, v = (graph.op("Gather", both, graph.const(index, "int64"), axis=0) for index in range(2))
    context = attend(nn, nn.array(f"{name}.query", query.reshape(1, heads, 1, head_dim)), k, v)
    x = linear(nn, graph.reshape(context, -1, width), tensors, f"{name}.attention.out_proj")
    hidden = norm(nn, x, tensors, f"{name}.layernorm", tower.eps)
    return graph.op("Add", x, mlp(nn, hidden, tensors, f"{name}.mlp", tower.act))


def text_graph(settings: TextSettings, tensors: Tensors, precision: Precision) -> GraphBuilder:
    """The text encoder.

    Inputs: ``input_ids`` int64 [B, T]; T is at most the context length for CLIP, and the context length for SigLIP.
    Outputs: ``text_embeds`` float32 [B, D] of unit length.

    Args:
        settings: The encoder's numbers.
        tensors: Weights.
        precision: What the linear layers run in.
    """
    graph = GraphBuilder("text")
    nn = Layers(graph, precision)
    tower, name, clip = settings.tower, "text_model.embeddings", settings.kind == "clip"
    ids = graph.input("input_ids", "int64", ["batch", "tokens" if clip else settings.context_length])
    shape = graph.op("Shape", ids)
    words = nn.embedding(ids, "token_embedding", tensors[f"{name}.token_embedding.weight"])
    count = graph.op("Shape", ids, start=1, end=2)
    places = nn.array("positions", tensors[f"{name}.position_embedding.weight"])
    places = graph.op("Slice", places, graph.ints(0), count, graph.ints(0))
    x = graph.reshape(graph.op("Add", words, places), -1, tower.width)
    encoder = Encoder(nn, tower, tensors, "text_model", shape)
    tokens = graph.op("Concat", shape, graph.ints(tower.width), axis=0)
    if clip:
        mask = _causal_mask(graph, settings.context_length, count)
        place = _end_place(graph, ids, settings.end)

        def end_token(rows: str) -> str:
            return graph.op("GatherND", graph.op("Reshape", rows, tokens), place, batch_dims=1)

        seen = graph.op("Unsqueeze", graph.op("Gather", mask, place, axis=0), graph.ints(1))
        x = encoder.run(x, mask=mask, reading=Reading(end_token, seen))
    else:

        def last_token(rows: str) -> str:
            return graph.op("Gather", graph.op("Reshape", rows, tokens), graph.const(-1, "int64"), axis=1)

        x = encoder.run(x, reading=Reading(last_token))
    x = norm(nn, x, tensors, "text_model.final_layer_norm", tower.eps)
    x = linear(nn, x, tensors, "text_projection" if clip else "text_model.head")
    graph.output(unit_length(nn, x), "text_embeds", "float32", ["batch", settings.dim])
    return graph


def _causal_mask(graph: GraphBuilder, longest: int, count: str) -> str:
    """0 where a token (row) may see another (column), very negative elsewhere; float32 [T, T]."""
    whole = np.triu(np.full((longest, longest), -1e30, np.float32), 1)
    both = graph.op("Concat", count, count, axis=0)
    return graph.op("Slice", graph.weight("causal_mask", whole), graph.ints(0, 0), both, graph.ints(0, 1))


def _end_place(graph: GraphBuilder, ids: str, end: int | None) -> str:
    """Where each text is read off, int64 [B, 1]: the first end token, or the first of the largest ids."""
    # In float32, which holds every id exactly: more backends have its ArgMax than that of integers.
    marks = ids if end is None else graph.op("Equal", ids, graph.const(end, "int64"))
    return graph.op("ArgMax", graph.cast(marks, "float32"), axis=1, keepdims=1)
