"""A scene as one small picture: what a report shows beneath its tiles."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from rasterio.errors import RasterioError

from rsedge.errors import OptionError, SceneError
from rsedge.runtime.scenes.products.product import PER_BAND
from rsedge.runtime.scenes.scene import open_pixels

if TYPE_CHECKING:
    from rsedge.pixels import UInt8
    from rsedge.runtime.scenes.scene import Scene

_LINES = 256  # source lines per read: few enough for little memory, many enough to keep GDAL busy
# Room for two rows of the blocks of JP2, which files behind a VRT have whatever it says of its own.
_CACHED_LINES = 2048
_SMALLEST_CACHE = 64 * 2**20
_SPARE = 1.5  # an overview has this many pixels per pixel of the picture, so that averaging is left to us


def quicklook(scene: Scene, *, longest: int = 1400) -> UInt8:
    """The scene, rendered as models see it, averaged down to at most ``longest`` pixels; never made larger.

    Memory depends on the width of the scene, not on its height. Overviews (of a COG, of JP2) are read where there are
    any that are large enough, so that little of a big or a remote scene is.

    Args:
        scene: What to show.
        longest: Pixels of the longer side, at most.

    Returns:
        uint8 [h, w, 4]: R, G, B and opacity, which is the share of a pixel's ground that has data; lines that cannot be
        read are transparent.

    Raises:
        OptionError: ``longest`` is below 1.
        SceneError: The scene cannot be opened any more.
    """
    if longest < 1:
        raise OptionError(f"longest is {longest}, expected at least 1 pixel")
    factor = max(1.0, max(scene.width, scene.height) / longest)
    width, height = (max(1, round(side / factor)) for side in (scene.width, scene.height))
    cached = max(_CACHED_LINES, scene.block_shape[0] * 3 // 2)
    cache = max(_SMALLEST_CACHE, cached * scene.width * scene.band_count * np.dtype(scene.dtype).itemsize)
    # Threads of GDAL's own do not know our settings, and a VRT would open its files in them.
    threads = {} if scene.driver == "VRT" else {"GDAL_NUM_THREADS": "ALL_CPUS"}
    with scene.environment(GDAL_CACHEMAX=cache, **threads):
        source = _overview(scene, factor)
        # The mean of the ground under each pixel, colours weighted by whether there is data.
        picture = np.zeros((height, width, 4), np.uint8)
        lines = source.height / height  # source lines per line of the picture
        at_once = max(1, int(_LINES / lines))
        with source.reader() as reader:
            for top in range(0, height, at_once):
                bottom = min(top + at_once, height)
                first, last = int(top * lines), min(source.height, math.ceil(bottom * lines))
                with suppress(RasterioError):
                    rgb, empty = reader.read(first, 0, last - first, source.width)
                    rgba = np.dstack([rgb, np.where(empty, np.uint8(0), np.uint8(255))])
                    box = (0, top * lines - first, source.width, min(bottom * lines, source.height) - first)
                    small = Image.fromarray(rgba, "RGBA").resize((width, bottom - top), Image.Resampling.BOX, box)
                    picture[top:bottom] = np.asarray(small)
    return picture


def _overview(scene: Scene, factor: float) -> Scene:
    """The smallest overview that is clearly larger than the picture, as a scene; else the scene itself."""
    # A palette's overviews mix colours that are none; a mask beside the bands would be left behind.
    if scene.palette or scene.mask_band in (0, PER_BAND) or scene.mask_file or scene.resampled:
        return scene
    try:
        with open_pixels(scene) as dataset:
            factors = [dataset.overviews(band) for band in dataset.indexes]
            # Overviews know only the no-data that the file declares.
            declared = tuple(dataset.nodatavals[band - 1] for band in scene.bands)
            if declared != scene.nodata:
                return scene
        levels = [level for level, by in enumerate(factors[0]) if by * _SPARE <= factor]
        if not levels or any(each != factors[0] for each in factors):
            return scene
        small = replace(scene, overview=levels[-1])
        with open_pixels(small) as dataset:
            # Its clouds lie on the scene's own grid, and are not shown.
            return replace(small, width=dataset.width, height=dataset.height, clouds=None)
    except (RasterioError, SceneError):
        return scene
