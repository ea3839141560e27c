"""BLIP captioning models as two graphs: vision (image → cross cache) and step (token → candidates).

Weights are the tensors of ``BlipForConditionalGeneration`` by their names there; shapes below use B images, R rows
(a row is one beam of one image; rows of an image are adjacent and every image has equally many), S image tokens,
H heads of d, C cache columns, V vocabulary, L decoder layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rsedge.bundle import ImageSpec
from rsedge.export.graphs.builder import GraphBuilder
from rsedge.export.graphs.encoder import embed_patches, prepend_token
from rsedge.export.graphs.precision import Layers, Precision
from rsedge.export.graphs.steps import StepInputs, give_candidates, give_new_column, scaled_query

if TYPE_CHECKING:
    from rsedge.export.checkpoint import Checkpoint
    from rsedge.export.models.blip_layout import BlipSettings

Tensors = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class BlipShape:
    """The numbers of a BLIP captioner that its graphs depend on.

    Attributes:
        image_size, patch_size: Pixels; ``image_size`` is the exported one and may differ from the checkpoint's.
        vision_width, vision_layers, vision_heads, vision_act, vision_eps: The image encoder.
        width, layers, heads, act, eps, positions, vocab_size: The text decoder.
    """

    image_size: int
    patch_size: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    vision_act: str
    vision_eps: float
    width: int
    layers: int
    heads: int
    act: str
    eps: float
    positions: int
    vocab_size: int

    @property
    def grid(self) -> int:
        """Patches along an edge."""
        return self.image_size // self.patch_size

    @property
    def image_tokens(self) -> int:
        """Patches and the class token."""
        return self.grid**2 + 1

    @property
    def head_dim(self) -> int:
        """Width of one decoder head."""
        return self.width // self.heads

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint[BlipSettings], image_size: int) -> BlipShape:
        """The checkpoint's numbers, at another image size if ``image_size`` says so."""
        vision, text = checkpoint.settings.vision, checkpoint.settings.text
        vision_config = checkpoint.config.get("vision_config") or {}
        text_config = checkpoint.config.get("text_config") or {}
        return cls(
            image_size=image_size,
            patch_size=vision["patch_size"],
            vision_width=vision["hidden_size"],
            vision_layers=vision["num_hidden_layers"],
            vision_heads=vision["num_attention_heads"],
            vision_act=vision_config.get("hidden_act", "gelu"),
            vision_eps=vision_config.get("layer_norm_eps", 1e-5),
            width=text["hidden_size"],
            layers=text["num_hidden_layers"],
            heads=text["num_attention_heads"],
            act=text_config.get("hidden_act", "gelu"),
            eps=text_config.get("layer_norm_eps", 1e-12),
            positions=text["max_position_embeddings"],
            vocab_size=text["vocab_size"],
        )


def vision_graph(
    shape: BlipShape,
    tensors: Tensors,
    positions: NDArray[np.float32],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    precision: Precision,
) -> GraphBuilder:
    """The image encoder with the cross-attention projections of every decoder layer behind it.

    Inputs: ``pixels`` uint8 [B, image_size, image_size, 3].
    Outputs: ``cross_k.l`` [B, H, d, S] and ``cross_v.l`` [B, H, S, d] for each layer l, ``image_embeds`` [B, S, D]. In
    int8 the caches are int8, a quarter of what each step reads, and ``cross_scales`` [B, 2·L, H, d] says what a unit of
    each channel is worth: of the keys of all layers, then of the values.

    Args:
        shape: The model's numbers.
        tensors: Weights by transformers' names.
        positions: Position embeddings [S, vision_width], interpolated to the exported size.
        mean, std: Of RGB values scaled to 0..1.
        precision: What the linear layers run in.
    """
    graph = GraphBuilder("vision")
    nn = Layers(graph, precision)
    x = _patches(nn, shape, tensors, positions, mean, std)
    for layer in range(shape.vision_layers):
        x = _vision_layer(nn, shape, tensors, f"vision_model.encoder.layers.{layer}", x)
    name = "vision_model.post_layernorm"
    x = nn.layer_norm(x, name, tensors[f"{name}.weight"], tensors[f"{name}.bias"], shape.vision_eps)
    scales = []
    for kind, axes, along in (("key", (0, 2, 3, 1), -1), ("value", (0, 2, 1, 3), -2)):
        sizes: list[int | str] = ["batch", shape.heads, shape.image_tokens, shape.head_dim]
        if kind == "key":
            sizes = ["batch", shape.heads, shape.head_dim, shape.image_tokens]
        for layer in range(shape.layers):
            name = f"text_decoder.bert.encoder.layer.{layer}.crossattention.self.{kind}"
            y = nn.linear(x, name, tensors[f"{name}.weight"], tensors[f"{name}.bias"])
            y = graph.reshape(y, -1, shape.image_tokens, shape.heads, shape.head_dim)
            y = graph.transpose(y, *axes)
            if precision == "int8":
                y, scale = nn.cache_codes(y, along)
                scales.append(graph.reshape(scale, -1, 1, shape.heads, shape.head_dim))
            graph.output(y, f"cross_{kind[0]}.{layer}", "int8" if scales else nn.dtype, sizes)
    if scales:
        scale_sizes: list[int | str] = ["batch", 2 * shape.layers, shape.heads, shape.head_dim]
        graph.output(graph.op("Concat", *scales, axis=1), "cross_scales", "float32", scale_sizes)
    embeds = nn.to_float32(graph.reshape(x, -1, shape.image_tokens, shape.vision_width))
    graph.output(embeds, "image_embeds", "float32", ["batch", shape.image_tokens, shape.vision_width])
    return graph


def _patches(
    nn: Layers,
    shape: BlipShape,
    tensors: Tensors,
    positions: NDArray[np.float32],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> str:
    """uint8 pixels → embedded patches with class token and positions, [B·S, D]."""
    graph, name, width = nn.graph, "vision_model.embeddings", shape.vision_width
    kernel, bias = (tensors[f"{name}.patch_embedding.{part}"] for part in ("weight", "bias"))
    x = embed_patches(nn, ImageSpec(size=shape.image_size, mean=mean, std=std), shape.patch_size, kernel, bias)
    x = prepend_token(nn, x, tensors[f"{name}.class_embedding"].reshape(width))
    return graph.reshape(graph.op("Add", x, nn.array("positions", positions)), -1, width)


def _vision_layer(nn: Layers, shape: BlipShape, tensors: Tensors, prefix: str, x: str) -> str:
    """One pre-norm encoder layer, [B·S, D] → [B·S, D]."""
    graph, heads, tokens = nn.graph, shape.vision_heads, shape.image_tokens
    head_dim = shape.vision_width // heads

    def norm(value: str, name: str) -> str:
        name = f"{prefix}.{name}"
        return nn.layer_norm(value, name, tensors[f"{name}.weight"], tensors[f"{name}.bias"], shape.vision_eps)

    def linear(value: str, name: str) -> str:
        name = f"{prefix}.{name}"
        return nn.linear(value, name, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    weight, bias = (tensors[f"{prefix}.self_attn.qkv.{part}"] for part in ("weight", "bias"))
    weight, bias = scaled_query(weight, bias, shape.vision_width, head_dim**-0.5)
    qkv = nn.linear(norm(x, "layer_norm1"), f"{prefix}.self_attn.qkv", weight, bias)
    qkv = graph.transpose(graph.reshape(qkv, -1, tokens, 3, heads, head_dim), 2, 0, 3, 1, 4)
    q, k, v = (graph.op("Gather", qkv, graph.const(index, "int64"), axis=0) for index in range(3))
    weights = nn.softmax(graph.op("MatMul", q, graph.transpose(k, 0, 1, 3, 2)))
    context = graph.transpose(graph.op("MatMul", weights, v), 0, 2, 1, 3)
    context = graph.reshape(context, -1, shape.vision_width)
    x = graph.op("Add", linear(context, "self_attn.projection"), x)
    hidden = nn.activation(linear(norm(x, "layer_norm2"), "mlp.fc1"), shape.vision_act)
    return graph.op("Add", linear(hidden, "mlp.fc2"), x)


def step_graph(shape: BlipShape, tensors: Tensors, precision: Precision) -> GraphBuilder:
    """One decoder run: one token per row against the self cache and the image's cross cache.

    Inputs: those of :class:`rsedge.export.graphs.steps.StepInputs`.
    Outputs: those of :func:`rsedge.export.graphs.steps.give_candidates`, and ``new_kv`` [2·L, R, H, d].
    """
    graph = GraphBuilder("step")
    nn = Layers(graph, precision)
    decoder = _Step(nn, shape, tensors)
    x = decoder.embed()
    mask = decoder.inputs.cache_mask(graph)
    for layer in range(shape.layers):
        x = decoder.layer(layer, x, mask)
    give_candidates(graph, decoder.inputs, nn.to_float32(decoder.head(x)), shape.vocab_size)
    give_new_column(nn, decoder.new_keys, decoder.new_values, heads=shape.heads, head_dim=shape.head_dim)
    return graph


class _Step:
    """The decoder's layers for one token per row; collects each layer's new key and value [1, R, H, d]."""

    def __init__(self, nn: Layers, shape: BlipShape, tensors: Tensors) -> None:
        self.nn, self.graph, self.shape, self.tensors = nn, nn.graph, shape, tensors
        self.new_keys: list[str] = []
        self.new_values: list[str] = []
        self.inputs = StepInputs(
            nn,
            layers=shape.layers,
            heads=shape.heads,
            head_dim=shape.head_dim,
            image_tokens=shape.image_tokens,
            codes=nn.precision == "int8",
        )

    def linear(self, value: str, name: str) -> str:
        return self.nn.linear(value, name, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def norm(self, value: str, name: str) -> str:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return self.nn.layer_norm(value, name, weight, bias, self.shape.eps)

    def embed(self) -> str:
        """Token and position embeddings, normalised, [R, D]."""
        name = "text_decoder.bert.embeddings"
        words = self.nn.embedding(self.inputs.tokens, "word_embeddings", self.tensors[f"{name}.word_embeddings.weight"])
        places = self.nn.array("position_embeddings", self.tensors[f"{name}.position_embeddings.weight"])
        x = self.graph.op("Add", words, self.graph.op("Gather", places, self.inputs.lengths))
        return self.norm(x, f"{name}.LayerNorm")

    def layer(self, index: int, x: str, mask: str) -> str:
        """Self attention, cross attention and the feed-forward layer, post-norm, [R, D] → [R, D]."""
        prefix = f"text_decoder.bert.encoder.layer.{index}"
        context = self._self_attention(f"{prefix}.attention.self", index, x, mask)
        x = self._residual(context, x, f"{prefix}.attention.output")
        context = self._cross_attention(f"{prefix}.crossattention.self", index, x)
        x = self._residual(context, x, f"{prefix}.crossattention.output")
        hidden = self.nn.activation(self.linear(x, f"{prefix}.intermediate.dense"), self.shape.act)
        return self._residual(hidden, x, f"{prefix}.output")

    def _residual(self, value: str, x: str, prefix: str) -> str:
        return self.norm(self.graph.op("Add", self.linear(value, f"{prefix}.dense"), x), f"{prefix}.LayerNorm")

    def _self_attention(self, prefix: str, index: int, x: str, mask: str) -> str:
        graph, shape = self.graph, self.shape
        caches = self.inputs.caches[index]
        parts = [f"{prefix}.{kind}" for kind in ("query", "key", "value")]
        weight = np.concatenate([self.tensors[f"{name}.weight"] for name in parts])
        bias = np.concatenate([self.tensors[f"{name}.bias"] for name in parts])
        weight, bias = scaled_query(weight, bias, shape.width, shape.head_dim**-0.5)
        qkv = self.nn.linear(x, f"{prefix}.qkv", weight, bias)
        qkv = graph.reshape(qkv, -1, 3 * shape.heads, 1, shape.head_dim)
        q, k, v = graph.multi("Split", qkv, outputs=3, axis=1, num_outputs=3)
        for new, collected in ((k, self.new_keys), (v, self.new_values)):
            collected.append(graph.reshape(new, 1, -1, shape.heads, shape.head_dim))
        past = graph.op("MatMul", q, graph.transpose(caches.self_k, 0, 1, 3, 2))
        past = graph.op("Add", self.nn.to_float32(past), mask)
        present = graph.op("ReduceSum", graph.op("Mul", q, k), graph.ints(-1), keepdims=1)
        scores = graph.op("Concat", past, self.nn.to_float32(present), axis=-1)
        weights = self.nn.from_float32(graph.op("Softmax", scores, axis=-1))
        on_past = graph.op("Slice", weights, graph.ints(0), graph.ints(-1), graph.ints(3))
        on_present = graph.op("Slice", weights, graph.ints(-1), graph.ints(2**31), graph.ints(3))
        context = graph.op("Add", graph.op("MatMul", on_past, caches.self_v), graph.op("Mul", on_present, v))
        return graph.reshape(context, -1, shape.width)

    def _cross_attention(self, prefix: str, index: int, x: str) -> str:
        graph, shape = self.graph, self.shape
        caches = self.inputs.caches[index]
        name = f"{prefix}.query"
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        q = self.nn.linear(x, name, *scaled_query(weight, bias, shape.width, shape.head_dim**-0.5))
        # All rows of an image go through one product with its keys: the cache is read once and never repeated.
        q = graph.transpose(graph.op("Reshape", q, self.inputs.by_image), 0, 2, 1, 3)
        if caches.scale_k is None or caches.scale_v is None:
            context = graph.op("MatMul", self.nn.softmax(graph.op("MatMul", q, caches.cross_k)), caches.cross_v)
        else:
            weights = self.nn.softmax(self.nn.times_codes(graph.op("Mul", q, caches.scale_k), caches.cross_k))
            context = graph.op("Mul", self.nn.weights_times_codes(weights, caches.cross_v), caches.scale_v)
        return graph.reshape(graph.transpose(context, 0, 2, 1, 3), -1, shape.width)

    def head(self, x: str) -> str:
        """Logits over the vocabulary, [R, V]."""
        name = "text_decoder.cls.predictions"
        x = self.nn.activation(self.linear(x, f"{name}.transform.dense"), self.shape.act)
        x = self.norm(x, f"{name}.transform.LayerNorm")
        weight, bias = self.tensors[f"{name}.decoder.weight"], self.tensors[f"{name}.decoder.bias"]
        words = self.tensors["text_decoder.bert.embeddings.word_embeddings.weight"]
        if np.array_equal(weight, words):
            return self.nn.linear_from_table(x, "word_embeddings", weight, bias)
        return self.nn.linear(x, f"{name}.decoder", weight, bias)
