"""What a BLIP captioning checkpoint must hold, told from its config alone: settings, tensor names and shapes.

The names and shapes are those of ``BlipForConditionalGeneration`` in transformers (models/blip/modeling_blip.py and
modeling_blip_text.py); the defaults those of its BlipVisionConfig and BlipTextConfig.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rsedge.bundle import TokenSpec
from rsedge.export.models.layout import Shapes, check_tower, check_unquantised, linear, norm, section, select, sizes

if TYPE_CHECKING:
    from rsedge.export.weights import Report, StoredTensor

HEAD = "text_decoder.cls.predictions"
WORDS = "text_decoder.bert.embeddings.word_embeddings.weight"
# The language-model head, and the tensor that each part is tied to by default.
TIED = {f"{HEAD}.decoder.weight": WORDS, f"{HEAD}.decoder.bias": f"{HEAD}.bias"}

_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 384,
    "patch_size": 16,
}
_TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "vocab_size": 30524,
    "max_position_embeddings": 512,
}
_TOKENS = {"bos_token_id": 30522, "sep_token_id": 102, "pad_token_id": 0}


@dataclass(frozen=True, slots=True)
class BlipSettings:
    """The checked settings of a BLIP captioner, transformers' defaults filled in.

    Attributes:
        vision, text: Sizes by their names in ``config.json``.
        tokens: ``bos_token_id``, ``sep_token_id`` (what ends a caption) and ``pad_token_id``.
        tied: Whether the head may share the word embeddings.
    """

    vision: dict[str, int]
    text: dict[str, int]
    tokens: dict[str, int]
    tied: bool

    @property
    def image_size(self) -> int:
        """Pixels along an edge."""
        return self.vision["image_size"]

    @property
    def patch_size(self) -> int:
        """Pixels along an edge of a patch."""
        return self.vision["patch_size"]

    @property
    def vocab_size(self) -> int:
        """Tokens the embeddings have room for."""
        return self.text["vocab_size"]

    @property
    def needed_tokens(self) -> dict[int, str]:
        """Ids the tokenizer must have, and what for."""
        return {self.tokens["sep_token_id"]: "which ends a caption (text_config.sep_token_id)"}

    @property
    def token_spec(self) -> TokenSpec:
        """What a caption starts and ends with."""
        bos, eos, pad = (self.tokens[name] for name in ("bos_token_id", "sep_token_id", "pad_token_id"))
        return TokenSpec(bos=bos, eos=eos, pad=pad, vocab_size=self.vocab_size)

    @property
    def image_tokens(self) -> int:
        """Patches and the class token at the checkpoint's own image size."""
        return int((self.image_size // self.patch_size) ** 2 + 1)


def read_settings(config: Mapping[str, Any], report: Report) -> BlipSettings | None:
    """The settings in ``config.json``, or None after a report where one cannot be used."""
    trouble: list[str] = []
    vision, text = section(config, "vision_config"), section(config, "text_config")
    found = {"vision_config": sizes(vision, _VISION, "vision_config", trouble.append)}
    found["text_config"] = sizes(text, _TEXT, "text_config", trouble.append)
    for name, values in (("vision_config", vision), ("text_config", text)):
        check_tower(values, found[name], name, "gelu", trouble.append)
    if text.get("is_decoder", True) is not True:
        trouble.append(
            "text_config.is_decoder is not true, so the decoder cannot see the image: rsedge needs a captioner"
        )
    check_unquantised(config, trouble.append)
    vocab = found["text_config"].get("vocab_size")
    tokens = {name: text.get(name, default) for name, default in _TOKENS.items()}
    for name, value in tokens.items():
        if type(value) is not int or (vocab is not None and not 0 <= value < vocab):
            trouble.append(
                f"text_config.{name} is {value!r}; it must be a token id of the vocabulary"
                + (f" (0 to {vocab - 1})" if vocab else "")
            )
    for problem in trouble:
        report(problem)
    if trouble:
        return None
    # transformers ties where either place asks for it; both default to true.
    tied = bool(config.get("tie_word_embeddings", True)) or bool(text.get("tie_word_embeddings", True))
    return BlipSettings(vision=found["vision_config"], text=found["text_config"], tokens=tokens, tied=tied)


def canonical_name(name: str) -> str:
    """The name a tensor has in transformers' model today; older files differ, and transformers renames them too."""
    name = name.removeprefix("blip.")
    return re.sub(r"LayerNorm\.(gamma|beta)$", lambda m: "LayerNorm." + {"gamma": "weight", "beta": "bias"}[m[1]], name)


def resolve_tensors(
    found: Mapping[str, StoredTensor], settings: BlipSettings, report: Report
) -> dict[str, StoredTensor]:
    """The tensors the model needs under their canonical names, tied ones under both; what is amiss is reported."""
    named = {canonical_name(name): tensor for name, tensor in found.items()}
    if settings.tied:  # either of a pair may be stored; where both are, each stands for itself, as in transformers
        for first, second in TIED.items():
            for there, absent in ((first, second), (second, first)):
                if there in named:
                    named.setdefault(absent, named[there])
    return select(named, expected_shapes(settings), report)


def expected_shapes(settings: BlipSettings) -> Shapes:
    """Name and shape of every tensor that captions depend on."""
    yield from _vision_shapes(settings)
    yield from _text_shapes(settings)


def _vision_shapes(settings: BlipSettings) -> Shapes:
    size = settings.vision
    width, inner, patch = size["hidden_size"], size["intermediate_size"], size["patch_size"]
    name = "vision_model.embeddings"
    yield f"{name}.class_embedding", (1, 1, width)
    yield f"{name}.patch_embedding.weight", (width, 3, patch, patch)
    yield f"{name}.patch_embedding.bias", (width,)
    yield f"{name}.position_embedding", (1, settings.image_tokens, width)
    for index in range(size["num_hidden_layers"]):
        name = f"vision_model.encoder.layers.{index}"
        yield from norm(f"{name}.layer_norm1", width)
        yield from linear(f"{name}.self_attn.qkv", width, 3 * width)
        yield from linear(f"{name}.self_attn.projection", width, width)
        yield from norm(f"{name}.layer_norm2", width)
        yield from linear(f"{name}.mlp.fc1", width, inner)
        yield from linear(f"{name}.mlp.fc2", inner, width)
    yield from norm("vision_model.post_layernorm", width)


def _text_shapes(settings: BlipSettings) -> Shapes:
    size = settings.text
    width, inner, vocab = size["hidden_size"], size["intermediate_size"], size["vocab_size"]
    name = "text_decoder.bert.embeddings"
    yield WORDS, (vocab, width)
    yield f"{name}.position_embeddings.weight", (size["max_position_embeddings"], width)
    yield from norm(f"{name}.LayerNorm", width)
    for index in range(size["num_hidden_layers"]):
        name = f"text_decoder.bert.encoder.layer.{index}"
        # The config's encoder_hidden_size is overwritten with the image encoder's width in transformers.
        for attention, source in (("attention", width), ("crossattention", settings.vision["hidden_size"])):
            yield from linear(f"{name}.{attention}.self.query", width, width)
            yield from linear(f"{name}.{attention}.self.key", source, width)
            yield from linear(f"{name}.{attention}.self.value", source, width)
            yield from linear(f"{name}.{attention}.output.dense", width, width)
            yield from norm(f"{name}.{attention}.output.LayerNorm", width)
        yield from linear(f"{name}.intermediate.dense", width, inner)
        yield from linear(f"{name}.output.dense", inner, width)
        yield from norm(f"{name}.output.LayerNorm", width)
    yield from linear(f"{HEAD}.transform.dense", width, width)
    yield from norm(f"{HEAD}.transform.LayerNorm", width)
    yield from linear(f"{HEAD}.decoder", width, vocab)
