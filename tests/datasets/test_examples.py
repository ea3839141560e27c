"""Examples check themselves, and sets of them count themselves."""

from __future__ import annotations

import pickle

import pytest

from rsedge.datasets import BadRecord, CaptionData, Example, FileImage
from rsedge.errors import OptionError

IMAGE = FileImage("a.jpg")


def test_a_whole_example_survives_pickling():
    example = Example("s/a.jpg", IMAGE, ("one", "two"), "train", (("eins",), ()), "harbour")
    assert pickle.loads(pickle.dumps(example)) == example


def test_a_label_stands_in_for_captions():
    assert Example("s/a.jpg", IMAGE, (), "test", label="harbour").captions == ()
    with pytest.raises(OptionError, match=r"s/a\.jpg: it has neither a caption nor a label"):
        Example("s/a.jpg", IMAGE, (), "test")


def test_all_faults_at_once():
    with pytest.raises(
        OptionError, match=r"split is 'dev'.*white space around it, got ' a'.*2 captions, but 1"
    ) as error:
        Example("s/a.jpg", IMAGE, (" a",), "dev", (("b",), ("c",)), "")
    assert "the label is empty" in str(error.value)
    with pytest.raises(OptionError, match="empty key"):
        Example("", IMAGE, ("a",), "train")
    for texts in (("",), (3,)):
        with pytest.raises(OptionError, match="captions must be text"):
            Example("s/a.jpg", IMAGE, texts, "train")


def test_keys_are_distinct():
    example = Example("s/a.jpg", IMAGE, ("a",), "train")
    with pytest.raises(OptionError, match=r"two examples have the key s/a\.jpg"):
        CaptionData((example, example))


def test_splits_and_summary():
    data = CaptionData(
        (
            Example("s/a", IMAGE, ("a b c", "d"), "train", (("x", "y"), ("z",))),
            Example("s/b", IMAGE, ("e f",), "train"),
            Example("s/c", IMAGE, (), "test", label="g"),
        ),
        (BadRecord("s", "d", "why"),),
        ("s",),
    )
    assert [example.key for example in data.split("train")] == ["s/a", "s/b"]
    assert data.split("val") == ()
    with pytest.raises(OptionError, match="no split 'dev', expected train, val, test"):
        data.split("dev")
    assert data.summary() == {
        "sources": ["s"],
        "bad": 1,
        "splits": {
            "train": {"images": 2, "captions": 3, "words_per_caption": 2.0, "paraphrases": 3},
            "test": {"images": 1, "captions": 0, "words_per_caption": None, "paraphrases": 0},
        },
    }
