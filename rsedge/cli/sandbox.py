"""``--sandbox``: the command line runs again in a process that can open only what was named in it.

The parent starts the child, passes signals on, and waits; it opens nothing. The child parses the same command line,
gives up all other files and the network, and only then imports NumPy, rasterio or an engine.
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

# Parameters of commands over scenes that name files, by what is done with those.
INPUTS = ("scenes", "inputs", "targets", "scene", "scene_name", "scl", "cloud_mask")
FILES_READ = ("model", "embedder", "labels", "allow_roots")
OUTPUTS = ("output", "html", "sheet", "stac", "embeddings", "raster", "png")
_NAMING = {"scenes", "scene"}  # after what these name an output is called that is not named itself

_PARENT, _IMPORTS = "RSEDGE_SANDBOX_PARENT", "RSEDGE_SANDBOX_IMPORTS"  # of the child: who waits for it, its sys.path
# Without the parent's path Python would import from the working folder first, which may be a stranger's.
_START = (
    "import os, sys; sys.path[:] = os.environ.pop('RSEDGE_SANDBOX_IMPORTS').split(os.pathsep); "
    "from rsedge.cli.main import main; main()"
)
# The child needs no credentials, and what it writes may go back to a stranger.
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
    """The callback of a command, which with ``--sandbox`` runs in a confined child and gives the child's exit code."""

    @functools.wraps(function)
    def run(*arguments: Any, sandbox: bool, **values: Any) -> Any:
        if sandbox and values["allow_remote"]:
            raise click.UsageError(
                "--sandbox takes the network away and --allow-remote wants it: download scenes first, or leave one out"
            )
        if sandbox and _PARENT not in os.environ:
            return _run_child(click.get_current_context().find_root().obj)
        if sandbox:
            _confine_child(values)
        return function(*arguments, **values)

    return run  # type: ignore[return-value]  # the same but for the option


# The parent


def _run_child(arguments: Sequence[str]) -> int:
    """Run the command line in a child that confines itself; its exit code."""
    from rsedge.runtime.sandbox.process import require_support

    require_support()
    with tempfile.TemporaryDirectory(prefix="rsedge-") as folder:
        code = _wait([sys.executable, "-c", _START, *arguments], _environment(os.environ, folder))
    if code >= 0:
        return code
    number = signal.Signals(-code)
    if number == signal.SIGINT:
        return 130
    if number.name in _PASSED_ON:  # who waits for this process sees what it would see without a sandbox
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    raise SandboxError(
        f"the process in the sandbox was ended by {number.name}"
        + (", as Linux does where memory runs out: pass a smaller --batch-size or" if number == signal.SIGKILL else ":")
        + " run the same command to go on from what is finished"
    )


def _environment(given: Mapping[str, str], folder: str) -> dict[str, str]:
    """Variables of the child, whose own temporary folder is ``folder``."""
    return {
        **{name: value for name, value in given.items() if _KEPT.fullmatch(name)},
        "TMPDIR": folder,
        # ONNX Runtime would keep a database of what it has to tell its makers, and tell them.
        "ORT_DISABLE_TELEMETRY": "1",
        _PARENT: str(os.getpid()),
        _IMPORTS: os.pathsep.join(sys.path),
    }


def _wait(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command to its end, passing on what is sent to this process; its return code."""
    sys.stdout.flush()
    sys.stderr.flush()
    waited = {signal.SIGCHLD, *(signal.Signals[name] for name in _PASSED_ON)}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, waited)
    try:
        child = subprocess.Popen(command, env=environment)
        while child.poll() is None:
            # Not for ever: a parent that ignores its children's ends has SIGCHLD never sent.
            received = signal.sigtimedwait(waited, 1.0)
            if received and received.si_signo != signal.SIGCHLD and received.si_code != _FROM_TERMINAL:
                child.send_signal(received.si_signo)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return child.returncode


# The child


def _confine_child(values: Mapping[str, Any]) -> None:
    """Confine this process to what the parameters name, and say so."""
    from rsedge.bundle import cache_dir
    from rsedge.runtime.sandbox.landlock import prctl
    from rsedge.runtime.sandbox.process import confine

    parent = int(os.environ.pop(_PARENT))
    prctl(_END_WITH_PARENT, signal.SIGKILL, 0)
    if os.getppid() != parent:
        raise SandboxError("the process that started this one has ended meanwhile: run the same command again")
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the parent's, which blocks what it passes on

    folders = _output_folders(values)
    gpu = values["device"].startswith("cuda")
    # Engines are programs for the GPU: where no GPU is in reach, none can be left there for a later run.
    cache = cache_dir() if gpu else cache_dir() / "verified"
    with contextlib.suppress(OSError):  # it saves time and nothing else
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    compiled = [Path.home() / ".nv"] if gpu else []
    read = [Path(path) for name in FILES_READ for path in _named(values, name)]
    read += [path for name in INPUTS for path in of_input(_named(values, name))]
    found = confine(
        read=[*read, *_default_model(values), cache_dir()],
        write=[*folders, cache, *compiled, tempfile.gettempdir()],
        listed=[path for name in INPUTS for path in _listed(_named(values, name))],
        gpu=gpu,
    )
    log = logging.getLogger("rsedge")
    log.info("sandbox: %s; writes below %s", ", ".join(found.holds), ", ".join(map(str, folders)) or "its cache alone")
    for phrase in found.missing:
        log.warning("Warning: the sandbox has a gap: %s", phrase)
    for folder in {path for path in read if Path.home().is_relative_to(path)}:
        log.warning("Warning: all of %s can be read in the sandbox: put the input into a folder of its own", folder)
    if values["device"] == "auto" and glob.glob("/dev/nvidiactl") + glob.glob("/dev/nvhost-ctrl*"):  # noqa: PTH207
        log.info("sandbox: the GPU is out of reach; --device cuda lets its driver in")


def _named(values: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """What a parameter names, whether one or several."""
    value = values.get(name)
    several = value if isinstance(value, tuple) else () if value is None else (value,)
    return tuple(os.fspath(one) for one in several)


def _output_folders(values: Mapping[str, Any]) -> list[Path]:
    """Folders of the outputs, which have to be open to writing in whole, as files appear there by rename.

    Raises:
        OptionError: In one of them lies the user's home or what Python imports: what is put there runs later.
    """
    from rsedge.runtime.sandbox.process import of_interpreter

    named = [name for output in OUTPUTS for name in _named(values, output) if name != "-"]
    if values.get("output", "-") is None and _NAMING & values.keys():
        named.append("output")  # whatever its name, it will lie in the working folder
    folders = sorted({Path(name).absolute().parent.resolve() for name in named})
    kept = [Path(place).resolve() for place in (Path.home(), *of_interpreter())]
    for folder in folders:
        if inside := [place for place in kept if place.is_relative_to(folder)]:
            raise OptionError(
                f"with --sandbox all files below an output's folder can be written, and {inside[0]} is among those of "
                f"{folder}: write into a folder of its own, such as -o results/…"
            )
    return folders


def _default_model(values: Mapping[str, Any]) -> list[Path]:
    """The settings, and the bundle that is used where none is named; the built-in one lies in the package."""
    from rsedge.cli.settings import ENVIRONMENT, read_settings, settings_path

    if values["model"] is not None:
        return []
    chosen = os.environ.get(ENVIRONMENT) or read_settings().get("model")
    return [settings_path(), *([Path(chosen).expanduser()] if chosen else [])]


def of_input(names: Sequence[str]) -> Iterator[Path]:
    """Files and folders that are read for scenes and masks that the user names.

    A folder is read whole; so is the product that a folder or file is part of, and the folder of a document (STAC,
    VRT, metadata), since it names files beside it. ``-`` is a STAC document that names files below the working folder.
    Of a raster the file is read, what is called after it (``.aux.xml``, ``.tfw``, ``.ovr``) and, where its name is that
    of a band, the other bands.
    """
    from rsedge.runtime.scenes.products.loose_bands import sibling_bands

    for name in names:
        if name == "-":
            yield Path.cwd()
            continue
        path = Path(name).resolve()
        if not path.exists():
            if glob.has_magic(name):
                yield from of_input(glob.glob(name, recursive=True))  # noqa: PTH207 - of any folder, absolute or not
            continue
        product = _product(path)
        if product is not None or path.is_dir():
            yield product or path
            yield path.with_name("R20m") if path.name == "R10m" else path
        elif path.suffix.lower() in _WITH_FOLDER:
            yield path.parent
        else:
            bands = sibling_bands(path) if _LOOSE_BAND.search(path.stem) else None
            for file in [path, *(Path(other) for other in (bands.files if bands else ()))]:
                yield file
                yield from _called_after(file)


def _product(path: Path) -> Path | None:
    """The folder of the Sentinel-2 product that ``path`` is, or is part of."""
    for place in (path, *path.parents):
        if place.suffix.upper() == ".SAFE" and place.is_dir():
            return place
        if place.name == "GRANULE":
            return place.parent
    return None


def _called_after(file: Path) -> Iterator[Path]:
    """Files beside ``file`` that have its name and something behind; no links, which lead anywhere."""
    for entry in os.scandir(file.parent):
        begins = entry.name.startswith((f"{file.name}.", f"{file.stem}."))
        if begins and entry.is_file(follow_symlinks=False):
            yield Path(entry.path)


def _listed(names: Sequence[str]) -> Iterator[Path]:
    """Folders whose names are looked through: of bands beside each other, and of patterns."""
    for name in names:
        if Path(name).is_file() and _LOOSE_BAND.search(Path(name).stem):
            yield Path(name).resolve().parent
            yield Path(name).resolve().parent.with_name("R20m")
        elif glob.has_magic(name) and not Path(name).exists():
            yield next(place for place in Path(name).absolute().parents if not glob.has_magic(str(place)))
