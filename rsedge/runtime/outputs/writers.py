"""Records to files. A format is one writer over the columns of a :class:`~rsedge.runtime.outputs.records.Table`."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from rsedge.errors import OptionError
from rsedge.runtime.outputs.files import Writer, open_file
from rsedge.runtime.outputs.geometry import wkt
from rsedge.runtime.outputs.geopackage import open_geopackage
from rsedge.runtime.outputs.geoparquet import GeoParquetWriter
from rsedge.runtime.outputs.records import TILES, Table
from rsedge.texts import cell

STDOUT = "-"


class GeoJsonWriter:
    """One RFC 7946 FeatureCollection, a feature a line; with ``lines`` the features alone (newline-delimited)."""

    def __init__(self, stream: BinaryIO, table: Table, *, lines: bool = False) -> None:
        self._stream, self._table, self._lines = stream, table, lines
        self._before = b'{"type":"FeatureCollection","features":[\n'

    def write(self, records: Iterable[Any]) -> None:
        """Append records.

        Raises:
            ValueError: A number is not finite.
        """
        for record in records:
            properties = dict(self._table.row(record))
            values = {"type": "Feature", "geometry": properties.pop("geometry"), "properties": properties}
            feature = json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
            self._stream.write(feature + b"\n" if self._lines else self._before + feature)
            self._before = b",\n"
        self._stream.flush()

    def finish(self) -> None:
        """Close the collection."""
        if not self._lines:
            empty = self._before != b",\n"
            self._stream.write((self._before.rstrip() if empty else b"") + b"\n]}\n")


class CsvWriter:
    """Comma-separated values with a header and the geometry as WKT; safe to open in a spreadsheet."""

    def __init__(self, stream: BinaryIO, table: Table) -> None:
        self._stream, self._table = stream, table
        self._lines([[column.name for column in table.columns]])

    def write(self, records: Iterable[Any]) -> None:
        """Append records."""
        rows = ({**row, "geometry": wkt(row["geometry"])} for row in map(self._table.row, records))
        self._lines([cell(row.get(column.name)) for column in self._table.columns] for row in rows)
        self._stream.flush()

    def finish(self) -> None:
        """Nothing closes the format."""

    def _lines(self, lines: Iterable[list[Any]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(lines)
        self._stream.write(text.getvalue().encode("utf-8", "replace"))


_STREAMS: dict[str, Callable[[BinaryIO, Table], Writer]] = {
    "geojson": GeoJsonWriter,
    "geojsonl": partial(GeoJsonWriter, lines=True),
    "csv": CsvWriter,
    "parquet": GeoParquetWriter,
}
_FILES: dict[str, Callable[[Path, Table], AbstractContextManager[Writer]]] = {"gpkg": open_geopackage}
"""Formats that are written here and there in a file, and so to no pipe."""
FORMATS = (*_STREAMS, *_FILES)


def parse_format(
    target: str | os.PathLike[str],
    format: str | None = None,  # noqa: A002 - the option's name
    *,
    formats: Sequence[str] = FORMATS,
    records: str = "tiles",
) -> str:
    """Return the format of an output: the named one, else that of the suffix, else (standard output) GeoJSON lines.

    It is one of ``formats``; an error names the ``records``.

    Raises:
        OptionError: The format or the suffix is not known, or the format cannot go to standard output.
    """
    if format is not None:
        name = format.lower().removeprefix(".")
        if name not in formats:
            raise OptionError(f"format {format!r} is not known: expected one of {', '.join(formats)}")
        if name in _FILES and os.fspath(target) == STDOUT:
            raise OptionError(
                f"format {format!r} needs a file, which is written here and there: name one, such as out.{name}, or "
                f"choose one of {', '.join(_STREAMS)} for standard output"
            )
        return name
    if os.fspath(target) == STDOUT:
        return "geojsonl"
    name = Path(target).suffix.lower().removeprefix(".")
    if name == "shp":
        raise OptionError(
            f"output {os.fspath(target)!r}: Shapefiles are not written, as they cut names and texts; "
            f"{Path(target).with_suffix('.gpkg')} is a GeoPackage, which the same programs open; formats are "
            f"{', '.join(f'.{known}' for known in formats)}"
        )
    if name not in formats:
        raise OptionError(
            f"output {os.fspath(target)!r} has no suffix that names a format for {records}: end it in one of "
            f"{', '.join(f'.{known}' for known in formats)}, or use {STDOUT} for standard output"
        )
    return name


@contextmanager
def open_writer(
    target: str | os.PathLike[str],
    format: str | None = None,  # noqa: A002 - the option's name
    table: Table = TILES,
) -> Iterator[Writer]:
    """Open a writer for a path or, with ``-``, standard output, which gets each batch of records at once.

    A path appears (or is replaced) by rename when the block ends well, and is left as it was otherwise. ``format`` is
    needed where the suffix does not name it.

    Raises:
        OptionError: See ``parse_format``.
        OutputError: The file cannot be written.
    """
    name = parse_format(target, format)
    if os.fspath(target) == STDOUT:
        writer = _STREAMS[name](sys.stdout.buffer, table)
        yield writer
        writer.finish()
        sys.stdout.buffer.flush()
    elif name in _FILES:
        with _FILES[name](Path(target), table) as writer:
            yield writer
    else:
        with open_file(Path(target), lambda stream: _STREAMS[name](stream, table)) as writer:
            yield writer
