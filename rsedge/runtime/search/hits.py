"""What a search found: tiles in the order of their similarity, and how they are written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rsedge.errors import OutputError
from rsedge.runtime.outputs import writers
from rsedge.runtime.outputs.geometry import from_wkb
from rsedge.runtime.outputs.records import TILES, Column, Table, TileRecord
from rsedge.runtime.search.search_file import SearchFile, check_lengths, reading
from rsedge.texts import plain, rfc3339

FORMATS = ("geojson", "geojsonl", "csv", "gpkg")

_BATCH_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Hit:
    """A tile that was found.

    Attributes:
        rank: Place in the result, from 1.
        score: Cosine of its embedding and the query, -1 to 1, rounded to 6 decimals.
        record: The tile.
        path: The file its pixels came from, as it was named when it was embedded, or None.
        file: The file of embeddings it was found in.
        row: Its row there, from 0.
    """

    rank: int
    score: float
    record: TileRecord
    path: str | None
    file: str
    row: int

    def properties(self) -> dict[str, Any]:
        """All but the geometry, as outputs name it; the score of a caption is ``caption_score``."""
        record = self.record.to_dict()
        del record["geometry"]
        record["caption_score"] = record.pop("score")
        without = ("caption", "caption_score") if self.record.caption is None else ()
        values = {name: value for name, value in record.items() if name not in without}
        return {"rank": self.rank, "score": self.score, **values, "path": self.path, "embeddings": plain(self.file)}


def read_records(file: SearchFile, rows: Sequence[int]) -> list[tuple[TileRecord, str | None]]:
    """The records of rows, and the paths of their pixels.

    Raises:
        OptionError: The file is damaged, or gone.
    """
    import pyarrow as pa

    found: dict[int, tuple[TileRecord, str | None]] = {}
    numbers = np.asarray(rows, np.int64)
    groups = np.searchsorted(file.starts, numbers, side="right") - 1
    names = [name for name in file.schema.names if name not in ("embedding", "bbox")]
    with reading(file.path), file.parquet() as opened:
        for group in np.unique(groups).tolist():
            wanted = np.unique(numbers[groups == group])
            first = int(file.starts[group])
            with reading(file.path, group):
                for batch in opened.iter_batches(_BATCH_ROWS, row_groups=[group], columns=names, use_threads=False):
                    for column in batch.columns:
                        check_lengths(column)
                    inside = wanted[(wanted >= first) & (wanted < first + len(batch))]
                    if len(inside):
                        entries = batch.take(pa.array(inside - first)).to_pylist()
                        found.update(zip(inside.tolist(), map(_record, entries), strict=True))
                    first += len(batch)
                    if first > wanted[-1]:  # what comes behind the last need not be decoded
                        break
    return [found[row] for row in numbers.tolist()]


def _record(values: dict[str, Any]) -> tuple[TileRecord, str | None]:
    path, shape, moment = values.pop("path", None), values.pop("geometry"), values.pop("datetime")
    try:
        geometry = None if shape is None else from_wkb(shape)
    except ValueError as error:
        raise OSError(f"a geometry is no polygon: {error}") from error
    defaults = {"caption": None, "score": None}
    known = {name: values[name] for name in TileRecord.__slots__ if name in values}
    record = TileRecord(**{**defaults, **known, "geometry": geometry, "datetime": moment and rfc3339(moment)})
    return record, None if path is None else plain(path)


_TABLE = Table(
    (
        Column("rank", "integer", required=True),
        Column("score", "real", required=True),
        *(column for column in TILES.properties if column.name != "score"),
        Column("caption_score", "real"),
        Column("path", "text"),
        Column("embeddings", "text"),
        Column("geometry", "geometry"),
    ),
    lambda hit: {**hit.properties(), "geometry": hit.record.geometry},
    name="hits",
)


def parse_format(target: str | os.PathLike[str]) -> str:
    """Return the format for a target: by suffix, and GeoJSON lines for ``-``.

    Raises:
        OptionError: The suffix is not known.
    """
    return writers.parse_format(target, formats=FORMATS, records="hits")


def write_hits(target: str | os.PathLike[str], hits: Sequence[Hit], *, overwrite: bool = False) -> None:
    """Write hits in their order: GeoJSON, GeoJSON lines, CSV or GeoPackage by the suffix; ``-`` is standard output.

    Raises:
        OptionError: The suffix is not known.
        OutputError: The file exists and shall not be replaced, or cannot be written.
    """
    name = parse_format(target)
    if os.fspath(target) != writers.STDOUT:
        check_output(target, overwrite=overwrite)
    with writers.open_writer(target, name, _TABLE) as writer:
        writer.write(hits)


def check_output(target: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Refuse to replace a file unasked.

    Raises:
        OutputError: It exists.
    """
    if not overwrite and Path(target).exists():
        raise OutputError(f"{target} exists already: pass --overwrite to replace it, or choose another output")
