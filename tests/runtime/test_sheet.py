from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from rsedge.errors import OptionError, OutputError
from rsedge.runtime.records import TileRecord
from rsedge.runtime.sheet import wrap, write_sheet


def record(col: int, caption: str | None, message: str | None = None) -> TileRecord:
    status = "ok" if caption else "nodata"
    return TileRecord("s", 0, col, 0, 0, 8, 8, None, caption, None, status, 0.0, None, None, "m@0", message)


def tile(value: int) -> np.ndarray:
    return np.full((8, 8, 3), value, np.uint8)


def test_tiles_stand_in_their_cells_with_text_beneath(tmp_path):
    tiles = [(tile(200), record(0, "a forest")), (tile(60), record(1, "a lake")), (tile(90), record(2, "fields"))]
    path = write_sheet(tmp_path / "sheet.png", tiles, columns=2, side=100)
    image = np.asarray(Image.open(path))
    assert image.shape[1] == 2 * 108 + 8
    first, second = image[8:108, 8:108], image[8:108, 116:216]
    assert (first == 200).all()
    assert (second == 60).all()
    below = image[108:150, 8:108]
    assert (below < 100).any(), "a caption is dark on white"
    height = (image.shape[0] - 8) // 2
    assert (image[8 + height : 108 + height, 8:108] == 90).all()
    assert (image[8 + height : 108 + height, 116:216] == 255).all(), "no fourth tile"


def test_a_tile_without_caption_says_why_and_one_without_pixels_is_grey(tmp_path):
    with_reason = write_sheet(tmp_path / "a.png", [(None, record(0, None, "no data in 80 %"))], columns=1)
    without = write_sheet(tmp_path / "b.png", [(None, record(0, None))], columns=1)
    a, b = np.asarray(Image.open(with_reason)), np.asarray(Image.open(without))
    assert len(np.unique(a[8:208, 8:208])) == 1
    assert a[0, 0, 0] != a[100, 100, 0]
    assert not np.array_equal(a, b), "the reason is there to read"


def test_long_captions_are_wrapped_and_cut_with_a_sign():
    font = ImageFont.load_default(13)
    text = "crop fields with patches of forest, a residential area and a winding river"
    lines = wrap(text, font, 120, lines=9)
    assert " ".join(lines) == text
    assert all(font.getlength(line) <= 120 for line in lines)
    cut = wrap(text, font, 120, lines=2)
    assert len(cut) == 2
    assert cut[-1].endswith("…")
    assert all(font.getlength(line) <= 120 for line in cut)
    assert wrap("x" * 200, font, 120)[0].endswith("…")
    assert wrap("", font, 120) == [""]


def test_what_cannot_be_is_refused(tmp_path):
    one = [(tile(9), record(0, "a"))]
    with pytest.raises(OptionError, match="no tiles"):
        write_sheet(tmp_path / "x.png", [], columns=1)
    with pytest.raises(OptionError, match="columns is 0"):
        write_sheet(tmp_path / "x.png", one, columns=0)
    with pytest.raises(OutputError, match=r"absent.*x\.png"):
        write_sheet(tmp_path / "absent" / "x.png", one, columns=1)
