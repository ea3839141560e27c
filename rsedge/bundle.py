"""The bundle on disk: the contract between export and runtime.

A bundle is a directory ``NAME.rsedge`` with ``manifest.json``, ONNX graphs, ``tokenizer.json``, ``stac-item.json`` and
``README.md``. The manifest vouches for each graph and the tokenizer by size and SHA-256. :func:`read_bundle` trusts
nothing else, and :func:`write_bundle` shows readers the whole bundle or none of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from rsedge import jsonvalues
from rsedge.errors import BundleError, OptionError, OutputError
from rsedge.graphcheck import beside, external_locations, graph_problems
from rsedge.manifest import MOST_BYTES as MOST_MANIFEST_BYTES
from rsedge.manifest import (
    DecoderSpec,
    EmbeddingSpec,
    Family,
    FileRef,
    GenerationDefaults,
    Graph,
    ImageSpec,
    Manifest,
    Provenance,
    TensorSpec,
    TokenSpec,
)
from rsedge.tokenizerfile import tokenizer_problems

__all__ = [
    "MANIFEST", "SUFFIX", "Bundle", "DecoderSpec", "EmbeddingSpec", "Family", "FileRef",
    "GenerationDefaults", "Graph", "ImageSpec", "Manifest", "Provenance", "TensorSpec", "TokenSpec",
    "cache_dir", "describe_file", "describe_graph", "read_bundle", "sha256_of", "write_bundle",
]  # fmt: skip

SUFFIX = ".rsedge"
MANIFEST = "manifest.json"

Verified = dict[str, list[object]]  # file → modification time (ns), size, inode, sha256; JSON values
_CONTENTS = "*"  # in place of a file, whose name it cannot be: which checks the contents passed, and of what manifest
_CHECKS = 1  # raised with every check of contents that is added, so that no older verdict is believed


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle whose files have been checked."""

    path: Path
    """The bundle directory, absolute."""
    manifest: Manifest
    hash: str
    """SHA-256 of the manifest's bytes, hexadecimal: it holds the hash of every file, so it names the model exactly."""

    @property
    def hash12(self) -> str:
        """The first 12 digits of ``hash``."""
        return self.hash[:12]

    @property
    def model(self) -> str:
        """``name@hash12``, as written to every record."""
        return f"{self.manifest.name}@{self.hash12}"

    def graph_path(self, name: str) -> Path:
        """The ONNX file of the graph ``name``; BundleError, which lists the graphs there are, where it is missing."""
        graph = self.manifest.graphs.get(name)
        if graph is None:
            raise BundleError(f"{self.path} has no graph {name!r}; it has {', '.join(self.manifest.graphs)}")
        return self.path / graph.file

    @property
    def tokenizer_path(self) -> Path:
        """The ``tokenizer.json``; BundleError where the bundle has none."""
        if self.manifest.tokenizer is None:
            raise BundleError(f"{self.path} has no tokenizer: it is a {self.manifest.family} bundle for images only")
        return self.path / self.manifest.tokenizer.file


def describe_file(root: Path, file: str) -> FileRef:
    """The size and hash of ``root / file``, for a manifest."""
    path = root / file
    return FileRef(file=file, sha256=sha256_of(path), size=path.stat().st_size)


def describe_graph(
    root: Path, file: str, *, opset: int, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec]
) -> Graph:
    """The manifest entry of the ONNX file ``root / file``; its external data files are found in the file itself."""
    external = sorted(beside(file, location) for location in external_locations(root / file))
    return Graph(
        **dataclasses.asdict(describe_file(root, file)),
        opset=opset,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        external_data=tuple(describe_file(root, name) for name in external),
    )


def cache_dir() -> Path:
    """Where rsedge keeps what it can make again: ``RSEDGE_CACHE``, else ``~/.cache/rsedge``. It may not exist yet."""
    chosen = os.environ.get("RSEDGE_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "rsedge"


# Reading


def read_bundle(path: str | Path) -> Bundle:
    """The bundle at ``path``, every file of it checked.

    A file is hashed once and then trusted while its size, modification time and inode stay the same; the results are
    kept in :func:`cache_dir`, where that can be written. Hard links are read like other files: package managers make
    them. They can only lead to what the manifest has the hash of, and nothing is ever written through them.

    Raises:
        BundleError: Listing everything wrong at once: no bundle there, a manifest of another format version or with
            impossible fields, files missing, cut short, altered or outside the bundle, external data not listed, a
            graph or tokenizer that rsedge could not have written.
    """
    path = Path(path)
    if not path.is_dir() or not (path / MANIFEST).is_file():
        raise BundleError(f"no bundle at {path}: {_what_is_there(path)}")
    root = path.resolve()
    try:
        if not (root / MANIFEST).resolve().is_relative_to(root):
            raise BundleError(f"{MANIFEST} is a link that leads outside the bundle: copy the bundle with 'cp -rL'")
        with (root / MANIFEST).open("rb") as stream:
            data = stream.read(MOST_MANIFEST_BYTES + 1)
        if len(data) > MOST_MANIFEST_BYTES:
            raise BundleError(f"{MANIFEST} has more than {MOST_MANIFEST_BYTES} bytes: it is no manifest of rsedge")
        manifest, digest = Manifest.from_json(data), hashlib.sha256(data).hexdigest()
        known = _load_verified(root)
        verified, problems = _check_files(root, manifest, digest, known)
        if verified != known:
            _save_verified(root, verified)
        if problems:
            raise BundleError("\n".join(problems))
    except (BundleError, OSError) as error:
        lines = "\n".join(f"  - {line}" for line in str(error).splitlines())
        raise BundleError(f"cannot use the bundle {path}:\n{lines}") from error
    return Bundle(path=root, manifest=manifest, hash=digest)


def _what_is_there(path: Path) -> str:
    if not path.exists():
        return f"it does not exist; make one with 'rsedge export CHECKPOINT -o {path.with_suffix(SUFFIX).name}'"
    if not path.is_dir():
        return "it is a file; a bundle is the directory that 'rsedge export' writes"
    if (path / "config.json").exists():
        return f"it is a checkpoint; export it first with 'rsedge export {path} -o {path.with_suffix(SUFFIX).name}'"
    return f"the directory holds no {MANIFEST}"


def _check_files(root: Path, manifest: Manifest, digest: str, known: Verified) -> tuple[Verified, list[str]]:
    """The files found sound, and everything wrong with the others; ``digest`` is the SHA-256 of the manifest."""
    verified: Verified = {}
    problems: dict[str, None] = {}  # a set that keeps the order: external data may be shared between graphs
    damaged = set()
    for ref in dict.fromkeys(manifest.files):
        problem = _check_file(root, ref, known, verified)
        if problem:
            problems[problem] = None
            damaged.add(ref.file)
    # The manifest pins every file's contents, so what was found in them once holds for as long as it stays the same.
    contents: list[object] = [_CHECKS, digest]
    if known.get(_CONTENTS) != contents:
        for graph in manifest.graphs.values():
            if not damaged & {ref.file for ref in graph.files}:
                problems.update(dict.fromkeys(graph_problems(root, graph)))
        if (tokens := manifest.tokenizer) is None or tokens.file in damaged:
            pass
        elif tokens.size > jsonvalues.MOST_BYTES:
            limit = f"at most {jsonvalues.MOST_BYTES} are read: do not use this bundle"
            problems[f"{tokens.file} has {tokens.size} bytes, {limit}"] = None
        else:
            for problem in tokenizer_problems((root / tokens.file).read_bytes()):
                problems[f"{tokens.file} {problem}: do not use this bundle, export again"] = None
    if not problems:
        verified[_CONTENTS] = contents
    return verified, list(problems)


def _check_file(root: Path, ref: FileRef, known: Verified, verified: Verified) -> str:
    """What is wrong with one file, or an empty string; notes a sound file in ``verified``."""
    path = (root / ref.file).resolve()
    if not path.is_relative_to(root):
        return f"{ref.file} is a link that leads outside the bundle (to {path}): copy the bundle with 'cp -rL'"
    if not path.is_file():
        return f"{ref.file} is missing: copy the whole bundle again, or export again"
    status = path.stat()
    if status.st_size != ref.size:
        fate = "cut short" if status.st_size < ref.size else "altered"
        return f"{ref.file} is {fate}: expected {ref.size} bytes, found {status.st_size}; copy it again or export again"
    state: list[object] = [status.st_mtime_ns, status.st_size, status.st_ino, ref.sha256]
    if known.get(ref.file) != state:
        actual = sha256_of(path)
        if actual != ref.sha256:
            return f"{ref.file} is altered: expected sha256 {ref.sha256}, found {actual}; copy it again or export again"
    verified[ref.file] = state
    return ""


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _verified_file(root: Path) -> Path:
    """What was verified: one small JSON file per bundle directory, so that two bundles never write the same one."""
    return cache_dir() / "verified" / f"{hashlib.sha256(os.fsencode(root)).hexdigest()[:32]}.json"


def _load_verified(root: Path) -> Verified:
    file = _verified_file(root)
    try:
        # Another user could plant a verdict in a directory open to all; then the hashes are simply counted again.
        owners = [place.stat() for place in (file.parent, file)]
        if any(owner.st_uid != os.getuid() or owner.st_mode & 0o022 for owner in owners):
            return {}
        values = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _save_verified(root: Path, verified: Verified) -> None:
    file = _verified_file(root)
    # The cache saves time and nothing else: a read-only home must not keep a bundle from loading.
    with contextlib.suppress(OSError):
        cache_dir().mkdir(mode=0o700, parents=True, exist_ok=True)
        file.parent.mkdir(mode=0o700, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=file.parent, prefix=file.name, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                json.dump(verified, stream)
            Path(draft).replace(file)
        except OSError:
            Path(draft).unlink()
            raise


# Writing


def write_bundle(target: str | Path, build: Callable[[Path], Manifest], *, overwrite: bool = False) -> Bundle:
    """Write a bundle so that ``target`` is at every moment absent, the old bundle, or the whole new one, and return it.

    Args:
        target: The bundle directory; its name ends in ``.rsedge`` and its parent exists.
        build: Fills the empty directory it is given (graphs, tokenizer, card) and returns the manifest, which is
            written last. The result is read back and checked before it takes its place.
        overwrite: Replace a bundle that is already there; anything that is not a bundle is never replaced.

    Raises:
        OptionError: The name does not end in ``.rsedge``.
        OutputError: ``target`` exists, is not a bundle, or cannot be written.
        BundleError: ``build`` returned a manifest that its files do not bear out.
    """
    check_target(target, overwrite=overwrite)
    target = Path(target).resolve()
    try:
        draft = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.stem}-", suffix=".tmp"))
    except OSError as error:
        raise OutputError(f"cannot write in {target.parent}: {error.strerror}; choose another folder") from error
    try:
        data = build(draft).to_json()
        (draft / MANIFEST).write_bytes(data)
        manifest, digest = Manifest.from_json(data), hashlib.sha256(data).hexdigest()
        _, problems = _check_files(draft, manifest, digest, {})
        if problems:
            raise BundleError("\n".join(["the bundle to be written is not sound:", *problems]))
        os.umask(mask := os.umask(0))  # the only portable way to read it is to set it
        draft.chmod(0o777 & ~mask)  # mkdtemp makes it private
        for folder, _, files in os.walk(draft):
            for name in (*files, ""):
                _sync(Path(folder, name))
        check_target(target, overwrite=overwrite)  # the build may have taken minutes
        _put_in_place(draft, target)
    finally:
        # After an exchange this is the old bundle, after a plain rename it is gone, after a failure it is the draft.
        shutil.rmtree(draft, ignore_errors=True)
    _sync(target.parent)
    return Bundle(path=target, manifest=manifest, hash=digest)


def check_target(target: str | Path, *, overwrite: bool = False) -> None:
    """Raise as :func:`write_bundle` does where a bundle cannot be written at ``target``."""
    target = Path(target)
    if not target.name.endswith(SUFFIX) or target.name == SUFFIX:
        raise OptionError(f"a bundle's name must end in {SUFFIX}, got {target.name!r}: use {target.name}{SUFFIX}")
    target = target.resolve()
    if not target.parent.is_dir():
        raise OutputError(f"the folder {target.parent} does not exist: create it first")
    if not target.exists():
        return
    try:
        values = json.loads((target / MANIFEST).read_bytes())
    except (OSError, ValueError):
        values = None
    if not isinstance(values, dict) or not {"format_version", "graphs"} <= values.keys():
        raise OutputError(f"{target} exists and is not a bundle: rsedge will not replace it; choose another name")
    if not overwrite:
        raise OutputError(f"{target} exists already: choose another name, or allow overwriting with --overwrite")


def _put_in_place(draft: Path, target: Path) -> None:
    """Rename ``draft`` to ``target``; an old bundle ends up under the name ``draft``."""
    try:
        if not target.exists():
            draft.rename(target)
        elif not _exchange(draft, target):
            aside = draft.with_suffix(".old")
            target.rename(aside)
            try:
                draft.rename(target)
            except BaseException:
                aside.rename(target)
                raise
            aside.rename(draft)
    except OSError as error:
        raise OutputError(f"cannot put the bundle at {target}: {error.strerror}; choose another name") from error


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step, so that no moment has neither; False where the system or file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    at_fdcwd, exchange = -100, 2  # <fcntl.h>, <linux/fs.h>
    return bool(renameat2(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), exchange) == 0)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
