"""What a user names → scenes: rasters, SAFE products, band files beside each other, STAC items; folders and patterns.

A folder stands for all it holds, at any depth, in the order of the names. Where it holds band files or STAC items,
those are its scenes, and other rasters beside them are taken for parts of theirs.
"""

from __future__ import annotations

import glob
import logging
import os
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from rsedge.errors import SceneError
from rsedge.runtime.scenes import remote
from rsedge.runtime.scenes.access import LOCAL, Access, refuse_handler, shortened
from rsedge.runtime.scenes.gdal import open_dataset
from rsedge.runtime.scenes.products.loose_bands import read_loose_bands, sibling_bands
from rsedge.runtime.scenes.products.product import Product
from rsedge.runtime.scenes.products.safe import is_safe, is_zip, read_safe
from rsedge.runtime.scenes.products.stac import is_stac_url, read_if_stac, read_stac
from rsedge.texts import in_a_line

_log = logging.getLogger("rsedge")

STDIN = "-"
RASTERS = frozenset({".tif", ".tiff", ".jp2", ".vrt", ".img", ".png", ".jpg", ".jpeg"})

_RESOLUTIONS = ("R10m", "R20m", "R60m")  # where a product keeps the bands that its own folder was read by
_DOCUMENTS = frozenset({".json", ".geojson"})
_DEEPEST = 100  # folders in each other
_MOST_VISITS = 100
_SHOWN = 8  # names in a message


def find(
    name: str, *, access: Access = LOCAL, stdin: str | None = None, suffixes: Collection[str] = RASTERS
) -> list[str | Product]:
    """The scenes that ``name`` stands for: products, and rasters by the name GDAL opens.

    Args:
        name: Raster, ``.SAFE`` folder or zip or a part of one, band file or folder of them, STAC item or collection of
            items, URL, folder, glob pattern, or ``-`` for STAC on standard input.
        access: What the scenes may touch.
        stdin: What ``-`` holds.
        suffixes: Of rasters that are taken from folders, lower case with the dot.

    Raises:
        SceneError: It does not exist, holds nothing to read, or is damaged.
        OptionError: It is remote, and that was not allowed.
    """
    if not name:
        raise SceneError("an empty name stands for no scene: pass a raster, a product, or . for this folder")
    if name == STDIN:
        return list(read_stac(STDIN, text=stdin or "", access=access))
    refuse_handler(name)
    if remote.is_remote(name):
        remote.check_allowed([name], allow=access.remote)
        return list(read_stac(name, access=access)) if is_stac_url(name) else [name]
    path = Path(name)
    try:
        path.exists()
    except OSError as error:
        raise SceneError(f"{shortened(name)} cannot be looked at: {error.strerror}; check the path") from error
    if _is_device(path):
        raise SceneError(f"{name} is a device, a pipe or a socket, and rsedge reads files: write it to a file first")
    if not path.exists() and glob.has_magic(name):
        matches = sorted(_matches(name))
        if not matches:
            raise SceneError(f"{name} matches no file: check the pattern")
        return [entry for match in matches for entry in find(match, access=access, suffixes=suffixes)]
    return _of_path(path, name, access, suffixes)


def _of_path(path: Path, name: str, access: Access, suffixes: Collection[str]) -> list[str | Product]:
    if is_safe(path):
        return list(read_safe(path, access=access))
    if (described := read_if_stac(os.fspath(path), access=access)) is not None:
        return list(described)
    if path.is_file() and (product := sibling_bands(path, access=access)) is not None:
        return [product]
    if path.is_dir():
        found = list(walk(path, suffixes, access=access))
        if not found:
            raise SceneError(
                f"{name} is a folder without scenes: no .SAFE product, band files, STAC item, or file that ends in "
                f"{', '.join(sorted(suffixes))}; pass another, or one raster file"
            )
        return found
    if path.is_file() and is_zip(path):
        return list(read_safe(path, access=access))  # says what it lacks
    if path.suffix.lower() in _DOCUMENTS and path.is_file():
        try:
            open_dataset(name).close()
        except SceneError:
            raise SceneError(
                f"{name} is neither a raster nor STAC with an item in it: pass an item or a collection of items"
            ) from None
    return [name]


def find_one(name: str, *, access: Access = LOCAL) -> str | Product:
    """The one scene that ``name`` stands for; SceneError where there are several, or as :func:`find`."""
    found = find(name, access=access)
    if len(found) > 1:
        names = in_a_line((entry.name if isinstance(entry, Product) else entry for entry in found), _SHOWN)
        raise SceneError(f"{name} holds {len(found)} scenes ({names}): open them with open_scenes, or name one")
    return found[0]


def _is_device(path: Path) -> bool:
    """Whether it is there and no file: opening a pipe waits for somebody to write, and a device may have no end."""
    return path.exists() and not path.is_file() and not path.is_dir()


@contextmanager
def noted(problems: list[str]) -> Iterator[None]:
    """Add a SceneError to ``problems`` in place of raising it."""
    try:
        yield
    except SceneError as error:
        problems.append(str(error))


def walk(
    folder: Path,
    suffixes: Collection[str],
    *,
    access: Access = LOCAL,
    above: frozenset[Path] = frozenset(),
    visits: Counter[Path] | None = None,
    bad: list[tuple[str, SceneError]] | None = None,
) -> Iterator[str | Product]:
    """The scenes inside a folder that is no product itself; left out are hidden names, links back, and what is no file,
    such as a pipe.

    Links are followed, also out of the folder: the user named it, and what they lead to is opened as if it was named.
    SceneError where a folder cannot be listed, links lead to one too often, or folders lie in each other too deep; with
    a list in ``bad``, damaged products are added to it with their names and left out.
    """
    visits = Counter() if visits is None else visits
    real = folder.resolve()
    if real in above:  # a link led back here
        return
    visits[real] += 1
    if visits[real] > _MOST_VISITS:  # two links to a folder, with two to the next in it, and so on
        raise SceneError(f"links lead to {real} more than {_MOST_VISITS} times: pass the folders by themselves")
    if len(above) >= _DEEPEST:
        raise SceneError(f"{folder} lies {_DEEPEST} folders deep: pass it by itself")
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise SceneError(f"{folder} cannot be listed: {error.strerror}; check its permissions") from error
    own = _own_products(folder, entries, access)
    yield from own
    named: set[str] = set()
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if is_safe(entry):
            # A product and the zip it came in lie beside each other.
            fresh = [product for product in _read_safe(entry, access, bad) if product.name not in named]
            named.update(product.name for product in fresh)
            yield from fresh
        elif entry.is_dir() and own and entry.name in _RESOLUTIONS:
            continue
        elif entry.is_dir():
            yield from walk(entry, suffixes, access=access, above=above | {real}, visits=visits, bad=bad)
        elif not own and entry.suffix.lower() in suffixes and not _is_device(entry):
            yield os.fspath(entry)


def _read_safe(path: Path, access: Access, bad: list[tuple[str, SceneError]] | None) -> list[Product]:
    try:
        return read_safe(path, access=access)
    except SceneError as error:
        if bad is None:
            raise
        bad.append((os.fspath(path), error))
        return []


def _own_products(folder: Path, entries: list[Path], access: Access) -> list[Product]:
    """The products of the files in a folder: STAC items, else band files beside each other."""
    described: list[Product] = []
    for path in entries:
        if path.name.startswith(".") or path.suffix.lower() not in _DOCUMENTS:
            continue
        problems: list[str] = []
        with noted(problems):
            described += read_if_stac(os.fspath(path), access=access) or []
        for problem in problems:  # it may describe the result of an earlier run
            _log.warning("Warning: left out: %s", problem)
    return described or read_loose_bands(folder, access=access)


def _matches(pattern: str) -> Iterator[str]:
    """The files and folders that a pattern matches; ``**`` follows no links, as two in a circle double the paths."""
    parts = Path(pattern).parts
    if "**" not in parts:
        found = glob.iglob(pattern)  # noqa: PTH207 - of any folder, absolute or not
    else:
        first = next(index for index, part in enumerate(parts) if glob.has_magic(part))
        below = [part if part == "**" else part.replace("**", "*") for part in parts[first:]]
        below += ["*"] if below[-1] == "**" else []
        base, hidden = Path(*parts[:first]), any(part.startswith(".") for part in below)
        found = (
            os.fspath(path)
            for path in base.glob("/".join(below))
            if hidden or not any(part.startswith(".") for part in path.relative_to(base).parts)
        )
    return (name for name in found if Path(name).is_file() or Path(name).is_dir())
