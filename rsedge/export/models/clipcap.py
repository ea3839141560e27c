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

from rsedge.bundle import GenerationDefaults, TokenSpec
from rsedge.export import verify
from rsedge.export.checkpoint import ModelType, Section, Settings
from rsedge.export.graphs.builder import GraphBuilder, Layers, Precision, Tensors, float_type
from rsedge.export.graphs.encoder import Tower, attend, mlp, split_heads, unit_length
from rsedge.export.graphs.steps import Step, cache_graphs, scaled_query
from rsedge.export.models.clip import VisionSettings, encode_images, read_vision

if TYPE_CHECKING:
    from rsedge.bundle import Bundle, DecoderSpec, ImageSpec
    from rsedge.export.checkpoint import Checkpoint, Report
    from rsedge.export.graphs.builder import Float32

_GPT2 = "language_model.transformer"
_GPT2_KEYS = ("n_embd", "n_inner", "n_layer", "n_head", "activation_function", "layer_norm_epsilon")
_NORM_EPS = 1e-5  # of torch's LayerNorm, which the mapper uses as it is
_MAPPERS = ("mlp", "transformer")


# The checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class MapperSettings:
    """The numbers of a mapper, which turns an image embedding into a prefix; the last three are the transformer's."""

    kind: str
    """``mlp`` or ``transformer``."""
    prefix_length: int
    """Positions of GPT-2 that stand for the image."""
    clip_length: int
    """Tokens made of the image embedding."""
    layers: int
    heads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipCapSettings(Settings):
    """The checked settings of a CLIPCap, the defaults filled in."""

    vision: VisionSettings
    mapper: MapperSettings
    text: Tower
    """GPT-2."""
    positions: int
    """Of GPT-2."""
    scales: tuple[float, ...]
    """Factor of the queries of each layer of GPT-2."""
    tokens: TokenSpec
    """A caption ends with the stop token and contains it; nothing starts it, the prefix takes that place."""

    @property
    def decoder(self) -> DecoderSpec:
        """Sizes of the caches: the cross cache has the prefix but for its last position, which is the first step's; a
        caption has a token per position behind it (the last token is not run).
        """
        tokens = self.mapper.prefix_length - 1
        return self.text.caches(self.positions - tokens, tokens)


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
        settings, tensors = self._settings, self._checkpoint.tensors
        return {
            "vision": vision_graph(settings, tensors, self._image, precision),
            "step": step_graph(settings, tensors, precision),
            **cache_graphs(settings.decoder, float_type(precision), start=settings.text.width),
        }

    def manifest_fields(self) -> dict[str, Any]:
        """Tokens, CLIPCap's own decoding defaults and the sizes of the caches."""
        from rsedge.training.models.clipcap_model import DEFAULTS

        settings, decoder = self._settings, self._settings.decoder
        generation = GenerationDefaults(
            max_new_tokens=min(DEFAULTS.max_new_tokens, decoder.max_positions),
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
    Position embeddings are interpolated to the size of ``image``.
    """
    graph = GraphBuilder("vision")
    nn = Layers(graph, precision, tensors)
    embeds = unit_length(nn, encode_images(nn, settings.vision, image))
    if settings.mapper.kind == "transformer":
        prefix = _transformer_mapper(nn, settings, nn.from_float32(embeds))
    else:  # Linear → Tanh → Linear
        hidden = graph.op("Tanh", nn.linear(nn.from_float32(embeds), "mapper.model.0"))
        prefix = nn.linear(hidden, "mapper.model.2")
        prefix = graph.reshape(prefix, -1, settings.mapper.prefix_length, settings.text.width)
    _prefill(nn, settings, prefix)
    graph.output(embeds, "image_embeds", "float32", ["batch", settings.vision.dim])
    return graph


def _transformer_mapper(nn: Layers, settings: ClipCapSettings, embeds: str) -> str:
    """Tokens of the image and learnt constants through pre-norm layers; the constants become the prefix, [B, P, W]."""
    graph, tensors, mapper, width = nn.graph, nn.tensors, settings.mapper, settings.text.width
    tokens = graph.reshape(nn.linear(embeds, "mapper.linear"), -1, mapper.clip_length, width)
    constants = nn.array("mapper.prefix_const", tensors["mapper.prefix_const"][None])
    batch = graph.op("Shape", tokens, start=0, end=1)
    shape = graph.op("Concat", batch, graph.ints(mapper.prefix_length, width), axis=0)
    x = graph.reshape(graph.op("Concat", tokens, graph.op("Expand", constants, shape), axis=1), -1, width)
    length, head_dim = mapper.clip_length + mapper.prefix_length, width // mapper.heads
    for layer in range(mapper.layers):
        name = f"mapper.transformer.layers.{layer}"
        normed = nn.norm(x, f"{name}.norm1", _NORM_EPS)
        weight = np.concatenate([tensors[f"{name}.attn.{part}.weight"] for part in ("to_queries", "to_keys_values")])
        weight, bias = scaled_query(weight, np.zeros(len(weight), np.float32), width, head_dim**-0.5)
        qkv = nn.linear(normed, f"{name}.attn.qkv", weight, bias)
        q, k, v = split_heads(graph, qkv, length, mapper.heads, head_dim)
        context = graph.reshape(attend(nn, q, k, v), -1, width)
        x = graph.op("Add", nn.linear(context, f"{name}.attn.project"), x)
        x = graph.op("Add", mlp(nn, nn.norm(x, f"{name}.norm2", _NORM_EPS), f"{name}.mlp", "relu"), x)
    x = graph.reshape(x, -1, length, width)
    return graph.op("Slice", x, graph.ints(mapper.clip_length), graph.ints(length), graph.ints(1))


def _prefill(nn: Layers, settings: ClipCapSettings, prefix: str) -> None:
    """GPT-2 over the first positions of ``prefix`` [B, P, W], as far as its keys and values need it."""
    graph, text, count = nn.graph, settings.text, settings.decoder.image_tokens
    last = graph.op("Slice", prefix, graph.ints(count), graph.ints(count + 1), graph.ints(1))
    graph.output(graph.reshape(last, -1, text.width), "start", nn.dtype, ["batch", text.width])
    x = graph.op("Slice", prefix, graph.ints(0), graph.ints(count), graph.ints(1))
    x = graph.op("Add", x, nn.array("wpe.prefix", nn.tensors[f"{_GPT2}.wpe.weight"][:count]))
    x = graph.reshape(x, -1, text.width)
    mask = graph.weight("later_positions", np.triu(np.full((count, count), -1e30, np.float32), 1))
    for layer in range(text.layers):
        name, last_layer = f"{_GPT2}.h.{layer}", layer == text.layers - 1
        normed = nn.norm(x, f"{name}.ln_1", text.eps)
        weight, bias = _attention_weights(nn, settings, layer)
        if last_layer:  # nothing comes after its keys and values
            kv = nn.linear(normed, f"{name}.kv", weight[text.width :], bias[text.width :])
            k, v = split_heads(graph, kv, count, text.heads, text.head_dim, 2)
        else:
            qkv = nn.linear(normed, f"{name}.qkv", weight, bias)
            q, k, v = split_heads(graph, qkv, count, text.heads, text.head_dim)
        sizes: list[int | str] = ["batch", text.heads, text.head_dim, count]
        graph.output(graph.transpose(k, 0, 1, 3, 2), f"cross_k.{layer}", nn.dtype, sizes)
        graph.output(v, f"cross_v.{layer}", nn.dtype, ["batch", text.heads, count, text.head_dim])
        if not last_layer:
            x = _block(nn, text, layer, x, graph.reshape(attend(nn, q, k, v, mask), -1, text.width))


def step_graph(settings: ClipCapSettings, tensors: Tensors, precision: Precision) -> GraphBuilder:
    """One GPT-2 run: one token per row against the self cache and the image's prefix.

    Inputs: those of :class:`rsedge.export.graphs.steps.Step`, whose cross cache is the prefix's, and ``start`` [B, W]:
    where a row's length is 0 its input is its image's ``start``, whatever its token says.
    Outputs: those of :meth:`rsedge.export.graphs.steps.Step.give`.
    """
    graph, text, spec = GraphBuilder("step"), settings.text, settings.decoder
    nn = Layers(graph, precision, tensors)
    step = Step(nn, spec)
    start = graph.input("start", nn.dtype, ["images", text.width])

    # 1. Input and position embeddings, [R, W].
    table = tensors[f"{_GPT2}.wte.weight"]
    words = nn.embedding(step.tokens, "wte", table)
    each = graph.op("Div", graph.op("Shape", step.tokens), step.images)
    shape = graph.op("Concat", step.images, each, graph.ints(text.width), axis=0)
    starts = graph.op("Expand", graph.op("Unsqueeze", start, graph.ints(1)), shape)
    first = graph.op("Unsqueeze", graph.op("Equal", step.lengths, graph.const(0, "int64")), graph.ints(1))
    x = graph.op("Where", first, graph.reshape(starts, -1, text.width), words)
    places = nn.array("wpe.step", tensors[f"{_GPT2}.wpe.weight"][spec.image_tokens :])
    x = graph.op("Add", x, graph.op("Gather", places, step.lengths))

    # 2. The layers, [R, W].
    mask = step.cache_mask()
    for layer in range(text.layers):
        x = _block(nn, text, layer, x, _attention(step, settings, layer, x, mask))

    # 3. Logits over the vocabulary, [R, V].
    x = nn.norm(x, f"{_GPT2}.ln_f", text.eps)
    weight, no_bias = tensors["language_model.lm_head.weight"], np.zeros(settings.vocab_size, np.float32)
    if np.array_equal(weight, table):
        return step.give(nn.linear_from_table(x, "wte", weight, no_bias), settings.vocab_size)
    return step.give(nn.linear(x, "lm_head", weight, no_bias), settings.vocab_size)


def _attention(step: Step, settings: ClipCapSettings, layer: int, x: str, mask: str) -> str:
    """One softmax over the prefix, the row's tokens so far and its present one, [R, W] → [R, W]."""
    nn, graph, caches, text = step.nn, step.graph, step.caches[layer], settings.text
    heads, count, name = text.heads, step.spec.image_tokens, f"{_GPT2}.h.{layer}"
    normed = nn.norm(x, f"{name}.ln_1", text.eps)
    qkv = nn.linear(normed, f"{name}.qkv", *_attention_weights(nn, settings, layer))
    q, v, past, present = step.self_scores(layer, qkv, mask)
    # All rows of an image go through one product with its prefix: that is read once and never repeated.
    by_image = graph.transpose(graph.op("Reshape", q, step.by_image), 0, 2, 1, 3)
    prefix = graph.transpose(graph.op("MatMul", by_image, caches.cross_k), 0, 2, 1, 3)
    prefix = graph.reshape(prefix, -1, heads, 1, count)
    scores = graph.op("Concat", nn.to_float32(prefix), nn.to_float32(present), past, axis=-1)
    weights = nn.from_float32(graph.op("Softmax", scores, axis=-1))

    def part(begin: int, end: int) -> str:
        return graph.op("Slice", weights, graph.ints(begin), graph.ints(end), graph.ints(3))

    grouped = graph.op("Concat", step.images, graph.ints(-1, heads, count), axis=0)
    on_prefix = graph.transpose(graph.op("Reshape", part(0, count), grouped), 0, 2, 1, 3)
    of_prefix = graph.transpose(graph.op("MatMul", on_prefix, caches.cross_v), 0, 2, 1, 3)
    of_past = graph.op("MatMul", part(count + 1, 2**31), caches.self_v)
    context = graph.op("Add", of_past, graph.op("Mul", part(count, count + 1), v))
    return graph.op("Add", graph.reshape(context, -1, text.width), graph.reshape(of_prefix, -1, text.width))


def _block(nn: Layers, text: Tower, layer: int, x: str, context: str) -> str:
    """What follows the attention of a layer: its projection and the MLP, each added to ``x`` [M, W]."""
    name, graph = f"{_GPT2}.h.{layer}", nn.graph

    def conv1d(value: str, name: str) -> str:
        """GPT-2's linear layers, which keep their weights transposed."""
        return nn.linear(value, name, nn.tensors[f"{name}.weight"].T, nn.tensors[f"{name}.bias"])

    x = graph.op("Add", conv1d(context, f"{name}.attn.c_proj"), x)
    hidden = conv1d(nn.norm(x, f"{name}.ln_2", text.eps), f"{name}.mlp.c_fc")
    return graph.op("Add", conv1d(nn.activation(hidden, text.act), f"{name}.mlp.c_proj"), x)


def _attention_weights(nn: Layers, settings: ClipCapSettings, layer: int) -> tuple[Float32, Float32]:
    """Weight [3 · W, W] and bias of a layer's queries, scaled, keys and values."""
    name = f"{_GPT2}.h.{layer}.attn.c_attn"
    weight, bias = nn.tensors[f"{name}.weight"].T, nn.tensors[f"{name}.bias"]
    return scaled_query(weight, bias, settings.text.width, settings.scales[layer])
