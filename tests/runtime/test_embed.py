"""Embedding scenes and images: the pipeline with an embedder, alone and beside a captioner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import geopandas
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rsedge.datasets.images import SUFFIXES, FileImage
from rsedge.errors import OptionError, OutputError, SceneError
from rsedge.pixels import resize
from rsedge.runtime.run.pipeline import SEGMENT_TILES, EmbeddingsOutput, caption_scene, embed, embed_scene, run
from rsedge.runtime.run.sources import find_inputs
from rsedge.runtime.scenes.scene import Scene
from rsedge.runtime.search.search_file import SearchFile
from tests import scenes
from tests.fakes import FakeCaptioner, FakeEmbedder
from tests.runtime.search_files import read_embeddings
from tests.safe_products import write_safe

REPOSITORY = Path(__file__).resolve().parents[2]
SIZE = 16


@pytest.fixture
def scene(tmp_path):
    """13 × 14 tiles of 16 pixels, in 3 segments, with a hole."""
    data = scenes.pixels(3, 200, 220)
    data[:, 40:80, 50:100] = 0
    path = scenes.write(
        tmp_path / "scene.tif", data, photometric="RGB", nodata=0, tiled=True, blockxsize=64, blockysize=64
    )
    return Scene.open(path)


def pictures(folder, count):
    """Images of different sizes, the third of them no image."""
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (20 + number % 5, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
    (folder / "002.png").write_bytes(b"no picture")
    return [FileImage(path) for path in sorted(folder.iterdir())]


def stored(path):
    """Every embedding of a file, None where there is none, and its rows."""
    table = pq.read_table(path)
    return read_embeddings(path), table.drop_columns(["embedding"]).to_pylist()


def do(output, inputs, embedder=None, **options):
    return embed(inputs, embedder or FakeEmbedder(SIZE), output, **{"tile_size": SIZE, **options})


def test_embeddings_are_in_the_order_of_the_tiles(tmp_path, scene):
    embedder = FakeEmbedder(24)
    summary = do(tmp_path / "a.parquet", [scene], embedder, max_nodata=0.4)
    found, rows = stored(tmp_path / "a.parquet")
    expected = list(caption_scene(FakeCaptioner(SIZE), scene, tile_size=SIZE, max_nodata=0.4))
    records = [record for segment in expected for record in segment]
    with scene.reader() as reader:
        for vector, row, record in zip(found, rows, records, strict=True):
            same = ("row", "col", "row_off", "col_off", "width", "height", "status", "nodata_fraction", "message")
            assert [row[name] for name in same] == [getattr(record, name) for name in same]
            assert (row["path"], row["model"]) == (str(tmp_path / "scene.tif"), embedder.model)
            assert (vector is None) == (record.status != "ok")
            if vector is not None:
                image = np.zeros((SIZE, SIZE, 3), np.uint8)
                image[: record.height, : record.width] = reader.read(
                    record.row_off, record.col_off, record.height, record.width
                )[0]
                alone = FakeEmbedder(24).embed_images(resize(image, 24)[None])[0]
                np.testing.assert_array_equal(vector, alone.astype(np.float16))
    assert (summary.tiles, summary.ok, summary.nodata) == (
        len(records),
        sum(v is not None for v in found),
        sum(v is None for v in found),
    )
    assert max(embedder.batches) <= SEGMENT_TILES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "scene.tif"]


def test_places_are_those_of_the_geojson_of_the_same_run(tmp_path, scene):
    beside = EmbeddingsOutput(path=tmp_path / "e.parquet", embedder=FakeEmbedder(SIZE))
    run([scene], FakeCaptioner(SIZE), tmp_path / "c.geojson", tile_size=SIZE, embeddings=beside)
    ours, theirs = geopandas.read_parquet(tmp_path / "e.parquet"), geopandas.read_file(tmp_path / "c.geojson")
    assert ours.crs.to_authority() == ("OGC", "CRS84")
    assert ours.geometry.to_wkb().tolist() == theirs.geometry.to_wkb().tolist()
    bounds = pq.read_table(tmp_path / "e.parquet")["bbox"].combine_chunks().flatten()
    np.testing.assert_array_equal(np.stack([c.to_numpy() for c in bounds], 1), theirs.bounds.to_numpy())
    for name in ("scene", "row", "col", "caption", "score", "status", "nodata_fraction"):
        assert ours[name].tolist() == theirs[name].tolist() or ours[name].equals(theirs[name])


@pytest.mark.parametrize("other_size", [SIZE, 24])
def test_one_pass_gives_what_two_give_and_reads_once(tmp_path, scene, other_size, monkeypatch):
    from rsedge.runtime.scenes.scene import SceneReader

    reads = []
    read = SceneReader.read
    monkeypatch.setattr(SceneReader, "read", lambda *a: (reads.append(a[1:]), read(*a))[1])
    captions, embeddings = tmp_path / "c.parquet", tmp_path / "e.parquet"
    beside = EmbeddingsOutput(path=embeddings, embedder=FakeEmbedder(other_size), dtype="float32")
    summary = run([scene], FakeCaptioner(SIZE), captions, tile_size=SIZE, embeddings=beside, readers=1)
    once = len(reads)
    assert len(set(reads)) == once, "a window is read twice"
    assert (summary.output, summary.embeddings) == (str(captions), str(embeddings))
    run([scene], FakeCaptioner(SIZE), tmp_path / "c2.parquet", tile_size=SIZE, readers=1)
    do(tmp_path / "e2.parquet", [scene], FakeEmbedder(other_size), dtype="float32", readers=1)
    assert len(reads) == 3 * once
    assert captions.read_bytes() == (tmp_path / "c2.parquet").read_bytes()
    first, second = pq.read_table(embeddings), pq.read_table(tmp_path / "e2.parquet")
    assert SearchFile.open(embeddings).info.caption_model == FakeCaptioner().model
    assert first.drop_columns(["caption", "score"]).replace_schema_metadata().equals(second.replace_schema_metadata())
    assert first["caption"].to_pylist() == pq.read_table(captions)["caption"].to_pylist()


def test_embed_scene_streams_full_precision(scene):
    pairs = list(embed_scene(FakeEmbedder(SIZE), scene, tile_size=SIZE, edge="drop"))
    assert len(pairs) == 12 * 13
    assert {vector.dtype for _, vector in pairs if vector is not None} == {np.dtype(np.float32)}
    assert all((vector is None) == (record.status != "ok") for record, vector in pairs)
    with pytest.raises(OptionError, match="overlap"):
        embed_scene(FakeEmbedder(), scene, overlap=224)


# ---- images ----


def test_images_are_one_record_each(tmp_path, scene):
    images = pictures(tmp_path / "set", 150)
    summary = do(tmp_path / "a.parquet", [*images[:70], scene, *images[70:]], readers=3)
    found, rows = stored(tmp_path / "a.parquet")
    assert (summary.images, summary.scenes, summary.tiles, summary.read_errors) == (150, 1, 150 + 182, 1)
    mine = [*range(70), *range(70 + 182, 150 + 182)]
    for image, vector, row in zip(images, [found[i] for i in mine], [rows[i] for i in mine], strict=True):
        assert (row["scene"], row["path"]) == (image.path.stem, str(image.path))
        assert row["geometry"] is row["bbox"] is row["nodata_fraction"] is None
        if image.path.name == "002.png":
            assert (row["status"], row["width"], vector) == ("read_error", 0, None)
            assert "002.png" in row["message"]
            continue
        pixels = image.read()
        assert (row["status"], row["height"], row["width"]) == ("ok", *pixels.shape[:2])
        alone = FakeEmbedder(SIZE).embed_images(resize(pixels, SIZE)[None])[0]
        np.testing.assert_array_equal(vector, alone.astype(np.float16))
    assert len(geopandas.read_parquet(tmp_path / "a.parquet")) == 150 + 182


def test_an_image_that_changed_ends_the_resumption(tmp_path):
    images = pictures(tmp_path / "set", 100)

    def stop(progress):
        if progress.tiles_done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        do(tmp_path / "a.parquet", images, progress=stop)
    images[99].path.write_bytes(images[98].path.read_bytes() + b" ")
    with pytest.raises(OutputError, match="names_sizes_times"):
        do(tmp_path / "a.parquet", images)
    assert do(tmp_path / "a.parquet", images, overwrite=True).resumed_tiles == 0


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        ("a.geojson", {}, r"end '.*a\.geojson' in \.parquet"),
        ("a.parquet", {"dtype": "int8"}, "float16, float32"),
        ("a.parquet", {"readers": 0}, "readers"),
    ],
)
def test_options_are_checked_before_any_work(tmp_path, scene, output, options, message):
    with pytest.raises(OptionError, match=message):
        do(tmp_path / output, [scene], **options)
    assert [path.name for path in tmp_path.iterdir()] == ["scene.tif"]


def test_two_outputs_need_two_names(tmp_path, scene):
    beside = EmbeddingsOutput(path=tmp_path / "x.parquet", embedder=FakeEmbedder(SIZE))
    with pytest.raises(OptionError, match="name a file for each"):
        run([scene], FakeCaptioner(SIZE), tmp_path / "x.parquet", embeddings=beside)


def test_either_output_that_exists_is_kept(tmp_path, scene):
    beside = EmbeddingsOutput(path=tmp_path / "e.parquet", embedder=FakeEmbedder(SIZE))
    (tmp_path / "e.parquet").write_text("precious")
    for output in (tmp_path / "c.csv", "-"):
        with pytest.raises(OutputError, match=r"e\.parquet exists already"):
            run([scene], FakeCaptioner(SIZE), output, embeddings=beside)
    assert (tmp_path / "e.parquet").read_text() == "precious"
    run([scene], FakeCaptioner(SIZE), tmp_path / "c.csv", tile_size=SIZE, embeddings=beside, overwrite=True)
    assert SearchFile.open(tmp_path / "e.parquet").rows == 182


# ---- what is a scene, what an image ----


def find(*names, **options):
    return find_inputs(
        [str(name) for name in names], open_scene=Scene.open, open_image=FileImage, suffixes=SUFFIXES, **options
    )


def kinds(found):
    return [
        (entry.name, "scene") if isinstance(entry, Scene) else (entry.path.name, "image") for entry in found.entries
    ]


@pytest.fixture
def mixed(tmp_path):
    folder = tmp_path / "mixed"
    (folder / "deep").mkdir(parents=True)
    scenes.write(folder / "b.tif", scenes.pixels(3, 30, 30))
    scenes.write(folder / "a.tif", scenes.pixels(3, 30, 30), crs=None, transform=None)
    scenes.write(folder / "deep" / "c.png", scenes.pixels(3, 30, 30), driver="PNG", crs=None, transform=None)
    (folder / "deep" / "d.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("not looked at")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


def test_a_georeference_makes_a_scene(mixed):
    expected = [("a.tif", "image"), ("b", "scene"), ("c.png", "image"), ("d.jpg", "image")]
    assert kinds(find(mixed)) == expected
    assert kinds(find(mixed / "b.tif", mixed / "notes.txt")) == [("b", "scene"), ("notes.txt", "image")]
    assert [kind for _, kind in kinds(find(mixed, kind="image"))] == ["image"] * 4
    assert kinds(find(mixed / "a.tif", kind="scene")) == [("a", "scene")]
    assert "d.jpg cannot be opened" in find(mixed, kind="scene").unopened[0]


def test_products_in_a_folder_are_scenes(tmp_path):
    product = write_safe(tmp_path / "x", seed=1, size=64)
    (product.path / "inner.png").write_bytes(b"")
    seen = []
    find_inputs(
        [str(tmp_path / "x")],
        open_scene=lambda found: seen.append(found.name),
        open_image=FileImage,
        suffixes=SUFFIXES,
    )
    assert seen == [product.name]


def test_what_is_not_there_is_an_error_at_once(tmp_path):
    with pytest.raises(SceneError, match=r"absent\.png does not exist"):
        find(tmp_path / "absent.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OptionError, match="empty is a folder without scenes"):
        find(tmp_path / "empty")
    with pytest.raises(OptionError, match="auto, scene, image"):
        find(tmp_path, kind="tile")


def test_every_scene_that_cannot_be_used_is_named(tmp_path):
    for number in range(10):
        scenes.write(tmp_path / f"band{number}.tif", scenes.pixels(2, 20, 20))
    with pytest.raises(SceneError) as caught:
        find(tmp_path)
    lines = str(caught.value).splitlines()
    assert [f"band{number}.tif" in line for number, line in enumerate(lines[:-1])] == [True] * 8
    assert lines[-1] == "and 2 more"


def test_a_link_that_leads_back_is_not_followed(tmp_path):
    (tmp_path / "deep").mkdir()
    scenes.write(tmp_path / "deep" / "a.png", scenes.pixels(3, 20, 20), driver="PNG", crs=None, transform=None)
    (tmp_path / "deep" / "up").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "deep")  # no way back: the same image under another name
    assert kinds(find(tmp_path)) == [("a.png", "image"), ("a.png", "image")]


def test_large_images_are_pointed_out(tmp_path):
    for name in ("a.png", "b.png"):
        blank = np.zeros((3, 1600, 1600), np.uint8)
        scenes.write(tmp_path / name, blank, driver="PNG", crs=None, transform=None)
    (warning,) = find(tmp_path).warnings
    assert "a.png has 1600 x 1600 px" in warning
    assert "1 other" in warning
    assert "--as scene" in warning


# ---- killed at any moment ----

KILLED = """
    import os, signal, sys
    from pathlib import Path
    from rsedge.datasets.images import FileImage
    from rsedge.runtime.run.pipeline import EmbeddingsOutput, embed, run
    from rsedge.runtime.scenes.scene import Scene
    from tests.fakes import FakeCaptioner, FakeEmbedder

    scene, folder, mode, output, moment = *sys.argv[1:5], int(sys.argv[5])
    count = 0

    def here(half=None):
        global count
        count += 1
        if count == moment:
            if half:
                half()
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(owner, name, torn=None):
        real = getattr(owner, name)
        def wrapped(*arguments, **options):
            here()
            if torn:
                here(lambda: torn(real, *arguments))
            result = real(*arguments, **options)
            here()
            return result
        setattr(owner, name, wrapped)

    wrap(os, "write", torn=lambda real, handle, data: real(handle, bytes(data)[: len(data) // 2]))
    wrap(os, "fsync")
    wrap(os, "ftruncate")
    wrap(Path, "replace")
    wrap(Path, "unlink")
    wrap(FakeEmbedder, "embed_images")
    output = Path(output)
    if mode == "embed":
        images = [FileImage(path) for path in sorted(Path(folder).iterdir())]
        embed([Scene.open(scene), *images], FakeEmbedder(16), output, tile_size=16)
    else:
        beside = EmbeddingsOutput(path=output.with_name("beside.parquet"), embedder=FakeEmbedder(24))
        run([Scene.open(scene)], FakeCaptioner(16), output, tile_size=16, embeddings=beside)
    print(count)
    assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("mode", ["embed", "both"])
def test_killed_at_any_moment_nothing_is_lost(tmp_path, scene, mode):
    images = pictures(tmp_path / "set", 70)
    name = "out.parquet" if mode == "embed" else "out.geojson"
    others = [] if mode == "embed" else ["beside.parquet"]

    def killed_at(moment, folder):
        command = [sys.executable, "-c", textwrap.dedent(KILLED), scene.path, str(tmp_path / "set"), mode]
        command += [str(folder / name), str(moment)]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)

    def resume(output):
        if mode == "embed":
            embed([scene, *images], FakeEmbedder(SIZE), output, tile_size=SIZE)
        else:
            beside = EmbeddingsOutput(path=output.with_name("beside.parquet"), embedder=FakeEmbedder(24))
            run([scene], FakeCaptioner(SIZE), output, tile_size=SIZE, embeddings=beside)

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    done = killed_at(-1, whole)
    assert done.returncode == 0, done.stderr
    expected = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert sorted(expected) == sorted([name, *others])
    moments = int(done.stdout)
    everywhere = bool(os.environ.get("RSEDGE_TEST_EVERY_MOMENT"))
    for moment in range(1, moments + 1) if everywhere else np.linspace(2, moments, 4).astype(int):
        assert killed_at(moment, cut).returncode == -signal.SIGKILL
        for path in cut.iterdir():
            assert path.name not in expected or path.read_bytes() == expected[path.name], "no half output"
        if not (cut / name).exists() or (cut / f"{name}.journal").exists():
            resume(cut / name)
        assert {path.name: path.read_bytes() for path in cut.iterdir()} == expected
        for path in cut.iterdir():
            path.unlink()
