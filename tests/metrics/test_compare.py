"""Paired comparisons against scipy, and the bootstrap against scoring every sample anew."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from scipy import stats

from rsedge.errors import OptionError
from rsedge.metrics import compare
from rsedge.metrics.captions import CaptionScores, Score, score_captions
from rsedge.metrics.compare import compare_scores
from tests.metrics.cases import random_captions

IMAGES = 30
WORSE, BETTER, REFERENCES = random_captions(4, IMAGES)


@pytest.fixture(scope="module")
def scored() -> tuple[CaptionScores, CaptionScores]:
    a, b = (score_captions(texts, REFERENCES, metrics=["bleu", "rouge_l", "cider_d"]) for texts in (WORSE, BETTER))
    return a, b


def of_values(*values: float, metric: str = "rouge_l", version: str = "1") -> CaptionScores:
    each = np.array(values, float)
    score = Score(metric=metric, value=each.mean(), per_image=each, library="x", version=version, tokenizer="y")
    return CaptionScores(scores={metric: score}, images=len(values))


def test_tests_are_scipys(scored):
    a, b = scored
    found = compare_scores(a, b, resamples=100)
    assert list(found) == ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d"]
    for name, one in found.items():
        first, second = a[name].per_image, b[name].per_image
        change = np.round(second - first, 12)
        assert one.t_test_p == pytest.approx(stats.ttest_rel(second, first).pvalue, rel=1e-9)
        assert one.wilcoxon_p == pytest.approx(stats.wilcoxon(change).pvalue, rel=1e-9)
        assert (one.better, one.worse) == ((change > 0).sum(), (change < 0).sum())
        assert one.better + one.worse + one.equal == IMAGES
        assert one.difference == pytest.approx(one.b - one.a)
        assert (one.a, one.b) == pytest.approx((a[name].value, b[name].value))
    assert found["rouge_l"].difference > 0


@pytest.mark.parametrize("block", [compare._BLOCK, 7 * IMAGES])
def test_the_interval_is_that_of_samples_scored_anew(scored, monkeypatch, block):
    monkeypatch.setattr(compare, "_BLOCK", block)
    found = compare_scores(*scored, resamples=100, confidence=0.9, seed=7)
    draws = np.random.default_rng(7).multinomial(IMAGES, np.full(IMAGES, 1 / IMAGES), size=100)
    changes = []
    for weights in draws:
        sample = np.repeat(np.arange(IMAGES), weights)
        references = {n: REFERENCES[i] for n, i in enumerate(sample)}
        values = [
            Bleu(4).compute_score(references, {n: [texts[i]] for n, i in enumerate(sample)}, verbose=0)[0]
            for texts in (WORSE, BETTER)
        ]
        means = [scored[1][name].per_image[sample].mean() - scored[0][name].per_image[sample].mean()
                 for name in ("rouge_l", "cider_d")]  # fmt: skip
        changes.append([*np.subtract(values[1], values[0]), *means])
    expected = np.percentile(changes, [5, 95], axis=0).T
    for (name, one), (low, high) in zip(found.items(), expected, strict=True):
        assert (one.low, one.high) == pytest.approx((low, high), abs=1e-9), name
        assert one.low < one.high
        assert one.confidence == 0.9
        assert one.statistic == ("corpus" if name.startswith("bleu") else "mean of images")


def test_the_interval_is_near_scipys(scored):
    one = compare_scores(*scored, resamples=5000)["rouge_l"]
    change = scored[1]["rouge_l"].per_image - scored[0]["rouge_l"].per_image
    theirs = stats.bootstrap((change,), np.mean, n_resamples=5000, method="percentile", rng=0).confidence_interval
    assert (one.low, one.high) == pytest.approx((theirs.low, theirs.high), abs=0.1 * (theirs.high - theirs.low))


def test_a_against_itself(scored):
    for one in compare_scores(scored[0], scored[0], resamples=100).values():
        assert (one.difference, one.low, one.high, one.t_test_p, one.wilcoxon_p, one.equal) == (0, 0, 0, 1, 1, IMAGES)


def test_the_other_way_round_is_the_mirror(scored):
    there, back = compare_scores(*scored, seed=1), compare_scores(*scored[::-1], seed=1)
    for name, one in there.items():
        other = back[name]
        assert (one.low, one.high, one.t_test_p) == pytest.approx((-other.high, -other.low, other.t_test_p))
        assert (one.better, one.worse) == (other.worse, other.better)


def test_all_images_better_by_the_same():
    one = compare_scores(of_values(0, 0.25, 0.5), of_values(0.5, 0.75, 1.0))["rouge_l"]
    assert (one.t_test_p, one.low, one.high, one.better) == (0, 0.5, 0.5, 3)
    assert json.loads(json.dumps(one.to_dict()))["metric"] == "rouge_l"


def test_the_last_bits_decide_nothing():
    one = compare_scores(of_values(0.3, 0.5, 0.6), of_values(0.1 + 0.2, 0.5, 0.7))["rouge_l"]
    assert (one.better, one.worse, one.equal) == (1, 0, 2)


def test_seeds(scored):
    first, again, other = (compare_scores(*scored, resamples=100, seed=seed)["cider_d"] for seed in (1, 1, 2))
    assert first == again
    assert first.low != other.low


def test_only_metrics_of_both():
    a, b = of_values(0, 1), of_values(1, 1)
    both = CaptionScores(scores={**b.scores, **of_values(1, 2, metric="cider_d").scores}, images=2)
    assert list(compare_scores(a, both)) == ["rouge_l"]


def test_everything_that_does_not_fit_is_told_at_once():
    with pytest.raises(OptionError) as caught:
        compare_scores(of_values(0, 1), of_values(0, 1, 1, version="2"), resamples=5, confidence=95)
    message = str(caught.value)
    assert "A has 2 images and B 3" in message
    assert "rouge_l was computed with x 1 (y) for A and x 2 (y) for B: score both with the same" in message
    assert "resamples is 5, expected at least 100" in message
    assert "confidence is 95, expected a share above 0 and below 1" in message
    with pytest.raises(OptionError, match="no metric in common"):
        compare_scores(of_values(0, 1), of_values(0, 1, metric="cider_d"))
    with pytest.raises(OptionError, match="at least two"):
        compare_scores(of_values(1), of_values(1))


def test_tokenizers_do_not_mix(scored):
    other = {name: replace(score, tokenizer="ptb") for name, score in scored[1].scores.items()}
    with pytest.raises(OptionError, match="score both with the same"):
        compare_scores(scored[0], replace(scored[1], scores=other))
