"""The captioner as its users call it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rsedge import Captioner, Scene, TileRecord
from rsedge.errors import BackendError, BundleError, OptionError
from rsedge.runtime.engines import ort
from tests import scenes
from tests.models import random_images


@pytest.fixture(scope="module")
def captioner(bundle_path: Path) -> Captioner:
    return Captioner.load(bundle_path, device="cpu", batch_size=4)


def test_captions_have_text_score_and_tokens(captioner):
    captions = captioner.caption(random_images(5, 32), num_beams=3)
    assert len(captions) == 5
    assert len({caption.text for caption in captions}) > 1
    assert all(caption.score < 0 and caption.token_ids for caption in captions)
    assert not any("[" in caption.text for caption in captions), "special tokens must not show"


def test_progress_counts_captions_as_they_are_finished(captioner):
    images = np.random.default_rng(0).integers(0, 256, (20, captioner.image_size, captioner.image_size, 3), np.uint8)
    ticks: list[int] = []
    captioner.with_options(max_new_tokens=5).caption_tiles(images, range(20), ticks.append)
    assert sum(ticks) == 20
    assert len(ticks) > 1, "16 images are decoded together"


def test_no_images_no_captions(captioner):
    assert captioner.caption(np.zeros((0, 32, 32, 3), np.uint8)) == []


def test_samples_do_not_depend_on_batch_order_or_threads(bundle_path, captioner):
    images = random_images(12, 32)
    keys = list(range(100, 112))
    options = {"top_p": 0.9, "temperature": 1.5, "seed": 11}
    expected = captioner.caption(images, keys=keys, **options)
    assert len({caption.token_ids for caption in expected}) > 3
    order = np.random.default_rng(0).permutation(12)
    shuffled = captioner.caption(images[order], keys=[keys[i] for i in order], **options)
    assert [c.token_ids for c in shuffled] == [expected[i].token_ids for i in order]
    for batch_size, threads in ((1, 1), (3, 2), (16, 1)):
        other = Captioner.load(bundle_path, device="cpu", batch_size=batch_size, threads=threads)
        assert [c.token_ids for c in other.caption(images, keys=keys, **options)] == [c.token_ids for c in expected]
    assert [c.token_ids for c in captioner.caption(images, keys=keys, **{**options, "seed": 12})] != [
        c.token_ids for c in expected
    ]


def test_caches_kept_on_a_device_give_the_same_captions(bundle_path, captioner):
    """The path CUDA takes, on the CPU: the bundle's cache graphs in place of arrays written in place."""
    on_device = Captioner.load(bundle_path, device="cpu", batch_size=4)
    on_device.decoder.keep_on_device(on_device.bundle)
    images = random_images(13, 32, seed=2)
    for options in ({"num_beams": 1}, {"num_beams": 3, "max_new_tokens": 30}, {"top_k": 5, "seed": 1}):
        expected = captioner.caption(images, **options)
        assert [c.token_ids for c in on_device.caption(images, **options)] == [c.token_ids for c in expected]


def test_other_sizes_are_resized(captioner):
    large = random_images(2, 50)
    from rsedge.pixels import resize

    small = np.array([resize(image, 32) for image in large])
    assert captioner.caption(large) == captioner.caption(small)


def test_images_of_the_wrong_kind_are_refused(captioner):
    with pytest.raises(OptionError, match=r"float32 \[2, 32, 32, 3\], expected uint8 \[B, H, W, 3\]"):
        captioner.caption(np.zeros((2, 32, 32, 3), np.float32))
    with pytest.raises(OptionError, match=r"pass image\[None\]"):
        captioner.caption(np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(OptionError, match="1 keys for 2 images"):
        captioner.caption(np.zeros((2, 32, 32, 3), np.uint8), keys=[1])
    with pytest.raises(OptionError, match=r"max_new_tokens is 1000.*positions for 64"):
        captioner.caption(np.zeros((1, 32, 32, 3), np.uint8), max_new_tokens=1000)


def test_captions_may_be_as_long_as_there_are_positions(captioner):
    [caption] = captioner.caption(random_images(1, 32), max_new_tokens=64, min_new_tokens=64)
    assert len(caption.token_ids) == 64


def test_scenes_give_records_lazily(captioner, tmp_path):
    path = scenes.write(tmp_path / "scene.tif", scenes.pixels(3, 70, 150))
    records = captioner.caption_scene(Scene.open(path), tile_size=32, num_beams=2)
    first = next(records)
    assert isinstance(first, TileRecord)
    assert first.status == "ok"
    assert first.model == captioner.model
    assert 1 + sum(1 for _ in records) == 15


@pytest.mark.parametrize("there", [True, False])
def test_auto_says_which_device_and_why(bundle_path, caplog, monkeypatch, there):
    monkeypatch.setattr("rsedge.runtime.engines.choose._NVIDIA", (str(bundle_path),) if there else ())
    with caplog.at_level("INFO", logger="rsedge"):
        captioner = Captioner.load(bundle_path)
    assert captioner.device in ("cpu", "cuda:0")
    assert captioner.device_reason
    # On a machine without a GPU nobody asks what CUDA lacks.
    assert (captioner.device_reason in caplog.text) == (there or captioner.device != "cpu")


def test_a_device_asked_for_by_name_is_used_or_refused(bundle_path, monkeypatch):
    monkeypatch.setattr(ort, "_cuda_problem", lambda number: f"no device {number} in this test")
    with pytest.raises(BackendError, match="cuda:3 cannot be used: no device 3 in this test"):
        Captioner.load(bundle_path, device="cuda:3")
    assert ort.choose_device("auto", "int8") == ("cpu", "an int8 bundle is made for CPUs")
    assert Captioner.load(bundle_path, device="auto").device == "cpu"
    for device in ("gpu", "cpu:1", "cuda:x"):
        with pytest.raises(OptionError, match="expected auto, cpu, cuda or cuda:N"):
            Captioner.load(bundle_path, device=device)


def test_a_damaged_graph_is_refused(bundle_path, tmp_path):
    copy = tmp_path / "copy.rsedge"
    copy.mkdir()
    for file in bundle_path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    data = bytearray((copy / "step.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "step.onnx").write_bytes(data)
    with pytest.raises(BundleError, match=r"step\.onnx is altered"):
        Captioner.load(copy)


def test_the_runtime_needs_no_torch(bundle_path, tmp_path):
    path = scenes.write(tmp_path / "scene.tif", scenes.pixels(3, 64, 64))
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "onnx", "accelerate", "safetensors"):
            raise ImportError(f"{{name}} is blocked")
        if name.startswith(("rsedge.training", "rsedge.export")):
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Block())
from rsedge import Captioner, Scene
captioner = Captioner.load({str(bundle_path)!r}, device="cpu")
print(len(list(captioner.caption_scene(Scene.open({str(path)!r}), tile_size=32))))
from rsedge.cli.main import run
output = {str(tmp_path / "out.geojson")!r}
caption = ["caption", {str(path)!r}, "-m", {str(bundle_path)!r}, "--tile-size", "32", "-o", output]
print(run(["--help"]), run(["caption", "--help"]), run(caption))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = result.stdout.strip().splitlines()
    assert (lines[0], lines[-1]) == ("4", "0 0 0")
    assert (tmp_path / "out.geojson").exists()
