"""A raster to process: which bands are its RGB, what has no data, where it lies, how its pixels become 8-bit.

A ``Scene`` holds metadata only. Pixels come from ``SceneReader`` objects, one per thread, because a GDAL dataset handle
serves one thread at a time.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.enums import Resampling
from rasterio.windows import Window

from rsedge.errors import SceneError
from rsedge.runtime.scenes import remote
from rsedge.runtime.scenes.access import LOCAL, Access
from rsedge.runtime.scenes.composite import CloudReader, Composite, Grid, Mask, PlacedBand
from rsedge.runtime.scenes.footprints import footprints
from rsedge.runtime.scenes.gdal import open_dataset
from rsedge.runtime.scenes.gdal import settings as gdal_settings
from rsedge.runtime.scenes.rendering import FastRule
from rsedge.texts import plain, redact

if TYPE_CHECKING:
    from rsedge.pixels import ReflectanceRule, UInt8
    from rsedge.runtime.scenes.composite import CloudSource
    from rsedge.runtime.scenes.products.product import BandFile, Extent, Product
    from rsedge.runtime.scenes.rendering import Rendering
    from rsedge.runtime.scenes.tiles import Tile


@dataclass(frozen=True, slots=True)
class Scene:
    """A raster with known RGB. Made by ``Scene.open``; usable as a context manager, though it holds nothing open.

    Texts that people read are made plain (:func:`rsedge.texts.plain`), without credentials.
    """

    name: str  # file name without the suffix (of the product, for a SAFE folder)
    path: str  # what the gate opens; of several files the first
    source: str  # the file behind it (of a SAFE folder, the product metadata)
    width: int  # and height: size in pixels
    height: int
    crs: Any  # rasterio CRS, or None
    transform: Any  # Affine from (column, row) to map coordinates
    dtype: str  # NumPy name of the bands' type
    bands: tuple[int, ...]  # 1-based numbers of red, green and blue; a single one for a palette
    bands_reason: str  # why these
    datetime: str | None  # acquisition time, RFC 3339 in UTC, or None
    rendering: Rendering  # how pixels become 8-bit
    rendering_reason: str  # why so, as one clause
    nodata: tuple[float | None, ...]  # per band of ``bands`` the value that means no data, or None
    mask_band: int | None  # number of the alpha band, 0 for a mask of the whole dataset, or None
    palette: bool
    block_shape: tuple[int, int]  # height and width of the blocks the file is stored in
    band_count: int  # bands in the file, used or not
    driver: str  # GDAL's name of the format
    files: tuple[str, ...]  # the files on disk its pixels and metadata come from
    remote: tuple[str, ...] = ()  # what else they come from, as GDAL names it
    product_id: str | None = None  # identifier of the product, or None
    mgrs_tile: str | None = None  # tile in the Military Grid Reference System, or None
    clouds: CloudSource | None = None  # where its clouds are known from, or None
    # name of the resampling that brings it to its size, or None where it is read as stored
    resampled: str | None = None
    # files of red, green and blue where these are several; empty where ``path`` has all bands
    parts: tuple[BandFile, ...] = ()
    extent: Extent | None = None  # where parts lie that do not say so themselves
    mask_file: BandFile | None = None  # raster beside the file (``.msk``) that is 0 where there is no data, or None
    overview: int | None = None  # level of the overview that is read in place of the full raster, or None
    access: Access = LOCAL  # what its files may touch
    warnings: tuple[str, ...] = ()  # what the user should know although the scene can be read

    def __post_init__(self) -> None:
        for name in ("name", "bands_reason", "rendering_reason", "datetime", "product_id", "mgrs_tile"):
            if (text := getattr(self, name)) is not None:
                object.__setattr__(self, name, plain(text))
        object.__setattr__(self, "warnings", tuple(redact(plain(text)) for text in self.warnings))

    @classmethod
    def open(cls, path: str | os.PathLike[str] | Product, **options: Any) -> Scene:
        """Read the metadata of a raster, or of a product of several files.

        Args:
            path: File, GDAL subdataset name, ``.SAFE`` folder or zip, folder of band files, STAC item, URL, or a
                product already found. What holds several scenes is for
                :func:`rsedge.runtime.scenes.opening.open_scenes`.
            **options: See :class:`rsedge.runtime.scenes.opening.SceneOptions`.

        Raises:
            SceneError: The raster cannot be opened, its pixels are of no known kind, or its RGB cannot be told.
            OptionError: An option does not fit the raster.
        """
        from rsedge.runtime.scenes.opening import SceneOptions, open_scene

        return open_scene(path, SceneOptions(**options))

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    @property
    def rule(self) -> str:
        """How pixels become 8-bit, as one line."""
        return self.rendering.describe()

    @property
    def reflectance(self) -> ReflectanceRule | None:
        """How digital numbers become 8-bit, or None for colours."""
        return self.rendering.rule

    @property
    def crs_name(self) -> str:
        """Its coordinate reference system, such as ``EPSG:32629``, or ``pixel`` where it has no place on a map."""
        return plain(self.crs.to_string()) if self._has_place else "pixel"

    @property
    def _has_place(self) -> bool:
        return bool(self.crs) and not self.transform.is_identity

    @property
    def grid(self) -> Grid:
        """Where its pixels lie."""
        return Grid(self.crs, self.transform, self.width, self.height)

    def identity(self) -> dict[str, Any]:
        """What decides the pixels: the files as they are now and every option. JSON values; SceneError if one is
        gone.
        """
        try:
            states = [Path(name).stat() for name in self.files]
        except OSError as error:
            raise SceneError(
                f"{error.filename} cannot be read: {error.strerror}; put it back, then run again"
            ) from error
        files = [[name, s.st_size, s.st_mtime_ns] for name, s in zip(self.files, states, strict=True)]
        # Signatures of remote files are secrets, and others tomorrow: what such a file is, is told by its state.
        where: dict[str, Any] = {"path": self.path}
        if self.remote:
            where = {"remote": [remote.remote_state(name, hosts=self.access.hosts) for name in self.remote]}
        if self.parts:
            where["parts"] = [[remote.unsigned(part.path), part.band] for part in self.parts]
        mask = self.clouds
        return {
            **where,
            "files": files,
            "bands": list(self.bands),
            "rule": self.rule,
            "nodata": [repr(value) for value in self.nodata],
            **({"clouds": [mask.kind, remote.unsigned(mask.file.path), mask.file.band]} if mask else {}),
            **({"resampled": [self.width, self.height, self.resampled]} if self.resampled else {}),
        }

    def footprints(self, tiles: Sequence[Tile]) -> list[dict[str, Any] | None]:
        """WGS 84 geometry of the covered part of each tile; None where the scene has no georeference."""
        if not self._has_place:
            return [None] * len(tiles)
        with rasterio.Env(**gdal_settings()):
            return footprints(tiles, self.crs, self.transform)

    def environment(self, **settings: Any) -> Any:
        """Rasterio's environment to read it in, a context manager of the thread that enters it."""
        return rasterio.Env(**gdal_settings(self.access), **settings)

    def reader(self) -> SceneReader:
        """A reader with a dataset handle of its own; close it, or use it in a ``with`` block. SceneError if a file is
        gone.
        """
        return SceneReader(self)


class Pixels(NamedTuple):
    """A window of a scene; valid until its reader reads the next one.

    Attributes:
        planes: uint8 [3, h, w], R, G, B; 0 where there is no data. Plane by plane, as GDAL gives them and every step is
            fastest.
        empty: bool [h, w], True where there is no data. None where all have data.
        fill: bool [h, w], True where all bands hold the least or all the greatest value they can: black or white fill
            that nothing declares, or clipping. None where there is none at all.
        cloud: bool [h, w], True where there is cloud; None where the scene has no cloud mask.
    """

    planes: UInt8
    empty: Mask | None
    fill: Mask | None
    cloud: Mask | None


def open_pixels(scene: Scene) -> Any:
    """The open raster of a scene as stored: a rasterio dataset, or a composite; close it. SceneError if it is gone."""
    if scene.parts:
        return Composite(scene.parts, scene.extent, scene.access, scene.overview)
    return open_dataset(scene.path, scene.access, overview=scene.overview)


class SceneReader:
    """Reads windows of one scene; belongs to one thread."""

    def __init__(self, scene: Scene) -> None:
        # 1. Open the files.
        self._scene = scene
        self._mask: PlacedBand | None = None
        self._clouds: CloudReader | None = None
        with ExitStack() as unless_good:
            stored: Any = open_pixels(scene)
            unless_good.callback(stored.close)
            self._dataset: Any = stored
            if scene.mask_file is not None:
                beside = open_dataset(scene.mask_file.path, scene.access)
                unless_good.callback(beside.close)
                own = Grid.of(stored)
                self._mask = PlacedBand(beside, scene.mask_file.band, own, scene.grid, scene.mask_file.path)
            if scene.resampled and isinstance(stored, Composite):
                stored.resample(scene.grid, Resampling[scene.resampled])
            elif scene.resampled:
                self._dataset = scene.grid.warp(stored, Grid.of(stored), Resampling[scene.resampled])
                unless_good.callback(self._dataset.close)
            if scene.clouds:
                self._clouds = CloudReader(scene.clouds)
                unless_good.callback(self._clouds.close)
            self._opened = unless_good.pop_all()
        # 2. A palette as uint8 [65536, 4], R, G, B, A; entries the file lacks are transparent.
        self._colours: UInt8 | None = None
        if scene.palette:
            self._colours = np.zeros((65536, 4), np.uint8)
            for value, colour in stored.colormap(scene.bands[0]).items():
                self._colours[value] = colour
        # 3. What the bands of a pixel without data, or of fill, hold, in the scene's own type.
        kind, rule = np.dtype(scene.dtype), scene.reflectance
        declared = np.array([value for value in scene.nodata if value is not None], kind)
        empty = {tuple(declared)} if len(declared) == len(scene.nodata) else set()
        if rule is not None:
            empty.add((kind.type(0),) * len(scene.bands))
        self._empty = list(empty)
        # 0 of reflectance is no data already, and a palette has no fill.
        fill: list[Any] = [0, 255] if rule is None else [] if kind.kind == "f" else [np.iinfo(kind).max]
        self._fill = [(kind.type(value),) * len(scene.bands) for value in ([] if scene.palette else fill)]
        # What no reflectance is below: -9999 and the like, which many files do not declare.
        self._impossible: float | None = None
        if rule is not None and scene.dtype != "uint16":
            self._impossible = -0.2 if scene.rendering.values == "reflectance" else -2000.0
        # 4. Buffers.
        self._fast = FastRule(rule) if rule and scene.dtype == "uint16" else None
        self._stored = np.empty(0, scene.dtype)
        self._planes = np.empty(0, np.uint8)

    def read(self, row_off: int, col_off: int, height: int, width: int) -> tuple[UInt8, Mask]:
        """The colours of a window inside the scene, uint8 [h, w, 3], and where there is no data, bool [h, w].

        Errors are those of :meth:`read_pixels`.
        """
        pixels = self.read_pixels(row_off, col_off, height, width)
        empty = np.zeros((height, width), np.bool_) if pixels.empty is None else pixels.empty
        return np.stack(tuple(pixels.planes), axis=2), empty

    def read_pixels(self, row_off: int, col_off: int, height: int, width: int) -> Pixels:
        """All that is known of a window inside the scene, in buffers that the next call uses again.

        Raises:
            rasterio.errors.RasterioError: The pixels cannot be read.
        """
        # 1. Stored values [K, h, w].
        window = Window(col_off, row_off, width, height)
        bands = self._scene.bands
        count = height * width * len(bands)
        if self._stored.size < count:
            self._stored = np.empty(count, self._scene.dtype)
        stored: npt.NDArray[Any] = self._stored[:count].reshape(len(bands), height, width)
        self._dataset.read(bands, window=window, out=stored)
        flat = stored.reshape(-1)
        extremes = (flat.min(), flat.max())
        # 2. Where there is no data as the values tell, as a mask does, and as the cloud mask does.
        empty: Mask | None = None
        if stored.dtype.kind == "f" and not np.isfinite(extremes).all():
            empty = ~np.isfinite(stored).all(axis=0)
        if self._impossible is not None and not extremes[0] >= self._impossible:
            empty = _either(empty, np.all(stored < self._impossible, axis=0))
        for values in self._empty:
            empty = _either(empty, _where(stored, values, extremes))
        empty = _either(empty, self._masked(window))
        cloud, without = self._clouds.read(window) if self._clouds is not None else (None, None)
        empty = _either(empty, without)
        # 3. Fill.
        fill = None
        for values in self._fill:
            fill = _either(fill, _where(stored, values, extremes))
        # 4. 8-bit colours; the stored values may be overwritten.
        if self._colours is not None:
            colours = self._colours[stored[0]]
            planes, empty = np.moveaxis(colours[..., :3], 2, 0), _either(empty, colours[..., 3] == 0)
        elif self._fast is None:
            planes = self._scene.rendering.apply(stored)
        else:
            if self._planes.size < count:
                self._planes = np.empty(count, np.uint8)
            planes = self._planes[:count].reshape(stored.shape)
            self._fast.apply(stored, planes, int(extremes[0]), int(extremes[1]))
        if empty is not None and not empty.any():
            empty = None
        if empty is not None:
            planes *= (~empty).view(np.uint8)  # many times as fast as assigning to a mask
        return Pixels(planes, empty, fill if fill is None or fill.any() else None, cloud)

    def _masked(self, window: Window) -> Mask | None:
        """Which pixels have no data as another band or a mask tells; None where nothing does."""
        if self._scene.mask_band:
            stored = self._dataset.read(self._scene.mask_band, window=window)
        elif self._scene.mask_band == 0:
            stored = self._dataset.read_masks(self._scene.bands[0], window=window)
        elif self._mask is not None:
            stored = np.empty((int(window.height), int(window.width)), self._mask.dtype)
            self._mask.read(window, stored, outside=0, resampling=Resampling.nearest)
        else:
            return None
        found: Mask = stored == 0
        return found

    def close(self) -> None:
        """Give the dataset handles back."""
        self._opened.close()

    def __enter__(self) -> SceneReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _where(stored: npt.NDArray[Any], values: tuple[Any, ...], extremes: tuple[Any, Any]) -> Mask | None:
    """Where bands [K, h, w] have their values, K of them; None where their extremes tell that it is nowhere."""
    if min(values) < extremes[0] or max(values) > extremes[1]:
        return None
    found: Mask = stored[0] == values[0]
    for band, value in zip(stored[1:], values[1:], strict=True):
        if not found.any():
            return None
        found &= band == value
    return found


def _either(one: Mask | None, other: Mask | None) -> Mask | None:
    """Where one of two masks is True; None is one that is False throughout."""
    if one is None or other is None:
        return other if one is None else one
    return one | other
