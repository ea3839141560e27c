"""``rsedge classify``: classify the tiles of a scene by labels in words, without training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from rsedge.cli import options
from rsedge.cli.say import note, report, tile_progress, warn


@click.command("classify")
@click.argument("scenes", nargs=-1, required=True)
@options.option("--labels", required=True, help="Classes separated by commas, or a UTF-8 file with one class per line.")
@options.embedder
@options.option(
    "--template",
    "templates",
    multiple=True,
    metavar="TEXT",
    help='Prompt with {} or {category}; several prompts are averaged.  [default: "An aerial photograph of {category}"]',
)
@options.option("--ensemble", is_flag=True, help="Average five wordings of the prompt.")
@options.option("--top", type=options.AT_LEAST_1, default=1, help="Classes to write per tile.")
@options.option("-o", "--output", help="Output file, or - for stdout.  [default: SCENE.classes.geojson in this folder]")
@options.option("--format", "file_format", help="geojson, geojsonl, gpkg, csv or parquet.  [default: by the suffix]")
@options.option("--raster", type=options.NEW_FILE, help="Write a GeoTIFF with a pixel per tile too; for one scene.")
@options.views
@options.over_scenes()
def command(
    given: options.SceneRun,
    *,
    scenes: tuple[str, ...],
    labels: str,
    templates: tuple[str, ...],
    ensemble: bool,
    top: int,
    output: str | None,
    file_format: str | None,
    raster: Path | None,
) -> int:
    """Classify every tile of each SCENE by labels in words.

    Each label becomes a prompt. A tile gets the class with the most similar prompt, with the probability that the model
    computes. The output file appears when the run is complete. Until then OUTPUT.journal holds the finished tiles, and
    the same command continues an interrupted run. Unreadable tiles become records with an error, and the exit code is
    3.
    """
    from rsedge.runtime.classify import Classifier, run
    from rsedge.runtime.prompts import ENSEMBLE, TEMPLATES, check_labels, overlong, prompts, read_labels

    if ensemble and templates:
        raise click.UsageError("--ensemble has its own templates: leave --template out")
    chosen = ENSEMBLE if ensemble else templates or TEMPLATES
    # Checked before the model is opened, so that an error appears at once.
    classes = read_labels(labels)
    check_labels(classes)
    texts = [text for label in classes for text in prompts(label, chosen)]
    given.check_outputs(output, raster, file_format=file_format)
    unopened: list[str] = []
    opened = options.open_scenes(scenes, [output, raster, given.html, given.sheet, given.stac], unopened, **given.scene)
    output = options.chosen_output(output, opened, ".classes.geojson")
    bundle, embedder = given.load_embedder()
    for text in overlong(texts, embedder.token_ids):
        warn(f"the model reads only the beginning of {text!r}: use a shorter label or template")
    settings = options.used(embedder)
    targets = given.targets(
        opened,
        embedder.model,
        output,
        {"raster": raster},
        key="classes",
        file_format=file_format,
        classes=list(classes),
    )
    with tile_progress(output) as progress:
        summary = run(
            opened,
            Classifier.make(embedder, classes, templates=chosen),
            output,
            top=top,
            raster=raster,
            format=file_format,
            beside=targets,
            overwrite=given.overwrite,
            settings=settings,
            progress=progress,
            **given.tiling,
        )
    if output != "-":
        # The default model may change, so the file names the bundle.
        options.save_config(Path(output), {**settings, "model": str(bundle)})
    summary = dataclasses.replace(summary, unopened=tuple(unopened))
    others = [raster, *(target.path for target in targets)]
    code = report(summary, "classified", embedder.device, embedder.device_reason, as_json=given.as_json, others=others)
    if not given.as_json and summary.classes:
        found = sorted(summary.classes.items(), key=lambda item: -item[1])
        note(", ".join(f"{label} {count}" for label, count in found if count) or "no tile has a class")
    return code
