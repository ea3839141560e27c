"""Bad and odd rasters: a clear error or the right answer, in one process."""

from __future__ import annotations

import json
import os
import shutil
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.control import GroundControlPoint
from rasterio.rpc import RPC

from rsedge.errors import OptionError, RsedgeError, SceneError
from rsedge.runtime.run.pipeline import run
from rsedge.runtime.scenes.opening import open_scenes
from tests import scenes
from tests.fakes import FakeCaptioner
from tests.faults.machine import write_scene

SIZE = 16
BLOCKS = {"tiled": True, "blockxsize": 32, "blockysize": 32, "compress": "deflate", "photometric": "RGB"}


class Noting(FakeCaptioner):
    """A captioner that also keeps the images it sees."""

    def __init__(self) -> None:
        super().__init__(SIZE)
        self.seen: list[np.ndarray] = []

    def caption_tiles(self, images, keys, *tick):
        self.seen += list(images)
        return super().caption_tiles(images, keys, *tick)


def tiles(path, captioner=None, **options):
    """Records of a scene by their place, and the summary."""
    opened = open_scenes([path], **options)
    output = Path(path).absolute().parent / "records.geojsonl"
    try:
        summary = run(opened, captioner or Noting(), output, tile_size=SIZE, overwrite=True)
        records = [json.loads(line) for line in output.read_text().splitlines()]
    finally:
        output.unlink(missing_ok=True)
    return {(r["properties"]["row"], r["properties"]["col"]): r for r in records}, summary


def refused(path, *words, **options):
    with pytest.raises(RsedgeError) as caught:
        tiles(path, **options)
    message = str(caught.value)
    assert not [word for word in words if word not in message], message


def rgb(path, **options):
    return scenes.write(path, scenes.pixels(3, 96, 96), **{**BLOCKS, **options})


NO_RASTERS = {
    "empty.tif": (b"", "it is empty"),
    "pointer.tif": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
    "text.tif": (b"<html>404</html>", "none of"),
    "zeros.tif": (bytes(4096), "none of"),
    "magic.tif": (b"II*\0" + b"\xff" * 64, ""),
    "big.tif": (b"II+\0\x08\0\0\0" + b"\xff" * 64, ""),
    "picture.png": (b"\x89PNG\r\n\x1a\n" + bytes(64), ""),
    "jp2.jp2": (b"\0\0\0\x0cjP  \r\n\x87\n" + b"\xff" * 64, ""),
}


@pytest.mark.parametrize("name", NO_RASTERS)
def test_no_raster(tmp_path, name):
    content, word = NO_RASTERS[name]
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, name, "" if word == "none of" else word)


def test_nothing_to_open(tmp_path):
    refused(tmp_path / "missing.tif", "missing.tif", "does not exist")
    (tmp_path / "folder.tif").mkdir()
    refused(tmp_path / "folder.tif", "folder.tif")
    os.mkfifo(tmp_path / "pipe.tif")
    refused(tmp_path / "pipe.tif", "pipe.tif")
    if os.geteuid():  # root reads everything
        path = rgb(tmp_path / "closed.tif")
        path.chmod(0)
        refused(path, "closed.tif", "permission")


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    path = rgb(tmp_path_factory.mktemp("intact") / "scene.tif")
    return path, tiles(path)[0]


def same_or_unreadable(path, intact, some=True):
    """Every tile has the caption of the intact file or is a read error; both kinds occur if ``some``."""
    found, summary = tiles(path)
    assert found.keys() == intact.keys()
    unreadable = 0
    for place, record in found.items():
        if record["properties"]["status"] == "read_error":
            unreadable += 1
            assert record["properties"]["caption"] is None
            assert record["properties"]["message"]
        else:
            assert record == intact[place]
    assert summary.read_errors == unreadable
    assert len(summary.unread) == (1 if unreadable else 0)
    if some:
        assert 0 < unreadable < len(found)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.99])
def test_truncated(tmp_path, intact, share):
    path = Path(shutil.copy(intact[0], tmp_path / "scene.tif"))
    same_or_unreadable(scenes.truncate(path, share), intact[1])


@pytest.mark.parametrize("seed", range(4))
def test_bits_flipped_in_compressed_blocks(tmp_path, intact, seed):
    content = bytearray(intact[0].read_bytes())
    generator = np.random.default_rng(seed)
    for place in generator.integers(len(content) // 2, len(content) - 100, 3).tolist():
        content[place] ^= 1 << int(generator.integers(8))
    path = tmp_path / "scene.tif"
    path.write_bytes(content)
    same_or_unreadable(path, intact[1])


def test_zeroed_blocks(tmp_path, intact):
    content = bytearray(intact[0].read_bytes())
    with rasterio.open(intact[0]) as dataset:
        first, size = (int(dataset.get_tag_item(f"BLOCK_{what}_1_1", "TIFF", bidx=1)) for what in ("OFFSET", "SIZE"))
    content[first : first + size] = bytes(size)
    path = tmp_path / "scene.tif"
    path.write_bytes(content)
    same_or_unreadable(path, intact[1])


@pytest.mark.parametrize("suffix", [".aux.xml", ".ovr", ".msk"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe<PAMDataset>", b"II*\0" + b"\xff" * 64])
def test_broken_sidecars(tmp_path, intact, suffix, content):
    path = Path(shutil.copy(intact[0], tmp_path / "scene.tif"))
    path.with_name(path.name + suffix).write_bytes(content)
    assert tiles(path)[0] == intact[1]


def seen_pixels(path, **options):
    """The pixels that the captioner sees of a scene of one tile."""
    captioner = Noting()
    found, _ = tiles(path, captioner, **options)
    assert [record["properties"]["status"] for record in found.values()] == ["ok"]
    return captioner.seen[0]


def test_bands_of_any_number(tmp_path):
    for count in (1, 2, 5, 12):
        data = scenes.pixels(count, SIZE, SIZE)
        path = scenes.write(tmp_path / f"{count}.tif", data)
        if count > 2:
            assert (seen_pixels(path, bands=(3, 2, 1)) == data[[2, 1, 0]].transpose(1, 2, 0)).all()
        try:
            assert (seen_pixels(path) == data[:1].transpose(1, 2, 0)).all()  # grey
        except (SceneError, OptionError) as error:
            assert "band" in str(error)  # noqa: PT017 - either is right


def test_odd_types(tmp_path):
    data = scenes.pixels(3, SIZE, SIZE)
    colours = {index: (index, 255 - index, 7, 255) for index in range(256)}
    path = scenes.write(tmp_path / "palette.tif", data[:1], colormap=colours)
    expected = np.array([colours[value][:3] for value in data[0].ravel().tolist()]).reshape(SIZE, SIZE, 3)
    assert (seen_pixels(path) == expected).all()

    alpha = np.full((1, SIZE, SIZE), 255, np.uint8)
    alpha[0, :4] = 0
    path = scenes.write(tmp_path / "alpha.tif", np.concatenate([data, alpha]), photometric="RGB", alpha="yes")
    image = seen_pixels(path)
    assert (image[4:] == data[:, 4:].transpose(1, 2, 0)).all()
    assert (image[:4] == 0).all()

    for name, values, options in (
        ("complex", data.astype(np.complex64), {}),
        ("complex16", data.astype(np.complex64), {"dtype": "complex_int16"}),
    ):
        refused(scenes.write(tmp_path / f"{name}.tif", values, **options), name)

    bits = data[:1] & 1
    image = seen_pixels(scenes.write(tmp_path / "bits.tif", bits, nbits=1))
    assert (image == 255 * bits.transpose(1, 2, 0)).all()

    cmyk = scenes.pixels(4, SIZE, SIZE)
    ink = cmyk.astype(int)
    expected = (255 - ink[:3]) * (255 - ink[3]) / 255
    image = seen_pixels(scenes.write(tmp_path / "cmyk.tif", cmyk, photometric="CMYK"))
    assert np.abs(image - expected.transpose(1, 2, 0)).max() <= 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none(tmp_path, value):
    data = scenes.pixels(3, SIZE, 2 * SIZE, "float32") / 10000
    data[:, :, :SIZE] = value
    found, _ = tiles(scenes.write(tmp_path / "a.tif", data), pixel_values="reflectance", bands=(1, 2, 3))
    assert [found[0, col]["properties"]["status"] for col in (0, 1)] == ["nodata", "ok"]


def test_a_palette_without_colours(tmp_path):
    """Found by fuzzing: GDAL calls such a band a palette and has no colour table of it."""
    path = scenes.write(tmp_path / "p.tif", scenes.pixels(1, 20, 20), colormap={1: (9, 8, 7, 255)})
    data = path.read_bytes()
    place = data.index(struct.pack("<HH", 320, 3))  # the tag ColorMap, of shorts
    path.write_bytes(data[:place] + struct.pack("<HH", 65000, 3) + data[place + 4 :])
    with pytest.raises(SceneError, match="palette"):
        open_scenes([str(path)])


def test_small(tmp_path):
    path = scenes.write(tmp_path / "one.tif", scenes.pixels(3, 1, 1), photometric="RGB")
    found, _ = tiles(path)
    assert found[0, 0]["properties"]["status"] in {"ok", "nodata"}
    with rasterio.open(path) as dataset:
        expected = rasterio.warp.transform_bounds(dataset.crs, "EPSG:4326", *dataset.bounds)
    corners = np.array(found[0, 0]["geometry"]["coordinates"][0])
    np.testing.assert_allclose([*corners.min(axis=0), *corners.max(axis=0)], expected, atol=1e-6)


def test_no_place_gives_no_footprint(tmp_path):
    data = scenes.pixels(3, 20, 20)
    plain = scenes.write(tmp_path / "plain.tif", data, crs=None, transform=None, photometric="RGB")
    points = scenes.write(tmp_path / "points.tif", data, crs=None, transform=None, photometric="RGB")
    rational = scenes.write(tmp_path / "rpc.tif", data, crs=None, transform=None, photometric="RGB")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(points, "r+") as dataset:
            corners = ((0, 0, 11, 47), (0, 20, 11.1, 47), (20, 0, 11, 46.9))
            dataset.gcps = [GroundControlPoint(*corner, 0) for corner in corners], "EPSG:4326"
        with rasterio.open(rational, "r+") as dataset:
            numbers = [1.0] + [0.0] * 19
            dataset.rpcs = RPC(0, 1, 47, 1, numbers, numbers, 10, 10, 11, 1, numbers, numbers, 10, 10)
    for path in (plain, points, rational):
        found, summary = tiles(path)
        assert {record["geometry"] is None for record in found.values()} == {True}
        assert any("no geometry" in warning for warning in summary.warnings)


@pytest.mark.parametrize(
    "name", ["größe 🛰.tif", "line\nfeed.tif", "-dash.tif", "x" * 246 + ".tif", "a'b\"c;d$(e).tif", "%41.tif"]
)
def test_odd_names(tmp_path, intact, name):
    path = Path(shutil.copy(intact[0], tmp_path / name))
    found, _ = tiles(path)
    assert [record["properties"]["status"] for record in found.values()] == ["ok"] * 36


def test_names_that_are_no_text(tmp_path, intact):
    raw = os.fsencode(tmp_path) + b"/\xff.tif"
    shutil.copy(intact[0], raw)
    refused(os.fsdecode(raw), "not UTF-8")


def replaced_bytes(path, old, new):
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    return path


def test_texts_that_are_no_utf_8(tmp_path):
    data = scenes.pixels(3, SIZE, SIZE)
    named = scenes.write(tmp_path / "a.tif", data, descriptions=("redred", "green", "blue"))
    refused(replaced_bytes(named, b"redred", b"re\xff\xfeed"), "a.tif", "not UTF-8")
    placed = scenes.write(tmp_path / "b.tif", data, photometric="RGB")
    noted = scenes.write(tmp_path / "c.tif", data, photometric="RGB", tags={"NOTE": "marker"})
    for path in (replaced_bytes(placed, b"WGS 84", b"WG\xff 84"), replaced_bytes(noted, b"marker", b"mar\xffer")):
        record = tiles(path)[0][0, 0]
        assert (record["properties"]["status"], record["properties"]["scene_crs"]) == ("ok", "EPSG:32632")
    vrt = tmp_path / "a.vrt"
    vrt.write_bytes(b'<VRTDataset rasterXSize="1" rasterYSize="1"><!-- \xff\xfe --></VRTDataset>')
    refused(vrt, "a.vrt", allow_vrt=True)


def test_changed_or_removed_during_the_run(tmp_path):
    first, gone = write_scene(tmp_path / "first.tif", 192), write_scene(tmp_path / "gone.tif", 32)
    last = write_scene(tmp_path / "last.tif", 32)
    opened = open_scenes([first, gone, last])
    changes = []

    def change(progress):
        if not changes and progress.tiles_done >= 64:
            os.utime(first, ns=(1, 1))
            gone.unlink()
            changes.append(progress)

    output = tmp_path / "out.csv"
    summary = run(opened, FakeCaptioner(SIZE), output, tile_size=SIZE, progress=change)
    assert changes
    assert [line.split(":")[0].rsplit("/")[-1] for line in summary.unread] == ["first.tif", "gone.tif"]
    assert "changed while it was read" in summary.unread[0]
    assert "does not exist" in summary.unread[1]
    assert (summary.tiles, summary.read_errors, summary.ok) == (144 + 4 + 4, 80 + 4, 64 + 4)


def test_one_scene_among_many_fails(tmp_path, intact):
    paths = [Path(shutil.copy(intact[0], tmp_path / f"{number}.tif")) for number in range(5)]
    scenes.truncate(paths[2], 0.6)
    summary = run(open_scenes(paths), FakeCaptioner(SIZE), tmp_path / "out.csv", tile_size=SIZE)
    assert [line.split(": ")[0] for line in summary.unread] == [str(paths[2])]
    assert summary.ok == 36 * 5 - summary.read_errors > 36 * 4
