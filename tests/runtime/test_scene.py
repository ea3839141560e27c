from __future__ import annotations

import os

import numpy as np
import pytest
import rasterio
import rasterio.rpc
import rasterio.shutil

from rsedge.errors import OptionError, SceneError
from rsedge.pixels import ReflectanceRule
from rsedge.runtime.scenes.scene import Scene
from tests import scenes
from tests.conftest import shared_data


def read(scene: Scene):
    with scene.reader() as reader:
        return reader.read(0, 0, scene.height, scene.width)


# ---- which bands ----


@pytest.mark.parametrize(
    ("descriptions", "expected"),
    [
        (("B02", "B03", "B04", "B08"), (3, 2, 1)),
        (("b8", "b4", "b3", "b2"), (2, 3, 4)),
        (("Blue", "Green", "Red", "Red edge 1"), (3, 2, 1)),
        (
            ("B4, central wavelength 665 nm", "B3, central wavelength 560 nm", "B2, central wavelength 490 nm", "B8"),
            (1, 2, 3),
        ),
        (("TCI_R", "TCI_G", "TCI_B", "nir"), (1, 2, 3)),
    ],
)
def test_bands_by_description(tmp_path, descriptions, expected):
    scene = Scene.open(scenes.write(tmp_path / "a.tif", scenes.pixels(4, 8, 9, "uint16"), descriptions=descriptions))
    assert scene.bands == expected
    assert "description" in scene.bands_reason or "wavelength" in scene.bands_reason


def test_descriptions_win_over_colours(tmp_path):
    path = scenes.write(
        tmp_path / "a.tif", scenes.pixels(3, 8, 9), photometric="RGB", descriptions=("B02", "B03", "B04")
    )
    assert Scene.open(path).bands == (3, 2, 1)
    assert Scene.open(path, bands=(1, 2, 3)).bands == (1, 2, 3)


def test_ambiguous_descriptions_do_not_count(tmp_path):
    path = scenes.write(
        tmp_path / "a.tif", scenes.pixels(4, 8, 9), photometric="RGB", descriptions=("B04", "B03", "B02", "B4")
    )
    assert "colour" in Scene.open(path).bands_reason


def test_bands_by_colour(tmp_path):
    scene = Scene.open(scenes.write(tmp_path / "a.tif", scenes.pixels(3, 8, 9), photometric="RGB"))
    assert scene.bands == (1, 2, 3)
    assert "colour" in scene.bands_reason


def test_palette_is_expanded(tmp_path):
    data = np.array([[[0, 1, 2], [2, 1, 0]]], dtype=np.uint8)
    colours = {0: (10, 20, 30, 255), 1: (200, 100, 50, 255), 2: (0, 255, 0, 255)}
    scene = Scene.open(scenes.write(tmp_path / "a.tif", data, photometric="palette", colormap=colours))
    rgb, empty = read(scene)
    np.testing.assert_array_equal(rgb, [[colours[int(value)][:3] for value in line] for line in data[0]])
    assert not empty.any()
    assert "palette" in scene.bands_reason


def test_single_grey_band_is_replicated(tmp_path):
    data = scenes.pixels(1, 8, 9)
    scene = Scene.open(scenes.write(tmp_path / "a.tif", data))
    np.testing.assert_array_equal(read(scene)[0], np.repeat(data.transpose(1, 2, 0), 3, axis=2))
    assert "grey" in scene.bands_reason


def test_unclear_bands_say_what_was_found(tmp_path):
    path = scenes.write(
        tmp_path / "a.tif", scenes.pixels(4, 8, 9, "uint16"), descriptions=("one", "two", "three", "four")
    )
    with pytest.raises(SceneError, match=r"1 \(one, gray\).*--bands R,G,B"):
        Scene.open(path)


@pytest.mark.parametrize("bands", [(1, 2), (1, 2, 5), (0, 1, 2), ()])
def test_bands_out_of_range(tmp_path, bands):
    path = scenes.write(tmp_path / "a.tif", scenes.pixels(4, 8, 9))
    with pytest.raises(OptionError, match="from 1 to 4"):
        Scene.open(path, bands=bands)


# ---- pixels ----


def test_bytes_come_as_they_are(tmp_path):
    data = scenes.pixels(5, 20, 30)
    data[:, 3:5, 3:5] = 0  # black, not missing: nothing declares a no-data value
    rgb, empty = read(Scene.open(scenes.write(tmp_path / "a.tif", data), bands=(3, 1, 2)))
    np.testing.assert_array_equal(rgb, data[[2, 0, 1]].transpose(1, 2, 0))
    assert not empty.any()
    assert rgb.flags.c_contiguous


@pytest.mark.parametrize("boa_offset", [0, -1000])
def test_reflectance_follows_the_rule(tmp_path, boa_offset):
    data = scenes.pixels(3, 20, 30, "uint16")
    data[:, :4] = 0
    data[0, 10] = 0  # one band alone is dark, not missing
    scene = Scene.open(scenes.write(tmp_path / "a.tif", data), bands=(1, 2, 3), boa_offset=boa_offset)
    rgb, empty = read(scene)
    expected = ReflectanceRule(boa_offset=boa_offset).apply(data).transpose(1, 2, 0).copy()
    expected[:4] = 0
    np.testing.assert_array_equal(rgb, expected)
    assert empty[:4].all()
    assert not empty[4:].any()
    assert scene.rule == ReflectanceRule(boa_offset=boa_offset).describe()


@pytest.mark.parametrize("dtype", ["uint32", "int32", "complex64"])
def test_other_types_are_refused_with_a_remedy(tmp_path, dtype):
    path = scenes.write(tmp_path / "a.tif", np.ones((3, 8, 9), dtype), descriptions=("red", "green", "blue"))
    with pytest.raises(SceneError, match=f"{dtype}.*gdal_translate .* -b 1 -b 2 -b 3"):
        Scene.open(path)


def test_every_problem_at_once(tmp_path):
    with pytest.raises(SceneError, match=r"unclear which bands.*int32"):
        Scene.open(scenes.write(tmp_path / "a.tif", np.ones((4, 8, 9), "int32")))


def test_offset_for_bytes_is_refused(tmp_path):
    with pytest.raises(OptionError, match="boa_offset -1000"):
        Scene.open(scenes.write(tmp_path / "a.tif", scenes.pixels(3, 8, 9), photometric="RGB"), boa_offset=-1000)


# ---- no data ----


def test_declared_nodata_needs_all_three_bands(tmp_path):
    data = scenes.pixels(3, 8, 9)
    data[:, 0], data[:2, 1] = 7, 7
    data[2, 1] = 9
    rgb, empty = read(Scene.open(scenes.write(tmp_path / "a.tif", data, photometric="RGB", nodata=7)))
    assert empty[0].all()
    assert not empty[1].any()
    assert not rgb[0].any()
    assert rgb[1].all()


def test_given_nodata_replaces_the_declared(tmp_path):
    data = scenes.pixels(3, 8, 9)
    data[:, 0], data[:, 1] = 7, 3
    scene = Scene.open(scenes.write(tmp_path / "a.tif", data, photometric="RGB", nodata=7), nodata=3)
    _, empty = read(scene)
    assert not empty[0].any()
    assert empty[1].all()


@pytest.mark.parametrize("nodata", [-9999, 256, 0.5, float("nan")])
def test_impossible_nodata_is_refused(tmp_path, nodata):
    with pytest.raises(OptionError, match="0 to 255"):
        Scene.open(scenes.write(tmp_path / "a.tif", scenes.pixels(3, 8, 9), photometric="RGB"), nodata=nodata)


def test_alpha_band(tmp_path):
    data = scenes.pixels(4, 8, 9)
    data[3] = 255
    data[3, 2:4] = 0
    scene = Scene.open(scenes.write(tmp_path / "a.tif", data, photometric="RGB", alpha="yes"))
    rgb, empty = read(scene)
    np.testing.assert_array_equal(empty, data[3] == 0)
    np.testing.assert_array_equal(rgb, np.where(empty[..., None], 0, data[:3].transpose(1, 2, 0)))


@pytest.mark.parametrize("description", ["NIR", "B08"])
def test_infrared_that_gdal_calls_alpha_is_no_mask(tmp_path, description):
    data = scenes.pixels(4, 8, 9)
    data[3] = 0
    names = ("red", "green", "blue", description)
    path = scenes.write(tmp_path / "a.tif", data, photometric="RGB", alpha="yes", descriptions=names)
    assert not read(Scene.open(path))[1].any()
    assert not read(Scene.open(path, bands=(4, 1, 2)))[1].any()


def test_internal_mask(tmp_path):
    mask = np.full((8, 9), 255, np.uint8)
    mask[:, 5:] = 0
    path = scenes.write(tmp_path / "a.tif", scenes.pixels(3, 8, 9), photometric="RGB", mask=mask)
    np.testing.assert_array_equal(read(Scene.open(path))[1], mask == 0)


# ---- what it says of itself ----


@pytest.mark.parametrize(
    ("name", "tags", "expected"),
    [
        ("S2A_MSIL2A_20200219T112111_N0214_R037_T29RKH_20200219T123947.tif", {}, "2020-02-19T11:21:11Z"),
        ("T34UCF_20230823T095559_TCI_10m.tif", {}, "2023-08-23T09:55:59Z"),
        ("S2A_29RKH_20200219_0_L2A.tif", {}, "2020-02-19T00:00:00Z"),
        ("naip_m_4709963_se_14_1_20100629.tif", {}, None),
        ("S2A_99999999.tif", {}, None),
        ("a.tif", {"TIFFTAG_DATETIME": "2021:03:04 05:06:07"}, "2021-03-04T05:06:07Z"),
        ("a.tif", {"ACQUISITIONDATETIME": "2021-03-04 05:06:07"}, "2021-03-04T05:06:07Z"),
        ("a.tif", {"PRODUCT_START_TIME": "2015-12-31T23:59:59.999Z"}, "2015-12-31T23:59:59.999Z"),
        # A program wrote the file in 2024; the name knows when it was taken.
        ("T34UCF_20230823T095559.tif", {"TIFFTAG_DATETIME": "2024:01:01 00:00:00"}, "2023-08-23T09:55:59Z"),
        ("a.tif", {"TIFFTAG_DATETIME": "yesterday"}, None),
    ],
)
def test_acquisition_time(tmp_path, name, tags, expected):
    path = scenes.write(tmp_path / name, scenes.pixels(3, 8, 9), photometric="RGB", tags=tags)
    assert Scene.open(path).datetime == expected


def test_identity_follows_file_and_options(tmp_path):
    path = scenes.write(tmp_path / "a.b.tif", scenes.pixels(3, 8, 9, "uint16"))
    scene = Scene.open(path, bands=(1, 2, 3))
    assert scene.name == "a.b"
    assert scene.identity() == Scene.open(path, bands=(1, 2, 3)).identity()
    for other in ({"bands": (3, 2, 1)}, {"bands": (1, 2, 3), "boa_offset": -1000}, {"bands": (1, 2, 3), "nodata": 5}):
        assert Scene.open(path, **other).identity() != scene.identity()
    before = scene.identity()
    scenes.write(path, scenes.pixels(3, 8, 10, "uint16"))
    assert scene.identity() != before


def test_identity_of_a_lost_file(tmp_path):
    path = scenes.write(tmp_path / "a.tif", scenes.pixels(3, 8, 9))
    scene = Scene.open(path)
    path.unlink()
    with pytest.raises(SceneError, match="cannot be read"):
        scene.identity()


def test_context_manager(tmp_path):
    with Scene.open(scenes.write(tmp_path / "a.tif", scenes.pixels(3, 8, 9))) as scene:
        assert (scene.width, scene.height) == (9, 8)


# ---- what cannot be opened ----


@pytest.mark.parametrize(
    "path",
    ["https://example.com/a.tif", "s3://bucket/a.tif", "/vsicurl/https://example.com/a.tif", "/vsis3/b/a.tif"],
)
def test_remote_paths(path):
    with pytest.raises(OptionError, match="--allow-remote"):
        Scene.open(path)


def test_missing_file():
    with pytest.raises(SceneError, match=r"nowhere\.tif does not exist"):
        Scene.open("nowhere.tif")


def test_no_raster(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("hello")
    with pytest.raises(SceneError, match="cannot be opened as a raster"):
        Scene.open(path)


def test_folders(tmp_path):
    with pytest.raises(SceneError, match="folder without scenes"):
        Scene.open(tmp_path)
    safe = tmp_path / "S2A.SAFE"
    safe.mkdir()
    with pytest.raises(SceneError, match="no product metadata"):
        Scene.open(safe)


def test_a_subdataset_of_a_tiff_is_read_by_its_name(tmp_path):
    first, second = scenes.pixels(3, 8, 9), scenes.pixels(3, 8, 9, seed=1)
    path = scenes.write(tmp_path / "a.tif", first)
    scenes.write(path, second, append_subdataset=True)
    scene = Scene.open(f"GTIFF_DIR:2:{path}")
    with scene.reader() as reader:
        assert np.array_equal(reader.read(0, 0, 8, 9)[0], second.transpose(1, 2, 0))


def test_formats_that_refer_to_other_files_are_refused(tmp_path):
    path = scenes.write(tmp_path / "a.gpkg", scenes.pixels(3, 8, 9), driver="GPKG")
    with pytest.raises(SceneError, match=r"none of TIFF, JPEG 2000, PNG, JPEG and WebP; gdal_translate"):
        Scene.open(path)


# ---- real scenes ----


def test_true_colour_image():
    scene = Scene.open(shared_data("scenes/S2A_29RKH_20200219_L2A/TCI.tif"))
    assert (scene.bands, scene.dtype, scene.crs.to_epsg()) == ((1, 2, 3), "uint8", 32629)


def test_naip_is_known_by_its_name():
    scene = Scene.open(shared_data("scenes/naip_m_4709963_se_14_1_20100629.tif"))
    assert (scene.bands, scene.width) == ((1, 2, 3), 934)
    assert "NAIP" in scene.bands_reason


def test_colours_stored_as_floats():
    scene = Scene.open(path := shared_data("scenes/wildfire_float64_5band.tif"))
    assert (scene.bands, scene.rule) == ((1, 2, 3), "uint8 as stored")
    with rasterio.open(path) as dataset, scene.reader() as reader:
        expected = np.floor(dataset.read([1, 2, 3]) + 0.5).transpose(1, 2, 0)
        assert np.array_equal(reader.read(0, 0, scene.height, scene.width)[0], expected)


def test_a_vrt_is_another_scene_once_its_source_changed(tmp_path):
    source = scenes.write(tmp_path / "source.tif", scenes.pixels(3, 40, 40))
    vrt = tmp_path / "view.vrt"
    rasterio.shutil.copy(source, vrt, driver="VRT")
    before = Scene.open(vrt, allow_vrt=True).identity()
    scenes.write(source, scenes.pixels(3, 40, 40, seed=4))
    assert Scene.open(vrt, allow_vrt=True).identity() != before


def test_a_16_bit_palette_is_colours_not_reflectance(tmp_path):
    indexes = np.random.default_rng(0).integers(0, 3, (1, 20, 20)).astype(np.uint16)
    colours = {0: (10, 20, 30, 255), 1: (200, 100, 50, 255), 2: (1, 2, 3, 255)}
    scene = Scene.open(scenes.write(tmp_path / "palette.tif", indexes, colormap=colours))
    assert scene.rule == "uint8 as stored"
    with scene.reader() as reader:
        rgb, _ = reader.read(0, 0, 20, 20)
    np.testing.assert_array_equal(rgb, np.array([colours[i][:3] for i in indexes.ravel()]).reshape(20, 20, 3))


def test_the_offset_may_be_declared_as_gdal_scale_and_offset(tmp_path):
    pixels = np.maximum(scenes.pixels(3, 20, 20, "uint16"), 1000)
    path = scenes.write(tmp_path / "scaled.tif", pixels, descriptions=("B04", "B03", "B02"))
    with rasterio.open(path, "r+") as dataset:
        dataset.scales, dataset.offsets = (1e-4,) * 3, (-0.1,) * 3
    assert Scene.open(path).reflectance == ReflectanceRule(boa_offset=-1000)
    with rasterio.open(path, "r+") as dataset:
        for band in (1, 2, 3):
            dataset.update_tags(band, BOA_ADD_OFFSET="-500.0")
    assert Scene.open(path).reflectance == ReflectanceRule(boa_offset=-500)
    with rasterio.open(path, "r+") as dataset:
        for band in (1, 2, 3):
            dataset.update_tags(band, BOA_ADD_OFFSET="none")
    with pytest.raises(SceneError, match="'none', which is no number: pass --boa-offset"):
        Scene.open(path)


EARTH_ENGINE = (
    *("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B11", "B12", "AOT", "WVP", "SCL"),
    *("TCI_R", "TCI_G", "TCI_B", "MSK_CLDPRB", "QA10", "QA20", "QA60"),
)


def write_export(path, dtype, factor=1.0):
    """All bands of an image of Earth Engine's S2_SR_HARMONIZED, SCL 9 throughout."""
    data = scenes.pixels(len(EARTH_ENGINE), 32, 32, "uint16").astype("float64")
    data[EARTH_ENGINE.index("SCL")] = 9
    return scenes.write(path, (data * factor).astype(dtype), descriptions=tuple(EARTH_ENGINE))


def test_an_export_with_bands_true_colour_and_classes(tmp_path):
    scene = Scene.open(write_export(tmp_path / "20230823T095559_20230823T095553_T34UCF.tif", "uint16"))
    assert scene.bands == (4, 3, 2)
    assert scene.mgrs_tile == "34UCF"
    assert scene.datetime == "2023-08-23T09:55:59Z"
    with scene.reader() as reader:
        assert reader.read_pixels(0, 0, 32, 32).cloud.all()


def test_an_export_as_floats_is_read_and_its_classes_are_not(tmp_path):
    scene = Scene.open(write_export(tmp_path / "export.tif", "float32", 1e-4))
    assert (scene.bands, scene.rendering.values, scene.clouds) == ((4, 3, 2), "reflectance", None)
    assert "band 15 (SCL) is float32" in scene.warnings[-1]
    assert "gdal_translate -b 15" in scene.warnings[-1]


def test_a_true_colour_image_by_its_channels(tmp_path):
    path = scenes.write(tmp_path / "a.tif", scenes.pixels(3, 8, 8), descriptions=("TCI_B", "TCI_G", "TCI_R"))
    assert Scene.open(path).bands == (3, 2, 1)


@pytest.mark.parametrize(("dtype", "cloud", "nodata"), [("int16", -1, None), ("uint16", 300, 65535), ("uint8", 1, 255)])
def test_masks_of_any_integers(tmp_path, dtype, cloud, nodata):
    mask = np.zeros((1, 8, 8), dtype)
    mask[:, :4] = cloud
    mask[:, 6:] = 0 if nodata is None else nodata
    given = scenes.write(tmp_path / "mask.tif", mask, nodata=nodata)
    scene = Scene.open(scenes.write(tmp_path / "a.tif", scenes.pixels(3, 8, 8)), cloud_mask=given)
    with scene.reader() as reader:
        assert np.array_equal(reader.read_pixels(0, 0, 8, 8).cloud, mask[0] == cloud)


def test_rational_polynomials_alone_are_no_place(tmp_path):
    path = scenes.write(tmp_path / "a.tif", scenes.pixels(3, 8, 8), crs=None, transform=None)
    ones = [1.0] * 20
    with rasterio.open(path, "r+") as dataset:
        dataset.rpcs = rasterio.rpc.RPC(0, 1, 45, 1, ones, ones, 10, 1, 4, 4, ones, ones, 4, 4)
    scene = Scene.open(path)
    assert scene.crs_name == "pixel"
    assert "gdalwarp -rpc" in scene.warnings[0]


def test_a_name_that_is_not_utf8(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.tif")
    scenes.write(tmp_path / "a.tif", scenes.pixels(3, 8, 8)).rename(path)
    with pytest.raises(SceneError, match=r"caf�\.tif is a name that is not UTF-8.*rename"):
        Scene.open(path)
