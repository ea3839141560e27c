"""What the XML files of a SAFE product say. Every field of theirs is text from outside: checked here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from xml.etree import ElementTree

from rsedge.errors import SceneError
from rsedge.runtime.scenes.products.product import Extent
from rsedge.runtime.scenes.products.sentinel2 import ProductName, parse_time

# Real ones have at most 20,000 elements and 20 levels; what has more was made to fill the memory.
_MOST_PARTS = 250_000  # tags and attributes
_DEEPEST = 100
_LONGEST_NAMESPACE = 200
_NAMESPACES = re.compile(rb"xmlns[^<>=]{0,99}=\s*(?:\"[^\"]{%d}|'[^']{%d})" % ((_LONGEST_NAMESPACE,) * 2))
_LONGEST_NAME = 255  # of a product: a file has no longer one
_SHOWN = 60  # letters of a value in a message
_LARGEST_OFFSET = 2**16  # digital numbers have 16 bits
# Position of a band in the instrument's list: B01 is 0, and B8A stands behind B08.
_BAND_IDS = {"B02": 1, "B03": 2, "B04": 3}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductMetadata:
    """The product metadata (``MTD_MSIL2A.xml`` and its like).

    Attributes:
        level: ``L1C`` or ``L2A``.
        product_id: Name of the product without ``.SAFE``, or None.
        baseline: Processing baseline, such as ``05.09``, or None.
        datetime: When the datatake began, RFC 3339 in UTC, or None.
        quantification: Digital numbers per unit of reflectance, or None.
        offsets: B04, B03, B02 → what is to be added to their digital numbers; empty where no offset is listed.
        images: Names of the image files, without suffix; before 2017 without folders.
        tiles: MGRS tiles of the granules listed.
    """

    level: str
    product_id: str | None
    baseline: str | None
    datetime: str | None
    quantification: float | None
    offsets: Mapping[str, int]
    images: tuple[str, ...]
    tiles: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class GranuleMetadata:
    """The metadata of a granule (``MTD_TL.xml``): its MGRS tile, and when it was taken; None where it does not say."""

    mgrs_tile: str | None
    datetime: str | None
    extent: Extent | None = None


def product_metadata(data: bytes, where: str) -> ProductMetadata:
    """Read product metadata.

    Raises:
        SceneError: It is no XML, has a document type, is of no L1C or L2A product, or holds numbers that are none.
    """
    fields = _Fields(data, where)
    level = re.match(r"Level-?(1C|2A)", fields.root)
    if not level:
        raise SceneError(
            f"{where} is no metadata of an L1C or L2A product, its outermost element is {fields.root[:_SHOWN]!r}: pass "
            "the .SAFE folder, or MTD_MSIL1C.xml or MTD_MSIL2A.xml in it"
        )
    uri = (fields.text("PRODUCT_URI_2A", "PRODUCT_URI") or "")[:_LONGEST_NAME]
    baseline = fields.text("PROCESSING_BASELINE")
    listed = [entry.get("granuleIdentifier", "") for entry in fields.all("Granule", "Granules")]
    names = [ProductName.parse(name) for name in listed]
    return ProductMetadata(
        level=f"L{level[1]}",
        product_id=re.sub(r"\.SAFE$", "", uri, flags=re.IGNORECASE) if uri else None,
        baseline=baseline if baseline and re.fullmatch(r"\d{2}\.\d{2}", baseline) else None,
        datetime=parse_time(fields.text("DATATAKE_SENSING_START", "PRODUCT_START_TIME") or ""),
        quantification=_quantification(fields, level[1]),
        offsets=_offsets(fields),
        images=tuple(
            (entry.text or "").strip() for entry in fields.all("IMAGE_FILE", "IMAGE_FILE_2A", "IMAGE_ID", "IMAGE_ID_2A")
        ),
        tiles=frozenset(name.mgrs_tile for name in names if name and name.mgrs_tile),
    )


def granule_metadata(data: bytes, where: str) -> GranuleMetadata:
    """Read the metadata of a granule.

    Raises:
        SceneError: It is no XML, or has a document type.
    """
    fields = _Fields(data, where)
    name = ProductName.parse(fields.text("TILE_ID_2A", "TILE_ID") or "")
    return GranuleMetadata(
        mgrs_tile=name.mgrs_tile if name else None,
        datetime=parse_time(fields.text("SENSING_TIME") or ""),
        extent=_extent(fields),
    )


def _extent(fields: _Fields) -> Extent | None:
    """The ground of a granule by its grid at 10 m, or None where that is not told in full."""
    crs = fields.text("HORIZONTAL_CS_CODE")
    size, place = fields.at_resolution("Size", "10"), fields.at_resolution("Geoposition", "10")
    try:
        numbers = [float(place[name]) for name in ("ULX", "ULY", "XDIM")] + [float(size[n]) for n in ("NROWS", "NCOLS")]
    except (KeyError, ValueError):
        return None
    left, top, step, rows, cols = numbers
    # Only the names of a register: GDAL takes other text for the name of a file, or of a grid that it would look for.
    if not all(map(math.isfinite, numbers)) or not re.fullmatch(r"EPSG:\d{4,5}", crs or "", re.IGNORECASE):
        return None
    return Extent(crs=crs or "", left=left, top=top, width=cols * step, height=rows * step)


class _Fields:
    """The elements of a document by their names, whatever their namespace and depth."""

    def __init__(self, data: bytes, where: str) -> None:
        # No product has a document type, and without one there are no entities that could grow. The parser refuses
        # encodings in which ASCII letters are others, and those of two bytes have zeros: so bytes can be compared.
        if b"<!DOCTYPE" in data or b"\0" in data:
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
        """All elements of these names, in the order of the names."""
        return [element for name in names for element in self._elements.get(name, ())]

    def text(self, *names: str) -> str | None:
        """The first text there is under one of these names."""
        texts = ((element.text or "").strip() for element in self.all(*names))
        return next(filter(None, texts), None)

    def at_resolution(self, name: str, metres: str) -> dict[str, str]:
        """The children of the element of a name that stands for a resolution: their names and texts."""
        found = (element for element in self.all(name) if element.get("resolution") == metres)
        return {_local(child.tag): (child.text or "").strip() for child in next(found, ())}


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]


def _quantification(fields: _Fields, level: str) -> float | None:
    names = ("BOA_QUANTIFICATION_VALUE", "L2A_BOA_QUANTIFICATION_VALUE") if level == "2A" else ("QUANTIFICATION_VALUE",)
    text = fields.text(*names)
    if text is None:
        return None
    value = _number(text)
    if value is None or value <= 0:
        raise SceneError(
            f"{fields.where}: the quantification is {text[:_SHOWN]!r}, expected a positive number such as 10000"
        )
    return value


def _offsets(fields: _Fields) -> dict[str, int]:
    """The offsets of the bands that are used."""
    listed: dict[str, str] = {}
    for entry in fields.all("BOA_ADD_OFFSET", "RADIO_ADD_OFFSET"):
        listed[entry.get("band_id", "").strip()] = (entry.text or "").strip()
    found: dict[str, int] = {}
    for band, number in _BAND_IDS.items():
        if (text := listed.get(str(number))) is None:
            continue
        value = _number(text)
        if value is None or value != round(value) or abs(value) > _LARGEST_OFFSET:
            raise SceneError(
                f"{fields.where}: the offset of {band} is {text[:_SHOWN]!r}, expected a whole number such as -1000"
            )
        found[band] = round(value)
    return found


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
