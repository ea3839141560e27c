"""What stored numbers become: floats, offsets that contradict the pixels, fill, clouds, other resolutions."""

import numpy as np
import pytest
import rasterio
import rasterio.warp
from rasterio.enums import Resampling
from rasterio.transform import from_origin

from bench.tci import measure
from rsedge.errors import OptionError, SceneError
from rsedge.pixels import ImageSize, ReflectanceRule
from rsedge.runtime.run.sources import SceneTiles, TileOptions
from rsedge.runtime.scenes.scene import Scene
from tests import scenes
from tests.conftest import shared_data

PLACE = {"crs": "EPSG:32633", "transform": from_origin(600000, 5100000, 10, 10)}
NAMES = ("B04", "B03", "B02")


def land(side: int = 64, seed: int = 0) -> np.ndarray:
    """Digital numbers of land, uint16 [3, side, side]."""
    return np.random.default_rng(seed).integers(200, 3500, (3, side, side)).astype(np.uint16)


def write(path, data, **options):
    return scenes.write(path, data, **{"descriptions": NAMES, **PLACE, **options})


def shown(scene: Scene) -> np.ndarray:
    with scene.reader() as reader:
        return reader.read(0, 0, scene.height, scene.width)[0]


def records(scene: Scene, **options) -> list:
    tiles = SceneTiles(scene, TileOptions(tile_size=32, **options))
    return [tile.record for segment in tiles.segments(0, [ImageSize(16)], "model@0") for tile in segment]


# ---- floats ----


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("values", "scale"), [("reflectance", 1e-4), ("dn", 1.0)])
def test_floats_look_like_the_digital_numbers_they_came_from(tmp_path, dtype, values, scale):
    dn = land()
    whole = Scene.open(write(tmp_path / "dn.tif", dn))
    floats = Scene.open(write(tmp_path / "float.tif", (dn * scale).astype(dtype)))
    assert floats.rendering.values == values
    assert np.array_equal(shown(floats), shown(whole))
    forced = Scene.open(tmp_path / "float.tif", pixel_values=values)
    assert forced.rule == floats.rule


def test_what_is_not_finite_has_no_data(tmp_path):
    data = (land() * 1e-4).astype("float32")
    data[1, :4, :5] = np.nan
    data[2, 10, 10] = np.inf
    data[:, 20, 20] = 0
    with Scene.open(write(tmp_path / "a.tif", data)).reader() as reader:
        rgb, empty = reader.read(0, 0, 64, 64)
    expected = ~np.isfinite(data).all(axis=0) | (data == 0).all(axis=0)
    assert np.array_equal(empty, expected)
    assert not rgb[expected].any()


def test_a_declared_value_of_floats(tmp_path):
    data = (land() * 1e-4).astype("float32")
    data[:, 5:9] = -9999
    scene = Scene.open(write(tmp_path / "a.tif", data, nodata=-9999))
    with scene.reader() as reader:
        assert np.array_equal(reader.read(0, 0, 64, 64)[1], (data == -9999).all(axis=0))
    assert scene.rendering.values == "reflectance"  # told from the others


@pytest.mark.parametrize(("dtype", "factor"), [("int16", 1), ("float32", 1), ("float32", 1e-4)])
def test_an_impossible_value_that_nothing_declares_is_no_data(tmp_path, dtype, factor):
    data = (land() * factor).astype(dtype)
    data[:, 5:9] = -9999
    data[0, 20] = -10 * factor  # dark water
    with Scene.open(write(tmp_path / "a.tif", data)).reader() as reader:
        assert np.array_equal(reader.read(0, 0, 64, 64)[1], (data == -9999).all(axis=0))


def test_values_that_fit_nothing_ask_the_user(tmp_path):
    path = write(tmp_path / "a.tif", land().astype("float32") * 1000)
    with pytest.raises(OptionError, match="--pixel-values"):
        Scene.open(path)
    assert Scene.open(path, pixel_values="dn").rendering.values == "dn"


def test_pixel_values_are_for_floats(tmp_path):
    with pytest.raises(OptionError, match="floating-point"):
        Scene.open(write(tmp_path / "a.tif", land()), pixel_values="dn")


# ---- offsets ----


def declared(path, offset: int):
    with rasterio.open(path, "r+") as dataset:
        for band in (1, 2, 3):
            dataset.update_tags(band, BOA_ADD_OFFSET=str(offset))
    return path


def test_an_offset_that_was_applied_already_is_not_applied_again(tmp_path):
    scene = Scene.open(declared(write(tmp_path / "a.tif", land()), -1000))
    assert scene.reflectance == ReflectanceRule(boa_offset=0)
    assert any("it was applied already" in warning for warning in scene.warnings)
    assert Scene.open(tmp_path / "a.tif", boa_offset=-1000).reflectance == ReflectanceRule(boa_offset=-1000)


def test_an_offset_that_fits_the_pixels_is_applied(tmp_path):
    scene = Scene.open(declared(write(tmp_path / "a.tif", land() + 1000), -1000))
    assert (scene.reflectance, scene.warnings) == (ReflectanceRule(boa_offset=-1000), ())


def test_dark_water_is_no_contradiction(tmp_path):
    noise = np.random.default_rng(0).normal(0, 60, (3, 64, 64))
    scene = Scene.open(declared(write(tmp_path / "a.tif", (1000 + noise).astype(np.uint16)), -1000))
    assert scene.reflectance == ReflectanceRule(boa_offset=-1000)


def test_the_name_tells_the_baseline(tmp_path):
    name = "S2A_MSIL2A_20230823T095559_N0509_R122_T34UCF_20230823T124759"
    scene = Scene.open(write(tmp_path / f"{name}.tif", land() + 1000))
    assert scene.reflectance == ReflectanceRule(boa_offset=-1000)
    assert (scene.product_id, scene.mgrs_tile) == (name, "34UCF")


def test_an_offset_that_nothing_declares_is_suspected(tmp_path):
    path = write(tmp_path / "T34UCF_20230823T095559.tif", land() + 1000)
    scene = Scene.open(path)
    assert scene.reflectance == ReflectanceRule()
    assert any("pass --boa-offset -1000" in warning for warning in scene.warnings)
    assert Scene.open(write(tmp_path / "T34UCF_20200823T095559.tif", land() + 1000)).warnings == ()


# ---- fill ----


@pytest.mark.parametrize("value", [0, 255])
def test_black_and_white_fill_is_low_content(tmp_path, value):
    data = np.random.default_rng(0).integers(1, 255, (3, 64, 64)).astype(np.uint8)
    data[:, :32, :24] = value
    scene = Scene.open(scenes.write(tmp_path / "a.tif", data, photometric="RGB", **PLACE))
    first, *rest = records(scene)
    assert (first.status, first.nodata_fraction) == ("nodata", 0.0)  # dark water is 0 too: it has data
    assert first.message == "low content: 75.00% of the pixels are pure black or white, more than 50.00%"
    assert {record.status for record in rest} == {"ok"}
    assert records(scene, max_nodata=0.8)[0].status == "ok"


def test_saturated_digital_numbers_are_fill(tmp_path):
    data = land()
    data[:, :, 32:] = 65535
    assert [record.status for record in records(Scene.open(write(tmp_path / "a.tif", data)))] == [
        "ok",
        "nodata",
        "ok",
        "nodata",
    ]


# ---- clouds ----


def classes(side: int = 32, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 12, (1, side, side)).astype(np.uint8)


def test_clouds_of_a_classification_at_half_the_resolution(tmp_path):
    scl = classes()
    scene_path = write(tmp_path / "a.tif", land())
    half = from_origin(600000, 5100000, 20, 20)
    scl_path = scenes.write(tmp_path / "scl.tif", scl, crs=PLACE["crs"], transform=half)
    full = np.kron(scl[0], np.ones((2, 2), np.uint8))
    for record in records(Scene.open(scene_path, scl=scl_path)):
        part = full[record.row_off : record.row_off + 32, record.col_off : record.col_off + 32]
        data = part != 0
        assert record.nodata_fraction == round(1 - data.mean(), 4)
        assert record.cloud_fraction == round(np.isin(part, (8, 9, 10)).sum() / data.sum(), 4)
    cloudy = records(Scene.open(scene_path, scl=scl_path), max_cloud=0.1)
    assert {record.status for record in cloudy} == {"cloud"}
    assert "are cloud, more than 10.00%" in cloudy[0].message


def test_any_raster_marks_clouds(tmp_path):
    mask = (classes() > 5).astype(np.uint8) * 255
    mask[0, 0, 0] = 7  # no data in it, so no cloud
    path = scenes.write(
        tmp_path / "m.tif", mask, nodata=7, crs=PLACE["crs"], transform=from_origin(600000, 5100000, 20, 20)
    )
    first = records(Scene.open(write(tmp_path / "a.tif", land()), cloud_mask=path))[0]
    assert first.cloud_fraction == round(float((mask[0, :16, :16] == 255).mean()), 4)
    assert first.nodata_fraction == 0


def test_a_mask_that_ends_early_says_nothing_beyond(tmp_path):
    scl = np.full((1, 8, 8), 9, np.uint8)
    path = scenes.write(tmp_path / "scl.tif", scl, crs=PLACE["crs"], transform=from_origin(600000, 5100000, 20, 20))
    found = records(Scene.open(write(tmp_path / "a.tif", land()), scl=path))
    assert [record.cloud_fraction for record in found] == [0.25, 0.0, 0.0, 0.0]
    assert {record.nodata_fraction for record in found} == {0.0}


def test_masks_that_do_not_fit_are_refused(tmp_path):
    scene = write(tmp_path / "a.tif", land())
    far = scenes.write(tmp_path / "far.tif", classes(), crs=PLACE["crs"], transform=from_origin(0, 0, 20, 20))
    other = scenes.write(tmp_path / "other.tif", classes(), crs="EPSG:32634", transform=PLACE["transform"])
    with pytest.raises(SceneError, match="covers no pixel of it"):
        Scene.open(scene, scl=far)
    with pytest.raises(SceneError, match="gdalwarp"):
        Scene.open(scene, cloud_mask=other)
    with pytest.raises(OptionError, match="give one"):
        Scene.open(scene, scl=far, cloud_mask=other)


# ---- resolution ----


@pytest.mark.parametrize(("resolution", "method"), [(20, "average"), (5, "bilinear"), (30, "average")])
def test_another_resolution_is_what_gdal_makes_of_it(tmp_path, resolution, method):
    path = write(tmp_path / "a.tif", land(60))
    scene = Scene.open(path, resolution=resolution)
    assert (scene.width, scene.height, scene.resampled) == (600 // resolution, 600 // resolution, method)
    assert scene.transform.a == resolution
    with rasterio.open(path) as dataset:
        out = np.empty((3, scene.height, scene.width), np.uint16)
        for band in (1, 2, 3):
            rasterio.warp.reproject(
                rasterio.band(dataset, band),
                out[band - 1],
                dst_transform=scene.transform,
                dst_crs=scene.crs,
                resampling=Resampling[method],
            )
    assert np.array_equal(shown(scene), ReflectanceRule().apply(out).transpose(1, 2, 0))
    assert Scene.open(path).identity() != scene.identity()


def test_resolution_needs_a_place_on_a_map(tmp_path):
    with pytest.raises(OptionError, match="no place on a map"):
        Scene.open(write(tmp_path / "a.tif", land(), crs=None, transform=None), resolution=20)
    with pytest.raises(OptionError, match="above 0"):
        Scene.open(write(tmp_path / "b.tif", land()), resolution=-1)


def test_holes_do_not_spread_when_pixels_are_averaged(tmp_path):
    data = land(60)
    data[:, :31] = 0
    with Scene.open(write(tmp_path / "a.tif", data, nodata=0), resolution=20).reader() as reader:
        rgb, empty = reader.read(0, 0, 30, 30)
    assert empty[:15].all()
    assert not empty[16:].any()
    assert not empty[15].any()  # half of it has data, and those pixels alone count
    assert np.array_equal(rgb[15], reader_of(data[:, 31:32].reshape(3, 30, 2)))


def reader_of(pairs: np.ndarray) -> np.ndarray:
    means = np.floor(pairs.mean(axis=2) + 0.5).astype(np.uint16)
    return ReflectanceRule().apply(means).T


# ---- the product's own picture ----


def test_the_rule_gives_the_true_colour_image_of_the_product():
    found = measure(shared_data("scenes/S2A_29RKH_20200219_L2A"))
    assert found["not_saturated"]["share_of_values"] > 0.5
    assert found["not_saturated"]["mean_absolute_difference"] < 0.6
    assert found["not_saturated"]["within_2"] > 0.97
    assert found["none_saturated_near"]["within_2"] > 0.99
