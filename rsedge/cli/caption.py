"""``rsedge caption``: write a caption per tile of a scene, in map coordinates."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rsedge.cli import options
from rsedge.cli.say import report, tile_progress

if TYPE_CHECKING:
    from rsedge.runtime.decoding.options import DecodingOptions


@click.command("caption")
@click.argument("scenes", metavar="SCENE|IMAGE|FOLDER...", nargs=-1, required=True)
@options.bundle
@options.option("-o", "--output", help="Output file, or - for stdout.  [default: SCENE.geojson in this folder]")
@options.option(
    "--format", "file_format", help="geojson, geojsonl, gpkg, csv or parquet.  [default: by the suffix; geojsonl for -]"
)
@options.option(
    "--embed", "embeddings", help="Write embeddings of the same tiles too, as GeoParquet. Each pixel is read once."
)
@options.option("--embedder", type=options.PATH, help="Bundle that computes the embeddings, CLIP.rsedge.")
@options.embedding_type
@options.image_kind
@options.views
@options.generation
@options.over_scenes()
def command(
    given: options.SceneRun,
    *,
    scenes: tuple[str, ...],
    output: str | None,
    file_format: str | None,
    embeddings: str | None,
    embedder: Path | None,
    dtype: Any,
    kind: Any,
    **decoding: Any,
) -> int:
    """Write a caption for every tile of each SCENE and for each whole IMAGE.

    A SCENE is a raster (GeoTIFF, JP2 …), a Sentinel-2 product (.SAFE or its zip), a folder of band files, a STAC item
    or collection of items, or a folder or pattern of these. - reads STAC from standard input. A picture, or a raster of
    at most 512 pixels a side, that has no place on a map is an IMAGE: one record, without geometry.

    The output file appears when the run is complete. Until then OUTPUT.journal holds the finished tiles, and the same
    command continues an interrupted run. Unreadable tiles become records with an error, and the exit code is 3.
    With --embed the run also computes embeddings of the same tiles; that file contains the captions too.
    """
    from rsedge.runtime.captioner import Captioner
    from rsedge.runtime.run.pipeline import EmbeddingsOutput, run
    from rsedge.runtime.scenes.scene import Scene

    if (embeddings is None) != (embedder is None) or (dtype is not None and embeddings is None):
        message = "--embed FILE.parquet and --embedder BUNDLE go together, and --dtype needs both: pass all, or none"
        raise click.UsageError(message)
    given.check_outputs(output, embeddings, file_format=file_format)
    views = options.given(("html", "sheet", "stac"))
    # The views show scenes, so files without a georeference are scenes too where one is wanted.
    wanted = kind if kind != "auto" else "scene" if views else "chip"
    found = options.open_inputs(scenes, wanted, given, [output, given.html, given.sheet, given.stac])
    opened = [entry for entry in found.entries if isinstance(entry, Scene)]
    if len(opened) < len(found.entries):
        if views:
            raise click.UsageError(f"{', '.join(views)}: for scenes, and there are images among the inputs; leave out")
        if output is None and len(found.entries) > 1:
            raise click.UsageError("captions of images need a named output: pass -o, such as -o captions.csv")
        if output is None:
            output = f"{Path(scenes[0]).stem}.geojson"
    output = options.chosen_output(output, opened, ".geojson")
    bundle = options.chosen_captioner(given.model)
    limits = {name: decoding[name] for name in ("num_beams", "max_new_tokens")}
    captioner = Captioner.load(bundle, **given.engine, **limits)
    task = captioner.with_options(**decoding)
    used, beside, encoder = options.used(captioner), None, None
    if embeddings is not None and embedder is not None:
        from rsedge.runtime.embedder import Embedder

        second = Embedder.load(options.chosen_embedder(embedder), **given.engine)
        beside = EmbeddingsOutput(path=embeddings, embedder=second, dtype=dtype or "float16")
        encoder = options.used(second)
    files = {"embeddings": Path(embeddings) if embeddings else None}
    targets = given.targets(opened, captioner.model, output, files, file_format=file_format)
    with tile_progress(output) as progress:
        summary = run(
            found.entries,
            task,
            output,
            format=file_format,
            embeddings=beside,
            beside=targets,
            overwrite=given.overwrite,
            settings={**dataclasses.asdict(task.options), **used, "embedder": encoder},
            progress=progress,
            **given.tiling,
        )
    if output != "-":
        # The default model may change, so the file names the bundle.
        resolved = {**_search_options(task.options), **used, "model": str(bundle), "dtype": beside and beside.dtype}
        images = {} if opened else dict.fromkeys(options.OF_SCENES_ALONE)
        options.save_config(Path(output), {**resolved, **images})
    summary = dataclasses.replace(summary, unopened=found.unopened)
    return report(
        summary,
        "captions",
        captioner.device,
        captioner.device_reason,
        as_json=given.as_json,
        others=[t.path for t in targets],
    )


def _search_options(used: DecodingOptions) -> dict[str, Any]:
    """Return the decoding options as flags. Options that the chosen search does not use are None: a command refuses
    them.
    """
    idle = {"do_sample"}
    idle |= {"num_beams"} if used.do_sample else {"temperature", "top_k", "top_p", "seed"}
    idle |= {"length_penalty", "early_stopping"} if used.num_beams == 1 else set()
    return {name: None if name in idle else value for name, value in dataclasses.asdict(used).items()}
