"""What a CLIPCap checkpoint must hold, told from its config alone: settings, tensor names and shapes.

The names and shapes are those of :class:`rsedge.training.models.clipcap_model.ClipCapModel`, whose parts are
transformers' CLIPVisionModelWithProjection or SiglipVisionModel and GPT2LMHeadModel (models/gpt2/modeling_gpt2.py); the
defaults those of ClipCapConfig and GPT2Config. The image encoder's tensors go by the names they have in a whole CLIP or
SigLIP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rsedge.bundle import TokenSpec
from rsedge.export.graphs.precision import ACTIVATIONS
from rsedge.export.models.clip_layout import Kind, VisionSettings, read_vision, vision_shapes
from rsedge.export.models.layout import Shapes, check_unquantised, linear, norm, section, select, sizes

if TYPE_CHECKING:
    from rsedge.export.weights import Report, StoredTensor

WORDS = "language_model.transformer.wte.weight"
HEAD = "language_model.lm_head.weight"

_TEXT = {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}
_ENCODERS: dict[str, Kind] = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}
_PROJECTION = 512  # CLIPVisionConfig's
_MAPPERS = ("mlp", "transformer")
_MAPPER = {"prefix_length": 40, "mapper_layers": 8, "mapper_heads": 8}
_FULL_STOP = 13  # of GPT-2's vocabulary


@dataclass(frozen=True, slots=True)
class Gpt2Settings:
    """The numbers of a GPT-2.

    Attributes:
        width, layers, heads, inner, positions, vocab_size: Sizes; ``inner`` is the MLPs' width.
        act, eps: Activation, and LayerNorm's epsilon.
        scales: What each layer multiplies its queries by.
        tied: Whether the head may share the word embeddings.
    """

    width: int
    layers: int
    heads: int
    inner: int
    positions: int
    vocab_size: int
    act: str
    eps: float
    scales: tuple[float, ...]
    tied: bool

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.width // self.heads


@dataclass(frozen=True, slots=True)
class MapperSettings:
    """The numbers of a mapper; all but ``kind`` and ``prefix_length`` are the transformer's.

    Attributes:
        kind: ``mlp`` or ``transformer``.
        prefix_length: Positions of GPT-2 that stand for the image.
        clip_length: Tokens made of the image embedding.
        layers, heads, inner: Sizes; ``inner`` is the MLPs' width.
    """

    kind: str
    prefix_length: int
    clip_length: int
    layers: int
    heads: int
    inner: int


@dataclass(frozen=True, slots=True)
class ClipCapSettings:
    """The checked settings of a CLIPCap, the defaults filled in.

    Attributes:
        vision: The image encoder's.
        text: GPT-2's.
        mapper: What turns an image embedding into a prefix.
        stop: The token that ends a caption and is part of it.
    """

    vision: VisionSettings
    text: Gpt2Settings
    mapper: MapperSettings
    stop: int

    @property
    def image_size(self) -> int:
        """Pixels along an edge."""
        return self.vision.image_size

    @property
    def patch_size(self) -> int:
        """Pixels along an edge of a patch."""
        return self.vision.patch_size

    @property
    def vocab_size(self) -> int:
        """Tokens the embeddings have room for."""
        return self.text.vocab_size

    @property
    def needed_tokens(self) -> dict[int, str]:
        """Ids the tokenizer must have, and what for."""
        return {self.stop: "which ends a caption (stop_token_id)"}

    @property
    def token_spec(self) -> TokenSpec:
        """What a caption ends with; nothing starts it, the prefix takes that place."""
        return TokenSpec(bos=self.stop, eos=self.stop, pad=self.stop, vocab_size=self.vocab_size)

    @property
    def image_tokens(self) -> int:
        """Prefix positions in the cross cache; the last one of the prefix is the first step's."""
        return self.mapper.prefix_length - 1

    @property
    def max_new_tokens(self) -> int:
        """Longest caption: a token per position behind the cross cache (the last token is not run)."""
        return self.text.positions - self.image_tokens


def read_settings(config: Mapping[str, Any], report: Report) -> ClipCapSettings | None:
    """The settings in ``config.json``, or None after a report where one cannot be used."""
    trouble: list[str] = []
    vision, text = _read_encoder(config, trouble.append), _read_text(config, trouble.append)
    mapper = _read_mapper(config, text, trouble.append)
    stop = config.get("stop_token_id", _FULL_STOP)
    if type(stop) is not int or stop < 0 or (text is not None and stop >= text.vocab_size):
        trouble.append(
            f"stop_token_id is {stop!r}; it must be one token id of the vocabulary"
            + (f" (0 to {text.vocab_size - 1})" if text is not None else "")
        )
    check_unquantised(config, trouble.append)
    for problem in trouble:
        report(problem)
    if trouble or vision is None or text is None or mapper is None:
        return None
    return ClipCapSettings(vision=vision, text=text, mapper=mapper, stop=stop)


def _read_encoder(config: Mapping[str, Any], report: Report) -> VisionSettings | None:
    values = section(config, "vision_config")
    name = values.get("model_type", "clip_vision_model")
    if name not in _ENCODERS:
        report(f"vision_config.model_type is {name!r}; rsedge exports {', '.join(_ENCODERS)}")
        return None
    kind, dim = _ENCODERS[name], None
    if kind == "clip":
        dim = sizes(values, {"projection_dim": _PROJECTION}, "vision_config", report).get("projection_dim")
    return read_vision(values, kind, dim, report)


def _read_text(config: Mapping[str, Any], report: Report) -> Gpt2Settings | None:
    trouble: list[str] = []
    text = section(config, "text_config")
    found = sizes(text, _TEXT, "text_config", trouble.append)
    inner = 4 * found.get("n_embd", 1)
    if text.get("n_inner") is not None:
        inner = sizes(text, {"n_inner": inner}, "text_config", trouble.append).get("n_inner", inner)
    act = text.get("activation_function", "gelu_new")
    if act not in ACTIVATIONS:
        trouble.append(f"text_config.activation_function is {act!r}; rsedge exports {', '.join(ACTIVATIONS)}")
    width, heads = found.get("n_embd", 1), found.get("n_head", 1)
    if width % heads:
        trouble.append(f"text_config.n_embd ({width}) is not a multiple of its n_head ({heads}): the config is damaged")
    if text.get("add_cross_attention"):
        trouble.append("text_config.add_cross_attention is true; CLIPCap shows GPT-2 the image as a prefix only")
    for problem in trouble:
        report(problem)
    if trouble:
        return None
    scale = (width // heads) ** -0.5 if text.get("scale_attn_weights", True) else 1.0
    by_layer = bool(text.get("scale_attn_by_inverse_layer_idx", False))
    return Gpt2Settings(
        width=width,
        layers=found["n_layer"],
        heads=heads,
        inner=inner,
        positions=found["n_positions"],
        vocab_size=found["vocab_size"],
        act=act,
        eps=float(text.get("layer_norm_epsilon", 1e-5)),
        scales=tuple(scale / (layer + 1) if by_layer else scale for layer in range(found["n_layer"])),
        tied=bool(text.get("tie_word_embeddings", True)),
    )


def _read_mapper(config: Mapping[str, Any], text: Gpt2Settings | None, report: Report) -> MapperSettings | None:
    trouble: list[str] = []
    found = sizes(config, _MAPPER, "config", trouble.append)
    prefix = found.get("prefix_length", 2)
    clip_length = prefix
    if config.get("clip_length") is not None:
        clip_length = sizes(config, {"clip_length": prefix}, "config", trouble.append).get("clip_length", prefix)
    kind, ratio = config.get("mapper", "mlp"), config.get("mapper_ratio", 2.0)
    if kind not in _MAPPERS:
        trouble.append(f"mapper is {kind!r}; rsedge exports {', '.join(_MAPPERS)}")
    elif kind == "transformer" and text is not None and text.width % found.get("mapper_heads", 1):
        trouble.append(
            f"mapper_heads is {found['mapper_heads']}, which does not divide GPT-2's width {text.width}: the config is "
            "damaged"
        )
    if not isinstance(ratio, int | float) or ratio <= 0:
        trouble.append(f"mapper_ratio is {ratio!r}, expected a number above 0, such as 2")
    if prefix < 2:
        # The last position is the first step's input; those before it are the cross cache, which cannot be empty.
        trouble.append(f"prefix_length is {prefix}; rsedge exports prefixes of 2 positions or more")
    if text is not None and prefix >= text.positions:
        trouble.append(f"prefix_length is {prefix}, but GPT-2 has {text.positions} positions in all")
    for problem in trouble:
        report(problem)
    if trouble or text is None:
        return None
    return MapperSettings(
        kind=kind,
        prefix_length=prefix,
        clip_length=clip_length,
        layers=found["mapper_layers"],
        heads=found["mapper_heads"],
        inner=int(text.width * ratio),
    )


def canonical_name(name: str) -> str:
    """The name a tensor goes by here; versions of transformers nest SigLIP's tower in itself or do not."""
    inner = name.removeprefix("encoder.")
    if inner == name or inner.startswith(("vision_model.", "visual_projection.")):
        return inner
    return f"vision_model.{inner}"


def resolve_tensors(
    found: Mapping[str, StoredTensor], settings: ClipCapSettings, report: Report
) -> dict[str, StoredTensor]:
    """The tensors the model needs under their canonical names, a tied head under both; what is amiss is reported."""
    named = {canonical_name(name): tensor for name, tensor in found.items()}
    if settings.text.tied:  # either may be stored; where both are, each stands for itself, as in transformers
        for there, absent in ((WORDS, HEAD), (HEAD, WORDS)):
            if there in named:
                named.setdefault(absent, named[there])
    return select(named, expected_shapes(settings), report)


def expected_shapes(settings: ClipCapSettings) -> Shapes:
    """Name and shape of every tensor that captions depend on."""
    yield from vision_shapes(settings.vision)
    yield from _mapper_shapes(settings)
    yield from _text_shapes(settings.text)


def _mapper_shapes(settings: ClipCapSettings) -> Shapes:
    mapper, width = settings.mapper, settings.text.width
    if mapper.kind == "mlp":
        output = mapper.prefix_length * width
        yield from linear("mapper.model.0", settings.vision.dim, output // 2)
        yield from linear("mapper.model.2", output // 2, output)
        return
    yield "mapper.prefix_const", (mapper.prefix_length, width)
    yield from linear("mapper.linear", settings.vision.dim, mapper.clip_length * width)
    for layer in range(mapper.layers):
        name = f"mapper.transformer.layers.{layer}"
        yield from norm(f"{name}.norm1", width)
        yield f"{name}.attn.to_queries.weight", (width, width)
        yield f"{name}.attn.to_keys_values.weight", (2 * width, width)
        yield from linear(f"{name}.attn.project", width, width)
        yield from norm(f"{name}.norm2", width)
        yield from linear(f"{name}.mlp.fc1", width, mapper.inner)
        yield from linear(f"{name}.mlp.fc2", mapper.inner, width)


def _text_shapes(text: Gpt2Settings) -> Shapes:
    width = text.width
    yield WORDS, (text.vocab_size, width)
    yield "language_model.transformer.wpe.weight", (text.positions, width)
    for layer in range(text.layers):
        name = f"language_model.transformer.h.{layer}"
        yield from norm(f"{name}.ln_1", width)
        yield from _conv1d(f"{name}.attn.c_attn", width, 3 * width)
        yield from _conv1d(f"{name}.attn.c_proj", width, width)
        yield from norm(f"{name}.ln_2", width)
        yield from _conv1d(f"{name}.mlp.c_fc", width, text.inner)
        yield from _conv1d(f"{name}.mlp.c_proj", text.inner, width)
    yield from norm("language_model.transformer.ln_f", width)
    yield HEAD, (text.vocab_size, width)


def _conv1d(name: str, inputs: int, outputs: int) -> Shapes:
    """A linear layer of GPT-2, which keeps its weight as [inputs, outputs]."""
    yield f"{name}.weight", (inputs, outputs)
    yield f"{name}.bias", (outputs,)
