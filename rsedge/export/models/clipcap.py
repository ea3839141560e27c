"""CLIPCap as two graphs: vision (image → prefix → its keys and values in GPT-2) and step (token → candidates).

The prefix stands in every caption of an image before its first token, so the vision graph runs GPT-2 over it once and
returns the keys and values as the image's cross cache, which all of its rows share. The prefix's last position is left
to the step graph: it predicts the first token, so it is the first step, whose input is ``start`` instead of a token.

Weights are the tensors of :class:`rsedge.training.models.clipcap_model.ClipCapModel`, those of the image encoder by
their names in a whole CLIP or SigLIP; shapes below use B images, R rows (a row is one beam of one image; rows of an
image are adjacent and every image has equally many), P prefix positions, W the width of GPT-2, H heads of d, C columns
of the self cache, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rsedge.bundle import DecoderSpec, GenerationDefaults, TokenSpec
from rsedge.export import verify
from rsedge.export.checkpoint import ModelType, Settings
from rsedge.export.graphs.builder import GraphBuilder
from rsedge.export.graphs.caches import CacheGraphs
from rsedge.export.graphs.encoder import Tensors, Tower, attend, linear, mlp, norm, unit_length
from rsedge.export.graphs.precision import Layers, Precision, float_type
from rsedge.export.graphs.steps import StepInputs, give_candidates, give_new_column, scaled_query
from rsedge.export.models.clip import VisionSettings, encode_images, read_vision
from rsedge.export.models.settings import Section

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rsedge.bundle import Bundle, ImageSpec
    from rsedge.export.checkpoint import Checkpoint
    from rsedge.export.weights import Report

_GPT2 = "language_model.transformer"
_GPT2_KEYS = ("n_embd", "n_inner", "n_layer", "n_head", "activation_function", "layer_norm_epsilon")
_NORM_EPS = 1e-5  # of torch's LayerNorm, which the mapper uses as it is
_MAPPERS = ("mlp", "transformer")


# The checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class MapperSettings:
    """The numbers of a mapper, which turns an image embedding into a prefix."""

    kind: str
    """``mlp`` or ``transformer``."""
    prefix_length: int
    """Positions of GPT-2 that stand for the image."""
    clip_length: int
    """Tokens the transformer makes of the image embedding."""
    layers: int
    """Of the transformer."""
    heads: int
    """Of the transformer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipCapSettings(Settings):
    """The checked settings of a CLIPCap, the defaults filled in."""

    vision: VisionSettings
    """The image encoder."""
    mapper: MapperSettings
    """The mapper."""
    text: Tower
    """GPT-2."""
    positions: int
    """Of GPT-2."""
    scales: tuple[float, ...]
    """Factor of the queries of each layer of GPT-2."""
    tokens: TokenSpec
    """A caption ends with the stop token and contains it; nothing starts it, the prefix takes that place."""

    @property
    def image_tokens(self) -> int:
        """Prefix positions in the cross cache; the last one of the prefix is the first step's."""
        return self.mapper.prefix_length - 1

    @property
    def max_new_tokens(self) -> int:
        """Longest caption: a token per position behind the cross cache (the last token is not run)."""
        return self.positions - self.image_tokens


def read_settings(config: Mapping[str, Any], report: Report) -> ClipCapSettings:
    """Read the settings in ``config.json``."""
    from transformers import CLIPVisionConfig, GPT2Config, SiglipVisionConfig

    from rsedge.training.models.clipcap_model import ClipCapConfig

    # 1. The image encoder.
    values = config.get("vision_config")
    name = values.get("model_type", "clip_vision_model") if isinstance(values, dict) else "clip_vision_model"
    if name not in ("clip_vision_model", "siglip_vision_model"):
        report(f"vision_config.model_type is {name!r}; rsedge exports clip_vision_model, siglip_vision_model")
    if name == "siglip_vision_model":
        vision = read_vision(Section(values, SiglipVisionConfig(), "vision_config", report), "siglip")
    else:
        section = Section(values, CLIPVisionConfig(), "vision_config", report)
        vision = read_vision(section, "clip", section.size("projection_dim"))

    # 2. GPT-2.
    gpt2 = Section(config.get("text_config"), GPT2Config(), "text_config", report)
    if gpt2.get("n_inner") is None:
        gpt2 = Section({**gpt2.given, "n_inner": 4 * gpt2.size("n_embd")}, GPT2Config(), "text_config", report)
    text, positions, vocab = gpt2.tower(_GPT2_KEYS), gpt2.size("n_positions"), gpt2.size("vocab_size")
    if gpt2.get("add_cross_attention"):
        report("text_config.add_cross_attention is true; CLIPCap shows GPT-2 the image as a prefix only")
    scale = text.head_dim**-0.5 if gpt2.get("scale_attn_weights", True) else 1.0
    by_layer = bool(gpt2.get("scale_attn_by_inverse_layer_idx", False))

    # 3. The mapper.
    whole = Section(config, ClipCapConfig(), "config", report)
    prefix, layers, heads = whole.size("prefix_length"), whole.layers("mapper_layers"), whole.size("mapper_heads")
    kind, ratio = whole.get("mapper"), whole.get("mapper_ratio")
    if kind not in _MAPPERS:
        report(f"mapper is {kind!r}; rsedge exports {', '.join(_MAPPERS)}")
    elif kind == "transformer" and text.width % heads:
        report(f"mapper_heads is {heads}, which does not divide GPT-2's width {text.width}: the config is damaged")
    if not isinstance(ratio, int | float) or ratio <= 0:
        report(f"mapper_ratio is {ratio!r}, expected a number above 0, such as 2")
    if prefix < 2:
        # The last position is the first step's input; those before it are the cross cache, which cannot be empty.
        report(f"prefix_length is {prefix}; rsedge exports prefixes of 2 positions or more")
    if prefix >= positions:
        report(f"prefix_length is {prefix}, but GPT-2 has {positions} positions in all")
    clip_length = prefix if whole.given.get("clip_length") is None else whole.size("clip_length")

    stop = whole.token("stop_token_id", vocab)
    return ClipCapSettings(
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        vocab_size=vocab,
        needed_tokens={stop: "which ends a caption (stop_token_id)"},
        vision=vision,
        mapper=MapperSettings(kind=kind, prefix_length=prefix, clip_length=clip_length, layers=layers, heads=heads),
        text=text,
        positions=positions,
        scales=tuple(scale / (layer + 1) if by_layer else scale for layer in range(text.layers)),
        tokens=TokenSpec(bos=stop, eos=stop, pad=stop, vocab_size=vocab),
    )


def canonical_name(name: str) -> str:
    """The name a tensor goes by here; versions of transformers nest SigLIP's tower in itself or do not."""
    inner = name.removeprefix("encoder.")
    if inner == name or inner.startswith(("vision_model.", "visual_projection.")):
        return inner
    return f"vision_model.{inner}"


class ClipCapPlan:
    """One CLIPCap at one image size; see :class:`rsedge.export.checkpoint.Plan`."""

    def __init__(self, checkpoint: Checkpoint[ClipCapSettings], image_size: int) -> None:
        from rsedge.training.models.clipcap_model import register_auto_classes

        register_auto_classes()  # else transformers warns of an unknown model when it reads the tokenizer
        self._checkpoint, self._settings = checkpoint, checkpoint.settings
        self._image = dataclasses.replace(checkpoint.image, size=image_size)

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
                start=text.width,
            ).by_role(),
        }

    def manifest_fields(self) -> dict[str, Any]:
        """Tokens, CLIPCap's own decoding defaults and the sizes of the caches."""
        from rsedge.training.models.clipcap_model import DEFAULTS

        settings, text = self._settings, self._settings.text
        decoder = DecoderSpec(
            layers=text.layers,
            heads=text.heads,
            head_dim=text.head_dim,
            max_positions=settings.max_new_tokens,
            image_tokens=settings.image_tokens,
        )
        generation = GenerationDefaults(
            max_new_tokens=min(DEFAULTS.max_new_tokens, settings.max_new_tokens),
            num_beams=min(DEFAULTS.num_beams, settings.vocab_size),
        )
        return {"tokens": settings.tokens, "generation": generation, "decoder": decoder}

    def parity(self, bundle: Bundle) -> dict[str, Any]:
        """See :func:`rsedge.export.verify.captioner_report`."""
        reference = "rsedge.training.models.clipcap_model.generate, float32"
        return verify.captioner_report(bundle, self._torch_results, reference=reference)

    def _torch_results(
        self, images: verify.UInt8, image: ImageSpec, longest: int
    ) -> tuple[verify.Float32, verify.Captions]:
        """Image embeddings [B, D] of unit length and captions of the checkpoint in torch."""
        import torch

        from rsedge.training.models.clipcap_model import DEFAULTS, ClipCapModel, generate

        model = verify.torch_model(ClipCapModel, self._checkpoint.path)
        pixels, resized = verify.torch_images(images, image), self._settings.image_size != image.size
        with torch.no_grad():
            output = model.encoder(pixel_values=pixels, interpolate_pos_encoding=resized)
            raw = output.image_embeds if self._settings.vision.kind == "clip" else output.pooler_output
            embeds = torch.nn.functional.normalize(raw, dim=-1)
        captions: verify.Captions = {}
        for name, beams in verify.SEARCHES.items():
            options = dataclasses.replace(DEFAULTS, num_beams=beams, max_new_tokens=longest)
            captions[name] = [caption.token_ids for caption in generate(model, embeds, options)]
        return embeds.numpy(), captions


CLIPCAP = ModelType(
    family="clipcap",
    title="CLIPCap",
    module="rsedge.training.models.clipcap_model",
    architecture="ClipCapModel",
    otherwise="CLIPCap but no whole model",
    tokenizer_files=("tokenizer.json", "vocab.json"),
    read_settings=read_settings,
    canonical_name=canonical_name,
    plan=ClipCapPlan,
)


# The graphs


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
    give_candidates(graph, step.inputs, step.nn.to_float32(step.head(x)), settings.vocab_size)
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
        weight, no_bias = self.tensors["language_model.lm_head.weight"], np.zeros(self.settings.vocab_size, np.float32)
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
    return scaled_query(tensors[f"{name}.weight"].T, tensors[f"{name}.bias"], text.width, settings.scales[layer])


def _conv1d(nn: Layers, tensors: Tensors, name: str, x: str) -> str:
    """GPT-2's linear layers, which keep their weights transposed."""
    return nn.linear(x, name, tensors[f"{name}.weight"].T, tensors[f"{name}.bias"])
