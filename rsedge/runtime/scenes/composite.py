"""Bands of several files on one grid, read as one raster; and clouds and masks on the grid of a scene.

Each file is opened by the gate and read directly: GDAL's own way, a VRT, would open the files a second time, with
every driver there is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.transform import from_origin
from rasterio.windows import Window

from rsedge.errors import SceneError
from rsedge.runtime.scenes import remote
from rsedge.runtime.scenes.gdal import open_dataset
from rsedge.runtime.scenes.products.product import PER_BAND
from rsedge.runtime.scenes.sidecars import mask_beside, place_beside

if TYPE_CHECKING:
    from rasterio.transform import Affine

    from rsedge.runtime.scenes.access import Access
    from rsedge.runtime.scenes.products.product import BandFile, Extent

_TYPES = ("uint8", "uint16", "int16", "float32", "float64")
_COLOURS = ("red", "green", "blue")

Mask = npt.NDArray[np.bool_]

_SCL_CLOUDS, _SCL_NO_DATA = (8, 9, 10), 0  # cloud of medium and of high probability, thin cirrus
_OUTSIDE = {"scl": 255, "mask": 0}  # where the file has no pixels: neither cloud nor without data
_CLOUD_NAMES = {"scl": "scene classification", "mask": "cloud mask"}


@dataclass(frozen=True, slots=True)
class Grid:
    """Where the pixels of a raster lie."""

    crs: Any  # rasterio CRS, or None
    transform: Affine  # Affine from (column, row) to map coordinates
    width: int  # and height: in pixels
    height: int

    @classmethod
    def of(cls, dataset: Any, extent: Extent | None = None) -> Grid:
        """That of an open dataset; of one without a place on a map, ``extent``, or what files beside it state."""
        crs, transform = dataset.crs, dataset.transform
        if not crs and transform.is_identity:
            if extent is not None:
                step = extent.width / dataset.width, extent.height / dataset.height
                crs, transform = CRS.from_string(extent.crs), from_origin(extent.left, extent.top, *step)
            else:
                crs, beside = place_beside(dataset.name)
                transform = beside or transform
        return cls(crs, transform, dataset.width, dataset.height)


class PlacedBand:
    """One band of an open dataset, or its mask, read by windows of a scene's grid; belongs to one thread."""

    def __init__(self, dataset: Any, band: int, own: Grid, grid: Grid, name: str) -> None:
        """Args: an open dataset, the number of its band, its grid, the scene's grid, how messages call the file.

        SceneError where it has no such band, a type that scenes do not have, or lies on another grid.
        """
        if not 1 <= band <= dataset.count:
            raise SceneError(f"{name} has {dataset.count} bands and no band {band}: name another file")
        if dataset.dtypes[band - 1] not in _TYPES:
            raise SceneError(
                f"{name} is {dataset.dtypes[band - 1]}, expected one of {', '.join(_TYPES)}: convert it with "
                "gdal_translate -ot"
            )
        self.dataset, self.band, self.name = dataset, band, name
        self.dtype = dataset.dtypes[band - 1]
        self.size = own.width, own.height
        # Where the file lies in the pixels of the grid.
        advice = "bring them together first, with gdalwarp"
        if own.crs != grid.crs:
            of_file, of_scene = (
                each.crs.to_string() if each.crs else "no coordinate reference system" for each in (own, grid)
            )
            raise SceneError(f"{name} is in {of_file} and the scene in {of_scene}: {advice}")
        to_grid = None if grid.transform.is_degenerate else ~grid.transform @ own.transform
        if to_grid is None or not all(map(math.isfinite, to_grid[:6])):
            raise SceneError(f"{name} and the scene have geotransforms that no numbers bring together: {advice}")
        if max(abs(to_grid.b), abs(to_grid.d)) > 1e-9 or to_grid.a <= 0 or to_grid.e <= 0:
            raise SceneError(f"{name} is rotated or mirrored against the scene: {advice}")
        place = (to_grid.c, to_grid.f, to_grid.a * own.width, to_grid.e * own.height)
        self.left, self.top, self.across, self.down = left, top, across, down = tuple(map(_exact, place))
        if left >= grid.width or top >= grid.height or left + across <= 0 or top + down <= 0:
            raise SceneError(f"{name} lies beside the scene and covers no pixel of it: name another file")
        self.fits = (left, top, across, down) == (0, 0, *self.size) == (0, 0, grid.width, grid.height)

    def read(
        self, window: Window, out: npt.NDArray[Any], *, outside: float = 0, resampling: Resampling, mask: bool = False
    ) -> None:
        """Read a window of the grid, in whole pixels, into ``out`` [h, w].

        Args:
            window: Of the grid.
            out: Filled; ``outside`` where the file has no pixels.
            outside: See ``out``.
            resampling: Where the pixels of the file are of another size.
            mask: Read the mask of the band (uint8, 0 without data) in place of its values.

        RasterioError where the pixels cannot be read.
        """
        read = self.dataset.read_masks if mask else self.dataset.read
        if self.fits:
            read(self.band, window=window, out=out)
            return
        # Pixels of the grid whose centres lie in the file, and the part of the file under them.
        lines, from_line, to_line = _covered(window.row_off, window.height, self.top, self.down, self.size[1])
        columns, from_column, to_column = _covered(window.col_off, window.width, self.left, self.across, self.size[0])
        if lines.stop - lines.start < window.height or columns.stop - columns.start < window.width:
            out[:] = outside
        if lines.stop <= lines.start or columns.stop <= columns.start:
            return
        part = Window(from_column, from_line, to_column - from_column, to_line - from_line)
        shape = lines.stop - lines.start, columns.stop - columns.start
        whole = all(float(value).is_integer() for value in part.flatten()) and shape == (part.height, part.width)
        pixels = read(self.band, window=part, out_shape=shape, resampling=Resampling.nearest if whole else resampling)
        out[lines, columns] = pixels


def _covered(first: int, count: int, start: float, length: float, own: int) -> tuple[slice, float, float]:
    """Along an axis: which of ``count`` pixels from ``first`` on lie in a file, and the file's pixels under them."""
    begin = max(first, math.ceil(start - 0.5))
    end = min(first + count, math.ceil(start + length - 0.5))
    scale = own / length
    return slice(begin - first, end - first), max(0.0, (begin - start) * scale), min(float(own), (end - start) * scale)


def _exact(value: float) -> float:
    """Without the noise of dividing coordinates, which would make GDAL resample what fits."""
    return float(round(value)) if abs(value - round(value)) < 1e-6 else value


class Composite:
    """Red, green and blue from files of one coordinate reference system, on the grid of the finest.

    Has of rasterio's datasets what describing and reading a scene needs. Belongs to one thread; close it.

    Attributes:
        parts: The files.
        notes: Which bands are resampled, one clause each.
        doubts: Masks beside the files that are not used, one line each.
        grid: Of the finest file, or the one it was brought to.
        crs, transform, width, height, count, indexes, dtypes, nodatavals, scales, offsets, block_shapes, driver, files,
            descriptions, colorinterp, mask_flag_enums: As of a rasterio dataset; blocks and driver of the first file.
    """

    gcps: tuple[list[Any], Any] = ([], None)
    rpcs = None
    count, indexes = 3, (1, 2, 3)
    descriptions = (None, None, None)

    def __init__(
        self, parts: Sequence[BandFile], extent: Extent | None, access: Access, overview: int | None = None
    ) -> None:
        """Open the files; SceneError where one cannot be opened, or their grids cannot be brought together.

        Args:
            parts: Files of red, green and blue.
            extent: Where files lie that do not say so themselves.
            access: What they may touch.
            overview: Level of the overviews inside the files that are read in place of their full rasters.
        """
        with ExitStack() as stack:
            opened = [stack.enter_context(open_dataset(part.path, access, overview=overview)) for part in parts]
            names = [remote.unsigned(part.path) for part in parts]
            grids = [Grid.of(dataset, extent) for dataset in opened]
            self.parts = tuple(parts)
            self._lie_on(min(grids, key=lambda grid: abs(grid.transform.a)))
            self._bands = [
                PlacedBand(dataset, part.band, own, self.grid, name)
                for dataset, part, own, name in zip(opened, parts, grids, names, strict=True)
            ]
            if len({band.dtype for band in self._bands}) > 1:
                found = ", ".join(f"{band.name} {band.dtype}" for band in self._bands)
                raise SceneError(
                    f"the bands have different types ({found}): convert them to one, with gdal_translate -ot"
                )
            self.colorinterp = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
            self.dtypes = tuple(band.dtype for band in self._bands)
            at = [(dataset, part.band - 1) for dataset, part in zip(opened, parts, strict=True)]
            self.nodatavals = tuple(dataset.nodatavals[index] for dataset, index in at)
            self.scales = tuple(dataset.scales[index] for dataset, index in at)
            self.offsets = tuple(dataset.offsets[index] for dataset, index in at)
            self._tags = [dataset.tags(index + 1) for dataset, index in at]
            self.block_shapes = tuple(dataset.block_shapes[index] for dataset, index in at)
            self.driver, self.name = opened[0].driver, names[0]
            self.files = [name for dataset in opened for name in dataset.files]
            self._overviews = [dataset.overviews(index + 1) for dataset, index in at]
            # The mask of each file: inside it, or beside it. A pixel without data in one has none.
            self._masks: list[tuple[PlacedBand, bool]] = []
            doubts = []
            for band, dataset, part, own in zip(self._bands, opened, parts, grids, strict=True):
                if MaskFlags.per_dataset in dataset.mask_flag_enums[part.band - 1]:
                    self._masks.append((band, True))
                    continue
                beside, doubt = mask_beside(part.path, dataset, access)
                doubts += [doubt] if doubt else []
                if beside is not None:
                    mask = stack.enter_context(open_dataset(beside.path, access))
                    number = part.band if beside.band == PER_BAND else beside.band
                    self._masks.append((PlacedBand(mask, number, own, self.grid, beside.path), False))
                    self.files.append(beside.path)
            self.doubts = tuple(doubts)
            self.mask_flag_enums = ([MaskFlags.per_dataset if self._masks else MaskFlags.all_valid],) * 3
            self.notes = tuple(
                f"{colour} was resampled from {abs(own.transform.a):g} to {abs(self.grid.transform.a):g} map units"
                for colour, own in zip(_COLOURS, grids, strict=True)
                if own.transform.a != self.grid.transform.a
            )
            self._extent = extent
            self._stack = stack.pop_all()

    def tags(self, band: int = 0, ns: str | None = None) -> dict[str, str]:  # noqa: ARG002
        """Metadata of a band's file; none of the whole."""
        return dict(self._tags[band - 1]) if band else {}

    def overviews(self, band: int) -> list[int]:
        """Factors of the overviews inside a band's file."""
        return list(self._overviews[band - 1])

    def _lie_on(self, grid: Grid) -> None:
        self.grid = grid
        self.crs, self.transform, self.width, self.height = grid.crs, grid.transform, grid.width, grid.height

    def read(self, indexes: Sequence[int], *, window: Window, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """Bands [K, h, w] of a window of the grid, in the files' type; RasterioError where they cannot be read."""
        if out is None:
            out = np.empty((len(indexes), int(window.height), int(window.width)), self.dtypes[0])
        for plane, index in zip(out, indexes, strict=True):
            self._bands[index - 1].read(
                window, plane, outside=self.nodatavals[index - 1] or 0, resampling=Resampling.bilinear
            )
        return out

    def read_masks(self, band: int, *, window: Window) -> npt.NDArray[np.uint8]:  # noqa: ARG002
        """The masks of all files together, uint8 [h, w], 0 without data."""
        out = np.full((int(window.height), int(window.width)), 255, np.uint8)
        for mask, inside in self._masks:
            one = np.empty(out.shape, np.uint8 if inside else mask.dtype)
            mask.read(window, one, outside=0, resampling=Resampling.nearest, mask=inside)
            out[one == 0] = 0
        return out

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def __enter__(self) -> Composite:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# Clouds: Sen2Cor's scene classification (SCL), or any raster that marks them


@dataclass(frozen=True, slots=True)
class CloudSource:
    """Where the clouds of a scene are known from."""

    # ``scl``: classes 8, 9 and 10 are cloud and 0 is no data; ``mask``: what is not 0 is cloud
    kind: Literal["scl", "mask"]
    file: BandFile
    grid: Grid  # of the scene
    extent: Extent | None  # where a file lies that does not say so itself
    access: Access  # what it may touch

    def describe(self) -> str:
        """For people."""
        return f"{_CLOUD_NAMES[self.kind]} {remote.unsigned(self.file.path)}, band {self.file.band}"


class CloudReader:
    """Reads windows of a cloud source; belongs to one thread. SceneError where the raster does not fit the scene."""

    def __init__(self, source: CloudSource) -> None:
        name = remote.unsigned(source.file.path)
        with ExitStack() as unless_good:
            dataset = open_dataset(source.file.path, source.access)
            unless_good.callback(dataset.close)
            self._band = PlacedBand(dataset, source.file.band, Grid.of(dataset, source.extent), source.grid, name)
            stored = self._stored = np.dtype(self._band.dtype)
            if stored.kind == "f":
                raise SceneError(f"{name} is {stored}, but masks hold classes: convert it with gdal_translate -ot Byte")
            self._opened = unless_good.pop_all()
        nodata = dataset.nodatavals[source.file.band - 1]
        # A table of every value there is; those below zero lie at its end, as negative indexes do.
        self._cloudy = np.zeros(256**stored.itemsize, np.bool_)
        self._cloudy[list(_SCL_CLOUDS) if source.kind == "scl" else slice(1, None)] = True
        if nodata is not None and float(nodata).is_integer() and np.iinfo(stored).min <= nodata <= np.iinfo(stored).max:
            self._cloudy[int(nodata)] = False
        self._no_data = _SCL_NO_DATA if source.kind == "scl" else None
        self._outside = _OUTSIDE[source.kind]

    def read(self, window: Window) -> tuple[Mask, Mask | None]:
        """Bool [h, w]: which pixels are cloud, and which have no data, None where that is not told."""
        classes = np.empty((int(window.height), int(window.width)), self._stored)
        self._band.read(window, classes, outside=self._outside, resampling=Resampling.nearest)
        return self._cloudy[classes], None if self._no_data is None else classes == self._no_data

    def close(self) -> None:
        """Give the dataset handle back."""
        self._opened.close()
