"""The loop's view of a model: a module that turns a batch into the terms of its loss, and a few facts beside it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from rsedge.checkpointfiles import write_image_spec
from rsedge.training.data.samples import Sample
from rsedge.training.losses import IGNORED, caption_loss_sum

if TYPE_CHECKING:
    from pathlib import Path

    from rsedge.manifest import ImageSpec
    from rsedge.training.recipe import Recipe

Batch = dict[str, Tensor]
"""``pixels`` uint8 [B, 3, S, S], ``captions`` int64 [B] (captions per image), ``input_ids`` and ``attention_mask``
int64 [rows, T] with the rows of an image adjacent, and ``labels`` for captioners."""
Collate = Callable[[Sequence[Sample]], Batch]


def stack(samples: Sequence[Sample]) -> Batch:
    """``pixels`` and ``captions`` of a batch."""
    return {
        "pixels": torch.stack([sample.pixels for sample in samples]),
        "captions": torch.tensor([len(sample.captions) for sample in samples]),
    }


@dataclass(frozen=True)
class CaptionCollate:
    """Samples → batch of a captioner: a row per caption; its last token also ends decoding."""

    tokenizer: Any
    start: tuple[int, ...]
    """Tokens before every caption, which are not learnt."""
    end: int
    padding: int
    max_tokens: int
    """Longest row, start and end included; what is longer is cut."""
    cut: str = ""
    """Characters to remove from the end of a caption, because the end token stands for them."""

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """The batch; labels are −100 where nothing is learnt."""
        texts = [caption.rstrip(self.cut) for sample in samples for caption in sample.captions]
        rows = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        room = self.max_tokens - len(self.start) - 1
        ids = [torch.tensor([*self.start, *row[:room], self.end]) for row in rows]
        input_ids = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.padding)
        lengths = torch.tensor([len(row) for row in ids])
        mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
        labels = input_ids.masked_fill(mask == 0, IGNORED)
        labels[:, : len(self.start)] = IGNORED
        return {**stack(samples), "input_ids": input_ids, "attention_mask": mask, "labels": labels}


class Task(nn.Module, ABC):
    """A model with its loss. Everything trained is a parameter of this module, so that wrapping it wraps it all.

    Attributes:
        model: The Hugging Face model.
        image: Size, filter, mean and deviation of its images.
        collate: Samples → batch; picklable, as it runs in the workers of a data loader.
        parts: Part → shell patterns of parameter names, for freezing and learning rates.
        one_caption: Whether a training image has one caption per epoch, in turn, instead of all.
    """

    one_caption: ClassVar[bool]
    parts: ClassVar[Mapping[str, str]]

    model: Any
    _mean: Tensor
    _std: Tensor

    def __init__(self, model: nn.Module, image: ImageSpec, collate: Collate, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.image, self.collate, self.tokenizer = model, image, collate, tokenizer
        # The recipe makes them again; they are not part of a checkpoint's weights.
        self.register_buffer("_mean", torch.tensor(image.mean).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(image.std).reshape(1, -1, 1, 1), persistent=False)

    def normalize(self, pixels: Tensor) -> Tensor:
        """Model input, float32 [B, 3, S, S], from uint8; the formula of the exported graph."""
        return (pixels.float() / 255 - self._mean) / self._std

    def after_step(self) -> None:
        """Called after an optimiser step."""

    def save(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write a checkpoint in Hugging Face layout, which ``rsedge export`` reads.

        Args:
            folder: An empty folder.
            state: This module's ``state_dict``, gathered from wherever its parts are.
        """
        self.model.save_pretrained(folder, state_dict=self.model_state(state))
        self.tokenizer.save_pretrained(folder)
        write_image_spec(folder, self.image, model_type=self.image_kind)

    @property
    def image_kind(self) -> str:
        """The model type whose image processor a checkpoint names."""
        return str(self.model.config.model_type)

    def model_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The part of ``state`` that is ``model``'s, under its own names."""
        return {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}


class CaptionTask(Task):
    """A captioner: the loss is a sum over caption tokens, divided by their number in the whole step."""

    one_caption: ClassVar[bool] = False

    def __init__(self, model: nn.Module, image: ImageSpec, collate: Collate, tokenizer: Any, recipe: Recipe) -> None:
        super().__init__(model, image, collate, tokenizer)
        self._max_tokens = recipe.model.max_tokens
        self._smoothing = recipe.caption.label_smoothing if recipe.caption else 0.0

    @abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """``loss_sum``: float32 [], the cross entropy of all caption tokens of ``batch``, added up."""

    def loss_sum(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """``loss_sum``, smoothed in training alone."""
        smoothing = self._smoothing if self.training else 0.0
        return {"loss_sum": caption_loss_sum(logits, labels, label_smoothing=smoothing)}

    @staticmethod
    def tokens(batch: Batch) -> int:
        """The number of tokens that ``loss_sum`` adds up."""
        return int((batch["labels"] != IGNORED).sum())

    @abstractmethod
    def generate(self, pixels: Tensor) -> list[str]:
        """Greedy captions of uint8 [B, 3, S, S]."""


class ContrastiveTask(Task):
    """A dual encoder: the loss is a function of the embeddings of the whole step."""

    one_caption: ClassVar[bool] = True
    text_rows: ClassVar[tuple[str, ...]] = ("text", "teacher_text", "sbert")
    """Outputs of ``forward`` with a row per caption."""
    rows: ClassVar[tuple[str, ...]] = ("image", "teacher_image", *text_rows)
    """Outputs of ``forward`` with a row per image or caption; the others are learnt scalars."""

    @abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """``image`` float32 [B, D] and ``text`` float32 [rows, D] of unit length, the teacher's, and learnt scalars."""

    @abstractmethod
    def loss(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``loss`` and its parts, from the outputs of a whole step put together. Uses no parameter of the module."""
