"""CLIPCap: captions by GPT-2 from a prefix that a mapper makes of a CLIP or SigLIP image embedding."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoConfig, CLIPVisionModelWithProjection, GPT2Config, GPT2LMHeadModel, SiglipVisionModel

from rsedge.errors import OptionError
from rsedge.manifest import ImageSpec
from rsedge.runtime.decoding.options import DecodingOptions
from rsedge.training.models.clipcap_model import ClipCapConfig, ClipCapModel, generate
from rsedge.training.models.loading import (
    config_type,
    default_image,
    image_spec,
    learn_byte_bpe,
    load_pretrained,
    merge_config,
    obtain_tokenizer,
    resize_vision,
)
from rsedge.training.models.task import Batch, CaptionCollate, CaptionTask

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rsedge.datasets.examples import CaptionData
    from rsedge.manifest import ImageSpec
    from rsedge.training.recipe import ModelRecipe, Recipe

_ENCODERS: dict[str, Any] = {"clip": CLIPVisionModelWithProjection, "siglip": SiglipVisionModel}
_SECTIONS = ("vision", "text")


class ClipCapTask(CaptionTask):
    """CLIPCap with one vision pass per image for all of its captions."""

    model: ClipCapModel
    parts: ClassVar[Mapping[str, str]] = {
        "encoder": "model.encoder.*",
        "language_model": "model.language_model.*",
        "mapper": "model.mapper.*",
    }

    def __init__(self, model: ClipCapModel, image: ImageSpec, tokenizer: Any, recipe: Recipe) -> None:
        stop = model.config.stop_token_id
        # "… an airport ." and "… an airport" both end in the one token that stops the decoder.
        collate = CaptionCollate(tokenizer, (), stop, stop, recipe.model.max_tokens, cut=" .")
        super().__init__(model, image, collate, tokenizer, recipe)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """``loss_sum`` of the batch."""
        logits = self.model(
            self.normalize(batch["pixels"]),
            batch["input_ids"],
            batch["attention_mask"],
            captions_per_image=batch["captions"],
        ).logits
        return self.loss_sum(logits, batch["labels"])

    @torch.no_grad()
    def generate(self, pixels: Tensor) -> list[str]:
        """Greedy captions of uint8 [B, 3, S, S]."""
        embeddings = self.model.embed_images(self.normalize(pixels))
        options = DecodingOptions(num_beams=1, max_new_tokens=self._max_tokens)
        found = generate(self.model, embeddings, options)
        return [self.tokenizer.decode(caption.token_ids, skip_special_tokens=True).strip() for caption in found]

    @property
    def image_kind(self) -> str:
        """The model type of the image encoder."""
        return str(self.model.config.vision_config.model_type.split("_")[0])


def make(recipe: Recipe, data: CaptionData) -> ClipCapTask:
    """The task of a recipe: a CLIPCap, or parts and a new mapper. Raises OptionError: parts or settings do not fit."""
    wanted = recipe.model
    tokenizer = obtain_tokenizer(wanted, wanted.init or wanted.language_model, data, learn_byte_bpe)
    if wanted.init is not None:
        model: Any = load_pretrained(ClipCapModel, wanted)
        image = image_spec(wanted.init, wanted.revision)
    else:
        model, image = _from_parts(wanted, tokenizer)
    size = wanted.image_size or image.size
    resize_vision(model.encoder, size)
    model.config.vision_config.image_size = size
    room = model.config.text_config.n_positions - model.config.prefix_length
    if wanted.max_tokens > room:
        raise OptionError(
            f"model.max_tokens is {wanted.max_tokens}, but GPT-2 has {room} positions behind the prefix: lower it"
        )
    return ClipCapTask(model, replace(image, size=size), tokenizer, recipe)


def _from_parts(wanted: ModelRecipe, tokenizer: Any) -> tuple[ClipCapModel, ImageSpec]:
    stop = tokenizer.encode(".", add_special_tokens=False)
    if len(stop) != 1:
        raise OptionError("the tokenizer has no token '.', which ends a caption: choose another model.tokenizer")
    sections = {name: dict(wanted.config.get(name, {})) for name in _SECTIONS}
    own = {name: value for name, value in wanted.config.items() if name not in _SECTIONS}
    merge_config(ClipCapConfig, {}, own)  # names what it does not know
    if wanted.encoder is not None:
        kind = config_type(wanted.encoder)
        if kind not in _ENCODERS:
            raise OptionError(f"model.encoder {wanted.encoder} is a {kind} model: give {' or '.join(_ENCODERS)}")
        changes = sections["vision"]
        if kind == "clip":  # the tower's own configuration may not know what the whole projects to
            whole = AutoConfig.from_pretrained(wanted.encoder, trust_remote_code=False)
            changes = {"projection_dim": whole.projection_dim, **changes}
        encoder = load_pretrained(_ENCODERS[kind], wanted, source=wanted.encoder, changes=changes)
        image = image_spec(wanted.encoder)
    elif "encoder" in wanted.freeze:
        raise OptionError(
            "model.freeze keeps the encoder, but its weights are random: name a trained CLIP or SigLIP, as "
            "with --set model.encoder=RUNS/clip/best"
        )
    else:
        siglip = sections["vision"].get("model_type") == "siglip_vision_model"
        encoder_class = _ENCODERS["siglip" if siglip else "clip"]
        settings = merge_config(encoder_class.config_class, {}, sections["vision"])
        settings.setdefault("image_size", wanted.image_size or 224)
        encoder = encoder_class(encoder_class.config_class(**settings))
        image = default_image("clip", settings["image_size"])
    if wanted.language_model is not None:
        decoder = load_pretrained(GPT2LMHeadModel, wanted, source=wanted.language_model, changes=sections["text"])
    else:
        end = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
        defaults = {"vocab_size": len(tokenizer), "n_positions": 256, **end}
        decoder = GPT2LMHeadModel(GPT2Config(**merge_config(GPT2Config, defaults, sections["text"])))
    return ClipCapModel.from_parts(encoder, decoder, **{"stop_token_id": stop[0], **own}), image
