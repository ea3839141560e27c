from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import geopandas
import numpy as np
import pytest
import rasterio
from rasterio.windows import Window

from rsedge.errors import OptionError, OutputError
from rsedge.runtime.run.pipeline import SEGMENT_TILES, Progress, caption_scene, run
from rsedge.runtime.scenes.scene import Scene
from rsedge.runtime.scenes.tiles import TileGrid
from tests import scenes
from tests.conftest import shared_data
from tests.fakes import FakeCaptioner

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


def caption(scene, **options):
    segments = caption_scene(FakeCaptioner(SIZE), scene, tile_size=SIZE, **options)
    return [record for segment in segments for record in segment]


def test_records_are_what_rasterio_and_the_captioner_say(scene):
    captioner = FakeCaptioner(SIZE)
    segments = list(caption_scene(captioner, scene, tile_size=SIZE, overlap=3, max_nodata=0.4))
    grid = TileGrid(scene.width, scene.height, SIZE, 3)
    assert [len(segment) for segment in segments[:-1]] == [SEGMENT_TILES] * (len(segments) - 1)
    assert len(captioner.batches) <= len(segments)
    records = [record for segment in segments for record in segment]
    footprints = scene.footprints(list(grid))
    with rasterio.open(scene.path) as dataset:
        for tile, record, footprint in zip(grid, records, footprints, strict=True):
            data = dataset.read(window=Window(tile.col_off, tile.row_off, tile.width, tile.height))
            fraction = float((data == 0).all(axis=0).mean())
            image = np.zeros((1, SIZE, SIZE, 3), np.uint8)
            image[0, : tile.height, : tile.width] = data.transpose(1, 2, 0)
            assert record.nodata_fraction == round(fraction, 4)
            assert record.status == ("nodata" if fraction > 0.4 else "ok")
            assert (record.row, record.col, record.row_off, record.col_off) == (
                tile.row,
                tile.col,
                tile.row_off,
                tile.col_off,
            )
            assert (record.width, record.height) == (tile.width, tile.height)
            assert record.geometry == footprint
            assert (record.scene, record.model, record.cloud_fraction) == ("scene", "fake@0123456789ab", None)
            if record.status == "ok":
                (expected,) = FakeCaptioner(SIZE).caption_tiles(
                    image, [zlib.crc32(b"scene") << 32 ^ tile.row << 16 ^ tile.col]
                )
                assert (record.caption, record.score, record.message) == (expected.text, round(expected.score, 4), None)
            else:
                assert (record.caption, record.score) == (None, None)
                assert "no data" in record.message or "no pixel" in record.message


def test_empty_tiles_never_get_a_caption(scene):
    assert {record.status for record in caption(scene, max_nodata=1.0) if record.nodata_fraction == 1} == {"nodata"}


@pytest.mark.parametrize("start", [0, 1, 2])
def test_segments_are_the_same_wherever_it_starts(scene, start):
    whole = list(caption_scene(FakeCaptioner(SIZE), scene, tile_size=SIZE))
    assert (
        list(caption_scene(FakeCaptioner(SIZE), scene, tile_size=SIZE, start_segment=start, readers=1)) == whole[start:]
    )


def test_blank_scene_calls_no_captioner(tmp_path):
    data = np.zeros((3, 40, 40), np.uint16)
    captioner = FakeCaptioner(SIZE)
    scene = Scene.open(scenes.write(tmp_path / "a.tif", data), bands=(1, 2, 3))
    (segment,) = caption_scene(captioner, scene, tile_size=SIZE)
    assert {record.status for record in segment} == {"nodata"}
    assert captioner.batches == []


@pytest.mark.parametrize("values", [{"max_nodata": 1.5}, {"readers": 0}, {"tile_size": 0}, {"edge": "no"}])
def test_options_are_checked_at_once(scene, values):
    with pytest.raises(OptionError):
        caption_scene(FakeCaptioner(), scene, **values)


# ---- run ----


def do(output, *inputs, **options):
    return run(list(inputs), FakeCaptioner(SIZE), output, **{"tile_size": SIZE, **options})


def test_run_writes_all_records_and_sums_up(tmp_path, scene):
    other = Scene.open(scenes.write(tmp_path / "other.tif", scenes.pixels(3, 30, 30, seed=1)))
    output = tmp_path / "out.geojson"
    seen: list[Progress] = []
    summary = do(output, scene, other, progress=seen.append)
    frame = geopandas.read_file(output)
    expected = caption(scene) + caption(other)
    assert list(frame["caption"].astype(object).where(frame["caption"].notna(), None)) == [
        record.caption for record in expected
    ]
    assert list(frame["scene"].unique()) == ["scene", "other"]
    assert (summary.tiles, summary.scenes, summary.resumed_tiles, summary.read_errors) == (len(expected), 2, 0, 0)
    assert summary.ok == sum(record.status == "ok" for record in expected)
    assert summary.nodata == len(expected) - summary.ok
    assert json.loads(json.dumps(summary.to_dict()))["output"] == str(output)
    assert [progress.tiles_done for progress in seen] == sorted(progress.tiles_done for progress in seen)
    assert seen[-1] == Progress("other", len(expected), len(expected), 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.tif", "out.geojson", "scene.tif"]


@pytest.mark.parametrize("suffix", ["geojson", "geojsonl", "csv"])
def test_options_that_decide_nothing_change_nothing(tmp_path, scene, suffix):
    first, second = tmp_path / f"1.{suffix}", tmp_path / f"2.{suffix}"
    do(first, scene)
    do(second, scene, readers=1)
    assert first.read_bytes() == second.read_bytes()


def test_stdout_streams(monkeypatch, scene):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(raw)))
    lines: list[int] = []
    summary = do("-", scene, progress=lambda _: lines.append(raw.getvalue().count(b"\n")))
    assert lines == [0, 64, 128, summary.tiles]
    assert summary.resumed_tiles == 0


def test_existing_output_is_kept(tmp_path, scene):
    output = tmp_path / "out.csv"
    output.write_text("precious")
    with pytest.raises(OutputError, match="--overwrite"):
        do(output, scene)
    assert output.read_text() == "precious"
    assert not (tmp_path / "out.csv.journal").exists()
    do(output, scene, overwrite=True)
    assert output.read_text().startswith("scene,row")


def test_unfinished_overwrite_still_needs_the_word(tmp_path, scene):
    output = tmp_path / "out.csv"
    output.write_text("precious")
    interrupt(output, scene, after=1, overwrite=True)
    with pytest.raises(OutputError, match="--overwrite"):
        do(output, scene)
    assert output.read_text() == "precious"
    assert do(output, scene, overwrite=True).resumed_tiles == SEGMENT_TILES


def interrupt(output, scene, after, **options):
    def stop(progress):
        if progress.tiles_done >= after * SEGMENT_TILES:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        do(output, scene, progress=stop, **options)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_interrupted_run_goes_on(tmp_path, scene, after):
    whole, output = tmp_path / "whole.geojson", tmp_path / "out.geojson"
    do(whole, scene)
    interrupt(output, scene, after)
    assert not output.exists()
    assert (tmp_path / "out.geojson.journal").exists()
    summary = do(output, scene, readers=1)
    assert output.read_bytes() == whole.read_bytes()
    assert summary.resumed_tiles == after * SEGMENT_TILES
    assert summary.tiles == 182
    assert not (tmp_path / "out.geojson.journal").exists()


@pytest.mark.parametrize("change", [{"tile_size": 32}, {"max_nodata": 0.1}, {"settings": {"num_beams": 3}}])
def test_interrupted_run_refuses_other_options(tmp_path, scene, change):
    output = tmp_path / "out.csv"
    interrupt(output, scene, after=1)
    with pytest.raises(OutputError, match=r"settings\.num_beams|tile_size|max_nodata"):
        do(output, scene, **change)
    do(output, scene, overwrite=True, **change)


def test_truncated_scene_goes_on(tmp_path):
    data = np.random.default_rng(0).integers(1, 255, (3, 100, 100), dtype=np.uint8)
    path = scenes.write(
        tmp_path / "a.tif", data, photometric="RGB", tiled=True, blockxsize=32, blockysize=32, compress="lzw"
    )
    scene = Scene.open(scenes.truncate(path, 0.6))
    summary = do(tmp_path / "out.geojson", scene)
    records = caption(scene)
    assert summary.read_errors == sum(record.status == "read_error" for record in records) > 0
    assert summary.ok > 0
    assert summary.tiles == 49
    for record in records:
        if record.status == "read_error":
            assert (record.caption, record.score, record.nodata_fraction) == (None, None, None)
            assert record.message.startswith("pixels cannot be read: ")
            assert record.geometry is not None


def test_scenes_of_the_same_name_are_pointed_out(tmp_path, scene):
    assert "called scene" in do(tmp_path / "out.csv", scene, scene).warnings[0]


def test_no_scene(tmp_path):
    with pytest.raises(OptionError, match="at least one"):
        do(tmp_path / "out.csv")


def test_captioner_that_fails_keeps_the_journal(tmp_path, scene):
    class Failing(FakeCaptioner):
        def caption_tiles(self, images, keys, tick=None):
            if len(self.batches) == 1:
                raise RuntimeError("out of memory")
            return super().caption_tiles(images, keys)

    output = tmp_path / "out.csv"
    with pytest.raises(RuntimeError, match="out of memory"):
        run([scene], Failing(SIZE), output, tile_size=SIZE)
    assert do(output, scene).resumed_tiles == SEGMENT_TILES


def test_score_that_is_no_number_is_null(tmp_path, scene):
    class Odd(FakeCaptioner):
        def caption_tiles(self, images, keys, tick=None):
            return [type(c)(c.text, float("nan"), c.token_ids) for c in super().caption_tiles(images, keys)]

    run([scene], Odd(SIZE), tmp_path / "out.geojson", tile_size=SIZE)
    features = json.loads((tmp_path / "out.geojson").read_bytes())["features"]
    assert {feature["properties"]["score"] for feature in features} == {None}


# ---- killed at any moment ----

KILLED = """
    import os, signal, sys
    from pathlib import Path
    from rsedge.runtime.run.pipeline import run
    from rsedge.runtime.scenes.scene import Scene
    from tests.fakes import FakeCaptioner

    scene, output, moment = sys.argv[1], sys.argv[2], int(sys.argv[3])
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
    wrap(FakeCaptioner, "caption_tiles")
    run([Scene.open(scene)], FakeCaptioner(16), output, tile_size=16)
    print(count)
"""


def killed_at(moment, scene, output):
    command = [sys.executable, "-c", textwrap.dedent(KILLED), scene.path, str(output), str(moment)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_killed_at_any_moment_nothing_is_lost(tmp_path, scene):
    whole, output = tmp_path / "whole.geojson", tmp_path / "out.geojson"
    done = killed_at(-1, scene, whole)
    assert done.returncode == 0, done.stderr
    moments = int(done.stdout)
    assert moments > 30
    everywhere = bool(os.environ.get("RSEDGE_TEST_EVERY_MOMENT"))
    for moment in range(1, moments + 1) if everywhere else np.linspace(1, moments, 12).astype(int):
        assert killed_at(moment, scene, output).returncode == -signal.SIGKILL
        # Before the rename there is no output, after it the whole one; and a second kill changes nothing.
        assert not output.exists() or output.read_bytes() == whole.read_bytes()
        if moment % 2:
            killed_at(moment // 3, scene, output)
        if not output.exists() or output.with_name("out.geojson.journal").exists():
            do(output, scene)
        assert output.read_bytes() == whole.read_bytes()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out.geojson", "scene.tif", "whole.geojson"]
        output.unlink()


# ---- real scenes ----


@pytest.mark.parametrize(
    ("path", "options"),
    [
        ("scenes/S2A_29RKH_20200219_L2A/TCI.tif", {}),
        ("scenes/naip_m_4709963_se_14_1_20100629.tif", {"bands": (1, 2, 3)}),
    ],
)
def test_real_scenes(tmp_path, path, options):
    scene = Scene.open(shared_data(path), **options)
    output = tmp_path / "out.geojson"
    summary = run([scene], FakeCaptioner(64), output)
    assert summary.ok == summary.tiles == len(TileGrid(scene.width, scene.height))
    frame = geopandas.read_file(output)
    with rasterio.open(scene.path) as dataset:
        bounds = rasterio.warp.transform_bounds(dataset.crs, "EPSG:4326", *dataset.bounds)
    np.testing.assert_allclose(frame.total_bounds, bounds, atol=2e-4)


def test_bands_stacked_look_like_the_true_colour_image(tmp_path):
    folder = shared_data("scenes/S2A_29RKH_20200219_L2A")
    planes = []
    for band in ("B04", "B03", "B02"):
        with rasterio.open(folder / f"{band}.tif") as dataset:
            planes.append(dataset.read(1))
    stacked = scenes.write(tmp_path / "stack.tif", np.stack(planes), descriptions=("B04", "B03", "B02"))
    with Scene.open(stacked).reader() as ours, Scene.open(folder / "TCI.tif").reader() as theirs:
        difference = ours.read(0, 0, 1098, 1098)[0].astype(int) - theirs.read(0, 0, 1098, 1098)[0]
    assert np.abs(difference).mean() < 0.5
