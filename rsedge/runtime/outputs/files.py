"""Outputs of a run, and files that appear, or are replaced, only when they are whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from rsedge.errors import OutputError
from rsedge.files import replacing


class ResultWriter(Protocol):
    """Writes results, or records, to one output."""

    def write(self, results: Sequence[Any], /) -> None:
        """Append results."""


class Writer(ResultWriter, Protocol):
    """Writes to a stream in one format."""

    def finish(self) -> None:
        """Write what closes the format."""


@dataclass(frozen=True, slots=True)
class Target:
    """An output of a run."""

    path: Path | None
    """Its file, or None for standard output."""
    open: Callable[[], AbstractContextManager[ResultWriter]]
    """Opens a writer of :class:`~rsedge.runtime.outputs.records.TileResult`; what was written is there when the block
    ends well, and nothing otherwise."""


def file_target(path: Path, make: Callable[[BinaryIO], Writer]) -> Target:
    """Return an output of a run that the writer of ``make`` writes, see :func:`open_file`."""
    return Target(path, lambda: open_file(path, make))


@contextmanager
def open_file(path: Path, make: Callable[[BinaryIO], Writer]) -> Iterator[Writer]:
    """Open the writer that ``make`` returns for a stream; its content becomes ``path`` when the block ends well.

    Raises:
        OutputError: The file cannot be written.
    """
    with whole_file(path) as temporary, temporary.open("wb") as stream:
        writer = make(stream)
        yield writer
        writer.finish()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside ``path`` where nothing is, and whose file becomes ``path`` when the block ends well.

    Raises:
        OutputError: The file cannot be written.
    """
    check_target(path)
    try:
        with replacing(path) as draft:
            yield draft
            with draft.open("rb+") as written:
                os.fsync(written.fileno())
        sync_folder(path.parent)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror or error}; free space or choose another"
        ) from error


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file that appears, or is replaced, whole.

    Raises:
        OutputError: It cannot be written.
    """
    with whole_file(path) as temporary:
        temporary.write_bytes(data)


def check_target(path: Path) -> None:
    """Refuse a path that cannot become a file by rename.

    Raises:
        OutputError: Its folder does not exist or is read-only, or it names something that is not a regular file.
    """
    if not path.parent.is_dir():
        raise OutputError(f"{path} cannot be written: {path.parent} is not a folder; create it first")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"{path} cannot be written: {path.parent} is read-only for you; choose another folder")
    if path.exists() and not path.is_file():
        raise OutputError(f"{path} exists and is not a regular file: choose another output, or - for standard output")


def check_room(sizes: Mapping[Path, int]) -> None:
    """Refuse files, path → least bytes still to write, for which their disks have no room. Raises OutputError."""
    disks: dict[int, list[Path]] = {}
    for path in sizes:
        disks.setdefault(path.parent.stat().st_dev, []).append(path)
    for paths in disks.values():
        least, free = sum(map(sizes.__getitem__, paths)), shutil.disk_usage(paths[0].parent).free
        if free < least:
            raise OutputError(
                f"{paths[0].parent} has {free / 2**20:.1f} MiB of room, and this run writes {least / 2**20:.1f} MiB or "
                "more: free space or choose another folder"
            )


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
