"""A QGIS layer style (``.qml``) beside vector output, which QGIS applies when it opens a layer of the same name.

Tiles are coloured by status or by class, captions appear where a tile is large enough on the screen to hold one, and a
map tip tells all of a tile. QGIS 3.28 and later read it; 3.22 was seen to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from xml.etree import ElementTree

from rsedge.errors import OptionError
from rsedge.runtime.outputs.files import open_file
from rsedge.runtime.outputs.geometry import bounding_box
from rsedge.runtime.run.run import Target
from rsedge.texts import plain

if TYPE_CHECKING:
    from rsedge.runtime.outputs.records import TileResult

SUFFIXES = (".geojson", ".geojsonl", ".gpkg", ".parquet")
"""Outputs that QGIS opens as layers of polygons."""
STATUS_COLOURS = {"ok": "#009E73", "nodata": "#999999", "cloud": "#56B4E9", "read_error": "#D55E00"}
"""Of Okabe and Ito, who chose them for the colour-blind; grey stands for nothing."""
STATUS_LABELS = {"ok": "ok", "nodata": "no data", "cloud": "cloud", "read_error": "could not be read"}
NO_CLASS_COLOUR = "#999999"

_FILL_ALPHA = 128
_LABEL_METRES = 0.025  # a tile this large on the screen holds a caption
_METRES_PER_DEGREE = 111_320.0  # of latitude
_LABEL_SCALE = 100_000  # of tiles without a place
_WRAP = 28
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
    """The style of a run's output as an output of the run.

    Args:
        output: The layer's file.
        classes: Labels of a classification, in the order of its raster's values; None where tiles have captions.

    Raises:
        OptionError: QGIS opens no polygons from such a file.
    """
    path = style_path(output)
    return Target(path, lambda: open_file(path, partial(_StyleWriter, classes=classes)))


class _StyleWriter:
    """Results to a style, which needs nothing of them but how large tiles are."""

    def __init__(self, stream: BinaryIO, *, classes: Sequence[str] | None) -> None:
        self._stream, self._classes = stream, classes
        self._degrees = 0.0

    def write(self, results: Sequence[TileResult]) -> None:
        for result in results:
            if result.record.geometry is not None:
                self._degrees = max(self._degrees, _height(result.record.geometry))

    def finish(self) -> None:
        scale = float(f"{self._degrees * _METRES_PER_DEGREE / _LABEL_METRES:.1e}") or _LABEL_SCALE
        self._stream.write(make_style(self._classes, label_scale=round(scale)))


def _height(geometry: Mapping[str, Any]) -> float:
    _, south, _, north = bounding_box(geometry)
    return north - south


def make_style(classes: Sequence[str] | None = None, *, label_scale: int = _LABEL_SCALE) -> bytes:
    """The style as UTF-8 XML, the same for the same arguments.

    Args:
        classes: Labels of a classification, or None where tiles have captions.
        label_scale: Captions are shown from 1 : ``label_scale`` on.
    """
    categories = _status_categories() if classes is None else _class_categories(classes)
    text = "caption" if classes is None else "class"
    root = _element("qgis", version="3.28.0-Firenze", styleCategories="Symbology|Labeling|MapTips", labelsEnabled="1")
    renderer = _element(
        "renderer-v2",
        root,
        type="categorizedSymbol",
        attr="status" if classes is None else "class",
        symbollevels="0",
        enableorderby="0",
        forceraster="0",
        referencescale="-1",
    )
    listed = _element("categories", renderer)
    symbols = _element("symbols", renderer)
    for number, (value, label, colour) in enumerate(categories):
        _element("category", listed, symbol=str(number), value=value, type="string", label=label, render="true")
        _symbol(symbols, str(number), colour)
    _element("rotation", renderer)
    _element("sizescale", renderer)
    _labels(root, text, label_scale)
    for name in ("blendMode", "featureBlendMode"):
        _element(name, root).text = "0"
    _element("layerOpacity", root).text = "1"
    _element("mapTip", root, enabled="1").text = _map_tip(text, "score" if classes is None else "probability")
    _element("layerGeometryType", root).text = "2"
    ElementTree.indent(root)
    return (_DOCTYPE + ElementTree.tostring(root, encoding="unicode") + "\n").encode("utf-8")


def _status_categories() -> list[tuple[str, str, str]]:
    return [(status, STATUS_LABELS[status], colour) for status, colour in STATUS_COLOURS.items()]


def _class_categories(classes: Sequence[str]) -> list[tuple[str, str, str]]:
    """A colour per class, those of the raster of classes; the empty value is QGIS's for all others."""
    from rsedge.runtime.outputs.rasters import class_colours

    colours = ["#{:02x}{:02x}{:02x}".format(*colour[:3]) for colour in class_colours(len(classes))]
    names = [plain(label) for label in classes]
    return [*zip(names, names, colours, strict=True), ("", "no class", NO_CLASS_COLOUR)]


def _symbol(parent: ElementTree.Element, name: str, colour: str) -> None:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    symbol = _element("symbol", parent, type="fill", name=name, alpha="1", clip_to_extent="1", force_rhr="0")
    layer = _element("layer", symbol, {"class": "SimpleFill"}, enabled="1", locked="0", **{"pass": "0"})
    _options(
        layer,
        {
            "border_width_map_unit_scale": "3x:0,0,0,0,0,0",
            "color": f"{red},{green},{blue},{_FILL_ALPHA}",
            "joinstyle": "miter",
            "offset": "0,0",
            "offset_map_unit_scale": "3x:0,0,0,0,0,0",
            "offset_unit": "MM",
            "outline_color": f"{red},{green},{blue},255",
            "outline_style": "solid",
            "outline_width": "0.2",
            "outline_width_unit": "MM",
            "style": "solid",
        },
    )


def _labels(root: ElementTree.Element, column: str, scale: int) -> None:
    labeling = _element("labeling", root, type="simple")
    settings = _element("settings", labeling, calloutType="simple")
    style = _element(
        "text-style",
        settings,
        fieldName=column,
        isExpression="0",
        allowHtml="0",
        fontFamily="Noto Sans",
        fontSize="8",
        fontSizeUnit="Point",
        fontWeight="50",
        fontItalic="0",
        namedStyle="Regular",
        textColor="20,20,20,255",
        textOpacity="1",
        multilineHeight="1",
        blendMode="0",
    )
    _element(
        "text-buffer",
        style,
        bufferDraw="1",
        bufferSize="0.7",
        bufferSizeUnits="MM",
        bufferColor="255,255,255,255",
        bufferOpacity="0.8",
        bufferNoFill="1",
        bufferJoinStyle="128",
        bufferBlendMode="0",
    )
    _element(
        "text-format",
        settings,
        autoWrapLength=str(_WRAP),
        useMaxLineLengthForAutoWrap="1",
        wrapChar="",
        multilineAlign="1",
        formatNumbers="0",
        addDirectionSymbol="0",
    )
    _element(
        "placement",
        settings,
        placement="1",  # over the centroid
        centroidWhole="1",
        centroidInside="1",
        quadOffset="4",
        fitInPolygonOnly="0",
        layerType="PolygonGeometry",
        priority="5",
    )
    _element(
        "rendering",
        settings,
        drawLabels="1",
        scaleVisibility="1",
        scaleMin="0",
        scaleMax=str(scale),
        labelPerPart="0",
        obstacle="0",
        zIndex="0",
    )


def _map_tip(text: str, number: str) -> str:
    """HTML in which QGIS evaluates what stands between ``[%`` and ``%]`` for the tile under the pointer."""
    title = _escaped(f'coalesce("{text}", "message", \'\')')
    figure = _escaped(f"coalesce(round(\"{number}\", 4), '–')")
    place = _escaped('"scene" || \', row \' || "row" || \', column \' || "col"')
    return (
        f"<p><b>[% {title} %]</b></p>\n"
        f"<p>{number} [% {figure} %], [% {_escaped(chr(34) + 'status' + chr(34))} %]<br>[% {place} %]</p>"
    )


def _escaped(expression: str) -> str:
    """An expression of QGIS, which has no function that escapes, as one whose value is plain text in HTML."""
    for letter, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        expression = f"replace({expression}, '{letter}', '{entity}')"
    return expression


def _options(parent: ElementTree.Element, values: Mapping[str, str]) -> None:
    options = _element("Option", parent, type="Map")
    for name, value in values.items():
        _element("Option", options, type="QString", name=name, value=value)


def _element(
    tag: str, parent: ElementTree.Element | None = None, attributes: Mapping[str, str] | None = None, /, **more: str
) -> ElementTree.Element:
    values = {**(attributes or {}), **more}
    return ElementTree.Element(tag, values) if parent is None else ElementTree.SubElement(parent, tag, values)
