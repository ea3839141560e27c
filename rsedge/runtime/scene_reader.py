"""Windows of one scene: 8-bit colours, and which pixels have no data, are fill, or are cloud."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from rsedge.runtime.clouds import CloudReader
from rsedge.runtime.opening import open_dataset

if TYPE_CHECKING:
    from rsedge.pixels import UInt8
    from rsedge.runtime.scene import Scene

Mask = npt.NDArray[np.bool_]


class Pixels(NamedTuple):
    """A window of a scene.

    Attributes:
        rgb: uint8 [h, w, 3], R, G, B; 0 where there is no data.
        empty: bool [h, w], True where there is no data.
        fill: bool [h, w], True where all bands hold the least or all the greatest value they can: black or white fill
            that nothing declares, or clipping. None where there is none at all.
        cloud: bool [h, w], True where there is cloud; None where the scene has no cloud mask.
    """

    rgb: UInt8
    empty: Mask
    fill: Mask | None
    cloud: Mask | None


class SceneReader:
    """Reads windows of one scene; belongs to one thread."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._opened: Any = open_dataset(scene.path)
        self._dataset: Any = self._opened
        if scene.resampled:
            self._dataset = WarpedVRT(
                self._opened,
                crs=scene.crs,
                transform=scene.transform,
                width=scene.width,
                height=scene.height,
                resampling=Resampling[scene.resampled],
            )
        self._clouds = CloudReader(scene.clouds) if scene.clouds else None
        # A grey scene names its band three times and an alpha band rides along: each band is read once.
        wanted = dict.fromkeys(scene.bands + ((scene.mask_band,) if scene.mask_band else ()))
        self._indexes = list(wanted)
        self._rgb = [self._indexes.index(band) for band in scene.bands]
        self._colours = _colour_table(self._opened, scene.bands[0]) if scene.palette else None
        self._declared = [None if value is None else np.array(value, dtype=scene.dtype) for value in scene.nodata]
        self._fill = _fill_values(scene)

    def read(self, row_off: int, col_off: int, height: int, width: int) -> tuple[UInt8, Mask]:
        """The colours of a window inside the scene, and where there is no data; see :class:`Pixels`.

        Raises:
            rasterio.errors.RasterioError: The pixels cannot be read.
        """
        pixels = self.read_pixels(row_off, col_off, height, width)
        return pixels.rgb, pixels.empty

    def read_pixels(self, row_off: int, col_off: int, height: int, width: int) -> Pixels:
        """All that is known of a window inside the scene.

        Raises:
            rasterio.errors.RasterioError: The pixels cannot be read.
        """
        window = Window(col_off, row_off, width, height)
        stored = self._dataset.read(self._indexes, window=window)
        planes = [stored[position] for position in self._rgb]
        empty = self._no_data(stored, planes, window)
        cloud = None
        if self._clouds is not None:
            cloud, without = self._clouds.read(window)
            if without is not None:
                empty |= without
        fill = self._filled(planes)
        if self._colours is not None:
            rgba = self._colours[stored[0]]
            rgb, empty = np.ascontiguousarray(rgba[..., :3]), empty | (rgba[..., 3] == 0)
        else:
            rgb = np.empty((height, width, 3), dtype=np.uint8)
            for channel, plane in enumerate(planes):  # six times as fast as transposing the whole
                rgb[..., channel] = self._scene.rendering.apply(plane)
        if empty.any():
            rgb[empty] = 0
        return Pixels(rgb, empty, fill, cloud)

    def _no_data(self, stored: npt.NDArray[Any], planes: Sequence[npt.NDArray[Any]], window: Window) -> Mask:
        """Which pixels of bands [K, h, w], read at ``window``, have no data."""
        scene = self._scene
        empty = np.zeros(planes[0].shape, dtype=np.bool_)
        if planes[0].dtype.kind == "f":
            for plane in planes:
                empty |= ~np.isfinite(plane)
        if all(value is not None for value in self._declared):
            empty |= _all_equal(planes, self._declared)
        if scene.reflectance is not None:
            empty |= _all_equal(planes, [0, 0, 0])
        if scene.mask_band:
            empty |= stored[self._indexes.index(scene.mask_band)] == 0
        elif scene.mask_band == 0:
            empty |= self._dataset.read_masks(scene.bands[0], window=window) == 0
        return empty

    def _filled(self, planes: Sequence[npt.NDArray[Any]]) -> Mask | None:
        fill: Mask | None = None
        for value in self._fill:
            found = _all_equal(planes, [value] * len(planes))
            fill = found if fill is None else fill | found
        return fill if fill is not None and fill.any() else None

    def close(self) -> None:
        """Give the dataset handles back."""
        if self._clouds is not None:
            self._clouds.close()
        if self._dataset is not self._opened:
            self._dataset.close()
        self._opened.close()

    def __enter__(self) -> SceneReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _fill_values(scene: Scene) -> list[Any]:
    """What fill is made of, in the scene's own type. 0 of reflectance is no data already, and a palette has none."""
    if scene.palette:
        return []
    if scene.reflectance is None:
        return [0, 255]
    return [] if scene.dtype.startswith("float") else [np.iinfo(scene.dtype).max]


def _all_equal(planes: Sequence[npt.NDArray[Any]], values: Sequence[Any]) -> Mask:
    """Where every plane has its value; stops at the first plane that has it nowhere, as most scenes allow."""
    found: Mask = planes[0] == values[0]
    for plane, value in zip(planes[1:], values[1:], strict=True):
        if not found.any():
            break
        found &= plane == value
    return found


def _colour_table(dataset: Any, band: int) -> UInt8:
    """The palette of a band as uint8 [65536, 4], R, G, B, A; entries the file lacks are transparent."""
    table = np.zeros((65536, 4), dtype=np.uint8)
    for value, colour in dataset.colormap(band).items():
        table[value] = colour
    return table
