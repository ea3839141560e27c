"""STAC items (https://stacspec.org, 1.0 and 1.1) and item collections → products: which assets are red, green and blue.

What catalogues of Sentinel-2 write is understood: Earth Search, Planetary Computer, the Copernicus Data Space. Hrefs
are taken as they are: nothing is signed, and ``alternate`` hrefs are not looked at. Items come from strangers: a local
one names files below its own folder only, a remote one remote files only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import url2pathname

from rsedge.errors import SceneError
from rsedge.jsonvalues import LARGEST, json_members
from rsedge.runtime.scenes import remote
from rsedge.runtime.scenes.access import LOCAL, Access, refuse_gdal_name
from rsedge.runtime.scenes.products.product import BandFile, Product
from rsedge.runtime.scenes.products.sentinel2 import baseline_offset
from rsedge.runtime.scenes.sensors import (
    SENTINEL2,
    BandText,
    Sensor,
    candidates,
    colour_of,
    known_sensor,
    named_as_sentinel2,
    to_micrometres,
)
from rsedge.texts import first_few, plain, rfc3339

_HEAD = 2**20  # how far into a file one looks for "stac_version"
_LONGEST_NAME = 255
_LONGEST_HREF = 8192
_LARGEST_OFFSET = 2**16  # digital numbers have 16 bits
_RASTERS = (".tif", ".tiff", ".jp2", ".vrt")

_COLOURS = ("red", "green", "blue")
# What catalogues append to the name of a band: B04_10m, red-jp2.
_KEY = re.compile(r"(?P<name>[a-z0-9]+?)(?:[_-](?P<metres>\d+)m)?(?:[_-](?:jp2|cog|tiff?))?", re.IGNORECASE)
_VISUAL = frozenset({"visual", "tci", "truecolor"})
_NO_DATA_ROLES = frozenset({"thumbnail", "overview", "metadata"})


def is_stac_url(url: str) -> bool:
    """Whether a URL is, by its address, that of a STAC item or a collection of items."""
    address = remote.unsigned(url).partition("?")[0].lower()
    answers = re.search(r"/(items(/[^/]*)?|search)/?$", address) and not address.endswith(_RASTERS)
    return bool(answers) or address.endswith((".json", ".geojson"))


def read_if_stac(source: str, *, access: Access = LOCAL) -> list[Product] | None:
    """The acquisitions in a file, or None where it holds no STAC item; the file is parsed once.

    A damaged file that names ``stac_version`` counts as STAC. Errors are those of :func:`read_stac`.
    """
    file = Path(source)
    if file.suffix.lower() not in (".json", ".geojson") or not file.is_file():
        return None
    try:
        with file.open("rb") as opened:
            if b'"stac_version"' not in opened.read(_HEAD):
                return None
        data = _bytes(file)
    except OSError as error:
        raise SceneError(f"{source} cannot be read: {error.strerror}; check its permissions") from error
    document = _Document(source, data)
    products = document.products(source, access)
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
    products = document.products(None if text is not None else source, access)
    if not document.is_stac:
        kind = document.kind or "something else"
        found = "a collection without STAC items" if kind.startswith("Feature") else f"{kind}, no STAC item"
        raise SceneError(f"{remote.unsigned(source)} is {found}: pass a STAC item or a collection of items")
    return products


def _bytes(file: Path) -> bytes:
    with file.open("rb") as opened:
        data = opened.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise SceneError(f"{file} has more than {LARGEST} bytes: pass its items in several files")
    return data


class _Document:
    """A document that is read item by item; ``kind`` and ``is_stac`` are known when all are read."""

    def __init__(self, source: str, data: bytes) -> None:
        self.source, self._data = source, data
        self._members: dict[str, Any] = {}
        self.count = 0
        self.is_stac = False

    @property
    def kind(self) -> str:
        """Its type, such as ``FeatureCollection``."""
        return _as_text(self._members.get("type"))

    def _items(self) -> Iterator[dict[str, Any]]:
        try:
            for name, value in json_members(self._data, "features"):
                if name != "features":
                    self._members[name] = value
                elif "stac_version" in (item := _as_object(value)):
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

    def products(self, base: str | None, access: Access) -> list[Product]:
        """The products of all items, of a document that lies at ``base``, a path, a URL or None."""
        problems: list[str] = []
        products: list[Product] = []
        items = self._items()
        item = next(items, None)
        while item is not None:
            following = next(items, None)
            links = [_as_object(link) for link in _as_list(item.get("links"))]
            link = next((_as_text(link.get("href")) for link in links if link.get("rel") == "self"), None)
            place = _Place(base, alone=self.count == 1, link=link, access=access)
            name = _as_text(item.get("id"))[:_LONGEST_NAME] or "item without id"  # it goes into every record
            try:
                products.append(_product(item, name, self.source, place))
            except SceneError as error:
                problems.append(f"{name}: {error}")
            item = following
        if not self.is_stac:
            return []
        if problems:
            raise SceneError(
                f"{self.source}: {len(problems)} of {self.count} items cannot be used\n  "
                + "\n  ".join(first_few(problems))
            )
        far = {name for product in products for name in product.paths if remote.is_remote(name)}
        remote.check_allowed(sorted(far), allow=access.remote)
        if any(_as_object(link).get("rel") == "next" for link in _as_list(self._members.get("links"))):
            warning = f"{self.source} is one page of several: only its {self.count} items are read"
            products[0] = replace(products[0], warnings=(*products[0].warnings, warning))
        return products


# From an item to a product


def _product(item: Mapping[str, Any], name: str, source: str, place: _Place) -> Product:
    # 1. Bands of reflectance, else those of a picture for people.
    properties = _as_object(item.get("properties"))
    sensor = _sensor(item, properties)
    bands = list(_asset_bands(item, sensor))
    if sensor is None and named_as_sentinel2(band.name for band in bands):
        bands = list(_asset_bands(item, SENTINEL2))
    chosen = _choose_bands(bands, visual=False)
    visual = not chosen
    chosen = chosen or _choose_bands(bands, visual=True)
    if not chosen:
        assets = ", ".join(map(_as_text, _as_object(item.get("assets")))) or "none"
        advice = ": pass items of imagery"
        if candidates([BandText(band.name) for band in bands]):
            advice = ", whose numbers mean nothing without a sensor: give bands common names, or the item a platform"
            key = max((band.count, band.key) for band in bands)[1]
            flags = candidates([BandText(band.name) for band in bands if band.key == key])
            advice += f"; or pass the file of {_as_text(key)} with {flags}" if flags else ""
        raise SceneError(f"no assets for red, green and blue are among its assets ({assets}){advice}")
    # 2. Where they are, else files of their names beside the item.
    paths: list[str] = []
    problems: list[str] = []
    for band in chosen.values():
        key = _as_text(band.key)
        try:
            paths.append(place.resolve(band.href))
        except SceneError as error:
            problems.append(f"asset {key}: {error}")
    if problems:
        raise SceneError("; ".join(dict.fromkeys(problems)))
    warnings = []
    if all(map(remote.is_remote, paths)) and (files := place.beside(paths, name)):
        warnings.append(
            f"{name}: its assets are remote, but files of their names lie in {Path(files[0]).parent}: those are read"
        )
        paths = files
    # 3. The scene classification, without which a scene can be read all the same.
    scl = min((band for band in bands if band.scl), key=lambda band: band.order, default=None)
    scl_path, doubts = _scl_path(scl, place, name, local=not any(map(remote.is_remote, paths)))
    warnings += doubts
    # 4. What the metadata say.
    versions = ["s2:processing_baseline", "sentinel:processing_baseline"]
    versions += ["processing:version"] if sensor is SENTINEL2 else []  # that of another sensor is no baseline
    if sensor not in (None, SENTINEL2):
        versions = []
    found = (re.fullmatch(r"N?(\d{1,2})\.?(\d{2})", _as_text(properties.get(field))) for field in versions)
    baseline = next((f"{match[1]:0>2}.{match[2]}" for match in found if match), None)
    names = ("s2:product_uri", "sentinel:product_id", "s2:granule_id")
    ids = (_as_text(properties.get(field)).removesuffix(".SAFE")[:_LONGEST_NAME] for field in names)
    offset, quantification = None, None
    if not visual:
        offset, quantification, doubt = _scaling(list(chosen.values()), properties, baseline, sensor)
        warnings += [f"{name}: {doubt}"] if doubt else []
    local = [path for path in (place.base, *paths, scl_path) if path and not remote.is_remote(path)]
    return Product(
        name=name,
        source=source,
        bands={
            colour: BandFile(path=remote.gdal_path(path), band=band.number)
            for path, (colour, band) in zip(paths, chosen.items(), strict=True)
        },
        reason="STAC assets: "
        + ", ".join(
            f"{colour} = {_as_text(band.key)}" + (f" band {band.number}" if band.count > 1 else "")
            for colour, band in chosen.items()
        )
        + f", by {' and '.join(dict.fromkeys(band.rule for band in chosen.values()))}",
        visual=visual,
        scl=BandFile(path=remote.gdal_path(scl_path), band=scl.number) if scl and scl_path else None,
        boa_offset=offset,
        quantification=quantification,
        baseline=baseline,
        datetime=_time(properties.get("datetime")) or _time(properties.get("start_datetime")),
        product_id=next(filter(None, ids), None),
        mgrs_tile=_mgrs_tile(properties),
        sentinel2=sensor in (None, SENTINEL2),
        files=tuple(sorted({str(Path(path).resolve()) for path in local})),
        warnings=tuple(warnings),
    )


def _scl_path(band: _AssetBand | None, place: _Place, item: str, *, local: bool) -> tuple[str | None, list[str]]:
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


def _sensor(item: Mapping[str, Any], properties: Mapping[str, Any]) -> Sensor | None:
    """The sensor of an item: by its platform, else its collection and id, its instruments, and fields of Sentinel-2."""
    platforms = [_as_text(properties.get(field)) for field in ("platform", "constellation")]
    names = [_as_text(item.get(field))[:_LONGEST_NAME] for field in ("collection", "id")]
    instruments = [_as_text(name) for name in _as_list(properties.get("instruments"))]
    fields = any(name.startswith(("s2:", "sentinel:")) for name in properties)
    return known_sensor(platforms, names, instruments) or (SENTINEL2 if fields else None)


def _scaling(
    bands: Sequence[_AssetBand], properties: Mapping[str, Any], baseline: str | None, sensor: Sensor | None
) -> tuple[int | tuple[int, ...] | None, float | tuple[float, ...] | None, str | None]:
    """What is to be added to digital numbers, how many are one unit of reflectance, of all bands or of each, and what
    is doubtful there.
    """
    applied = properties.get("earthsearch:boa_offset_applied", properties.get("sentinel:boa_offset_applied"))
    stated: list[tuple[int | None, float | None]] = []
    doubts = dict.fromkeys(band.doubt for band in bands if band.doubt)
    for band in bands:
        added, units, scale = None, None, band.scale
        # 1 is what tools write that know of no scale, unless values are reflectance itself.
        if scale is not None and scale > 0 and (scale != 1 or band.dtype.startswith("float")):
            exact = None if band.offset is None else band.offset / scale
            if math.isfinite(1 / scale) and (exact is None or abs(exact) < _LARGEST_OFFSET):
                added, units = None if exact is None else round(exact), round(1 / scale, 6)
        stated.append((added, units))
    offsets, quantifications = [offset for offset, _ in stated], [number for _, number in stated]
    offset: int | tuple[int, ...] | None = None
    quantification: float | tuple[float, ...] | None = None
    if len(set(stated)) == 1:
        offset, quantification = stated[0]
    elif sensor is SENTINEL2 or None in offsets or None in quantifications:
        doubts["its bands declare different scales or offsets, and none is taken: --boa-offset sets one"] = None
    else:
        offset = tuple(number for number in offsets if number is not None)
        quantification = tuple(number for number in quantifications if number is not None)
    doubt = "; ".join(doubts) or None
    if applied is True:
        return 0, quantification, doubt
    if applied is False and offset == 0 and baseline and baseline_offset(baseline):
        doubt = "it declares the offset 0, and says too that the offset of its processing baseline was not applied"
        offset = None
    return offset, quantification, doubt


def _mgrs_tile(properties: Mapping[str, Any]) -> str | None:
    parts = ("mgrs:utm_zone", "mgrs:latitude_band", "mgrs:grid_square")
    for text in (
        _as_text(properties.get("s2:mgrs_tile")),
        _as_text(properties.get("grid:code")).removeprefix("MGRS-"),
        "".join(str(properties.get(part, "")) for part in parts),
    ):
        if match := re.fullmatch(r"T?(\d{1,2}[A-Z]{3})", text):
            return match[1].zfill(5)
    return None


def _time(value: Any) -> str | None:
    """RFC 3339 in UTC, to the millisecond where it has a fraction, as of other sources."""
    match = re.fullmatch(r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(\.\d+)?([Zz]|[+-]\d\d:\d\d)?", _as_text(value))
    if not match:
        return None
    day, clock, fraction, zone = match.groups(default="")
    zone = "+00:00" if zone in ("", "Z", "z") else zone
    try:
        return rfc3339(datetime.fromisoformat(f"{day}T{clock}.{fraction[1:7]:0<6}{zone}").astimezone(timezone.utc))
    except (ValueError, OverflowError):
        return None


# What assets hold


@dataclass(frozen=True, slots=True)
class _AssetBand:
    """A band of an asset, as its metadata describe it."""

    name: str  # its own, in lower case
    key: str  # and href: of the asset
    href: str
    number: int  # of the band in the asset, from 1
    colour: str | None  # ``red``, ``green``, ``blue`` or None
    scl: bool  # whether it is the scene classification of Sen2Cor
    metres: float | None  # size of a pixel, or None
    jp2: bool  # whether it is JPEG 2000, which is slow to read in parts
    visual: bool  # whether it is of a picture for people
    count: int  # bands in the asset
    scale: float | None  # and offset: reflectance = digital number · scale + offset; None where not stated
    offset: float | None
    dtype: str  # as STAC calls it, or empty
    rule: str  # what says its colour
    distance: float = 0.0  # of its wavelength from the usual one of its colour, in micrometres
    doubt: str | None = None  # about its scale

    @property
    def order(self) -> tuple[float, float, bool, int]:
        """Of the bands of one colour the least is read: fine pixels, the usual wavelength, a fast format, a file of its
        own.
        """
        return (self.metres if self.metres is not None else math.inf, self.distance, self.jp2, self.count)


def _asset_bands(item: Mapping[str, Any], sensor: Sensor | None) -> Iterator[_AssetBand]:
    """All bands of all assets of an item that can hold data.

    Of STAC 1.1 ``bands`` is read, of 1.0 ``eo:bands`` and ``raster:bands``; what they leave out, the asset says, and
    its key: ``red``, ``B04``, ``B04_10m``, ``red-jp2``, ``visual``, ``TCI``, ``SCL``.
    """
    for key, value in _as_object(item.get("assets")).items():
        asset = _as_object(value)
        roles = {role.lower() for role in _as_list(asset.get("roles")) if isinstance(role, str)}
        href = asset.get("href")
        if not isinstance(href, str) or roles & _NO_DATA_ROLES:
            continue
        match = _KEY.fullmatch(key)
        name = (match["name"] if match else key).lower()
        described = [_as_object(band) for band in _as_list(asset.get("bands")) or _as_list(asset.get("eo:bands"))]
        rasters = [_as_object(band) for band in _as_list(asset.get("raster:bands"))]
        visual = "visual" in roles or name in _VISUAL
        if visual and len(described) < len(_COLOURS):
            described = [{"name": colour} for colour in _COLOURS]
        count = max(1, len(described), len(rasters))
        doubt = None
        if len(rasters) > max(1, len(described)) and (described or name in _COLOURS):
            # Several descriptions of one band: reflectance, radiance …
            count = max(1, len(described))
            kinds = {(_number(raster.get("scale")), _number(raster.get("offset"))) for raster in rasters}
            if len(kinds) > 1:
                doubt = f"asset {key} has {len(rasters)} raster:bands for {count} bands, and no scale of them is taken"
                rasters = [{**raster, "scale": None, "offset": None} for raster in rasters]
        placed = sensor.positions.get(count) if sensor else None
        for index in range(count):
            own = {**asset, **(rasters[index] if index < len(rasters) else {})}
            own |= described[index] if index < len(described) else {}
            band = str(own.get("name") or "").lower() if described else name
            common = str(own.get("eo:common_name") or own.get("common_name") or "").lower()
            length = to_micrometres(_number(own.get("eo:center_wavelength", own.get("center_wavelength"))), "µm")
            words = _as_text(own.get("description"))[:_LONGEST_NAME] if described and index < len(described) else ""
            # A name without a colour may have one in its description.
            found = colour_of(BandText(words, common, length), None) if words else None
            found = found or colour_of(BandText(band, common, length), sensor)
            if found is None and sensor and placed and index + 1 in placed and not (common or words or length):
                found = _COLOURS[placed.index(index + 1)], 0.0, f"positions of {sensor.name}"
            kind = str(asset.get("type") or "").lower()
            transform = _as_list(own.get("proj:transform"))
            metres = [_number(own.get(field)) for field in ("gsd", "raster:spatial_resolution", "spatial_resolution")]
            metres += [abs(_number(transform[0]) or 0) if transform else None]
            metres += [float(match["metres"]) if match and match["metres"] else None]
            yield _AssetBand(
                name=band,
                key=key,
                href=href,
                number=index + 1,
                colour=found[0] if found else None,
                scl="scl" in (band, name),
                metres=next(filter(None, metres), None),
                jp2="jp2" in kind or re.split("[?#]", href)[0].lower().endswith(".jp2"),
                visual=visual,
                count=count,
                scale=_number(own.get("raster:scale", own.get("scale"))),
                offset=_number(own.get("raster:offset", own.get("offset"))),
                dtype=str(own.get("data_type") or ""),
                distance=found[1] if found else 0.0,
                rule=found[2] if found else "",
                doubt=doubt,
            )


def _choose_bands(bands: Sequence[_AssetBand], *, visual: bool) -> dict[str, _AssetBand]:
    """The band of each colour, of pictures for people or of reflectances; none at all where one is missing."""
    found = {}
    for colour in _COLOURS:
        fitting = [band for band in bands if band.colour == colour and band.visual == visual]
        if not fitting:
            return {}
        found[colour] = min(fitting, key=lambda band: band.order)
    return found


# Where they are


@dataclass(frozen=True, slots=True)
class _Place:
    """Where hrefs of an item lead."""

    base: str | None  # file or URL of the document, or None
    # whether the item is the only one of its document, so that files beside it are its own; those of others lie
    # in folders called by their ids
    alone: bool
    link: str | None  # the item's ``self`` link, or None
    access: Access  # what assets may be

    @property
    def folder(self) -> Path:
        """Where relative hrefs of a document begin that is a file, or came by another way."""
        return Path(self.base).parent if self.base and not remote.is_remote(self.base) else Path()

    def resolve(self, href: str) -> str:
        """A path below the item's folder or a root, or a URL; SceneError where it may not be, or is not there."""
        if not href or not href.isprintable():
            raise SceneError(f"the href {_as_text(href)[:_LONGEST_HREF]!r} is none")
        if len(href) > _LONGEST_HREF:
            raise SceneError(f"an href has {len(href)} letters, and no address has more than {_LONGEST_HREF}")
        try:
            urlsplit(href)
        except ValueError as error:
            raise SceneError(f"the href {href} is none: {error}") from error
        here = not (self.base and remote.is_remote(self.base))
        if not here and href.lower().startswith(("file:", "/vsi")):
            raise SceneError(
                f"{href} is a file of this machine, which a remote document may not name: download the item"
            )
        found = href
        if href.lower().startswith("file:"):
            parts = urlsplit(href)
            if parts.netloc not in ("", "localhost"):
                raise SceneError(f"{href} is on another machine ({parts.netloc}): copy it here")
            found = url2pathname(parts.path)
        refuse_gdal_name(found, what="the href")
        if remote.is_remote(found):
            path = _checked_url(found)
        elif self.base and not here:
            path = _checked_url(urljoin(self.base, found))
        else:
            path = self._local(found, href)
        if urlsplit(path).path.lower().endswith(".vrt") and not self.access.vrt:
            raise SceneError(f"{href} is a VRT, which may name any file: pass --allow-vrt if you trust the item")
        return path

    def _local(self, name: str, href: str) -> str:
        link = self.link if self.link and remote.is_remote(self.link) else None
        names = dict.fromkeys((name, name if name != href else unquote(name)))
        paths = [self.folder / each for each in names if each.isprintable()]
        try:
            for path in paths:
                real = self.access.confine(path, self.folder, what=f"the href {href}")
                if _is_file(real):
                    return str(real)
        except SceneError:
            # A saved item: what it calls its neighbours are those of the place it was saved from.
            if not link:
                raise
        if not link:
            raise SceneError(
                f"{href} does not exist ({paths[0].absolute()}): check the item's hrefs, or put the file there"
            )
        scheme = link.split("://", 1)[0]  # urljoin knows nothing of s3
        try:
            url = scheme + urljoin("http" + link.removeprefix(scheme), name).removeprefix("http")
        except ValueError as error:
            raise SceneError(f"the item's self link {_as_text(link)[:_LONGEST_HREF]} is none: {error}") from error
        return _checked_url(url)

    def beside(self, hrefs: Iterable[str], item: str) -> list[str] | None:
        """The files of the same names as remote hrefs that lie beside the item, if all do; SceneError for links
        elsewhere.
        """
        if not self.base or remote.is_remote(self.base):
            return None
        names = [Path(unquote(urlsplit(href).path)).name for href in hrefs]
        own = [self.folder / item] if item and item != ".." and Path(item).name == item else []
        for folder in ([self.folder] if self.alone else []) + own:
            files = [folder / name for name in names]
            if all(map(_is_file, files)):
                return [
                    str(self.access.confine(file, self.folder, what=f"{file.name} beside the item")) for file in files
                ]
        return None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def _checked_url(url: str) -> str:
    """A URL that has a host, a scheme that is read, and no secrets of others in it."""
    remote.gdal_path(url)
    remote.named_hosts([url])
    return url


def _as_object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _as_text(value: Any) -> str:
    return plain(value) if isinstance(value, str) else ""


def _number(value: Any) -> float | None:
    try:
        number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    except OverflowError:  # JSON has whole numbers of any size
        return None
    return number if math.isfinite(number) else None
