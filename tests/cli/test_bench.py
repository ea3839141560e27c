"""`rsedge bench` and what it measures with; no figure of time is asserted."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest

from rsedge import host
from rsedge.cli.main import run
from rsedge.errors import OptionError, OutputError, SceneError
from rsedge.host import CACHES, ENCODE, STEPS, StageClock
from rsedge.runtime.captioner import Captioner, TileCaptions
from rsedge.runtime.diagnostics.benchmark import BenchmarkReport, benchmark
from rsedge.runtime.scenes.scene import Scene
from tests import scenes
from tests.dual_encoders import make_clip
from tests.models import random_images

benchmark_module = importlib.import_module("rsedge.runtime.diagnostics.benchmark")


@pytest.fixture(scope="module")
def scene_path(tmp_path_factory) -> Path:
    return scenes.write(tmp_path_factory.mktemp("scene") / "small.tif", scenes.pixels(3, 2 * 64, 3 * 64))


@pytest.fixture(scope="module")
def report(bundle_path, scene_path) -> BenchmarkReport:
    with Scene.open(scene_path) as scene:
        return benchmark(
            bundle_path,
            scene=scene,
            device="cpu",
            threads=1,
            batch_sizes=(2, 4),
            tiles=6,
            rounds=2,
            tile_size=64,
            num_beams=2,
            max_new_tokens=5,
            min_new_tokens=5,
        )


@pytest.fixture(scope="module")
def clip_bundle(tmp_path_factory) -> Path:
    from rsedge.export.convert import export

    checkpoint = make_clip(tmp_path_factory.mktemp("clip") / "clip")
    return export(checkpoint, tmp_path_factory.mktemp("clip") / "clip.rsedge").path


def stages(report: BenchmarkReport) -> dict[str, object]:
    return {stage.name: stage for stage in report.stages}


def test_a_captioner_is_timed_at_every_batch_size(report):
    assert [batch.batch_size for batch in report.batches] == [2, 4]
    assert all(batch.tiles == 6 for batch in report.batches)
    assert report.batch_size in (2, 4)
    for spread in (*(batch.tiles_per_second for batch in report.batches), report.whole_tiles_per_second):
        assert 0 < spread.lowest <= spread.median <= spread.highest
    assert report.tiles_per_second == max(
        (batch.tiles_per_second for batch in report.batches), key=lambda spread: spread.median
    )
    assert report.does == "caption"
    assert report.decoding["num_beams"] == 2
    assert report.threads == 1


def test_stages_are_those_of_a_run(report):
    found = stages(report)
    names = ["read", "resize", "encode", "decode steps", "caches", "search and text", "wait for tiles", "write"]
    assert list(found) == names
    assert [name for name in names if found[name].runs == "beside"] == ["read", "resize"]
    # Six captions of five tokens each, in batches: the last token is not fed again.
    batches = -(-6 // report.batch_size)
    assert found["decode steps"].calls == 5 * batches
    assert found["encode"].calls == batches


def test_stages_of_the_model_sum_up_to_its_time(bundle_path):
    clock = StageClock()
    captioner = Captioner.load(bundle_path, device="cpu", threads=1, batch_size=4)
    images = random_images(9, 32)
    expected = [caption.token_ids for caption in captioner.caption(images, num_beams=2)]
    captioner.clock = clock
    assert [caption.token_ids for caption in captioner.caption(images, num_beams=2)] == expected
    assert set(clock.seconds) == {ENCODE, STEPS, CACHES}
    assert all(seconds > 0 for seconds in clock.seconds.values())
    clock.reset()
    assert not clock.calls


def test_nothing_is_left_behind(report, scene_path):
    assert sorted(path.name for path in scene_path.parent.iterdir()) == ["small.tif"]


def test_the_report_is_json(report):
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["machine"]["versions"]["onnxruntime"]
    assert values["machine"]["cores"] >= 1
    assert values["stages"][0]["ms_per_tile"]["median"] > 0
    assert values["scene"] | {"name": ""} == {
        "name": "",
        "generated": False,
        "width": 192,
        "height": 128,
        "tiles": 6,
        "tile_size": 64,
        "readers": 2,
    }


def test_an_embedder_is_timed_on_a_generated_scene(clip_bundle):
    report = benchmark(clip_bundle, device="cpu", threads=1, batch_sizes=(4,), tiles=30, rounds=1)
    assert report.does == "embed"
    assert report.decoding is None
    assert report.scene["generated"]
    assert report.scene["tiles"] == 80, "20 tiles were painted, and repeated because they do not last a round"
    assert list(stages(report)) == ["read", "resize", "encode", "wait for tiles", "write"]


def test_decoding_options_are_refused_for_an_embedder(clip_bundle):
    with pytest.raises(OptionError, match="generates nothing: leave num_beams out"):
        benchmark(clip_bundle, device="cpu", num_beams=3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_sizes": (0, 65)}, ["batch_sizes has 0", "batch_sizes has 65, expected 1 to 64"]),
        ({"seconds": math.inf}, ["seconds is inf"]),
        ({"batch_sizes": (2, 8), "tiles": 3}, ["tiles is 3, fewer than a batch of 8"]),
        ({"device": "cuda:x"}, ["device is 'cuda:x', expected auto"]),
        ({"seconds": 1.0, "tiles": 3, "rounds": 0}, ["leave one out", "rounds is 0"]),
        ({"tiles": -1}, ["tiles is -1"]),
    ],
)
def test_all_that_is_wrong_is_said_at_once(bundle_path, options, words):
    with pytest.raises(OptionError) as error:
        benchmark(bundle_path, **{"device": "cpu", **options})
    assert all(word in str(error.value) for word in words)


def test_an_unknown_option_is_refused(bundle_path):
    with pytest.raises(OptionError, match="beems"):
        benchmark(bundle_path, device="cpu", beems=3)


def test_a_scene_without_data_is_refused(bundle_path, tmp_path):
    path = scenes.write(tmp_path / "empty.tif", np.zeros((3, 64, 64), np.uint8))
    with Scene.open(path) as scene, pytest.raises(SceneError, match="no tile of empty can be shown"):
        benchmark(bundle_path, scene=scene, device="cpu", tile_size=64)


def test_a_batch_that_does_not_fit_is_said_to(bundle_path, scene_path, monkeypatch):
    original = Captioner._decode_some

    def fail(self, *arguments):
        if self.batch_size == 4:
            raise MemoryError("out of memory")
        return original(self, *arguments)

    monkeypatch.setattr(Captioner, "_decode_some", fail)
    with Scene.open(scene_path) as scene:
        report = benchmark(bundle_path, scene=scene, device="cpu", batch_sizes=(2, 4), tiles=4, rounds=1, tile_size=64)
    assert [batch.tiles_per_second is None for batch in report.batches] == [False, True]
    assert report.batch_size == 2


def test_the_model_alone_gets_what_the_segments_of_the_run_had(bundle_path, tmp_path, monkeypatch):
    """A whole run is compared with batches as large as its own, however small the scene."""
    empty = scenes.pixels(3, 64, 64 * 100)
    empty[:, :, : 64 * 60] = 0  # the first segment has 4 tiles that a model sees, the second 36
    given: dict[str, list[int]] = {"run": [], "alone": []}
    now = "alone"
    original_run, original_execute = TileCaptions.caption_tiles, benchmark_module.execute

    def caption_tiles(self, images, keys, tick=None):
        given[now].append(len(images))
        return original_run(self, images, keys)

    def execute(*arguments, **options):
        nonlocal now
        now = "run"
        given["alone"].clear()  # what was timed at several batch sizes before
        try:
            return original_execute(*arguments, **options)
        finally:
            now = "alone"

    monkeypatch.setattr(TileCaptions, "caption_tiles", caption_tiles)
    monkeypatch.setattr(benchmark_module, "execute", execute)
    path = scenes.write(tmp_path / "half.tif", empty)
    with Scene.open(path) as scene:
        benchmark(bundle_path, scene=scene, device="cpu", batch_sizes=(4,), tiles=80, rounds=1, tile_size=64)
    assert given["run"] == [4, 36, 4, 36], "twice through"
    assert given["alone"] == given["run"]


def test_memory_is_what_measuring_took(monkeypatch, bundle_path):
    """And not what generating the scene did."""
    taken = 300 * 10**6

    def write_scene(path, *, tiles):
        np.ones(taken, np.uint8)
        return scenes.write(path, scenes.pixels(3, 4 * 64, 5 * 64))

    monkeypatch.setattr(benchmark_module, "write_scene", write_scene)
    before = host.memory_now()
    report = benchmark(bundle_path, device="cpu", batch_sizes=(4,), tiles=4, rounds=1, tile_size=64)
    assert before / 1e6 - 50 < report.peak_memory_mb < (before + taken) / 1e6


@pytest.mark.parametrize(
    ("places", "total", "count", "ends"),
    [
        ([0, 1, 2], 3, 1, [1]),
        ([0, 1, 2], 3, 3, [3]),
        ([0, 1, 2], 3, 7, [3, 3]),  # one more tile is not worth a pass
        ([5, 6, 9], 100, 3, [10]),
        ([5, 6, 9], 100, 6, [20]),  # further into the scene rather than again
        ([99], 100, 1, [100]),
        ([99], 100, 3, [100, 100, 100]),
        (list(range(256)), 2000, 2500, [2000, 500]),
    ],
)
def test_how_far_a_run_goes(places, total, count, ends):
    assert benchmark_module._ends(places, total, count) == ends


def test_batch_sizes_that_are_tried():
    assert benchmark_module._usual_sizes(16, "cpu", None) == [1, 4, 16]
    assert benchmark_module._usual_sizes(32, "cuda:0", None) == [8, 32, 64]
    assert benchmark_module._usual_sizes(64, "cuda:0", None) == [16, 64], "a run gives a model no more together"
    assert benchmark_module._usual_sizes(16, "cpu", 6) == [1, 4, 6]


# The command

FAST = ("--device", "cpu", "--threads", "1", "--batch-size", "2", "--tiles", "2", "--rounds", "1", "--tile-size", "64")


def test_the_command_prints_a_table_and_writes_the_report(bundle_path, scene_path, tmp_path, capsys):
    output = tmp_path / "report.json"
    arguments = ["-q", "bench", "-m", str(bundle_path), "--scene", str(scene_path), *FAST, "--beams", "2"]
    assert run([*arguments, "-o", str(output)]) == 0
    printed = capsys.readouterr().out
    for words in ("num_beams 2", "tiles/s, model alone", "decode steps", "with reading and writing", "peak memory"):
        assert words in printed
    values = json.loads(output.read_text())
    assert values["decoding"]["num_beams"] == 2
    assert run([*arguments, "-o", str(output)]) == 1
    assert "pass --overwrite" in capsys.readouterr().err


def test_json_on_standard_output_is_the_report(bundle_path, scene_path, capsys):
    assert run(["-q", "bench", "-m", str(bundle_path), "--scene", str(scene_path), *FAST, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["rounds"] == 1
    assert values["batches"][0]["batch_size"] == 2


def test_a_report_that_cannot_be_written_is_printed_all_the_same(
    bundle_path, scene_path, tmp_path, monkeypatch, capsys
):
    def write_bytes(path, data):
        raise OutputError(f"{path} cannot be written: No space left on device")

    monkeypatch.setattr("rsedge.runtime.outputs.files.write_bytes", write_bytes)
    arguments = ["-q", "bench", "-m", str(bundle_path), "--scene", str(scene_path), *FAST]
    assert run([*arguments, "-o", str(tmp_path / "report.json")]) == 1
    printed = capsys.readouterr()
    assert "peak memory" in printed.out
    assert "No space left" in printed.err


def test_options_from_a_file(bundle_path, scene_path, tmp_path, capsys):
    file = tmp_path / "bench.toml"
    file.write_text(f'model = "{bundle_path}"\ntiles = 3\nrounds = 1\ntile_size = 64\nbeams = 2\n')
    assert run(["-q", "bench", "--config", str(file), "--scene", str(scene_path), "--device", "cpu", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert [batch["batch_size"] for batch in values["batches"]] == [1, 3], "none beyond the tiles of a round"
    assert values["decoding"]["num_beams"] == 2


def test_options_of_a_scene_need_one(bundle_path, capsys):
    assert run(["-q", "bench", "-m", str(bundle_path), *FAST, "--bands", "3,2,1"]) == 2
    assert "add --scene" in capsys.readouterr().err


def test_seconds_and_tiles_exclude_each_other(bundle_path, scene_path, capsys):
    assert run(["-q", "bench", "-m", str(bundle_path), "--scene", str(scene_path), *FAST, "--seconds", "3"]) == 2
    assert "leave one out" in capsys.readouterr().err
