"""What the readers of layouts hand over: records as they stand in a file, not checked yet."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsedge.errors import OptionError

if TYPE_CHECKING:
    from rsedge.datasets.examples import BadRecord, ImageSource

FILE_COLUMNS = ("file_name", "filename", "image")
CAPTION_COLUMNS = ("captions", "caption", "text", "sentences")
_NUMBERED = re.compile(r"captions?_?(\d{1,9})")
# File names that say nothing about what is in the set: the folder's name is the better one.
_GENERIC = {"metadata", "captions", "annotations", "dataset", "data", "train", "training", "val", "valid", "validation"}
_GENERIC |= {"dev", "test", "testing", "index", "labels"}


@dataclass(frozen=True, slots=True)
class Record:
    """One image as the file describes it; every field may be wrong."""

    where: str
    """Where it stands, for messages."""
    name: Any
    """File name relative to the image folder."""
    captions: Sequence[Any]
    """As they stand."""
    split: Any = None
    label: Any = None
    """As they stand; None where the file has none."""
    paraphrases: Any = None
    """As they stand: a list for each caption."""
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
    bad: tuple[BadRecord, ...] = ()
    """Records that could not even be parsed."""


def set_name(path: Path) -> str:
    """What a set read from ``path`` is called: its file or folder, or the folder around a file with a generic name."""
    path = path.absolute()
    return path.parent.name or path.stem if path.is_file() and path.stem.lower() in _GENERIC else path.stem


def tell_apart(sets: Sequence[CaptionSet]) -> list[CaptionSet]:
    """The sets with distinct names: those that share one get as much of their paths as tells them apart.

    Raises:
        OptionError: One set is given twice.
    """
    paths = [item.path for item in sets]
    if twice := [item.source for item in sets if paths.count(item.path) > 1]:
        raise OptionError(f"{' and '.join(twice)} are one set: name every set once")
    result = []
    for item in sets:
        same = [other for other in sets if other.name == item.name]
        depth = 1
        while len(same) > 1 and len({_tail(other.path, depth) for other in same}) < len(same):
            depth += 1
        result.append(item if len(same) == 1 else replace(item, name=_tail(item.path, depth)))
    return result


def _tail(path: Path, depth: int) -> str:
    """The last ``depth`` parts of a path; with its suffix once the rest is used up."""
    parts = path.with_suffix("").parts
    return "/".join(part.strip("/") for part in parts[-depth:]) if depth <= len(parts) else path.as_posix()


def column(columns: Iterable[str], candidates: Sequence[str], purpose: str, source: str) -> str | None:
    """The one of ``candidates`` among ``columns``, or None.

    Raises:
        OptionError: There are several.
    """
    present = [name for name in candidates if name in set(columns)]
    if len(present) > 1:
        raise OptionError(f"{source}: both {' and '.join(present)} may be the {purpose}: keep one of them")
    return present[0] if present else None


def caption_columns(columns: Iterable[str], source: str) -> tuple[str, ...]:
    """The columns with captions: one of ``CAPTION_COLUMNS``, or numbered ones such as ``caption_0`` in their order.

    Empty where there are none but a ``label``.

    Raises:
        OptionError: There is neither, or it is unclear which.
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
