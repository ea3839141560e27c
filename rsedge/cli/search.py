"""``rsedge search``: search embeddings for the tiles most similar to a text, an image or a tile."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rsedge.cli import options
from rsedge.cli.say import image_progress, note, say, say_json, warn

if TYPE_CHECKING:
    from rsedge.runtime.search.hits import Hit
    from rsedge.runtime.search.index import Index

_MISSING = "give one of --text, --image or --tile (or --build-index, --measure-recall)"


class Box(click.ParamType):  # type: ignore[type-arg]  # generic only in newer click
    """``W,S,E,N``, or a list of four numbers from a configuration file."""

    name = "W,S,E,N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return four numbers."""
        try:
            west, south, east, north = (float(part) for part in (value.split(",") if isinstance(value, str) else value))
        except (TypeError, ValueError):
            self.fail(f"{value!r}: give west, south, east, north in degrees, such as 14.2,45.9,14.8,46.2", param, ctx)
        return west, south, east, north


class TileName(click.ParamType):  # type: ignore[type-arg]
    """``SCENE:ROW:COL``; the name of a scene may contain colons."""

    name = "SCENE:ROW:COL"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return scene, row and column."""
        if isinstance(value, tuple):
            return value
        scene, _, place = str(value).rpartition(":")
        scene, _, row = scene.rpartition(":")
        if not scene or not (row.isdecimal() and place.isdecimal()):
            self.fail(f"{value!r}: give a scene, a row and a column, such as S2A_33TVM:12:7", param, ctx)
        return scene, int(row), int(place)


@click.command("search")
@click.argument("embeddings", nargs=-1, required=True, type=options.PATH)
@options.option("--text", help="Query text.")
@options.option("--image", type=options.PATH, help="Query image.")
@options.option("--tile", type=TileName(), help="Query tile of EMBEDDINGS.")
@options.embedder
@options.option("--top", type=options.AT_LEAST_1, default=20, help="Largest number of hits.")
@options.option(
    "--bbox", type=Box(), help="Only tiles that touch this box, in degrees; W > E crosses the antimeridian."
)
@options.option("--since", help="Only tiles acquired at this date or time (UTC) or later.")
@options.option(
    "--until", help="Only tiles acquired at this date or time (UTC) or earlier; a date includes the whole day."
)
@options.option("--max-cloud", type=click.FloatRange(0, 1), help="Only tiles with a known share of cloud up to this.")
@options.option("--where", help="Condition on columns, such as \"scene like 'S2A%' and row in (1, 2)\".")
@options.option(
    "-o",
    "--output",
    help="Output file: GeoJSON, GeoJSON lines, CSV or GeoPackage by the suffix, or - for lines on stdout.",
)
@options.option("--sheet", type=options.PATH, help="Write a contact sheet of the hits, .png.")
@options.option("--pixels-from", multiple=True, type=options.PATH, help="Folder of the scenes, for --sheet.")
@options.option(
    "--approximate/--exact",
    default=None,
    help="Use the index of --build-index, or compare every tile.  [default: the index of a large file, if it exists]",
)
@options.option("--build-index", is_flag=True, help="Write an index beside each file, for --approximate.")
@options.option(
    "--measure-recall", is_flag=True, help="Measure the share of exact hits that the index finds, for 100 tiles."
)
@options.device
@options.backend
@options.threads
@options.overwrite
@options.as_json
@options.config
@click.pass_context
def command(
    ctx: click.Context,
    /,
    embeddings: tuple[Path, ...],
    text: str | None,
    image: Path | None,
    tile: tuple[str, int, int] | None,
    model: Path | None,
    top: int,
    bbox: tuple[float, float, float, float] | None,
    since: str | None,
    until: str | None,
    max_cloud: float | None,
    where: str | None,
    output: str | None,
    sheet: Path | None,
    pixels_from: tuple[Path, ...],
    approximate: bool | None,
    build_index: bool,
    measure_recall: bool,
    overwrite: bool,
    as_json: bool,
    **engine: Any,
) -> None:
    """Search EMBEDDINGS, files or folders of rsedge embed, for the tiles most similar to a query.

    A query text or image needs the bundle that computed the embeddings (-m); a query tile needs none. Without -o the
    command prints the hits. A score is the cosine similarity of the query and the tile, at most 1.
    """
    query = [flag for flag, given in (("--text", text), ("--image", image), ("--tile", tile)) if given is not None]
    on_index = [flag for flag, given in (("--build-index", build_index), ("--measure-recall", measure_recall)) if given]
    _check_use(ctx, query, on_index)
    from rsedge.runtime.outputs.rasters import check_suffix
    from rsedge.runtime.search.hits import check_output, parse_format, write_hits
    from rsedge.runtime.search.index import Index

    for target in (output, sheet):
        if target is not None and target != "-":
            check_output(target, overwrite=overwrite)
    if output is not None:
        parse_format(output)
    if sheet is not None:
        check_suffix(sheet, (".png",))
    index = Index.open(*embeddings)
    if on_index:
        _on_index(index, build=build_index, measure=measure_recall, top=top, as_json=as_json)
        return
    from rsedge.runtime.search.filters import Filters

    chosen = Filters(bbox=bbox, since=since, until=until, max_cloud=max_cloud, where=where)
    values: dict[str, Any] = {"text": text, "tile": tile}
    if tile is None:
        from rsedge.runtime.embedder import Embedder

        values["embedder"] = Embedder.load(options.chosen_embedder(model), **engine)
        index.check_model(values["embedder"])
        if image is not None:
            from rsedge.datasets.images import FileImage

            values["image"] = FileImage(image).read()
    hits = index.search(**values, top=top, filters=chosen, approximate=approximate, threads=engine["threads"])
    if output is not None:
        write_hits(output, hits, overwrite=overwrite)
    if sheet is not None and hits:
        from rsedge.runtime.search.hit_sheet import write_hit_sheet

        if without := write_hit_sheet(sheet, hits, folders=pixels_from):
            warn(f"{without} of {len(hits)} hits on {sheet} have no pixels: it says why (--pixels-from FOLDER)")
    elif sheet is not None:
        warn(f"{sheet} is not written: nothing was found")
    _report(index, hits, output, sheet, as_json=as_json)


def _check_use(ctx: click.Context, query: list[str], on_index: list[str]) -> None:
    """Refuse options without an effect."""
    if not on_index and len(query) != 1:
        raise click.UsageError(f"{' and '.join(query)}: give one query at a time" if query else _MISSING)
    default = click.core.ParameterSource.DEFAULT
    given = {name: ctx.get_parameter_source(name) not in (default, None) for name in ctx.params}
    flags = {str(each.name): "/".join([each.opts[-1], *each.secondary_opts]) for each in ctx.command.params}

    def refuse(idle: Iterable[str], reason: str) -> None:
        if wrong := [flags[name] for name in idle if given[name]]:
            raise click.UsageError(f"{reason}: leave out {', '.join(wrong)}")

    if on_index:
        used = {"embeddings", "as_json", *(name.lstrip("-").replace("-", "_") for name in on_index)}
        used |= {"top"} if "--measure-recall" in on_index else set()
        refuse((name for name in given if name not in used), f"{' and '.join(on_index)} runs no search")
    if "--tile" in query:
        refuse(("model", "device"), "--tile reads its embedding from the file and needs no model")
    if not given["sheet"]:
        refuse(("pixels_from",), "without --sheet there is no picture")


def _on_index(index: Index, *, build: bool, measure: bool, top: int, as_json: bool) -> None:
    """Build indexes, and measure them."""
    summary: dict[str, Any] = {"tiles": index.rows}
    if build:
        with image_progress() as progress:
            summary["indexes"] = [str(path) for path in index.build_approximate(progress=progress)]
        for path in summary["indexes"]:
            note(f"index: {path}")
    if measure:
        summary |= {"top": top, "recall": round(index.measure_recall(top=top), 4)}
        if not as_json:
            say(f"recall of the index: {summary['recall']:.2%} of the {top} nearest tiles")
    if as_json:
        say_json(summary)


def _place(geometry: dict[str, Any]) -> str:
    """Return the middle of a footprint in degrees, such as ``47.0114°N 99.1339°W``."""
    from rsedge.runtime.outputs.report.report import centre

    lon, lat = (float(each or 0) for each in centre(geometry))
    return f"{abs(lat):.4f}°{'NS'[lat < 0]} {abs(lon):.4f}°{'EW'[lon < 0]}"


def _report(index: Index, hits: list[Hit], output: str | None, sheet: Path | None, *, as_json: bool) -> None:
    """Print the hits if there is no output file, else a summary."""
    if as_json:
        summary: dict[str, Any] = {"output": output, "sheet": sheet and str(sheet), "tiles": index.rows}
        summary |= {"model": index.info.model, "hits": len(hits)}
        if output is None:
            summary["found"] = [{**hit.properties(), "geometry": hit.record.geometry} for hit in hits]
        say_json(summary, err=output == "-")
        return
    if output is None:
        for hit in hits:
            record = hit.record
            caption = f"  {record.caption}" if record.caption else ""
            where = f"  {_place(record.geometry):<20}" if record.geometry else ""
            say(f"{hit.rank:4}  {hit.score:7.4f}{where}  {record.scene}:{record.row}:{record.col}{caption}")
    best = f", best {hits[0].score:.4f}" if hits else ""
    where = f"{output}: " if output not in (None, "-") else ""
    note(f"{where}{len(hits)} hits among {index.rows} tiles{best}")
