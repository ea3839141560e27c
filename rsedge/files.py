"""Files that appear, or are replaced, only when they are whole. A link at a file's name is replaced, never followed:
a stranger's folder may hold one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A free name beside ``path``; what is made there takes the name of ``path`` when the block ends well. Raises
    OSError where that fails.
    """
    draft = path.with_name(f".{path.name}.tmp")
    draft.unlink(missing_ok=True)
    try:
        yield draft
        draft.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8 that appears, or is replaced, whole. Raises OSError where that fails."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def open_itself(path: str | os.PathLike[str], flags: int) -> int:
    """Open a file that changes in place, for ``open(…, opener=open_itself)``. Raises OSError where it is a link."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def open_regular(path: str | os.PathLike[str], flags: int) -> int:
    """Open a file to read, for ``open(…, opener=open_regular)``. Raises OSError for what is no regular file: opening a
    pipe would wait for a writer, and a device may have no end.
    """
    handle = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is no regular file", os.fspath(path))
    return handle
