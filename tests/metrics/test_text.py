"""Statistics of captions, counted by hand."""

from __future__ import annotations

import json

import pytest

from rsedge.errors import OptionError
from rsedge.metrics.text import text_statistics

CAPTIONS = ["A river.", "a river", "two roads near a river", "", "trees"]


def test_by_hand():
    found = text_statistics(CAPTIONS, known=["A RIVER near trees", "a bridge"])
    assert found.captions == 5
    assert (found.empty, found.words) == (1, 10)
    assert found.words_mean == pytest.approx(2.0)
    assert found.words_sd == pytest.approx(((0 + 0 + 9 + 4 + 1) / 5) ** 0.5)
    assert (found.words_min, found.words_max) == (0, 5)
    assert found.vocabulary == 6  # a river two roads near trees
    assert found.unseen_share == pytest.approx(2 / 10)  # two, roads
    assert (found.distinct, found.distinct_share) == (4, pytest.approx(4 / 5))
    assert (found.most_frequent, found.most_frequent_share) == ("a river", pytest.approx(2 / 5))
    assert json.loads(json.dumps(found.to_dict()))["vocabulary"] == 6


def test_of_several_the_first_in_the_alphabet():
    assert text_statistics(["c d", "a b", "a b", "c d", "e"]).most_frequent == "a b"


def test_without_known_captions_nothing_is_unseen():
    assert text_statistics(["a"]).unseen_share is None
    assert text_statistics(["a"], known=[]).unseen_share == 1.0
    assert text_statistics(["a"], known=iter(["a"])).unseen_share == 0.0


def test_captions_without_a_word():
    found = text_statistics(["", "."], known=["a"])
    assert (found.empty, found.words, found.vocabulary, found.unseen_share, found.distinct) == (2, 0, 0, 0.0, 1)


def test_no_caption():
    with pytest.raises(OptionError, match="at least one"):
        text_statistics([])
