"""Draws against the exact filtered distribution, and filters against transformers'."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from rsedge.runtime.decoding.options import DecodingOptions
from rsedge.runtime.decoding.search import draw, filtered, uniform

CASES = [
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.8},
    {"temperature": 1.7, "top_k": 40, "top_p": 0.6},
    {"top_p": 0.02},
    {"top_k": 2000, "top_p": 0.95},
]


def logits_of(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, size).astype(np.float32)


def reference(logits: np.ndarray, options: DecodingOptions) -> np.ndarray:
    """Probabilities by transformers' own warpers, float64 [V]."""
    scores = torch.from_numpy(logits.astype(np.float64))[None]
    scores = TemperatureLogitsWarper(float(options.temperature))(None, scores)
    if options.top_k:
        scores = TopKLogitsWarper(options.top_k)(None, scores)
    if options.top_p < 1:
        scores = TopPLogitsWarper(options.top_p)(None, scores)
    return torch.softmax(scores, -1)[0].numpy()


@pytest.mark.parametrize("size", [12, 300, 3000])
@pytest.mark.parametrize("case", CASES)
def test_the_filter_is_that_of_transformers(case, size):
    options = DecodingOptions(do_sample=True, **case)
    for seed in range(5):
        logits = logits_of(size, seed)
        tokens, weights = filtered(logits, options)
        expected = reference(logits, options)
        assert tokens.tolist() == np.flatnonzero(expected).tolist()
        np.testing.assert_allclose(weights, expected[tokens], rtol=1e-9)


@pytest.mark.parametrize("case", CASES[:4])
def test_draws_follow_the_filtered_distribution(case):
    """Chi-square at 4 sigma: seeded, so it either always passes or always fails."""
    options = DecodingOptions(do_sample=True, seed=3, **case)
    logits = logits_of(60, 9)
    tokens, weights = filtered(logits, options)
    draws = 20_000
    counts = np.bincount([draw(logits, options, key=key, position=0) for key in range(draws)], minlength=60)
    assert counts.sum() == counts[tokens].sum(), "a token outside the filter was drawn"
    common = weights * draws >= 5
    observed = np.append(counts[tokens][common], counts[tokens][~common].sum())
    expected = np.append(weights[common], weights[~common].sum()) * draws
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    assert freedom >= 3
    statistic = ((observed - expected) ** 2 / expected).sum()
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


def test_a_token_ruled_out_is_never_drawn():
    logits = logits_of(50, 1)
    logits[10:] = -np.inf
    options = DecodingOptions(do_sample=True, temperature=3.0)
    assert max(draw(logits, options, key=key, position=0) for key in range(500)) < 10


def test_draws_are_the_same_for_ever_and_differ_between_seeds_keys_and_positions():
    assert uniform(7, 42, 3) == 0.8629188455309948
    values = {uniform(seed, key, position) for seed in range(5) for key in range(5) for position in range(5)}
    assert len(values) == 125
    assert all(0 <= value < 1 for value in values)
    assert uniform(2**64 - 1, 2**64 - 1, 0) != uniform(0, 0, 0)
