"""Bands of several files on one grid, compared with the VRT that GDAL would make of them."""

from __future__ import annotations

from xml.etree.ElementTree import Element, SubElement, tostring

import numpy as np
import pytest
import rasterio
from rasterio.enums import Resampling
from rasterio.transform import from_origin
from rasterio.windows import Window

from rsedge import Scene
from rsedge.errors import SceneError
from rsedge.runtime.scenes.access import LOCAL
from rsedge.runtime.scenes.composite import Composite, Grid, PlacedBand
from rsedge.runtime.scenes.gdal import open_dataset
from rsedge.runtime.scenes.products.product import BandFile
from tests import scenes

TYPES = {"uint16": "UInt16", "uint8": "Byte"}


def grid(left, top, step, width, height):
    return Grid(rasterio.crs.CRS.from_epsg(32632), from_origin(left, top, step, step), width, height)


def write(path, own, *, seed=0, **options):
    return scenes.write(
        path, scenes.pixels(1, own.height, own.width, "uint16", seed), crs=own.crs, transform=own.transform, **options
    )


def by_gdal(path, own, on, resampling):
    """The band on a grid, by a VRT of GDAL's: where it lies is computed here once more."""
    to = ~on.transform @ own.transform
    root = Element("VRTDataset", rasterXSize=str(on.width), rasterYSize=str(on.height))
    band = SubElement(root, "VRTRasterBand", dataType="UInt16", band="1")
    source = SubElement(band, "SimpleSource", resampling=resampling)
    SubElement(source, "SourceFilename", relativeToVRT="0").text = str(path)
    SubElement(source, "SourceBand").text = "1"
    SubElement(source, "SrcRect", xOff="0", yOff="0", xSize=str(own.width), ySize=str(own.height))
    place = {"xOff": to.c, "yOff": to.f, "xSize": to.a * own.width, "ySize": to.e * own.height}
    SubElement(source, "DstRect", {name: repr(round(value, 9)) for name, value in place.items()})
    with rasterio.open(tostring(root, encoding="unicode")) as dataset:
        return dataset.read(1)


@pytest.mark.parametrize(
    ("own", "resampling"),
    [
        (grid(600000, 5100000, 10, 90, 80), "nearest"),  # the same
        (grid(600000, 5100000, 20, 45, 40), "nearest"),
        (grid(600000, 5100000, 20, 45, 40), "bilinear"),
        (grid(600000, 5100000, 60, 15, 14), "bilinear"),  # hangs over
        (grid(600200, 5099900, 10, 20, 20), "nearest"),  # lies inside
        (grid(599800, 5100100, 20, 45, 40), "nearest"),  # begins outside
        (grid(600000, 5100000, 5, 180, 160), "nearest"),  # finer
    ],
)
def test_a_band_on_another_grid(tmp_path, own, resampling):
    on = grid(600000, 5100000, 10, 90, 80)
    path = write(tmp_path / "a.tif", own)
    expected = by_gdal(path, own, on, resampling)
    with open_dataset(str(path)) as dataset:
        band = PlacedBand(dataset, 1, own, on, "a")
        whole = np.empty((80, 90), np.uint16)
        band.read(Window(0, 0, 90, 80), whole, resampling=Resampling[resampling])
        assert np.array_equal(whole, expected)
        generator = np.random.default_rng(0)
        for _ in range(30):  # whatever the window, a pixel has one value
            row, col = generator.integers(0, 70, 2)
            height, width = generator.integers(1, 11, 2)
            part = np.empty((height, width), np.uint16)
            band.read(Window(col, row, width, height), part, resampling=Resampling[resampling])
            difference = np.abs(part.astype(int) - expected[row : row + height, col : col + width])
            assert difference.max() <= (1 if resampling == "bilinear" else 0)


def test_outside_of_a_file(tmp_path):
    own, on = grid(600200, 5099900, 10, 20, 20), grid(600000, 5100000, 10, 90, 80)
    with open_dataset(str(write(tmp_path / "a.tif", own))) as dataset:
        band = PlacedBand(dataset, 1, own, on, "a")
        pixels = np.empty((80, 90), np.uint16)
        band.read(Window(0, 0, 90, 80), pixels, outside=255, resampling=Resampling.nearest)
    inside = np.zeros((80, 90), bool)
    inside[10:30, 20:40] = True
    assert (pixels[~inside] == 255).all()


def test_three_files_are_one_raster(tmp_path):
    fine, coarse = grid(600000, 5100000, 10, 40, 30), grid(600000, 5100000, 20, 20, 15)
    paths = [
        write(tmp_path / "r.tif", fine, seed=1, nodata=7),
        write(tmp_path / "g.tif", coarse, seed=2),
        write(tmp_path / "b.tif", fine, seed=3),
    ]
    with Composite([BandFile(path=str(path)) for path in paths], None, LOCAL) as together:
        assert (together.width, together.height, together.count) == (40, 30, 3)
        assert together.nodatavals == (7, None, None)
        assert together.notes == ("green was resampled from 20 to 10 map units",)
        assert {str(path) for path in paths} == set(together.files)
        pixels = together.read((1, 2, 3), window=Window(0, 0, 40, 30))
    for number, (path, own) in enumerate(zip(paths, (fine, coarse, fine), strict=True)):
        assert np.array_equal(pixels[number], by_gdal(path, own, fine, "bilinear" if own is coarse else "nearest"))


@pytest.mark.parametrize(("step", "left"), [(1e-300, 1e300), (1e-160, 1e300)])
def test_geotransforms_without_a_common_grid_are_refused(tmp_path, step, left):
    one, other = grid(left, left, step, 8, 8), grid(0, 0, 10, 8, 8)
    paths = [write(tmp_path / f"{number}.tif", own) for number, own in enumerate((one, other, other))]
    with pytest.raises(SceneError, match="no numbers bring together"):
        Composite([BandFile(path=str(path)) for path in paths], None, LOCAL)


def test_files_that_do_not_fit(tmp_path):
    on = grid(600000, 5100000, 10, 40, 30)
    path = write(tmp_path / "a.tif", on)
    far = write(tmp_path / "far.tif", grid(700000, 5100000, 10, 40, 30))
    other = scenes.write(tmp_path / "other.tif", scenes.pixels(1, 30, 40, "uint16"), crs="EPSG:32633")
    eight = scenes.write(tmp_path / "eight.tif", scenes.pixels(1, 30, 40), transform=on.transform)
    for third, said in ((far, "lies beside"), (other, "is in EPSG:32633"), (eight, "different types")):
        with pytest.raises(SceneError, match=said):
            Composite([BandFile(path=str(each)) for each in (path, path, third)], None, LOCAL)
    with pytest.raises(SceneError, match="no band 2"):
        Composite([BandFile(path=str(path)), BandFile(path=str(path), band=2), BandFile(path=str(path))], None, LOCAL)


@pytest.mark.parametrize("place", ["inside", "beside"])
def test_the_mask_of_a_file_is_that_of_all(tmp_path, place):
    on = grid(600000, 5100000, 10, 40, 30)
    paths = [write(tmp_path / f"{band}.tif", on, seed=number) for number, band in enumerate(("B04", "B03", "B02"))]
    mask = np.full((30, 40), 255, np.uint8)
    mask[:, :10] = 0
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=place == "inside"), rasterio.open(paths[1], "r+") as dataset:
        dataset.write_mask(mask)
    assert (tmp_path / "B03.tif.msk").exists() == (place == "beside")
    scene = Scene.open(tmp_path)
    with scene.reader() as reader:
        assert np.array_equal(reader.read(0, 0, 30, 40)[1], mask == 0)
    if place == "beside":
        assert str(tmp_path / "B03.tif.msk") in scene.files
        with Scene.open(tmp_path, resolution=20).reader() as reader:
            assert np.array_equal(reader.read(0, 0, 15, 20)[1], mask[::2, ::2] == 0)


def test_a_mask_beside_a_file_that_is_not_used_is_named(tmp_path):
    on = grid(600000, 5100000, 10, 40, 30)
    for band in ("B04", "B03", "B02"):
        write(tmp_path / f"{band}.tif", on)
    (tmp_path / "B02.tif.msk").write_text("<VRTDataset/>")
    [warning] = [each for each in Scene.open(tmp_path).warnings if "mask" in each]
    assert "B02.tif.msk is not used as a mask" in warning
