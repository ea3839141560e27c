"""Caption sets of any layout → examples: the whole policy, from the sources as a user names them.

The file of ``rsedge back-translate`` keeps other wordings of captions apart from the annotations.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeGuard

from rsedge import jsonvalues
from rsedge.datasets.examples import (
    SPLIT_WORDS,
    SPLITS,
    BadRecord,
    CaptionData,
    Example,
    ImageSource,
    Split,
    Splitter,
    split_named,
    subset,
    wanted_splits,
)
from rsedge.datasets.images import FileImage
from rsedge.datasets.sources import label_of, read_classes, read_set
from rsedge.errors import OptionError, SceneError
from rsedge.texts import in_a_line, in_lines

if TYPE_CHECKING:
    from rsedge.datasets.tables import CaptionSet, Record

_MOST_THREADS = 4
_LONGEST_NAME, _LONGEST_PART = 2000, 255  # bytes, of a file name and of a part between slashes
_SEARCHED = 500  # names looked for in each folder that may have the images


def load_examples(
    sources: Sequence[str | Path],
    *,
    seed: int = 0,
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    val_fraction: float = 0.0,
    limit: int | None = None,
    splits: Sequence[str] = SPLITS,
    skip_bad: bool = False,
    paraphrases: Path | None = None,
    check: bool = True,
    progress: Callable[[str], None] | None = None,
) -> CaptionData:
    """Read one or several caption sets.

    A set's own splits come first; without such, each image is placed by a hash of the seed and its key (see
    :mod:`rsedge.datasets.examples`), so that all its captions are on one side.

    Args:
        sources: ``FILE``, ``FILE@FOLDER`` (with the folder of its images), ``FOLDER`` or ``hf:OWNER/NAME``; see
            :mod:`rsedge.datasets.sources` for the layouts.
        seed: Of splits and of ``limit``.
        fractions: Of train, val and test, for sets without splits; met on average, not exactly.
        val_fraction: Share of the training images that become val, for sets with splits but without val.
        limit: At most so many images of each split over all sets: a random subset, the same whatever else there is.
        splits: Read only these; images of the others need not be there.
        skip_bad: Leave out records that cannot be used, and list them in the result, instead of refusing all.
        paraphrases: File of ``rsedge back-translate`` with other wordings of the captions.
        check: Decode every image once, in a few threads, so that a damaged one is found now and not in mid-training.
        progress: Told what takes a while.

    Raises:
        OptionError: Listing all at once: a set cannot be read, its layout is unclear, an option is out of range, or
            records cannot be used: a missing image, no caption, an undecodable file, an unknown split, a file named
            twice or outside the folder.
    """
    sets = _read_all([str(source) for source in sources], read_set)
    splitter = Splitter(seed, fractions, val_fraction)
    return _load(sets, None, splitter, limit, splits, skip_bad, paraphrases, check, progress)


def load_labelled(
    source: str | Path,
    *,
    seed: int = 0,
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    val_fraction: float = 0.0,
    limit: int | None = None,
    splits: Sequence[str] = SPLITS,
    skip_bad: bool = False,
    check: bool = True,
    progress: Callable[[str], None] | None = None,
) -> tuple[Example, ...]:
    """Read images with a class each, for zero-shot classification.

    ``source`` is a folder with one folder a class, or with files named ``class_number.ext``, all for testing unless
    folders around them are splits; or a caption set whose records have a ``label`` or such file names (captions are
    kept, but not needed). Other arguments and errors as :func:`load_examples`; OptionError too where an image has no
    class.
    """
    sets = _read_all([str(source)], lambda name: read_classes(name) or read_set(name))
    return _load(
        sets, label_of, Splitter(seed, fractions, val_fraction), limit, splits, skip_bad, None, check, progress
    ).examples


def _read_all(sources: Sequence[str], read: Callable[[str], CaptionSet]) -> list[CaptionSet]:
    """All sets, with distinct names; what is wrong with any is said of all."""
    if not sources:
        raise OptionError("no caption set is named: give at least one")
    sets: list[CaptionSet] = []
    problems: list[str] = []
    for source in sources:
        try:
            sets.append(read(source))
        except OptionError as error:  # noqa: PERF203 - reading a set takes far longer
            problems.append(str(error))
    if problems:
        raise OptionError("\n".join(problems))
    # Sets that share a name get as much of their paths as tells them apart.
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


def _load(
    sets: Sequence[CaptionSet],
    label: Callable[[Record], str | None] | None,
    splitter: Splitter,
    limit: int | None,
    splits: Sequence[str],
    skip_bad: bool,
    paraphrases: Path | None,
    check: bool,
    progress: Callable[[str], None] | None,
) -> CaptionData:
    wanted = wanted_splits(splits)
    if limit is not None and limit < 1:
        raise OptionError(f"limit is {limit}: give a number of images above 0")
    examples: list[Example] = []
    bad: list[BadRecord] = []
    source_of: dict[str, str] = {}
    for caption_set in sets:
        found, unusable = _read_examples(caption_set, label, splitter, wanted)
        examples += found
        bad += unusable
        source_of.update((example.key, caption_set.source) for example in found)
    examples.sort(key=lambda example: example.key)
    if limit is not None:
        by_split = ([example.key for example in examples if example.split == split] for split in wanted)
        kept = set().union(*(subset(keys, limit, seed=splitter.seed) for keys in by_split))
        examples = [example for example in examples if example.key in kept]
    if check:
        if progress is not None:
            progress(f"checking {len(examples)} images")
        with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
            faults = {example.key: fault for example, fault in zip(examples, pool.map(_fault, examples), strict=True)}
        bad += [BadRecord(source_of[key], key, fault) for key, fault in faults.items() if fault is not None]
        examples = [example for example in examples if faults[example.key] is None]
    if bad and not skip_bad:
        count = "1 record cannot be used" if len(bad) == 1 else f"{len(bad)} records cannot be used"
        raise OptionError("\n".join([f"{count}:", *in_lines(bad), "mend them, or leave them out with --skip-bad"]))
    if not examples:
        left = f"all {len(bad)} records are left out" if bad else "there are no records"
        names = ", ".join(caption_set.source for caption_set in sets)
        raise OptionError(f"{names} hold no usable image of the splits {', '.join(sorted(wanted))}: {left}")
    if paraphrases is not None:
        known = {f"{each.name}/{_name(record)[0]}" for each in sets for record in each.records}
        examples = attach_paraphrases(examples, paraphrases, known=known)
    return CaptionData(tuple(examples), tuple(bad), tuple(caption_set.source for caption_set in sets))


def _read_examples(
    caption_set: CaptionSet,
    label: Callable[[Record], str | None] | None,
    splitter: Splitter,
    splits: frozenset[Split],
) -> tuple[list[Example], list[BadRecord]]:
    """The usable records of the wanted splits as examples, and the others of these splits.

    Where ``label``, which finds the class of a record, is given, an example needs a class instead of captions.
    """
    has_splits = any(record.split is not None for record in caption_set.records)
    has_val = any(split_named(record.split) == "val" for record in caption_set.records)
    seen: set[str] = set()
    kept: list[tuple[Record, str, Split, str | None]] = []
    bad = [BadRecord(caption_set.source, *fault) for fault in caption_set.bad]
    for record in caption_set.records:
        name, reasons = _name(record)
        if name in seen:
            reasons.append(f"{name} is there more than once: every image needs one record with all its captions")
        seen.add(name)
        key = f"{caption_set.name}/{name}"
        split = split_named(record.split) if has_splits else splitter.split(key)
        if has_splits and not has_val and split == "train" and splitter.is_val(key):
            split = "val"
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
    """The folder that has most of the images, the first of several; None where none is needed."""
    if not names:
        return None
    sample = names[:: -(-len(names) // _SEARCHED)]
    hits = {folder: sum((folder / name).is_file() for name in sample) for folder in caption_set.folders}
    best = max(hits, key=lambda folder: hits[folder])
    if not hits[best]:
        raise OptionError(
            f"{caption_set.source}: no image of it, such as {names[0]}, is in {in_a_line(hits, 8)}; "
            f"name the folder of its images: {caption_set.source.partition('@')[0]}@FOLDER"
        )
    return best


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
            key = _paraphrased(values := jsonvalues.loads(line), known, by_file)
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


def _paraphrased(values: Any, known: Collection[str], by_file: dict[str, list[str]]) -> str:
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
