"""Zero-shot classes: against a softmax written out, rasters read back, and what happens to a run that is cut."""

from __future__ import annotations

import csv
import json
import math
import re
from itertools import product
from pathlib import Path

import geopandas
import numpy as np
import pytest
import rasterio
import rasterio.shutil
from pyarrow import parquet
from rasterio.transform import Affine

from rsedge.errors import BundleError, OptionError, OutputError
from rsedge.runtime.classify import Classifier, classify_scene, run
from rsedge.runtime.outputs.records import TileResult
from rsedge.runtime.scenes.scene import Scene
from rsedge.runtime.scenes.tiles import TileGrid
from tests import scenes
from tests.colours import ColourEmbedder, blocks, embed_text, unit
from tests.runtime.test_writers import RECORD

SIZE = 16
PLAIN = ("{}",)
LABELS = ("red", "green", "blue")
PICTURE = [["red", "green", "blue", "green"], ["blue", "-", "red", "red"], ["green", "green", "blue", "red"]]


def make(labels=LABELS, templates=PLAIN, **options) -> Classifier:
    return Classifier.make(ColourEmbedder(**options), labels, templates=templates)


@pytest.fixture
def scene(tmp_path: Path, monkeypatch) -> Scene:
    """3 × 4 tiles of one colour each, one of them without data; the working directory is empty but for it."""
    monkeypatch.chdir(tmp_path)
    return Scene.open(scenes.write(tmp_path / "scene.tif", blocks(PICTURE, SIZE), photometric="RGB", nodata=0))


def classify(scene, output="out.geojson", classifier=None, **options):
    return run([scene], classifier or make(), output, **{"tile_size": SIZE, **options})


def expected_probabilities(scene: Scene, templates, labels=LABELS, scale=10.0, bias=None) -> dict:
    """(row, col) → probabilities, in plain Python."""
    anchors = []
    for label in labels:
        mean = sum(embed_text(template.replace("{}", label)).astype(float) for template in templates) / len(templates)
        anchors.append(mean / math.sqrt(sum(mean**2)))
    found = {}
    with rasterio.open(scene.path) as dataset:
        data = dataset.read().astype(float)
    for row, col in product(range(3), range(4)):
        pixels = data[:, row * SIZE : (row + 1) * SIZE, col * SIZE : (col + 1) * SIZE]
        vector = unit(pixels.reshape(3, -1).mean(axis=1)[None] + 1e-3)[0]
        logits = [scale * float(vector @ anchor) for anchor in anchors]
        if bias is None:
            total = sum(math.exp(logit) for logit in logits)
            found[row, col] = [math.exp(logit) / total for logit in logits]
        else:
            found[row, col] = [1 / (1 + math.exp(-logit - bias)) for logit in logits]
    return found


@pytest.mark.parametrize(("templates", "bias"), [(PLAIN, None), (("{}", "grey {}", "{} or dark"), None), (PLAIN, -8.0)])
def test_classes_and_probabilities_are_those_written_out(scene, templates, bias):
    tiles = list(classify_scene(make(templates=templates, logit_bias=bias), scene, tile_size=SIZE, top=3))
    expected = expected_probabilities(scene, templates, bias=bias)
    assert len(tiles) == 12
    for tile in tiles:
        values = tile.to_dict()
        if PICTURE[tile.row][tile.col] == "-":
            assert (tile.status, values["class"], values["probability_3"]) == ("nodata", None, None)
            continue
        assert values["class"] == PICTURE[tile.row][tile.col]
        order = sorted(zip(expected[tile.row, tile.col], LABELS, strict=True), reverse=True)
        assert [values[f"class{n}"] for n in ("", "_2", "_3")] == [label for _, label in order]
        found = [values[f"probability{n}"] for n in ("", "_2", "_3")]
        np.testing.assert_allclose(found, [value for value, _ in order], atol=6e-5)  # 4 decimals are kept
        assert sum(found) == pytest.approx(1, abs=2e-4) or bias is not None


def test_probabilities_neither_overflow_nor_hide_the_nearest():
    classifier = make(logit_scale=1e4)
    vectors = unit(np.array([[3.0, 2.9, 0.1], [0.0, 0.0, 1.0]]))
    found = classifier.probabilities(vectors)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found.sum(axis=1), 1)
    # Both sigmoids are 1 to the last bit; the nearer one still leads.
    sure = make(labels=("green", "red"), logit_scale=1e3, logit_bias=0.0)
    assert sure.probabilities(vectors)[0].tolist() == [1.0, 1.0]
    (tile,) = sure.classify([TileResult(RECORD, None, vectors[0])])
    assert tile.ranked == (("red", 1.0),)


def test_a_string_is_no_list():
    with pytest.raises(OptionError, match="labels is the string 'water'"):
        Classifier.make(ColourEmbedder(), "water")
    with pytest.raises(OptionError, match=r"templates is the string 'a \{\}'"):
        Classifier.make(ColourEmbedder(), ("dark", "grey"), templates="a {}")


def test_a_model_without_a_scale_is_refused():
    with pytest.raises(BundleError, match="no logit scale"):
        make(logit_scale=None)


@pytest.mark.parametrize("top", [1, 2])
def test_every_format_says_the_same(scene, top):
    names = ["class", "probability", "class_2", "probability_2"][: 2 * top]
    records = [tile.to_dict() for tile in classify_scene(make(), scene, tile_size=SIZE, top=top)]
    wanted = [tuple(record[name] for name in names) for record in records]
    for suffix in ("geojson", "geojsonl", "csv", "parquet"):
        summary = classify(scene, f"out.{suffix}", top=top)
        assert (summary.ok, summary.nodata, summary.tiles) == (11, 1, 12)
        assert summary.classes == {"red": 4, "green": 4, "blue": 3}
    collection = json.loads(Path("out.geojson").read_text())["features"]
    lines = [json.loads(line) for line in Path("out.geojsonl").read_text().splitlines()]
    assert collection == lines
    assert list(collection[0]["properties"]) == [name for name in records[0] if name != "geometry"]
    assert [tuple(feature["properties"][name] for name in names) for feature in collection] == wanted
    with Path("out.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == list(records[0])
    assert [tuple(row[name] for name in names) for row in rows] == [
        tuple("" if value is None else str(value) for value in record) for record in wanted
    ]
    frame = geopandas.read_parquet("out.parquet")
    assert not {"caption", "score"} & set(frame.columns)
    found = frame[names].astype(object).where(frame[names].notna(), None)
    assert [tuple(row) for row in found.itertuples(index=False)] == wanted
    assert frame.geometry.geom_equals_exact(
        geopandas.read_file("out.geojson").geometry.set_crs(frame.crs, allow_override=True), 1e-9
    ).all()
    schema = parquet.read_schema("out.parquet")
    assert [str(schema.field(name).type) for name in names] == ["string", "double"] * top
    assert json.loads(schema.metadata[b"geo"])["version"] == "1.1.0"


def test_many_tiles_go_to_parquet_in_groups(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rsedge.runtime.outputs.geoparquet.ROW_GROUP_ROWS", 100)
    monkeypatch.setattr("rsedge.runtime.outputs.geoparquet._BATCH_ROWS", 50)
    scene = Scene.open(scenes.write(tmp_path / "scene.tif", scenes.pixels(3, 160, 160), photometric="RGB"))
    run([scene], make(image_size=4), "out.parquet", tile_size=8)
    run([scene], make(image_size=4), "out.geojson", tile_size=8)
    assert parquet.ParquetFile("out.parquet").num_row_groups == 4
    frame, features = geopandas.read_parquet("out.parquet"), geopandas.read_file("out.geojson")
    assert frame["class"].tolist() == features["class"].tolist()
    assert frame["probability"].tolist() == features["probability"].tolist()


def categories(path: str) -> list[str]:
    """Category names as GDAL reads them; rasterio has no word for them, but its VRT copies show them."""
    rasterio.shutil.copy(path, "copy.vrt", driver="VRT")
    return re.findall(r"<Category>(.*?)</Category>", Path("copy.vrt").read_text(encoding="utf-8"))


def test_the_raster_has_a_pixel_per_tile(scene):
    labels = ("red", "green", "blue & <deep>")
    classify(scene, raster="classes.tif", classifier=make(labels))
    with rasterio.open("classes.tif") as raster, rasterio.open(scene.path) as source:
        assert (raster.crs, raster.bounds) == (source.crs, source.bounds)
        assert raster.transform[:6] == (160, 0, 600000, 0, -160, 5100000)
        assert (raster.dtypes, raster.nodata, raster.shape) == (("uint8",), 0, (3, 4))
        wanted = [[0 if name == "-" else LABELS.index(name) + 1 for name in row] for row in PICTURE]
        assert raster.read(1).tolist() == wanted
        colours = [raster.colormap(1)[value] for value in (1, 2, 3)]
        assert len(set(colours)) == 3
        assert all(colour[3] == 255 and colour[:3] != (0, 0, 0) for colour in colours)
        tags = raster.tags()
        assert [tags["class_1"], tags["class_3"]] == ["red", "blue & <deep>"]
        assert tags["model"] == "colours@abcdefabcdef"
        assert raster.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert raster.descriptions == ("class",)
    assert categories("classes.tif") == ["no class", "red", "green", "blue &amp; &lt;deep&gt;"]


def pixel(scene: Scene, x: float, y: float) -> tuple[float, float]:
    """Column and row of map coordinates, north up."""
    return (x - scene.transform.c) / scene.transform.a, (y - scene.transform.f) / scene.transform.e


@pytest.mark.parametrize("edge", ["pad", "shift", "drop"])
@pytest.mark.parametrize("overlap", [0, 5, 8])
def test_pixels_lie_where_their_tiles_are(tmp_path, monkeypatch, overlap, edge):
    monkeypatch.chdir(tmp_path)
    scene = Scene.open(scenes.write(tmp_path / "scene.tif", scenes.pixels(3, 60, 75), photometric="RGB"))
    classify(scene, raster="classes.tif", overlap=overlap, edge=edge)
    grid = TileGrid(75, 60, SIZE, overlap, edge)
    classes = {
        (tile.row, tile.col): tile for tile in classify_scene(make(), scene, tile_size=16, overlap=overlap, edge=edge)
    }
    with rasterio.open("classes.tif") as raster:
        assert raster.shape == (grid.rows, grid.cols)
        values = raster.read(1)
        for tile in grid:
            assert values[tile.row, tile.col] == LABELS.index(classes[tile.row, tile.col].ranked[0][0]) + 1
            # The middle of the pixel is the middle of its tile, whole and on its place in the grid …
            x, y = pixel(scene, *raster.xy(tile.row, tile.col))
            shifted = edge == "shift" and (tile.row == grid.rows - 1 or tile.col == grid.cols - 1)
            if not shifted:
                assert (x, y) == pytest.approx((tile.col_off + SIZE / 2, tile.row_off + SIZE / 2))
            # … and what of the pixel is in the scene is in the tile, moved or not.
            left, top = pixel(scene, *raster.xy(tile.row, tile.col, offset="ul"))
            right, bottom = pixel(scene, *raster.xy(tile.row, tile.col, offset="lr"))
            assert tile.col_off - 1e-6 <= left
            assert tile.row_off - 1e-6 <= top
            assert min(right, 75) <= tile.col_off + tile.width + 1e-6
            assert min(bottom, 60) <= tile.row_off + tile.height + 1e-6


def test_many_classes_take_two_bytes(scene):
    labels = (*LABELS, *(f"number {number}" for number in range(300)))
    classify(scene, raster="classes.tif", classifier=make(labels))
    with rasterio.open("classes.tif") as raster:
        assert raster.dtypes == ("uint16",)
        assert raster.read(1)[0].tolist() == [1, 2, 3, 2]
        table = raster.colormap(1)
        assert len({table[value] for value in range(1, 255)}) > 200
    assert categories("classes.tif")[303] == "number 299"


def test_a_rotated_scene_and_one_without_a_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = blocks(PICTURE, SIZE)
    turned = Affine(8, 6, 600000, 6, -8, 5100000)
    scene = Scene.open(scenes.write(tmp_path / "turned.tif", data, photometric="RGB", transform=turned))
    classify(scene, raster="turned-classes.tif")
    with rasterio.open("turned-classes.tif") as raster:
        assert raster.transform[:6] == (128, 96, 600000, 96, -128, 5100000)
    scene = Scene.open(scenes.write(tmp_path / "bare.tif", data, photometric="RGB", crs=None, transform=None))
    summary = classify(scene, "bare.csv", raster="bare-classes.tif")
    assert "has no coordinate reference system" in summary.warnings[0]
    with rasterio.open("bare-classes.tif") as raster:
        assert raster.crs is None
        assert raster.transform[:6] == (SIZE, 0, 0, 0, SIZE, 0), "pixels of the scene take the place of coordinates"


class Tripping(ColourEmbedder):
    """Breaks down at its second segment."""

    def embed_images(self, images):
        if self.seen:
            raise KeyboardInterrupt
        return super().embed_images(images)


def test_a_run_goes_on_where_it_was_cut_even_with_other_labels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scene = Scene.open(scenes.write(tmp_path / "scene.tif", scenes.pixels(3, 160, 160), photometric="RGB"))
    whole = run([scene], make(), "whole.geojson", tile_size=SIZE, raster="whole.tif")
    with pytest.raises(KeyboardInterrupt):
        run([scene], Classifier.make(Tripping(), ("dark", "grey")), "out.geojson", tile_size=SIZE, raster="out.tif")
    assert not Path("out.geojson").exists()
    assert not Path("out.tif").exists()
    summary = run([scene], make(), "out.geojson", tile_size=SIZE, raster="out.tif")
    assert (summary.resumed_tiles, summary.classes) == (64, whole.classes)
    for suffix in ("geojson", "tif"):
        assert Path(f"out.{suffix}").read_bytes() == Path(f"whole.{suffix}").read_bytes()
    assert not Path("out.geojson.journal").exists()


def test_what_cannot_be_is_refused_before_any_work(scene):
    embedder = ColourEmbedder()
    classifier = Classifier.make(embedder, LABELS)
    Path("there.tif").write_bytes(b"precious")
    for error, message, options in (
        (OptionError, "top is 4, expected 1 to 3, the number of labels", {"top": 4}),
        (OptionError, "top is 0", {"top": 0}),
        (OptionError, "end its name in .tif or .tiff", {"raster": "classes.png"}),
        (OptionError, "no suffix that names a format", {"output": "out.xyz"}),
        (OutputError, "there.tif exists already: pass --overwrite", {"raster": "there.tif"}),
        (OptionError, "overlap is 16", {"overlap": 16}),
    ):
        with pytest.raises(error, match=re.escape(message)):
            classify(scene, classifier=classifier, **options)
    with pytest.raises(OptionError, match=r"2 scenes do not fit in one raster, classes\.tif"):
        run([scene, scene], classifier, "out.geojson", raster="classes.tif")
    assert embedder.seen == 0
    assert Path("there.tif").read_bytes() == b"precious"


def test_records_go_to_standard_output(scene, capfdbinary):
    classify(scene, "-", format="csv")
    rows = capfdbinary.readouterr().out.decode().splitlines()
    assert len(rows) == 13
    assert ",class,probability,status," in rows[0]
