"""A raster to process: which bands are its RGB, what has no data, where it lies, how its pixels become 8-bit.

A ``Scene`` holds metadata only. Pixels come from ``SceneReader`` objects, one per thread, because a GDAL dataset handle
serves one thread at a time.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import rasterio

from rsedge.errors import SceneError
from rsedge.redaction import redact
from rsedge.runtime.scenes import remote
from rsedge.runtime.scenes.access import LOCAL, Access
from rsedge.runtime.scenes.composite import Grid
from rsedge.runtime.scenes.footprints import footprints
from rsedge.runtime.scenes.gdal import settings as gdal_settings
from rsedge.runtime.scenes.scene_reader import SceneReader
from rsedge.texts import plain

if TYPE_CHECKING:
    from rsedge.pixels import ReflectanceRule
    from rsedge.runtime.scenes.clouds import CloudSource
    from rsedge.runtime.scenes.products.product import BandFile, Extent, Product
    from rsedge.runtime.scenes.rendering import Rendering
    from rsedge.runtime.scenes.tiles import Tile


@dataclass(frozen=True, slots=True)
class Scene:
    """A raster with known RGB. Made by ``Scene.open``; usable as a context manager, though it holds nothing open.

    Texts that people read are made plain (:func:`rsedge.texts.plain`), without credentials.

    Attributes:
        name: File name without the suffix (of the product, for a SAFE folder).
        path: What the gate opens; of several files the first.
        source: The file behind it (of a SAFE folder, the product metadata).
        width, height: Size in pixels.
        crs: rasterio CRS, or None.
        transform: Affine from (column, row) to map coordinates.
        dtype: NumPy name of the bands' type.
        rendering: How pixels become 8-bit.
        rendering_reason: Why so, as one clause.
        bands: 1-based numbers of red, green and blue; a single one for a palette.
        bands_reason: Why these.
        datetime: Acquisition time, RFC 3339 in UTC, or None.
        nodata: Per band of ``bands`` the value that means no data, or None.
        mask_band: Number of the alpha band, 0 for a mask of the whole dataset, or None.
        block_shape: Height and width of the blocks the file is stored in.
        band_count: Bands in the file, used or not.
        driver: GDAL's name of the format.
        files: The files on disk its pixels and metadata come from.
        remote: What else they come from, as GDAL names it.
        product_id: Identifier of the product, or None.
        mgrs_tile: Tile in the Military Grid Reference System, or None.
        clouds: Where its clouds are known from, or None.
        resampled: Name of the resampling that brings it to its size, or None where it is read as stored.
        parts: Files of red, green and blue where these are several; empty where ``path`` has all bands.
        extent: Where parts lie that do not say so themselves.
        mask_file: Raster beside the file (``.msk``) that is 0 where there is no data, or None.
        overview: Level of the overview that is read in place of the full raster, or None.
        access: What its files may touch.
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
    rendering: Rendering
    rendering_reason: str
    nodata: tuple[float | None, ...]
    mask_band: int | None
    palette: bool
    block_shape: tuple[int, int]
    band_count: int
    driver: str
    files: tuple[str, ...]
    remote: tuple[str, ...] = ()
    product_id: str | None = None
    mgrs_tile: str | None = None
    clouds: CloudSource | None = None
    resampled: str | None = None
    parts: tuple[BandFile, ...] = ()
    extent: Extent | None = None
    mask_file: BandFile | None = None
    overview: int | None = None
    access: Access = LOCAL
    warnings: tuple[str, ...] = ()

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
                :func:`rsedge.runtime.scenes.catalog.open_scenes`.
            **options: See :class:`rsedge.runtime.scenes.opening.SceneOptions`.

        Raises:
            SceneError: The raster cannot be opened, its pixels are of no known kind, or its RGB cannot be told.
            OptionError: An option does not fit the raster.
        """
        from rsedge.runtime.scenes.opening import SceneOptions, open_scene

        return open_scene(path, SceneOptions(**options))

    def __enter__(self) -> Scene:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
        """What decides the pixels: the files as they are now and every option. JSON values only.

        Raises:
            SceneError: A file is gone.
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
        """WGS 84 geometry of the covered part of each tile; None where the scene has no georeference.

        See ``rsedge.runtime.scenes.footprints.footprints``.
        """
        if not self._has_place:
            return [None] * len(tiles)
        with rasterio.Env(**gdal_settings()):
            return footprints(tiles, self.crs, self.transform)

    def environment(self, **settings: Any) -> Any:
        """Rasterio's environment to read it in, a context manager of the thread that enters it."""
        return rasterio.Env(**gdal_settings(self.access), **settings)

    def reader(self) -> SceneReader:
        """A reader with a dataset handle of its own; close it, or use it as a context manager.

        Raises:
            SceneError: The raster cannot be opened any more.
        """
        return SceneReader(self)
