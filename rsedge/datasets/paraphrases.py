"""The file of ``rsedge back-translate``: other wordings of captions, kept apart from the annotations."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from rsedge import jsonvalues
from rsedge.errors import OptionError
from rsedge.texts import in_lines

if TYPE_CHECKING:
    from rsedge.datasets.examples import Example


def to_line(example: Example, paraphrases: Sequence[Sequence[str]]) -> str:
    """The line of an example in the file: its key, its captions, and for each caption its other wordings."""
    values = {"key": example.key, "captions": example.captions, "paraphrases": paraphrases}
    return json.dumps(values, ensure_ascii=False)


def attach_paraphrases(examples: Sequence[Example], path: Path, *, known: Collection[str]) -> list[Example]:
    """The examples with the wordings that ``path`` has for them; those it does not name stay as they are.

    Args:
        examples: Any part of a data set.
        path: JSON lines ``{"key", "captions", "paraphrases": [[…], …]}``, one list of wordings for each caption; in
            place of ``key``, ``filename`` will do where only one set has such a file.
        known: Keys of the whole data set: lines for others of them are no mistake.

    Raises:
        OptionError: A line is malformed, names an unknown image, or has other captions than the data: all are listed.
    """
    by_file: dict[str, list[str]] = {}
    for key in known:
        by_file.setdefault(key.partition("/")[2], []).append(key)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"the paraphrases {path} cannot be read: {error}") from error
    problems: list[str] = []
    entries: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            key = _place(values := jsonvalues.loads(line), known, by_file)
            if key in entries:
                raise ValueError(f"{key} is there twice")
            entries[key] = values
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    result = []
    for example in examples:
        entry = entries.get(example.key)
        if entry is None:
            result.append(example)
        elif tuple(entry["captions"]) != example.captions:
            problems.append(f"{example.key} has other captions in the data")
        else:
            groups = tuple(tuple(text.strip() for text in group) for group in entry["paraphrases"])
            result.append(replace(example, paraphrases=groups if any(groups) else ()))
    if not entries and not problems:
        problems.append("it is empty")
    if problems:
        remedy = "make it anew from these sets: rsedge back-translate"
        raise OptionError("\n".join([f"the paraphrases {path} do not fit the data:", *in_lines(problems), remedy]))
    return result


def _place(values: Any, known: Collection[str], by_file: dict[str, list[str]]) -> str:
    """The key a line is for; ValueError says why there is none."""
    if not isinstance(values, dict):
        raise ValueError("it is no JSON object")
    captions, groups = values.get("captions"), values.get("paraphrases")
    if not _texts(captions) or not isinstance(groups, list) or not all(map(_texts, groups)):
        raise ValueError("it needs captions, a list of texts, and paraphrases, a list of such lists")
    if len(groups) != len(captions):
        raise ValueError(f"it has {len(captions)} captions, but paraphrases of {len(groups)}")
    if "key" in values:
        if values["key"] not in known:
            raise ValueError(f"there is no image {values['key']!r} in the data")
        return str(values["key"])
    keys = by_file.get(str(values.get("filename")), [])
    if len(keys) != 1:
        name = values.get("filename")
        raise ValueError(f"the file name {name!r} is that of {len(keys)} images in the data: give key")
    return keys[0]


def _texts(values: Any) -> TypeGuard[list[str]]:
    return isinstance(values, list) and all(isinstance(text, str) and text.strip() for text in values)
