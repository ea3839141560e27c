"""CLIPCap checkpoints on their way to a bundle: precisions, sizes, refusals, and evaluation of both."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from rsedge import Captioner
from rsedge.cli.main import run
from rsedge.errors import CheckpointError, OptionError, ParityError
from rsedge.export.convert import export
from rsedge.export.loading import load_checkpoint
from rsedge.export.models import clipcap
from rsedge.training.models.clipcap_model import ClipCapModel
from tests.clipcap_models import CLIP, SIGLIP, beam_caption, embed, make_clipcap
from tests.models import random_images
from tests.training.tiny import caption_data, write_set


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clipcap(tmp_path_factory.mktemp("clipcap") / "made", seed=2, vision=CLIP)


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to spoil."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


def change(path: Path, section: str | None = None, **values: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (config if section is None else config[section]).update(values)
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("precision", "largest"), [("fp16", 0.005), ("int8", 0.1)])
def test_lower_precisions_stay_near_torch(made: Path, tmp_path: Path, precision, largest):
    bundle = export(made, tmp_path / "small.rsedge", precision=precision)
    captioner = Captioner.load(bundle.path, device="cpu", threads=1, batch_size=3)
    images = random_images(6, 32, seed=3)
    expected = embed(ClipCapModel.from_pretrained(made).eval(), images).numpy()
    assert 0 < np.abs(captioner.decoder.encode(images) - expected).mean() / np.abs(expected).mean() < largest
    together = captioner.caption(images, max_new_tokens=8)
    assert [c.token_ids for c in together] == [
        captioner.caption(i[None], max_new_tokens=8)[0].token_ids for i in images
    ]
    specs = {tensor.name: tensor.dtype for tensor in bundle.manifest.graphs["step"].inputs}
    assert specs["start"] == specs["cross_k.0"] == ("float16" if precision == "fp16" else "float32")


def test_fp16_is_typed_in_the_graph_with_norms_and_softmax_in_float32(made: Path, tmp_path: Path):
    path = export(made, tmp_path / "half.rsedge", precision="fp16").path
    for name in ("vision", "step"):
        model = onnx.shape_inference.infer_shapes(onnx.load(path / f"{name}.onnx"))
        types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
        types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        for kind, wanted in (("Gemm", "FLOAT16"), ("LayerNormalization", "FLOAT"), ("Softmax", "FLOAT")):
            nodes = [node for node in model.graph.node if node.op_type == kind]
            assert nodes
            assert all(types[node.input[0]] == onnx.TensorProto.DataType.Value(wanted) for node in nodes)


def test_words_are_stored_once_and_the_prefix_is_not_run_again(made: Path, tmp_path: Path):
    path = export(made, tmp_path / "b.rsedge").path
    step = {tensor.name: list(tensor.dims) for tensor in onnx.load(path / "step.onnx").graph.initializer}
    assert [name for name, dims in step.items() if 300 in dims and len(dims) == 2] == ["wte.table"]
    assert not any(name.startswith(("mapper", "vision_model")) for name in step)
    [positions] = [dims for name, dims in step.items() if name.startswith("wpe")]
    assert positions == [48 - 4, 32]


def test_another_image_size_interpolates_positions_as_transformers_does(made: Path, tmp_path: Path):
    bundle = export(made, tmp_path / "larger.rsedge", image_size=52)
    images, model = random_images(3, 52, seed=8), ClipCapModel.from_pretrained(made).eval()
    captioner = Captioner.load(bundle.path, device="cpu", threads=1)
    embeds = embed(model, images)
    np.testing.assert_allclose(captioner.decoder.encode(images), embeds.numpy(), atol=2e-6)
    found = captioner.caption(images, num_beams=3, max_new_tokens=9)
    assert [c.token_ids for c in found] == [beam_caption(model, image, 3, 9)[0] for image in embeds]


@pytest.mark.parametrize(
    "settings",
    [
        {"text": {"n_inner": 40, "activation_function": "relu", "scale_attn_by_inverse_layer_idx": True}},
        {"text": {"scale_attn_weights": False, "tie_word_embeddings": False}, "prefix_length": 2},
        {"mapper": "transformer", "mapper_ratio": 1.5, "mapper_heads": 2, "vision": {**SIGLIP, "patch_size": 16}},
    ],
)
def test_settings_of_the_parts_are_heeded(tmp_path: Path, settings):
    path = make_clipcap(tmp_path / "c", seed=4, max_shard_size="40KB", **settings)
    assert len(list(path.glob("*.safetensors"))) > 1
    captioner = Captioner.load(export(path, tmp_path / "b.rsedge").path, device="cpu", threads=1)
    images, model = random_images(3, 32, seed=8), ClipCapModel.from_pretrained(path).eval()
    found = captioner.caption(images, num_beams=3, max_new_tokens=9)
    assert [c.token_ids for c in found] == [beam_caption(model, image, 3, 9)[0] for image in embed(model, images)]


def test_captions_may_be_as_long_as_there_are_positions(tmp_path: Path):
    path = make_clipcap(tmp_path / "c", seed=2, ends=0, text={"n_positions": 16})
    captioner = Captioner.load(export(path, tmp_path / "b.rsedge").path, device="cpu", threads=1)
    [caption] = captioner.caption(random_images(1, 32), num_beams=2)
    assert len(caption.token_ids) == 16 - 5 + 1
    model = ClipCapModel.from_pretrained(path).eval()
    assert caption.token_ids == beam_caption(model, embed(model, random_images(1, 32))[0], 2, 12)[0]
    with pytest.raises(OptionError, match="positions for 12"):
        captioner.caption(random_images(1, 32), max_new_tokens=13)
    with pytest.raises(OptionError, match=r"length_penalty is 2.0.*no counterpart.*positions for 12"):
        captioner.caption(random_images(1, 32), length_penalty=2.0, max_new_tokens=13)


def test_a_wrong_graph_fails_the_report(made: Path, tmp_path: Path, monkeypatch):
    """The gate must see a real fault: here attention loses its scale."""
    monkeypatch.setattr(clipcap, "scaled_query", lambda weight, bias, width, scale: (weight, bias))
    with pytest.raises(ParityError, match="stray from torch"):
        export(made, tmp_path / "x.rsedge")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        (None, {"prefix_length": 1}, "prefixes of 2 positions or more"),
        (None, {"prefix_length": 48}, "GPT-2 has 48 positions in all"),
        (None, {"prefix_length": "5"}, r"config\.prefix_length is '5'"),
        (None, {"mapper": "linear", "mapper_ratio": 0}, "mapper is 'linear'"),
        (None, {"mapper": "transformer", "mapper_heads": 3}, "does not divide GPT-2's width 32"),
        (None, {"stop_token_id": 300}, r"stop_token_id is 300.*0 to 299"),
        (None, {"architectures": ["Other"]}, "no whole model"),
        ("text_config", {"n_head": 3}, "n_embd .32. is not a multiple of its n_head"),
        ("text_config", {"activation_function": "silu"}, "activation_function is 'silu'"),
        ("text_config", {"add_cross_attention": True}, "as a prefix only"),
        ("text_config", {"n_inner": 0}, r"text_config\.n_inner is 0"),
        ("text_config", {"n_layer": 3}, "12 of .* tensors are missing"),
        ("text_config", {"vocab_size": 301}, "tensors do not fit the config"),
        ("vision_config", {"model_type": "vit"}, "model_type is 'vit'"),
        ("vision_config", {"projection_dim": 25}, "tensors do not fit the config"),
        ("vision_config", {"num_attention_heads": 5}, "not a multiple of its num_attention_heads"),
    ],
)
def test_checkpoints_that_cannot_be_exported_say_why(copy: Path, tmp_path: Path, section, values, words):
    change(copy, section, **values)
    with pytest.raises(CheckpointError, match=words):
        export(copy, tmp_path / "b.rsedge")


def test_everything_wrong_is_told_at_once(copy: Path, tmp_path: Path):
    change(copy, None, mapper="linear", stop_token_id=-1)
    change(copy, "text_config", activation_function="silu")
    change(copy, "vision_config", num_attention_heads=5)
    (copy / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError) as error:
        export(copy, tmp_path / "b.rsedge")
    for words in ("stop_token_id is -1", "'silu'", "num_attention_heads", "preprocessor_config.json"):
        assert words in str(error.value)


def test_tensors_are_found_under_the_names_of_other_versions_of_transformers(tmp_path: Path):
    """SigLIP's tower nested in itself, and the tied head stored in place of the words."""
    path = make_clipcap(tmp_path / "c", seed=4, vision=SIGLIP)
    expected = dict(load_checkpoint(path).tensors)
    tensors = load_file(path / "model.safetensors")
    tensors = {name.replace("encoder.", "encoder.vision_model.", 1): value for name, value in tensors.items()}
    tensors["language_model.lm_head.weight"] = tensors.pop("language_model.transformer.wte.weight")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    found = load_checkpoint(path).tensors
    assert set(found) == set(expected)
    assert all(np.array_equal(found[name], value) for name, value in expected.items())


def test_evaluation_of_a_checkpoint_and_its_bundle_gives_the_same_captions(made: Path, tmp_path: Path, capsys):
    data = write_set(tmp_path / "set", caption_data(train=4, val=6))
    bundle = export(made, tmp_path / "b.rsedge").path
    for settings in ([], ["--beams", "1"], ["--top-p", "0.8", "--seed", "3"]):
        files = []
        for model in (made, bundle):
            files.append(tmp_path / f"{model.name}-{len(settings)}-{settings[:1]}.jsonl")
            arguments = ["--data", str(data), "--split", "val", "--metrics", "bleu", *settings]
            arguments += ["--predictions", str(files[-1])]
            assert run(["evaluate", "captions", str(model), *arguments]) == 0
        captions = [
            [json.loads(line)["caption"] for line in file.read_text().splitlines() if "caption" in line]
            for file in files
        ]
        assert captions[0] == captions[1]
        assert len(set(captions[0])) > 2
    capsys.readouterr()
