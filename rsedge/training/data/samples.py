"""Training samples: which images a step trains on, and their pixels and captions as torch takes them.

The order is a pure function of seed and step, so that a run can go on at any of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rsedge.errors import BackendError, OptionError, SceneError
from rsedge.pixels import ImageSize, fit_image
from rsedge.texts import first_line
from rsedge.training.data.augment import choose_caption, sample_seed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rsedge.datasets.examples import Example
    from rsedge.manifest import ImageSpec
    from rsedge.training.recipe import Recipe

Position = tuple[int, int]
"""Epoch and index of an example."""


def derive(*parts: int | str) -> int:
    """A 63-bit seed from ``parts``, the same on every machine and in every process."""
    digest = blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True, slots=True)
class Order:
    """The order of a run.

    The images of a step are cut into chunks, the portions of one forward pass; a process works on neighbouring chunks.
    Neither the content of a step nor what is random about a chunk depends on the number of processes.

    Raises:
        OptionError: A step cannot be filled, or not be cut evenly.
    """

    examples: int
    """Number of training images."""
    batch_size: int
    """Images per step."""
    micro_batch_size: int
    """Images per chunk."""
    seed: int = 0
    """Of the order."""
    processes: int = 1
    process: int = 0
    """How many share the steps, and which one this is."""

    def __post_init__(self) -> None:
        if self.batch_size > self.examples:
            raise OptionError(
                f"loop.batch_size is {self.batch_size}, but there are {self.examples} training images: set it to "
                f"{self.examples} or less"
            )
        if self.batch_size % (self.micro_batch_size * self.processes):
            raise OptionError(
                f"loop.batch_size {self.batch_size} cannot be shared evenly by {self.processes} processes in portions "
                f"of loop.micro_batch_size {self.micro_batch_size}: make it a multiple of "
                f"{self.micro_batch_size * self.processes}"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Full steps of an epoch; the images left over differ from epoch to epoch."""
        return self.examples // self.batch_size

    @property
    def chunks(self) -> int:
        """Chunks of a step that this process works on."""
        return self.batch_size // (self.micro_batch_size * self.processes)

    def chunk_number(self, chunk: int) -> int:
        """The number, within the whole step, of this process's ``chunk``-th chunk."""
        return self.process * self.chunks + chunk

    def batches(self, start: int, stop: int) -> Iterator[list[Position]]:
        """The chunks of this process for steps ``start`` up to, not including, ``stop``: ``chunks`` lists per step."""
        known, permutation = -1, np.empty(0, np.int64)
        for step in range(start, stop):
            epoch, within = divmod(step, self.steps_per_epoch)
            if epoch != known:
                known, generator = epoch, np.random.Generator(np.random.Philox(derive("order", self.seed, epoch)))
                permutation = generator.permutation(self.examples)
            first = within * self.batch_size + self.chunk_number(0) * self.micro_batch_size
            for chunk in range(self.chunks):
                offset = first + chunk * self.micro_batch_size
                yield [(epoch, int(index)) for index in permutation[offset : offset + self.micro_batch_size]]


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a step."""

    pixels: Tensor
    """uint8 [3, S, S]. Augmented images are rounded too: the runtime knows 8-bit pixels only."""
    captions: tuple[str, ...]
    """All of the image's captions, or the one of this epoch."""


class TrainingSamples(Dataset[Sample]):
    """Samples by (epoch, index). Equal positions give equal samples in any process and any order.

    Args:
        examples: The training images.
        image: Size and filter of the model's images.
        recipe: For the seed, the augmentation of pixels, and the share of paraphrases.
        one_caption: Give one caption per epoch, in turn, instead of all.
    """

    def __init__(self, examples: Sequence[Example], image: ImageSpec, recipe: Recipe, *, one_caption: bool) -> None:
        self._examples, self._image, self._augmentation = tuple(examples), image, recipe.augmentation
        self._seed, self._one, self._probability = recipe.seed, one_caption, recipe.data.paraphrase_probability

    def __getitem__(self, position: Position) -> Sample:
        epoch, index = position
        example = self._examples[index]
        pixels = read_pixels(example, self._image)
        if self._augmentation is not None:
            changed = self._augmentation(pixels.float() / 255, seed=sample_seed(self._seed, epoch, example.key))
            pixels = (changed * 255).round().clamp(0, 255).to(torch.uint8)
        captions = example.captions
        if self._one:
            chance = self._probability
            captions = (choose_caption(example, epoch=epoch, seed=self._seed, paraphrase_probability=chance),)
        elif example.paraphrases and self._probability:
            draw = np.random.Generator(np.random.Philox(derive("paraphrases", self._seed, epoch, example.key)))
            captions = tuple(
                str(draw.choice(others)) if draw.random() < self._probability and others else caption
                for caption, others in zip(captions, example.paraphrases, strict=True)
            )
        return Sample(pixels, captions)

    def __len__(self) -> int:
        return len(self._examples)


class PlainSamples(Dataset[Sample]):
    """Samples by index, unchanged and with all captions, for evaluation."""

    def __init__(self, examples: Sequence[Example], image: ImageSpec) -> None:
        self._examples, self._image = tuple(examples), image

    def __getitem__(self, index: int) -> Sample:
        example = self._examples[index]
        return Sample(read_pixels(example, self._image), example.captions)

    def __len__(self) -> int:
        return len(self._examples)


def read_pixels(example: Example, image: ImageSpec) -> Tensor:
    """The image at the model's size, uint8 [3, S, S], by the code that the runtime uses."""
    pixels = fit_image(example.image.read(), ImageSize(image.size, image.resample, image.crop))
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def loaded(loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches of a loader.

    Raises:
        SceneError: An image cannot be read any more.
        BackendError: A worker was killed, which the system does where memory is short.
    """
    try:
        yield from loader
    except SceneError as error:  # a worker's comes with its traceback in the text
        raise SceneError(str(error).rpartition("SceneError: ")[2].strip()) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise BackendError(
            f"a process that reads images was killed ({first_line(error)}): memory or /dev/shm probably ran short; "
            "lower loop.batch_size or data.workers (0 reads in the training process); --resume goes on from the last "
            "checkpoint"
        ) from error
