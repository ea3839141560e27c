"""The files of a SAFE product, in a folder or in a zip, under the same names."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from rsedge.errors import SceneError

# Real ones have at most 2 MB; what is larger was made to fill the memory.
_LARGEST_TEXT = 8 * 2**20


class ProductFiles(Protocol):
    """Files by their names below one folder, with ``/`` between the parts."""

    @property
    def names(self) -> frozenset[str]:
        """All files that can belong to a product."""

    def read(self, name: str) -> bytes:
        """The bytes of a small file.

        Raises:
            SceneError: It cannot be read, or is larger than any metadata.
        """

    def gdal_path(self, name: str) -> str:
        """What GDAL opens to read it."""

    def on_disk(self, names: Iterable[str], /) -> tuple[str, ...]:
        """The files on disk behind these, sorted."""


class FolderFiles:
    """Metadata and granules below a folder that is, or holds, a product."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        try:
            self.names = frozenset(self._listing())
        except OSError as error:
            raise SceneError(f"{folder} cannot be listed: {error.strerror}; check its permissions") from error

    def _listing(self) -> Iterable[str]:
        # A folder that unpacking put around the product is looked into, and nothing else: it may be anybody's.
        for root in (self._folder, *(path for path in self._folder.glob("*.[Ss][Aa][Ff][Ee]") if path.is_dir())):
            for path in (*root.glob("*.[Xx][Mm][Ll]"), *(root / "GRANULE").rglob("*.*")):
                if path.is_file():
                    yield path.relative_to(self._folder).as_posix()

    def read(self, name: str) -> bytes:
        """See ``ProductFiles``."""
        path = self._folder / name
        try:
            with path.open("rb") as file:
                return _checked(file.read(_LARGEST_TEXT + 1), str(path))
        except OSError as error:
            raise SceneError(f"{path} cannot be read: {error.strerror}; check its permissions") from error

    def gdal_path(self, name: str) -> str:
        """See ``ProductFiles``."""
        return str(self._folder / name)

    def on_disk(self, names: Iterable[str], /) -> tuple[str, ...]:
        """See ``ProductFiles``."""
        return tuple(sorted(str(self._folder / name) for name in names))


class ZipFiles:
    """What a zip holds, by its central directory."""

    def __init__(self, path: Path) -> None:
        self._path = path.resolve()
        try:
            with zipfile.ZipFile(self._path) as archive:
                self.names = frozenset(name for name in archive.namelist() if not name.endswith("/"))
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise SceneError(f"{path} is no whole zip: {error}; download it again, or unpack it") from error

    def read(self, name: str) -> bytes:
        """See ``ProductFiles``."""
        where = f"{name} in {self._path}"
        try:
            with zipfile.ZipFile(self._path) as archive, archive.open(name) as file:
                return _checked(file.read(_LARGEST_TEXT + 1), where)
        # RuntimeError is what zipfile raises for encrypted members and methods it does not know.
        except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, OSError) as error:
            raise SceneError(f"{where} cannot be read: {error}; download the zip again, or unpack it") from error

    def gdal_path(self, name: str) -> str:
        """See ``ProductFiles``."""
        path = str(self._path)
        # Braces say where the zip ends, whatever it is called, but GDAL counts those in its name too.
        if "{" in path or "}" in path:
            return f"/vsizip/{path}/{name}"
        return f"/vsizip/{{{path}}}/{name}"

    def on_disk(self, _names: Iterable[str], /) -> tuple[str, ...]:
        """See ``ProductFiles``; the zip stands for all it holds."""
        return (str(self._path),)


def _checked(data: bytes, where: str) -> bytes:
    if len(data) > _LARGEST_TEXT:
        raise SceneError(f"{where} has more than {_LARGEST_TEXT >> 20} MiB, which no metadata of Sentinel-2 has")
    return data
