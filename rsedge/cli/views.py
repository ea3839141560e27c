"""Extra outputs of a run over tiles: a report, a contact sheet, a QGIS style, a STAC item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rsedge.runtime.outputs.files import Target
    from rsedge.runtime.scenes.scene import Scene

_STYLED = (".geojson", ".gpkg")

html = click.option(
    "--html", type=click.Path(dir_okay=False, path_type=Path), help="Write a report: one offline page, .html."
)
sheet = click.option(
    "--sheet", type=click.Path(dir_okay=False, path_type=Path), help="Write a contact sheet of the tiles, .png."
)
stac = click.option(
    "--stac",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a STAC item that describes the result, .json.",
)
style = click.option(
    "--style/--no-style",
    default=True,
    show_default=True,
    help="Write a QGIS style, .qml, beside .geojson and .gpkg output; an existing style stays.",
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
    """Return the extra files that the user asked for, as outputs of a run.

    Args:
        scenes: The scenes of the run, in order.
        output: Path of its main output, or ``-``.
        html, sheet: Paths, or None.
        style: Whether to write a style for output that QGIS opens.
        overwrite: Whether to replace an existing style.
        classes: Labels of a classification.
    """
    found: list[Target] = []
    if html is not None:
        from rsedge.runtime.outputs.report.report import report_target

        found.append(report_target(html, scenes))
    if sheet is not None:
        from rsedge.runtime.outputs.report.sheet import sheet_target

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
    """Return the STAC item of a run, as one of its outputs.

    Args:
        path: Path of the item.
        scenes: The scenes of the run.
        model: ``name@hash12`` of the bundle.
        output: Path of its main output, or ``-``.
        others: Kind of file → path; None for files that are not written.
        key: Asset key of the main output.
        file_format: Format of the main output if its suffix does not name it.
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
