"""``rsedge locate``: locate a described feature in a scene and write a heat map."""

from __future__ import annotations

from pathlib import Path

import click

from rsedge.cli import options
from rsedge.cli.say import SOME_TILES_FAILED, note, say_json, tile_progress, warn


@click.command("locate")
@click.argument("scene")
@options.option(
    "--text",
    "texts",
    multiple=True,
    required=True,
    help="Description of the feature; may be repeated, each text gets a band.",
)
@options.option(
    "--contrast",
    "contrasts",
    multiple=True,
    metavar="TEXT",
    help="Description of something else; with it values are probabilities of the text against all contrasts, else "
    "similarities.",
)
@options.embedder
@options.option(
    "-o", "--output", type=options.NEW_FILE, help="Heat map, GeoTIFF.  [default: SCENE.heat.tif in this folder]"
)
@options.option("--png", type=options.NEW_FILE, help="Write a picture of the heat map over the scene too.")
@options.option("--window", type=options.AT_LEAST_1, default=224, help="Edge of a window, in source pixels.")
@options.option(
    "--stride", type=options.AT_LEAST_1, default=56, help="Source pixels between windows, and per cell of the heat map."
)
@options.over_scenes(tiles=False)
def command(
    given: options.SceneRun,
    *,
    scene: str,
    texts: tuple[str, ...],
    contrasts: tuple[str, ...],
    output: Path | None,
    png: Path | None,
    window: int,
    stride: int,
) -> int:
    """Locate described features in SCENE and write a heat map: a GeoTIFF with a band per text.

    The values are larger where the scene matches the text better. The model compares overlapping windows with the texts
    as you write them: try "an airport" or "an aerial photograph of an airport". Unreadable windows are skipped, and the
    exit code is 3.
    """
    import time

    from rsedge.runtime.locate import LEAST_SPAN, LocateOptions, check_texts, locate, write_overlay
    from rsedge.runtime.outputs.rasters import check_outputs
    from rsedge.runtime.prompts import overlong
    from rsedge.runtime.run.sources import spare_scenes
    from rsedge.runtime.scenes.scene import Scene

    # Checked before the model is opened, so that an error appears at once.
    windows = {"window": window, "stride": stride, **given.tiling}
    LocateOptions(**windows)
    check_texts(texts, contrasts)
    opened = Scene.open(scene, **given.scene)
    output = output or Path(options.file_name(opened, ".heat.tif"))
    outputs = {output: (".tif", ".tiff"), **({png: (".png",)} if png else {})}
    check_outputs(outputs, overwrite=given.overwrite)
    spare_scenes([opened], outputs)
    options.introduce(opened)
    for warning in opened.warnings:
        warn(warning)
    bundle, embedder = given.load_embedder()
    for text in overlong([*texts, *contrasts], embedder.token_ids):
        warn(f"the model reads only the beginning of {text!r}: use a shorter text")
    began = time.monotonic()
    with tile_progress() as progress:
        found = locate(embedder, opened, texts, contrasts=contrasts, progress=progress, **windows)
    found.write(output)
    if png:
        write_overlay(png, found)
    options.save_config(output, {**options.used(embedder), "model": str(bundle)})
    values = {
        "output": str(output),
        "png": png and str(png),
        **found.summary(),
        "seconds": round(time.monotonic() - began, 3),
        "device": embedder.device,
        "device_reason": embedder.device_reason,
    }
    code = SOME_TILES_FAILED if found.read_errors else 0
    if given.as_json:
        say_json(values)
        return code
    left_out = found.windows - found.seen - found.read_errors
    written = " and ".join(str(name) for name in (output, png) if name)
    note(
        f"{written}: {found.windows} windows ({left_out} without data, {found.read_errors} unreadable); "
        f"{values['seconds']:.1f} s on {embedder.device}"
    )
    for best in values["texts"]:
        if best["value"] is None:
            note(f"{best['text']}: no value anywhere")
        else:
            place = f"row {best['row']:.0f}, column {best['col']:.0f}"
            note(f"{best['text']}: {found.quantity} {best['least']} to {best['value']}, best at {place}")
            if best["value"] - best["least"] < LEAST_SPAN:
                warn(f"{best['text']}: no place stands out; values differ by less than {LEAST_SPAN}, as noise does")
    return code
