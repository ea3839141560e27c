from __future__ import annotations

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from rsedge.cli.main import run
from rsedge.runtime import embedder
from tests.runtime.search_files import MODEL_HASH, brute_force, unit_vectors, write_file
from tests.scenes import pixels, write


class FakeEmbedder:
    model, hash = "clip@0123456789ab", MODEL_HASH

    def __init__(self, vector):
        self._vector = vector

    def embed_texts(self, texts):
        return self._vector[None] if texts == ["a lake"] else -self._vector[None]

    def embed_images(self, images):
        assert images.shape == (1, 10, 12, 3)
        return self._vector[None]


@pytest.fixture
def file(tmp_path):
    vectors = unit_vectors(200, 16)
    return write_file(
        tmp_path / "a.parquet", vectors, cloud_fraction=[(k % 10) / 10 for k in range(200)], captions=True
    )


@pytest.fixture
def model(monkeypatch):
    fake = FakeEmbedder(unit_vectors(1, 16, 8, "float32")[0])
    monkeypatch.setattr(embedder.Embedder, "load", lambda path, **options: fake)
    monkeypatch.setattr("rsedge.cli.options.chosen_embedder", lambda path: path)
    return fake


def test_a_text_gives_ranked_geojson(file, model, tmp_path):
    output = tmp_path / "hits.geojson"
    assert run(["search", str(file), "--text", "a lake", "-m", "clip.rsedge", "--top", "7", "-o", str(output)]) == 0
    content = json.loads(output.read_text())
    rows, scores = brute_force(unit_vectors(200, 16), model._vector, np.ones(200, bool), 7)
    found = [feature["properties"] for feature in content["features"]]
    assert [each["row"] * 10 + each["col"] for each in found] == rows.tolist()
    assert [each["rank"] for each in found] == list(range(1, 8))
    np.testing.assert_allclose([each["score"] for each in found], scores, atol=1e-6)
    assert found[0]["caption"] == "a field"
    assert found[0]["caption_score"] == -0.5
    assert found[0]["embeddings"] == str(file)
    assert content["features"][0]["geometry"]["type"] == "Polygon"
    assert run(["search", str(file), "--text", "a lake", "-m", "x", "-o", str(output)]) == 1, "it exists"
    assert run(["search", str(file), "--text", "a lake", "-m", "x", "-o", str(output), "--overwrite"]) == 0


def test_an_image_is_a_query(file, model, tmp_path, capsysbinary):
    Image.fromarray(np.zeros((10, 12, 3), np.uint8)).save(tmp_path / "query.png")
    run(["search", str(file), "--text", "a lake", "-o", "-"])
    by_text = capsysbinary.readouterr().out
    assert run(["search", str(file), "--image", str(tmp_path / "query.png"), "-o", "-"]) == 0
    assert capsysbinary.readouterr().out == by_text
    assert len(by_text.splitlines()) == 20
    assert json.loads(by_text.splitlines()[0])["type"] == "Feature"


def test_a_tile_needs_no_model_and_filters_hold(file, tmp_path):
    output = tmp_path / "hits.csv"
    arguments = ["search", str(file.parent), "--tile", "a:3:4", "--max-cloud", "0.3", "--where", "row < 15"]
    arguments += ["--bbox", "0,0,50,1", "--since", "2024-05-31", "--until", "2024-05-31", "--top", "200"]
    assert run([*arguments, "-o", str(output)]) == 0
    rows = list(csv.DictReader(output.open()))
    allowed = np.array([k % 10 <= 3 and k // 10 < 15 and k <= 150 and k % 100 <= 50 for k in range(200)])
    expected, _ = brute_force(unit_vectors(200, 16), unit_vectors(200, 16)[34], allowed, 200)
    assert [int(row["row"]) * 10 + int(row["col"]) for row in rows] == expected.tolist()
    assert rows[0]["geometry"].startswith("POLYGON ((")


def test_hits_are_listed_where_they_go_nowhere(file, capsys):
    assert run(["search", str(file), "--tile", "a:3:4", "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].split()[0] == "1"
    assert run(["search", str(file), "--tile", "a:3:4", "--top", "2", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["hits"], summary["tiles"]) == (2, 200)
    assert [hit["rank"] for hit in summary["found"]] == [1, 2]


def test_a_contact_sheet_shows_the_hits(file, tmp_path, caplog):
    (tmp_path / "scenes").mkdir()
    write(tmp_path / "scenes" / "a.tif", pixels(3, 160, 80))
    sheet = tmp_path / "hits.png"
    arguments = ["search", str(file), "--tile", "a:3:4", "--top", "3", "--sheet", str(sheet)]
    assert run([*arguments, "--pixels-from", str(tmp_path / "scenes")]) == 0
    assert Image.open(sheet).width == 3 * 208 + 8
    assert "have no pixels" not in caplog.text
    assert run([*arguments, "--overwrite"]) == 0
    assert "3 of 3 hits" in caplog.text
    sheet.unlink()
    assert run([*arguments, "--where", "row = 999"]) == 0
    assert not sheet.exists()
    assert "nothing was found" in caplog.text


def test_an_index_is_made_measured_and_used(file, capsys):
    pytest.importorskip("faiss")
    assert run(["search", str(file), "--build-index", "--measure-recall", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["indexes"] == [f"{file}.index"]
    assert 0.9 < summary["recall"] <= 1
    assert run(["search", str(file), "--tile", "a:3:4", "--approximate"]) == 0
    approximate = capsys.readouterr().out
    assert run(["search", str(file), "--tile", "a:3:4", "--exact"]) == 0
    assert capsys.readouterr().out == approximate


def test_another_model_is_refused(file, model, capsys):
    model.hash = "f" * 64
    assert run(["search", str(file), "--text", "a lake"]) == 2
    message = capsys.readouterr().err
    assert "f" * 64 in message
    assert MODEL_HASH in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --text, --image or --tile"),
        (["--text", "a", "--tile", "a:0:0"], "--text and --tile: give one query"),
        (["--tile", "a:0:0", "-m", "x", "--device", "cpu"], "leave out --model, --device"),
        (["--tile", "a:0"], "give a scene, a row and a column"),
        (["--tile", "a:0:0", "--bbox", "1,2,3"], "give west, south, east, north"),
        (["--tile", "a:0:0", "--pixels-from", "x"], "leave out --pixels-from"),
        (["--tile", "a:0:0", "--where", "rwo = 1"], "position 1"),
        (["--tile", "a:0:0", "-o", "x.parquet"], "names a format for hits"),
        (["--tile", "a:0:0", "--approximate"], "--build-index"),
        (
            ["--build-index", "--tile", "a:0:0", "--top", "3", "--exact"],
            "leave out --tile, --top, --approximate/--exact",
        ),
    ],
)
def test_what_cannot_be_asked_for_is_refused(file, arguments, message, capsys):
    assert run(["search", str(file), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_it_runs_without_torch(file):
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'rsedge.training', 'rsedge.export', 'faiss'): sys.modules[name] = None\n"
        "from rsedge.cli.main import run\n"
        f"sys.exit(run(['search', {str(file)!r}, '--tile', 'a:3:4', '-o', '-']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 20
