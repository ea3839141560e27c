"""Records as they stand in a file, not checked yet, and their readers: JSON, JSON lines, CSV, Parquet, Karpathy's.

A table has one row an image with a list of captions, or one row a caption with the file name repeated. Columns: the
image file (``file_name``, ``filename`` or ``image``), the captions (``captions``, ``caption``, ``text``, ``sentences``,
or ``caption_1``, ``caption_2`` …), and where there are such ``split``, ``label`` and ``paraphrases``.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsedge import jsonvalues
from rsedge.errors import OptionError

if TYPE_CHECKING:
    from rsedge.datasets.examples import ImageSource

FILE_COLUMNS = ("file_name", "filename", "image")
CAPTION_COLUMNS = ("captions", "caption", "text", "sentences")
_NUMBERED = re.compile(r"captions?_?(\d{1,9})")
_OPTIONAL = ("split", "label", "paraphrases")

Rows = Iterable[tuple[str, Mapping[str, Any]]]
"""Where a row stands, and its cells."""
Faults = list[tuple[str, str]]
"""Where a row stands, and why it is left out; readers append to it."""


@dataclass(frozen=True, slots=True)
class Record:
    """One image as the file describes it; every field may be wrong."""

    where: str
    """Where it stands, for messages."""
    name: Any
    """File name relative to the image folder."""
    captions: Sequence[Any]
    split: Any = None
    label: Any = None
    paraphrases: Any = None
    """A list for each caption."""
    image: ImageSource | None = None
    """The image, where the layout holds the pixels itself."""


@dataclass(frozen=True, slots=True)
class CaptionSet:
    """The records of one source."""

    source: str
    """As the user named it."""
    name: str
    """First part of its examples' keys."""
    path: Path
    """What was read; tells sets of one name apart."""
    records: tuple[Record, ...]
    """In the order of the file."""
    folders: tuple[Path, ...] = ()
    """Where the images may be; the folder that has most of them is it."""
    bad: Sequence[tuple[str, str]] = ()
    """Where a record stands that could not even be parsed, and why."""


def column(columns: Iterable[str], candidates: Sequence[str], purpose: str, source: str) -> str | None:
    """The one of ``candidates`` among ``columns``, or None; OptionError where there are several."""
    present = [name for name in candidates if name in set(columns)]
    if len(present) > 1:
        raise OptionError(f"{source}: both {' and '.join(present)} may be the {purpose}: keep one of them")
    return present[0] if present else None


def caption_columns(columns: Iterable[str], source: str) -> tuple[str, ...]:
    """The columns with captions: one of ``CAPTION_COLUMNS``, or numbered ones such as ``caption_0`` in their order.

    Empty where there are none but a ``label``; OptionError where there is neither, or it is unclear which.
    """
    columns = list(columns)
    if (name := column(columns, CAPTION_COLUMNS, "captions", source)) is not None:
        return (name,)
    numbered = [(int(match[1]), text) for text in columns if (match := _NUMBERED.fullmatch(text))]
    if not numbered and "label" not in columns:
        raise OptionError(
            f"{source}: no column of captions among {', '.join(columns) or 'none at all'}; "
            f"accepted are {', '.join(CAPTION_COLUMNS)}, or caption_1, caption_2 and so on"
        )
    return tuple(text for _, text in sorted(numbered))


def captions_in(row: Mapping[str, Any], columns: Sequence[str]) -> tuple[Any, ...]:
    """The captions of a row as they stand; cells of numbered columns may be empty."""
    if len(columns) != 1:
        return tuple(row[name] for name in columns if row.get(name) not in (None, ""))
    cell = row.get(columns[0])
    if isinstance(cell, (list, tuple)):
        return tuple(cell)
    return () if cell is None else (cell,)


def records_of(rows: Rows, source: str, faults: Faults) -> list[Record]:
    """The records of rows; OptionError where no column, or more than one, can be the file name or the captions."""
    rows = list(rows)
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
            faults.append((record.where, f"its split or label is not that of {first.where}: an image has one"))
        else:
            records[places[name]] = replace(first, captions=(*first.captions, *record.captions))
    return records


def read_table(path: Path, source: str, faults: Faults) -> list[Record]:
    """The records of a table by its suffix; OptionError where it is unreadable, or unclear which column is what."""
    try:
        rows = list(READERS[path.suffix.lower()](path, faults))
    except (OSError, ValueError) as error:
        raise OptionError(f"{path} cannot be read: {error}") from error
    return records_of(rows, source, faults)


def _json_lines(path: Path, faults: Faults) -> Rows:
    """One JSON object a line; empty lines are none."""
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            where = f"line {number}"
            try:
                row = jsonvalues.loads(line) if line.strip() else None
            except ValueError as error:
                faults.append((where, f"it is not JSON: {error}"))
                continue
            if isinstance(row, dict):
                yield where, row
            elif line.strip():
                faults.append((where, "it is no JSON object"))


def _csv(path: Path, faults: Faults) -> Rows:
    """CSV with a header. An empty split or label is none; an empty caption stays, as it is a fault."""
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            for row in reader:
                where = f"line {reader.line_num}"
                if None in row or None in row.values():
                    faults.append((where, f"it has not the {len(reader.fieldnames or ())} cells of the header"))
                elif lists := [cell for cell in row.values() if cell.startswith("[") and cell.endswith("]")]:
                    faults.append((where, f"{lists[0][:40]} looks like a list: give one row for each caption"))
                else:
                    yield where, {**row, **{name: row[name] or None for name in _OPTIONAL if name in row}}
        except csv.Error as error:
            raise OptionError(f"{path} is no CSV after line {reader.line_num}: {error}") from error


def _parquet(path: Path, faults: Faults) -> Rows:  # noqa: ARG001 - its rows are always whole
    import pyarrow  # type: ignore[import-untyped, unused-ignore]
    import pyarrow.parquet  # type: ignore[import-untyped, unused-ignore]

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise OptionError(f"{path} cannot be read as Parquet: {error}") from error
    if any(pyarrow.types.is_struct(field.type) for field in table.schema):
        raise OptionError(f"{path} holds the images themselves: have its folder loaded, hf:{path.parent}")
    return [(f"row {number}", row) for number, row in enumerate(table.to_pylist(), 1)]


def read_karpathy(images: Sequence[Any], faults: Faults) -> list[Record]:
    """The records of Karpathy's splits, the JSON layout of RSICD, UCM-Captions, RSITMD, NWPU-Captions and Sydney:
    ``{"images": [{"filename", "split", "sentences": [{"raw"}]}]}``.
    """
    records = []
    for number, image in enumerate(images):
        where = f"images[{number}]"
        if not isinstance(image, dict) or not isinstance(sentences := image.get("sentences", []), list):
            faults.append((where, "it is no object with a list of sentences"))
            continue
        name = image.get("filename")
        captions = [sentence.get("raw") if isinstance(sentence, dict) else sentence for sentence in sentences]
        where = name if isinstance(name, str) and name else where
        records.append(Record(where, name, captions, image.get("split"), image.get("label")))
    return records


READERS: dict[str, Callable[[Path, Faults], Rows]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _csv,
    ".parquet": _parquet,
}
"""Suffix → reader."""
