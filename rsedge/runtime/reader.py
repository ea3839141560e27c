"""Tiles of a scene as images, read ahead by threads, in order, in constant memory.

Pixels are read by tile rows. Where a file is stored in tiles, each thread owns a range of block columns and walks down
the scene, so that the last row of blocks is still in GDAL's cache when the next tile row begins in it; where it is
stored in strips as wide as the scene, threads take whole tile rows in turn. Either way no block is decoded twice by two
threads, and a row is cut into tiles by the thread that read the last part of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from rasterio.errors import RasterioError

from rsedge.errors import OptionError
from rsedge.pixels import UInt8, resize

if TYPE_CHECKING:
    from rsedge.runtime.scene import Scene
    from rsedge.runtime.scene_reader import Pixels, SceneReader
    from rsedge.runtime.tiles import Tile, TileGrid

# Formats that can only be decoded from the top: a second reader would decode everything a second time.
_SEQUENTIAL = frozenset({"PNG", "JPEG", "GIF", "BMP", "WEBP"})
# A raster made of others reports blocks of its own; this is what the files behind it usually have (JP2: 1024).
_COMPOSITE = frozenset({"VRT", "SENTINEL2"})
_COMPOSITE_BLOCK = 1024
# Room for a row of 512-line blocks of a whole Sentinel-2 tile in 16 bits: up to that width memory is the same.
_SMALLEST_CACHE = 64 * 2**20
# Lines per read: enough to keep GDAL busy, few enough that copies on the way cost little memory.
_LINES_AT_ONCE = 64


@dataclass(frozen=True, slots=True, eq=False)
class TilePixels:
    """The pixels of one tile.

    Attributes:
        tile: Which one.
        images: Per size asked for uint8 [size, size, 3], 0 where there is no data or the tile hangs over; empty if
            unreadable.
        nodata_fraction: Share of the covered source pixels without data, or None if unreadable.
        fill_fraction: Share of them that are pure black or white although they have data, or None if unreadable.
        cloud_fraction: Share of those with data that are cloud, or None if unreadable, all without data, or unknown.
        error: Why it is unreadable, as one line, or None.
    """

    tile: Tile
    images: tuple[UInt8, ...]
    nodata_fraction: float | None
    fill_fraction: float | None = None
    cloud_fraction: float | None = None
    error: str | None = None

    @property
    def image(self) -> UInt8 | None:
        """The first of ``images``, or None."""
        return self.images[0] if self.images else None


@dataclass(frozen=True, slots=True)
class ImageSize:
    """What a model wants to see.

    Attributes:
        size: Side in pixels.
        resample: Filter that brings pixels to it, see ``rsedge.pixels.resize``.
    """

    size: int
    resample: str = "bicubic"

    def of(self, image: UInt8) -> UInt8:
        """The image, uint8 [H, W, 3], as uint8 [size, size, 3]."""
        return resize(image, self.size, self.resample)


def resize_all(image: UInt8, sizes: Sequence[ImageSize]) -> tuple[UInt8, ...]:
    """An image in every size, made once where two are the same."""
    made = {size: size.of(image) for size in dict.fromkeys(sizes)}
    return tuple(made[size] for size in sizes)


def read_tiles(
    scene: Scene,
    grid: TileGrid,
    *,
    image_size: int,
    resample: str = "bicubic",
    also: Sequence[ImageSize] = (),
    start: int = 0,
    stop: int | None = None,
    readers: int = 2,
    queue_tiles: int = 96,
) -> Generator[TilePixels, None, None]:
    """The tiles ``start`` to ``stop`` (not included) of the grid, in index order; the same however it is started.

    Threads read ahead whole tile rows with about ``queue_tiles`` tiles, at least one row each, so that memory hardly
    depends on the width of the scene and not at all on its height. Closing the iterator ends and joins the threads.

    Args:
        scene: Where the pixels come from.
        grid: Tiles of that scene.
        image_size: Side of the images in pixels; tiles of another size are resized in the reading threads.
        resample: Filter for that, see ``rsedge.pixels.resize``.
        also: Further sizes of the same pixels, for other models.
        start: Index of the first tile.
        stop: Index after the last tile; default: all of them.
        readers: Number of reading threads; fewer are used where more would decode the same block again.
        queue_tiles: Tiles that may wait for the consumer.

    Raises:
        OptionError: ``readers`` or ``queue_tiles`` is below 1.
        SceneError: The scene cannot be opened any more.
    """
    if readers < 1 or queue_tiles < 1:
        raise OptionError(f"readers is {readers} and queue_tiles {queue_tiles}: both must be at least 1")
    end = len(grid) if stop is None else min(stop, len(grid))
    rows = _RowQueue(scene, grid, start, end, partial(resize_all, sizes=[ImageSize(image_size, resample), *also]))
    return _generate(scene, grid, rows, readers, queue_tiles)


def _generate(
    scene: Scene, grid: TileGrid, queue: _RowQueue, readers: int, queue_tiles: int
) -> Generator[TilePixels, None, None]:
    ranges = _column_ranges(scene, readers)
    workers = 1 if len(ranges) > 1 else _strip_readers(scene, grid, readers)
    queue.start(ranges, workers, ahead=max(queue_tiles // grid.cols, workers), cache_bytes=cache_bytes(scene, grid))
    try:
        yield from queue
    finally:
        queue.close()


def _column_ranges(scene: Scene, readers: int) -> list[tuple[int, int]]:
    """First and last column (not included) that each thread reads: whole blocks, about the same number each."""
    block = max(scene.block_shape[1], _COMPOSITE_BLOCK if scene.driver in _COMPOSITE else 1)
    blocks = -(-scene.width // block)
    count = min(readers, blocks)
    edges = [min(scene.width, block * (blocks * k // count)) for k in range(count + 1)]
    return list(pairwise(edges))


def _strip_readers(scene: Scene, grid: TileGrid, readers: int) -> int:
    """Threads that take whole tile rows in turn; one, where neighbouring rows share more than a tenth of the strips."""
    strip = scene.block_shape[0]
    shared = grid.overlap + (0 if grid.stride % strip == 0 else strip)
    return 1 if scene.driver in _SEQUENTIAL or shared * 10 > grid.tile_size else min(readers, grid.rows)


def cache_bytes(scene: Scene, grid: TileGrid) -> int:
    """GDAL's block cache: the rows of blocks that the next tile row wants again, whatever the height of the scene.

    In bytes, because rasterio hands GDAL the number as it is: the 64 that GDAL's own option would read as megabytes
    leaves no cache at all, and every block is decoded again for each tile row.
    """
    composite = scene.driver in _COMPOSITE
    block = max(scene.block_shape[0], _COMPOSITE_BLOCK if composite else 1)
    # Lines are read from above: only blocks of the last lines and of the overlap are wanted again. Half a row more is
    # room for a thread that is ahead, whose new blocks would else drive out those another one still needs.
    lines = block * (1 + -(-grid.overlap // block)) + block // 2
    bands = len(scene.bands) if composite else scene.band_count  # interleaved by pixel, all bands are decoded together
    return max(_SMALLEST_CACHE, lines * scene.width * bands * np.dtype(scene.dtype).itemsize)


class _Row:
    """One tile row while it is being read: its images, filled line by line, and counts of their pixels: without data,
    fill, cloud.
    """

    def __init__(self, tiles: list[Tile], tile_size: int, parts: int) -> None:
        self.left = tiles[0].col_off
        self.right = max(tile.col_off + tile.width for tile in tiles)
        self.images: list[UInt8] = [np.zeros((tile_size, tile_size, 3), np.uint8) for _ in tiles]
        self.counts = np.zeros((3, len(tiles)), np.int64)
        self.parts_left = parts
        self.failed = False


class _RowQueue:
    """Tile rows in work: threads fill them, the consumer takes them in order. One condition guards it all."""

    def __init__(
        self, scene: Scene, grid: TileGrid, start: int, stop: int, bring_to_size: Callable[[UInt8], tuple[UInt8, ...]]
    ) -> None:
        self._scene = scene
        self._grid = grid
        self._span = (start, stop)
        self._rows = range(start // grid.cols, -(-stop // grid.cols)) if start < stop else range(0)
        self._bring_to_size = bring_to_size
        self._changed = threading.Condition()
        self._in_work: dict[int, _Row] = {}
        self._done: dict[int, list[TilePixels]] = {}
        self._taken = self._rows.start
        self._stopped = False
        self._error: BaseException | None = None
        self._threads: list[threading.Thread] = []

    def start(self, ranges: list[tuple[int, int]], workers: int, *, ahead: int, cache_bytes: int) -> None:
        """Start a thread per column range, or ``workers`` threads that share the one range row by row."""
        self._parts = len(ranges)
        self._ahead = ahead
        for first in range(workers):
            for columns in ranges:
                arguments = (self._rows[first::workers], columns, cache_bytes)
                thread = threading.Thread(target=self._work, args=arguments, name="rsedge-reader", daemon=True)
                self._threads.append(thread)
                thread.start()

    def _tiles(self, number: int) -> list[Tile]:
        """The tiles wanted of a tile row."""
        cols, (start, stop) = self._grid.cols, self._span
        return list(self._grid.slice(max(start, number * cols), min(stop, (number + 1) * cols)))

    def __iter__(self) -> Iterator[TilePixels]:
        for number in self._rows:
            yield from self._take(number)

    def _take(self, number: int) -> list[TilePixels]:
        """The tiles of row ``number``, which is the next; its predecessor makes room for another one."""
        with self._changed:
            self._taken = number
            self._changed.notify_all()
            self._changed.wait_for(lambda: number in self._done or self._error is not None)
            if self._error is not None:
                raise self._error
            return self._done.pop(number)

    def close(self) -> None:
        """End the threads and wait for them; each finishes at most the read it is in."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self, numbers: range, columns: tuple[int, int], cache_bytes: int) -> None:
        """Read ``columns`` of the rows ``numbers``: the body of a thread."""
        try:
            with self._scene.environment(GDAL_CACHEMAX=cache_bytes), self._scene.reader() as reader:
                for number in numbers:
                    row = self._enter(number)
                    if row is None:
                        return
                    if self._leave(row, self._fill(row, self._tiles(number), reader, columns)):
                        tiles = self._cut(row, self._tiles(number), reader)
                        with self._changed:
                            del self._in_work[number]
                            self._done[number] = tiles
                            self._changed.notify_all()
        except BaseException as error:  # whatever it is, the consumer must hear of it
            with self._changed:
                self._error = self._error or error
                self._stopped = True
                self._changed.notify_all()

    def _enter(self, number: int) -> _Row | None:
        """Row ``number`` once the consumer is near it, or None when all should end."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or number <= self._taken + self._ahead)
            if self._stopped:
                return None
            if number not in self._in_work:
                self._in_work[number] = _Row(self._tiles(number), self._grid.tile_size, self._parts)
            return self._in_work[number]

    def _fill(self, row: _Row, tiles: list[Tile], reader: SceneReader, owned: tuple[int, int]) -> npt.NDArray[np.int64]:
        """Read the owned columns into the row's images; gives the counts of their pixels in each, [3, tiles]."""
        counts = np.zeros((3, len(tiles)), np.int64)
        left, right = max(owned[0], row.left), min(owned[1], row.right)
        if left >= right or row.failed:
            return counts
        height = tiles[0].height
        try:
            for top in range(0, height, _LINES_AT_ONCE):
                lines = slice(top, min(top + _LINES_AT_ONCE, height))
                pixels = reader.read_pixels(tiles[0].row_off + top, left, lines.stop - top, right - left)
                for index, tile in enumerate(tiles):
                    first, last = max(tile.col_off, left), min(tile.col_off + tile.width, right)
                    if first < last:
                        part, place = slice(first - left, last - left), slice(first - tile.col_off, last - tile.col_off)
                        row.images[index][lines, place] = pixels.rgb[:, part]
                        counts[:, index] += _counts(pixels, part)
        except RasterioError:
            row.failed = True
        return counts

    def _leave(self, row: _Row, counts: npt.NDArray[np.int64]) -> bool:
        """Whether the caller read the last part of the row, and so has to finish it."""
        with self._changed:
            row.counts += counts
            row.parts_left -= 1
            return row.parts_left == 0

    def _cut(self, row: _Row, tiles: list[Tile], reader: SceneReader) -> list[TilePixels]:
        if row.failed:  # what of it can be read, tile by tile, so that the outcome does not depend on how it was shared
            return [self._read_alone(tile, reader) for tile in tiles]
        return [
            self._finish(tile, image, counts)
            for tile, image, counts in zip(tiles, row.images, row.counts.T.tolist(), strict=True)
        ]

    def _read_alone(self, tile: Tile, reader: SceneReader) -> TilePixels:
        try:
            pixels = reader.read_pixels(tile.row_off, tile.col_off, tile.height, tile.width)
        except RasterioError as error:
            reason = " ".join(str(error.__cause__ or error).split())
            return TilePixels(tile, (), None, error=f"pixels cannot be read: {reason}")
        image = np.zeros((self._grid.tile_size, self._grid.tile_size, 3), np.uint8)
        image[: tile.height, : tile.width] = pixels.rgb
        return self._finish(tile, image, _counts(pixels, slice(None)))

    def _finish(self, tile: Tile, image: UInt8, counts: Sequence[int]) -> TilePixels:
        """Bring a padded tile to the images' sizes; padding does not count as missing."""
        empty, fill, cloud = counts
        size = tile.width * tile.height
        cloudy = cloud / (size - empty) if self._scene.clouds is not None and empty < size else None
        return TilePixels(tile, self._bring_to_size(image), empty / size, fill / size, cloudy)


def _counts(pixels: Pixels, columns: slice) -> list[int]:
    """Pixels without data, pixels of fill that have data, pixels of cloud that have data."""
    empty = pixels.empty[:, columns]
    none = int(np.count_nonzero(empty))
    return [
        none,
        *(
            0 if mask is None else int(np.count_nonzero(mask[:, columns] & ~empty if none else mask[:, columns]))
            for mask in (pixels.fill, pixels.cloud)
        ),
    ]
