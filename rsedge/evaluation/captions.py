"""Captions of a data set: predict them, score them beside a fixed caption, compare those of two models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from zlib import crc32

from rsedge.errors import OptionError
from rsedge.evaluation.interfaces import Progress, read_blocks
from rsedge.evaluation.predictions import Prediction
from rsedge.metrics.captions import CaptionScores, score_captions
from rsedge.metrics.compare import Comparison, compare_scores
from rsedge.metrics.text import TextStatistics, consensus_caption, most_frequent_caption, text_statistics
from rsedge.texts import in_a_line

if TYPE_CHECKING:
    from rsedge.datasets.examples import Example
    from rsedge.evaluation.interfaces import CaptionModel
    from rsedge.metrics.text import TokenizerName


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Baseline:
    """One caption, the same for every image, and its scores."""

    caption: str
    scores: CaptionScores

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"caption": self.caption, "scores": self.scores.to_dict()["scores"]}


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class CaptionReport:
    """How good predicted captions are."""

    scores: CaptionScores
    predictions: TextStatistics
    references: TextStatistics
    baselines: dict[str, Baseline]
    """``most_frequent`` and ``consensus`` training caption; none without training captions."""
    failed: dict[str, str]
    """Key → why there is no caption; scored as an empty one."""

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            **self.scores.to_dict(),
            "text": {"predictions": self.predictions.to_dict(), "references": self.references.to_dict()},
            "baselines": {name: baseline.to_dict() for name, baseline in self.baselines.items()},
            "failed": self.failed,
        }


def predict_captions(
    model: CaptionModel, examples: Sequence[Example], *, skip_bad: bool = False, progress: Progress | None = None
) -> tuple[Prediction, ...]:
    """A prediction per example, in order, with the example's captions as references.

    Sampling is seeded by the example's key, so that an image's caption does not depend on which others are evaluated.
    ``skip_bad`` and ``progress`` as for :func:`rsedge.evaluation.interfaces.read_blocks`; with ``skip_bad`` an image
    that cannot be read has an empty caption and an error.

    Raises:
        OptionError: Images cannot be read, or there are none.
    """
    captions: dict[int, str] = {}
    errors: dict[int, str] = {}
    for indices, images, failed in read_blocks(examples, skip_bad=skip_bad, progress=progress):
        keys = [crc32(examples[index].key.encode()) for index in indices]
        captions.update(zip(indices, model.caption(images, keys=keys), strict=True))
        errors |= failed
    return tuple(
        Prediction(example.key, captions.get(index, ""), example.captions, errors.get(index))
        for index, example in enumerate(examples)
    )


def score_predictions(
    predictions: Sequence[Prediction],
    *,
    metrics: Sequence[str] | None = None,
    tokenizer: TokenizerName = "treebank",
    sbert: str | None = None,
    device: str = "cpu",
    training_captions: Sequence[str] = (),
) -> CaptionReport:
    """Score predictions against their references, of which each has at least one.

    The baselines are taken from ``training_captions``, whose words count as seen; without any there are no baselines.
    Other arguments and errors as for :func:`rsedge.metrics.captions.score_captions`.
    """
    if bare := [prediction.key for prediction in predictions if not prediction.references]:
        raise OptionError(
            f"{len(bare)} of {len(predictions)} predictions have no references, the first is of {bare[0]}: give the "
            "data set they are of (--data), or references in the file"
        )
    texts = [prediction.caption for prediction in predictions]
    references = [prediction.references for prediction in predictions]

    def score(captions: Sequence[str]) -> CaptionScores:
        return score_captions(captions, references, metrics=metrics, tokenizer=tokenizer, sbert=sbert, device=device)

    scores = score(texts)
    known = list(training_captions) or None
    rivals = {"most_frequent": most_frequent_caption, "consensus": consensus_caption} if known else {}
    fixed = {name: choose(known or [], tokenizer=tokenizer) for name, choose in rivals.items()}
    return CaptionReport(
        scores=scores,
        predictions=text_statistics(texts, known=known, tokenizer=tokenizer),
        references=text_statistics([text for group in references for text in group], known=known, tokenizer=tokenizer),
        baselines={
            name: Baseline(caption=caption, scores=score([caption] * len(texts))) for name, caption in fixed.items()
        },
        failed={prediction.key: prediction.error for prediction in predictions if prediction.error is not None},
    )


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
    """Score two sets of predictions, and test the difference B - A in pairs of images.

    They are of the same images with the same references, in any order. Other arguments as for
    :func:`rsedge.metrics.captions.score_captions` and :func:`rsedge.metrics.compare.compare_scores`.

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
        raise OptionError("\n  ".join(["a paired test needs the same images and references:", *problems]))

    def score(side: dict[str, Prediction]) -> CaptionScores:
        captions, references = [side[key].caption for key in first], [side[key].references for key in first]
        return score_captions(captions, references, metrics=metrics, tokenizer=tokenizer, sbert=sbert, device=device)

    scores = score(first), score(second)
    return compare_scores(*scores, resamples=resamples, confidence=confidence, seed=seed), *scores
