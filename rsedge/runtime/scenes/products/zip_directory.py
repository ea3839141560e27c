"""How much a zip says that it holds, told before anything parses its list of members.

``zipfile`` makes an object of 1 kB for each member, however many there are, and looks for the list in another way than
GDAL, so that one file could be two archives.
"""

from __future__ import annotations

import struct
from pathlib import Path

from rsedge.errors import SceneError

MOST_MEMBERS = 20_000
"""Members that a zip may have; a product has less than 500."""
LARGEST_DIRECTORY = 16 * 2**20
"""Bytes that their list may have."""

_END, _END_SIZE = b"PK\5\6", 22
_END_64, _LOCATOR_64, _SIZE_64 = b"PK\6\6", b"PK\6\7", 56 + 20
_MEMBER = b"PK\1\2"
_LONGEST_COMMENT = 2**16


def judge_directory(path: Path, shown: str) -> None:
    """Refuse a zip whose list of members is too long, or is not the only one.

    What is no whole zip passes: opening it says so.

    Args:
        path: The file.
        shown: How messages call it.

    Raises:
        SceneError: It cannot be read, or is refused.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - LARGEST_DIRECTORY - _SIZE_64 - _END_SIZE - _LONGEST_COMMENT))
            tail = file.read()
    except OSError as error:
        raise SceneError(f"{shown} cannot be read: {error.strerror}; check its permissions") from error
    comment = max(0, len(tail) - _LONGEST_COMMENT - _END_SIZE)
    end = tail.rfind(_END, comment)
    if end < 0 or end + _END_SIZE > len(tail):
        return
    members, directory = struct.unpack_from("<HL", tail, end + 10)
    first = end
    locator = tail.rfind(_LOCATOR_64, comment)
    if locator >= 0 and locator == end - 20 and tail[end - _SIZE_64 : end - _SIZE_64 + 4] == _END_64:
        members, directory = struct.unpack_from("<32xQQ", tail, end - _SIZE_64)
        first = end - _SIZE_64
    elif locator >= 0:
        raise SceneError(f"{shown} is not read: it has a list of members for some programs only; unpack it")
    if tail.find(_END, comment) != end:
        raise SceneError(f"{shown} is not read: it has more than one list of members; unpack it")
    if directory <= LARGEST_DIRECTORY:
        # What the end says of their number, zipfile does not look at.
        members = max(members, tail.count(_MEMBER, max(0, first - directory), first))
    if members > MOST_MEMBERS or directory > LARGEST_DIRECTORY:
        raise SceneError(
            f"{shown} is not read: it lists {members} members in {directory} bytes, and at most {MOST_MEMBERS} in "
            f"{LARGEST_DIRECTORY} are read, of which a product has less than 500; unpack it"
        )
