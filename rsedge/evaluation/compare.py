"""Two files of predictions for the same images: which is better, and by more than chance?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rsedge.errors import OptionError
from rsedge.metrics.captions import CaptionScores, score_captions
from rsedge.metrics.compare import Comparison, compare_scores
from rsedge.texts import in_a_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rsedge.evaluation.predictions import Prediction
    from rsedge.metrics.tokens import TokenizerName


def compare_predictions(
    a: Sequence[Prediction],
    b: Sequence[Prediction],
    *,
    metrics: Sequence[str] | None = None,
    tokenizer: TokenizerName = "treebank",
    sbert: str | None = None,
    device: str = "cpu",
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[dict[str, Comparison], CaptionScores, CaptionScores]:
    """Score both, and test the difference B - A in pairs of images.

    Args:
        a, b: Of the same images with the same references, in any order.
        metrics, tokenizer, sbert, device: As for :func:`rsedge.metrics.captions.score_captions`.
        resamples, confidence, seed: As for :func:`rsedge.metrics.compare.compare_scores`.

    Returns:
        Metric → comparison, and the scores of A and of B.

    Raises:
        OptionError: The files are of different images or references, or a value is not accepted.
        BackendError: A metric was named that cannot run here.
    """
    first, second = ({prediction.key: prediction for prediction in side} for side in (a, b))
    problems = []
    for here, there, name, other in ((first, second, "A", "B"), (second, first, "B", "A")):
        if only := [key for key in here if key not in there]:
            problems.append(f"{len(only)} images are in {name} and not in {other}: {in_a_line(only)}")
    differing = [
        key for key, prediction in first.items() if key in second and prediction.references != second[key].references
    ]
    if differing:
        problems.append(f"{len(differing)} images have other references in A than in B: {in_a_line(differing)}")
    if problems:
        raise OptionError(
            "a paired test needs the same images and references:\n" + "\n".join(f"  {text}" for text in problems)
        )
    scores = [
        score_captions(
            [side[key].caption for key in first],
            [side[key].references for key in first],
            metrics=metrics,
            tokenizer=tokenizer,
            sbert=sbert,
            device=device,
        )
        for side in (first, second)
    ]
    found = compare_scores(scores[0], scores[1], resamples=resamples, confidence=confidence, seed=seed)
    return found, scores[0], scores[1]
