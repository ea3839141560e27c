"""Texts and files around a raster: those beside it, and VRTs. GDAL reads none of them as it finds them.

Files beside a raster may be of any format and name any other file. A mask (``.msk``) is opened through the gate like
any raster. Where the raster says nothing of its place on a map, the coordinate reference system and the geotransform
of ``.aux.xml``, or a world file, are read here. What else would change the pixels is named in a warning.

A VRT is a text that makes GDAL open other files, of any format, and run functions on them. Where ``--allow-vrt`` says
so it is opened: checked element by element, and written anew. What is kept is what ``gdalbuildvrt`` and
``gdal_translate -of VRT`` write: bands that take windows of files. Each of these files lies below the folder of the VRT
(or an ``--allow-root``), passes the gate itself, and is TIFF, JPEG 2000 or PNG: the first bytes of these three hold a
zero before any text can stand, so that GDAL's other drivers, which look for words, take none.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from rasterio.transform import Affine

from rsedge.errors import SceneError
from rsedge.runtime.scenes.access import is_plain_xml, refuse_gdal_name
from rsedge.runtime.scenes.gdal import OwnVrt, open_dataset
from rsedge.runtime.scenes.products.product import PER_BAND, BandFile
from rsedge.runtime.scenes.reference import WKT, file_named, parse_reference

if TYPE_CHECKING:
    from rsedge.runtime.scenes.access import Access

# What of GDAL's own sidecar decides pixels or place; statistics and names do not.
_DECIDES = (b"<NoDataValue", b"<GCPList", b"<ColorInterp", b"<Scale", b"<Offset")
_LARGEST = 2**20  # bytes of a text beside a raster
_LARGEST_VRT = 4 * 2**20
_WORLD_FILES = {"tif": "tfw", "tiff": "tfw", "jp2": "j2w", "png": "pgw", "jpg": "jgw", "jpeg": "jgw", "webp": "wldx"}
_PER_DATASET = "2"

_MOST_SOURCES = 10_000
_BAND = frozenset({"ColorInterp", "NoDataValue", "Description", "Metadata", "Offset", "Scale", "UnitType", "ColorTable",
                   "CategoryNames", "HideNoDataValue"})  # fmt: skip
_SOURCES = frozenset({"SimpleSource", "ComplexSource", "AveragedSource"})
_SOURCE = frozenset({"SourceBand", "SrcRect", "DstRect", "NODATA", "ScaleOffset", "ScaleRatio", "LUT", "UseMaskBand"})
_KEPT_WHOLE = frozenset({"GeoTransform", "GCPList", "SRS", "Metadata", "BlockXSize", "BlockYSize"})
_FORMATS = ("GTiff", "JP2OpenJPEG", "JP2KAK", "JP2ECW", "JP2MrSID", "PNG")


def mask_beside(target: str, dataset: Any, access: Access) -> tuple[BandFile | None, str | None]:
    """The mask in ``FILE.msk``; its band is ``PER_BAND`` if it has a mask for each band of the raster.

    Args:
        target: The raster, as the gate opened it.
        dataset: It, open.
        access: What the mask may touch.

    Returns:
        The mask, or None; and a warning where there is one that is not used.
    """
    path = Path(f"{target}.msk")
    if target.startswith("/vsi") or not os.path.isfile(path):  # noqa: PTH113 - Path raises for long names
        return None, None
    if not _lies_beside(path):
        return None, f"{path} is not used as a mask: it is a link to a file elsewhere"
    try:
        with open_dataset(str(path), access) as mask:
            if mask.driver != "GTiff":
                return None, f"{path} is not used as a mask: it is {mask.driver}, and masks are TIFF"
            if mask.shape != dataset.shape:
                return None, f"{path} is not used as a mask: it has {mask.width} x {mask.height} px, the raster others"
            if mask.tags().get("INTERNAL_MASK_FLAGS_1", _PER_DATASET) != _PER_DATASET and mask.count > 1:
                if mask.count != dataset.count:
                    counts = f"{mask.count} bands, the raster {dataset.count}"
                    return None, f"{path} is not used as a mask: it has masks for {counts}"
                return BandFile(path=str(path), band=PER_BAND), None
    except SceneError as error:
        return None, f"{path} is not used as a mask: {error}"
    return BandFile(path=str(path)), None


def place_beside(name: str) -> tuple[Any, Affine | None]:
    """The reference system and the geotransform that files beside a raster state which has none; None each where none
    does.
    """
    path = Path(name)
    crs, transform = None, None
    try:
        beside = Path(f"{name}.aux.xml")
        if beside.is_file() and _lies_beside(beside) and beside.stat().st_size <= _LARGEST:
            text = beside.read_bytes()
            if is_plain_xml(text):
                root = ElementTree.fromstring(text)
                stated = (root.findtext("SRS") or "").strip()
                transform = _affine((root.findtext("GeoTransform") or "").split(","))
                crs = parse_reference(stated) if stated else None
        world = _WORLD_FILES.get(path.suffix.lower().lstrip("."))
        file = path.with_suffix(f".{world}")
        if transform is None and world and file.is_file() and _lies_beside(file):
            with file.open("rb") as opened:
                a, d, b, e, x, y = opened.read(1024).decode("ascii").split()[:6]
            centred = _affine([x, a, b, y, d, e])  # it names the middle of the first pixel
            transform = centred @ Affine.translation(-0.5, -0.5) if centred else None
    except (OSError, ValueError, LookupError, ElementTree.ParseError):
        pass  # as without them: the scene says that it has no place
    return crs, transform


def _lies_beside(path: Path) -> bool:
    """Whether a file is in the folder it is named in, and no link to one elsewhere."""
    return path.resolve().parent == path.parent.resolve()


def _affine(numbers: Sequence[str]) -> Affine | None:
    """A geotransform of GDAL's, six finite numbers with an area; None for anything else."""
    values = [float(number) for number in numbers]
    if len(values) != 6 or not all(map(math.isfinite, values)):
        return None
    transform = Affine.from_gdal(*values)
    return transform if transform.determinant else None


def unread_sidecars(target: str) -> Iterator[str]:
    """A warning for each file beside a raster that GDAL would read and that decides something."""
    if target.startswith(("/vsi", "<")):
        return
    remedy = "gdal_translate writes one file that holds it all"
    beside = Path(f"{target}.aux.xml")
    try:
        if beside.is_file() and _lies_beside(beside):
            with beside.open("rb") as file:
                start = file.read(2**16)
            if found := [part.decode().lstrip("<") for part in _DECIDES if part in start]:
                yield f"{beside} is not read for them, and it states {', '.join(found)}: {remedy}"
    except (OSError, ValueError):
        return


# VRTs


def is_vrt(path: Path) -> bool:
    """Whether a file holds a VRT, whatever it is called."""
    try:
        with path.open("rb") as file:
            return b"<VRTDataset" in file.read(4096)
    except OSError:
        return False


def read_vrt(path: Path, access: Access) -> tuple[OwnVrt, tuple[str, ...]]:
    """Read a VRT and write it anew, with its sources as absolute paths.

    Returns what :func:`rsedge.runtime.scenes.gdal.open_dataset` opens, and the files it takes its pixels from.
    SceneError where it is damaged, holds elements other than plain windows of files, or names a file that it may not.
    """
    try:
        if path.stat().st_size > _LARGEST_VRT:
            raise SceneError(f"{path} has more than {_LARGEST_VRT >> 20} MiB: make a GeoTIFF of it with gdal_translate")
        text = path.read_bytes()
        if not is_plain_xml(text):
            raise SceneError(f"{path} declares a document type, or is not in UTF-8, as no VRT is")
        root = ElementTree.fromstring(text)
    except OSError as error:
        raise SceneError(f"{path} cannot be read: {error.strerror}; check its permissions") from error
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise SceneError(f"{path} is no whole VRT: {error}; write it again") from error
    writer = _Writer(path, access)
    made = writer.dataset(root)
    return OwnVrt(ElementTree.tostring(made, encoding="unicode")), tuple(sorted(writer.files))


class _Writer:
    """Copies what is allowed of one VRT."""

    def __init__(self, path: Path, access: Access) -> None:
        self.path, self.access = path, access
        self.files: set[str] = set()
        self.sources = 0

    def dataset(self, root: Element) -> Element:
        if root.tag != "VRTDataset" or root.get("subClass"):
            raise self._refused(root, "only plain VRTs are")
        made = Element("VRTDataset", {name: root.get(name, "") for name in ("rasterXSize", "rasterYSize")})
        for child in root:
            if child.tag == "VRTRasterBand":
                made.append(self._band(child))
            elif child.tag == "MaskBand":
                mask = ElementTree.SubElement(made, "MaskBand")
                mask.extend([self._band(band) for band in child if band.tag == "VRTRasterBand"])
            elif child.tag in _KEPT_WHOLE:
                made.append(self._text_alone(child))
            elif child.tag != "OverviewList":
                raise self._refused(child, "only bands that take windows of files are")
        return made

    def _band(self, band: Element) -> Element:
        if band.get("subClass", "VRTSourcedRasterBand") != "VRTSourcedRasterBand":
            raise self._refused(band, f"bands of the kind {band.get('subClass')} are not")
        made = Element(
            "VRTRasterBand", {name: value for name, value in band.attrib.items() if name in ("dataType", "band")}
        )
        for child in band:
            if child.tag in _BAND:
                made.append(self._text_alone(child))
            elif child.tag in _SOURCES:
                made.append(self._source(child))
            elif child.tag not in ("Histograms", "Overview"):
                raise self._refused(child, "only windows of files are")
        return made

    def _source(self, source: Element) -> Element:
        self.sources += 1
        if self.sources > _MOST_SOURCES:
            raise SceneError(f"{self.path} has more than {_MOST_SOURCES} sources: make a GeoTIFF of it")
        made = Element(source.tag, {name: value for name, value in source.attrib.items() if name == "resampling"})
        names = [child for child in source if child.tag == "SourceFilename"]
        if len(names) != 1:
            raise self._refused(source, "each source names one file")
        name, what = (names[0].text or "").strip(), f"a source of {self.path}"
        refuse_gdal_name(name, what=what)
        if "://" in name:
            raise SceneError(f"{what} is remote, and a VRT may name local files only: download it")
        folder = self.path.resolve().parent
        file = os.fspath(self.access.confine(folder / name, folder, what=what))
        if file not in self.files:
            with open_dataset(file, self.access) as dataset:
                if dataset.driver not in _FORMATS:
                    raise SceneError(
                        f"{what} is {dataset.driver} ({file}), and sources of a VRT are TIFF, JPEG 2000 or PNG: "
                        "convert it with gdal_translate"
                    )
            self.files.add(file)
        # Shared handles would be used by several threads at once.
        ElementTree.SubElement(made, "SourceFilename", relativeToVRT="0", shared="0").text = file
        for child in source:
            if child.tag in _SOURCE:
                made.append(self._text_alone(child))
            elif child.tag not in ("SourceFilename", "SourceProperties"):
                raise self._refused(child, "only windows of files are")
        return made

    def _text_alone(self, element: Element) -> Element:
        """A copy of an element that names no file; texts that GDAL would look up are checked."""
        if element.tag == "SRS" and (element.text or "").strip() and not WKT.match(element.text or ""):
            raise SceneError(f"{self.path} is not opened: its SRS is neither WKT nor EPSG:…, and GDAL would look it up")
        if element.tag == "GCPList" and (given := element.get("Projection")) and not WKT.match(given):
            raise SceneError(f"{self.path} is not opened: the projection of its GCPs is neither WKT nor EPSG:…")
        for text in (element.text if element.tag == "SRS" else "", element.get("Projection")):
            if found := file_named(text or ""):
                raise SceneError(f"{self.path} is not opened: its coordinate reference system names a file ({found})")
        if element.tag == "Metadata" and element.get("domain", "IMAGERY") not in ("IMAGERY", "RPC"):
            return Element("Metadata")
        if any(len(inner) for child in element for inner in child):  # deeper than any that GDAL writes
            raise self._refused(element, "only flat lists of values are")
        return element

    def _refused(self, element: Element, why: str) -> SceneError:
        return SceneError(
            f"{self.path} is not opened: it holds {element.tag[:60]}, and of a VRT {why} allowed: make a GeoTIFF of it "
            "with gdal_translate"
        )
