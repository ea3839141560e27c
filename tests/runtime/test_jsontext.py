"""JSON read value by value: the values of ``json.loads``, its errors, and what bombs cost."""

from __future__ import annotations

import itertools
import json
import string

import pytest

from rsedge import jsonvalues
from rsedge.jsonvalues import json_members, parse_json
from rsedge.runtime.scenes.products.stac import read_if_stac
from tests.measured import measure

SETUP = "from rsedge.runtime.scenes.catalog import find"


def collected(data):
    found = {}
    for name, value in json_members(data, "features"):
        if name == "features":
            found.setdefault(name, []).append(value)
        else:
            found[name] = value
    return found


DOCUMENTS = [
    {"features": [{"a": 1}, {"b": [1, 2.5, None, True, "ü€😀"]}], "type": "x"},
    {"type": "é", "features": [1, -2, 3.25, "text", [], {}], "links": [{"rel": "next"}]},
    {"a": {"features": [1]}},
    {"features": ["x" * 70_000, "ü" * 70_000, 5]},
    {"x": '\\ " \n \t'},
]


@pytest.mark.parametrize("document", DOCUMENTS, ids=range(len(DOCUMENTS)))
@pytest.mark.parametrize("options", [{}, {"ensure_ascii": False}, {"indent": 2}, {"separators": (",", ":")}])
def test_values_are_those_of_json(document, options):
    text = json.dumps(document, **options)
    for data in (text, text.encode(), b"\xef\xbb\xbf" + text.encode(), f" \r\n\t{text}\n ".encode()):
        assert collected(data) == document
        assert parse_json(data) == document


@pytest.mark.parametrize("size", [jsonvalues._WINDOWS[0] + extra for extra in (-2, -1, 0, 1, 2, 9)])
def test_a_number_is_whole_wherever_the_piece_ends(size):
    number = "1." + "0" * (size - 3) + "e"
    for text in (number + "1", number + "+1", number + "-25"):
        assert parse_json(text) == json.loads(text)
        assert collected(f'{{"features": [{text}, {text}]}}')["features"] == [json.loads(text)] * 2


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_letter_of_several_bytes_may_stand_where_the_piece_ends(cut):
    text = "x" * (jsonvalues._WINDOWS[0] - 1 - cut) + "😀" + "y" * 9
    assert collected(json.dumps({"features": [text]}, ensure_ascii=False)) == {"features": [text]}


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", '{"a"', '{"a":', '{"a":1', '{"a":1,}', '{"a" 1}', '{"a":1 "b":2}', "{1:2}", '{"a":1}x', "nonsense"),
        *('{"features":[1,]}', '{"features":[1 2]}', '{"features":[1', '{"features":[}', '{"a":tru}', '{"a":"\\x"}'),
        '{"a":"\n"}',
    ],
)
def test_what_json_refuses_is_refused(text):
    with pytest.raises(ValueError, match=r"line \d+ column \d+"):
        collected(text)
    with pytest.raises(ValueError, match=r"line \d+ column \d+"):
        parse_json(text)
    with pytest.raises(ValueError, match=r"line \d+ column \d+"):
        json.loads(text)


def test_errors_say_where():
    with pytest.raises(ValueError, match="Expecting value: line 3 column 7"):
        collected('{"a": "ü",\n "b": [\n"ü": 😀]}'.replace('"ü": 😀', '"ü", 😀'))
    with pytest.raises(ValueError, match="utf-8"):
        collected(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match="no JSON object"):
        collected("[1, 2]")


def test_limits(monkeypatch):
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        collected('{"a": ' + '{"b":' * 100_000)
    with pytest.raises(ValueError, match="a value has more than 2097152 bytes"):
        parse_json(f'"{"x" * 2**21}"')
    with pytest.raises(ValueError, match="a value has more than"):
        collected(f'{{"features": [1, "{"x" * 2**21}", 2]}}')
    with pytest.raises(ValueError, match="beside features"):
        collected("{" + ",".join(f'"{number}": "{"x" * 2**19}"' for number in range(5)) + "}")
    with pytest.raises(ValueError, match="beside features"):
        collected("{" + ",".join(f'"{number}": 1' for number in range(1002)) + "}")
    with pytest.raises(ValueError, match="it has about 3200009 values, and at most 2500000 are read"):
        collected('{"features": [' + ",".join(["[" + "0," * 399_999 + "0]"] * 8) + "]}")
    with pytest.raises(ValueError, match="more than 10000 elements"):
        collected('{"features": [' + "1," * 10_000 + "1]}")
    monkeypatch.setattr(jsonvalues, "LARGEST", 10)
    with pytest.raises(ValueError, match="it has 13 bytes, and at most 10 are read"):
        collected('{"a": "1234"}')


# ---- what it costs ----


def item(number):
    """An item of the size that catalogues of Sentinel-2 write: 20 kB, 1,000 brackets and commas."""
    assets = {
        name: {
            "href": f"https://example.com/tiles/29/R/KH/2020/2/S2A_29RKH_{number}_0_L2A/{name}.tif",
            "type": "image/tiff; application=geotiff; profile=cloud-optimized",
            "title": f"Band {name} as it was measured on the ground",
            "eo:bands": [{"name": name, "common_name": name, "center_wavelength": 0.665, "full_width_half_max": 0.038}],
            "proj:shape": [10980, 10980],
            "proj:transform": [10, 0, 199980, 0, -10, 2800020, 0, 0, 1],
            "raster:bands": [{"nodata": 0, "data_type": "uint16", "spatial_resolution": 10, "scale": 0.0001}],
            "roles": ["data", "reflectance"],
        }
        for name in ("red", "green", "blue", *(f"band{index}" for index in range(22)))
    }
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "id": f"S2A_29RKH_{number}",
        "geometry": {"type": "Polygon", "coordinates": [[[index / 7, index / 9] for index in range(60)]]},
        "properties": {"datetime": "2023-02-19T11:34:25Z", **{f"s2:field_{index}": "x" * 40 for index in range(60)}},
        "links": [{"rel": f"link{index}", "href": "https://example.com/" + "x" * 60} for index in range(9)],
        "assets": assets,
    }


def test_a_collection_of_2000_items_is_read(tmp_path):
    path = tmp_path / "items.json"
    one = json.dumps(item(0))
    assert 19_000 < len(one) < 23_000
    assert sum(map(one.count, "[{,")) > 900
    features = ",".join(one.replace("S2A_29RKH_0", f"S2A_29RKH_{number}") for number in range(2000))
    path.write_text('{"type": "FeatureCollection", "features": [' + features + "]}")
    code = f"products = find({str(path)!r}, access=Access(remote=True)); assert len(products) == 2000, len(products)"
    said, seconds, memory = measure(f"{SETUP}\nfrom rsedge.runtime.scenes.access import Access", code)
    assert said is None
    assert seconds < 4
    assert memory < 300


def nested(depth, width):
    return "[" + ",".join(["[" * depth + "]" * depth] * width) + "]"


def unique_keys(count):
    names = map("".join, itertools.product(string.ascii_letters, repeat=4))
    return "[" + ",".join(f'{{"{name}":1}}' for name in itertools.islice(names, count)) + "]"


def item_with(value):
    return f'{{"stac_version":"1.0.0","x":{value}}}'


HEAD = '{"type":"FeatureCollection","stac_version":"1.0.0","features":['
BOMBS = {
    "one nest": lambda: HEAD + "[" * 60_000_000,
    "nests": lambda: HEAD + nested(900, 33_000),
    "nests within the count": lambda: HEAD + ",".join([item_with(nested(900, 1000))] * 2) + "]}",
    "lists within the count": lambda: HEAD + ",".join([item_with("[" + "[]," * 600_000 + "[]]")] * 2) + "]}",
    "keys within the count": lambda: HEAD + ",".join([item_with(unique_keys(180_000))] * 6) + "]}",
    "small items": lambda: HEAD + ",".join([item_with(1)] * 800_000) + "]}",
    "members": lambda: HEAD + "]," + '"a":{},' * 9_000_000 + '"a":1}',
    "one string": lambda: HEAD + '"' + "x" * 60_000_000 + '"]}',
    "wide letters": lambda: HEAD + '"😀' + "x" * 60_000_000 + '"]}',
    "too large": lambda: HEAD + '"' + "x" * 70_000_000 + '"]}',
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_soon(tmp_path, name):
    path = tmp_path / "items.json"
    path.write_text(BOMBS[name](), encoding="utf-8")
    said, seconds, memory = measure(SETUP, f"find({str(path)!r})")
    path.unlink()
    assert said is not None
    assert "items.json" in said
    assert seconds < 2, said
    assert memory < 300, said


def test_an_item_is_parsed_once(tmp_path, monkeypatch):
    from rsedge.runtime.scenes.catalog import find
    from rsedge.runtime.scenes.products import stac

    calls = []
    monkeypatch.setattr(stac, "json_members", lambda *args: calls.append(args) or json_members(*args))
    path = tmp_path / "item.json"
    path.write_text(json.dumps({**item(0), "assets": {name: {"href": "a.tif"} for name in ("red", "green", "blue")}}))
    (tmp_path / "a.tif").touch()
    assert len(find(str(path))) == 1
    assert len(calls) == 1
    assert len(find(str(tmp_path))) == 1
    assert len(calls) == 2
    assert read_if_stac(str(path))
