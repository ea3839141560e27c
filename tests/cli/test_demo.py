"""`rsedge demo` from an installation: no network, no torch, and captions that fit what was generated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rsedge.bundle import read_bundle
from rsedge.cli.demo import CAVEAT
from rsedge.cli.main import run
from rsedge.runtime.default_model import built_in_model
from rsedge.runtime.synthetic import CLASSES, compose_scene

WORDS = {
    "farmland": {"farmland", "fields"},
    "forest": {"forest", "woodland"},
    "grassland": {"grassland", "meadows"},
    "desert": {"desert"},
    "town": {"town", "houses"},
    "industrial area": {"industrial"},
    "lake": {"lake"},
    "sea": {"sea"},
    "river": {"river"},
    "road": {"road"},
}
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


def named(caption: str) -> set[str]:
    words = set(caption.replace(",", " ").split())
    return {name for name, synonyms in WORDS.items() if words & synonyms}


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
        shares = land.shares(record["row_off"], record["col_off"], 224)
        classes = named(record["caption"])
        hits.append(next(iter(shares)) in classes)
        there += [name in shares for name in classes]
    assert len(hits) > 40
    assert sum(hits) / len(hits) >= 0.8
    assert sum(there) / len(there) >= 0.8


def test_captions_vary(demo):
    _, _, records = demo
    assert len({record["caption"] for record in records}) > 10
    assert len(set.union(*(named(record["caption"]) for record in records if record["caption"]))) >= len(CLASSES) - 2


def test_it_prints_a_line_per_tile_and_says_what_it_is(demo):
    process, folder, records = demo
    lines = process.stdout.splitlines()
    assert lines[-1] == CAVEAT
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
    assert {path.name for path in Path("demo-out").iterdir()} == {"captions.geojson", "notes.txt", "scene.tif"}


def test_an_output_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    assert run(["demo", "-o", str(tmp_path / "taken")]) == 2
    (tmp_path / "locked").write_text("")
    assert run(["demo", "-o", str(tmp_path / "locked" / "in")]) == 1
    assert "choose another" in capsys.readouterr().err


def test_the_packaged_bundle_is_small_and_says_what_it_was_trained_on():
    bundle = read_bundle(built_in_model())
    assert sum(path.stat().st_size for path in bundle.path.iterdir()) < 4e6
    assert "no real imagery" in bundle.manifest.provenance.recipe["data"]
    assert "not for real images" in (bundle.path / "README.md").read_text(encoding="utf-8")
