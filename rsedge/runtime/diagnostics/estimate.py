"""How long a run over a scene will take and how much memory, from a short measurement: an estimate and no more."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rsedge.bundle import read_bundle
from rsedge.errors import BackendError
from rsedge.runtime.demo.scene import compose_tile
from rsedge.runtime.engines import host
from rsedge.runtime.scenes.pieces import cache_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from rsedge.bundle import Bundle, Manifest
    from rsedge.pixels import UInt8
    from rsedge.runtime.run.sources import TileOptions
    from rsedge.runtime.scenes.scene import Scene

_PAINTED = 8  # generated tiles: enough for captions of different lengths
_PATIENCE = 3.0  # seconds a measurement may take once it has begun, one batch at least
_BARE = 150 * 2**20  # Python with the libraries of a run, where the system does not tell
_AHEAD = 96  # tiles that wait for the model, as a run reads them


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A model on a device, and how fast it was.

    Attributes:
        model: ``name@hash12``.
        does: ``caption`` or ``embed``.
        backend, device, device_reason: What runs it, where and why; all None where it cannot.
        batch_size: Images computed together, or None where it cannot run.
        image_size: Side of its images in pixels.
        images: Generated images that were timed; 0 where nothing was measured.
        tiles_per_second: What was measured, or None.
        process_bytes: Memory of the process without the model.
        model_bytes: Memory that the model takes at work; on CUDA what it takes of the host's.
        problem: Why it cannot run here, or None.
    """

    model: str
    does: str
    backend: str | None
    device: str | None
    device_reason: str | None
    batch_size: int | None
    image_size: int
    images: int
    tiles_per_second: float | None
    process_bytes: int
    model_bytes: int
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a run over one scene will take.

    Attributes:
        model, does, backend, device, device_reason, batch_size, tiles_per_second: See ``Probe``.
        measured_images: Generated images it rests on; 0 where nothing was measured.
        seconds: Wall time of the model's part, or None; reading runs beside it and counts only where it is slower.
        reader_cache_bytes: Cache of decoded blocks.
        tiles_bytes: Tiles that wait for the model.
        model_bytes, process_bytes: See ``Probe``.
        memory_bytes: All of these.
        problem: Why there is no time, or None.
    """

    model: str
    does: str
    backend: str | None
    device: str | None
    device_reason: str | None
    batch_size: int | None
    tiles_per_second: float | None
    measured_images: int
    seconds: float | None
    reader_cache_bytes: int
    tiles_bytes: int
    model_bytes: int
    process_bytes: int
    memory_bytes: int
    problem: str | None


def probe_model(
    path: str | Path,
    *,
    device: str = "auto",
    backend: str = "auto",
    threads: int | None = None,
    batch_size: int | None = None,
    measure: bool = True,
) -> Probe:
    """Load a bundle and time it on generated tiles for a few seconds.

    Args:
        path: A bundle of any family.
        device, backend, threads, batch_size: As ``Captioner.load`` takes them.
        measure: Whether to run it; else only where it would run is found out.

    Returns:
        What was found; a device that cannot be used is its ``problem``.

    Raises:
        BundleError: The bundle is damaged.
        OptionError: A value that is not accepted.
    """
    bundle = read_bundle(path)
    manifest = bundle.manifest
    host.forget_memory_peak()  # what came before is no part of the model's
    before = host.memory_now() or _BARE
    known: dict[str, Any] = {
        "model": bundle.model,
        "does": "embed" if manifest.generation is None else "caption",
        "image_size": manifest.image.size,
        "process_bytes": before,
    }
    guessed = _guessed_bytes(manifest, batch_size or 16)
    try:
        run, runs_on = _load(bundle, device=device, backend=backend, threads=threads, batch_size=batch_size)
    except BackendError as error:
        idle: dict[str, Any] = dict.fromkeys(("backend", "device", "device_reason", "batch_size", "tiles_per_second"))
        return Probe(**known, **idle, images=0, model_bytes=guessed, problem=str(error))
    if not measure:
        guessed = _guessed_bytes(manifest, runs_on["batch_size"])
        return Probe(**known, **runs_on, images=0, tiles_per_second=None, model_bytes=guessed)
    images, rate = _time(run, manifest.image.size, runs_on["batch_size"])
    peak = host.memory_peak()
    taken = max(peak - before, 0) if peak else guessed
    return Probe(**known, **runs_on, images=images, tiles_per_second=rate, model_bytes=taken)


def estimate(scene: Scene, options: TileOptions, probe: Probe) -> Estimate:
    """What a run over ``scene`` will take.

    Raises:
        OptionError: The options leave no tile.
    """
    grid = options.grid(scene)
    ahead = max(_AHEAD // grid.cols, options.readers) + 2  # with the row that is taken from and the one being read
    sides = {grid.tile_size, probe.image_size}
    tiles = min(ahead * grid.cols, len(grid)) * sum(3 * side**2 for side in sides)
    cache = cache_bytes(scene, grid)
    rate = probe.tiles_per_second
    return Estimate(
        model=probe.model,
        does=probe.does,
        backend=probe.backend,
        device=probe.device,
        device_reason=probe.device_reason,
        batch_size=probe.batch_size,
        tiles_per_second=rate,
        measured_images=probe.images,
        seconds=round(len(grid) / rate, 1) if rate else None,
        reader_cache_bytes=cache,
        tiles_bytes=tiles,
        model_bytes=probe.model_bytes,
        process_bytes=probe.process_bytes,
        memory_bytes=cache + tiles + probe.model_bytes + probe.process_bytes,
        problem=probe.problem,
    )


def _load(bundle: Bundle, **where: Any) -> tuple[Callable[[UInt8], Any], dict[str, Any]]:
    """What runs images, uint8 [N, S, S, 3], and where."""
    if bundle.manifest.generation is None:
        from rsedge.runtime.embedder import Embedder

        embedder = Embedder.load(bundle.path, **where)
        return embedder.embed_images, _where(embedder)
    from rsedge.runtime.captioner import Captioner

    captioner = Captioner.load(bundle.path, **where)
    return captioner.caption, _where(captioner)


def _where(model: Any) -> dict[str, Any]:
    return {name: getattr(model, name) for name in ("backend", "device", "device_reason", "batch_size")}


def _time(run: Callable[[UInt8], Any], size: int, batch_size: int) -> tuple[int, float]:
    """Images timed, and images per second."""
    random = np.random.default_rng(0)
    painted = np.stack([compose_tile(random, size).image for _ in range(min(_PAINTED, batch_size))])
    run(painted[:1])  # the first run allocates
    # As many as a segment of a run has, if they take no longer than people wait.
    begin = time.perf_counter()
    run(painted)
    seconds, done = time.perf_counter() - begin, len(painted)
    more = min(4 * batch_size, int(_PATIENCE / max(seconds / done, 1e-6)))
    if more > done:
        begin = time.perf_counter()
        run(painted[np.arange(more) % len(painted)])
        seconds, done = time.perf_counter() - begin, more
    return done, float(f"{done / max(seconds, 1e-9):.3g}")


def _guessed_bytes(manifest: Manifest, batch_size: int) -> int:
    """Weights twice, as files and unpacked, and twice what the graphs give for a batch."""
    weights = sum(ref.size for ref in dict.fromkeys(manifest.files))
    outputs = [tensor for graph in manifest.graphs.values() for tensor in graph.outputs]
    values = sum(
        math.prod(side for side in tensor.shape if isinstance(side, int)) * np.dtype(tensor.dtype).itemsize
        for tensor in outputs
    )
    return 2 * weights + 2 * batch_size * values
