"""``rsedge classify``: classify the tiles of a scene by labels in words, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rsedge.cli import options, views
from rsedge.cli.outputs import report, resumable, save_config
from rsedge.cli.progress import tile_progress


@click.command("classify")
@click.argument("scenes", nargs=-1, required=True)
@click.option("--labels", required=True, help="Classes separated by commas, or a UTF-8 file with one class per line.")
@options.embedder
@click.option(
    "--template",
    "templates",
    multiple=True,
    metavar="TEXT",
    help='Prompt with {} or {category}; several prompts are averaged.  [default: "An aerial photograph of {category}"]',
)
@click.option("--ensemble", is_flag=True, help="Average five wordings of the prompt.")
@click.option("--top", type=click.IntRange(min=1), default=1, show_default=True, help="Classes to write per tile.")
@click.option("-o", "--output", help="Output file, or - for stdout.  [default: SCENE.classes.geojson in this folder]")
@click.option("--format", "file_format", help="geojson, geojsonl, gpkg, csv or parquet.  [default: by the suffix]")
@click.option(
    "--raster",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a GeoTIFF with a pixel per tile too; for one scene.",
)
@views.html
@views.sheet
@views.stac
@views.style
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
    labels: str,
    model: Path | None,
    templates: tuple[str, ...],
    ensemble: bool,
    top: int,
    output: str | None,
    file_format: str | None,
    raster: Path | None,
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
    """Classify every tile of each SCENE by labels in words.

    Each label becomes a prompt. A tile gets the class with the most similar prompt, with the probability that the model
    computes. The output file appears when the run is complete. Until then OUTPUT.journal holds the finished tiles, and
    the same command continues an interrupted run. Unreadable tiles become records with an error, and the exit code is
    3.
    """
    from rsedge.runtime.classify import Classifier, run
    from rsedge.runtime.embedder import Embedder
    from rsedge.runtime.prompts import ENSEMBLE, TEMPLATES, check_labels, overlong, prompts, read_labels

    if ensemble and templates:
        raise click.UsageError("--ensemble has its own templates: leave --template out")
    chosen = ENSEMBLE if ensemble else templates or TEMPLATES
    # Checked before the model is opened, so that an error appears at once.
    classes = read_labels(labels)
    check_labels(classes)
    texts = [text for label in classes for text in prompts(label, chosen)]
    scene_options, tiling = options.take(others, options.OF_SCENES), options.take(others, options.OF_TILES)
    opened = options.open_scenes(scenes, [output, raster, html, sheet, stac], **scene_options)
    output = options.chosen_output(output, opened, ".classes.geojson")
    bundle = options.chosen_embedder(model)
    embedder = Embedder.load(bundle, device=device, backend=backend, threads=threads, batch_size=batch_size)
    for text in overlong(texts, embedder.token_ids):
        options.warn(f"the model reads only the beginning of {text!r}: use a shorter label or template")
    settings = {"device": embedder.device, "backend": embedder.backend, "batch_size": embedder.batch_size}
    targets = views.targets(
        opened, output, html=html, sheet=sheet, style=style, overwrite=overwrite, classes=list(classes)
    )
    if stac:
        files = {"report": html, "sheet": sheet, "raster": raster}
        targets.append(views.item(stac, opened, embedder.model, output, files, key="classes", file_format=file_format))
    with resumable(output), tile_progress() as progress:
        summary = run(
            opened,
            Classifier.make(embedder, classes, templates=chosen),
            output,
            top=top,
            raster=raster,
            format=file_format,
            beside=targets,
            overwrite=overwrite,
            settings=settings,
            progress=progress,
            **tiling,
        )
    if output != "-":
        # The default model may change, so the file names the bundle.
        save_config(ctx, Path(output), {**settings, "model": str(bundle)})
    code = report(summary, "classified", embedder.device, embedder.device_reason, as_json=as_json)
    if not as_json and summary.classes:
        found = sorted(summary.classes.items(), key=lambda item: -item[1])
        options.note(", ".join(f"{label} {count}" for label, count in found if count) or "no tile has a class")
    return code
