"""Heat maps: against a mean over windows worked out pixel by pixel, and what has no data."""

from __future__ import annotations

import math
import re
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import rasterio
from PIL import Image

from rsedge.errors import BundleError, OptionError
from rsedge.runtime.locate import blend, locate, magma, quicklook, write_overlay
from rsedge.runtime.outputs.rasters import check_outputs
from rsedge.runtime.scenes.scene import Scene
from rsedge.runtime.scenes.tiles import TileGrid
from tests import scenes
from tests.colours import ColourEmbedder, embed_text, unit


def field(height: int, width: int, *squares: tuple[int, int, int, int]) -> np.ndarray:
    """uint8 [3, H, W] of dark noise with red rectangles (top, left, bottom, right)."""
    data = np.random.default_rng(0).integers(60, 70, (3, height, width)).astype(np.uint8)
    for top, left, bottom, right in squares:
        data[:, top:bottom, left:right] = np.array([220, 10, 10])[:, None, None]
    return data


def write(tmp_path: Path, data: np.ndarray, **options) -> Scene:
    return Scene.open(scenes.write(tmp_path / "scene.tif", data, photometric="RGB", **options))


def worked_out(data: np.ndarray, texts, contrasts, window: int, stride: int, seen=lambda part: True) -> np.ndarray:
    """Sum and number of the windows over each pixel, then the ratio of both over each cell. float [T, rows, cols]."""
    _, height, width = data.shape
    sums, counts = np.zeros((len(texts), height, width)), np.zeros((height, width))
    for tile in TileGrid(width, height, window, window - stride, "shift"):
        place = slice(tile.row_off, tile.row_off + tile.height), slice(tile.col_off, tile.col_off + tile.width)
        part = data[:, place[0], place[1]]
        if not seen(part):
            continue
        beyond = (0, 0), (0, window - tile.height), (0, window - tile.width)
        padded = np.pad(part, beyond, "symmetric").astype(float)  # a scene smaller than a window is mirrored
        vector = unit(padded.reshape(3, -1).mean(axis=1)[None] + 1e-3)[0].astype(float)
        for number, text in enumerate(texts):
            value = float(vector @ embed_text(text))
            if contrasts:
                others = [math.exp(10 * float(vector @ embed_text(other))) for other in contrasts]
                value = math.exp(10 * value) / (math.exp(10 * value) + sum(others))
            sums[number][place] += value
        counts[place] += 1
    rows, cols = range(0, height, stride), range(0, width, stride)
    heat = np.full((len(texts), len(rows), len(cols)), np.nan)
    for r, top in enumerate(rows):
        for c, left in enumerate(cols):
            cell = slice(top, top + stride), slice(left, left + stride)
            if counts[cell].any():
                heat[:, r, c] = sums[:, cell[0], cell[1]].sum(axis=(1, 2)) / counts[cell].sum()
    return heat


@pytest.mark.parametrize("contrasts", [(), ("green", "grey")])
@pytest.mark.parametrize(
    ("size", "window", "stride"), [((96, 128), 32, 8), ((75, 101), 32, 12), ((20, 50), 32, 32), ((33, 40), 24, 7)]
)
def test_the_mean_over_all_windows_that_cover_a_cell(tmp_path, size, window, stride, contrasts):
    data = field(*size, (8, 16, 17, 35))
    scene, texts = write(tmp_path, data), ("red", "grey blue")
    embedder = ColourEmbedder(window)  # no resizing, so that means are those of the source
    found = locate(embedder, scene, texts, contrasts=contrasts, window=window, stride=stride)
    assert found.heat.dtype == np.float32
    np.testing.assert_allclose(found.heat, worked_out(data, texts, contrasts, window, stride), rtol=1e-5)
    assert found.windows == found.seen == embedder.seen
    assert found.quantity == ("probability" if contrasts else "cosine similarity")


def test_a_red_square_lights_up_where_it_is(tmp_path):
    scene = write(tmp_path, field(300, 400, (160, 240, 200, 280)))
    found = locate(ColourEmbedder(), scene, ["red"], contrasts=["grey"], window=48, stride=12)
    (best,) = found.summary()["texts"]
    assert best["row"] == pytest.approx(180, abs=8)
    assert best["col"] == pytest.approx(260, abs=8)
    found.write(tmp_path / "heat.tif")
    with rasterio.open(tmp_path / "heat.tif") as raster, rasterio.open(scene.path) as source:
        x, y = raster.xy(*np.unravel_index(np.argmax(raster.read(1)), raster.shape))
        row, col = source.index(x, y)
        assert (160 <= row < 200, 240 <= col < 280) == (True, True)
        assert raster.read(1).max() == pytest.approx(best["value"], abs=1e-4)
        assert raster.crs == source.crs
        assert raster.transform[:6] == (120, 0, 600000, 0, -120, 5100000)
        assert (raster.dtypes, math.isnan(raster.nodata), raster.shape) == (("float32",), True, (25, 34))
        tags = raster.tags()
        assert (tags["quantity"], tags["contrasts"], tags["window"]) == ("probability", "grey", "48")


def test_a_band_for_each_text(tmp_path):
    scene = write(tmp_path, field(64, 64))
    locate(ColourEmbedder(), scene, ["red", "blue, and grün"], window=32, stride=16).write(tmp_path / "heat.tif")
    with rasterio.open(tmp_path / "heat.tif") as raster:
        assert raster.descriptions == ("red", "blue, and grün")
        assert raster.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"


def test_where_there_is_no_data_there_is_no_value(tmp_path):
    data = field(96, 96, (0, 60, 20, 80))
    data[:, 30:75, :50] = 0
    scene = write(tmp_path, data, nodata=0)
    embedder = ColourEmbedder(24)
    found = locate(embedder, scene, ["red"], window=24, stride=8, max_nodata=0.4)
    expected = worked_out(data, ["red"], (), 24, 8, lambda part: (part == 0).all(axis=0).mean() <= 0.4)
    blank = np.array([[(data[:, r : r + 8, c : c + 8] == 0).all() for c in range(0, 96, 8)] for r in range(0, 96, 8)])
    assert blank.sum() > 20
    assert (blank & ~np.isnan(expected[0])).any(), "windows beyond the edge reach into cells without data"
    expected[0][blank] = np.nan
    np.testing.assert_allclose(found.heat, expected, rtol=1e-5)
    assert embedder.seen == found.seen < found.windows


def test_a_scene_without_any_data(tmp_path):
    scene = write(tmp_path, np.zeros((3, 40, 40), np.uint8), nodata=0)
    found = locate(ColourEmbedder(), scene, ["red"], window=16, stride=8)
    assert np.isnan(found.heat).all()
    assert found.summary()["texts"] == [{"text": "red", "value": None, "least": None, "row": None, "col": None}]
    found.write(tmp_path / "heat.tif")
    write_overlay(tmp_path / "heat.png", found)


def test_windows_that_cannot_be_read_are_counted_and_left_out(tmp_path):
    layout = {"tiled": True, "blockxsize": 32, "blockysize": 32, "interleave": "pixel"}
    path = scenes.write(tmp_path / "cut.tif", field(256, 64), photometric="RGB", **layout)
    scene = Scene.open(scenes.truncate(path, 0.6))
    found = locate(ColourEmbedder(), scene, ["red"], window=32, stride=16)
    assert found.read_errors > 0
    assert found.seen > 0
    assert found.seen + found.read_errors == found.windows
    assert np.isfinite(found.heat[0, 0]).all()
    assert np.isnan(found.heat[0, -1]).all()


def test_a_scene_without_a_place_has_a_map_in_pixels(tmp_path):
    scene = write(tmp_path, field(64, 64), crs=None, transform=None)
    locate(ColourEmbedder(), scene, ["red"], window=32, stride=16).write(tmp_path / "heat.tif")
    with rasterio.open(tmp_path / "heat.tif") as raster:
        assert raster.crs is None
        assert raster.transform[:6] == (16, 0, 0, 0, 16, 0)


def test_progress_goes_to_the_end(tmp_path):
    steps = []
    scene = write(tmp_path, field(96, 128))
    found = locate(ColourEmbedder(), scene, ["red"], window=32, stride=8, progress=steps.append)
    assert [step.tiles_done for step in steps] == sorted(step.tiles_done for step in steps)
    assert (steps[0].tiles_done, steps[-1].tiles_done, steps[-1].tiles_total) == (0, found.windows, found.windows)


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "there is no text"),
        (["red", " "], {}, "a text is empty"),
        ("water", {}, "texts is the string 'water': pass a list"),
        (["red"], {"contrasts": "water"}, "contrasts is the string 'water': pass a list"),
        (["red", "red"], {}, "'red' is given twice"),
        (["red"], {"contrasts": ["red"]}, "'red' is given twice"),
        (["red"], {"window": 32, "stride": 33}, "stride is 33, expected 1 to 32 (the window)"),
        (["red"], {"stride": 0, "max_nodata": 2.0}, "stride is 0, expected 1 to 224 (the window)"),
        (["red"], {"stride": 0, "max_nodata": 2.0}, "max_nodata is 2.0"),
        (["red"], {"window": 0}, "window is 0"),
        (["red"], {"readers": 0}, "readers is 0"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, texts, options, message):
    embedder = ColourEmbedder()
    with pytest.raises(OptionError, match=re.escape(message)):
        locate(embedder, write(tmp_path, field(64, 64)), texts, **options)
    assert embedder.seen == 0


def test_contrasts_need_a_scale_and_similarities_do_not(tmp_path):
    scene, embedder = write(tmp_path, field(32, 32)), ColourEmbedder(logit_scale=None)
    assert np.isfinite(locate(embedder, scene, ["red"], window=16, stride=16).heat).all()
    with pytest.raises(BundleError, match="no logit scale"):
        locate(embedder, scene, ["red"], contrasts=["grey"], window=16, stride=16)


def test_outputs_are_checked_together(tmp_path):
    for name in ("a.tif", "b.png"):
        (tmp_path / name).touch()
    outputs = {tmp_path / "a.tif": (".tif",), tmp_path / "b.png": (".png",)}
    with pytest.raises(Exception, match=r"a\.tif and .*b\.png exist already: pass --overwrite"):
        check_outputs(outputs, overwrite=False)
    check_outputs(outputs, overwrite=True)
    with pytest.raises(OptionError, match=r"end its name in \.png"):
        check_outputs({tmp_path / "c.jpg": (".png",)}, overwrite=True)


def test_colours_are_those_of_matplotlib():
    values = np.linspace(0, 1, 256, dtype=np.float32)
    expected = np.asarray(mpl.colormaps["magma"](values))[:, :3] * 255
    assert np.abs(magma(values) - expected).max() < 3
    assert magma(np.array([np.nan], np.float32)).tolist() == [[0, 0, 0]]


def test_a_quicklook_is_the_scene_made_smaller(tmp_path):
    data = field(300, 500, (100, 200, 160, 260))
    step, picture = quicklook(write(tmp_path, data), 128)
    assert (step, picture.shape) == (4, (75, 125, 3))
    means = data.reshape(3, 75, 4, 125, 4).mean(axis=(2, 4)).transpose(1, 2, 0)
    inside = np.zeros((75, 125), bool)
    inside[27:38, 52:63] = True
    assert np.abs(picture[inside] - means[inside]).max() <= 2
    step, picture = quicklook(write(tmp_path, data), 1000)
    assert (step, picture.tobytes()) == (1, data.transpose(1, 2, 0).tobytes())


def test_heat_lies_on_the_picture_where_it_belongs():
    heat = np.array([[0.0, 1.0, np.nan], [0.5, 0.0, 0.0]], np.float32)
    picture = np.full((12, 20, 3), (10, 200, 30), np.uint8)
    mixed = blend(picture, 2, heat, 16)  # a cell is 8 pixels of the picture
    colours = magma(heat)
    grey = np.asarray(Image.fromarray(picture).convert("L"))[0, 0]
    for row, col in ((0, 0), (7, 7), (0, 8), (7, 15), (8, 0), (11, 19)):
        expected = 0.7 * colours[row // 8, col // 8] + 0.3 * grey
        np.testing.assert_allclose(mixed[row, col], expected, atol=1)
    assert mixed[0, 16].tolist() == mixed[7, 19].tolist() == [10, 200, 30], "no value, no colour"


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_picture_with_a_panel_per_text(tmp_path, count):
    scene = write(tmp_path, field(200, 300, (100, 200, 160, 260)))
    texts = ["red", "grey", "blue", "green", "a very long text " * 12 + "red"][:count]
    write_overlay(tmp_path / "heat.png", locate(ColourEmbedder(), scene, texts, window=48, stride=12))
    with Image.open(tmp_path / "heat.png") as image:
        assert image.format == "PNG"
        assert image.width > 300 * math.ceil(count**0.5) * 0.9
