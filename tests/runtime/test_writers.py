from __future__ import annotations

import csv
import io
import json
import sys
from dataclasses import replace

import geopandas
import pyogrio
import pytest

from rsedge.errors import OptionError, OutputError
from rsedge.runtime.outputs.records import TileRecord
from rsedge.runtime.outputs.writers import FORMATS, open_writer, parse_format

SQUARE = {"type": "Polygon", "coordinates": [[[9.0, 45.0], [9.1, 45.0], [9.1, 45.1], [9.0, 45.1], [9.0, 45.0]]]}
SPLIT = {
    "type": "MultiPolygon",
    "coordinates": [
        [[[179.9, 1.0], [180.0, 1.0], [180.0, 2.0], [179.9, 1.0]]],
        [[[-180.0, 1.0], [-179.9, 1.0], [-180.0, 2.0], [-180.0, 1.0]]],
    ],
}
RECORD = TileRecord(
    scene="a",
    row=0,
    col=1,
    row_off=0,
    col_off=224,
    width=224,
    height=100,
    geometry=SQUARE,
    caption="a river, “wide” – and fields",
    score=-1.2345,
    status="ok",
    nodata_fraction=0.25,
    cloud_fraction=None,
    datetime="2020-02-19T11:21:11Z",
    model="fake@0123456789ab",
)
RECORDS = [
    RECORD,
    replace(RECORD, col=2, geometry=SPLIT),
    replace(RECORD, col=3, geometry=None, caption=None, score=None, status="read_error", message="no\nluck"),
]


def written(tmp_path, name, records=RECORDS):
    path = tmp_path / name
    with open_writer(path) as writer:
        writer.write(records[:1])
        writer.write(iter(records[1:]))
    return path


@pytest.mark.parametrize("suffix", ["geojson", "geojsonl"])
def test_gdal_and_geopandas_read_geojson(tmp_path, suffix):
    path = written(tmp_path, f"a.{suffix}")
    frame = geopandas.read_file(path)
    assert frame.crs.to_epsg() == 4326
    assert list(frame["caption"].astype(object).where(frame["caption"].notna(), None)) == [
        record.caption for record in RECORDS
    ]
    assert list(frame["status"]) == ["ok", "ok", "read_error"]
    assert frame.geometry[0].equals(geopandas.GeoSeries.from_wkt(["POLYGON((9 45,9.1 45,9.1 45.1,9 45.1,9 45))"])[0])
    assert frame.geometry[1].geom_type == "MultiPolygon"
    assert frame.geometry[2] is None
    assert pyogrio.read_info(path)["features"] == 3


def test_geojson_text(tmp_path):
    path = written(tmp_path, "a.geojson")
    lines = path.read_text("utf-8").splitlines()
    assert lines[0] == '{"type":"FeatureCollection","features":['
    assert lines[-1] == "]}"
    assert len(lines) == 2 + len(RECORDS)
    whole = json.loads(path.read_bytes())
    assert "crs" not in whole
    for feature, record in zip(whole["features"], RECORDS, strict=True):
        assert feature["geometry"] == record.geometry
        assert feature["properties"] == {key: value for key, value in record.to_dict().items() if key != "geometry"}
    assert "“wide”" in lines[1]  # UTF-8, not escapes


def test_geojson_lines_are_the_same_features(tmp_path):
    features = json.loads(written(tmp_path, "a.geojson").read_bytes())["features"]
    lines = written(tmp_path, "a.geojsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == features


@pytest.mark.parametrize("suffix", list(FORMATS))
def test_no_records(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    with open_writer(path):
        pass
    if suffix == "geojson":
        assert json.loads(path.read_bytes()) == {"type": "FeatureCollection", "features": []}
    elif suffix == "csv":
        assert len(path.read_text().splitlines()) == 1
    elif suffix == "parquet":
        assert len(geopandas.read_parquet(path)) == 0
    elif suffix == "gpkg":
        assert len(geopandas.read_file(path)) == 0
    else:
        assert path.read_bytes() == b""


def test_csv_read_back(tmp_path):
    path = written(tmp_path, "a.csv")
    rows = list(csv.DictReader(io.StringIO(path.read_text("utf-8"))))
    assert [row["caption"] for row in rows] == [RECORD.caption, RECORD.caption, ""]
    assert rows[0]["score"] == "-1.2345"  # a number starts no formula
    assert rows[2]["message"] == "no luck"
    assert list(rows[0]) == list(RECORD.to_dict())
    shapes = geopandas.GeoSeries.from_wkt([row["geometry"] for row in rows[:2]])
    assert list(shapes.geom_type) == ["Polygon", "MultiPolygon"]
    assert json.loads(geopandas.GeoSeries(shapes[:1]).to_json())["features"][0]["geometry"] == SQUARE
    frame = pyogrio.read_dataframe(path, GEOM_POSSIBLE_NAMES="geometry")
    assert frame.geometry[0].equals(shapes[0])


@pytest.mark.parametrize(
    "start", ["=", "+", "-", "@", "\t=", "\r+", "＝", "－", "﹣", " =", "\u3000=", '"=', "'@", "“-"]
)
def test_csv_starts_no_formula(tmp_path, start):
    path = written(tmp_path, "a.csv", [replace(RECORD, caption=f'{start}HYPERLINK("x")')])
    (row,) = csv.DictReader(io.StringIO(path.read_text("utf-8")))
    assert row["caption"] == "'" + start.replace("\t", " ").replace("\r", " ") + 'HYPERLINK("x")'


@pytest.mark.parametrize("text", ["fields;=1+1", "fields; @SUM(1)", 'fields;"=1"', "a;b;-1", ";+1"])
def test_csv_starts_no_formula_where_semicolons_part_cells(tmp_path, text):
    path = written(tmp_path, "a.csv", [replace(RECORD, caption=text)])
    rows = list(csv.reader(io.StringIO(path.read_text("utf-8")), delimiter=";", quoting=csv.QUOTE_NONE))
    assert [each for each in rows[1] if each.strip(' "')[:1] in tuple("=+-@")] == []


@pytest.mark.parametrize("text", ["a river; green fields - and a road", "2 + 2 = 4", "x@y"])
def test_csv_leaves_plain_text_alone(tmp_path, text):
    path = written(tmp_path, "a.csv", [replace(RECORD, caption=text)])
    (row,) = csv.DictReader(io.StringIO(path.read_text("utf-8")))
    assert row["caption"] == text


CONTROLS = "".join(map(chr, [*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029]))


def test_csv_holds_no_control_character(tmp_path):
    content = written(tmp_path, "a.csv", [replace(RECORD, caption=CONTROLS)]).read_text("utf-8")
    assert len(content.splitlines()) == 2
    assert [letter for letter in content if letter in CONTROLS] == ["\n", "\n"]


@pytest.mark.parametrize("suffix", ["geojson", "geojsonl"])
def test_geojson_holds_no_control_character(tmp_path, suffix):
    content = written(tmp_path, f"a.{suffix}", [replace(RECORD, caption=CONTROLS)]).read_text("utf-8")
    assert set(content) & set(CONTROLS) == {"\n"}
    (line,) = [line for line in content.splitlines() if '"caption"' in line]
    assert set(json.loads(line)["properties"]["caption"]) == {" ", "\ufffd"}


@pytest.mark.parametrize("name", ["gpkg", ".GPKG"])
def test_what_needs_a_file_goes_to_no_pipe(name):
    with pytest.raises(OptionError, match=r"needs a file.*geojsonl"):
        parse_format("-", name)


@pytest.mark.parametrize(
    ("target", "name", "expected"),
    [
        ("a.geojson", None, "geojson"),
        ("a.GeoJSONL", None, "geojsonl"),
        ("a.b.csv", None, "csv"),
        ("-", None, "geojsonl"),
        ("-", "csv", "csv"),
        ("a.txt", "geojson", "geojson"),
        ("a.txt", ".CSV", "csv"),
    ],
)
def test_format(target, name, expected):
    assert parse_format(target, name) == expected


@pytest.mark.parametrize(("target", "name"), [("a", None), ("a.shp", None), ("a.csv", "shp"), ("-", "xml")])
def test_unknown_format(target, name):
    with pytest.raises(OptionError, match=r"geojsonl, \.?csv"):
        parse_format(target, name)


def test_output_appears_only_when_whole(tmp_path):
    path = tmp_path / "a.geojson"
    path.write_text("old")

    def fail_midway():
        with open_writer(path) as writer:
            writer.write(RECORDS)
            assert path.read_text() == "old"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_midway()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_stdout_sees_each_batch(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(raw)))
    with open_writer("-") as writer:
        writer.write(RECORDS[:1])
        assert raw.getvalue().count(b"\n") == 1
        writer.write(RECORDS[1:])
    assert raw.getvalue().count(b"\n") == 3
    sys.stdout.write("still open")


def test_folder_that_is_not_there(tmp_path):
    with pytest.raises(OutputError, match="create it first"), open_writer(tmp_path / "no" / "a.csv"):
        pass


def test_special_files_are_left_alone(tmp_path):
    (tmp_path / "a.csv").mkdir()
    with pytest.raises(OutputError, match="not a regular file"), open_writer(tmp_path / "a.csv"):
        pass


def test_names_that_are_not_utf_8(tmp_path):
    record = replace(RECORD, message="\udcff")
    for suffix in FORMATS:
        path = written(tmp_path, f"a.{suffix}", [record])
        if suffix == "parquet":
            assert list(geopandas.read_parquet(path)["message"]) == ["\ufffd"]
        elif suffix == "gpkg":
            assert list(geopandas.read_file(path)["message"]) == ["\ufffd"]
        else:
            path.read_text("utf-8")


@pytest.mark.parametrize("suffix", ["geojson", "geojsonl"])
def test_not_a_number_is_no_json(tmp_path, suffix):
    with pytest.raises(ValueError, match="JSON compliant"):
        written(tmp_path, f"a.{suffix}", [replace(RECORD, score=float("nan"))])
