"""Which layout a source has, found from what is there.

A source is written

- ``FILE``: Karpathy JSON, or a table (JSON list, JSON lines, CSV, Parquet), with its images in the same folder or in
  one beside it whose name speaks of images (``images/``, ``RSICD_images/``);
- ``FILE@FOLDER``: the same with its images in FOLDER;
- ``FOLDER``: an imagefolder (``metadata.jsonl``, ``.csv`` or ``.parquet`` in it, or in its folders ``train``,
  ``validation``, ``test``), a set that ``datasets`` saved to disk, or a folder with one FILE of the above, or with one
  for each split, named as such (``train.jsonl``, ``val.jsonl``);
- ``hf:OWNER/NAME[:CONFIG][@REVISION]``: a set of the Hugging Face hub.

A set has splits where its records say so, else where the names of its folders or tables do (``train/``, ``test.csv``).

For zero-shot classification also a folder with one folder a class, or with files named ``class_number.ext``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from rsedge import jsonvalues
from rsedge.datasets import hub, tables
from rsedge.datasets.examples import split_named
from rsedge.datasets.images import SUFFIXES
from rsedge.datasets.tables import CaptionSet, Record
from rsedge.errors import OptionError
from rsedge.texts import in_a_line

ACCEPTED = (
    "accepted are Karpathy JSON, JSON lines, CSV or Parquet (FILE, or FILE@FOLDER with the folder of its images), "
    "a folder with metadata.jsonl, .csv or .parquet, a set saved by datasets, and hf:OWNER/NAME"
)
_IMAGE_FOLDER = re.compile(r"image|img|photo", re.IGNORECASE)
# File names that say nothing about what is in the set: the folder's name is the better one.
_GENERIC = {
    "metadata", "captions", "annotations", "dataset", "data", "train", "training", "val", "valid", "validation", "dev",
    "test", "testing", "index", "labels",
}  # fmt: skip
_NUMBERED_NAME = re.compile(r"(?P<label>.*[^\W\d_].*?)[ _-]?\d+")


class _Table(NamedTuple):
    """One table of a set: its file, the folder of images that its names are relative to, its split."""

    path: Path
    prefix: str = ""
    split: str | None = None


def read_set(source: str) -> CaptionSet:
    """The records of a caption set, not checked yet; OptionError where it is missing, unreadable or of an unclear
    layout.
    """
    if source.startswith(hub.PREFIX):
        return hub.read_hub(source)
    path, images = Path(source).expanduser(), None
    if not path.exists():  # then it is FILE@FOLDER
        text, at, folder = source.rpartition("@")
        path, images = Path(text).expanduser(), Path(folder).expanduser()
        if not at or not path.exists():
            raise OptionError(f"{source} does not exist; {ACCEPTED}")
        if not images.is_dir():
            raise OptionError(f"{source}: there is no folder {folder} for the images of {text}")
    if path.is_file():
        return _read_file(source, path, images)
    candidates = _candidates(source, path, images)
    if len(candidates) != 1:
        found = f"it holds {' and '.join(candidates)}: give the one that is meant" if candidates else _contents(path)
        raise OptionError(f"{source} is a folder whose layout cannot be told: {found}; {ACCEPTED}")
    return next(iter(candidates.values()))()


def read_classes(source: str) -> CaptionSet | None:
    """The images of a folder with one folder a class or files named ``class_number.ext``; None if it has annotations.

    Folders around the classes are splits where they are named so; without such, all images are for testing. OptionError
    where the folder has no images.
    """
    path = Path(source).expanduser()
    if not path.is_dir() or _candidates(source, path, None):
        return None
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise OptionError(f"{source} has neither annotations nor images: {_contents(path)}")
    records = []
    for file in files:
        relative = file.relative_to(path)
        *folders, _ = relative.parts
        split = split_named(folders[0]) if folders else None
        label = "/".join(folders[1:] if split else folders)
        records.append(Record(relative.as_posix(), relative.as_posix(), (), split, label or None))
    if all(record.split is None for record in records):
        records = [replace(record, split="test") for record in records]
    return CaptionSet(source, _set_name(path), path.resolve(), tuple(records), (path,))


_SHARD = re.compile(r"[a-z]\w*-\d{5}-of-\d{5}\.parquet", re.IGNORECASE)


def _set_name(path: Path) -> str:
    """What a set read from ``path`` is called: its file or folder, or the folder around a file with a generic name."""
    path = path.absolute()
    return path.parent.name or path.stem if path.is_file() and path.stem.lower() in _GENERIC else path.stem


def label_of(record: Record) -> str | None:
    """The class of a record: what its file says, else what its name begins with (``airport_12.jpg``), else None."""
    if record.label is not None and str(record.label).strip():
        return str(record.label).strip()
    match = _NUMBERED_NAME.fullmatch(PurePosixPath(str(record.name)).stem)
    return match["label"] if match else None


def _candidates(source: str, path: Path, images: Path | None) -> dict[str, Callable[[], CaptionSet]]:
    """What a folder may be: what was found → how to read it. Single annotation files count only if there is no more."""
    found: dict[str, Callable[[], CaptionSet]] = {}
    if hub.is_saved(path):
        found["a set saved by datasets"] = partial(hub.read_saved, source, path)
    inner = [(folder.name, folder) for folder in sorted(path.iterdir()) if split_named(folder.name)]
    for suffix in tables.READERS:
        name = f"metadata{suffix}"
        if (path / name).is_file():
            found[name] = partial(_read_tables, source, path, [_Table(path / name)], (images or path,))
        parts = [_Table(folder / name, f"{split}/", split) for split, folder in inner if (folder / name).is_file()]
        if parts:
            label = ", ".join(f"{part.prefix}{name}" for part in parts)
            found[label] = partial(_read_tables, source, path, parts, (images or path,))
    if found:
        return found
    shards = [file for folder in (path / "data", path) if folder.is_dir() for file in folder.glob("*-of-*.parquet")]
    if any(_SHARD.fullmatch(file.name) for file in shards):
        return {"a set in the layout of the hub": partial(hub.read_hub, f"{hub.PREFIX}{path}")}
    suffixes = (".json", *tables.READERS)
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in suffixes and file.name[0] != ".")
    if len(files) > 1 and all(split_named(file.stem) and file.suffix.lower() in tables.READERS for file in files):
        parts = [_Table(file, split=file.stem) for file in files]
        label = ", ".join(file.name for file in files)
        return {label: partial(_read_tables, source, path, parts, _image_folders(path, images))}
    return {file.name: partial(_read_file, source, file, images) for file in files}


def _read_file(source: str, path: Path, images: Path | None) -> CaptionSet:
    folders = _image_folders(path.parent, images)
    if path.suffix.lower() in tables.READERS:
        split = path.stem if split_named(path.stem) else None
        return _read_tables(source, path, [_Table(path, split=split)], folders)
    if path.suffix.lower() != ".json":
        raise OptionError(f"{source} is a {path.suffix or 'file without a suffix'}, which is no layout; {ACCEPTED}")
    try:
        values = jsonvalues.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise OptionError(f"{path} cannot be read as JSON: {error}") from error
    name = _set_name(path)
    faults: tables.Faults = []
    if isinstance(values, list):
        entries = [(f"entry {number}", entry) for number, entry in enumerate(values)]
        faults += [(where, "it is no JSON object") for where, entry in entries if not isinstance(entry, dict)]
        rows = [(where, entry) for where, entry in entries if isinstance(entry, dict)]
        records = tables.records_of(rows, source, faults)
    elif isinstance(values, dict) and values and all(map(_is_nwpu_class, values.values())):
        records = _read_nwpu(values, folders)
    elif isinstance(values, dict) and isinstance(values.get("images"), list) and "annotations" not in values:
        records = tables.read_karpathy(values["images"], faults)
        stated = values.get("dataset")
        name = stated if isinstance(stated, str) and stated else name
    else:
        held = f"an object with {in_a_line(values, 8)}" if isinstance(values, dict) else "no list of images"
        raise OptionError(f"{source} is {held}: Karpathy JSON has images, each with its sentences; {ACCEPTED}")
    return CaptionSet(source, name, path.resolve(), tuple(records), folders, faults)


def _is_nwpu_class(entries: Any) -> bool:
    return (
        isinstance(entries, list)
        and bool(entries)
        and all(isinstance(entry, dict) and "filename" in entry and "raw" in entry for entry in entries)
    )


def _read_nwpu(classes: dict[str, list[dict[str, Any]]], folders: tuple[Path, ...]) -> list[Record]:
    """NWPU-Captions as published: class → images with captions in ``raw``, ``raw_1`` …; the images of a class lie in a
    folder of its name, or all lie in one.
    """
    records = []
    for label, entries in classes.items():
        for entry in entries:
            name = entry["filename"]
            captions = [text for key, text in entry.items() if re.fullmatch(r"raw(_\d+)?", key)]
            if _is_plain(label) and isinstance(name, str) and _is_plain(name):
                below = f"{label}/{name}"
                if any((folder / below).is_file() for folder in folders):
                    name = below
            records.append(Record(str(entry["filename"]), name, tuple(captions), entry.get("split"), label))
    return records


def _is_plain(part: str) -> bool:
    """Whether a name leads to no other folder."""
    return "/" not in part and "\0" not in part and part not in ("", ".", "..") and len(part.encode()) < 256


def _read_tables(source: str, path: Path, parts: Sequence[_Table], folders: tuple[Path, ...]) -> CaptionSet:
    records: list[Record] = []
    faults: tables.Faults = []
    for part in parts:
        for record in tables.read_table(part.path, source, faults):
            name = part.prefix + record.name if isinstance(record.name, str) and record.name else record.name
            records.append(replace(record, name=name, split=record.split or part.split))
    if all(record.split is None for record in records):
        # The usual imagefolder with its metadata at the top: the images lie in train/, validation/, test/.
        within = [split_named(str(record.name).partition("/")[0]) for record in records]
        if any(within):
            records = [replace(record, split=split) for record, split in zip(records, within, strict=True)]
    return CaptionSet(source, _set_name(path), path.resolve(), tuple(records), folders, faults)


def _image_folders(folder: Path, images: Path | None) -> tuple[Path, ...]:
    """Where the images of an annotation file in ``folder`` may be, the likeliest first."""
    if images is not None:
        return (images,)
    inner = sorted(entry for entry in folder.iterdir() if _IMAGE_FOLDER.search(entry.name) and entry.is_dir())
    return (*inner, folder)


def _contents(path: Path) -> str:
    names = [entry.name + "/" * entry.is_dir() for entry in sorted(path.iterdir())]
    return f"it holds {in_a_line(names, 8) or 'nothing'}"
