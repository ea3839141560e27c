"""Exported tokenizers of CLIP and SigLIP against transformers: equal ids, equal text."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, CLIPTokenizer

from rsedge.export.loading import vocabulary_ids
from rsedge.export.tokenizer import export_tokenizer
from rsedge.runtime.decoding.tokenizer import Tokenizer
from tests.conftest import shared_data

ODD = [
    "",
    "   ",
    " leading and trailing  ",
    "don't  stop, it's_ok! a.b-C (12) 3-4",
    "café naïve ⅷ ﬁ ² Ünïcödé x\u0301",
    "水域 😀 x 😀😀 и поле",
    "tab\tnew\nline\r\n end ▁ ▁▁x",
    "x" * 300,
    "A photo of a Cat.",
]
CAPTIONS = [
    f"{count} {colour} {thing} {place} ."
    for count in ("many", "two", "some", "a piece of")
    for colour in ("green", "white", "dense", "large")
    for thing in ("trees", "buildings", "planes", "farmlands")
    for place in ("are near a river", "stand beside the road", "surround a stadium", "lie in the desert")
]


def assert_same_as_transformers(folder: Path, texts: list[str], target: Path) -> Tokenizer:
    expected, tokenizer = AutoTokenizer.from_pretrained(folder), Tokenizer.load(export_tokenizer(folder, target))
    assert tokenizer.vocab_size == len(expected)
    for text in texts:
        ids = expected.encode(text)
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == expected.decode(ids, skip_special_tokens=True), text
    longest = 12
    short = Tokenizer.load(target, longest=longest)
    for text in texts:
        assert short.encode(text) == expected.encode(text, truncation=True, max_length=longest), text
    return tokenizer


def test_the_real_vocabulary_of_clip(tmp_path: Path):
    lines = gzip.decompress(shared_data("vocab/bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    letters = _byte_letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder = tmp_path / "clip"
    CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=merges).save_pretrained(folder)
    tokenizer = assert_same_as_transformers(folder, [*ODD, *CAPTIONS], tmp_path / "tokenizer.json")
    # As openai/CLIP's own tokenizer has it.
    assert tokenizer.encode("a photo of a cat") == [49406, 320, 1125, 539, 320, 2368, 49407]
    draw = random.Random(0)
    expected = AutoTokenizer.from_pretrained(folder)
    for _ in range(300):
        ids = [draw.randrange(49408) for _ in range(draw.randrange(20))]
        assert tokenizer.decode(ids) == expected.decode(ids, skip_special_tokens=True), ids


def _byte_letters() -> list[str]:
    """The letters that stand for bytes, in the order of openai/CLIP: printable ones first, as they are."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


def test_files_of_before_tokenizer_json(tmp_path: Path):
    from rsedge.training.models.loading import learn_clip_bpe

    learnt = learn_clip_bpe(CAPTIONS, 600)
    data = json.loads(learnt.backend_tokenizer.to_str())["model"]
    folder = tmp_path / "clip"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(data["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in data["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    assert_same_as_transformers(folder, [*ODD, *CAPTIONS], tmp_path / "tokenizer.json")
    assert vocabulary_ids(folder / "vocab.json", pytest.fail) == set(range(len(learnt)))


@pytest.mark.parametrize("settings", [{}, {"do_lower_case": False}])
def test_sentencepiece(tmp_path: Path, settings: dict[str, Any]):
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    from transformers import SiglipTokenizer

    folder = tmp_path / "siglip"
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS * 3),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=100,
        hard_vocab_limit=False,
        model_type="unigram",
        normalization_rule_name="nmt_nfkc",  # with these settings the vocabulary of SigLIP was made
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    SiglipTokenizer(str(tmp_path / "spiece.model"), **settings).save_pretrained(folder)
    assert not (folder / "tokenizer.json").exists()
    tokenizer = assert_same_as_transformers(folder, [*ODD, *CAPTIONS], tmp_path / "tokenizer.json")
    assert vocabulary_ids(folder / "spiece.model", pytest.fail) == set(range(tokenizer.vocab_size))


def test_a_damaged_vocabulary_is_reported(tmp_path: Path):
    pytest.importorskip("sentencepiece")
    found: list[str] = []
    (tmp_path / "spiece.model").write_bytes(b"none")
    assert vocabulary_ids(tmp_path / "spiece.model", found.append) is None
    (tmp_path / "vocab.json").write_text("[]")
    assert vocabulary_ids(tmp_path / "vocab.json", found.append) is None
    assert "no SentencePiece model" in found[0]
    assert "vocab.json" in found[1]
