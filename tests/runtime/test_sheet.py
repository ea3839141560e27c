from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFont

from rsedge.errors import OptionError, OutputError
from rsedge.runtime.outputs.records import TileRecord, TileResult
from rsedge.runtime.outputs.report import sheet as scene_sheet
from rsedge.runtime.outputs.report.sheet import sheet_target, wrap, write_sheet
from rsedge.runtime.scenes.scene import Scene
from rsedge.runtime.scenes.tiles import TileGrid
from tests.scenes import pixels, truncate, write


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
    assert (first[1:-1, 1:-1] == 200).all()
    assert (second[1:-1, 1:-1] == 60).all()
    assert (first[0] == first[-1]).all(), "a rim"
    assert len(np.unique(first[0])) == 1
    below = image[108:150, 8:108]
    assert (below < 100).any(), "a caption is dark on white"
    height = (image.shape[0] - 8) // 2
    assert (image[9 + height : 107 + height, 9:107] == 90).all()
    assert (image[8 + height : 108 + height, 116:216] == 255).all(), "no fourth tile"


def test_rows_are_as_high_as_their_captions(tmp_path):
    long = "crop fields with patches of forest, a residential area and a winding river under haze"
    heights = []
    for captions in (["a lake"] * 2, [long, "a lake"], [long, long]):
        path = write_sheet(
            tmp_path / "s.png", [(tile(9), record(k, c)) for k, c in enumerate(captions)], columns=1, side=100
        )
        heights.append(Image.open(path).height)
    assert heights[0] < heights[1] < heights[2]
    assert heights[2] - heights[1] == heights[1] - heights[0]


def test_a_tile_without_caption_says_why_and_one_without_pixels_is_grey(tmp_path):
    with_reason = write_sheet(tmp_path / "a.png", [(None, record(0, None, "no data in 80 %"))], columns=1)
    without = write_sheet(tmp_path / "b.png", [(None, record(0, None))], columns=1)
    a, b = np.asarray(Image.open(with_reason)), np.asarray(Image.open(without))
    assert len(np.unique(a[9:207, 9:207])) == 1
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


def test_text_that_no_font_draws_and_endless_words_do_no_harm():
    font = ImageFont.load_default(13)
    assert wrap("a\x00b \x1b\ud800 c", font, 200) == ["a\ufffdb \ufffd\ufffd c"]
    assert wrap("w" * 20_000, font, 120) == [wrap("w" * 200, font, 120)[0]]
    assert len(wrap("word " * 20_000, font, 120)) == 4


def test_a_title_stands_above_the_cells(tmp_path):
    one = [(tile(200), record(0, "a"))]
    plain = np.asarray(Image.open(write_sheet(tmp_path / "a.png", one, columns=1)))
    titled = np.asarray(Image.open(write_sheet(tmp_path / "b.png", one, columns=1, title="one\ntwo")))
    above = len(titled) - len(plain)
    assert np.array_equal(titled[above:][8:], plain[8:])
    assert (titled[:above] < 100).any()


# ---- of a run


def sheet(path, scenes, records, **options):
    """The sheet of records, a list per scene, and the texts drawn on it."""
    with sheet_target(path, scenes, **options).open() as writer:
        for scene, mine in zip(scenes, records, strict=True):
            writer.write([TileResult(each, scene.source) for each in mine])
    return np.asarray(Image.open(path))


@pytest.fixture
def drawn(monkeypatch):
    """What is asked to be drawn: the tiles and the options."""
    seen = []

    def draw_sheet(tiles, **options):
        seen.append((tiles, options))
        return real(tiles, **options)

    real = scene_sheet.draw_sheet
    monkeypatch.setattr(scene_sheet, "draw_sheet", draw_sheet)
    return seen


def grid(scene: Scene, side: int) -> list[TileRecord]:
    return [
        replace(
            record(tile.col, f"{tile.row}-{tile.col}"),
            scene=scene.name,
            row=tile.row,
            row_off=tile.row_off,
            col_off=tile.col_off,
            width=tile.width,
            height=tile.height,
        )
        for tile in TileGrid(scene.width, scene.height, side)
    ]


def test_the_tiles_of_a_scene_stand_as_they_lie_with_its_pixels(tmp_path, drawn):
    data = pixels(3, 100, 150)
    scene = Scene.open(write(tmp_path / "a.tif", data))
    sheet(tmp_path / "s.png", [scene], [grid(scene, 40)], side=40)
    [(cells, options)] = drawn
    assert (len(cells), options["columns"], options["name_scenes"]) == (12, 4, False)
    assert options["title"] == "a · 12 tiles\nm@0"
    for image, of in cells:
        stored = np.moveaxis(data, 0, -1)[of.row_off : of.row_off + 40, of.col_off : of.col_off + 40]
        assert np.array_equal(image[: of.height, : of.width], stored)
        assert not image[of.height :].any()
        assert not image[:, of.width :].any()


def test_of_many_tiles_every_nth_row_and_column_is_shown_and_the_sheet_says_so(tmp_path, drawn):
    scene = Scene.open(write(tmp_path / "a.tif", pixels(3, 104, 96)))
    sheet(tmp_path / "s.png", [scene], [grid(scene, 8)], most=20, side=32)
    [(cells, options)] = drawn
    assert options["title"].startswith("a · 20 of 156 tiles, every 3rd row and column")
    assert options["columns"] == 4
    assert sorted({of.row for _, of in cells}) == [1, 4, 7, 10, 12]
    assert sorted({of.col for _, of in cells}) == [1, 4, 7, 10]


@pytest.mark.parametrize(("height", "width"), [(8, 800), (800, 8), (312, 312), (200, 344)])
@pytest.mark.parametrize("most", [1, 7, 50, 200])
def test_there_are_never_more_tiles_than_fit_and_rows_stay_whole(height, width, most):
    records = [replace(record(tile.col, "x"), row=tile.row, col=tile.col) for tile in TileGrid(width, height, 8)]
    chosen = scene_sheet._choose(records, most)
    assert 1 <= len(chosen.records) <= most
    assert len(chosen.records) % chosen.columns == 0
    assert len({of.col for of in chosen.records}) == chosen.columns


def test_several_scenes_share_the_sheet(tmp_path, drawn):
    scenes = [Scene.open(write(tmp_path / f"{name}.tif", pixels(3, 64, 64))) for name in "ab"]
    sheet(tmp_path / "s.png", scenes, [grid(scene, 16) for scene in scenes], most=8, columns=3)
    [(cells, options)] = drawn
    assert [of.scene for _, of in cells] == ["a"] * 4 + ["b"] * 4
    assert (options["columns"], options["name_scenes"]) == (3, True)
    assert options["title"].count("4 of 16 tiles, every 2nd row and column") == 2


def test_tiles_that_cannot_be_read_are_left_grey(tmp_path, drawn):
    path = write(tmp_path / "a.tif", pixels(3, 512, 64), tiled=True, blockxsize=64, blockysize=64, compress="deflate")
    scene = Scene.open(truncate(path, 0.5))
    sheet(tmp_path / "s.png", [scene], [grid(scene, 64)])
    assert [image is None for image, _ in drawn[0][0]][::7] == [False, True]
    path.unlink()
    sheet(tmp_path / "s.png", [scene], [grid(scene, 64)])
    assert all(image is None for image, _ in drawn[1][0])


def test_the_same_run_gives_the_same_bytes(tmp_path):
    scene = Scene.open(write(tmp_path / "a.tif", pixels(3, 64, 64)))
    for name in ("a.png", "b.png"):
        sheet(tmp_path / name, [scene], [grid(scene, 32)])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_what_a_sheet_of_a_run_cannot_be_is_refused_at_once(tmp_path):
    with pytest.raises(OptionError) as error:
        sheet_target(tmp_path / "s.jpg", [], columns=0, most=0, side=8)
    for part in (r"s.jpg", "end its name in .png", "columns is 0", "most is 0", "side is 8"):
        assert part in str(error.value)
