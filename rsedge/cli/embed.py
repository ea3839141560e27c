"""``rsedge embed``: compute an embedding per tile or image and write them as GeoParquet."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from rsedge.cli import options
from rsedge.cli.say import report, tile_progress, warn

_OF_SCENES = tuple(name for name in (*options.OF_TILES, *options.OF_SCENES) if name != "readers")


@click.command("embed")
@click.argument("inputs", metavar="SCENE|IMAGE|FOLDER...", nargs=-1, required=True)
@options.embedder
@options.option("-o", "--output", required=True, help="GeoParquet file, NAME.parquet.")
@options.embedding_type
@options.option(
    "--as",
    "kind",
    type=click.Choice(["auto", "scene", "image"]),
    default="auto",
    help="Treat files as scenes, cut into tiles, or as images, embedded whole; auto: georeferenced files are scenes.",
)
@options.over_scenes()
def command(given: options.SceneRun, *, inputs: tuple[str, ...], output: str, dtype: Any, kind: Any) -> int:
    """Compute an embedding of every tile of each SCENE and of each whole IMAGE.

    A georeferenced raster is a scene, any other file an image. A FOLDER stands for the files and .SAFE folders in it,
    at any depth. The output file appears when the run is complete. Until then OUTPUT.journal holds the finished tiles,
    and the same command continues an interrupted run. Unreadable files become records with an error, and the exit code
    is 3.
    """
    from rsedge.datasets.images import SUFFIXES, FileImage
    from rsedge.runtime.run.pipeline import embed
    from rsedge.runtime.run.sources import find_inputs
    from rsedge.runtime.scenes.opening import SceneOptions
    from rsedge.runtime.scenes.scene import Scene

    found = find_inputs(
        inputs,
        open_scene=partial(Scene.open, **given.scene),
        open_image=FileImage,
        suffixes=SUFFIXES,
        kind=kind,
        access=SceneOptions(**given.scene).access,
        stdin=options.standard_input(inputs),
    )
    scenes = [entry for entry in found.entries if isinstance(entry, Scene)]
    if not scenes and (useless := options.given(_OF_SCENES)):
        raise click.UsageError(
            f"{', '.join(useless)}: for scenes only, and none of the inputs is one (a raster with a georeference); "
            "leave out, or pass --as scene to cut images into tiles"
        )
    for scene in scenes:
        options.introduce(scene)
    for warning in found.warnings:
        warn(warning)
    bundle, embedder = given.load_embedder()
    settings = options.used(embedder)
    with tile_progress(output) as progress:
        summary = embed(
            found.entries,
            embedder,
            output,
            dtype=dtype or "float16",
            overwrite=given.overwrite,
            settings=settings,
            progress=progress,
            **given.tiling,
        )
    # The default model may change, so the file names the bundle. Scene options are refused for images alone.
    resolved = {**settings, "model": str(bundle), "dtype": dtype or "float16"}
    options.save_config(Path(output), resolved if scenes else {**resolved, **dict.fromkeys(_OF_SCENES)})
    return report(summary, "embeddings", embedder.device, embedder.device_reason, as_json=given.as_json)
