"""A contact sheet: the tiles of a scene as one picture, each with its caption beneath. Pillow only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from rsedge.errors import OptionError, OutputError
from rsedge.pixels import resize

if TYPE_CHECKING:
    from rsedge.pixels import UInt8
    from rsedge.runtime.records import TileRecord

_PAPER, _INK, _FAINT, _EMPTY = (255, 255, 255), (24, 24, 24), (120, 120, 120), (228, 228, 228)
_GAP = 8
_LINES = 4  # of a caption, at most
_TEXT = 13  # height of letters in pixels

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def write_sheet(
    path: str | Path, tiles: Sequence[tuple[UInt8 | None, TileRecord]], *, columns: int, side: int = 200
) -> Path:
    """Write a PNG with one cell per tile, in the order given, row by row.

    Args:
        path: The PNG, replaced if it is there.
        tiles: Pixels, uint8 [H, W, 3] or None where there are none, and the record of each tile.
        columns: Cells in a row.
        side: Width and height of a tile in the picture, in pixels.

    Returns:
        ``path``.

    Raises:
        OptionError: There are no tiles, or ``columns`` or ``side`` cannot be.
        OutputError: The file cannot be written.
    """
    if not tiles:
        raise OptionError("there are no tiles to show")
    if columns < 1 or side < 32:
        raise OptionError(f"columns is {columns} and side {side}: give at least 1 and 32")
    font = ImageFont.load_default(_TEXT)
    leading = _TEXT + 4
    cell = (side + _GAP, side + (_LINES + 1) * leading + _GAP)
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * cell[0] + _GAP, rows * cell[1] + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, (pixels, record) in enumerate(tiles):
        left, top = _GAP + index % columns * cell[0], _GAP + index // columns * cell[1]
        if pixels is None:
            draw.rectangle((left, top, left + side - 1, top + side - 1), fill=_EMPTY)
        else:
            sheet.paste(Image.fromarray(resize(pixels, side)), (left, top))
        text, ink = (record.caption, _INK) if record.caption else (_without(record), _FAINT)
        draw.text((left, top + side + 2), f"row {record.row}, col {record.col}", fill=_FAINT, font=font)
        for number, line in enumerate(wrap(text, font, side), 1):
            draw.text((left, top + side + 2 + number * leading), line, fill=ink, font=font)
    try:
        sheet.save(path, format="PNG", optimize=True)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    return Path(path)


def wrap(text: str, font: Font, width: int, lines: int = _LINES) -> list[str]:
    """``text`` in lines no wider than ``width`` pixels; what does not fit into ``lines`` ends in "…"."""
    wrapped = [""]
    for word in text.split():
        longer = f"{wrapped[-1]} {word}".lstrip()
        if wrapped[-1] and font.getlength(longer) > width:
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
    while line and font.getlength(f"{line}…") > width:
        line = line[:-1].rstrip()
    return f"{line}…"


def _without(record: TileRecord) -> str:
    return f"{record.status}: {record.message}" if record.message else record.status
