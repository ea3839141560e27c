"""Vocabularies learnt from captions: the same every time, and read back by transformers as their kind."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from rsedge.datasets.examples import CaptionData
from rsedge.errors import OptionError
from rsedge.training.models import loading
from rsedge.training.recipe import ModelRecipe

CAPTIONS = [
    f"{count} {colour} planes are parked in an airport , near a {thing}'s edge ."
    for count in ("many", "two", "some", "Five")
    for colour in ("white", "grey", "old")
    for thing in ("runway", "café", "forest", "river", "sea")
]
KINDS = [loading.learn_wordpiece, loading.learn_clip_bpe, loading.learn_byte_bpe]


@pytest.mark.parametrize("learn", KINDS)
def test_learning_does_not_depend_on_order_or_chance(learn):
    first = learn(CAPTIONS, 700).get_vocab()
    assert all(learn(reversed(CAPTIONS), 700).get_vocab() == first for _ in range(3))
    assert sorted(first.values()) == list(range(len(first)))


@pytest.mark.parametrize("learn", KINDS)
def test_a_saved_tokenizer_is_read_back_equal(learn, tmp_path):
    tokenizer = learn(CAPTIONS, 700)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*CAPTIONS, "an unseen word, 42 zebras!"]
    assert again(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    assert loading.open_tokenizer(tmp_path)(texts)["input_ids"] == tokenizer(texts)["input_ids"]


def test_captions_survive_their_tokens():
    wordpiece, clip, byte = (learn(CAPTIONS, 700) for learn in KINDS)
    text = "many white planes are parked in an airport , near a forest's edge ."
    assert wordpiece.decode(wordpiece(text, add_special_tokens=False)["input_ids"]) == text.replace(" ,", ",").replace(
        " .", "."
    ).replace("'", " ' ")
    assert byte.decode(byte(text)["input_ids"]) == text
    assert clip.decode(clip(text, add_special_tokens=False)["input_ids"]).strip() == text.replace("'", " '")
    ids = clip(text)["input_ids"]
    assert (ids[0], ids[-1]) == (clip.bos_token_id, clip.eos_token_id)
    assert clip.eos_token_id == max(clip.get_vocab().values())  # where CLIP's text encoder pools
    assert wordpiece.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [len(wordpiece) - 2, len(wordpiece) - 1]


def test_no_tokenizer(tmp_path):
    with pytest.raises(OptionError, match="give a folder or a hub id that has one"):
        loading.open_tokenizer(tmp_path)
    with pytest.raises(OptionError, match=r"model.tokenizer is not set"):
        loading.obtain_tokenizer(ModelRecipe(), None, CaptionData(()), loading.learn_wordpiece)
