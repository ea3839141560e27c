"""Descriptions of scenes and bundles, with an estimate of a run: the findings of ``rsedge info``."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rsedge import host
from rsedge.bundle import read_bundle
from rsedge.errors import BackendError
from rsedge.runtime.scenes.products.product import PER_BAND
from rsedge.runtime.scenes.tiles import Tile, TileGrid

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rsedge.bundle import Manifest, TensorSpec
    from rsedge.pixels import UInt8
    from rsedge.runtime.run.sources import TileOptions
    from rsedge.runtime.scenes.scene import Scene

_CARD_BYTES = 1 << 20  # of a model card; the summary is at its beginning
_PAINTED = 8  # generated tiles: enough for captions of different lengths
_PATIENCE = 3.0  # seconds of a measurement, at least one batch
_BARE = 150 * 2**20  # Python with the libraries of a run, where the system does not tell
_AHEAD = 96  # tiles that wait for the model in a run


# ---- scenes ----


def describe_scene(scene: Scene, options: TileOptions, estimate: Estimate | None = None) -> dict[str, Any]:
    """Return a scene as JSON values, as a run with ``options`` would read it; no pixel is read.

    Raises:
        OptionError: The options leave no tile.
    """
    rule, crs, transform = scene.reflectance, scene.crs, scene.transform
    resolution = unit = bbox = None  # without a geotransform, without a CRS, without either
    if not transform.is_identity:
        sides = math.hypot(transform.a, transform.d), math.hypot(transform.b, transform.e)
        resolution = tuple(float(f"{side:.9g}") for side in sides)
    if crs:
        unit = "degree" if crs.is_geographic else str(crs.linear_units)
        bbox = _bbox(scene) if resolution else None
    known = any(value is not None for value in scene.nodata)
    return {
        "kind": "scene",
        "name": scene.name,
        "source": scene.source,
        "driver": scene.driver,
        "width": scene.width,
        "height": scene.height,
        "band_count": scene.band_count,  # bands in the file, used or not
        "dtype": scene.dtype,
        "crs": crs.to_string() if crs else None,
        "resolution": resolution,  # size of a pixel along columns and rows, in ``unit``
        "unit": unit,
        "bbox": bbox,  # west, south, east, north in WGS 84; west > east across the antimeridian
        "bands": scene.bands,
        "bands_reason": scene.bands_reason,
        "pixel_values": scene.rendering.values,
        "boa_offset": rule.boa_offset if rule else None,
        "full_scale": rule.full_scale if rule else None,  # digital number that becomes 255
        "rule": scene.rule,
        "rule_reason": scene.rendering_reason,
        # As text, because JSON has no nan; empty if no band has a value.
        "nodata": tuple(None if value is None else f"{value:g}" for value in scene.nodata) if known else (),
        "mask": _mask(scene),
        "clouds": scene.clouds.describe() if scene.clouds else None,
        "resampled": scene.resampled,
        "datetime": scene.datetime,
        "product_id": scene.product_id,
        "mgrs_tile": scene.mgrs_tile,
        "files": len(scene.files),
        "tiles": describe_grid(options.grid(scene)),
        "estimate": estimate and dataclasses.asdict(estimate),
        "warnings": scene.warnings,
    }


def _mask(scene: Scene) -> str | None:
    """Return which mask tells where a scene has no data, or None."""
    if scene.mask_file is not None:
        return f"{scene.mask_file.path}" + (", of each band" if scene.mask_file.band == PER_BAND else "")
    names = {None: None, 0: "mask", PER_BAND: "masks of the bands"}
    return names.get(scene.mask_band, f"alpha, band {scene.mask_band}")


def describe_grid(grid: TileGrid) -> dict[str, Any]:
    """Return the tiling of a scene as JSON values; ``whole`` counts the tiles that lie wholly in the scene."""
    wide = sum(grid.tile(col).width == grid.tile_size for col in range(grid.cols))
    high = sum(grid.tile(row * grid.cols).height == grid.tile_size for row in range(grid.rows))
    values = {name: getattr(grid, name) for name in ("tile_size", "overlap", "edge", "rows", "cols")}
    return {**values, "total": len(grid), "whole": wide * high}


def _bbox(scene: Scene) -> tuple[float, float, float, float] | None:
    """Return the box of a scene as in RFC 7946; None if a corner is outside the projection."""
    (geometry,) = scene.footprints([Tile(0, 0, 0, 0, 0, scene.width, scene.height)])
    if geometry is None:
        return None
    polygons = geometry["coordinates"] if geometry["type"] == "MultiPolygon" else [geometry["coordinates"]]
    boxes = []
    for (ring,) in polygons:
        lon, lat = zip(*ring, strict=True)
        boxes.append((min(lon), min(lat), max(lon), max(lat)))
    wests, souths, easts, norths = zip(*boxes, strict=True)
    west, east = min(wests), max(easts)
    if len(boxes) > 1:  # some parts end at 180, the others begin at -180
        west, east = min(w for w in wests if w > -180), max(e for e in easts if e < 180)
    return west, min(souths), east, max(norths)


# ---- estimates ----


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Expected time and memory of a run over one scene."""

    model: str
    """``name@hash12``."""
    does: str
    """``caption`` or ``embed``."""
    backend: str | None
    """``onnxruntime`` or ``tensorrt``; this and the next three are None if the model cannot run."""
    device: str | None
    device_reason: str | None
    batch_size: int | None
    tiles_per_second: float | None
    """The measured rate, or None without a measurement."""
    measured_images: int
    """Generated images of the measurement."""
    seconds: float | None
    """Wall time of the model, or None; reading runs beside it and counts only if it is slower."""
    reader_cache_bytes: int
    """Cache of decoded blocks."""
    tiles_bytes: int
    """Tiles that wait for the model."""
    model_bytes: int
    """Host memory of the model at work."""
    process_bytes: int
    """The process without the model."""
    memory_bytes: int
    """The sum of these."""
    problem: str | None
    """The reason if the model cannot run here."""


def measure_model(
    path: str | Path,
    *,
    device: str = "auto",
    backend: str = "auto",
    threads: int | None = None,
    batch_size: int | None = None,
    measure: bool = True,
) -> Callable[[Scene, TileOptions], Estimate]:
    """Load a bundle, time it on generated tiles for a few seconds, and return a function that estimates runs with it.

    Args:
        path: A bundle of any family.
        device, backend, threads, batch_size: As in ``Captioner.load``.
        measure: Whether to run the model; else only its device is determined.

    Returns:
        A function of a scene and its tiling. It raises OptionError if the options leave no tile. A device that cannot
        be used is a ``problem`` of its estimates.

    Raises:
        BundleError: The bundle is damaged.
        OptionError: A value is not accepted.
    """
    # 1. The process without the model.
    bundle = read_bundle(path)
    manifest = bundle.manifest
    host.forget_memory_peak()  # earlier memory is not the model's
    before = host.memory_now() or _BARE
    known: dict[str, Any] = dict.fromkeys(("backend", "device", "device_reason", "batch_size", "tiles_per_second"))
    known |= {"model": bundle.model, "does": "embed" if manifest.generation is None else "caption"}
    known |= {"process_bytes": before, "measured_images": 0, "problem": None}

    # 2. The device of the model. Its libraries are imported here, so that they count as the model's.
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

    # 3. Its speed and memory.
    if measure:
        run: Callable[[UInt8], Any] = model.caption if isinstance(model, Captioner) else model.embed_images
        known["measured_images"], known["tiles_per_second"] = _time(run, manifest.image.size, model.batch_size)
        if peak := host.memory_peak():
            known["model_bytes"] = max(peak - before, 0)
    return partial(_estimate, known, manifest.image.size)


def _estimate(known: Mapping[str, Any], image_size: int, scene: Scene, options: TileOptions) -> Estimate:
    from rsedge.runtime.scenes.readahead import cache_bytes

    grid = options.grid(scene)
    ahead = max(_AHEAD // grid.cols, options.readers) + 2  # and the row in use and the row being read
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
    """Return the number of timed images, and images per second."""
    from rsedge.runtime.demo.scene import compose_tile

    random = np.random.default_rng(0)
    painted = np.stack([compose_tile(random, size).image for _ in range(min(_PAINTED, batch_size))])
    run(painted[:1])  # the first run allocates
    # As many as in a segment of a run, unless that takes too long.
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
    """Return twice the weights, as files and unpacked, and twice the outputs of the graphs for a batch."""
    weights = sum(ref.size for ref in dict.fromkeys(manifest.files))
    outputs = [tensor for graph in manifest.graphs.values() for tensor in graph.outputs]
    values = sum(
        math.prod(side for side in tensor.shape if isinstance(side, int)) * np.dtype(tensor.dtype).itemsize
        for tensor in outputs
    )
    return 2 * weights + 2 * batch_size * values


# ---- bundles ----


def is_bundle(target: str) -> bool:
    """Return whether a target of ``rsedge info`` is a bundle, by its name or by the files in the folder."""
    path = Path(target)
    return path.name.endswith(".rsedge") or (path / "manifest.json").is_file()


def describe_bundle(path: str | Path) -> dict[str, Any]:
    """Check all files of a bundle against its manifest, and return the manifest and the card as JSON values.

    Raises:
        BundleError: The bundle is damaged; the message lists all faults.
    """
    bundle = read_bundle(path)
    manifest = bundle.manifest
    summary, licence, labels = _card(bundle.path)

    def part(name: str) -> dict[str, Any] | None:
        value = getattr(manifest, name)
        return None if value is None else dataclasses.asdict(value)

    def tensors(specs: tuple[TensorSpec, ...]) -> tuple[str, ...]:
        return tuple(f"{spec.name}: {spec.dtype} [{', '.join(map(str, spec.shape))}]" for spec in specs)

    return {
        "kind": "bundle",
        "path": str(bundle.path),
        "name": manifest.name,
        "model": bundle.model,
        "family": manifest.family,
        "precision": manifest.precision,
        "format_version": manifest.format_version,
        "sha256": bundle.hash,
        "bytes": sum(ref.size for ref in dict.fromkeys(manifest.files)),
        "image": part("image"),
        "graphs": [
            {
                "role": role,
                "file": graph.file,
                "bytes": sum(ref.size for ref in graph.files),  # with its external data
                "sha256": graph.sha256,
                "opset": graph.opset,
                "inputs": tensors(graph.inputs),  # such as ``pixels: uint8 [batch, 224, 224, 3]``
                "outputs": tensors(graph.outputs),
            }
            for role, graph in manifest.graphs.items()
        ],
        **{name: part(name) for name in ("tokens", "generation", "decoder", "embedding", "tokenizer", "provenance")},
        "parity": manifest.parity,
        "domain": manifest.domain.describe() if manifest.domain else None,
        "summary": summary,
        "licence": licence,
        "labels": labels,
    }


def _card(folder: Path) -> tuple[str | None, str | None, tuple[str, ...]]:
    """Return the first sentences of the card, and licence and tags of its front matter, a few lines of YAML."""
    path = folder / "README.md"
    try:
        # The manifest has no hash of it: it may be a pipe, endless, or a link to a file of the user.
        if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
            return None, None, ()
        with path.open("rb") as stream:
            text = stream.read(_CARD_BYTES).decode("utf-8", "ignore")
    except OSError:  # a bundle works without it
        return None, None, ()
    front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    paragraphs = (text[front.end() :] if front else text).split("\n\n")
    summary = next((part.strip() for part in paragraphs if part.strip() and not part.lstrip().startswith("#")), None)
    licence, labels, key = None, [], ""
    for line in front.group(1).splitlines() if front else []:
        if found := re.fullmatch(r"([\w-]+):\s*(.*)", line):
            key, value = found[1], found[2].strip("'\" ")
            licence = value or licence if key == "license" else licence
        elif key == "tags" and (entry := re.fullmatch(r"\s*-\s+(.+)", line)):
            labels.append(entry[1].strip("'\" "))
    return summary and " ".join(summary.split()), licence, tuple(labels)
