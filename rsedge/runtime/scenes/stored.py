"""Stored pixels of a scene and their validity, decided here alone: sampling, resampling and reading all use it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from rasterio.enums import Resampling
from rasterio.windows import Window

from rsedge.runtime.scenes.products.product import PER_BAND

if TYPE_CHECKING:
    from rsedge.runtime.scenes.composite import CloudReader, PlacedBand

Mask = npt.NDArray[np.bool_]
Stored = npt.NDArray[Any]

_AT_ONCE = 2**22  # stored pixels that are resampled together


@dataclass(frozen=True, slots=True)
class Validity:
    """Rules for stored pixels without data. A pixel is empty if any rule applies."""

    nodata: tuple[float | None, ...] = ()
    """Per band the value that means no data, or None. A pixel is empty if all bands have theirs."""
    zero: bool = False
    """Whether 0 in all bands is no data although nothing declares it: so it is in reflectance."""
    least: float | None = None
    """Value below which all bands of a pixel are no measurement: -9999 and the like are often not declared."""
    mask_band: int | None = None
    """Number of an alpha band, 0 for a mask of the whole dataset, ``PER_BAND`` for masks of the bands, any of which
    empties a pixel, or None."""


class StoredPixels:
    """Reads stored bands with their validity; belongs to one thread.

    Args:
        dataset: Open rasterio dataset, or composite.
        bands: Numbers of the bands, from 1.
        rules: Rules for pixels without data.
        beside: Masks beside the file on the dataset's grid, 0 where there is no data: none, one, or one per band.
        classes: Scene classification on the dataset's grid whose no-data is the scene's, or None.
        palette: uint8 [65536, 4], R, G, B, A by index if the one band holds indexes; then :meth:`read` returns colours.
    """

    def __init__(
        self,
        dataset: Any,
        bands: Sequence[int],
        rules: Validity,
        *,
        beside: Sequence[PlacedBand] = (),
        classes: CloudReader | None = None,
        palette: npt.NDArray[np.uint8] | None = None,
    ) -> None:
        self._dataset, self._bands, self._rules = dataset, list(bands), rules
        self._beside, self._classes, self._palette = beside, classes, palette
        self.size = dataset.height, dataset.width
        self._dtype = np.dtype(dataset.dtypes[bands[0] - 1])
        self._memory = np.empty(0, self._dtype)
        # Values of the bands of a pixel without data.
        self._values: list[tuple[Any, ...]] = []
        if rules.nodata and None not in rules.nodata:
            self._values.append(tuple(self._dtype.type(value) for value in rules.nodata))
        if rules.zero:
            self._values.append((self._dtype.type(0),) * len(bands))

    def read(self, window: Window) -> tuple[Stored, Mask | None, tuple[Any, Any]]:
        """Return values [K, h, w], valid until the next call, the mask of pixels without data, bool [h, w], or None if
        there are none, and the least and greatest value.

        Raises:
            rasterio.errors.RasterioError: The pixels cannot be read.
        """
        # 1. The values.
        height, width = int(window.height), int(window.width)
        count = height * width * len(self._bands)
        if self._memory.size < count:
            self._memory = np.empty(count, self._dtype)
        stored: Stored = self._memory[:count].reshape(len(self._bands), height, width)
        self._dataset.read(self._bands, window=window, out=stored)
        flat = stored.reshape(-1)
        extremes = (flat.min(), flat.max())
        # 2. No data by value.
        empty: Mask | None = None
        if stored.dtype.kind == "f" and not np.isfinite(extremes).all():
            empty = np.asarray(~np.isfinite(stored).all(axis=0))
        if self._rules.least is not None and not extremes[0] >= self._rules.least:
            empty = either(empty, np.asarray((stored < self._rules.least).all(axis=0)))
        for values in self._values:
            empty = either(empty, where(stored, values, extremes))
        # 3. No data by a mask, a class, or a transparent colour.
        empty = either(empty, self._masked(window))
        if self._classes is not None:
            empty = either(empty, self._classes.read(window)[1])
        if self._palette is not None:
            colours = self._palette[stored[0]]
            stored, empty = np.moveaxis(colours[..., :3], 2, 0), either(empty, colours[..., 3] == 0)
        return stored, empty, extremes

    def _masked(self, window: Window) -> Mask | None:
        """Which pixels have no data by another band or a mask; None if there is neither."""
        band = self._rules.mask_band
        found: Mask
        if band == PER_BAND:
            found = (self._dataset.read_masks(self._bands, window=window) == 0).any(axis=0)
        elif band == 0:
            found = self._dataset.read_masks(self._bands[0], window=window) == 0
        elif band is not None:
            found = self._dataset.read(band, window=window) == 0
        elif not self._beside:
            return None
        else:
            found = np.zeros((int(window.height), int(window.width)), np.bool_)
            for mask in self._beside:
                stored = np.empty(found.shape, mask.dtype)
                mask.read(window, stored, outside=0, resampling=Resampling.nearest)
                found |= stored == 0
        return found


class Resampled:
    """Reads stored pixels at another size: means of the pixels that have data. Belongs to one thread.

    Values do not depend on the window that a pixel is read with.

    Args:
        stored: Pixels as stored.
        factors: Stored pixels per pixel, down and across.
        method: ``average``: mean weighted by area, empty where no pixel has data; ``bilinear``: empty where the nearest
            pixel is; ``nearest``.
    """

    def __init__(
        self, stored: StoredPixels, factors: tuple[float, float], method: Literal["average", "bilinear", "nearest"]
    ) -> None:
        self._stored, self._factors, self._method = stored, factors, method

    def read(self, window: Window) -> tuple[Stored, Mask | None, tuple[Any, Any]]:
        """Return what :meth:`StoredPixels.read` returns, for a window of the resampled pixels."""
        top, height = int(window.row_off), int(window.height)
        across = taps(int(window.col_off), int(window.width), self._factors[1], self._stored.size[1], self._method)
        lines = max(1, int(_AT_ONCE / (self._factors[0] * len(across[1]) * max(self._factors[1], 1))))
        parts, masks = [], []
        for first in range(top, top + height, lines):
            down = taps(first, min(lines, top + height - first), self._factors[0], self._stored.size[0], self._method)
            values, empty = self._mean(down, across)
            parts.append(values)
            masks.append(empty)
        values, empty = np.concatenate(parts, axis=1), np.concatenate(masks)
        return values, empty if empty.any() else None, (values.min(), values.max())

    def _mean(self, down: Taps, across: Taps) -> tuple[Stored, Mask]:
        # 1. The stored pixels under the window, and 1 for those with data.
        (rows, row_weights), (columns, column_weights) = down, across
        first_row, first_column = int(rows.min()), int(columns.min())
        last_row, last_column = int(rows.max()) + 1, int(columns.max()) + 1
        window = Window(first_column, first_row, last_column - first_column, last_row - first_row)
        stored, empty, _ = self._stored.read(window)
        kind = stored.dtype
        good = np.ones(stored.shape[1:]) if empty is None else (~empty).astype(np.float64)
        values = np.where(good > 0, stored, 0).astype(np.float64)
        # 2. Sums along lines, then across, of values and of weights.
        planes = np.concatenate([values, good[None]])
        rows, columns = rows - first_row, columns - first_column
        narrow = np.zeros((len(planes), len(rows), planes.shape[2]))
        for tap in range(rows.shape[1]):
            narrow += planes[:, rows[:, tap]] * row_weights[:, tap, None]
        sums = np.zeros((len(planes), len(rows), len(columns)))
        for tap in range(columns.shape[1]):
            sums += narrow[..., columns[:, tap]] * column_weights[:, tap]
        total = sums[-1]
        # 3. Their ratio, in the stored type.
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.where(total > 0, sums[:-1] / total, 0)
        without = total <= 0
        if self._method == "bilinear" and empty is not None:  # data do not grow over their edge
            nearest = [index[np.arange(len(index)), weights.argmax(axis=1)] for index, weights in
                       ((rows, row_weights), (columns, column_weights))]  # fmt: skip
            without |= empty[np.ix_(*nearest)]
        if kind.kind != "f":
            mean = np.floor(mean + 0.5)
        return mean.astype(kind), without


Taps = tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]
"""Along an axis, per pixel the stored pixels that it is made of, and their weights, both [n, taps]."""


@lru_cache(maxsize=64)
def taps(first: int, count: int, factor: float, size: int, method: str) -> Taps:
    """Return the stored pixels under ``count`` pixels from ``first`` on, and their weights.

    Args:
        first, count: Pixels along the axis.
        factor: Stored pixels per pixel.
        size: Stored pixels along the axis; pixels beyond have weight 0.
        method: See :class:`Resampled`.
    """
    at = np.arange(first, first + count, dtype=np.float64)
    if method == "average":
        begin, end = at * factor, np.minimum((at + 1) * factor, size)
        most = math.ceil(factor) + 1
        index = np.floor(begin + 1e-9).astype(np.int64)[:, None] + np.arange(most)
        weights = np.clip(np.minimum(index + 1, end[:, None]) - np.maximum(index, begin[:, None]), 0, 1)
        weights[weights < 1e-9] = 0
    elif method == "bilinear":
        centre = (at + 0.5) * factor - 0.5
        lower = np.floor(centre)
        index = lower.astype(np.int64)[:, None] + np.arange(2)
        upper = (centre - lower)[:, None]
        weights = np.concatenate([1 - upper, upper], axis=1)
    else:
        index = np.floor((at + 0.5) * factor).astype(np.int64)[:, None]
        weights = np.ones((count, 1))
    return np.clip(index, 0, size - 1), weights


def where(stored: Stored, values: tuple[Any, ...], extremes: tuple[Any, Any]) -> Mask | None:
    """Return where bands [K, h, w] have their values, K of them; None if their extremes exclude it."""
    if min(values) < extremes[0] or max(values) > extremes[1]:
        return None
    found: Mask = stored[0] == values[0]
    for band, value in zip(stored[1:], values[1:], strict=True):
        if not found.any():
            return None
        found &= band == value
    return found


def either(one: Mask | None, other: Mask | None) -> Mask | None:
    """Return where one of two masks is True; None is a mask that is False throughout."""
    if one is None or other is None:
        return other if one is None else one
    return one | other
