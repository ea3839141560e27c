"""How much each metric notices: captions are spoilt on purpose, seeded, and scored again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rsedge.errors import OptionError
from rsedge.metrics.captions import CaptionScores, score_captions

if TYPE_CHECKING:
    from rsedge.metrics.tokens import TokenizerName

PERTURBATIONS = {
    "drop_10": "each word left out with probability 0.1, at least one",
    "drop_30": "each word left out with probability 0.3, at least one",
    "swap": "two neighbouring words exchanged",
    "shuffle": "all words in random order",
    "other_image": "the caption of another image",
}
"""Perturbation → what it does; from what hardly changes the meaning to what changes it altogether."""


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
