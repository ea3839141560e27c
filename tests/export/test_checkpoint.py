"""Checkpoints: what transformers loads is loaded equally, and everything else is refused with every reason."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BlipForConditionalGeneration, BlipForQuestionAnswering
from transformers.utils import logging

from rsedge.bundle import TokenSpec
from rsedge.errors import CheckpointError
from rsedge.export.loading import load_checkpoint
from tests.models import make_blip

if TYPE_CHECKING:
    from rsedge.export.checkpoint import Checkpoint

WEIGHTS = "model.safetensors"
EMBEDDINGS = "text_decoder.bert.embeddings"
HEAD = "text_decoder.cls.predictions"
WORDS = f"{EMBEDDINGS}.word_embeddings.weight"


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    logging.disable_progress_bar()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_blip(tmp_path_factory.mktemp("checkpoint") / "blip", layers=1, hidden=16, text_hidden=24, vocab=150)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "blip"))


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def assert_same_as_transformers(checkpoint: Checkpoint) -> None:
    model = BlipForConditionalGeneration.from_pretrained(checkpoint.path, dtype=torch.float32)
    expected = model.state_dict()
    # The head's own bias is added by its linear layer; the second name is only where it is tied from.
    assert set(expected) - set(checkpoint.tensors) == {f"{HEAD}.bias"}
    for name, values in checkpoint.tensors.items():
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, expected[name].numpy(), err_msg=name)


def problems(source: str | Path) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(source)
    return list(caught.value.problems)


# What loads


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden": 32, "text_hidden": 48, "heads": 2, "text_heads": 6, "layers": 2, "text_layers": 3},
        {"hidden": 16, "layers": 1, "vocab": 150, "tied": False},
        {"hidden": 16, "layers": 1, "dtype": torch.float16},
        {"hidden": 16, "layers": 1, "dtype": torch.bfloat16, "image_size": 48, "patch": 16},
        {"hidden": 32, "layers": 2, "max_shard_size": "20KB", "max_positions": 40},
    ],
    ids=["sizes differ", "untied", "fp16", "bf16", "shards"],
)
def test_tensors_are_those_of_transformers(tmp_path: Path, sizes: dict[str, Any]):
    checkpoint = load_checkpoint(make_blip(tmp_path / "blip", seed=3, **sizes))
    assert_same_as_transformers(checkpoint)


def test_what_else_a_checkpoint_knows(original: Path):
    checkpoint = load_checkpoint(str(original))
    assert checkpoint.family == "blip"
    assert checkpoint.source == str(original)
    assert checkpoint.revision is None
    assert checkpoint.tokens == TokenSpec(bos=148, eos=3, pad=0, vocab_size=150)
    assert (checkpoint.settings.decoder.image_tokens, checkpoint.settings.text.width) == (17, 24)
    assert (checkpoint.image.size, checkpoint.image.resample) == (32, "bicubic")
    assert checkpoint.image.mean == (0.48145466, 0.4578275, 0.40821073)
    assert checkpoint.generation_config["bos_token_id"] == 148
    assert [path.name for path in checkpoint.tokenizer_files] == ["tokenizer.json", "tokenizer_config.json"]
    printed = subprocess.run(["sha256sum", str(original / WEIGHTS)], capture_output=True, text=True, check=True).stdout
    assert checkpoint.sha256 == printed.split()[0]


def test_the_hash_of_shards_is_that_of_what_sha256sum_prints(tmp_path: Path):
    folder = make_blip(tmp_path / "blip", hidden=16, layers=1, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    command = "sha256sum *.safetensors | sha256sum"
    printed = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, check=True).stdout
    assert load_checkpoint(folder).sha256 == printed.split()[0]


def rename(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if old in name or not old:
                tensors[name.replace(old, new, 1) if old else new + name] = tensors.pop(name)

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update({f"{EMBEDDINGS}.position_ids": torch.arange(64)[None]}),
        lambda t: t.update(
            {f"{HEAD}.decoder.weight": t[WORDS].clone(), f"{HEAD}.decoder.bias": t[f"{HEAD}.bias"].clone()}
        ),
        lambda t: t.update({f"{HEAD}.decoder.weight": t[WORDS] + 1}),
        lambda t: t.update({f"{HEAD}.decoder.weight": t.pop(WORDS)}),
        lambda t: t.update({f"{HEAD}.decoder.bias": t.pop(f"{HEAD}.bias")}),
        lambda t: t.update({"itm_head.weight": torch.zeros(2, 16)}),
        rename("LayerNorm.weight", "LayerNorm.gamma"),
        rename("LayerNorm.bias", "LayerNorm.beta"),
        rename("", "blip."),
    ],
    ids=[
        "position_ids buffer",
        "head stored twice",
        "head differs",
        "head in place of words",
        "decoder bias only",
        "unused tensors",
        "gamma",
        "beta",
        "prefix",
    ],
)
def test_files_of_other_ages_load_as_in_transformers(folder: Path, change):
    edit_weights(folder, change)
    assert_same_as_transformers(load_checkpoint(folder))


@pytest.mark.parametrize("place", ["top", "text"])
def test_one_tie_flag_is_enough_as_in_transformers(folder: Path, place: str):
    def untie(values: dict[str, Any]) -> None:
        (values if place == "top" else values["text_config"])["tie_word_embeddings"] = False

    edit_json(folder / "config.json", untie)
    assert_same_as_transformers(load_checkpoint(folder))


def test_defaults_left_out_of_the_config_are_those_of_transformers(folder: Path):
    def thin(values: dict[str, Any]) -> None:
        values.pop("architectures")
        for section in ("text_config", "vision_config"):
            for name in ("hidden_act", "layer_norm_eps", "is_decoder", "encoder_hidden_size"):
                values[section].pop(name, None)

    edit_json(folder / "config.json", thin)
    assert_same_as_transformers(load_checkpoint(folder))


def test_a_tokenizer_without_dec_and_enc_is_accepted(folder: Path):
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(f"t{i}" for i in range(148)) + "\n")
    assert [path.name for path in load_checkpoint(folder).tokenizer_files] == ["vocab.txt", "tokenizer_config.json"]


# The image processor


def test_the_nested_processor_of_transformers_5_wins(folder: Path, caplog):
    values = json.loads((folder / "preprocessor_config.json").read_text())
    values.update(size={"height": 24, "width": 24}, resample=2, image_mean=[0, 0.25, 0.5])
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": values}))
    with caplog.at_level("WARNING", logger="rsedge"):
        image = load_checkpoint(folder).image
    # Of its size the model knows better.
    assert (image.size, image.resample, image.mean) == (32, "bilinear", (0.0, 0.25, 0.5))
    assert "its image processor states 24 px and the model 32 px: 32 px it is" in caplog.text


def test_a_processor_config_without_image_processor_defers(folder: Path):
    (folder / "processor_config.json").write_text('{"processor_class": "BlipProcessor"}')
    assert load_checkpoint(folder).image.size == 32


@pytest.mark.parametrize(
    "settings",
    [
        {"do_normalize": False},
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5},
        {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]},
    ],
)
def test_mean_and_std_say_what_the_processor_does(folder: Path, settings: dict[str, Any]):
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    edit_json(folder / "preprocessor_config.json", lambda values: values.update(settings))
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    processor = BlipImageProcessorPil.from_pretrained(folder)
    expected = processor(pixels, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    image = load_checkpoint(folder).image
    np.testing.assert_allclose((pixels / 255 - image.mean) / image.std, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": {"height": 24, "width": 32}}, "is not square"),
        ({"resample": 4}, "resample is 4"),
        ({"do_center_crop": True, "crop_size": 24}, "it cuts 24 out of"),
        ({"do_pad": True}, "do_pad is set"),
        ({"image_std": [0, 1, 1]}, "std must have one positive value"),
        ({"size": {}}, "cannot be used"),
        ({"rescale_factor": 0}, "float division by zero"),
    ],
)
def test_an_image_processor_that_cannot_be_followed_is_refused(folder: Path, settings: dict[str, Any], message: str):
    edit_json(folder / "preprocessor_config.json", lambda values: values.update(settings))
    (problem,) = problems(folder)
    assert message in problem


def test_image_processor_settings_are_an_object(folder: Path):
    (folder / "processor_config.json").write_text('{"image_processor": [1]}')
    (problem,) = problems(folder)
    assert "its settings are no object" in problem


# Refusals


def one_problem(folder: Path, *parts: str) -> None:
    found = problems(folder)
    assert len(found) == 1, found
    for part in parts:
        assert part in found[0]


def test_every_problem_is_told_at_once(folder: Path):
    edit_json(
        folder / "config.json", lambda values: values["text_config"].update(hidden_act="swish", sep_token_id=None)
    )
    edit_json(folder / "config.json", lambda values: values["vision_config"].update(patch_size=[8, 8], hidden_size=17))
    (folder / "preprocessor_config.json").unlink()
    (folder / "tokenizer.json").unlink()
    (folder / "generation_config.json").write_text("{")
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-100])
    text = "\n".join(problems(folder))
    for part in (
        "vision_config.patch_size is [8, 8]",
        "vision_config.hidden_size (17) is not a multiple of its num_attention_heads (4)",
        "text_config.hidden_act is 'swish'; rsedge exports gelu, gelu_new, gelu_fast, ",
        "text_config.sep_token_id is None",
        f"model.safetensors is cut short: its header promises {len(data)} bytes, the file has {len(data) - 100}",
        "no tokenizer (neither tokenizer.json nor vocab.txt)",
        "no image processor",
        "generation_config.json is not readable JSON",
    ):
        assert part in text


def test_the_message_lists_each_problem_on_its_line(folder: Path):
    (folder / "config.json").unlink()
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    assert str(caught.value).startswith(f"cannot export {folder}: 2 problems\n  - config.json is missing")


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_config_that_is_no_json_object_is_refused(folder: Path, text: str):
    (folder / "config.json").write_text(text)
    one_problem(folder, "config.json")


def test_another_model_type_is_named(folder: Path):
    edit_json(folder / "config.json", lambda values: values.update(model_type="blip-2"))
    one_problem(folder, "model_type 'blip-2'", "rsedge exports BLIP captioning")


def test_blip_that_answers_questions_is_refused(original: Path, tmp_path: Path):
    config = BlipForConditionalGeneration.from_pretrained(original).config
    folder = Path(shutil.copytree(original, tmp_path / "vqa"))
    BlipForQuestionAnswering(config).save_pretrained(folder)
    one_problem(folder, "no captioner (BlipForQuestionAnswering)")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "epoch=3.ckpt"])
def test_pickled_weights_are_refused_and_never_opened(folder: Path, name: str):
    (folder / WEIGHTS).rename(folder / name)
    (folder / name).chmod(0)
    one_problem(folder, name, "never executes pickle", "save_pretrained(folder, safe_serialization=True)")


def test_pickled_weights_beside_safe_ones_do_not_matter(folder: Path):
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    assert len(load_checkpoint(folder).tensors) > 0


def test_no_weights_at_all(folder: Path):
    (folder / WEIGHTS).unlink()
    one_problem(folder, "no weights: expected model.safetensors, or model.safetensors.index.json")


@pytest.mark.parametrize("length", [0, 4, 8, 100, 2000])
def test_weights_cut_anywhere_are_refused(folder: Path, length: int):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:length])
    one_problem(folder, "model.safetensors is cut short", f"the file has {length}")


def test_weights_with_bytes_too_many_are_refused(folder: Path):
    with (folder / WEIGHTS).open("ab") as stream:
        stream.write(b"more")
    one_problem(folder, "model.safetensors is damaged")


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32"}}',
    ],
)
def test_a_damaged_header_is_refused(folder: Path, header: bytes):
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    one_problem(folder, "the header of model.safetensors is damaged")


def test_safetensors_without_tensors_are_refused(folder: Path):
    (folder / WEIGHTS).write_bytes((2).to_bytes(8, "little") + b"{}")
    one_problem(folder, "tensors are missing")


def test_missing_and_misshapen_tensors_are_listed(folder: Path):
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop("vision_model.post_layernorm.bias")
        tensors.pop(f"{HEAD}.transform.dense.weight")
        tensors[f"{EMBEDDINGS}.LayerNorm.weight"] = torch.zeros(23)

    edit_weights(folder, spoil)
    missing, wrong = problems(folder)
    assert missing.startswith("2 of ")
    assert "vision_model.post_layernorm.bias; text_decoder.cls.predictions.transform.dense.weight" in missing
    assert f"1 tensors do not fit the config: {EMBEDDINGS}.LayerNorm.weight is [23], the config says [24]" in wrong


def test_an_untied_head_must_be_there(folder: Path):
    def untie(values: dict[str, Any]) -> None:
        values["tie_word_embeddings"] = values["text_config"]["tie_word_embeddings"] = False

    edit_json(folder / "config.json", untie)
    one_problem(folder, "2 of ", f"{HEAD}.decoder.weight", f"{HEAD}.decoder.bias")


def test_packed_weights_are_refused(folder: Path):
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    edit_weights(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    one_problem(folder, f"{name} is I8", "export the unquantised checkpoint")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_blip(tmp_path / "blip", hidden=16, layers=1, max_shard_size="20KB")


def test_a_missing_and_a_short_shard_are_both_named(sharded: Path):
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    missing, short = problems(sharded)
    assert f"the shard {first.name} is missing" in missing
    assert f"{second.name} is cut short" in short


def test_a_shard_that_lacks_what_the_index_says_is_refused(sharded: Path):
    shard = min(sharded.glob("*.safetensors"))
    tensors = load_file(shard)
    gone = sorted(tensors)[0]
    tensors.pop(gone)
    save_file(tensors, shard, {"format": "pt"})
    assert any(f"the shard {shard.name} lacks {gone}" in problem for problem in problems(sharded))


@pytest.mark.parametrize("place", ["../blip/config.json", "/etc/passwd", "sub/x.safetensors", ".."])
def test_an_index_that_leads_elsewhere_is_refused(sharded: Path, place: str):
    edit_json(sharded / "model.safetensors.index.json", lambda values: values["weight_map"].update(x=place))
    assert any(
        f"names {place!r}, which is not a safetensors file of the folder" in problem for problem in problems(sharded)
    )


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": 3}'])
def test_a_damaged_index_is_refused(sharded: Path, text: str):
    (sharded / "model.safetensors.index.json").write_text(text)
    one_problem(sharded, "model.safetensors.index.json is damaged")


# The tokenizer


def test_a_tokenizer_larger_than_the_model_is_refused(folder: Path):
    token = {"id": 150, "content": "[NEW]", "special": True}
    edit_json(folder / "tokenizer.json", lambda values: values["added_tokens"].append(token))
    one_problem(folder, "token ids up to 150, the model's vocab_size is 150")


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path):
    folder = make_blip(tmp_path / "blip", hidden=16, layers=1, vocab=500)
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("[PAD]\n[SEP]\n")
    small, end = problems(folder)
    assert "its tokenizer has 2 tokens, the model 500" in small
    assert "no token 3, which ends a caption" in end


@pytest.mark.parametrize("text", ["{", "{}", '{"model": {"vocab": 3}}'])
def test_a_damaged_tokenizer_is_refused(folder: Path, text: str):
    (folder / "tokenizer.json").write_text(text)
    one_problem(folder, "tokenizer.json")


# Where it comes from


@pytest.mark.parametrize("source", ["no such folder", "/no/such/folder", "./runs/last", "a/b/c", "blip", ""])
def test_a_source_that_is_neither_folder_nor_id_is_refused(source: str, monkeypatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    if source == "":
        one_problem(tmp_path / "x", "no such folder, and it is no hub id")
    else:
        one_problem(source, "no such folder, and it is no hub id")


def test_a_file_is_refused(folder: Path):
    one_problem(folder / WEIGHTS, "it is a file: give the folder")


def test_a_revision_belongs_to_the_hub(folder: Path):
    with pytest.raises(CheckpointError, match="leave the revision out"):
        load_checkpoint(folder, revision="main")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty Hugging Face cache, offline. The library reads the environment at import, hence the constants."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_hub_id_is_found_in_the_cache_offline(original: Path, hub: Path):
    repository = hub / "models--owner--captioner"
    shutil.copytree(original, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for revision in (None, "main", COMMIT):
        checkpoint = load_checkpoint("owner/captioner", revision=revision)
        assert (checkpoint.source, checkpoint.revision) == ("owner/captioner", COMMIT)
    assert checkpoint.sha256 == load_checkpoint(original).sha256


def test_a_hub_id_that_is_not_in_the_cache_offline_says_what_to_do(hub: Path):
    one_problem(
        "owner/captioner", "the Hugging Face hub did not give it", "hf download owner/captioner", "HF_HUB_OFFLINE"
    )


def test_pickled_weights_are_not_even_asked_of_the_hub(original: Path, monkeypatch: pytest.MonkeyPatch):
    from fnmatch import fnmatch

    asked: list[str] = []

    def snapshot_download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(original)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    load_checkpoint("owner/captioner")
    wanted = ["config.json", "model-00001-of-00002.safetensors", "vocab.txt", "model.safetensors.index.json"]
    unwanted = ["pytorch_model.bin", "model.ckpt", "modeling_evil.py", "tf_model.h5", "onnx/model.onnx"]
    for name in wanted + unwanted:
        assert any(fnmatch(name, pattern) for pattern in asked) == (name in wanted), name
