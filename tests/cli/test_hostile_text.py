"""Names, metadata and captions made by someone with bad intent, through the commands into every kind of output.

Each output is read back by a reader of its own kind; what no output and no terminal may hold is stated here once more,
independently of the code.
"""

from __future__ import annotations

import csv
import json
import logging
import re
import sqlite3
import unicodedata
import warnings
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pyarrow.parquet as pq
import pytest
import rasterio

from rsedge.cli.main import run
from rsedge.cli.say import Formatter, guard_process
from rsedge.runtime.captioner import TileCaptions
from rsedge.tomlfile import read_toml
from tests import colours, scenes
from tests.runtime.search_files import unit_vectors, write_file
from tests.runtime.test_stac import item

ATTACK = (
    "=HYPERLINK(1)\x1b]8;;http://x\x07\x1b[2J</script><script>alert(1)</script><img src=x onerror=alert(1)><!--"
    "\u202egnp\u2066\u200b\u200d\ufeff\u061c\u200e\x9b31m\u2028\u2029\r\n\t-- '\" ]]>&[% $now %] ;=1+1 \U000e0041\x00"
)
STARTS = ["", " ", '"', "\t", "＝", "-", "@", "\u200b="]
GOOD = "Grüße 水域 مرحبا 👩‍🌾"
FORMULA = re.compile(r"(?:^|;)[\s\"“”]*[=+\-@＝＋－＠]")


def hidden(text: str, *, lines: bool = False) -> list[str]:
    """What of a text no terminal shows, or obeys; the joiner of the farmer in ``GOOD`` apart."""
    text = text.replace(GOOD, "")
    kept = "\n" if lines else ""
    return [sign for sign in text if unicodedata.category(sign) in ("Cc", "Cf", "Cs", "Zl", "Zp") and sign not in kept]


def texts(values: Any) -> Iterator[str]:
    """All strings of a nested value, the names of fields among them."""
    if isinstance(values, str):
        yield values
    elif isinstance(values, dict):
        for name, value in values.items():
            yield name
            yield from texts(value)
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from texts(value)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of an output, by a reader that knows nothing of rsedge."""
    kind = path.suffix
    if kind == ".geojson":
        return [feature["properties"] for feature in json.loads(path.read_text("utf-8"))["features"]]
    if kind == ".geojsonl":
        return [json.loads(line)["properties"] for line in path.read_text("utf-8").split("\n") if line]
    if kind == ".csv":
        with path.open(encoding="utf-8", newline="") as stream:
            return list(csv.DictReader(stream, strict=True))
    if kind == ".parquet":
        return pq.read_table(path).drop_columns(["geometry"]).to_pylist()
    with sqlite3.connect(path) as database:
        database.row_factory = sqlite3.Row
        (table,) = database.execute("SELECT table_name FROM gpkg_contents").fetchone()
        return [dict(row) for row in database.execute(f'SELECT * FROM "{table}"')]


class Elements(HTMLParser):
    """The elements of a page and their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes |= {name for name, _ in attrs}


@pytest.fixture
def hostile_item(tmp_path, monkeypatch) -> Path:
    """A STAC item whose identifiers are attacks, over a scene of 3 × 5 tiles of 32 px; an empty folder to work in."""
    folder = tmp_path / "in"
    folder.mkdir()
    scenes.write(folder / "visual.tif", scenes.pixels(3, 70, 150), tags={"TIFFTAG_DATETIME": ATTACK.replace("\0", "")})
    bands = [{"name": name, "common_name": name} for name in ("red", "green", "blue")]
    asset = {"href": "visual.tif", "type": "image/tiff", "roles": ["visual"], "eo:bands": bands, "title": ATTACK}
    properties = {"s2:product_uri": ATTACK, "grid:code": f"MGRS-{ATTACK}", "s2:processing_baseline": ATTACK}
    values = {**item({"visual": asset}, properties), "id": f"../{ATTACK}"}
    (folder / "item.json").write_text(json.dumps(values))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder / "item.json"


@pytest.fixture
def hostile_captions(monkeypatch) -> None:
    """A captioner that says attacks, each behind another start, and every second time ordinary text."""
    real = TileCaptions.caption_tiles

    def caption(self, images, keys, tick=None):
        return [
            replace(each, text=GOOD if key % 2 else STARTS[key // 2 % len(STARTS)] + ATTACK)
            for key, each in enumerate(real(self, images, keys))
        ]

    monkeypatch.setattr(TileCaptions, "caption_tiles", caption)


def caption(*arguments: object) -> int:
    return run(["caption", *map(str, arguments), "--tile-size", "32", "--device", "cpu", "--max-new-tokens", "3"])


def check_terminal(capsys) -> str:
    output = capsys.readouterr()
    for text in output:
        assert hidden(text, lines=True) == []
    return output.out + output.err


@pytest.mark.parametrize("kind", ["geojson", "geojsonl", "csv", "parquet", "gpkg"])
def test_every_format_holds_plain_text(hostile_item, hostile_captions, bundle_path, capsys, kind):
    output = Path(f"out.{kind}")
    assert caption(hostile_item, "-m", bundle_path, "-o", output, "--json") == 0
    json.loads(check_terminal(capsys).splitlines()[0])
    rows = read(output)
    assert len(rows) == 15
    assert [text for text in texts(rows) if hidden(text)] == []
    assert [row["caption"] for row in rows].count(GOOD) == 7
    assert all("</script>" in row["scene"] for row in rows)  # the name itself is told
    if kind == "csv":
        assert [text for row in rows for text in row.values() if isinstance(text, str) and FORMULA.search(text)] == [
            row["score"] for row in rows
        ]
    if kind not in ("parquet", "gpkg"):
        assert hidden(output.read_text("utf-8"), lines=True) == []


def test_what_lies_beside_the_output_holds_plain_text(hostile_item, hostile_captions, bundle_path, capsys):
    more = ["--html", "r.html", "--sheet", "s.png", "--stac", "i.json", "-o", "o.geojson"]
    assert caption(hostile_item, "-m", bundle_path, *more) == 0
    check_terminal(capsys)
    page = Path("r.html").read_text("utf-8")
    assert hidden(page, lines=True) == []
    found = Elements(page)
    assert found.names.count("script") == 2  # the data, and the one script the policy allows
    assert found.names.count("img") == 1  # the picture
    assert not [name for name in found.attributes if name.startswith("on")]
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert [text for text in texts(data) if hidden(text)] == []
    assert GOOD in list(texts(data))
    assert [text for text in texts(json.loads(Path("i.json").read_text("utf-8"))) if hidden(text)] == []
    assert hidden(Path("i.json").read_text("utf-8"), lines=True) == []
    style = ElementTree.parse("o.qml")
    assert [
        text for node in style.iter() for text in (node.text or "", *node.attrib.values()) if hidden(text, lines=True)
    ] == []
    assert hidden(Path("o.geojson.config.toml").read_text("utf-8"), lines=True) == []


def test_an_output_called_after_a_scene_stays_in_its_folder(hostile_item, bundle_path):
    assert caption(hostile_item, "-m", bundle_path) == 0
    assert {path.resolve().parent for path in Path().iterdir()} == {Path().resolve()}
    assert {path.name for path in Path().parent.resolve().parent.iterdir()} == {"in", "work"}
    assert list(Path().glob("*.geojson")) != []


def test_a_file_name_is_plain_everywhere_but_where_it_is_kept(tmp_path, monkeypatch, bundle_path, capsys):
    monkeypatch.chdir(tmp_path)
    name = ATTACK.replace("/", "∕").replace("\0", "")[:80] + ".tif"
    scenes.write(tmp_path / name, scenes.pixels(3, 40, 40))
    assert caption(name, "-m", bundle_path, "-o", "o.csv") == 0
    check_terminal(capsys)
    assert hidden(Path("o.csv").read_text("utf-8"), lines=True) == []
    config = Path("o.csv.config.toml")
    assert hidden(config.read_text("utf-8"), lines=True) == []
    assert read_toml(config)["scenes"] == [name]
    Path("o.csv").unlink()
    assert run(["caption", "--config", str(config), name]) == 0  # the name still leads to the file


def test_the_journal_holds_plain_text(hostile_item, hostile_captions, bundle_path, monkeypatch, capsys):
    taken = TileCaptions.caption_tiles

    def stop(self, images, keys, tick):
        if min(keys) & 0xFFFFFFFF >= 64:
            raise KeyboardInterrupt
        return taken(self, images, keys, tick)

    monkeypatch.setattr(TileCaptions, "caption_tiles", stop)
    arguments = ["caption", str(hostile_item), "-m", str(bundle_path), "--tile-size", "8", "--device", "cpu"]
    assert run([*arguments, "-o", "o.geojson"]) == 130
    assert hidden(check_terminal(capsys), lines=True) == []
    (journal,) = Path().glob("*.journal")
    content = journal.read_text("ascii")
    assert hidden(content, lines=True) == []
    assert [
        text for line in content.splitlines() for text in texts(json.loads(line.partition(" ")[2])) if hidden(text)
    ] == []
    # Another run is told what differs.
    assert run([*arguments, "-o", "o.geojson", "--beams", "2"]) == 1
    check_terminal(capsys)


def test_classes_and_their_raster_hold_plain_labels(hostile_item, monkeypatch, capsys):
    colours.install(monkeypatch)
    Path("labels.txt").write_text(f"red {ATTACK[:100]}\u202e\x1b[1m\nblue\u200b;=1\ngreen {GOOD}\n", "utf-8")
    more = ["-m", "colours.rsedge", "--labels", "labels.txt", "--top", "3", "--raster", "c.tif", "--tile-size", "32"]
    for kind in ("csv", "geojson", "gpkg", "parquet"):
        assert run(["classify", str(hostile_item), *more, "-o", f"o.{kind}", "--overwrite"]) == 0
        rows = read(Path(f"o.{kind}"))
        assert [text for text in texts(rows) if hidden(text)] == []
        assert {f"green {GOOD}"} <= {row[name] for row in rows for name in ("class", "class_2", "class_3")}
        if kind == "csv":
            assert [
                text for row in rows for name, text in row.items() if "class" in name and FORMULA.search(text)
            ] == []
    check_terminal(capsys)
    names = [node.text for node in ElementTree.parse("c.tif.aux.xml").iter("Category")]
    assert len(names) == 4
    with rasterio.open("c.tif") as dataset:
        told = [*dataset.tags().values(), *names]
    assert [text for text in told if hidden(text)] == []
    style = ElementTree.parse("o.gpkg.qml" if Path("o.gpkg.qml").exists() else "o.qml")
    labels = [node.attrib["value"] for node in style.iter("category")]
    assert labels[2] == f"green {GOOD}"
    assert [text for text in labels if hidden(text)] == []


def test_heat_maps_hold_plain_texts(hostile_item, monkeypatch, capsys):
    colours.install(monkeypatch)
    text = "red " + ATTACK.replace("\0", "")
    arguments = [
        "--text",
        text,
        "--window",
        "32",
        "--stride",
        "16",
        "-m",
        "colours.rsedge",
        "-o",
        "h.tif",
        "--png",
        "h.png",
    ]
    assert run(["locate", str(hostile_item), *arguments, "--json"]) == 0
    out = check_terminal(capsys).splitlines()
    assert [each for line in out if line.startswith("{") for each in texts(json.loads(line)) if hidden(each)] == []
    with rasterio.open("h.tif") as dataset:
        told = [*dataset.tags().values(), *filter(None, dataset.descriptions)]
    assert [each for each in told if hidden(each)] == []
    assert hidden(Path("h.tif.config.toml").read_text("utf-8"), lines=True) == []


def test_embeddings_of_strangers_are_searched_and_shown_plain(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = 20
    stranger = {name: [start + ATTACK for start in STARTS * 3][:rows] for name in ("scene", "caption", "message")}
    stranger["scene"][0] = "good"
    stranger |= {"product_id": [GOOD] * rows, "mgrs_tile": [ATTACK] * rows}
    write_file(tmp_path / "a.parquet", unit_vectors(rows, 8), captions=True, **stranger)
    arguments = ["search", "a.parquet", "--tile", "good:0:0", "--top", "9"]
    for kind in ("csv", "geojson", "geojsonl", "gpkg"):
        assert run([*arguments, "-o", f"o.{kind}"]) == 0, capsys.readouterr().err
        found = read(Path(f"o.{kind}"))
        assert len(found) == 9
        assert [text for text in texts(found) if hidden(text)] == []
        if kind == "csv":
            named = [text for row in found for name, text in row.items() if "score" not in name]
            assert [text for text in named if FORMULA.search(text)] == []
    assert run(arguments) == 0
    assert "=HYPERLINK" in check_terminal(capsys)
    assert run([*arguments, "--json"]) == 0
    values = json.loads(check_terminal(capsys))
    assert [text for text in texts(values) if hidden(text)] == []
    assert GOOD in list(texts(values))


@pytest.mark.parametrize("command", [["caption"], ["info"], ["--debug", "caption"], ["--debug", "info"]])
def test_messages_are_plain(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    name = ATTACK.replace("/", "∕").replace("\0", "")[:80]
    Path(f"{name}.tif").write_text("no raster")
    Path("item.json").write_text(json.dumps({**item({ATTACK: {"href": ATTACK}}), "id": ATTACK}))
    Path(f"{name}.rsedge").mkdir()
    (Path(f"{name}.rsedge") / "manifest.json").write_text(json.dumps({"format_version": ATTACK}))
    for target in (f"{name}.tif", "item.json", f"{name}.rsedge", f"{name}.no", "item.json"):
        assert run([*command, target, "--device", "cpu"]) in (1, 2)
        assert check_terminal(capsys)
    assert run([*command, "a", f"--{ATTACK}".replace("\0", "")]) == 2
    assert "No such option" in check_terminal(capsys)


def test_info_tells_a_scene_in_plain_text(hostile_item, capsys):
    for more in ([], ["--json"]):
        assert run(["info", str(hostile_item), "--no-probe", *more]) == 0
        told = check_terminal(capsys)
        assert "=HYPERLINK" in told
    assert [text for text in texts(json.loads(told)) if hidden(text)] == []


def test_logs_and_warnings_are_plain(monkeypatch, capsys):
    record = logging.LogRecord("rsedge", logging.INFO, "", 0, "%s\nsecond line", (ATTACK,), None)
    assert hidden(Formatter("%(message)s").format(record), lines=True) == []
    assert Formatter("%(message)s").format(record).endswith("\nsecond line")
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr("threading.excepthook", None)
    guard_process()
    said = warnings.formatwarning(UserWarning(ATTACK), UserWarning, "a.py", 1)
    assert "UserWarning: =HYPERLINK" in said
    assert hidden(said, lines=True) == []
