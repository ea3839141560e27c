"""What embeddings are good for: zero-shot classification, and retrieval between images and captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rsedge.errors import OptionError
from rsedge.evaluation.interfaces import Progress, read_blocks
from rsedge.metrics.retrieval import (
    RetrievalScores,
    ZeroShotScores,
    chance_retrieval,
    retrieval_scores,
    zero_shot_scores,
)
from rsedge.runtime.prompts import TEMPLATES, class_embeddings

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rsedge.datasets.examples import Example
    from rsedge.evaluation.interfaces import EmbeddingModel


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ZeroShotReport:
    """Zero-shot classification of a data set."""

    scores: ZeroShotScores
    templates: tuple[str, ...]
    """Of the prompts."""
    failed: dict[str, str]
    """Key → why an image has no embedding; counted as wrong."""

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**self.scores.to_dict(), "templates": list(self.templates), "failed": self.failed}


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class RetrievalReport:
    """Retrieval between the images and captions of a data set."""

    scores: RetrievalScores
    chance: RetrievalScores
    """What random embeddings score on average."""
    images: int
    captions: int
    failed: dict[str, str]
    """Key → why an image has no embedding; its queries count as misses."""

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "images": self.images,
            "captions": self.captions,
            **self.scores.to_dict(),
            "chance": self.chance.to_dict(),
            "failed": self.failed,
        }


def classes_of(source: str, split: str) -> list[str]:
    """The classes of a whole split, sorted, for a part of it: fewer images make the test smaller, not easier.
    OptionError where the split cannot be read.
    """
    from rsedge.datasets.layouts import load_labelled

    examples = load_labelled(source, splits=(split,), skip_bad=True, check=False)
    return sorted({str(example.label) for example in examples})


def evaluate_zero_shot(
    model: EmbeddingModel,
    examples: Sequence[Example],
    *,
    labels: Sequence[str] | None = None,
    templates: Sequence[str] = TEMPLATES,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> ZeroShotReport:
    """Classify images by the prompt that is nearest.

    Args:
        model: Embeds prompts and images.
        examples: Each with a ``label``.
        labels: The classes to choose from, as the labels spell them; None takes those that occur, sorted.
        templates: Each with ``{category}``; the prompts of a class are averaged.
        skip_bad: Count an image that cannot be read as wrong, instead of failing.
        progress: As for :func:`rsedge.evaluation.interfaces.read_blocks`.

    Raises:
        OptionError: An image has no class, or one that is not among ``labels``; a template is bad; images cannot be
            read.
    """
    if bare := [example.key for example in examples if example.label is None]:
        raise OptionError(
            f"{len(bare)} of {len(examples)} images have no class, the first is {bare[0]}: give class folders, or "
            "records with a label"
        )
    truth = [str(example.label) for example in examples]
    classes = sorted(set(truth)) if labels is None else list(labels)
    # Before the images, so that a bad class or template is found at once.
    if unknown := sorted(set(truth) - set(classes)):
        raise OptionError(f"images are of {', '.join(unknown)}, which is not among the labels {', '.join(classes)}")
    anchors = class_embeddings(classes, model.embed_texts, templates)
    vectors, failed = _embed_images(model, examples, skip_bad=skip_bad, progress=progress)
    return ZeroShotReport(
        scores=zero_shot_scores(vectors, anchors, truth, classes, failed=list(failed)),
        templates=tuple(templates),
        failed={examples[index].key: reason for index, reason in failed.items()},
    )


def evaluate_retrieval(
    model: EmbeddingModel, examples: Sequence[Example], *, skip_bad: bool = False, progress: Progress | None = None
) -> RetrievalReport:
    """Find captions by image and images by caption; with ``skip_bad`` the queries of an image that cannot be read are
    misses.

    Raises:
        OptionError: An image has no caption, or images cannot be read.
    """
    counts = [len(example.captions) for example in examples]
    if bare := [example.key for example in examples if not example.captions]:
        raise OptionError(f"{len(bare)} of {len(examples)} images have no caption, the first is {bare[0]}")
    vectors, failed = _embed_images(model, examples, skip_bad=skip_bad, progress=progress)
    texts = [text for example in examples for text in example.captions]
    owners = np.repeat(np.arange(len(examples)), counts)
    return RetrievalReport(
        scores=retrieval_scores(vectors, model.embed_texts(texts), owners, failed=list(failed)),
        chance=chance_retrieval(counts),
        images=len(examples),
        captions=len(texts),
        failed={examples[index].key: reason for index, reason in failed.items()},
    )


def _embed_images(
    model: EmbeddingModel, examples: Sequence[Example], *, skip_bad: bool, progress: Progress | None
) -> tuple[NDArray[np.float32], dict[int, str]]:
    """A vector per example, zero for those in the second value: index → why it has none."""
    failed: dict[int, str] = {}
    vectors: NDArray[np.float32] | None = None
    for indices, images, unreadable in read_blocks(examples, skip_bad=skip_bad, progress=progress):
        failed |= unreadable
        if images:
            found = model.embed_images(images)
            if vectors is None:
                vectors = np.zeros((len(examples), found.shape[1]), np.float32)
            vectors[indices] = found
    if vectors is None:
        raise OptionError(f"none of {len(examples)} images can be read, so there is nothing to evaluate")
    return vectors, failed
