"""`rsedge info`, of scenes and of bundles."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rasterio.transform import from_origin

from rsedge.bundle import read_bundle
from rsedge.cli.main import run
from rsedge.runtime.diagnostics.describe import describe_grid
from rsedge.runtime.scenes.scene import Scene
from rsedge.runtime.scenes.tiles import TileGrid
from tests import scenes
from tests.conftest import shared_data


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """Reflectance, 5 × 3 tiles of 32 px."""
    return scenes.write(
        tmp_path / "S2A_29RKH_20200219_0_L2A.tif",
        scenes.pixels(3, 70, 150, "uint16"),
        descriptions=("B04", "B03", "B02"),
        nodata=0,
    )


def info(*arguments: object) -> int:
    return run(["info", *map(str, arguments)])


def values_of(capsys, *arguments: object) -> list[dict]:
    assert info(*arguments, "--json") == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_scene_as_json(scene, bundle_path, capsys):
    (found,) = values_of(capsys, scene, "-m", bundle_path, "--tile-size", 32, "--device", "cpu")
    opened = Scene.open(scene)
    for name in ("name", "source", "driver", "width", "height", "dtype", "bands_reason", "datetime", "rule"):
        assert found[name] == getattr(opened, name), name
    assert (found["kind"], found["crs"], found["resolution"], found["unit"]) == (
        "scene",
        "EPSG:32632",
        [10, 10],
        "metre",
    )
    assert (found["pixel_values"], found["boa_offset"], found["full_scale"]) == ("dn", 0, 2500)
    assert (found["nodata"], found["clouds"], found["mgrs_tile"]) == (["0", "0", "0"], None, "29RKH")
    assert found["tiles"] == {
        "tile_size": 32, "overlap": 0, "edge": "shift", "rows": 3, "cols": 5, "total": 15, "whole": 15,
    }  # fmt: skip
    west, south, east, north = found["bbox"]
    assert 10.29 < west < east < 10.32
    assert 46.03 < south < north < 46.05
    estimate = found["estimate"]
    assert estimate["model"] == read_bundle(bundle_path).model
    assert (estimate["does"], estimate["device"], estimate["batch_size"]) == ("caption", "cpu", 16)
    assert estimate["backend"] == "onnxruntime"
    assert estimate["measured_images"] >= 8
    assert estimate["seconds"] == pytest.approx(15 / estimate["tiles_per_second"], abs=0.06)
    parts = ("reader_cache_bytes", "tiles_bytes", "model_bytes", "process_bytes")
    assert estimate["memory_bytes"] == sum(estimate[part] for part in parts)
    assert all(estimate[part] > 0 for part in parts[1:])


def test_a_scene_as_text(scene, bundle_path, capsys):
    assert info(scene, "-m", bundle_path, "--tile-size", 32, "--overlap", 4, "--no-probe") == 0
    out = capsys.readouterr().out
    for part in (
        "scene S2A_29RKH_20200219_0_L2A\n",
        "150 x 70 px, 10 metre per pixel",
        "red = band 1 (B04)",
        "uint8 = clip(round(1 + 254 * (DN - 0) / 2500), 1, 255)".replace("- 0", "+ 0"),
        "clouds       not known",
        "of 32 px",
        "4 px shared",
        "memory about",
    ):
        assert part in out, part
    assert "time about" not in out


@pytest.mark.parametrize("edge", ["pad", "shift", "drop"])
@pytest.mark.parametrize(("size", "overlap"), [((150, 70), 0), ((150, 70), 7), ((64, 64), 0), ((20, 300), 3)])
def test_tiles_are_counted_as_they_are(edge, size, overlap):
    if edge == "drop" and min(size) < 32:
        pytest.skip("there is no tile")
    grid = TileGrid(*size, 32, overlap, edge)
    tiles = list(grid)
    found = describe_grid(grid)
    assert (found["total"], found["rows"] * found["cols"]) == (len(tiles), len(tiles))
    assert found["whole"] == sum(tile.width == tile.height == 32 for tile in tiles)


def test_a_real_product(bundle_path, capsys):
    (found,) = values_of(capsys, shared_data("scenes/safe_l2a_n0509_gdal"), "-m", bundle_path, "--no-probe")
    assert (found["boa_offset"], found["mgrs_tile"], found["tiles"]["whole"]) == (-1000, "34UCF", 2500)
    assert "metadata of the product" in found["rule_reason"]
    assert "SCL_20m.jp2" in found["clouds"]
    assert found["product_id"].startswith("S2B_MSIL2A_20230823T095559_N0509")


def test_across_the_antimeridian_the_box_begins_in_the_west(tmp_path, bundle_path, capsys):
    path = scenes.write(
        tmp_path / "a.tif", scenes.pixels(3, 20, 20), crs="EPSG:4326", transform=from_origin(179.9, 10, 0.01, 0.01)
    )
    (found,) = values_of(capsys, path, "-m", bundle_path, "--no-probe")
    assert found["bbox"] == pytest.approx([179.9, 9.8, -179.9, 10])


def test_without_a_place_and_with_an_odd_value_for_no_data(tmp_path, bundle_path, capsys):
    path = scenes.write(
        tmp_path / "a.tif", scenes.pixels(3, 20, 20, "float32") / 5000, crs=None, transform=None, nodata=float("nan")
    )
    options = ("--bands", "1,2,3", "--pixel-values", "reflectance")
    (found,) = values_of(capsys, path, "-m", bundle_path, "--no-probe", *options)
    assert (found["crs"], found["resolution"], found["bbox"], found["unit"]) == (None, None, None, None)
    assert set(found["nodata"]) <= {"nan"}
    assert "no coordinate reference system" in found["warnings"][0]
    assert info(path, "-m", bundle_path, "--no-probe", *options) == 0
    assert "pixel coordinates only" in capsys.readouterr().out


def test_reading_options_are_those_of_caption(scene, bundle_path, capsys):
    options = ("--boa-offset", "-1000", "--bands", "3,2,1", "--nodata", "7")
    (found,) = values_of(capsys, scene, "-m", bundle_path, "--no-probe", *options)
    assert (found["boa_offset"], found["bands"], found["nodata"]) == (-1000, [3, 2, 1], ["7", "7", "7"])


def test_what_cannot_be_read_does_not_hide_the_rest(scene, bundle_path, tmp_path, capsys):
    assert info(tmp_path / "absent.tif", scene, "-m", bundle_path, "--no-probe") == 1
    out, err = capsys.readouterr()
    assert "scene S2A_29RKH_20200219_0_L2A" in out
    assert "absent.tif" in err
    assert info(scene, "-m", bundle_path, "--no-probe", "--overlap", 300) == 2
    assert "overlap is 300" in capsys.readouterr().err


def test_a_scene_is_described_without_a_usable_model(scene, tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.setenv("RSEDGE_MODEL", str(tmp_path / "gone.rsedge"))
    (found,) = values_of(capsys, scene)
    assert found["estimate"] is None
    assert "gone.rsedge" in caplog.text


def test_a_scene_is_described_without_an_engine(scene, bundle_path):
    code = (
        "import sys; sys.modules['onnxruntime'] = None; from rsedge.cli.main import main\n"
        f"main(['info', {str(scene)!r}, '-m', {str(bundle_path)!r}])"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert process.returncode == 0, process.stderr
    assert "cannot run here: ONNX Runtime is not installed: pip install 'rsedge[cpu]'" in process.stdout
    assert "memory about" in process.stdout


# ---- bundles ----


def test_a_bundle_as_json(bundle_path, capsys):
    (found,) = values_of(capsys, bundle_path)
    bundle = read_bundle(bundle_path)
    manifest = json.loads(bundle.manifest.to_json())
    for name in ("name", "family", "precision", "image", "tokens", "generation", "decoder", "provenance", "parity"):
        assert found[name] == manifest[name], name
    assert (found["kind"], found["sha256"], found["model"]) == ("bundle", bundle.hash, bundle.model)
    assert [graph["role"] for graph in found["graphs"]] == list(manifest["graphs"])
    for graph in found["graphs"]:
        assert graph["sha256"] == manifest["graphs"][graph["role"]]["sha256"]
        assert graph["bytes"] == sum(ref.size for ref in bundle.manifest.graphs[graph["role"]].files)
    assert found["graphs"][0]["inputs"] == ["pixels: uint8 [batch, 32, 32, 3]"]
    assert found["bytes"] == sum(ref.size for ref in set(bundle.manifest.files))
    assert {"remote-sensing", "onnx"} <= set(found["labels"])
    assert found["summary"].startswith("A BLIP model")


def test_a_bundle_as_text(bundle_path, capsys):
    assert info(bundle_path) == 0
    out = capsys.readouterr().out
    for part in (
        "graph vision",
        "graph step",
        "max_new_tokens",
        "parity",
        "every hash matches",
        "licence      not stated",
    ):
        assert part in out, part


def test_the_licence_is_what_the_card_says(bundle_path, tmp_path, capsys):
    copy = tmp_path / "copy.rsedge"
    shutil.copytree(bundle_path, copy)
    card = copy / "README.md"
    card.write_text(card.read_text().replace("---\n", "---\nlicense: 'apache-2.0'\n", 1))
    assert values_of(capsys, copy)[0]["licence"] == "apache-2.0"
    card.unlink()
    (found,) = values_of(capsys, copy)
    assert (found["licence"], found["labels"], found["summary"]) == (None, [], None)


def test_a_damaged_bundle_is_told_whole(bundle_path, tmp_path, capsys):
    copy = tmp_path / "copy.rsedge"
    shutil.copytree(bundle_path, copy)
    scenes.truncate(copy / "vision.onnx", 0.9)
    (copy / "tokenizer.json").unlink()
    assert info(copy) == 1
    err = capsys.readouterr().err
    assert "vision.onnx is cut short" in err
    assert "tokenizer.json is missing" in err
    assert info(tmp_path / "absent.rsedge") == 1
    assert "no bundle at" in capsys.readouterr().err


def test_a_backend_that_cannot_be_used_is_told(scene, bundle_path, tmp_path, capsys):
    config = tmp_path / "info.toml"
    config.write_text('backend = "tensorrt"\ntile_size = 32\ndevice = "cpu"\n')
    (found,) = values_of(capsys, scene, "-m", bundle_path, "--config", config)
    assert found["tiles"]["tile_size"] == 32
    assert found["estimate"]["backend"] is None
    assert "backend tensorrt cannot be used" in found["estimate"]["problem"]


def test_an_embedder_is_timed_too(scene, tmp_path, capsys):
    from rsedge.export.convert import export
    from tests.dual_encoders import make_clip

    clip = export(make_clip(tmp_path / "model"), tmp_path / "clip.rsedge").path
    found, bundle = values_of(capsys, scene, clip, "-m", clip, "--tile-size", 32, "--device", "cpu")
    assert (found["estimate"]["does"], found["estimate"]["seconds"] is not None) == ("embed", True)
    assert (bundle["generation"], bundle["embedding"]["dim"]) == (None, read_bundle(clip).manifest.embedding.dim)
