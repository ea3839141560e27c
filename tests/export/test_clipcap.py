"""CLIPCap bundles against recomputing everything in torch, token for token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from rsedge import Captioner
from rsedge.bundle import read_bundle
from rsedge.export.convert import export
from rsedge.runtime.decoding.options import DecodingOptions
from rsedge.training.models.clipcap_model import ClipCapModel, generate
from tests.clipcap_models import CLIP, SIGLIP, beam_caption, embed, make_clipcap
from tests.models import random_images

if TYPE_CHECKING:
    import torch

CONFIGURATIONS = {
    "mlp-clip": {"seed": 2, "vision": CLIP},
    "transformer-siglip": {"seed": 1, "mapper": "transformer", "vision": SIGLIP, "clip_length": 3},
    "transformer-clip": {"seed": 2, "mapper": "transformer", "vision": CLIP, "text": {"n_layer": 3, "n_head": 2}},
}
IMAGES, LONGEST = 11, 14


@dataclass(frozen=True)
class Pair:
    """A random CLIPCap in torch and its bundle; images, their embeddings, and captions by number of beams."""

    model: ClipCapModel
    bundle: Path
    images: np.ndarray
    embeds: torch.Tensor
    captions: dict[int, list[tuple[tuple[int, ...], float]]]


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp(request.param)
    path = make_clipcap(folder / "checkpoint", **CONFIGURATIONS[request.param])
    model = ClipCapModel.from_pretrained(path).eval()
    images = random_images(IMAGES, 32, seed=5)
    embeds = embed(model, images)
    captions = {beams: [beam_caption(model, image, beams, LONGEST) for image in embeds] for beams in (1, 3, 5)}
    return Pair(model, export(path, folder / "model.rsedge").path, images, embeds, captions)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_greedy_and_beam_captions_are_those_of_recomputing_everything(pair: Pair, batch_size):
    captioner = Captioner.load(pair.bundle, device="cpu", threads=1, batch_size=batch_size)
    for beams, expected in pair.captions.items():
        found = captioner.caption(pair.images, num_beams=beams, max_new_tokens=LONGEST)
        assert [caption.token_ids for caption in found] == [tokens for tokens, _ in expected]
        np.testing.assert_allclose([caption.score for caption in found], [score for _, score in expected], atol=1e-4)


@pytest.mark.parametrize("beams", [1, 3, 5])
def test_captions_are_those_of_the_checkpoint(pair: Pair, beams):
    captioner = Captioner.load(pair.bundle, device="cpu", threads=1, batch_size=4)
    expected = generate(pair.model, pair.embeds, DecodingOptions(num_beams=beams, max_new_tokens=30))
    found = captioner.caption(pair.images, num_beams=beams, max_new_tokens=30)
    assert [caption.token_ids for caption in found] == [caption.token_ids for caption in expected]


def test_the_captions_compared_are_worth_comparing(pair: Pair):
    for expected in pair.captions.values():
        tokens = [ids for ids, _ in expected]
        assert len(set(tokens)) > 5
        assert len({len(ids) for ids in tokens}) > 2
        assert any(ids[-1] == pair.model.config.stop_token_id for ids in tokens)
    assert pair.captions[1] != pair.captions[5]


def test_samples_are_those_of_the_checkpoint(pair: Pair):
    captioner = Captioner.load(pair.bundle, device="cpu", threads=1, batch_size=3)
    keys = [2**63, *range(50, 50 + IMAGES - 1)]
    for settings in ({"top_p": 0.8}, {"top_k": 7, "temperature": 1.5, "seed": 9}):
        options = DecodingOptions(do_sample=True, max_new_tokens=LONGEST, **settings)
        expected = generate(pair.model, pair.embeds, options, keys=keys)
        found = captioner.caption(pair.images, keys=keys, max_new_tokens=LONGEST, **settings)
        assert [caption.token_ids for caption in found] == [caption.token_ids for caption in expected]
        scores = [caption.score for caption in expected]
        np.testing.assert_allclose([caption.score for caption in found], scores, atol=1e-4)
    assert [caption.token_ids for caption in found] != [tokens for tokens, _ in pair.captions[1]]


def test_caches_kept_on_a_device_give_the_same_captions(pair: Pair):
    """The path CUDA takes, on the CPU."""
    captioner = Captioner.load(pair.bundle, device="cpu", threads=1, batch_size=4)
    captioner.decoder.keep_on_device(captioner.bundle)
    for beams, expected in pair.captions.items():
        found = captioner.caption(pair.images, num_beams=beams, max_new_tokens=LONGEST)
        assert [caption.token_ids for caption in found] == [tokens for tokens, _ in expected]


def test_the_bundle_says_how_clipcap_decodes(pair: Pair):
    manifest = read_bundle(pair.bundle).manifest
    config = pair.model.config
    positions = config.text_config.n_positions - config.prefix_length + 1
    assert manifest.family == "clipcap"
    assert manifest.tokens.eos == config.stop_token_id
    assert (manifest.generation.num_beams, manifest.generation.max_new_tokens) == (5, positions)
    assert (manifest.decoder.image_tokens, manifest.decoder.max_positions) == (config.prefix_length - 1, positions)
    specs = {tensor.name: tensor.shape for tensor in manifest.graphs["step"].inputs}
    assert specs["start"] == ("images", 32)
    assert manifest.parity["problems"] == []
    assert manifest.parity["encoder"]["max"] < 1e-5
    assert manifest.parity["next_token"] == manifest.parity["beam3"]["captions"] == 1.0
