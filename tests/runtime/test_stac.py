from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import rasterio

from rsedge.errors import OptionError, SceneError
from rsedge.runtime.scenes import remote
from rsedge.runtime.scenes.access import Access
from rsedge.runtime.scenes.products.product import BandFile
from rsedge.runtime.scenes.products.stac import is_stac_url, read_if_stac, read_stac
from rsedge.runtime.scenes.remote import Patience
from tests import scenes
from tests.conftest import shared_data
from tests.range_server import serve

COG = "image/tiff; application=geotiff; profile=cloud-optimized"
COMMON = {"B02": "blue", "B03": "green", "B04": "red", "B05": "rededge", "B08": "nir"}
REFLECTANCE = {"data_type": "uint16", "nodata": 0, "scale": 0.0001}


def item(assets, properties=None, version="1.0.0", **fields):
    return {
        "type": "Feature",
        "stac_version": version,
        "id": "S2A_29RKH_20230219_0_L2A",
        "geometry": None,
        "properties": {"datetime": "2023-02-19T11:34:25.405000Z", **(properties or {})},
        "links": [],
        "assets": assets,
        **fields,
    }


def earth_search(*, collection="v1", applied=None, offset=-0.1):
    """As Earth Search writes ``sentinel-2-l2a`` (v1) and ``sentinel-2-c1-l2a`` (c1): names for keys, JP2 beside COG."""
    assets = {}
    for band, name in COMMON.items():
        metres = 20 if band == "B05" else 10
        about = {
            "eo:bands": [{"name": name if collection == "v1" else band, "common_name": name}],
            "gsd": metres,
            "raster:bands": [{**REFLECTANCE, "offset": offset, "spatial_resolution": metres}],
            "roles": ["data", "reflectance"],
        }
        if collection == "v1":
            assets[f"{name}-jp2"] = {"href": f"s3://sentinel-s2-l2a/R10m/{band}.jp2", "type": "image/jp2", **about}
        assets[name] = {"href": f"https://cogs.example/x/{band}.tif", "type": COG, **about}
    colours = [{"name": name, "common_name": name} for name in ("red", "green", "blue")]
    assets["visual"] = {
        "href": "https://cogs.example/x/TCI.tif",
        "type": COG,
        "eo:bands": colours,
        "gsd": 10,
        "roles": ["visual"],
    }
    assets["preview"] = {"href": "https://cogs.example/x/PVI.tif", "eo:bands": colours, "roles": ["overview"], "gsd": 1}
    assets["scl"] = {"href": "https://cogs.example/x/SCL.tif", "type": COG, "gsd": 20, "roles": ["data"]}
    assets["thumbnail"] = {"href": "https://cogs.example/x/preview.jpg", "type": "image/jpeg", "roles": ["thumbnail"]}
    properties = {
        "s2:processing_baseline": "05.09",
        "s2:product_uri": "S2A_MSIL2A_20230219T112111_N0509_R037_T29RKH_20230219T174747.SAFE",
        "grid:code": "MGRS-29RKH",
    }
    if applied is not None:
        properties["earthsearch:boa_offset_applied"] = applied
    return item(assets, properties)


def planetary_computer():
    """Keys are Sentinel-2's, hrefs of Azure, no ``raster:bands``, a visual asset of role data."""
    assets = {
        band: {
            "href": f"https://sentinel2l2a01.blob.core.windows.net/x/{band}_10m.tif?sig=a%2Bb&se=2",
            "type": COG,
            "eo:bands": [{"name": band, "common_name": name}],
            "gsd": 10,
            "roles": ["data"],
        }
        for band, name in COMMON.items()
    }
    colours = [{"name": band, "common_name": COMMON[band]} for band in ("B04", "B03", "B02")]
    assets["visual"] = {
        "href": "https://sentinel2l2a01.blob.core.windows.net/x/TCI_10m.tif",
        "type": COG,
        "eo:bands": colours,
        "gsd": 10,
        "roles": ["data"],
    }
    assets["SCL"] = {"href": "https://sentinel2l2a01.blob.core.windows.net/x/SCL_20m.tif", "gsd": 20, "roles": ["data"]}
    properties = {
        "s2:processing_baseline": "04.00",
        "s2:mgrs_tile": "5VNK",
        "s2:granule_id": "S2A_OPER_MSI_L2A_TL_X_T05VNK_N04.00",
    }
    return item(assets, properties)


def copernicus():
    """STAC 1.1 as the Copernicus Data Space writes it: ``bands``, keys with resolutions, scale on assets, JP2 on S3."""
    assets = {}
    for metres in (60, 20, 10):
        for band in ("B02", "B03", "B04"):
            assets[f"{band}_{metres}m"] = {
                "href": f"s3://eodata/x/T29RKH_{band}_{metres}m.jp2",
                "type": "image/jp2",
                "bands": [{"name": band, "eo:common_name": COMMON[band]}],
                "data_type": "uint16",
                "raster:scale": 0.0001,
                "raster:offset": -0.1,
                "proj:transform": [metres, 0, 199980, 0, -metres, 2800020],
                "roles": ["data", "reflectance"],
            }
    assets["TCI_10m"] = {"href": "s3://eodata/x/T29RKH_TCI_10m.jp2", "type": "image/jp2", "roles": ["visual"]}
    assets["SCL_60m"] = {"href": "s3://eodata/x/T29RKH_SCL_60m.jp2", "roles": ["data"]}
    assets["SCL_20m"] = {"href": "s3://eodata/x/T29RKH_SCL_20m.jp2", "roles": ["data"]}
    return item(assets, {"processing:version": "05.11", "grid:code": "MGRS-29RKH"}, version="1.1.0")


def local_item(folder: Path, href="./{}.tif", **properties):
    """An item in ``folder`` with three band files beside it."""
    folder.mkdir(exist_ok=True)
    for seed, band in enumerate(("B04", "B03", "B02")):
        scenes.write(folder / f"{band}.tif", scenes.pixels(1, 40, 50, "uint16", seed=seed))
    assets = {band: {"href": href.format(band)} for band in ("B04", "B03", "B02")}
    return write(folder / "item.json", item(assets, properties))


def write(path: Path, document) -> str:
    path.write_text(json.dumps(document), encoding="utf-8")
    return str(path)


def read_text(document, **options):
    return read_stac("-", text=json.dumps(document), **{"access": Access(remote=True), **options})


def one(document):
    (product,) = read_text(document)
    return product


# ---- the catalogues ----


def test_the_real_item_is_read_from_the_files_beside_it():
    path = shared_data("scenes/S2A_29RKH_20200219_L2A/S2A_29RKH_20200219_0_L2A.json").resolve()
    (product,) = read_if_stac(str(path))
    assert {colour: Path(file.path).name for colour, file in product.bands.items()} == {
        "red": "B04.tif",
        "green": "B03.tif",
        "blue": "B02.tif",
    }
    assert all(Path(file.path).parent == path.parent for file in product.bands.values())
    assert product.scl == BandFile(path=str(path.parent / "SCL.tif"))
    assert "files of their names" in product.warnings[0]
    assert len(product.files) == 5
    assert (product.boa_offset, product.quantification, product.baseline) == (0, 10000, "02.14")
    assert product.datetime == "2020-02-19T11:34:25.405Z"
    assert product.product_id == "S2A_MSIL2A_20200219T112111_N0214_R037_T29RKH_20200219T123947"
    assert (product.name, product.mgrs_tile, product.visual) == ("S2A_29RKH_20200219_0_L2A", "29RKH", False)


def test_earth_search():
    product = one(earth_search(applied=False))
    assert {c: f.path for c, f in product.bands.items()} == {
        "red": "/vsicurl/https://cogs.example/x/B04.tif",  # the COG, not the JP2; 10 m, not the preview
        "green": "/vsicurl/https://cogs.example/x/B03.tif",
        "blue": "/vsicurl/https://cogs.example/x/B02.tif",
    }
    assert product.scl == BandFile(path="/vsicurl/https://cogs.example/x/SCL.tif")
    assert (product.boa_offset, product.quantification, product.baseline) == (-1000, 10000, "05.09")
    assert product.product_id == "S2A_MSIL2A_20230219T112111_N0509_R037_T29RKH_20230219T174747"
    assert (product.files, product.warnings) == ((), ())


def test_an_offset_that_was_applied_is_not_applied_again():
    assert one(earth_search(applied=True)).boa_offset == 0


def test_collection_1():
    product = one(earth_search(collection="c1"))
    assert product.bands["blue"].path.endswith("/B02.tif")
    assert product.boa_offset == -1000


def test_metadata_that_contradict_themselves_leave_the_offset_open():
    product = one(earth_search(applied=False, offset=0))
    assert product.boa_offset is None
    assert "offset 0" in product.warnings[0]
    document = earth_search()
    document["assets"]["red"]["raster:bands"][0]["offset"] = 0
    product = one(document)
    assert (product.boa_offset, product.quantification) == (None, None)
    assert "different" in product.warnings[0]


def test_planetary_computer():
    product = one(planetary_computer())
    assert product.bands["red"].path.endswith("/B04_10m.tif?sig=a%2Bb&se=2")
    assert product.scl.path.endswith("/SCL_20m.tif")
    assert (product.boa_offset, product.quantification, product.baseline) == (None, None, "04.00")
    assert (product.mgrs_tile, product.product_id) == ("05VNK", "S2A_OPER_MSI_L2A_TL_X_T05VNK_N04.00")
    assert not product.visual


def test_stac_1_1():
    product = one(copernicus())
    assert product.bands["green"].path == "/vsis3/eodata/x/T29RKH_B03_10m.jp2"
    assert product.scl.path == "/vsis3/eodata/x/T29RKH_SCL_20m.jp2"
    assert (product.boa_offset, product.quantification, product.baseline) == (-1000, 10000, "05.11")


def test_bands_of_one_asset():
    bands = [{"name": name, "common_name": COMMON[name]} for name in ("B02", "B03", "B04", "B08")]
    rasters = [{**REFLECTANCE, "offset": -0.1} for _ in bands]
    product = one(item({"data": {"href": "https://h/a.tif", "eo:bands": bands, "raster:bands": rasters}}))
    path = "/vsicurl/https://h/a.tif"
    assert product.bands == {
        "red": BandFile(path=path, band=3),
        "green": BandFile(path=path, band=2),
        "blue": BandFile(path=path, band=1),
    }
    assert product.boa_offset == -1000


@pytest.mark.parametrize("key", ["visual", "TCI", "TCI_10m", "visual-jp2"])
def test_true_colour_where_there_is_nothing_else(key):
    product = one(item({key: {"href": "https://h/TCI.tif"}, "SCL": {"href": "https://h/SCL.tif"}}))
    assert product.visual
    assert [product.bands[colour].band for colour in ("red", "green", "blue")] == [1, 2, 3]
    assert product.boa_offset is None


@pytest.mark.parametrize(
    ("properties", "expected"),
    [
        ({"datetime": None, "start_datetime": "2023-02-19T11:34:25Z"}, "2023-02-19T11:34:25Z"),
        ({"datetime": "2023-02-19T11:34:25.4+02:00"}, "2023-02-19T09:34:25.400Z"),
        ({"datetime": "2023-02-31T11:34:25Z"}, None),
        ({"datetime": 5}, None),
    ],
)
def test_times(properties, expected):
    assert one({**earth_search(), "properties": properties}).datetime == expected


@pytest.mark.parametrize(
    ("properties", "tile"),
    [
        ({"mgrs:utm_zone": 5, "mgrs:latitude_band": "V", "mgrs:grid_square": "NK"}, "05VNK"),
        ({"grid:code": "MGRS-5VNK"}, "05VNK"),
        ({"grid:code": "WRS2-123"}, None),
        ({}, None),
    ],
)
def test_tiles(properties, tile):
    assert one({**earth_search(), "properties": properties}).mgrs_tile == tile


# ---- hrefs ----


@pytest.mark.parametrize("href", ["./{}.tif", "{}.tif", "../here/{}.tif"])
def test_relative_hrefs_begin_at_the_item(tmp_path, href):
    (product,) = read_stac(local_item(tmp_path / "here", href))
    assert product.bands["red"].path == str((tmp_path / "here" / "B04.tif").resolve())
    assert sorted(Path(name).name for name in product.files) == ["B02.tif", "B03.tif", "B04.tif", "item.json"]
    with rasterio.open(product.bands["blue"].path) as dataset:
        np.testing.assert_array_equal(dataset.read(), scenes.pixels(1, 40, 50, "uint16", seed=2))


def test_file_urls(tmp_path):
    folder = tmp_path / "with space"
    path = local_item(folder, folder.as_uri() + "/{}.tif")
    assert "%20" in Path(path).read_text()
    (product,) = read_stac(path)
    assert product.bands["red"].path == str((folder / "B04.tif").resolve())


def test_relative_hrefs_of_a_saved_item_follow_its_self_link(tmp_path):
    document = item({band: {"href": f"./{band}.tif"} for band in ("B04", "B03", "B02")})
    document["links"] = [{"rel": "self", "href": "s3://bucket/a/item.json"}]
    (product,) = read_stac(write(tmp_path / "item.json", document), access=Access(remote=True))
    assert product.bands["red"].path == "/vsis3/bucket/a/B04.tif"


def test_files_beside_a_collection_are_nobodys(tmp_path):
    local_item(tmp_path)
    both = [earth_search(), {**earth_search(), "id": "other"}]
    path = write(tmp_path / "items.json", {"type": "FeatureCollection", "features": both})
    with pytest.raises(OptionError, match="--allow-remote"):
        read_stac(path)
    local_item(tmp_path / "other")
    first, second = read_stac(path, access=Access(remote=True))
    assert first.bands["red"].path.startswith("/vsicurl/")
    assert second.bands["red"].path == str((tmp_path / "other" / "B04.tif").resolve())
    assert second.scl is not None


def test_a_remote_scene_classification_is_left_out_unless_allowed(tmp_path):
    local_item(tmp_path)
    path = write(tmp_path / "item.json", earth_search())
    (product,) = read_stac(path)
    assert product.scl is None
    assert "scene classification" in product.warnings[1]
    (product,) = read_stac(path, access=Access(remote=True))
    assert product.scl.path.startswith("/vsicurl/")


def test_files_that_are_missing_are_all_named(tmp_path):
    path = local_item(tmp_path)
    (tmp_path / "B04.tif").unlink()
    (tmp_path / "B02.tif").unlink()
    with pytest.raises(SceneError, match=r"asset B04: .*B04\.tif does not exist.*asset B02: .*B02\.tif"):
        read_stac(path)


# ---- over the network ----


def test_nothing_remote_without_leave(tmp_path):
    path = write(tmp_path / "item.json", planetary_computer())
    with pytest.raises(OptionError, match=r"B04_10m\.tif.* are remote.*--allow-remote") as caught:
        read_stac(path)
    assert "sig=" not in str(caught.value)
    with pytest.raises(OptionError, match="is remote"):
        read_stac("https://host/item.json")


def test_an_item_and_its_bands_from_a_server(tmp_path):
    local_item(tmp_path)
    with serve(tmp_path) as server:
        server.fail(503, times=1)
        (product,) = read_stac(server.url("item.json"), access=Access(remote=True))
        assert product.bands["red"].path == f"/vsicurl/{server.base}/B04.tif"
        assert product.files == ()
        with (
            rasterio.Env(**remote.gdal_options(Patience(timeout=2))),
            rasterio.open(product.bands["red"].path) as dataset,
        ):
            np.testing.assert_array_equal(dataset.read(), scenes.pixels(1, 40, 50, "uint16", seed=0))


@pytest.mark.parametrize("href", ["file:///etc/{}.tif", "/vsizip/a.zip/{}.tif"])
def test_a_remote_item_cannot_name_files_of_this_machine(tmp_path, href):
    local_item(tmp_path, href)
    with serve(tmp_path) as server, pytest.raises(SceneError, match="remote document"):
        read_stac(server.url("item.json"), access=Access(remote=True))


# ---- what is and what is not STAC ----


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("https://host/a.json?sig=1", True),
        ("https://host/collections/c/items/S2A_1", True),
        ("https://host/collections/c/items?limit=3", True),
        ("https://host/search?ids=a", True),
        ("s3://bucket/a.json", True),
        ("https://host/items/a.tif", False),
        ("https://host/a.tif", False),
    ],
)
def test_addresses(source, expected):
    assert is_stac_url(source) is expected


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (earth_search(), True),
        ({"type": "FeatureCollection", "features": [earth_search()]}, True),
        ({"type": "FeatureCollection", "features": [{"type": "Feature", "properties": {"stac_version": 1}}]}, False),
        ({"type": "Collection", "stac_version": "1.0.0", "id": "c"}, False),
        ({"type": "FeatureCollection", "features": []}, False),
        ([1], False),
    ],
)
def test_files(tmp_path, document, expected):
    found = read_if_stac(write(tmp_path / "a.json", document), access=Access(remote=True))
    assert (found is not None) is expected
    assert read_if_stac(write(tmp_path / "a.txt", document)) is None
    if not expected:
        with pytest.raises(SceneError, match="pass a STAC item"):
            read_text(document)


def test_a_damaged_item_is_one(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(earth_search())[:-9])
    with pytest.raises(SceneError, match="no JSON document"):
        read_if_stac(str(path))
    with pytest.raises(SceneError, match="no JSON document"):
        read_stac(str(path))
    assert read_if_stac(str(tmp_path / "missing.json")) is None
    with pytest.raises(SceneError, match="No such file"):
        read_stac(str(tmp_path / "missing.json"))


def test_items_without_colours_are_all_named_with_their_assets():
    radar = item({"vv": {"href": "https://h/vv.tif"}, "vh": {"href": "https://h/vh.tif"}}, id="S1A")
    half = copy.deepcopy(earth_search())
    half["assets"] = {key: half["assets"][key] for key in ("red", "green", "rededge")}
    document = {"type": "FeatureCollection", "features": [radar, earth_search(), {**half, "id": "half"}]}
    with pytest.raises(SceneError) as caught:
        read_text(document)
    message = str(caught.value)
    assert "2 of 3 items" in message
    assert "S1A: no assets for red, green and blue are among its assets (vv, vh)" in message
    assert "half: no assets for red, green and blue are among its assets (red, green, rededge)" in message


def test_a_page_of_many_is_told():
    document = {"type": "FeatureCollection", "features": [earth_search()], "links": [{"rel": "next", "href": "x"}]}
    assert "one page of several" in one(document).warnings[0]


def test_names_can_be_written_whatever_they_hold():
    product = one({**earth_search(), "id": "a\n\ud800<b>"})
    assert product.name == "a �<b>"
    assert product.name.encode()


@pytest.mark.parametrize(
    "fields",
    [
        {"properties": None},
        {"links": 3},
        {"assets": []},
        {"assets": {"red": 1, "green": {"href": 2}, "blue": {"href": "\0"}}},
        {"assets": {band: {"href": "\n", "eo:bands": 3, "roles": [4]} for band in ("red", "green", "blue")}},
        {"id": 7},
    ],
)
def test_wrong_types_are_errors_of_ours_or_nothing(fields):
    document = {**earth_search(), **fields}
    if "assets" not in fields:
        assert one(document).bands
        return
    with pytest.raises(SceneError, match="cannot be used"):
        one(document)


@pytest.mark.parametrize("raster", [{"scale": 0}, {"scale": 1}, {"scale": "x"}, {"scale": 5e-324}, {"scale": True}, {}])
def test_scales_that_say_nothing(raster):
    document = earth_search()
    for asset in document["assets"].values():
        asset["raster:bands"] = [{"offset": -0.1, **raster}]
    product = one(document)
    assert (product.boa_offset, product.quantification) == (None, None)
