"""Pixels into models and embeddings out of them, alike in training, evaluation and runtime. NumPy and Pillow only.

A model must see at run time what it saw in training, so all of them call these functions and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from rsedge.errors import BundleError, OptionError

if TYPE_CHECKING:
    from rsedge.bundle import Bundle

UInt8 = npt.NDArray[np.uint8]

_DN_VALUES = 65536


@dataclass(frozen=True, slots=True)
class ReflectanceRule:
    """One fixed rule from Sentinel-2 digital numbers (DN) to 8-bit, never a stretch per scene.

    ``1 + 254 * (DN + boa_offset) / full_scale``, rounded half up, clipped to 1..255; 0 is left for no-data.
    With the defaults this is how ESA renders the true-colour image of an L2A product without an offset
    (measured on one: within 1 grey level wherever the TCI is neither resampled across saturation nor clipped).

    Raises:
        OptionError: ``boa_offset`` or ``full_scale`` is out of range.
    """

    boa_offset: int = 0
    """Added to every DN first: -1000 for processing baseline 04.00 and later, else 0."""
    full_scale: int = 2500
    """DN, after the offset, that becomes 255: 2500 is a reflectance of 0.25."""

    def __post_init__(self) -> None:
        if not -_DN_VALUES < self.boa_offset < _DN_VALUES:
            raise OptionError(
                f"boa_offset is {self.boa_offset}, expected -65535 to 65535: it is added to digital numbers; pass "
                "-1000 for Sentinel-2 products of processing baseline 04.00 and later, 0 before"
            )
        if not 0 < self.full_scale < _DN_VALUES:
            raise OptionError(f"full_scale is {self.full_scale}, expected 1 to {_DN_VALUES - 1}: pass 2500 for L2A")

    def apply(self, dn: npt.NDArray[np.uint16] | npt.NDArray[np.int16]) -> UInt8:
        """8-bit values, 1 to 255, for digital numbers of any shape; negative ones (int16) become 1. TypeError where
        they are neither uint16 nor int16.
        """
        if dn.dtype == np.int16:
            dn = np.maximum(dn, 0).astype(np.uint16)
        if dn.dtype != np.uint16:
            raise TypeError(f"digital numbers must be uint16 or int16, got {dn.dtype}")
        return _table(self.boa_offset, self.full_scale)[dn]

    def describe(self) -> str:
        """The rule as one line, recorded in manifests and summaries."""
        offset = f" {'-' if self.boa_offset < 0 else '+'} {abs(self.boa_offset)}"
        return f"uint8 = clip(round(1 + 254 * (DN{offset}) / {self.full_scale}), 1, 255)"

    def to_dict(self) -> dict[str, int]:
        """The fields, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ReflectanceRule:
        """The rule that ``to_dict`` gave ``values`` for."""
        return cls(**values)


@lru_cache(maxsize=8)
def _table(boa_offset: int, full_scale: int) -> UInt8:
    """The 8-bit value of each of the 65536 digital numbers."""
    dn = np.arange(_DN_VALUES, dtype=np.int64) + boa_offset
    # Whole numbers throughout: a half must round up on every machine.
    values = 1 + (2 * 254 * dn + full_scale) // (2 * full_scale)
    table = np.clip(values, 1, 255).astype(np.uint8)
    table.flags.writeable = False
    return table


def resize(image: UInt8, size: int, resample: str = "bicubic") -> UInt8:
    """The image, uint8 [H, W, 3], as [size, size, 3], by one of Pillow's filters, as image processors of transformers
    do it.

    ``resample`` is ``nearest``, ``bilinear``, ``bicubic`` (what BLIP and CLIP were trained with) or ``lanczos``. An
    image of that size already is returned as it is.
    """
    if image.shape[:2] == (size, size):
        return image
    return _resize(image, (size, size), resample)


def _resize(image: UInt8, sides: Sequence[int], resample: str) -> UInt8:
    return np.asarray(Image.fromarray(image).resize((sides[1], sides[0]), Image.Resampling[resample.upper()]))


@dataclass(frozen=True, slots=True)
class ImageSize:
    """Images that a model takes."""

    size: int
    """Side, pixels."""
    resample: str = "bicubic"
    """Filter that brings images to it, see :func:`resize`."""
    crop: bool = False
    """Whether the shorter side is brought to ``size`` and the middle cut out, as CLIP's image processor does; else both
    sides are brought to it."""
    resolution: tuple[float, float] | None = None
    """Least and greatest size of a pixel on the ground that the model was trained on, metres, or None."""


def fit_image(image: UInt8, wanted: ImageSize, metres: float | None = None) -> UInt8:
    """Bring a whole image, uint8 [H, W, 3], to what a model takes, [size, size, 3].

    A model that knows its ground resolution sees the image at that: an image of other known pixels is resampled, and
    one that then is smaller than ``size`` is mirrored at its edges, not blown up. Other images are resized.

    Args:
        image: The image.
        wanted: What the model takes.
        metres: Size of the image's pixels on the ground; None takes the model's own.
    """
    size, (height, width) = wanted.size, image.shape[:2]
    if wanted.resolution is not None:
        low, high = wanted.resolution
        scale = 1.0 if metres is None else metres / min(max(metres, low), high)
        scale = min(scale, max(1.0, size / max(height, width)))  # resized once, to no more than needed
        sides = [max(1, round(side * scale)) for side in (height, width)]
        if min(sides) < size:
            shrink = min(1.0, size / max(sides))
            sides = [max(1, round(side * shrink)) for side in sides]
            if sides != [height, width]:
                image = _resize(image, sides, wanted.resample)
            return np.pad(image, ((0, size - sides[0]), (0, size - sides[1]), (0, 0)), "symmetric")
    if not wanted.crop or height == width:
        return resize(image, size, wanted.resample)
    short = min(height, width)
    # As transformers computes it: the longer side is cut to a whole number.
    sides = [size if side == short else int(size * side / short) for side in (height, width)]
    top, left = (sides[0] - size) // 2, (sides[1] - size) // 2
    return _resize(image, sides, wanted.resample)[top : top + size, left : left + size]


def fitting_images(images: npt.NDArray[Any], size: int, resample: str) -> UInt8:
    """``images`` [B, H, W, 3] as uint8 [B, size, size, 3]; OptionError where they have another shape or type."""
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise OptionError(
            f"images are {images.dtype} {list(images.shape)}, expected uint8 [B, H, W, 3]; "
            "for one image pass image[None]"
        )
    if 0 in images.shape[1:3]:
        raise OptionError(f"images are {images.shape[1]} x {images.shape[2]} pixels: there is nothing to see")
    if images.shape[1:3] == (size, size):
        return images
    resized = [resize(image, size, resample) for image in images]
    return np.array(resized, np.uint8).reshape(len(images), size, size, 3)


def stack_images(images: Sequence[UInt8]) -> UInt8:
    """Images, uint8 [H, W, 3] of one size, as a contiguous batch uint8 [B, H, W, 3].

    Tiles come plane after plane in memory; ``np.stack`` would keep them so.
    """
    batch = np.empty((len(images), *images[0].shape), np.uint8)
    for into, image in zip(batch, images, strict=True):
        for channel in range(3):  # several times as fast as all at once
            into[..., channel] = image[..., channel]
    return batch


def check_image_spec(bundle: Bundle) -> None:
    """Refuse with BundleError a bundle made for other bands or another reflectance rule than this runtime has."""
    image = bundle.manifest.image
    rule, known = image.reflectance.get("full_scale"), ReflectanceRule().full_scale
    if image.bands != ("red", "green", "blue"):
        raise BundleError(f"{bundle.path} sees the bands {', '.join(image.bands)}; this rsedge reads red, green, blue")
    if rule not in (None, known):
        raise BundleError(f"{bundle.path} was made for reflectance with full scale {rule}; this rsedge uses {known}")


def unit_rows(vectors: npt.NDArray[np.floating[Any]], what: str) -> npt.NDArray[np.float32]:
    """Each row of float [N, D] over its length, float32.

    ``what`` they are embeddings of stands in the message of the OptionError that a row raises which is zero or not
    finite: it has no direction, hence no similarity.
    """
    values = np.asarray(vectors, np.float64)
    length = np.linalg.norm(values, axis=-1, keepdims=True)
    if bad := np.flatnonzero(~(np.isfinite(length) & (length > 0))).tolist():
        raise OptionError(
            f"{len(bad)} of {len(values)} {what} embeddings are zero or not finite, the first is number {bad[0]}: "
            "the model is broken, or overflows in this precision"
        )
    return np.asarray(values / length, np.float32)
