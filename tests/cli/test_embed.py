"""`rsedge embed`, and `rsedge caption --embed`, as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import geopandas
import numpy as np
import pytest
import rasterio
import rasterio.warp
from PIL import Image

from rsedge.cli.main import run
from rsedge.runtime.search.search_file import SearchFile
from tests import scenes
from tests.conftest import shared_data
from tests.dual_encoders import make_clip
from tests.runtime.search_files import read_embeddings


@pytest.fixture(scope="module")
def clip_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rsedge.export.convert import export

    folder = tmp_path_factory.mktemp("clip")
    return export(make_clip(folder / "model"), folder / "clip.rsedge").path


@pytest.fixture
def scene(tmp_path: Path, monkeypatch) -> Path:
    """A scene of 5 × 3 tiles of 32 px, and an empty working directory beside it."""
    monkeypatch.chdir(tmp_path)
    return scenes.write(tmp_path / "scene.tif", scenes.pixels(3, 70, 150))


def embed(bundle: Path, *arguments: object) -> int:
    return run(["embed", "-m", str(bundle), "--device", "cpu", *map(str, arguments)])


def vectors(path: str) -> np.ndarray:
    return np.array(read_embeddings(path))


def test_the_command_gives_what_the_api_gives(scene, clip_path, capsys):
    from rsedge.runtime.embedder import Embedder
    from rsedge.runtime.scenes.scene import Scene

    assert embed(clip_path, scene, "--tile-size", 32, "-o", "a.parquet", "--dtype", "float32", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["tiles"], summary["ok"], summary["scenes"], summary["images"]) == (15, 15, 1, 0)
    embedder = Embedder.load(clip_path, device="cpu")
    pairs = list(embedder.embed_scene(Scene.open(scene), tile_size=32))
    np.testing.assert_array_equal(vectors("a.parquet"), [vector for _, vector in pairs])
    np.testing.assert_allclose(np.linalg.norm(vectors("a.parquet"), axis=1), 1, atol=1e-6)
    info = SearchFile.open("a.parquet").info
    assert (info.model, info.model_hash, info.dim) == (embedder.model, embedder.hash, embedder.dim)
    frame = geopandas.read_parquet("a.parquet")
    assert [(r.row, r.col, r.geometry is not None) for r in frame.itertuples()] == [
        (record.row, record.col, True) for record, _ in pairs
    ]


def test_half_precision_is_the_default_and_rounds_only(scene, clip_path):
    assert embed(clip_path, scene, "--tile-size", 32, "-o", "a.parquet") == 0
    assert embed(clip_path, scene, "--tile-size", 32, "-o", "b.parquet", "--dtype", "float32") == 0
    np.testing.assert_array_equal(vectors("a.parquet"), vectors("b.parquet").astype(np.float16))


def test_a_folder_of_images_and_scenes(tmp_path, clip_path, monkeypatch, capsys):
    from rsedge.datasets.images import FileImage
    from rsedge.runtime.embedder import Embedder

    monkeypatch.chdir(tmp_path)
    Path("set/river").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("set/river/1.png")
    Image.fromarray(pixels[:, :, 0]).save("set/river/2.jpg")
    Path("set/river/3.png").write_bytes(b"no picture")
    scenes.write(Path("set/4.tif"), scenes.pixels(3, 32, 64))
    assert embed(clip_path, "set", "-o", "a.parquet", "--tile-size", 32, "--json") == 3
    summary = json.loads(capsys.readouterr().out)
    assert (summary["scenes"], summary["images"], summary["read_errors"], summary["ok"]) == (1, 3, 1, 4)
    frame = geopandas.read_parquet("a.parquet")
    assert frame["path"].tolist()[2:] == ["set/river/1.png", "set/river/2.jpg", "set/river/3.png"]
    assert frame["status"].tolist() == ["ok"] * 4 + ["read_error"]
    embedder = Embedder.load(clip_path, device="cpu")
    for row, name in ((2, "1.png"), (3, "2.jpg")):
        image = FileImage(Path("set/river") / name).read()
        # An image may not depend on those it is computed with, but for the last bits.
        np.testing.assert_allclose(read_embeddings("a.parquet")[row], embedder.embed_images(image[None])[0], atol=1e-3)


def test_options_of_scenes_are_refused_where_there_is_none(tmp_path, clip_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.full((40, 50, 3), 9, np.uint8)).save("1.png")
    assert embed(clip_path, "1.png", "-o", "a.parquet", "--tile-size", 32, "--bands", "3,2,1") == 2
    assert "--tile-size, --bands: for scenes only" in capsys.readouterr().err
    assert embed(clip_path, "1.png", "-o", "a.parquet") == 0
    before = Path("a.parquet").read_bytes()
    assert run(["embed", "--config", "a.parquet.config.toml", "--overwrite"]) == 0
    assert Path("a.parquet").read_bytes() == before
    assert embed(clip_path, "1.png", "-o", "b.parquet", "--as", "scene", "--tile-size", 32) == 0
    assert SearchFile.open("b.parquet").rows == 4


def test_the_saved_configuration_is_the_very_same_run(scene, clip_path):
    options = ["--tile-size", 32, "--overlap", 4, "--edge", "shift", "--dtype", "float32", "--batch-size", 3]
    assert embed(clip_path, scene, "-o", "a.parquet", *options) == 0
    before = Path("a.parquet").read_bytes()
    Path("a.parquet").unlink()
    assert run(["embed", "--config", "a.parquet.config.toml"]) == 0
    assert Path("a.parquet").read_bytes() == before


def test_captions_and_embeddings_in_one_pass(scene, bundle_path, clip_path, capsys):
    both = ["--embed", "e.parquet", "--embedder", str(clip_path)]
    caption = ["caption", str(scene), "-m", str(bundle_path), "--tile-size", "32", "--device", "cpu"]
    assert run([*caption, *both, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["output"], summary["embeddings"]) == ("scene.geojson", "e.parquet")
    one_pass = Path("scene.geojson").read_bytes()
    found = geopandas.read_parquet("e.parquet")
    assert run([*caption, "--overwrite"]) == 0
    assert Path("scene.geojson").read_bytes() == one_pass
    assert embed(clip_path, scene, "--tile-size", 32, "-o", "two.parquet") == 0
    np.testing.assert_array_equal(vectors("e.parquet"), vectors("two.parquet"))
    assert found["caption"].tolist() == [f["properties"]["caption"] for f in json.loads(one_pass)["features"]]
    Path("e.parquet").unlink()
    Path("scene.geojson").unlink()
    assert run([*caption, *both]) == 0
    assert run(["caption", "--config", "scene.geojson.config.toml", "--overwrite"]) == 0
    assert Path("scene.geojson").read_bytes() == one_pass


def test_captions_as_parquet(scene, bundle_path):
    command = ["caption", str(scene), "-m", str(bundle_path), "--tile-size", "32", "--device", "cpu"]
    assert run([*command, "-o", "c.parquet"]) == 0
    assert run(command) == 0
    ours, theirs = geopandas.read_parquet("c.parquet"), geopandas.read_file("scene.geojson")
    assert ours["caption"].tolist() == theirs["caption"].tolist()
    assert ours.geometry.to_wkb().tolist() == theirs.geometry.to_wkb().tolist()
    assert "embedding" not in ours


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["caption", "-m", "CLIP"], "computes embeddings (rsedge embed) and writes no captions"),
        (["embed", "-m", "BLIP", "-o", "a.parquet"], "writes captions (rsedge caption) and computes no embeddings"),
        (["caption", "-m", "BLIP", "--embed", "a.parquet", "--embedder", "BLIP"], "computes no embeddings"),
        (["caption", "-m", "BLIP", "--embed", "a.parquet"], "go together"),
        (["caption", "-m", "BLIP", "--embedder", "CLIP"], "go together"),
        (["caption", "-m", "BLIP", "--dtype", "float32"], "go together"),
        (["caption", "-m", "BLIP", "--embed", "a.csv", "--embedder", "CLIP"], "end 'a.csv' in .parquet"),
        (["embed", "-m", "CLIP", "-o", "a.geojson"], "end 'a.geojson' in .parquet"),
        (["embed", "-m", "CLIP", "-o", "-"], "end '-' in .parquet"),
        (["embed", "-m", "CLIP"], "Missing option"),
    ],
)
def test_bad_values_are_refused_before_any_work(scene, bundle_path, clip_path, capsys, arguments, message):
    names = {"CLIP": str(clip_path), "BLIP": str(bundle_path)}
    assert run([names.get(argument, argument) for argument in arguments] + [str(scene)]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["scene.tif"]


def test_it_needs_no_torch(scene, clip_path):
    script = f"""
        import sys
        for name in ("torch", "transformers", "accelerate", "safetensors", "onnx"):
            sys.modules[name] = None
        from rsedge.cli.main import run
        sys.exit(run(["-q", "embed", {str(scene)!r}, "-m", {str(clip_path)!r}, "-o", "a.parquet", "--device", "cpu"]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert SearchFile.open("a.parquet").rows == 1


def test_a_real_scene(tmp_path, clip_path, monkeypatch):
    scene = shared_data("scenes/S2A_29RKH_20200219_L2A/TCI.tif")
    monkeypatch.chdir(tmp_path)
    assert embed(clip_path, scene, "-o", "a.parquet") == 0
    frame = geopandas.read_parquet("a.parquet")
    assert len(frame) == 25
    with rasterio.open(scene) as dataset:
        bounds = rasterio.warp.transform_bounds(dataset.crs, "EPSG:4326", *dataset.bounds)
    np.testing.assert_allclose(frame.total_bounds, bounds, atol=2e-4)
