"""Engines on disk: made once per graph, TensorRT version, GPU and profile, and checked before they are used.

Deserialising a plan runs code that is in it. So engines are never kept inside a bundle, which people pass on, but in
``engines/`` of :func:`rsedge.bundle.cache_dir`: a directory that its owner alone may read and write. Each plan has a
JSON file beside it with what it was made for, its SHA-256, and a seal: an HMAC-SHA256 of both under a secret of this
user. Anyone can write a hash; so a cache that came from a stranger is not believed.

The secret is 32 random bytes. It is made at first use and lies outside the cache, since a cache may come from elsewhere
as a whole: in ``engine.key`` of the user's settings, ``$XDG_CONFIG_HOME/rsedge`` or ``~/.config/rsedge``, or in the
file that ``RSEDGE_ENGINE_KEY`` names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import hmac
import json
import logging
import math
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsedge.bundle import cache_dir
from rsedge.errors import BackendError

_log = logging.getLogger("rsedge")

FORMAT = 1

Buffer = bytes | memoryview
Ranges = tuple[tuple[str, tuple[int, int, int]], ...]
"""A profile as a key holds it."""

_LABELS = {"tensorrt": "TensorRT", "sm": "compute capability", "gpu": "GPU", "multiprocessors": "GPU cores (SM)"}
_SECRET_LENGTH = 32
_UNFIT_SECRET = f"it must have {_SECRET_LENGTH} bytes, be yours, and be closed to others (chmod 600)"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineKey:
    """All that decides whether an engine can be used."""

    role: str
    """Of the graph in its bundle."""
    graph_sha256: str
    """Of the ONNX file, which holds the precision's types too."""
    external_sha256: tuple[str, ...]
    """Of its external data files."""
    tensorrt: str
    """Version."""
    gpu: str
    """The device's name."""
    sm: str
    """Its compute capability."""
    multiprocessors: int
    """How many of them it has: the name is the same for boards, and power modes, that differ in it."""
    precision: str
    """Of the bundle."""
    profiles: tuple[Ranges, ...]
    """The optimisation profiles."""

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        values = dataclasses.asdict(self)
        return {**json.loads(json.dumps(values)), "format": FORMAT}

    @property
    def name(self) -> str:
        """The name of its files, without suffix."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return f"{self.role}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


class EngineStore:
    """The engines of this user.

    Args:
        root: Their directory; None takes ``engines/`` of the cache directory. It is made when first written.
        secret: File of the secret they are sealed with; None takes the user's. It is made when first needed.

    Raises:
        BackendError: The directory belongs to someone else.
    """

    def __init__(self, root: Path | None = None, secret: Path | None = None) -> None:
        self.root = root or cache_dir() / "engines"
        self._secret = secret or secret_path()

    def path(self, key: EngineKey) -> Path:
        """Where the plan of ``key`` is, or would be."""
        return self.root / f"{key.name}.plan"

    def load(self, key: EngineKey) -> bytes | None:
        """The plan of ``key`` if a sound one is there; else None, and why is logged."""
        path = self.path(key)
        if not path.exists():
            self._log_others(key)
            return None
        self._check_owner()
        try:
            expected = json.loads(_read_own(path.with_suffix(".json")))
            plan = _read_own(path)
        except (OSError, ValueError) as error:
            _log.warning("the TensorRT engine %s cannot be read (%s): building it again", path, error)
            return None
        problem = ""
        if not isinstance(expected, dict) or expected.get("key") != key.to_json():
            problem = "what stands beside it is not about this engine"
        elif hashlib.sha256(plan).hexdigest() != expected.get("sha256"):
            problem = f"it is damaged: {len(plan)} bytes, sha256 other than noted"
        elif not self._is_sealed(_sealed(key, expected["sha256"]), expected.get("seal")):
            problem = "it was not made by this user on this machine"
        if problem:
            _log.warning("the TensorRT engine %s is not used, %s: building it again", path, problem)
            return None
        return plan

    def level(self, key: EngineKey) -> int:
        """The optimization level that the engine of ``key`` was built with; -1 if there is none."""
        notes = _notes(self.path(key).with_suffix(".json"))
        level = notes.get("level") if self.path(key).exists() else None
        return level if isinstance(level, int) else -1

    def covering(self, key: EngineKey) -> EngineKey:
        """The key of the narrowest engine there is that serves the sizes of ``key``; else ``key`` itself.

        An engine built ahead for a larger batch is so used for a smaller one, rather than another built.
        """
        found = [key] if self.path(key).exists() else []
        fields = {name: value for name, value in key.to_json().items() if name != "profiles"}
        for path in self.root.glob(f"{key.role}-*.json"):
            there = _notes(path).get("key")
            if isinstance(there, dict) and all(there.get(name) == value for name, value in fields.items()):
                other = dataclasses.replace(key, profiles=_profiles(there.get("profiles")))
                if self.path(other).exists() and _serves(other, key):
                    found.append(other)

        def extent(engine: EngineKey) -> int:
            """How much the widest profile allows: a number to compare engines of one graph by."""
            return math.prod(high + 1 for _, (_, _, high) in engine.profiles[-1])

        return min(found, key=extent, default=key)

    def save(self, key: EngineKey, plan: Buffer, *, seconds: float, level: int) -> Path:
        """Keep a plan; readers see the old one or the new one.

        Args:
            key: What it was made for.
            plan: Its bytes.
            seconds: What building took, noted beside it.
            level: The builder's optimization level, noted beside it.

        Raises:
            BackendError: It, or the user's secret, cannot be written.
        """
        self._prepare()
        path, sha256 = self.path(key), hashlib.sha256(plan).hexdigest()
        notes = {
            "key": key.to_json(),
            "sha256": sha256,
            "seal": self._seal(_sealed(key, sha256)),
            "seconds": round(seconds, 1),
            "level": level,
        }
        with self._writing():
            # A plan whose note is older is taken for damaged, so the note goes first and nothing worse can be seen.
            _write(path.with_suffix(".json"), json.dumps(notes, indent=1).encode())
            _write(path, plan)
        return path

    def load_timing(self, key: EngineKey) -> bytes:
        """The timing cache for the TensorRT and GPU of ``key``; empty if there is none that this user made."""
        path = self._timing(key)
        try:
            self._check_owner()
            sealed, data = _read_own(path).split(b"\n", 1)
        except (OSError, ValueError):
            return b""
        return data if self._is_sealed(data, sealed.decode("ascii", "replace")) else b""

    def save_timing(self, key: EngineKey, data: Buffer) -> None:
        """Keep a timing cache: it makes the next build faster and is worth no error."""
        with contextlib.suppress(OSError, BackendError):
            self._prepare()
            _write(self._timing(key), self._seal(bytes(data)).encode() + b"\n" + bytes(data))

    def _timing(self, key: EngineKey) -> Path:
        text = json.dumps([key.tensorrt, key.gpu, key.sm, key.multiprocessors])
        return self.root / f"timing-{hashlib.sha256(text.encode()).hexdigest()[:16]}.cache"

    @contextlib.contextmanager
    def building(self, key: EngineKey) -> Iterator[None]:
        """Only one process at a time builds an engine; the others wait, and should look again then.

        Raises:
            BackendError: The directory cannot be written.
        """
        import fcntl

        self._prepare()
        with self._writing():
            handle = os.open(self.root / f"{key.name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _log.info("another process builds the TensorRT engine of %s: waiting for it", key.role)
                fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError as error:  # a file system that cannot lock; writing is whole or not at all without it, too
                _log.debug("%s cannot be locked: %s", self.root, error)
            yield
        finally:
            os.close(handle)  # which unlocks; the file stays, since removing it would race with who waits for it

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise BackendError(
                f"cannot keep TensorRT engines in {self.root}: {error.strerror}; point RSEDGE_CACHE at a directory of "
                "your own"
            ) from error

    def _prepare(self) -> None:
        """Make the directory, the owner's alone."""
        with self._writing():
            self.root.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.root.mkdir(mode=0o700, exist_ok=True)
        self._check_owner()

    def _check_owner(self) -> None:
        """Engines are code: use a directory only if nobody else can have put them there."""
        status = self.root.stat()
        if status.st_uid != os.getuid():
            raise BackendError(
                f"the TensorRT engines in {self.root} belong to another user, and engines are code: point RSEDGE_CACHE "
                "at a directory of your own"
            )
        if not status.st_mode & 0o077:
            return
        with self._writing():
            self.root.chmod(0o700)
            if status.st_mode & 0o022:
                for path in (*self.root.glob("*.plan"), *self.root.glob("timing-*.cache")):
                    path.unlink(missing_ok=True)
                _log.warning(
                    "others could write in %s, so the TensorRT engines there are not used: they are deleted, the "
                    "directory is closed, and engines are built again",
                    self.root,
                )

    def _log_others(self, key: EngineKey) -> None:
        """How the last of the engines of the same graph differs, if there is any."""
        wanted, reason = key.to_json(), ""
        for path in sorted(self.root.glob(f"{key.role}-*.json")):
            there = _notes(path).get("key")
            if isinstance(there, dict) and there.get("graph_sha256") == key.graph_sha256:
                reason = ", ".join(
                    "other sizes" if name == "profiles" else f"{_LABELS.get(name, name)} {there.get(name)}, not {value}"
                    for name, value in wanted.items()
                    if there.get(name) != value
                )
        if reason:
            _log.info("%s: its TensorRT engine is for %s: building another", key.role, reason)

    def _seal(self, data: bytes) -> str:
        """The seal of ``data``, hexadecimal; the secret is made if there is none.

        Raises:
            BackendError: The secret cannot be written or read, or others can read it.
        """
        path = self._secret
        try:
            if not path.exists():
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                # Unlike a rename, a link never takes the place of a secret that another process has made meanwhile.
                with _draft(path, secrets.token_bytes(_SECRET_LENGTH)) as draft, contextlib.suppress(FileExistsError):
                    path.hardlink_to(draft)
            return self._digest(data)
        except OSError as error:
            raise BackendError(
                f"cannot keep TensorRT engines without a secret in {path}: {error.strerror or error}; set "
                "RSEDGE_ENGINE_KEY to a file that you alone can read and write, in a directory of your own"
            ) from error

    def _is_sealed(self, data: bytes, found: object) -> bool:
        """Whether ``found`` is the seal of ``data``; False where there is no sound secret."""
        try:
            expected = self._digest(data)
        except OSError:
            return False
        return isinstance(found, str) and hmac.compare_digest(expected.encode(), found.encode("utf-8", "replace"))

    def _digest(self, data: bytes) -> str:
        secret = _read_own(self._secret, _SECRET_LENGTH, closed=0o077, otherwise=_UNFIT_SECRET)
        if len(secret) != _SECRET_LENGTH:
            raise PermissionError(_UNFIT_SECRET)
        return hmac.digest(secret, data, "sha256").hex()


def secret_path() -> Path:
    """Where this user's secret is, or would be."""
    if chosen := os.environ.get("RSEDGE_ENGINE_KEY"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "rsedge" / "engine.key"


def _sealed(key: EngineKey, sha256: str) -> bytes:
    """What the seal of a plan is made over."""
    return json.dumps([key.to_json(), sha256], sort_keys=True).encode()


def _read_own(path: Path, most: int = -1, *, closed: int = 0o022, otherwise: str = "") -> bytes:
    """The bytes, ``most`` at most, of a plain file that is this user's, and whose mode has no bit of ``closed``.

    Raises:
        OSError: It is another kind of file, or someone else's; ``otherwise`` says so.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & closed:
            raise PermissionError(otherwise or f"{path.name} is not a plain file that its owner alone may write")
        return stream.read(most)


def _notes(path: Path) -> dict[str, Any]:
    """What stands beside an engine; empty if it cannot be read."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _profiles(values: Any) -> tuple[Ranges, ...]:
    """Profiles from JSON; none if they are not such."""
    try:
        return tuple(
            tuple((str(name), (int(low), int(tuned), int(high))) for name, (low, tuned, high) in profile)
            for profile in values
        )
    except (TypeError, ValueError):
        return ()


def _serves(other: EngineKey, key: EngineKey) -> bool:
    """Whether the widest profile of ``other`` allows all that the profiles of ``key`` do."""
    if not other.profiles:
        return False
    widest = dict(other.profiles[-1])
    return all(
        name in widest and widest[name][0] <= low and high <= widest[name][2]
        for profile in key.profiles
        for name, (low, _, high) in profile
    )


def _write(path: Path, data: Buffer) -> None:
    """Write a whole file or none, readable by its owner alone."""
    with _draft(path, data) as draft:
        draft.replace(path)


@contextlib.contextmanager
def _draft(path: Path, data: Buffer) -> Iterator[Path]:
    """A file of ``data`` beside ``path``, readable by its owner alone; deleted when the block ends if it is there."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}", suffix=".tmp")
    draft = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        yield draft
    finally:
        draft.unlink(missing_ok=True)
