"""A raster to process: which bands are its RGB, what has no data, where it lies, how its pixels become 8-bit.

Opening is cheap: a ``Scene`` holds metadata only. Pixels come from ``SceneReader`` objects, one per thread, because a
GDAL dataset handle serves one thread at a time.
"""

from __future__ import annotations

import math
import os
import re
import threading
import warnings as python_warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window

from rsedge.errors import OptionError, SceneError
from rsedge.pixels import ReflectanceRule, UInt8
from rsedge.runtime.bands import BandChoice, explicit_bands, find_bands, unclear_bands, unusable_type
from rsedge.runtime.footprints import footprints
from rsedge.runtime.sentinel2 import acquisition_time, choose_subdataset, declared_offset, metadata_file

if TYPE_CHECKING:
    from rsedge.runtime.tiles import Tile

Mask = npt.NDArray[np.bool_]

_REMOTE = re.compile(r"://|/vsi(curl|s3|gs|az|adls|oss|swift|hdfs|webhdfs)")
_GDAL_NAME = re.compile(r"^(/vsi[a-z0-9]+/|[A-Za-z][A-Za-z0-9_]+:)")
_REFLECTANCE_TYPES = ("uint16", "int16")
_WARNING_FILTERS = threading.Lock()


@dataclass(frozen=True, slots=True)
class Scene:
    """A raster with known RGB. Made by ``Scene.open``; usable as a context manager, though it holds nothing open.

    Attributes:
        name: File name without the suffix (of the product, for a SAFE folder).
        path: What GDAL opens.
        source: The file behind it (of a SAFE folder, the product metadata).
        width, height: Size in pixels.
        crs: rasterio CRS, or None.
        transform: Affine from (column, row) to map coordinates.
        dtype: NumPy name of the bands' type.
        bands: 1-based numbers of red, green and blue; a single one for a palette.
        bands_reason: Why these.
        datetime: Acquisition time, RFC 3339 in UTC, or None.
        reflectance: How digital numbers become 8-bit, or None for 8-bit scenes.
        nodata: Per band of ``bands`` the value that means no data, or None.
        mask_band: Number of the alpha band, 0 for a mask of the whole dataset, or None.
        block_shape: Height and width of the blocks the file is stored in.
        band_count: Bands in the file, used or not.
        driver: GDAL's name of the format.
        files: The files on disk its pixels and metadata come from.
        warnings: What the user should know although the scene can be read.
    """

    name: str
    path: str
    source: str
    width: int
    height: int
    crs: Any
    transform: Any
    dtype: str
    bands: tuple[int, ...]
    bands_reason: str
    datetime: str | None
    reflectance: ReflectanceRule | None
    nodata: tuple[float | None, ...]
    mask_band: int | None
    palette: bool
    block_shape: tuple[int, int]
    band_count: int
    driver: str
    files: tuple[str, ...]
    warnings: tuple[str, ...]

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        bands: Sequence[int] | None = None,
        boa_offset: int | None = None,
        nodata: float | None = None,
    ) -> Scene:
        """Read the metadata of any raster GDAL reads, or of a Sentinel-2 ``.SAFE`` folder.

        Args:
            path: File, ``.SAFE`` folder, or a GDAL subdataset name.
            bands: Numbers of red, green and blue, from 1; default: by band descriptions, then by colour
                interpretation.
            boa_offset: Added to 16-bit digital numbers (see ``ReflectanceRule``); default: what the bands' own
                metadata declare, else 0.
            nodata: Value that means no data, in place of what the file declares. A pixel has no data when all three
                bands say so, or a mask does; 0 in all three is no data in 16-bit reflectance besides.

        Raises:
            SceneError: The raster cannot be opened, is not 8-bit or 16-bit, or its RGB cannot be told.
            OptionError: ``bands``, ``boa_offset`` or ``nodata`` do not fit the raster.
        """
        source = os.fspath(path)
        with rasterio.Env():
            file = _resolve(source)
            with _open_dataset(file) as dataset:
                if dataset.count > 0:
                    return _describe(source, file, dataset, bands, boa_offset, nodata)
                with _open_dataset(choose_subdataset(source, dataset.subdatasets)) as subdataset:
                    return _describe(source, file, subdataset, bands, boa_offset, nodata)

    def __enter__(self) -> Scene:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    @property
    def rule(self) -> str:
        """How pixels become 8-bit, as one line."""
        return self.reflectance.describe() if self.reflectance else "uint8 as stored"

    def identity(self) -> dict[str, Any]:
        """What decides the pixels: the file as it is now and every option. JSON values only.

        Raises:
            SceneError: The file is gone.
        """
        try:
            states = [Path(name).stat() for name in self.files]
        except OSError as error:
            raise SceneError(
                f"{error.filename} cannot be read: {error.strerror}; put it back, then run again"
            ) from error
        files = [[name, s.st_size, s.st_mtime_ns] for name, s in zip(self.files, states, strict=True)]
        return {
            "path": self.path,
            "files": files,
            "bands": list(self.bands),
            "rule": self.rule,
            "nodata": list(self.nodata),
        }

    def footprints(self, tiles: Sequence[Tile]) -> list[dict[str, Any] | None]:
        """WGS 84 geometry of the covered part of each tile; None where the scene has no georeference.

        See ``rsedge.runtime.footprints.footprints``.
        """
        if not self.crs or self.transform.is_identity:
            return [None] * len(tiles)
        with rasterio.Env():
            return footprints(tiles, self.crs, self.transform)

    def reader(self) -> SceneReader:
        """A reader with a dataset handle of its own; close it, or use it as a context manager.

        Raises:
            SceneError: The raster cannot be opened any more.
        """
        return SceneReader(self)


class SceneReader:
    """Reads windows of one scene; belongs to one thread."""

    def __init__(self, scene: Scene) -> None:
        self._dataset = _open_dataset(scene.path)
        self._scene = scene
        # A grey scene names its band three times and an alpha band rides along: each band is read once.
        wanted = dict.fromkeys(scene.bands + ((scene.mask_band,) if scene.mask_band else ()))
        self._indexes = list(wanted)
        self._rgb = [self._indexes.index(band) for band in scene.bands]
        self._colours = _colour_table(self._dataset, scene.bands[0]) if scene.palette else None
        self._empty = [None if value is None else np.array(value, dtype=scene.dtype) for value in scene.nodata]

    def read(self, row_off: int, col_off: int, height: int, width: int) -> tuple[UInt8, Mask]:
        """A window inside the scene.

        Returns:
            uint8 [height, width, 3] in R, G, B order, 0 where there is no data, and bool [height, width], True where
            there is none.

        Raises:
            rasterio.errors.RasterioError: The pixels cannot be read.
        """
        window = Window(col_off, row_off, width, height)
        stored = self._dataset.read(self._indexes, window=window)
        empty = self._no_data(stored, window)
        if self._colours is not None:
            rgba = self._colours[stored[0]]
            rgb, empty = np.ascontiguousarray(rgba[..., :3]), empty | (rgba[..., 3] == 0)
        else:
            rule = self._scene.reflectance
            rgb = np.empty((height, width, 3), dtype=np.uint8)
            for channel, position in enumerate(self._rgb):  # six times as fast as transposing the whole
                rgb[..., channel] = rule.apply(stored[position]) if rule else stored[position]
        if empty.any():
            rgb[empty] = 0
        return rgb, empty

    def _no_data(self, stored: npt.NDArray[Any], window: Window) -> Mask:
        """Which pixels of bands [K, h, w], read at ``window``, have no data."""
        planes = [stored[position] for position in self._rgb]
        empty = np.zeros(planes[0].shape, dtype=np.bool_)
        if all(value is not None for value in self._empty):
            empty |= _all_equal(planes, self._empty)
        if self._scene.reflectance is not None:
            empty |= _all_equal(planes, [0, 0, 0])
        if self._scene.mask_band:
            empty |= stored[self._indexes.index(self._scene.mask_band)] == 0
        elif self._scene.mask_band == 0:
            empty |= self._dataset.read_masks(self._scene.bands[0], window=window) == 0
        return empty

    def close(self) -> None:
        """Give the dataset handle back."""
        self._dataset.close()

    def __enter__(self) -> SceneReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _all_equal(planes: Sequence[npt.NDArray[Any]], values: Sequence[Any]) -> Mask:
    """Where every plane has its value; stops at the first plane that has it nowhere, as most scenes allow."""
    found: Mask = planes[0] == values[0]
    for plane, value in zip(planes[1:], values[1:], strict=True):
        if not found.any():
            break
        found &= plane == value
    return found


def _resolve(source: str) -> str:
    """What GDAL should open for what the user named."""
    if _REMOTE.search(source):
        raise SceneError(f"{source} is remote, and rsedge reads local files: download it first, then pass the file")
    file = Path(source)
    if file.is_dir():
        if file.suffix.upper() == ".SAFE" or any(file.glob("*MTD_*.xml")):
            return str(metadata_file(file).resolve())
        return str(file.resolve())
    if file.exists():
        return str(file.resolve())
    if _GDAL_NAME.match(source):
        return source
    raise SceneError(f"{source} does not exist: check the path, and pass a raster file or a .SAFE folder")


def _open_dataset(target: str) -> Any:
    try:
        # Scene.warnings says it; catch_warnings changes the whole process, hence one thread at a time.
        with _WARNING_FILTERS, python_warnings.catch_warnings():
            python_warnings.simplefilter("ignore", NotGeoreferencedWarning)
            return rasterio.open(target)
    except RasterioError as error:
        raise SceneError(f"{target} cannot be opened as a raster: {error} (gdalinfo says more)") from error


def _describe(
    source: str,
    file: str,
    dataset: Any,
    bands: Sequence[int] | None,
    boa_offset: int | None,
    nodata: float | None,
) -> Scene:
    """The scene for an open dataset; reports everything that is wrong at once."""
    colours = [colour.name for colour in dataset.colorinterp]
    if bands is not None:
        choice: BandChoice | None = explicit_bands(bands, dataset.count)
    else:
        choice = find_bands(dataset.descriptions, colours, dataset.dtypes)
    dtypes = {dataset.dtypes[index - 1] for index in (choice.indexes if choice else dataset.indexes)}
    dtype = dataset.dtypes[(choice.indexes[0] if choice else 1) - 1]
    problems = [] if choice else [unclear_bands(dataset.descriptions, colours)]
    if len(dtypes) > 1 or dtype not in ("uint8", *_REFLECTANCE_TYPES):
        problems.append(unusable_type(source, dtypes, choice))
    if choice is None or problems:
        raise SceneError(f"{source}: " + "; ".join(problems))

    rule = None
    if dtype in _REFLECTANCE_TYPES and not choice.palette:
        if boa_offset is None:
            chosen = [index - 1 for index in choice.indexes]
            scaling = [(dataset.scales[index], dataset.offsets[index]) for index in chosen]
            boa_offset = declared_offset([dataset.tags(index + 1) for index in chosen], scaling)
        rule = ReflectanceRule(boa_offset=boa_offset)
    elif boa_offset:
        raise OptionError(
            f"boa_offset {boa_offset} is for 16-bit digital numbers, but {source} is {dtype}: leave the offset out"
        )
    if nodata is not None:
        _check_nodata(nodata, dtype)
    declared = [nodata if nodata is not None else dataset.nodatavals[index - 1] for index in choice.indexes]
    return Scene(
        name=_name(source),
        path=dataset.name,
        source=file,
        width=dataset.width,
        height=dataset.height,
        crs=dataset.crs,
        transform=dataset.transform,
        dtype=dtype,
        bands=choice.indexes,
        bands_reason=choice.reason,
        datetime=acquisition_time({**dataset.tags(ns="IMAGERY"), **dataset.tags()}, Path(source).name),
        reflectance=rule,
        nodata=tuple(value if value is not None and _fits(value, dtype) else None for value in declared),
        mask_band=_mask_band(dataset, choice.indexes),
        palette=choice.palette,
        block_shape=tuple(dataset.block_shapes[choice.indexes[0] - 1]),
        band_count=dataset.count,
        driver=dataset.driver,
        files=tuple(sorted(name for name in dataset.files if Path(name).is_file())),
        warnings=_georeference_warnings(source, dataset),
    )


def _check_nodata(nodata: float, dtype: str) -> None:
    if not _fits(nodata, dtype):
        limits = np.iinfo(dtype)
        raise OptionError(
            f"nodata {nodata} cannot occur in {dtype}: expected a whole number {limits.min} to {limits.max}"
        )


def _fits(value: float, dtype: str) -> bool:
    limits = np.iinfo(dtype)
    return math.isfinite(value) and value == int(value) and limits.min <= value <= limits.max


def _mask_band(dataset: Any, chosen: tuple[int, ...]) -> int | None:
    """Number of the alpha band, 0 for an internal mask or one beside the file, None where neither exists.

    GDAL calls the fourth band of many R, G, B, infrared files alpha; one that is described as something else, or chosen
    as a colour, is none.
    """
    bands = zip(dataset.indexes, dataset.colorinterp, dataset.descriptions, strict=True)
    called_alpha = {index: description for index, colour, description in bands if colour == ColorInterp.alpha}
    for index, description in called_alpha.items():
        if index not in chosen and (not description or "alpha" in description.lower()):
            return int(index)
    flags = dataset.mask_flag_enums[chosen[0] - 1]
    return 0 if MaskFlags.per_dataset in flags and not called_alpha else None


def _colour_table(dataset: Any, band: int) -> UInt8:
    """The palette of a band as uint8 [65536, 4], R, G, B, A; entries the file lacks are transparent."""
    table = np.zeros((65536, 4), dtype=np.uint8)
    for value, colour in dataset.colormap(band).items():
        table[value] = colour
    return table


def _name(source: str) -> str:
    file = Path(source)
    if file.name.startswith("MTD_") and file.parent.suffix.upper() == ".SAFE":
        file = file.parent
    name = file.name if file.is_dir() and file.suffix.upper() != ".SAFE" else file.stem
    return os.fsencode(name).decode("utf-8", "replace")  # names on disk need not be UTF-8, outputs must be


def _georeference_warnings(source: str, dataset: Any) -> tuple[str, ...]:
    missing = []
    if not dataset.crs:
        missing.append("coordinate reference system")
    if dataset.transform.is_identity:
        missing.append("geotransform")
    if not missing:
        return ()
    remedy = (
        "gdalwarp uses its ground control points" if dataset.gcps[0] else "gdal_edit.py -a_srs … -a_ullr … sets them"
    )
    return (f"{source} has no {' and no '.join(missing)}: its records have no geometry ({remedy})",)
