"""A QGIS layer style (``.qml``) beside vector output, which QGIS applies when it opens a layer of the same name.

Tiles are coloured by status or by class, captions appear where a tile is large enough on the screen to hold one, and a
map tip tells all of a tile. QGIS 3.28 and later read it; 3.22 was seen to.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from xml.etree import ElementTree

from rsedge.errors import OptionError
from rsedge.runtime.outputs.files import Target, file_target
from rsedge.runtime.outputs.geometry import bounding_box
from rsedge.texts import plain

if TYPE_CHECKING:
    from rsedge.runtime.outputs.records import TileResult

SUFFIXES = (".geojson", ".geojsonl", ".gpkg", ".parquet")
"""Outputs that QGIS opens as layers of polygons."""
STATUS_COLOURS = {"ok": "#009E73", "nodata": "#999999", "cloud": "#56B4E9", "read_error": "#D55E00"}
"""Of Okabe and Ito, who chose them for the colour-blind; grey stands for nothing."""
STATUS_LABELS = {"ok": "ok", "nodata": "no data", "cloud": "cloud", "read_error": "could not be read"}
NO_CLASS_COLOUR = "#999999"

_FILL_ALPHA, _CLASS_ALPHA = {"ok": 0}, 72  # of 255: imagery beneath stays visible, and captioned tiles are outlines
_LABEL_METRES = 0.025  # a tile this large on the screen holds a caption
_METRES_PER_DEGREE = 111_320.0  # of latitude
_LABEL_SCALE = 100_000  # of tiles without a place
_DOCTYPE = "<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n"


def style_path(output: Path) -> Path:
    """Where QGIS looks for the style of ``output``: the same name, ending in ``.qml``.

    Raises:
        OptionError: QGIS opens no polygons from such a file.
    """
    if output.suffix.lower() not in SUFFIXES:
        raise OptionError(f"a style goes with a layer of polygons: {output} ends in none of {', '.join(SUFFIXES)}")
    return output.with_suffix(".qml")


def style_target(output: Path, *, classes: Sequence[str] | None = None) -> Target:
    """The style of a run's output, the layer's file, as an output of the run; see :func:`make_style`.

    Raises:
        OptionError: QGIS opens no polygons from such a file.
    """
    return file_target(style_path(output), partial(_StyleWriter, classes=classes))


class _StyleWriter:
    """Results to a style, which depends on nothing but the size of the tiles."""

    def __init__(self, stream: BinaryIO, *, classes: Sequence[str] | None) -> None:
        self._stream, self._classes = stream, classes
        self._degrees = 0.0

    def write(self, results: Iterable[TileResult]) -> None:
        for result in results:
            if result.record.geometry is not None:
                _, south, _, north = bounding_box(result.record.geometry)
                self._degrees = max(self._degrees, north - south)

    def finish(self) -> None:
        scale = float(f"{self._degrees * _METRES_PER_DEGREE / _LABEL_METRES:.1e}") or _LABEL_SCALE
        self._stream.write(make_style(self._classes, label_scale=round(scale)))


def make_style(classes: Sequence[str] | None = None, *, label_scale: int = _LABEL_SCALE) -> bytes:
    """The style as UTF-8 XML, the same for the same arguments.

    Args:
        classes: Labels of a classification in the order of its raster's values, or None where tiles have captions.
        label_scale: Captions are shown from 1 : ``label_scale`` on.
    """
    shown, text, number = ("status", "caption", "score") if classes is None else ("class", "class", "probability")
    root = ElementTree.fromstring(files(__package__).joinpath("qgis_style.qml").read_text("utf-8"))
    renderer, listed, symbols, style, rendering, map_tip = (
        next(root.iter(tag)) for tag in ("renderer-v2", "categories", "symbols", "text-style", "rendering", "mapTip")
    )
    renderer.set("attr", shown)
    style.set("fieldName", text)
    rendering.set("scaleMax", str(label_scale))
    # 1. A category of each status, or of each class, coloured as in the raster of classes, and one of all others.
    if classes is None:
        categories = [(status, STATUS_LABELS[status], colour) for status, colour in STATUS_COLOURS.items()]
    else:
        from rsedge.runtime.outputs.rasters import class_colours

        colours = ["#{:02x}{:02x}{:02x}".format(*colour[:3]) for colour in class_colours(len(classes))]
        names = [plain(label) for label in classes]
        categories = [*zip(names, names, colours, strict=True), ("", "no class", NO_CLASS_COLOUR)]
    category, symbol = listed[0], symbols[0]
    listed.clear()
    symbols.clear()
    for place, (value, label, colour) in enumerate(categories):
        listed.append(copy.deepcopy(category))
        listed[-1].attrib.update(symbol=str(place), value=value, label=label)
        symbols.append(copy.deepcopy(symbol))
        symbols[-1].set("name", str(place))
        rgb = ",".join(str(int(colour[at : at + 2], 16)) for at in (1, 3, 5))
        fill = _FILL_ALPHA.get(value, _CLASS_ALPHA)
        for option, alpha in (("color", fill), ("outline_color", 255)):
            next(symbols[-1].iterfind(f".//Option[@name='{option}']")).set("value", f"{rgb},{alpha}")
    # 2. The map tip: HTML in which QGIS evaluates what stands between [% and %] for the tile under the pointer.
    title, figure, status, position = map(
        _escaped,
        (
            f'coalesce("{text}", "message", \'\')',
            f"coalesce(round(\"{number}\", 4), '–')",
            '"status"',
            '"scene" || \', row \' || "row" || \', column \' || "col"',
        ),
    )
    map_tip.text = f"<p><b>[% {title} %]</b></p>\n<p>{number} [% {figure} %], [% {status} %]<br>[% {position} %]</p>"
    ElementTree.indent(root)
    return (_DOCTYPE + ElementTree.tostring(root, encoding="unicode") + "\n").encode("utf-8")


def _escaped(expression: str) -> str:
    """An expression of QGIS, which has no function that escapes, as one whose value is plain text in HTML."""
    for letter, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        expression = f"replace({expression}, '{letter}', '{entity}')"
    return expression
