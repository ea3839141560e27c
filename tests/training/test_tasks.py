"""Each family's loss is transformers' own, its checkpoints are transformers' own, and its parts are where it says."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    CLIPModel,
    CLIPVisionModelWithProjection,
    SiglipModel,
)

from rsedge.errors import OptionError
from rsedge.training.data.samples import PlainSamples
from rsedge.training.models.clipcap_model import ClipCapModel
from rsedge.training.models.loading import interpolate, resize_vision
from rsedge.training.optim import matching
from rsedge.training.recipe import load_recipe
from rsedge.training.train import make_task, train
from tests.training.tiny import caption_data, tiny_recipe

DATA = caption_data()


def task_of(family, *settings, **options):
    torch.manual_seed(0)
    return make_task(tiny_recipe(family, *settings, **options), DATA).eval()


def batch_of(task, count=6):
    return task.collate([PlainSamples(DATA.examples, task.image)[index] for index in range(count)])


def test_blip_loss_is_transformers(tmp_path):
    task = task_of("blip", "caption.label_smoothing=0.1")
    batch = batch_of(task)
    assert batch["input_ids"].shape[0] == 12  # two captions an image
    found = task(batch)["loss_sum"] / task.tokens(batch)
    expected = task.model(
        pixel_values=task.normalize(batch["pixels"]).repeat_interleave(2, 0),
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=batch["labels"],
    ).loss
    torch.testing.assert_close(found, expected)  # the model's own label smoothing is 0, and so is ours in evaluation
    task.train()
    task.model.eval()
    task.model.text_decoder.label_smoothing = 0.1
    smoothed = task.model(
        pixel_values=task.normalize(batch["pixels"]).repeat_interleave(2, 0),
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=batch["labels"],
    ).loss
    torch.testing.assert_close(task(batch)["loss_sum"] / task.tokens(batch), smoothed)


def test_blip_rows_start_and_end_as_decoding_does():
    task = task_of("blip", "model.max_tokens=6")
    batch, text = batch_of(task, 1), task.model.config.text_config
    for row, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        length = int(mask.sum())
        assert length <= 6
        assert (row[0], row[length - 1]) == (text.bos_token_id, text.sep_token_id)
        assert labels[0] == -100
        assert (labels[1:length] == row[1:length]).all()
        assert (labels[length:] == -100).all()


def test_pixels_are_those_of_the_image_processor(tmp_path):
    task = task_of("blip")
    task.save(tmp_path, task.state_dict())
    image = DATA.examples[0].image.read()
    expected = BlipImageProcessorPil.from_pretrained(tmp_path)(image, return_tensors="np")["pixel_values"][0]
    found = task.normalize(PlainSamples(DATA.examples, task.image)[0].pixels[None])[0]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_clip_loss_is_transformers():
    task = task_of("clip")
    batch = batch_of(task)
    first = {**batch, "input_ids": batch["input_ids"][::2], "attention_mask": batch["attention_mask"][::2]}
    expected = task.model(
        input_ids=first["input_ids"],
        attention_mask=first["attention_mask"],
        pixel_values=task.normalize(batch["pixels"]),
        return_loss=True,
    )
    outputs = task(first)
    torch.testing.assert_close(outputs["image"], expected.image_embeds)
    torch.testing.assert_close(outputs["text"], expected.text_embeds)
    torch.testing.assert_close(task.loss(outputs)["loss"], expected.loss)


SIGMOID = ("contrastive.rsdix.use_sigmoid_loss=true", "contrastive.rsdix.alpha=1.0", "contrastive.rsdix.teacher=none")


def test_siglip_loss_is_transformers_and_its_scalars_are_saved(tmp_path):
    task = task_of("clip", *SIGMOID, siglip=True)
    batch = batch_of(task)
    first = {**batch, "input_ids": batch["input_ids"][::2]}
    assert first["input_ids"].shape[1] == 16  # always the whole length, as SigLIP reads its last position
    with torch.no_grad():
        task.rsdix.sigmoid_bias.fill_(-3.0)
        task.rsdix.sigmoid_log_temperature.fill_(1.5)
    task.save(tmp_path, task.state_dict())
    model = SiglipModel.from_pretrained(tmp_path).eval()
    expected = model(input_ids=first["input_ids"], pixel_values=task.normalize(batch["pixels"]), return_loss=True)
    torch.testing.assert_close(task.loss(task(first))["loss"], expected.loss)
    assert not task.model.logit_scale.requires_grad


def test_clip_has_no_sigmoid_loss():
    with pytest.raises(OptionError, match="needs a SigLIP model"):
        task_of("clip", *SIGMOID)


@pytest.mark.parametrize(
    ("family", "cls"), [("blip", BlipForConditionalGeneration), ("clip", CLIPModel), ("clipcap", ClipCapModel)]
)
def test_checkpoints_are_read_back_equal_and_can_be_gone_on_from(family, cls, tmp_path):
    task = task_of(family)
    task.save(tmp_path, task.state_dict())
    model, report = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for name, value in task.model.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0)
    texts = ["a field that is red .", "seen from above"]
    assert AutoTokenizer.from_pretrained(tmp_path)(texts)["input_ids"] == task.tokenizer(texts)["input_ids"]

    recipe = load_recipe(
        None, family=family, settings=[f"model.init={tmp_path}", "model.max_tokens=16", "model.image_size=32"]
    )
    again = make_task(recipe, DATA)
    assert again.image.size == 32
    outputs = again.eval()(batch_of(again))
    assert all(torch.isfinite(value).all() for value in outputs.values())


def test_clipcap_from_a_trained_clip(tmp_path):
    clip = task_of("clip")
    clip.save(tmp_path, clip.state_dict())
    settings = ["model.tokenizer=captions", "vocabulary_size=600", "max_tokens=16", f"model.encoder={tmp_path}"]
    text = [f"model.config.text.{name}={value}" for name, value in (("n_embd", 32), ("n_layer", 1), ("n_head", 2))]
    recipe = load_recipe(None, family="clipcap", settings=[*settings, *text, "model.config.prefix_length=2"])
    task = make_task(recipe, DATA).eval()
    expected = CLIPVisionModelWithProjection.from_pretrained(tmp_path).eval()
    pixels = task.normalize(batch_of(task)["pixels"])
    embeds = expected(pixel_values=pixels).image_embeds
    torch.testing.assert_close(task.model.embed_images(pixels), embeds / embeds.norm(dim=-1, keepdim=True))
    batch = batch_of(task)
    assert (batch["input_ids"][:, -1] == task.model.config.stop_token_id).all()
    assert (batch["labels"] == task.model.config.stop_token_id).sum() == len(batch["labels"])  # once a caption


@pytest.mark.parametrize("family", ["blip", "clip", "clipcap"])
def test_parts_name_parameters(family):
    task = task_of(family)
    names = dict(task.named_parameters())
    assert all(matching(names, part, task.parts) for part in task.parts)


@pytest.mark.parametrize("family", ["blip", "clip", "siglip"])
def test_other_image_sizes_as_transformers_interpolates(family):
    siglip = family == "siglip"
    task = task_of("clip" if siglip else family, siglip=siglip)
    model, pixels = task.model, torch.randn(2, 3, 32, 32, generator=torch.manual_seed(0))
    expected = model.vision_model(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
    resize_vision(model, 32)
    torch.testing.assert_close(
        model.vision_model(pixel_values=pixels).last_hidden_state, expected, atol=1e-5, rtol=1e-5
    )
    assert model.config.vision_config.image_size == 32
    with pytest.raises(OptionError, match="not a multiple of the patch size 8: choose 32"):
        resize_vision(model, 36)


def test_interpolation_keeps_the_class_token():
    positions = torch.randn(5, 3)
    resized = interpolate(positions, 4, class_token=True)
    assert resized.shape == (17, 3)
    torch.testing.assert_close(resized[0], positions[0])
    torch.testing.assert_close(interpolate(positions, 2, class_token=True), positions)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.init=EMPTY"], "no tokenizer in EMPTY"),
        (["model.config.vision.hiden_size=3"], "vision.hiden_size, which BlipConfig does not"),
        (["model.config.text.max_position_embeddings=9"], "the decoder has 9 positions"),
    ],
)
def test_models_that_cannot_be(settings, message, tmp_path, monkeypatch):
    (tmp_path / "EMPTY").mkdir()
    monkeypatch.chdir(tmp_path)
    unset = ["model.tokenizer="] if "EMPTY" in settings[0] else []
    with pytest.raises(OptionError, match=message):
        make_task(tiny_recipe("blip", *settings, *unset), DATA)


def test_another_kind_of_checkpoint_is_refused(tmp_path):
    clip = task_of("clip")
    clip.save(tmp_path, clip.state_dict())
    for family, message in (("blip", "is a clip model, not blip"), ("clipcap", "is a clip model, not clipcap")):
        with pytest.raises(OptionError, match=message):
            make_task(load_recipe(None, family=family, settings=[f"model.init={tmp_path}"]), DATA)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(OptionError, match="takes clip or siglip"):
        make_task(load_recipe(None, family="clip", settings=[f"model.init={tmp_path}"]), DATA)


def test_sentence_bert_teaches_and_is_compared_with(tmp_path, monkeypatch):
    width = 6
    rows = np.random.default_rng(0).standard_normal((1000, width)).astype(np.float32)
    monkeypatch.setattr(
        "rsedge.training.models.clip.sentence_embeddings",
        lambda model, texts: {text: rows[number] for number, text in enumerate(sorted(set(texts)))},
    )
    teacher = ("contrastive.rsdix.teacher=sbert", "contrastive.rsdix.alpha=0.5", "contrastive.sbert=folder")
    result = train(tiny_recipe("clip", *teacher), tmp_path, data=DATA, cpu=True, trackers=())
    assert {"val_projection", "val_distillation", "val_sbs_mse"} <= result.values.keys()
    batch = batch_of(task_of("clip", *teacher), 1)
    texts = sorted({caption for example in DATA.examples for caption in example.captions})
    for row, caption in zip(batch["sbert"], DATA.examples[0].captions, strict=True):
        np.testing.assert_array_equal(row.numpy(), rows[texts.index(caption)])
