"""How long a run over a scene will take and how much memory, from a short measurement: an estimate and no more."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rsedge import host
from rsedge.bundle import read_bundle
from rsedge.errors import BackendError
from rsedge.runtime.demo.scene import compose_tile
from rsedge.runtime.scenes.readahead import cache_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rsedge.bundle import Manifest
    from rsedge.pixels import UInt8
    from rsedge.runtime.run.sources import TileOptions
    from rsedge.runtime.scenes.scene import Scene

_PAINTED = 8  # generated tiles: enough for captions of different lengths
_PATIENCE = 3.0  # seconds a measurement may take once it has begun, one batch at least
_BARE = 150 * 2**20  # Python with the libraries of a run, where the system does not tell
_AHEAD = 96  # tiles that wait for the model, as a run reads them


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """The time and memory that a run over one scene will take."""

    model: str
    """``name@hash12``."""
    does: str
    """``caption`` or ``embed``."""
    backend: str | None
    """``onnxruntime`` or ``tensorrt``; None, as the three that follow, where the model cannot run."""
    device: str | None
    device_reason: str | None
    batch_size: int | None
    """Images computed together."""
    tiles_per_second: float | None
    """The measured rate, or None where nothing was measured."""
    measured_images: int
    """Generated images it rests on; 0 where nothing was measured."""
    seconds: float | None
    """Wall time of the model's part, or None; reading runs beside it and counts only where it is slower."""
    reader_cache_bytes: int
    """Cache of decoded blocks."""
    tiles_bytes: int
    """Tiles that wait for the model."""
    model_bytes: int
    """Memory that the model takes at work; on CUDA what it takes of the host's."""
    process_bytes: int
    """Memory of the process without the model."""
    memory_bytes: int
    """All of these."""
    problem: str | None
    """Why the model cannot run here, or None."""


def measure_model(
    path: str | Path,
    *,
    device: str = "auto",
    backend: str = "auto",
    threads: int | None = None,
    batch_size: int | None = None,
    measure: bool = True,
) -> Callable[[Scene, TileOptions], Estimate]:
    """Load a bundle, time it on generated tiles for a few seconds, and return what estimates runs with it.

    Args:
        path: A bundle of any family.
        device, backend, threads, batch_size: As ``Captioner.load`` takes them.
        measure: Whether to run it; else only where it would run is found out.

    Returns:
        A function of a scene and how it is cut. It raises OptionError where the options leave no tile. A device that
        cannot be used is a ``problem`` of its estimates.

    Raises:
        BundleError: The bundle is damaged.
        OptionError: A value that is not accepted.
    """
    # 1. The process as it is, without the model.
    bundle = read_bundle(path)
    manifest = bundle.manifest
    host.forget_memory_peak()  # what came before is no part of the model's
    before = host.memory_now() or _BARE
    known: dict[str, Any] = dict.fromkeys(("backend", "device", "device_reason", "batch_size", "tiles_per_second"))
    known |= {"model": bundle.model, "does": "embed" if manifest.generation is None else "caption"}
    known |= {"process_bytes": before, "measured_images": 0, "problem": None}

    # 2. Where the model runs. Its libraries are imported here, so that they count as the model's.
    from rsedge.runtime.captioner import Captioner
    from rsedge.runtime.embedder import Embedder

    where: dict[str, Any] = {"device": device, "backend": backend, "threads": threads, "batch_size": batch_size}
    model: Captioner | Embedder
    try:
        model = (Embedder if manifest.generation is None else Captioner).load(bundle.path, **where)
    except BackendError as error:
        known |= {"problem": str(error), "model_bytes": _guessed_bytes(manifest, batch_size or 16)}
        return partial(_estimate, known, manifest.image.size)
    known |= {name: getattr(model, name) for name in ("backend", "device", "device_reason", "batch_size")}
    known["model_bytes"] = _guessed_bytes(manifest, model.batch_size)

    # 3. How fast it is, and the memory that it takes.
    if measure:
        run: Callable[[UInt8], Any] = model.caption if isinstance(model, Captioner) else model.embed_images
        known["measured_images"], known["tiles_per_second"] = _time(run, manifest.image.size, model.batch_size)
        if peak := host.memory_peak():
            known["model_bytes"] = max(peak - before, 0)
    return partial(_estimate, known, manifest.image.size)


def _estimate(known: Mapping[str, Any], image_size: int, scene: Scene, options: TileOptions) -> Estimate:
    grid = options.grid(scene)
    ahead = max(_AHEAD // grid.cols, options.readers) + 2  # with the row that is taken from and the one being read
    sides = {grid.tile_size, image_size}
    tiles = min(ahead * grid.cols, len(grid)) * sum(3 * side**2 for side in sides)
    cache = cache_bytes(scene, grid)
    rate = known["tiles_per_second"]
    return Estimate(
        **known,
        seconds=round(len(grid) / rate, 1) if rate else None,
        reader_cache_bytes=cache,
        tiles_bytes=tiles,
        memory_bytes=cache + tiles + known["model_bytes"] + known["process_bytes"],
    )


def _time(run: Callable[[UInt8], Any], size: int, batch_size: int) -> tuple[int, float]:
    """Return how many images were timed, and images per second."""
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
