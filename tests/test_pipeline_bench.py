"""`bench/pipeline.py`: what it makes of a run, and the run itself on a small scene; no figure of time is asserted."""

from __future__ import annotations

import json

import pytest
import rasterio

from bench import common, pipeline
from bench.pipeline import Stretch


def test_a_stretch_is_held_against_the_model_at_both_of_its_ends():
    found = pipeline.summarise([Stretch(10, 2.2), Stretch(0, 0.1), Stretch(10, 3.0)], [200.0, 200.0, 300.0, 300.0])
    assert found["tiles"] == 20
    assert found["seconds"] == 5.3
    assert found["model_ms"] == 250
    assert found["ratio"] == 1.06, "what took no tile is not left out"
    assert found["ratios"] == [1.1, 1.0]


def test_memory_is_compared_after_a_tenth_and_at_the_end():
    memory = [(number, 100.0 + number) for number in range(1, 1001)]
    found = pipeline.flatness(memory)
    assert (found["rss_mb_at_a_tenth"], found["rss_mb_at_the_end"], found["rss_ratio"]) == (200, 1100, 5.5)
    assert found["rss_mb"][0] == memory[0]
    assert found["rss_mb"][-1] == memory[-1]
    assert len(found["rss_mb"]) <= 101
    assert pipeline.flatness([(5, 80.0)])["rss_ratio"] == 1


@pytest.mark.parametrize("tiles", [4, 13])
def test_a_whole_run(bundle_path, tmp_path, tiles):
    scene = pipeline.write_cog(tmp_path / "scene.tif", tiles * pipeline.TILE + 8)
    with rasterio.open(scene) as dataset:
        assert dataset.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert dataset.compression.name == "deflate"
    found = pipeline.measure_whole(bundle_path, scene, stretches=3)
    assert found["tiles"] == (tiles + 1) ** 2
    assert found["side"] == tiles * pipeline.TILE + 8
    assert len(found["ratios"]) == (1 if tiles == 4 else 3)
    assert found["seconds"] > 0
    assert found["ratio"] > 0
    done = [tile for tile, _ in found["rss_mb"]]
    assert done == sorted(done)
    assert done[-1] == (tiles + 1) ** 2
    assert found["peak_rss_mb"] >= max(size for _, size in found["rss_mb"])


def test_rounds_and_the_whole_scene_are_kept_beside_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    pipeline.save({"tiles": 64, "old": 1})
    pipeline.save({"whole": {"tiles": 2401}})
    pipeline.save({"tiles": 16})
    assert json.loads((tmp_path / "pipeline.json").read_text()) == {"whole": {"tiles": 2401}, "tiles": 16}


def test_a_worker_that_ends_is_told():
    with common.Process(pipeline.__file__, "model", "gone.rsedge", "gone.tif") as process, pytest.raises(SystemExit):
        process.read()
