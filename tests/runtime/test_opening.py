"""The gate: which files are opened, with what beside them, and how large they may be."""

from __future__ import annotations

import ast
import os
import struct
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from PIL import Image
from rasterio.errors import NotGeoreferencedWarning

import rsedge
from rsedge import Scene
from rsedge.errors import OptionError, SceneError
from rsedge.runtime.scenes.access import Access
from rsedge.runtime.scenes.gdal import DRIVERS, open_dataset
from rsedge.runtime.scenes.headers import Sizes, declared_sizes
from tests import scenes

ROOT = Path(rsedge.__file__).parent
# Who may use rasterio's own open: the gate, and what writes rasters.
OPENING = {"runtime/scenes/gdal.py"}
WRITING = {"runtime/demo/scene.py", "runtime/outputs/rasters.py"}


def sizes_of(path):
    content = path.read_bytes()
    return list(declared_sizes(lambda offset, length: content[offset : offset + length]))


# ---- one gate ----


def test_nothing_else_opens_a_raster_to_read():
    found = set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            raster = (
                isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "rasterio"
            )
            if name == "DatasetReader" or (raster and name in ("open", "band", "shutil", "merge")):
                found.add(path.relative_to(ROOT).as_posix())
    assert found - WRITING == OPENING


@pytest.mark.parametrize(
    ("driver", "name"),
    [("GTiff", "a.tif"), ("JP2OpenJPEG", "a.jp2"), ("PNG", "a.png"), ("JPEG", "a.jpg"), ("WEBP", "a.webp")],
)
def test_formats_that_hold_their_pixels_are_read_whatever_they_are_called(tmp_path, driver, name):
    options = {"WEBP_LOSSLESS": True} if driver == "WEBP" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        made = scenes.write(
            tmp_path / name, scenes.pixels(3, 40, 50), driver=driver, crs=None, transform=None, **options
        )
        (other := tmp_path / "other.dat").write_bytes(made.read_bytes())
        with open_dataset(str(other)) as dataset, rasterio.open(made) as expected:
            assert (dataset.driver, dataset.driver in DRIVERS) == (driver, True)
            assert np.array_equal(dataset.read(), expected.read())


@pytest.mark.parametrize("driver", ["GPKG", "ENVI", "HFA", "netCDF", "PCIDSK"])
def test_formats_that_name_other_files_are_not(tmp_path, driver):
    path = tmp_path / "a.tif"
    try:
        scenes.write(path, scenes.pixels(3, 40, 50), driver=driver)
    except rasterio.errors.RasterioError:
        pytest.skip(f"this GDAL writes no {driver}")
    with rasterio.open(path) as dataset:
        assert dataset.driver == driver  # GDAL alone would
    with pytest.raises(SceneError, match="cannot be opened as a raster"):
        open_dataset(str(path))


def test_settings_of_the_caller_do_not_open_the_gate(tmp_path):
    path = scenes.write(tmp_path / "a.tif", scenes.pixels(3, 40, 50))
    (tmp_path / "a.tif.aux.xml").write_text("<PAMDataset><Metadata><MDI key='x'>y</MDI></Metadata></PAMDataset>")
    with rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="FALSE", GDAL_PAM_ENABLED="YES"):
        with open_dataset(str(path)) as dataset:
            assert "x" not in dataset.tags()
            assert dataset.files == [str(path)]
        with rasterio.open(path) as dataset:
            assert dataset.tags()["x"] == "y"


@pytest.mark.parametrize(
    "name", ["/vsizip/a.zip/a.tif", "/vsitar/a.tar/a.tif", "/vsigzip/a.gz", "/vsisubfile/0_9,a.tif"]
)
def test_names_of_gdals_own_are_refused(name):
    with pytest.raises(SceneError, match=r"name of GDAL's own|cannot be read"):
        open_dataset(name)
    with pytest.raises(SceneError):
        Scene.open(name)


def test_the_network_needs_leave():
    with pytest.raises(OptionError, match="--allow-remote"):
        open_dataset("/vsicurl/http://127.0.0.1:1/a.tif")
    with pytest.raises(SceneError, match="no file on the network"):
        open_dataset("/vsicached//vsicurl/http://127.0.0.1:1/a.tif", Access(remote=True))


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.tif")
    with pytest.raises(SceneError, match="no regular file"):
        open_dataset(str(tmp_path / "a.tif"))


def test_a_coordinate_reference_system_names_no_grid(tmp_path):
    grid = "+proj=longlat +ellps=bessel +nadgrids=/etc/hostname +no_defs"
    path = scenes.write(tmp_path / "a.tif", scenes.pixels(3, 8, 9), crs=grid)
    with rasterio.open(path) as dataset:
        assert "/etc/hostname" in dataset.crs.to_wkt()
    with pytest.raises(SceneError, match="names a file of PROJ's"):
        open_dataset(str(path))
    mercator = scenes.write(tmp_path / "b.tif", scenes.pixels(3, 8, 9), crs="EPSG:3857")
    open_dataset(str(mercator)).close()  # whose PROJ string has +nadgrids=@null


@pytest.mark.parametrize("name", ["a.tif", "a.jp2"])
def test_metadata_inside_a_raster_name_no_overviews(tmp_path, name):
    secret = scenes.write(tmp_path / "secret.tif", scenes.pixels(3, 150, 150))
    path = tmp_path / name
    source = scenes.write(tmp_path / "a.tif", scenes.pixels(3, 300, 300))
    with rasterio.open(source, "r+") as dataset:
        dataset.update_tags(ns="OVERVIEWS", OVERVIEW_FILE=str(secret))
    if path != source:
        rasterio.shutil.copy(source, path, driver="JP2OpenJPEG", WRITE_METADATA="YES")
    with rasterio.open(path) as dataset:
        assert dataset.tags(ns="OVERVIEWS") == {"OVERVIEW_FILE": str(secret)}
        assert 2 in dataset.overviews(1)  # GDAL follows it
    with pytest.raises(SceneError, match=r"metadata name another file \(OVERVIEWS: OVERVIEW_FILE\)"):
        open_dataset(str(path))


def test_what_a_file_is_that_no_driver_takes(tmp_path):
    for content, said in (
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b'<VRTDataset rasterXSize="1"/>', "--allow-vrt"),
        (b"<GDAL_WMS></GDAL_WMS>", "describes one elsewhere"),
        (b'{"tilejson": "2.1.0"}', "describes one elsewhere"),
        (b"hello", "none of TIFF"),
    ):
        (path := tmp_path / "a.tif").write_bytes(content)
        with pytest.raises(SceneError, match=said):
            open_dataset(str(path))


# ---- sizes ----


@pytest.mark.parametrize(
    ("options", "blocks", "block"),
    [
        ({"tiled": True, "blockxsize": 64, "blockysize": 32}, 2 * 4, 64 * 32 * 3 * 2),
        ({"tiled": True, "blockxsize": 64, "blockysize": 32, "interleave": "band"}, 2 * 4 * 3, 64 * 32 * 2),
        ({"blockysize": 7, "BIGTIFF": "YES"}, 15, 100 * 7 * 3 * 2),
        ({"blockysize": 100, "ENDIANNESS": "BIG"}, 1, 100 * 100 * 3 * 2),
    ],
)
def test_sizes_of_a_tiff(tmp_path, options, blocks, block):
    path = scenes.write(tmp_path / "a.tif", scenes.pixels(3, 100, 100, "uint16"), **options)
    [sizes] = sizes_of(path)
    assert (sizes.width, sizes.height, sizes.bands, sizes.blocks, sizes.block_bytes) == (100, 100, 3, blocks, block)


def test_sizes_of_every_directory(tmp_path):
    path = scenes.write(tmp_path / "a.tif", scenes.pixels(3, 100, 100))
    with rasterio.open(path, "r+") as dataset:
        dataset.build_overviews([2, 4])
    assert [sizes.width for sizes in sizes_of(path)] == [100, 50, 25]


@pytest.mark.parametrize("name", ["a.jp2", "a.j2k"])
def test_sizes_of_jpeg_2000(tmp_path, name):
    options = {"driver": "JP2OpenJPEG", "crs": None, "transform": None, "blockxsize": 128, "blockysize": 64}
    path = scenes.write(tmp_path / name, scenes.pixels(3, 300, 500), **options)
    [sizes] = sizes_of(path)
    assert (sizes.width, sizes.height, sizes.bands, sizes.blocks) == (500, 300, 3, 4 * 5 * 3)
    assert sizes.block_bytes == 128 * 64 * 3 * 4


def test_a_header_cut_anywhere_is_left_to_gdal(tmp_path):
    for path in (
        scenes.write(tmp_path / "a.tif", scenes.pixels(3, 40, 40)),
        scenes.write(tmp_path / "a.jp2", scenes.pixels(3, 40, 40), driver="JP2OpenJPEG"),
    ):
        whole = path.read_bytes()
        for length in range(0, min(len(whole), 700), 3):
            content = whole[:length]
            for sizes in declared_sizes(lambda offset, count, content=content: content[offset : offset + count]):
                assert sizes.width in (0, 40)


def tiff(width, height, *, samples=1, tile=None, directories=1):
    """A TIFF of nothing but directories."""
    entries = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (277, 3, 1, samples),
    ]
    if tile:
        entries += [(322, 3, 1, tile), (323, 3, 1, tile), (324, 4, 1, 0), (325, 4, 1, 0)]
    else:
        entries += [(273, 4, 1, 8), (278, 4, 1, 1), (279, 4, 1, 1)]
    size = 2 + 12 * len(entries) + 4
    content = b"II*\0" + struct.pack("<I", 8)
    for number in range(directories):
        following = 8 + (number + 1) * size if number + 1 < directories else 0
        content += struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
        content += struct.pack("<I", following)
    return content


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (tiff(300_000, 300_000, tile=512), r"90,000,000,000 pixels.*--max-pixels 90000000000"),
        (tiff(100, 100, samples=65535), "65,535 bands, more than 4,096"),
        (tiff(140_000, 140_000, tile=16), "76,562,500 blocks, more than 8,388,608"),
        (tiff(2**31 - 1, 1), "a side of 2,147,483,647 pixels"),
        (tiff(8, 8, directories=1200), "more than 1000 directories"),
    ],
)
def test_bombs_are_refused_by_their_header(tmp_path, content, said):
    (path := tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(SceneError, match=said):
        Scene.open(path)


def test_more_pixels_are_opened_where_the_user_says_so(tmp_path):
    path = scenes.write(tmp_path / "a.tif", scenes.pixels(3, 100, 100))
    with pytest.raises(SceneError, match="--max-pixels 10000 allows them"):
        Scene.open(path, max_pixels=9_999)
    assert Scene.open(path, max_pixels=10_000).width == 100
    with pytest.raises(OptionError, match="--max-pixels"):
        Scene.open(path, max_pixels=10_000, resolution=1)


def test_blocks_that_no_memory_holds(monkeypatch):
    monkeypatch.setattr("rsedge.runtime.scenes.headers.memory_available", lambda: 2**30)
    Sizes(width=10980, height=10980, bands=3, blocks=1, block_bytes=2**28).check("a", 2**40)
    with pytest.raises(SceneError, match=r"blocks of 0\.5 GiB, more than 0\.3 GiB \(a third of the free memory"):
        Sizes(width=10980, height=10980, bands=3, blocks=1, block_bytes=2**29).check("a", 2**40)
    monkeypatch.setattr("rsedge.runtime.scenes.headers.memory_available", lambda: 2**40)
    with pytest.raises(SceneError, match=r"blocks of 2\.0 GiB, more than 1\.0 GiB"):
        Sizes(width=10980, height=10980, bands=3, blocks=1, block_bytes=2**31).check("a", 2**40)


@pytest.mark.parametrize(
    ("format_", "options", "block"),
    [
        ("PNG", {}, 500 * 3),
        ("JPEG", {}, 500 * 3 * 16),
        ("JPEG", {"progressive": True}, 500 * 300 * 3 * 2),
        ("WEBP", {}, 500 * 300 * 8),
        ("WEBP", {"lossless": True}, 500 * 300 * 8),
        ("WEBP", {"exif": b"Exif\0\0"}, 500 * 300 * 8),
    ],
)
def test_sizes_of_formats_decoded_from_the_top(tmp_path, format_, options, block):
    path = tmp_path / "a"
    Image.fromarray(scenes.pixels(3, 300, 500).transpose(1, 2, 0)).save(path, format_, **options)
    [sizes] = sizes_of(path)
    assert (sizes.width, sizes.height, sizes.block_bytes, sizes.from_the_top) == (500, 300, block, True)
    with pytest.raises(SceneError, match="decoded from the top"):
        Scene.open(path, max_pixels=500 * 300 * 16 - 1)
    assert Scene.open(path, max_pixels=500 * 300 * 16).width == 500


def test_an_interlaced_png_is_decoded_whole():
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBB", 13, b"IHDR", 500, 300, 16, 2, 0, 0, 1)
    [sizes] = declared_sizes(lambda offset, length: head[offset : offset + length])
    assert sizes.block_bytes == 500 * 300 * 3 * 2


# ---- files beside a raster ----


def test_a_mask_beside_a_raster_is_read(tmp_path):
    mask = np.full((60, 70), 255, np.uint8)
    mask[:, :20] = 0
    path = scenes.write(tmp_path / "a.tif", scenes.pixels(3, 60, 70))
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(path, "r+") as dataset:
        dataset.write_mask(mask)
    assert (tmp_path / "a.tif.msk").exists()
    scene = Scene.open(path)
    assert str(tmp_path / "a.tif.msk") in scene.files
    with scene.reader() as reader:
        assert np.array_equal(reader.read(0, 0, 60, 70)[1], mask == 0)
        assert np.array_equal(reader.read(10, 15, 20, 30)[1], mask[10:30, 15:45] == 0)
    with Scene.open(path, resolution=20).reader() as reader:
        assert np.array_equal(reader.read(0, 0, 30, 35)[1], mask[::2, ::2] == 0)


def test_a_mask_of_another_format_or_size_is_named_and_not_read(tmp_path):
    path = scenes.write(tmp_path / "a.tif", scenes.pixels(3, 60, 70))
    scenes.write(tmp_path / "a.tif.msk", np.zeros((1, 30, 30), np.uint8))
    (warning,) = Scene.open(path).warnings
    assert "a.tif.msk is not used as a mask: it has 30 x 30 px" in warning
    (tmp_path / "a.tif.msk").write_text('<VRTDataset rasterXSize="70" rasterYSize="60"/>')
    (warning,) = Scene.open(path).warnings
    assert "is not used as a mask" in warning
    assert "VRT" in warning


def test_the_place_of_a_raster_may_stand_beside_it(tmp_path):
    path = scenes.write(tmp_path / "a.png", scenes.pixels(3, 60, 70), driver="PNG")
    beside = tmp_path / "a.png.aux.xml"
    assert {each.name for each in tmp_path.iterdir()} == {"a.png", beside.name}
    with rasterio.open(path) as dataset:
        expected = dataset.crs, dataset.transform
    scene = Scene.open(path)
    assert ((scene.crs, scene.transform), scene.warnings) == (expected, ())
    coarse = Scene.open(path, resolution=20)
    with coarse.reader() as reader, rasterio.open(path) as dataset:
        mean = dataset.read().reshape(3, 30, 2, 35, 2).mean(axis=(2, 4)).transpose(1, 2, 0)
        assert np.abs(reader.read(0, 0, 30, 35)[0] - mean).max() <= 0.5
    beside.unlink()
    (tmp_path / "a.pgw").write_text("10\n0\n0\n-10\n600005\n5099995\n")
    with rasterio.open(path) as dataset:
        assert Scene.open(path).transform == dataset.transform


@pytest.mark.parametrize("srs", ["/etc/x", "http://127.0.0.1:1/", "+proj=longlat +nadgrids=/etc/x", "ESRI::x"])
def test_a_place_beside_a_raster_names_nothing(tmp_path, srs):
    path = scenes.write(tmp_path / "a.png", scenes.pixels(3, 60, 70), driver="PNG")
    (tmp_path / "a.png.aux.xml").write_text(
        f"<PAMDataset><SRS>{srs}</SRS><GeoTransform>a,b</GeoTransform></PAMDataset>"
    )
    scene = Scene.open(path)
    assert (scene.crs, scene.transform.is_identity) == (None, True)


def test_sidecars_that_decide_something_else_are_named(tmp_path):
    path = scenes.write(tmp_path / "a.png", scenes.pixels(3, 60, 70), driver="PNG")
    beside = tmp_path / "a.png.aux.xml"
    stated = '<PAMRasterBand band="1"><NoDataValue>7</NoDataValue></PAMRasterBand></PAMDataset>'
    beside.write_text(beside.read_text().replace("</PAMDataset>", stated))
    [warning] = Scene.open(path).warnings
    assert "a.png.aux.xml is not read for them, and it states NoDataValue" in warning


# ---- what would pass the gate unjudged ----


def _box(kind, content):
    return struct.pack(">I4s", 8 + len(content), kind) + content


def _jp2(path, boxes=b"", marker=b""):
    """A JPEG 2000 file of 65,025 tiles with 255 bands, for which OpenJPEG takes gigabytes when it opens it."""
    side = 255 * 16
    sizes = struct.pack(">HHIIIIIIIIH", 38 + 3 * 255, 0, side, side, 0, 0, 16, 16, 0, 0, 255) + b"\7\1\1" * 255
    header = _box(b"ihdr", struct.pack(">IIHBBBB", side, side, 255, 7, 7, 0, 0)) + _box(b"colr", b"\1\0\0\0\0\0\20")
    start = _box(b"jP  ", b"\r\n\x87\n") + _box(b"ftyp", b"jp2 \0\0\0\0jp2 ") + _box(b"jp2h", header)
    path.write_bytes(start + boxes + _box(b"jp2c", b"\xff\x4f" + marker + b"\xff\x51" + sizes))
    return path


@pytest.mark.parametrize(
    ("boxes", "marker", "said"),
    [
        (b"", b"", "16,581,375 blocks"),
        (_box(b"free", b"") * 1001, b"", "more than 1000 boxes"),
        (b"", b"\xff\x30", "does not begin with its sizes"),
        (b"", b"\xff\x70\x00\x04\x00\x00", "does not begin with its sizes"),
    ],
)
def test_a_codestream_whose_sizes_are_not_found_is_refused(tmp_path, boxes, marker, said):
    with pytest.raises(SceneError, match=said):
        open_dataset(str(_jp2(tmp_path / "a.jp2", boxes, marker)))


def test_a_codestream_far_inside_a_member_is_refused(tmp_path):
    path = _jp2(tmp_path / "a.jp2", _box(b"free", bytes(2**20)))
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(path, "a.jp2")
    with pytest.raises(SceneError, match="more than 1 MiB behind its start"):
        open_dataset(f"/vsizip/{{{tmp_path / 'a.zip'}}}/a.jp2")


def test_directories_that_lie_in_each_other_are_counted_by_their_entries(tmp_path):
    count, directories = 65535, 100
    content = bytearray(b"II*\0" + struct.pack("<I", 8) + b"\xff\xff")
    content += struct.pack("<HHII", 33000, 4, 1, 0xFFFF0008) * (count + directories + 1)
    for number in range(directories):  # each begins 12 bytes behind the last
        struct.pack_into("<I", content, 10 + 12 * (number + count), 8 + 12 * (number + 1))
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(SceneError, match="more than 200000 entries"):
        open_dataset(str(tmp_path / "a.tif"))


@pytest.mark.parametrize(("tag", "said"), [((8, 1, 32767), "32,767 bands"), ((3, 1, 65535), "65,535 bands")])
def test_sizes_of_any_type_count_and_the_first_of_several(tag, said):
    tags = [(256, 3, 1, 8), (257, 3, 1, 8), (277, *tag), (277, 3, 1, 1)]
    content = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + b"".join(struct.pack("<HHII", *each) for each in tags)
    [sizes] = declared_sizes(lambda offset, length: (content + bytes(4))[offset : offset + length])
    with pytest.raises(SceneError, match=said):
        sizes.check("a.tif", 10**6)
