"""Random changes to training images and captions, decided by a seed of the sample alone.

The same sample in the same epoch is changed the same way, whatever the number of workers and the order of loading. The
settings import no torch; the operations are in :mod:`rsedge.training.data.augment_ops`.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rsedge.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor

    from rsedge.datasets.examples import Example

_RANGES = ("crop_scale", "crop_ratio", "rotation", "brightness", "contrast", "saturation", "hue", "sharpness", "blur")
# Field → lowest and highest value that makes sense in its range.
_LIMITS = {
    **dict.fromkeys(_RANGES, (0.0, math.inf)),
    "crop_scale": (0.0, 1.0),
    "rotation": (-360.0, 360.0),
    "hue": (-0.5, 0.5),
}
_NOT_ZERO = ("crop_scale", "crop_ratio", "blur")
_PROBABILITIES = ("probability", "horizontal_flip", "vertical_flip", "blur_probability")


@dataclass(frozen=True, slots=True)
class ImageAugmentation:
    """Random changes to one image, in the order of the fields; None switches one off.

    A range ``(low, high)`` is drawn from evenly. Factors are those of Pillow's ``ImageEnhance`` and of torchvision: 1
    changes nothing, 0 is black, mean grey, grey or smooth. Every change draws numbers of its own, so switching one on
    or off leaves the others as they were.

    Raises:
        OptionError: A range or a probability cannot be.
    """

    probability: float = 1.0
    """That an image is changed at all."""
    crop_scale: tuple[float, ...] | None = None
    """Share of the image's area that a crop keeps; the crop is resized to the whole (bilinear, antialias)."""
    crop_ratio: tuple[float, ...] = (1.0, 1.0)
    """Width over height of the crop, drawn evenly in the logarithm; what is wider or higher than the image is cut."""
    horizontal_flip: float | None = None
    vertical_flip: float | None = None
    """Probability of each flip."""
    rotation: tuple[float, ...] | None = None
    """Degrees, counter-clockwise, about the centre. Bilinear; the corners are filled by reflection, because black
    corners would look like missing data."""
    brightness: tuple[float, ...] | None = None
    contrast: tuple[float, ...] | None = None
    saturation: tuple[float, ...] | None = None
    """Factors."""
    hue: tuple[float, ...] | None = None
    """Share of the colour circle by which hues turn, -0.5 to 0.5."""
    sharpness: tuple[float, ...] | None = None
    """Factor."""
    blur: tuple[float, ...] | None = None
    """Standard deviation of a Gaussian in pixels."""
    blur_probability: float = 0.5
    """How often the blur is applied."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {value}: give a probability from 0 to 1"
            for name in _PROBABILITIES
            if (value := getattr(self, name)) is not None and not 0 <= value <= 1
        ]
        for name, (lowest, highest) in _LIMITS.items():
            value = getattr(self, name)
            if value is None:
                continue
            ordered = len(value) == 2 and lowest <= value[0] <= value[1] <= highest and math.isfinite(value[1])
            if not ordered or (name in _NOT_ZERO and value[0] == 0):
                least = "above 0" if name in _NOT_ZERO else f"from {lowest:g}"
                most = "" if math.isinf(highest) else f" to {highest:g}"
                problems.append(f"{name} is {list(value)}: give a lower and an upper number {least}{most}")
        if self.crop_scale is None and tuple(self.crop_ratio) != (1.0, 1.0):
            problems.append("crop_ratio is set but crop_scale is not: give both, or neither")
        if self.blur is None and self.blur_probability != 0.5:
            problems.append("blur_probability is set but blur is not: give both, or neither")
        if problems:
            raise OptionError("; ".join(problems))

    def __call__(self, image: Tensor, *, seed: int) -> Tensor:
        """The image, changed.

        Args:
            image: float32 [3, H, W], R, G, B, 0 to 1; stays as it is.
            seed: 0 to 2**64 - 1, of the sample and the epoch, see :func:`sample_seed`. Nothing else is random.

        Returns:
            float32 [3, H, W], 0 to 1; ``image`` itself where nothing was drawn.

        Raises:
            ValueError: ``image`` is of another shape or type.
        """
        from rsedge.training.data import augment_ops as ops

        if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
            raise ValueError(f"expected a float image [3, H, W], got {image.dtype} {list(image.shape)}")
        # The raw stream of Philox is fixed by its definition: no NumPy or torch release changes what a seed means.
        raw = np.random.Philox(key=seed).random_raw(len(_DRAWS))
        draw = {name: int(bits >> 11) / 2**53 for name, bits in zip(_DRAWS, raw.tolist(), strict=True)}
        if draw["probability"] >= self.probability:
            return image
        if self.crop_scale is not None:
            ratio = math.exp(_between(tuple(map(math.log, self.crop_ratio)), draw["crop_ratio"]))
            scale = _between(self.crop_scale, draw["crop_scale"])
            image = ops.resized_crop(image, scale, ratio, draw["crop_row"], draw["crop_column"])
        if draw["horizontal_flip"] < (self.horizontal_flip or 0):
            image = image.flip(2)
        if draw["vertical_flip"] < (self.vertical_flip or 0):
            image = image.flip(1)
        if self.rotation is not None:
            image = ops.rotate(image, _between(self.rotation, draw["rotation"]))
        for name, change in ops.COLOUR_CHANGES.items():
            limits = getattr(self, name)
            if limits is not None:
                image = change(image, _between(limits, draw[name]))
        if self.blur is not None and draw["blur_probability"] < self.blur_probability:
            image = ops.gaussian_blur(image, _between(self.blur, draw["blur"]))
        return image


# A number from 0 up to, not including, 1 each, at a place of its own in the random stream; new ones go to the end, so
# that old runs stay the same.
_DRAWS = (
    *("probability", "crop_scale", "crop_ratio", "crop_row", "crop_column", "horizontal_flip", "vertical_flip"),
    *("rotation", "brightness", "contrast", "saturation", "hue", "sharpness", "blur", "blur_probability"),
)


def _between(limits: tuple[float, ...], share: float) -> float:
    low, high = limits
    return low + (high - low) * share


def sample_seed(seed: int, epoch: int, key: str) -> int:
    """The seed of an example in an epoch, from the run's: 0 to 2**64 - 1, the same on every machine and Python."""
    return _hash(f"sample\0{seed}\0{epoch}\0{key}")


def choose_caption(example: Example, *, epoch: int, seed: int, paraphrase_probability: float = 0.0) -> str:
    """The caption of an example in an epoch.

    Captions take turns, from one that the seed and the key choose: any k epochs in a row show each of k captions once.
    Where the caption has paraphrases, one of them stands in for it with ``paraphrase_probability``.

    Raises:
        OptionError: The example has no caption.
    """
    if not example.captions:
        raise OptionError(f"{example.key} has no caption: it can be classified, but not trained on")
    turn = (_hash(f"first caption\0{seed}\0{example.key}") + epoch) % len(example.captions)
    others = example.paraphrases[turn] if example.paraphrases else ()
    if others:
        chance, choice = np.random.Philox(key=_hash(f"caption\0{seed}\0{epoch}\0{example.key}")).random_raw(2).tolist()
        if chance / 2**64 < paraphrase_probability:
            return others[int(choice) % len(others)]
    return example.captions[turn]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
