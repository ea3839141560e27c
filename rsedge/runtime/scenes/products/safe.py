"""SAFE products of Sentinel-2, as ESA ships them: a folder or a zip, L1C or L2A, of any processing baseline.

The files of a product have the same names in a folder and in a zip, and none outside of them is read.
"""

from __future__ import annotations

import os
import re
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rsedge.errors import SceneError
from rsedge.files import open_regular
from rsedge.runtime.scenes.access import LOCAL, Access
from rsedge.runtime.scenes.products.product import BandFile, Product
from rsedge.runtime.scenes.products.sentinel2 import (
    GranuleMetadata,
    ProductMetadata,
    ProductName,
    baseline_offset,
    granule_metadata,
    printable,
    product_metadata,
)
from rsedge.texts import in_a_line

_COLOURS = {"red": "B04", "green": "B03", "blue": "B02"}
# MTD_MSIL2A.xml; before December 2016 S2A_OPER_MTD_SAFL1C_PDMC_….xml, and of Sen2Cor S2A_USER_MTD_SAFL2A_….xml
_PRODUCT_METADATA = re.compile(r"(?:MTD_MSI|S2[A-D]_(?:OPER|USER)_MTD_SAF)L(?:1C|2A)\w*\.xml", re.IGNORECASE)
_GRANULE_METADATA = re.compile(r"(?:MTD_TL|S2[A-D]_(?:OPER|USER)_MTD_L(?:1C|2A)_\w*)\.xml", re.IGNORECASE)
_MOST_GRANULES = 500  # products before 2017 have a few dozen
_WHAT_TO_PASS = "pass a .SAFE folder or zip as downloaded, or its MTD_MSIL1C.xml or MTD_MSIL2A.xml"
_MOST_SHOWN = 20  # names in a message

# Real metadata have at most 2 MB; what is larger was made to fill the memory.
_LARGEST_TEXT = 8 * 2**20
_LARGEST_SUM = 64 * 2**20  # of all metadata of a product
_MOST_TAGS = 1_000_000  # of them, and attributes
_LONGEST_NAME = 400  # of a member of a zip; real ones have at most 200
_MOST_MEMBERS = 20_000  # of a zip
_LARGEST_DIRECTORY = 16 * 2**20  # bytes of the list of a zip's members
_LONGEST_COMMENT = 2**16
_UNICODE_PATH = 0x7075
_FIRST_MEMBER = b"PK\3\4"
_LONGEST_START = 300  # bytes: the first member and its name
_END, _END_SIZE = b"PK\5\6", 22
_END_64, _LOCATOR_64, _SIZE_64 = b"PK\6\6", b"PK\6\7", 56 + 20
_MEMBER = b"PK\1\2"


def is_safe(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a SAFE product, or a part of one that names it; it may be damaged all the same.

    True for a ``.SAFE`` folder, a folder with product metadata and granules, in such a product the metadata, a granule,
    and its ``IMG_DATA`` and ``R10m``, and for a zip that holds a product by its central directory or is named as one.
    Opens nothing but a zip.
    """
    file = Path(path)
    if file.is_file():
        if is_zip(file):
            return _is_safe_zip(file)
        if not (_PRODUCT_METADATA.fullmatch(file.name) or _GRANULE_METADATA.fullmatch(file.name)):
            return False
    elif not file.is_dir():
        return False
    root = _product_folder(file)[0]
    if root.suffix.upper() == ".SAFE":
        return True
    try:
        entries = [entry.name for entry in os.scandir(root)]
    except OSError:
        return False
    return "GRANULE" in entries and any(map(_PRODUCT_METADATA.fullmatch, entries))


def is_zip(path: Path) -> bool:
    """Whether a file is a zip by its first bytes, or named as one and no TIFF or JPEG 2000."""
    start = _start(path)
    raster = start[:2] in (b"II", b"MM") or start[4:8] == b"jP  "
    return start.startswith(_FIRST_MEMBER) or (path.suffix.lower() == ".zip" and path.is_file() and not raster)


def _start(path: Path) -> bytes:
    try:
        with open(path, "rb", opener=open_regular) as file:
            return file.read(_LONGEST_START)
    except OSError:
        return b""


def _is_safe_zip(path: Path) -> bool:
    if path.name.lower().endswith((".safe", ".safe.zip")):
        return True
    try:
        files = _Zip(path)
    except SceneError:
        # Cut off on the way, but named as a product, itself or its first member: reading it says what is wrong.
        names = map(ProductName.parse, (path.name, _start(path).decode("latin-1")))
        return any(name is not None and name.baseline is not None for name in names)
    files.archive.close()
    return any(
        ".SAFE/" in name.upper() or _PRODUCT_METADATA.fullmatch(PurePosixPath(name).name) for name in files.names
    )


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
    file, text, granule = Path(source), os.fspath(source), None
    files: _Folder | _Zip
    with ExitStack() as opened:
        # 1. Where are its files?
        if file.is_file() and is_zip(file):
            files, home = _Zip(file), file.stem
            opened.enter_context(files.archive)
        elif file.is_dir() or file.is_file():
            folder, granule = _product_folder(file)
            files, home = _Folder(folder, access), folder.name
        else:
            raise SceneError(f"{text} does not exist: {_WHAT_TO_PASS}")
        # 2. Which folders ("" or with a slash behind it) hold product metadata? Of one folder the first file, sorted.
        named = file.name if file.is_file() and _PRODUCT_METADATA.fullmatch(file.name) else None
        found: dict[str, str] = {}
        for name in sorted(files.names, reverse=True):
            root, _, base = name.rpartition("/")
            wanted = name == named if named else _PRODUCT_METADATA.fullmatch(base) and "GRANULE" not in root.split("/")
            if wanted:
                found[f"{root}/" if root else ""] = name
        # A product that holds another in a folder of its own is the product that was meant.
        roots = sorted((root, name) for root, name in found.items() if root == "" or "" not in found)
        if not roots:
            there = in_a_line(sorted({name.split("/")[0] for name in files.names}), _MOST_SHOWN) or "nothing"
            if zips := [name for name in files.names if name.lower().endswith(".zip")]:
                raise SceneError(f"{text} is a zip with a zip in it, {zips[0]}: unpack it, and pass what it holds")
            raise SceneError(
                f"{text} has no product metadata (MTD_MSIL1C.xml or MTD_MSIL2A.xml), there is {there}: "
                f"{_WHAT_TO_PASS}; bands without them are read by their names where the folder they are in is passed"
            )
        # 3. Read them.
        return [
            product for root, name in roots for product in _Reading(text, home, files, root, name).products(granule)
        ]


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


# From files to products


@dataclass(frozen=True, slots=True)
class _Granule:
    name: str
    files: tuple[str, ...]
    metadata_file: str | None
    said: GranuleMetadata
    mgrs_tile: str | None


class _Reading:
    """One product while it is read."""

    def __init__(self, source: str, home: str, files: _Folder | _Zip, root: str, metadata_file: str) -> None:
        self.source, self.files, self.root, self.metadata_file = source, files, root, metadata_file
        self.metadata: ProductMetadata = product_metadata(files.read(metadata_file), self._shown(metadata_file))
        folder = printable(PurePosixPath(root).name or home)
        stem = re.sub(r"\.SAFE$", "", folder, flags=re.IGNORECASE)
        self.product_id = self.metadata.product_id or (stem if ProductName.parse(stem) or stem != folder else None)
        self.name = stem if stem != folder else self.metadata.product_id or stem

    def products(self, only: str | None) -> list[Product]:
        """A product for each granule, or for the one called ``only``."""
        # 1. Its granules, and how they are called.
        granules = self._granules()
        if not granules:
            raise SceneError(f"{self.source} has no granule (GRANULE/…/IMG_DATA): download the product again")
        tiles = [granule.mgrs_tile for granule in granules]
        several = len(granules) > 1 or len(self.metadata.tiles) > 1
        distinct = len(set(tiles)) == len(tiles) and None not in tiles
        # 2. What is added to the digital numbers of all three bands.
        offsets, baseline = self.metadata.offsets, self.metadata.baseline
        if len(set(offsets.values())) > 1:
            listed = ", ".join(f"{band} {offsets[band]}" for band in _COLOURS.values() if band in offsets)
            raise SceneError(
                f"{self._shown(self.metadata_file)} declares different offsets ({listed}), and one rule serves all "
                "bands: correct the metadata, or pass one of its band files with --boa-offset"
            )
        warnings: tuple[str, ...] = ()
        if len(offsets) == len(_COLOURS):
            offset: int | None = next(iter(offsets.values()))
        elif offset := baseline_offset(baseline) if baseline else None:
            warnings = (
                f"{self.source}: the metadata lack band offsets, so {offset} is taken from baseline {baseline}",
            )
        # 3. What is not there.
        if missing := sorted(self.metadata.tiles.difference(tile for tile in tiles if tile)):
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
        granules = []
        for name in with_images:
            inside = [file for file in grouped[name] if file.count("/") == self.root.count("/") + 2]
            metadata_file = next(
                (file for file in inside if _GRANULE_METADATA.fullmatch(file.rpartition("/")[2])), None
            )
            said = GranuleMetadata()
            if metadata_file is not None:
                said = granule_metadata(self.files.read(metadata_file), self._shown(metadata_file))
            tile = re.search(r"(?:^|_)T(\d{2}[A-Z]{3})(?:_|$)", name)  # such as L2A_T34UCF_A033753_…
            mgrs_tile = said.mgrs_tile or (tile[1] if tile else None)
            granules.append(_Granule(name, tuple(grouped[name]), metadata_file, said, mgrs_tile))
        return granules

    def _product(self, granule: _Granule, *, name: str, offset: int | None, warnings: tuple[str, ...]) -> Product:
        found = {colour: self._image(granule, band) for colour, band in _COLOURS.items()}
        bands = {colour: image for colour, image in found.items() if image}
        visual = len(bands) < len(_COLOURS)
        scl = self._image(granule, "SCL", "20m") if self.metadata.level == "L2A" else None
        if visual:
            tci = self._image(granule, "TCI")
            missing = " and ".join(band for colour, band in _COLOURS.items() if not found[colour])
            if tci is None:
                there = [file.rpartition("/")[2] for file in granule.files if "/IMG_DATA/" in file]
                raise SceneError(
                    f"{self.source}: granule {granule.name} lacks {missing} at 10 m, and a true-colour image (TCI) to "
                    f"stand in for them; in IMG_DATA there is {in_a_line(there, _MOST_SHOWN) or 'nothing'}: download "
                    "the product again"
                )
            warnings += (f"{name}: {missing} missing, so its true-colour image (TCI) is used as it is",)
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
            extent=granule.said.extent,
            boa_offset=None if visual else offset,
            quantification=None if visual else self.metadata.quantification,
            baseline=self.metadata.baseline,
            datetime=granule.said.datetime or self.metadata.datetime,
            product_id=self.product_id,
            mgrs_tile=granule.mgrs_tile,
            files=self.files.on_disk(file for file in used if file),
            warnings=warnings,
        )

    def _image(self, granule: _Granule, band: str, resolution: str = "10m") -> str | None:
        """The file of a band: as the metadata name it, else by its name; None where there is none."""
        fitting = {}
        for file in granule.files:
            stem = file[: -len(".jp2")]
            if file.lower().endswith(".jp2") and "/IMG_DATA/" in stem:
                # T34UCF_…_B04_10m, L1C T34UCF_…_B04; early Sen2Cor …_SCL_L2A_…_20m
                *before, last = stem.rpartition("/")[2].upper().split("_")
                if (last == resolution.upper() and band in before) or (resolution == "10m" and last == band):
                    fitting[stem] = file
        # The metadata name images with folders from the product on, or before 2017 without any.
        named = (
            file
            for stem, file in fitting.items()
            if {stem[len(self.root) :], stem.rpartition("/")[2]} & self.metadata.images
        )
        return next(named, next(iter(fitting.values()), None))

    def _shown(self, name: str) -> str:
        return f"{name} in {self.source}" if not self.source.endswith(name.rpartition("/")[2]) else self.source


# Files in a folder or in a zip. Both have ``names``, of all files that can belong to a product, with ``/`` between the
# parts; ``read`` returns the bytes of a small file, ``gdal_path`` what GDAL opens for one, and ``on_disk`` the files on
# disk behind some, sorted. All raise SceneError for a file that lies outside.


class _Folder:
    """Metadata and granules below a folder that is, or holds, a product; SceneError where links lead out of it."""

    def __init__(self, folder: Path, access: Access) -> None:
        self._folder = folder.resolve()
        self._access = access
        self._read = Counter[str]()
        try:
            # A folder that unpacking put around the product is looked into, and nothing else: it may be anybody's.
            names: set[str] = set()
            for root in (self._folder, *(path for path in self._folder.glob("*.[Ss][Aa][Ff][Ee]") if path.is_dir())):
                for inside in (root, root / "GRANULE"):
                    self._confined(inside)  # before it is walked
                found = (*root.glob("*.[Xx][Mm][Ll]"), *(root / "GRANULE").rglob("*.*"))
                names.update(path.relative_to(self._folder).as_posix() for path in found if path.is_file())
            self.names = frozenset(names)
        except OSError as error:
            raise SceneError(f"{folder} cannot be listed: {error.strerror}; check its permissions") from error

    def _confined(self, path: Path) -> Path:
        name = path.relative_to(self._folder).as_posix()
        return self._access.confine(path, self._folder, what=f"{name} in {self._folder}")

    def read(self, name: str) -> bytes:
        path = self._confined(self._folder / name)
        try:
            with path.open("rb") as file:
                data = file.read(_LARGEST_TEXT + 1)
        except OSError as error:
            raise SceneError(f"{path} cannot be read: {error.strerror}; check its permissions") from error
        return _checked(data, self._read, str(path))

    def gdal_path(self, name: str) -> str:
        return str(self._confined(self._folder / name))

    def on_disk(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(map(self.gdal_path, names)))


class _Zip:
    """What a zip holds, by its central directory; close its ``archive``.

    SceneError where it is no whole zip, has more than any product, or members whose names lead elsewhere or are there
    twice, so that two programs could read different ones.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.resolve()
        self._read = Counter[str]()
        _judge_directory(self._path, str(path))
        try:
            self.archive = zipfile.ZipFile(self._path)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise SceneError(f"{path} is no whole zip: {error}; download it again, or unpack it") from error
        with ExitStack() as unless_good:
            unless_good.enter_context(self.archive)
            seen: set[PurePosixPath] = set()
            for info in self.archive.infolist():
                name = info.orig_filename
                inside = PurePosixPath(name)
                problem = None
                if ".." in inside.parts or inside.is_absolute() or "\\" in name or "\0" in name:
                    problem = "leads elsewhere"
                elif inside in seen:
                    problem = "is there twice"
                elif _has_other_name(info.extra):
                    problem = "has a second name, which other programs take"
                elif len(name) > _LONGEST_NAME:
                    problem = f"has more than {_LONGEST_NAME} letters"
                if problem:
                    shown = "".join(letter if letter.isprintable() else "�" for letter in name[:_LONGEST_NAME])
                    raise SceneError(
                        f"{path} is not read: its member {shown} {problem}; unpack the zip and look into it"
                    )
                seen.add(inside)
            unless_good.pop_all()
        self.names = frozenset(name for name in self.archive.namelist() if not name.endswith("/"))

    def read(self, name: str) -> bytes:
        where = f"{name} in {self._path}"
        info = self.archive.getinfo(name)
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # GDAL knows no other
            raise SceneError(f"{where} is compressed by method {info.compress_type}, not by deflate: pack it again")
        try:
            with self.archive.open(info) as file:
                data = file.read(_LARGEST_TEXT + 1)
        # RuntimeError is what zipfile raises for encrypted members.
        except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, OSError, ValueError) as error:
            raise SceneError(f"{where} cannot be read: {error}; download the zip again, or unpack it") from error
        return _checked(data, self._read, where)

    def gdal_path(self, name: str) -> str:
        path = str(self._path)
        # Braces say where the zip ends, whatever it is called, but GDAL counts those in its name too.
        return f"/vsizip/{path}/{name}" if "{" in path or "}" in path else f"/vsizip/{{{path}}}/{name}"

    def on_disk(self, _names: Iterable[str]) -> tuple[str, ...]:
        return (str(self._path),)


def _has_other_name(extra: bytes) -> bool:
    """Whether an extra field is Info-ZIP's Unicode path, by which GDAL and zipfile may call a member something else."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        if kind == _UNICODE_PATH:
            return True
        extra = extra[4 + length :]
    return False


def _checked(data: bytes, read: Counter[str], where: str) -> bytes:
    """Return a document; ``read`` counts those of the product."""
    read.update({"bytes": len(data), "tags": data.count(b"<") + data.count(b"=")})
    if len(data) > _LARGEST_TEXT:
        raise SceneError(f"{where} has more than {_LARGEST_TEXT >> 20} MiB, which no metadata of Sentinel-2 has")
    if read["bytes"] > _LARGEST_SUM or read["tags"] > _MOST_TAGS:
        raise SceneError(
            f"with {where} its metadata have more than {_LARGEST_SUM >> 20} MiB, or {_MOST_TAGS} tags and attributes, "
            "as no product has"
        )
    return data


def _judge_directory(path: Path, shown: str) -> None:
    """Refuse a zip whose list of members is too long, or is not the only one; what is no whole zip passes.

    ``zipfile`` makes an object of 1 kB for each member, however many there are, and looks for the list in another way
    than GDAL, so that one file could be two archives. So the list is judged before anything parses it.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _LARGEST_DIRECTORY - _SIZE_64 - _END_SIZE - _LONGEST_COMMENT))
            tail = file.read()
    except OSError as error:
        raise SceneError(f"{shown} cannot be read: {error.strerror}; check its permissions") from error
    comment = max(0, len(tail) - _LONGEST_COMMENT - _END_SIZE)
    end = tail.rfind(_END, comment)
    if end < 0 or end + _END_SIZE > len(tail):
        return
    members, directory = struct.unpack_from("<HL", tail, end + 10)
    first = end
    locator = tail.rfind(_LOCATOR_64, comment)
    if locator >= 0 and locator == end - 20 and tail[end - _SIZE_64 : end - _SIZE_64 + 4] == _END_64:
        members, directory = struct.unpack_from("<32xQQ", tail, end - _SIZE_64)
        first = end - _SIZE_64
    elif locator >= 0:
        raise SceneError(f"{shown} is not read: it has a list of members for some programs only; unpack it")
    if tail.find(_END, comment) != end:
        raise SceneError(f"{shown} is not read: it has more than one list of members, as a zip in a zip has; unpack it")
    if directory <= _LARGEST_DIRECTORY:
        # What the end says of their number, zipfile does not look at.
        members = max(members, tail.count(_MEMBER, max(0, first - directory), first))
    if members > _MOST_MEMBERS or directory > _LARGEST_DIRECTORY:
        raise SceneError(
            f"{shown} is not read: it lists {members} members in {directory} bytes, and at most {_MOST_MEMBERS} in "
            f"{_LARGEST_DIRECTORY} are read, of which a product has less than 500; unpack it"
        )
