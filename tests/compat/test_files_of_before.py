"""Files that rsedge 0.1.0 wrote on 2026-11-21, before the modules moved, behave as they did.

``captions.parquet``, ``tiles.parquet`` and ``cut.geojson.journal`` (of a run killed after its first segment) are of one
generated scene, 300 x 460 px, uint8; the embeddings are of a small CLIP with random weights. ``manifest.json`` is
that of the built-in bundle of then, whose other files are those of now; tiles at the edge were padded.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet
import pytest

from rsedge.cli.config import built_in_model
from rsedge.cli.main import run
from tests import scenes

HERE = Path(__file__).parent
AS_BEFORE = ("--edge", "pad", "-m", "before.rsedge")


@pytest.fixture
def scene(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(built_in_model(), "before.rsedge")
    shutil.copy(HERE / "manifest.json", "before.rsedge")
    return scenes.write(tmp_path / "scene.tif", scenes.pixels(3, 300, 460))


def test_a_journal_of_another_version_is_refused(scene, capsys):
    shutil.copy(HERE / "cut.geojson.journal", ".")
    assert run(["caption", str(scene), "-o", "cut.geojson", "--device", "cpu", *AS_BEFORE]) == 1
    assert "cut.geojson.journal is not a journal of this version" in capsys.readouterr().err
    assert Path("cut.geojson.journal").read_bytes() == (HERE / "cut.geojson.journal").read_bytes()


def test_captions_are_what_they_were(scene):
    assert run(["-q", "caption", str(scene), "-o", "captions.parquet", "--device", "cpu", *AS_BEFORE]) == 0
    before, now = (pyarrow.parquet.read_table(path) for path in (HERE / "captions.parquet", "captions.parquet"))
    assert [name for name in now.schema.names if name != "covered"] == before.schema.names
    assert before.to_pylist() == now.drop_columns("covered").to_pylist()


def test_embeddings_are_searched(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["search", str(HERE / "tiles.parquet"), "--tile", "scene:0:0", "--top", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["found"]
    places = [(hit["row"], hit["col"], round(hit["score"], 3)) for hit in found]
    assert places == [(1, 0, 0.910), (1, 1, 0.829), (0, 2, 0.756)]  # what the program of then found in them
