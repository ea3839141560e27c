"""Caption sets as tables: JSON lines, a JSON list, CSV and Parquet, alone or as the metadata of an imagefolder.

One row an image with a list of captions, or one row a caption with the file name repeated. Columns: the image file
(``file_name``, ``filename`` or ``image``), the captions (``captions``, ``caption``, ``text``, ``sentences``, or
``caption_1``, ``caption_2`` …), and where there are such ``split``, ``label`` and ``paraphrases``.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rsedge import jsonvalues
from rsedge.datasets.examples import BadRecord
from rsedge.datasets.records import FILE_COLUMNS, Record, caption_columns, captions_in, column
from rsedge.errors import OptionError

_OPTIONAL = ("split", "label", "paraphrases")

Rows = list[tuple[str, Mapping[str, Any]]]
"""Where a row stands, and its cells."""


def read_table(path: Path, source: str) -> tuple[list[Record], list[BadRecord]]:
    """The records of a table by its suffix, and the lines that are none.

    Raises:
        OptionError: The file cannot be read, or it is unclear which column is what.
    """
    bad: list[BadRecord] = []

    def report(where: str, reason: str) -> None:
        bad.append(BadRecord(source, where, reason))

    try:
        rows = READERS[path.suffix.lower()](path, report)
    except (OSError, ValueError) as error:
        raise OptionError(f"{path} cannot be read: {error}") from error
    return records_of(rows, source, report), bad


def records_of(rows: Rows, source: str, report: Callable[[str, str], None]) -> list[Record]:
    """The records of rows. ``report`` is told where a row stands and why it is left out.

    Raises:
        OptionError: No column, or more than one, can be the file name or the captions.
    """
    if not rows:
        return []
    columns = dict.fromkeys(name for _, row in rows for name in row)
    file = column(columns, FILE_COLUMNS, "image file", source)
    if file is None:
        raise OptionError(
            f"{source}: no column of image files among {', '.join(columns)}; accepted are {', '.join(FILE_COLUMNS)}"
        )
    texts = caption_columns(columns, source)
    records: list[Record] = []
    places: dict[Any, int] = {}
    for where, row in rows:
        cells = row.get(texts[0]) if texts else None
        name = row.get(file)
        record = Record(
            where=f"{name} ({where})" if isinstance(name, str) and name else where,
            name=name,
            captions=captions_in(row, texts),
            split=row.get("split"),
            label=row.get("label"),
            paraphrases=row.get("paraphrases"),
        )
        # A caption a row: the rows of one image are one record. With lists, a second row of an image is a fault, as
        # nothing says how the two belong together.
        apart = len(texts) != 1 or not isinstance(cells, str) or not isinstance(name, str)
        if apart or name not in places:
            if not apart:
                places[name] = len(records)
            records.append(record)
            continue
        first = records[places[name]]
        if (record.split, record.label) != (first.split, first.label):
            report(record.where, f"its split or label is not that of {first.where}: an image has one")
            continue
        records[places[name]] = Record(
            first.where, name, (*first.captions, *record.captions), first.split, first.label, first.paraphrases
        )
    return records


def read_json_lines(path: Path, report: Callable[[str, str], None]) -> Rows:
    """Rows of a file with one JSON object a line; empty lines are none."""
    rows: Rows = []
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = jsonvalues.loads(line)
            except ValueError as error:
                report(f"line {number}", f"it is not JSON: {error}")
                continue
            if isinstance(row, dict):
                rows.append((f"line {number}", row))
            else:
                report(f"line {number}", "it is no JSON object")
    return rows


def rows_of_list(values: Sequence[Any], report: Callable[[str, str], None]) -> Rows:
    """Rows of a JSON list of objects."""
    rows: Rows = []
    for number, row in enumerate(values):
        if isinstance(row, dict):
            rows.append((f"entry {number}", row))
        else:
            report(f"entry {number}", "it is no JSON object")
    return rows


def read_csv(path: Path, report: Callable[[str, str], None]) -> Rows:
    """Rows of a CSV file with a header. An empty split or label is none; an empty caption stays, as it is a fault."""
    rows: Rows = []
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            for row in reader:
                where = f"line {reader.line_num}"
                if None in row or None in row.values():
                    report(where, f"it has not the {len(reader.fieldnames or ())} cells of the header")
                elif lists := [cell for cell in row.values() if cell.startswith("[") and cell.endswith("]")]:
                    report(where, f"{lists[0][:40]} looks like a list: give one row for each caption")
                else:
                    rows.append((where, {**row, **{name: row[name] or None for name in _OPTIONAL if name in row}}))
        except csv.Error as error:
            raise OptionError(f"{path} is no CSV after line {reader.line_num}: {error}") from error
    return rows


def read_parquet(path: Path, report: Callable[[str, str], None]) -> Rows:  # noqa: ARG001 - its rows are always whole
    """Rows of a Parquet file; needs pyarrow."""
    try:
        import pyarrow  # type: ignore[import-untyped, unused-ignore]
        import pyarrow.parquet  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise OptionError(f"{path} is Parquet, which needs pyarrow: pip install pyarrow") from error
    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise OptionError(f"{path} cannot be read as Parquet: {error}") from error
    if any(pyarrow.types.is_struct(field.type) for field in table.schema):
        raise OptionError(f"{path} holds the images themselves: have its folder loaded, hf:{path.parent}")
    return [(f"row {number}", row) for number, row in enumerate(table.to_pylist(), 1)]


READERS: dict[str, Callable[[Path, Callable[[str, str], None]], Rows]] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".csv": read_csv,
    ".parquet": read_parquet,
}
"""Suffix → reader."""
