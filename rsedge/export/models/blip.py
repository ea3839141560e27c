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

from rsedge.bundle import DecoderSpec, GenerationDefaults, TokenSpec
from rsedge.errors import BundleError, CheckpointError
from rsedge.export import verify
from rsedge.export.checkpoint import ModelType, Settings
from rsedge.export.graphs.builder import GraphBuilder
from rsedge.export.graphs.caches import CacheGraphs
from rsedge.export.graphs.encoder import (
    Tensors,
    Tower,
    attend,
    embed_patches,
    interpolate_positions,
    linear,
    mlp,
    norm,
    prepend_token,
)
from rsedge.export.graphs.precision import Layers, Precision, float_type
from rsedge.export.graphs.steps import StepInputs, give_candidates, give_new_column, scaled_query
from rsedge.export.models.settings import Section

if TYPE_CHECKING:
    from rsedge.bundle import Bundle, ImageSpec
    from rsedge.export.checkpoint import Checkpoint
    from rsedge.export.weights import Report

_HEAD = "text_decoder.cls.predictions"
_EMBEDDINGS = "text_decoder.bert.embeddings"


# The checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class BlipSettings(Settings):
    """The checked settings of a BLIP captioner, transformers' defaults filled in."""

    vision: Tower
    """The image encoder."""
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
    def image_tokens(self) -> int:
        """Patches and the class token."""
        return int(self.grid**2 + 1)


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
        settings, text, tensors = self._settings, self._settings.text, self._checkpoint.tensors
        return {
            "vision": vision_graph(settings, tensors, self._image, precision),
            "step": step_graph(settings, tensors, precision),
            **CacheGraphs(
                layers=text.layers,
                heads=text.heads,
                head_dim=text.head_dim,
                image_tokens=settings.image_tokens,
                dtype=float_type(precision),
                codes=precision == "int8",
            ).by_role(),
        }

    def manifest_fields(self) -> dict[str, Any]:
        """Tokens, decoding defaults and the sizes of the caches."""
        text = self._settings.text
        decoder = DecoderSpec(
            layers=text.layers,
            heads=text.heads,
            head_dim=text.head_dim,
            max_positions=self._settings.positions,
            image_tokens=self._settings.image_tokens,
        )
        return {"tokens": self._settings.tokens, "generation": self._generation, "decoder": decoder}

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

    Args:
        settings: The model's numbers, at the exported image size (position embeddings are interpolated).
        tensors: Weights by transformers' names.
        image: Size, mean and deviation.
        precision: Of the linear layers.
    """
    graph = GraphBuilder("vision")
    nn = Layers(graph, precision)
    vision, text, tokens = settings.vision, settings.text, settings.image_tokens

    # 1. Pixels → embedded patches with class token and positions, [B·S, D].
    name = "vision_model.embeddings"
    kernel, bias = (tensors[f"{name}.patch_embedding.{part}"] for part in ("weight", "bias"))
    x = embed_patches(nn, image, settings.patch_size, kernel, bias)
    x = prepend_token(nn, x, tensors[f"{name}.class_embedding"].reshape(vision.width))
    positions = interpolate_positions(tensors[f"{name}.position_embedding"][0], settings.grid)
    x = graph.reshape(graph.op("Add", x, nn.array("positions", positions)), -1, vision.width)

    # 2. The encoder.
    for layer in range(vision.layers):
        x = _vision_layer(nn, settings, tensors, f"vision_model.encoder.layers.{layer}", x)
    x = norm(nn, x, tensors, "vision_model.post_layernorm", vision.eps)

    # 3. Keys, then values of every decoder layer.
    scales = []
    for kind, axes, along in (("key", (0, 2, 3, 1), -1), ("value", (0, 2, 1, 3), -2)):
        tail = (text.head_dim, tokens) if kind == "key" else (tokens, text.head_dim)
        for layer in range(text.layers):
            y = linear(nn, x, tensors, f"text_decoder.bert.encoder.layer.{layer}.crossattention.self.{kind}")
            y = graph.reshape(y, -1, tokens, text.heads, text.head_dim)
            y = graph.transpose(y, *axes)
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


def _vision_layer(nn: Layers, settings: BlipSettings, tensors: Tensors, prefix: str, x: str) -> str:
    """One pre-norm encoder layer, [B·S, D] → [B·S, D]."""
    graph, tower, tokens = nn.graph, settings.vision, settings.image_tokens
    weight, bias = (tensors[f"{prefix}.self_attn.qkv.{part}"] for part in ("weight", "bias"))
    weight, bias = scaled_query(weight, bias, tower.width, tower.head_dim**-0.5)
    normed = norm(nn, x, tensors, f"{prefix}.layer_norm1", tower.eps)
    qkv = nn.linear(normed, f"{prefix}.self_attn.qkv", weight, bias)
    qkv = graph.transpose(graph.reshape(qkv, -1, tokens, 3, tower.heads, tower.head_dim), 2, 0, 3, 1, 4)
    q, k, v = (graph.op("Gather", qkv, graph.const(index, "int64"), axis=0) for index in range(3))
    context = graph.reshape(attend(nn, q, k, v), -1, tower.width)
    x = graph.op("Add", linear(nn, context, tensors, f"{prefix}.self_attn.projection"), x)
    normed = norm(nn, x, tensors, f"{prefix}.layer_norm2", tower.eps)
    return graph.op("Add", mlp(nn, normed, tensors, f"{prefix}.mlp", tower.act), x)


def step_graph(settings: BlipSettings, tensors: Tensors, precision: Precision) -> GraphBuilder:
    """One decoder run: one token per row against the self cache and the image's cross cache.

    Inputs: those of :class:`rsedge.export.graphs.steps.StepInputs`.
    Outputs: those of :func:`rsedge.export.graphs.steps.give_candidates`, and ``new_kv`` [2·L, R, H, d].
    """
    graph = GraphBuilder("step")
    nn = Layers(graph, precision)
    decoder, text = _Step(nn, settings, tensors), settings.text
    x = decoder.embed()
    mask = decoder.inputs.cache_mask(graph)
    for layer in range(text.layers):
        x = decoder.layer(layer, x, mask)
    give_candidates(graph, decoder.inputs, nn.to_float32(decoder.head(x)), settings.vocab_size)
    give_new_column(nn, decoder.new_keys, decoder.new_values, heads=text.heads, head_dim=text.head_dim)
    return graph


class _Step:
    """The decoder's layers for one token per row; collects each layer's new key and value [1, R, H, d]."""

    def __init__(self, nn: Layers, settings: BlipSettings, tensors: Tensors) -> None:
        self.nn, self.graph, self.text, self.tensors = nn, nn.graph, settings.text, tensors
        self.new_keys: list[str] = []
        self.new_values: list[str] = []
        self.inputs = StepInputs(
            nn,
            layers=self.text.layers,
            heads=self.text.heads,
            head_dim=self.text.head_dim,
            image_tokens=settings.image_tokens,
            codes=nn.precision == "int8",
        )

    def linear(self, value: str, name: str) -> str:
        return linear(self.nn, value, self.tensors, name)

    def norm(self, value: str, name: str) -> str:
        return norm(self.nn, value, self.tensors, name, self.text.eps)

    def embed(self) -> str:
        """Token and position embeddings, normalised, [R, D]."""
        table = self.tensors[f"{_EMBEDDINGS}.word_embeddings.weight"]
        words = self.nn.embedding(self.inputs.tokens, "word_embeddings", table)
        places = self.nn.array("position_embeddings", self.tensors[f"{_EMBEDDINGS}.position_embeddings.weight"])
        x = self.graph.op("Add", words, self.graph.op("Gather", places, self.inputs.lengths))
        return self.norm(x, f"{_EMBEDDINGS}.LayerNorm")

    def layer(self, index: int, x: str, mask: str) -> str:
        """Self attention, cross attention and the feed-forward layer, post-norm, [R, D] → [R, D]."""
        prefix = f"text_decoder.bert.encoder.layer.{index}"
        context = self._self_attention(f"{prefix}.attention.self", index, x, mask)
        x = self._residual(context, x, f"{prefix}.attention.output")
        context = self._cross_attention(f"{prefix}.crossattention.self", index, x)
        x = self._residual(context, x, f"{prefix}.crossattention.output")
        hidden = self.nn.activation(self.linear(x, f"{prefix}.intermediate.dense"), self.text.act)
        return self._residual(hidden, x, f"{prefix}.output")

    def _residual(self, value: str, x: str, prefix: str) -> str:
        return self.norm(self.graph.op("Add", self.linear(value, f"{prefix}.dense"), x), f"{prefix}.LayerNorm")

    def _self_attention(self, prefix: str, index: int, x: str, mask: str) -> str:
        graph, text = self.graph, self.text
        caches = self.inputs.caches[index]
        parts = [f"{prefix}.{kind}" for kind in ("query", "key", "value")]
        weight = np.concatenate([self.tensors[f"{name}.weight"] for name in parts])
        bias = np.concatenate([self.tensors[f"{name}.bias"] for name in parts])
        weight, bias = scaled_query(weight, bias, text.width, text.head_dim**-0.5)
        qkv = self.nn.linear(x, f"{prefix}.qkv", weight, bias)
        qkv = graph.reshape(qkv, -1, 3 * text.heads, 1, text.head_dim)
        q, k, v = graph.multi("Split", qkv, outputs=3, axis=1, num_outputs=3)
        for new, collected in ((k, self.new_keys), (v, self.new_values)):
            collected.append(graph.reshape(new, 1, -1, text.heads, text.head_dim))
        past = graph.op("MatMul", q, graph.transpose(caches.self_k, 0, 1, 3, 2))
        past = graph.op("Add", self.nn.to_float32(past), mask)
        present = graph.op("ReduceSum", graph.op("Mul", q, k), graph.ints(-1), keepdims=1)
        scores = graph.op("Concat", past, self.nn.to_float32(present), axis=-1)
        weights = self.nn.from_float32(graph.op("Softmax", scores, axis=-1))
        on_past = graph.op("Slice", weights, graph.ints(0), graph.ints(-1), graph.ints(3))
        on_present = graph.op("Slice", weights, graph.ints(-1), graph.ints(2**31), graph.ints(3))
        context = graph.op("Add", graph.op("MatMul", on_past, caches.self_v), graph.op("Mul", on_present, v))
        return graph.reshape(context, -1, text.width)

    def _cross_attention(self, prefix: str, index: int, x: str) -> str:
        graph, text = self.graph, self.text
        caches = self.inputs.caches[index]
        name = f"{prefix}.query"
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        q = self.nn.linear(x, name, *scaled_query(weight, bias, text.width, text.head_dim**-0.5))
        # All rows of an image go through one product with its keys: the cache is read once and never repeated.
        q = graph.transpose(graph.op("Reshape", q, self.inputs.by_image), 0, 2, 1, 3)
        if caches.scale_k is None or caches.scale_v is None:
            context = graph.op("MatMul", self.nn.softmax(graph.op("MatMul", q, caches.cross_k)), caches.cross_v)
        else:
            weights = self.nn.softmax(self.nn.times_codes(graph.op("Mul", q, caches.scale_k), caches.cross_k))
            context = graph.op("Mul", self.nn.weights_times_codes(weights, caches.cross_v), caches.scale_v)
        return graph.reshape(graph.transpose(context, 0, 2, 1, 3), -1, text.width)

    def head(self, x: str) -> str:
        """Logits over the vocabulary, [R, V]."""
        x = self.nn.activation(self.linear(x, f"{_HEAD}.transform.dense"), self.text.act)
        x = self.norm(x, f"{_HEAD}.transform.LayerNorm")
        weight, bias = self.tensors[f"{_HEAD}.decoder.weight"], self.tensors[f"{_HEAD}.decoder.bias"]
        if np.array_equal(weight, self.tensors[f"{_EMBEDDINGS}.word_embeddings.weight"]):
            return self.nn.linear_from_table(x, "word_embeddings", weight, bias)
        return self.nn.linear(x, f"{_HEAD}.decoder", weight, bias)
