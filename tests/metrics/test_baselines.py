"""The trivial captions, against brute force."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from rsedge.errors import OptionError
from rsedge.metrics.text import consensus_caption, most_frequent_caption

CAPTIONS = ["Two roads.", "a river near a bridge .", "two  roads", "many trees", "A river near a bridge", "two roads ."]


def cosine(a: str, b: str) -> float:
    left, right = Counter(a.split()), Counter(b.split())
    dot = sum(count * right[word] for word, count in left.items())
    return dot / math.sqrt(sum(v * v for v in left.values()) * sum(v * v for v in right.values()))


def test_the_most_frequent_as_first_written():
    assert most_frequent_caption(CAPTIONS) == "Two roads."
    assert most_frequent_caption(["b c", "A B", "b c", "a b"]) == "A B"


def test_the_consensus_is_that_of_brute_force():
    words = np.array(["river", "road", "tree", "many", "two", "near", "green", "house"])
    random = np.random.default_rng(3)
    captions = [" ".join(random.choice(words, size=random.integers(1, 7))) for _ in range(80)]
    captions += captions[:15]
    mean = [sum(cosine(a, b) for b in captions) / len(captions) for a in captions]
    best = max(mean)
    chosen = consensus_caption(captions)
    assert mean[captions.index(chosen)] == pytest.approx(best, abs=1e-12)
    assert sum(value > best - 1e-9 for value in set(mean)) == 1  # so that the choice is not one of several


def test_repeats_weigh():
    assert consensus_caption(["a b", "a c", "x y", "x y", "x y"]) == "x y"
    assert consensus_caption(["a b", "a c", "a d", "x y"]) == "a b"


def test_wordless_captions_do_not_count():
    assert most_frequent_caption([".", ".", "", "a road"]) == "a road"
    assert consensus_caption([".", ".", "", "a road"]) == "a road"
    for baseline in (most_frequent_caption, consensus_caption):
        with pytest.raises(OptionError, match="none of 2 captions has a word in it"):
            baseline([".", ""])
