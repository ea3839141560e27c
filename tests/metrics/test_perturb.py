"""Captions spoilt on purpose: each in its own way, the same again with the same seed, and scored lower."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from rsedge.errors import OptionError
from rsedge.metrics.captions import score_captions
from rsedge.metrics.compare import PERTURBATIONS, perturb, sensitivity
from tests.metrics.cases import random_captions

_, CAPTIONS, REFERENCES = random_captions(6, 200)


@pytest.mark.parametrize(("kind", "share"), [("drop_10", 0.1), ("drop_30", 0.3)])
def test_words_left_out(kind, share):
    lost = total = 0
    for before, after in zip(CAPTIONS, perturb(CAPTIONS, kind), strict=True):
        rest = iter(before.split())
        assert all(word in rest for word in after.split())  # in their order
        assert 0 < len(after.split()) < len(before.split())
        lost += len(before.split()) - len(after.split())
        total += len(before.split())
    # At least one of each: a caption of n words loses n · p, and one more with probability (1 - p)^n.
    lengths = np.array([len(text.split()) for text in CAPTIONS])
    expected = (lengths * share + (1 - share) ** lengths).sum() / total
    assert lost / total == pytest.approx(expected, abs=0.04)


def test_swap_exchanges_two_neighbours():
    captions = [" ".join(f"{n}" for n in range(9))] * 100
    places = Counter()
    for after in perturb(captions, "swap"):
        moved = [n for n, word in enumerate(after.split()) if word != str(n)]
        assert len(moved) == 2
        assert moved[1] == moved[0] + 1
        places[moved[0]] += 1
    assert set(places) == set(range(8))


def test_shuffle_keeps_the_words():
    after = perturb(CAPTIONS, "shuffle")
    assert [sorted(text.split()) for text in after] == [sorted(text.split()) for text in CAPTIONS]
    assert sum(a != b for a, b in zip(after, CAPTIONS, strict=True)) > 190


@pytest.mark.parametrize("count", [2, 3, 50])
def test_another_images_caption(count):
    captions = [str(n) for n in range(count)]
    after = perturb(captions, "other_image", seed=3)
    assert sorted(after) == sorted(captions)
    assert all(a != b for a, b in zip(after, captions, strict=True))


def test_seeds():
    for kind in PERTURBATIONS:
        assert perturb(CAPTIONS, kind, seed=1) == perturb(CAPTIONS, kind, seed=1)
        assert perturb(CAPTIONS, kind, seed=1) != perturb(CAPTIONS, kind, seed=2)


def test_short_captions():
    assert {len(text.split()) for text in perturb(["a road"] * 300, "drop_30")} == {1}
    for kind in ("drop_10", "drop_30", "swap", "shuffle"):
        assert perturb(["", "road"], kind) == ["", "road"]


def test_sensitivity():
    captions, references = CAPTIONS[:60], REFERENCES[:60]
    found = sensitivity(captions, references, metrics=["bleu", "rouge_l"])
    whole = score_captions(captions, references, metrics=["bleu", "rouge_l"])
    assert list(found) == list(PERTURBATIONS)
    spoilt = score_captions(perturb(captions, "swap"), references, metrics=["bleu", "rouge_l"])
    for name, values in found["swap"].items():
        assert values["value"] == spoilt[name].value
        assert values["kept"] == pytest.approx(spoilt[name].value / whole[name].value)
    assert found["shuffle"]["bleu_1"]["kept"] == pytest.approx(1)  # words alone know no order
    kept = {kind: values["bleu_4"]["kept"] for kind, values in found.items()}
    assert 1 > kept["drop_10"] > kept["drop_30"] > kept["other_image"]
    assert 1 > kept["swap"] > kept["shuffle"]
    assert sensitivity(captions, references, metrics=["bleu", "rouge_l"], original=whole) == found


def test_what_is_not_accepted():
    with pytest.raises(OptionError, match="there is no perturbation 'typo'; there are drop_10, drop_30, swap"):
        perturb(CAPTIONS, "typo")
    with pytest.raises(OptionError, match="at least two images"):
        perturb(["a"], "other_image")
    other = score_captions(CAPTIONS, REFERENCES, metrics=["bleu"])
    with pytest.raises(OptionError, match="asked for are rouge_l of 200: score the same captions with the same metr"):
        sensitivity(CAPTIONS, REFERENCES, metrics=["rouge_l"], original=other)
