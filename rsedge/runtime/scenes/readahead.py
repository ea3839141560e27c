"""Tiles of a scene as images, read ahead by threads, in order, in constant memory.

Pixels are read in pieces that are whole blocks of the file (tiles, strips), row by row of pieces. Each piece is decoded
once, by one thread, made 8-bit at once, and laid into all tiles that it touches; a tile row is finished by the thread
that read the last piece of it. So the pace is that of decoding the file from its first block to its last.
"""

from __future__ import annotations

import math
import mmap
import threading
import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from rsedge.errors import OptionError
from rsedge.pixels import ImageSize, UInt8, resize, stack_images
from rsedge.runtime.scenes.gdal import READ_ERRORS

if TYPE_CHECKING:
    from rsedge.runtime.scenes.scene import Pixels, Scene, SceneReader
    from rsedge.runtime.scenes.tiles import Tile, TileGrid

# Formats that can only be decoded from the top: a second reader would decode everything a second time.
_SEQUENTIAL = frozenset({"PNG", "JPEG", "GIF", "BMP", "WEBP"})
# A raster made of others reports blocks of its own; this is what the files behind it usually have (JP2: 1024).
_COMPOSITE = frozenset({"VRT"})
_COMPOSITE_BLOCK = 1024
# Blocks higher than this are read slice by slice, from GDAL's cache: laid out as tiles they would take too much memory.
_HIGHEST_PIECE = 4096
_PIXELS_TOGETHER = 2**18  # make a read worth its call: smaller blocks are read together
_SMALLEST_CACHE = 32 * 2**20
# Pixels per read at most: a JP2 block of 1024 in one; two threads that read parts through VRTs decode each twice.
_PIXELS_AT_ONCE = 2**20


@dataclass(frozen=True, slots=True, eq=False)
class TilePixels:
    """The pixels of one tile."""

    tile: Tile  # which one
    # per size asked for uint8 [size, size, 3], 0 where there is no data or ``pad`` lets the tile hang over; empty if
    # unreadable. Plane after plane in memory where they were not resized: see ``rsedge.pixels``.
    images: tuple[UInt8, ...]
    nodata_fraction: float | None  # share of the covered source pixels without data, or None if unreadable
    # share of them that are pure black or white although they have data, or None if unreadable
    fill_fraction: float | None = None
    # share of those with data that are cloud, or None if unreadable, all without data, or unknown
    cloud_fraction: float | None = None
    error: str | None = None  # why it is unreadable, as one line, or None

    @property
    def image(self) -> UInt8 | None:
        """The first of ``images``, or None."""
        return self.images[0] if self.images else None


def resize_all(image: UInt8, sizes: Sequence[ImageSize]) -> tuple[UInt8, ...]:
    """An image in every size, made once where two are the same."""
    if any(image.shape[:2] != (size.size, size.size) for size in sizes):
        [image] = stack_images([image])  # Pillow takes five times as long over planes
    made = {size: resize(image, size.size, size.resample) for size in dict.fromkeys(sizes)}
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
    return _RowQueue(scene, grid, start, end, [ImageSize(image_size, resample), *also]).tiles(readers, queue_tiles)


# How a scene is read: in pieces that are whole blocks of its file, and with how much of GDAL's cache


def _block_shape(scene: Scene) -> tuple[int, int]:
    """Height and width of what is decoded at once."""
    least = _COMPOSITE_BLOCK if scene.driver in _COMPOSITE else 1
    return max(scene.block_shape[0], least), max(scene.block_shape[1], least)


def cache_bytes(scene: Scene, grid: TileGrid) -> int:
    """GDAL's block cache: what is decoded besides the pixels at hand, whatever the height of the scene.

    In bytes, because rasterio hands GDAL the number as it is: the 64 that GDAL's own option would read as megabytes
    leaves no cache at all, and every block is decoded again for each read.
    """
    rows, cols = _block_shape(scene)
    # Interleaved, all bands of a file are decoded together.
    bands = len(scene.bands) if scene.driver in _COMPOSITE else scene.band_count
    bytes_per_pixel = bands * np.dtype(scene.dtype).itemsize
    if rows > _HIGHEST_PIECE or scene.resampled or scene.remote:
        # Its lines are wanted again, by the next slice or by what is resampled from them, or come row by row.
        lines = rows * (1 + -(-grid.overlap // rows)) + rows // 2
        wider = 2 if scene.resampled else 1  # the file than the scene, as 10 m than 20 m
        return max(2 * _SMALLEST_CACHE, wider * lines * scene.width * bytes_per_pixel)
    return max(_SMALLEST_CACHE, 4 * rows * min(cols, scene.width) * bytes_per_pixel)


class _Pieces:
    """A window of a scene as pieces that are whole blocks, in rows; all but those at its rim have one size.

    Attributes:
        edges: First line of each row of pieces, and the end.
        columns: First and last column (not included) of the pieces of a row.
        lanes: What each thread works through: the same for all, or columns of its own where the pieces below need again
            what it decoded.
    """

    def __init__(self, scene: Scene, window: tuple[int, int, int, int], readers: int, stride: int) -> None:
        top, bottom, left, right = window
        rows, cols = _block_shape(scene)
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
        elif rows > _HIGHEST_PIECE:
            high, across = stride, blocks
        self.edges = [top, *range((top // high + 1) * high, bottom, high), bottom]
        wide = cols * across
        verticals = [left, *range((left // wide + 1) * wide, right, wide), right]
        self.columns = list(pairwise(verticals))
        apart = scene.resampled and len(self.columns) > 1
        self.lanes = [_Lane([columns]) for columns in self.columns] if apart else [_Lane(self.columns)] * readers


class _Lane:
    """Columns of pieces on the way down: the row of pieces in work, and which of it nobody has taken yet."""

    def __init__(self, columns: list[tuple[int, int]]) -> None:
        self.columns = columns
        self.at = 0
        self.left = list(columns)


# Tile rows in work


class _Row:
    """One tile row while it is being read: its pixels, filled piece by piece, and counts of them: without data, fill,
    cloud.

    Attributes:
        planes: Per tile uint8 [3, size, size] as pixels come: interleaving them would take a tenth of the reading.
    """

    def __init__(self, tiles: list[Tile], memory: _Memory, parts: int) -> None:
        self.tiles = tiles
        self.top, self.bottom = tiles[0].row_off, tiles[0].row_off + tiles[0].height
        self.lefts = [tile.col_off for tile in tiles]
        self.rights = [tile.col_off + tile.width for tile in tiles]
        self.planes = [memory.take() for _ in tiles]
        for tile, planes in zip(tiles, self.planes, strict=True):
            if (tile.height, tile.width) != planes.shape[1:]:  # pixels will not be laid over all of it
                planes[:] = 0
        self.counts = np.zeros((3, len(tiles)), np.int64)
        self.parts_left = parts
        self.failed = False


class _Memory:
    """Memory of tiles that is used again once nobody looks at them any more: fresh pages cost more than the copy."""

    def __init__(self, size: int) -> None:
        self._shape = (3, size, size)
        # Maps: zero without being written. No arrays: NumPy would have views refer to those, past what is watched.
        self._free: list[mmap.mmap] = []

    def take(self) -> UInt8:
        """uint8 [3, size, size], holding anything."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = mmap.mmap(-1, math.prod(self._shape))
        planes = np.ndarray(self._shape, np.uint8, memory)
        weakref.finalize(planes, self._free.append, memory).atexit = False  # views of it keep it alive
        return planes


class _RowQueue:
    """Tile rows in work: threads fill them, the consumer takes them in order. One condition guards it all."""

    def __init__(self, scene: Scene, grid: TileGrid, start: int, stop: int, sizes: Sequence[ImageSize]) -> None:
        self._scene, self._grid, self._span, self._sizes = scene, grid, (start, stop), sizes
        self._rows = range(start // grid.cols, -(-stop // grid.cols)) if start < stop else range(0)
        self._memory = _Memory(grid.tile_size)
        self._changed = threading.Condition()
        self._in_work: dict[int, _Row] = {}
        self._done: dict[int, list[TilePixels]] = {}
        self._taken = self._rows.start
        self._stopped = False
        self._error: BaseException | None = None
        # Tile rows by their lines; both ascend.
        firsts = [grid.tile(number * grid.cols) for number in self._rows]
        self._tops = [tile.row_off for tile in firsts]
        self._bottoms = [tile.row_off + tile.height for tile in firsts]

    def tiles(self, readers: int, queue_tiles: int) -> Generator[TilePixels, None, None]:
        """Start the threads, yield the tiles in order, and end the threads: each finishes at most its piece."""
        scene, grid, threads = self._scene, self._grid, []
        # 1. What is read of the scene: first and last line (not included), first and last column.
        tiles = [tile for number in self._rows[:2] for tile in self._tiles(number)]
        window = (0, 0, 0, 0)
        if tiles:
            left, right = min(tile.col_off for tile in tiles), max(tile.col_off + tile.width for tile in tiles)
            window = (self._tops[0], self._bottoms[-1], left, right)
        alone = scene.driver in _SEQUENTIAL or _block_shape(scene)[0] > _HIGHEST_PIECE
        self._pieces = _Pieces(scene, window, 1 if alone else readers, grid.stride)
        self._ahead = max(queue_tiles // grid.cols, 1)
        # 2. A thread for each lane.
        for number, lane in enumerate(self._pieces.lanes if self._rows else ()):
            arguments = (lane, (number + 0.5) / len(self._pieces.lanes), cache_bytes(scene, grid))
            threads.append(threading.Thread(target=self._work, args=arguments, name="rsedge-reader", daemon=True))
            threads[-1].start()
        # 3. Row after row; the one before makes room for another.
        try:
            for number in self._rows:
                with self._changed:
                    self._taken = number
                    self._changed.notify_all()
                    while number not in self._done and self._error is None:
                        self._changed.wait()
                    if self._error is not None:
                        raise self._error
                    done = self._done.pop(number)
                yield from done
        finally:
            with self._changed:
                self._stopped = True
                self._changed.notify_all()
            for thread in threads:
                thread.join()

    def _tiles(self, number: int) -> list[Tile]:
        """The tiles wanted of a tile row."""
        cols, (start, stop) = self._grid.cols, self._span
        return list(self._grid.slice(max(start, number * cols), min(stop, (number + 1) * cols)))

    def _work(self, lane: _Lane, place: float, cache_bytes: int) -> None:
        """Read piece after piece: the body of a thread. Of a row of pieces it prefers those near ``place``, 0 to 1."""
        try:
            with self._scene.environment(GDAL_CACHEMAX=cache_bytes), self._scene.reader() as reader:
                while (piece := self._enter(lane, place)) is not None:
                    window, rows = piece
                    counts = self._fill(rows, reader, *window)
                    # The rows of which this was the last piece are finished here.
                    finished = []
                    with self._changed:
                        for number, row in rows.items():
                            row.counts += counts[number]
                            row.parts_left -= 1
                            if row.parts_left == 0:
                                finished.append(number)
                                del self._in_work[number]
                    for number in finished:
                        tiles = self._finish(rows[number], reader)
                        with self._changed:
                            self._done[number] = tiles
                            self._changed.notify_all()
        except BaseException as error:  # whatever it is, the consumer must hear of it
            with self._changed:
                self._error = self._error or error
                self._stopped = True
                self._changed.notify_all()

    def _enter(self, lane: _Lane, place: float) -> tuple[tuple[int, int, int, int], dict[int, _Row]] | None:
        """The next piece (top, bottom, left, right) with the tile rows that it touches, once the consumer is near;
        None when all should end.
        """
        edges = self._pieces.edges
        with self._changed:
            while True:
                if not lane.left:
                    lane.at += 1
                    lane.left = list(lane.columns)
                if self._stopped or lane.at + 1 >= len(edges):
                    return None
                top, bottom = edges[lane.at : lane.at + 2]
                numbers = self._rows[bisect_right(self._bottoms, top) : bisect_left(self._tops, bottom)]
                if not numbers:  # lines that no tile wants
                    lane.left = []
                elif numbers.start <= self._taken + self._ahead:
                    break
                else:
                    self._changed.wait()
            target = self._pieces.columns[0][0] * (1 - place) + self._pieces.columns[-1][1] * place
            left, right = min(lane.left, key=lambda columns: abs(columns[0] + columns[1] - 2 * target))
            lane.left.remove((left, right))
            for number in numbers:
                if number not in self._in_work:
                    self._in_work[number] = self._new_row(number)
            return (top, bottom, left, right), {n: self._in_work[n] for n in numbers}

    def _new_row(self, number: int) -> _Row:
        tiles, edges = self._tiles(number), self._pieces.edges
        top, bottom = tiles[0].row_off, tiles[0].row_off + tiles[0].height
        parts = bisect_left(edges, bottom) - bisect_right(edges, top) + 1  # rows of pieces that reach into it
        return _Row(tiles, self._memory, parts * len(self._pieces.columns))

    def _fill(
        self, rows: dict[int, _Row], reader: SceneReader, top: int, bottom: int, left: int, right: int
    ) -> dict[int, npt.NDArray[np.int64]]:
        """Read a piece into the images of the tile rows; gives the counts of its pixels in each, [3, tiles]."""
        counts = {number: np.zeros((3, len(row.tiles)), np.int64) for number, row in rows.items()}
        lines = max(1, _PIXELS_AT_ONCE // (right - left))
        try:
            for first in range(top, bottom, lines):
                last = min(first + lines, bottom)
                pixels = reader.read_pixels(first, left, last - first, right - left)
                for number, row in rows.items():
                    if row.top < last and row.bottom > first:
                        _lay(pixels, row, counts[number], first, left)
        except READ_ERRORS:
            for row in rows.values():
                row.failed = True
        return counts

    def _finish(self, row: _Row, reader: SceneReader) -> list[TilePixels]:
        """The tiles of a row; of one that failed what can be read tile by tile, however it was shared among threads."""
        if row.failed:
            return [self._read_alone(tile, reader) for tile in row.tiles]
        return [
            self._tile(tile, planes, counts)
            for tile, planes, counts in zip(row.tiles, row.planes, row.counts.T.tolist(), strict=True)
        ]

    def _read_alone(self, tile: Tile, reader: SceneReader) -> TilePixels:
        try:
            pixels = reader.read_pixels(tile.row_off, tile.col_off, tile.height, tile.width)
        except READ_ERRORS as error:
            reason = " ".join(str(error.__cause__ or error).split())
            return TilePixels(tile, (), None, error=f"pixels cannot be read: {reason}")
        planes = np.zeros((3, self._grid.tile_size, self._grid.tile_size), np.uint8)
        planes[:, : tile.height, : tile.width] = pixels.planes
        return self._tile(tile, planes, _counts(pixels, slice(None), slice(None)))

    def _tile(self, tile: Tile, planes: UInt8, counts: Sequence[int]) -> TilePixels:
        """Mirror a tile that hangs over, and bring it to the images' sizes; what lies beyond does not count."""
        empty, fill, cloud = counts
        size = tile.width * tile.height
        if self._grid.edge in ("shift", "mirror") and size < planes[0].size:
            beyond = (0, 0), (0, planes.shape[1] - tile.height), (0, planes.shape[2] - tile.width)
            planes[:] = np.pad(planes[:, : tile.height, : tile.width], beyond, "symmetric")
        cloudy = cloud / (size - empty) if self._scene.clouds is not None and empty < size else None
        return TilePixels(tile, resize_all(planes.transpose(1, 2, 0), self._sizes), empty / size, fill / size, cloudy)


def _lay(pixels: Pixels, row: _Row, counts: npt.NDArray[np.int64], top: int, left: int) -> None:
    """Lay pixels whose upper left is at ``top``, ``left`` into a row's images, as far as they belong there."""
    height, width = pixels.planes.shape[1:]
    first, last, right = max(top, row.top), min(top + height, row.bottom), left + width
    lines, place = slice(first - top, last - top), slice(first - row.top, last - row.top)
    known = any(mask is not None for mask in pixels[1:])
    for index in range(bisect_right(row.rights, left), bisect_left(row.lefts, right)):
        begin, end = max(row.lefts[index], left), min(row.rights[index], right)
        columns = slice(begin - left, end - left)
        across = slice(begin - row.lefts[index], end - row.lefts[index])
        row.planes[index][:, place, across] = pixels.planes[:, lines, columns]
        if known:
            counts[:, index] += _counts(pixels, lines, columns)


def _counts(pixels: Pixels, lines: slice, columns: slice) -> list[int]:
    """Pixels without data, pixels of fill that have data, pixels of cloud that have data."""
    empty = None if pixels.empty is None else pixels.empty[lines, columns]
    found = [0 if empty is None else int(np.count_nonzero(empty))]
    for mask in (pixels.fill, pixels.cloud):
        part = None if mask is None else mask[lines, columns]
        if part is not None and empty is not None and found[0]:
            part = part & ~empty
        found.append(0 if part is None else int(np.count_nonzero(part)))
    return found
