"""The files of a SAFE product, in a folder or in a zip, under the same names; never one outside of them."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from rsedge.errors import SceneError
from rsedge.runtime.scenes.products.zip_directory import judge_directory

if TYPE_CHECKING:
    from rsedge.runtime.scenes.access import Access

# Real ones have at most 2 MB; what is larger was made to fill the memory.
_LARGEST_TEXT = 8 * 2**20
_LARGEST_SUM = 64 * 2**20  # of all metadata of a product
_LONGEST_NAME = 400  # of a member of a zip; real ones have at most 200


class ProductFiles(Protocol):
    """Files by their names below one folder, with ``/`` between the parts."""

    @property
    def names(self) -> frozenset[str]:
        """All files that can belong to a product."""

    def read(self, name: str) -> bytes:
        """The bytes of a small file.

        Raises:
            SceneError: It cannot be read, lies outside, or is larger than any metadata.
        """

    def gdal_path(self, name: str) -> str:
        """What GDAL opens to read it.

        Raises:
            SceneError: It lies outside.
        """

    def on_disk(self, names: Iterable[str], /) -> tuple[str, ...]:
        """The files on disk behind these, sorted."""


class FolderFiles:
    """Metadata and granules below a folder that is, or holds, a product.

    Raises:
        SceneError: It cannot be listed, or links lead out of it.
    """

    def __init__(self, folder: Path, access: Access) -> None:
        self._folder = folder.resolve()
        self._access = access
        self._read = 0
        try:
            self.names = frozenset(self._listing())
        except OSError as error:
            raise SceneError(f"{folder} cannot be listed: {error.strerror}; check its permissions") from error

    def _listing(self) -> Iterator[str]:
        # A folder that unpacking put around the product is looked into, and nothing else: it may be anybody's.
        for root in (self._folder, *(path for path in self._folder.glob("*.[Ss][Aa][Ff][Ee]") if path.is_dir())):
            for folder in (root, root / "GRANULE"):
                self._confined(folder)  # before it is walked
            for path in (*root.glob("*.[Xx][Mm][Ll]"), *(root / "GRANULE").rglob("*.*")):
                if path.is_file():
                    yield path.relative_to(self._folder).as_posix()

    def _confined(self, path: Path) -> Path:
        name = path.relative_to(self._folder).as_posix()
        return self._access.confine(path, self._folder, what=f"{name} in {self._folder}")

    def read(self, name: str) -> bytes:
        """See ``ProductFiles``."""
        path = self._confined(self._folder / name)
        try:
            with path.open("rb") as file:
                data = file.read(_LARGEST_TEXT + 1)
        except OSError as error:
            raise SceneError(f"{path} cannot be read: {error.strerror}; check its permissions") from error
        self._read += len(data)
        return _checked(data, self._read, str(path))

    def gdal_path(self, name: str) -> str:
        """See ``ProductFiles``."""
        return str(self._confined(self._folder / name))

    def on_disk(self, names: Iterable[str], /) -> tuple[str, ...]:
        """See ``ProductFiles``."""
        return tuple(sorted(str(self._confined(self._folder / name)) for name in names))


class ZipFiles:
    """What a zip holds, by its central directory; a context manager.

    Raises:
        SceneError: It is no whole zip, has more than any product, or members whose names lead elsewhere or are there
            twice, so that two programs could read different ones.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.resolve()
        self._read = 0
        judge_directory(self._path, str(path))
        try:
            self._archive = zipfile.ZipFile(self._path)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise SceneError(f"{path} is no whole zip: {error}; download it again, or unpack it") from error
        try:
            self._check_names(str(path))
        except SceneError:
            self._archive.close()
            raise
        self.names = frozenset(name for name in self._archive.namelist() if not name.endswith("/"))

    def __enter__(self) -> ZipFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._archive.close()

    def _check_names(self, path: str) -> None:
        seen: set[PurePosixPath] = set()
        for info in self._archive.infolist():
            name = info.orig_filename
            inside = PurePosixPath(name)
            problem = None
            if ".." in inside.parts or inside.is_absolute() or "\\" in name or "\0" in name:
                problem = "leads elsewhere"
            elif inside in seen:
                problem = "is there twice"
            elif len(name) > _LONGEST_NAME:
                problem = f"has more than {_LONGEST_NAME} letters"
            if problem:
                shown = "".join(letter if letter.isprintable() else "�" for letter in name[:_LONGEST_NAME])
                raise SceneError(f"{path} is not read: its member {shown} {problem}; unpack the zip and look into it")
            seen.add(inside)

    def read(self, name: str) -> bytes:
        """See ``ProductFiles``."""
        where = f"{name} in {self._path}"
        info = self._archive.getinfo(name)
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # GDAL knows no other
            raise SceneError(f"{where} is compressed by method {info.compress_type}, not by deflate: pack it again")
        try:
            with self._archive.open(info) as file:
                data = file.read(_LARGEST_TEXT + 1)
        # RuntimeError is what zipfile raises for encrypted members.
        except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, OSError, ValueError) as error:
            raise SceneError(f"{where} cannot be read: {error}; download the zip again, or unpack it") from error
        self._read += len(data)
        return _checked(data, self._read, where)

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


def _checked(data: bytes, together: int, where: str) -> bytes:
    if len(data) > _LARGEST_TEXT:
        raise SceneError(f"{where} has more than {_LARGEST_TEXT >> 20} MiB, which no metadata of Sentinel-2 has")
    if together > _LARGEST_SUM:
        raise SceneError(f"with {where} its metadata have more than {_LARGEST_SUM >> 20} MiB, as no product has")
    return data
