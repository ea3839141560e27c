"""BLIP captioning: ViT encoder, BERT decoder with cross attention (Li et al. 2022, as in transformers)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import BlipConfig, BlipForConditionalGeneration

from rsedge.errors import OptionError
from rsedge.manifest import ImageSpec
from rsedge.preprocessor import write_image_spec
from rsedge.training.losses import caption_loss_sum
from rsedge.training.models import tokenizers
from rsedge.training.models.loading import image_spec, load_pretrained, merge_config, resize_vision
from rsedge.training.models.task import Batch, CaptionTask

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from rsedge.datasets.examples import CaptionData
    from rsedge.training.data.samples import Sample
    from rsedge.training.recipe import Recipe

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, which BLIP uses


@dataclass(frozen=True)
class BlipCollate:
    """Samples → batch: each caption a row that starts with the start token and ends with the end token."""

    tokenizer: Any
    start: int
    end: int
    padding: int
    max_tokens: int

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """The batch; labels are −100 where there is padding."""
        texts = [caption for sample in samples for caption in sample.captions]
        rows = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        ids = [torch.tensor([self.start, *row[: self.max_tokens - 2], self.end]) for row in rows]
        input_ids = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.padding)
        lengths = torch.tensor([len(row) for row in ids])
        mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
        return {
            "pixels": torch.stack([sample.pixels for sample in samples]),
            "captions": torch.tensor([len(sample.captions) for sample in samples]),
            "input_ids": input_ids,
            "attention_mask": mask,
            "labels": input_ids.masked_fill(mask == 0, -100).index_fill(1, torch.tensor([0]), -100),
        }


class BlipTask(CaptionTask):
    """BLIP captioning with one vision pass per image for all of its captions."""

    parts: ClassVar[Mapping[str, str]] = {
        "vision": "model.vision_model.*",
        "text": "model.text_decoder.*",
        "cross_attention": "model.text_decoder.*.crossattention.*",
    }

    def __init__(self, model: Any, image: ImageSpec, tokenizer: Any, recipe: Recipe) -> None:
        text = model.config.text_config
        collate = BlipCollate(
            tokenizer, text.bos_token_id, text.sep_token_id, text.pad_token_id, recipe.model.max_tokens
        )
        super().__init__(model, image, collate, tokenizer)
        self._max_tokens = recipe.model.max_tokens
        self._smoothing = recipe.caption.label_smoothing if recipe.caption else 0.0

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
        smoothing = self._smoothing if self.training else 0.0
        return {"loss_sum": caption_loss_sum(logits[:, :-1], batch["labels"][:, 1:], label_smoothing=smoothing)}

    @torch.no_grad()
    def generate(self, pixels: Tensor) -> list[str]:
        """Greedy captions of uint8 [B, 3, S, S]."""
        ids = self.model.generate(
            pixel_values=self.normalize(pixels), num_beams=1, do_sample=False, max_new_tokens=self._max_tokens - 2
        )
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def save(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write a checkpoint that transformers and ``rsedge export`` read."""
        self.model.save_pretrained(folder, state_dict=self.model_state(state))
        self.tokenizer.save_pretrained(folder)
        write_image_spec(folder, self.image, model_type="blip")


def make(recipe: Recipe, data: CaptionData) -> BlipTask:
    """The task of a recipe, its model loaded or made from the seed.

    Args:
        recipe: Of family ``blip``.
        data: For a vocabulary to be learnt from its training captions.

    Raises:
        OptionError: The checkpoint is not BLIP, or settings do not fit it.
    """
    wanted = recipe.model
    if wanted.init is not None and wanted.tokenizer is not None:
        raise OptionError(f"model.init {wanted.init} has a tokenizer of its own: leave model.tokenizer out")
    tokenizer = tokenizers.obtain(
        wanted.tokenizer,
        wanted.init,
        captions=(caption for example in data.split("train") for caption in example.captions),
        learn=tokenizers.learn_wordpiece,
        size=wanted.vocabulary_size,
        revision=wanted.revision,
    )
    if wanted.init is None:
        model, image = _from_config(recipe, tokenizer)
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
    return BlipTask(
        model, ImageSpec(size=size, mean=image.mean, std=image.std, resample=image.resample), tokenizer, recipe
    )


def _from_config(recipe: Recipe, tokenizer: Any) -> tuple[Any, ImageSpec]:
    ids = tokenizer.convert_tokens_to_ids
    defaults = {
        "vision_config": {"image_size": recipe.model.image_size or 224},
        "text_config": {
            "vocab_size": len(tokenizer),
            "bos_token_id": ids("[DEC]"),
            "sep_token_id": ids("[SEP]"),
            "eos_token_id": ids("[SEP]"),
            "pad_token_id": ids("[PAD]"),
            "label_smoothing": 0.0,
        },
    }
    config = BlipConfig(**merge_config(BlipConfig, defaults, recipe.model.config))
    # The decoder reads the encoder's output, however wide a recipe made it.
    config.text_config.encoder_hidden_size = config.vision_config.hidden_size
    model = BlipForConditionalGeneration(config)
    return model, ImageSpec(size=config.vision_config.image_size, mean=MEAN, std=STD)
