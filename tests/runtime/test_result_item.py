from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import pytest
from shapely.geometry import shape

from rsedge.errors import OptionError
from rsedge.runtime.outputs.records import TileResult
from rsedge.runtime.outputs.stac_item import PROCESSING, result_item_target
from tests.runtime.test_writers import RECORD, RECORDS, SPLIT

pystac = pytest.importorskip("pystac")
pytest.importorskip("jsonschema")

SCENES = [SimpleNamespace(name="a", source="a.tif", files=())]


def item(tmp_path, records, *, cut=2, scenes=SCENES, **options):
    path = tmp_path / "a.stac.json"
    options.setdefault("output", tmp_path / "a.geojson")
    target = result_item_target(path, scenes=scenes, model="fake@0123456789ab", **options)
    results = [TileResult(record, "a.tif") for record in records]
    with target.open() as writer:
        for start in range(0, len(results), cut):
            writer.write(results[start : start + cut])
    assert target.path == path
    values = json.loads(path.read_bytes())
    validate(values)
    return values


def validate(values):
    """Against the schemas of STAC that pystac brings; the extension's are on the web, so its one field is checked."""
    from pystac.validation import validate_dict

    validate_dict(values, extensions=[])
    assert values["stac_extensions"] == [PROCESSING]
    processing = {name: value for name, value in values["properties"].items() if name.startswith("processing:")}
    assert list(processing) == ["processing:software"]
    assert all(isinstance(version, str) and name for name, version in processing["processing:software"].items())
    assert pystac.Item.from_dict(values).id == values["id"]


def test_what_an_item_says(tmp_path):
    records = [
        replace(RECORD, product_id="S2A_X", mgrs_tile="32TQM", rendering="1 + 254 * DN / 2500", scene_crs="EPSG:32632"),
        replace(RECORD, status="cloud", caption=None),
    ]
    values = item(tmp_path, records)
    assert values["id"] == "a"
    assert values["bbox"] == [9.0, 45.0, 9.1, 45.1]
    assert shape(values["geometry"]).equals(shape(RECORD.geometry))
    assert values["properties"]["datetime"] == "2020-02-19T11:21:11Z"
    assert values["properties"]["rsedge:tiles_by_status"] == {"ok": 1, "nodata": 0, "cloud": 1, "read_error": 0}
    assert values["properties"]["rsedge:model"] == "fake@0123456789ab"
    assert values["properties"]["rsedge:renderings"] == ["1 + 254 * DN / 2500"]
    assert values["properties"]["rsedge:mgrs_tiles"] == ["32TQM"]
    assert values["properties"]["rsedge:product_ids"] == ["S2A_X"]
    assert values["properties"]["rsedge:scene_crs"] == ["EPSG:32632"]


def test_the_same_bytes_however_results_come(tmp_path):
    item(tmp_path, RECORDS * 5, cut=1)
    first = (tmp_path / "a.stac.json").read_bytes()
    item(tmp_path, RECORDS * 5, cut=15)
    assert (tmp_path / "a.stac.json").read_bytes() == first


def test_across_the_antimeridian(tmp_path):
    values = item(tmp_path, [replace(RECORD, geometry=SPLIT)])
    assert values["geometry"]["type"] == "MultiPolygon"
    assert values["bbox"] == [179.9, 1.0, -179.9, 2.0]


def test_without_a_place(tmp_path):
    values = item(tmp_path, [replace(RECORD, geometry=None)])
    assert values["geometry"] is None
    assert "bbox" not in values


def test_without_records(tmp_path):
    assert item(tmp_path, [])["properties"]["rsedge:tiles"] == 0


def test_several_times_are_a_range(tmp_path):
    records = [
        replace(RECORD, datetime="2020-02-19T11:21:11.250Z"),
        replace(RECORD, datetime="2019-02-19T11:21:11+02:00"),
        replace(RECORD, datetime=None),
    ]
    properties = item(tmp_path, records)["properties"]
    assert properties["datetime"] is None
    assert properties["start_datetime"] == "2019-02-19T09:21:11Z"
    assert properties["end_datetime"] == "2020-02-19T11:21:11.250Z"


def test_an_unknown_time_is_any_time(tmp_path):
    properties = item(tmp_path, [replace(RECORD, datetime=None)])["properties"]
    assert properties["datetime"] is None
    assert properties["start_datetime"] == "0001-01-01T00:00:00Z"
    assert properties["end_datetime"] == "9999-12-31T23:59:59Z"
    assert properties["rsedge:datetime_source"] == "no time is known"


@pytest.mark.parametrize(
    ("names", "first", "last"),
    [
        (["m_4709963_se_14_1_20100629_20101001"], "2010-06-29", "2010-06-29"),
        (["a-2011-02-03T101112"], "2011-02-03", "2011-02-03"),
        (["x_20101399_20120229"], "2012-02-29", "2012-02-29"),  # the first number is no date
        (["b_20200101", "a_20190101"], "2019-01-01", "2020-01-01"),
        (["b_20200101", "a"], None, None),  # a range of some scenes would leave others out
        (["a_120200101"], None, None),
        (["a_2020-0101"], None, None),
    ],
)
def test_dates_in_names_stand_for_unknown_times(tmp_path, names, first, last):
    scenes = [SimpleNamespace(name=name, source="a.tif", files=()) for name in names]
    properties = item(tmp_path, [replace(RECORD, datetime=None)], scenes=scenes)["properties"]
    if first is None:
        assert properties["rsedge:datetime_source"] == "no time is known"
    else:
        assert properties["datetime"] is None
        assert properties["start_datetime"] == f"{first}T00:00:00Z"
        assert properties["end_datetime"] == f"{last}T23:59:59Z"
        assert properties["rsedge:datetime_source"].startswith("dates in the names")
    # A known time wins.
    known = item(tmp_path, [replace(RECORD, datetime="2021-01-01T00:00:00Z")], scenes=scenes)["properties"]
    assert known["datetime"] == "2021-01-01T00:00:00Z"
    assert "rsedge:datetime_source" not in known


def test_assets_are_beside_the_item(tmp_path):
    (tmp_path / "sub").mkdir()
    others = {"report": tmp_path / "sub" / "re port#1.html", "embeddings": tmp_path.parent / "e.parquet"}
    others["sheet"] = tmp_path / "s.png"
    assets = item(tmp_path, RECORDS, others=others, key="classes")["assets"]
    assert assets["classes"]["href"] == "./a.geojson"
    assert assets["classes"]["type"] == "application/geo+json"
    assert assets["classes"]["roles"] == ["data"]
    assert assets["report"]["href"] == "./sub/re%20port%231.html"
    assert (tmp_path / unquote(assets["report"]["href"])).parent.is_dir()
    assert assets["embeddings"]["href"] == "../e.parquet"
    assert assets["embeddings"]["type"] == "application/vnd.apache.parquet"
    assert assets["sheet"] == {"href": "./s.png", "title": "Contact sheet", "type": "image/png", "roles": ["overview"]}


def test_a_format_the_suffix_does_not_name(tmp_path):
    output = tmp_path / "a.txt"
    assert item(tmp_path, RECORDS, output=output, file_format="CSV")["assets"]["captions"]["type"] == "text/csv"
    assert "type" not in item(tmp_path, RECORDS, output=output)["assets"]["captions"]


def test_captions_on_standard_output_are_no_asset(tmp_path):
    values = item(tmp_path, RECORDS, output=None)
    assert values["assets"] == {}
    assert values["id"] == "a.stac"


@pytest.mark.parametrize(
    ("source", "href"),
    [
        ("https://user:word@host.org/a b.tif?X-Amz-Signature=1#x", "https://host.org/a%20b.tif"),
        ("/vsicurl/https://host.org/a.tif?sig=1", "https://host.org/a.tif"),
        ("/vsis3/bucket/a.tif", "s3://bucket/a.tif"),
        ("s3://bucket/a.tif", "s3://bucket/a.tif"),
        ("{folder}/data/a.tif", "./data/a.tif"),
        ("/vsizip/{folder}/a.SAFE.zip", "./a.SAFE.zip"),
        ("{folder}/\udcff.tif", "./%FF.tif"),
    ],
)
def test_scenes_are_linked(tmp_path, source, href):
    scene = SimpleNamespace(name="<a>", source=source.format(folder=tmp_path), files=())
    (link,) = item(tmp_path, RECORDS, scenes=[scene])["links"]
    assert link["rel"] == "derived_from"
    assert link["href"] == href
    assert link["title"] == "<a>"


def test_scenes_far_apart_are_several_polygons(tmp_path):
    def at(lon):
        ring = [[lon, 0.0], [lon + 1, 0.0], [lon + 1, 1.0], [lon, 1.0], [lon, 0.0]]
        return replace(RECORD, scene=str(lon), geometry={"type": "Polygon", "coordinates": [ring]})

    values = item(tmp_path, [at(0.0), at(50.0), at(1.0)])
    assert len(values["geometry"]["coordinates"]) == 2
    assert values["bbox"] == [0.0, 0.0, 51.0, 1.0]


def test_names_that_cannot_be(tmp_path):
    options = {"scenes": SCENES, "model": "m", "output": tmp_path / "a.json"}
    with pytest.raises(OptionError, match=r"in \.json"):
        result_item_target(tmp_path / "a.txt", **options)
    with pytest.raises(OptionError, match="name two files"):
        result_item_target(Path(tmp_path / "x" / ".." / "a.json"), **options)
