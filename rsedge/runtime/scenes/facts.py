"""What is known of a scene beside its pixels, and what its pixels say to that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from rasterio.errors import RasterioError
from rasterio.windows import Window

from rsedge.errors import OptionError
from rsedge.pixels import ReflectanceRule
from rsedge.runtime.scenes.products.sentinel2 import (
    OFFSET_TAGS,
    ProductName,
    acquisition_time,
    baseline_offset,
    declared_offset,
    parse_time,
)
from rsedge.runtime.scenes.rendering import (
    FLOATS,
    PixelValues,
    Rendering,
    guess_values,
    offset_conflict,
    offset_missing,
)

if TYPE_CHECKING:
    from rsedge.runtime.scenes.bands import BandChoice
    from rsedge.runtime.scenes.products.product import Product

_WINDOWS, _WINDOW_SIDE = 3, 256  # per axis; pixels
_OFFSET_SINCE = "2022-01-25"  # when products of baseline 04.00 began


@dataclass(frozen=True, slots=True)
class Facts:
    """What metadata and names say.

    Attributes:
        datetime: Acquisition time, RFC 3339 in UTC, or None.
        product_id, mgrs_tile: See ``Product``.
        boa_offset: What is to be added to digital numbers, or None where nothing says so.
        offset_reason: Where that comes from.
        quantification: Digital numbers per unit of reflectance.
    """

    datetime: str | None
    product_id: str | None
    mgrs_tile: str | None
    boa_offset: int | None
    offset_reason: str
    quantification: float


def known_facts(source: str, dataset: Any, choice: BandChoice, product: Product | None) -> Facts:
    """What the product, else the raster's own metadata, else its name says.

    Raises:
        SceneError: The bands declare offsets that differ.
    """
    name = ProductName.parse(product.product_id or product.name if product else Path(source).name)
    baseline = (product.baseline if product else None) or (name.baseline if name else None)
    offset, why, quantification = None, "nothing declares one", None
    if product is not None and product.boa_offset is not None:
        offset, why = product.boa_offset, "metadata of the product"
    elif product is None or not product.visual:
        indexes = [index - 1 for index in choice.indexes]
        tags = [dataset.tags(index + 1) for index in indexes]
        scaling = [(dataset.scales[index], dataset.offsets[index]) for index in indexes]
        declared = declared_offset(tags, scaling)
        if declared or any(tag.keys() & set(OFFSET_TAGS) for tag in tags):
            offset, why = declared, "metadata of the bands"
        if scaling[0][0] not in (0.0, 1.0):
            quantification = 1 / scaling[0][0]
    if offset is None and baseline is not None:
        offset = baseline_offset(baseline)
        why = f"processing baseline {baseline}" if offset is not None else why
    return Facts(
        datetime=(parse_time(product.datetime or "") if product else None)
        or acquisition_time({**dataset.tags(ns="IMAGERY"), **dataset.tags()}, Path(source).name),
        product_id=(product.product_id if product else None) or (name.product_id if name else None),
        mgrs_tile=(product.mgrs_tile if product else None) or (name.mgrs_tile if name else None),
        boa_offset=offset,
        offset_reason=why,
        quantification=(product.quantification if product else None) or quantification or 10000.0,
    )


def choose_rendering(
    dataset: Any,
    choice: BandChoice,
    nodata: Sequence[float | None],
    facts: Facts,
    *,
    boa_offset: int | None,
    values: PixelValues | None,
    source: str,
) -> tuple[Rendering, str, tuple[str, ...]]:
    """How pixels become 8-bit, why so, and what the user should know of it.

    Args:
        dataset: Open raster.
        choice: Its red, green and blue.
        nodata: Value of each that means no data, or None.
        facts: What is known of it.
        boa_offset: As the user gave it, or None.
        values: What floats are, as the user gave it, or None.
        source: What the user named, for messages.

    Raises:
        OptionError: ``boa_offset`` or ``values`` do not fit the raster.
    """
    dtype = dataset.dtypes[choice.indexes[0] - 1]
    floating = dtype in FLOATS
    problems = []
    if values is not None and not floating:
        problems.append(f"pixel values {values!r} are for floating-point rasters, but {source} is {dtype}")
    colours = dtype == "uint8" or choice.palette or values == "colours"
    if boa_offset and colours:
        problems.append(f"boa_offset {boa_offset} is for digital numbers, but {source} is {dtype}")
    if problems:
        raise OptionError("; ".join(problems) + ": leave it out")
    if dtype == "uint8" or choice.palette:
        return Rendering("colours", None), "8-bit colours as stored", ()
    why = "16-bit digital numbers"
    sample: list[npt.NDArray[Any]] | None = None
    if floating:
        if values is None:
            sample = _sample(dataset, choice, nodata)
            values, why = guess_values(sample)
        else:
            why = f"{values} as asked"
        if values == "colours":
            return Rendering("colours", None), why, ()
    scale = 10000 if values == "reflectance" else facts.quantification
    doubts: tuple[str, ...] = ()
    if boa_offset is not None:
        offset, reason = boa_offset, "as asked"
    elif values == "reflectance":
        offset, reason = 0, "reflectance has none"
    else:
        offset, reason, doubts = _checked_offset(
            facts, lambda: _sample(dataset, choice, nodata) if sample is None else sample, source
        )
    rule = ReflectanceRule(boa_offset=offset, full_scale=round(ReflectanceRule().full_scale * scale / 10000))
    return Rendering(values or "dn", rule), f"{why}; offset {offset}: {reason}", doubts


def _checked_offset(
    facts: Facts, sample: Callable[[], list[npt.NDArray[Any]]], source: str
) -> tuple[int, str, tuple[str, ...]]:
    """The offset that metadata state, checked on pixels where it can be wrong; why; and doubts."""
    offset = facts.boa_offset or 0
    suspicious = facts.boa_offset is None and (facts.datetime or "") >= _OFFSET_SINCE
    if not (offset or suspicious):
        return offset, facts.offset_reason, ()
    pixels = sample()
    if conflict := offset_conflict(pixels, offset):
        doubt = f"{source}: {conflict}; --boa-offset {offset} uses it all the same"
        return 0, "the pixels contradict the metadata", (doubt,)
    if suspicious and offset_missing(pixels, offset):
        doubt = (
            f"{source}: no digital number is below 1000 and nothing declares an offset: if the product is of "
            "processing baseline 04.00 or later, pass --boa-offset -1000"
        )
        return offset, facts.offset_reason, (doubt,)
    return offset, facts.offset_reason, ()


def _sample(dataset: Any, choice: BandChoice, nodata: Sequence[float | None]) -> list[npt.NDArray[Any]]:
    """Pixels that have data, per band, from windows spread over the raster; none where they cannot be read."""
    indexes = list(choice.indexes)
    found: list[list[npt.NDArray[Any]]] = [[] for _ in indexes]
    for top in _spread(dataset.height):
        for left in _spread(dataset.width):
            window = Window(left, top, min(_WINDOW_SIDE, dataset.width - left), min(_WINDOW_SIDE, dataset.height - top))
            try:
                planes = dataset.read(indexes, window=window)
            except RasterioError:
                continue  # its tiles will say so
            good = np.isfinite(planes).all(axis=0) & (planes != 0).any(axis=0)
            if all(value is not None for value in nodata):
                good &= (planes != np.array(nodata)[:, None, None]).any(axis=0)
            for part, plane in zip(found, planes, strict=True):
                part.append(plane[good])
    return [np.concatenate(parts) if parts else np.empty(0) for parts in found]


def _spread(size: int) -> list[int]:
    """Where windows begin along an axis of ``size`` pixels."""
    last = max(0, size - _WINDOW_SIDE)
    return sorted({last * step // (_WINDOWS - 1) // _WINDOW_SIDE * _WINDOW_SIDE for step in range(_WINDOWS)})
