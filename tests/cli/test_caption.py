"""`rsedge caption` as a user runs it."""

from __future__ import annotations

import csv
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import geopandas
import numpy as np
import pytest
import rasterio
import rasterio.warp
from shapely.geometry import shape

from rsedge.cli.main import run
from tests import scenes
from tests.conftest import shared_data


@pytest.fixture
def scene(tmp_path: Path, monkeypatch) -> Path:
    """A scene of 5 × 3 tiles of 32 px, and an empty working directory beside it."""
    monkeypatch.chdir(tmp_path)
    return scenes.write(tmp_path / "scene.tif", scenes.pixels(3, 70, 150))


def caption(scene: Path, bundle: Path, *arguments: str) -> int:
    return run(["caption", str(scene), "-m", str(bundle), "--tile-size", "32", "--device", "cpu", *arguments])


def test_geojson_lies_where_rasterio_says(scene, bundle_path):
    assert caption(scene, bundle_path, "--beams", "3") == 0
    frame = geopandas.read_file("scene.geojson")
    assert len(frame) == 15
    assert set(frame.status) == {"ok"}
    assert frame.caption.str.len().gt(0).any()
    with rasterio.open(scene) as dataset:
        for record in frame.itertuples():
            window = rasterio.windows.Window(record.col_off, record.row_off, record.width, record.height)
            left, bottom, right, top = rasterio.windows.bounds(window, dataset.transform)
            box = [[(left, top), (left, bottom), (right, bottom), (right, top), (left, top)]]
            expected = rasterio.warp.transform_geom(dataset.crs, "EPSG:4326", {"type": "Polygon", "coordinates": box})
            assert record.geometry.equals_exact(shape(expected), 1e-6)


def test_the_pipeline_gives_what_the_api_gives(scene, bundle_path):
    from rsedge import Captioner, Scene

    assert caption(scene, bundle_path, "--beams", "2", "--max-new-tokens", "9") == 0
    written = [feature["properties"] for feature in json.loads(Path("scene.geojson").read_text())["features"]]
    captioner = Captioner.load(bundle_path, device="cpu")
    records = captioner.caption_scene(Scene.open(scene), tile_size=32, num_beams=2, max_new_tokens=9)
    assert [(r.caption, r.score, r.row, r.col) for r in records] == [
        (p["caption"], p["score"], p["row"], p["col"]) for p in written
    ]


def test_summary_goes_to_stdout_and_talk_to_stderr(scene, bundle_path, capsys):
    assert caption(scene, bundle_path, "--json") == 0
    output = capsys.readouterr()
    summary = json.loads(output.out)
    assert (summary["tiles"], summary["ok"], summary["read_errors"], summary["device"]) == (15, 15, 0, "cpu")
    assert summary["output"] == "scene.geojson"


def test_data_goes_to_stdout(scene, bundle_path, capsysbinary):
    assert caption(scene, bundle_path, "-o", "-", "--format", "csv", "--json") == 0
    output = capsysbinary.readouterr()
    rows = list(csv.DictReader(io.StringIO(output.out.decode())))
    assert len(rows) == 15
    assert rows[0]["geometry"].startswith("POLYGON")
    assert json.loads(output.err.decode().strip().splitlines()[-1])["tiles"] == 15
    assert [path.name for path in Path().iterdir()] == ["scene.tif"]


def test_several_scenes_go_into_one_output(scene, bundle_path, tmp_path):
    other = scenes.write(tmp_path / "other.tif", scenes.pixels(3, 40, 40, seed=3))
    assert caption(scene, bundle_path, str(other)) == 2  # which name would it have?
    assert caption(scene, bundle_path, str(other), "-o", "all.geojsonl") == 0
    records = [json.loads(line)["properties"] for line in Path("all.geojsonl").read_text().splitlines()]
    assert [record["scene"] for record in records] == ["scene"] * 15 + ["other"] * 4


def test_a_config_file_gives_options_and_flags_win(scene, bundle_path, capsys):
    Path("run.toml").write_text(f'model = "{bundle_path}"\ntile-size = 32\nbeams = 2\n')
    assert run(["caption", str(scene), "--config", "run.toml", "--tile-size", "64"]) == 0
    Path("scene.geojson").unlink()
    Path("wrong.toml").write_text("tile_size = 64.7\n")
    assert run(["caption", str(scene), "--config", "wrong.toml"]) == 2
    assert "tile_size is 64.7, expected a whole number" in capsys.readouterr().err
    Path("wrong.toml").write_text("beans = 2\n")
    assert run(["caption", str(scene), "--config", "wrong.toml"]) == 2
    assert "unknown keys beans" in capsys.readouterr().err
    assert run(["caption", str(scene), "--config", "run.toml", "--tile-size", "64"]) == 0
    first = Path("scene.geojson").read_bytes()
    assert first.count(b'Feature"') == 6
    saved = Path("scene.geojson.config.toml").read_text()
    assert "tile_size = 64" in saved
    assert "\nbeams = 2" in saved
    assert "max_new_tokens = 20" in saved, "what came from the bundle is there too"
    Path("scene.geojson").unlink()
    assert run(["caption", "--config", "scene.geojson.config.toml"]) == 0
    assert Path("scene.geojson").read_bytes() == first


@pytest.mark.parametrize(
    "arguments",
    [
        [
            "--bands",
            "3,2,1",
            "--nodata",
            "7",
            "--readers",
            "1",
            "--edge",
            "shift",
            "--overlap",
            "4",
            "--max-nodata",
            "0.2",
        ],
        ["--beams", "3", "--length-penalty", "0.5", "--early-stopping", "never", "--min-new-tokens", "3"],
        ["--top-p", "0.9", "--temperature", "1.5", "--seed", "4", "--batch-size", "3", "--threads", "1"],
        ["--repetition-penalty", "1.2", "--no-repeat-ngram-size", "2", "--max-new-tokens", "9", "--format", "geojsonl"],
    ],
)
def test_the_saved_configuration_is_the_very_same_run(scene, bundle_path, arguments):
    assert caption(scene, bundle_path, "-o", "first.geojson", *arguments) == 0
    first = Path("first.geojson").read_bytes()
    Path("first.geojson").unlink()
    assert run(["caption", "--config", "first.geojson.config.toml"]) == 0
    assert Path("first.geojson").read_bytes() == first


def test_two_scenes_are_sampled_apart(scene, bundle_path, tmp_path):
    other = tmp_path / "copy.tif"
    other.write_bytes(scene.read_bytes())
    assert caption(scene, bundle_path, str(other), "-o", "all.geojsonl", "--temperature", "2.5") == 0
    records = [json.loads(line)["properties"]["caption"] for line in Path("all.geojsonl").read_text().splitlines()]
    assert records[:15] != records[15:]


def test_an_output_is_never_overwritten_unasked(scene, bundle_path, capsys):
    Path("scene.geojson").write_text("precious")
    assert caption(scene, bundle_path) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert Path("scene.geojson").read_text() == "precious"
    assert caption(scene, bundle_path, "--overwrite") == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--top-p", "2"], 2, "top_p is 2.0"),
        (["--beams", "3", "--top-p", "0.9"], 2, "choose beams"),
        (["--seed", "0"], 2, "only acts on sampling"),
        (["--beams", "2", "--length-penalty", "nan"], 2, "length_penalty is nan"),
        (["--temperature", "1e-320"], 2, "temperature is"),
        (["-o", "x.shp"], 2, ".geojson"),
        (["--overlap", "32"], 2, "overlap"),
        (["--bands", "1,2"], 2, "three band numbers"),
        (["--bands", "1,2,9"], 2, "9"),
        (["--device", "cuda:77"], 1, "cuda:77 cannot be used"),
        (["--max-new-tokens", "500"], 2, "positions for 64"),
        (["--config", "absent.toml"], 2, "absent.toml"),
    ],
)
def test_bad_values_are_refused_before_any_work(scene, bundle_path, capsys, arguments, code, message):
    assert caption(scene, bundle_path, *arguments) == code
    assert message in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["scene.tif"]


def test_missing_scenes_and_bundles_say_what_to_do(scene, bundle_path, capsys):
    assert caption(Path("absent.tif"), bundle_path) == 1
    assert "absent.tif" in capsys.readouterr().err
    assert caption(scene, Path("absent.rsedge")) == 1
    assert "rsedge export CHECKPOINT" in capsys.readouterr().err


def test_without_m_the_default_model_is_used_named_and_kept(scene, bundle_path, capsys, caplog, monkeypatch):
    assert caption(scene, bundle_path, "-o", "named.geojson") == 0
    monkeypatch.setenv("RSEDGE_MODEL", str(bundle_path))
    assert run(["caption", str(scene), "--tile-size", "32", "--device", "cpu"]) == 0
    assert f"model: {bundle_path} (RSEDGE_MODEL in the environment)" in caplog.messages
    assert Path("scene.geojson").read_bytes() == Path("named.geojson").read_bytes()
    assert f'model = "{bundle_path}"' in Path("scene.geojson.config.toml").read_text()
    monkeypatch.setenv("RSEDGE_MODEL", "absent.rsedge")
    assert run(["caption", str(scene), "-o", "other.geojson"]) == 1
    assert "unset it" in capsys.readouterr().err


def test_unreadable_tiles_are_recorded_and_the_exit_code_is_3(tmp_path, bundle_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = scenes.pixels(3, 256, 64)
    path = scenes.write(tmp_path / "cut.tif", data, tiled=True, blockxsize=32, blockysize=32, interleave="pixel")
    scenes.truncate(path, 0.6)
    assert caption(path, bundle_path, "--json") == 3
    summary = json.loads(capsys.readouterr().out)
    assert summary["ok"] > 0
    assert summary["read_errors"] > 0
    assert summary["ok"] + summary["read_errors"] == summary["tiles"] == 16
    features = json.loads(Path("cut.geojson").read_text())["features"]
    bad = [f["properties"] for f in features if f["properties"]["status"] == "read_error"]
    assert all(record["caption"] is None and record["message"] for record in bad)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_killed_at_ten_points_the_same_command_completes_to_the_same_bytes(
    checkpoint, tmp_path, monkeypatch, precision
):
    """SIGKILL after each of ten segments of thirteen, each rerun going on from the last; then one finishes."""
    from rsedge.export.convert import export

    monkeypatch.chdir(tmp_path)
    bundle = export(checkpoint, tmp_path / "model.rsedge", precision=precision).path
    data = np.random.default_rng(0).integers(0, 255, (3, 32 * 20, 32 * 40), dtype=np.uint8)  # 800 tiles, 13 segments
    scene = scenes.write(tmp_path / "large.tif", data)

    def command(output: str) -> list[str]:
        options = ["-m", str(bundle), "--tile-size", "32", "--beams", "2", "-o", output, "--device", "cpu"]
        return [sys.executable, "-m", "rsedge", "-q", "caption", str(scene), *options]

    subprocess.run(command("whole.geojson"), check=True)
    journal = Path("cut.geojson.journal")
    for segments in range(1, 11):
        process = subprocess.Popen(command("cut.geojson"))
        while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > segments):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it must be killed in its work, not after it"
    assert not Path("cut.geojson").exists()
    subprocess.run(command("cut.geojson"), check=True)
    assert Path("cut.geojson").read_bytes() == Path("whole.geojson").read_bytes()
    assert not journal.exists()


def test_an_interruption_keeps_the_journal_and_exits_130(tmp_path, bundle_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = np.random.default_rng(0).integers(0, 255, (3, 32 * 40, 32 * 60), dtype=np.uint8)
    scene = scenes.write(tmp_path / "large.tif", data)
    options = ["-m", str(bundle_path), "--tile-size", "32", "--beams", "5", "--device", "cpu"]
    # Started in the background of a shell, the tests would hand down that SIGINT is ignored.
    process = subprocess.Popen(
        [sys.executable, "-m", "rsedge", "caption", str(scene), *options],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    journal = Path("large.geojson.journal")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (journal.exists() and journal.stat().st_size > 5000):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, talk = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command continues from there" in talk
    assert "Traceback" not in talk
    assert journal.exists()
    assert not Path("large.geojson").exists()
    assert run(["caption", str(scene), *options, "--json"]) == 0
    assert Path("large.geojson").exists()
    assert not journal.exists()


def test_a_closed_pipe_is_no_fault(scene, bundle_path):
    command = [sys.executable, "-m", "rsedge", "caption", str(scene), "-m", str(bundle_path), "--tile-size", "8"]
    process = subprocess.Popen([*command, "-o", "-"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    assert process.wait() == 1


@pytest.mark.parametrize(
    ("path", "arguments", "tiles"),
    [
        ("scenes/S2A_29RKH_20200219_L2A/TCI.tif", [], 25),
        ("scenes/naip_m_4709963_se_14_1_20100629.tif", ["--bands", "1,2,3"], 20),
        ("scenes/safe_l2a_n0509_gdal", [], 2500),
    ],
)
def test_real_scenes(tmp_path, bundle_path, monkeypatch, path, arguments, tiles):
    found = shared_data(path)
    monkeypatch.chdir(tmp_path)
    scene = next(found.glob("*.SAFE")) if found.is_dir() else found
    code = run(["caption", str(scene), "-m", str(bundle_path), "-o", "out.geojson", "--device", "cpu", *arguments])
    assert code == 0
    frame = geopandas.read_file("out.geojson")
    assert len(frame) == tiles
    if found.is_dir():
        assert set(frame.status) == {"nodata"}  # the pixels of this SAFE are blank
        return
    with rasterio.open(scene) as dataset:
        bounds = rasterio.warp.transform_bounds(dataset.crs, "EPSG:4326", *dataset.bounds)
    np.testing.assert_allclose(frame.total_bounds, bounds, atol=1e-5)


def test_real_reflectance_bands_stacked(tmp_path, bundle_path, monkeypatch):
    folder = shared_data("scenes/S2A_29RKH_20200219_L2A")
    monkeypatch.chdir(tmp_path)
    planes = []
    for band in ("B04", "B03", "B02"):
        with rasterio.open(folder / f"{band}.tif") as dataset:
            planes.append(dataset.read(1))
            options = {"crs": dataset.crs, "transform": dataset.transform, "nodata": dataset.nodata}
    scene = scenes.write(tmp_path / "stack.tif", np.stack(planes), descriptions=("B04", "B03", "B02"), **options)
    assert run(["caption", str(scene), "-m", str(bundle_path), "--device", "cpu"]) == 0
    assert len(geopandas.read_file("stack.geojson")) == 25


def test_other_types_are_refused_with_the_command_that_converts_them(tmp_path, bundle_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scene = scenes.write(tmp_path / "scene.tif", np.ones((3, 8, 9), "int32"), photometric="RGB")
    assert run(["caption", str(scene), "-m", str(bundle_path)]) == 1
    error = capsys.readouterr().err
    assert "int32" in error
    assert "gdal_translate" in error
    assert [path.name for path in Path().iterdir()] == ["scene.tif"]
