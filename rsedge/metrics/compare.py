"""Captions compared: two sets by paired tests and a bootstrap over images, and captions with themselves spoilt on
purpose, which shows how much each metric notices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rsedge.errors import OptionError
from rsedge.metrics.captions import CaptionScores, Score, corpus_bleu, score_captions

if TYPE_CHECKING:
    from rsedge.metrics.text import TokenizerName

Floats = NDArray[np.float64]

_BLOCK = 2**22  # elements of a block of resampling weights
PERTURBATIONS = {
    "drop_10": "each word left out with probability 0.1, at least one",
    "drop_30": "each word left out with probability 0.3, at least one",
    "swap": "two neighbouring words exchanged",
    "shuffle": "all words in random order",
    "other_image": "the caption of another image",
}
"""Perturbation → what it does; from what hardly changes the meaning to what changes it altogether."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One metric of A and of B on the same images."""

    metric: str
    a: float
    b: float
    difference: float
    """B - A."""
    statistic: str
    """What was resampled: ``corpus`` for BLEU, whose counts are added up anew for each sample; ``mean of images`` for
    the rest, METEOR too, whose corpus value cannot be had from its images' scores."""
    low: float
    high: float
    """Ends of the bootstrap interval of the difference (percentiles)."""
    confidence: float
    t_test_p: float
    wilcoxon_p: float
    """Two-sided, paired; 1 where no image differs, and the t-test's is 0 where all differ by the same."""
    better: int
    worse: int
    equal: int
    """Images for which B scores higher, lower, the same."""

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def compare_scores(
    a: CaptionScores, b: CaptionScores, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> dict[str, Comparison]:
    """Metric → comparison, for the metrics that both have; images must stand in the same order in both.

    Every metric is computed on the same ``resamples`` bootstrap samples, each of as many images as there are, drawn
    with replacement. ``confidence`` of the intervals is above 0 and below 1.

    Raises:
        OptionError: Different images, fewer than two, no metric in common, or a value that is not accepted.
    """

    def origin(score: Score) -> str:
        return f"{score.library} {score.version} ({score.tokenizer})"

    problems = []
    if a.images != b.images or a.images < 2:
        problems.append(f"A has {a.images} images and B {b.images}: a paired test needs the same images, at least two")
    shared = [name for name in a.scores if name in b.scores]
    if not shared:
        problems.append("A and B have no metric in common: score both with the same metrics")
    problems += [
        f"{name} was computed with {first} for A and {second} for B: score both with the same"
        for name in shared
        if (first := origin(a[name])) != (second := origin(b[name]))
    ]
    if resamples < 100:
        problems.append(f"resamples is {resamples}, expected at least 100")
    if not 0 < confidence < 1:
        problems.append(f"confidence is {confidence}, expected a share above 0 and below 1, such as 0.95")
    if problems:
        raise OptionError("; ".join(problems))

    means = [name for name in shared if not name.startswith("bleu_")]
    each = np.stack([b[name].per_image - a[name].per_image for name in shared], axis=1)
    sampled = {name: np.empty(resamples) for name in shared}
    random = np.random.default_rng(seed)
    block = max(1, _BLOCK // a.images)
    for start in range(0, resamples, block):
        rows = slice(start, min(start + block, resamples))
        # How often each image is drawn says all there is to say of a sample.
        weights = random.multinomial(a.images, np.full(a.images, 1 / a.images), size=rows.stop - start)
        averages = weights @ each / a.images
        for name in means:
            sampled[name][rows] = averages[:, shared.index(name)]
        if a.bleu_counts is not None and b.bleu_counts is not None:
            change = corpus_bleu(weights @ b.bleu_counts) - corpus_bleu(weights @ a.bleu_counts)
            for name in set(shared) - set(means):
                sampled[name][rows] = change[:, int(name[-1]) - 1]
    tails = [50 * (1 - confidence), 50 * (1 + confidence)]
    return {name: _comparison(a[name], b[name], np.percentile(sampled[name], tails), confidence) for name in shared}


def _comparison(a: Score, b: Score, ends: Floats, confidence: float) -> Comparison:
    from scipy import stats

    corpus = a.metric.startswith("bleu_")
    first, second = (score.value if corpus else score.mean_of_images for score in (a, b))
    change = np.round(b.per_image - a.per_image, 12)  # equal scores may differ in their last bits
    t_test = wilcoxon = 1.0
    if change.any():
        t_test = 0.0 if np.ptp(change) == 0 else float(stats.ttest_1samp(change, 0.0).pvalue)
        wilcoxon = float(stats.wilcoxon(change).pvalue)
    return Comparison(
        metric=a.metric,
        a=first,
        b=second,
        difference=second - first,
        statistic="corpus" if corpus else "mean of images",
        low=float(ends[0]),
        high=float(ends[1]),
        confidence=confidence,
        t_test_p=t_test,
        wilcoxon_p=wilcoxon,
        better=int((change > 0).sum()),
        worse=int((change < 0).sum()),
        equal=int((change == 0).sum()),
    )


def perturb(captions: Sequence[str], kind: str, *, seed: int = 0) -> list[str]:
    """The captions, one per image, spoilt in one way of :data:`PERTURBATIONS`; words are what stands between spaces.

    One word is never left out. Equal seeds give equal results, whatever other kinds are asked for. OptionError where
    there is no such perturbation, or a single image where another's caption is asked for.
    """
    if kind not in PERTURBATIONS:
        raise OptionError(f"there is no perturbation {kind!r}; there are {', '.join(PERTURBATIONS)}")
    random = np.random.default_rng([seed, list(PERTURBATIONS).index(kind)])
    if kind == "other_image":
        if len(captions) < 2:
            raise OptionError("another image's caption needs at least two images")
        order = random.permutation(len(captions))
        taken = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))  # one cycle: none keeps its own
        return [captions[taken[index]] for index in range(len(captions))]
    return [" ".join(_spoil(caption.split(), kind, random)) for caption in captions]


def _spoil(words: list[str], kind: str, random: np.random.Generator) -> list[str]:
    if len(words) < 2:
        return words
    if kind == "swap":
        first = int(random.integers(len(words) - 1))
        words[first], words[first + 1] = words[first + 1], words[first]
        return words
    if kind == "shuffle":
        return [words[index] for index in random.permutation(len(words))]
    leave = random.random(len(words)) < int(kind.removeprefix("drop_")) / 100
    if not leave.any() or leave.all():
        leave = np.arange(len(words)) == random.integers(len(words))
    return [word for word, left in zip(words, leave, strict=True) if not left]


def sensitivity(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    metrics: Sequence[str] | None = None,
    tokenizer: TokenizerName = "treebank",
    sbert: str | None = None,
    device: str = "cpu",
    seed: int = 0,
    original: CaptionScores | None = None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Perturbation → metric → ``value`` after it, and ``kept``, its share of the original value (None where that is 0).

    ``original`` are the scores of the predictions as they are, where they are known already. Other arguments and errors
    as for :func:`rsedge.metrics.captions.score_captions`; OptionError too where ``original`` is of other images or
    metrics.
    """

    def score(captions: Sequence[str]) -> CaptionScores:
        return score_captions(captions, references, metrics=metrics, tokenizer=tokenizer, sbert=sbert, device=device)

    whole = original or score(predictions)
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for kind in PERTURBATIONS:
        spoilt = score(perturb(predictions, kind, seed=seed))
        if spoilt.images != whole.images or not spoilt.scores.keys() <= whole.scores.keys():
            raise OptionError(
                f"original has {', '.join(whole.scores)} of {whole.images} images, asked for are "
                f"{', '.join(spoilt.scores)} of {spoilt.images}: score the same captions with the same metrics"
            )
        result[kind] = {
            name: {"value": found.value, "kept": found.value / whole[name].value if whole[name].value else None}
            for name, found in spoilt.scores.items()
        }
    return result
