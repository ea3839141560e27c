from __future__ import annotations

import numpy as np
import pytest
import rasterio
import rasterio.shutil

from rsedge.errors import OptionError, SceneError
from rsedge.pixels import ReflectanceRule
from rsedge.runtime.scenes.quicklook import quicklook
from rsedge.runtime.scenes.scene import Scene
from tests.scenes import pixels, truncate, write


def means(image: np.ndarray, by: int) -> np.ndarray:
    """The mean of each ``by`` × ``by`` block of [H, W, C]."""
    height, width, channels = image.shape
    return image.reshape(height // by, by, width // by, by, channels).mean(axis=(1, 3))


def smooth(bands: int, height: int, width: int) -> np.ndarray:
    """Reflectance without noise, so that a picture hardly depends on the filter that made it smaller."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [1200 + 900 * np.sin(x / 70 + band) + 800 * np.cos(y / 90 - band) for band in range(bands)]
    return np.clip(planes, 1, 4000).astype(np.uint16)


@pytest.mark.parametrize("options", [{}, {"tiled": True, "blockxsize": 128, "blockysize": 128}])
def test_each_pixel_is_the_mean_of_the_rendered_ground_beneath(tmp_path, options):
    data = pixels(3, 1200, 900, "uint16")
    scene = Scene.open(write(tmp_path / "a.tif", data, descriptions=("B04", "B03", "B02"), **options))
    picture = quicklook(scene, longest=200)
    assert (picture.shape, picture.dtype) == ((200, 150, 4), np.uint8)
    rendered = np.moveaxis(ReflectanceRule().apply(data), 0, -1)
    assert np.abs(picture[..., :3] - means(rendered, 6)).max() <= 1
    assert (picture[..., 3] == 255).all()


def test_reading_in_bands_changes_nothing_where_lines_do_not_divide(tmp_path, monkeypatch):
    scene = Scene.open(write(tmp_path / "a.tif", pixels(3, 611, 403)))
    whole = quicklook(scene, longest=97)
    assert whole.shape == (97, 64, 4)
    monkeypatch.setattr("rsedge.runtime.scenes.quicklook._LINES", 20)
    assert np.abs(quicklook(scene, longest=97).astype(int) - whole).max() <= 1


def test_a_small_scene_is_not_made_larger(tmp_path):
    data = pixels(3, 50, 70)
    picture = quicklook(Scene.open(write(tmp_path / "a.tif", data)))
    assert np.array_equal(picture[..., :3], np.moveaxis(data, 0, -1))


def test_no_data_is_transparent_and_does_not_darken_its_neighbours(tmp_path):
    data = np.full((3, 400, 400), 180, np.uint8)
    data[:, :, :102] = 7
    picture = quicklook(Scene.open(write(tmp_path / "a.tif", data, nodata=7)), longest=100)
    assert (picture[:, :25, 3] == 0).all()
    assert (picture[:, 26:, 3] == 255).all()
    assert np.abs(picture[:, 25, 3].astype(int) - 128).max() <= 1, "half of the ground beneath has data"
    assert np.abs(picture[:, 25:, :3].astype(int) - 180).max() <= 1


@pytest.mark.parametrize(
    ("driver", "name", "options"),
    [
        ("COG", "a.tif", {"blocksize": 128, "overview_count": 3}),
        ("JP2OpenJPEG", "a.jp2", {"quality": 100, "reversible": "YES"}),
    ],
)
def test_overviews_give_the_same_picture(tmp_path, monkeypatch, driver, name, options):
    data = smooth(3, 1024, 1280)
    data[:, :256, :256] = 0
    plain = write(tmp_path / "plain.tif", data)
    odd = tmp_path / "a & b <1>?.d"
    odd.mkdir()
    with rasterio.open(plain) as dataset:
        rasterio.shutil.copy(dataset, odd / name, driver=driver, **options)
    expected = quicklook(Scene.open(plain, bands=(3, 2, 1), boa_offset=-100), longest=160)
    sizes = []
    real = Scene.reader
    monkeypatch.setattr(Scene, "reader", lambda scene: sizes.append((scene.width, scene.height)) or real(scene))
    picture = quicklook(Scene.open(odd / name, bands=(3, 2, 1), boa_offset=-100), longest=160)
    assert sizes == [(320, 256)], "of the overviews the one that is still larger than the picture"
    inner = np.s_[40:, 40:]  # at the rim of no data filters differ
    assert np.abs(picture[inner].astype(int) - expected[inner]).max() <= 6
    assert np.abs(picture[inner].astype(int) - expected[inner]).mean() < 1
    assert (picture[:30, :30, 3] == 0).all()


def test_what_has_no_fitting_overview_is_read_as_it_is(tmp_path):
    data = smooth(3, 512, 512)
    mask = np.full((512, 512), 255, np.uint8)
    mask[:256] = 0
    path = write(tmp_path / "a.tif", data, mask=mask)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as dataset:
        dataset.build_overviews([2, 4])
    picture = quicklook(Scene.open(path, bands=(1, 2, 3)), longest=64)
    assert (picture[:32, :, 3] == 0).all()
    assert (picture[32:, :, 3] == 255).all()


def test_a_palette_keeps_its_colours(tmp_path):
    data = np.repeat(np.arange(2, dtype=np.uint8), 200)[None, None].repeat(400, axis=1)
    scene = Scene.open(write(tmp_path / "a.tif", data, colormap={0: (200, 10, 30, 255), 1: (5, 90, 250, 255)}))
    picture = quicklook(scene, longest=100)
    assert picture[50, 20].tolist() == [200, 10, 30, 255]
    assert picture[50, 80].tolist() == [5, 90, 250, 255]


def test_lines_that_cannot_be_read_are_transparent(tmp_path):
    data = pixels(3, 2048, 256)
    path = write(tmp_path / "a.tif", data, tiled=True, blockxsize=256, blockysize=256, compress="deflate")
    picture = quicklook(Scene.open(truncate(path, 0.5)), longest=512)
    assert (picture[:128, :, 3] == 255).all()
    assert (picture[-128:, :, 3] == 0).all()


def test_what_cannot_be_is_refused(tmp_path):
    scene = Scene.open(write(tmp_path / "a.tif", pixels(3, 32, 32)))
    with pytest.raises(OptionError, match="longest is 0"):
        quicklook(scene, longest=0)
    (tmp_path / "a.tif").unlink()
    with pytest.raises(SceneError, match="cannot be opened"):
        quicklook(scene)
