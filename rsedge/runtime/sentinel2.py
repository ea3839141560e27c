"""What is particular to Sentinel-2 products: SAFE folders, GDAL's subdatasets, offsets, acquisition times."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

from rsedge.errors import SceneError

# In order of trust; TIFFTAG_DATETIME comes last, because many programs put the time of processing there.
_TIME_TAGS = ("ACQUISITIONDATETIME", "DATATAKE_1_DATATAKE_SENSING_START", "PRODUCT_START_TIME")
_TIME_FORMATS = ("%Y-%m-%dT%H:%M:%S.%f", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%d %H:%M:%S", "%Y:%m:%d %H:%M:%S")

# S2A_MSIL2A_20200219T112111_…, T34UCF_20230823T095559_B02_10m, S2A_29RKH_20200219_0_L2A
_PRODUCT_NAME = re.compile(r"(?:^|_)(?:S2[A-D]_|T\d{2}[A-Z]{3}_).*?(?<!\d)(\d{8})(?:T(\d{6}))?(?!\d)")


def metadata_file(folder: Path) -> Path:
    """The product metadata of a SAFE folder, which is what GDAL opens.

    Raises:
        SceneError: There is none, or more than one.
    """
    found = sorted(path for path in folder.glob("*.xml") if "MTD_" in path.name and path.name != "MTD_TL.xml")
    if len(found) == 1:
        return found[0]
    what = "no product metadata (MTD_MSIL1C.xml, MTD_MSIL2A.xml)" if not found else ", ".join(p.name for p in found)
    raise SceneError(f"{folder} is a folder with {what}: pass a .SAFE folder as downloaded, or one raster file")


def choose_subdataset(path: str, names: Sequence[str]) -> str:
    """The subdataset with the 10 m bands of a container without bands of its own.

    Raises:
        SceneError: It cannot be told which subdataset is meant.
    """
    ten_metres = [name for name in names if name.startswith("SENTINEL2_") and re.search(r":10m(:|$)", name)]
    if len(ten_metres) == 1:
        return ten_metres[0]
    if len(names) == 1:
        return names[0]
    if not names:
        raise SceneError(f"{path} has neither bands nor subdatasets: pass a raster with red, green and blue bands")
    listed = "".join(f"\n  {name}" for name in names)
    raise SceneError(f"{path} holds {len(names)} subdatasets and it is unclear which to read; pass one of:{listed}")


def declared_offset(tags: Sequence[Mapping[str, str]], scaling: Sequence[tuple[float, float]]) -> int:
    """What the bands' own metadata add to their digital numbers, 0 where they say nothing.

    Args:
        tags: Of each band; ``BOA_ADD_OFFSET`` or ``RADIO_ADD_OFFSET`` is the offset in digital numbers.
        scaling: GDAL scale and offset of each band, reflectance = DN · scale + offset: the offset over the scale.

    Raises:
        SceneError: The bands declare different ones, or no number.
    """
    offsets = set()
    for tag, (scale, offset) in zip(tags, scaling, strict=True):
        text = tag.get("BOA_ADD_OFFSET", tag.get("RADIO_ADD_OFFSET"))
        try:
            offsets.add(round(float(text)) if text is not None else round(offset / (scale or 1.0)))
        except (ValueError, OverflowError) as error:
            raise SceneError(f"a band declares the offset {text!r}, which is no number: pass --boa-offset") from error
    if len(offsets) > 1:
        raise SceneError(f"the bands declare different offsets {sorted(offsets)}: pass --boa-offset to choose one")
    return offsets.pop()


def acquisition_time(tags: Mapping[str, str], name: str) -> str | None:
    """Acquisition time as RFC 3339 in UTC, from metadata or a Sentinel-2 file name, or None."""
    for tag in _TIME_TAGS:
        if when := _parse_time(tags.get(tag, "")):
            return when
    for match in _PRODUCT_NAME.finditer(name):
        day, time = match.groups(default="000000")
        if when := _parse_time(f"{day[:4]}-{day[4:6]}-{day[6:]}T{time[:2]}:{time[2:4]}:{time[4:]}"):
            return when
    return _parse_time(tags.get("TIFFTAG_DATETIME", ""))


def _parse_time(text: str) -> str | None:
    text = text.strip().removesuffix("Z")
    for pattern in _TIME_FORMATS:
        try:
            when = datetime.strptime(text, pattern).replace(tzinfo=timezone.utc)
        except ValueError:
            continue
        return when.isoformat(timespec="milliseconds" if when.microsecond else "seconds").replace("+00:00", "Z")
    return None
