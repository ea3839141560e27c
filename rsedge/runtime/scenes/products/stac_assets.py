"""What STAC assets hold and where they are: bands with colours, resolutions and scales; hrefs as files and URLs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import url2pathname

from rsedge.errors import SceneError
from rsedge.runtime.scenes import remote
from rsedge.runtime.scenes.access import refuse_gdal_name
from rsedge.texts import plain

if TYPE_CHECKING:
    from rsedge.runtime.scenes.access import Access

COLOURS = ("red", "green", "blue")
_BAND_COLOURS = {"red": "red", "b04": "red", "b4": "red", "green": "green", "b03": "green", "b3": "green"}
_BAND_COLOURS |= {"blue": "blue", "b02": "blue", "b2": "blue"}

# What catalogues append to the name of a band: B04_10m, red-jp2.
_KEY = re.compile(r"(?P<name>[a-z0-9]+?)(?:[_-](?P<metres>\d+)m)?(?:[_-](?:jp2|cog|tiff?))?", re.IGNORECASE)
_LONGEST_HREF = 8192
_VISUAL = frozenset({"visual", "tci", "truecolor"})
_NO_DATA_ROLES = frozenset({"thumbnail", "overview", "metadata"})


@dataclass(frozen=True, slots=True)
class AssetBand:
    """A band of an asset, as its metadata describe it.

    Attributes:
        key: Of the asset.
        href: Of the asset.
        number: Of the band in the asset, from 1.
        colour: ``red``, ``green``, ``blue`` or None.
        scl: Whether it is the scene classification of Sen2Cor.
        metres: Size of a pixel, or None.
        jp2: Whether it is JPEG 2000, which is slow to read in parts.
        visual: Whether it is of a picture for people.
        count: Bands in the asset.
        scale, offset: reflectance = digital number · scale + offset; None where not stated.
        dtype: As STAC calls it, or empty.
    """

    key: str
    href: str
    number: int
    colour: str | None
    scl: bool
    metres: float | None
    jp2: bool
    visual: bool
    count: int
    scale: float | None
    offset: float | None
    dtype: str

    @property
    def order(self) -> tuple[float, bool, int]:
        """Of the bands of one colour the least is read: fine pixels, a format that is read fast, a file of its own."""
        return (self.metres if self.metres is not None else float("inf"), self.jp2, self.count)


def asset_bands(item: Mapping[str, Any]) -> Iterator[AssetBand]:
    """All bands of all assets of an item that can hold data.

    Of STAC 1.1 ``bands`` is read, of 1.0 ``eo:bands`` and ``raster:bands``; what they leave out, the asset says, and
    its key: ``red``, ``B04``, ``B04_10m``, ``red-jp2``, ``visual``, ``TCI``, ``SCL``.
    """
    for key, value in as_object(item.get("assets")).items():
        asset = as_object(value)
        roles = {role.lower() for role in as_list(asset.get("roles")) if isinstance(role, str)}
        href = asset.get("href")
        if not isinstance(href, str) or roles & _NO_DATA_ROLES:
            continue
        match = _KEY.fullmatch(key)
        name = (match["name"] if match else key).lower()
        described = [as_object(band) for band in as_list(asset.get("bands")) or as_list(asset.get("eo:bands"))]
        rasters = [as_object(band) for band in as_list(asset.get("raster:bands"))]
        visual = "visual" in roles or name in _VISUAL
        if visual and len(described) < len(COLOURS):
            described = [{"name": colour} for colour in COLOURS]
        count = max(1, len(described), len(rasters))
        for index in range(count):
            own = {**asset, **(rasters[index] if index < len(rasters) else {})}
            own |= described[index] if index < len(described) else {}
            band = str(own.get("name") or "").lower() if described else name
            common = str(own.get("eo:common_name") or own.get("common_name") or "").lower()
            kind = str(asset.get("type") or "").lower()
            yield AssetBand(
                key=key,
                href=href,
                number=index + 1,
                colour=common if common in COLOURS else None if common else _BAND_COLOURS.get(band),
                scl="scl" in (band, name),
                metres=_metres(own, match["metres"] if match else None),
                jp2="jp2" in kind or re.split("[?#]", href)[0].lower().endswith(".jp2"),
                visual=visual,
                count=count,
                scale=_number(own.get("raster:scale", own.get("scale"))),
                offset=_number(own.get("raster:offset", own.get("offset"))),
                dtype=str(own.get("data_type") or ""),
            )


def _metres(band: Mapping[str, Any], in_key: str | None) -> float | None:
    transform = as_list(band.get("proj:transform"))
    stated = (
        *(_number(band.get(field)) for field in ("gsd", "raster:spatial_resolution", "spatial_resolution")),
        abs(_number(transform[0]) or 0) if transform else None,
        float(in_key) if in_key else None,
    )
    return next((value for value in stated if value), None)


def choose_bands(bands: Sequence[AssetBand], *, visual: bool) -> dict[str, AssetBand]:
    """The band of each colour, of pictures for people or of reflectances; none at all where one is missing."""
    found = {}
    for colour in COLOURS:
        fitting = [band for band in bands if band.colour == colour and band.visual == visual]
        if not fitting:
            return {}
        found[colour] = min(fitting, key=lambda band: band.order)
    return found


@dataclass(frozen=True, slots=True)
class Place:
    """Where hrefs of an item lead.

    Attributes:
        base: File or URL of the document, or None.
        alone: Whether the item is the only one of its document, so that files beside it are its own; those of others
            lie in folders called by their ids.
        link: The item's ``self`` link, or None.
        access: What assets may be.
    """

    base: str | None
    alone: bool
    link: str | None
    access: Access

    @property
    def folder(self) -> Path:
        """Where relative hrefs of a document begin that is a file, or came by another way."""
        return Path(self.base).parent if self.base and not remote.is_remote(self.base) else Path()

    def resolve(self, href: str) -> str:
        """A path below the item's folder or a root, or a URL.

        Raises:
            SceneError: The href is unusable or not allowed, or leads to a file that is not there.
        """
        if not href or not href.isprintable():
            raise SceneError(f"the href {as_text(href)[:_LONGEST_HREF]!r} is none")
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
        names = dict.fromkeys((name, name if name != href else unquote(name)))
        paths = [self.folder / each for each in names if each.isprintable()]
        try:
            for path in paths:
                real = self.access.confine(path, self.folder, what=f"the href {href}")
                if _is_file(real):
                    return str(real)
        except SceneError:
            # A saved item: what it calls its neighbours are those of the place it was saved from.
            if not (self.link and remote.is_remote(self.link)):
                raise
        if self.link and remote.is_remote(self.link):
            return _checked_url(_join(self.link, name))
        raise SceneError(
            f"{href} does not exist ({paths[0].absolute()}): check the item's hrefs, or put the file there"
        )

    def beside(self, hrefs: Iterable[str], item: str) -> list[str] | None:
        """The files of the same names as remote hrefs that lie beside the item, if all do.

        Raises:
            SceneError: They are links that lead out of the item's folder.
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


def _join(base: str, href: str) -> str:
    """``urljoin`` for any scheme: it knows nothing of s3.

    Raises:
        SceneError: ``base`` is no URL.
    """
    scheme = base.split("://", 1)[0]
    try:
        return scheme + urljoin("http" + base.removeprefix(scheme), href).removeprefix("http")
    except ValueError as error:
        raise SceneError(f"the item's self link {as_text(base)[:_LONGEST_HREF]} is none: {error}") from error


def as_object(value: Any) -> dict[str, Any]:
    """An object, empty if it is none."""
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    """A list, empty if it is none."""
    return value if isinstance(value, list) else []


def _number(value: Any) -> float | None:
    try:
        number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    except OverflowError:  # JSON has whole numbers of any size
        return None
    return number if math.isfinite(number) else None


def as_text(value: Any) -> str:
    """Plain text (:func:`rsedge.texts.plain`), empty if it is none."""
    return plain(value) if isinstance(value, str) else ""
