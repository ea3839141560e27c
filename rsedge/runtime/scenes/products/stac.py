"""STAC items (https://stacspec.org, 1.0 and 1.1) and item collections → products: which assets are red, green and blue.

What catalogues of Sentinel-2 write is understood: Earth Search, Planetary Computer, the Copernicus Data Space. Hrefs
are taken as they are: nothing is signed, and ``alternate`` hrefs are not looked at. Items come from strangers: a local
one names files below its own folder only, a remote one remote files only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rsedge.errors import SceneError
from rsedge.jsonvalues import LARGEST, json_members
from rsedge.runtime.scenes import remote
from rsedge.runtime.scenes.access import LOCAL, Access
from rsedge.runtime.scenes.products.product import BandFile, Product
from rsedge.runtime.scenes.products.sentinel2 import baseline_offset
from rsedge.runtime.scenes.products.stac_assets import (
    COLOURS,
    AssetBand,
    Place,
    as_list,
    as_object,
    as_text,
    asset_bands,
    choose_bands,
)
from rsedge.texts import first_few, rfc3339

_HEAD = 2**20  # how far into a file one looks for "stac_version"
_LONGEST_NAME = 255
_LARGEST_OFFSET = 2**16  # digital numbers have 16 bits
_RASTERS = (".tif", ".tiff", ".jp2", ".vrt")


def is_stac_url(url: str) -> bool:
    """Whether a URL is, by its address, that of a STAC item or a collection of items."""
    address = remote.unsigned(url).partition("?")[0].lower()
    answers = re.search(r"/(items(/[^/]*)?|search)/?$", address) and not address.endswith(_RASTERS)
    return bool(answers) or address.endswith((".json", ".geojson"))


def read_if_stac(source: str, *, access: Access = LOCAL) -> list[Product] | None:
    """The acquisitions in a file, or None where it holds no STAC item; the file is parsed once.

    A damaged file that names ``stac_version`` counts as STAC.

    Args:
        source: A file of any kind.
        access: What the items may name.

    Raises:
        SceneError, OptionError: As :func:`read_stac`.
    """
    data = _file(source)
    if data is None:
        return None
    document = _Document(source, data)
    products = _products(document, source, access)
    return products if document.is_stac else None


def read_stac(source: str, *, text: str | None = None, access: Access = LOCAL) -> list[Product]:
    """The acquisitions that STAC items describe, in order.

    Args:
        source: File or URL of an item or an item collection; with ``text``, what messages call it.
        text: The document itself, where it came by another way; relative hrefs begin at the current folder.
        access: What the items may name.

    Raises:
        SceneError: The document cannot be had, is none, or is too large; or items have no red, green and blue, or
            assets that do not exist or that they may not name: all are named.
        OptionError: Something is remote, and that was not allowed.
    """
    base = None if text is not None else source
    if text is not None:
        data = text.encode("utf-8", "surrogatepass")
    elif remote.is_remote(source):
        remote.check_allowed([source], allow=access.remote)
        access = replace(access, hosts=(*access.hosts, *remote.named_hosts([source])))
        data = remote.fetch_bytes(source, hosts=access.hosts, limit=LARGEST)
    else:
        try:
            data = _bytes(Path(source))
        except OSError as error:
            raise SceneError(f"{source} cannot be read: {error.strerror}; check the path") from error
    document = _Document(remote.unsigned(source), data)
    products = _products(document, base, access)
    if not document.is_stac:
        kind = document.kind or "something else"
        found = "a collection without STAC items" if kind.startswith("Feature") else f"{kind}, no STAC item"
        raise SceneError(f"{remote.unsigned(source)} is {found}: pass a STAC item or a collection of items")
    return products


def _file(source: str) -> bytes | None:
    """What a file holds that may be STAC, or None for another."""
    file = Path(source)
    if file.suffix.lower() not in (".json", ".geojson") or not file.is_file():
        return None
    try:
        with file.open("rb") as opened:
            if b'"stac_version"' not in opened.read(_HEAD):
                return None
        return _bytes(file)
    except OSError as error:
        raise SceneError(f"{source} cannot be read: {error.strerror}; check its permissions") from error


def _bytes(file: Path) -> bytes:
    with file.open("rb") as opened:
        data = opened.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise SceneError(f"{file} has more than {LARGEST} bytes: pass its items in several files")
    return data


class _Document:
    """A document that is read item by item; what it is, is known when all are read."""

    def __init__(self, source: str, data: bytes) -> None:
        self.source, self._data = source, data
        self._members: dict[str, Any] = {}
        self.count = 0
        self.is_stac = False

    def items(self) -> Iterator[dict[str, Any]]:
        """Yield its items.

        Raises:
            SceneError: It is no JSON, or more of it than is read.
        """
        try:
            for name, value in json_members(self._data, "features"):
                if name != "features":
                    self._members[name] = value
                elif "stac_version" in (item := as_object(value)):
                    self.count += 1
                    yield item
                else:
                    return  # of GeoJSON that is not STAC no more is read
        except ValueError as error:
            start = self._data[:60].decode("utf-8", "replace")
            raise SceneError(
                f"{self.source} is no JSON document that can be read: {error}; it begins with {start!r}: pass a STAC "
                "item or a collection of items"
            ) from error
        if self.kind == "Feature" and "stac_version" in self._members:
            self.count += 1
            yield self._members
        self.is_stac = self.count > 0 and self.kind in ("Feature", "FeatureCollection")

    @property
    def kind(self) -> str:
        """Its type, such as ``FeatureCollection``."""
        return as_text(self._members.get("type"))

    @property
    def has_next(self) -> bool:
        """Whether it is one page of several."""
        return any(as_object(link).get("rel") == "next" for link in as_list(self._members.get("links")))


def _products(document: _Document, base: str | None, access: Access) -> list[Product]:
    """The products of a document that lies at ``base``, a path, a URL or None."""
    problems: list[str] = []
    products: list[Product] = []
    items = document.items()
    item = next(items, None)
    while item is not None:
        following = next(items, None)
        alone = document.count == 1
        place = Place(base, alone=alone, link=_self_link(item), access=access)
        try:
            products.append(_product(item, document.source, place))
        except SceneError as error:
            problems.append(f"{_name(item)}: {error}")
        item = following
    if not document.is_stac:
        return []
    if problems:
        raise SceneError(
            f"{document.source}: {len(problems)} of {document.count} items cannot be used\n  "
            + "\n  ".join(first_few(problems))
        )
    far = {file.path for product in products for file in _files(product) if remote.is_remote(file.path)}
    remote.check_allowed(sorted(far), allow=access.remote)
    if document.has_next:
        warning = f"{document.source} is one page of several: only its {document.count} items are read"
        products[0] = replace(products[0], warnings=(*products[0].warnings, warning))
    return products


def _name(item: Mapping[str, Any]) -> str:
    # It goes into every record.
    return as_text(item.get("id"))[:_LONGEST_NAME] or "item without id"


def _self_link(item: Mapping[str, Any]) -> str | None:
    links = (as_object(link) for link in as_list(item.get("links")))
    return next((as_text(link.get("href")) for link in links if link.get("rel") == "self"), None)


def _product(item: Mapping[str, Any], source: str, place: Place) -> Product:
    bands = list(asset_bands(item))
    chosen = choose_bands(bands, visual=False)
    visual = not chosen
    chosen = chosen or choose_bands(bands, visual=True)
    if not chosen:
        assets = ", ".join(map(as_text, as_object(item.get("assets")))) or "none"
        raise SceneError(f"no assets for red, green and blue are among its assets ({assets}): pass items of imagery")
    scl = min((band for band in bands if band.scl), key=lambda band: band.order, default=None)
    paths, warnings = _paths([chosen[colour] for colour in COLOURS], place, _name(item))
    files = {
        colour: BandFile(path=remote.gdal_path(path), band=chosen[colour].number)
        for colour, path in zip(COLOURS, paths, strict=True)
    }
    scl_path, scl_warnings = _scl_path(scl, place, _name(item), local=not any(map(remote.is_remote, paths)))
    properties = as_object(item.get("properties"))
    offset, quantification, doubts = (None, None, []) if visual else _scaling(list(chosen.values()), properties)
    local = [path for path in (place.base, *paths, scl_path) if path and not remote.is_remote(path)]
    return Product(
        name=_name(item),
        source=source,
        bands=files,
        reason="STAC assets: " + ", ".join(f"{colour} = {as_text(chosen[colour].key)}" for colour in COLOURS),
        visual=visual,
        scl=BandFile(path=remote.gdal_path(scl_path), band=scl.number) if scl and scl_path else None,
        boa_offset=offset,
        quantification=quantification,
        baseline=_baseline(properties),
        datetime=_time(properties.get("datetime")) or _time(properties.get("start_datetime")),
        product_id=_product_id(properties),
        mgrs_tile=_mgrs_tile(properties),
        files=tuple(sorted({str(Path(path).resolve()) for path in local})),
        warnings=(*warnings, *scl_warnings, *(f"{_name(item)}: {doubt}" for doubt in doubts)),
    )


def _paths(bands: Sequence[AssetBand], place: Place, item: str) -> tuple[list[str], list[str]]:
    """Paths or URLs of the bands, and what to know of them."""
    found: list[str] = []
    problems: list[str] = []
    for band in bands:
        key = as_text(band.key)
        try:
            found.append(place.resolve(band.href))
        except SceneError as error:
            problems.append(f"asset {key}: {error}")
    if problems:
        raise SceneError("; ".join(dict.fromkeys(problems)))
    if all(map(remote.is_remote, found)) and (files := place.beside(found, item)):
        folder = Path(files[0]).parent
        return files, [f"{item}: its assets are remote, but files of their names lie in {folder}: those are read"]
    return found, []


def _scl_path(band: AssetBand | None, place: Place, item: str, *, local: bool) -> tuple[str | None, list[str]]:
    """Where the scene classification is; without it a scene can be read all the same."""
    if band is None:
        return None, []
    try:
        path = place.resolve(band.href)
    except SceneError as error:
        return None, [f"{item}: no scene classification: {error}"]
    if local and remote.is_remote(path):
        if files := place.beside([path], item):
            return files[0], []
        if not place.access.remote:
            return None, [f"{item}: its scene classification is remote and left out: --allow-remote reads it"]
    return path, []


def _scaling(bands: Sequence[AssetBand], properties: Mapping[str, Any]) -> tuple[int | None, float | None, list[str]]:
    """What is to be added to digital numbers, how many are one unit of reflectance, and what is doubtful there."""
    applied = properties.get("earthsearch:boa_offset_applied", properties.get("sentinel:boa_offset_applied"))
    stated = {_offset_and_quantification(band) for band in bands}
    doubts = []
    offset, quantification = stated.pop()
    if stated:
        doubts.append("its bands declare different scales or offsets, and none is taken: --boa-offset sets one")
        offset, quantification = None, None
    if applied is True:
        return 0, quantification, doubts
    baseline = _baseline(properties)
    if applied is False and offset == 0 and baseline and baseline_offset(baseline):
        doubts.append(
            "it declares the offset 0, and says too that the offset of its processing baseline was not applied"
        )
        offset = None
    return offset, quantification, doubts


def _offset_and_quantification(band: AssetBand) -> tuple[int | None, float | None]:
    scale = band.scale
    # 1 is what tools write that know of no scale, unless values are reflectance itself.
    if scale is None or not scale > 0 or (scale == 1 and not band.dtype.startswith("float")):
        return None, None
    quantification, offset = 1 / scale, None if band.offset is None else band.offset / scale
    if not math.isfinite(quantification) or (offset is not None and not abs(offset) < _LARGEST_OFFSET):
        return None, None
    return None if offset is None else round(offset), round(quantification, 6)


def _baseline(properties: Mapping[str, Any]) -> str | None:
    for field in ("s2:processing_baseline", "sentinel:processing_baseline", "processing:version"):
        if match := re.fullmatch(r"N?(\d{1,2})\.?(\d{2})", as_text(properties.get(field))):
            return f"{match[1]:0>2}.{match[2]}"
    return None


def _product_id(properties: Mapping[str, Any]) -> str | None:
    for field in ("s2:product_uri", "sentinel:product_id", "s2:granule_id"):
        if name := as_text(properties.get(field)).removesuffix(".SAFE"):
            return name[:_LONGEST_NAME]
    return None


def _mgrs_tile(properties: Mapping[str, Any]) -> str | None:
    parts = ("mgrs:utm_zone", "mgrs:latitude_band", "mgrs:grid_square")
    for text in (
        as_text(properties.get("s2:mgrs_tile")),
        as_text(properties.get("grid:code")).removeprefix("MGRS-"),
        "".join(str(properties.get(part, "")) for part in parts),
    ):
        if match := re.fullmatch(r"T?(\d{1,2}[A-Z]{3})", text):
            return match[1].zfill(5)
    return None


def _time(value: Any) -> str | None:
    """RFC 3339 in UTC, to the millisecond where it has a fraction, as of other sources."""
    match = re.fullmatch(r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(\.\d+)?([Zz]|[+-]\d\d:\d\d)?", as_text(value))
    if not match:
        return None
    day, clock, fraction, zone = match.groups(default="")
    zone = "+00:00" if zone in ("", "Z", "z") else zone
    try:
        when = datetime.fromisoformat(f"{day}T{clock}.{fraction[1:7]:0<6}{zone}").astimezone(timezone.utc)
    except (ValueError, OverflowError):
        return None
    return rfc3339(when)


def _files(product: Product) -> Iterator[BandFile]:
    yield from product.bands.values()
    if product.scl:
        yield product.scl
