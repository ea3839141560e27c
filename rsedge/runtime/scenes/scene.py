"""A raster to process: which bands are its RGB, what has no data, where it lies, how its pixels become 8-bit.

A ``Scene`` holds metadata only. Pixels come from ``SceneReader`` objects, one per thread, because a GDAL dataset handle
serves one thread at a time.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import rasterio
from rasterio.windows import Window

from rsedge.errors import SceneError
from rsedge.runtime.scenes import remote
from rsedge.runtime.scenes.access import LOCAL, Access
from rsedge.runtime.scenes.composite import CloudReader, Composite, Grid, PlacedBand
from rsedge.runtime.scenes.footprints import footprints
from rsedge.runtime.scenes.gdal import open_dataset
from rsedge.runtime.scenes.gdal import settings as gdal_settings
from rsedge.runtime.scenes.products.product import PER_BAND
from rsedge.runtime.scenes.products.sentinel2 import ProductName
from rsedge.runtime.scenes.rendering import FastRule
from rsedge.runtime.scenes.stored import Mask, Resampled, StoredPixels, Validity, either, where
from rsedge.texts import plain, redact

if TYPE_CHECKING:
    from rsedge.manifest import Domain
    from rsedge.pixels import ReflectanceRule, UInt8
    from rsedge.runtime.scenes.composite import CloudSource
    from rsedge.runtime.scenes.products.product import BandFile, Extent, Product
    from rsedge.runtime.scenes.rendering import Rendering
    from rsedge.runtime.scenes.tiles import Tile

METRES_PER_DEGREE = 111_320.0  # of latitude
# Landsat's level 1, and PlanetScope's radiance.
_NOT_AT_SURFACE = re.compile(r"(?<![A-Z0-9])L[COTEM]0\d_L1[GT][A-Z]_|AnalyticMS(?!\w*_SR)", re.IGNORECASE)
_TOLERANCE = 1.6  # times a resolution that a model still knows


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
    mask_band: int | None  # see ``Validity``
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
    resampled: Literal["average", "bilinear", "nearest"] | None = None
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
        """Rule from digital numbers (of red, where the bands have rules of their own) to 8-bit; None for colours."""
        return self.rendering.rules[0] if self.rendering.rules else None

    @property
    def validity(self) -> Validity:
        """Rules for pixels without data."""
        least = None
        if self.rendering.rules and self.dtype != "uint16":
            least = -0.2 if self.rendering.values == "reflectance" else -2000.0
        return Validity(self.nodata, bool(self.rendering.rules), least, self.mask_band)

    @property
    def crs_name(self) -> str:
        """Its coordinate reference system, such as ``EPSG:32629``, or ``pixel`` where it has no place on a map."""
        return plain(self.crs.to_string()) if self._has_place else "pixel"

    @property
    def _has_place(self) -> bool:
        return bool(self.crs) and not self.transform.is_identity

    @property
    def metres_per_pixel(self) -> float | None:
        """Size of a pixel on the ground, in metres (of a scene in degrees along its columns), or None."""
        if not self._has_place:
            return None
        size = math.hypot(self.transform.b, self.transform.e)
        return size * METRES_PER_DEGREE if self.crs.is_geographic else size * self.crs.linear_units_factor[1]

    def outside(self, domain: Domain | None) -> str | None:
        """Return what sets the scene apart from the imagery that a model was trained on, as one line, or None."""
        if domain is None:
            return None
        doubts = []
        (low, high), size = domain.resolution, self.metres_per_pixel
        if size is not None and not low / _TOLERANCE <= size <= high * _TOLERANCE:
            wanted = low if size < low else high
            unit = wanted / METRES_PER_DEGREE if self.crs.is_geographic else wanted / self.crs.linear_units_factor[1]
            remedy = f"; --resolution {unit:.3g} resamples it" if size < low else "; finer imagery fits"
            doubts.append(f"has {size:.3g} m per pixel{remedy}")
        level = (ProductName.parse(self.product_id or self.name) or ProductName()).level
        if domain.surface_reflectance and (level == "L1C" or _NOT_AT_SURFACE.search(self.product_id or self.name)):
            doubts.append(f"is level {level or 'L1'}, not reflectance at the surface; its product of level 2 fits")
        if self.palette or (len(set(self.bands)) == 1 and not self.parts):
            doubts.append("is a picture of classes or grey values")
        if not doubts:
            return None
        return (
            f"{self.name} {', and '.join(doubts)}: the model was trained on {domain.describe()}, and guesses elsewhere"
        )

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


def open_masks(
    file: BandFile | None, grid: Grid, bands: Sequence[int], access: Access, stack: ExitStack
) -> list[PlacedBand]:
    """Open the masks beside a raster that lies on ``grid``; ``stack`` closes them."""
    if file is None:
        return []
    mask = open_dataset(file.path, access)
    stack.callback(mask.close)
    numbers = dict.fromkeys(bands) if file.band == PER_BAND else [file.band]
    return [PlacedBand(mask, number, grid, grid, file.path) for number in numbers]


class SceneReader:
    """Reads windows of one scene; belongs to one thread."""

    def __init__(self, scene: Scene) -> None:
        # 1. Open the files.
        self._scene = scene
        self._clouds: CloudReader | None = None
        with ExitStack() as unless_good:
            dataset: Any = open_pixels(scene)
            unless_good.callback(dataset.close)
            own = Grid.of(dataset, scene.extent)
            beside = open_masks(scene.mask_file, own, scene.bands, scene.access, unless_good)
            classes = None
            if scene.clouds:
                self._clouds = CloudReader(scene.clouds)
                unless_good.callback(self._clouds.close)
                if scene.clouds.kind == "scl":  # its no-data is the scene's
                    classes = CloudReader(replace(scene.clouds, grid=own)) if scene.resampled else self._clouds
                    unless_good.callback(classes.close)
            self._opened = unless_good.pop_all()
        # 2. A palette as uint8 [65536, 4], R, G, B, A; entries the file lacks are transparent.
        palette: UInt8 | None = None
        if scene.palette:
            palette = np.zeros((65536, 4), np.uint8)
            for value, colour in dataset.colormap(scene.bands[0]).items():
                palette[value] = colour
        # 3. The pixels as stored, or resampled.
        stored = StoredPixels(dataset, scene.bands, scene.validity, beside=beside, classes=classes, palette=palette)
        self._pixels: StoredPixels | Resampled = stored
        if scene.resampled:
            factors = (~own.transform @ scene.transform)[4], (~own.transform @ scene.transform)[0]
            self._pixels = Resampled(stored, factors, scene.resampled)
        # 4. What the bands of a pixel of fill hold, in the scene's own type. 0 of reflectance is no data already, and a
        # palette has no fill.
        kind = np.dtype(scene.dtype)
        fill: list[Any] = [0, 255] if not scene.rendering.rules else [] if kind.kind == "f" else [np.iinfo(kind).max]
        self._fill = [(kind.type(value),) * len(scene.bands) for value in ([] if scene.palette else fill)]
        # 5. Rules, and their output.
        uint16 = scene.dtype == "uint16"
        self._fast = [FastRule(rule) for rule in scene.rendering.rules] if uint16 else []
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
        # 1. Stored values [K, h, w], and where there is no data.
        window = Window(col_off, row_off, width, height)
        stored, empty, extremes = self._pixels.read(window)
        cloud = self._clouds.read(window)[0] if self._clouds is not None else None
        # 2. Fill.
        fill = None
        for values in self._fill:
            fill = either(fill, where(stored, values, extremes))
        # 3. 8-bit colours; the stored values may be overwritten.
        if self._fast:
            if self._planes.size < stored.size:
                self._planes = np.empty(stored.size, np.uint8)
            planes = self._planes[: stored.size].reshape(stored.shape)
            least, most = map(int, extremes)
            if len(self._fast) == 1:
                self._fast[0].apply(stored, planes, least, most)
            else:
                for rule, plane, out in zip(self._fast, stored, planes, strict=True):
                    rule.apply(plane, out, least, most)
        else:
            planes = self._scene.rendering.apply(stored)
        if empty is not None and not empty.any():
            empty = None
        if empty is not None:
            planes *= (~empty).view(np.uint8)  # many times as fast as assigning to a mask
        return Pixels(planes, empty, fill if fill is None or fill.any() else None, cloud)

    def close(self) -> None:
        """Give the dataset handles back."""
        self._opened.close()

    def __enter__(self) -> SceneReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
