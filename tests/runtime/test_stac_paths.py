"""What a STAC item may name: files below its own folder, and nothing that GDAL takes for something else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rsedge.errors import OptionError, SceneError
from rsedge.runtime.scenes.access import Access
from rsedge.runtime.scenes.products.stac import read_stac
from tests.runtime.test_stac import earth_search, item, local_item, one, planetary_computer, write


@pytest.fixture
def outside(tmp_path):
    """A folder with the three bands beside the item's own folder ``in``."""
    local_item(tmp_path / "out")
    (tmp_path / "in").mkdir()
    return tmp_path / "out"


def hostile(folder, href, **fields):
    assets = {band: {"href": href.replace("B04", band)} for band in ("B04", "B03", "B02")}
    return write(folder / "item.json", item(assets, **fields))


@pytest.mark.parametrize(
    "href",
    [
        *("{out}/B04.tif", "file://{out}/B04.tif", "file:{out}/B04.tif", "FILE://localhost{out}/B04.tif"),
        *("../out/B04.tif", "%2e%2e/out/B04.tif", "sub/../../out/B04.tif", "link/B04.tif", "B04.tif"),
    ],
)
def test_an_item_names_files_below_its_folder_or_a_root(tmp_path, outside, href):
    (tmp_path / "in" / "link").symlink_to(outside)
    for band in ("B04", "B03", "B02"):
        (tmp_path / "in" / f"{band}.tif").symlink_to(outside / f"{band}.tif")
    path = hostile(tmp_path / "in", href.format(out=outside))
    with pytest.raises(SceneError) as caught:
        read_stac(path)
    assert f"leads to {outside}/B04.tif, outside of {tmp_path}/in" in str(caught.value)
    assert f"--allow-root {outside}" in str(caught.value)
    (product,) = read_stac(path, access=Access(roots=[outside]))
    assert product.bands["red"].path == str(outside / "B04.tif")
    assert read_stac(path, access=Access(roots=[tmp_path]))


def test_items_of_a_collection_and_on_standard_input_are_confined_too(tmp_path, outside, monkeypatch):
    one = json.loads(Path(hostile(tmp_path / "in", "../out/B04.tif")).read_text())
    document = {"type": "FeatureCollection", "features": [one, {**one, "id": "second"}]}
    with pytest.raises(SceneError, match=r"2 of 2 items(.|\n)*second: asset B04: .*--allow-root"):
        read_stac(write(tmp_path / "in" / "items.json", document))
    monkeypatch.chdir(tmp_path / "in")
    with pytest.raises(SceneError, match="--allow-root"):
        read_stac("-", text=json.dumps(one))
    monkeypatch.chdir(tmp_path)
    one["assets"] = {band: {"href": f"out/{band}.tif"} for band in ("B04", "B03", "B02")}
    assert read_stac("-", text=json.dumps(one))


@pytest.mark.parametrize(
    "href",
    [
        *("/vsizip/{out}/a.zip/B04.tif", "/vsisubfile/0_9,{out}/B04.tif", "/vsicurl/http://127.0.0.1/B04.tif"),
        *("/VSIZIP/{out}/a.zip/B04.tif", "/vsistdin/", "/vsicached?file={out}/B04.tif", "sub/vsizip/a.zip/B04.tif"),
        *("file:///vsizip/{out}/a.zip/B04.tif", "<VRTDataset rasterXSize='1'></VRTDataset>", "  <VRTDataset/>B04"),
        *("GTIFF_DIR:1:{out}/B04.tif", "WMS:http://127.0.0.1/B04", 'NETCDF:"{out}/a.nc":B04', "vrt:{out}/B04.tif"),
        *("file:GTIFF_DIR:1:{out}/B04.tif", "ENVI:B04", "https://h/vsizip/B04.tif"),
    ],
)
def test_names_of_gdal_are_refused_by_name(tmp_path, outside, href):
    path = hostile(tmp_path / "in", href.format(out=outside))
    with pytest.raises(SceneError, match=r"asset B04: the href holds '.*a name of GDAL's own"):
        read_stac(path, access=Access(remote=True, roots=[tmp_path], hosts=["127.0.0.1"]))


def test_a_vrt_needs_leave(tmp_path):
    path = local_item(tmp_path)
    (tmp_path / "a.vrt").write_text("<VRTDataset/>")
    (tmp_path / "plain.tif").symlink_to("a.vrt")
    for href in ("a.vrt", "A.VRT", "plain.tif", "https://h/a.vrt?x=1"):
        (tmp_path / "A.VRT").write_text("<VRTDataset/>")
        path = hostile(tmp_path, href)
        with pytest.raises(SceneError, match="--allow-vrt"):
            read_stac(path, access=Access(remote=True))
        assert read_stac(path, access=Access(remote=True, vrt=True))


@pytest.mark.parametrize("link", ["https://[", "https://[x]/y", "https://ex\u2100.com/a", "s3://["])
def test_a_self_link_that_is_no_url_is_said(tmp_path, link):
    path = hostile(tmp_path, "B04.tif", links=[{"rel": "self", "href": link}])
    with pytest.raises(SceneError, match=r"self link .* is none"):
        read_stac(path)


def test_a_self_link_never_makes_a_local_path(tmp_path, outside):
    link = {"links": [{"rel": "self", "href": f"{outside}/item.json"}]}
    with pytest.raises(SceneError, match="does not exist"):
        read_stac(hostile(tmp_path / "in", "B04.tif", **link))
    link = {"links": [{"rel": "self", "href": f"file://{outside}/item.json"}]}
    with pytest.raises(SceneError, match="does not exist"):
        read_stac(hostile(tmp_path / "in", "B04.tif", **link))
    link = {"links": [{"rel": "self", "href": "s3://bucket/a/item.json"}]}
    (product,) = read_stac(hostile(tmp_path / "in", "../out/B04.tif", **link), access=Access(remote=True))
    assert product.bands["red"].path == "/vsis3/bucket/out/B04.tif"


def test_files_beside_an_item_are_confined(tmp_path, outside):
    for band in ("B04_10m", "B03_10m", "B02_10m"):
        (tmp_path / "in" / f"{band}.tif").symlink_to(outside / "B04.tif")
    path = write(tmp_path / "in" / "item.json", planetary_computer())
    with pytest.raises(SceneError, match=r"B04_10m\.tif beside the item leads to .*--allow-root"):
        read_stac(path)
    assert read_stac(path, access=Access(roots=[outside]))
    document = {**planetary_computer(), "id": ".."}
    for band in ("B04_10m", "B03_10m", "B02_10m"):
        (tmp_path / "in" / f"{band}.tif").unlink()
        (tmp_path / f"{band}.tif").touch()
    with pytest.raises(OptionError, match="--allow-remote"):
        read_stac(write(tmp_path / "in" / "item.json", document))


@pytest.mark.parametrize(
    "href", ["x" * 300 + ".tif", "x" * 9000, "a%00.tif", "loop/B04.tif", "//[x/B04.tif", "file://[x/B04.tif", "/"]
)
def test_hrefs_that_are_no_names_end_in_errors(tmp_path, href):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(SceneError, match=r"item\.json: 1 of 1 items cannot be used"):
        read_stac(hostile(tmp_path, href))


def test_numbers_of_any_size(tmp_path):
    document = earth_search()
    for asset in document["assets"].values():
        asset["gsd"] = 10**400
        asset["raster:bands"] = [{"scale": 1e-300, "offset": 1e300}]
    product = one(document)
    assert (product.boa_offset, product.quantification) == (None, None)


def test_names_in_records_have_a_length():
    product = one({**earth_search(), "id": "x" * 10**6, "properties": {"s2:product_uri": "y" * 10**6}})
    assert (len(product.name), len(product.product_id)) == (255, 255)
