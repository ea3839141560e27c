"""``rsedge caption``: write a caption per tile of a scene, in map coordinates."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rsedge.cli import options, views
from rsedge.cli.outputs import report, resumable, save_config
from rsedge.cli.progress import tile_progress

if TYPE_CHECKING:
    from rsedge.runtime.decoding.options import DecodingOptions
    from rsedge.runtime.run.pipeline import EmbeddingsOutput


@click.command("caption")
@click.argument("scenes", nargs=-1, required=True)
@options.bundle
@click.option("-o", "--output", help="Output file, or - for stdout.  [default: SCENE.geojson in this folder]")
@click.option(
    "--format", "file_format", help="geojson, geojsonl, gpkg, csv or parquet.  [default: by the suffix; geojsonl for -]"
)
@click.option(
    "--embed", "embeddings", help="Write embeddings of the same tiles too, as GeoParquet. Each pixel is read once."
)
@click.option("--embedder", type=click.Path(path_type=Path), help="Bundle that computes the embeddings, CLIP.rsedge.")
@options.embedding_type
@views.html
@views.sheet
@views.stac
@views.style
@options.generation
@options.tiling
@options.device
@options.backend
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
    embeddings: str | None,
    embedder: Path | None,
    dtype: Any,
    html: Path | None,
    sheet: Path | None,
    stac: Path | None,
    style: bool,
    device: str,
    backend: str,
    threads: int | None,
    batch_size: int | None,
    overwrite: bool,
    as_json: bool,
    **others: Any,
) -> int:
    """Write a caption for every tile of each SCENE.

    A SCENE is a raster (GeoTIFF, JP2 …), a Sentinel-2 product (.SAFE or its zip), a folder of band files, a STAC item
    or collection of items, or a folder or pattern of these. - reads STAC from standard input.

    The output file appears when the run is complete. Until then OUTPUT.journal holds the finished tiles, and the same
    command continues an interrupted run. Unreadable tiles become records with an error, and the exit code is 3.
    With --embed the run also computes embeddings of the same tiles; that file contains the captions too.
    """
    from rsedge.runtime.captioner import Captioner
    from rsedge.runtime.run.pipeline import run

    if (embeddings is None) != (embedder is None) or (dtype is not None and embeddings is None):
        message = "--embed FILE.parquet and --embedder BUNDLE go together, and --dtype needs both: pass all, or none"
        raise click.UsageError(message)
    scene_options, tiling = options.take(others, options.OF_SCENES), options.take(others, options.OF_TILES)
    opened = options.open_scenes(scenes, [output, html, sheet, stac], **scene_options)
    output = options.chosen_output(output, opened, ".geojson")
    bundle = options.chosen_captioner(model)
    engine: dict[str, Any] = {"device": device, "backend": backend, "threads": threads, "batch_size": batch_size}
    captioner = Captioner.load(bundle, **engine, num_beams=others["num_beams"], max_new_tokens=others["max_new_tokens"])
    task = captioner.with_options(**others)
    beside, encoder = _embeddings(embeddings, embedder, dtype, engine)
    targets = views.targets(opened, output, html=html, sheet=sheet, style=style, overwrite=overwrite)
    if stac:
        files = {"report": html, "sheet": sheet, "embeddings": Path(embeddings) if embeddings else None}
        targets.append(views.item(stac, opened, captioner.model, output, files, file_format=file_format))
    used = {"device": captioner.device, "backend": captioner.backend, "batch_size": captioner.batch_size}
    with resumable(output), tile_progress() as progress:
        summary = run(
            opened,
            task,
            output,
            format=file_format,
            embeddings=beside,
            beside=targets,
            overwrite=overwrite,
            settings={**dataclasses.asdict(task.options), **used, "embedder": encoder},
            progress=progress,
            **tiling,
        )
    if output != "-":
        # The default model may change, so the file names the bundle.
        resolved = {**_search_options(task.options), **used, "model": str(bundle), "dtype": beside and beside.dtype}
        save_config(ctx, Path(output), resolved)
    return report(summary, "captions", captioner.device, captioner.device_reason, as_json=as_json)


def _embeddings(
    path: str | None, bundle: Path | None, dtype: Any, engine: Mapping[str, Any]
) -> tuple[EmbeddingsOutput | None, dict[str, Any] | None]:
    """Return the output of ``--embed`` and ``--embedder``, and the settings that the embeddings depend on."""
    if path is None or bundle is None:
        return None, None
    from rsedge.runtime.embedder import Embedder
    from rsedge.runtime.run.pipeline import EmbeddingsOutput

    embedder = Embedder.load(options.chosen_embedder(bundle), **engine)
    output = EmbeddingsOutput(path=path, embedder=embedder, dtype=dtype or "float16")
    return output, {"device": embedder.device, "backend": embedder.backend, "batch_size": embedder.batch_size}


def _search_options(used: DecodingOptions) -> dict[str, Any]:
    """Return the decoding options as flags. Options that the chosen search does not use are None: a command refuses
    them.
    """
    idle = {"do_sample"}
    idle |= {"num_beams"} if used.do_sample else {"temperature", "top_k", "top_p", "seed"}
    idle |= {"length_penalty", "early_stopping"} if used.num_beams == 1 else set()
    return {name: None if name in idle else value for name, value in dataclasses.asdict(used).items()}
