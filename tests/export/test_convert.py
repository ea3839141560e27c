"""The export as a whole: precisions, the manifest, the parity gate, and failures that leave nothing behind."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import BlipForConditionalGeneration

from rsedge import Captioner
from rsedge.bundle import read_bundle
from rsedge.errors import BundleError, CheckpointError, OptionError, OutputError, ParityError
from rsedge.export import verify
from rsedge.export.convert import export
from rsedge.export.graphs import builder as graph
from rsedge.pixels import resize
from tests.models import make_blip, random_images


def test_a_bundle_says_what_it_is(checkpoint: Path, bundle_path: Path):
    manifest = read_bundle(bundle_path).manifest
    config = json.loads((checkpoint / "config.json").read_text())
    assert (manifest.family, manifest.precision, manifest.name) == ("blip", "fp32", "tiny")
    assert set(manifest.graphs) == {"vision", "step", "self_cache", "cross_cache", "self_write", "cross_write"}
    assert manifest.tokens.eos == config["text_config"]["sep_token_id"]
    assert manifest.image.size == config["vision_config"]["image_size"]
    assert manifest.image.reflectance["full_scale"] == 2500
    assert manifest.provenance.source == "tiny"
    assert {"torch", "transformers", "onnx", "onnxruntime", "rsedge"} <= set(manifest.provenance.versions)
    [pixels] = manifest.graphs["vision"].inputs
    assert (pixels.name, pixels.dtype, pixels.shape) == ("pixels", "uint8", ("batch", 32, 32, 3))
    assert json.loads((bundle_path / "stac-item.json").read_text())["properties"]["mlm:tasks"] == ["image-captioning"]
    assert (bundle_path / "README.md").read_text().startswith("---")


def test_the_parity_report_is_stored_and_clean_in_fp32(bundle_path: Path):
    report = read_bundle(bundle_path).manifest.parity
    assert report["encoder"]["max"] < 1e-4
    assert report["next_token"] == report["greedy"]["captions"] == report["beam3"]["captions"] == 1.0
    assert report["problems"] == []


@pytest.mark.parametrize(("precision", "largest_share"), [("fp16", 0.005), ("int8", 0.1)])
def test_lower_precisions_stay_near_torch(checkpoint: Path, tmp_path: Path, precision, largest_share):
    bundle = export(checkpoint, tmp_path / "small.rsedge", precision=precision)
    captioner = Captioner.load(bundle.path, device="cpu")
    images = random_images(6, 32, seed=3)
    image = bundle.manifest.image
    values = ((images / 255 - np.array(image.mean)) / np.array(image.std)).astype(np.float32)
    model = BlipForConditionalGeneration.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        expected = model.vision_model(torch.from_numpy(values).permute(0, 3, 1, 2))[0].numpy()
    error = np.abs(captioner.decoder.encode(images) - expected).mean() / np.abs(expected).mean()
    assert 0 < error < largest_share
    assert all(caption.token_ids for caption in captioner.caption(images, num_beams=3))


def test_int8_gives_an_image_the_same_caption_in_any_company(checkpoint: Path, tmp_path: Path):
    captioner = Captioner.load(export(checkpoint, tmp_path / "i.rsedge", precision="int8").path, device="cpu")
    images = random_images(8, 32, seed=4)
    images[1] = 255  # a neighbour whose activations are far larger must not coarsen the others'
    together = captioner.caption(images, num_beams=3)
    alone = [captioner.caption(image[None], num_beams=3)[0] for image in images]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    # Images that enter as others leave find a cache as wide as those before them needed: sums must not change with it.
    images = random_images(40, 32, seed=4)
    for beams in (1, 3):
        options = {"num_beams": beams, "max_new_tokens": 30, "min_new_tokens": 25}
        alone = [captioner.caption(image[None], **options)[0] for image in images]
        for captioner.batch_size in (1, 3):
            together = captioner.caption(images, **options)
            assert [c.token_ids for c in together] == [c.token_ids for c in alone]
            np.testing.assert_allclose([c.score for c in together], [c.score for c in alone], atol=1e-6)


def test_outputs_are_given_by_the_nodes_that_make_them(bundle_path: Path):
    """An Identity would copy the logits, or a whole cache, at every step."""
    for name in ("vision", "step", "self_write", "cross_write"):
        model = onnx.load(bundle_path / f"{name}.onnx")
        outputs = {output.name for output in model.graph.output}
        assert not [node.name for node in model.graph.node if node.op_type == "Identity" and outputs & {*node.output}]


def test_fp16_is_typed_in_the_graph_with_norms_and_softmax_in_float32(checkpoint: Path, tmp_path: Path):
    path = export(checkpoint, tmp_path / "half.rsedge", precision="fp16").path
    for name in ("vision", "step"):
        model = onnx.shape_inference.infer_shapes(onnx.load(path / f"{name}.onnx"))
        types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
        types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        nodes = {kind: [n for n in model.graph.node if n.op_type == kind] for kind in ("Gemm", "LayerNormalization")}
        nodes["Softmax"] = [n for n in model.graph.node if n.op_type == "Softmax"]
        assert all(types[node.input[1]] == onnx.TensorProto.FLOAT16 for node in nodes["Gemm"])
        for kind in ("LayerNormalization", "Softmax"):
            assert nodes[kind]
            assert all(types[node.input[0]] == onnx.TensorProto.FLOAT for node in nodes[kind])
    specs = {tensor.name: tensor.dtype for tensor in read_bundle(path).manifest.graphs["step"].inputs}
    assert specs["self_k.0"] == specs["cross_v.0"] == "float16"


def test_no_node_projects_the_image_in_the_step_graph(bundle_path: Path):
    """The cross cache must come from the vision graph: per token only queries and outputs are projected."""
    step = onnx.load(bundle_path / "step.onnx")
    names = {tensor.name for tensor in step.graph.initializer}
    assert not any("crossattention.self.key" in name or "crossattention.self.value" in name for name in names)
    vision = {tensor.name for tensor in onnx.load(bundle_path / "vision.onnx").graph.initializer}
    assert sum("crossattention.self.key.weight" in name for name in vision) == 2


def test_weights_beyond_protobuf_go_beside_the_graph(checkpoint: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(graph, "EXTERNAL_DATA_FROM", 10_000)
    bundle = export(checkpoint, tmp_path / "large.rsedge")
    assert bundle.manifest.graphs["step"].external_data[0].file == "step.onnx.data"
    assert Captioner.load(bundle.path, device="cpu").caption(random_images(2, 32))
    (bundle.path / "step.onnx.data").write_bytes(b"short")
    with pytest.raises(BundleError, match=r"step\.onnx\.data is cut short"):
        read_bundle(bundle.path)


def test_beyond_its_tolerance_nothing_is_written(checkpoint: Path, tmp_path: Path, monkeypatch):
    strict = dataclasses.replace(verify.TOLERANCES["int8"], encoder_mean=1e-9, next_token=1.01)
    monkeypatch.setitem(verify.TOLERANCES, "int8", strict)
    with pytest.raises(ParityError, match="encoder's mean error") as caught:
        export(checkpoint, tmp_path / "x.rsedge", precision="int8")
    assert "next tokens agree" in str(caught.value)
    assert "--fp32" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_graph_fails_the_report(checkpoint: Path, tmp_path: Path, monkeypatch):
    """The gate must see a real fault: here the decoder's attention loses its scale."""
    from rsedge.export.models import blip

    monkeypatch.setattr(blip, "scaled_query", lambda weight, bias, width, scale: (weight, bias))
    with pytest.raises(ParityError, match="stray from torch"):
        export(checkpoint, tmp_path / "x.rsedge")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("hidden_act", ["relu", "quick_gelu", "gelu_new", "gelu_pytorch_tanh"])
def test_every_activation_is_that_of_torch(tmp_path: Path, hidden_act):
    bundle = export(make_blip(tmp_path / "c", seed=3, hidden_act=hidden_act), tmp_path / "b.rsedge")
    assert bundle.manifest.parity["encoder"]["max"] < 1e-4


def test_the_filter_of_the_checkpoint_is_used(checkpoint: Path, tmp_path: Path):
    copy = tmp_path / "checkpoint"
    copy.mkdir()
    for file in checkpoint.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    values = json.loads((copy / "preprocessor_config.json").read_text()) | {"resample": 0}
    (copy / "preprocessor_config.json").write_text(json.dumps(values))
    captioner = Captioner.load(export(copy, tmp_path / "b.rsedge").path, device="cpu")
    images = random_images(4, 96, seed=6)
    nearest = np.array([resize(image, 32, "nearest") for image in images])
    assert captioner.caption(images) == captioner.caption(nearest)
    assert captioner.caption(images) != captioner.caption(np.array([resize(image, 32) for image in images]))


def test_a_bundle_for_other_pixels_is_refused(bundle_path: Path, tmp_path: Path):
    copy = tmp_path / "other.rsedge"
    copy.mkdir()
    for file in bundle_path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    manifest = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(manifest.replace('"full_scale": 2500', '"full_scale": 2750'))
    with pytest.raises(BundleError, match="full scale 2750"):
        Captioner.load(copy)


def test_an_existing_bundle_is_replaced_only_on_demand(checkpoint: Path, tmp_path: Path):
    first = export(checkpoint, tmp_path / "b.rsedge")
    with pytest.raises(OutputError, match="exists"):
        export(checkpoint, tmp_path / "b.rsedge", precision="int8")
    assert read_bundle(first.path).manifest.precision == "fp32"
    export(checkpoint, tmp_path / "b.rsedge", precision="int8", overwrite=True)
    assert read_bundle(first.path).manifest.precision == "int8"


def test_options_that_cannot_be(checkpoint: Path, tmp_path: Path):
    with pytest.raises(OptionError, match=r"fp8.*fp32, fp16, int8"):
        export(checkpoint, tmp_path / "b.rsedge", precision="fp8")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="at least one patch of 8"):
        export(checkpoint, tmp_path / "b.rsedge", image_size=4)
    with pytest.raises(OptionError, match=r"must end in \.rsedge"):
        export(checkpoint, tmp_path / "b")


def test_generation_defaults_come_from_the_checkpoint(checkpoint: Path, tmp_path: Path):
    copy = tmp_path / "checkpoint"
    copy.mkdir()
    for file in checkpoint.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = {"num_beams": 3, "max_length": 13, "length_penalty": 0.5, "early_stopping": True}
    (copy / "generation_config.json").write_text(json.dumps(config))
    defaults = export(copy, tmp_path / "b.rsedge").manifest.generation
    assert (defaults.num_beams, defaults.max_new_tokens, defaults.length_penalty) == (3, 12, 0.5)
    (copy / "generation_config.json").write_text(json.dumps({"length_penalty": 2.0, "do_sample": False}))
    assert export(copy, tmp_path / "greedy.rsedge").manifest.generation.length_penalty == 2.0
    (copy / "generation_config.json").write_text(json.dumps({"do_sample": True}))
    assert export(copy, tmp_path / "sampling.rsedge").manifest.generation.top_k == 50
    (copy / "generation_config.json").write_text(json.dumps({"num_beams": "3"}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        export(copy, tmp_path / "c.rsedge")
    (copy / "generation_config.json").write_text(json.dumps({"num_beams": 0}))
    with pytest.raises(CheckpointError, match="num_beams is 0, expected 1"):
        export(copy, tmp_path / "c.rsedge")


def test_a_decoder_with_few_positions_is_compared_as_far_as_it_goes(tmp_path: Path):
    path = make_blip(tmp_path / "short", seed=2, max_positions=9)
    bundle = export(path, tmp_path / "short.rsedge")
    assert bundle.manifest.parity["new_tokens"] == bundle.manifest.generation.max_new_tokens == 9
