"""Tile records to files: GeoJSON, GeoJSON lines, CSV, GeoParquet, GeoPackage. A file appears only when it is whole."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from rsedge.errors import OptionError, OutputError
from rsedge.runtime.outputs.records import TileRecord
from rsedge.texts import cell

STDOUT = "-"
_COLUMNS = [field.name for field in fields(TileRecord)]


class Writer(Protocol):
    """Turns records into one format."""

    def write(self, records: Iterable[TileRecord]) -> None:
        """Append records."""

    def finish(self) -> None:
        """Write what closes the format."""


class Finishing(Protocol):
    """Writes something that ends in ``finish``."""

    def finish(self) -> None:
        """Write what closes the format."""


AnyWriter = TypeVar("AnyWriter", bound=Finishing)


class GeoJsonLinesWriter:
    """One RFC 7946 Feature a line (newline-delimited GeoJSON)."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def write(self, records: Iterable[TileRecord]) -> None:
        """Append records."""
        for record in records:
            self._stream.write(_feature(record) + b"\n")

    def finish(self) -> None:
        """Nothing closes the format."""


class GeoJsonWriter:
    """One RFC 7946 FeatureCollection, a feature a line."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._separator = b'{"type":"FeatureCollection","features":[\n'

    def write(self, records: Iterable[TileRecord]) -> None:
        """Append records."""
        for record in records:
            self._stream.write(self._separator + _feature(record))
            self._separator = b",\n"

    def finish(self) -> None:
        """Close the collection."""
        if self._separator != b",\n":
            self._stream.write(self._separator.rstrip())
        self._stream.write(b"\n]}\n")


class CsvWriter:
    """Comma-separated values with a header and the geometry as WKT; safe to open in a spreadsheet."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._row(_COLUMNS)

    def write(self, records: Iterable[TileRecord]) -> None:
        """Append records."""
        for record in records:
            values = record.to_dict() | {"geometry": wkt(record.geometry)}
            self._row([cell(value) for value in values.values()])

    def finish(self) -> None:
        """Nothing closes the format."""

    def _row(self, cells: list[Any]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(cells)
        self._stream.write(text.getvalue().encode("utf-8", "replace"))


def _geoparquet_writer(stream: BinaryIO) -> Writer:
    from rsedge.runtime.outputs.geoparquet import GeoParquetWriter

    return GeoParquetWriter(stream)


def _open_geopackage(path: Path) -> AbstractContextManager[Writer]:
    from rsedge.runtime.outputs.geopackage import RECORD_COLUMNS, open_geopackage

    return open_geopackage(path, RECORD_COLUMNS)


_STREAMS: dict[str, Callable[[BinaryIO], Writer]] = {
    "geojson": GeoJsonWriter,
    "geojsonl": GeoJsonLinesWriter,
    "csv": CsvWriter,
    "parquet": _geoparquet_writer,
}
_FILES: dict[str, Callable[[Path], AbstractContextManager[Writer]]] = {"gpkg": _open_geopackage}
"""Formats that are written here and there in a file, and so to no pipe."""
FORMATS = (*_STREAMS, *_FILES)


def parse_format(target: str | os.PathLike[str], format: str | None = None) -> str:  # noqa: A002 - the option's name
    """The format for an output: as named, else by suffix, else (standard output) GeoJSON lines.

    Raises:
        OptionError: The format or the suffix is not known, or the format cannot go to standard output.
    """
    suffixes = ", ".join(f".{name}" for name in FORMATS)
    if format is not None:
        name = format.lower().removeprefix(".")
        if name not in FORMATS:
            raise OptionError(f"format {format!r} is not known: expected one of {', '.join(FORMATS)}")
        if name in _FILES and os.fspath(target) == STDOUT:
            raise OptionError(
                f"format {format!r} needs a file, which is written here and there: name one, such as out.{name}, or "
                f"choose one of {', '.join(_STREAMS)} for standard output"
            )
        return name
    if os.fspath(target) == STDOUT:
        return "geojsonl"
    name = Path(target).suffix.lower().removeprefix(".")
    if name not in FORMATS:
        raise OptionError(
            f"output {os.fspath(target)!r} has no suffix that names a format: end it in one of {suffixes}, or use "
            f"{STDOUT} for standard output"
        )
    return name


@contextmanager
def open_writer(target: str | os.PathLike[str], format: str | None = None) -> Iterator[Writer]:  # noqa: A002
    """A writer for a path or, with ``-``, standard output.

    A path appears (or is replaced) by rename when the block ends well, and is left as it was otherwise.

    Raises:
        OptionError: See ``parse_format``.
        OutputError: The file cannot be written.
    """
    name = parse_format(target, format)
    if name in _FILES:
        with _FILES[name](Path(target)) as writer:
            yield writer
        return
    make = _STREAMS[name]
    if os.fspath(target) == STDOUT:
        stream = sys.stdout.buffer
        writer = make(stream)
        yield _Flushing(writer, stream)
        writer.finish()
        stream.flush()
        return
    with open_file(Path(target), make) as writer:
        yield writer


@contextmanager
def open_file(path: Path, make: Callable[[BinaryIO], AnyWriter]) -> Iterator[AnyWriter]:
    """The writer that ``make`` gives for a stream whose content becomes ``path``, as :func:`open_writer` says.

    Raises:
        OutputError: The file cannot be written.
    """
    with whole_file(path) as temporary, temporary.open("wb") as stream:
        writer = make(stream)
        yield writer
        writer.finish()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside ``path`` where nothing is, and whose file becomes ``path`` when the block ends well.

    Raises:
        OutputError: The file cannot be written.
    """
    check_target(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise OutputError(
                f"{path} cannot be written: {error.strerror or error}; free space or choose another"
            ) from error
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """A file of ``data`` that appears, or is replaced, whole.

    Raises:
        OutputError: It cannot be written.
    """
    with open_file(path, _Whole) as whole:
        whole.write(data)


class _Whole:
    """The writer of a file that is ready."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def write(self, data: bytes) -> None:
        self._stream.write(data)

    def finish(self) -> None:
        """Nothing closes it."""


class _Flushing:
    """A writer to a pipe, whose reader should see each batch at once."""

    def __init__(self, writer: Writer, stream: BinaryIO) -> None:
        self._writer = writer
        self._stream = stream

    def write(self, records: Iterable[TileRecord]) -> None:
        self._writer.write(records)
        self._stream.flush()

    def finish(self) -> None:
        self._writer.finish()


def check_target(path: Path) -> None:
    """Refuse a path that cannot become a file by rename.

    Raises:
        OutputError: Its folder does not exist, or it names something that is not a regular file.
    """
    if not path.parent.is_dir():
        raise OutputError(f"{path} cannot be written: {path.parent} is not a folder; create it first")
    if path.exists() and not path.is_file():
        raise OutputError(f"{path} exists and is not a regular file: choose another output, or - for standard output")


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def wkt(geometry: dict[str, Any] | None) -> str | None:
    """A GeoJSON Polygon or MultiPolygon as well-known text."""
    if geometry is None:
        return None
    if geometry["type"] == "Polygon":
        return f"POLYGON {_wkt_rings(geometry['coordinates'])}"
    return f"MULTIPOLYGON ({', '.join(_wkt_rings(rings) for rings in geometry['coordinates'])})"


def _wkt_rings(rings: list[list[list[float]]]) -> str:
    return f"({', '.join('(' + ', '.join(f'{x!r} {y!r}' for x, y in ring) + ')' for ring in rings)})"


def _feature(record: TileRecord) -> bytes:
    properties = record.to_dict()
    geometry = properties.pop("geometry")
    return feature(geometry, properties)


def feature(geometry: dict[str, Any] | None, properties: dict[str, Any]) -> bytes:
    """A GeoJSON feature in one line of UTF-8.

    Raises:
        ValueError: A number is not finite.
    """
    values = {"type": "Feature", "geometry": geometry, "properties": properties}
    return json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
