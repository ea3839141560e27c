"""What is particular to Sentinel-2 products: their names, GDAL's subdatasets, offsets, acquisition times."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

from rsedge.errors import SceneError
from rsedge.texts import plain, rfc3339

OFFSET_TAGS = ("BOA_ADD_OFFSET", "RADIO_ADD_OFFSET")
"""Metadata of a band that say what is to be added to its digital numbers."""

# In order of trust; TIFFTAG_DATETIME comes last, because many programs put the time of processing there.
_TIME_TAGS = ("ACQUISITIONDATETIME", "DATATAKE_1_DATATAKE_SENSING_START", "PRODUCT_START_TIME")
_TIME_FORMATS = ("%Y-%m-%dT%H:%M:%S.%f", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%d %H:%M:%S", "%Y:%m:%d %H:%M:%S")

# A date behind a mission or a tile: what is left of names that were cut or added to.
_DATED_NAME = re.compile(r"(?:^|_)(?:S2[A-D]_|T\d{2}[A-Z]{3}_).*?(?<!\d)(\d{8}(?:T\d{6})?)(?!\d)")

# What Sen2Cor writes where a user runs it: it says nothing of the input's offset.
_USER_BASELINE = "99.99"

_COMPACT = re.compile(
    r"(?P<id>(?P<mission>S2[A-D])_MSI(?P<level>L1C|L2A)_(?P<time>\d{8}T\d{6})_N(?P<baseline>\d{4})_R\d{3}"
    r"_T(?P<tile>\d{2}[A-Z]{3})_\d{8}T\d{6})(?![A-Z0-9])"
)
_EARTH_SEARCH = re.compile(
    r"(?<![A-Z0-9])(?P<id>(?P<mission>S2[A-D])_T?(?P<tile>\d{1,2}[A-Z]{3})_(?P<time>\d{8}(?:T\d{6})?)(?:_\d+)?"
    r"_(?P<level>L1C|L2A))(?![A-Z0-9])"
)
_EARTH_ENGINE = re.compile(r"(?<!\d)(?P<id>(?P<time>\d{8}T\d{6})_\d{8}T\d{6}_T(?P<tile>\d{2}[A-Z]{3}))(?![A-Z0-9])")
_GRANULE_FILE = re.compile(r"(?<![A-Z0-9])T(?P<tile>\d{2}[A-Z]{3})_(?P<time>\d{8}T\d{6})(?!\d)")
# Until December 2016; the times in front are those of processing, and what a name holds depends on its kind.
_OPERATIONAL = re.compile(
    r"(?<![A-Z0-9])(?P<mission>S2[A-D])_(?:OPER|USER)_(?P<rest>[A-Z0-9._]*(?P<level>L1C|L2A)\w*(?:\.\d\d)?)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductName:
    """What the name of a Sentinel-2 product, granule, band file or catalogue item says; None where it says nothing.

    Attributes:
        mission: ``S2A`` to ``S2D``.
        level: ``L1C`` or ``L2A``.
        datetime: Acquisition, RFC 3339 in UTC; midnight where the name has the day alone.
        baseline: Processing baseline, such as ``05.09``.
        mgrs_tile: Such as ``05VNK``, the zone always in two digits.
        product_id: The part that identifies the product, without ``.SAFE``.
    """

    mission: str | None = None
    level: str | None = None
    datetime: str | None = None
    baseline: str | None = None
    mgrs_tile: str | None = None
    product_id: str | None = None

    @classmethod
    def parse(cls, text: str) -> ProductName | None:
        """What ``text`` says, or None where no such name is in it; the name may stand anywhere in it.

        Known are ESA's names of today and of before December 2016, those of band files, Earth Search's
        (``S2A_29RKH_20200219_0_L2A``) and Earth Engine's (``20230823T095559_20230823T095553_T34UCF``).
        """
        for pattern in (_COMPACT, _EARTH_SEARCH, _EARTH_ENGINE):
            if match := pattern.search(text):
                found = match.groupdict()
                baseline = found.get("baseline")
                return cls(
                    mission=found.get("mission"),
                    level=found.get("level"),
                    datetime=_compact_time(found["time"]),
                    baseline=f"{baseline[:2]}.{baseline[2:]}" if baseline else None,
                    mgrs_tile=found["tile"].zfill(5),
                    product_id=found["id"],
                )
        if match := _OPERATIONAL.search(text):
            return cls._operational(match)
        if match := _GRANULE_FILE.search(text):
            return cls(datetime=_compact_time(match["time"]), mgrs_tile=match["tile"])
        return None

    @classmethod
    def _operational(cls, match: re.Match[str]) -> ProductName:
        rest = match["rest"]
        tile = re.search(r"_T(\d{2}[A-Z]{3})(?![A-Z0-9])", rest)
        baseline = re.search(r"_N(\d{2}\.\d{2})$", rest)
        time = re.search(r"_V(\d{8}T\d{6})", rest)
        return cls(
            mission=match["mission"],
            level=match["level"],
            datetime=_compact_time(time[1]) if time else None,
            baseline=baseline[1] if baseline else None,
            mgrs_tile=tile[1] if tile else None,
            product_id=match[0] if rest.startswith("PRD_") else None,
        )


def baseline_offset(baseline: str) -> int | None:
    """What is to be added to the digital numbers of products of a processing baseline, L1C and L2A alike.

    -1000 from 04.00 on, 0 before; None for 99.99, which Sen2Cor writes where users run it themselves, whatever the
    product it made the result from.

    Raises:
        ValueError: ``baseline`` is not of the form ``05.09``.
    """
    if not re.fullmatch(r"\d{2}\.\d{2}", baseline):
        raise ValueError(f"{baseline!r} is no processing baseline: expected two digits, a point, and two digits")
    if baseline == _USER_BASELINE:
        return None
    return -1000 if baseline >= "04.00" else 0


def printable(name: str | os.PathLike[str]) -> str:
    """A file name as plain text (:func:`rsedge.texts.plain`); what is not UTF-8 in it is replaced."""
    return plain(os.fsencode(name).decode("utf-8", "replace"))


def choose_subdataset(path: str, names: Sequence[str]) -> str:
    """The subdataset of a container without bands of its own.

    Raises:
        SceneError: It cannot be told which subdataset is meant.
    """
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
        text = next((tag[name] for name in OFFSET_TAGS if name in tag), None)
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
        if when := parse_time(tags.get(tag, "")):
            return when
    if known := ProductName.parse(name):
        when = known.datetime
    else:
        when = next(filter(None, (_compact_time(match[1]) for match in _DATED_NAME.finditer(name))), None)
    return when or parse_time(tags.get("TIFFTAG_DATETIME", ""))


def _compact_time(text: str) -> str | None:
    """``20230823T095559`` or ``20230823`` as RFC 3339, or None where there is no such day."""
    day, _, time = text.partition("T")
    time = time or "000000"
    return parse_time(f"{day[:4]}-{day[4:6]}-{day[6:]}T{time[:2]}:{time[2:4]}:{time[4:]}")


def parse_time(text: str) -> str | None:
    """A time as metadata write it, taken as UTC, as RFC 3339; None where it is no time."""
    text = text.strip().removesuffix("Z")
    for pattern in _TIME_FORMATS:
        try:
            when = datetime.strptime(text, pattern).replace(tzinfo=timezone.utc)
        except ValueError:
            continue
        return rfc3339(when)
    return None
