"""Which pixels are cloud: Sen2Cor's scene classification (SCL), or any raster that marks them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from rasterio.enums import Resampling

from rsedge.errors import SceneError
from rsedge.runtime.scenes.composite import Grid, PlacedBand
from rsedge.runtime.scenes.gdal import open_dataset
from rsedge.runtime.scenes.remote import unsigned

if TYPE_CHECKING:
    from rasterio.windows import Window

    from rsedge.runtime.scenes.access import Access
    from rsedge.runtime.scenes.products.product import BandFile, Extent

Mask = npt.NDArray[np.bool_]

SCL_CLOUDS = (8, 9, 10)
"""Cloud of medium and of high probability, thin cirrus."""
SCL_NO_DATA = 0

_OUTSIDE = {"scl": 255, "mask": 0}  # where the file has no pixels: neither cloud nor without data
_NAMES = {"scl": "scene classification", "mask": "cloud mask"}


@dataclass(frozen=True, slots=True)
class CloudSource:
    """Where the clouds of a scene are known from.

    Attributes:
        kind: ``scl``: classes 8, 9 and 10 are cloud and 0 is no data; ``mask``: what is not 0 is cloud.
        file: The raster.
        grid: Of the scene.
        extent: Where a file lies that does not say so itself.
        access: What it may touch.
    """

    kind: Literal["scl", "mask"]
    file: BandFile
    grid: Grid
    extent: Extent | None
    access: Access

    def check(self) -> None:
        """Open it once.

        Raises:
            SceneError: The raster cannot be opened, holds no whole numbers, or lies on no grid that fits.
        """
        CloudReader(self).close()

    def describe(self) -> str:
        """For people."""
        return f"{_NAMES[self.kind]} {unsigned(self.file.path)}, band {self.file.band}"


class CloudReader:
    """Reads windows of a cloud source; belongs to one thread."""

    def __init__(self, source: CloudSource) -> None:
        name = unsigned(source.file.path)
        self._dataset: Any = open_dataset(source.file.path, source.access)
        try:
            own = Grid.of(self._dataset, source.extent)
            self._band = PlacedBand(self._dataset, source.file.band, own, source.grid, name)
            stored = self._stored = np.dtype(self._band.dtype)
            if stored.kind == "f":
                raise SceneError(f"{name} is {stored}, but masks hold classes: convert it with gdal_translate -ot Byte")
        except SceneError:
            self._dataset.close()
            raise
        nodata = self._dataset.nodatavals[source.file.band - 1]
        # A table of every value there is; those below zero lie at its end, as negative indexes do.
        self._cloudy = np.zeros(256**stored.itemsize, np.bool_)
        self._cloudy[list(SCL_CLOUDS) if source.kind == "scl" else slice(1, None)] = True
        if nodata is not None and float(nodata).is_integer() and np.iinfo(stored).min <= nodata <= np.iinfo(stored).max:
            self._cloudy[int(nodata)] = False
        self._no_data = SCL_NO_DATA if source.kind == "scl" else None
        self._outside = _OUTSIDE[source.kind]

    def read(self, window: Window) -> tuple[Mask, Mask | None]:
        """Bool [h, w]: which pixels are cloud, and which have no data, None where that is not told."""
        classes = np.empty((int(window.height), int(window.width)), self._stored)
        self._band.read(window, classes, outside=self._outside, resampling=Resampling.nearest)
        return self._cloudy[classes], None if self._no_data is None else classes == self._no_data

    def close(self) -> None:
        """Give the dataset handle back."""
        self._dataset.close()
