"""Records of classified tiles, and their writers: the columns of captions give way to classes and probabilities."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from rsedge.runtime.outputs.records import TileRecord, TileResult
from rsedge.runtime.outputs.writers import STDOUT, CsvWriter, GeoJsonLinesWriter, GeoJsonWriter, Writer, open_file

_FIELDS = tuple(field.name for field in fields(TileRecord))
_CAPTION = _FIELDS.index("caption")  # score follows it


def columns(top: int) -> list[str]:
    """``class``, ``probability``, then ``class_2``, ``probability_2`` and so on."""
    return [
        f"{name}{place}" for place in ("", *(f"_{n}" for n in range(2, top + 1))) for name in ("class", "probability")
    ]


def geopackage_columns(top: int) -> dict[str, str]:
    """Columns of a GeoPackage of :class:`ClassifiedTile` and their types."""
    from rsedge.runtime.outputs.geopackage import RECORD_COLUMNS

    known = [name for name in _FIELDS if name != "geometry"]
    at = known.index("caption")
    kinds = {name: "TEXT" if name.startswith("class") else "DOUBLE" for name in columns(top)}
    names = [*known[:at], *kinds, *known[at + 2 :]]
    return {name: kinds.get(name) or RECORD_COLUMNS[name] for name in names}


@dataclass(frozen=True, slots=True)
class ClassifiedTile(TileRecord):
    """A record with the most probable classes of its tile; it has no caption.

    Attributes:
        top: How many classes a record names.
        ranked: Class and probability, rounded to 4 decimals, the most similar first; empty unless ``status`` is ``ok``.
    """

    top: int = 1
    ranked: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, record: TileRecord, top: int, ranked: tuple[tuple[str, float], ...]) -> ClassifiedTile:
        """The record with its classes."""
        return cls(**{name: getattr(record, name) for name in _FIELDS}, top=top, ranked=ranked)

    def found(self) -> dict[str, str | float | None]:
        """:func:`columns` and their values, None where there is no class."""
        values: list[str | float | None] = [value for pair in self.ranked for value in pair]
        return dict(zip(columns(self.top), values or [None] * (2 * self.top), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """The record as a plain dict, :func:`columns` in place of ``caption`` and ``score``."""
        values = [(name, getattr(self, name)) for name in _FIELDS]
        return dict([*values[:_CAPTION], *self.found().items(), *values[_CAPTION + 2 :]])


class _CsvWriter(CsvWriter):
    def __init__(self, stream: BinaryIO, *, top: int) -> None:
        self._stream = stream
        self._row([*_FIELDS[:_CAPTION], *columns(top), *_FIELDS[_CAPTION + 2 :]])


class _GeoParquetWriter:
    def __init__(self, stream: BinaryIO, *, top: int) -> None:
        from rsedge.runtime.outputs.geoparquet import TableWriter, make_schema

        classes = [(name, name.startswith("class")) for name in columns(top)]
        self._table = TableWriter(stream, make_schema(None, captions=False, classes=classes), model=None)

    def write(self, records: Iterable[TileRecord]) -> None:
        self._table.add(map(TileResult, records))

    def finish(self) -> None:
        self._table.finish()


_WRITERS: dict[str, Callable[..., Writer]] = {"csv": _CsvWriter, "parquet": _GeoParquetWriter}
_AS_THEY_ARE: dict[str, Callable[[BinaryIO], Writer]] = {"geojson": GeoJsonWriter, "geojsonl": GeoJsonLinesWriter}


@contextmanager
def open_class_writer(target: str | os.PathLike[str], file_format: str, *, top: int) -> Iterator[Writer]:
    """As :func:`rsedge.runtime.outputs.writers.open_writer`, for :class:`ClassifiedTile`.

    Args:
        target: Path or ``-``.
        file_format: One of ``rsedge.runtime.outputs.writers.FORMATS``.
        top: How many classes a record names.

    Raises:
        OutputError: The file cannot be written.
    """
    if file_format == "gpkg":
        from rsedge.runtime.outputs.geopackage import open_geopackage

        with open_geopackage(Path(target), geopackage_columns(top)) as rows:
            yield rows
        return
    make = _AS_THEY_ARE.get(file_format) or partial(_WRITERS[file_format], top=top)
    if os.fspath(target) != STDOUT:
        with open_file(Path(target), make) as writer:
            yield writer
        return
    writer = make(sys.stdout.buffer)
    yield writer
    writer.finish()
    sys.stdout.buffer.flush()
