"""`rsedge classify` as a user runs it, with a tiny CLIP."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import rasterio

from rsedge.cli.main import run
from tests import colours, scenes
from tests.dual_encoders import make_clip, make_siglip

LABELS = "field,water,SparseResidential"


@pytest.fixture(scope="module", params=["clip", "siglip"])
def bundle(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rsedge.export.convert import export

    folder = tmp_path_factory.mktemp(request.param)
    make = {"clip": make_clip, "siglip": make_siglip}[request.param]
    return export(make(folder / "model"), folder / "model.rsedge").path


@pytest.fixture
def scene(tmp_path: Path, monkeypatch) -> Path:
    """A scene of 5 × 3 tiles of 32 px, and an empty working directory beside it."""
    monkeypatch.chdir(tmp_path)
    return scenes.write(tmp_path / "scene.tif", scenes.pixels(3, 70, 150))


@pytest.fixture
def colour_model(monkeypatch) -> str:
    """What to pass with -m, where what a model says shall be known."""
    colours.install(monkeypatch)
    return "colours.rsedge"


def classify(*arguments: object) -> int:
    return run(["classify", "--tile-size", "32", "--device", "cpu", *map(str, arguments)])


def properties(path: str = "scene.classes.geojson") -> list[dict]:
    return [feature["properties"] for feature in json.loads(Path(path).read_text())["features"]]


def test_classes_are_those_of_embeddings_compared_by_hand(scene, bundle):
    from rsedge import Scene
    from rsedge.runtime.embedder import Embedder

    assert classify(scene, "-m", bundle, "--labels", LABELS, "--ensemble", "--top", 2, "--raster", "classes.tif") == 0
    embedder = Embedder.load(bundle, device="cpu")
    texts = [
        [text.format(label) for text in (
            "An aerial photograph of {}", "a satellite image of {}", "a satellite photo of {}", "an aerial view of {}",
            "a remote sensing image of {}",
        )]
        for label in ("field", "water", "sparse residential")
    ]  # fmt: skip
    anchors = np.stack([embedder.embed_texts(five).astype(float).mean(axis=0) for five in texts])
    anchors /= np.linalg.norm(anchors, axis=1, keepdims=True)
    tiles = [vector.astype(float) for _, vector in embedder.embed_scene(Scene.open(scene), tile_size=32)]
    logits = np.stack(tiles) @ anchors.T * embedder.logit_scale
    if embedder.logit_bias is None:
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    else:
        probabilities = 1 / (1 + np.exp(-logits - embedder.logit_bias))
    order = np.argsort(-logits, axis=1)
    names = np.array(LABELS.split(","))
    found = properties()
    assert [record["class"] for record in found] == names[order[:, 0]].tolist()
    assert [record["class_2"] for record in found] == names[order[:, 1]].tolist()
    best = np.take_along_axis(probabilities, order[:, :1], axis=1)[:, 0]
    np.testing.assert_allclose([record["probability"] for record in found], best, atol=6e-5)
    with rasterio.open("classes.tif") as raster:
        assert raster.read(1).ravel().tolist() == (order[:, 0] + 1).tolist()


def test_summary_goes_to_stdout_and_talk_to_stderr(scene, bundle, capsys, caplog):
    Path("labels.txt").write_text("Feld\nGewässer\n", encoding="utf-8")
    arguments = [scene, "-m", bundle, "--labels", "labels.txt"]
    assert classify(*arguments, "--template", "ein Bild: {}", "-o", "a.csv", "--raster", "a.tif", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["tiles"], summary["ok"], summary["device"]) == (15, 15, "cpu")
    assert list(summary["classes"]) == ["Feld", "Gewässer"]
    assert sum(summary["classes"].values()) == 15
    assert (summary["output"], summary["raster"]) == ("a.csv", "a.tif")
    assert classify(*arguments) == 0
    assert capsys.readouterr().out == ""
    counts = {name: len([r for r in properties() if r["class"] == name]) for name in ("Feld", "Gewässer")}
    assert all(f"{name} {count}" in caplog.messages[-1] for name, count in counts.items() if count)


def test_classes_are_shown_as_captions_are(scene, bundle):
    views = ["--html", "report.html", "--sheet", "sheet.png", "--stac", "item.json"]
    assert classify(scene, "-m", bundle, "--labels", LABELS, *views) == 0
    features = json.loads(Path("scene.classes.geojson").read_text())["features"]
    named = {feature["properties"]["class"] for feature in features} - {None}
    page, style = Path("report.html").read_text(), Path("scene.classes.qml").read_text()
    assert named
    assert all(label in page and label in style for label in named)
    assert "classes" in json.loads(Path("item.json").read_text())["assets"]
    assert Path("sheet.png").stat().st_size > 0


def test_the_saved_configuration_is_the_very_same_run(scene, bundle):
    options = ["--labels", LABELS, "--template", "a {}", "--template", "the {category}", "--top", 3]
    assert classify(scene, "-m", bundle, *options, "--overlap", 8, "--raster", "classes.tif", "-o", "a.geojson") == 0
    first = {name: Path(name).read_bytes() for name in ("a.geojson", "classes.tif", "classes.tif.aux.xml")}
    for name in first:
        Path(name).unlink()
    assert run(["classify", "--config", "a.geojson.config.toml"]) == 0
    assert {name: Path(name).read_bytes() for name in first} == first


def test_colours_are_found(tmp_path, monkeypatch, colour_model):
    monkeypatch.chdir(tmp_path)
    names = [["red", "green"], ["-", "blue"]]
    scenes.write(tmp_path / "scene.tif", colours.blocks(names, 32), photometric="RGB", nodata=0)
    assert classify("scene.tif", "-m", colour_model, "--labels", "red,blue,green") == 0
    assert [record["class"] for record in properties()] == ["red", "green", None, "blue"]
    assert [record["status"] for record in properties()] == ["ok", "ok", "nodata", "ok"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "--labels"),
        (["--labels", "field"], 2, "neither a file nor a list"),
        (["--labels", ","], 2, "neither a file nor a list"),
        (["--labels", "absent.txt"], 2, "neither a file nor a list"),
        (["--labels", "field,water,field"], 2, "(field and field mean the same)"),
        (["--labels", "latin.txt"], 2, "latin.txt, line 1, are not UTF-8"),
        (["--labels", "empty.txt"], 2, "labels are none"),
        (["--labels", LABELS, "--template", "a photo"], 2, "has no {category} and no {}"),
        (["--labels", LABELS, "--template", "a {}", "--ensemble"], 2, "leave --template out"),
        (["--labels", LABELS, "--top", "4"], 2, "top is 4, expected 1 to 3"),
        (["--labels", LABELS, "--raster", "a.jpg"], 2, "end its name in .tif"),
        (["--labels", LABELS, "-o", "a.shp"], 2, ".geojson"),
        (["--labels", LABELS, "--raster", "latin.tif"], 1, "latin.tif exists already"),
        (["--labels", LABELS, "--raster", "scene.tif", "--overwrite"], 2, "the scene itself is never replaced"),
        (["--labels", LABELS, "second.tif"], 2, "pass -o"),
        (
            ["--labels", LABELS, "second.tif", "-o", "a.csv", "--raster", "a.tif"],
            2,
            "2 scenes do not fit in one raster",
        ),
    ],
)
def test_bad_values_are_refused_before_any_work(scene, colour_model, capsys, arguments, code, message):
    Path("latin.txt").write_bytes("Gewässer\nFeld\n".encode("latin-1"))
    Path("latin.tif").touch()
    Path("empty.txt").touch()
    Path("second.tif").write_bytes(scene.read_bytes())
    before = sorted(Path().iterdir())
    assert classify(scene, "-m", colour_model, *arguments) == code
    assert message in capsys.readouterr().err
    assert sorted(Path().iterdir()) == before


def test_a_captioner_is_refused(scene, bundle_path, capsys):
    assert classify(scene, "-m", bundle_path, "--labels", LABELS) == 2
    assert "computes no embeddings" in capsys.readouterr().err


def test_unreadable_tiles_are_recorded_and_the_exit_code_is_3(tmp_path, colour_model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layout = {"tiled": True, "blockxsize": 32, "blockysize": 32, "interleave": "pixel"}
    scenes.truncate(scenes.write(tmp_path / "scene.tif", scenes.pixels(3, 256, 64), **layout), 0.6)
    assert classify("scene.tif", "-m", colour_model, "--labels", "red,green", "--raster", "classes.tif") == 3
    bad = [record for record in properties() if record["status"] == "read_error"]
    assert bad
    assert all(record["class"] is None and record["message"] for record in bad)
    with rasterio.open("classes.tif") as raster:
        assert (raster.read(1) == 0).sum() == len(bad)


def test_a_prompt_beyond_what_the_model_reads_is_warned_of(scene, bundle, caplog):
    assert classify(scene, "-m", bundle, "--template", "{}", "--labels", "field," + "water by a wood " * 30) == 0
    assert len([message for message in caplog.messages if "reads only the beginning" in message]) == 1


@pytest.mark.parametrize("command", ["classify", "locate"])
def test_it_needs_no_torch(scene, bundle, command):
    script = f"""
        import sys
        for name in ("torch", "transformers", "accelerate", "safetensors", "onnx", "matplotlib"):
            sys.modules[name] = None
        from rsedge.cli.main import run
        arguments = {{
            "classify": ["--labels", "a,b", "--tile-size", "32", "--raster", "a.tif", "-o", "a.parquet"],
            "locate": ["--text", "a", "--contrast", "b", "--window", "32", "--stride", "16", "--png", "a.png"],
        }}
        code = run([{command!r}, {str(scene)!r}, "-m", {str(bundle)!r}, *arguments[{command!r}]])
        sys.exit(code)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, capture_output=True)
