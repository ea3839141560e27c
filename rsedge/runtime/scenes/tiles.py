"""The tile grid of a scene: pure arithmetic, no pixels and no files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from rsedge.errors import OptionError

Edge = Literal["shift", "mirror", "pad", "drop"]
EDGES: tuple[Edge, ...] = get_args(Edge)


@dataclass(frozen=True, slots=True)
class Tile:
    """A square ground window of a scene."""

    index: int  # position in row-major order
    row: int  # and col: position in the grid, from the upper left
    col: int
    row_off: int  # and col_off: first source pixel
    col_off: int
    # and height: source pixels inside the scene; less than the tile size where ``pad`` and ``mirror`` let it hang over,
    # or the scene is smaller
    width: int
    height: int


_LARGEST = 16384  # 0.8 GB of pixels: a whole Sentinel-2 tile is 10980


@dataclass(frozen=True, slots=True)
class TileGrid:
    """Tiles of a scene in row-major order.


    Raises:
        OptionError: A value is out of range, or ``drop`` leaves no tile.
    """

    width: int  # and height: the scene in pixels
    height: int
    tile_size: int = 224  # side of a tile in source pixels
    overlap: int = 0  # pixels that neighbouring tiles share
    # what happens where the scene does not end with a tile: ``shift`` moves the last tile inward until it is whole,
    # ``mirror`` fills it up with the scene mirrored, ``pad`` with black, ``drop`` keeps whole tiles only; ``shift``
    # mirrors a scene smaller than a tile
    edge: Edge = "shift"

    def __post_init__(self) -> None:
        if self.width < 1 or self.height < 1:
            raise OptionError(f"a scene of {self.width} × {self.height} pixels has no tiles: both must be at least 1")
        if not 1 <= self.tile_size <= _LARGEST:
            raise OptionError(f"tile size is {self.tile_size} pixels, expected 1 to {_LARGEST}: 224 is the default")
        if not 0 <= self.overlap < self.tile_size:
            raise OptionError(
                f"overlap is {self.overlap}, expected 0 to {self.tile_size - 1} (less than the tile size "
                f"{self.tile_size}): choose a smaller overlap or larger tiles"
            )
        if self.edge not in EDGES:
            raise OptionError(f"edge is {self.edge!r}, expected one of {', '.join(EDGES)}")
        if self.edge == "drop" and min(self.width, self.height) < self.tile_size:
            raise OptionError(
                f"no whole tile of {self.tile_size} pixels fits a scene of {self.width} × {self.height}: "
                "choose edge shift, or smaller tiles"
            )

    @property
    def stride(self) -> int:
        """Source pixels from one tile to the next."""
        return self.tile_size - self.overlap

    @property
    def rows(self) -> int:
        """Number of tile rows."""
        return self._count(self.height)

    @property
    def cols(self) -> int:
        """Number of tile columns."""
        return self._count(self.width)

    def __len__(self) -> int:
        return self.rows * self.cols

    def __iter__(self) -> Iterator[Tile]:
        return self.slice(0, len(self))

    def slice(self, start: int, stop: int) -> Iterator[Tile]:
        """The tiles from index ``start`` up to ``stop``, which is not included."""
        return (self.tile(index) for index in range(start, min(stop, len(self))))

    def tile(self, index: int) -> Tile:
        """The tile at ``index``.

        Raises:
            IndexError: There is no such tile.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"tile {index} of {len(self)}")
        row, col = divmod(index, self.cols)
        row_off, height = self._span(row, self.rows, self.height)
        col_off, width = self._span(col, self.cols, self.width)
        return Tile(index, row, col, row_off, col_off, width, height)

    def _count(self, size: int) -> int:
        """Tiles along an axis of ``size`` pixels."""
        beyond_first = max(0, size - self.tile_size)
        return 1 + (beyond_first // self.stride if self.edge == "drop" else -(-beyond_first // self.stride))

    def _span(self, position: int, count: int, size: int) -> tuple[int, int]:
        """First pixel and covered pixels of the tile at ``position`` along an axis of ``size`` pixels."""
        offset = position * self.stride
        if self.edge == "shift" and position == count - 1:
            offset = max(0, size - self.tile_size)
        return offset, min(self.tile_size, size - offset)
