"""Examples as torch wants them: pixels of the model's size, augmented by position, and the captions of the epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from rsedge.pixels import resize
from rsedge.training.data.augment import ImageAugmentation, choose_caption, sample_seed
from rsedge.training.data.order import Position, derive

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rsedge.datasets.examples import Example
    from rsedge.manifest import ImageSpec


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a step."""

    key: str
    """Of the example."""
    pixels: Tensor
    """uint8 [3, S, S]. Augmented images are rounded too: the runtime knows 8-bit pixels only."""
    captions: tuple[str, ...]
    """All of the image's captions, or the one of this epoch."""


class TrainingSamples(Dataset[Sample]):
    """Samples by (epoch, index). Equal positions give equal samples, in whichever process and order they are asked for.

    Args:
        examples: The training images.
        image: Size and filter of the model's images.
        augmentation: Of the pixels; None: none.
        seed: Of augmentation and choice.
        one_caption: Give one caption per epoch, in turn, instead of all.
        paraphrase_probability: How often a caption is replaced by one of its paraphrases.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        image: ImageSpec,
        *,
        augmentation: ImageAugmentation | None,
        seed: int,
        one_caption: bool,
        paraphrase_probability: float,
    ) -> None:
        self._examples, self._image, self._augmentation = tuple(examples), image, augmentation
        self._seed, self._one, self._probability = seed, one_caption, paraphrase_probability

    def __getitem__(self, position: Position) -> Sample:
        epoch, index = position
        example = self._examples[index]
        pixels = read_pixels(example, self._image)
        if self._augmentation is not None:
            changed = self._augmentation(pixels.float() / 255, seed=sample_seed(self._seed, epoch, example.key))
            pixels = (changed * 255).round().clamp(0, 255).to(torch.uint8)
        captions = example.captions
        if self._one:
            captions = (
                choose_caption(example, epoch=epoch, seed=self._seed, paraphrase_probability=self._probability),
            )
        elif example.paraphrases and self._probability:
            draw = np.random.Generator(np.random.Philox(derive("paraphrases", self._seed, epoch, example.key)))
            captions = tuple(
                str(draw.choice(others)) if draw.random() < self._probability and others else caption
                for caption, others in zip(captions, example.paraphrases, strict=True)
            )
        return Sample(example.key, pixels, captions)

    def __len__(self) -> int:
        return len(self._examples)


class PlainSamples(Dataset[Sample]):
    """Samples by index, unchanged and with all captions, for evaluation."""

    def __init__(self, examples: Sequence[Example], image: ImageSpec) -> None:
        self._examples, self._image = tuple(examples), image

    def __getitem__(self, index: int) -> Sample:
        example = self._examples[index]
        return Sample(example.key, read_pixels(example, self._image), example.captions)

    def __len__(self) -> int:
        return len(self._examples)


def read_pixels(example: Example, image: ImageSpec) -> Tensor:
    """The image at the model's size, uint8 [3, S, S], by the code that the runtime uses."""
    pixels = resize(example.image.read(), image.size, image.resample)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
