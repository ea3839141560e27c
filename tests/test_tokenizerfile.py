"""Tokenizers from strangers: those of the exporter pass, and nothing that takes time or memory without end."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import tokenizers

import rsedge
from rsedge.errors import BundleError, OptionError
from rsedge.runtime.decoding.tokenizer import LONGEST_TEXT, Tokenizer
from rsedge.tokenizerfile import EXPRESSIONS, tokenizer_problems

WORDS = {
    "type": "WordPiece",
    "unk_token": "a",
    "continuing_subword_prefix": "##",
    "max_input_chars_per_word": 100,
    "vocab": {"a": 0, "b": 1},
}


@pytest.mark.parametrize("name", ["selftest", "sentinel2-rgb"])
def test_the_built_in_tokenizers_pass(name: str):
    path = Path(rsedge.__file__).parent / "builtin" / f"{name}.rsedge" / "tokenizer.json"
    assert tokenizer_problems(path.read_bytes()) == []


def test_those_of_every_family_pass_before_and_after_export(tmp_path: Path):
    pytest.importorskip("transformers")
    from rsedge.export.tokenizer import export_tokenizer
    from tests.clipcap_models import make_clipcap
    from tests.dual_encoders import make_clip, make_siglip
    from tests.models import make_blip

    for make in (make_blip, make_clip, make_siglip, make_clipcap):
        folder = make(tmp_path / make.__name__)
        assert tokenizer_problems((folder / "tokenizer.json").read_bytes()) == []
        target = export_tokenizer(folder, tmp_path / f"{make.__name__}.json")
        assert tokenizer_problems(target.read_bytes()) == []


def test_that_of_a_sentencepiece_model_passes(tmp_path: Path):
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    from transformers import SiglipTokenizer

    from rsedge.export.tokenizer import export_tokenizer

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["many trees are near a river .", "two planes stand beside the road ."] * 50),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=40,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (tmp_path / "siglip").mkdir()
    SiglipTokenizer(str(tmp_path / "spiece.model")).save_pretrained(tmp_path / "siglip")
    target = export_tokenizer(tmp_path / "siglip", tmp_path / "tokenizer.json")
    assert tokenizer_problems(target.read_bytes()) == []


def replace(pattern: dict[str, str], content: str) -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


def split(pattern: object) -> dict:
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


SLOW = r"(a+)+$"
A = {"Sequence": {"id": "A", "type_id": 0}}
HOSTILE: dict[str, tuple[dict, str]] = {
    "slow split": ({"pre_tokenizer": split({"Regex": SLOW})}, "the regular expression '(a+)+$'"),
    "slow replacement": ({"normalizer": replace({"Regex": SLOW}, "")}, "the regular expression '(a+)+$'"),
    "slow decoder": ({"decoder": replace({"Regex": SLOW}, "")}, "the regular expression '(a+)+$'"),
    "slow step in a sequence": (
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split({"Regex": SLOW})]}},
        "the regular expression '(a+)+$'",
    ),
    "two patterns": ({"pre_tokenizer": split({"String": " ", "Regex": SLOW})}, "a pattern of an unknown kind"),
    "empty pattern": ({"normalizer": replace({"String": ""}, "")}, "the pattern ''"),
    "growth": ({"normalizer": replace({"String": "a"}, "aa")}, "by something longer"),
    "growth by an expression": ({"normalizer": replace({"Regex": r"\s+"}, "  ")}, "by something longer"),
    "unknown step": ({"pre_tokenizer": {"type": "UnicodeScripts"}}, "the step 'UnicodeScripts'"),
    "prepending step": ({"normalizer": {"type": "Prepend", "prepend": "x" * 99}}, "the step 'Prepend'"),
    "no step": ({"decoder": ["ByteLevel"]}, "the step 'None'"),
    "many steps": (
        {"decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}] * 100_000}},
        "more than 32 steps in its decoder",
    ),
    "long padding": ({"padding": {"strategy": {"Fixed": 10**12}}}, "the number 1000000000000 in its padding"),
    "repeated text": (
        {"post_processor": {"type": "TemplateProcessing", "single": [A] * 50, "pair": [A], "special_tokens": {}}},
        "a template that repeats the text",
    ),
    "many tokens around": (
        {"post_processor": {"type": "TemplateProcessing", "single": [A] * 10**4, "pair": [], "special_tokens": {}}},
        "a list of 10000",
    ),
    "large table": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "A" * 3_000_000}}, "table of char"),
    "unknown part": ({"code": "import os"}, "has 'code'"),
    "unknown model": ({"model": {"type": "WordLevel", "vocab": {}}}, "a model 'WordLevel'"),
    "no model": ({"model": None}, "holds no tokenizer model"),
    "no vocabulary": ({"model": {"type": "BPE"}}, "no vocabulary"),
    "large ids": ({"model": {**WORDS, "vocab": {"a": 2**31}}}, "a token whose id is not in 0 to"),
    "ids below zero": ({"model": {**WORDS, "vocab": {"a": -1}}}, "a token whose id is not in 0 to"),
    "long token": ({"model": {**WORDS, "vocab": {"a" * 10**6: 0}}}, "a token that is no text of up to 512"),
    "long added token": ({"added_tokens": [{"id": 0, "content": "a" * 1000}]}, "a token that is no text"),
    "added tokens of another kind": ({"added_tokens": {"a": 1}}, "added tokens that are no list"),
    "long words": ({"model": {**WORDS, "max_input_chars_per_word": 10**6}}, "max_input_chars_per_word 1000000"),
    "merges of another kind": (
        {"model": {"type": "BPE", "vocab": {}, "merges": [["a"] * 9]}},
        "a merge that is no pair",
    ),
    "scores of another kind": ({"model": {"type": "Unigram", "vocab": [["a", "b"]]}}, "no list of pieces and scores"),
}


def test_a_sound_tokenizer_passes():
    assert tokenizer_problems(json.dumps({"version": "1.0", "model": WORDS}).encode()) == []


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tokenizer_is_refused(name: str):
    changes, words = HOSTILE[name]
    (problem, *_) = tokenizer_problems(json.dumps({"model": WORDS, **changes}).encode())
    assert words in problem
    assert len(problem) < 300


def test_tokens_are_counted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rsedge.tokenizerfile._MOST_TOKENS", 2)
    values = {"model": WORDS, "added_tokens": [{"id": 2, "content": "c"}]}
    assert tokenizer_problems(json.dumps(values).encode()) == ["has 3 tokens, at most 2 are accepted"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"[" * 100_000, "nests deeper"),
        (b"[1]", "no tokenizer model"),
        (b"\xff\xfe", "is not JSON"),
        (b'{"model": {"vocab": [' + b"[]," * 5_000_000, "at most 4000000 are read"),
        (b" " * ((64 << 20) + 1), "at most 67108864 are read"),
    ],
)
def test_a_file_that_would_take_the_memory_is_refused(data: bytes, words: str):
    assert words in tokenizer_problems(data)[0]


def split_by(pattern: str, text: str) -> int:
    backend = tokenizers.Tokenizer.from_str(json.dumps({"model": WORDS, "pre_tokenizer": split({"Regex": pattern})}))
    return len(backend.encode(text).ids)


def test_the_expressions_accepted_take_a_long_text_and_those_refused_do_not_take_a_short_one():
    """The control: the package gives up, with an exception of its own kind, after ten million tries at one place."""
    with pytest.raises(BaseException, match="retry-limit-in-match"):
        split_by(SLOW, "a" * 40 + "!")
    text = ("a'" * 40 + " \t" * 40 + "▁." * 40 + "é1") * (LONGEST_TEXT // 242)
    for pattern in EXPRESSIONS:
        assert split_by(pattern, text) > 0, pattern


def test_a_table_of_characters_that_is_none_is_an_error_and_no_crash(tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    for table in ("", "AAAA", "/////w==", "CAAAAP//////////AAAA"):
        values = {"model": WORDS, "normalizer": {"type": "Precompiled", "precompiled_charsmap": table}}
        path.write_text(json.dumps(values))
        with pytest.raises(BundleError, match="tokenizer"):
            Tokenizer.load(path).encode("a b é")


def test_texts_of_megabytes_are_refused(tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": copy.deepcopy(WORDS)}))
    tokenizer = Tokenizer.load(path)
    assert tokenizer.encode("a" * LONGEST_TEXT)
    with pytest.raises(OptionError, match=f"a text has {LONGEST_TEXT + 1} characters, at most {LONGEST_TEXT}"):
        tokenizer.encode("a" * (LONGEST_TEXT + 1))
