"""Read catalogues of scenes, one scene at a time, and place each scene's output.

A catalogue may be larger than memory: 16 bytes per scene are kept, and no more.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rsedge.errors import OptionError, SceneError
from rsedge.runtime.scenes.access import LOCAL, Access
from rsedge.runtime.scenes.catalog import RASTERS, find, walk
from rsedge.runtime.scenes.products.product import Product
from rsedge.runtime.scenes.products.sentinel2 import ProductName
from rsedge.texts import plain, redact

NO_COLLECTION, NO_TILE = "scenes", "no-mgrs-tile"
"""Folders of scenes that belong to no collection, and to no tile of the Military Grid Reference System."""
_LONGEST_ID = 200  # bytes: a file name has at most 255, and suffixes follow


@dataclass(frozen=True, slots=True)
class Entry:
    """A scene of a catalogue."""

    id: str
    """Name of the scene as part of a file name; no two scenes of a catalogue share it."""
    collection: str
    """``sentinel-2-l2a`` or ``sentinel-2-l1c`` by its product id, or ``scenes``."""
    mgrs_tile: str
    """Its tile, such as ``34UCF``, or ``no-mgrs-tile``."""
    name: str
    """Scene as the catalogue names it, for messages."""
    source: str | Product | None
    """What ``Scene.open`` takes; None for an entry that cannot be used."""
    error: str | None = None
    """Reason why it cannot be used."""

    @property
    def output(self) -> Path:
        """Path of its output below the folder of a batch."""
        return Path(self.collection, self.mgrs_tile, f"{self.id}.parquet")

    @property
    def key(self) -> int:
        """A number of 64 bits that depends on the id alone: shards are assigned by it."""
        return _number(self.id)


def read_catalog(names: Iterable[str], *, access: Access = LOCAL, stdin: str | None = None) -> Iterator[Entry]:
    """Yield the scenes of a catalogue, in the order of its parts; a scene that occurs twice is yielded once.

    An entry that cannot be used has an ``error`` and no ``source``.

    Args:
        names: Rasters, products, STAC items and collections of items, folders and patterns of these, and text files
            (``.txt``) with one of them per line, relative to the folder of the file; lines that begin with # are
            comments.
        access: Access of the scenes.
        stdin: Content of ``-``.

    Raises:
        OptionError: A list cannot be read, or an input is remote without ``access.remote``.
    """
    known: dict[int, int] = {}
    for name, source in _sources(names, access, stdin):
        entry = _entry(name, source)
        parts = repr(sorted(source.bands.items())) if isinstance(source, Product) else os.path.realpath(name)
        origin, first = _number(parts), known.get(entry.key)
        if first is None:
            known[entry.key] = origin
            yield entry
        elif first != origin:
            error = f"another scene of the catalogue is called {entry.id}, and so is its output: rename one of them"
            yield replace(entry, id=f"{entry.id}~{origin:016x}", source=None, error=error)


def _sources(
    names: Iterable[str], access: Access, stdin: str | None
) -> Iterator[tuple[str, str | Product | SceneError]]:
    """Yield what can be opened, and the errors of what cannot, each with its name."""
    for name in names:
        path = Path(name)
        if path.suffix.lower() == ".txt":
            try:
                with path.open(encoding="utf-8") as lines:
                    listed = (line.strip() for line in lines)
                    places = (
                        line if "://" in line else os.fspath(path.parent / line)
                        for line in listed
                        if line and not line.startswith("#")
                    )
                    # A list in a list would be a circle sooner or later.
                    yield from _sources((place for place in places if not place.endswith(".txt")), access, stdin)
            except (OSError, UnicodeDecodeError) as error:
                raise OptionError(f"{name} cannot be read as a list of scenes: {error}; give a UTF-8 file") from error
            continue
        bad: list[tuple[str, SceneError]] = []
        try:
            # A product is a folder too, and has a suffix.
            found = (
                walk(path, RASTERS, access=access, bad=bad)
                if path.is_dir() and not path.suffix
                else find(name, access=access, stdin=stdin)
            )
            for source in found:
                yield (source.name if isinstance(source, Product) else source), source
                yield from bad
                bad.clear()
        except SceneError as error:
            bad.append((name, error))
        yield from bad


def _entry(name: str, source: str | Product | SceneError) -> Entry:
    if isinstance(source, SceneError):
        return Entry(_file_name(Path(name).name), NO_COLLECTION, NO_TILE, name, None, redact(plain(str(source))))
    label, given = (source.name, source) if isinstance(source, Product) else (Path(source).stem, None)
    known = ProductName.parse((given and given.product_id) or label) or ProductName()
    collection = f"sentinel-2-{known.level.lower()}" if known.mission and known.level else NO_COLLECTION
    tile = (given and given.mgrs_tile) or known.mgrs_tile or NO_TILE
    return Entry(_file_name(label), collection, tile, name, source)


def _file_name(label: str) -> str:
    """Return a scene's name as part of a file name: the name may come from a stranger's product or item."""
    safe = plain(label).replace("/", "_").replace(os.sep, "_").lstrip(".") or "scene"
    short = safe.encode("utf-8", "replace")[:_LONGEST_ID].decode("utf-8", "ignore")
    return short if short == safe else f"{short}~{_number(label):016x}"


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:8], "big")
