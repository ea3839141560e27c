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
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from rasterio.errors import RasterioError

from rsedge.errors import OptionError
from rsedge.pixels import UInt8, resize, stack_images
from rsedge.runtime.scenes.pieces import Lane, Pieces, cache_bytes, is_high

if TYPE_CHECKING:
    from rsedge.runtime.scenes.scene import Pixels, Scene, SceneReader
    from rsedge.runtime.scenes.tiles import Tile, TileGrid

# Formats that can only be decoded from the top: a second reader would decode everything a second time.
_SEQUENTIAL = frozenset({"PNG", "JPEG", "GIF", "BMP", "WEBP"})
# Where GDAL resamples, a pixel between two values may depend on the window that it is part of: the same ones always,
# tile row by tile row, so many lines each.
_WARPED_LINES = 64
# Pixels per read at most: a JP2 block of 1024 in one; two threads that read parts through VRTs decode each twice.
_PIXELS_AT_ONCE = 2**20


@dataclass(frozen=True, slots=True, eq=False)
class TilePixels:
    """The pixels of one tile.

    Attributes:
        tile: Which one.
        images: Per size asked for uint8 [size, size, 3], 0 where there is no data or the tile hangs over; empty if
            unreadable. Plane after plane in memory where they were not resized: see ``rsedge.images``.
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
    if any(image.shape[:2] != (size.size, size.size) for size in sizes):
        [image] = stack_images([image])  # Pillow takes five times as long over planes
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
    if scene.driver in _SEQUENTIAL or is_high(scene):
        readers = 1
    pieces = Pieces(scene, queue.window, readers, grid.stride)
    queue.start(pieces, ahead=max(queue_tiles // grid.cols, 1), cache_bytes=cache_bytes(scene, grid))
    try:
        yield from queue
    finally:
        queue.close()


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

    def __init__(
        self, scene: Scene, grid: TileGrid, start: int, stop: int, bring_to_size: Callable[[UInt8], tuple[UInt8, ...]]
    ) -> None:
        self._scene = scene
        self._grid = grid
        self._span = (start, stop)
        self._rows = range(start // grid.cols, -(-stop // grid.cols)) if start < stop else range(0)
        self._bring_to_size = bring_to_size
        self._memory = _Memory(grid.tile_size)
        self._changed = threading.Condition()
        self._in_work: dict[int, _Row] = {}
        self._done: dict[int, list[TilePixels]] = {}
        self._taken = self._rows.start
        self._stopped = False
        self._error: BaseException | None = None
        self._threads: list[threading.Thread] = []
        # Tile rows by their lines; both ascend.
        firsts = [grid.tile(number * grid.cols) for number in self._rows]
        self._tops = [tile.row_off for tile in firsts]
        self._bottoms = [tile.row_off + tile.height for tile in firsts]

    @property
    def window(self) -> tuple[int, int, int, int]:
        """What is read of the scene: first and last line (not included), first and last column."""
        if not self._rows:
            return 0, 0, 0, 0
        tiles = [tile for number in self._rows[:2] for tile in self._tiles(number)]
        left, right = min(tile.col_off for tile in tiles), max(tile.col_off + tile.width for tile in tiles)
        return self._tops[0], self._bottoms[-1], left, right

    def start(self, pieces: Pieces, *, ahead: int, cache_bytes: int) -> None:
        """Start the threads."""
        self._pieces = pieces
        self._ahead = ahead
        for number, lane in enumerate(pieces.lanes if self._rows else ()):
            arguments = (lane, (number + 0.5) / len(pieces.lanes), cache_bytes)
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
        """End the threads and wait for them; each finishes at most the piece it is in."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self, lane: Lane, place: float, cache_bytes: int) -> None:
        """Read piece after piece: the body of a thread. Of a row of pieces it prefers those near ``place``, 0 to 1."""
        try:
            with self._scene.environment(GDAL_CACHEMAX=cache_bytes), self._scene.reader() as reader:
                while (piece := self._enter(lane, place)) is not None:
                    window, rows = piece
                    counts = self._fill(rows, reader, *window)
                    for number in self._leave(rows, counts):
                        tiles = self._cut(rows[number], reader)
                        with self._changed:
                            self._done[number] = tiles
                            self._changed.notify_all()
        except BaseException as error:  # whatever it is, the consumer must hear of it
            with self._changed:
                self._error = self._error or error
                self._stopped = True
                self._changed.notify_all()

    def _enter(self, lane: Lane, place: float) -> tuple[tuple[int, int, int, int], dict[int, _Row]] | None:
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
                numbers = self._touched(edges[lane.at], edges[lane.at + 1])
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
            return (edges[lane.at], edges[lane.at + 1], left, right), {n: self._in_work[n] for n in numbers}

    def _touched(self, top: int, bottom: int) -> range:
        """Numbers of the tile rows that want any of the lines."""
        return self._rows[bisect_right(self._bottoms, top) : bisect_left(self._tops, bottom)]

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
        lines = _WARPED_LINES if self._scene.resampled else max(1, _PIXELS_AT_ONCE // (right - left))
        try:
            for first in range(top, bottom, lines):
                last = min(first + lines, bottom)
                pixels = reader.read_pixels(first, left, last - first, right - left)
                for number, row in rows.items():
                    if row.top < last and row.bottom > first:
                        _lay(pixels, row, counts[number], first, left)
        except RasterioError:
            for row in rows.values():
                row.failed = True
        return counts

    def _leave(self, rows: dict[int, _Row], counts: dict[int, npt.NDArray[np.int64]]) -> list[int]:
        """Numbers of the rows of which the caller read the last piece, and which so it has to finish."""
        finished = []
        with self._changed:
            for number, row in rows.items():
                row.counts += counts[number]
                row.parts_left -= 1
                if row.parts_left == 0:
                    finished.append(number)
                    del self._in_work[number]
        return finished

    def _cut(self, row: _Row, reader: SceneReader) -> list[TilePixels]:
        if row.failed:  # what of it can be read, tile by tile, so that the outcome does not depend on how it was shared
            return [self._read_alone(tile, reader) for tile in row.tiles]
        return [
            self._finish(tile, planes, counts)
            for tile, planes, counts in zip(row.tiles, row.planes, row.counts.T.tolist(), strict=True)
        ]

    def _read_alone(self, tile: Tile, reader: SceneReader) -> TilePixels:
        try:
            pixels = reader.read_pixels(tile.row_off, tile.col_off, tile.height, tile.width)
        except RasterioError as error:
            reason = " ".join(str(error.__cause__ or error).split())
            return TilePixels(tile, (), None, error=f"pixels cannot be read: {reason}")
        planes = np.zeros((3, self._grid.tile_size, self._grid.tile_size), np.uint8)
        planes[:, : tile.height, : tile.width] = pixels.planes
        return self._finish(tile, planes, _counts(pixels, slice(None), slice(None)))

    def _finish(self, tile: Tile, planes: UInt8, counts: Sequence[int]) -> TilePixels:
        """Bring a padded tile to the images' sizes; padding does not count as missing."""
        empty, fill, cloud = counts
        size = tile.width * tile.height
        cloudy = cloud / (size - empty) if self._scene.clouds is not None and empty < size else None
        return TilePixels(tile, self._bring_to_size(planes.transpose(1, 2, 0)), empty / size, fill / size, cloudy)


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
