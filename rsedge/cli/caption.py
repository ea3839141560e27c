"""``rsedge caption``: scenes → one caption per tile, in map coordinates."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rsedge.cli import options
from rsedge.cli.progress import tile_progress

if TYPE_CHECKING:
    from rsedge.runtime.captioner import Captioner
    from rsedge.runtime.options import DecodingOptions
    from rsedge.runtime.pipeline import Summary

SOME_TILES_FAILED = 3


@click.command("caption")
@click.argument("scenes", nargs=-1, required=True)
@options.bundle
@click.option("-o", "--output", help="File, or - for stdout.  [default: SCENE.geojson in this folder]")
@click.option("--format", "file_format", help="geojson, geojsonl or csv.  [default: by the suffix; geojsonl for -]")
@options.generation
@options.tiling
@options.device
@options.threads
@options.batch_size
@options.overwrite
@options.as_json
@options.config
@click.pass_context
def command(
    ctx: click.Context,
    /,
    scenes: tuple[str, ...],
    model: Path | None,
    output: str | None,
    file_format: str | None,
    tile_size: int,
    overlap: int,
    edge: Any,
    max_nodata: float,
    bands: tuple[int, int, int] | None,
    boa_offset: int | None,
    nodata: float | None,
    readers: int,
    device: str,
    threads: int | None,
    batch_size: int | None,
    overwrite: bool,
    as_json: bool,
    **generation: Any,
) -> int:
    """Caption every tile of each SCENE, any raster GDAL reads.

    The output appears when it is whole; until then finished tiles are kept in OUTPUT.journal, and the same
    command goes on after an interruption. Tiles that cannot be read are recorded, and the exit code is 3.
    """
    from contextlib import ExitStack

    from rsedge.runtime.captioner import Captioner
    from rsedge.runtime.pipeline import run
    from rsedge.runtime.scene import Scene

    with ExitStack() as stack:
        opened = [
            stack.enter_context(Scene.open(scene, bands=bands, boa_offset=boa_offset, nodata=nodata))
            for scene in scenes
        ]
        if output is None:
            if len(opened) > 1:
                message = f"{len(opened)} scenes go into one output: name it with -o, such as -o all.geojson"
                raise click.UsageError(message)
            output = f"{opened[0].name}.geojson"
        for scene in opened:
            options.note(f"{scene.name}: {scene.width} x {scene.height} px, {scene.bands_reason}; {scene.rule}")
        bundle = options.chosen_bundle(model)
        captioner = Captioner.load(bundle, device=device, threads=threads, batch_size=batch_size)
        task = captioner.with_options(**generation)
        settings = {
            **dataclasses.asdict(task.options),
            "device": captioner.device,
            "batch_size": captioner.batch_size,
        }
        with _resumable(output), tile_progress() as progress:
            summary = run(
                opened,
                task,
                output,
                tile_size=tile_size,
                overlap=overlap,
                edge=edge,
                max_nodata=max_nodata,
                readers=readers,
                format=file_format,
                overwrite=overwrite,
                settings=settings,
                progress=progress,
            )
    if output != "-":
        _save_config(ctx, Path(output), captioner, task.options, bundle)
    _report(summary, captioner, as_json=as_json)
    return SOME_TILES_FAILED if summary.read_errors else 0


@contextmanager
def _resumable(output: str) -> Iterator[None]:
    """On an interruption say what was kept."""
    try:
        yield
    except KeyboardInterrupt:
        journal = Path(f"{output}.journal")
        if output != "-" and journal.exists():
            click.echo(f"\nfinished tiles are in {journal}; the same command goes on from there", err=True)
        raise


def _save_config(
    ctx: click.Context, output: Path, captioner: Captioner, options_used: DecodingOptions, bundle: Path
) -> None:
    """Keep the resolved options beside the output, in a file that ``--config`` takes for the very same run."""
    from rsedge.errors import OutputError
    from rsedge.tomlfile import write_toml

    used = dataclasses.asdict(options_used)
    # Naming what has no part in the search chosen would be refused, as on the command line.
    idle = {"do_sample"}
    idle |= {"num_beams"} if options_used.do_sample else {"temperature", "top_k", "top_p", "seed"}
    idle |= {"length_penalty", "early_stopping"} if options_used.num_beams == 1 else set()
    resolved = {name: None if name in idle else value for name, value in used.items()}
    values = {**ctx.params, **resolved, "device": captioner.device, "batch_size": captioner.batch_size}
    # The default model may be another tomorrow.
    values |= {"output": str(output), "model": str(bundle)}
    path = output.with_name(f"{output.name}.config.toml")
    try:
        write_toml(path, options.to_config(ctx.command, values))
    except OSError as error:
        raise OutputError(f"{output} is whole, but {path} cannot be written: {error.strerror}; move it away") from error


def _report(summary: Summary, captioner: Captioner, *, as_json: bool) -> None:
    """What was done: JSON on stdout (on stderr beside data), else a line on stderr."""
    for warning in summary.warnings:
        logging.getLogger("rsedge").warning("Warning: %s", warning)
    if as_json:
        values = {**summary.to_dict(), "device": captioner.device, "device_reason": captioner.device_reason}
        click.echo(json.dumps(values), err=summary.output == "-")
        return
    kept = f", {summary.resumed_tiles} of them from the interrupted run" if summary.resumed_tiles else ""
    parts = [f"{summary.ok} captions", f"{summary.nodata} without data", f"{summary.read_errors} unreadable"]
    options.note(
        f"{summary.output}: {summary.tiles} tiles ({', '.join(parts)}){kept}; "
        f"{summary.seconds:.1f} s, {summary.tiles_per_second} tiles/s on {captioner.device}"
    )
