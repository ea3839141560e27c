"""The machine, and whether captioning works on it: the findings of ``rsedge doctor``.

Each section is a function that returns values and never fails: an unknown value is None or a sentence, and a fault
becomes a problem with its next step. Nothing of torch is imported.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

from rsedge.bundle import cache_dir, read_bundle
from rsedge.errors import BackendError, RsedgeError
from rsedge.host import memory_available, memory_total, usable_cores
from rsedge.runtime.sandbox.process import Support, support

LIBRARIES = (
    *("numpy", "Pillow", "rasterio", "pyarrow", "tokenizers"),
    *("onnxruntime", "onnxruntime-gpu", "tensorrt", "cuda-python", "faiss-cpu"),
    *("onnx", "torch", "transformers", "accelerate"),
)
DRIVERS = {
    "GTiff": "GeoTIFF",
    "COG": "Cloud Optimized GeoTIFF",
    "JP2OpenJPEG": "JPEG 2000, the bands of SAFE products",
    "PNG": "images",
    "JPEG": "images",
    "WEBP": "images",
    "VRT": "mosaics, with --allow-vrt",
}
"""GDAL driver → its use here."""
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
"""Extra of the package → its use."""
_SCARCE_DISK, _SCARCE_MEMORY = 2 * 2**30, 1 * 2**30
_OTHER_NAMES = {"tensorrt": ("tensorrt-cu12", "tensorrt-cu13"), "cuda-python": ("cuda-bindings",)}
_FEATURES: dict[str, dict[str, tuple[str, ...]]] = {
    "x86": {"AVX2": ("avx2",), "AVX-512": ("avx512f",), "VNNI": ("avx512_vnni", "avx_vnni"), "AMX": ("amx_int8",)},
    "arm": {"dotprod": ("asimddp",), "i8mm": ("i8mm",), "fp16": ("asimdhp",), "SVE": ("sve",)},
}
_JETPACK = {32: "4", 34: "5", 35: "5", 36: "6", 38: "7"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    """Versions."""

    rsedge: str
    python: str
    platform: str
    libc: str | None
    """Such as ``glibc 2.36``, or None."""
    gdal: str | None
    proj: str | None
    """As installed with rasterio, or None."""
    libraries: dict[str, str | None]
    """Library → version, or None where it is not installed."""
    providers: tuple[str, ...]
    """Execution providers of this ONNX Runtime; empty without it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """The CPU."""

    model: str | None
    architecture: str
    """Such as ``x86_64`` or ``aarch64``."""
    cores: int | None
    """Of the machine."""
    usable: int
    """Cores this process may use."""
    features: dict[str, bool]
    """Instruction set → whether the CPU has it; empty if unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Memory and disk, bytes; None if unknown."""

    memory: int | None
    """Of the machine."""
    memory_free: int | None
    cache: str
    """Folder of the cache."""
    cache_free: int | None
    """Free on its disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """GPUs and engines."""

    gpus: tuple[str, ...]
    """Name, driver, memory and compute capability of each, from nvidia-smi."""
    cuda: bool
    """Whether ONNX Runtime can use a CUDA GPU."""
    cuda_problem: str | None
    """The reason if not, or None."""
    tensorrt: bool
    """Whether TensorRT can use the first GPU."""
    tensorrt_problem: str | None
    """The reason if not, or None."""
    jetpack: str | None
    """Such as ``6 (L4T 36.4.0)``, or None on other machines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rasters:
    """Formats of GDAL."""

    drivers: dict[str, bool]
    """Driver of :data:`DRIVERS` → whether GDAL has it."""
    remote: bool
    """Whether it reads over HTTP and from S3 (``/vsicurl``)."""
    maps: bool
    """Whether PROJ finds its database."""
    problem: str | None = None
    """The reason if rasterio cannot be imported, or None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A problem with its next step."""

    text: str
    remedy: str
    fatal: bool = False
    """Whether captioning fails because of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """The chosen bundle and its caption of one generated tile; a field that was not reached is None."""

    path: str | None = None
    chosen: str | None = None
    """The reason for this bundle."""
    model: str | None = None
    family: str | None = None
    precision: str | None = None
    backend: str | None = None
    device: str | None = None
    reason: str | None = None
    """The reason for this device."""
    caption: str | None = None
    seconds: float | None = None
    """Time of the caption, loading included."""
    problem: str | None = None
    """The reason if there is no caption."""
    remedy: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Extra:
    """An extra of the package."""

    name: str
    purpose: str
    """Its use."""
    missing: tuple[str, ...]
    """Libraries that are not installed."""
    command: str | None
    """Command that installs them, or None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkup:
    """All sections, and the problems."""

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
        """Return the findings as JSON values."""
        return {"works": self.works, **dataclasses.asdict(self)}


def check_up(bundle: Callable[[], tuple[Path, str]], *, device: str = "auto", backend: str = "auto") -> Checkup:
    """Check every section.

    Args:
        bundle: Returns the bundle to try and the reason for it; an error of :mod:`rsedge.errors` is reported.
        device, backend: As in ``Captioner.load``.
    """
    sections = software(), room(), devices(), rasters(), _try_bundle(bundle, device, backend)
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


# ---- software ----


def software() -> Software:
    """Return the versions."""
    gdal = proj = None
    with suppress(ImportError):
        import rasterio

        gdal, proj = rasterio.__gdal_version__, rasterio.__proj_version__
    providers: tuple[str, ...] = ()
    with suppress(ImportError, AttributeError):  # or an empty folder of that name, as a failed removal leaves it
        import onnxruntime

        providers = tuple(onnxruntime.get_available_providers())
    return Software(
        rsedge=version_of("rsedge") or "unknown",
        python=f"{platform.python_implementation()} {platform.python_version()} ({sys.executable})",
        platform=platform.platform(),
        libc=" ".join(platform.libc_ver()).strip() or None,
        gdal=gdal,
        proj=proj,
        libraries={name: version_of(name) for name in LIBRARIES},
        providers=providers,
    )


def version_of(name: str) -> str | None:
    """Return the version of a distribution without importing it, or None."""
    for spelling in (name, *_OTHER_NAMES.get(name, ())):
        with suppress(metadata.PackageNotFoundError):
            if found := metadata.version(spelling):
                return found
    if name == "tensorrt" and util.find_spec(name) is not None:  # Debian's package on a Jetson has no metadata
        with suppress(Exception):  # its libraries may be missing
            return str(__import__(name).__version__)
    return None


# ---- machine ----


def processor() -> Processor:
    """Return the CPU."""
    model, features = parse_cpuinfo(_text("/proc/cpuinfo"), platform.machine())
    board = _text("/proc/device-tree/model").strip("\0 \n")
    return Processor(
        model=board or model or platform.processor() or None,
        architecture=platform.machine(),
        cores=os.cpu_count(),
        usable=usable_cores(),
        features=features,
    )


def parse_cpuinfo(text: str, machine: str) -> tuple[str | None, dict[str, bool]]:
    """Return name and features from Linux's ``/proc/cpuinfo``; no features if the text is empty."""
    model = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    known = _FEATURES["arm" if machine.lower() in ("aarch64", "arm64") else "x86"]
    words = set(flags[1].split()) if flags else set()
    features = {name: any(word in words for word in any_of) for name, any_of in known.items()} if flags else {}
    return (model[1].strip() if model else None), features


def room() -> Room:
    """Return the free memory and disk."""
    cache = cache_dir()
    there = next((folder for folder in (cache, *cache.parents) if folder.exists()), None)
    disk = None
    with suppress(OSError):
        disk = shutil.disk_usage(there).free if there else None
    return Room(memory=memory_total(), memory_free=memory_available(), cache=str(cache), cache_free=disk)


def devices() -> Devices:
    """Return the GPUs and engines."""
    cuda_problem = None
    try:
        from rsedge.runtime.engines.ort import choose_device

        choose_device("cuda", "fp16")
    except BackendError as error:
        cuda_problem = re.sub(r"^device cuda cannot be used: |; use --device cpu.*$", "", str(error))
    except Exception as error:  # a broken installation fails in its own way
        cuda_problem = f"{type(error).__name__}: {error}"
    try:
        from rsedge.runtime.engines.tensorrt.backend import tensorrt_problem

        without = tensorrt_problem(0, "fp16") or None
    except Exception as error:  # a broken installation fails in its own way
        without = f"{type(error).__name__}: {error}"
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,compute_cap", "--format=csv,noheader"]
    answer = ""
    with suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    rows = [[part.strip() for part in line.split(",")] for line in answer.splitlines()]
    return Devices(
        gpus=tuple(
            f"{row[0]}, driver {row[1]}, {row[2]}, compute capability {row[3]}" for row in rows if len(row) == 4
        ),
        cuda=cuda_problem is None,
        cuda_problem=cuda_problem,
        tensorrt=without is None,
        tensorrt_problem=without,
        jetpack=parse_tegra(_text("/etc/nv_tegra_release")),
    )


def parse_tegra(text: str) -> str | None:
    """Return JetPack and L4T from ``/etc/nv_tegra_release``, such as ``6 (L4T 36.4.0)``, or None."""
    found = re.search(r"R(\d+)\s*\(release\)\s*,\s*REVISION:\s*([\d.]+)", text)
    return f"{_JETPACK.get(int(found[1]), 'of unknown version')} (L4T {found[1]}.{found[2]})" if found else None


def _text(path: str) -> str:
    """Return the text of one of the system's files, or nothing."""
    with suppress(OSError):
        return Path(path).read_text(encoding="utf-8", errors="replace")
    return ""


# ---- rasters ----


def rasters() -> Rasters:
    """Return the formats of GDAL."""
    try:
        import rasterio
        from rasterio.crs import CRS
    except Exception as error:  # GDAL's libraries may be missing in many ways
        none = dict.fromkeys(DRIVERS, False)
        return Rasters(drivers=none, remote=False, maps=False, problem=f"{type(error).__name__}: {error}")
    with rasterio.Env() as environment:
        there = environment.drivers()
        try:
            maps = CRS.from_epsg(32629).is_projected
        except rasterio.errors.RasterioError:
            maps = False
    return Rasters(
        drivers={name: name in there for name in DRIVERS},
        remote="HTTP" in there,  # this driver and /vsicurl come with the same library, curl
        maps=bool(maps),
    )


# ---- the bundle ----


def _try_bundle(bundle: Callable[[], tuple[Path, str]], device: str, backend: str) -> Trial:
    """Caption one generated tile."""
    found: dict[str, Any] = {}
    begin = time.perf_counter()
    try:
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
    except Exception as error:  # a broken library fails in its own way, and this command reports it
        problem = f"{type(error).__name__}: {error}"
        return Trial(**found, problem=problem, remedy="rsedge --debug demo shows where")
    return Trial(**found, caption=caption.text, seconds=round(time.perf_counter() - begin, 3))


# ---- what could be installed ----


def extras(*, jetpack: bool = False) -> tuple[Extra, ...]:
    """Return the extras of the installed package, in the order of :data:`EXTRAS`; with ``jetpack`` TensorRT comes with
    the system.
    """
    try:
        wanted = metadata.requires("rsedge") or []
    except metadata.PackageNotFoundError:  # not installed: run from a folder
        wanted = []
    found = []
    for name, purpose in EXTRAS.items():
        needs = sorted(needed_by(name, wanted)) + ["tensorrt"] * (name == "tensorrt")
        missing = tuple(library for library in needs if version_of(library) is None)
        if name == "cpu" and version_of("onnxruntime-gpu"):  # it runs on CPUs too
            missing = ()
        command = f"pip install 'rsedge[{name}]'" if missing else None
        if missing and name == "gpu" and version_of("onnxruntime"):  # both write the same files
            command = f"pip uninstall -y onnxruntime && {command}"
        elif "tensorrt" in missing:
            command = f"sudo apt install python3-libnvinfer && {command}" if jetpack else f"{command} tensorrt"
        found.append(Extra(name=name, purpose=purpose, missing=missing, command=command))
    return tuple(found)


def needed_by(extra: str, requirements: Iterable[str]) -> set[str]:
    """Return the libraries of an extra and of the extras it includes, from requirements of package metadata such as
    ``torch>=2.4; extra == "export"``.
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


def _problems(soft: Software, space: Room, compute: Devices, raster: Rasters, trial: Trial) -> Iterator[Problem]:
    """Yield the problems, fatal ones first."""
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
    """Return the command that installs an engine for this machine."""
    if compute.jetpack:
        return (
            "pip install onnxruntime-gpu from NVIDIA's index for this JetPack (pypi.jetson-ai-lab.io), or run on the "
            "CPU: pip install 'rsedge[cpu]'"
        )
    if compute.gpus:
        return "pip uninstall -y onnxruntime && pip install 'rsedge[gpu]'"
    return "pip install 'rsedge[cpu]'"
