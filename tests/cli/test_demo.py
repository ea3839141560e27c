"""`rsedge demo` from an installation: no network, no torch, and captions that fit what was generated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rsedge.bundle import read_bundle
from rsedge.cli.config import built_in_model
from rsedge.cli.main import run
from rsedge.runtime.demo.scene import compose_scene
from tools.builtin_model.compose import GENERATED
from tools.builtin_model.words import WORDS, covers, named_covers

TILES = 6 * 8

_WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "onnx", "rsedge.export", "rsedge.training"):
    sys.modules[name] = None  # importing it now raises
from rsedge.cli.main import main
main(["demo", "-o", sys.argv[1], "--device", "cpu"])
"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The finished process, its folder, and the records it wrote."""
    folder = tmp_path_factory.mktemp("demo") / "new" / "out"
    process = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TORCH, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert process.returncode == 0, process.stderr
    features = json.loads((folder / "captions.geojson").read_text())["features"]
    return process, folder, [feature["properties"] for feature in features]


@pytest.fixture(scope="module")
def land():
    return compose_scene(seed=7)


def test_it_captions_every_tile_that_has_data(demo):
    _, _, records = demo
    assert len(records) == TILES
    for record in records:
        assert (record["status"] == "ok") == (record["nodata_fraction"] <= 0.5)
        assert (record["caption"] is not None) == (record["status"] == "ok")
    assert records[0]["status"] == "nodata"


def test_captions_name_what_is_there(demo, land):
    _, _, records = demo
    hits, there = [], []
    for record in records:
        if record["caption"] is None:
            continue
        found = land.shares(record["row_off"], record["col_off"], 224)
        shares = covers({GENERATED[name]: share for name, share in found.items()})
        named = named_covers(record["caption"])
        hits.append(max(shares, key=shares.__getitem__) in named)
        there += [name in shares for name in named]
    assert len(hits) > 40
    assert sum(hits) / len(hits) >= 0.8
    assert sum(there) / len(there) >= 0.8


def test_captions_vary(demo):
    _, _, records = demo
    texts = [record["caption"] for record in records if record["caption"]]
    assert len(set(texts)) > 10
    shown = {next(iter(covers({name: 1.0}))) for name in GENERATED.values()}
    assert len(shown & set.union(*map(named_covers, texts))) >= len(shown) - 2


def test_the_sheet_shows_the_tiles_where_they_lie(demo, land):
    _, folder, _ = demo
    sheet = np.asarray(Image.open(folder / "sheet.png"))
    width = (sheet.shape[1] - 8) // 8
    assert width > 150
    tile = np.asarray(Image.fromarray(land.image[3 * 224 : 4 * 224, 5 * 224 : 6 * 224]).resize((200, 200)), np.int16)
    column = sheet[:, 5 * width + 8 : 5 * width + 208].astype(np.int16)
    # Rows are as high as their captions: the tile of row 3 lies below the middle of the three rows above it.
    differences = [np.abs(column[top : top + 200] - tile).mean() for top in range(3 * width, 3 * (width + 85))]
    assert min(differences) < 12


def test_the_report_holds_every_caption(demo):
    _, folder, records = demo
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert all(record["caption"] in page for record in records if record["caption"])


def test_it_prints_a_line_per_tile_and_says_what_it_is(demo):
    process, folder, records = demo
    lines = process.stdout.splitlines()
    assert str(folder / "sheet.png") in lines[-1]
    assert records[0]["model"] in lines[-1]
    table = [line.split(maxsplit=4) for line in lines[1 : TILES + 1]]
    assert [(int(row), int(col)) for row, col, *_ in table] == [(record["row"], record["col"]) for record in records]
    assert [row[4] for row in table] == [record["caption"] or f"({record['message']})" for record in records]
    assert all(8.9 < float(lon) < 9.3 and 44.1 < float(lat) < 44.5 for _, _, lon, lat, _ in table)
    assert str(folder / "captions.geojson") in process.stdout


def test_a_second_demo_replaces_the_first(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("demo-out").mkdir()
    Path("demo-out/captions.geojson").write_text("an earlier one")
    Path("demo-out/notes.txt").write_text("mine")
    assert run(["demo", "--seed", "8", "--device", "cpu"]) == 0
    assert "generated from seed 8" in capsys.readouterr().out
    assert len(json.loads(Path("demo-out/captions.geojson").read_text())["features"]) == TILES
    assert {path.name for path in Path("demo-out").iterdir()} == {
        "captions.geojson",
        "notes.txt",
        "report.html",
        "scene.tif",
        "sheet.png",
    }


def test_an_output_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    assert run(["demo", "-o", str(tmp_path / "taken")]) == 2
    (tmp_path / "locked").write_text("")
    assert run(["demo", "-o", str(tmp_path / "locked" / "in")]) == 1
    assert "choose another" in capsys.readouterr().err


def test_the_built_in_model_is_small_and_its_card_says_what_it_is():
    bundle = read_bundle(built_in_model())
    assert sum(path.stat().st_size for path in bundle.path.iterdir()) < 10e6
    card = (bundle.path / "README.md").read_text(encoding="utf-8")
    for part in ("EuroSAT", "Helber", "MIT licence", "modified Copernicus Sentinel data", "never entered training"):
        assert part in card, part
    for words in WORDS.values():
        assert any(word in card for word in words)
