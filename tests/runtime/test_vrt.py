"""Users' VRTs: opened where allowed, and then what GDAL reads of them; nothing outside of their folder."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio
import rasterio.shutil

from rsedge import Scene
from rsedge.errors import SceneError
from tests import scenes


@pytest.fixture
def mosaic(tmp_path):
    """A VRT of two halves."""
    halves = [scenes.pixels(3, 40, 30, seed=seed) for seed in (1, 2)]
    for number, half in enumerate(halves):
        place = scenes.UTM["transform"] * rasterio.Affine.translation(30 * number, 0)
        scenes.write(tmp_path / f"{number}.tif", half, transform=place)
    rasterio.shutil.copy(tmp_path / "0.tif", tmp_path / "a.vrt", driver="VRT")
    text = (tmp_path / "a.vrt").read_text().replace('rasterXSize="30"', 'rasterXSize="60"')
    for band in (1, 2, 3):
        first = text.index("</SimpleSource>", text.index(f'band="{band}"')) + len("</SimpleSource>")
        second = (
            f'<SimpleSource><SourceFilename relativeToVRT="1">1.tif</SourceFilename><SourceBand>{band}</SourceBand>'
            '<SrcRect xOff="0" yOff="0" xSize="30" ySize="40"/><DstRect xOff="30" yOff="0" xSize="30" ySize="40"/>'
            "</SimpleSource>"
        )
        text = text[:first] + second + text[first:]
    (tmp_path / "a.vrt").write_text(text)
    return tmp_path / "a.vrt"


def read(scene):
    with scene.reader() as reader:
        return reader.read(0, 0, scene.height, scene.width)[0]


def test_a_mosaic_is_what_gdal_reads(mosaic):
    with pytest.raises(SceneError, match="--allow-vrt"):
        Scene.open(mosaic)
    scene = Scene.open(mosaic, allow_vrt=True)
    with rasterio.open(mosaic) as dataset:
        assert np.array_equal(read(scene), dataset.read().transpose(1, 2, 0))
        assert (scene.crs, scene.transform) == (dataset.crs, dataset.transform)
    assert scene.name == "a"
    assert {path.rsplit("/", 1)[1] for path in scene.files} == {"0.tif", "1.tif", "a.vrt"}


def test_a_vrt_by_another_name(mosaic):
    other = mosaic.rename(mosaic.with_name("holiday.tif"))
    assert Scene.open(other, allow_vrt=True).width == 60


def test_sources_outside_need_a_root(mosaic, tmp_path):
    inside = tmp_path / "in"
    inside.mkdir()
    moved = mosaic.rename(inside / "a.vrt")
    moved.write_text(moved.read_text().replace(">0.tif<", ">../0.tif<").replace(">1.tif<", ">../1.tif<"))
    with pytest.raises(SceneError, match=r"a source of .*a\.vrt leads to .*0\.tif, outside.*--allow-root"):
        Scene.open(moved, allow_vrt=True)
    assert Scene.open(moved, allow_vrt=True, allow_roots=[tmp_path]).width == 60


def test_links_are_followed_before_they_are_judged(mosaic, tmp_path):
    outside = tmp_path.parent / f"{tmp_path.name}-outside.tif"
    (tmp_path / "1.tif").rename(outside)
    (tmp_path / "1.tif").symlink_to(outside)
    with pytest.raises(SceneError, match="outside"):
        Scene.open(mosaic, allow_vrt=True)


SOURCE = '<SourceFilename relativeToVRT="1">0.tif</SourceFilename>'


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (SOURCE, '<SourceFilename relativeToVRT="0">/etc/hostname</SourceFilename>', "outside"),
        (SOURCE, '<SourceFilename relativeToVRT="1">/etc/hostname</SourceFilename>', "outside"),
        (SOURCE, "<SourceFilename>/vsicurl/http://127.0.0.1:1/a.tif</SourceFilename>", "/vsicurl/"),
        (SOURCE, "<SourceFilename>http://127.0.0.1:1/a.tif</SourceFilename>", "remote"),
        (SOURCE, "<SourceFilename>WMS:http://127.0.0.1:1/</SourceFilename>", "name of GDAL's own"),
        (SOURCE, "<SourceFilename>&lt;VRTDataset/&gt;</SourceFilename>", "name of GDAL's own"),
        (SOURCE, SOURCE.replace("0.tif", "a.vrt"), "is a VRT"),
        (SOURCE, SOURCE.replace("0.tif", "note.tif"), "none of TIFF"),
        (SOURCE, SOURCE.replace("0.tif", "photo.jpg"), "is JPEG"),
        (SOURCE, SOURCE + "<OpenOptions><OOI key='NUM_THREADS'>2</OOI></OpenOptions>", "OpenOptions"),
        ("<SimpleSource>", "<KernelFilteredSource>", "is no whole VRT|KernelFilteredSource"),
        ('band="1"', 'band="1" subClass="VRTRawRasterBand"', "VRTRawRasterBand"),
        ('band="1"', 'band="1" subClass="VRTDerivedRasterBand"', "VRTDerivedRasterBand"),
        ("<VRTDataset ", '<VRTDataset subClass="VRTWarpedDataset" ', "VRTDataset"),
        ("<VRTDataset ", "<!DOCTYPE a><VRTDataset ", "document type"),
        ("</VRTDataset>", "<GDALWarpOptions><SourceDataset>/etc/x</SourceDataset></GDALWarpOptions></VRTDataset>",
         "GDALWarpOptions"),
        ("</VRTDataset>", "<PansharpeningOptions/></VRTDataset>", "PansharpeningOptions"),
        ("</VRTDataset>", "<Group name='/'/></VRTDataset>", "Group"),
        ("</VRTDataset>", "<SRS>/etc/hostname</SRS></VRTDataset>", "neither WKT nor EPSG"),
        ("</VRTDataset>", "<SRS>http://127.0.0.1:1/</SRS></VRTDataset>", "neither WKT nor EPSG"),
        ("</VRTDataset>", "<SRS>+proj=longlat +nadgrids=/etc/hostname</SRS></VRTDataset>", "neither WKT nor EPSG"),
        ("</VRTDataset>", "", "no whole VRT"),
    ],
)  # fmt: skip
def test_what_reaches_out_is_refused(mosaic, old, new, said):
    (mosaic.parent / "note.tif").write_text("hello")
    scenes.write(mosaic.parent / "photo.jpg", scenes.pixels(3, 40, 30), driver="JPEG")
    text = mosaic.read_text()
    assert old in text
    mosaic.write_text(text.replace(old, new, 1))
    with pytest.raises(SceneError, match=said):
        Scene.open(mosaic, allow_vrt=True)


def test_a_vrt_that_is_not_utf_8(mosaic):
    mosaic.write_bytes(mosaic.read_bytes().replace(b"0.tif", b"\xff\xfe.tif"))
    with pytest.raises(SceneError, match="no whole VRT"):
        Scene.open(mosaic, allow_vrt=True)


def test_overviews_that_are_files_are_left_out(mosaic):
    text = mosaic.read_text()
    text = text.replace("</VRTRasterBand>", "<Overview><SourceFilename>/etc/hostname</SourceFilename><SourceBand>1"
                        "</SourceBand></Overview></VRTRasterBand>")  # fmt: skip
    mosaic.write_text(text)
    assert "hostname" not in Scene.open(mosaic, allow_vrt=True).path
