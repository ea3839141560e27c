"""``rsedge info``: describe a scene or a bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rsedge.cli import options
from rsedge.cli.say import say, say_json, warn

if TYPE_CHECKING:
    from rsedge.runtime.diagnostics.describe import Estimate
    from rsedge.runtime.run.sources import TileOptions
    from rsedge.runtime.scenes.scene import Scene

Rows = Iterator[tuple[str, str]]


@click.command("info")
@click.argument("targets", nargs=-1, required=True)
@options.bundle
@options.option(
    "--no-probe", is_flag=True, help="Do not measure the model: no expected time, and a rougher estimate of memory."
)
@options.tiling
@options.device
@options.backend
@options.threads
@options.batch_size
@options.config
@options.option("--json", "as_json", is_flag=True, help="Print a line of JSON per scene or bundle.")
def command(
    targets: tuple[str, ...],
    model: Path | None,
    no_probe: bool,
    device: str,
    backend: str,
    threads: int | None,
    batch_size: int | None,
    as_json: bool,
    **reading: Any,
) -> int:
    """Describe each TARGET: a scene, as for rsedge caption, or a bundle, NAME.rsedge.

    For a scene the command shows its bands, rendering, tiles and warnings, and estimates the time and memory of a run.
    The estimate measures the chosen model on generated tiles for a few seconds. The exit code is 1 if a target is
    unreadable.
    """
    from rsedge.errors import RsedgeError
    from rsedge.runtime.diagnostics.describe import describe_bundle, describe_scene, is_bundle

    scene_options, tile_options = options.take(reading, options.OF_SCENES), options.take(reading, options.OF_TILES)
    chosen = {"device": device, "backend": backend, "threads": threads, "batch_size": batch_size}
    worst, probes, shown = 0, _Probes(model, {**chosen, "measure": not no_probe}), 0
    for target in targets:
        try:
            if is_bundle(target):
                found = [describe_bundle(target)]
            else:
                from rsedge.runtime.run.sources import TileOptions
                from rsedge.runtime.scenes.opening import open_scenes

                tiling = TileOptions(**tile_options)
                scenes = open_scenes([target], stdin=options.standard_input([target]), **scene_options)
                found = [describe_scene(scene, tiling, probes.estimate(scene, tiling)) for scene in scenes]
        except RsedgeError as error:
            say(f"Error: {error}", err=True)
            worst = max(worst, error.exit_code)
            continue
        for description in found:
            if as_json:
                say_json(description)
            else:
                say(("\n" if shown else "") + "\n".join(_lines(description)))
            shown += 1
    return worst


class _Probes:
    """The model of the estimates, measured once."""

    def __init__(self, model: Path | None, chosen: Mapping[str, Any]) -> None:
        self._model, self._chosen = model, chosen
        self._estimate: Callable[[Scene, TileOptions], Estimate] | None = None
        self._failed = False

    def estimate(self, scene: Scene, tiling: TileOptions) -> Estimate | None:
        """Estimate a run over ``scene``; return None, with one warning, if the bundle is unusable."""
        from rsedge.errors import BundleError
        from rsedge.runtime.diagnostics.describe import measure_model

        if self._estimate is None and not self._failed:
            try:
                self._estimate = measure_model(options.chosen_bundle(self._model), **self._chosen)
            except BundleError as error:
                self._failed = True
                warn(f"no estimate of time and memory: {error}")
        return self._estimate(scene, tiling) if self._estimate else None


# As text


def _lines(description: Mapping[str, Any]) -> Iterator[str]:
    """Yield a heading, then a line per fact."""
    rows = _scene_rows(description) if description["kind"] == "scene" else _bundle_rows(description)
    yield f"{description['kind']} {description['name']}"
    for name, text in rows:
        yield f"  {name:<12} {text}"


def _scene_rows(scene: Mapping[str, Any]) -> Rows:
    yield "source", scene["source"]
    yield "driver", f"{scene['driver']}, {scene['band_count']} band{'s' * (scene['band_count'] != 1)}, {scene['dtype']}"
    size = f"{scene['width']} x {scene['height']} px"
    if scene["resolution"]:
        across, down = (f"{value:g}" for value in scene["resolution"])
        size += f", {across if across == down else f'{across} x {down}'} {scene['unit'] or 'map units'} per pixel"
    yield "size", size + (f", resampled: {scene['resampled']}" if scene["resampled"] else "")
    yield "CRS", scene["crs"] or "none: tiles have pixel coordinates only"
    if scene["bbox"]:
        yield "bbox", "{:.5f} {:.5f} to {:.5f} {:.5f} (west south to east north)".format(*scene["bbox"])
    yield "bands", scene["bands_reason"]
    yield "values", f"{scene['pixel_values']}: {scene['rule_reason']}"
    yield "rendering", scene["rule"]
    values = [value or "none" for value in scene["nodata"]]
    parts = [values[0] if len(set(values)) == 1 else f"{', '.join(values)} per band"] if values else []
    parts += [scene["mask"]] if scene["mask"] else []
    yield "no data", " and ".join(parts) or "no value and no mask declared"
    yield "clouds", scene["clouds"] or "not known"
    yield "time", scene["datetime"] or "not known"
    if scene["mgrs_tile"] or scene["product_id"]:
        named = scene["product_id"], scene["mgrs_tile"] and f"tile {scene['mgrs_tile']}"
        yield "product", ", ".join(filter(None, named))
    tiles = scene["tiles"]
    overlap = f", {tiles['overlap']} px shared" if tiles["overlap"] else ""
    part = tiles["total"] - tiles["whole"]
    cut = f"{tiles['whole']} whole, {part} at the edge" if part else "whole"
    yield "tiles", f"{tiles['total']} of {tiles['tile_size']} px ({tiles['rows']} x {tiles['cols']}; {cut}{overlap})"
    if scene["estimate"]:
        yield from _estimate_rows(scene["estimate"])
    for warning in scene["warnings"]:
        yield "warning", warning


def _estimate_rows(estimate: Mapping[str, Any]) -> Rows:
    runs = f"with {estimate['backend']} on {estimate['device']} ({estimate['device_reason']})"
    yield "model", f"{estimate['model']} " + (runs if estimate["device"] else f"cannot run here: {estimate['problem']}")
    if estimate["seconds"] is not None:
        rate = f"{estimate['tiles_per_second']:g} tiles/s on {estimate['measured_images']} generated tiles"
        text = f"{_duration(estimate['seconds'])} to {estimate['does']}, at {rate}; more if reading is slower"
        yield "time about", text
    parts = {"process": "process", "reader cache": "reader_cache", "tiles read ahead": "tiles", "model": "model"}
    detail = ", ".join(f"{name} {_size(estimate[f'{key}_bytes'])}" for name, key in parts.items())
    yield "memory about", f"{_size(estimate['memory_bytes'])}: {detail}"


def _bundle_rows(bundle: Mapping[str, Any]) -> Rows:
    yield "path", bundle["path"]
    version = f"format version {bundle['format_version']}"
    yield "model", f"{bundle['model']}: {bundle['family']}, {bundle['precision']}, {version}"
    if bundle["summary"]:
        yield "card", bundle["summary"]
    if bundle["labels"]:
        yield "labels", ", ".join(bundle["labels"])
    yield "licence", bundle["licence"] or "not stated"
    yield "trained on", bundle["domain"] or "not stated"
    image = bundle["image"]
    yield "image", f"{image['size']} px, {', '.join(image['bands'])}, {image['resample']}"
    mean, std = (", ".join(f"{value:g}" for value in image[name]) for name in ("mean", "std"))
    yield "mean, std", f"{mean}; {std}"
    if image["reflectance"]:
        yield "reflectance", str(image["reflectance"].get("formula") or _pairs(image["reflectance"]))
    yield "files", f"{_size(bundle['bytes'])} in all; every hash matches the manifest"
    for graph in bundle["graphs"]:
        size = f"{_size(graph['bytes'])}, opset {graph['opset']}, sha256 {graph['sha256'][:12]}…"
        yield f"graph {graph['role']}", f"{graph['file']}, {size}"
        yield "", f"in:  {'; '.join(graph['inputs'])}"
        yield "", f"out: {'; '.join(graph['outputs'])}"
    for name in ("tokens", "generation", "decoder", "embedding"):
        if part := bundle[name]:
            yield name, _pairs(part)
    if bundle["tokenizer"]:
        yield "tokenizer", f"{bundle['tokenizer']['file']}, {_size(bundle['tokenizer']['size'])}"
    source = bundle["provenance"]
    revision = f" at {source['source_revision']}" if source["source_revision"] else ""
    yield "from", f"{source['source']}{revision}, exported {source['exported_at']}"
    yield "", f"weights sha256 {source['source_sha256']}"
    yield "", _pairs(source["versions"])
    if source["recipe"]:
        yield "recipe", _pairs(_flat(source["recipe"]))
    yield "parity", _pairs(_flat(bundle["parity"])) or "no report"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested objects to names such as ``captions.equal``."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else "under 1 s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _size(count: int) -> str:
    unit, name = next(((u, n) for u, n in ((2**30, "GiB"), (2**20, "MiB")) if count >= u), (2**10, "KiB"))
    return f"{count / unit:.3g} {name}" if count < 1000 * unit else f"{count / unit:.0f} {name}"
