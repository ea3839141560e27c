"""`rsedge bench` and what it measures with; no figure of time is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rsedge.cli.main import run
from rsedge.errors import OptionError, SceneError
from rsedge.runtime.benchmark import BenchmarkReport, benchmark
from rsedge.runtime.captioner import Captioner
from rsedge.runtime.scene import Scene
from rsedge.runtime.stage_clock import CACHES, ENCODE, STEPS, StageClock, TimedDecoder
from tests import scenes
from tests.dual_encoders import make_clip
from tests.models import random_images


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
    captioner.decoder = TimedDecoder(captioner.decoder, clock)
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
    report = benchmark(clip_bundle, device="cpu", threads=1, batch_sizes=(4,), tiles=4, rounds=1)
    assert report.does == "embed"
    assert report.decoding is None
    assert report.scene["generated"]
    assert list(stages(report)) == ["read", "resize", "encode", "wait for tiles", "write"]


def test_decoding_options_are_refused_for_an_embedder(clip_bundle):
    with pytest.raises(OptionError, match="generates nothing: leave num_beams out"):
        benchmark(clip_bundle, device="cpu", num_beams=3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_sizes": (0,)}, ["batch_sizes has 0"]),
        ({"seconds": 1.0, "tiles": 3, "rounds": 0}, ["leave one out", "rounds is 0"]),
        ({"tiles": -1}, ["tiles is -1"]),
    ],
)
def test_all_that_is_wrong_is_said_at_once(bundle_path, options, words):
    with pytest.raises(OptionError) as error:
        benchmark(bundle_path, device="cpu", **options)
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
        report = benchmark(bundle_path, scene=scene, device="cpu", batch_sizes=(2, 4), tiles=2, rounds=1, tile_size=64)
    assert [batch.tiles_per_second is None for batch in report.batches] == [False, True]
    assert report.batch_size == 2


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


def test_options_of_a_scene_need_one(bundle_path, capsys):
    assert run(["-q", "bench", "-m", str(bundle_path), *FAST, "--bands", "3,2,1"]) == 2
    assert "name it with --scene" in capsys.readouterr().err


def test_seconds_and_tiles_exclude_each_other(bundle_path, scene_path, capsys):
    assert run(["-q", "bench", "-m", str(bundle_path), "--scene", str(scene_path), *FAST, "--seconds", "3"]) == 2
    assert "leave one out" in capsys.readouterr().err
