"""What `rsedge caption` and `rsedge classify` show beside their output, as a user asks for it."""

import json
import zipfile
from pathlib import Path

import geopandas
import pytest
from PIL import Image

from rsedge.cli.main import run
from rsedge.pixels import ImageSize
from rsedge.runtime.outputs.records import TileResult
from rsedge.runtime.outputs.report.report import report_target
from rsedge.runtime.run.sources import SceneTiles, TileOptions
from rsedge.runtime.scenes.scene import Scene
from tests import scenes
from tests.range_server import serve
from tests.safe_products import write_safe


@pytest.fixture
def product(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_safe(tmp_path / "in", seed=3, size=160)


VIEWS = ["--html", "report.html", "--sheet", "sheet.png", "--stac", "item.json"]


def caption(scene, bundle, *arguments):
    return run(["caption", str(scene), "-m", str(bundle), "--tile-size", "32", "--device", "cpu", *map(str, arguments)])


def test_everything_at_once_from_a_zipped_product(product, bundle_path):
    assert caption(product.path, bundle_path, "-o", "out.gpkg", *VIEWS) == 0
    assert sorted(path.name for path in Path().iterdir()) == [
        "in",
        "item.json",
        "out.gpkg",
        "out.gpkg.config.toml",
        "out.qml",
        "report.html",
        "sheet.png",
    ]
    frame = geopandas.read_file("out.gpkg")
    assert len(frame) == 25
    assert set(frame.product_id) == {product.name}
    page = Path("report.html").read_text()
    assert all(json.dumps(text)[1:-1] in page for text in frame.caption.dropna())
    with Image.open("sheet.png") as sheet:
        assert sheet.width > 5 * 50
    item = json.loads(Path("item.json").read_text())
    assert set(item["assets"]) == {"captions", "report", "sheet"}
    assert item["assets"]["captions"]["href"] == "./out.gpkg"
    assert item["properties"]["rsedge:tiles"] == 25


def test_the_saved_configuration_gives_the_same_views(product, bundle_path):
    assert caption(product.path, bundle_path, "-o", "out.geojson", *VIEWS, "--max-cloud", "0.3", "--no-style") == 0
    names = ["out.geojson", "report.html", "sheet.png", "item.json"]
    before = {name: Path(name).read_bytes() for name in names}
    assert not Path("out.qml").exists()
    assert run(["caption", "--config", "out.geojson.config.toml", "--overwrite"]) == 0
    assert {name: Path(name).read_bytes() for name in names} == before


def test_a_style_that_is_there_stays(product, bundle_path):
    Path("out.qml").write_text("mine")
    assert caption(product.path, bundle_path, "-o", "out.geojson") == 0
    assert Path("out.qml").read_text() == "mine"
    assert caption(product.path, bundle_path, "-o", "out.geojson", "--overwrite") == 0
    assert Path("out.qml").read_text() != "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--html", "report.txt"], "end its name in .html"),
        (["--sheet", "sheet.jpg"], ".png"),
        (["--stac", "item.xml"], ".json"),
        (["--html", "same.html", "--sheet", "same.png", "--stac", "out.geojson"], ".json"),
        (["--boa-offset", "much"], "auto, 0 or -1000"),
        (["--scl", "a.tif", "--cloud-mask", "b.tif"], "give one"),
        (["--resolution", "0"], "above 0"),
        (["--max-cloud", "2"], "0<=x<=1"),
    ],
)
def test_bad_names_are_refused_before_any_work(product, bundle_path, capsys, arguments, message):
    assert caption(product.path, bundle_path, "-o", "out.geojson", *arguments) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["in"]


def test_clouds_are_counted(product, bundle_path, capsys, caplog):
    import logging

    caplog.set_level(logging.INFO, logger="rsedge")
    assert caption(product.path, bundle_path, "-o", "out.csv", "--max-cloud", "0", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["cloud"] > 0
    rows = Path("out.csv").read_text().splitlines()
    assert sum(",cloud," in row for row in rows) == summary["cloud"]


def test_a_remote_scene_needs_leave(product, bundle_path, capsys):
    assert caption("https://example.com/scene.tif", bundle_path) == 2
    assert "--allow-remote" in capsys.readouterr().err


def test_a_folder_becomes_one_output(product, bundle_path, tmp_path):
    scenes.write(tmp_path / "in" / "more.tif", scenes.pixels(3, 40, 40))
    with zipfile.ZipFile(tmp_path / "in" / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "no product")
    assert caption(tmp_path / "in", bundle_path, "-o", "all.geojsonl") == 0
    names = [json.loads(line)["properties"]["scene"] for line in Path("all.geojsonl").read_text().splitlines()]
    assert list(dict.fromkeys(names)) == [product.name, "more"]


def write_item(product):
    """A STAC item of a product, in this folder."""
    assets = {
        name: {"href": str(product.path / product.image(band))}
        for name, band in (("red", "B04"), ("green", "B03"), ("blue", "B02"))
    }
    values = {"type": "Feature", "stac_version": "1.0.0", "id": "s", "properties": {}, "assets": assets, "links": []}
    Path("item.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("scene", "arguments"),
    [
        ("scene.png", ["-o", "out.csv", "--sheet", "scene.png"]),
        ("item.json", ["-o", "out.csv", "--stac", "item.json"]),
        ("scene.gpkg", ["-o", "scene.gpkg"]),
        ("scene.gpkg", ["-o", "-", "--cloud-mask", "mask.png", "--sheet", "mask.png"]),
    ],
)
def test_what_is_read_is_never_replaced(product, bundle_path, capsys, scene, arguments):
    write_item(product)
    scenes.write(Path("scene.png"), scenes.pixels(3, 64, 64), driver="PNG")
    scenes.write(Path("scene.gpkg"), scenes.pixels(3, 64, 64))  # a GeoTIFF by another name
    scenes.write(Path("mask.png"), scenes.pixels(1, 64, 64), driver="PNG")
    before = {path: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    assert caption(scene, bundle_path, *arguments, "--overwrite") == 2
    assert "the scene itself is never replaced" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path().iterdir() if path.is_file()} == before


def test_a_run_over_its_own_folder_again(product, bundle_path):
    scenes.write(Path("a.tif"), scenes.pixels(3, 64, 64))
    for _ in range(2):
        assert caption(".", bundle_path, "-o", "out.csv", *VIEWS, "--overwrite") == 0
    assert {line.split(",")[0] for line in Path("out.csv").read_text().splitlines()[1:]} == {"a", product.name}


def test_signatures_stay_out_of_all_that_is_written(tmp_path, monkeypatch, bundle_path):
    (tmp_path / "served").mkdir()
    scenes.write(tmp_path / "served" / "a.tif", scenes.pixels(3, 64, 64))
    monkeypatch.chdir(tmp_path)
    with serve(tmp_path / "served") as server:
        server.query = "sig=SECRET"
        assert caption(server.url("a.tif"), bundle_path, "-o", "out.geojson", *VIEWS, "--allow-remote") == 0
    written = [path for path in Path().iterdir() if path.is_file()]
    assert len(written) == 6
    assert [path.name for path in written if b"SECRET" in path.read_bytes()] == []
    assert "/a.tif" in Path("out.geojson.config.toml").read_text()


@pytest.mark.parametrize("view", ["sheet.png", "report.html"])
def test_views_read_remote_scenes_as_a_run_does(product, tmp_path, monkeypatch, view):
    """With retries and time limits, and without looking for files beside the scene."""
    from rasterio.env import getenv, hasenv

    from rsedge.runtime.outputs.report.report import report_target
    from rsedge.runtime.outputs.report.sheet import sheet_target
    from rsedge.runtime.scenes.scene import Scene, SceneReader

    (tmp_path / "served").mkdir()
    scenes.write(tmp_path / "served" / "a.tif", scenes.pixels(3, 64, 64))
    opened = []
    real = SceneReader.__init__

    def watch(self, scene):
        opened.append(scene)
        assert hasenv()
        assert getenv()["GDAL_HTTP_MAX_RETRY"] == "2"
        real(self, scene)

    with serve(tmp_path / "served") as server:
        scene = Scene.open(server.url("a.tif"), allow_remote=True)
        results = list(SceneTiles(scene, TileOptions(tile_size=32)).segments(0, [ImageSize(32)], "m"))
        monkeypatch.setattr(SceneReader, "__init__", watch)
        make = sheet_target if view.endswith(".png") else report_target
        with make(view, [scene]).open() as writer:
            writer.write([TileResult(tile.record, tile.path, None) for segment in results for tile in segment])
    assert opened


def test_the_last_line_names_every_file(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    scenes.write(tmp_path / "n.tif", scenes.pixels(3, 60, 60))
    views = ["--html", "n.html", "--sheet", "n.png", "--stac", "n.json"]
    assert run(["caption", "n.tif", "-o", "n.geojson", "--tile-size", "32", "--device", "cpu", *views]) == 0
    assert caplog.messages[-1].startswith("n.geojson, n.html, n.png, n.qml and n.json: 4 tiles (4 captions")
    assert all((tmp_path / name).exists() for name in ("n.geojson", "n.html", "n.png", "n.qml", "n.json"))
    properties = json.loads((tmp_path / "n.json").read_text())["properties"]
    assert properties["rsedge:datetime_source"].startswith("modification times")
    assert properties["datetime"][:2] == "20"


def test_outputs_are_checked_before_anything_is_opened(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scenes.write(tmp_path / "n.tif", scenes.pixels(3, 60, 60))
    (tmp_path / "there.csv").write_text("precious")
    for output, said in (("there.csv", "exists already"), ("gone/a.csv", "create it first"), ("a.shp", "a.gpkg is a")):
        assert run(["caption", "n.tif", "-o", output, "-m", "no-such.rsedge"]) in (1, 2)
        assert said in capsys.readouterr().err


def test_the_report_of_a_classification_speaks_of_classes(tmp_path):
    scene = Scene.open(scenes.write(tmp_path / "n.tif", scenes.pixels(3, 60, 60)))
    with report_target(tmp_path / "r.html", [scene], classes=["lake", "forest"]).open():
        pass
    page = (tmp_path / "r.html").read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert [label for label, _ in data["classes"]] == ["lake", "forest"]
    assert len({colour for _, colour in data["classes"]}) == 2
