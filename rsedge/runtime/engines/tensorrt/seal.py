"""Seals: how this user's rsedge knows files that it wrote itself, among files that anyone may have written.

A seal is an HMAC-SHA256 under a secret of 32 random bytes. It is made at first use and lies outside the cache, since a
cache may come from elsewhere as a whole: in ``engine.key`` of the user's settings, ``$XDG_CONFIG_HOME/rsedge`` or
``~/.config/rsedge``, or in the file that ``RSEDGE_ENGINE_KEY`` names.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import stat
import tempfile
from pathlib import Path

from rsedge.errors import BackendError

_LENGTH = 32


def secret_path() -> Path:
    """Where this user's secret is, or would be."""
    if chosen := os.environ.get("RSEDGE_ENGINE_KEY"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "rsedge" / "engine.key"


def seal(data: bytes, path: Path) -> str:
    """The seal of ``data`` under the secret in ``path``, hexadecimal; the secret is made if there is none.

    Raises:
        BackendError: The secret cannot be written or read, or others can read it.
    """
    try:
        if not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}", suffix=".tmp")
            try:
                with os.fdopen(handle, "wb") as stream:
                    stream.write(secrets.token_bytes(_LENGTH))
                # Unlike a rename, a link never takes the place of a secret that another process has made meanwhile.
                with contextlib.suppress(FileExistsError):
                    path.hardlink_to(draft)
            finally:
                Path(draft).unlink()
        return hmac.digest(_secret(path), data, "sha256").hex()
    except OSError as error:
        raise BackendError(
            f"cannot keep TensorRT engines without a secret in {path}: {error.strerror or error}; set "
            "RSEDGE_ENGINE_KEY to a file that you alone can read and write, in a directory of your own"
        ) from error


def is_sealed(data: bytes, found: object, path: Path) -> bool:
    """Whether ``found`` is the seal of ``data`` under the secret in ``path``; False where there is no sound secret."""
    try:
        expected = hmac.digest(_secret(path), data, "sha256").hex()
    except OSError:
        return False
    return isinstance(found, str) and hmac.compare_digest(expected.encode(), found.encode("utf-8", "replace"))


def _secret(path: Path) -> bytes:
    """The secret in ``path``.

    Raises:
        OSError: It is not there, too short, or not this user's alone.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as stream:
        status = os.fstat(stream.fileno())
        secret = stream.read(_LENGTH) if stat.S_ISREG(status.st_mode) else b""
    if status.st_uid != os.getuid() or status.st_mode & 0o077 or len(secret) != _LENGTH:
        raise PermissionError(f"it must have {_LENGTH} bytes, be yours, and be closed to others (chmod 600)")
    return secret
