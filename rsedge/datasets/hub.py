"""Sets of the Hugging Face ``datasets`` library: a hub id, a folder it can load, or one saved to disk.

Images stay where they are, in memory-mapped files, and are decoded when they are read. The first Image column is the
image (``image`` of several); captions are found as in tables. A set with no split but ``train`` counts as one without
splits, since that is what the library calls the whole of a set.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from rsedge.datasets.examples import SPLIT_WORDS, split_named
from rsedge.datasets.images import FileImage, decode
from rsedge.datasets.tables import CaptionSet, Record, caption_columns, captions_in, column
from rsedge.errors import OptionError, SceneError

if TYPE_CHECKING:
    from rsedge.pixels import UInt8

PREFIX = "hf:"
_LARGEST_CARD = 2**20  # bytes
_LARGEST_HEAD = 2**15  # characters; YAML takes 20 s for a MiB
# The head of a card, as huggingface_hub finds it: both must see the same.
_HEAD = re.compile(r"^(\s*---(?:\r\n|\r|\n))([\S\s]*?)((?:\r\n|\r|\n)---[ \t]*(\r\n|\n|$))")
_ID = re.compile(r"hf:(?P<path>[^@]+?)(?::(?P<config>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True, slots=True)
class RowImage:
    """The image in a row of a ``datasets`` set, as an :class:`~rsedge.datasets.examples.ImageSource`."""

    rows: Any
    """A ``datasets.Dataset`` whose ``column`` is not decoded; pickled, it is a reference to its files."""
    row: int
    column: str
    name: str
    """For messages."""
    roots: tuple[Path, ...]
    """Folders below which files lie that the set may name; their links are followed."""

    def read(self) -> UInt8:
        """The image, uint8 [H, W, 3], RGB; SceneError where there is none, it is damaged, or its RGB is unclear."""
        cell = self.rows[self.row][self.column] or {}
        if cell.get("bytes") is not None:
            return decode(cell["bytes"], self.name)
        if cell.get("path"):
            path = Path(os.path.abspath(cell["path"]))  # noqa: PTH100 - resolve() would follow links of the folder
            if not any(path.is_relative_to(root) for root in self.roots) or not path.is_file():
                raise SceneError(
                    f"{self.name} names the file {cell['path']!r}, which is not there or in no folder of the set: save "
                    "the set with its images"
                )
            return FileImage(path).read()
        raise SceneError(f"{self.name} has no image")


def read_hub(source: str) -> CaptionSet:
    """The set ``hf:OWNER/NAME[:CONFIG][@REVISION]``, from the hub or its cache; or ``hf:FOLDER``.

    Raises:
        OptionError: The id is malformed, the library is missing, the set cannot be had, or it has not the columns.
    """
    match = _ID.fullmatch(source)
    if match is None:
        raise OptionError(f"{source} is no id of a set: give hf:OWNER/NAME, hf:OWNER/NAME:CONFIG or hf:…@REVISION")
    path = match["path"]
    library = _library(source)
    if Path(path).is_dir():
        _check_data_files(Path(path), source)
    try:
        loaded = library.load_dataset(path, match["config"], revision=match["revision"])
    except Exception as error:  # the library raises a dozen kinds, its own and those of what it calls
        raise OptionError(f"{source} cannot be loaded: {error}") from error
    return _caption_set(source, path.strip("/"), Path(path if Path(path).is_dir() else source), loaded)


def _check_data_files(folder: Path, source: str) -> None:
    """Refuse a folder whose card names data elsewhere: the library would read any file and any URL it names."""
    import yaml

    for card in (folder / "README.md", folder / ".huggingface.yaml"):
        try:
            if not card.exists():
                continue
            text = _text_of(card, source)
            if card.suffix == ".md":
                text = match[2] if (match := _HEAD.search(text)) else ""
            if len(text) > _LARGEST_HEAD:
                raise OptionError(f"{source}: the head of {card} has more than {_LARGEST_HEAD} characters: shorten it")
            if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):  # a value can hold itself
                raise OptionError(f"{source}: {card} has aliases, which no card needs: write the values out")
            stated = yaml.safe_load(text)
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            raise OptionError(f"{source}: {card} cannot be read: {error}") from error
        _check_names(stated.get("configs") if isinstance(stated, dict) else None, card, source)


def _text_of(file: Path, source: str) -> str:
    if not file.is_file():
        raise OptionError(f"{source}: {file} is no file")
    with file.open("rb") as opened:
        data = opened.read(_LARGEST_CARD + 1)
    if len(data) > _LARGEST_CARD:
        raise OptionError(f"{source}: {file} has more than {_LARGEST_CARD} bytes: shorten it")
    return data.decode("utf-8-sig")


def _check_names(stated: Any, card: Path, source: str) -> None:
    waiting = [stated]
    while waiting:
        entry = waiting.pop()
        if isinstance(entry, dict):
            waiting += entry.values()
        elif isinstance(entry, list):
            waiting += entry
        elif isinstance(entry, str) and (
            "://" in entry or "::" in entry or entry.startswith(("/", "~", "\\")) or ".." in re.split(r"[/\\]", entry)
        ):
            raise OptionError(f"{source}: {card} names {entry!r}, which is not below the folder: name files of the set")


def read_saved(source: str, folder: Path) -> CaptionSet:
    """The set that ``save_to_disk`` wrote into ``folder``; OptionError as :func:`read_hub`."""
    library, places = _library(source), [folder]
    try:
        # Its parts must not lie elsewhere either.
        if (whole := folder / "dataset_dict.json").is_file():
            splits = json.loads(_text_of(whole, source))["splits"]
            _check_names(splits, whole, source)
            places = [folder / split for split in splits]
        for state in (place / "state.json" for place in places):
            if state.exists():
                _check_names(json.loads(_text_of(state, source))["_data_files"], state, source)
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise OptionError(f"{source} cannot be loaded: {error}") from error
    try:
        loaded = library.load_from_disk(str(folder))
    except Exception as error:  # as above
        raise OptionError(f"{source} cannot be loaded: {error}") from error
    return _caption_set(source, folder.name, folder, loaded)


def is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote ``folder``."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def _library(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise OptionError(f"{source} is a set of the datasets library: pip install datasets") from error
    return datasets


def _caption_set(source: str, name: str, path: Path, loaded: Any) -> CaptionSet:
    from datasets import config

    parts: Mapping[str | None, Any] = loaded if isinstance(loaded, dict) else {None: loaded}
    if unknown := [word for word in parts if word is not None and split_named(word) is None]:
        raise OptionError(f"{source} has unknown splits {', '.join(map(str, unknown))}: accepted are {SPLIT_WORDS}")
    if set(parts) == {"train"}:
        parts = {None: parts["train"]}
    # Where its image files may lie: in its own folder, and where the library puts what it fetches.
    fetched = [config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, config.EXTRACTED_DATASETS_PATH]
    roots = tuple(Path(name).absolute() for name in ([path] if path.is_dir() else []) + fetched)
    records = [record for word, rows in parts.items() for record in _records(source, word, rows, roots)]
    return CaptionSet(source, name, path, tuple(records))


def _records(source: str, split: str | None, rows: Any, roots: tuple[Path, ...]) -> list[Record]:
    import datasets
    from datasets.features.features import require_decoding

    images = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    image = "image" if "image" in images else images[0] if images else None
    if image is None:
        raise OptionError(f"{source} has no column of images among {', '.join(rows.column_names)}")
    rows = rows.cast_column(image, datasets.Image(decode=False))
    # The library decodes whole rows: it would open the files that other media name, wherever they lie.
    rows = rows.select_columns([name for name, kind in rows.features.items() if not require_decoding(kind)])
    others = [name for name in rows.column_names if name != image]
    texts = caption_columns(others, source)
    file = column(others, ("file_name", "filename"), "image file", source)
    if file:
        names = [str(name) for name in rows[file]]
    else:  # those kept with the images, where every image has one of its own
        names = []
        for batch in rows.select_columns([image]).with_format("arrow").iter(batch_size=1000):
            paths = batch.column(image).combine_chunks().field("path").to_pylist()
            names += [PurePath(path).name if path else "" for path in paths]
        if not all(names) or len(set(names)) < len(names):
            names = [f"{split or 'row'}-{number:06d}" for number in range(len(rows))]
    classes = rows.features.get("label")
    records = []
    for number, row in enumerate(rows.select_columns(others) if others else [{}] * len(rows)):
        label = row.get("label")
        if isinstance(classes, datasets.ClassLabel) and label is not None:
            label = classes.int2str(label)
        records.append(
            Record(
                where=f"{names[number]} (row {number}{f' of {split}' if split else ''})",
                name=names[number],
                captions=captions_in(row, texts),
                split=row.get("split", split),
                label=label,
                paraphrases=row.get("paraphrases"),
                image=RowImage(rows, number, image, f"{source}: {names[number]}", roots),
            )
        )
    return records
