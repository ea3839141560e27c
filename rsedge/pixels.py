"""Pixel code shared by training and runtime: reflectance to 8-bit, and resizing. NumPy and Pillow only.

A model must see at run time what it saw in training, so both worlds call these functions and nothing else.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from rsedge.errors import OptionError

UInt8 = npt.NDArray[np.uint8]

_DN_VALUES = 65536


@dataclass(frozen=True, slots=True)
class ReflectanceRule:
    """One fixed rule from Sentinel-2 digital numbers (DN) to 8-bit, never a stretch per scene.

    ``1 + 254 * (DN + boa_offset) / full_scale``, rounded half up, clipped to 1..255; 0 is left for no-data.
    With the defaults this is how ESA renders the true-colour image of an L2A product without an offset
    (measured on one: within 1 grey level wherever the TCI is neither resampled across saturation nor clipped).

    Attributes:
        boa_offset: Added to every DN first: -1000 for processing baseline 04.00 and later, else 0.
        full_scale: DN, after the offset, that becomes 255: 2500 is a reflectance of 0.25.

    Raises:
        OptionError: ``boa_offset`` is positive, or ``full_scale`` is not.
    """

    boa_offset: int = 0
    full_scale: int = 2500

    def __post_init__(self) -> None:
        if not -_DN_VALUES < self.boa_offset <= 0:
            raise OptionError(
                f"boa_offset is {self.boa_offset}, but it is added to the digital numbers and must be 0 or negative: "
                "pass -1000 for processing baseline 04.00 and later, 0 before"
            )
        if not 0 < self.full_scale < _DN_VALUES:
            raise OptionError(f"full_scale is {self.full_scale}, expected 1 to {_DN_VALUES - 1}: pass 2500 for L2A")

    def apply(self, dn: npt.NDArray[np.uint16] | npt.NDArray[np.int16]) -> UInt8:
        """8-bit values, 1 to 255, for digital numbers of any shape; negative ones (int16) become 1.

        Raises:
            TypeError: ``dn`` is neither uint16 nor int16.
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
    """The image as a square of ``size`` pixels, by one of Pillow's filters, as image processors of transformers do it.

    Args:
        image: uint8 [H, W, 3].
        size: Height and width of the result in pixels.
        resample: ``nearest``, ``bilinear``, ``bicubic`` (what BLIP and CLIP were trained with) or ``lanczos``.

    Returns:
        uint8 [size, size, 3]; ``image`` itself where it has that size already.
    """
    if image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling[resample.upper()]))
