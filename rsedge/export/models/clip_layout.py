"""What a CLIP or SigLIP checkpoint must hold, told from its config alone: settings, tensor names and shapes.

The names and shapes are those of ``CLIPModel`` and ``SiglipModel`` in transformers (models/clip/modeling_clip.py,
models/siglip/modeling_siglip.py), the defaults those of their configurations.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rsedge.export.models.layout import Shapes, check_tower, check_unquantised, linear, norm, section, select, sizes

if TYPE_CHECKING:
    from rsedge.export.weights import Report, StoredTensor

Kind = Literal["clip", "siglip"]

_VISION: dict[Kind, dict[str, int]] = {
    "clip": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
    },
    "siglip": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
    },
}
_TEXT: dict[Kind, dict[str, int]] = {
    "clip": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "vocab_size": 49408,
        "max_position_embeddings": 77,
    },
    "siglip": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "vocab_size": 32000,
        "max_position_embeddings": 64,
    },
}
_ACTIVATION: dict[Kind, str] = {"clip": "quick_gelu", "siglip": "gelu_pytorch_tanh"}
_EPSILON: dict[Kind, float] = {"clip": 1e-5, "siglip": 1e-6}
_PROJECTION = 512
_END = 49407
_PAD = 1
# Configurations written before transformers 4.31 say 2 whatever the end token is; see ClipText.end.
_LEGACY_END = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Tower:
    """The numbers of a transformer encoder.

    Attributes:
        width, inner, layers, heads: Sizes; ``inner`` is the MLPs' width.
        act, eps: Activation, and LayerNorm's epsilon.
    """

    width: int
    inner: int
    layers: int
    heads: int
    act: str
    eps: float

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.width // self.heads


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionSettings:
    """An image encoder.

    Attributes:
        kind: CLIP reads a class token and projects it, SigLIP pools with attention.
        tower: Its layers.
        image_size, patch_size: Pixels along an edge, of the checkpoint.
        dim: Length of an embedding.
    """

    kind: Kind
    tower: Tower
    image_size: int
    patch_size: int
    dim: int

    @property
    def extra_tokens(self) -> int:
        """Tokens beside the patches."""
        return 1 if self.kind == "clip" else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSettings:
    """A text encoder.

    Attributes:
        kind: CLIP's is causal and read at the end token, SigLIP's sees all of a padded text and is read at the last.
        tower: Its layers.
        vocab_size, context_length: Rows of the token and of the position embeddings.
        dim: Length of an embedding.
        end: CLIP's end token, at whose first place a text is read off. None: at the first place of the largest id, as
            transformers does for configurations with an ``eos_token_id`` of 2, which is wrong but widespread.
        pad: What fills a text: SigLIP's padding, which is seen; for CLIP an id that moves neither place.
    """

    kind: Kind
    tower: Tower
    vocab_size: int
    context_length: int
    dim: int
    end: int | None
    pad: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DualEncoderSettings:
    """The checked settings of a CLIP or SigLIP model, transformers' defaults filled in."""

    vision: VisionSettings
    text: TextSettings

    @property
    def kind(self) -> Kind:
        """CLIP or SigLIP."""
        return self.vision.kind

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
        if self.kind == "siglip":
            return {self.text.pad: "which fills a text (text_config.pad_token_id)"}
        return {} if self.text.end is None else {self.text.end: "which ends a text (text_config.eos_token_id)"}

    @property
    def token_spec(self) -> None:
        """None: nothing is generated."""
        return None


def read_clip_settings(config: Mapping[str, Any], report: Report) -> DualEncoderSettings | None:
    """CLIP's settings in ``config.json``, or None after a report where one cannot be used."""
    trouble: list[str] = []
    found = sizes(config, {"projection_dim": _PROJECTION}, "config", trouble.append)
    dim = found.get("projection_dim", _PROJECTION)
    vision = read_vision(_clip_section(config, "vision_config", _VISION["clip"]), "clip", dim, trouble.append)
    text = _read_text(_clip_section(config, "text_config", _TEXT["clip"]), "clip", dim, trouble.append)
    return _settled(config, vision, text, trouble, report)


def read_siglip_settings(config: Mapping[str, Any], report: Report) -> DualEncoderSettings | None:
    """SigLIP's settings in ``config.json``, or None after a report where one cannot be used."""
    trouble: list[str] = []
    vision = read_vision(section(config, "vision_config"), "siglip", None, trouble.append)
    text = _read_text(section(config, "text_config"), "siglip", None, trouble.append)
    if vision is not None and text is not None and vision.dim != text.dim:
        trouble.append(
            f"its images have embeddings of {vision.dim} numbers, its texts of {text.dim} "
            "(text_config.projection_size): the config is damaged"
        )
    return _settled(config, vision, text, trouble, report)


def _settled(
    config: Mapping[str, Any],
    vision: VisionSettings | None,
    text: TextSettings | None,
    trouble: list[str],
    report: Report,
) -> DualEncoderSettings | None:
    check_unquantised(config, trouble.append)
    for problem in trouble:
        report(problem)
    if trouble or vision is None or text is None:
        return None
    return DualEncoderSettings(vision=vision, text=text)


def _clip_section(config: Mapping[str, Any], name: str, defaults: Mapping[str, int]) -> Mapping[str, Any]:
    """A section of a CLIP config; old files have a second copy that, defaults included, wins in transformers."""
    values, old = section(config, name), config.get(f"{name}_dict")
    if not isinstance(old, dict):
        return values
    more = {"hidden_act": _ACTIVATION["clip"], "layer_norm_eps": _EPSILON["clip"], "eos_token_id": _END}
    return {**values, **defaults, **more, **old}


def read_vision(values: Mapping[str, Any], kind: Kind, dim: int | None, report: Report) -> VisionSettings | None:
    """An image encoder's settings, or None after at least one report.

    Args:
        values: The ``vision_config``.
        kind: Of the model.
        dim: Length of an embedding; None: SigLIP's, the encoder's width.
        report: Called once per problem.
    """
    trouble: list[str] = []
    found = sizes(values, _VISION[kind], "vision_config", trouble.append)
    check_tower(values, found, "vision_config", _ACTIVATION[kind], trouble.append)
    if values.get("num_channels", 3) != 3:
        trouble.append(f"vision_config.num_channels is {values['num_channels']!r}; rsedge exports red, green and blue")
    if not values.get("vision_use_head", True):
        trouble.append("vision_config.vision_use_head is false, so it gives no embedding of an image")
    if found.get("patch_size", 1) > found.get("image_size", 1):
        trouble.append(
            f"vision_config.patch_size ({found['patch_size']}) is larger than image_size ({found['image_size']}): the "
            "config is damaged"
        )
    for problem in trouble:
        report(problem)
    if trouble:
        return None
    return VisionSettings(
        kind=kind,
        tower=_tower(values, found, kind),
        image_size=found["image_size"],
        patch_size=found["patch_size"],
        dim=dim or found["hidden_size"],
    )


def _read_text(values: Mapping[str, Any], kind: Kind, dim: int | None, report: Report) -> TextSettings | None:
    trouble: list[str] = []
    found = sizes(values, _TEXT[kind], "text_config", trouble.append)
    check_tower(values, found, "text_config", _ACTIVATION[kind], trouble.append)
    vocab = found.get("vocab_size", _TEXT[kind]["vocab_size"])
    end: int | None = None
    if kind == "clip":
        end = values.get("eos_token_id", _END)
        pad = end = _token(end, "eos_token_id", vocab, trouble.append)
        if end == _LEGACY_END:
            end, pad = None, 0
    else:
        pad = _token(values.get("pad_token_id", _PAD), "pad_token_id", vocab, trouble.append)
        projection = {"projection_size": found.get("hidden_size", 1)}
        given = {name: value for name, value in values.items() if value is not None}  # null means the width too
        dim = sizes(given, projection, "text_config", trouble.append).get("projection_size", 1)
    for problem in trouble:
        report(problem)
    if trouble:
        return None
    return TextSettings(
        kind=kind,
        tower=_tower(values, found, kind),
        vocab_size=vocab,
        context_length=found["max_position_embeddings"],
        dim=dim or found["hidden_size"],
        end=end,
        pad=pad,
    )


def _token(value: Any, name: str, vocab: int, report: Report) -> int:
    if type(value) is int and 0 <= value < vocab:
        return value
    report(f"text_config.{name} is {value!r}; it must be one token id of the vocabulary (0 to {vocab - 1})")
    return 0


def _tower(values: Mapping[str, Any], found: Mapping[str, int], kind: Kind) -> Tower:
    return Tower(
        width=found["hidden_size"],
        inner=found["intermediate_size"],
        layers=found["num_hidden_layers"],
        heads=found["num_attention_heads"],
        act=values.get("hidden_act", _ACTIVATION[kind]),
        eps=float(values.get("layer_norm_eps", _EPSILON[kind])),
    )


def canonical_name(name: str) -> str:
    """The name a tensor has in transformers' model today: some versions prefix the model, or nest a tower in itself."""
    name = re.sub(r"^(clip|siglip)\.", "", name)
    return re.sub(r"\b(text_model|vision_model)\.\1\.", r"\1.", name)


def resolve_tensors(
    found: Mapping[str, StoredTensor], settings: DualEncoderSettings, report: Report
) -> dict[str, StoredTensor]:
    """The tensors the model needs under their canonical names; what is amiss is reported."""
    return select({canonical_name(name): tensor for name, tensor in found.items()}, expected_shapes(settings), report)


def expected_shapes(settings: DualEncoderSettings) -> Shapes:
    """Name and shape of every tensor that embeddings and their logits depend on."""
    yield from vision_shapes(settings.vision)
    yield from _text_shapes(settings.text)
    yield "logit_scale", () if settings.kind == "clip" else (1,)
    if settings.kind == "siglip":
        yield "logit_bias", (1,)


def vision_shapes(vision: VisionSettings) -> Shapes:
    """Name and shape of an image encoder's tensors, its projection included."""
    tower, patch, name = vision.tower, vision.patch_size, "vision_model.embeddings"
    width = tower.width
    yield f"{name}.patch_embedding.weight", (width, 3, patch, patch)
    yield f"{name}.position_embedding.weight", ((vision.image_size // patch) ** 2 + vision.extra_tokens, width)
    yield from _layers("vision_model", tower)
    yield from norm("vision_model.post_layernorm", width)
    if vision.kind == "clip":
        yield f"{name}.class_embedding", (width,)
        yield from norm("vision_model.pre_layrnorm", width)  # so spelt in transformers
        yield "visual_projection.weight", (vision.dim, width)
        return
    yield f"{name}.patch_embedding.bias", (width,)
    name = "vision_model.head"
    yield f"{name}.probe", (1, 1, width)
    yield f"{name}.attention.in_proj_weight", (3 * width, width)
    yield f"{name}.attention.in_proj_bias", (3 * width,)
    yield from linear(f"{name}.attention.out_proj", width, width)
    yield from norm(f"{name}.layernorm", width)
    yield from linear(f"{name}.mlp.fc1", width, tower.inner)
    yield from linear(f"{name}.mlp.fc2", tower.inner, width)


def _text_shapes(text: TextSettings) -> Shapes:
    width, name = text.tower.width, "text_model.embeddings"
    yield f"{name}.token_embedding.weight", (text.vocab_size, width)
    yield f"{name}.position_embedding.weight", (text.context_length, width)
    yield from _layers("text_model", text.tower)
    yield from norm("text_model.final_layer_norm", width)
    if text.kind == "clip":
        yield "text_projection.weight", (text.dim, width)
    else:
        yield from linear("text_model.head", width, text.dim)


def _layers(prefix: str, tower: Tower) -> Shapes:
    for index in range(tower.layers):
        name = f"{prefix}.encoder.layers.{index}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from linear(f"{name}.self_attn.{part}", tower.width, tower.width)
        yield from norm(f"{name}.layer_norm1", tower.width)
        yield from norm(f"{name}.layer_norm2", tower.width)
        yield from linear(f"{name}.mlp.fc1", tower.width, tower.inner)
        yield from linear(f"{name}.mlp.fc2", tower.inner, tower.width)
