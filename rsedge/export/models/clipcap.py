"""CLIPCap as two graphs: vision (image → prefix → its keys and values in GPT-2) and step (token → candidates).

The prefix stands in every caption of an image before its first token, so the vision graph runs GPT-2 over it once and
gives the keys and values as the image's cross cache, which all of its rows share. The prefix's last position is left to
the step graph: it predicts the first token, so it is the first step, whose input is ``start`` instead of a token.

Weights are the tensors of :class:`rsedge.training.models.clipcap_model.ClipCapModel` by the names of
:mod:`rsedge.export.models.clipcap_layout`; shapes below use B images, R rows (a row is one beam of one image; rows of
an image are adjacent and every image has equally many), P prefix positions, W the width of GPT-2, H heads of d, C
columns of the self cache, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rsedge.export.graphs.builder import GraphBuilder
from rsedge.export.graphs.encoder import attend, linear, mlp, norm, unit_length
from rsedge.export.graphs.precision import Layers, Precision
from rsedge.export.graphs.steps import StepInputs, give_candidates, give_new_column, scaled_query
from rsedge.export.models.clip import encode_images

if TYPE_CHECKING:
    from rsedge.bundle import ImageSpec
    from rsedge.export.models.clipcap_layout import ClipCapSettings

Tensors = Mapping[str, NDArray[np.float32]]

_GPT2 = "language_model.transformer"
_NORM_EPS = 1e-5  # of torch's LayerNorm, which the mapper uses as it is


def vision_graph(settings: ClipCapSettings, tensors: Tensors, image: ImageSpec, precision: Precision) -> GraphBuilder:
    """Image encoder, mapper, and GPT-2 over the first P − 1 prefix positions.

    Inputs: ``pixels`` uint8 [B, size, size, 3].
    Outputs: ``cross_k.l`` [B, H, d, P − 1] and ``cross_v.l`` [B, H, P − 1, d] for each layer l, ``start`` [B, W] (the
    last prefix position), ``image_embeds`` float32 [B, D] of unit length.

    Args:
        settings: The model's numbers.
        tensors: Weights.
        image: Size to export at (position embeddings are interpolated), mean and deviation.
        precision: What the linear layers run in.
    """
    graph = GraphBuilder("vision")
    nn = Layers(graph, precision)
    embeds = unit_length(nn, encode_images(nn, settings.vision, tensors, image))
    mapper = _transformer_mapper if settings.mapper.kind == "transformer" else _mlp_mapper
    _prefill(nn, settings, tensors, mapper(nn, settings, tensors, nn.from_float32(embeds)))
    graph.output(embeds, "image_embeds", "float32", ["batch", settings.vision.dim])
    return graph


def _mlp_mapper(nn: Layers, settings: ClipCapSettings, tensors: Tensors, embeds: str) -> str:
    """Linear → Tanh → Linear, [B, D] → [B, P, W]."""
    hidden = nn.graph.op("Tanh", linear(nn, embeds, tensors, "mapper.model.0"))
    prefix = linear(nn, hidden, tensors, "mapper.model.2")
    return nn.graph.reshape(prefix, -1, settings.mapper.prefix_length, settings.text.width)


def _transformer_mapper(nn: Layers, settings: ClipCapSettings, tensors: Tensors, embeds: str) -> str:
    """Tokens of the image and learnt constants through pre-norm layers; the constants become the prefix, [B, P, W]."""
    graph, mapper, width = nn.graph, settings.mapper, settings.text.width
    tokens = graph.reshape(linear(nn, embeds, tensors, "mapper.linear"), -1, mapper.clip_length, width)
    constants = nn.array("mapper.prefix_const", tensors["mapper.prefix_const"][None])
    batch = graph.op("Shape", tokens, start=0, end=1)
    shape = graph.op("Concat", batch, graph.ints(mapper.prefix_length, width), axis=0)
    x = graph.reshape(graph.op("Concat", tokens, graph.op("Expand", constants, shape), axis=1), -1, width)
    length, head_dim = mapper.clip_length + mapper.prefix_length, width // mapper.heads
    for layer in range(mapper.layers):
        name = f"mapper.transformer.layers.{layer}"
        normed = norm(nn, x, tensors, f"{name}.norm1", _NORM_EPS)
        weight = np.concatenate([tensors[f"{name}.attn.{part}.weight"] for part in ("to_queries", "to_keys_values")])
        weight, bias = scaled_query(weight, np.zeros(len(weight), np.float32), width, head_dim**-0.5)
        q, k, v = _heads(graph, nn.linear(normed, f"{name}.attn.qkv", weight, bias), length, mapper.heads, head_dim)
        context = graph.reshape(attend(nn, q, k, v), -1, width)
        x = graph.op("Add", linear(nn, context, tensors, f"{name}.attn.project"), x)
        normed = norm(nn, x, tensors, f"{name}.norm2", _NORM_EPS)
        x = graph.op("Add", mlp(nn, normed, tensors, f"{name}.mlp", "relu"), x)
    x = graph.reshape(x, -1, length, width)
    return graph.op("Slice", x, graph.ints(mapper.clip_length), graph.ints(length), graph.ints(1))


def _prefill(nn: Layers, settings: ClipCapSettings, tensors: Tensors, prefix: str) -> None:
    """GPT-2 over the first positions of ``prefix`` [B, P, W], as far as its keys and values need it."""
    graph, text, count = nn.graph, settings.text, settings.image_tokens
    last = graph.op("Slice", prefix, graph.ints(count), graph.ints(count + 1), graph.ints(1))
    graph.output(graph.reshape(last, -1, text.width), "start", nn.dtype, ["batch", text.width])
    x = graph.op("Slice", prefix, graph.ints(0), graph.ints(count), graph.ints(1))
    x = graph.op("Add", x, nn.array("wpe.prefix", tensors[f"{_GPT2}.wpe.weight"][:count]))
    x = graph.reshape(x, -1, text.width)
    later = np.triu(np.full((count, count), -1e30, np.float32), 1)
    mask = graph.weight("later_positions", later)
    for layer in range(text.layers):
        name = f"{_GPT2}.h.{layer}"
        normed = norm(nn, x, tensors, f"{name}.ln_1", text.eps)
        weight, bias = _attention_weights(settings, tensors, layer)
        if layer == text.layers - 1:  # nothing comes after its keys and values
            weight, bias = weight[text.width :], bias[text.width :]
            k, v = _heads(graph, nn.linear(normed, f"{name}.kv", weight, bias), count, text.heads, text.head_dim, 2)
        else:
            qkv = nn.linear(normed, f"{name}.qkv", weight, bias)
            q, k, v = _heads(graph, qkv, count, text.heads, text.head_dim)
        sizes: list[int | str] = ["batch", text.heads, text.head_dim, count]
        graph.output(graph.transpose(k, 0, 1, 3, 2), f"cross_k.{layer}", nn.dtype, sizes)
        graph.output(v, f"cross_v.{layer}", nn.dtype, ["batch", text.heads, count, text.head_dim])
        if layer < text.layers - 1:
            context = graph.reshape(attend(nn, q, k, v, mask), -1, text.width)
            x = _block(nn, settings, tensors, layer, x, context)


def _heads(graph: GraphBuilder, rows: str, length: int, heads: int, head_dim: int, parts: int = 3) -> list[str]:
    """Split projections [B · T, parts · H · d] into ``parts`` values [B, H, T, d]."""
    split = graph.transpose(graph.reshape(rows, -1, length, parts, heads, head_dim), 2, 0, 3, 1, 4)
    return [graph.op("Gather", split, graph.const(index, "int64"), axis=0) for index in range(parts)]


def step_graph(settings: ClipCapSettings, tensors: Tensors, precision: Precision) -> GraphBuilder:
    """One GPT-2 run: one token per row against the self cache and the image's prefix.

    Inputs: those of :class:`rsedge.export.graphs.steps.StepInputs`, whose cross cache is the prefix's, and ``start``
    [B, W]: where a row's length is 0 its input is its image's ``start``, whatever its token says.
    Outputs: those of :func:`rsedge.export.graphs.steps.give_candidates`, and ``new_kv`` [2·L, R, H, d].
    """
    graph = GraphBuilder("step")
    step = _Step(Layers(graph, precision), settings, tensors)
    x = step.embed()
    mask = step.inputs.cache_mask(graph)
    for layer in range(settings.text.layers):
        x = _block(step.nn, settings, tensors, layer, x, step.attention(layer, x, mask))
    give_candidates(graph, step.inputs, step.nn.to_float32(step.head(x)), settings.text.vocab_size)
    give_new_column(step.nn, step.new_keys, step.new_values, heads=settings.text.heads, head_dim=settings.text.head_dim)
    return graph


class _Step:
    """GPT-2's layers for one token per row; collects each layer's new key and value [1, R, H, d]."""

    def __init__(self, nn: Layers, settings: ClipCapSettings, tensors: Tensors) -> None:
        self.nn, self.graph, self.settings, self.tensors = nn, nn.graph, settings, tensors
        self.new_keys: list[str] = []
        self.new_values: list[str] = []
        text = settings.text
        self.inputs = StepInputs(
            nn, layers=text.layers, heads=text.heads, head_dim=text.head_dim, image_tokens=settings.image_tokens
        )
        self.start = self.graph.input("start", nn.dtype, ["images", text.width])

    def embed(self) -> str:
        """Input and position embeddings, [R, W]."""
        graph, inputs, width = self.graph, self.inputs, self.settings.text.width
        words = self.nn.embedding(inputs.tokens, "wte", self.tensors[f"{_GPT2}.wte.weight"])
        each = graph.op("Div", graph.op("Shape", inputs.tokens), inputs.images)
        shape = graph.op("Concat", inputs.images, each, graph.ints(width), axis=0)
        starts = graph.op("Expand", graph.op("Unsqueeze", self.start, graph.ints(1)), shape)
        first = graph.op("Unsqueeze", graph.op("Equal", inputs.lengths, graph.const(0, "int64")), graph.ints(1))
        x = graph.op("Where", first, graph.reshape(starts, -1, width), words)
        places = self.nn.array("wpe.step", self.tensors[f"{_GPT2}.wpe.weight"][self.settings.image_tokens :])
        return graph.op("Add", x, graph.op("Gather", places, inputs.lengths))

    def attention(self, layer: int, x: str, mask: str) -> str:
        """One softmax over the prefix, the row's tokens so far and its present one, [R, W] → [R, W]."""
        graph, text, nn = self.graph, self.settings.text, self.nn
        caches, heads, head_dim = self.inputs.caches[layer], text.heads, text.head_dim
        name = f"{_GPT2}.h.{layer}"
        normed = norm(nn, x, self.tensors, f"{name}.ln_1", text.eps)
        qkv = nn.linear(normed, f"{name}.qkv", *_attention_weights(self.settings, self.tensors, layer))
        q, k, v = graph.multi("Split", graph.reshape(qkv, -1, 3 * heads, 1, head_dim), outputs=3, axis=1, num_outputs=3)
        for new, collected in ((k, self.new_keys), (v, self.new_values)):
            collected.append(graph.reshape(new, 1, -1, heads, head_dim))
        past = graph.op("MatMul", q, graph.transpose(caches.self_k, 0, 1, 3, 2))
        past = graph.op("Add", nn.to_float32(past), mask)
        present = graph.op("ReduceSum", graph.op("Mul", q, k), graph.ints(-1), keepdims=1)
        # All rows of an image go through one product with its prefix: that is read once and never repeated.
        by_image = graph.transpose(graph.op("Reshape", q, self.inputs.by_image), 0, 2, 1, 3)
        count = self.settings.image_tokens
        prefix = graph.transpose(graph.op("MatMul", by_image, caches.cross_k), 0, 2, 1, 3)
        prefix = graph.reshape(prefix, -1, heads, 1, count)
        scores = graph.op("Concat", nn.to_float32(prefix), nn.to_float32(present), past, axis=-1)
        weights = nn.from_float32(graph.op("Softmax", scores, axis=-1))

        def part(begin: int, end: int) -> str:
            return graph.op("Slice", weights, graph.ints(begin), graph.ints(end), graph.ints(3))

        grouped = graph.op("Concat", self.inputs.images, graph.ints(-1, heads, count), axis=0)
        on_prefix = graph.transpose(graph.op("Reshape", part(0, count), grouped), 0, 2, 1, 3)
        of_prefix = graph.transpose(graph.op("MatMul", on_prefix, caches.cross_v), 0, 2, 1, 3)
        of_past = graph.op("MatMul", part(count + 1, 2**31), caches.self_v)
        context = graph.op("Add", of_past, graph.op("Mul", part(count, count + 1), v))
        return graph.op("Add", graph.reshape(context, -1, text.width), graph.reshape(of_prefix, -1, text.width))

    def head(self, x: str) -> str:
        """Logits over the vocabulary, [R, V]."""
        text = self.settings.text
        x = norm(self.nn, x, self.tensors, f"{_GPT2}.ln_f", text.eps)
        weight, no_bias = self.tensors["language_model.lm_head.weight"], np.zeros(text.vocab_size, np.float32)
        if np.array_equal(weight, self.tensors[f"{_GPT2}.wte.weight"]):
            return self.nn.linear_from_table(x, "wte", weight, no_bias)
        return self.nn.linear(x, "lm_head", weight, no_bias)


def _block(nn: Layers, settings: ClipCapSettings, tensors: Tensors, layer: int, x: str, context: str) -> str:
    """What follows the attention of a layer: its projection and the MLP, each added to ``x`` [M, W]."""
    name, graph, text = f"{_GPT2}.h.{layer}", nn.graph, settings.text
    x = graph.op("Add", _conv1d(nn, tensors, f"{name}.attn.c_proj", context), x)
    normed = norm(nn, x, tensors, f"{name}.ln_2", text.eps)
    hidden = nn.activation(_conv1d(nn, tensors, f"{name}.mlp.c_fc", normed), text.act)
    return graph.op("Add", _conv1d(nn, tensors, f"{name}.mlp.c_proj", hidden), x)


def _attention_weights(
    settings: ClipCapSettings, tensors: Tensors, layer: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weight [3 · W, W] and bias of a layer's queries, scaled, keys and values."""
    name = f"{_GPT2}.h.{layer}.attn.c_attn"
    text = settings.text
    return scaled_query(tensors[f"{name}.weight"].T, tensors[f"{name}.bias"], text.width, text.scales[layer])


def _conv1d(nn: Layers, tensors: Tensors, name: str, x: str) -> str:
    """GPT-2's linear layers, which keep their weights transposed."""
    return nn.linear(x, name, tensors[f"{name}.weight"].T, tensors[f"{name}.bias"])
