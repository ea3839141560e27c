"""Coordinate reference systems from strangers: which of them PROJ may see.

PROJ opens files that a reference system names: grids of shifts, models of deformation, its own initialisation files.
Some it opens as soon as the text is parsed, so a text is judged before, and once more as PROJ understood it.
"""

from __future__ import annotations

import contextlib
import re
from typing import Any

import rasterio
from rasterio._err import CPLE_BaseError  # what reference systems raise beside CRSError; it has no public name
from rasterio.crs import CRS
from rasterio.errors import CRSError

# What else GDAL would look a coordinate reference system up by: names of files, URLs, PROJ strings.
WKT = re.compile(r"\s*(?:EPSG:\d+\s*$|(?:PROJ|GEOG|GEOC|GEOD|COMPD|COMPOUND|LOCAL|BOUND|ENG|VERT)[A-Z]*\[)")
"""A coordinate reference system that is stated in full, or by its number."""

_QUOTE, _OPEN = r"[\"“”]", r"\s*[\[(]\s*"
# "@null" stands for a grid that shifts nothing: web maps have it.
_FILES = re.compile(
    rf"PARAMETERFILE(?!{_OPEN}\"[^\"]*\"\s*,\s*\"@null\")"
    rf"|PROJ4_GRIDS(?!{_QUOTE}\s*,\s*{_QUOTE}@null{_QUOTE})|grids\s*=(?!@null\b)|\+init\s*=|\bcatalog\s*=",
    re.IGNORECASE,
)
# A method that is an operation of PROJ's own may have any parameter of PROJ's in its name, and in those of its values.
_OWN_METHOD = re.compile(rf"\b(?:METHOD|PROJECTION){_OPEN}{_QUOTE}\s*PROJ[^\"“”]{{0,60}}", re.IGNORECASE)
_EXTENSION = re.compile(rf"\bEXTENSION{_OPEN}", re.IGNORECASE)
_EXTENDED = re.compile(rf"{_QUOTE}([^\"“”]*){_QUOTE}\s*,\s*{_QUOTE}([^\"“”]*){_QUOTE}")
# Parameters of a PROJ string that are numbers, angles or names out of PROJ's own tables.
_PARAMETERS = re.compile(
    r"proj|datum|ellps|a|b|f|rf|es|r|r_(?:a|v|g|h|lat_[ag])|v?units|v?to_meter|lat_(?:[0-3b]|ts)|lon_(?:[0-3]|wrap)|lonc"
    r"|alpha|gamma|theta|azi|tilt|k|k_0|[xyz]_0|h|zone|south|no_(?:defs|off|uoff|rot)|wktext|type|towgs84|pm|over|axis"
    r"|sweep|o_proj|o_alpha|o_(?:lat|lon)_[pc12]|[mnqws]|ns|approx|geoc|bounded|lsat|czech|hyperbolic",
    re.IGNORECASE,
)
_VALUE = re.compile(r"[A-Za-z0-9_.,+-]*")


def file_named(text: str) -> str | None:
    """What in a text that may hold WKT, of any version, makes PROJ open a file, or could; None where nothing does."""
    for pattern in (_FILES, _OWN_METHOD):
        if found := pattern.search(text):
            return found[0]
    for found in _EXTENSION.finditer(text):
        extended = _EXTENDED.match(text, found.end())
        if extended is None:
            return found[0]
        # Of a PROJ string, the parameters that may name something other than numbers.
        for part in extended[2].split() if extended[1].strip().upper() == "PROJ4" else ():
            name, _, value = part.lstrip("+").partition("=")
            known = _PARAMETERS.fullmatch(name) and _VALUE.fullmatch(value)
            if not known and (name, value) != ("nadgrids", "@null"):
                return part[:60]
    return None


def parse_reference(text: str) -> CRS:
    """The reference system that a text of a stranger states; ValueError where it is none, or names a file."""
    if not WKT.match(text):
        raise ValueError("it is neither WKT nor EPSG:…")
    if found := file_named(text):
        raise ValueError(f"it names a file of PROJ's ({found})")
    try:
        with rasterio.Env():
            crs = CRS.from_user_input(text)
    except (CRSError, CPLE_BaseError) as error:
        forget_error()
        raise ValueError(str(error)) from error
    check_reference(crs)
    return crs


def check_reference(crs: Any) -> None:
    """Refuse, with ValueError, a reference system (rasterio CRS) that as PROJ understood it names files or has no
    text.
    """
    written: list[str | None] = []
    for version in ("WKT2_2019", None):
        text = None
        try:
            with rasterio.Env():
                text = crs.to_wkt(version=version)
        except (CRSError, CPLE_BaseError):  # that version has no words for it
            forget_error()
        written.append(text)
    # The newer version leaves PROJ strings out, and the older one transformations, so that it cannot hold every one.
    newer, older = written
    if newer is None or (older is None and "BOUNDCRS" in newer):
        raise ValueError("it cannot be written as WKT")
    if found := file_named(newer) or file_named(older or ""):
        raise ValueError(f"it names a file of PROJ's ({found})")


def forget_error() -> None:
    """Take GDAL's last error away, which rasterio would raise from the next call of this thread, whatever that is."""
    with contextlib.suppress(CRSError, CPLE_BaseError):
        CRS.from_epsg(4326)
