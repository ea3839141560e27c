"""Red, green and blue, and offsets, of products of many sensors: from metadata, and with metadata that lie."""
# ruff: noqa: E501 - rows of tables

from __future__ import annotations

import json
import shutil
import zipfile

import numpy as np
import pytest
import rasterio

from rsedge.errors import SceneError
from rsedge.runtime.scenes.opening import open_scenes
from rsedge.runtime.scenes.scene import Scene
from tests import scenes
from tests.safe_products import write_safe

# ---- bands ----


def raster(folder, name, descriptions, *, dtype="uint16", tags=None, lengths=(), photometric="MINISBLACK"):
    count = len(descriptions)
    path = scenes.write(
        folder / f"{name}.tif", scenes.pixels(count, 20, 20, dtype), descriptions=descriptions, tags=tags,
        photometric=photometric,
    )  # fmt: skip
    with rasterio.open(path, "r+") as dataset:
        for band, value in enumerate(lengths, 1):
            dataset.update_tags(band, wavelength=str(value), wavelength_units="Nanometers")
    return path


NONE = ("",) * 4
B4, B7, B8 = (
    tuple(f"{form}{number}" for number in range(1, count + 1)) for form, count in (("b", 4), ("B", 7), ("b", 8))
)
SR = tuple(f"SR_B{number}" for number in range(1, 8))
S2_ALL = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B11", "B12")


@pytest.mark.parametrize(
    ("name", "descriptions", "tags", "expected"),
    [
        ("LC08_L2SP_193023_20230823_20230902_02_T1", SR, None, (4, 3, 2)),
        ("LE07_L2SP_193023_20030823_20200902_02_T1", SR, None, (3, 2, 1)),
        ("a", B7, {"SPACECRAFT_ID": "LANDSAT_7"}, (3, 2, 1)),
        ("a", B7, {"SPACECRAFT_ID": "LANDSAT_9"}, (4, 3, 2)),
        ("20230823_100402_78_2475_3B_AnalyticMS_SR", B4, None, (3, 2, 1)),
        ("20230823_100402_78_2475_3B_AnalyticMS_SR_8b", B8, None, (6, 4, 2)),
        ("a", NONE, {"platform": "planetscope"}, (3, 2, 1)),
        ("m_4709963_se_14_1_20100629", NONE, None, (1, 2, 3)),
        ("a", ("",) * 8, {"satelliteid": "WV02"}, (5, 3, 2)),
        ("a", B4, {"sensor": "GeoEye-1"}, (3, 2, 1)),
        ("HLS.L30.T34UCF.2023235T095559.v2.0", ("B02", "B03", "B04", "B05"), None, (3, 2, 1)),
        ("S2A_MSIL2A_20230823T095559_N0509_R122_T34UCF_20230823T143200", S2_ALL, None, (4, 3, 2)),
        ("a", S2_ALL, None, (4, 3, 2)),
        ("a", ("B02", "B03", "B04"), None, (3, 2, 1)),
        ("a", ("B8", "B4", "B3", "B2"), None, (2, 3, 4)),
        ("a", ("nir", "red", "green", "blue"), {"platform": "landsat-7"}, (2, 3, 4)),
        ("S2A_MSIL2A_20230823T095559_N0509_R122_T34UCF_20230823T143200", ("",) * 12, None, (4, 3, 2)),
        ("a", ("BAND_B", "BAND_G", "BAND_R", "BAND_N"), None, (3, 2, 1)),
        ("a", B7, {"instrument": "TM"}, (3, 2, 1)),
    ],
)
def test_bands_of_known_sensors(tmp_path, name, descriptions, tags, expected):
    scene = Scene.open(raster(tmp_path, name, descriptions, tags=tags))
    assert scene.bands == expected, scene.bands_reason


@pytest.mark.parametrize("descriptions", [B4, B7, ("Band 1", "Band 2", "Band 3", "Band 4")])
def test_numbers_of_an_unknown_sensor_are_asked_about(tmp_path, descriptions):
    with pytest.raises(SceneError, match=r"unclear which bands are red.*--bands 4,3,2 \(.*--bands 3,2,1 \("):
        Scene.open(raster(tmp_path, "a", descriptions))


@pytest.mark.parametrize(
    ("name", "descriptions", "tags"),
    [
        ("a", ("B1", "B2", "B3", "B4", "B5"), {"platform": "RapidEye-3", "sensor": "MSI"}),
        ("a", B7, {"TIFFTAG_IMAGEDESCRIPTION": "made with a program (TM)"}),
        ("oli_at_the_lake", B7, None),
        ("a", ("B2", "B3", "B4", "B5"), None),  # green, red and two infrared bands of Landsat 7
    ],
)
def test_words_and_numbers_alone_name_no_sensor(tmp_path, name, descriptions, tags):
    with pytest.raises(SceneError, match=r"unclear which bands are red.*--bands \d,\d,\d \("):
        Scene.open(raster(tmp_path, name, descriptions, tags=tags))


@pytest.mark.parametrize("descriptions", [("B4", "B3", "B2"), ("B8", "B4", "B3", "B2"), ("SR_B2", "SR_B3", "SR_B4")])
def test_numbers_of_sentinel2_without_its_name_are_doubted(tmp_path, descriptions):
    (doubt,) = Scene.open(raster(tmp_path, "a", descriptions)).warnings
    assert "nothing names its sensor" in doubt
    assert not Scene.open(raster(tmp_path, "b", descriptions, tags={"platform": "landsat-8"})).warnings


@pytest.mark.parametrize(
    ("names", "advice"),
    [
        (["LANDSAT7_2003_B{}"], "Landsat 4–7: gdalbuildvrt -separate rgb.vrt B3.tif B2.tif B1.tif"),
        (["20230823_PSScene_B{}"], "RED.tif GREEN.tif BLUE.tif"),
        (["scene_B{}"], "B4.tif B3.tif B2.tif"),
        (["scene_B0{}"], None),
        (["S2A_29RKH_20200219_0_L2A_B{}"], None),
        (["HLS.L30.T34UCF.2023235T095559.v2.0.B0{}"], None),
    ],
)
def test_bands_as_files_of_another_sensor_are_no_scene(tmp_path, names, advice):
    for band in (2, 3, 4):
        scenes.write(tmp_path / f"{names[0].format(band)}.tif", np.full((1, 20, 20), 500 * band, np.uint16))
    if advice is None:
        (scene,) = open_scenes([str(tmp_path)])
        with scene.reader() as reader:
            assert reader.read(0, 0, 1, 1)[0][0, 0].tolist() == [204, 153, 103]  # 1 + 254 · 2000 / 2500 …
    else:
        with pytest.raises(SceneError) as caught:
            open_scenes([str(tmp_path)])
        assert advice in str(caught.value)


@pytest.mark.parametrize("prefix", ["B", "band_", "Band "])
def test_colour_interpretation_outranks_numbers(tmp_path, prefix):
    descriptions = tuple(f"{prefix}{number}" for number in range(1, 5))
    scene = Scene.open(raster(tmp_path, "a", descriptions, dtype="uint8", photometric="RGB"))
    assert scene.bands == (1, 2, 3)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [((443, 490, 560, 665, 705), (4, 3, 2)), ((842, 665, 560, 490), (2, 3, 4)), ((485, 530, 565, 660), (4, 3, 1))],
)
def test_wavelengths_tell_colours(tmp_path, lengths, expected):
    path = raster(tmp_path, "a", tuple(f"b{number}" for number in range(1, len(lengths) + 1)), lengths=lengths)
    scene = Scene.open(path)
    assert scene.bands == expected
    assert "wavelength" in scene.bands_reason


def test_bands_that_are_not_true_colour_are_doubted(tmp_path):
    path = raster(tmp_path, "a", ("B02", "B03", "B04", "B08"))
    (doubt,) = Scene.open(path, bands=(4, 3, 2)).warnings
    assert "bands 4,3,2 are not its true colour, 3,2,1" in doubt
    assert "leave --bands out" in doubt
    assert not Scene.open(path, bands=(3, 2, 1)).warnings


# ---- STAC ----


def item(folder, assets, properties, *, name="item", collection=None, pixels=None):
    folder.mkdir(exist_ok=True)
    document = {
        "type": "Feature", "stac_version": "1.0.0", "id": name, "geometry": None, "links": [],
        "properties": {"datetime": "2023-08-23T09:55:59Z", **properties}, "assets": {},
    }  # fmt: skip
    if collection:
        document["collection"] = collection
    for number, (key, fields) in enumerate(assets.items()):
        count = max(1, len(fields.get("eo:bands", fields.get("bands", []))))
        data = np.full((count, 20, 20), 2000, np.uint16) + np.arange(count, dtype=np.uint16)[:, None, None] * 100
        data += np.uint16(number * 100)
        scenes.write(folder / f"{key}.tif", data if pixels is None else pixels)
        document["assets"][key] = {"href": f"./{key}.tif", "roles": ["data"], **fields}
    (folder / f"{name}.json").write_text(json.dumps(document))
    return folder / f"{name}.json"


@pytest.mark.parametrize(
    ("bands", "properties", "expected"),
    [
        (
            [{"name": f"b{n}", "description": word} for n, word in enumerate(("Red", "Green", "Blue", "NIR"), 1)],
            {},
            [1, 2, 3],
        ),
        (
            [{"name": f"b{n}", "center_wavelength": um} for n, um in enumerate((0.49, 0.56, 0.665, 0.84), 1)],
            {},
            [3, 2, 1],
        ),
        ([{"name": f"B{n}"} for n in range(1, 8)], {"platform": "landsat-7", "instruments": ["etm+"]}, [3, 2, 1]),
        ([{"name": f"B{n}"} for n in range(1, 8)], {"platform": "landsat-9"}, [4, 3, 2]),
        ([{"name": f"x{n}", "common_name": word} for n, word in enumerate(("blue", "green", "red"), 1)], {}, [3, 2, 1]),
        ([{"name": f"b{n}"} for n in range(1, 5)], {"platform": "24a1", "constellation": "planetscope"}, [3, 2, 1]),
        ([{"name": f"b{n}"} for n in range(1, 9)], {"platform": "planetscope", "instruments": ["PSB.SD"]}, [6, 4, 2]),
        ([{"name": f"B0{n}"} for n in range(1, 5)], {}, [4, 3, 2]),
    ],
)
def test_bands_of_items(tmp_path, bands, properties, expected):
    scene = Scene.open(item(tmp_path, {"data": {"eo:bands": bands}}, properties))
    assert [part.band for part in scene.parts] == expected or list(scene.bands) == expected


@pytest.mark.parametrize(
    "properties",
    [{}, {"platform": "rapideye-1", "instruments": ["msi"]}, {"platform": "gaofen-6", "instruments": ["wfv"]}],
)
def test_numbers_of_items_without_a_known_sensor_are_asked_about(tmp_path, properties):
    bands = {"data": {"eo:bands": [{"name": f"B{n}"} for n in range(1, 8)]}}
    with pytest.raises(SceneError, match=r"whose numbers mean nothing.*file of data with --bands 4,3,2 \(.*3,2,1 \("):
        Scene.open(item(tmp_path / "one", bands, properties))
    with pytest.raises(SceneError, match=r"\(B2, B3, B4, B5\), whose numbers mean nothing without a sensor"):
        Scene.open(item(tmp_path / "each", {f"B{n}": {} for n in range(2, 6)}, properties))


def test_the_reason_of_an_item_names_bands_and_rule(tmp_path):
    named = [{"name": f"B{n}"} for n in range(1, 8)]
    scene = Scene.open(item(tmp_path, {"data": {"eo:bands": named}}, {"platform": "landsat-7"}))
    assert scene.bands_reason == (
        "STAC assets: red = data band 3, green = data band 2, blue = data band 1, by numbers of Landsat 4–7"
    )


def test_several_descriptions_of_one_band_take_no_scale(tmp_path):
    rasters = [{"scale": 0.01, "offset": 0}, {"scale": 0.0001, "offset": 0}]
    assets = {
        colour: {"eo:bands": [{"common_name": colour}], "raster:bands": rasters} for colour in ("red", "green", "blue")
    }
    scene = Scene.open(item(tmp_path, assets, {}))
    assert scene.reflectance.full_scale == 2500
    assert any("2 raster:bands" in warning for warning in scene.warnings)
    with scene.reader() as reader:
        assert reader.read(0, 0, 1, 1)[0][0, 0].tolist() == [204, 214, 225]


# ---- offsets of twelve kinds of products ----

S2 = {"platform": "sentinel-2a", "constellation": "sentinel-2", "instruments": ["msi"]}
COLOURS = ("red", "green", "blue")


def assets_of(offset=None, scale=0.0001):
    rasters = {} if offset is None else {"raster:bands": [{"scale": scale, "offset": offset}]}
    return {colour: {"eo:bands": [{"common_name": colour}], **rasters} for colour in COLOURS}


def plain(folder, name, *, low=1200, high=3000, tags=None, scale=None):
    data = np.random.default_rng(0).integers(low, high, (3, 40, 40)).astype(np.uint16)
    path = scenes.write(folder / f"{name}.tif", data, descriptions=("B04", "B03", "B02"), tags=tags)
    if scale:
        with rasterio.open(path, "r+") as dataset:
            dataset.scales, dataset.offsets = (scale[0],) * 3, (scale[1],) * 3
    return path


@pytest.mark.parametrize(
    ("make", "offset", "full_scale"),
    [
        pytest.param(lambda d: write_safe(d, seed=1, size=60, baseline="02.14").path, 0, 2500, id="SAFE 02.14"),
        pytest.param(lambda d: write_safe(d, seed=1, size=60, baseline="04.00").path, -1000, 2500, id="SAFE 04.00"),
        pytest.param(lambda d: write_safe(d, seed=1, size=60, baseline="05.11").path, -1000, 2500, id="SAFE 05.11"),
        pytest.param(lambda d: write_safe(d, seed=1, size=60, level="L1C").path, -1000, 2500, id="L1C"),
        pytest.param(
            lambda d: item(d, assets_of(-0.1), {**S2, "s2:processing_baseline": "05.09",
                           "earthsearch:boa_offset_applied": True}), 0, 2500, id="Earth Search v1, applied",
        ),
        pytest.param(
            lambda d: item(d, assets_of(-0.1), {**S2, "s2:processing_baseline": "05.09",
                           "earthsearch:boa_offset_applied": False}), -1000, 2500, id="Earth Search c1, not applied",
        ),
        pytest.param(
            lambda d: item(d, assets_of(), {**S2, "s2:processing_baseline": "05.09"}), -1000, 2500, id="Planetary Computer",
        ),
        pytest.param(lambda d: plain(d, "20230823T095559_20230823T095553_T34UCF", low=200), 0, 2500, id="GEE harmonised"),
        pytest.param(lambda d: plain(d, "HLS.S30.T34UCF.2023235T095559.v2.0", scale=(1e-4, 0)), 0, 2500, id="HLS"),
        pytest.param(lambda d: plain(d, "LC08_L2SP_193023_20230823_20230902_02_T1", low=8000 - 6000,
                                     scale=(2e-4, -0.2)), -1000, 1250, id="scaled"),
        pytest.param(
            lambda d: item(d, assets_of(-0.2, 2.75e-5), {"platform": "landsat-9", "instruments": ["oli"]},
                           pixels=np.full((1, 20, 20), 9000, np.uint16)), -7273, 9091, id="Landsat",
        ),
        pytest.param(
            lambda d: item(d, assets_of(), {"platform": "venus", "processing:version": "04.10"}), 0, 2500, id="Venus",
        ),
        pytest.param(lambda d: plain(d, "stack"), 0, 2500, id="plain stack"),
        pytest.param(
            lambda d: item(d, {k: {} for k in ("B02", "B03", "B04")}, {**S2, "processing:version": "05.10"},
                           name="HLS.S30.T34UCF.2023235T095559.v2.0"), 0, 2500, id="HLS as an item",
        ),
        pytest.param(
            lambda d: plain(d, "LC08_L2SP_193023_20230823_20230902_02_T1", low=9000, high=20000), -7273, 9091,
            id="Landsat without scales",
        ),
        pytest.param(
            lambda d: item(d, assets_of(), {"platform": "landsat-8"}, name="LC08_L2SP_193023_20230823_20230902_02_T1",
                           pixels=np.full((1, 20, 20), 9000, np.uint16)), -7273, 9091, id="a Landsat item without scales",
        ),
        pytest.param(  # reflectance of -0.02, as of dark water
            lambda d: plain(d, "LC08_L2SP_193023_20230823_20230902_02_T1", low=6546, high=6547), -7273, 9091,
            id="dark Landsat",
        ),
        # Metadata that lie.
        pytest.param(
            lambda d: plain(d, "LC08_L2SP_193023_20230823_20230902_02_T1"), 0, 2500,
            id="Landsat scaled to reflectance times 10,000",
        ),
        pytest.param(
            lambda d: item(d, assets_of(), {"platform": "landsat-8", "s2:processing_baseline": "05.09"},
                           collection="sentinel-2-l2a"), 0, 2500, id="Landsat in a collection of Sentinel-2",
        ),
        pytest.param(
            lambda d: item(d, assets_of(), {"platform": "venus", "s2:processing_baseline": "05.09"}), 0, 2500,
            id="a baseline of Sentinel-2 on another platform",
        ),
        pytest.param(
            lambda d: item(d, assets_of(-0.1), {**S2, "s2:processing_baseline": "05.09"},
                           pixels=np.full((1, 20, 20), 300, np.uint16)), 0, 2500, id="an offset that pixels contradict",
        ),
        pytest.param(
            lambda d: plain(d, "S2A_MSIL2A_20230823T095559_N0509_R122_T34UCF_20230823T143200",
                            tags={"platform": "landsat-8"}), 0, 2500, id="a name of Sentinel-2 on Landsat",
        ),
    ],
)  # fmt: skip
def test_offsets(tmp_path, make, offset, full_scale):
    rule = Scene.open(make(tmp_path / "d" if (tmp_path / "d").mkdir() is None else tmp_path)).reflectance
    assert (rule.boa_offset, rule.full_scale) == (offset, full_scale)


# ---- archives by content ----


def test_a_zip_is_one_by_its_content(tmp_path):
    product = write_safe(tmp_path / "p", seed=1, size=60, zipped=True).path
    named = tmp_path / product.name.removesuffix(".zip")
    shutil.copy(product, named)
    assert Scene.open(named).bands_reason == Scene.open(product).bands_reason
    assert len(open_scenes([str(named)])) == 1
    other = tmp_path / "download.bin"
    shutil.copy(product, other)
    assert Scene.open(other).product_id


@pytest.mark.parametrize("share", [0.2, 0.6, 0.95])
def test_a_zip_that_was_cut_off_says_so(tmp_path, share):
    product = write_safe(tmp_path / "p", seed=1, size=60, zipped=True).path
    named = tmp_path / "in" / product.name.removesuffix(".zip")
    named.parent.mkdir()
    named.write_bytes(product.read_bytes()[: int(product.stat().st_size * share)])
    (tmp_path / "renamed").mkdir()
    renamed = shutil.copy(named, tmp_path / "renamed" / "download.zip")
    for source in (named, named.parent, renamed, tmp_path / "renamed"):
        with pytest.raises(SceneError, match=r"is no whole zip.*download it again"):
            open_scenes([str(source)])


def test_a_raster_called_a_zip_is_a_raster(tmp_path):
    path = scenes.write(tmp_path / "a.tif", scenes.pixels(3, 20, 20), photometric="RGB").rename(tmp_path / "a.zip")
    assert Scene.open(path).bands == (1, 2, 3)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_in_a_zip_is_to_be_unpacked(tmp_path, method):
    product = write_safe(tmp_path / "p", seed=1, size=60, zipped=True).path
    with zipfile.ZipFile(tmp_path / "outer.zip", "w", method) as outer:
        outer.write(product, "wrapped/product.zip")
    with pytest.raises(SceneError, match=r"zip in a zip|zip with a zip"):
        Scene.open(tmp_path / "outer.zip")
