"""BLIP captioning: ViT encoder, BERT decoder with cross attention (Li et al. 2022, as in transformers)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers import BlipConfig, BlipForConditionalGeneration

from rsedge.errors import OptionError
from rsedge.manifest import ImageSpec
from rsedge.training.models.loading import (
    default_image,
    image_spec,
    learn_wordpiece,
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
    from rsedge.training.recipe import Recipe


class BlipTask(CaptionTask):
    """BLIP captioning with one vision pass per image for all of its captions."""

    parts: ClassVar[Mapping[str, str]] = {
        "vision": "model.vision_model.*",
        "text": "model.text_decoder.*",
        "cross_attention": "model.text_decoder.*.crossattention.*",
    }

    def __init__(self, model: Any, image: ImageSpec, tokenizer: Any, recipe: Recipe) -> None:
        text = model.config.text_config
        collate = CaptionCollate(
            tokenizer, (text.bos_token_id,), text.sep_token_id, text.pad_token_id, recipe.model.max_tokens
        )
        super().__init__(model, image, collate, tokenizer, recipe)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """``loss_sum`` of the batch."""
        seen = self.model.vision_model(pixel_values=self.normalize(batch["pixels"])).last_hidden_state
        seen = seen.repeat_interleave(batch["captions"], dim=0)
        logits = self.model.text_decoder(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            encoder_hidden_states=seen,
            encoder_attention_mask=seen.new_ones(seen.shape[:2], dtype=torch.long),
            use_cache=False,
        ).logits
        return self.loss_sum(logits[:, :-1], batch["labels"][:, 1:])

    @torch.no_grad()
    def generate(self, pixels: Tensor) -> list[str]:
        """Greedy captions of uint8 [B, 3, S, S]."""
        ids = self.model.generate(
            pixel_values=self.normalize(pixels), num_beams=1, do_sample=False, max_new_tokens=self._max_tokens - 2
        )
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def make(recipe: Recipe, data: CaptionData) -> BlipTask:
    """The task of a recipe. Raises OptionError: the checkpoint is not BLIP, or settings do not fit it."""
    wanted = recipe.model
    tokenizer = obtain_tokenizer(wanted, wanted.init, data, learn_wordpiece)
    if wanted.init is None:
        ids = tokenizer.convert_tokens_to_ids
        defaults = {
            "vision_config": {"image_size": wanted.image_size or 224},
            "text_config": {
                "vocab_size": len(tokenizer),
                "bos_token_id": ids("[DEC]"),
                "sep_token_id": ids("[SEP]"),
                "eos_token_id": ids("[SEP]"),
                "pad_token_id": ids("[PAD]"),
                "label_smoothing": 0.0,
            },
        }
        config = BlipConfig(**merge_config(BlipConfig, defaults, wanted.config))
        # The decoder reads the encoder's output, however wide a recipe made it.
        config.text_config.encoder_hidden_size = config.vision_config.hidden_size
        model: Any = BlipForConditionalGeneration(config)
        image = default_image("clip", config.vision_config.image_size)  # BLIP uses CLIP's statistics
    else:
        image = image_spec(wanted.init, wanted.revision)
        model = load_pretrained(BlipForConditionalGeneration, wanted)
    size = wanted.image_size or image.size
    resize_vision(model, size)
    longest = model.config.text_config.max_position_embeddings
    if wanted.max_tokens > longest:
        raise OptionError(f"model.max_tokens is {wanted.max_tokens}, but the decoder has {longest} positions: lower it")
    # transformers' own default of 20 new tokens would cut the captions of evaluation and export short.
    model.generation_config.max_new_tokens = wanted.max_tokens - 2
    return BlipTask(model, replace(image, size=size), tokenizer, recipe)
