"""``rsedge doctor``: show versions, devices, the chosen engine, and how to install what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rsedge.cli import options
from rsedge.cli.say import note, say, say_json

if TYPE_CHECKING:
    from rsedge.runtime.diagnostics.doctor import (
        Checkup,
        Devices,
        Processor,
        Rasters,
        Room,
        Software,
        Trial,
    )
    from rsedge.runtime.sandbox.process import Support

Rows = Iterator[tuple[str, str]]


@click.command("doctor")
@options.bundle
@options.device
@options.backend
@options.option(
    "--selftest",
    is_flag=True,
    help="Build, run and compare a tiny model with each engine that is here, TensorRT among them, and nothing else.",
)
@options.as_json
def command(model: Path | None, device: str, backend: str, selftest: bool, as_json: bool) -> int:
    """Show versions, devices, the engine for captioning with the reason, and packages for more features.

    The command captions one generated tile. It lists problems last, each with the next step. The exit code is 0 if
    captioning works and 1 if not. TensorRT awaits confirmation on hardware: --selftest tests it on this machine.
    """
    from rsedge.runtime.diagnostics.doctor import check_up

    if selftest:
        if model is not None:
            raise click.UsageError("--selftest runs its own model: leave -m out")
        if backend != "auto":
            raise click.UsageError("--selftest tests every engine: leave --backend out")
        from rsedge.runtime.diagnostics.selftest import selftest as test_engines

        checks = test_engines(device=device, progress=note)
        if as_json:
            say_json([check.to_json() for check in checks])
        else:
            words = {True: "passed", False: "FAILED", None: "-"}
            for check in checks:
                say(f"{words[check.passed]:<7} {check.name}: {check.detail}")
        return 1 if any(check.passed is False for check in checks) else 0

    from rsedge.cli.config import default_model

    found = check_up(
        default_model if model is None else lambda: (model, "named with -m"), device=device, backend=backend
    )
    if as_json:
        say_json(found.to_dict())
    else:
        say("\n".join(_lines(found)))
    return 0 if found.works else 1


# As text


def _lines(found: Checkup) -> Iterator[str]:
    sections = {
        "software": _software(found.software),
        "processor": _processor(found.processor),
        "room": _room(found.room),
        "devices": _devices(found.devices),
        "rasters": _rasters(found.rasters),
        "sandbox": _sandbox(found.sandbox),
        "captioning": _trial(found.trial),
        "for more": ((extra.name, f"{extra.command or 'installed'}: {extra.purpose}") for extra in found.extras),
    }
    for title, rows in sections.items():
        yield title
        for name, text in rows:
            yield f"  {name:<16} {text}"
        yield ""
    count = len(found.problems)
    yield f"{count or 'no'} problem{'s' * (count != 1)}"
    for problem in found.problems:
        yield f"  - {problem.text}"
        yield f"    next: {problem.remedy}"
    yield ""
    yield "captioning works" if found.works else "captioning does not work"


def _software(found: Software) -> Rows:
    yield "rsedge", found.rsedge
    yield "Python", found.python
    yield "platform", ", ".join(filter(None, (found.platform, found.libc)))
    yield "GDAL, PROJ", f"{found.gdal or 'not found'}, {found.proj or 'not found'}"
    for name, version in found.libraries.items():
        providers = f" ({', '.join(found.providers)})" if name.startswith("onnxruntime") and version else ""
        yield name, f"{version}{providers}" if version else "-"


def _processor(found: Processor) -> Rows:
    yield "CPU", f"{found.model or 'unknown'} ({found.architecture})"
    yield "cores", f"{found.usable} of {found.cores or 'an unknown number'} usable"
    if found.features:
        yield "instructions", ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in found.features.items())


def _room(found: Room) -> Rows:
    yield "memory", f"{_size(found.memory_free)} free of {_size(found.memory)}"
    yield "cache", f"{found.cache}, {_size(found.cache_free)} free"


def _devices(found: Devices) -> Rows:
    for gpu in found.gpus:
        yield "GPU", gpu
    if not found.gpus:
        yield "GPU", "nvidia-smi finds none"
    yield "CUDA", "usable by ONNX Runtime" if found.cuda else f"not used: {found.cuda_problem}"
    trt = "usable; awaits confirmation on hardware: rsedge doctor --selftest tests it"
    yield "TensorRT", trt if found.tensorrt else f"not used: {found.tensorrt_problem}"
    if found.jetpack:
        yield "JetPack", found.jetpack


def _rasters(found: Rasters) -> Rows:
    from rsedge.runtime.diagnostics.doctor import DRIVERS

    for name, there in found.drivers.items():
        yield name, f"{'yes' if there else 'no'}: {DRIVERS[name]}"
    yield "/vsicurl", "yes: scenes over HTTP and from S3" if found.remote else "no"
    yield "PROJ database", "yes" if found.maps else "no"


def _sandbox(found: Support) -> Rows:
    if found.problem:
        yield "--sandbox", f"no: {found.problem}"
    else:
        network = "seccomp" if found.seccomp else "a name space, where that is allowed"
        yield "--sandbox", f"yes: files by Landlock {found.landlock}, network by {network}"


def _trial(found: Trial) -> Rows:
    if found.path:
        yield "bundle", f"{found.path} ({found.chosen})"
    if found.model:
        yield "model", f"{found.model}: {found.family}, {found.precision}"
    if found.device:
        yield "runs on", f"{found.backend}, {found.device}: {found.reason}"
    if found.caption is not None:
        yield "a tile", f"{found.caption!r} in {found.seconds} s, loading included"
    else:
        yield "a tile", f"no caption: {found.problem}"


def _size(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.1f} GiB"
