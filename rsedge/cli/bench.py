"""``rsedge bench``: measure the speed of a bundle on this machine, stage by stage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rsedge.cli import options
from rsedge.cli.say import note, say

if TYPE_CHECKING:
    from rsedge.runtime.diagnostics.benchmark import BenchmarkReport, Spread
    from rsedge.runtime.scenes.scene import Scene


@click.command("bench")
@options.bundle
@options.option("--scene", "scene_name", help="Scene to read, exactly one.  [default: a generated scene]")
@options.option(
    "--batch-size",
    "batch_sizes",
    type=click.IntRange(1, 64),
    multiple=True,
    help="Images per batch; repeat it to compare several.  [default: 1, 4, 16 on CPU; on CUDA a quarter of the usual "
    "number, that number and twice as many; at most 64, the tiles of a segment]",
)
@options.option(
    "--seconds", type=click.FloatRange(min=0, min_open=True), help="Duration of the measurement.  [default: 30]"
)
@options.option("--tiles", type=options.AT_LEAST_1, help="Tiles per round, at least one batch, instead of a duration.")
@options.option("--rounds", type=options.AT_LEAST_1, default=3, help="Rounds per figure.")
@options.generation
@options.tiling
@options.device
@options.backend
@options.threads
@options.config
@options.option("-o", "--output", type=options.NEW_FILE, help="Write the report to FILE.json.")
@options.overwrite
@options.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    model: Path | None, scene_name: str | None, output: Path | None, overwrite: bool, as_json: bool, **others: Any
) -> None:
    """Measure a bundle on this machine: tiles per second per batch size, milliseconds per stage, memory.

    The command measures the model alone in rounds over all batch sizes, then reading alone, then whole runs with
    reading and writing. It discards the first runs. Figures are medians over rounds, with the lowest and the highest
    value. The measurement takes longer than --seconds if one batch of each size per round already does.
    """
    import json
    from contextlib import ExitStack

    from rsedge.errors import OptionError, OutputError
    from rsedge.runtime.diagnostics.benchmark import benchmark
    from rsedge.runtime.outputs.files import check_target, write_bytes

    if output is not None:
        check_target(output)
        if output.exists() and not overwrite:
            raise OutputError(f"{output} exists already: pass --overwrite to replace it, or choose another output")
    opening = options.take(others, options.OF_SCENES)
    with ExitStack() as stack:
        scene = None if scene_name is None else stack.enter_context(_scene(scene_name, opening))
        if scene is None and (useless := options.given(opening)):
            text = "only for a scene that --scene names; add --scene, or leave them out"
            raise OptionError(f"{', '.join(useless)}: {text}")
        found = benchmark(options.chosen_bundle(model), scene=scene, say=note, **others)
    text = json.dumps(found.to_dict(), indent=2, allow_nan=False) + "\n"
    say(
        text if as_json else "\n".join(_lines(found)), nl=not as_json
    )  # printed first, so that a failing write loses nothing
    if output is not None:
        write_bytes(output, text.encode())


def _scene(name: str, opening: dict[str, Any]) -> Scene:
    from rsedge.errors import OptionError

    scenes = options.open_scenes([name], **opening)
    if len(scenes) != 1:
        raise OptionError(f"{name} holds {len(scenes)} scenes: pass one of them to --scene")
    return scenes[0]


def _lines(found: BenchmarkReport) -> Iterator[str]:
    machine, scene = found.machine, found.scene
    yield f"{found.model}: {found.family}, {found.precision}; {found.backend} on {found.device} ({found.device_reason})"
    if found.decoding:
        names = ("temperature", "top_k", "top_p") if found.decoding["do_sample"] else ("num_beams",)
        chosen = [f"{name} {found.decoding[name]:g}" for name in (*names, "min_new_tokens", "max_new_tokens")]
        yield f"decoding: {', '.join(chosen)}"
    features = f" ({', '.join(machine['instructions'])})" if machine["instructions"] else ""
    load = "not known" if machine["load"] is None else machine["load"]
    yield f"{machine['cpu']}, {machine['cores']} cores{features}, {found.threads} threads; load before: {load}"
    yield from machine["gpus"]
    yield ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    made = "generated scene" if scene["generated"] else scene["name"]
    yield (
        f"{made}: {scene['width']} x {scene['height']} px, {scene['tiles']} tiles of {scene['tile_size']} px; "
        f"{found.rounds} rounds, medians (lowest to highest)"
    )
    yield ""
    yield "batch size   tiles/s, model alone"
    for batch in found.batches:
        rate = "does not fit into memory" if batch.tiles_per_second is None else _spread(batch.tiles_per_second)
        best = "   fastest" if batch.batch_size == found.batch_size and len(found.batches) > 1 else ""
        yield f"{batch.batch_size:10}   {rate}{best}"
    yield ""
    yield "stage              ms/tile"
    for stage in found.stages:
        note = "   beside the model" if stage.runs == "beside" else ""
        calls = f"   {stage.calls} for {stage.tiles} tiles" if stage.name == "decode steps" else ""
        yield f"{stage.name:16}   {_spread(stage.ms_per_tile)}{note}{calls}"
    yield ""
    ratio = f"{found.whole_ratio.median:.3f} times what the model alone takes"
    yield f"with reading and writing   {_spread(found.whole_tiles_per_second)} tiles/s, {ratio}"
    yield f"peak memory                {_megabytes(found.peak_memory_mb)}" + (
        f", of the GPU {_megabytes(found.device_memory_mb)}" if found.device_memory_mb else ""
    )


def _spread(values: Spread) -> str:
    return f"{values.median:.4g} ({values.lowest:.4g} to {values.highest:.4g})"


def _megabytes(count: float | None) -> str:
    return "not known" if count is None else f"{count:.0f} MB"
