"""Captions of exported bundles against transformers.generate, token for token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BlipForConditionalGeneration

from rsedge import Captioner
from rsedge.export.convert import export
from tests.models import make_blip, random_images

CONFIGURATIONS = {
    "square": {"seed": 1},
    "narrow-text": {
        "seed": 2,
        "hidden": 48,
        "layers": 3,
        "heads": 3,
        "vocab": 500,
        "image_size": 48,
        "patch": 16,
        "text_hidden": 32,
        "text_heads": 2,
    },
    "deep-text": {
        "seed": 3,
        "hidden": 64,
        "layers": 1,
        "heads": 8,
        "vocab": 1000,
        "image_size": 56,
        "patch": 14,
        "text_layers": 3,
        "tied": False,
    },
}
SETTINGS = [
    {"num_beams": 1},
    {"num_beams": 1, "repetition_penalty": 1.5},
    {"num_beams": 1, "repetition_penalty": 0.8},
    {"num_beams": 1, "no_repeat_ngram_size": 2, "min_new_tokens": 9},
    {"num_beams": 2},
    {"num_beams": 2, "max_new_tokens": 30},
    {"num_beams": 3, "length_penalty": 2.0},
    {"num_beams": 3, "early_stopping": True},
    {"num_beams": 3, "early_stopping": "never", "length_penalty": 0.7},
    {"num_beams": 3, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 6},
    {"num_beams": 5, "length_penalty": -0.5},
    {"num_beams": 5, "repetition_penalty": 0.9},
]
IMAGES = 18


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A random BLIP in torch and its bundle."""
    folder = tmp_path_factory.mktemp(request.param)
    path = make_blip(folder / "checkpoint", **CONFIGURATIONS[request.param])
    bundle = export(path, folder / "model.rsedge")
    return BlipForConditionalGeneration.from_pretrained(path).eval(), bundle.path


def normalized(images: np.ndarray, bundle_image) -> torch.Tensor:
    values = (images / 255 - np.array(bundle_image.mean)) / np.array(bundle_image.std)
    return torch.from_numpy(values.astype(np.float32)).permute(0, 3, 1, 2)


def generated(row: list[int], eos: int) -> tuple[int, ...]:
    row = row[1:]
    return tuple(row[: row.index(eos) + 1] if eos in row else row)


@pytest.fixture(scope="module")
def reference(pair):
    """What transformers gives for each of ``SETTINGS``: computed once, as it costs most of the time here."""
    model, path = pair
    image = Captioner.load(path, device="cpu").bundle.manifest.image
    images = random_images(IMAGES, image.size, seed=5)
    with torch.no_grad():
        expected = [
            model.generate(
                pixel_values=normalized(images, image),
                do_sample=False,
                output_scores=True,
                return_dict_in_generate=True,
                **{"max_new_tokens": 14, **settings},
            )
            for settings in SETTINGS
        ]
    return images, expected


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_greedy_and_beam_captions_are_those_of_transformers(pair, reference, batch_size):
    model, path = pair
    captioner = Captioner.load(path, device="cpu", batch_size=batch_size)
    images, references = reference
    eos = model.config.text_config.sep_token_id
    lengths = set()
    for settings, expected in zip(SETTINGS, references, strict=True):
        captions = captioner.caption(images, **{"max_new_tokens": 14, **settings})
        tokens = [generated(row, eos) for row in expected.sequences.tolist()]
        assert [caption.token_ids for caption in captions] == tokens, settings
        if settings["num_beams"] > 1:
            scores = [caption.score for caption in captions]
            np.testing.assert_allclose(scores, expected.sequences_scores.numpy(), rtol=1e-4, atol=1e-4)
        lengths |= {len(caption.token_ids) for caption in captions}
    assert len(lengths) > 3, "captions of one length would not show that images leave the batch at different times"


def test_defaults_are_those_of_transformers(pair):
    model, path = pair
    captioner = Captioner.load(path, device="cpu")
    image = captioner.bundle.manifest.image
    images = random_images(6, image.size, seed=6)
    with torch.no_grad():
        expected = model.generate(pixel_values=normalized(images, image))
    eos = model.config.text_config.sep_token_id
    assert [c.token_ids for c in captioner.caption(images)] == [generated(row, eos) for row in expected.tolist()]


def test_the_greedy_score_is_the_mean_log_probability(pair):
    model, path = pair
    captioner = Captioner.load(path, device="cpu")
    image = captioner.bundle.manifest.image
    images = random_images(4, image.size, seed=7)
    [first, *_] = captions = captioner.caption(images, num_beams=1)
    assert first.score < 0
    for index, caption in enumerate(captions):
        ids = torch.tensor([[model.config.text_config.bos_token_id, *caption.token_ids]])
        with torch.no_grad():
            embeds = model.vision_model(normalized(images[index : index + 1], image))[0]
            logits = model.text_decoder(ids[:, :-1], encoder_hidden_states=embeds).logits
        log_probs = torch.log_softmax(logits[0], -1)[range(len(caption.token_ids)), ids[0, 1:]]
        assert caption.score == pytest.approx(log_probs.mean().item(), abs=1e-4)


def test_another_image_size_interpolates_positions_as_transformers_does(tmp_path: Path):
    path = make_blip(tmp_path / "checkpoint", seed=4, image_size=32, patch=8)
    captioner = Captioner.load(export(path, tmp_path / "larger.rsedge", image_size=52).path, device="cpu")
    assert captioner.image_size == 52  # not a multiple of the patch: the margin is ignored, as torch ignores it
    model = BlipForConditionalGeneration.from_pretrained(path).eval()
    images = random_images(5, 52, seed=8)
    values = normalized(images, captioner.bundle.manifest.image)
    with torch.no_grad():
        embeds = model.vision_model(values, interpolate_pos_encoding=True)[0].numpy()
        expected = model.generate(pixel_values=values, interpolate_pos_encoding=True, num_beams=3)
    np.testing.assert_allclose(captioner.decoder.encode(images), embeds, atol=2e-5)
    eos = model.config.text_config.sep_token_id
    tokens = [generated(row, eos) for row in expected.tolist()]
    assert [c.token_ids for c in captioner.caption(images, num_beams=3)] == tokens
