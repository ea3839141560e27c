"""The gate: the one place where GDAL opens anything to read.

GDAL opens a file by its content, and some 140 drivers look at it: behind ``scene.tif`` may stand a description of a web
service, a cache that GDAL writes to, or a list of other files. So every raster is opened here, with the few drivers
that hold their pixels themselves, without the files beside it, and with sizes judged before any pixel is read.
"""

from __future__ import annotations

import os
import re
import threading
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rasterio
from rasterio._err import CPLE_BaseError  # what GDAL's errors become where rasterio catches none; it has no public name
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader

from rsedge.errors import SceneError
from rsedge.runtime.scenes import remote
from rsedge.runtime.scenes.access import LOCAL, Access, shortened
from rsedge.runtime.scenes.headers import Read, Sizes, declared_sizes
from rsedge.runtime.scenes.reference import check_reference, forget_error

_JPEG2000 = ("JP2OpenJPEG", "JP2KAK", "JP2ECW", "JP2MrSID", "JPEG2000")
DRIVERS = ("GTiff", *_JPEG2000, "PNG", "JPEG", "WEBP")
"""Formats that hold their own pixels and refer to no other file; GDAL's builds have one or several for JPEG 2000."""

SETTINGS = {
    # Files beside the raster (.aux.xml, .ovr, .msk, world files, metadata) may be of any format and name any other.
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_PAM_ENABLED": "NO",
    "GDAL_VRT_ENABLE_PYTHON": "NO",
    "GDAL_VRT_ENABLE_RAWRASTERBAND": "NO",
}
"""GDAL's configuration while rasters are opened and read."""
# Nothing at all is fetched, whatever asks for it.
_NO_NETWORK = {"CPL_VSIL_CURL_ALLOWED_FILENAME": "none"}
_LFS = b"version https://git-lfs"
_WARNING_FILTERS = threading.Lock()
_SHOWN = 200  # characters of a name or half a reason
_NETWORK_NAME = re.compile(
    r"/vsi(?:curl(?:_streaming)?(?:/|\?(?:use_head=no&)?url=)(?:https?|ftp)(?:://|%3A%2F%2F)"
    r"|(?:s3|gs|az|adls|oss|swift)(?:_streaming)?/)",
    re.IGNORECASE,
)
# Metadata by which a raster of any format can refer to another file: overviews, and arrays of coordinates.
_REFERRING = {
    "OVERVIEWS": {"OVERVIEW_FILE"},
    "ProxyOverviewRequest": {"FILENAME"},
    "GEOLOCATION": {"X_DATASET", "Y_DATASET"},
}
SUBDATASET = re.compile(r"GTIFF_DIR:(?:off:)?\d+:(?P<path>.+)", re.DOTALL)
_ZIP_MEMBER = re.compile(
    r"/vsizip/(?:\{(?P<braced>[^{}]+)\}|(?P<plain>.+?\.zip))/(?P<member>.+)", re.DOTALL | re.IGNORECASE
)


_ITEM_BYTES = {"uint8": 1, "int8": 1, "uint16": 2, "int16": 2, "uint32": 4, "int32": 4, "float32": 4}
_ITEM_BYTES |= {"uint64": 8, "int64": 8, "float64": 8, "complex64": 8, "complex_int16": 4, "complex128": 16}
_MEMBER_HEAD = 2**20  # bytes of a zip's member that are looked at


READ_ERRORS = (RasterioError, CPLE_BaseError)
"""What rasterio raises for pixels or metadata that cannot be read."""


class OwnVrt(str):
    """The text of a VRT that rsedge wrote itself, from sources that passed the gate."""

    __slots__ = ()


def settings(access: Access = LOCAL) -> dict[str, str]:
    """GDAL's configuration for what may be touched; for ``rasterio.Env``, which holds for the thread that enters it."""
    return {**SETTINGS, **(remote.gdal_options() if access.remote else _NO_NETWORK)}


def open_dataset(target: str, access: Access = LOCAL, *, overview: int | None = None) -> Any:
    """Open a raster to read, for the thread that calls.

    Args:
        target: Path of a file, a subdataset of a TIFF, a member of a zip as ``read_safe`` names it, a file in
            memory, a name of GDAL's on the network, or an :class:`OwnVrt`.
        access: What may be touched.
        overview: Level of an overview inside the file that is opened in place of the full raster, from 0.

    Returns:
        An open rasterio dataset.

    Raises:
        SceneError: It is of no format that is read, its sizes are beyond the limits, its coordinate reference system
            names files, or GDAL cannot open it.
        OptionError: It is remote, and that was not allowed.
    """
    name = shortened(target)
    # 1. What kind of name is it, and which drivers may look at it?
    drivers: tuple[str, ...] = DRIVERS
    read: Read | None = None
    options: dict[str, Any] = {} if overview is None else {"overview_level": overview}
    places = True
    if isinstance(target, OwnVrt):
        drivers, name = ("VRT",), "the VRT"
    elif remote.is_remote(target):
        if not _NETWORK_NAME.match(target):
            raise SceneError(f"{remote.unsigned(target)} is no file on the network that rsedge reads: pass its URL")
        remote.check_allowed([target], allow=access.remote)
        name = remote.unsigned(target)
    elif target.startswith("/vsimem/"):
        pass  # bytes that rsedge itself put there, after judge_header
    elif match := _ZIP_MEMBER.fullmatch(target):
        drivers = _JPEG2000  # members of SAFE products
        # They state their place in GML; GeoTIFF in a box, which may stand at the very end, is not looked at.
        places, options["GEOREF_SOURCES"] = False, "GMLJP2"
        read = _reader_of_member(match["braced"] or match["plain"], match["member"])
    elif target.startswith("/vsi"):
        raise SceneError(
            f"{name} is a name of GDAL's own, and rsedge opens files: unpack or copy it, then pass the file"
        )
    else:
        path = Path(target)
        subdataset = None if path.exists() else SUBDATASET.fullmatch(target)  # a file may be called so
        path = Path(subdataset["path"]) if subdataset else path
        drivers = ("GTiff",) if subdataset else DRIVERS
        read = _reader_of_file(path)
        target = target if subdataset else os.fspath(path.absolute())
    # 2. Judge the sizes that the header declares.
    if read is not None:
        judge_header(read, name, access, places=places)
    # 3. Open it with these drivers alone.
    dataset = _open(target, name, drivers, access, options)
    # 4. Judge what is open.
    try:
        with reading(name):
            _check(dataset, name, access)
    except BaseException:
        dataset.close()
        raise
    return dataset


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Raise what rasterio raises over the metadata or pixels of an open raster as SceneError."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise SceneError(
            f"{name} has metadata that are not UTF-8 (a band's name, a tag, its coordinate reference system): "
            "gdal_translate -nomd writes it without them"
        ) from error
    except READ_ERRORS as error:
        reason = re.sub(r"\s+", " ", str(error.__cause__ or error))[: 2 * _SHOWN]
        raise SceneError(f"{name} cannot be read: {reason} (gdalinfo says more)") from error


def judge_header(read: Read, name: str, access: Access = LOCAL, *, places: bool = True) -> None:
    """Refuse a raster by its first bytes, before GDAL sees it; SceneError where it is refused or cannot be read.

    Args:
        read: Reads parts of it.
        name: What messages call it.
        access: Its limits.
        places: See :func:`rsedge.runtime.scenes.headers.declared_sizes`.
    """
    try:
        for sizes in declared_sizes(read, places=places):
            sizes.check(name, access.max_pixels)
    except ValueError as error:
        raise SceneError(f"{name} is not opened: {error}; gdal_translate makes a GeoTIFF of what you trust") from error
    except OSError as error:
        raise SceneError(f"{name} cannot be read: {error.strerror or error}; check its permissions") from error


def _open(target: str, name: str, drivers: tuple[str, ...], access: Access, options: dict[str, Any]) -> Any:
    try:
        # Scene.warnings says it; catch_warnings changes the whole process, hence one thread at a time.
        with _WARNING_FILTERS, warnings.catch_warnings(), rasterio.Env(**settings(access)):
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            return DatasetReader(target, driver=list(drivers), **options)
    except UnicodeEncodeError as error:
        shown = os.fsencode(name).decode("utf-8", "replace")
        raise SceneError(f"{shown} is a name that is not UTF-8, and rasterio opens none: rename the file") from error
    except READ_ERRORS as error:
        if remote.is_remote(target):
            raise remote.read_problem(target, error) from error
        reason = re.sub(r"\s+", " ", str(error))[: 2 * _SHOWN]
        if "not recognized as being in a supported file format" in reason:
            raise SceneError(_of_no_format(target, name)) from error
        raise SceneError(f"{name} cannot be opened as a raster: {reason} (gdalinfo says more)") from error


def _of_no_format(target: str, name: str) -> str:
    """Why a file of none of the formats is not opened, and what to do."""
    try:
        with Path(target).open("rb") as file:
            start = file.read(4096)
    except OSError:
        start = b""
    known, remedy = "TIFF, JPEG 2000, PNG, JPEG and WebP", "gdal_translate makes a GeoTIFF of what you trust"
    if b"<VRTDataset" in start and not start.startswith(_LFS):
        return f"{name} is a VRT, which names other files: pass --allow-vrt (in Python, allow_vrt=True) to open it"
    if not start:
        why = "it is empty; download it again"
    elif start.startswith(_LFS):
        why = "it is a Git LFS pointer, not the file: run git lfs pull"
    elif start.lstrip()[:1] in (b"<", b"{"):
        why = (
            "it is a text that describes one elsewhere, and rsedge opens files that hold their own pixels "
            f"({known}): {remedy}"
        )
    else:
        why = f"it is none of {known}; {remedy}"
    return f"{name} cannot be opened as a raster: {why}"


def _check(dataset: Any, name: str, access: Access) -> None:
    """Refuse an open dataset beyond the limits, or one whose metadata or coordinate reference system name files."""
    # Before anything asks for overviews: GDAL would open, with every driver, the file that a TIFF's own metadata name.
    for domain, keys in _REFERRING.items():
        if found := keys & dataset.tags(ns=domain).keys():
            raise SceneError(
                f"{name} is not opened: its metadata name another file ({domain}: {', '.join(sorted(found))}), and an "
                "input may not: gdal_translate -nomd writes it without them"
            )
    if dataset.count:
        rows, cols = dataset.block_shapes[0]
        together = dataset.count if (dataset.interleaving and dataset.interleaving.name == "pixel") else 1
        Sizes(
            width=dataset.width,
            height=dataset.height,
            bands=dataset.count,
            blocks=-(-dataset.width // max(1, cols)) * -(-dataset.height // max(1, rows)),
            block_bytes=rows * cols * together * _ITEM_BYTES.get(dataset.dtypes[0], 16),
        ).check(name, access.max_pixels)
    forget_error()
    try:
        if dataset.crs:
            check_reference(dataset.crs)
    except (ValueError, CPLE_BaseError) as error:
        reason = str(error) if isinstance(error, ValueError) else "PROJ cannot make anything of it"
        raise SceneError(
            f"{name} is not opened: its coordinate reference system is not used, as {reason[: 2 * _SHOWN]}: "
            "gdal_translate -a_srs EPSG:… gives it another"
        ) from error


def _reader_of_file(path: Path) -> Read:
    """Reads parts of a regular file; SceneError where it is none: opening a pipe would wait for a writer."""
    try:
        if not path.is_file():
            what = "is no regular file" if path.exists() else "does not exist"
            raise SceneError(f"{path} cannot be opened as a raster: it {what}; check the path")
    except (OSError, ValueError) as error:
        raise SceneError(f"{str(path)[:_SHOWN]!r} is no path: {error}") from error

    def read(offset: int, length: int) -> bytes:
        with path.open("rb") as file:
            file.seek(min(offset, 2**62))
            return file.read(length)

    return read


def _reader_of_member(archive: str, member: str) -> Read:
    """Reads the beginning of a zip's member, unpacked once; ValueError farther in, so that nothing passes unjudged."""
    head: list[bytes] = []

    def read(offset: int, length: int) -> bytes:
        if not head:
            try:
                with zipfile.ZipFile(archive) as opened, opened.open(member) as file:
                    head.append(file.read(_MEMBER_HEAD))
            except (zipfile.BadZipFile, KeyError, RuntimeError, EOFError, NotImplementedError, zlib.error) as error:
                raise SceneError(f"{member} in {archive} cannot be read: {error}; download the zip again") from error
        if offset + length > len(head[0]) == _MEMBER_HEAD:
            raise ValueError(
                f"its codestream begins more than {_MEMBER_HEAD >> 20} MiB behind its start: unpack the zip"
            )
        return head[0][offset : offset + length]

    return read
