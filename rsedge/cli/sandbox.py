"""``--sandbox``: run the command line again in a process that opens only the files named in it.

The parent starts the child, forwards signals and waits; it opens nothing. The child parses the same command line, gives
up the network and all other files, and only then imports NumPy, rasterio or an engine.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from rsedge.errors import OptionError, SandboxError

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

# Parameters of commands over scenes that name files, by use.
INPUTS = ("scenes", "inputs", "catalog", "targets", "scene", "scene_name", "scl", "cloud_mask")
FILES_READ = ("model", "embedder", "labels", "allow_roots")
OUTPUTS = ("output", "html", "sheet", "stac", "embeddings", "raster", "png")
_NAMING = {"scenes", "scene"}  # the default output is named after these

_PARENT, _IMPORTS = "RSEDGE_SANDBOX_PARENT", "RSEDGE_SANDBOX_IMPORTS"  # of the child: its parent's id, its sys.path
# Without the parent's path Python would import from the working folder first, and that may hold a stranger's files.
_START = (
    "import os, sys; sys.path[:] = os.environ.pop('RSEDGE_SANDBOX_IMPORTS').split(os.pathsep); "
    "from rsedge.cli.main import main; main()"
)
# The child needs no credentials, and a stranger may receive its output.
_KEPT = re.compile(
    r"HOME|USER|LOGNAME|PATH|LANG|LANGUAGE|TZ|TERM|COLORTERM|COLUMNS|LINES|NO_COLOR|FORCE_COLOR|RSEDGE_(CACHE|MODEL)"
    r"|PYTHON[A-Z]*|(LC|XDG|LD|PROJ|OMP|OPENBLAS|MKL|ORT|ARROW|MALLOC|CUDA|NVIDIA|OPJ)_\w+|(GDAL|CPL)_(?!HTTP|CURL)\w+"
)
_PASSED_ON = ("SIGINT", "SIGTERM", "SIGHUP")
_FROM_TERMINAL = 0x80  # SI_KERNEL: the terminal sent it to the child, too
_END_WITH_PARENT = 1  # prctl: PR_SET_PDEATHSIG

_LOOSE_BAND = re.compile(r"B0?[234]", re.IGNORECASE)
_WITH_FOLDER = (".json", ".geojson", ".xml", ".vrt")  # what names files beside itself


def sandboxed(function: Decorated) -> Decorated:
    """Wrap the callback of a command: with ``--sandbox`` it runs in a confined child and returns its exit code."""

    @functools.wraps(function)
    def run(*arguments: Any, sandbox: bool, **values: Any) -> Any:
        if sandbox and values["allow_remote"]:
            raise click.UsageError(
                "--sandbox has no network and --allow-remote needs it: download scenes first, or leave one out"
            )
        if sandbox and _PARENT not in os.environ:
            return _run_child(click.get_current_context().find_root().obj)
        if sandbox:
            _confine_child(values)
        return function(*arguments, **values)

    return run  # type: ignore[return-value]  # the same but for the option


# The parent


def _run_child(arguments: Sequence[str]) -> int:
    """Run the command line in a child that confines itself and return its exit code."""
    from rsedge.runtime.sandbox.process import require_support

    require_support()
    with tempfile.TemporaryDirectory(prefix="rsedge-") as folder:
        environment = {
            **{name: value for name, value in os.environ.items() if _KEPT.fullmatch(name)},
            "TMPDIR": folder,
            # Otherwise ONNX Runtime keeps a database of its use and reports it.
            "ORT_DISABLE_TELEMETRY": "1",
            _PARENT: str(os.getpid()),
            _IMPORTS: os.pathsep.join(sys.path),
        }
        code = _wait([sys.executable, "-c", _START, *arguments], environment)
    if code >= 0:
        return code
    number = signal.Signals(-code)
    if number == signal.SIGINT:
        return 130
    if number.name in _PASSED_ON:  # end by the same signal, as without a sandbox
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    memory = " (Linux sends it when memory runs out): pass a smaller --batch-size or"
    raise SandboxError(
        f"{number.name} ended the process in the sandbox{memory if number == signal.SIGKILL else ':'} run the same "
        "command to continue from the finished tiles"
    )


def _wait(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command, forward the signals that this process receives, and return its return code."""
    sys.stdout.flush()
    sys.stderr.flush()
    waited = {signal.SIGCHLD, *(signal.Signals[name] for name in _PASSED_ON)}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, waited)
    try:
        child = subprocess.Popen(command, env=environment)
        while child.poll() is None:
            # With a limit: a process that ignores SIGCHLD never receives it.
            received = signal.sigtimedwait(waited, 1.0)
            if received and received.si_signo != signal.SIGCHLD and received.si_code != _FROM_TERMINAL:
                child.send_signal(received.si_signo)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return child.returncode


# The child


def _confine_child(values: Mapping[str, Any]) -> None:
    """Confine this process to the files in the parameters, and print the limits."""
    from rsedge.bundle import cache_dir
    from rsedge.cli.config import ENVIRONMENT, read_settings, settings_path
    from rsedge.runtime.sandbox.landlock import prctl
    from rsedge.runtime.sandbox.process import confine

    parent = int(os.environ.pop(_PARENT))
    prctl(_END_WITH_PARENT, signal.SIGKILL, 0)
    if os.getppid() != parent:
        raise SandboxError("the parent process ended before its sandbox started: run the same command again")
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # inherited from the parent, which blocks the signals it forwards

    folders = _output_folders(values)
    gpu = values["device"].startswith("cuda")
    # Engines are programs for the GPU. Without a GPU the sandbox cannot write one for a later run.
    cache = cache_dir() if gpu else cache_dir() / "verified"
    with contextlib.suppress(OSError):  # the cache only saves time
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    compiled = [Path.home() / ".nv"] if gpu else []
    read = [Path(path) for name in FILES_READ for path in _named(values, name)]
    read += [path for name in INPUTS for path in of_input(_named(values, name))]
    settings = []
    if values["model"] is None:  # the built-in bundle lies in the package
        chosen = os.environ.get(ENVIRONMENT) or read_settings().get("model")
        settings = [settings_path(), *([Path(chosen).expanduser()] if chosen else [])]
    found = confine(
        read=[*read, *settings, cache_dir()],
        write=[*folders, cache, *compiled, tempfile.gettempdir()],
        listed=[path for name in INPUTS for path in _listed(_named(values, name))],
        gpu=gpu,
    )
    log = logging.getLogger("rsedge")
    log.info("sandbox: %s; writes below %s", ", ".join(found.holds), ", ".join(map(str, folders)) or "its cache alone")
    for phrase in found.missing:
        log.warning("Warning: the sandbox has a gap: %s", phrase)
    for folder in {path for path in read if Path.home().is_relative_to(path)}:
        log.warning("Warning: the sandbox can read all of %s: move the input into its own folder", folder)
    if values["device"] == "auto" and glob.glob("/dev/nvidiactl") + glob.glob("/dev/nvhost-ctrl*"):  # noqa: PTH207
        log.info("sandbox: the GPU is not available; --device cuda allows its driver")


def _named(values: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Return the values of a parameter as texts, whether one or several."""
    value = values.get(name)
    several = value if isinstance(value, tuple) else () if value is None else (value,)
    return tuple(os.fspath(one) for one in several)


def _output_folders(values: Mapping[str, Any]) -> list[Path]:
    """Return the folders of the outputs. They must be writable as a whole, because files appear there by rename. Raises
    OptionError if one holds the user's home or Python's packages: files written there would run later.
    """
    from rsedge.runtime.sandbox.process import of_interpreter

    named = [name for output in OUTPUTS for name in _named(values, output) if name != "-"]
    if values.get("output", "-") is None and _NAMING & values.keys():
        named.append("output")  # the default name lies in the working folder
    folders = sorted({Path(name).absolute().parent.resolve() for name in named})
    kept = [Path(place).resolve() for place in (Path.home(), *of_interpreter())]
    for folder in folders:
        if inside := [place for place in kept if place.is_relative_to(folder)]:
            raise OptionError(
                f"with --sandbox every file below the folder of an output is writable, and {folder} holds {inside[0]}: "
                "choose a separate folder, such as -o results/…"
            )
    return folders


def of_input(names: Sequence[str]) -> Iterator[Path]:
    """Yield the files and folders to read for the scenes and masks that the user names.

    For a folder: the whole folder. For a file or folder of a product: the whole product. For a document (STAC, VRT,
    metadata): its folder, because it names files there. For ``-``, a STAC document: the working folder. For a raster:
    the file, the files named after it (``.aux.xml``, ``.tfw``, ``.ovr``) and, for a single band, the other bands.
    """
    from rsedge.runtime.scenes.products.loose_bands import sibling_bands

    for name in names:
        if name == "-":
            yield Path.cwd()
            continue
        path = Path(name).resolve()
        if not path.exists():
            if glob.has_magic(name):
                yield from of_input(list(_matches(name)))
            continue
        product = _product(path)
        if product is not None or path.is_dir():
            yield product or path
            yield from _r20m_beside(path)
        elif path.suffix.lower() in _WITH_FOLDER:
            yield path.parent
        else:
            bands = sibling_bands(path) if _LOOSE_BAND.search(path.stem) else None
            for file in [path, *(Path(other) for other in (bands.files if bands else ()))]:
                yield file
                for entry in os.scandir(file.parent):  # files named after it; links are left out
                    begins = entry.name.startswith((f"{file.name}.", f"{file.stem}."))
                    if begins and entry.is_file(follow_symlinks=False):
                        yield Path(entry.path)


def _matches(pattern: str) -> Iterator[str]:
    """Yield what a pattern matches, without links out of its folder: their targets were not named by the user."""
    base = _base(pattern).resolve()
    for name in glob.glob(pattern, recursive=True):  # noqa: PTH207 - of any folder, absolute or not
        if Path(name).resolve().is_relative_to(base):
            yield name


def _base(pattern: str) -> Path:
    """Return the folder in which a pattern begins."""
    return next(place for place in Path(pattern).absolute().parents if not glob.has_magic(str(place)))


def _r20m_beside(folder: Path) -> Iterator[Path]:
    """Yield ``R20m`` beside a folder ``R10m``, unless it is a link, which may lead anywhere."""
    beside = folder.with_name("R20m")
    if folder.name == "R10m" and not beside.is_symlink():
        yield beside


def _product(path: Path) -> Path | None:
    """Return the folder of the Sentinel-2 product that contains ``path``, or None."""
    for place in (path, *path.parents):
        if place.suffix.upper() == ".SAFE" and place.is_dir():
            return place
        if place.name == "GRANULE":
            return place.parent
    return None


def _listed(names: Sequence[str]) -> Iterator[Path]:
    """Yield the folders to list: for bands beside each other, and for patterns."""
    for name in names:
        if Path(name).is_file() and _LOOSE_BAND.search(Path(name).stem):
            folder = Path(name).resolve().parent
            yield folder
            yield from _r20m_beside(folder)
        elif glob.has_magic(name) and not Path(name).exists():
            yield _base(name)
