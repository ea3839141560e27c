"""A contact sheet of hits: each tile's pixels, read again from its scene, with its rank, score and place."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rasterio.errors import RasterioError

from rsedge.errors import OptionError, RsedgeError, SceneError
from rsedge.runtime.outputs.geometry import polygons
from rsedge.runtime.outputs.report.sheet import write_sheet
from rsedge.runtime.scenes.access import Access
from rsedge.runtime.scenes.catalog import find
from rsedge.runtime.scenes.products.product import Product
from rsedge.runtime.scenes.products.safe import is_safe
from rsedge.runtime.scenes.scene import Scene

if TYPE_CHECKING:
    from rsedge.pixels import UInt8
    from rsedge.runtime.search.hits import Hit

_COLUMNS = 5
_LARGEST_SIDE = 8192  # pixels that are read for a card
_SIDEWAYS = (".msk", ".ovr", ".aux.xml", ".xml", ".json", ".toml", ".parquet", ".csv", ".txt", ".html", ".index")
"""Files that stand beside scenes and bear their names."""


def write_hit_sheet(
    path: str | os.PathLike[str], hits: Sequence[Hit], *, folders: Sequence[str | os.PathLike[str]] = ()
) -> int:
    """Write a PNG with a card per hit, best first.

    A scene is looked for in ``folders`` (and the folders below) by its name, then where it was when it was embedded,
    then beside the file of embeddings. What that file names is opened only where it lies below the file's own folder or
    one of ``folders``: it may come from a stranger. A card without pixels shows the reason.

    Returns:
        Number of cards without pixels.

    Raises:
        OptionError: There are no hits, or a folder does not exist.
        OutputError: The file cannot be written.
    """
    if not hits:
        raise OptionError("there are no hits to show: loosen the filters")
    if missing := [os.fspath(folder) for folder in folders if not Path(folder).is_dir()]:
        raise OptionError(f"{', '.join(missing)} is no folder: name the folders that hold the scenes")
    finder = _Scenes([Path(folder) for folder in folders])
    cards, without = [], 0
    for hit in hits:
        pixels, record = finder.pixels(hit), hit.record
        texts = [f"#{hit.rank}", f"{hit.score:.4f}"]
        if isinstance(pixels, str):
            texts.append(pixels)
            without += 1
        if record.geometry is not None:  # the middle of the footprint, such as 46.0512°N 14.5058°E
            lon, lat = np.array(polygons(record.geometry)[0][0][:-1]).mean(axis=0).tolist()
            texts.append(f"{abs(lat):.4f}°{'NS'[lat < 0]} {abs(lon):.4f}°{'EW'[lon < 0]}")
        texts += [record.scene, *([record.caption] if record.caption else [])]
        cards.append((None if isinstance(pixels, str) else pixels, replace(record, caption=" · ".join(texts))))
    write_sheet(Path(path), cards, columns=min(_COLUMNS, len(cards)))
    return without


class _Scenes:
    """Finds and opens scenes, each once."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders
        self._named: dict[str, list[Path]] | None = None
        self._opened: dict[tuple[str, str | None, str], Scene | str] = {}

    def pixels(self, hit: Hit) -> UInt8 | str:
        """The pixels of a hit, uint8 [H, W, 3], or why there are none."""
        key = (hit.record.scene, hit.path, str(Path(hit.file).parent))
        if key not in self._opened:
            found: Scene | str = "pixels not found: --pixels-from FOLDER"
            for path in self._candidates(hit):
                found = _try_open(path, hit.record.scene)
                if not isinstance(found, str):
                    break
            self._opened[key] = found
        scene = self._opened[key]
        if isinstance(scene, str):
            return scene
        record = hit.record
        if min(record.row_off, record.col_off) < 0 or min(record.height, record.width) < 1:
            return f"no tile of {scene.name} has {record.width} x {record.height} px"
        height = min(record.height, scene.height - record.row_off)
        width = min(record.width, scene.width - record.col_off)
        if height < 1 or width < 1:
            return f"{scene.name} is smaller than when it was embedded"
        if max(height, width) > _LARGEST_SIDE:
            return f"{width} x {height} px are too many for a card, at most {_LARGEST_SIDE} are on a side"
        try:
            with scene.environment(), scene.reader() as reader:
                image, _ = reader.read(record.row_off, record.col_off, height, width)
        except (RasterioError, RsedgeError) as error:
            return f"pixels cannot be read: {' '.join(str(error).split())}"
        side = max(height, width)  # an edge tile keeps its shape
        square = np.zeros((side, side, 3), np.uint8)
        square[:height, :width] = image
        return square

    def _candidates(self, hit: Hit) -> Iterator[Path]:
        if self._named is None:
            self._named = {}
            for path in (path for folder in self._folders for path in sorted(folder.rglob("*"))):
                if not path.name.lower().endswith(_SIDEWAYS):
                    name = path.name if path.suffix.upper() == ".SAFE" else path.stem
                    self._named.setdefault(name, []).append(path)
        beside = Path(hit.file).parent
        named = self._named.get(hit.record.scene, [])
        # Class folders hold files of one name: the one whose folders are called as they were comes first.
        yield from sorted(named, key=lambda path: -_shared_end(path, hit.path))
        if hit.path is not None:
            for path in (Path(hit.path), beside / hit.path, beside / Path(hit.path).name):
                if self._may_be(path, beside):
                    yield path
        for path in sorted(beside.iterdir()):
            same = hit.record.scene in (path.stem, path.name)
            if same and not path.name.lower().endswith(_SIDEWAYS) and self._may_be(path, beside):
                yield path

    def _may_be(self, path: Path, beside: Path) -> bool:
        """Whether a scene can be there, and the file of embeddings in the folder ``beside`` may name it."""
        try:
            if not path.is_file() and not is_safe(path):  # of a folder, such as /, all would be read
                return False
            Access(roots=self._folders).confine(path, beside, what="the scene")
        except (OSError, ValueError, SceneError):  # a name that is too long, or lies elsewhere
            return False
        return True


def _shared_end(path: Path, embedded: str | None) -> int:
    """How many parts of both paths are the same, from the end."""
    pairs = zip(reversed(path.parts), reversed(Path(embedded or "").parts), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _try_open(path: Path, name: str) -> Scene | str:
    """The scene at a path; the one of its ``name`` where there are several, granules or STAC items."""
    try:
        found = find(os.fspath(path))
        named = [entry for entry in found if isinstance(entry, Product) and entry.name == name]
        return Scene.open(named[0] if len(found) > 1 and len(named) == 1 else path)
    except RsedgeError as error:
        return f"pixels cannot be read: {' '.join(str(error).split())}"
