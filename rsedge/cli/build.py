"""``rsedge build``: build the TensorRT engines of a bundle for the GPU of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from rsedge.cli import options
from rsedge.cli.say import build_progress, note, say, say_json

if TYPE_CHECKING:
    from rsedge.bundle import Bundle
    from rsedge.runtime.engines.tensorrt.backend import TrtBackend
    from rsedge.runtime.engines.tensorrt.build import BuildSettings, Limits


@click.command("build")
@click.argument("bundle", type=options.PATH)
@options.option("--device", default="cuda", help="cuda or cuda:N.")
@options.option("--batch-size", type=options.AT_LEAST_1, help="Images per batch.  [default: 32, 64 for embeddings]")
@options.option("--beams", type=click.IntRange(1, 64), help="Widest beam search.  [default: the bundle's, at least 3]")
@options.option(
    "--max-new-tokens",
    type=options.AT_LEAST_1,
    help="Longest caption, in tokens.  [default: the bundle's, at least 40]",
)
@options.option(
    "--level",
    type=click.IntRange(0, 5),
    default=3,
    help="Effort of the search for fast kernels, 0 to 5; an existing engine of a higher level is kept.",
)
@options.option(
    "--workspace", type=options.AT_LEAST_1, help="Largest scratch memory, in MiB.  [default: all GPU memory]"
)
@options.option("--force", is_flag=True, help="Build existing engines again.")
@options.as_json
def command(
    bundle: Path,
    device: str,
    batch_size: int | None,
    beams: int | None,
    max_new_tokens: int | None,
    level: int,
    workspace: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Build the TensorRT engines of BUNDLE for this machine's GPU before the first caption needs them.

    Commands on TensorRT build missing engines themselves. This command builds them in advance, and for other sizes. An
    engine works with one GPU and one TensorRT version. Engines are stored in RSEDGE_CACHE, else ~/.cache/rsedge, never
    in the bundle.
    """
    from rsedge.bundle import read_bundle
    from rsedge.errors import OptionError
    from rsedge.runtime.engines.tensorrt.build import BuildSettings, Limits

    kind, _, number = device.partition(":")
    if kind != "cuda" or (number and not number.isdecimal()):
        raise OptionError(f"device is {device!r}, expected cuda or cuda:N: TensorRT runs on NVIDIA GPUs only")
    found = read_bundle(bundle)
    limits = Limits.of(found.manifest, images=batch_size, beams=beams, tokens=max_new_tokens)
    settings = BuildSettings(level=level, workspace=None if workspace is None else workspace << 20)
    backend, taken = build_engines(found, device=device, limits=limits, settings=settings, force=force)
    paths = {role: backend.engine_path(role) for role in taken}
    if as_json:
        engines = {
            role: {"path": str(path), "bytes": path.stat().st_size, "seconds": round(taken[role], 1)}
            for role, path in paths.items()
        }
        summary = {"model": found.model, "tensorrt": backend.version, "gpu": backend.cuda.info.name, "engines": engines}
        say_json(summary)
        return
    for role, path in paths.items():
        how = f"built in {taken[role]:.0f} s" if taken[role] else "existing"
        say(f"{role:<10}  {path.stat().st_size / 2**20:8.1f} MiB  {how:<16}  {path}")


def build_engines(
    bundle: Bundle,
    *,
    device: str = "cuda",
    limits: Limits | None = None,
    settings: BuildSettings | None = None,
    force: bool = False,
) -> tuple[TrtBackend, dict[str, float]]:
    """Build the engines of a bundle, with progress on stderr.

    Args:
        bundle: Bundle in fp16 or fp32.
        device: ``cuda`` or ``cuda:N``.
        limits, settings: As :class:`~rsedge.runtime.engines.tensorrt.backend.TrtBackend` takes them.
        force: Build existing engines again.

    Returns:
        The backend, and role → build time of its engine in seconds; 0 for an existing engine.

    Raises:
        BackendError: TensorRT does not work here, or a build fails.
    """
    from rsedge.runtime.engines.tensorrt.backend import TrtBackend, device_summary

    with build_progress() as report:
        backend = TrtBackend(bundle, device, limits=limits, settings=settings, report=report)
        note(f"TensorRT {backend.version} on {device_summary(backend.cuda)}")
        return backend, backend.prepare(exact=True, force=force)
