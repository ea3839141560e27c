"""Records → examples; whatever is wrong with a record is said, and all of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from rsedge.datasets.examples import BadRecord, Example, ImageSource, Split
from rsedge.datasets.images import FileImage
from rsedge.datasets.splits import SPLIT_WORDS, Splitter, split_named
from rsedge.errors import OptionError, SceneError
from rsedge.texts import in_a_line

if TYPE_CHECKING:
    from rsedge.datasets.records import CaptionSet, Record

_MOST_THREADS = 4
_LONGEST_NAME, _LONGEST_PART = 2000, 255  # bytes, of a file name and of a part between slashes
_SEARCHED = 500  # names looked for in each folder that may have the images


def read_examples(
    caption_set: CaptionSet,
    *,
    splitter: Splitter,
    splits: frozenset[Split],
    label: Callable[[Record], str | None] | None = None,
) -> tuple[list[Example], list[BadRecord]]:
    """The usable records of the wanted splits as examples, and the others of these splits.

    Args:
        caption_set: Read, but not checked.
        splitter: Places images where the set has no split column.
        splits: Wanted; records of the others need no image.
        label: Finds the class of a record. Where it is given, an example needs a class instead of captions.
    """
    has_splits = any(record.split is not None for record in caption_set.records)
    seen: set[str] = set()
    kept: list[tuple[Record, str, Split, str | None]] = []
    bad = list(caption_set.bad)
    for record in caption_set.records:
        name, reasons = _name(record)
        if name in seen:
            reasons.append(f"{name} is there more than once: every image needs one record with all its captions")
        seen.add(name)
        split = split_named(record.split) if has_splits else splitter.split(f"{caption_set.name}/{name}")
        if split is None:
            stated = "it has no split, though other records have" if record.split is None else repr(record.split)
            reasons.append(f"unknown split: {stated}; accepted are {SPLIT_WORDS}")
        elif split not in splits:
            continue
        found = label(record) if label else None if record.label is None else str(record.label).strip() or None
        if label and found is None:
            reasons.append("it has no class: neither a label nor a file name such as airport_12.jpg")
        reasons += _caption_faults(record, needed=label is None)
        if reasons or split is None:
            bad.append(BadRecord(caption_set.source, record.where, "; ".join(reasons)))
        else:
            kept.append((record, name, split, found))
    folder = _image_folder(caption_set, [name for record, name, _, _ in kept if record.image is None])
    examples = []
    for record, name, split, found in kept:
        image: ImageSource | None = record.image
        if image is None and folder is not None:
            path = folder / name
            if not path.is_file():
                bad.append(BadRecord(caption_set.source, record.where, f"there is no image {path}"))
                continue
            image = FileImage(path)
        assert image is not None  # _image_folder finds one or raises
        captions = tuple(text.strip() for text in record.captions)
        paraphrases = tuple(tuple(text.strip() for text in group) for group in record.paraphrases or ())
        examples.append(Example(f"{caption_set.name}/{name}", image, captions, split, paraphrases, found))
    return examples, bad


def undecodable(examples: Sequence[Example], source: Callable[[Example], str]) -> dict[str, BadRecord]:
    """The examples whose image cannot be read, by key; reads every image once, in a few threads."""
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        faults = pool.map(_fault, examples)
        return {
            example.key: BadRecord(source(example), example.key, fault)
            for example, fault in zip(examples, faults, strict=True)
            if fault is not None
        }


def keys_of(caption_set: CaptionSet) -> set[str]:
    """The keys that the records of a set have, or would have if nothing else were wrong with them."""
    return {f"{caption_set.name}/{_name(record)[0]}" for record in caption_set.records}


def _fault(example: Example) -> str | None:
    try:
        example.image.read()
    except SceneError as error:
        return str(error)
    return None


def _name(record: Record) -> tuple[str, list[str]]:
    """The file name in one spelling, and what is wrong with it."""
    if not isinstance(record.name, str) or not record.name.strip():
        return f"\0{record.where}", ["it names no image file"]
    path = PurePosixPath(record.name.strip())
    if path.is_absolute() or ".." in path.parts:
        return str(path), [f"{record.name} lies outside the image folder: give names relative to it, without .."]
    letters = str(path).encode("utf-8", "replace")
    if str(path) != letters.decode() or "\0" in str(path) or len(letters) > _LONGEST_NAME:
        return letters.decode(), [
            f"{str(path)[:40]!r} can be no name of a file: give one of up to {_LONGEST_NAME} bytes of UTF-8"
        ]
    if any(len(part.encode()) > _LONGEST_PART for part in path.parts):
        return str(path), [f"{str(path)[:40]!r} has a part of more than {_LONGEST_PART} bytes, and no file has"]
    return str(path), []


def _caption_faults(record: Record, *, needed: bool) -> Iterator[str]:
    if needed and not record.captions:
        yield "it has no caption"
    if wrong := [text for text in record.captions if not isinstance(text, str)]:
        yield f"a caption is {wrong[0]!r}, expected text"
    elif any(not text.strip() for text in record.captions):
        yield "a caption is empty"
    elif any("\ud800" <= letter <= "\udfff" for text in record.captions for letter in text):  # JSON can escape one
        yield "a caption has half a character, which no file in UTF-8 can have"
    if (groups := record.paraphrases) is not None:
        whole = isinstance(groups, list) and all(isinstance(group, list) for group in groups)
        if not whole or not all(isinstance(text, str) and text.strip() for group in groups for text in group):
            yield "paraphrases must be a list of texts for each caption"
        elif len(groups) != len(record.captions):
            yield f"it has paraphrases of {len(groups)} captions, but {len(record.captions)} captions"


def _image_folder(caption_set: CaptionSet, names: Sequence[str]) -> Path | None:
    """The folder that has most of the images, the first of several; None where none is needed.

    Raises:
        OptionError: No folder has any.
    """
    if not names:
        return None
    sample = names[:: -(-len(names) // _SEARCHED)]
    hits = {folder: sum((folder / name).is_file() for name in sample) for folder in caption_set.folders}
    best = max(hits, key=lambda folder: hits[folder])
    if not hits[best]:
        where = in_a_line(hits, 8)
        raise OptionError(
            f"{caption_set.source}: no image of it, such as {names[0]}, is in {where}; "
            f"name the folder of its images: {caption_set.source.partition('@')[0]}@FOLDER"
        )
    return best
