"""The columns of a kind of record; every format writes a record by them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from rsedge.runtime.outputs.records import TileRecord, TileResult

Kind = Literal["text", "integer", "real", "time", "geometry"]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table."""

    name: str
    """Its name in the file and in the rows."""
    kind: Kind
    """The type of its values: text is str, integer is int, real is float, time is an RFC 3339 string, geometry is a
    GeoJSON Polygon or MultiPolygon."""
    required: bool = False
    """Whether every row has a value; otherwise None is one."""
    repeated: bool = False
    """Whether few values stand in many rows: GeoParquet stores those as a dictionary."""


@dataclass(frozen=True, slots=True)
class Table:
    """A kind of record. A format takes the values of a record from its row, by the names of the columns."""

    columns: tuple[Column, ...]
    """In the order of the file; one is called ``geometry``. GeoPackage writes it first, GeoParquet last."""
    row: Callable[[Any], Mapping[str, Any]]
    """Returns the row of a record: its values by name. GeoJSON writes all of them in their order, and only them; the
    other formats write the columns, empty where the row has no value."""
    name: str = "tiles"
    """Name of the layer in a GeoPackage."""

    @property
    def properties(self) -> tuple[Column, ...]:
        """The columns without the geometry."""
        return tuple(column for column in self.columns if column.kind != "geometry")


TILES = Table(
    (
        Column("scene", "text", required=True, repeated=True),
        *(Column(name, "integer", required=True) for name in ("row", "col", "row_off", "col_off", "width", "height")),
        Column("geometry", "geometry"),
        Column("caption", "text", repeated=True),
        Column("score", "real"),
        Column("status", "text", required=True, repeated=True),
        Column("nodata_fraction", "real"),
        Column("cloud_fraction", "real"),
        Column("datetime", "time", repeated=True),
        Column("model", "text", required=True, repeated=True),
        *(
            Column(name, "text", repeated=True)
            for name in ("message", "scene_crs", "product_id", "mgrs_tile", "rendering")
        ),
    ),
    TileRecord.to_dict,
)
"""Columns of :class:`~rsedge.runtime.outputs.records.TileRecord`."""


def _record_of(result: TileResult) -> dict[str, Any]:
    return result.record.to_dict()


RESULTS = replace(TILES, row=_record_of)
"""The records of :class:`~rsedge.runtime.outputs.records.TileResult`."""
