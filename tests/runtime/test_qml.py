from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from rsedge.errors import OptionError
from rsedge.runtime.outputs.qgis_style import STATUS_COLOURS, make_style, style_path, style_target
from rsedge.runtime.outputs.rasters import class_colours
from rsedge.runtime.outputs.records import TileResult
from tests.runtime.test_writers import RECORD, RECORDS


def parsed(data):
    assert data.startswith(b"<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n<qgis ")
    return ElementTree.fromstring(data)


def categories(root):
    """Value → label, and fill and outline of its symbol."""
    renderer = root.find("renderer-v2")
    symbols = {symbol.get("name"): symbol for symbol in renderer.find("symbols")}
    assert len(symbols) == len(renderer.find("categories"))
    found = {}
    for category in renderer.find("categories"):
        symbol = symbols[category.get("symbol")]
        assert symbol.get("type") == "fill"
        layer = symbol.find("layer[@class='SimpleFill']/Option[@type='Map']")
        values = {option.get("name"): option.get("value") for option in layer}
        found[category.get("value")] = (category.get("label"), values["color"], values["outline_color"])
    return found


def test_tiles_are_coloured_by_status():
    root = parsed(make_style())
    assert root.find("renderer-v2").get("type") == "categorizedSymbol"
    assert root.find("renderer-v2").get("attr") == "status"
    assert categories(root) == {
        "ok": ("ok", "0,158,115,0", "0,158,115,255"),
        "nodata": ("no data", "153,153,153,72", "153,153,153,255"),
        "cloud": ("cloud", "86,180,233,72", "86,180,233,255"),
        "read_error": ("could not be read", "213,94,0,72", "213,94,0,255"),
    }
    assert root.find("layerGeometryType").text == "2"  # polygons
    assert {"Symbology", "Labeling", "MapTips"} == set(root.get("styleCategories").split("|"))


def test_tiles_are_coloured_by_class_as_the_raster_is():
    labels = ["forest", "<b>&\"'", "sea\x00"]
    root = parsed(make_style(labels))
    assert root.find("renderer-v2").get("attr") == "class"
    found = categories(root)
    assert list(found) == ["forest", "<b>&\"'", "sea\ufffd", ""]
    red, green, blue, _ = class_colours(3)[1]
    assert found["<b>&\"'"] == ("<b>&\"'", f"{red},{green},{blue},72", f"{red},{green},{blue},255")
    assert found[""][0] == "no class"
    assert root.find("labeling/settings/text-style").get("fieldName") == "class"


def test_captions_are_shown_wrapped_and_as_plain_text():
    settings = parsed(make_style(label_scale=50_000)).find("labeling/settings")
    text = settings.find("text-style")
    assert (text.get("fieldName"), text.get("isExpression"), text.get("allowHtml")) == ("caption", "0", "0")
    assert int(settings.find("text-format").get("autoWrapLength")) > 0
    rendering = settings.find("rendering")
    assert (rendering.get("scaleVisibility"), rendering.get("scaleMax")) == ("1", "50000")


def test_the_map_tip_escapes_every_value():
    for root in (parsed(make_style()), parsed(make_style(["a"]))):
        tip = root.find("mapTip")
        assert tip.get("enabled") == "1"
        expressions = [part.split("%]")[0].strip() for part in tip.text.split("[%")[1:]]
        assert len(expressions) == 4
        for expression in expressions:
            assert expression.startswith("replace(replace(replace(")
            assert expression.endswith("'&', '&amp;'), '<', '&lt;'), '>', '&gt;')")


def styled(tmp_path, records, cut=1):
    target = style_target(tmp_path / "a.gpkg")
    with target.open() as writer:
        for start in range(0, len(records), cut):
            writer.write([TileResult(record) for record in records[start : start + cut]])
    assert target.path == tmp_path / "a.qml"
    return target.path.read_bytes()


def test_the_scale_of_labels_follows_the_tiles(tmp_path):
    def scale(*records):
        root = parsed(styled(tmp_path, records))
        return int(root.find("labeling/settings/rendering").get("scaleMax"))

    side = 2240 / 111_320  # of a tile of 224 pixels of 10 m, in degrees
    ring = [[0.0, 0.0], [side, 0.0], [side, side], [0.0, side], [0.0, 0.0]]
    tile = replace(RECORD, geometry={"type": "Polygon", "coordinates": [ring]})
    assert scale(tile) == 90_000  # 2240 m are 25 mm there
    assert scale(replace(RECORD, geometry=None), tile) == 90_000
    assert scale(replace(RECORD, geometry=None)) == 100_000
    assert scale() == 100_000


def test_the_same_bytes_however_results_come(tmp_path):
    assert styled(tmp_path, RECORDS, cut=1) == styled(tmp_path, RECORDS, cut=3)
    assert make_style(["a", "b"]) == make_style(["a", "b"])


def test_where_it_is():
    for name in ("a.b.geojson", "a.b.GPKG", "a.b.parquet", "a.b.geojsonl"):
        assert style_path(Path("x") / name) == Path("x/a.b.qml")
    for name in ("a.csv", "a", "a.qml"):
        with pytest.raises(OptionError, match="polygons"):
            style_target(Path(name))


def test_colours_differ_for_those_who_see_no_red():
    """Deuteranopia and protanopia after Viénot, Brettel and Mollon 1999: their distances in sRGB."""
    matrices = {
        "protanopia": ((0.11238, 0.88762, 0.0), (0.11238, 0.88762, 0.0), (0.00401, -0.00401, 1.0)),
        "deuteranopia": ((0.29275, 0.70725, 0.0), (0.29275, 0.70725, 0.0), (-0.02234, 0.02234, 1.0)),
    }
    colours = [[(int(colour[at : at + 2], 16) / 255) ** 2.2 for at in (1, 3, 5)] for colour in STATUS_COLOURS.values()]
    for matrix in matrices.values():
        seen = [
            [max(0.0, sum(a * b for a, b in zip(row, colour, strict=True))) ** (1 / 2.2) for row in matrix]
            for colour in colours
        ]
        distances = [
            sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5
            for at, one in enumerate(seen)
            for other in seen[:at]
        ]
        assert min(distances) > 0.1
