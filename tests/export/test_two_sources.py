"""Facts of a checkpoint that two files state, and folders that hold no usable weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from rsedge.checkpointfiles import read_image_spec
from rsedge.errors import CheckpointError
from rsedge.export.convert import export
from rsedge.export.loading import load_checkpoint
from rsedge.pixels import ImageSize, fit_image
from tests import scenes
from tests.dual_encoders import make_clip


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("size", [{"height": 48, "width": 48}, 48])
def test_the_size_of_the_model_wins_in_export_and_evaluation(folder: Path, tmp_path: Path, caplog, size):
    from rsedge.evaluation.models import open_captioner

    change(folder / "preprocessor_config.json", size=size)
    with caplog.at_level("WARNING", logger="rsedge"):
        bundle = export(folder, tmp_path / "a.rsedge")
    assert "its image processor states 48 px and the model 32 px: 32 px it is" in caplog.text
    assert bundle.manifest.image.size == 32
    images = [scenes.pixels(3, *side, seed=n).transpose(1, 2, 0) for n, side in enumerate([(60, 60), (50, 90)] * 4)]
    captions = [open_captioner(source, device="cpu").caption(images) for source in (folder, bundle.path)]
    assert captions[0] == captions[1]


@pytest.mark.parametrize("size", [(60, 90), (90, 60), (33, 32), (32, 32), (31, 200)])
def test_a_centre_crop_is_that_of_transformers(tmp_path: Path, size):
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32, do_normalize=False, do_rescale=False)
    processor.save_pretrained(tmp_path)
    spec = read_image_spec(tmp_path, pytest.fail)
    assert spec is not None
    assert (spec.size, spec.crop) == (32, True)
    pixels = scenes.pixels(3, *size).transpose(1, 2, 0)
    ours = fit_image(pixels, ImageSize(spec.size, spec.resample, spec.crop))
    theirs = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


def test_a_bundle_keeps_the_crop(tmp_path: Path):
    path = make_clip(tmp_path / "clip")
    side = json.loads((path / "config.json").read_text())["vision_config"]["image_size"]
    change(
        path / "preprocessor_config.json", do_center_crop=True, size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
    )  # fmt: skip
    assert export(path, tmp_path / "a.rsedge").manifest.image.crop


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"do_resize": False}, "do_resize is off"),
        ({"size": {"shortest_edge": 32}, "do_center_crop": False}, "shortest_edge"),
        ({"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": 32}, "cuts 32 out of"),
    ],
)
def test_processors_that_keep_the_shape_are_refused(folder: Path, values, words):
    change(folder / "preprocessor_config.json", **values)
    refused(folder, words)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("manifest.json", "a bundle of rsedge"),
        ("open_clip_config.json", "open_clip"),
        ("open_clip_model.safetensors", "open_clip"),
        ("tf_model.h5", "from_tf=True"),
        ("flax_model.msgpack", "from_flax=True"),
        ("model-q4.gguf", "GGUF"),
        ("decoder.onnx", "graphs of ONNX"),
        ("weights.ckpt", "import-rsdix"),
        ("model.pt", "never executes pickle"),
    ],
)
def test_a_folder_without_weights_is_named(folder: Path, file: str, words: str):
    (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(b"{}")
    refused(folder, words)


def test_an_adapter_names_the_way_out(folder: Path):
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "LoRA", "merge_and_unload")


def shard(folder: Path, count: int) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for number in range(count):
        part = {name: tensors[name] for name in list(tensors)[number::count]}
        save_file(part, folder / f"model-{number + 1:05}-of-{count:05}.safetensors", {"format": "pt"})


@pytest.mark.parametrize("count", [1, 3])
def test_shards_are_read_without_an_index(folder: Path, count: int):
    before = dict(load_checkpoint(folder).tensors)
    shard(folder, count)
    after = load_checkpoint(folder).tensors
    assert set(before) == set(after)
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])


def test_a_missing_shard_is_named(folder: Path):
    shard(folder, 3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(folder, "shards 2 of 3 are missing")


def test_a_run_stands_for_its_best_checkpoint(checkpoint: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(checkpoint, run / "best")
    said: list[str] = []
    export(run, tmp_path / "a.rsedge", progress=said.append)
    assert said[0] == f"best checkpoint of the run: {run / 'best'}"
