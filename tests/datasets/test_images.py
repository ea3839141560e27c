"""Every kind of image against Pillow, rasterio, or the runtime's own reading of the same file."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image

from rsedge.datasets.images import FileImage, decode
from rsedge.errors import SceneError
from rsedge.pixels import ReflectanceRule
from rsedge.runtime.scenes.scene import Scene
from tests.conftest import shared_data
from tests.scenes import pixels, truncate, write


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (9, 14, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("suffix", "options"),
    [("png", {}), ("jpg", {}), ("webp", {"lossless": True}), ("bmp", {}), ("tif", {}), ("gif", {})],
)
def test_colour_pictures_are_pillows(tmp_path: Path, suffix, options):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(picture()).save(path, **options)
    expected = np.asarray(Image.open(path).convert("RGB"))
    read = FileImage(path).read()
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, expected)
    np.testing.assert_array_equal(decode(path.read_bytes(), "x"), expected)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK"])
def test_other_modes_are_pillows(tmp_path: Path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.fromarray(picture()).convert(mode).save(path)
    np.testing.assert_array_equal(FileImage(path).read(), np.asarray(Image.open(path).convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation):
    turned = Image.fromarray(picture())
    exif = Image.Exif()
    exif[274] = orientation
    turned.save(tmp_path / "a.png", exif=exif)
    steps = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
             7: "TRANSVERSE", 8: "ROTATE_90"}  # fmt: skip
    if orientation > 1:
        turned = turned.transpose(Image.Transpose[steps[orientation]])
    np.testing.assert_array_equal(FileImage(tmp_path / "a.png").read(), np.asarray(turned))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_alpha_is_dropped_but_nothing_is_black(tmp_path: Path, suffix):
    colours = np.maximum(picture(), 1)
    alpha = np.full((9, 14, 1), 128, np.uint8)
    alpha[:3] = 0
    alpha[3:5] = 255
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.concatenate([colours, alpha], axis=2)).save(path)
    expected = colours.copy()
    expected[:3] = 0
    np.testing.assert_array_equal(FileImage(path).read(), expected)


def test_transparent_greys_and_palettes(tmp_path: Path):
    Image.fromarray(np.array([[[7, 255], [9, 0]]], np.uint8), "LA").save(tmp_path / "la.png")
    assert FileImage(tmp_path / "la.png").read().tolist() == [[[7] * 3, [0] * 3]]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "p.png", transparency=1)
    assert FileImage(tmp_path / "p.png").read().tolist() == [[[10, 20, 30], [0, 0, 0]]]


def test_16_bit_grey_pictures_keep_their_high_byte(tmp_path: Path):
    values = np.array([[0, 255, 256, 40000, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert FileImage(tmp_path / "a.png").read()[0, :, 0].tolist() == [0, 0, 1, 156, 255]


def test_reflectance_is_what_the_runtime_sees(tmp_path: Path):
    names = ("B08", "B02", "B03", "B04")
    path = write(tmp_path / "a.tif", pixels(4, 12, 17, "uint16"), descriptions=names, tags={})
    scene = Scene.open(path)
    with scene.reader() as reader:
        expected, _ = reader.read(0, 0, 12, 17)
    read = FileImage(path).read()
    np.testing.assert_array_equal(read, expected)
    with rasterio.open(path) as dataset:
        np.testing.assert_array_equal(read, ReflectanceRule().apply(dataset.read([4, 3, 2])).transpose(1, 2, 0))
    np.testing.assert_array_equal(decode(path.read_bytes(), "x"), expected)


@pytest.mark.parametrize(("count", "bands"), [(1, (0, 0, 0)), (3, (0, 1, 2)), (12, (3, 2, 1)), (13, (3, 2, 1))])
def test_bands_without_names_follow_custom(tmp_path: Path, count, bands):
    data = pixels(count, 6, 7, "uint16")
    path = write(tmp_path / "a.tif", data)
    expected = ReflectanceRule().apply(data[list(bands)]).transpose(1, 2, 0)
    np.testing.assert_array_equal(FileImage(path).read(), expected)


def test_eurosat_in_13_bands_looks_like_its_picture():
    folder = shared_data("eurosat/ms")
    for path in sorted(folder.glob("*.tif")):
        bands, jpeg = FileImage(path).read(), FileImage(path.with_suffix(".jpg")).read()
        assert np.corrcoef(bands[..., 0].ravel(), jpeg[..., 0].ravel())[0, 1] > 0.8


def test_a_picture_of_a_scene(tmp_path: Path):
    path = write(tmp_path / "a.tif", pixels(1, 5, 6))
    with rasterio.open(path) as dataset:
        np.testing.assert_array_equal(FileImage(path).read()[..., 2], dataset.read(1))


def test_what_cannot_be_told_is_refused(tmp_path: Path):
    path = write(tmp_path / "four.tif", pixels(4, 6, 7, "uint16"))
    with pytest.raises(SceneError, match=r"four\.tif: it is unclear which of its bands.*gdal_translate -b R -b G -b B"):
        FileImage(path).read()
    path = write(tmp_path / "wide.tif", pixels(3, 6, 7, "uint16").astype(np.int32))
    with pytest.raises(SceneError, match=r"wide\.tif is no image that rsedge reads.*int32.*-scale 0 1 0 10000"):
        FileImage(path).read()


def test_reflectance_as_floats_is_what_its_digital_numbers_are(tmp_path: Path):
    numbers = pixels(3, 6, 7, "uint16")
    whole = FileImage(write(tmp_path / "whole.tif", numbers)).read()
    floats = FileImage(write(tmp_path / "floats.tif", numbers.astype(np.float32) / 10000)).read()
    assert np.array_equal(floats, whole)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_truncated_files(tmp_path: Path, suffix):
    path = tmp_path / f"a.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    truncate(path, 0.6)
    with pytest.raises(SceneError, match=rf"a\.{suffix} "):
        FileImage(path).read()
    with pytest.raises(SceneError, match="upload 3"):
        decode(path.read_bytes(), "upload 3")


def test_files_that_are_no_images(tmp_path: Path):
    (tmp_path / "a.jpg").write_text("not found")
    (tmp_path / "empty.jpg").touch()
    for name, message in [
        ("a.jpg", "no image that rsedge reads"),
        ("empty.jpg", "no image"),
        ("no.jpg", "No such file"),
    ]:
        with pytest.raises(SceneError, match=message):
            FileImage(tmp_path / name).read()
    with pytest.raises(SceneError, match="cannot be read"):
        FileImage(tmp_path).read()


def test_sources_travel_to_workers(tmp_path: Path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    source = pickle.loads(pickle.dumps(FileImage(tmp_path / "a.png")))
    np.testing.assert_array_equal(source.read(), picture())


def test_small_files_of_large_images_are_not_decoded(tmp_path: Path, monkeypatch):
    sparse = {"width": 50_000, "height": 50_000, "count": 3, "dtype": "uint8", "driver": "GTiff", "SPARSE_OK": True}
    with rasterio.open(tmp_path / "a.tif", "w", tiled=True, BIGTIFF="YES", **sparse):
        pass
    assert (tmp_path / "a.tif").stat().st_size < 2**20
    with pytest.raises(SceneError, match=r"50000 x 50000 px of 8 bits, and at most 33554432 px are decoded"):
        FileImage(tmp_path / "a.tif").read()
    with pytest.raises(SceneError, match="upload 3 has 50000 x 50000 px"):
        decode((tmp_path / "a.tif").read_bytes(), "upload 3")
    monkeypatch.setattr("rsedge.datasets.images.MOST_BYTES", 50 * 50)
    Image.fromarray(np.zeros((51, 50, 3), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(SceneError, match="50 x 51 px of 8 bits, and at most 2500"):
        FileImage(tmp_path / "a.png").read()
    write(tmp_path / "b.tif", np.ones((3, 40, 40), np.uint16))
    with pytest.raises(SceneError, match="40 x 40 px of 16 bits, and at most 1250"):
        FileImage(tmp_path / "b.tif").read()


def test_images_within_other_bytes_pass_the_gate(tmp_path: Path):
    tags = [(256, 3, 1, 8), (257, 3, 1, 8), (277, 3, 1, 65535)]
    content = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + b"".join(struct.pack("<HHII", *each) for each in tags)
    with pytest.raises(SceneError, match=r"upload 3 is not opened: its header declares .* 65,535 bands"):
        decode(content + bytes(4), "upload 3")
