"""BLIP captioning models as two graphs: vision (image → cross cache) and step (token → candidates).

Weights are the tensors of ``BlipForConditionalGeneration`` by their names there; shapes below use B images, R rows
(a row is one beam of one image; rows of an image are adjacent and every image has equally many), S image tokens,
H heads of d, C cache columns, V vocabulary, L decoder layers.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rsedge.bundle import GenerationDefaults, TokenSpec
from rsedge.errors import BundleError, CheckpointError
from rsedge.export import verify
from rsedge.export.checkpoint import ModelType, Section, Settings
from rsedge.export.graphs.builder import GraphBuilder, Layers, Precision, Tensors, float_type
from rsedge.export.graphs.encoder import (
    Tower,
    attend,
    embed_patches,
    interpolate_positions,
    mlp,
    prepend_token,
    split_heads,
)
from rsedge.export.graphs.steps import Step, cache_graphs, scaled_query

if TYPE_CHECKING:
    from rsedge.bundle import Bundle, DecoderSpec, ImageSpec
    from rsedge.export.checkpoint import Checkpoint, Report

_HEAD = "text_decoder.cls.predictions"
_EMBEDDINGS = "text_decoder.bert.embeddings"


# The checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class BlipSettings(Settings):
    """The checked settings of a BLIP captioner, transformers' defaults filled in."""

    vision: Tower
    text: Tower
    """The decoder."""
    positions: int
    """Longest caption, start token included."""
    tokens: TokenSpec

    @property
    def grid(self) -> int:
        """Patches along an edge."""
        return self.image_size // self.patch_size

    @property
    def decoder(self) -> DecoderSpec:
        """Sizes of the caches; an image has its patches and the class token."""
        return self.text.caches(self.positions, self.grid**2 + 1)


def read_settings(config: Mapping[str, Any], report: Report) -> BlipSettings:
    """Read the settings in ``config.json``."""
    from transformers import BlipTextConfig, BlipVisionConfig

    vision = Section(config.get("vision_config"), BlipVisionConfig(), "vision_config", report)
    text = Section(config.get("text_config"), BlipTextConfig(), "text_config", report)
    if text.get("is_decoder", True) is not True:
        report("text_config.is_decoder is not true, so the decoder cannot see the image: rsedge needs a captioner")
    vocab = text.size("vocab_size")
    bos, eos, pad = (text.token(name, vocab) for name in ("bos_token_id", "sep_token_id", "pad_token_id"))
    return BlipSettings(
        vision=vision.tower(),
        text=text.tower(),
        image_size=vision.size("image_size"),
        patch_size=vision.size("patch_size"),
        positions=text.size("max_position_embeddings"),
        tokens=TokenSpec(bos=bos, eos=eos, pad=pad, vocab_size=vocab),
        vocab_size=vocab,
        needed_tokens={eos: "which ends a caption (text_config.sep_token_id)"},
    )


def canonical_name(name: str) -> str:
    """The name a tensor has in transformers' model today; older files differ, and transformers renames them too."""
    name = name.removeprefix("blip.")
    return re.sub(r"LayerNorm\.(gamma|beta)$", lambda m: "LayerNorm." + {"gamma": "weight", "beta": "bias"}[m[1]], name)


class BlipPlan:
    """One BLIP captioner at one image size; see :class:`rsedge.export.checkpoint.Plan`."""

    def __init__(self, checkpoint: Checkpoint[BlipSettings], image_size: int) -> None:
        self._checkpoint = checkpoint
        self._settings = dataclasses.replace(checkpoint.settings, image_size=image_size)
        self._image = dataclasses.replace(checkpoint.image, size=image_size)
        try:
            self._generation = GenerationDefaults.from_transformers(
                checkpoint.generation_config, positions=self._settings.positions
            )
        except (BundleError, TypeError) as error:
            problem = f"generation_config.json asks for what no caption can be: {error}; mend or delete it"
            raise CheckpointError(checkpoint.source, [problem]) from error

    def graphs(self, precision: Precision) -> dict[str, GraphBuilder]:
        """The captioner's two graphs, and those that keep its caches on a device."""
        settings, tensors, codes = self._settings, self._checkpoint.tensors, precision == "int8"
        return {
            "vision": vision_graph(settings, tensors, self._image, precision),
            "step": step_graph(settings, tensors, precision),
            **cache_graphs(settings.decoder, float_type(precision), codes=codes),
        }

    def manifest_fields(self) -> dict[str, Any]:
        """Tokens, decoding defaults and the sizes of the caches."""
        settings = self._settings
        return {"tokens": settings.tokens, "generation": self._generation, "decoder": settings.decoder}

    def parity(self, bundle: Bundle) -> dict[str, Any]:
        """See :func:`rsedge.export.verify.captioner_report`."""
        return verify.captioner_report(bundle, self._torch_results, reference="transformers.generate, float32")

    def _torch_results(
        self, images: verify.UInt8, image: ImageSpec, longest: int
    ) -> tuple[verify.Float32, verify.Captions]:
        """Encoder output [B, S, D] and captions of the checkpoint in torch."""
        import torch
        from transformers import BlipForConditionalGeneration

        model = verify.torch_model(BlipForConditionalGeneration, self._checkpoint.path)
        resized, eos = self._checkpoint.settings.image_size != image.size, self._settings.tokens.eos
        inputs = {"pixel_values": verify.torch_images(images, image), "interpolate_pos_encoding": resized}
        captions: verify.Captions = {}
        with torch.no_grad():
            embeds = model.vision_model(**inputs)[0].numpy()
            for name, beams in verify.SEARCHES.items():
                ids = model.generate(**inputs, do_sample=False, **verify.generation(beams, longest))
                rows = [row[1:] for row in ids.tolist()]
                captions[name] = [tuple(row[: row.index(eos) + 1] if eos in row else row) for row in rows]
        return embeds, captions


BLIP = ModelType(
    family="blip",
    title="BLIP captioning",
    architecture="BlipForConditionalGeneration",
    otherwise="BLIP but no captioner",
    tokenizer_files=("tokenizer.json", "vocab.txt"),
    read_settings=read_settings,
    canonical_name=canonical_name,
    unused=frozenset({f"{_HEAD}.bias"}),  # the name that decoder.bias is tied to
    plan=BlipPlan,
)


# The graphs


def vision_graph(settings: BlipSettings, tensors: Tensors, image: ImageSpec, precision: Precision) -> GraphBuilder:
    """The image encoder with the cross-attention projections of every decoder layer behind it.

    Inputs: ``pixels`` uint8 [B, image_size, image_size, 3].
    Outputs: ``cross_k.l`` [B, H, d, S] and ``cross_v.l`` [B, H, S, d] for each layer l, ``image_embeds`` [B, S, D]. In
    int8 the caches are int8, a quarter of the bytes that each step reads, and ``cross_scales`` [B, 2·L, H, d] has the
    worth of a unit of each channel: of the keys of all layers, then of the values.
    Position embeddings are interpolated to the settings' image size, that of the export.
    """
    graph = GraphBuilder("vision")
    nn = Layers(graph, precision, tensors)
    vision, text, tokens = settings.vision, settings.text, settings.decoder.image_tokens

    # 1. Pixels → embedded patches with class token and positions, [B·S, D].
    name = "vision_model.embeddings"
    kernel, bias = (tensors[f"{name}.patch_embedding.{part}"] for part in ("weight", "bias"))
    x = embed_patches(nn, image, settings.patch_size, kernel, bias)
    x = prepend_token(nn, x, tensors[f"{name}.class_embedding"].reshape(vision.width))
    positions = interpolate_positions(tensors[f"{name}.position_embedding"][0], settings.grid)
    x = graph.reshape(graph.op("Add", x, nn.array("positions", positions)), -1, vision.width)

    # 2. The encoder: pre-norm layers.
    for layer in range(vision.layers):
        name = f"vision_model.encoder.layers.{layer}"
        weight, bias = (tensors[f"{name}.self_attn.qkv.{part}"] for part in ("weight", "bias"))
        normed = nn.norm(x, f"{name}.layer_norm1", vision.eps)
        scaled = scaled_query(weight, bias, vision.width, vision.head_dim**-0.5)
        qkv = nn.linear(normed, f"{name}.self_attn.qkv", *scaled)
        q, k, v = split_heads(graph, qkv, tokens, vision.heads, vision.head_dim)
        context = graph.reshape(attend(nn, q, k, v), -1, vision.width)
        x = graph.op("Add", nn.linear(context, f"{name}.self_attn.projection"), x)
        normed = nn.norm(x, f"{name}.layer_norm2", vision.eps)
        x = graph.op("Add", mlp(nn, normed, f"{name}.mlp", vision.act), x)
    x = nn.norm(x, "vision_model.post_layernorm", vision.eps)

    # 3. Keys, then values of every decoder layer.
    scales = []
    for kind, axes, along in (("key", (0, 2, 3, 1), -1), ("value", (0, 2, 1, 3), -2)):
        tail = (text.head_dim, tokens) if kind == "key" else (tokens, text.head_dim)
        for layer in range(text.layers):
            y = nn.linear(x, f"text_decoder.bert.encoder.layer.{layer}.crossattention.self.{kind}")
            y = graph.transpose(graph.reshape(y, -1, tokens, text.heads, text.head_dim), *axes)
            if precision == "int8":
                y, scale = nn.cache_codes(y, along)
                scales.append(graph.reshape(scale, -1, 1, text.heads, text.head_dim))
            graph.output(y, f"cross_{kind[0]}.{layer}", "int8" if scales else nn.dtype, ["batch", text.heads, *tail])
    if scales:
        sizes: list[int | str] = ["batch", 2 * text.layers, text.heads, text.head_dim]
        graph.output(graph.op("Concat", *scales, axis=1), "cross_scales", "float32", sizes)
    embeds = nn.to_float32(graph.reshape(x, -1, tokens, vision.width))
    graph.output(embeds, "image_embeds", "float32", ["batch", tokens, vision.width])
    return graph


def step_graph(settings: BlipSettings, tensors: Tensors, precision: Precision) -> GraphBuilder:
    """One decoder run: one token per row against the self cache and the image's cross cache.

    Inputs: those of :class:`rsedge.export.graphs.steps.Step`.
    Outputs: those of :meth:`rsedge.export.graphs.steps.Step.give`.
    """
    graph, text = GraphBuilder("step"), settings.text
    nn = Layers(graph, precision, tensors)
    step = Step(nn, settings.decoder, codes=precision == "int8")

    def added(value: str, x: str, name: str) -> str:
        """A projection of ``value``, added to ``x`` and normalised, [R, D]."""
        return nn.norm(graph.op("Add", nn.linear(value, f"{name}.dense"), x), f"{name}.LayerNorm", text.eps)

    # 1. Token and position embeddings, normalised, [R, D].
    table = tensors[f"{_EMBEDDINGS}.word_embeddings.weight"]
    words = nn.embedding(step.tokens, "word_embeddings", table)
    places = nn.array("position_embeddings", tensors[f"{_EMBEDDINGS}.position_embeddings.weight"])
    x = graph.op("Add", words, graph.op("Gather", places, step.lengths))
    x = nn.norm(x, f"{_EMBEDDINGS}.LayerNorm", text.eps)

    # 2. The layers, post-norm: self attention, cross attention, feed-forward, [R, D].
    mask = step.cache_mask()
    for layer in range(text.layers):
        name = f"text_decoder.bert.encoder.layer.{layer}"
        x = added(_self_attention(step, text, f"{name}.attention.self", layer, x, mask), x, f"{name}.attention.output")
        context = _cross_attention(step, text, f"{name}.crossattention.self", layer, x)
        x = added(context, x, f"{name}.crossattention.output")
        x = added(nn.activation(nn.linear(x, f"{name}.intermediate.dense"), text.act), x, f"{name}.output")

    # 3. Logits over the vocabulary, [R, V].
    x = nn.activation(nn.linear(x, f"{_HEAD}.transform.dense"), text.act)
    x = nn.norm(x, f"{_HEAD}.transform.LayerNorm", text.eps)
    weight, bias = tensors[f"{_HEAD}.decoder.weight"], tensors[f"{_HEAD}.decoder.bias"]
    if np.array_equal(weight, table):
        return step.give(nn.linear_from_table(x, "word_embeddings", weight, bias), settings.vocab_size)
    return step.give(nn.linear(x, f"{_HEAD}.decoder", weight, bias), settings.vocab_size)


def _self_attention(step: Step, text: Tower, prefix: str, layer: int, x: str, mask: str) -> str:
    """Attention to the row's tokens so far and its present one, [R, D] → [R, D]."""
    nn, graph = step.nn, step.graph
    weight, bias = (
        np.concatenate([nn.tensors[f"{prefix}.{kind}.{part}"] for kind in ("query", "key", "value")])
        for part in ("weight", "bias")
    )
    scaled = scaled_query(weight, bias, text.width, text.head_dim**-0.5)
    _, v, past, present = step.self_scores(layer, nn.linear(x, f"{prefix}.qkv", *scaled), mask)
    scores = graph.op("Concat", past, nn.to_float32(present), axis=-1)
    weights = nn.from_float32(graph.op("Softmax", scores, axis=-1))
    on_past = graph.op("Slice", weights, graph.ints(0), graph.ints(-1), graph.ints(3))
    on_present = graph.op("Slice", weights, graph.ints(-1), graph.ints(2**31), graph.ints(3))
    of_past = graph.op("MatMul", on_past, step.caches[layer].self_v)
    return graph.reshape(graph.op("Add", of_past, graph.op("Mul", on_present, v)), -1, text.width)


def _cross_attention(step: Step, text: Tower, prefix: str, layer: int, x: str) -> str:
    """Attention to the image, [R, D] → [R, D]."""
    nn, graph, caches, name = step.nn, step.graph, step.caches[layer], f"{prefix}.query"
    weight, bias = nn.tensors[f"{name}.weight"], nn.tensors[f"{name}.bias"]
    q = nn.linear(x, name, *scaled_query(weight, bias, text.width, text.head_dim**-0.5))
    # All rows of an image go through one product with its keys: the cache is read once and never repeated.
    q = graph.transpose(graph.op("Reshape", q, step.by_image), 0, 2, 1, 3)
    if caches.scale_k is None or caches.scale_v is None:
        context = graph.op("MatMul", nn.softmax(graph.op("MatMul", q, caches.cross_k)), caches.cross_v)
    else:
        weights = nn.softmax(nn.times_codes(graph.op("Mul", q, caches.scale_k), caches.cross_k))
        context = graph.op("Mul", nn.weights_times_codes(weights, caches.cross_v), caches.scale_v)
    return graph.reshape(graph.transpose(context, 0, 2, 1, 3), -1, text.width)
