"""What a user names to be embedded: which of it is a scene, which an image.

- A raster with a place on a map (a coordinate reference system, a geotransform, ground control points) is a scene and
  is cut into tiles; so is any product (see ``rsedge.runtime.scenes.catalog``), a raster of subdatasets, and a name that
  only GDAL understands.
- Every other file is an image: one record, the whole of it brought to the model's size. A file that cannot be opened
  is an image too, and its record says why.
- A folder stands for all it holds, at any depth, in the order of the names: files whose suffix is that of an image,
  and products. Hidden names are left out, and so are links back to a folder they lie in.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from rsedge.errors import OptionError, SceneError
from rsedge.runtime.scenes.access import LOCAL, Access
from rsedge.runtime.scenes.catalog import STDIN, find
from rsedge.runtime.scenes.composite import Grid
from rsedge.runtime.scenes.gdal import open_dataset
from rsedge.runtime.scenes.remote import is_remote
from rsedge.runtime.scenes.sidecars import is_vrt
from rsedge.texts import first_few

if TYPE_CHECKING:
    from rsedge.runtime.run.sources import ImageSource
    from rsedge.runtime.scenes.products.product import Product
    from rsedge.runtime.scenes.scene import Scene

InputKind = Literal["auto", "scene", "image"]
INPUT_KINDS: tuple[InputKind, ...] = get_args(InputKind)

_LARGE = 1500 * 1500
"""Pixels beyond which an image is rather a scene that lost its georeference."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What was found."""

    entries: tuple[Scene | ImageSource, ...]
    """Scenes and images in order."""
    warnings: tuple[str, ...]
    """What the user should know, one line each."""


def find_inputs(
    names: Sequence[str],
    *,
    open_scene: Callable[[str | Product], Scene],
    open_image: Callable[[Path], ImageSource],
    suffixes: Collection[str],
    kind: InputKind = "auto",
    access: Access = LOCAL,
    stdin: str | None = None,
) -> Inputs:
    """Scenes and images for files and folders.

    Args:
        names: As the user gave them.
        open_scene: Makes a scene of a name or a product.
        open_image: Makes an image of a path, without reading it.
        suffixes: Of files that are taken from folders, lower case with the dot.
        kind: ``auto`` decides by the rule above; ``scene`` and ``image`` say what every file is.
        access: What the inputs may touch.
        stdin: What ``-`` holds.

    Raises:
        OptionError: Something does not exist, or a folder holds nothing to read; all are named.
        SceneError: Scenes cannot be opened, or their RGB cannot be told; all are named.
    """
    if kind not in INPUT_KINDS:
        raise OptionError(f"kind is {kind!r}, expected one of {', '.join(INPUT_KINDS)}")
    found: list[str | Product] = []
    problems = []
    for name in names:
        if name != STDIN and not Path(name).exists() and not is_remote(name) and not glob.has_magic(name):
            found.append(name)  # GDAL's name of something, or an error that opening it explains
            continue
        if kind == "image" and Path(name).is_file():
            found.append(name)
            continue
        try:
            found += find(name, access=access, stdin=stdin, suffixes=suffixes)
        except SceneError as error:
            problems.append(str(error))
    if problems:
        raise OptionError("; ".join(problems))
    entries: list[Scene | ImageSource] = []
    large: list[str] = []
    unusable: list[str] = []
    for entry in found:
        if isinstance(entry, str) and not _is_scene(entry, kind, access, large):
            entries.append(open_image(Path(entry)))
            continue
        try:
            entries.append(open_scene(entry))
        except SceneError as error:
            unusable.append(str(error))
    if unusable:
        raise SceneError("\n".join(first_few(unusable)))
    return Inputs(tuple(entries), tuple(_warnings(large)))


def _warnings(large: Sequence[str]) -> Iterator[str]:
    if large:
        others = f"; so do {len(large) - 1} others of more than {_LARGE} px" if len(large) > 1 else ""
        yield f"{large[0]} and no place on a map: it becomes one record{others}; --as scene cuts it into tiles"


def _is_scene(name: str, kind: InputKind, access: Access, large: list[str]) -> bool:
    """Whether ``name`` is a scene; notes an image in ``large`` that is as large as one."""
    path = Path(name)
    if kind == "scene" or path.is_dir() or not path.exists():
        return True  # what does not exist is GDAL's name of something, or an error that opening it explains
    if kind == "image":
        return False
    if access.vrt and is_vrt(path):
        return True
    try:
        dataset = open_dataset(name, access)
    except SceneError:
        return False
    with dataset:
        grid = Grid.of(dataset)
        if grid.crs or not grid.transform.is_identity or dataset.gcps[0] or dataset.count == 0:
            return True
        if dataset.width * dataset.height > _LARGE:
            large.append(f"{name} has {dataset.width} x {dataset.height} px")
    return False
