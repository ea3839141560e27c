"""What metadata, names and a few pixels say of a raster: its red, green and blue, its time, what its numbers are.

Pixels are read where they must be asked what they are: of floats, and where an offset can be wrong.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
from rasterio.errors import RasterioError
from rasterio.windows import Window

from rsedge.errors import OptionError, SceneError
from rsedge.pixels import ReflectanceRule
from rsedge.runtime.scenes.products.sentinel2 import (
    OFFSET_TAGS,
    ProductName,
    acquisition_time,
    baseline_offset,
    parse_time,
)
from rsedge.runtime.scenes.rendering import FLOATS, INTEGERS, PIXEL_VALUES, PixelValues, Rendering
from rsedge.runtime.scenes.sensors import (
    INSTRUMENT_TAGS,
    NAME_TAGS,
    NUMBERS_ALONE,
    PLATFORM_TAGS,
    ROLES,
    SENTINEL2,
    BandText,
    Sensor,
    candidates,
    find_colours,
    known_sensor,
    to_micrometres,
)
from rsedge.texts import in_a_line

if TYPE_CHECKING:
    from rsedge.runtime.scenes.products.product import Product
    from rsedge.runtime.scenes.stored import StoredPixels

T = TypeVar("T")

_MOST_SHOWN = 20  # bands in a message
_WINDOWS, _WINDOW_SIDE = 3, 256  # per axis; pixels
_LANDSAT_SCALE = "scale of Landsat Collection 2, level 2"
_LANDSAT_REFLECTANCE = re.compile(r"L[COTE]0[4-9]_L2S[PR]_\d{6}_\d{8}_\d{8}_02_", re.IGNORECASE)
_OFFSET_SINCE = "2022-01-25"  # when products of baseline 04.00 began
_NEWER_OFFSET = -1000
# A share of pixels this far below zero reflectance is no noise: dark water scatters by a hundredth or two.
_IMPOSSIBLE, _IMPOSSIBLE_SHARE = -0.03, 0.02


# Bands


@dataclass(frozen=True, slots=True)
class BandChoice:
    """The bands to read and why."""

    indexes: tuple[int, ...]  # 1-based band numbers of red, green and blue; a single one for a palette
    reason: str  # why, as one clause
    palette: bool = False  # true where the one band holds indexes into a colour table
    doubt: str | None = None  # what the user should know of the choice


def choose_bands(
    source: str, dataset: Any, product: Product | None, wanted: Sequence[int] | None
) -> tuple[BandChoice, str]:
    """The bands to read, and NumPy's name of their type.

    Args:
        source: What the user named, for messages.
        dataset: Open raster.
        product: Its product, or None.
        wanted: Numbers of red, green and blue as the user gave them, or None.

    SceneError where that is unclear or their type is not read, OptionError where ``wanted`` are not three bands.
    """
    descriptions, colours = dataset.descriptions, [colour.name for colour in dataset.colorinterp]
    choice: BandChoice | None
    if product is not None:
        same = len({file.path for file in product.bands.values()}) == 1
        indexes = tuple(product.bands[role].band for role in ROLES) if same else (1, 2, 3)
        choice = BandChoice(indexes, product.reason)
    elif wanted is not None:
        indexes = tuple(wanted)
        listed = ",".join(map(str, indexes))
        if len(indexes) != 3 or any(not 1 <= number <= dataset.count for number in indexes):
            raise OptionError(
                f"bands {listed}: expected three numbers from 1 to {dataset.count} for red, green and blue, such as "
                "--bands 3,2,1"
            )
        usual, doubt = _find_bands(source, dataset, colours), None
        if usual is not None and not usual.palette and usual.indexes != indexes:
            own = ",".join(map(str, usual.indexes))
            doubt = (
                f"{source}: bands {listed} are not its true colour, {own} ({usual.reason}): leave --bands out for that"
            )
        choice = BandChoice(indexes, f"bands {listed} as asked", doubt=doubt)
    else:
        choice = _find_bands(source, dataset, colours)
    dtypes = {dataset.dtypes[index - 1] for index in (choice.indexes if choice else dataset.indexes)}
    dtype = dataset.dtypes[(choice.indexes[0] if choice else 1) - 1]
    problems = []
    if choice is None:
        bands = enumerate(zip(descriptions, colours, strict=True), 1)
        found = [f"{index} ({description or 'no description'}, {colour})" for index, (description, colour) in bands]
        known = candidates(band_texts(dataset)) or "--bands 1,2,3"
        advice = f"name them: --bands R,G,B with their numbers, such as {known}"
        if len(found) < 3:
            sensor = raster_sensor(source, dataset) or SENTINEL2
            files = " ".join(f"B{number}.tif" for number in sensor.numbers or ()) or "RED.tif GREEN.tif BLUE.tif"
            advice = f"stack red, green and blue first, of {sensor.name}: gdalbuildvrt -separate rgb.vrt {files}"
        listed = in_a_line(found, _MOST_SHOWN)
        problems.append(f"it is unclear which bands are red, green and blue among {listed}; {advice}")
    if len(dtypes) > 1 or dtype not in ("uint8", *INTEGERS, *FLOATS):
        flags = " ".join(f"-b {index}" for index in choice.indexes) if choice else "-b R -b G -b B"
        problems.append(
            f"its bands are {' and '.join(sorted(dtypes))}, and rsedge reads uint8 colours or uint16 and int16 "
            "reflectance (DN = reflectance * 10000); convert it first, for reflectance from 0 to 1: "
            f"gdal_translate -ot UInt16 -scale 0 1 0 10000 {flags} {shlex.quote(source)} rgb.tif; "
            "for other values: -ot Byte -scale BLACK WHITE 1 255"
        )
    if choice is None or problems:
        raise SceneError(f"{source}: " + "; ".join(problems))
    return choice, dtype


def _find_bands(source: str, dataset: Any, colours: Sequence[str]) -> BandChoice | None:
    """The RGB bands by what names, metadata and colour interpretation (lower-case names) say, or None."""
    if found := find_colours(band_texts(dataset), raster_sensor(source, dataset)):
        alone = (
            f"{source}: nothing names its sensor, and its bands 4, 3, 2 are taken as red, green and blue: pass --bands "
            "if it is of Landsat 4–7 or PlanetScope, whose band 4 is infrared"
        )
        return BandChoice(*found, doubt=alone if found[1].startswith(NUMBERS_ALONE) else None)
    data = [index for index, colour in enumerate(colours, 1) if colour != "alpha"]
    if len(data) == 1 and colours[data[0] - 1] == "palette":
        try:
            dataset.colormap(data[0])
        except ValueError:  # its colour table is missing or cut off
            return None
        return BandChoice((data[0],), f"band {data[0]} is a palette, expanded to its colours", palette=True)
    if len(data) == 1 and dataset.dtypes[data[0] - 1] == "uint8":
        return BandChoice((data[0],) * 3, f"band {data[0]} is the only one: grey, taken as red, green and blue")
    return None


def band_texts(dataset: Any) -> list[BandText]:
    """What names and metadata of the bands of an open raster say."""
    texts = []
    for index, (name, colour) in enumerate(zip(dataset.descriptions, dataset.colorinterp, strict=True), 1):
        imagery = dataset.tags(index, ns="IMAGERY").get("CENTRAL_WAVELENGTH_UM")
        tags = {key.lower(): value for key, value in dataset.tags(index).items()}
        length = to_micrometres(_float(imagery), "µm")
        unit = tags.get("wavelength_units", tags.get("wavelength_unit", ""))
        for key in ("wavelength", "center_wavelength", "central_wavelength", "centre_wavelength"):
            length = length or to_micrometres(_float(tags.get(key)), unit)
        texts.append(BandText(name or tags.get("band_name", ""), colour.name, length))
    return texts


def raster_sensor(source: str, dataset: Any) -> Sensor | None:
    """The sensor that the metadata of an open raster name, else its file name."""
    tags = {key.lower(): value for ns in (None, "IMAGERY") for key, value in dataset.tags(ns=ns).items()}
    platforms, names, instruments = (
        [tags.get(tag) for tag in of] for of in (PLATFORM_TAGS, NAME_TAGS, INSTRUMENT_TAGS)
    )
    return known_sensor(platforms, [*names, Path(source).stem], instruments)


def _float(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


# Metadata


@dataclass(frozen=True, slots=True)
class Facts:
    """What metadata and names say."""

    datetime: str | None  # acquisition time, RFC 3339 in UTC, or None
    product_id: str | None  # and mgrs_tile: see ``Product``
    mgrs_tile: str | None
    # what is to be added to digital numbers, one number for all bands or one for each; None where nothing says so
    offsets: tuple[int, ...] | None
    offset_reason: str  # where that comes from
    quantifications: tuple[float, ...]  # digital numbers per unit of reflectance, one or one for each band
    sentinel2: bool  # false if metadata name another sensor


def known_facts(source: str, dataset: Any, choice: BandChoice, product: Product | None) -> Facts:
    """What the product, else the raster's own metadata, else its name says; SceneError where an offset is no number."""
    name = ProductName.parse(product.product_id or product.name if product else Path(source).name)
    baseline = (product.baseline if product else None) or (name.baseline if name else None)
    sensor = raster_sensor(source, dataset) if product is None else None
    sentinel2 = product.sentinel2 if product else sensor in (None, SENTINEL2)
    if not sentinel2:
        baseline = None  # whatever its file is called
    offsets: tuple[int, ...] | None = None
    why = "nothing declares one"
    quantifications: tuple[float, ...] = (10000.0,)
    if product is not None and product.quantification is not None:
        quantifications = _each(product.quantification)
    if product is not None and product.boa_offset is not None:
        offsets, why = _each(product.boa_offset), "metadata of the product"
    elif product is None or not product.visual:
        tags = [dataset.tags(index) for index in choice.indexes]
        scaling, said = _scaling(product.name if product else source, dataset, choice.indexes)
        found = []
        stated = {tag[name] for tag in tags for name in OFFSET_TAGS if name in tag}
        if len(stated) > 1:
            listed = ", ".join(sorted(stated))
            raise SceneError(f"the bands declare different offsets ({listed}), which Sentinel-2 has not: correct them")
        for tag, (scale, shift) in zip(tags, scaling, strict=True):
            text = next((tag[name] for name in OFFSET_TAGS if name in tag), None)
            try:
                found.append(round(float(text)) if text is not None else round(shift / scale))
            except (ValueError, OverflowError) as error:
                raise SceneError(
                    f"a band declares the offset {text!r}, which is no number: pass --boa-offset"
                ) from error
        if any(found) or any(tag.keys() & set(OFFSET_TAGS) for tag in tags):
            offsets, why = _each(tuple(found)), said
        scales = [scale for scale, _ in scaling]
        if any(scale != 1.0 for scale in scales) and (product is None or product.quantification is None):
            if any(scale <= 0 or not math.isfinite(1 / scale) for scale in scales):
                raise SceneError(f"the bands declare the scales {scales}, expected numbers above 0: correct them")
            quantifications = _each(tuple(1 / scale for scale in scales))
    if offsets is None and baseline is not None and (offset := baseline_offset(baseline)) is not None:
        offsets, why = (offset,), f"processing baseline {baseline}"
    return Facts(
        datetime=(parse_time(product.datetime or "") if product else None)
        or acquisition_time({**dataset.tags(ns="IMAGERY"), **dataset.tags()}, Path(source).name),
        product_id=(product.product_id if product else None) or (name.product_id if name else None),
        mgrs_tile=(product.mgrs_tile if product else None) or (name.mgrs_tile if name else None),
        offsets=offsets,
        offset_reason=why,
        quantifications=quantifications,
        sentinel2=sentinel2,
    )


def _scaling(name: str, dataset: Any, indexes: Sequence[int]) -> tuple[list[tuple[float, float]], str]:
    """GDAL's scale and offset of bands, reflectance = DN · scale + offset, and what says so; Landsat's, if none is."""
    scaling = [(dataset.scales[index - 1] or 1.0, dataset.offsets[index - 1]) for index in indexes]
    names = f"{dataset.tags().get('LANDSAT_PRODUCT_ID', '')} {Path(name).name}"
    if (
        set(scaling) == {(1.0, 0.0)}
        and dataset.dtypes[indexes[0] - 1] == "uint16"
        and _LANDSAT_REFLECTANCE.search(names)
    ):
        return [(2.75e-5, -0.2)] * len(scaling), _LANDSAT_SCALE
    return scaling, "metadata of the bands"


def _each(values: T | tuple[T, ...]) -> tuple[T, ...]:
    """Values of the bands, as one where all are the same."""
    several = values if isinstance(values, tuple) else (values,)
    return several[:1] if len(set(several)) == 1 else several


# Pixels


def choose_rendering(
    stored: StoredPixels,
    dtype: str,
    choice: BandChoice,
    facts: Facts,
    *,
    boa_offset: int | None,
    values: PixelValues | None,
    source: str,
) -> tuple[Rendering, str, tuple[str, ...]]:
    """How pixels become 8-bit, why so, and what the user should know of it.

    Args:
        stored: Its pixels.
        dtype: NumPy's name of their type.
        choice: Its red, green and blue.
        facts: What is known of it.
        boa_offset: As the user gave it, or None.
        values: What floats are, as the user gave it, or None.
        source: What the user named, for messages.

    OptionError where an option does not fit the raster.
    """
    # 1. Do the options fit?
    floating = dtype in FLOATS
    problems = []
    if values is not None and not floating:
        problems.append(f"pixel values {values!r} are for floating-point rasters, but {source} is {dtype}")
    if boa_offset and (dtype == "uint8" or choice.palette or values == "colours"):
        problems.append(f"boa_offset {boa_offset} is for digital numbers, but {source} is {dtype}")
    if problems:
        raise OptionError("; ".join(problems) + ": leave it out")
    # 2. What are the numbers?
    if dtype == "uint8" or choice.palette:
        return Rendering("colours"), "8-bit colours as stored", ()
    sample = cache(lambda: _sample(stored))
    why = f"{values} as asked" if floating else "16-bit digital numbers"
    if floating and values is None:
        values, why = _guess_values(sample())
    if values == "colours":
        return Rendering("colours"), why, ()
    # 3. Which offset is added? What metadata state is checked on pixels where it can be wrong.
    offsets, reason = facts.offsets or (0,), facts.offset_reason
    doubts: tuple[str, ...] = ()
    if boa_offset is not None:
        offsets, reason = (boa_offset,), "as asked"
    elif values == "reflectance":
        offsets, reason = (0,), "reflectance has none"
    elif any(offsets):
        bands = sample()
        known = zip(bands, _three(offsets), _three(facts.quantifications), strict=True)
        pixels = np.concatenate([(band.astype(np.float64) + offset) / units for band, offset, units in known])
        share = float(np.mean(pixels < _IMPOSSIBLE)) if len(pixels) else 0.0
        if share > _IMPOSSIBLE_SHARE:
            stated = _listed(offsets)
            doubts = (
                f"{source}: with the offset {stated} that its metadata declare, {share:.0%} of the pixels looked at "
                f"would have a reflectance below {_IMPOSSIBLE}: it was applied already, and 0 is used; "
                f"--boa-offset {offsets[0]} uses it all the same",
            )
            offsets, reason = (0,), "the pixels contradict the metadata"
    elif (
        facts.offsets is None
        and facts.sentinel2
        and (facts.datetime or "") >= _OFFSET_SINCE
        and all(len(band) > 0 and float(np.quantile(band, 0.001)) >= -_NEWER_OFFSET for band in sample())
    ):
        doubts = (
            f"{source}: no digital number is below 1000 and nothing declares an offset: if the product is of "
            "processing baseline 04.00 or later, pass --boa-offset -1000",
        )
    # Landsat's numbers without Landsat's offset were scaled to reflectance times 10,000.
    scaled = values == "reflectance" or (facts.offset_reason == _LANDSAT_SCALE and not any(offsets))
    scales = (10000.0,) if scaled else facts.quantifications
    count = max(len(offsets), len(scales))
    rules = tuple(
        ReflectanceRule(boa_offset=offset, full_scale=round(ReflectanceRule().full_scale * scale / 10000))
        for offset, scale in list(zip(_three(offsets), _three(scales), strict=True))[:count]
    )
    return Rendering(values or "dn", rules), f"{why}; offset {_listed(offsets)}: {reason}", doubts


def _three(values: tuple[T, ...]) -> tuple[T, ...]:
    return values * 3 if len(values) == 1 else values


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))


def _sample(stored: StoredPixels) -> list[npt.NDArray[Any]]:
    """Pixels that have data, per band, from windows spread over the raster; none where they cannot be read."""
    height, width = stored.size
    found: list[list[npt.NDArray[Any]]] = []
    for top in _spread(height):
        for left in _spread(width):
            window = Window(left, top, min(_WINDOW_SIDE, width - left), min(_WINDOW_SIDE, height - top))
            try:
                planes, empty, _ = stored.read(window)
            except RasterioError:
                continue  # its tiles will say so
            found.append([plane.flatten() if empty is None else plane[~empty] for plane in planes])
    return [np.concatenate(parts) for parts in zip(*found, strict=True)] if found else [np.empty(0)] * 3


def _spread(size: int) -> list[int]:
    """Where windows begin along an axis of ``size`` pixels."""
    last = max(0, size - _WINDOW_SIDE)
    return sorted({last * step // (_WINDOWS - 1) // _WINDOW_SIDE * _WINDOW_SIDE for step in range(_WINDOWS)})


def _guess_values(sample: Sequence[npt.NDArray[Any]]) -> tuple[PixelValues, str]:
    """What floats are, from pixels of the three bands, and why; OptionError where they fit nothing known."""
    pixels = np.concatenate(sample)
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
