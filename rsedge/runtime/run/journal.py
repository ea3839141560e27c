r"""The journal: finished segments beside an incomplete output.

A journal is a text file of lines ``crc32 json\n``: first the fingerprint of the run, then one line per finished
segment, in order. Each line is on disk before the next is written, so a run that was killed at any moment continues
after the last whole line; a torn line is cut off.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rsedge.errors import InUseError, OutputError
from rsedge.files import open_itself
from rsedge.runtime.outputs.files import sync_folder
from rsedge.runtime.outputs.records import TileResult

FORMAT_VERSION = 4


class Journal:
    """An open, locked journal. Made by ``Journal.open``; use it as a context manager."""

    def __init__(self, path: Path, handle: int) -> None:
        self.path, self._handle, self._records_at = path, handle, 0
        self.finished = 0
        """Number of finished segments; the next segment to append has this number."""

    @classmethod
    def open(cls, path: Path, fingerprint: Mapping[str, Any], *, overwrite: bool = False) -> Journal:
        """Open the journal of a run, or begin one.

        Args:
            path: Its path.
            fingerprint: Everything that decides the records, as JSON values.
            overwrite: Replace the journal of another run.

        Raises:
            OutputError: Another process uses the file, it is no journal of this run, or it cannot be written.
        """
        try:
            journal = cls(path, _locked(path))
        except OSError as error:
            raise OutputError(f"{path} cannot be opened: {error.strerror}; choose another output") from error
        try:
            journal._load(json.loads(json.dumps(fingerprint)), overwrite)
        except BaseException as error:
            journal.close()
            if isinstance(error, OSError):
                raise OutputError(f"{path} cannot be written: {error.strerror}; choose another output") from error
            raise
        return journal

    def append(self, segment: int, results: Sequence[TileResult]) -> None:
        """Write a segment to disk. Raises ValueError unless it is the next one, and OutputError if writing fails."""
        if segment != self.finished:
            raise ValueError(f"segment {segment} does not follow {self.finished - 1}")
        try:
            self._write({"segment": segment, "results": [result.to_dict() for result in results]})
        except OSError as error:
            raise OutputError(
                f"{self.path} cannot be written: {error.strerror}; make room and run the same command to go on"
            ) from error
        self.finished += 1

    def segments(self) -> Iterator[list[TileResult]]:
        """Yield the finished segments in order, read one at a time."""
        with self.path.open("rb") as stream:
            stream.seek(self._records_at)
            for _ in range(self.finished):
                body = _parse(stream.readline())
                try:
                    results = [TileResult.from_dict(values) for values in body["results"]]  # type: ignore[index]
                except (LookupError, TypeError, ValueError, AttributeError) as error:
                    raise OutputError(f"{self.path} is damaged: run again with --overwrite") from error
                yield results

    def remove(self) -> None:
        """Delete the file and release the lock."""
        self.path.unlink()
        sync_folder(self.path.parent)
        self.close()

    def close(self) -> None:
        """Release the lock; the file stays."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _load(self, fingerprint: dict[str, Any], overwrite: bool) -> None:
        """Check the fingerprint, count the whole segments, and cut off the rest."""
        with self.path.open("rb") as stream:
            header = stream.readline()
            stored = _parse(header)
            if not header.endswith(b"\n") and _is_torn_header(header):
                return self._begin(fingerprint)  # new, or killed while it was begun
            if stored is None or stored.get("rsedge_journal") != FORMAT_VERSION:
                if overwrite:
                    return self._begin(fingerprint)
                raise OutputError(f"{self.path} is not a journal of this version: delete it, or pass --overwrite")
            if stored.get("fingerprint") != fingerprint:
                if overwrite:
                    return self._begin(fingerprint)
                pairs = _differences("", stored.get("fingerprint"), fingerprint)
                lines = [f"  {key}: {old} in the journal, {new} now" for key, old, new in pairs]
                first = f"{self.path} belongs to a run with other options or inputs:"
                last = "run with the former ones to go on with it, or pass --overwrite to begin anew"
                raise OutputError("\n".join([first, *lines, last]))
            end = self._records_at = len(header)
            for line in stream:
                body = _parse(line)
                if body is None or body.get("segment") != self.finished:
                    break
                self.finished += 1
                end += len(line)
        os.ftruncate(self._handle, end)
        os.lseek(self._handle, end, os.SEEK_SET)
        return None

    def _begin(self, fingerprint: dict[str, Any]) -> None:
        os.ftruncate(self._handle, 0)
        os.lseek(self._handle, 0, os.SEEK_SET)
        self._write({"rsedge_journal": FORMAT_VERSION, "fingerprint": fingerprint})
        self._records_at = os.lseek(self._handle, 0, os.SEEK_CUR)
        sync_folder(self.path.parent)

    def _write(self, body: dict[str, Any]) -> None:
        text = json.dumps(body, separators=(",", ":")).encode("ascii")
        line = memoryview(b"%08x %s\n" % (zlib.crc32(text), text))
        while line:
            line = line[os.write(self._handle, line) :]
        os.fsync(self._handle)


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return the body of a whole, undamaged line, else None."""
    checksum, _, text = line.partition(b" ")
    if not text.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text[:-1]):
        return None
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):  # another program wrote it: rsedge writes JSON
        return None
    return body if isinstance(body, dict) else None


def _is_torn_header(data: bytes) -> bool:
    """Return whether ``data``, without a line end, can begin a journal: nothing else is ever overwritten."""
    checksum, _, body = data.partition(b" ")
    begins = b'{"rsedge_journal"'
    return len(checksum) <= 8 and not checksum.strip(b"0123456789abcdef") and (body[: len(begins)] in begins)


def _locked(path: Path) -> int:
    """Open and lock the file and return its handle."""
    while True:
        handle = open_itself(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(handle)
            os.close(handle)
            raise InUseError(
                f"{path} is in use by another run{holder}: wait for it to end, or choose another output"
            ) from None
        try:
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except FileNotFoundError:
            pass
        os.close(handle)  # a run that ended meanwhile removed the file: this handle is on nothing


def _holder(handle: int) -> str:
    """Return ``, process N`` for the process that locks a file, where Linux shows it."""
    found = os.fstat(handle)
    place = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            _, kind, *_, process, locked, _, _ = line.split()
            if (kind, locked) == ("FLOCK", place) and int(process) > 0:  # 0 or less: of another container
                return f", process {process}"
    return ""


def _differences(prefix: str, old: Any, new: Any) -> Iterator[tuple[str, str, str]]:
    """Yield the dotted names of all leaves that differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from _differences(f"{prefix}.{key}" if prefix else key, old.get(key), new.get(key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for position, (first, second) in enumerate(zip(old, new, strict=True)):
            yield from _differences(f"{prefix}[{position}]", first, second)
    elif old != new:
        yield prefix, json.dumps(old), json.dumps(new)
