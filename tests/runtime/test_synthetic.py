from __future__ import annotations

import numpy as np
import pytest
import rasterio

from rsedge.pixels import ReflectanceRule
from rsedge.runtime.demo.scene import (
    CLASSES,
    NO_DATA,
    compose_scene,
    compose_tile,
    under_clouds,
    under_snow,
    write_scene,
)
from rsedge.runtime.scenes.scene import Scene


@pytest.fixture(scope="module")
def land():
    return compose_scene(seed=3, tiles=(3, 4), tile_size=128)


@pytest.fixture(scope="module")
def whole():
    return compose_scene(seed=7)


@pytest.fixture(scope="module")
def scene_path(tmp_path_factory):
    return write_scene(tmp_path_factory.mktemp("synthetic") / "scene.tif", seed=3, tiles=(3, 4), tile_size=128)


def test_the_same_seed_gives_the_same_land_and_another_seed_other_land(land):
    again = compose_scene(seed=3, tiles=(3, 4), tile_size=128)
    assert np.array_equal(again.dn, land.dn)
    assert np.array_equal(again.cover, land.cover)
    assert not np.array_equal(compose_scene(seed=4, tiles=(3, 4), tile_size=128).cover, land.cover)


def test_the_same_file_to_the_byte(scene_path, tmp_path):
    again = write_scene(tmp_path / "scene.tif", seed=3, tiles=(3, 4), tile_size=128)
    assert again.read_bytes() == scene_path.read_bytes()


def test_the_file_is_a_georeferenced_tiled_reflectance_raster(scene_path, land):
    with rasterio.open(scene_path) as dataset:
        assert (dataset.height, dataset.width, dataset.count) == (384, 512, 3)
        assert dataset.dtypes == ("uint16",) * 3
        assert dataset.descriptions == ("B04", "B03", "B02")
        assert dataset.crs.to_epsg() == 32632
        assert (dataset.transform.a, dataset.transform.e) == (10, -10)
        assert dataset.nodata == 0
        assert dataset.block_shapes == [(256, 256)] * 3
        assert dataset.compression.name == "deflate"
        assert np.array_equal(dataset.read(), land.dn)


def test_the_runtime_sees_the_image_the_generator_shows(scene_path, land):
    scene = Scene.open(scene_path)
    assert scene.bands == (1, 2, 3)
    assert scene.reflectance == ReflectanceRule()
    with scene.reader() as reader:
        rgb, empty = reader.read(0, 0, scene.height, scene.width)
    assert np.array_equal(rgb, land.image)
    assert np.array_equal(empty, land.cover == NO_DATA)


def test_digital_numbers_invert_the_rule_within_a_level():
    levels = np.arange(1, 256)
    dn = np.rint((levels - 1) * (ReflectanceRule().full_scale / 254)).astype(np.uint16)
    assert np.abs(ReflectanceRule().apply(dn).astype(int) - levels).max() <= 1


def test_one_corner_lacks_data_and_the_rest_has_it(land):
    empty = land.cover == NO_DATA
    assert empty[:128, :128].all()
    assert not empty[:, -128:].any()
    assert 0.05 < empty.mean() < 0.25
    assert (land.dn[:, empty] == 0).all()
    assert (land.dn[:, ~empty] > 0).all()


def test_shares_count_the_pixels_with_data(land):
    shares = land.shares()
    assert sum(shares.values()) == pytest.approx(1)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    data = land.cover[land.cover != NO_DATA]
    for name, share in shares.items():
        assert share == pytest.approx((data == CLASSES.index(name)).mean())
    window = land.shares(128, 256, 128)
    assert window.keys() == {CLASSES[index] for index in np.unique(land.cover[128:256, 256:384])}
    assert land.shares(0, 0, 128) == {}


def test_a_scene_is_continuous_and_shows_every_class(whole):
    assert set(whole.shares()) == set(CLASSES)
    for name in ("river", "road", "sea"):
        tiles = {(row // 224, col // 224) for row, col in np.argwhere(whole.cover == CLASSES.index(name))}
        assert len(tiles) >= 4, name
    # Across the seams between tiles the land changes no more than within them.
    steps = (whole.cover[:, 1:] != whole.cover[:, :-1]).mean(axis=0)
    assert steps[223::224].mean() < 1.5 * steps.mean() + 0.01


def test_tiles_are_seeded_and_all_classes_come_up_as_the_largest():
    rng, again = np.random.default_rng(5), np.random.default_rng(5)
    largest = set()
    for _ in range(80):
        land, twin = compose_tile(rng, 64), compose_tile(again, 64)
        assert land.image.shape == (64, 64, 3)
        assert land.image.dtype == np.uint8
        assert np.array_equal(land.image, twin.image)
        assert np.array_equal(land.cover, twin.cover)
        shares = land.shares()
        assert sum(shares.values()) == pytest.approx(1)
        largest.add(next(iter(shares)))
    assert largest >= set(CLASSES) - {"river", "road"}


def test_land_covers_look_their_part(whole):
    """True-colour Sentinel-2 images have dark forest, blue sea, sandy desert, and roofs brighter than houses."""
    image = whole.image
    mean = {name: image[whole.cover == index].mean(axis=0) for index, name in enumerate(CLASSES)}
    assert mean["forest"].sum() < 0.6 * mean["farmland"].sum()
    assert mean["sea"][2] > 1.5 * mean["sea"][0]
    assert mean["desert"].sum() > 1.3 * mean["farmland"].sum()
    assert mean["desert"][0] > mean["desert"][2]
    assert mean["grassland"][1] > mean["grassland"][2]
    assert mean["industrial area"].sum() > mean["town"].sum()
    for name in ("snow", "cloud"):
        assert mean[name].min() > 170, name
        assert np.ptp(mean[name]) < 25, name


def test_snow_and_clouds_cover_where_they_are_thick_and_nowhere_else():
    land = np.full((64, 64, 3), 60, np.float32)
    thickness = np.zeros((64, 64), np.float32)
    thickness[:, 24:40] = 2
    for change in (under_snow, under_clouds):
        image, white = change(np.random.default_rng(0), land, thickness)
        assert white[:, 24:40].all()
        assert white.mean() == 0.25
        assert image[:, 24:40].min() > 150
        beside = np.delete(image, np.s_[24:40], axis=1)
        assert beside.max() <= 60
    assert beside.min() < 60, "clouds cast shadows"
