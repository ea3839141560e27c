"""Whether captioning works here, what would be used and why, what to do about the rest: what ``rsedge doctor`` says.

Each section is a function that gives values and never fails; what is wrong becomes a problem with its next step.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rsedge.errors import RsedgeError
from rsedge.runtime.diagnostics.machine import (
    DRIVERS,
    Devices,
    Processor,
    Rasters,
    Room,
    Software,
    devices,
    processor,
    rasters,
    room,
    software,
    version_of,
)
from rsedge.runtime.sandbox.process import Support, support

EXTRAS = {
    "cpu": "inference with ONNX Runtime on any machine",
    "gpu": "inference with ONNX Runtime on an NVIDIA GPU",
    "tensorrt": "inference with TensorRT on an NVIDIA GPU",
    "export": "rsedge export",
    "train": "rsedge train and import-rsdix",
    "tune": "rsedge tune",
    "evaluate": "rsedge evaluate",
    "sbert": "similarity in meaning in rsedge evaluate",
    "search": "approximate search in millions of embeddings",
    "translate": "rsedge back-translate",
}
"""Extra of the package → what it is for."""
_SCARCE_DISK, _SCARCE_MEMORY = 2 * 2**30, 1 * 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something to act on."""

    text: str
    """What is wrong."""
    remedy: str
    """The next step."""
    fatal: bool = False
    """Whether captioning fails until then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """The bundle that would be used, tried on one generated tile."""

    path: str | None = None
    chosen: str | None = None
    """The bundle and why this one; None where that fails already."""
    model: str | None = None
    family: str | None = None
    precision: str | None = None
    """What it says of itself."""
    backend: str | None = None
    device: str | None = None
    reason: str | None = None
    """What ran it, where and why there."""
    caption: str | None = None
    """What it wrote, or None."""
    seconds: float | None = None
    """That took, loading included."""
    problem: str | None = None
    """Why there is no caption, or None."""
    remedy: str | None = None
    """The next step then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extra:
    """An extra of the package."""

    name: str
    purpose: str
    """What it is and what it is for."""
    missing: tuple[str, ...]
    """What of it is not installed."""
    command: str | None
    """What installs that, or None where nothing is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkup:
    """All sections, and what to do."""

    software: Software
    processor: Processor
    room: Room
    devices: Devices
    rasters: Rasters
    sandbox: Support
    trial: Trial
    extras: tuple[Extra, ...]
    problems: tuple[Problem, ...]

    @property
    def works(self) -> bool:
        """Whether captioning works."""
        return not any(problem.fatal for problem in self.problems)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"works": self.works, **dataclasses.asdict(self)}


def check_up(bundle: Callable[[], tuple[Path, str]], *, device: str = "auto", backend: str = "auto") -> Checkup:
    """Every section.

    Args:
        bundle: Gives the bundle to try and why this one; an error of :mod:`rsedge.errors` is reported.
        device, backend: As ``Captioner.load`` takes them.
    """
    sections = software(), room(), devices(), rasters(), try_bundle(bundle, device=device, backend=backend)
    soft, space, compute, raster, trial = sections
    return Checkup(
        software=soft,
        processor=processor(),
        room=space,
        devices=compute,
        rasters=raster,
        sandbox=support(),
        trial=trial,
        extras=extras(jetpack=compute.jetpack is not None),
        problems=tuple(_problems(*sections)),
    )


# ---- the bundle ----


def try_bundle(bundle: Callable[[], tuple[Path, str]], *, device: str = "auto", backend: str = "auto") -> Trial:
    """Caption one generated tile.

    Args:
        bundle: Gives the bundle and why this one, or an error of :mod:`rsedge.errors`.
        device, backend: As ``Captioner.load`` takes them.
    """
    found: dict[str, Any] = {}
    begin = time.perf_counter()
    try:
        from rsedge.bundle import read_bundle

        path, chosen = bundle()
        found |= {"path": str(path), "chosen": chosen}
        opened = read_bundle(path)
        manifest = opened.manifest
        found |= {"model": opened.model, "family": manifest.family, "precision": manifest.precision}
        if manifest.generation is None:
            return Trial(
                **found,
                problem=f"{path} is a {manifest.family} bundle: it makes embeddings and writes no captions",
                remedy="rsedge config unset model, or pass a captioner with -m",
            )
        import numpy as np

        from rsedge.runtime.captioner import Captioner
        from rsedge.runtime.demo.scene import compose_tile

        captioner = Captioner.load(path, device=device, backend=backend, batch_size=1)
        found |= {"backend": captioner.backend, "device": captioner.device, "reason": captioner.device_reason}
        (caption,) = captioner.caption(compose_tile(np.random.default_rng(0)).image[None])
    except RsedgeError as error:
        return Trial(**found, problem=str(error), remedy="put that right, then run rsedge doctor again")
    except Exception as error:  # a broken library fails in its own way, and this command is to say so
        problem = f"{type(error).__name__}: {error}"
        return Trial(**found, problem=problem, remedy="rsedge --debug demo shows where")
    return Trial(**found, caption=caption.text, seconds=round(time.perf_counter() - begin, 3))


# ---- what could be installed ----


def extras(*, jetpack: bool = False) -> tuple[Extra, ...]:
    """The extras of the package as it is installed, in the order of :data:`EXTRAS`.

    Args:
        jetpack: Whether this is a Jetson, whose TensorRT comes with the system.
    """
    try:
        wanted = metadata.requires("rsedge") or []
    except metadata.PackageNotFoundError:  # run from a folder that was never installed
        wanted = []
    found = []
    for name, purpose in EXTRAS.items():
        needs = sorted(needed_by(name, wanted)) + ["tensorrt"] * (name == "tensorrt")
        missing = tuple(library for library in needs if version_of(library) is None)
        if name == "cpu" and version_of("onnxruntime-gpu"):  # which runs on CPUs too
            missing = ()
        command = _installing(name, missing, jetpack) if missing else None
        found.append(Extra(name=name, purpose=purpose, missing=missing, command=command))
    return tuple(found)


def _installing(extra: str, missing: Iterable[str], jetpack: bool) -> str:
    """The command that installs an extra."""
    command = f"pip install 'rsedge[{extra}]'"
    if extra == "gpu" and version_of("onnxruntime"):  # both write the same files
        return f"pip uninstall -y onnxruntime && {command}"
    if "tensorrt" in missing:
        return f"sudo apt install python3-libnvinfer && {command}" if jetpack else f"{command} tensorrt"
    return command


def needed_by(extra: str, requirements: Iterable[str]) -> set[str]:
    """The libraries an extra adds, those of the extras it includes too.

    Args:
        extra: Its name.
        requirements: As package metadata list them, such as ``torch>=2.4; extra == "export"``.
    """
    requirements = list(requirements)
    needs: set[str] = set()
    for line in requirements:
        requirement, _, marker = line.partition(";")
        if not re.search(rf"extra\s*==\s*['\"]{re.escape(extra)}['\"]", marker):
            continue
        name = re.match(r"[\w.-]+", requirement.strip())
        included = re.search(r"\[(.+?)\]", requirement)
        if name and name[0] == "rsedge" and included:
            for other in included[1].split(","):
                needs |= needed_by(other.strip(), requirements)
        elif name:
            needs.add(name[0])
    return needs


# ---- problems ----


def _problems(soft: Software, space: Room, compute: Devices, raster: Rasters, trial: Trial) -> Iterable[Problem]:
    """Everything to act on, what keeps captioning from working first."""
    libraries = soft.libraries
    if raster.problem:
        remedy = "pip install --force-reinstall rasterio"
        yield Problem(text=f"rasterio cannot be imported: {raster.problem}", remedy=remedy, fatal=True)
    if trial.problem:
        remedy = trial.remedy or ""
        if not soft.providers:
            remedy = _inference(compute)
        yield Problem(text=f"captioning does not work: {trial.problem}", remedy=remedy, fatal=True)
    if not raster.problem:
        missing = [f"{name} ({DRIVERS[name]})" for name, there in raster.drivers.items() if not there]
        if missing:
            text = f"this GDAL has no driver {', '.join(missing)}"
            yield Problem(text=text, remedy="install rasterio from PyPI, whose wheels have all: pip install rasterio")
        if not raster.maps:
            remedy = "unset PROJ_LIB and PROJ_DATA, which may point to another version's database"
            yield Problem(text="PROJ finds no database of coordinate systems: no footprints", remedy=remedy)
        if not raster.remote:
            text = "this GDAL is built without curl: nothing is read over the network"
            yield Problem(text=text, remedy="install rasterio from PyPI, or download scenes first")
    if compute.gpus and not compute.cuda and not compute.tensorrt:
        yield Problem(text=f"there is a GPU that is not used: {compute.cuda_problem}", remedy=_inference(compute))
    if libraries["onnxruntime"] and libraries["onnxruntime-gpu"]:
        text = "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files"
        remedy = "pip uninstall -y onnxruntime onnxruntime-gpu, then install the one you want"
        yield Problem(text=text, remedy=remedy)
    if space.cache_free is not None and space.cache_free < _SCARCE_DISK:
        text = f"{space.cache_free / 2**30:.1f} GiB are free for the cache {space.cache}; engines need about 1 GiB each"
        yield Problem(text=text, remedy="make room, or set RSEDGE_CACHE to a folder on another disk")
    if space.memory_free is not None and space.memory_free < _SCARCE_MEMORY:
        text = f"{space.memory_free / 2**30:.1f} GiB of memory are free"
        yield Problem(text=text, remedy="close other programs, or pass a smaller --batch-size")


def _inference(compute: Devices) -> str:
    """What installs an engine for this machine."""
    if compute.jetpack:
        return (
            "pip install onnxruntime-gpu from NVIDIA's index for this JetPack (pypi.jetson-ai-lab.io), or run on the "
            "CPU: pip install 'rsedge[cpu]'"
        )
    if compute.gpus:
        return "pip uninstall -y onnxruntime && pip install 'rsedge[gpu]'"
    return "pip install 'rsedge[cpu]'"
