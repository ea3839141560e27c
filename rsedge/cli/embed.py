"""``rsedge embed``: compute an embedding per tile or image and write them as GeoParquet."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from rsedge.cli import options
from rsedge.cli.say import report, tile_progress


@click.command("embed")
@click.argument("inputs", metavar="SCENE|IMAGE|FOLDER...", nargs=-1, required=True)
@options.embedder
@options.option("-o", "--output", required=True, help="GeoParquet file, NAME.parquet.")
@options.embedding_type
@options.image_kind
@options.over_scenes()
def command(given: options.SceneRun, *, inputs: tuple[str, ...], output: str, dtype: Any, kind: Any) -> int:
    """Compute an embedding of every tile of each SCENE and of each whole IMAGE.

    A georeferenced raster is a scene, any other file an image. A FOLDER stands for the files and .SAFE folders in it,
    at any depth. The output file appears when the run is complete. Until then OUTPUT.journal holds the finished tiles,
    and the same command continues an interrupted run. Unreadable files become records with an error, and the exit code
    is 3.
    """
    from rsedge.errors import OptionError
    from rsedge.runtime.run.pipeline import embed
    from rsedge.runtime.scenes.scene import Scene

    if Path(output).suffix.lower() != ".parquet":
        raise OptionError(f"embeddings are written as GeoParquet: end {output!r} in .parquet")
    given.check_outputs(output, formats=False)
    found = options.open_inputs(inputs, kind, given, [output])
    scenes = [entry for entry in found.entries if isinstance(entry, Scene)]
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
    options.save_config(Path(output), resolved if scenes else {**resolved, **dict.fromkeys(options.OF_SCENES_ALONE)})
    summary = replace(summary, unopened=found.unopened)
    return report(summary, "embeddings", embedder.device, embedder.device_reason, as_json=given.as_json)
