"""CLIP and SigLIP bundles: their embeddings are those of transformers, and what cannot be exported is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from rsedge.bundle import EmbeddingSpec, read_bundle
from rsedge.errors import CheckpointError, ParityError
from rsedge.export import verify
from rsedge.export.convert import export
from rsedge.export.graphs import encoder
from rsedge.export.loading import load_checkpoint
from rsedge.export.models import clip
from rsedge.runtime.embedder import Embedder
from tests.dual_encoders import CAPTIONS, TEXTS, embeddings, make_clip, make_siglip
from tests.models import random_images

WIDE = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 40, "num_hidden_layers": 3}
MODELS = {
    "clip": lambda path: make_clip(path, seed=1),
    # eos_token_id 2 is what files of before transformers 4.31 say, whatever the end token is.
    "clip-legacy-end": lambda path: make_clip(
        path, seed=2, vision={**WIDE, "hidden_act": "gelu"}, text={"eos_token_id": 2, "hidden_act": "gelu"}, dim=40
    ),
    "siglip": lambda path: make_siglip(path, seed=3),
    "siglip-one-layer": lambda path: make_siglip(
        path, seed=4, vision={**WIDE, "patch_size": 16}, text={"num_hidden_layers": 1, "projection_size": 48}
    ),
}
TOLERANCES = {"fp32": 0.99999, "fp16": 0.999, "int8": 0.99}


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODELS[request.param](tmp_path_factory.mktemp(request.param) / "model")


def edit_json(path: Path, change: Any) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return (first.astype(np.float64) * second).sum(axis=1)


@pytest.mark.parametrize("precision", TOLERANCES)
def test_embeddings_are_those_of_transformers(checkpoint: Path, tmp_path: Path, precision: Any):
    embedder = Embedder.load(export(checkpoint, tmp_path / "b.rsedge", precision=precision).path, device="cpu")
    images = random_images(6, 32, seed=5)
    expected_images, expected_texts = embeddings(checkpoint, images)
    ours = embedder.embed_images(images), embedder.embed_texts(TEXTS)
    for found, expected in zip(ours, (expected_images, expected_texts), strict=True):
        assert (found.dtype, found.shape) == (np.float32, expected.shape)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
        assert cosines(found, expected).min() >= TOLERANCES[precision]
        assert cosines(expected, np.roll(expected, 1, axis=0)).max() < 0.998, "alike embeddings would prove nothing"
    if precision == "fp32":
        np.testing.assert_allclose(ours[0], expected_images, atol=5e-6)
        np.testing.assert_allclose(ours[1], expected_texts, atol=5e-6)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_an_embedding_does_not_depend_on_its_neighbours(checkpoint: Path, tmp_path: Path, precision: Any):
    path = export(checkpoint, tmp_path / "b.rsedge", precision=precision).path
    embedder, one_by_one = Embedder.load(path, device="cpu"), Embedder.load(path, device="cpu", batch_size=1)
    images = random_images(5, 32, seed=6)
    images[1] = 255  # a neighbour whose activations are far larger
    np.testing.assert_allclose(embedder.embed_images(images), one_by_one.embed_images(images), atol=2e-6)
    np.testing.assert_allclose(embedder.embed_texts(TEXTS), one_by_one.embed_texts(TEXTS), atol=2e-6)


@pytest.mark.parametrize("make", [make_clip, make_siglip])
def test_another_image_size_interpolates_positions_as_transformers_does(tmp_path: Path, make: Any):
    path = make(tmp_path / "model", seed=7)
    embedder = Embedder.load(export(path, tmp_path / "b.rsedge", image_size=52).path, device="cpu")
    images = random_images(4, 52, seed=8)  # not a multiple of the patch: the margin is ignored, as torch ignores it
    expected, _ = embeddings(path, images, resized=True)
    np.testing.assert_allclose(embedder.embed_images(images), expected, atol=5e-6)


def test_the_manifest_says_how_texts_are_filled_and_logits_made(tmp_path: Path):
    spec = export(make_clip(tmp_path / "c"), tmp_path / "c.rsedge").manifest.embedding
    scale = spec.logit_scale
    assert scale == pytest.approx(math.exp(2.6))
    # CLIP's texts may end anywhere; those of SigLIP may not.
    assert spec == EmbeddingSpec(dim=24, logit_scale=scale, context_length=20, pad_id=559)
    bundle = export(make_siglip(tmp_path / "s"), tmp_path / "s.rsedge")
    manifest, scale = bundle.manifest, bundle.manifest.embedding.logit_scale
    assert scale == pytest.approx(math.exp(2.6))
    assert manifest.embedding == EmbeddingSpec(
        dim=32, logit_scale=scale, logit_bias=-9.5, context_length=16, pad_to_context=True, pad_id=559
    )
    assert (manifest.family, set(manifest.graphs), manifest.tokens) == ("clip", {"vision", "text"}, None)
    assert manifest.graphs["text"].inputs[0].shape == ("batch", 16)
    card = (bundle.path / "README.md").read_text()
    assert "embedder.embed_texts" in card
    assert "| pad_to_context | true |" in card
    assert json.loads((bundle.path / "stac-item.json").read_text())["properties"]["mlm:tasks"] == ["similarity-search"]


def test_fp16_is_typed_with_norms_softmax_and_lengths_in_float32(checkpoint: Path, tmp_path: Path):
    path = export(checkpoint, tmp_path / "half.rsedge", precision="fp16").path
    for name in ("vision", "text"):
        model = onnx.shape_inference.infer_shapes(onnx.load(path / f"{name}.onnx"))
        types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
        types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        for kind, wanted in (
            ("Gemm", onnx.TensorProto.FLOAT16),
            ("LayerNormalization", onnx.TensorProto.FLOAT),
            ("Softmax", onnx.TensorProto.FLOAT),
            ("ReduceL2", onnx.TensorProto.FLOAT),
        ):
            nodes = [node for node in model.graph.node if node.op_type == kind]
            assert nodes
            assert {types[node.input[0]] for node in nodes} == {wanted}, kind


# The gate


def test_a_wrong_graph_fails_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = make_clip(tmp_path / "c", seed=9)
    with monkeypatch.context() as patch:
        patch.setattr(clip, "_causal_mask", lambda graph, longest, count: graph.const(np.zeros((20, 20)), "float32"))
        with pytest.raises(ParityError):
            export(path, tmp_path / "x.rsedge")
    monkeypatch.setattr(encoder, "interpolate_positions", lambda positions, grid, extra: positions * 0)
    monkeypatch.setattr(clip, "interpolate_positions", lambda positions, grid, extra: positions * 0)
    with pytest.raises(ParityError, match="image embeddings have a cosine of"):
        export(path, tmp_path / "x.rsedge")
    assert not (tmp_path / "x.rsedge").exists()


def test_nan_fails_the_report():
    rows = np.ones((2, 3), np.float32)
    assert not verify.compare(rows * np.nan, rows)["cosine_min"] >= 0


def test_texts_must_end_where_the_model_reads_them(tmp_path: Path):
    path = make_clip(tmp_path / "c", text={"eos_token_id": 7})
    with pytest.raises(ParityError, match=r"reads a text at token 7 .*does not end texts with it"):
        export(path, tmp_path / "x.rsedge")


def test_texts_are_filled_as_the_tokenizer_fills_them(tmp_path: Path):
    from transformers import AutoTokenizer

    path = make_siglip(tmp_path / "s", text={"pad_token_id": 3})
    bundle = export(path, tmp_path / "x.rsedge")
    assert bundle.manifest.embedding.pad_id == AutoTokenizer.from_pretrained(path).pad_token_id != 3


# What loads


def rename(folder: Path, change: Any) -> None:
    file = folder / "model.safetensors"
    save_file({change(name): value for name, value in load_file(file).items()}, file, {"format": "pt"})


@pytest.mark.parametrize(
    "change",
    [lambda name: f"clip.{name}", lambda name: name.replace("text_model.", "text_model.text_model.")],
    ids=["prefix", "nested"],
)
def test_tensors_of_files_of_other_ages(tmp_path: Path, change: Any):
    path = make_clip(tmp_path / "c", seed=10)
    expected = AutoModel.from_pretrained(path).state_dict()
    rename(path, change)
    tensors = load_checkpoint(path).tensors
    assert set(tensors) == set(expected)
    for name, values in tensors.items():
        np.testing.assert_array_equal(values, expected[name].numpy())


def test_a_second_copy_of_a_section_wins_as_in_transformers(tmp_path: Path):
    """openai/clip-vit-large-patch14 has one; its end token, absent there, is the default and not the section's 2."""
    path = make_clip(tmp_path / "c", text={"eos_token_id": 2})
    assert load_checkpoint(path).settings.text.end is None
    sizes = json.loads((path / "config.json").read_text())["text_config"]
    sizes = {name: value for name, value in sizes.items() if name != "eos_token_id"} | {"vocab_size": 49408}
    edit_json(path / "config.json", lambda values: values.update(text_config_dict=sizes))
    assert AutoModel.from_pretrained(path, ignore_mismatched_sizes=True).config.text_config.eos_token_id == 49407
    from rsedge.export.models.clip import read_clip_settings

    settings = read_clip_settings(json.loads((path / "config.json").read_text()), pytest.fail)
    assert settings is not None
    assert (settings.text.end, settings.text.vocab_size, settings.text.tower.width) == (49407, 49408, 32)


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (make_clip, {"architectures": ["CLIPVisionModel"]}, "CLIP but not both of its encoders (CLIPVisionModel)"),
        (make_clip, {"projection_dim": 0}, "config.projection_dim is 0"),
        (make_clip, {"text_config": {"eos_token_id": [1, 2]}}, "text_config.eos_token_id is [1, 2]"),
        (make_clip, {"vision_config": {"num_channels": 4}}, "vision_config.num_channels is 4"),
        (make_clip, {"text_config": {"hidden_act": "swish"}}, "text_config.hidden_act is 'swish'"),
        (make_clip, {"text_config": {"hidden_act": ["gelu"]}}, "text_config.hidden_act is ['gelu']"),
        (make_clip, {"text_config": {"layer_norm_eps": None}}, "text_config.layer_norm_eps is None"),
        (
            make_clip,
            {"text_config": {"num_hidden_layers": 10**12}},
            "num_hidden_layers is 1000000000000; rsedge exports at",
        ),
        (make_clip, {"vision_config": {"hidden_size": 2**62}}, "transformers makes no CLIPModel of config.json"),
        (make_clip, {"quantization_config": {"bits": 4}}, "export the unquantised checkpoint"),
        (make_siglip, {"vision_config": {"vision_use_head": False}}, "gives no embedding of an image"),
        (make_siglip, {"text_config": {"projection_size": 5}}, "embeddings of 32 numbers, its texts of 5"),
        (make_siglip, {"text_config": {"pad_token_id": 5000}}, "text_config.pad_token_id is 5000"),
    ],
)
def test_settings_no_graph_follows_are_refused(tmp_path: Path, make: Any, change: dict[str, Any], message: str):
    def merge(values: dict[str, Any]) -> None:
        for name, value in change.items():
            values[name] = {**values[name], **value} if name.endswith("_config") and name in values else value

    path = make(tmp_path / "model")
    edit_json(path / "config.json", merge)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert any(message in problem for problem in caught.value.problems), caught.value


def test_a_temperature_that_ran_away_is_refused(tmp_path: Path):
    path = make_clip(tmp_path / "c")
    tensors = load_file(path / "model.safetensors")
    save_file({**tensors, "logit_scale": torch.tensor(float("nan"))}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="training diverged"):
        export(path, tmp_path / "x.rsedge")


# From training, and through evaluation


@pytest.mark.parametrize("siglip", [False, True])
def test_what_training_wrote_embeds_alike_as_checkpoint_and_as_bundle(tmp_path: Path, siglip: bool):
    from rsedge.evaluation.models import open_embedder
    from rsedge.training.models import clip as training
    from tests.training.tiny import caption_data, tiny_recipe

    torch.manual_seed(0)
    data = caption_data()
    task = training.make(tiny_recipe("clip", siglip=siglip), data)
    folder = tmp_path / "checkpoint"
    task.save(folder, task.state_dict())
    bundle = export(folder, tmp_path / "b.rsedge").path
    assert read_bundle(bundle).manifest.image.size == 16
    pair = [open_embedder(source, device="cpu") for source in (folder, bundle)]
    images = [example.image.read() for example in data.examples[:5]]
    texts = [example.captions[0] for example in data.examples[:5]]
    for first, second in (
        [model.embed_images(images) for model in pair],
        [model.embed_texts(texts) for model in pair],
    ):
        np.testing.assert_allclose(first, second, atol=5e-6)
    assert (pair[1].info.kind, pair[1].info.precision) == ("bundle", "fp32")


def test_an_imported_rsdix_model_is_exported(tmp_path: Path):
    from rsedge.training.models.loading import learn_clip_bpe
    from rsedge.training.rsdix.import_rsdix import import_rsdix
    from tests.cli.test_import_rsdix import lightning, rsdix_clip

    learn_clip_bpe(CAPTIONS, 560).save_pretrained(tmp_path / "words")
    state, student, _ = rsdix_clip("clip", tmp_path / "words")
    path = tmp_path / "model"
    import_rsdix(lightning(tmp_path / "rsdix.ckpt", state), path, tokenizer=tmp_path / "words")
    embedder = Embedder.load(export(path, tmp_path / "b.rsedge").path, device="cpu")
    images = random_images(3, student.config.vision_config.image_size)
    for found, expected in zip(
        (embedder.embed_images(images), embedder.embed_texts(TEXTS)), embeddings(path, images), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=5e-6)


def test_the_command_prints_the_cosines(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from rsedge.cli.main import run

    assert run(["export", str(make_clip(tmp_path / "c")), "-o", str(tmp_path / "c.rsedge")]) == 0
    output = capsys.readouterr().out
    assert "images  cosine 1.0000000 at least" in output
    assert "(accepted 0.99999)" in output
