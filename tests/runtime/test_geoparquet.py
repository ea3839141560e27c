from __future__ import annotations

import base64
import io
import itertools
import json
import sys
from dataclasses import replace

import geopandas
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyogrio
import pytest
import shapely

from rsedge.errors import OptionError
from rsedge.runtime.outputs import geoparquet
from rsedge.runtime.outputs.geometry import bounding_box, wkb
from rsedge.runtime.outputs.geoparquet import EmbeddingsInfo, embeddings_table, make_schema, open_embeddings
from rsedge.runtime.outputs.records import TileResult
from rsedge.runtime.outputs.writers import open_writer
from rsedge.runtime.search.search_file import SearchFile
from tests.runtime.search_files import read_embeddings
from tests.runtime.test_writers import RECORD, RECORDS, SPLIT, SQUARE

INFO = EmbeddingsInfo(model="eye@abcdefabcdef", model_hash="abcdefabcdef" + 52 * "0", dim=3, dtype="float16")


def results(count, dtype=np.float16):
    """``count`` results, each third of them without an embedding and each seventh without a place."""
    generator = np.random.default_rng(0)
    for number in range(count):
        record = replace(RECORD, row=number, geometry=None if number % 7 == 6 else SQUARE)
        vector = generator.standard_normal(3).astype(dtype)
        if number % 3 == 2:
            yield TileResult(replace(record, status="nodata", message="no pixel has data"), "a.tif")
        else:
            yield TileResult(record, "a.tif", vector)


def embedded(path, rows, info=INFO):
    with open_embeddings(path, info) as writer:
        writer.write(rows)
    return path


def captions(path, records=RECORDS):
    with open_writer(path) as writer:
        writer.write(iter(records))
    return path


@pytest.mark.parametrize("geometry", [SQUARE, SPLIT])
def test_wkb_and_bounds_are_what_shapely_says(geometry):
    shape = shapely.from_geojson(json.dumps(geometry))
    assert wkb(geometry) == shapely.to_wkb(shape, byte_order=1)
    assert bounding_box(geometry) == list(shape.bounds)
    assert wkb(None) is None


def test_captions_read_by_geopandas_are_those_of_geojson(tmp_path):
    ours = geopandas.read_parquet(captions(tmp_path / "a.parquet"))
    theirs = geopandas.read_file(captions(tmp_path / "a.geojson"))
    assert ours.crs.to_authority() == ("OGC", "CRS84")
    assert theirs.crs.to_epsg() == 4326, "the same in longitude and latitude"
    assert "embedding" not in ours
    assert list(ours.columns) == [name for name in RECORD.to_dict() if name != "geometry"] + ["geometry"]
    assert ours.geometry.to_wkb()[:2].tolist() == theirs.geometry.to_wkb()[:2].tolist()
    assert ours.geometry[2] is None
    for name in set(ours.columns) - {"geometry", "datetime"}:
        assert ours[name].astype(object).where(ours[name].notna(), None).tolist() == [
            getattr(record, name) for record in RECORDS
        ]
    assert ours["datetime"][0].isoformat() == "2020-02-19T11:21:11+00:00"


def test_metadata_keep_the_rules_of_geoparquet(tmp_path):
    """The requirements of the specification's JSON schema and text, one by one."""
    path = captions(tmp_path / "a.parquet")
    stored = pq.read_metadata(path).metadata[b"geo"]
    assert pq.read_schema(path).metadata[b"geo"] == stored, "readers of Arrow's schema find it too"
    geo = json.loads(stored)
    assert set(geo) == {"version", "primary_column", "columns"}
    assert geo["version"] == "1.1.0"
    assert geo["primary_column"] == "geometry"
    (column,) = geo["columns"].values()
    assert set(column) == {"encoding", "geometry_types", "orientation", "bbox", "covering"}
    assert column["encoding"] == "WKB"
    assert sorted(column["geometry_types"]) == ["MultiPolygon", "Polygon"]
    assert column["orientation"] == "counterclockwise"
    shapes = [shapely.from_geojson(json.dumps(record.geometry)) for record in RECORDS[:2]]
    assert column["bbox"] == list(shapely.total_bounds(shapes))
    corners = ["xmin", "ymin", "xmax", "ymax"]
    assert column["covering"] == {"bbox": {corner: ["bbox", corner] for corner in corners}}
    # No crs: longitude and latitude. The columns themselves: at the root, binary, not repeated; doubles in a struct.
    schema = pq.ParquetFile(path).schema
    leaves = {schema.column(i).path: schema.column(i) for i in range(len(schema.names))}
    assert leaves["geometry"].physical_type == "BYTE_ARRAY"
    assert leaves["geometry"].max_repetition_level == 0
    assert [leaves[f"bbox.{corner}"].physical_type for corner in corners] == ["DOUBLE"] * 4
    table = pq.read_table(path)
    for row, record in zip(table.to_pylist(), RECORDS, strict=True):
        assert row["bbox"] == (
            None if record.geometry is None else dict(zip(corners, bounding_box(record.geometry), strict=True))
        )


def test_readers_skip_by_bbox(tmp_path):
    west, east = (
        {"type": "Polygon", "coordinates": [[[x, 0.0], [x + 1.0, 0.0], [x + 1.0, 1.0], [x, 0.0]]]} for x in (0.0, 50.0)
    )
    path = captions(tmp_path / "a.parquet", [replace(RECORD, geometry=west), replace(RECORD, geometry=east)])
    assert geopandas.read_parquet(path, bbox=(49, 0, 60, 1)).geometry[0].bounds[0] == 50
    statistics = {
        pq.read_metadata(path).row_group(0).column(i).path_in_schema: pq.read_metadata(path).row_group(0).column(i)
        for i in range(pq.read_metadata(path).num_columns)
    }
    assert (statistics["bbox.xmin"].statistics.min, statistics["bbox.xmax"].statistics.max) == (0, 51)
    assert {column.compression for column in statistics.values()} == {"ZSTD"}


def test_gdal_reads_it(tmp_path):
    if "Parquet" not in pyogrio.list_drivers():
        pytest.skip("this build of GDAL has no Parquet driver")
    path = embedded(tmp_path / "a.parquet", results(5))
    info = pyogrio.read_info(path)
    assert info["features"] == 5
    assert info["crs"] in ("OGC:CRS84", "EPSG:4326")
    assert pyogrio.read_dataframe(path).geometry[0].equals(shapely.from_geojson(json.dumps(SQUARE)))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_embeddings_come_back_to_the_bit(tmp_path, dtype):
    rows = list(results(20, dtype))
    path = embedded(tmp_path / "a.parquet", rows, replace(INFO, dtype=dtype))
    column = pq.read_table(path)["embedding"]
    assert pa.types.is_fixed_size_list(column.type)
    assert (column.type.list_size, str(column.type.value_type)) == (
        3,
        {"float16": "halffloat", "float32": "float"}[dtype],
    )
    for value, row in zip(column.to_pylist(), rows, strict=True):
        assert value == (None if row.embedding is None else row.embedding.tolist())
    frame = geopandas.read_parquet(path)
    assert frame["embedding"].notna().tolist() == [row.embedding is not None for row in rows]
    assert json.loads(pq.read_schema(path).metadata[b"rsedge"]) == {
        "version": 1,
        "model": "eye@abcdefabcdef",
        "model_hash": "abcdefabcdef" + 52 * "0",
        "dim": 3,
        "dtype": dtype,
        "normalized": True,
    }
    assert set(frame["model"]) == {"eye@abcdefabcdef"}, "the embedder's, whoever the record names"


def test_row_groups_are_of_one_size_and_read_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(geoparquet, "ROW_GROUP_ROWS", 1024)
    rows = list(results(2500))
    path = tmp_path / "a.parquet"
    with open_embeddings(path, INFO) as writer:
        for start in range(0, len(rows), 64):
            writer.write(rows[start : start + 64])
    groups = pq.read_metadata(path)
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [1024, 1024, 452]
    found = SearchFile.open(path)
    assert (found.rows, found.groups, found.info) == (2500, 3, INFO)
    assert found.starts.tolist() == [0, 1024, 2048, 2500]
    assert [row["row"] for row in pq.ParquetFile(path).read_row_group(2, columns=["row"]).to_pylist()] == [
        row.record.row for row in rows[2048:]
    ]
    for row, vector in zip(rows, read_embeddings(path), strict=True):
        assert (vector is None) == (row.embedding is None)
        if vector is not None:
            np.testing.assert_array_equal(vector, row.embedding)


def test_cuts_of_the_input_change_no_byte(tmp_path):
    rows = list(results(1500))
    whole = embedded(tmp_path / "whole.parquet", rows).read_bytes()
    for size in (1, 64, 700):
        with open_embeddings(tmp_path / "cut.parquet", INFO) as writer:
            for start in range(0, len(rows), size):
                writer.write(rows[start : start + size])
        assert (tmp_path / "cut.parquet").read_bytes() == whole


def test_nothing_and_nowhere_are_valid_too(tmp_path):
    for rows in ([], [TileResult(replace(RECORD, geometry=None))]):
        path = embedded(tmp_path / "a.parquet", rows)
        column = json.loads(pq.read_metadata(path).metadata[b"geo"])["columns"]["geometry"]
        assert column["geometry_types"] == []
        assert "bbox" not in column
        assert len(geopandas.read_parquet(path)) == len(rows)
        assert len(read_embeddings(path)) == len(rows)


def test_a_pipe_gets_the_same_bytes(tmp_path, monkeypatch):
    class Pipe(io.RawIOBase):
        def __init__(self):
            self.data = b""

        def writable(self):
            return True

        def write(self, data):
            self.data += bytes(data)
            return len(data)

    raw = Pipe()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(raw)))
    with open_writer("-", "parquet") as writer:
        writer.write(RECORDS)
    assert raw.data == captions(tmp_path / "a.parquet").read_bytes()


@pytest.mark.parametrize("text", ["2020-02-19T11:21:11Z", "2020-02-19T11:21:11.024Z", None])
def test_times_are_times(tmp_path, text):
    path = captions(tmp_path / "a.parquet", [replace(RECORD, datetime=text)])
    column = pq.read_table(path)["datetime"]
    assert str(column.type) == "timestamp[ms, tz=UTC]"
    expected = None if text is None else np.datetime64(text.removesuffix("Z"), "ms")
    assert column.to_numpy()[0] == expected or (text is None and column.null_count == 1)


# ---- files that are no embeddings ----


def altered(path, **changes):
    """The file with other ``rsedge`` metadata, or another schema."""
    table = pq.read_table(path)
    metadata = dict(table.schema.metadata)
    if "info" in changes:
        metadata[b"rsedge"] = changes["info"]
    table = table.drop_columns(changes.get("without", []))
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"info": b"{"}, "not JSON"),
        ({"info": b"[]"}, "no JSON object"),
        ({"info": b'{"version": 1, "modle": "a"}'}, "model_hash is missing"),
        ({"info": INFO.to_json().replace('"version": 1', '"version": 2').encode()}, "version 2"),
        ({"info": INFO.to_json().replace('"dim": 3', '"dim": 4').encode()}, r"embedding is fixed_size_list.*\[3\]"),
        ({"info": INFO.to_json().replace('"dim": 3', '"dim": 0').encode()}, "dim 0"),
        ({"without": ["embedding", "path"]}, "path is missing.*embedding is missing"),
    ],
)
def test_files_that_were_changed_are_refused(tmp_path, changes, message):
    path = altered(embedded(tmp_path / "a.parquet", results(5)), **changes)
    with pytest.raises(OptionError, match=message):
        SearchFile.open(path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(OptionError, match="holds no embeddings"):
        SearchFile.open(captions(tmp_path / "a.parquet"))
    with pytest.raises(OptionError, match="does not exist"):
        SearchFile.open(tmp_path / "absent.parquet")
    (tmp_path / "b.parquet").write_text("no Parquet")
    with pytest.raises(OptionError, match="cannot be read as Parquet"):
        SearchFile.open(tmp_path / "b.parquet")


def test_damage_inside_is_named(tmp_path):
    path = embedded(tmp_path / "a.parquet", results(500))
    content = bytearray(path.read_bytes())
    at = pq.read_metadata(path).row_group(0).column(pq.read_metadata(path).num_columns - 1).data_page_offset
    content[at + 40 : at + 400] = bytes(360)
    path.write_bytes(content)
    with pytest.raises(OptionError, match="damaged in row group 0"):
        list(SearchFile.open(path)._decode(0))


def test_results_survive_json():
    for result in itertools.islice(results(4), 4):
        back = TileResult.from_dict(json.loads(json.dumps(result.to_dict())))
        assert (back.record, back.path) == (result.record, result.path)
        assert (back.embedding is None) == (result.embedding is None)
        if result.embedding is not None:
            assert back.embedding.dtype == np.float16
            np.testing.assert_array_equal(back.embedding, result.embedding)
    big = TileResult(RECORD, None, np.array([1.5, -2], ">f4"))
    kind, data = big.to_dict()["embedding"]
    assert (kind, base64.b64decode(data)) == ("<f4", np.array([1.5, -2], "<f4").tobytes())


def test_captions_stand_in_the_schema_where_there_are_some():
    assert "caption" not in make_schema(embeddings_table(INFO), INFO).names
    captioned = replace(INFO, caption_model="blip@abcdefabcdef")
    assert make_schema(embeddings_table(captioned), captioned).names[7:9] == ["caption", "score"]
