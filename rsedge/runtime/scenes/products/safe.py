"""SAFE products of Sentinel-2, as ESA ships them: a folder or a zip, L1C or L2A, of any processing baseline."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rsedge.errors import SceneError
from rsedge.runtime.scenes.access import LOCAL, Access
from rsedge.runtime.scenes.products.product import BandFile, Extent, Product
from rsedge.runtime.scenes.products.safe_files import FolderFiles, ProductFiles, ZipFiles
from rsedge.runtime.scenes.products.safe_metadata import (
    GranuleMetadata,
    ProductMetadata,
    granule_metadata,
    product_metadata,
)
from rsedge.runtime.scenes.products.sentinel2 import ProductName, baseline_offset, printable

_COLOURS = {"red": "B04", "green": "B03", "blue": "B02"}
# MTD_MSIL2A.xml; before December 2016 S2A_OPER_MTD_SAFL1C_PDMC_….xml, and of Sen2Cor S2A_USER_MTD_SAFL2A_….xml
_PRODUCT_METADATA = re.compile(r"(?:MTD_MSI|S2[A-D]_(?:OPER|USER)_MTD_SAF)L(?:1C|2A)\w*\.xml", re.IGNORECASE)
_GRANULE_METADATA = re.compile(r"(?:MTD_TL|S2[A-D]_(?:OPER|USER)_MTD_L(?:1C|2A)_\w*)\.xml", re.IGNORECASE)
_MOST_GRANULES = 500  # products before 2017 have a few dozen
_WHAT_TO_PASS = "pass a .SAFE folder or zip as downloaded, or its MTD_MSIL1C.xml or MTD_MSIL2A.xml"


def is_safe(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a SAFE product, or a part of one that names it; it may be damaged all the same.

    True for a ``.SAFE`` folder, a folder with product metadata and granules, in such a product the metadata, a granule,
    and its ``IMG_DATA`` and ``R10m``, and for a zip that holds a product by its central directory or is named as one.
    Opens nothing but a zip.
    """
    file = Path(path)
    if file.is_file():
        if file.suffix.lower() == ".zip":
            return _is_safe_zip(file)
        if not (_PRODUCT_METADATA.fullmatch(file.name) or _GRANULE_METADATA.fullmatch(file.name)):
            return False
    elif not file.is_dir():
        return False
    root = _product_folder(file)[0]
    return root.suffix.upper() == ".SAFE" or _has_product(root)


def read_safe(source: str | os.PathLike[str], *, access: Access = LOCAL) -> list[Product]:
    """The products behind a SAFE product: one per granule, in the order of their names.

    Args:
        source: A ``.SAFE`` folder, a zip of one (or of several), product metadata in XML, a granule's folder, or in it
            the metadata, ``IMG_DATA`` or ``R10m``. A granule stands for itself, all else for all granules.
        access: Folders that links in the product may lead to, beside the product's own.

    Returns:
        Products whose ``name`` is that of the ``.SAFE`` folder without the suffix, with the MGRS tile behind it where
        the product has several granules; ``boa_offset`` is what the metadata list, else what the baseline says, and
        ``datetime`` the sensing time of the granule, else of the datatake.

    Raises:
        SceneError: There is no such product, its metadata are missing, damaged, larger than any, or declare different
            offsets for red, green and blue, band files are missing, or files of it lie outside.
    """
    with ExitStack() as opened:
        return _read(Path(source), os.fspath(source), access, opened)


def _read(file: Path, text: str, access: Access, opened: ExitStack) -> list[Product]:
    granule: str | None = None
    files: ProductFiles
    if file.suffix.lower() == ".zip" and file.is_file():
        files, home = opened.enter_context(ZipFiles(file)), file.stem
    elif file.is_dir() or file.is_file():
        folder, granule = _product_folder(file)
        files, home = FolderFiles(folder, access), folder.name
    else:
        raise SceneError(f"{text} does not exist: {_WHAT_TO_PASS}")
    roots = _roots(files, file.name if file.is_file() and _PRODUCT_METADATA.fullmatch(file.name) else None)
    if not roots:
        there = _some(sorted({name.split("/")[0] for name in files.names}))
        raise SceneError(
            f"{text} has no product metadata (MTD_MSIL1C.xml or MTD_MSIL2A.xml), there is {there}: {_WHAT_TO_PASS}; "
            "bands without them are read by their names where the folder they are in is passed"
        )
    return [
        product for root, metadata in roots for product in _Reading(text, home, files, root, metadata).products(granule)
    ]


def _has_product(folder: Path) -> bool:
    entries = _entries(folder)
    return "GRANULE" in entries and any(map(_PRODUCT_METADATA.fullmatch, entries))


def _entries(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in os.scandir(folder)]
    except OSError:
        return []


def _is_safe_zip(path: Path) -> bool:
    if path.name.lower().endswith(".safe.zip"):
        return True
    try:
        with ZipFiles(path) as files:
            names = files.names
    except SceneError:
        name = ProductName.parse(path.name)
        return name is not None and name.baseline is not None  # cut off on the way: reading it says so
    return any(".SAFE/" in name.upper() or _PRODUCT_METADATA.fullmatch(PurePosixPath(name).name) for name in names)


def _product_folder(source: Path) -> tuple[Path, str | None]:
    """The folder of the product that a folder or an XML file belongs to, and the granule if one is meant."""
    path = source.resolve()
    if path.is_file() and not _GRANULE_METADATA.fullmatch(path.name):
        return path.parent, None
    folder = path if path.is_dir() else path.parent
    for granule, below in ((folder, ""), (folder.parent, "IMG_DATA"), (folder.parent.parent, "IMG_DATA/R10m")):
        if granule.parent.name == "GRANULE" and folder == granule / below:
            return granule.parent.parent, granule.name
    return folder, None


def _roots(files: ProductFiles, named: str | None) -> list[tuple[str, str]]:
    """Folder (``""`` or with a slash behind it) and metadata file of each product; of one folder the first, sorted."""
    found: dict[str, str] = {}
    for name in sorted(files.names, reverse=True):
        folder, _, base = name.rpartition("/")
        wanted = name == named if named else _PRODUCT_METADATA.fullmatch(base) and "GRANULE" not in folder.split("/")
        if wanted:
            found[f"{folder}/" if folder else ""] = name
    # A product that holds another in a folder of its own is the product that was meant.
    return sorted((folder, name) for folder, name in found.items() if folder == "" or "" not in found)


@dataclass(frozen=True, slots=True)
class _Granule:
    """A granule's folder, the files in it, and what its metadata say."""

    name: str
    files: tuple[str, ...]
    metadata_file: str | None
    mgrs_tile: str | None
    datetime: str | None
    extent: Extent | None


class _Reading:
    """One product while it is read."""

    def __init__(self, source: str, home: str, files: ProductFiles, root: str, metadata_file: str) -> None:
        self.source = source
        self.files = files
        self.root = root
        self.metadata_file = metadata_file
        self.metadata: ProductMetadata = product_metadata(files.read(metadata_file), self._shown(metadata_file))
        folder = printable(PurePosixPath(root).name or home)
        stem = re.sub(r"\.SAFE$", "", folder, flags=re.IGNORECASE)
        self.product_id = self.metadata.product_id or (stem if ProductName.parse(stem) or stem != folder else None)
        self.name = stem if stem != folder else self.metadata.product_id or stem

    def products(self, only: str | None) -> list[Product]:
        """A product for each granule, or for the one called ``only``."""
        granules = self._granules()
        if not granules:
            raise SceneError(f"{self.source} has no granule (GRANULE/…/IMG_DATA): download the product again")
        tiles = [granule.mgrs_tile for granule in granules]
        several = len(granules) > 1 or len(self.metadata.tiles) > 1
        distinct = len(set(tiles)) == len(tiles) and None not in tiles
        offset, warnings = self._offset()
        missing = sorted(self.metadata.tiles.difference(tile for tile in tiles if tile))
        if missing:
            warnings += (f"{self.source}: not there of the granules in its metadata: {', '.join(missing)}",)
        return [
            self._product(
                granule,
                name=f"{self.name}_{f'T{granule.mgrs_tile}' if distinct else granule.name}" if several else self.name,
                offset=offset,
                warnings=warnings,
            )
            for granule in granules
            if only is None or granule.name == only
        ]

    def _granules(self) -> list[_Granule]:
        start = f"{self.root}GRANULE/"
        grouped: dict[str, list[str]] = {}
        for name in sorted(self.files.names):
            if name.startswith(start):
                grouped.setdefault(name[len(start) :].split("/")[0], []).append(name)
        with_images = [name for name, inside in grouped.items() if any("/IMG_DATA/" in file for file in inside)]
        if len(with_images) > _MOST_GRANULES:
            raise SceneError(f"{self.source} has {len(with_images)} granules, and no product has {_MOST_GRANULES}")
        return [self._granule(name, tuple(grouped[name])) for name in with_images]

    def _granule(self, name: str, inside: tuple[str, ...]) -> _Granule:
        depth = self.root.count("/") + 2
        candidates = (
            file for file in inside if file.count("/") == depth and _GRANULE_METADATA.fullmatch(file.rpartition("/")[2])
        )
        metadata_file = next(candidates, None)
        said = GranuleMetadata(mgrs_tile=None, datetime=None)
        if metadata_file is not None:
            said = granule_metadata(self.files.read(metadata_file), self._shown(metadata_file))
        return _Granule(name, inside, metadata_file, said.mgrs_tile or _tile_in(name), said.datetime, said.extent)

    def _offset(self) -> tuple[int | None, tuple[str, ...]]:
        """What is added to the digital numbers of all three bands, and warnings."""
        offsets = self.metadata.offsets
        if len(set(offsets.values())) > 1:
            listed = ", ".join(f"{band} {offsets[band]}" for band in _COLOURS.values() if band in offsets)
            raise SceneError(
                f"{self._shown(self.metadata_file)} declares different offsets ({listed}), and one rule serves all "
                "bands: correct the metadata, or pass one of its band files with --boa-offset"
            )
        baseline = self.metadata.baseline
        if len(offsets) == len(_COLOURS):
            return next(iter(offsets.values())), ()
        told = baseline_offset(baseline) if baseline else None
        if not told:
            return told, ()
        return told, (f"{self.source}: the metadata lack band offsets, so {told} is taken from baseline {baseline}",)

    def _product(self, granule: _Granule, *, name: str, offset: int | None, warnings: tuple[str, ...]) -> Product:
        found = {colour: self._image(granule, band) for colour, band in _COLOURS.items()}
        bands = {colour: image for colour, image in found.items() if image}
        visual = len(bands) < len(_COLOURS)
        scl = self._image(granule, "SCL", "20m") if self.metadata.level == "L2A" else None
        if visual:
            tci = self._image(granule, "TCI")
            missing = [band for colour, band in _COLOURS.items() if not found[colour]]
            if tci is None:
                raise self._missing(granule, missing)
            warnings += (f"{name}: {' and '.join(missing)} missing, so its true-colour image (TCI) is used as it is",)
            bands, reason = dict.fromkeys(_COLOURS, tci), "true-colour image (TCI) of the product, as bands are missing"
        else:
            reason = f"B04, B03, B02 at 10 m of the Sentinel-2 {self.metadata.level} product"
        if self.metadata.level == "L2A" and scl is None:
            warnings += (f"{name}: no scene classification (SCL at 20 m) in the product, so clouds are not known",)
        used = {self.metadata_file, *bands.values(), granule.metadata_file, scl} - {None}
        return Product(
            name=name,
            source=self.source,
            bands={
                colour: BandFile(path=self.files.gdal_path(image), band=number if visual else 1)
                for number, (colour, image) in enumerate(bands.items(), 1)
            },
            reason=reason,
            visual=visual,
            scl=BandFile(path=self.files.gdal_path(scl)) if scl else None,
            extent=granule.extent,
            boa_offset=None if visual else offset,
            quantification=None if visual else self.metadata.quantification,
            baseline=self.metadata.baseline,
            datetime=granule.datetime or self.metadata.datetime,
            product_id=self.product_id,
            mgrs_tile=granule.mgrs_tile,
            files=self.files.on_disk(file for file in used if file),
            warnings=warnings,
        )

    def _image(self, granule: _Granule, band: str, resolution: str = "10m") -> str | None:
        """The file of a band: as the metadata name it, else by its name; None where there is none."""
        stems = {file[: -len(".jp2")]: file for file in granule.files if file.lower().endswith(".jp2")}
        fitting = {
            stem: file
            for stem, file in stems.items()
            if "/IMG_DATA/" in stem and _is_band(stem.rpartition("/")[2], band, resolution)
        }
        named = frozenset(self.metadata.images)  # with folders from the product on, or before 2017 without any
        first = (file for stem, file in fitting.items() if {stem[len(self.root) :], stem.rpartition("/")[2]} & named)
        return next(first, next(iter(fitting.values()), None))

    def _missing(self, granule: _Granule, bands: Iterable[str]) -> SceneError:
        there = [file.rpartition("/")[2] for file in granule.files if "/IMG_DATA/" in file]
        return SceneError(
            f"{self.source}: granule {granule.name} lacks {' and '.join(bands)} at 10 m, and a true-colour image (TCI) "
            f"to stand in for them; in IMG_DATA there is {_some(there)}: download the product again"
        )

    def _shown(self, name: str) -> str:
        return f"{name} in {self.source}" if not self.source.endswith(name.rpartition("/")[2]) else self.source


def _is_band(stem: str, band: str, resolution: str) -> bool:
    """Whether a file is a band by its name: ``T34UCF_…_B04_10m``, L1C ``T34UCF_…_B04``; early Sen2Cor
    ``…_SCL_L2A_…_20m``.
    """
    *before, last = stem.upper().split("_")
    return (last == resolution.upper() and band in before) or (resolution == "10m" and last == band)


def _tile_in(name: str) -> str | None:
    """The MGRS tile in the name of a granule's folder, such as ``L2A_T34UCF_A033753_…``."""
    match = re.search(r"(?:^|_)T(\d{2}[A-Z]{3})(?:_|$)", name)
    return match[1] if match else None


def _some(names: list[str], most: int = 20) -> str:
    """Names in one line, the first of them where there are many."""
    if not names:
        return "nothing"
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
