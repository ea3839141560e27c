"""How stored pixels become the 8-bit colours a model sees: one fixed rule per kind of pixel.

16-bit integers are reflectance as digital numbers; :mod:`rsedge.runtime.scenes.facts` chooses what floats are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from rsedge.pixels import ReflectanceRule, UInt8

    UInt16 = npt.NDArray[np.uint16]

PixelValues = Literal["reflectance", "dn", "colours"]
PIXEL_VALUES: tuple[PixelValues, ...] = get_args(PixelValues)

INTEGERS = ("uint16", "int16")
FLOATS = ("float32", "float64")

_DN_PER_REFLECTANCE = 10000
_AT_ONCE = 2**18


@dataclass(frozen=True, slots=True)
class Rendering:
    """From stored pixels to 8-bit."""

    # what the numbers are: ``reflectance`` from 0 to 1, ``dn`` (reflectance times 10,000), or ``colours`` from 0
    # to 255
    values: PixelValues
    # from digital numbers to 8-bit: one for all bands, or one for each; none for colours
    rules: tuple[ReflectanceRule, ...] = ()

    def apply(self, stored: npt.NDArray[Any]) -> UInt8:
        """8-bit values of the same shape [K, h, w]; what is not finite gives any."""
        floating = stored.dtype.kind == "f"
        if not self.rules:
            return _whole(stored, 1, 255).astype(np.uint8) if floating else stored.astype(np.uint8, copy=False)
        numbers = stored
        if floating:
            numbers = _whole(stored, _DN_PER_REFLECTANCE if self.values == "reflectance" else 1, 65535)
        if len(self.rules) == 1:
            return self.rules[0].apply(numbers)
        return np.stack([rule.apply(plane) for rule, plane in zip(self.rules, numbers, strict=True)])

    def describe(self) -> str:
        """One line, as records carry it."""
        if not self.rules:
            return "uint8 as stored"
        described = list(dict.fromkeys(rule.describe() for rule in self.rules))
        text = described[0]
        if len(described) > 1:
            bands = zip(("red", "green", "blue"), self.rules, strict=True)
            text = "; ".join(f"{colour}: {rule.describe()}" for colour, rule in bands)
        return text + ("; DN = round(10000 * reflectance)" if self.values == "reflectance" else "")


class FastRule:
    """A rule for digital numbers at twice the speed of its table: a product and a sum in float32 instead of look-ups.

    Belongs to one thread, whose buffers it keeps.
    """

    def __init__(self, rule: ReflectanceRule) -> None:
        self._rule = rule
        self._line = _line(rule)
        if self._line is not None:
            # The limits as arrays, because NumPy compares with a single number five times as slowly.
            self._low, self._high = (np.full(_AT_ONCE, limit, np.uint16) for limit in self._line[:2])
            self._floats = np.empty(_AT_ONCE, np.float32)

    def apply(self, dn: UInt16, out: UInt8, least: int, most: int) -> None:
        """What ``ReflectanceRule.apply`` gives, to the last bit.

        Args:
            dn: uint16, contiguous, of any shape; overwritten.
            out: uint8 of the same shape, contiguous.
            least, most: The least and the greatest value in ``dn``.
        """
        if self._line is None:
            out[...] = self._rule.apply(dn)
            return
        low, high, slope, start = self._line
        flat, result = dn.reshape(-1), out.reshape(-1)
        for first in range(0, flat.size, _AT_ONCE):
            part = flat[first : first + _AT_ONCE]
            if most > high:
                np.minimum(part, self._high[: part.size], out=part)
            if least < low:
                np.maximum(part, self._low[: part.size], out=part)
            floats = self._floats[: part.size]
            floats[...] = part
            floats *= slope
            floats += start
            result[first : first + _AT_ONCE] = floats


@lru_cache(maxsize=8)
def _line(rule: ReflectanceRule) -> tuple[int, int, np.float32, np.float32] | None:
    """8-bit values as ``start + slope * DN``, cut to whole numbers, between two of them: low, high, slope, start.

    None where float32 would give another value for any digital number at all.
    """
    every = np.arange(65536, dtype=np.uint16)
    table = rule.apply(every)
    low = int(np.count_nonzero(table == table[0])) - 1
    high = 65536 - int(np.count_nonzero(table == table[-1]))
    # Exact values lie 1 / (2 * full_scale) apart: half of that more, and rounding errors of float32 cross none of them.
    slope = np.float32(254 / rule.full_scale)
    start = np.float32(1.5 + 254 / rule.full_scale * rule.boa_offset + 0.25 / rule.full_scale)
    result = (np.clip(every, low, high).astype(np.float32) * slope + start).astype(np.uint8)
    return (low, high, slope, start) if np.array_equal(result, table) else None


def _whole(stored: npt.NDArray[Any], factor: int, most: int) -> npt.NDArray[np.uint16]:
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = np.nan_to_num(np.asarray(stored, np.float64) * factor, nan=0.0, posinf=0.0, neginf=0.0)
        return np.clip(np.floor(scaled + 0.5), 0, most).astype(np.uint16)
