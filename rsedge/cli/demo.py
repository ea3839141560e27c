"""``rsedge demo``: generate a scene, caption it with the built-in model and write a report, offline."""

from __future__ import annotations

import json
from pathlib import Path

import click

from rsedge.cli import options
from rsedge.cli.say import say, tile_progress


@click.command("demo")
@options.option(
    "-o",
    "--output",
    type=options.FOLDER,
    default="demo-out",
    help="Folder for scene.tif, captions.geojson, report.html and sheet.png; files of an earlier demo are replaced.",
)
@options.option("--seed", type=options.AT_LEAST_0, default=7, help="Seed of the scene.")
@options.device
@options.backend
@options.threads
def command(output: Path, seed: int, device: str, backend: str, threads: int | None) -> None:
    """Generate a scene of 18 by 13 km, caption its tiles and write a report, without network or torch.

    The built-in model names land cover in Sentinel-2 true colour at 10 m. Its card, README.md in the bundle, states
    its accuracy.
    """
    from rsedge.cli.config import built_in_model
    from rsedge.errors import OutputError
    from rsedge.runtime.captioner import Captioner
    from rsedge.runtime.demo.scene import write_scene
    from rsedge.runtime.outputs.records import TileRecord
    from rsedge.runtime.outputs.report.report import report_target
    from rsedge.runtime.outputs.report.sheet import sheet_target
    from rsedge.runtime.run.pipeline import run
    from rsedge.runtime.scenes.scene import Scene

    captioner = Captioner.load(built_in_model(), device=device, backend=backend, threads=threads)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot create the folder {output}: {error.strerror}; choose another with -o") from error
    target, report, sheet = output / "captions.geojson", output / "report.html", output / "sheet.png"
    with Scene.open(write_scene(output / "scene.tif", seed=seed)) as scene:
        views = [report_target(report, [scene]), sheet_target(sheet, [scene])]
        with tile_progress() as progress:
            summary = run([scene], captioner.with_options(), target, beside=views, overwrite=True, progress=progress)
    say("row col       lon       lat  caption")
    for feature in json.loads(target.read_bytes())["features"]:
        record = TileRecord(geometry=feature["geometry"], **feature["properties"])
        # The footprint is a small convex ring whose last point repeats the first.
        ring = (record.geometry or {})["coordinates"][0][:-1]
        lon, lat = (sum(point[axis] for point in ring) / len(ring) for axis in (0, 1))
        say(f"{record.row:3} {record.col:3} {lon:9.4f} {lat:9.4f}  {record.caption or f'({record.message})'}")
    say(
        f"\n{output / 'scene.tif'}: {scene.width} x {scene.height} px at 10 m, generated from seed {seed}\n"
        f"{target}: {summary.ok} captions, {summary.nodata} tiles without data; "
        f"{summary.seconds:.1f} s on {captioner.device}\n"
        f"{report}: the scene and its captions; open it in a browser\n"
        f"{sheet}: the tiles with their captions; model {captioner.model}"
    )
