"""How stored pixels become the 8-bit colours a model sees: one fixed rule per kind of pixel, and a check of the offset.

16-bit integers are reflectance as digital numbers; floats are told from a sample of the pixels, or by the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from rsedge.errors import OptionError

if TYPE_CHECKING:
    from rsedge.pixels import ReflectanceRule, UInt8

    UInt16 = npt.NDArray[np.uint16]

PixelValues = Literal["reflectance", "dn", "colours"]
PIXEL_VALUES: tuple[PixelValues, ...] = get_args(PixelValues)

INTEGERS = ("uint16", "int16")
FLOATS = ("float32", "float64")

_DN_PER_REFLECTANCE = 10000
_NEWER_OFFSET = -1000
# A share of pixels this far below zero reflectance is no noise: dark water scatters by a hundredth or two.
_IMPOSSIBLE, _IMPOSSIBLE_SHARE = -300, 0.02
_AT_ONCE = 2**18


@dataclass(frozen=True, slots=True)
class Rendering:
    """From stored pixels to 8-bit.

    Attributes:
        values: What the numbers are: ``reflectance`` from 0 to 1, ``dn`` (reflectance times 10,000), or ``colours``
            from 0 to 255.
        rule: From digital numbers to 8-bit; None for colours.
    """

    values: PixelValues
    rule: ReflectanceRule | None

    def apply(self, stored: npt.NDArray[Any]) -> UInt8:
        """8-bit values of the same shape; what is not finite gives any."""
        floating = stored.dtype.kind == "f"
        if self.rule is None:
            return _whole(stored, 1, 255).astype(np.uint8) if floating else stored.astype(np.uint8, copy=False)
        if not floating:
            return self.rule.apply(stored)
        return self.rule.apply(_whole(stored, _DN_PER_REFLECTANCE if self.values == "reflectance" else 1, 65535))

    def describe(self) -> str:
        """One line, as records carry it."""
        if self.rule is None:
            return "uint8 as stored"
        return self.rule.describe() + ("; DN = round(10000 * reflectance)" if self.values == "reflectance" else "")


class FastRule:
    """A rule for digital numbers at twice the speed of its table: a product and a sum in float32 instead of look-ups.

    Belongs to one thread, whose buffers it keeps.
    """

    def __init__(self, rule: ReflectanceRule) -> None:
        self._rule = rule
        self._line = _line(rule)
        if self._line is not None:
            # The limits as arrays, because NumPy compares with a single number five times as slowly.
            self._low, self._high = (np.full(_AT_ONCE, limit, np.uint16) for limit in (self._line.low, self._line.high))
            self._floats = np.empty(_AT_ONCE, np.float32)

    def apply(self, dn: UInt16, out: UInt8, least: int, most: int) -> None:
        """What ``ReflectanceRule.apply`` gives, to the last bit.

        Args:
            dn: uint16, contiguous, of any shape; overwritten.
            out: uint8 of the same shape, contiguous.
            least, most: The least and the greatest value in ``dn``.
        """
        line = self._line
        if line is None:
            out[...] = self._rule.apply(dn)
            return
        flat, result = dn.reshape(-1), out.reshape(-1)
        for first in range(0, flat.size, _AT_ONCE):
            part = flat[first : first + _AT_ONCE]
            if most > line.high:
                np.minimum(part, self._high[: part.size], out=part)
            if least < line.low:
                np.maximum(part, self._low[: part.size], out=part)
            floats = self._floats[: part.size]
            floats[...] = part
            floats *= line.slope
            floats += line.start
            result[first : first + _AT_ONCE] = floats


@dataclass(frozen=True, slots=True)
class _Line:
    """8-bit values as ``start + slope * DN``, cut to whole numbers, between ``low`` and ``high``; float32."""

    low: int
    high: int
    slope: np.float32
    start: np.float32

    def apply(self, dn: UInt16) -> UInt8:
        return (np.clip(dn, self.low, self.high).astype(np.float32) * self.slope + self.start).astype(np.uint8)


@lru_cache(maxsize=8)
def _line(rule: ReflectanceRule) -> _Line | None:
    """The line of a rule, or None where float32 would give another value for any digital number at all."""
    every = np.arange(65536, dtype=np.uint16)
    table = rule.apply(every)
    low = int(np.count_nonzero(table == table[0])) - 1
    high = 65536 - int(np.count_nonzero(table == table[-1]))
    slope = 254 / rule.full_scale
    # Exact values lie 1 / (2 * full_scale) apart: half of that more, and rounding errors of float32 cross none of them.
    start = 1.5 + slope * rule.boa_offset + 0.25 / rule.full_scale
    line = _Line(low, high, np.float32(slope), np.float32(start))
    return line if np.array_equal(line.apply(every), table) else None


def _whole(stored: npt.NDArray[Any], factor: int, most: int) -> npt.NDArray[np.uint16]:
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = np.nan_to_num(np.asarray(stored, np.float64) * factor, nan=0.0, posinf=0.0, neginf=0.0)
        return np.clip(np.floor(scaled + 0.5), 0, most).astype(np.uint16)


def guess_values(sample: Sequence[npt.NDArray[Any]]) -> tuple[PixelValues, str]:
    """What floats are, from pixels of the three bands, and why.

    Args:
        sample: Per band, any pixels that have data and are finite.

    Raises:
        OptionError: They fit nothing known.
    """
    pixels = np.concatenate([np.ravel(band) for band in sample]) if sample else np.empty(0)
    if not len(pixels):
        return "reflectance", "no pixel looked at has data: taken as reflectance from 0 to 1"
    high, most = float(np.quantile(pixels, 0.98)), float(pixels.max())
    shown = f"98 % of the pixels looked at are at most {high:.4g}"
    if high <= 2:
        return "reflectance", f"{shown}: reflectance from 0 to 1"
    if high <= 255 and most <= 255:
        return "colours", f"{shown}, none is above 255: colours"
    if high <= 30000:
        return "dn", f"{shown}: reflectance times 10,000"
    raise OptionError(
        f"{shown}, which is neither reflectance (0 to 1, or 0 to 10,000) nor a colour (0 to 255): say what it is with "
        f"--pixel-values {'|'.join(PIXEL_VALUES)}, or rescale it first with gdal_translate -scale"
    )


def offset_conflict(sample: Sequence[npt.NDArray[Any]], offset: int) -> str | None:
    """Why an offset cannot be right for these digital numbers, or None.

    Args:
        sample: Per band, pixels that have data.
        offset: Added to digital numbers, 0 or negative.
    """
    pixels = np.concatenate([np.ravel(band) for band in sample]) if sample else np.empty(0)
    if not len(pixels) or offset == 0:
        return None
    share = float(np.mean(pixels.astype(np.int64) + offset < _IMPOSSIBLE))
    if share <= _IMPOSSIBLE_SHARE:
        return None
    return (
        f"with the offset {offset} that its metadata declare, {share:.0%} of the pixels looked at would have a "
        f"reflectance below {_IMPOSSIBLE / _DN_PER_REFLECTANCE}: it was applied already, and 0 is used"
    )


def offset_missing(sample: Sequence[npt.NDArray[Any]], offset: int) -> bool:
    """Whether digital numbers look as if the offset of -1000 of newer products were still in them."""
    return (
        offset == 0
        and bool(sample)
        and all(len(band) > 0 and float(np.quantile(band, 0.001)) >= -_NEWER_OFFSET for band in sample)
    )
