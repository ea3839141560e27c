"""What a run of tiles shows beside its output: a report, a contact sheet, a style for QGIS, a STAC item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rsedge.runtime.outputs.target import Target
    from rsedge.runtime.scenes.scene import Scene

_STYLED = (".geojson", ".gpkg")

html = click.option(
    "--html", type=click.Path(dir_okay=False, path_type=Path), help="Report to look at: one offline page, .html."
)
sheet = click.option(
    "--sheet", type=click.Path(dir_okay=False, path_type=Path), help="Contact sheet of the tiles, .png."
)
stac = click.option(
    "--stac", type=click.Path(dir_okay=False, path_type=Path), help="STAC item that describes the result, .json."
)
style = click.option(
    "--style/--no-style",
    default=True,
    show_default=True,
    help="Style for QGIS beside .geojson and .gpkg output, .qml; one that is there already stays.",
)


def targets(
    scenes: Sequence[Scene],
    output: str,
    *,
    html: Path | None,
    sheet: Path | None,
    style: bool,
    overwrite: bool,
    classes: Sequence[str] | None = None,
) -> list[Target]:
    """The views that were asked for, as outputs of a run.

    Args:
        scenes: The scenes of the run, in order.
        output: Path of its main output, or ``-``.
        html, sheet: Where to, or None.
        style: Whether output that QGIS opens gets a style.
        overwrite: Whether a style that is there already is replaced.
        classes: Labels of a classification.
    """
    found: list[Target] = []
    if html is not None:
        from rsedge.runtime.outputs.report.report import report_target

        found.append(report_target(html, scenes))
    if sheet is not None:
        from rsedge.runtime.outputs.report.scene_sheet import sheet_target

        found.append(sheet_target(sheet, scenes))
    if style and Path(output).suffix.lower() in _STYLED:
        from rsedge.runtime.outputs.qgis_style import style_path, style_target

        if overwrite or not style_path(Path(output)).exists():
            found.append(style_target(Path(output), classes=classes))
    return found


def item(
    path: Path,
    scenes: Sequence[Scene],
    model: str,
    output: str,
    others: Mapping[str, Path | None],
    *,
    key: str = "captions",
    file_format: str | None = None,
) -> Target:
    """The STAC item of a run, as one of its outputs.

    Args:
        path: Where to.
        scenes: The scenes of the run.
        model: ``name@hash12`` of the bundle.
        output: Path of its main output, or ``-``.
        others: Its other files by what they are; None where there is none.
        key: What its main output is.
        file_format: Of the main output, where its suffix does not name it.
    """
    from rsedge.runtime.outputs.stac_item import result_item_target

    return result_item_target(
        path,
        scenes=scenes,
        model=model,
        output=None if output == "-" else Path(output),
        others={name: file for name, file in others.items() if file is not None},
        key=key,
        file_format=file_format,
    )
