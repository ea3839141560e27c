from __future__ import annotations

import sqlite3
import struct
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timezone

import geopandas
import pyogrio
import pytest
import shapely
from shapely.geometry import box, mapping, shape

from rsedge.errors import OptionError, OutputError
from rsedge.runtime.classify import ClassifiedTile, class_table
from rsedge.runtime.outputs.geopackage import open_geopackage
from rsedge.runtime.outputs.records import TILES, Column, Table
from rsedge.runtime.outputs.writers import open_writer
from rsedge.runtime.search.hits import Hit, write_hits
from tests.runtime.test_writers import RECORD, RECORDS

MANY = [
    replace(RECORD, row=n // 40, col=n % 40, geometry=mapping(box(n % 40, n // 40, n % 40 + 1, n // 40 + 1)))
    for n in range(1000)
]


def written(tmp_path, records=RECORDS, *, cut=2, name="a.gpkg"):
    path = tmp_path / name
    with open_writer(path) as writer:
        for start in range(0, len(records), cut):
            writer.write(records[start : start + cut])
    return path


def query(path, sql):
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        return database.execute(sql).fetchall()


def test_gdal_and_geopandas_read_it(tmp_path):
    path = written(tmp_path)
    assert pyogrio.list_layers(path).tolist() == [["tiles", "Unknown"]]
    info = pyogrio.read_info(path)
    assert info["crs"] == "EPSG:4326"
    assert info["features"] == 3
    assert info["total_bounds"] == (-180, 1, 180, 45.1)
    assert info["capabilities"]["fast_spatial_filter"]
    assert dict(zip(info["fields"], info["ogr_types"], strict=True)) == {
        **dict.fromkeys([column.name for column in TILES.properties], "OFTString"),
        **dict.fromkeys(("row", "col", "row_off", "col_off", "width", "height"), "OFTInteger"),
        **dict.fromkeys(("score", "nodata_fraction", "cloud_fraction", "covered"), "OFTReal"),
        "datetime": "OFTDateTime",
    }
    frame = geopandas.read_file(path)
    assert frame["datetime"][0] == datetime(2020, 2, 19, 11, 21, 11, tzinfo=timezone.utc)
    for position, record in enumerate(RECORDS):
        for name, value in record.to_dict().items():
            if name == "geometry":
                found = frame.geometry[position]
                assert found is None if value is None else found.equals(shape(value))
            elif name != "datetime":
                assert frame[name].astype(object).where(frame[name].notna(), None)[position] == value


def test_sqlite_finds_no_fault(tmp_path):
    path = written(tmp_path, MANY)
    assert query(path, "PRAGMA integrity_check") == [("ok",)]
    assert query(path, "PRAGMA foreign_key_check") == []
    assert query(path, "SELECT rtreecheck('rtree_tiles_geom')") == [("ok",)]
    assert query(path, "PRAGMA journal_mode") == [("delete",)]


def test_requirements_of_the_standard(tmp_path):
    """The numbers are the standard's."""
    path = written(tmp_path)
    content = path.read_bytes()
    assert content[:16] == b"SQLite format 3\0"  # 1
    assert content[68:72] == b"GPKG"  # 2
    assert struct.unpack(">I", content[60:64]) == (10300,)
    assert path.suffix == ".gpkg"  # 3
    types = {kind for (_, _, kind, *_) in query(path, "PRAGMA table_info(tiles)")}
    assert types <= {"INTEGER", "MEDIUMINT", "TEXT", "DOUBLE", "DATETIME", "GEOMETRY"}  # 5
    when = query(path, "SELECT datetime FROM tiles") + query(path, "SELECT last_change FROM gpkg_contents")  # 5, 15
    assert all(datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ") and len(text) == 24 for (text,) in when)
    systems = query(path, "SELECT srs_id, organization, organization_coordsys_id FROM gpkg_spatial_ref_sys")  # 11
    assert systems == [(-1, "NONE", -1), (0, "NONE", 0), (4326, "EPSG", 4326)]
    contents = "SELECT table_name, data_type, min_x, min_y, max_x, max_y, srs_id FROM gpkg_contents"  # 13, 14, 18
    assert query(path, contents) == [("tiles", "features", -180.0, 1.0, 180.0, 45.1, 4326)]
    columns = "SELECT table_name, column_name, geometry_type_name, srs_id, z, m FROM gpkg_geometry_columns"  # 22 to 28
    assert query(path, columns) == [("tiles", "geom", "GEOMETRY", 4326, 0, 0)]
    key = next(row for row in query(path, "PRAGMA table_info(tiles)") if row[5])
    assert key[1:3] == ("fid", "INTEGER")  # 29
    extensions = "SELECT table_name, column_name, extension_name, scope FROM gpkg_extensions"  # 58 to 64
    assert query(path, extensions) == [("tiles", "geom", "gpkg_rtree_index", "write-only")]
    triggers = {name for (name,) in query(path, "SELECT name FROM sqlite_master WHERE type = 'trigger'")}  # 77
    expected = ("insert", "update1", "update2", "update3", "update4", "delete")
    assert triggers == {f"rtree_tiles_geom_{name}" for name in expected}


def test_geometries_as_the_standard_has_them(tmp_path):
    path = written(tmp_path)
    for (blob,), record in zip(query(path, "SELECT geom FROM tiles ORDER BY fid"), RECORDS, strict=True):
        if record.geometry is None:
            assert blob is None
            continue
        magic, version, flags, system = struct.unpack("<2sBBi", blob[:8])
        assert (magic, version, flags, system) == (b"GP", 0, 0b00000011, 4326)
        expected = shape(record.geometry)
        west, south, east, north = expected.bounds
        assert struct.unpack("<4d", blob[8:40]) == (west, east, south, north)
        assert shapely.from_wkb(blob[40:]).equals(expected)


def test_the_index_finds_what_is_there(tmp_path):
    path = written(tmp_path, MANY)
    window = "minx <= 4.5 AND maxx >= 3.5 AND miny <= 2.5 AND maxy >= 1.5"
    ids = {fid for (fid,) in query(path, f"SELECT id FROM rtree_tiles_geom WHERE {window}")}
    assert ids == {1 + 40 * row + col for row in (1, 2) for col in (3, 4)}
    frame = geopandas.read_file(path, bbox=(3.5, 1.5, 4.5, 2.5))
    assert sorted(zip(frame["row"], frame["col"], strict=True)) == [(1, 3), (1, 4), (2, 3), (2, 4)]


def test_whoever_edits_the_table_keeps_the_index_right(tmp_path):
    path = written(tmp_path, RECORDS)
    frame = geopandas.read_file(path)[:1]
    frame.geometry = [box(50, 50, 51, 51)]
    pyogrio.write_dataframe(frame, path, layer="tiles", append=True)
    assert query(path, "SELECT id, minx FROM rtree_tiles_geom WHERE maxy > 50") == [(4, 50.0)]
    assert len(geopandas.read_file(path, bbox=(50, 50, 51, 51))) == 1


def test_the_same_bytes_whatever_the_batches(tmp_path):
    once = written(tmp_path, [*MANY, *RECORDS], cut=1003)
    bits = written(tmp_path, [*MANY, *RECORDS], cut=7, name="b.gpkg")
    assert once.read_bytes() == bits.read_bytes()
    assert len(once.read_bytes()) > 1 << 18  # enough for more than one level of pages


def test_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "a.gpkg"
    for suffix in ("", "-wal", "-shm", "-journal"):  # of a program that has the old file open, or had and died
        path.with_name(path.name + suffix).write_bytes(b"old")
    written(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.gpkg"]
    assert len(geopandas.read_file(path)) == 3


def test_what_a_killed_run_left_is_no_start(tmp_path):
    (tmp_path / ".a.gpkg.tmp").write_bytes(written(tmp_path, MANY).read_bytes())
    assert len(geopandas.read_file(written(tmp_path))) == 3


def test_a_run_that_fails_leaves_the_old_file(tmp_path):
    path = written(tmp_path)
    old = path.read_bytes()
    beside = tmp_path / "a.gpkg-wal"
    beside.write_bytes(b"")

    def fail_midway():
        with open_writer(path) as writer:
            writer.write(RECORDS)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_midway()
    assert path.read_bytes() == old
    assert sorted(tmp_path.iterdir()) == [path, beside]


def test_a_full_disk_is_said(tmp_path):
    def fill_it():
        with open_writer(tmp_path / "a.gpkg") as writer:
            writer._database.execute("PRAGMA max_page_count = 30")
            writer.write(MANY)

    with pytest.raises(OutputError, match=r"a\.gpkg cannot be written: .*full.*free space"):
        fill_it()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["'; DROP TABLE tiles; --", '"', "=1+1", "<script>", "é 🌍", ""])
def test_captions_are_text(tmp_path, text):
    path = written(tmp_path, [replace(RECORD, caption=text)])
    assert geopandas.read_file(path)["caption"][0] == text


def test_captions_hold_nothing_that_xml_cannot(tmp_path):
    path = written(tmp_path, [replace(RECORD, caption="a\0b\x1b[31m\x9b\ufffe\ud800")])
    assert geopandas.read_file(path)["caption"][0] == "a\ufffdb\ufffd[31m\ufffd\ufffd\ufffd"


def test_times_are_utc(tmp_path):
    path = written(tmp_path, [replace(RECORD, datetime="2020-01-01T00:30:00.500+01:00")])
    assert query(path, "SELECT datetime FROM tiles") == [("2019-12-31T23:30:00.500Z",)]


def test_classes_have_columns(tmp_path):
    ranked = (("sea", 0.75), ("forest", 0.25))
    tiles = [ClassifiedTile(**replace(RECORD, caption=None, score=None).to_dict(), top=2, ranked=ranked)]
    tiles.append(ClassifiedTile(**replace(RECORDS[2], caption=None, score=None).to_dict(), top=2, ranked=()))
    path = tmp_path / "a.gpkg"
    with open_writer(path, table=class_table(2)) as writer:
        writer.write(tiles)
    frame = geopandas.read_file(path)
    assert [*frame.columns] == [*(name for name in tiles[0].to_dict() if name != "geometry"), "geometry"]
    assert list(frame["class"].astype(object).where(frame["class"].notna(), None)) == ["sea", None]
    assert frame["probability_2"][0] == 0.25
    types = {name: kind for _, name, kind, *_ in query(path, "PRAGMA table_info(tiles)")}
    assert (types["class_2"], types["probability_2"]) == ("TEXT", "DOUBLE")


def test_hits_keep_their_order(tmp_path):
    records = [replace(RECORD, caption=None, score=None), RECORD, RECORDS[2]]
    hits = [Hit(n, 1 - n / 10, record, None, "e.parquet", n) for n, record in enumerate(records, 1)]
    path = tmp_path / "a.gpkg"
    write_hits(path, hits)
    frame = geopandas.read_file(path, layer="hits")
    assert list(frame["rank"]) == [1, 2, 3]
    assert frame["score"][0] == 0.9
    assert frame["caption_score"][1] == RECORD.score
    with pytest.raises(OutputError, match="exists already"):
        write_hits(path, hits)


def test_the_layer_has_any_plain_name(tmp_path):
    path = tmp_path / "a.gpkg"
    table = Table((Column("a", "text"),), dict, name="captions_2020")
    with open_geopackage(path, table) as writer:
        writer.write([{"a": "x", "geometry": RECORD.geometry}])
    assert pyogrio.list_layers(path)[0][0] == "captions_2020"
    for name in ("", "a b", 'a"', "gpkg_tiles", "RTREE_x", "sqlite_x"):
        with pytest.raises(OptionError, match="table"), open_geopackage(path, replace(table, name=name)):
            pass
