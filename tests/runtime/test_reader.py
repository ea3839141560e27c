from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import rasterio
from rasterio.windows import Window

from rsedge.errors import OptionError, SceneError
from rsedge.pixels import ReflectanceRule, resize
from rsedge.runtime.scenes.readahead import read_tiles
from rsedge.runtime.scenes.rendering import FastRule
from rsedge.runtime.scenes.scene import Scene, SceneReader
from rsedge.runtime.scenes.tiles import TileGrid
from tests import scenes

SIZE = 32
LAYOUTS = {
    "tiled": {"tiled": True, "blockxsize": 16, "blockysize": 16, "compress": "deflate"},
    "tiled-large": {"tiled": True, "blockxsize": 64, "blockysize": 48, "compress": "deflate"},
    "tiled-bands": {"tiled": True, "blockxsize": 32, "blockysize": 32, "interleave": "band"},
    "striped": {"blockysize": 1, "compress": "deflate"},
    "striped-aligned": {"blockysize": 32, "compress": "lzw"},
    "striped-high": {"blockysize": 50, "compress": "deflate"},
    "one-strip": {"blockysize": 150},
    "png": {"driver": "PNG", "crs": None, "transform": None},
    "jp2": {"driver": "JP2OpenJPEG", "reversible": "YES", "quality": "100", "blockxsize": 64, "blockysize": 64},
}


def has_driver(name: str) -> bool:
    with rasterio.Env() as env:
        return name in env.drivers()


def make(tmp_path, layout, data=None, **more):
    options = LAYOUTS[layout] | more
    if not has_driver(options.get("driver", "GTiff")):
        pytest.skip(f"this GDAL has no {options['driver']} driver")
    data = scenes.pixels(3, 150, 210) if data is None else data
    suffix = {"PNG": "png", "JP2OpenJPEG": "jp2"}.get(options.get("driver"), "tif")
    return scenes.write(tmp_path / f"a.{suffix}", data, **options)


def expected_image(path, tile, tile_size):
    """What rasterio's plain windowed read gives, padded with black."""
    with rasterio.open(path) as dataset:
        data = dataset.read((1, 2, 3), window=Window(tile.col_off, tile.row_off, tile.width, tile.height))
    image = np.zeros((tile_size, tile_size, 3), np.uint8)
    image[: tile.height, : tile.width] = data.transpose(1, 2, 0)
    return image


@pytest.mark.parametrize("readers", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("overlap", "edge"), [(0, "pad"), (12, "shift"), (5, "drop")])
def test_tiles_are_what_rasterio_reads(tmp_path, layout, readers, overlap, edge):
    path = make(tmp_path, layout)
    scene = Scene.open(path, bands=(1, 2, 3))
    grid = TileGrid(scene.width, scene.height, SIZE, overlap, edge)
    found = list(read_tiles(scene, grid, image_size=SIZE, readers=readers))
    assert [pixels.tile for pixels in found] == list(grid)
    for pixels in found:
        np.testing.assert_array_equal(pixels.image, expected_image(path, pixels.tile, SIZE))
        assert pixels.image.dtype == np.uint8
        assert pixels.image.base.nbytes == pixels.image.nbytes  # its own memory, not a row's
        assert (pixels.nodata_fraction, pixels.error) == (0.0, None)


def test_memory_of_tiles_is_used_again_once_they_are_gone(tmp_path):
    scene = Scene.open(make(tmp_path, "tiled"), bands=(1, 2, 3))
    grid = TileGrid(scene.width, scene.height, SIZE)
    kept, places = [], set()
    for pixels in read_tiles(scene, grid, image_size=SIZE, readers=1, queue_tiles=1):
        places.add(pixels.image.ctypes.data)
        if pixels.tile.col == 0:
            kept.append(pixels)
    assert len(places) < len(grid)
    for pixels in kept:
        np.testing.assert_array_equal(pixels.image, expected_image(scene.path, pixels.tile, SIZE))


@pytest.mark.parametrize("layout", ["tiled", "striped", "striped-high"])
def test_wherever_it_starts_the_tiles_are_the_same(tmp_path, layout):
    data = scenes.pixels(3, 150, 210)
    data[:, 20:70, 50:130] = 0
    scene = Scene.open(make(tmp_path, layout, data, nodata=0), bands=(1, 2, 3))
    grid = TileGrid(scene.width, scene.height, SIZE, 7)
    whole = list(read_tiles(scene, grid, image_size=20))
    for start, stop in [(1, None), (9, 10), (10, 31), (len(grid) - 1, None), (len(grid), None), (5, 5), (3, 999)]:
        part = list(read_tiles(scene, grid, image_size=20, start=start, stop=stop, queue_tiles=1))
        assert len(part) == len(whole[start:stop])
        for one, other in zip(part, whole[start:stop], strict=True):
            assert (one.tile, one.nodata_fraction) == (other.tile, other.nodata_fraction)
            np.testing.assert_array_equal(one.image, other.image)


def test_nodata_counts_covered_pixels_only(tmp_path):
    data = scenes.pixels(3, 40, 40, "uint16")
    data[:, 32:, 32:36] = 0
    scene = Scene.open(make(tmp_path, "tiled", data), bands=(1, 2, 3))
    last = list(read_tiles(scene, TileGrid(40, 40, SIZE, edge="pad"), image_size=SIZE))[-1]
    assert (last.tile.width, last.tile.height) == (8, 8)
    assert last.nodata_fraction == 0.5
    assert not last.image[:8, :4].any()
    assert last.image[:8, 4:8].all()
    assert not last.image[8:].any()
    assert not last.image[:, 8:].any()


@pytest.mark.parametrize(
    ("size", "edge"), [((40, 40), "mirror"), ((20, 70), "shift"), ((5, 9), "shift"), ((70, 33), "mirror")]
)
def test_mirrored_pixels_fill_a_tile_and_do_not_count(tmp_path, size, edge):
    data = scenes.pixels(3, *size, "uint16")
    data[:, :4, :4] = 0
    scene = Scene.open(make(tmp_path, "tiled", data), bands=(1, 2, 3))
    with scene.reader() as reader:
        whole, empty = reader.read(0, 0, *size)
    for found in read_tiles(scene, TileGrid(size[1], size[0], SIZE, edge=edge), image_size=SIZE):
        tile = found.tile
        place = np.s_[tile.row_off : tile.row_off + tile.height, tile.col_off : tile.col_off + tile.width]
        beyond = (0, SIZE - tile.height), (0, SIZE - tile.width), (0, 0)
        np.testing.assert_array_equal(found.image, np.pad(whole[place], beyond, "symmetric"))
        assert found.nodata_fraction == pytest.approx(empty[place].mean())


def test_images_are_resized_as_pixels_does(tmp_path):
    path = make(tmp_path, "tiled")
    scene = Scene.open(path)
    for pixels in read_tiles(scene, TileGrid(210, 150, SIZE), image_size=50):
        np.testing.assert_array_equal(pixels.image, resize(expected_image(path, pixels.tile, SIZE), 50))


@pytest.mark.parametrize("offset", [0, -1000, -317])
@pytest.mark.parametrize("scale", [2500, 2764, 7, 65535])
@pytest.mark.parametrize("window", [(0, 65536), (1200, 2000), (900, 60000)])
def test_fast_rule_is_the_rule(offset, scale, window):
    rule = ReflectanceRule(offset, scale)
    dn = np.arange(*window, dtype=np.uint16)
    out = np.empty(dn.shape, np.uint8)
    expected = rule.apply(dn)
    FastRule(rule).apply(dn, out, int(dn.min()), int(dn.max()))
    np.testing.assert_array_equal(out, expected)


def test_fast_rule_goes_through_more_than_one_buffer():
    rule = ReflectanceRule(-1000)
    dn = np.random.default_rng(0).integers(0, 65536, (3, 300, 400), dtype=np.uint16)
    out = np.empty(dn.shape, np.uint8)
    expected = rule.apply(dn)
    FastRule(rule).apply(dn, out, int(dn.min()), int(dn.max()))
    np.testing.assert_array_equal(out, expected)


# ---- damaged files ----


@pytest.mark.parametrize("layout", ["tiled", "striped-aligned"])
@pytest.mark.parametrize("readers", [1, 2])
def test_truncated_file_gives_what_can_be_read(tmp_path, layout, readers):
    data = np.random.default_rng(0).integers(1, 255, (3, 150, 210), dtype=np.uint8)
    path = make(tmp_path, layout, data)
    scenes.truncate(path, 0.5)
    scene = Scene.open(path, bands=(1, 2, 3))
    grid = TileGrid(scene.width, scene.height, SIZE)
    found = list(read_tiles(scene, grid, image_size=SIZE, readers=readers))
    assert [pixels.tile for pixels in found] == list(grid)
    good = [pixels for pixels in found if pixels.error is None]
    bad = [pixels for pixels in found if pixels.error is not None]
    assert good
    assert bad
    with rasterio.open(path) as dataset:
        for pixels in bad:
            tile = pixels.tile
            assert (pixels.image, pixels.nodata_fraction) == (None, None)
            assert "\n" not in pixels.error
            with pytest.raises(rasterio.errors.RasterioIOError):
                dataset.read((1, 2, 3), window=Window(tile.col_off, tile.row_off, tile.width, tile.height))
    for pixels in good:
        np.testing.assert_array_equal(pixels.image, expected_image(path, pixels.tile, SIZE))
    # The words, too, are the same whoever reads and wherever it starts.
    again = list(read_tiles(scene, grid, image_size=SIZE, readers=3, start=len(grid) // 2))
    assert [pixels.error for pixels in again] == [pixels.error for pixels in found[len(grid) // 2 :]]


# ---- threads ----


def reader_threads():
    return [thread for thread in threading.enumerate() if thread.name == "rsedge-reader"]


@pytest.mark.parametrize("layout", ["tiled", "striped"])
@pytest.mark.parametrize("taken", [0, 1, 9])
def test_closing_ends_the_threads(tmp_path, layout, taken):
    scene = Scene.open(make(tmp_path, layout, scenes.pixels(3, 600, 210)))
    tiles = read_tiles(scene, TileGrid(210, 600, SIZE), image_size=SIZE, readers=2, queue_tiles=1)
    for _ in range(taken):
        next(tiles)
    began = time.monotonic()
    tiles.close()
    assert time.monotonic() - began < 2
    assert not reader_threads()


@pytest.mark.parametrize("layout", ["tiled", "striped"])
def test_reads_ahead_but_not_far(tmp_path, layout, monkeypatch):
    highest = []
    read = SceneReader.read_pixels

    def spy(self, row_off, *rest):
        highest.append(row_off)
        return read(self, row_off, *rest)

    monkeypatch.setattr(SceneReader, "read_pixels", spy)
    scene = Scene.open(make(tmp_path, layout, scenes.pixels(3, 1600, 64)))
    tiles = read_tiles(scene, TileGrid(64, 1600, SIZE), image_size=SIZE, readers=2, queue_tiles=6)
    next(tiles)
    deadline = time.monotonic() + 5
    while max(highest) < 3 * SIZE and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert max(highest) == 3 * SIZE  # rows 1, 2 and 3 wait, and not one more
    tiles.close()


def bytes_read_by_this_process():
    with open("/proc/self/io") as counters:  # noqa: PTH123 - a file of the kernel
        return int(next(line for line in counters if line.startswith("rchar")).split()[1])


@pytest.mark.parametrize("layout", ["tiled-large", "tiled-bands", "striped", "striped-high", "one-strip"])
@pytest.mark.parametrize("overlap", [0, 12])
def test_no_block_is_decoded_twice(tmp_path, layout, overlap):
    path = make(tmp_path, layout, np.random.default_rng(0).integers(1, 255, (3, 900, 1000), dtype=np.uint8))
    scene = Scene.open(path)
    before = bytes_read_by_this_process()
    for _ in read_tiles(scene, TileGrid(scene.width, scene.height, SIZE, overlap), image_size=SIZE):
        pass
    assert bytes_read_by_this_process() - before < 1.4 * path.stat().st_size


@pytest.mark.parametrize("layout", ["tiled", "tiled-large", "striped", "striped-high"])
@pytest.mark.parametrize(("overlap", "edge"), [(0, "pad"), (5, "shift"), (5, "drop")])
def test_every_pixel_is_read_once_in_whole_blocks(tmp_path, monkeypatch, layout, overlap, edge):
    reads = np.zeros((150, 210), np.int64)
    read = SceneReader.read_pixels
    path = make(tmp_path, layout)
    scene = Scene.open(path)
    rows, cols = scene.block_shape

    def spy(self, row_off, col_off, height, width):
        reads[row_off : row_off + height, col_off : col_off + width] += 1
        assert row_off % rows == 0
        assert col_off % cols == 0
        return read(self, row_off, col_off, height, width)

    monkeypatch.setattr(SceneReader, "read_pixels", spy)
    grid = TileGrid(210, 150, SIZE, overlap, edge)
    tiles = list(grid)
    list(read_tiles(scene, grid, image_size=SIZE, readers=3))
    bottom = max(tile.row_off + tile.height for tile in tiles)
    right = max(tile.col_off + tile.width for tile in tiles)
    assert (reads[:bottom, :right] == 1).all()
    assert reads.sum() == bottom * right  # and what no tile wants is not read at all


def test_blocks_higher_than_memory_allows_are_read_in_slices(tmp_path, monkeypatch):
    monkeypatch.setattr("rsedge.runtime.scenes.readahead._HIGHEST_PIECE", 40)
    path = make(tmp_path, "one-strip")
    scene = Scene.open(path)
    held = []
    read = SceneReader.read_pixels

    def spy(self, row_off, col_off, height, width):
        held.append(height)
        return read(self, row_off, col_off, height, width)

    monkeypatch.setattr(SceneReader, "read_pixels", spy)
    for pixels in read_tiles(scene, TileGrid(210, 150, SIZE, 5), image_size=SIZE, readers=3):
        np.testing.assert_array_equal(pixels.image, expected_image(path, pixels.tile, SIZE))
    assert max(held) <= 2 * (SIZE - 5)


@pytest.mark.parametrize("layout", ["tiled", "striped"])
def test_errors_in_threads_reach_the_consumer(tmp_path, layout, monkeypatch):
    def fail(self, row_off, *_):
        raise ZeroDivisionError(f"row {row_off}")

    scene = Scene.open(make(tmp_path, layout))
    monkeypatch.setattr(SceneReader, "read_pixels", fail)
    with pytest.raises(ZeroDivisionError):
        list(read_tiles(scene, TileGrid(210, 150, SIZE), image_size=SIZE))
    assert not reader_threads()


def test_lost_file(tmp_path):
    path = make(tmp_path, "tiled")
    scene = Scene.open(path)
    path.unlink()
    with pytest.raises(SceneError, match="cannot be opened"):
        list(read_tiles(scene, TileGrid(210, 150, SIZE), image_size=SIZE))


@pytest.mark.parametrize("values", [{"readers": 0}, {"queue_tiles": 0}])
def test_what_is_refused(tmp_path, values):
    scene = Scene.open(make(tmp_path, "tiled"))
    with pytest.raises(OptionError, match="at least 1"):
        read_tiles(scene, TileGrid(210, 150, SIZE), image_size=SIZE, **values)
