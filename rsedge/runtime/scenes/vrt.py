"""Users' VRTs, opened where ``--allow-vrt`` says so: checked element by element, and written anew.

A VRT is a text that makes GDAL open other files, of any format, and run functions on them. What is kept here is what
``gdalbuildvrt`` and ``gdal_translate -of VRT`` write: bands that take windows of files. Each of these files lies below
the folder of the VRT (or an ``--allow-root``), passes the gate itself, and is TIFF, JPEG 2000 or PNG: the first bytes
of these three hold a zero before any text can stand, so that GDAL's other drivers, which look for words, take none.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from rsedge.errors import SceneError
from rsedge.runtime.scenes.access import Access, is_plain_xml, refuse_gdal_name
from rsedge.runtime.scenes.gdal import OwnVrt, open_dataset
from rsedge.runtime.scenes.reference import WKT, file_named

_LARGEST = 4 * 2**20  # bytes
_MOST_SOURCES = 10_000
_BAND = frozenset({"ColorInterp", "NoDataValue", "Description", "Metadata", "Offset", "Scale", "UnitType", "ColorTable",
                   "CategoryNames", "HideNoDataValue"})  # fmt: skip
_SOURCES = frozenset({"SimpleSource", "ComplexSource", "AveragedSource"})
_SOURCE = frozenset({"SourceBand", "SrcRect", "DstRect", "NODATA", "ScaleOffset", "ScaleRatio", "LUT", "UseMaskBand"})
_KEPT_WHOLE = frozenset({"GeoTransform", "GCPList", "SRS", "Metadata", "BlockXSize", "BlockYSize"})
_FORMATS = ("GTiff", "JP2OpenJPEG", "JP2KAK", "JP2ECW", "JP2MrSID", "PNG")


def is_vrt(path: Path) -> bool:
    """Whether a file holds a VRT, whatever it is called."""
    try:
        with path.open("rb") as file:
            return b"<VRTDataset" in file.read(4096)
    except OSError:
        return False


def read_vrt(path: Path, access: Access) -> tuple[OwnVrt, tuple[str, ...]]:
    """Read a VRT and write it anew, with its sources as absolute paths.

    Args:
        path: Of the VRT.
        access: What it may touch.

    Returns:
        What :func:`rsedge.runtime.scenes.gdal.open_dataset` opens, and the files it takes its pixels from.

    Raises:
        SceneError: It is damaged, holds elements other than plain windows of files, or names a file that it may not.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise SceneError(f"{path} has more than {_LARGEST >> 20} MiB: make a GeoTIFF of it with gdal_translate")
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
        file = self._file((names[0].text or "").strip())
        # Shared handles would be used by several threads at once.
        ElementTree.SubElement(made, "SourceFilename", relativeToVRT="0", shared="0").text = file
        for child in source:
            if child.tag in _SOURCE:
                made.append(self._text_alone(child))
            elif child.tag not in ("SourceFilename", "SourceProperties"):
                raise self._refused(child, "only windows of files are")
        return made

    def _file(self, name: str) -> str:
        what = f"a source of {self.path}"
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
        return file

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
        _bounded(element, self._refused)
        return element

    def _refused(self, element: Element, why: str) -> SceneError:
        return SceneError(
            f"{self.path} is not opened: it holds {element.tag[:60]}, and of a VRT {why} allowed: make a GeoTIFF of it "
            "with gdal_translate"
        )


def _bounded(element: Element, refused: Callable[[Element, str], Exception]) -> None:
    """Refuse elements nested deeper than any that GDAL writes."""
    if any(len(inner) for child in element for inner in child):
        raise refused(element, "only flat lists of values are")
