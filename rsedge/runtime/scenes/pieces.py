"""How a scene is read: in pieces that are whole blocks of its file, and with how much of GDAL's cache."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from rsedge.runtime.scenes.scene import Scene
    from rsedge.runtime.scenes.tiles import TileGrid

# A raster made of others reports blocks of its own; this is what the files behind it usually have (JP2: 1024).
_COMPOSITE = frozenset({"VRT"})
_COMPOSITE_BLOCK = 1024
# Blocks higher than this are read slice by slice, from GDAL's cache: laid out as tiles they would take too much memory.
_HIGHEST_PIECE = 4096
_PIXELS_TOGETHER = 2**18  # make a read worth its call: smaller blocks are read together
_SMALLEST_CACHE = 32 * 2**20


def block_shape(scene: Scene) -> tuple[int, int]:
    """Height and width of what is decoded at once."""
    least = _COMPOSITE_BLOCK if scene.driver in _COMPOSITE else 1
    return max(scene.block_shape[0], least), max(scene.block_shape[1], least)


def is_high(scene: Scene) -> bool:
    """Whether its blocks are too high to be read whole."""
    return block_shape(scene)[0] > _HIGHEST_PIECE


def cache_bytes(scene: Scene, grid: TileGrid) -> int:
    """GDAL's block cache: what is decoded besides the pixels at hand, whatever the height of the scene.

    In bytes, because rasterio hands GDAL the number as it is: the 64 that GDAL's own option would read as megabytes
    leaves no cache at all, and every block is decoded again for each read.
    """
    rows, cols = block_shape(scene)
    # Interleaved, all bands of a file are decoded together.
    bands = len(scene.bands) if scene.driver in _COMPOSITE else scene.band_count
    bytes_per_pixel = bands * np.dtype(scene.dtype).itemsize
    if is_high(scene) or scene.resampled or scene.remote:
        # Its lines are wanted again, by the next slice or by what is resampled from them, or come row by row.
        lines = rows * (1 + -(-grid.overlap // rows)) + rows // 2
        wider = 2 if scene.resampled else 1  # the file than the scene, as 10 m than 20 m
        return max(2 * _SMALLEST_CACHE, wider * lines * scene.width * bytes_per_pixel)
    return max(_SMALLEST_CACHE, 4 * rows * min(cols, scene.width) * bytes_per_pixel)


class Pieces:
    """A window of a scene as pieces that are whole blocks, in rows; all but those at its rim have one size.

    Attributes:
        edges: First line of each row of pieces, and the end.
        columns: First and last column (not included) of the pieces of a row.
        lanes: What each thread works through: the same for all, or columns of its own where the pieces below need again
            what it decoded.
    """

    def __init__(self, scene: Scene, window: tuple[int, int, int, int], readers: int, stride: int) -> None:
        top, bottom, left, right = window
        rows, cols = block_shape(scene)
        blocks = max(1, -(-right // cols) - left // cols)
        readers = max(1, min(readers, blocks if scene.block_shape[1] < scene.width else readers))
        if scene.block_shape[1] >= scene.width:
            across = 1
        elif scene.remote or scene.resampled:  # neighbours on a line are fetched together, or decoded for one another
            across = -(-blocks // readers)
        else:
            across = min(-(-blocks // readers), max(1, _PIXELS_TOGETHER // (rows * cols)))
        high = rows * max(1, min(_PIXELS_TOGETHER // (cols * across), stride) // rows)
        if scene.resampled:
            high = stride
        elif is_high(scene):
            high, across = stride, blocks
        self.edges = [top, *range((top // high + 1) * high, bottom, high), bottom]
        wide = cols * across
        verticals = [left, *range((left // wide + 1) * wide, right, wide), right]
        self.columns = list(pairwise(verticals))
        apart = scene.resampled and len(self.columns) > 1
        self.lanes = [Lane([columns]) for columns in self.columns] if apart else [Lane(self.columns)] * readers


class Lane:
    """Columns of pieces on the way down: the row of pieces in work, and which of it nobody has taken yet."""

    def __init__(self, columns: list[tuple[int, int]]) -> None:
        self.columns = columns
        self.at = 0
        self.left = list(columns)
