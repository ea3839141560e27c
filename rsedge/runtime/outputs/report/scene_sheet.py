"""A contact sheet of a run: its tiles with their captions, the pixels read again from the scenes."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from rasterio.errors import RasterioError

from rsedge.errors import OptionError, SceneError
from rsedge.pixels import resize
from rsedge.runtime.outputs.files import open_file
from rsedge.runtime.outputs.report.scene_order import SceneOrder
from rsedge.runtime.outputs.report.sheet import draw_sheet
from rsedge.runtime.outputs.target import Target

if TYPE_CHECKING:
    from rsedge.pixels import UInt8
    from rsedge.runtime.outputs.records import TileRecord, TileResult
    from rsedge.runtime.scenes.scene import Scene, SceneReader

_WIDEST = 24  # cells in a row, unless asked for


def sheet_target(
    path: str | os.PathLike[str],
    scenes: Sequence[Scene],
    *,
    columns: int | None = None,
    most: int = 200,
    side: int = 200,
) -> Target:
    """An output of a run that is one PNG with a cell per tile.

    The tiles of a single scene stand as they lie there. Where there are more than ``most``, every second row and column
    is shown, or every third and so on, and the sheet says so.

    Args:
        path: Path that ends in ``.png``.
        scenes: The scenes of the run, in its order.
        columns: Cells in a row; default: as many as the scene has tiles side by side, or a nearly square sheet.
        most: Tiles on the sheet, at most; at least one of each scene is shown.
        side: Width and height of a tile on the sheet, in pixels.

    Raises:
        OptionError: The suffix is another one, or a number cannot be.
    """
    problems = []
    if Path(path).suffix.lower() != ".png":
        problems.append(f"the contact sheet {os.fspath(path)!r} is written as PNG: end its name in .png")
    if columns is not None and columns < 1:
        problems.append(f"columns is {columns}, expected at least 1")
    if most < 1:
        problems.append(f"most is {most}, expected at least 1 tile")
    if side < 32:
        problems.append(f"side is {side}, expected at least 32 pixels")
    if problems:
        raise OptionError("\n".join(problems))
    make = partial(_SheetWriter, scenes=tuple(scenes), columns=columns, most=most, side=side)
    return Target(Path(path), lambda: open_file(Path(path), make))


@dataclass(frozen=True, slots=True)
class _Shown:
    """The tiles of one scene that are shown: those of every ``step``-th row and column."""

    records: list[TileRecord]
    step: int
    columns: int


class _SheetWriter:
    """Gathers the records of a run; reads the pixels of those that are shown, and draws, in the end."""

    def __init__(self, stream: BinaryIO, scenes: Sequence[Scene], columns: int | None, most: int, side: int) -> None:
        self._stream, self._scenes = stream, scenes
        self._columns, self._most, self._side = columns, most, side
        self._order = SceneOrder(scenes)
        self._records: list[list[TileRecord]] = [[] for _ in scenes]

    def write(self, results: Sequence[TileResult]) -> None:
        """Append the results of a segment."""
        for result in results:
            self._records[self._order.number(result)].append(result.record)

    def finish(self) -> None:
        """Draw the sheet."""
        share = max(1, self._most // max(1, len(self._scenes)))
        shown = [_choose(records, share) for records in self._records]
        cells = [
            (pixels, record)
            for scene, chosen in zip(self._scenes, shown, strict=True)
            for pixels, record in zip(_read(scene, chosen.records, self._side), chosen.records, strict=True)
        ]
        several = len(self._scenes) > 1
        columns = self._columns or (_square(len(cells)) if several else min(shown[0].columns, _WIDEST))
        sheet = draw_sheet(
            cells, columns=columns, side=self._side, title="\n".join(self._title(shown)), name_scenes=several
        )
        sheet.save(self._stream, format="PNG", optimize=True)

    def _title(self, shown: Sequence[_Shown]) -> list[str]:
        lines = []
        for scene, records, chosen in zip(self._scenes, self._records, shown, strict=True):
            parts = [scene.name, *([scene.datetime] if scene.datetime else [])]
            if chosen.step > 1:
                parts.append(
                    f"{len(chosen.records):,} of {len(records):,} tiles, every {_ordinal(chosen.step)} row and column"
                )
            else:
                parts.append(f"{len(records):,} tiles")
            lines.append(" · ".join(parts))
        models = dict.fromkeys(record.model for records in self._records for record in records)
        return [*lines, " · ".join(models)]


def _choose(records: list[TileRecord], most: int) -> _Shown:
    """As many tiles as there may be, evenly over the scene."""
    rows, cols = (max((getattr(record, axis) for record in records), default=0) + 1 for axis in ("row", "col"))
    step = 1
    while -(-rows // step) * -(-cols // step) > most:
        step += 1
    # From the middle of each square of step × step tiles, so that the rim of the scene is not preferred.
    first = (step - 1) // 2
    chosen = [r for r in records if _at(r.row, rows, step, first) and _at(r.col, cols, step, first)]
    return _Shown(chosen, step, -(-cols // step))


def _at(position: int, count: int, step: int, first: int) -> bool:
    """Whether a row or column is that of its square, which the last square may not have: it gives its last one."""
    return position % step == first or (position == count - 1 and position % step < first)


def _read(scene: Scene, records: Sequence[TileRecord], side: int) -> list[UInt8 | None]:
    """Pixels of the tiles as squares, uint8 [side, side, 3]; None where they cannot be read."""
    with ExitStack() as stack:
        stack.enter_context(scene.environment())
        try:
            reader = stack.enter_context(scene.reader())
        except SceneError:
            return [None] * len(records)
        squares = [_square_pixels(reader, record, _tile_size(records)) for record in records]
        return [None if square is None else resize(square, side) for square in squares]


def _tile_size(records: Sequence[TileRecord]) -> int:
    """The side of a whole tile; those at the rim may cover less."""
    return max(max(record.width, record.height) for record in records)


def _square_pixels(reader: SceneReader, record: TileRecord, size: int) -> UInt8 | None:
    """A tile as the model saw it: black where it hangs over the rim of the scene."""
    try:
        rgb, _ = reader.read(record.row_off, record.col_off, record.height, record.width)
    except RasterioError:
        return None
    square = np.zeros((size, size, 3), np.uint8)
    square[: record.height, : record.width] = rgb
    return square


def _square(count: int) -> int:
    """Columns that make a sheet of ``count`` cells about as wide as it is high; cells are higher than wide."""
    return min(_WIDEST, max(1, math.ceil(math.sqrt(count * 1.5))))


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
