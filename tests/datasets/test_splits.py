"""Splits and subsets depend on seed and key alone."""

from __future__ import annotations

import hashlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsedge.datasets.examples import SPLIT_WORDS, Splitter, split_named, subset, uniform, wanted_splits
from rsedge.errors import OptionError

KEYS = [f"set/{number}.jpg" for number in range(20_000)]


def test_hashes_are_fixed():
    """A change here moves images of everyone from one split to another."""
    digest = hashlib.blake2b(b"split\x007\x00rsicd/1.jpg", digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    assert uniform("split", 7, "rsicd/1.jpg") == pytest.approx(place, abs=1e-15)
    assert Splitter(7, (place + 1e-9, 1 - place - 1e-9, 0.0)).split("rsicd/1.jpg") == "train"
    assert Splitter(7, (place - 1e-9, 1 - place + 1e-9, 0.0)).split("rsicd/1.jpg") == "val"


def test_fractions_are_met_on_average():
    placed = [Splitter(1, (0.7, 0.2, 0.1)).split(key) for key in KEYS]
    for name, share in (("train", 0.7), ("val", 0.2), ("test", 0.1)):
        deviation = math.sqrt(share * (1 - share) / len(KEYS))
        assert abs(placed.count(name) / len(KEYS) - share) < 4 * deviation


def test_seeds_give_other_splits():
    first, second = ([Splitter(seed, (0.5, 0.5, 0.0)).split(key) for key in KEYS[:2000]] for seed in (0, 1))
    assert 0.4 < sum(a == b for a, b in zip(first, second, strict=True)) / 2000 < 0.6


@given(st.lists(st.text(max_size=20), unique=True), st.integers(0, 2**40), st.integers(1, 30), st.randoms())
def test_a_subset_knows_no_order_and_grows(keys, seed, limit, random):
    chosen = subset(keys, limit, seed=seed)
    assert len(chosen) == min(limit, len(keys))
    assert chosen <= subset(keys, limit + 1, seed=seed)
    shuffled = list(keys)
    random.shuffle(shuffled)
    assert subset(shuffled, limit, seed=seed) == chosen
    rest = [key for key in keys if key in chosen]
    assert subset(rest, limit, seed=seed) == chosen


@given(st.text(), st.integers())
def test_a_fraction_of_nothing_gets_nothing(key, seed):
    assert Splitter(seed, (1.0, 0.0, 0.0)).split(key) == "train"
    assert Splitter(seed, (0.0, 0.0, 1.0)).split(key) == "test"
    assert Splitter(seed, (0.7, 0.3, 0.0)).split(key) != "test"
    assert 0 <= uniform("x", seed, key) < 1


def test_subsets_and_splits_are_independent():
    val = [key for key in KEYS if Splitter(3).split(key) == "val"]
    assert 150 < len(subset(KEYS, 2000, seed=3).intersection(val)) < 250


@pytest.mark.parametrize("fractions", [(0.8, 0.2), (0.8, 0.1, 0.2), (1.2, -0.1, -0.1), (math.nan, 0.5, 0.5)])
def test_impossible_fractions(fractions):
    with pytest.raises(OptionError, match="give three for train, val, test that add up to 1"):
        Splitter(0, fractions)


def test_split_words():
    assert [split_named(word) for word in (" Train", "restval", "VALIDATION", "dev", "test", "holdout", None, 3)] == [
        "train", "train", "val", "val", "test", None, None, None,
    ]  # fmt: skip
    assert "restval" in SPLIT_WORDS
    assert wanted_splits(["val", "train"]) == {"train", "val"}
    for wrong in ("train", [], ["dev"]):
        with pytest.raises(OptionError, match="give some of train, val, test"):
            wanted_splits(wrong)
