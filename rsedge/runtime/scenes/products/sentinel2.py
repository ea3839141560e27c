"""What Sentinel-2 products say of themselves: in names, in metadata in XML, by their processing baseline.

Every field of the metadata is text from outside: checked here.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from xml.etree import ElementTree

from rsedge.errors import SceneError
from rsedge.runtime.scenes.access import is_plain_xml
from rsedge.runtime.scenes.products.product import Extent
from rsedge.texts import plain, rfc3339

OFFSET_TAGS = ("BOA_ADD_OFFSET", "RADIO_ADD_OFFSET")
"""Names of what is to be added to the digital numbers of a band."""

# Real metadata have at most 20,000 elements and 20 levels; what has more was made to fill the memory.
_MOST_PARTS = 250_000  # tags and attributes
_DEEPEST = 100
_LONGEST_NAMESPACE = 200
_NAMESPACES = re.compile(rb"xmlns[^<>=]{0,99}=\s*(?:\"[^\"]{%d}|'[^']{%d})" % ((_LONGEST_NAMESPACE,) * 2))
_LONGEST_TEXT = 1000
_LONGEST_NAME = 255  # of a product: a file has no longer one
_SHOWN = 60  # letters of a value in a message
_LARGEST_OFFSET = 2**16  # digital numbers have 16 bits
# Position of a band in the instrument's list: B01 is 0, and B8A stands behind B08.
_BAND_IDS = {"B02": 1, "B03": 2, "B04": 3}

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
    """What the name of a Sentinel-2 product, granule, band file or catalogue item says; None where it says nothing."""

    mission: str | None = None  # ``S2A`` to ``S2D``
    level: str | None = None  # ``L1C`` or ``L2A``
    datetime: str | None = None  # acquisition, RFC 3339 in UTC; midnight where the name has the day alone
    baseline: str | None = None  # processing baseline, such as ``05.09``
    mgrs_tile: str | None = None  # such as ``05VNK``, the zone always in two digits
    product_id: str | None = None  # the part that identifies the product, without ``.SAFE``

    @classmethod
    def parse(cls, text: str) -> ProductName | None:
        """What ``text`` says, or None where no such name is in it; the name may stand anywhere in it.

        Known are ESA's names of today and of before December 2016, those of band files, Earth Search's
        (``S2A_29RKH_20200219_0_L2A``) and Earth Engine's (``20230823T095559_20230823T095553_T34UCF``).
        """
        text = text[:_LONGEST_TEXT]  # some patterns take the square of the length
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
            rest = match["rest"]
            tile = re.search(r"_T(\d{2}[A-Z]{3})(?![A-Z0-9])", rest)
            numbered = re.search(r"_N(\d{2}\.\d{2})$", rest)
            time = re.search(r"_V(\d{8}T\d{6})", rest)
            return cls(
                mission=match["mission"],
                level=match["level"],
                datetime=_compact_time(time[1]) if time else None,
                baseline=numbered[1] if numbered else None,
                mgrs_tile=tile[1] if tile else None,
                product_id=match[0] if rest.startswith("PRD_") else None,
            )
        if match := _GRANULE_FILE.search(text):
            return cls(datetime=_compact_time(match["time"]), mgrs_tile=match["tile"])
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductMetadata:
    """The product metadata (``MTD_MSIL2A.xml`` and its like)."""

    level: str  # ``L1C`` or ``L2A``
    product_id: str | None  # name of the product without ``.SAFE``, or None
    baseline: str | None  # processing baseline, such as ``05.09``, or None
    datetime: str | None  # when the datatake began, RFC 3339 in UTC, or None
    quantification: float | None  # digital numbers per unit of reflectance, or None
    # B04, B03, B02 → what is to be added to their digital numbers; empty where no offset is listed
    offsets: Mapping[str, int]
    images: frozenset[str]  # names of the image files, without suffix; before 2017 without folders
    tiles: frozenset[str]  # MGRS tiles of the granules listed


@dataclass(frozen=True, slots=True, kw_only=True)
class GranuleMetadata:
    """The metadata of a granule (``MTD_TL.xml``): its tile, when it was taken, where it lies; None where unsaid."""

    mgrs_tile: str | None = None
    datetime: str | None = None
    extent: Extent | None = None


def product_metadata(data: bytes, where: str) -> ProductMetadata:
    """Read product metadata; SceneError where they are no XML, of no L1C or L2A product, or have false numbers."""
    fields = _Fields(data, where)
    level = re.match(r"Level-?(1C|2A)", fields.root)
    if not level:
        raise SceneError(
            f"{where} is no metadata of an L1C or L2A product, its outermost element is {fields.root[:_SHOWN]!r}: pass "
            "the .SAFE folder, or MTD_MSIL1C.xml or MTD_MSIL2A.xml in it"
        )
    units = ("BOA_QUANTIFICATION_VALUE", "L2A_BOA_QUANTIFICATION_VALUE")
    stated = fields.text(*(units if level[1] == "2A" else ("QUANTIFICATION_VALUE",)))
    quantification = None if stated is None else _number(stated)
    if stated is not None and (quantification is None or quantification <= 0):
        raise SceneError(
            f"{where}: the quantification is {stated[:_SHOWN]!r}, expected a positive number such as 10000"
        )
    listed = {entry.get("band_id", "").strip(): (entry.text or "").strip() for entry in fields.all(*OFFSET_TAGS)}
    offsets: dict[str, int] = {}
    for band, number in _BAND_IDS.items():
        if (text := listed.get(str(number))) is None:
            continue
        value = _number(text)
        if value is None or value != round(value) or abs(value) > _LARGEST_OFFSET:
            raise SceneError(
                f"{where}: the offset of {band} is {text[:_SHOWN]!r}, expected a whole number such as -1000"
            )
        offsets[band] = round(value)
    uri = (fields.text("PRODUCT_URI_2A", "PRODUCT_URI") or "")[:_LONGEST_NAME]
    baseline = fields.text("PROCESSING_BASELINE")
    images = fields.all("IMAGE_FILE", "IMAGE_FILE_2A", "IMAGE_ID", "IMAGE_ID_2A")
    granules = fields.all("Granule", "Granules")
    names = [ProductName.parse(entry.get("granuleIdentifier", "")) for entry in granules]
    return ProductMetadata(
        level=f"L{level[1]}",
        product_id=re.sub(r"\.SAFE$", "", uri, flags=re.IGNORECASE) if uri else None,
        baseline=baseline if baseline and re.fullmatch(r"\d{2}\.\d{2}", baseline) else None,
        datetime=parse_time(fields.text("DATATAKE_SENSING_START", "PRODUCT_START_TIME") or ""),
        quantification=quantification,
        offsets=offsets,
        images=frozenset((entry.text or "").strip() for entry in images),
        tiles=frozenset(name.mgrs_tile for name in names if name and name.mgrs_tile),
    )


def granule_metadata(data: bytes, where: str) -> GranuleMetadata:
    """Read the metadata of a granule; SceneError where they are no XML, or have a document type."""
    fields = _Fields(data, where)
    name = ProductName.parse(fields.text("TILE_ID_2A", "TILE_ID") or "")
    # Its ground, by its grid at 10 m, where that is told in full.
    extent = None
    crs = fields.text("HORIZONTAL_CS_CODE") or ""
    size, place = fields.at_resolution("Size", "10"), fields.at_resolution("Geoposition", "10")
    try:
        numbers = [float(place[each]) for each in ("ULX", "ULY", "XDIM")]
        numbers += [float(size[each]) for each in ("NROWS", "NCOLS")]
    except (KeyError, ValueError):
        numbers = []
    # Only the names of a register: GDAL takes other text for the name of a file, or of a grid that it would look for.
    if numbers and all(map(math.isfinite, numbers)) and re.fullmatch(r"EPSG:\d{4,5}", crs, re.IGNORECASE):
        left, top, step, rows, cols = numbers
        extent = Extent(crs=crs, left=left, top=top, width=cols * step, height=rows * step)
    return GranuleMetadata(
        mgrs_tile=name.mgrs_tile if name else None,
        datetime=parse_time(fields.text("SENSING_TIME") or ""),
        extent=extent,
    )


class _Fields:
    """The elements of a document by their names, whatever their namespace and depth."""

    def __init__(self, data: bytes, where: str) -> None:
        if not is_plain_xml(data):
            raise SceneError(f"{where} is not read: it declares a document type, or is not in UTF-8, as no product is")
        parts = data.count(b"<") + data.count(b"=")
        if parts > _MOST_PARTS or _NAMESPACES.search(data):
            raise SceneError(
                f"{where} is not read: it has about {parts} tags and attributes, or a namespace of more than "
                f"{_LONGEST_NAMESPACE} letters, as no metadata of Sentinel-2 have"
            )
        try:
            tree = ElementTree.fromstring(data)
        except (ElementTree.ParseError, LookupError, ValueError) as error:
            raise SceneError(f"{where} is damaged: {error}; download the product again") from error
        level, depth = [tree], 0
        while level := [child for element in level for child in element]:
            depth += 1
            if depth > _DEEPEST:
                raise SceneError(f"{where} is not read: its elements lie more than {_DEEPEST} deep in each other")
        self.where = where
        self.root = _local(tree.tag)
        self._elements: dict[str, list[ElementTree.Element]] = {}
        for element in tree.iter():
            self._elements.setdefault(_local(element.tag), []).append(element)

    def all(self, *names: str) -> list[ElementTree.Element]:
        return [element for name in names for element in self._elements.get(name, ())]

    def text(self, *names: str) -> str | None:
        texts = ((element.text or "").strip() for element in self.all(*names))
        return next(filter(None, texts), None)

    def at_resolution(self, name: str, metres: str) -> dict[str, str]:
        """The children of the element of a name that stands for a resolution: their names and texts."""
        found = (element for element in self.all(name) if element.get("resolution") == metres)
        return {_local(child.tag): (child.text or "").strip() for child in next(found, ())}


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def baseline_offset(baseline: str) -> int | None:
    """What is to be added to the digital numbers of products of a processing baseline (``05.09``), L1C and L2A alike.

    -1000 from 04.00 on, 0 before; None for 99.99, which Sen2Cor writes where users run it themselves, whatever the
    product it made the result from. ValueError where it is no baseline.
    """
    if not re.fullmatch(r"\d{2}\.\d{2}", baseline):
        raise ValueError(f"{baseline!r} is no processing baseline: expected two digits, a point, and two digits")
    if baseline == _USER_BASELINE:
        return None
    return -1000 if baseline >= "04.00" else 0


def printable(name: str | os.PathLike[str]) -> str:
    """A file name as plain text (:func:`rsedge.texts.plain`); what is not UTF-8 in it is replaced."""
    return plain(os.fsencode(name).decode("utf-8", "replace"))


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
