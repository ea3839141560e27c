"""``rsedge demo``: make a scene and caption it with the built-in model, offline."""

from __future__ import annotations

from pathlib import Path

import click

from rsedge.cli import options
from rsedge.cli.progress import tile_progress

CAVEAT = "The built-in model has seen generated scenes only; it is not for real imagery."


@click.command("demo")
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default="demo-out",
    show_default=True,
    help="Folder for scene.tif and captions.geojson; those of an earlier demo are replaced.",
)
@click.option("--seed", type=click.IntRange(min=0), default=7, show_default=True, help="Of the scene.")
@options.device
@options.threads
def command(output: Path, seed: int, device: str, threads: int | None) -> None:
    """Make a scene of 18 by 13 km and caption its tiles, without network or torch.

    The land is generated and the built-in model has seen nothing else: it shows how rsedge works, and is not for real
    imagery.
    """
    from rsedge.errors import OutputError
    from rsedge.runtime.captioner import Captioner
    from rsedge.runtime.default_model import built_in_model
    from rsedge.runtime.pipeline import run
    from rsedge.runtime.scene import Scene
    from rsedge.runtime.synthetic import write_scene

    captioner = Captioner.load(built_in_model(), device=device, threads=threads)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {output}: {error.strerror}; choose another with -o") from error
    target = output / "captions.geojson"
    with Scene.open(write_scene(output / "scene.tif", seed=seed)) as scene, tile_progress() as progress:
        summary = run([scene], captioner.with_options(), target, overwrite=True, progress=progress)
    _print_table(target)
    click.echo(
        f"\n{output / 'scene.tif'}: {scene.width} x {scene.height} px at 10 m, generated from seed {seed}\n"
        f"{target}: {summary.ok} captions, {summary.nodata} tiles without data; "
        f"{summary.seconds:.1f} s on {captioner.device}\n{CAVEAT}"
    )


def _print_table(captions: Path) -> None:
    """A line per tile of a GeoJSON of captions."""
    import json

    click.echo("row col       lon       lat  caption")
    for feature in json.loads(captions.read_bytes())["features"]:
        record = feature["properties"]
        # The footprint is a small convex ring whose last point repeats the first.
        ring = feature["geometry"]["coordinates"][0][:-1]
        lon, lat = (sum(point[axis] for point in ring) / len(ring) for axis in (0, 1))
        text = record["caption"] or f"({record['message']})"
        click.echo(f"{record['row']:3} {record['col']:3} {lon:9.4f} {lat:9.4f}  {text}")
