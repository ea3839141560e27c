"""STAC items (https://stacspec.org, 1.0 and 1.1) and item collections → products: which assets are red, green and blue.

What catalogues of Sentinel-2 write is understood: Earth Search, Planetary Computer, the Copernicus Data Space. Hrefs
are taken as they are: nothing is signed, and ``alternate`` hrefs are not looked at.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rsedge.errors import SceneError
from rsedge.runtime import remote
from rsedge.runtime.access import LOCAL, Access
from rsedge.runtime.products import BandFile, Product
from rsedge.runtime.sentinel2 import baseline_offset
from rsedge.runtime.stac_assets import (
    COLOURS,
    AssetBand,
    Place,
    as_list,
    as_object,
    as_text,
    asset_bands,
    choose_bands,
)

_LARGEST = 64 * 2**20  # bytes of a document
_HEAD = 2**20  # how far into a file one looks for "stac_version"
_RASTERS = (".tif", ".tiff", ".jp2", ".vrt")
_SHOWN = 8  # problems that are told in full


def is_stac(source: str) -> bool:
    """Whether ``source`` is a STAC item or a collection of items; of a URL only the address is looked at.

    A damaged file that names ``stac_version`` counts, so that reading it says what is wrong.
    """
    if remote.is_remote(source):
        address = urlsplit(remote.unsigned(source)).path.lower()
        answers = re.search(r"/(items(/[^/]*)?|search)/?$", address) and not address.endswith(_RASTERS)
        return bool(answers) or address.endswith((".json", ".geojson"))
    file = Path(source)
    if file.suffix.lower() not in (".json", ".geojson") or not file.is_file():
        return False
    with file.open("rb") as opened:
        if b'"stac_version"' not in opened.read(_HEAD):
            return False
    try:
        document = json.loads(file.read_bytes()) if file.stat().st_size <= _LARGEST else None
    except (ValueError, RecursionError):
        return True
    return document is None or bool(_features(document))


def read_stac(source: str, *, text: str | None = None, access: Access = LOCAL) -> list[Product]:
    """The acquisitions that STAC items describe, in order.

    Args:
        source: File or URL of an item or an item collection; with ``text``, what messages call it.
        text: The document itself, where it came by another way.
        access: What the items may name.

    Raises:
        SceneError: The document cannot be had or is none; or items have no red, green and blue, or assets that do not
            exist: all are named.
        OptionError: Something is remote, and that was not allowed.
    """
    document, base = _load(source, text, access)
    items = _features(document)
    if not items:
        kind = as_text(as_object(document).get("type")) or "something else"
        found = "a collection without STAC items" if kind == "FeatureCollection" else f"{kind}, no STAC item"
        raise SceneError(f"{remote.unsigned(source)} is {found}: pass a STAC item or a collection of items")
    problems: list[str] = []
    products: list[Product] = []
    for item in items:
        place = Place(base, alone=len(items) == 1, link=_self_link(item), access=access)
        try:
            products.append(_product(item, source, place))
        except SceneError as error:
            problems.append(f"{_name(item)}: {error}")
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise SceneError(
            f"{remote.unsigned(source)}: {len(problems)} of {len(items)} items cannot be used\n  "
            + "\n  ".join([*problems[:_SHOWN], *more])
        )
    far = {file.path for product in products for file in _files(product) if remote.is_remote(file.path)}
    remote.check_allowed(sorted(far), allow=access.remote)
    if isinstance(document, dict) and any(
        as_object(link).get("rel") == "next" for link in as_list(document.get("links"))
    ):
        warning = f"{remote.unsigned(source)} is one page of several: only its {len(items)} items are read"
        products[0] = replace(products[0], warnings=(*products[0].warnings, warning))
    return products


def _load(source: str, text: str | None, access: Access) -> tuple[Any, str | None]:
    """The document, and where it lies: a path, a URL, or None."""
    base = None if text is not None else source
    if text is None and remote.is_remote(source):
        remote.check_allowed([source], allow=access.remote)
        return remote.fetch_json(source, limit=_LARGEST), base
    try:
        if text is None:
            if Path(source).stat().st_size > _LARGEST:
                raise SceneError(f"{source} has more than {_LARGEST} bytes: pass its items in several files")
            text = Path(source).read_text(encoding="utf-8-sig")
        return json.loads(text), base
    except OSError as error:
        raise SceneError(f"{source} cannot be read: {error.strerror}; check the path") from error
    except (ValueError, RecursionError) as error:
        raise SceneError(f"{source} is no JSON document: {error}; pass a STAC item or a collection of items") from error


def _features(document: Any) -> list[dict[str, Any]]:
    """The items of a document; none if it is something else."""
    document = as_object(document)
    found = [document] if document.get("type") == "Feature" else []
    if document.get("type") == "FeatureCollection":
        found = [as_object(feature) for feature in as_list(document.get("features"))]
    return found if found and all("stac_version" in item for item in found) else []


def _name(item: Mapping[str, Any]) -> str:
    return as_text(item.get("id")) or "item without id"


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
    local = [path for path in (source if place.base else None, *paths, scl_path) if path and not remote.is_remote(path)]
    return Product(
        name=_name(item),
        source=remote.unsigned(source),
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
        files=tuple(sorted({str(Path(path).resolve()) for path in local if not path.startswith("/vsi")})),
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
    if not math.isfinite(quantification) or (offset is not None and not math.isfinite(offset)):
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
            return name
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
    return when.isoformat(timespec="milliseconds" if when.microsecond else "seconds").replace("+00:00", "Z")


def _files(product: Product) -> Iterator[BandFile]:
    yield from product.bands.values()
    if product.scl:
        yield product.scl
