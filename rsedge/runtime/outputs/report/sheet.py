"""A contact sheet: the tiles of a scene as one picture, each with its caption beneath. Pillow only."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from rsedge.errors import OptionError, OutputError
from rsedge.pixels import resize
from rsedge.texts import plain

if TYPE_CHECKING:
    from rsedge.pixels import UInt8
    from rsedge.runtime.outputs.records import TileRecord

_PAPER, _INK, _FAINT, _EMPTY = (255, 255, 255), (24, 24, 24), (120, 120, 120), (228, 228, 228)
_GAP = 8
_LINES = 4  # of a caption, at most
_TEXT = 13  # height of letters in pixels
_LEADING = _TEXT + 4

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def write_sheet(
    path: str | Path,
    tiles: Sequence[tuple[UInt8 | None, TileRecord]],
    *,
    columns: int,
    side: int = 200,
    title: str | None = None,
) -> Path:
    """Write a PNG with one cell per tile, see :func:`draw_sheet`.

    Args:
        path: The PNG, replaced if it is there.
        tiles, columns, side, title: As there.

    Returns:
        ``path``.

    Raises:
        OptionError: There are no tiles, or ``columns`` or ``side`` cannot be.
        OutputError: The file cannot be written.
    """
    sheet = draw_sheet(tiles, columns=columns, side=side, title=title)
    try:
        sheet.save(path, format="PNG", optimize=True)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
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
        columns: Cells in a row.
        side: Width and height of a tile in the picture, in pixels.
        title: Lines above the cells.
        name_scenes: Whether each cell says which scene it is of.

    Raises:
        OptionError: There are no tiles, or ``columns`` or ``side`` cannot be.
    """
    if not tiles:
        raise OptionError("there are no tiles to show")
    if columns < 1 or side < 32:
        raise OptionError(f"columns is {columns} and side {side}: give at least 1 and 32")
    font = ImageFont.load_default(_TEXT)
    cell = (side + _GAP, side + (_LINES + 1) * _LEADING + _GAP)
    rows, width = -(-len(tiles) // columns), columns * cell[0] + _GAP
    heading = [line for text in (title or "").splitlines() for line in wrap(text, font, width - 2 * _GAP)]
    first = _GAP + (len(heading) * _LEADING + _GAP if heading else 0)
    sheet = Image.new("RGB", (width, first + rows * cell[1]), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(heading):
        draw.text((_GAP, _GAP + number * _LEADING), line, fill=_INK, font=font)
    for index, (pixels, record) in enumerate(tiles):
        left, top = _GAP + index % columns * cell[0], first + index // columns * cell[1]
        if pixels is None:
            draw.rectangle((left, top, left + side - 1, top + side - 1), fill=_EMPTY)
        else:
            sheet.paste(Image.fromarray(resize(pixels, side)), (left, top))
        place = f"row {record.row}, col {record.col}" + (f", {record.scene}" if name_scenes else "")
        draw.text((left, top + side + 2), wrap(place, font, side, 1)[0], fill=_FAINT, font=font)
        text, ink = (_without(record), _FAINT) if record.caption is None else (record.caption, _INK)
        for number, line in enumerate(wrap(text, font, side), 1):
            draw.text((left, top + side + 2 + number * _LEADING), line, fill=ink, font=font)
    return sheet


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
    if font.getlength(line) <= width:
        return line
    line = line.removesuffix("…").rstrip()
    fitting = (
        bisect_right(range(len(line)), width, key=lambda end: math.ceil(font.getlength(f"{line[:end].rstrip()}…"))) - 1
    )
    return f"{line[: max(0, fitting)].rstrip()}…"


def _without(record: TileRecord) -> str:
    return f"{record.status}: {record.message}" if record.message else record.status
