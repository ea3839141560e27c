"""Words as the reference tokenizer counts them: written out, and against Stanford's own where Java is."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from rsedge.errors import BackendError, OptionError
from rsedge.metrics import java, text
from rsedge.metrics.text import TOKENIZERS, describe_tokenizer, tokenize
from tests.conftest import shared_data

needs_java = pytest.mark.skipif(not shutil.which("java"), reason="the PTB tokenizer runs in Java, which is not here")

# What Stanford's PTBTokenizer 3.4.1 makes of them, less pycocoevalcap's punctuation.
CASES = {
    "": "",
    " \t ": "",
    ".": "",
    "Many Green Trees.": "many green trees",
    "A (small) river, near; fields - and: 'quoted' \"twice\".": (
        "a -lrb- small -rrb- river near fields and quoted twice"
    ),
    "It's 3.5 km. Two U.S. roads! Really? yes...": "it 's 3.5 km two u.s. roads really yes",
    "two\nlines\rhere\u2028x\x85y\tz\x0bq\x0c": "two lines here x y z q",
    "caf\u00e9 \u2019s \u201cq\u201d": "caf\u00e9 's q",
    "a/b c-d 10% $5 & #1": "a/b c-d 10 % $ 5 & # 1",
    "can't won't gonna cannot": "ca n't wo n't gon na can not",
    "[x] {y}": "-lsb- x -rsb- -lcb- y -rcb-",
    "a road .": "a road",
}


def test_treebank_written_out():
    assert dict(zip(CASES, tokenize(list(CASES)), strict=True)) == CASES


@needs_java
def test_ptb_written_out():
    assert dict(zip(CASES, tokenize(list(CASES), "ptb"), strict=True)) == CASES


@needs_java
def test_ptb_is_pycocoevalcaps():
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    captions = [text for text in CASES if text.strip() and text.isascii() and "\r" not in text]
    oracle = PTBTokenizer().tokenize({n: [{"caption": text}] for n, text in enumerate(captions)})
    assert tokenize(captions, "ptb") == [oracle[n][0] for n in range(len(captions))]


@needs_java
def test_treebank_is_close_to_ptb_on_rsicd():
    with shared_data("rsicd/dataset_rsicd.json").open(encoding="utf-8") as file:
        images = json.load(file)["images"]
    captions = list(dict.fromkeys(text["raw"] for image in images for text in image["sentences"]))
    # All that are more than letters, commas and full stops, and some of the rest.
    captions = [text for n, text in enumerate(captions) if n % 20 == 0 or re.search(r"[^a-zA-Z ,.]", text)]
    different = [a for a, b in zip(tokenize(captions), tokenize(captions, "ptb"), strict=True) if a != b]
    assert len(different) == 2
    assert all("#" in text or "+" in text for text in different)


def test_order_and_repeats_stay():
    assert tokenize(["b a", "a", "b a", "", "a"]) == ["b a", "a", "b a", "", "a"]
    assert tokenize([]) == []


def test_each_names_itself():
    assert "Stanford PTBTokenizer 3.4.1" in describe_tokenizer("ptb")
    assert describe_tokenizer("treebank").startswith("nltk NLTKWordTokenizer 3.")
    assert TOKENIZERS == ("treebank", "ptb")


def test_an_unknown_tokenizer():
    with pytest.raises(OptionError, match="tokenizer is 'moses', expected treebank or ptb"):
        tokenize(["a"], "moses")


def test_ptb_without_java(monkeypatch):
    monkeypatch.setattr(java.shutil, "which", lambda name: None)
    with pytest.raises(BackendError, match=r"there is no java on this machine: install .*; or choose the tokenizer"):
        tokenize(["a"], "ptb")


def test_without_the_extra(monkeypatch):
    monkeypatch.setattr(text, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"need nltk and pycocoevalcap: pip install 'rsedge\[evaluate\]'"):
        tokenize(["a"])
