"""`rsedge import-rsdix` on Lightning files made of tiny models: what comes out is the model that went in."""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModelWithProjection,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionModel,
)

from rsedge.checkpointfiles import read_image_spec
from rsedge.cli.import_rsdix import command
from rsedge.errors import OptionError, OutputError, RsedgeError
from rsedge.training.models.clipcap_model import ClipCapModel
from rsedge.training.models.loading import learn_byte_bpe, learn_clip_bpe

CAPTIONS = ["many planes are parked at the airport .", "a river runs through green fields ."] * 3
VISION = {
    "projection_dim": 48,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "image_size": 24,
    "patch_size": 8,
}


class MappingType(Enum):
    MLP = "mlp"
    Transformer = "transformer"


@pytest.fixture(scope="module")
def clip_words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip_words")
    learn_clip_bpe(CAPTIONS, 560).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def gpt_words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpt_words")
    learn_byte_bpe(CAPTIONS, 300).save_pretrained(path)
    return path


def dual_encoder(kind: str, words: Path, seed: int = 0) -> Any:
    size = len(AutoTokenizer.from_pretrained(words))
    torch.manual_seed(seed)
    text = {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 1,
        "intermediate_size": 80,
        "vocab_size": size,
        "max_position_embeddings": 20,
    }
    if kind == "clip":
        ends = {"bos_token_id": size - 2, "eos_token_id": size - 1}
        return CLIPModel(CLIPConfig(text_config=text | ends, vision_config=VISION, projection_dim=48)).eval()
    ends = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1}
    config = SiglipConfig(text_config={**text, **ends, "projection_size": 128}, vision_config=VISION)
    return SiglipModel(config).eval()


def prefixed(prefix: str, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": value for name, value in values.items()}


def lightning(path: Path, state: dict[str, torch.Tensor], **hyper_parameters) -> Path:
    torch.save(
        {
            "epoch": 3,
            "global_step": 100,
            "pytorch-lightning_version": "2.1.0",
            "state_dict": OrderedDict(state),
            "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}],
            "hparams_name": "kwargs",
            "hyper_parameters": {"model": "openai/clip-vit-base-patch32", "betas": (0.9, 0.99), **hyper_parameters},
        },
        path,
    )
    return path


def rsdix_clip(kind: str, words: Path) -> tuple[dict[str, torch.Tensor], Any, Any]:
    """The state of RSDiX-CLIP as its authors' code saves it, S-BERT variant; and student and teacher."""
    student, teacher = dual_encoder(kind, words), dual_encoder(kind, words, seed=1)
    state = {
        **prefixed("_student.", student.state_dict()),
        # Older transformers saved this buffer.
        "_student.text_model.embeddings.position_ids": torch.arange(20)[None],
        **prefixed("_teacher.", teacher.state_dict()),
        "_dist_loss.T_s": torch.tensor(3.9),
        **prefixed("_sbert_model.0.auto_model.", nn.Linear(4, 4).state_dict()),
        **prefixed("_proj_linear_sbert_clip.", nn.Linear(4, 48).state_dict()),
    }
    return state, student, teacher


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments], standalone_mode=False)


def imported(*arguments: str | Path) -> dict[str, Any]:
    result = call(*arguments, "--json")
    if result.exception:
        raise result.exception
    return json.loads(result.stdout)


def refused(*arguments: str | Path) -> str:
    with pytest.raises(RsedgeError) as error:
        imported(*arguments)
    return str(error.value)


def same_outputs(first: Any, second: Any, **inputs: torch.Tensor) -> None:
    with torch.no_grad():
        one, other = first.eval()(**inputs), second.eval()(**inputs)
    assert torch.equal(one.logits_per_image, other.logits_per_image)
    assert torch.equal(one.text_embeds, other.text_embeds)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("weights", ["student", "teacher"])
def test_a_dual_encoder_comes_out_as_it_went_in(tmp_path: Path, clip_words: Path, kind: str, weights: str):
    state, student, teacher = rsdix_clip(kind, clip_words)
    file = lightning(tmp_path / "a.ckpt", state)
    summary = imported(file, "-o", tmp_path / "out", "--tokenizer", clip_words, "--weights", weights)
    original = student if weights == "student" else teacher
    model, info = type(original).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    generator = torch.Generator().manual_seed(0)
    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    tokens = words(CAPTIONS[:2], padding="max_length", max_length=20, truncation=True, return_tensors="pt")["input_ids"]
    same_outputs(model, original, input_ids=tokens, pixel_values=torch.randn(3, 3, 24, 24, generator=generator))
    problems: list[str] = []
    image = read_image_spec(tmp_path / "out", problems.append)
    assert problems == []
    assert (image.size, image.resample) == (24, "bicubic")
    assert image.mean[0] == (0.5 if kind == "siglip" else 0.48145466)
    assert (summary["family"], summary["weights"]) == (kind, weights)
    assert summary["mapped"] == {f"_{weights}.": len(original.state_dict())}
    other = "_teacher" if weights == "student" else "_student"
    assert summary["unused"] == {
        other: len(original.state_dict()),
        "_dist_loss": 1,
        "_sbert_model": 2,
        "_proj_linear_sbert_clip": 2,
    }
    assert summary["parameters"] == sum(value.numel() for value in original.parameters())
    provenance = json.loads((tmp_path / "out" / "import.json").read_text())
    assert (provenance["source"], provenance["hyper_parameters"]["betas"]) == ("a.ckpt", [0.9, 0.99])


class Mlp(nn.Module):
    """The mapper as ClipCap's authors have it."""

    def __init__(self, image: int, width: int, length: int) -> None:
        super().__init__()
        half, whole = width * length // 2, width * length
        self.model = nn.Sequential(nn.Linear(image, half), nn.Tanh(), nn.Linear(half, whole))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images)


def rsdix_clipcap(words: Path, kind: str, mapper: str) -> tuple[dict[str, torch.Tensor], Any, Any, nn.Module]:
    student = dual_encoder(kind, words)
    torch.manual_seed(5)
    text = {"n_layer": 2, "n_embd": 64, "n_head": 1, "vocab_size": len(AutoTokenizer.from_pretrained(words))}
    last = text["vocab_size"] - 1
    gpt = GPT2LMHeadModel(GPT2Config(**text, n_positions=48, bos_token_id=last, eos_token_id=last)).eval()
    encoder = (CLIPVisionModelWithProjection if kind == "clip" else SiglipVisionModel)(student.config.vision_config)
    donor = ClipCapModel.from_parts(encoder, gpt, prefix_length=4, mapper=mapper, clip_length=3, mapper_layers=2)
    project = Mlp(128 if kind == "siglip" else 48, 64, 4) if mapper == "mlp" else donor.mapper
    state = {
        **prefixed("_clip_encoder._student.", student.state_dict()),
        **prefixed("_clip_encoder._teacher.", dual_encoder(kind, words, seed=1).state_dict()),
        "_clip_encoder._dist_loss.T_s": torch.tensor(3.9),
        **prefixed("_clipcap.clip_project.", project.state_dict()),
        **prefixed("_clipcap.gpt.", gpt.state_dict()),
        # Older transformers saved these buffers.
        "_clipcap.gpt.transformer.h.0.attn.bias": torch.ones(1, 1, 48, 48, dtype=torch.bool),
        "_clipcap.gpt.transformer.h.1.attn.masked_bias": torch.tensor(-1e4),
    }
    return state, student, gpt, project


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("mapper", ["mlp", "transformer"])
def test_a_captioner_comes_out_as_it_went_in(tmp_path: Path, gpt_words: Path, kind: str, mapper: str):
    state, student, gpt, project = rsdix_clipcap(gpt_words, kind, mapper)
    hyper = {"prefix_length": 4, "clip_length": 3, "num_layers": 2, "dropout_transformer": 0.6}
    file = lightning(tmp_path / "a.ckpt", state, mapping_type=MappingType(mapper), gpt_model="gpt2", **hyper)
    summary = imported(file, "-o", tmp_path / "out", "--tokenizer", gpt_words)
    model, info = ClipCapModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model.eval()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, 24, 24, generator=generator)
    tokens = torch.randint(0, 290, (2, 6), generator=generator)
    with torch.no_grad():
        images = student.get_image_features(pixel_values=pixels)
        images = images if isinstance(images, torch.Tensor) else images.pooler_output
        images = images / images.norm(dim=-1, keepdim=True)
        prefix = project(images).view(2, 4, 64)
        inputs = torch.cat([prefix, gpt.transformer.wte(tokens)], dim=1)
        expected = gpt(inputs_embeds=inputs).logits[:, 3:-1]
        found = model(pixels, tokens)
    for name, value in gpt.state_dict().items():
        assert torch.equal(model.language_model.state_dict()[name], value), name
    assert torch.allclose(found.image_embeds, images, atol=1e-6)
    assert torch.allclose(found.logits, expected, atol=1e-5)
    settings = summary["settings"]
    assert (settings["mapper"], settings["prefix_length"], summary["family"]) == (mapper, 4, "clipcap")
    assert model.config.mapper_dropout == (0.6 if mapper == "transformer" else 0)
    assert summary["unused"]["_clip_encoder._student.text_model"] > 0
    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert words.decode([model.config.stop_token_id]) == "."
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.num_beams, generation.max_new_tokens) == (5, 67)
    assert generation.eos_token_id == model.config.stop_token_id


def test_half_precision_becomes_float32(tmp_path: Path, clip_words: Path):
    state, student, _ = rsdix_clip("clip", clip_words)
    half = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    imported(lightning(tmp_path / "a.ckpt", half), "-o", tmp_path / "out", "--tokenizer", clip_words)
    model = CLIPModel.from_pretrained(tmp_path / "out")
    for name, value in model.state_dict().items():
        assert torch.equal(value, student.state_dict()[name].half().float()), name


def test_a_tower_nested_in_itself_is_understood(tmp_path: Path, clip_words: Path):
    state, student, _ = rsdix_clip("clip", clip_words)
    nested = {
        name.replace("vision_model.", "vision_model.vision_model.").replace(
            "text_model.", "text_model.text_model."
        ): value
        for name, value in state.items()
    }
    imported(lightning(tmp_path / "a.ckpt", nested), "-o", tmp_path / "out", "--tokenizer", clip_words)
    model = CLIPModel.from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in student.state_dict().items())


def test_the_summary_for_people(tmp_path: Path, clip_words: Path):
    state, _, _ = rsdix_clip("clip", clip_words)
    result = call(lightning(tmp_path / "a.ckpt", state), "-o", tmp_path / "out", "--tokenizer", clip_words)
    assert result.exception is None
    assert "clip  " in result.output
    assert "M parameters, of the student" in result.output
    assert "image_size 24" in result.output
    assert "not used  _proj_linear_sbert_clip.*  2 tensors" in result.output


# Faults


def test_everything_wrong_is_told_at_once(tmp_path: Path, clip_words: Path, gpt_words: Path):
    state, _, _ = rsdix_clip("clip", clip_words)
    del state["_student.text_projection.weight"]
    state["_student.extra.weight"] = torch.ones(2)
    state["_student.vision_model.post_layernorm.weight"] = torch.ones(7)
    file = lightning(tmp_path / "a.ckpt", state)
    error = refused(file, "-o", tmp_path / "out", "--tokenizer", gpt_words)
    for words in (
        "4 problems",
        "lacks text_projection.weight",
        "has not: _student.extra.weight",
        "_student.vision_model.post_layernorm.weight is [7], expected [128]",
        "the tokenizer has 300 tokens, the model 557",
        "--tokenizer",
    ):
        assert words in error, words
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.iterdir()) == [file]


def test_sizes_that_cannot_be_told_are_named(tmp_path: Path, clip_words: Path):
    state, _, _ = rsdix_clip("clip", clip_words)
    for name in ("visual_projection.weight", "text_model.embeddings.token_embedding.weight"):
        del state[f"_student.{name}"]
    error = refused(lightning(tmp_path / "a.ckpt", state), "-o", tmp_path / "out", "--tokenizer", clip_words)
    assert "visual_projection.weight" in error
    assert "token_embedding.weight" in error
    state["_student.vision_model.embeddings.position_embedding.weight"] = torch.ones(12, 128)
    state |= prefixed("_student.", dual_encoder("clip", clip_words).state_dict())
    state["_student.vision_model.embeddings.position_embedding.weight"] = torch.ones(12, 128)
    error = refused(lightning(tmp_path / "b.ckpt", state), "-o", tmp_path / "out", "--tokenizer", clip_words)
    assert "11 image positions do not make a square" in error


def test_hyper_parameters_that_contradict_the_tensors_are_refused(tmp_path: Path, gpt_words: Path):
    state, *_ = rsdix_clipcap(gpt_words, "clip", "mlp")
    file = lightning(tmp_path / "a.ckpt", state, prefix_length=10, mapping_type=MappingType.Transformer)
    error = refused(file, "-o", tmp_path / "out", "--tokenizer", gpt_words)
    assert "say prefix_length 10, its tensors 4" in error
    assert "say mapper 'transformer', its tensors 'mlp'" in error


def test_other_files_are_refused_with_what_they_hold(tmp_path: Path, clip_words: Path):
    other = lightning(tmp_path / "other.ckpt", {"encoder.weight": torch.ones(2), "decoder.weight": torch.ones(2)})
    error = refused(other, "-o", tmp_path / "out", "--tokenizer", clip_words)
    assert "encoder.* (1), decoder.* (1)" in error
    assert "_student.*" in error
    alone = lightning(tmp_path / "alone.ckpt", prefixed("_student.", dual_encoder("clip", clip_words).state_dict()))
    error = refused(alone, "-o", tmp_path / "out", "--tokenizer", clip_words, "--weights", "teacher")
    assert "use --weights student" in error
    legacy = tmp_path / "legacy.ckpt"
    legacy.write_bytes(pickle.dumps({"state_dict": {}}))
    assert "before version 1.6" in refused(legacy, "-o", tmp_path / "out", "--tokenizer", clip_words)


def test_a_tokenizer_that_is_not_there_is_named(tmp_path: Path, clip_words: Path, monkeypatch: pytest.MonkeyPatch):
    state, _, _ = rsdix_clip("clip", clip_words)
    file = lightning(tmp_path / "a.ckpt", state)
    error = refused(file, "-o", tmp_path / "out", "--tokenizer", tmp_path / "none")
    assert str(tmp_path / "none") in error
    assert "--tokenizer" in error

    def offline(source: str, *_: object, **__: object) -> None:
        raise OSError(f"We couldn't connect to 'https://huggingface.co' to load {source}")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", offline)
    error = refused(file, "-o", tmp_path / "out")
    assert "openai/clip-vit-base-patch32 (We couldn't connect" in error
    assert "--tokenizer" in error


def test_a_target_is_replaced_only_when_asked_and_only_a_checkpoint(tmp_path: Path, clip_words: Path):
    state, _, _ = rsdix_clip("clip", clip_words)
    file, out = lightning(tmp_path / "a.ckpt", state), tmp_path / "out"
    arguments = (file, "-o", out, "--tokenizer", clip_words)
    imported(*arguments)
    (out / "mark").write_text("old")
    with pytest.raises(OutputError, match="--overwrite"):
        imported(*arguments)
    assert (out / "mark").exists()
    imported(*arguments, "--overwrite")
    assert not (out / "mark").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")  # someone's own
    with pytest.raises(OutputError, match="not a checkpoint"):
        imported(file, "-o", tmp_path / "mine", "--tokenizer", clip_words, "--overwrite")
    assert (tmp_path / "mine" / "config.json").exists()
    with pytest.raises(OutputError, match="create it first"):
        imported(file, "-o", tmp_path / "no" / "out", "--tokenizer", clip_words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ckpt", "mine", "out"]


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path, clip_words: Path, monkeypatch: pytest.MonkeyPatch):
    state, _, _ = rsdix_clip("clip", clip_words)
    file, out = lightning(tmp_path / "a.ckpt", state), tmp_path / "out"
    imported(file, "-o", out, "--tokenizer", clip_words)
    (out / "mark").write_text("old")

    def full(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CLIPModel, "save_pretrained", full)
    with pytest.raises(OutputError, match="No space left"):
        imported(file, "-o", out, "--tokenizer", clip_words, "--overwrite")
    assert (out / "mark").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ckpt", "out"]


def test_weights_are_student_or_teacher(tmp_path: Path):
    from rsedge.training.rsdix.import_rsdix import import_rsdix

    with pytest.raises(OptionError, match="'both', expected student or teacher"):
        import_rsdix(tmp_path / "a.ckpt", tmp_path / "out", weights="both")  # type: ignore[arg-type]
