"""Records as GeoPackage 1.3 (https://www.geopackage.org/spec130/), written with the SQLite of the standard library.

The wheels of rasterio write no vector formats, and on an edge device nothing should have to be installed for one table.
Version 1.3 because GDAL 3.6 and QGIS 3.28, of which many are in use, warn of a later one.

All is one transaction without a journal: what is cut off is no file. No clock is read and every setting of SQLite that
could differ is set, so that the same rows make the same bytes, whatever batches they come in, with the same SQLite,
which writes its version into the header.
"""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsedge.errors import OptionError, OutputError
from rsedge.runtime.outputs.files import whole_file
from rsedge.runtime.outputs.geometry import bounding_box, wkb

if TYPE_CHECKING:
    from rsedge.runtime.outputs.records import Table

_WGS84 = 4326
_APPLICATION_ID, _VERSION = 0x47504B47, 10300  # "GPKG"; 1.3.0
_LAST_CHANGE = "1970-01-01T00:00:00.000Z"
_ENVELOPE = struct.Struct("<4d")
_HEADER_BYTES = 8
_BESIDE = ("-journal", "-wal", "-shm")

_TYPES = {"text": "TEXT", "integer": "MEDIUMINT", "real": "DOUBLE", "time": "DATETIME"}

_WGS84_DEFINITION = (
    'GEOGCS["WGS 84",DATUM["WGS_1984",SPHEROID["WGS 84",6378137,298.257223563,AUTHORITY["EPSG","7030"]],'
    'AUTHORITY["EPSG","6326"]],PRIMEM["Greenwich",0,AUTHORITY["EPSG","8901"]],UNIT["degree",0.0174532925199433,'
    'AUTHORITY["EPSG","9122"]],AXIS["Latitude",NORTH],AXIS["Longitude",EAST],AUTHORITY["EPSG","4326"]]'
)
_SYSTEMS = [
    ("Undefined Cartesian SRS", -1, "NONE", -1, "undefined", "undefined Cartesian coordinate reference system"),
    ("Undefined geographic SRS", 0, "NONE", 0, "undefined", "undefined geographic coordinate reference system"),
    (
        "WGS 84 geodetic",
        _WGS84,
        "EPSG",
        _WGS84,
        _WGS84_DEFINITION,
        "longitude/latitude coordinates in decimal degrees on the WGS 84 spheroid",
    ),
]
_SETTINGS = """
PRAGMA page_size = 4096;
PRAGMA auto_vacuum = NONE;
PRAGMA encoding = 'UTF-8';
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
PRAGMA secure_delete = ON;
PRAGMA locking_mode = EXCLUSIVE;
PRAGMA temp_store = MEMORY;
"""
_SCHEMA = """
CREATE TABLE gpkg_spatial_ref_sys (
    srs_name TEXT NOT NULL, srs_id INTEGER NOT NULL PRIMARY KEY, organization TEXT NOT NULL,
    organization_coordsys_id INTEGER NOT NULL, definition TEXT NOT NULL, description TEXT
);
CREATE TABLE gpkg_contents (
    table_name TEXT NOT NULL PRIMARY KEY, data_type TEXT NOT NULL, identifier TEXT UNIQUE, description TEXT DEFAULT '',
    last_change DATETIME NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ','now')),
    min_x DOUBLE, min_y DOUBLE, max_x DOUBLE, max_y DOUBLE, srs_id INTEGER,
    CONSTRAINT fk_gc_r_srs_id FOREIGN KEY (srs_id) REFERENCES gpkg_spatial_ref_sys(srs_id)
);
CREATE TABLE gpkg_geometry_columns (
    table_name TEXT NOT NULL, column_name TEXT NOT NULL, geometry_type_name TEXT NOT NULL, srs_id INTEGER NOT NULL,
    z TINYINT NOT NULL, m TINYINT NOT NULL,
    CONSTRAINT pk_geom_cols PRIMARY KEY (table_name, column_name),
    CONSTRAINT uk_gc_table_name UNIQUE (table_name),
    CONSTRAINT fk_gc_tn FOREIGN KEY (table_name) REFERENCES gpkg_contents(table_name),
    CONSTRAINT fk_gc_srs FOREIGN KEY (srs_id) REFERENCES gpkg_spatial_ref_sys (srs_id)
);
CREATE TABLE gpkg_extensions (
    table_name TEXT, column_name TEXT, extension_name TEXT NOT NULL, definition TEXT NOT NULL, scope TEXT NOT NULL,
    CONSTRAINT ge_tce UNIQUE (table_name, column_name, extension_name)
);
CREATE TABLE {table} (fid INTEGER PRIMARY KEY AUTOINCREMENT NOT NULL, geom GEOMETRY, {columns});
CREATE VIRTUAL TABLE {index} USING rtree(id, minx, maxx, miny, maxy);
"""
# What the extension wants, so that whoever edits the table keeps the index right. They are of no use before: the
# functions they call are the reader's.
_BOX = "NEW.fid, ST_MinX(NEW.geom), ST_MaxX(NEW.geom), ST_MinY(NEW.geom), ST_MaxY(NEW.geom)"
_SOME, _NONE = "(NEW.geom NOTNULL AND NOT ST_IsEmpty(NEW.geom))", "(NEW.geom ISNULL OR ST_IsEmpty(NEW.geom))"
_TRIGGERS = {
    "insert": f"INSERT ON {{table}} WHEN {_SOME} BEGIN INSERT OR REPLACE INTO {{index}} VALUES ({_BOX}); END",
    "update1": f"UPDATE OF geom ON {{table}} WHEN OLD.fid = NEW.fid AND {_SOME} "
    f"BEGIN INSERT OR REPLACE INTO {{index}} VALUES ({_BOX}); END",
    "update2": f"UPDATE OF geom ON {{table}} WHEN OLD.fid = NEW.fid AND {_NONE} "
    "BEGIN DELETE FROM {index} WHERE id = OLD.fid; END",
    "update3": f"UPDATE ON {{table}} WHEN OLD.fid != NEW.fid AND {_SOME} "
    f"BEGIN DELETE FROM {{index}} WHERE id = OLD.fid; INSERT OR REPLACE INTO {{index}} VALUES ({_BOX}); END",
    "update4": f"UPDATE ON {{table}} WHEN OLD.fid != NEW.fid AND {_NONE} "
    "BEGIN DELETE FROM {index} WHERE id IN (OLD.fid, NEW.fid); END",
    "delete": "DELETE ON {table} WHEN OLD.geom NOT NULL BEGIN DELETE FROM {index} WHERE id = OLD.fid; END",
}


class GeoPackageWriter:
    """Records to the one table of a GeoPackage, a file that does not exist yet; the table's name is the layer's.

    Raises:
        OptionError: A layer may not have the name of ``table``.
        sqlite3.OperationalError: The file cannot be written.
    """

    def __init__(self, path: Path, table: Table) -> None:
        name = table.name
        if not name.isidentifier() or name.lower().startswith(("gpkg_", "sqlite_", "rtree_")):
            raise OptionError(f"table {name!r}: name it with letters, digits and _, and with no prefix of GeoPackage")
        self._table = table
        self._names = {"table": f'"{name}"', "index": f'"rtree_{name}_geom"'}
        self._bounds: tuple[float, float, float, float] | None = None
        marks = ", ".join("?" * (len(table.properties) + 1))
        self._insert = f'INSERT INTO "{name}" VALUES (NULL, {marks})'
        definitions = ", ".join(
            f'"{column.name}" {_TYPES[column.kind]}{" NOT NULL" * column.required}' for column in table.properties
        )
        self._database = sqlite3.connect(path, isolation_level=None)
        self._database.executescript(_SETTINGS)
        self._database.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        self._database.execute(f"PRAGMA user_version = {_VERSION}")
        self._database.executescript("BEGIN;" + _SCHEMA.format(columns=definitions, **self._names))

    def write(self, records: Iterable[Any]) -> None:
        """Append records."""
        self._database.executemany(self._insert, map(self._values, records))

    def finish(self) -> None:
        """Write the index and what is known of the table."""
        boxes = self._database.execute(
            f"SELECT fid, substr(geom, {_HEADER_BYTES + 1}, {_ENVELOPE.size}) FROM {self._names['table']} "
            "WHERE geom NOTNULL ORDER BY fid"
        )
        self._database.executemany(
            f"INSERT INTO {self._names['index']} VALUES (?, ?, ?, ?, ?)",
            ((fid, *_ENVELOPE.unpack(envelope)) for fid, envelope in boxes),
        )
        for name, trigger in _TRIGGERS.items():
            self._database.execute(
                f'CREATE TRIGGER "rtree_{self._table.name}_geom_{name}" AFTER {trigger.format(**self._names)}'
            )
        self._fill("gpkg_spatial_ref_sys", *_SYSTEMS)
        bounds = self._bounds or (None,) * 4
        self._fill(
            "gpkg_contents", (self._table.name, "features", self._table.name, "", _LAST_CHANGE, *bounds, _WGS84)
        )  # one table, so its name is its identifier too
        self._fill("gpkg_geometry_columns", (self._table.name, "geom", "GEOMETRY", _WGS84, 0, 0))
        definition = "http://www.geopackage.org/spec120/#extension_rtree"
        self._fill("gpkg_extensions", (self._table.name, "geom", "gpkg_rtree_index", definition, "write-only"))
        self._database.execute("COMMIT")

    def close(self) -> None:
        """Let go of the file; what is not finished is not there."""
        self._database.close()

    def _fill(self, table: str, *rows: tuple[Any, ...]) -> None:
        self._database.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(rows[0]))})", rows)

    def _values(self, record: Any) -> list[Any]:
        """The record's row of the table: geometry as GeoPackageBinary, times in UTC with milliseconds."""
        row, blob = self._table.row(record), None
        if (geometry := row["geometry"]) is not None:
            west, south, east, north = bounding_box(geometry)
            known = self._bounds or (west, south, east, north)
            self._bounds = (min(known[0], west), min(known[1], south), max(known[2], east), max(known[3], north))
            header = struct.pack("<2sBBi", b"GP", 0, 0b11, _WGS84)  # version 0; an envelope of x and y, little-endian
            blob = header + _ENVELOPE.pack(west, east, south, north) + (wkb(geometry) or b"")
        values = [blob]
        for column in self._table.properties:
            value = row.get(column.name)
            if column.kind == "time" and value is not None:
                moment = datetime.fromisoformat(value.replace("Z", "+00:00")).astimezone(timezone.utc)
                value = moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
            values.append(value)
        return values


@contextmanager
def open_geopackage(path: Path, table: Table) -> Iterator[GeoPackageWriter]:
    """Open the writer of a GeoPackage that becomes ``path`` when the block ends well.

    Raises:
        OptionError: A layer may not have the name of ``table``.
        OutputError: The file cannot be written.
    """
    with whole_file(path) as temporary:
        try:
            with closing(GeoPackageWriter(temporary, table)) as writer:
                yield writer
                writer.finish()
        except sqlite3.OperationalError as error:
            raise OutputError(f"{path} cannot be written: {error}; free space or choose another") from error
        for suffix in _BESIDE:  # of the file that is replaced: SQLite would apply them to this one
            path.with_name(path.name + suffix).unlink(missing_ok=True)
