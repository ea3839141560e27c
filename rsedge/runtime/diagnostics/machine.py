"""The machine as rsedge sees it: software, processor, memory, devices, raster formats.

Each function gives values and never fails: what cannot be found out is None, or said in words. Nothing of torch is
imported.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from rsedge.bundle import cache_dir
from rsedge.errors import BackendError
from rsedge.host import memory_available, memory_total, usable_cores

LIBRARIES = (
    "numpy",
    "Pillow",
    "rasterio",
    "pyarrow",
    "tokenizers",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "cuda-python",
    "faiss-cpu",
    "onnx",
    "torch",
    "transformers",
    "accelerate",
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
"""GDAL's drivers that matter → what for."""
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
    """What rasterio brings, or None; so is ``proj``."""
    proj: str | None
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
    """Instruction set that matters → whether it is there; empty where the system does not tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Memory and disk, bytes; None where the system does not tell."""

    memory: int | None
    """Of the machine."""
    memory_free: int | None
    cache: str
    """The folder of files that rsedge can make again."""
    cache_free: int | None
    """On its disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """What can compute."""

    gpus: tuple[str, ...]
    """Name, driver, memory and compute capability of each, from nvidia-smi."""
    cuda: bool
    """Whether ONNX Runtime can use a CUDA GPU."""
    cuda_problem: str | None
    """Why not, or None."""
    tensorrt: bool
    """Whether TensorRT can be used on the first of them."""
    tensorrt_problem: str | None
    """Why not, or None."""
    jetpack: str | None
    """Such as ``6 (L4T 36.4.0)``, or None on other machines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rasters:
    """What GDAL reads."""

    drivers: dict[str, bool]
    """Driver that matters → whether it is there."""
    remote: bool
    """Whether it reads over HTTP and from S3 (``/vsicurl``)."""
    maps: bool
    """Whether PROJ finds its database."""
    problem: str | None = None
    """Why there is no GDAL at all, or None."""


# ---- software ----


def software() -> Software:
    """See :class:`Software`."""
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
    """Return the version of a distribution without importing it; None where it is not installed."""
    for spelling in (name, *_OTHER_NAMES.get(name, ())):
        with suppress(metadata.PackageNotFoundError):
            if found := metadata.version(spelling):
                return found
    if name == "tensorrt" and util.find_spec(name) is not None:  # Debian's package on a Jetson has no metadata
        with suppress(Exception):  # whatever it is that its libraries miss
            return str(__import__(name).__version__)
    return None


# ---- machine ----


def processor() -> Processor:
    """See :class:`Processor`."""
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
    """Name and features from Linux's ``/proc/cpuinfo``; no features where the text is empty."""
    model = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    known = _FEATURES["arm" if machine.lower() in ("aarch64", "arm64") else "x86"]
    words = set(flags[1].split()) if flags else set()
    features = {name: any(word in words for word in any_of) for name, any_of in known.items()} if flags else {}
    return (model[1].strip() if model else None), features


def room() -> Room:
    """See :class:`Room`."""
    cache = cache_dir()
    there = next((folder for folder in (cache, *cache.parents) if folder.exists()), None)
    disk = None
    with suppress(OSError):
        disk = shutil.disk_usage(there).free if there else None
    return Room(memory=memory_total(), memory_free=memory_available(), cache=str(cache), cache_free=disk)


def devices() -> Devices:
    """See :class:`Devices`."""
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
    told = ""
    with suppress(OSError, subprocess.SubprocessError):
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    rows = [[part.strip() for part in line.split(",")] for line in told.splitlines()]
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
    """JetPack and L4T from ``/etc/nv_tegra_release``, such as ``6 (L4T 36.4.0)``; None where there is none."""
    found = re.search(r"R(\d+)\s*\(release\)\s*,\s*REVISION:\s*([\d.]+)", text)
    return f"{_JETPACK.get(int(found[1]), 'of unknown version')} (L4T {found[1]}.{found[2]})" if found else None


def _text(path: str) -> str:
    """Return the text of one of the system's files, or nothing."""
    with suppress(OSError):
        return Path(path).read_text(encoding="utf-8", errors="replace")
    return ""


# ---- rasters ----


def rasters() -> Rasters:
    """See :class:`Rasters`."""
    try:
        import rasterio
        from rasterio.crs import CRS
    except Exception as error:  # a library of GDAL's may be missing in many ways
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
