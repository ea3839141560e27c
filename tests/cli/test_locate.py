"""`rsedge locate` as a user runs it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image

from rsedge.cli.main import run
from tests import colours, scenes
from tests.dual_encoders import make_clip


@pytest.fixture(scope="module")
def clip_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rsedge.export.convert import export

    folder = tmp_path_factory.mktemp("clip")
    return export(make_clip(folder / "model"), folder / "clip.rsedge").path


@pytest.fixture
def scene(tmp_path: Path, monkeypatch) -> Path:
    """Grey squares of 32 px and a red one, in an empty working directory; ``-m`` takes any name of a model."""
    monkeypatch.chdir(tmp_path)
    names = [["grey"] * 6 for _ in range(4)]
    names[2][4] = "red"
    return scenes.write(tmp_path / "scene.tif", colours.blocks(names, 32), photometric="RGB")


def locate(*arguments: object) -> int:
    return run(["locate", "--window", "32", "--stride", "8", "--device", "cpu", *map(str, arguments)])


def test_a_red_square_is_found(scene, monkeypatch, capsys, caplog):
    colours.install(monkeypatch)
    arguments = [scene, "-m", "colours.rsedge", "--text", "red", "--text", "grey", "--png", "heat.png"]
    assert locate(*arguments, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["output"], found["png"], found["windows"]) == ("scene.heat.tif", "heat.png", 21 * 13)
    red, grey = found["texts"]
    assert (red["text"], grey["text"]) == ("red", "grey")
    assert (abs(red["row"] - 80) <= 8, abs(red["col"] - 144) <= 8) == (True, True)
    with rasterio.open("scene.heat.tif") as raster, rasterio.open(scene) as source:
        assert raster.descriptions == ("red", "grey")
        heat = raster.read()
        row, col = source.index(*raster.xy(*np.unravel_index(np.argmax(heat[0]), heat[0].shape)))
        assert (64 <= row < 96, 128 <= col < 160) == (True, True)
        assert np.isfinite(heat).all()
    with Image.open("heat.png") as image:
        assert image.size > (300, 100)
    assert locate(*arguments, "--overwrite") == 0
    assert capsys.readouterr().out == ""
    assert any(re.match(r"red: cosine similarity -?0\.\d+ to 0\.\d+, best at", message) for message in caplog.messages)


def test_contrasts_and_the_saved_configuration(scene, clip_path):
    options = ["--text", "a port", "--contrast", "a field", "--contrast", "a wood", "-o", "a.tif", "--png", "a.png"]
    assert locate(scene, "-m", clip_path, *options) == 0
    with rasterio.open("a.tif") as raster:
        assert raster.tags()["quantity"] == "probability"
        heat = raster.read(1)
        assert ((heat > 0) & (heat < 1)).all()
    first = {name: Path(name).read_bytes() for name in ("a.tif", "a.png")}
    for name in first:
        Path(name).unlink()
    assert run(["locate", "--config", "a.tif.config.toml"]) == 0
    assert {name: Path(name).read_bytes() for name in first} == first


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "--text"),
        (["--text", " "], 2, "a text is empty"),
        (["--text", "red", "--contrast", "red"], 2, "given twice"),
        (["--text", "red", "--stride", "33"], 2, "stride is 33, expected 1 to 32 (the window)"),
        (["--text", "red", "--stride", "0"], 2, "--stride"),
        (["--text", "red", "-o", "heat.png"], 2, "end its name in .tif"),
        (["--text", "red", "--png", "heat.tif"], 2, "end its name in .png"),
        (["--text", "red", "--tile-size", "32"], 2, "--tile-size"),
        (["--text", "red", "-o", "scene.tif"], 1, "scene.tif exists already: pass --overwrite"),
        (["--text", "red", "-o", "scene.tif", "--overwrite"], 2, "the scene itself is never replaced"),
        (["--text", "red", "-o", "absent/heat.tif"], 1, "absent is not a folder"),
        (["--text", "red", "--bands", "1,2,9"], 2, "9"),
    ],
)
def test_bad_values_are_refused_before_any_work(scene, monkeypatch, capsys, arguments, code, message):
    colours.install(monkeypatch)
    assert locate(scene, "-m", "colours.rsedge", *arguments) == code
    assert message in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["scene.tif"]
    with rasterio.open("scene.tif") as raster:
        assert raster.count == 3


def test_windows_that_cannot_be_read_give_exit_code_3(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    colours.install(monkeypatch)
    layout = {"tiled": True, "blockxsize": 32, "blockysize": 32, "interleave": "pixel"}
    scenes.truncate(scenes.write(tmp_path / "cut.tif", scenes.pixels(3, 256, 64), **layout), 0.6)
    assert locate("cut.tif", "-m", "colours.rsedge", "--text", "red", "--png", "a.png", "--json") == 3
    assert json.loads(capsys.readouterr().out)["read_errors"] > 0
    with rasterio.open("cut.heat.tif") as raster:
        assert np.isnan(raster.read(1)).any()


def test_a_scene_without_a_place_is_warned_of(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    colours.install(monkeypatch)
    scenes.write(tmp_path / "bare.tif", scenes.pixels(3, 64, 64), crs=None, transform=None)
    assert locate("bare.tif", "-m", "colours.rsedge", "--text", "red") == 0
    assert any("has no coordinate reference system" in message for message in caplog.messages)
    with rasterio.open("bare.heat.tif") as raster:
        assert raster.crs is None


def test_a_text_beyond_what_the_model_reads_is_warned_of(scene, clip_path, caplog):
    assert locate(scene, "-m", clip_path, "--text", "a port", "--text", "a port by a river " * 20) == 0
    warnings = [message for message in caplog.messages if "reads only the beginning" in message]
    assert len(warnings) == 1
    assert "'a port by a river a port" in warnings[0]
