"""One scene, given in every form it comes in, gives the same records."""

import json

import numpy as np
import pytest
import rasterio
import rasterio.shutil

from rsedge.errors import OptionError, SceneError
from rsedge.runtime.run.sources import SceneTiles, TileOptions
from rsedge.runtime.scenes.catalog import find
from rsedge.runtime.scenes.opening import open_scenes
from rsedge.runtime.scenes.scene import Scene
from tests import scenes
from tests.range_server import serve
from tests.safe_products import SafeProduct, write_safe

SIZE = 540


@pytest.fixture(scope="module")
def product(tmp_path_factory):
    return write_safe(tmp_path_factory.mktemp("safe"), seed=3, size=SIZE)


@pytest.fixture(scope="module")
def stacked(product, tmp_path_factory):
    """Its bands in one file, with what metadata a careful person would keep."""
    path = tmp_path_factory.mktemp("stacked") / f"{product.name}.tif"
    bands = np.concatenate([product.dn[:3], np.kron(product.scl, np.ones((2, 2), np.uint16))[None].astype(np.uint16)])
    profile = {"driver": "COG", "dtype": "uint16", "count": 4, "crs": product.crs, "transform": product.transform}
    with rasterio.MemoryFile() as memory:
        with memory.open(**{**profile, "driver": "GTiff"}, height=SIZE, width=SIZE) as dataset:
            dataset.write(bands)
            dataset.descriptions = ("B04", "B03", "B02", "SCL")
            dataset.scales, dataset.offsets = (1e-4,) * 4, (product.offset * 1e-4,) * 4
            dataset.update_tags(ACQUISITIONDATETIME=product.datetime)
        with memory.open() as dataset:
            rasterio.shutil.copy(dataset, path, driver="COG", blocksize=256, compress="deflate", overviews="none")
    return path


def item(product: SafeProduct, base: str) -> dict:
    """As a catalogue describes it, assets below ``base``."""
    scaling = [{"scale": 1e-4, "offset": product.offset * 1e-4}]
    assets = {
        name: {"href": f"{base}{product.image(band)}", "eo:bands": [{"common_name": name}], "raster:bands": scaling}
        for name, band in (("red", "B04"), ("green", "B03"), ("blue", "B02"))
    }
    assets["scl"] = {"href": f"{base}{product.image('SCL')}", "roles": ["data"]}
    properties = {
        "datetime": product.datetime,
        "grid:code": f"MGRS-{product.tile}",
        "s2:product_uri": f"{product.name}.SAFE",
        "s2:processing_baseline": product.baseline,
    }
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "id": product.name,
        "geometry": None,
        "properties": properties,
        "links": [],
        "assets": assets,
    }


def records(scene: Scene, **options: object) -> list[dict]:
    tiles = SceneTiles(scene, TileOptions(tile_size=128, **options))
    return [tile.record.to_dict() for segment in tiles.segments(0, [size(64)], "model@0") for tile in segment]


def size(side):
    from rsedge.pixels import ImageSize

    return ImageSize(side)


def pixels(scene: Scene) -> np.ndarray:
    with scene.reader() as reader:
        return reader.read(0, 0, scene.height, scene.width)[0]


@pytest.fixture(scope="module")
def expected(product):
    scene = Scene.open(product.path)
    return records(scene), pixels(scene)


def test_the_product_itself(product, expected):
    found, shown = expected
    assert {record["status"] for record in found} >= {"ok"}
    assert {record["product_id"] for record in found} == {product.name}
    assert {record["mgrs_tile"] for record in found} == {product.tile}
    assert {record["datetime"] for record in found} == {f"{product.datetime[:23]}Z"}  # milliseconds of microseconds
    assert {record["scene_crs"] for record in found} == {product.crs}
    dn = product.dn[:3].astype(np.int64).transpose(1, 2, 0)
    rule = np.clip((1 + 254 * (dn + product.offset) / 2500 + 0.5) // 1, 1, 255)
    empty = (dn == 0).all(axis=-1) | (np.kron(product.scl, np.ones((2, 2))) == 0)
    assert np.array_equal(shown, np.where(empty[..., None], 0, rule))
    cloudy = np.isin(np.kron(product.scl, np.ones((2, 2), np.uint8)), (8, 9, 10)) & ~empty
    for record in found:
        rows = slice(record["row_off"], record["row_off"] + record["height"])
        cols = slice(record["col_off"], record["col_off"] + record["width"])
        with_data = np.count_nonzero(~empty[rows, cols])
        assert record["nodata_fraction"] == round(float(empty[rows, cols].mean()), 4)
        wanted = round(np.count_nonzero(cloudy[rows, cols]) / with_data, 4) if with_data else None
        assert record["cloud_fraction"] == wanted


def test_as_a_zip(expected, tmp_path):
    zipped = write_safe(tmp_path, seed=3, size=SIZE, zipped=True)
    assert (records(Scene.open(zipped.path)), True) == (expected[0], True)


def test_as_a_stacked_file(stacked, expected):
    scene = Scene.open(stacked)
    assert records(scene) == expected[0]
    assert np.array_equal(pixels(scene), expected[1])


def test_as_a_stac_item(product, expected, tmp_path):
    path = tmp_path / "item.json"
    path.write_text(json.dumps(item(product, f"{product.path}/")))
    with pytest.raises(SceneError, match="--allow-root"):
        Scene.open(path)
    scene = Scene.open(path, allow_roots=[product.path])
    assert records(scene) == expected[0]
    assert np.array_equal(pixels(scene), expected[1])


def test_as_remote_files(product, stacked, expected):
    with serve(stacked.parent) as server:
        address = server.url(stacked.name)
        with pytest.raises(OptionError, match="--allow-remote"):
            Scene.open(address)
        scene = Scene.open(address, allow_remote=True)
        assert records(scene) == expected[0]
        before = scene.identity()
        assert before["remote"]
    with serve(product.path) as server:
        (product.path / "item.json").write_text(json.dumps(item(product, "")))
        scene = Scene.open(server.url("item.json"), allow_remote=True)
        assert records(scene) == expected[0]
    (product.path / "item.json").unlink()


def test_as_a_folder_of_bands(product, expected):
    folder = (product.path / product.image("B04")).parent
    (scene,) = open_scenes([folder.parent])
    got = records(scene)
    # Names of files hold the start of the datatake, not the time this granule was seen.
    assert [{**each, "datetime": None} for each in got] == [{**each, "datetime": None} for each in expected[0]]


def test_a_folder_of_products_and_a_pattern(product, tmp_path):
    other = write_safe(tmp_path, seed=4, size=64, tile="34UDF")
    write_safe(tmp_path / "zips", seed=5, size=64, tile="34UEF", zipped=True)
    assert [scene.mgrs_tile for scene in open_scenes([tmp_path])] == ["34UDF", "34UEF"]
    assert [scene.name for scene in open_scenes([str(tmp_path / "*.SAFE")])] == [other.name]
    with pytest.raises(SceneError, match="matches no file"):
        find(str(tmp_path / "*.jp2"))
    with pytest.raises(SceneError, match="holds 2 scenes"):
        Scene.open(tmp_path)


def test_a_product_and_its_zip_are_one_scene(tmp_path):
    kept = write_safe(tmp_path, seed=4, size=64)
    zipped = write_safe(tmp_path / "again", seed=4, size=64, zipped=True)
    zipped.path.rename(tmp_path / zipped.path.name)
    assert [scene.name for scene in open_scenes([tmp_path])] == [kept.name]


def test_stac_on_standard_input(product, expected):
    document = json.dumps(item(product, f"{product.path}/"))
    (scene,) = open_scenes(["-"], stdin=document, allow_roots=[product.path])
    assert records(scene) == expected[0]


def test_damage_is_told_for_every_scene(product, tmp_path):
    first = tmp_path / "first.tif"
    first.write_bytes(b"no raster")
    with pytest.raises(SceneError) as caught:
        open_scenes([first, product.path, tmp_path / "absent.tif"])
    assert "first.tif" in str(caught.value)
    assert "absent.tif" in str(caught.value)
    assert product.name not in str(caught.value)


def write_bands(folder, **options):
    """B04, B03 and B02 beside each other, 1200 and more."""
    folder.mkdir()
    for number, band in enumerate(("B04", "B03", "B02")):
        scenes.write(folder / f"{band}.tif", scenes.pixels(1, 32, 32, "uint16", seed=number) + 1200, **options)
    return folder


def test_bands_beside_each_other_may_declare_an_offset(tmp_path):
    plain = Scene.open(write_bands(tmp_path / "plain"))
    assert plain.reflectance.boa_offset == 0
    for name, declare in (
        ("scaled", lambda band: (setattr(band, "scales", (1e-4,)), setattr(band, "offsets", (-0.1,)))),
        ("tagged", lambda band: band.update_tags(1, BOA_ADD_OFFSET="-1000")),
    ):
        for path in write_bands(tmp_path / name).iterdir():
            with rasterio.open(path, "r+") as band:
                declare(band)
        scene = Scene.open(tmp_path / name)
        assert scene.reflectance.boa_offset == -1000
        assert "metadata of the bands" in scene.rendering_reason
        with scene.reader() as reader:
            shown = reader.read(0, 0, 32, 32)[0]
        assert np.array_equal(shown, scene.rendering.apply(stored(plain)))


def stored(scene):
    planes = []
    for part in scene.parts:
        with rasterio.open(part.path) as dataset:
            planes.append(dataset.read(part.band))
    return np.stack(planes, axis=2)


def test_bands_beside_each_other_may_have_a_mask(tmp_path):
    mask = np.full((32, 32), 255, np.uint8)
    mask[:, :8] = 0
    folder = write_bands(tmp_path / "in", mask=mask)
    scene = Scene.open(folder)
    with scene.reader() as reader:
        assert np.array_equal(reader.read(0, 0, 32, 32)[1], mask == 0)


def test_what_will_be_written_is_no_scene_of_its_folder(tmp_path):
    scenes.write(tmp_path / "a.tif", scenes.pixels(3, 8, 8))
    sheet = scenes.write(tmp_path / "sheet.png", scenes.pixels(3, 8, 8), driver="PNG")
    assert [scene.name for scene in open_scenes([tmp_path])] == ["a", "sheet"]
    assert [scene.name for scene in open_scenes([tmp_path], outputs=[sheet])] == ["a"]
    assert [scene.name for scene in open_scenes([sheet], outputs=[sheet])] == ["sheet"]


@pytest.mark.parametrize("text", ["[1]", '{"type": "FeatureCollection", "features": []}', '{"type": "Collection"}'])
def test_json_that_is_no_item_is_told_as_such(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(SceneError, match="neither a raster nor STAC with an item"):
        Scene.open(path)


def test_an_empty_name_is_not_this_folder():
    with pytest.raises(SceneError, match="empty name"):
        find("")


def test_a_vrt_names_no_remote_file(tmp_path):
    path = scenes.write(tmp_path / "a.tif", scenes.pixels(3, 32, 32))
    vrt = tmp_path / "a.vrt"
    rasterio.shutil.copy(path, vrt, driver="VRT")
    with serve(tmp_path) as server:
        far = f'relativeToVRT="0">/vsicurl/{server.url("a.tif")}<'
        vrt.write_text(vrt.read_text().replace('relativeToVRT="1">a.tif<', far))
        with pytest.raises(SceneError, match=r"is a VRT.*--allow-vrt"):
            Scene.open(vrt)
        with pytest.raises(SceneError, match="/vsicurl/"):
            Scene.open(vrt, allow_vrt=True, allow_remote=True)
        assert server.requests == []
