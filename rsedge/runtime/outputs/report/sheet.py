"""Contact sheets: tiles as one picture, each with its caption beneath, and the sheet of a run's scenes."""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rasterio.errors import RasterioError

from rsedge.errors import OptionError, SceneError
from rsedge.pixels import resize
from rsedge.runtime.outputs.files import Target, file_target, whole_file
from rsedge.runtime.scenes.products.sentinel2 import printable
from rsedge.texts import plain

if TYPE_CHECKING:
    from rsedge.pixels import UInt8
    from rsedge.runtime.outputs.records import TileRecord, TileResult
    from rsedge.runtime.scenes.scene import Scene

_PAPER, _INK, _FAINT, _EMPTY = (255, 255, 255), (24, 24, 24), (120, 120, 120), (228, 228, 228)
_RIM = (170, 170, 170)
_GAP = 8
_LINES = 4  # of a caption, at most
_TEXT = 13  # height of letters in pixels
_LEADING = _TEXT + 4
_WIDEST = 24  # cells in a row, unless asked for

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def write_sheet(
    path: str | Path,
    tiles: Sequence[tuple[UInt8 | None, TileRecord]],
    *,
    columns: int,
    side: int = 200,
    title: str | None = None,
) -> Path:
    """Write the picture of :func:`draw_sheet` as PNG, replaced if it is there; return ``path``.

    Raises:
        OptionError: There are no tiles, or ``columns`` or ``side`` cannot be.
        OutputError: The file cannot be written.
    """
    sheet = draw_sheet(tiles, columns=columns, side=side, title=title)
    with whole_file(Path(path)) as draft:
        sheet.save(draft, format="PNG", optimize=True)
    return Path(path)


def draw_sheet(
    tiles: Sequence[tuple[UInt8 | None, TileRecord]],
    *,
    columns: int,
    side: int = 200,
    title: str | None = None,
    name_scenes: bool = False,
) -> Image.Image:
    """A picture with one cell per tile, in the order given, row by row.

    Args:
        tiles: Pixels, uint8 [H, W, 3] or None where there are none, and the record of each tile.
        columns, side: Cells in a row, and pixels of a tile in the picture.
        title: Lines above the cells.
        name_scenes: Whether each cell names its scene.

    Raises:
        OptionError: There are no tiles, or ``columns`` or ``side`` cannot be.
    """
    if not tiles:
        raise OptionError("there are no tiles to show")
    if columns < 1 or side < 32:
        raise OptionError(f"columns is {columns} and side {side}: give at least 1 and 32")
    font = ImageFont.load_default(_TEXT)
    rows, width = -(-len(tiles) // columns), columns * (side + _GAP) + _GAP
    # Each row is as high as its longest caption.
    texts = [_lines_of(record, font, side, name_scenes=name_scenes) for _, record in tiles]
    heights = [
        side + max(map(len, texts[row * columns : (row + 1) * columns])) * _LEADING + _GAP for row in range(rows)
    ]
    heading = [line for text in (title or "").splitlines() for line in wrap(text, font, width - 2 * _GAP)]
    first = _GAP + (len(heading) * _LEADING + _GAP if heading else 0)
    sheet = Image.new("RGB", (width, first + sum(heights)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(heading):
        draw.text((_GAP, _GAP + number * _LEADING), line, fill=_INK, font=font)
    for index, (pixels, _) in enumerate(tiles):
        left, top = _GAP + index % columns * (side + _GAP), first + sum(heights[: index // columns])
        if pixels is None:
            draw.rectangle((left, top, left + side - 1, top + side - 1), fill=_EMPTY)
        else:
            sheet.paste(Image.fromarray(resize(pixels, side)), (left, top))
            draw.rectangle((left, top, left + side - 1, top + side - 1), outline=_RIM)  # white tiles end on white paper
        for number, (line, ink) in enumerate(texts[index]):
            draw.text((left, top + side + 2 + number * _LEADING), line, fill=ink, font=font)
    return sheet


def _lines_of(
    record: TileRecord, font: Font, side: int, *, name_scenes: bool
) -> list[tuple[str, tuple[int, int, int]]]:
    """The lines beneath a tile with their colours: its place and what it shows, in one line if they fit."""
    place = f"{record.row}:{record.col}" + (f" {record.scene}" if name_scenes else "")
    missing = f"{record.status}: {record.message}" if record.message else record.status
    text, ink = (missing, _FAINT) if record.caption is None else (record.caption, _INK)
    return [(wrap(place, font, side, 1)[0], _FAINT), *((line, ink) for line in wrap(text, font, side))]


def wrap(text: str, font: Font, width: int, lines: int = _LINES) -> list[str]:
    """``text`` in lines no wider than ``width`` pixels; what does not fit into ``lines`` ends in "…"."""
    wrapped = [""]
    for word in plain(text).split():
        longer = f"{wrapped[-1]} {word}".lstrip()
        if wrapped[-1] and font.getlength(longer) > width:
            if len(wrapped) > lines:
                break
            wrapped.append(word)
        else:
            wrapped[-1] = longer
    kept = wrapped[:lines]
    if len(wrapped) > lines:
        kept[-1] += " …"
    return [_shorten(line, font, width) for line in kept]


def _shorten(line: str, font: Font, width: int) -> str:
    """The line, or as much of it as fits and an ellipsis."""
    if font.getlength(line) <= width:
        return line
    line = line.removesuffix("…").rstrip()
    fitting = (
        bisect_right(range(len(line)), width, key=lambda end: math.ceil(font.getlength(f"{line[:end].rstrip()}…"))) - 1
    )
    return f"{line[: max(0, fitting)].rstrip()}…"


class SceneOrder:
    """Tells scenes apart though several may share a name, or a file: results come scene by scene, tile by tile."""

    def __init__(self, scenes: Sequence[Scene]) -> None:
        self._keys = [(scene.name, printable(scene.source)) for scene in scenes]
        self._number, self._last = 0, (-1, -1)

    def number(self, result: TileResult) -> int:
        """The index of the scene of the next result.

        Raises:
            ValueError: It belongs to none of the scenes that are left.
        """
        place = (result.record.row, result.record.col)
        key = (result.record.scene, result.path)
        first = self._number if place > self._last else self._number + 1
        for number in range(first, len(self._keys)):
            if self._keys[number] == key:
                self._number, self._last = number, place
                return number
        raise ValueError(f"a result of {key} is of none of the scenes of the run, or out of order")


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
    return file_target(Path(path), make)


class _SheetWriter:
    """Gathers the records of a run; reads the pixels of those that are shown, and draws, in the end."""

    def __init__(self, stream: BinaryIO, scenes: Sequence[Scene], columns: int | None, most: int, side: int) -> None:
        self._stream, self._scenes = stream, scenes
        self._columns, self._most, self._side = columns, most, side
        self._order = SceneOrder(scenes)
        self._records: list[list[TileRecord]] = [[] for _ in scenes]

    def write(self, results: Iterable[TileResult]) -> None:
        for result in results:
            self._records[self._order.number(result)].append(result.record)

    def finish(self) -> None:
        # 1. Choose the tiles of each scene, and read their pixels.
        share = max(1, self._most // max(1, len(self._scenes)))
        shown = [_choose(records, share) for records in self._records]
        cells = [
            (pixels, record)
            for scene, chosen in zip(self._scenes, shown, strict=True)
            for pixels, record in zip(_read(scene, chosen.records, self._side), chosen.records, strict=True)
        ]
        # 2. Columns: those of the one scene, or a sheet about as wide as it is high; cells are higher than wide.
        several = len(self._scenes) > 1
        columns = max(1, math.ceil(math.sqrt(len(cells) * 1.5))) if several else shown[0].columns
        # 3. The title: a line for each scene, and the models.
        title = []
        for scene, records, chosen in zip(self._scenes, self._records, shown, strict=True):
            tiles = f"{len(records):,} tiles"
            if (step := chosen.step) > 1:
                ending = "th" if step % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(step % 10, "th")
                tiles = f"{len(chosen.records):,} of {tiles}, every {step}{ending} row and column"
            title.append(" · ".join([scene.name, *([scene.datetime] if scene.datetime else []), tiles]))
        title.append(" · ".join(dict.fromkeys(record.model for records in self._records for record in records)))
        sheet = draw_sheet(
            cells,
            columns=self._columns or min(columns, _WIDEST),
            side=self._side,
            title="\n".join(title),
            name_scenes=several,
        )
        sheet.save(self._stream, format="PNG", optimize=True)


@dataclass(frozen=True, slots=True)
class _Shown:
    """The tiles of one scene that are shown: those of every ``step``-th row and column."""

    records: list[TileRecord]
    step: int
    columns: int


def _choose(records: list[TileRecord], most: int) -> _Shown:
    """As many tiles as there may be, evenly over the scene."""
    rows, cols = (max((getattr(record, axis) for record in records), default=0) + 1 for axis in ("row", "col"))
    step = 1
    while -(-rows // step) * -(-cols // step) > most:
        step += 1
    # From the middle of each square of step × step tiles, so that the rim of the scene is not preferred.
    first = (step - 1) // 2

    def shown(position: int, count: int) -> bool:
        """Whether a row or column is that of its square; the last square may lack it and gives its last one."""
        return position % step == first or (position == count - 1 and position % step < first)

    chosen = [record for record in records if shown(record.row, rows) and shown(record.col, cols)]
    return _Shown(chosen, step, -(-cols // step))


def _read(scene: Scene, records: Sequence[TileRecord], side: int) -> list[UInt8 | None]:
    """Tiles as the model saw them, uint8 [side, side, 3], black beyond the rim; None where they cannot be read."""
    size = max((max(record.width, record.height) for record in records), default=0)  # of a whole tile
    squares: list[UInt8 | None] = [None] * len(records)
    with ExitStack() as stack:
        stack.enter_context(scene.environment())
        try:
            reader = stack.enter_context(scene.reader())
        except SceneError:
            return squares
        for number, record in enumerate(records):
            with suppress(RasterioError):
                rgb, _ = reader.read(record.row_off, record.col_off, record.height, record.width)
                square = np.zeros((size, size, 3), np.uint8)
                square[: record.height, : record.width] = rgb
                squares[number] = resize(square, side)
    return squares
