"""Pixels, validity and shares of random scenes against an oracle of their own: NumPy over rasterio's full read."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import rasterio
from rasterio.enums import ColorInterp, Resampling
from rasterio.transform import from_origin

from rsedge.errors import OptionError
from rsedge.runtime.scenes.readahead import read_tiles
from rsedge.runtime.scenes.scene import Scene
from rsedge.runtime.scenes.tiles import TileGrid
from tests import scenes

ORIGIN = (500000.0, 5700000.0)
NAMES = ("B04", "B03", "B02", "NIR")


def random_scene(folder, seed: int):
    """Write a scene; return its path, the options to open it with, and the oracle's values and validity as stored."""
    random = np.random.default_rng(seed)
    pick = lambda *values: values[random.integers(len(values))]  # noqa: E731
    height, width = (int(random.integers(9, 70)) for _ in range(2))
    dtype = pick("uint8", "uint16", "int16", "float32", "float64")
    order = random.permutation(4 if random.random() < 0.5 else 3)
    most = 255 if dtype == "uint8" else 3000
    data = random.integers(1, most, (len(order), height, width)).astype(dtype)
    valid = np.ones((height, width), bool)
    hole = random.random((height, width)) < pick(0, 0.1, 0.6)
    if random.random() < 0.5:
        hole[: height // 2, : width // 3] = True
    options, profile = {}, {}
    kind = pick("none", "declared", "option", "zero", "mask", "sidecar", "bands", "alpha", "nan", "impossible")
    kind = kind if dtype not in ("uint8",) or kind not in ("zero", "impossible") else "mask"
    kind = kind if dtype.startswith("float") or kind != "nan" else "declared"
    kind = kind if dtype != "uint16" or kind != "impossible" else "zero"
    if dtype.startswith("float"):
        data, options["pixel_values"] = data / 10000, "reflectance"
    fill = {"declared": 200, "option": 77, "zero": 0, "nan": np.nan, "impossible": -9999}.get(kind)
    if fill is not None:
        data[:, hole] = fill
        valid &= ~hole
    if kind in ("declared", "option"):
        valid = ~(data == fill).all(axis=0)
        (profile if kind == "declared" else options)["nodata"] = fill
    elif kind in ("mask", "sidecar", "bands", "alpha"):
        data[:, hole] = 65535 if dtype == "uint16" else 255 if dtype == "uint8" else 3
        valid &= ~hole
    if random.random() < 0.5:
        side = pick(16, 32)
        profile |= {"tiled": True, "blockxsize": side, "blockysize": side}
    profile["compress"] = pick("deflate", "lzw", "none")
    profile["interleave"] = pick("pixel", "band")
    count = len(order) + (kind == "alpha")
    path = folder / f"{seed}.tif"
    profile |= {"driver": "GTiff", "dtype": dtype, "count": count, "height": height, "width": width}
    profile |= {"crs": "EPSG:32634", "transform": from_origin(*ORIGIN, 10, 10)}
    inside = kind in ("mask",)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=inside), rasterio.open(path, "w", **profile) as dataset:
        dataset.colorinterp = [ColorInterp.undefined] * (count - 1) + [
            ColorInterp.alpha if kind == "alpha" else ColorInterp.undefined
        ]
        dataset.write(data[order], indexes=list(range(1, len(order) + 1)))
        if kind == "alpha":
            dataset.write(np.where(hole, 0, 255).astype(dtype), count)
        for index, number in enumerate(order, 1):
            dataset.set_band_description(index, NAMES[number])
        if kind in ("mask", "sidecar"):
            dataset.write_mask(~hole)
    if kind == "bands":  # a mask per band, in a file beside it
        holes = [hole & (random.random(hole.shape) < 0.7) for _ in range(count)]
        with rasterio.open(f"{path}.msk", "w", **{**profile, "dtype": "uint8", "interleave": "band"}) as masks:
            masks.write(np.where(holes, 0, 255).astype(np.uint8))
            masks.update_tags(**{f"INTERNAL_MASK_FLAGS_{band}": "0" for band in range(1, count + 1)})
        valid = ~np.any([holes[list(order).index(band)] for band in range(3)], axis=0)
    scales, offsets = [1.0] * 3, [0.0] * 3
    if dtype in ("uint16", "int16") and random.random() < 0.4:
        scales = [pick(1e-4, 2e-4, 2.75e-5) for _ in range(3)] if random.random() < 0.5 else [pick(1e-4, 2.75e-5)] * 3
        offsets = [scale * pick(0, 200, 500) for scale in scales]
        with rasterio.open(path, "r+") as dataset:
            places = [list(order).index(band) for band in range(3)]
            every = [1.0] * count, [0.0] * count
            for place, scale, offset in zip(places, scales, offsets, strict=True):
                every[0][place], every[1][place] = scale, offset
            dataset.scales, dataset.offsets = every
    if random.random() < 0.3:
        with rasterio.open(path, "r+") as dataset:
            dataset.build_overviews([2, 4], Resampling.average)
    with warnings.catch_warnings(), rasterio.open(path) as dataset:
        warnings.simplefilter("ignore")
        stored = dataset.read([list(order).index(band) + 1 for band in range(3)])
    if kind in ("none",) and dtype != "uint8":
        valid = (stored != 0).any(axis=0)
    return path, options, stored, valid, scales, offsets


def resampled(stored, valid, factor: float):
    """Mean by area of the pixels that have data, written pixel by pixel."""
    height, width = (max(1, math.ceil(side / factor - 1e-6)) for side in valid.shape)
    values, has = np.zeros((len(stored), height, width)), np.zeros((height, width), bool)
    cover = []
    for count, side in ((height, valid.shape[0]), (width, valid.shape[1])):
        edges = np.arange(side)
        cover.append([
            np.clip(np.minimum(edges + 1, min((at + 1) * factor, side)) - np.maximum(edges, at * factor), 0, None)
            for at in range(count)
        ])  # fmt: skip
    clean = np.where(valid, stored, 0).astype(np.float64)
    for row in range(height):
        for col in range(width):
            weight = np.outer(cover[0][row], cover[1][col]) * valid
            has[row, col] = weight.sum() > 1e-12
            if has[row, col]:
                values[:, row, col] = (clean * weight).sum(axis=(1, 2)) / weight.sum()
    return (values if stored.dtype.kind == "f" else np.floor(values + 0.5)), has


def eight_bit(values, dtype, scales, offsets):
    if dtype == "uint8":
        return values
    numbers = values.astype(np.float64)
    if dtype.startswith("float"):
        numbers = np.floor(numbers * 10000 + 0.5)
    result = np.empty(numbers.shape)
    for band, plane in enumerate(numbers):
        scale, offset = (1e-4, 0) if scales[band] == 1 else (scales[band], round(offsets[band] / scales[band]))
        full = round(0.25 / scale)
        result[band] = np.clip(np.floor(1 + 254 * (np.clip(plane, 0, 65535) + offset) / full + 0.5), 1, 255)
    return result


@pytest.mark.parametrize("part", range(6))
def test_pixels_validity_and_shares_are_those_of_the_oracle(tmp_path, part):
    for seed in range(part * 50, part * 50 + 50):
        path, options, stored, valid, scales, offsets = random_scene(tmp_path, seed)
        factor = (1, 1, 2, 3, 1.5, 2.7)[seed % 6]
        scene = Scene.open(path, **options, **({"resolution": 10 * factor} if factor > 1 else {}))
        values = stored
        if factor > 1:
            values, valid = resampled(stored, valid, factor)
        expected = np.where(valid, eight_bit(values, str(stored.dtype), scales, offsets), 0)
        with scene.reader() as reader:
            colours, empty = reader.read(0, 0, scene.height, scene.width)
        np.testing.assert_array_equal(~empty, valid, err_msg=f"validity of seed {seed}")
        difference = np.abs(colours.transpose(2, 0, 1).astype(int) - expected)
        # A mean that lies on a half may round either way, by one digital number.
        assert difference.max() <= (0 if factor == 1 else 1), f"pixels of seed {seed}"
        assert np.mean(difference > 0) < 0.02, f"pixels of seed {seed}"
        grid = TileGrid(scene.width, scene.height, 16)
        for tile in read_tiles(scene, grid, image_size=16):
            place = tile.tile
            part_valid = valid[
                place.row_off : place.row_off + place.height, place.col_off : place.col_off + place.width
            ]
            assert tile.nodata_fraction == pytest.approx(1 - part_valid.mean()), f"share of seed {seed}"
        path.unlink()


# ---- the kinds of faults that were met ----


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("resolution", [None, 20, 30, 5])
def test_a_mask_holds_at_every_resolution(tmp_path, inside, resolution):
    data = np.full((3, 60, 60), 100, np.uint8)
    data[:, :, 30:] = 250
    mask = np.zeros((60, 60), bool)
    mask[:, :30] = True
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=inside):
        path = scenes.write(tmp_path / "a.tif", data, photometric="RGB")
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=inside), rasterio.open(path, "r+") as dataset:
            dataset.write_mask(mask)
    with Scene.open(path, resolution=resolution).reader() as reader:
        width = {None: 60, 20: 30, 30: 20, 5: 120}[resolution]
        colours, empty = reader.read(0, 0, width, width)
    assert empty.mean() == pytest.approx(0.5)
    assert set(np.unique(colours[~empty])) == {100}


@pytest.mark.parametrize("resolution", [20, 30, 40])
def test_palette_indexes_are_not_averaged(tmp_path, resolution):
    data = np.where(np.indices((1, 24, 24)).sum(axis=0) % 2, 10, 90).astype(np.uint8)
    table = {10: (200, 40, 10, 255), 90: (20, 40, 180, 255), 50: (0, 255, 0, 255)}
    path = scenes.write(tmp_path / "p.tif", data, colormap=table)
    with Scene.open(path, resolution=resolution).reader() as reader:
        colours, empty = reader.read(0, 0, 6, 6)
    assert not empty.any()
    assert (np.abs(colours.astype(int) - (110, 40, 95)) <= 10).all()


@pytest.mark.parametrize("description", ["NIR", "Infrared", "B08"])
def test_infrared_called_alpha_empties_nothing_at_another_resolution(tmp_path, description):
    data = np.full((4, 40, 40), 90, np.uint8)
    data[3, :20] = 0
    path = scenes.write(
        tmp_path / "a.tif", data, photometric="RGB", alpha="YES", descriptions=("Red", "Green", "Blue", description)
    )
    with Scene.open(path, resolution=20).reader() as reader:
        colours, empty = reader.read(0, 0, 20, 20)
    assert not empty.any()
    assert (colours == 90).all()


@pytest.mark.parametrize("description", ["Band_4", "band 4", "4", None, "alpha", "Layer_4"])
def test_a_description_that_says_nothing_leaves_alpha(tmp_path, description):
    data = np.full((4, 40, 40), 90, np.uint8)
    data[3, :10] = 0
    path = scenes.write(tmp_path / "a.tif", data, photometric="RGB", alpha="YES")
    with rasterio.open(path, "r+") as dataset:
        if description:
            dataset.set_band_description(4, description)
    with Scene.open(path).reader() as reader:
        assert reader.read(0, 0, 40, 40)[1].mean() == 0.25


@pytest.mark.parametrize("fill", [65535.0, 100.0, -3.0])
def test_masked_floats_do_not_decide_what_floats_are(tmp_path, fill):
    data = np.random.default_rng(0).uniform(0.02, 0.2, (3, 60, 60)).astype(np.float32)
    mask = np.ones((60, 60), bool)
    mask[:40] = False
    data[:, ~mask] = fill
    path = scenes.write(tmp_path / "a.tif", data, descriptions=("B04", "B03", "B02"), mask=mask)
    scene = Scene.open(path)
    assert scene.rendering.values == "reflectance"
    with scene.reader() as reader:
        assert reader.read(0, 0, 60, 60)[1].mean() == pytest.approx(2 / 3)


@pytest.mark.parametrize("fill", [1, 2, 3])
def test_masked_pixels_do_not_contradict_an_offset(tmp_path, fill):
    data = np.random.default_rng(0).integers(1200, 2500, (3, 60, 60)).astype(np.uint16)
    mask = np.ones((60, 60), bool)
    mask[:20] = False
    data[:, ~mask] = fill
    name = "S2A_MSIL2A_20230823T095559_N0509_R122_T34UCF_20230823T143200_rgb.tif"
    scene = Scene.open(scenes.write(tmp_path / name, data, descriptions=("B04", "B03", "B02"), mask=mask))
    assert scene.reflectance.boa_offset == -1000
    assert scene.warnings == ()


@pytest.mark.parametrize(("resolution", "transform"), [(10, 1e-4), (20, 1e-4), (0.5, 1e-3)])
def test_metres_for_degrees_are_refused_with_the_number_to_use(tmp_path, resolution, transform):
    path = scenes.write(
        tmp_path / "a.tif", scenes.pixels(3, 30, 30), photometric="RGB", crs="EPSG:4326",
        transform=from_origin(10, 50, transform, transform),
    )  # fmt: skip
    with pytest.raises(OptionError, match="its coordinates are degrees"):
        Scene.open(path, resolution=resolution)
    path = scenes.write(tmp_path / "m.tif", scenes.pixels(3, 30, 30), photometric="RGB")
    with pytest.raises(OptionError, match="more than the whole"):
        Scene.open(path, resolution=5000)


@pytest.mark.parametrize("kind", ["inside", "beside", "alpha"])
def test_info_names_the_mask(tmp_path, kind):
    from rsedge.runtime.diagnostics.describe import describe_scene
    from rsedge.runtime.run.sources import TileOptions

    data = np.full((4 if kind == "alpha" else 3, 40, 40), 90, np.uint8)
    options = {"photometric": "RGB", **({"alpha": "YES"} if kind == "alpha" else {})}
    path = scenes.write(tmp_path / "a.tif", data, **options)
    if kind != "alpha":
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=kind == "inside"), rasterio.open(path, "r+") as dataset:
            dataset.write_mask(np.ones((40, 40), bool))
    said = describe_scene(Scene.open(path), TileOptions())["mask"]
    assert said == {"inside": "mask", "beside": f"{path}.msk", "alpha": "alpha, band 4"}[kind]
