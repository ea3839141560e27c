from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from rsedge.errors import BatchError, OptionError
from rsedge.runtime.run.batch import Batch, Job, Shard, read_failures, read_origin
from rsedge.runtime.run.batch_catalog import read_catalog
from rsedge.runtime.run.pipeline import Models
from rsedge.runtime.run.sources import TileOptions
from tests import scenes
from tests.fakes import FakeCaptioner
from tests.safe_products import write_safe

SIZE = 16


def write_scenes(folder: Path, count: int, bad: int = 0) -> Path:
    folder.mkdir()
    for number in range(count):
        scenes.write(folder / f"s{number:02}.tif", scenes.pixels(3, 20, 36, seed=number), photometric="RGB")
    for number in range(bad):
        whole = (folder / f"s{number:02}.tif").read_bytes()
        (folder / f"bad{number:02}.tif").write_bytes([b"", whole[:60], b"no raster"][number % 3])
    return folder


def batch(catalog: Path, folder: Path, **options) -> Batch:
    job = Job(
        models=Models(captioner=FakeCaptioner(SIZE)), tiling=TileOptions(tile_size=SIZE), **options.pop("job", {})
    )
    return Batch(lambda: read_catalog([os.fspath(catalog)]), job, folder, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.parquet"))}


def test_each_scene_has_an_output_and_failures_are_listed(tmp_path):
    catalog = write_scenes(tmp_path / "in", 4, bad=3)
    out = tmp_path / "out"
    summary = batch(catalog, out).run()
    assert (summary.scenes, summary.done, summary.failed) == (7, 4, 3)
    assert list(files(out)) == [f"scenes/no-mgrs-tile/s{number:02}.parquet" for number in range(4)]
    assert parquet.read_table(out / "scenes/no-mgrs-tile/s01.parquet")["scene"].to_pylist() == ["s01"] * 6
    assert [line["scene"] for line in read_failures(out / "failed.jsonl")] == ["bad00", "bad01", "bad02"]
    origin = read_origin(out / "scenes/no-mgrs-tile/s01.parquet")
    assert origin["run"]["model"] == FakeCaptioner(SIZE).model
    assert origin["scene"]["path"] == str(catalog / "s01.tif")


def test_a_rerun_does_only_what_is_missing_failed_or_stale(tmp_path):
    catalog = write_scenes(tmp_path / "in", 3, bad=1)
    out = tmp_path / "out"
    batch(catalog, out).run()
    before = files(out)
    again = batch(catalog, out).run()
    assert (again.done, again.failed, again.finished_before, again.failed_before) == (0, 0, 3, 1)
    # 1. A scene whose output was deleted is done again, to the same bytes.
    (out / "scenes/no-mgrs-tile/s02.parquet").unlink()
    assert batch(catalog, out).run().done == 1
    assert files(out) == before
    # 2. A failed scene is retried where that is wanted, and leaves the list when it is finished.
    scenes.write(catalog / "bad00.tif", scenes.pixels(3, 20, 36), photometric="RGB")
    assert batch(catalog, out).run().done == 0
    retried = batch(catalog, out, retry_failed=True).run()
    assert (retried.done, retried.failures) == (1, None)
    assert not (out / "failed.jsonl").exists()
    # 3. Other options make outputs stale; they stay until they are to be redone.
    other = {"settings": {"num_beams": 3}}
    assert batch(catalog, out, job=other).run().stale == 4
    assert batch(catalog, out, job=other, redo_stale=True).run().done == 4
    assert batch(catalog, out, job=other).run().finished_before == 4
    # 4. So does another state of the input.
    scenes.write(catalog / "s00.tif", scenes.pixels(3, 20, 36, seed=99), photometric="RGB")
    assert batch(catalog, out, job=other).run().done == 0
    assert batch(catalog, out, job=other, redo_stale=True).run().done == 1


def test_shards_together_write_what_one_run_writes(tmp_path):
    catalog = write_scenes(tmp_path / "in", 9, bad=2)
    batch(catalog, tmp_path / "one").run()
    done = [batch(catalog, tmp_path / "many", shard=Shard(number, 4)).run() for number in range(4)]
    assert files(tmp_path / "many") == files(tmp_path / "one")
    assert (sum(each.done for each in done), sum(each.failed for each in done)) == (9, 2)
    lines = [line for path in (tmp_path / "many").glob("failed*.jsonl") for line in read_failures(path)]
    assert sorted(line["scene"] for line in lines) == ["bad00", "bad01"]
    # A grown catalogue leaves each scene in its shard.
    known = {entry.id: entry.key % 4 for entry in read_catalog([str(catalog)])}
    scenes.write(catalog / "a-new-one.tif", scenes.pixels(3, 20, 36), photometric="RGB")
    grown = {entry.id: entry.key % 4 for entry in read_catalog([str(catalog)])}
    assert known.items() < grown.items()
    with pytest.raises(OptionError, match="0 to 3"):
        Shard(4, 4)


def test_a_limit_of_failures_ends_the_run_and_the_next_one_continues(tmp_path):
    catalog = write_scenes(tmp_path / "in", 3, bad=3)
    with pytest.raises(BatchError, match="2 scenes failed, more than 1"):
        batch(catalog, tmp_path / "out").run(max_failures=1)
    assert len(list(read_failures(tmp_path / "out/failed.jsonl"))) == 2
    summary = batch(catalog, tmp_path / "out").run(max_failures=1)
    assert (summary.done, summary.failed, summary.failed_before) == (3, 1, 2)


def test_unreadable_tiles_count_as_failed(tmp_path):
    catalog = tmp_path / "in"
    catalog.mkdir()
    pixels = scenes.pixels(3, 640, 640)
    path = scenes.write(catalog / "s.tif", pixels, photometric="RGB", tiled=True, blockxsize=64, blockysize=64)
    whole = path.read_bytes()
    scenes.truncate(path, 0.7)
    summary = batch(catalog, tmp_path / "out").run()
    assert (summary.done, summary.failed) == (0, 1)
    assert "tiles are unreadable" in next(read_failures(tmp_path / "out/failed.jsonl"))["error"]
    assert batch(catalog, tmp_path / "out").run().failed_before == 1
    path.write_bytes(whole)
    assert batch(catalog, tmp_path / "out", retry_failed=True).run().done == 1


def test_a_torn_line_of_failures_is_skipped(tmp_path):
    listed = tmp_path / "failed.jsonl"
    listed.write_text(json.dumps({"scene": "a", "error": "x"}) + '\n{"scene": "b", "err')
    assert [line["scene"] for line in read_failures(listed)] == ["a"]


def test_a_catalogue_is_lists_folders_and_products(tmp_path):
    folder = write_scenes(tmp_path / "in", 2)
    write_safe(folder, seed=1, size=60)
    (folder / "damaged.SAFE").mkdir()
    (tmp_path / "list.txt").write_text("# scenes\nin/s00.tif\n\nin/s01.tif\nin/s00.tif\nin/none.tif\n")
    entries = list(read_catalog([str(tmp_path / "list.txt")]))
    assert [entry.id for entry in entries] == ["s00", "s01", "none"]
    found = {entry.id: entry for entry in read_catalog([str(folder)])}
    product = next(entry for entry in found.values() if entry.collection == "sentinel-2-l2a")
    assert len(product.mgrs_tile) == 5
    assert found["damaged.SAFE"].error
    with pytest.raises(OptionError, match=r"gone.txt cannot be read as a list"):
        list(read_catalog([str(tmp_path / "gone.txt")]))


def test_two_scenes_of_one_name_are_told_apart(tmp_path):
    write_scenes(tmp_path / "a", 1)
    write_scenes(tmp_path / "b", 1)
    entries = list(read_catalog([str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "a")]))
    assert [entry.error is None for entry in entries] == [True, False]
    assert "called s00" in entries[1].error


def test_names_of_scenes_leave_no_folder(tmp_path):
    scenes.write(tmp_path / "x\n.tif", scenes.pixels(3, 20, 36), photometric="RGB")
    entry = next(read_catalog([str(tmp_path)]), None)
    assert entry is not None
    assert (tmp_path / entry.output).resolve().is_relative_to(tmp_path)
    assert not {"\n", "/"} & set(entry.id)
    assert np.all([len(part.encode()) < 255 for part in entry.output.parts])
