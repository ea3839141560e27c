"""How well embeddings serve: images that find their captions, captions that find their images, images their class.

Retrieval follows the protocol of Karpathy and Fei-Fei: image → text counts a query as right at k if any of the image's
captions is among the k nearest of all captions; text → image asks for the caption's one image among all images. Ranks
are pessimistic: whatever is as similar as the right answer, to within :data:`TIE`, stands before it. So a model that
gives every image the same embedding scores 0, and so does a caption that two images share. Classification is by
prompts: an image is of the class whose prompt it is most similar to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsedge.errors import OptionError
from rsedge.pixels import unit_rows

Ints = NDArray[np.int64]
Floats = NDArray[np.floating[Any]]

TIE = 1e-6
"""Cosines closer than this are equal: float32 products differ by less with the place of a row in its matrix."""

KS = (1, 5, 10)
TOP_KS = (1, 3, 5, 10)
"""k of retrieval and of classification."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Direction:
    """Retrieval one way.

    Attributes:
        recall: k → share of queries with a right answer among the first k.
        median_rank: From 1; None where it does not follow from chance alone.
        queries: Those without an embedding included.
    """

    recall: dict[int, float]
    median_rank: float | None
    queries: int

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON: ``recall_1``, …, ``median_rank``, ``queries``."""
        recall = {f"recall_{k}": value for k, value in self.recall.items()}
        return {**recall, "median_rank": self.median_rank, "queries": self.queries}


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalScores:
    """Retrieval both ways; ``mean_recall`` is the mean of all recalls."""

    image_to_text: Direction
    text_to_image: Direction

    @property
    def mean_recall(self) -> float:
        """The mean of the recalls, both ways, at every k."""
        recalls = [*self.image_to_text.recall.values(), *self.text_to_image.recall.values()]
        return sum(recalls) / len(recalls)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "image_to_text": self.image_to_text.to_dict(),
            "text_to_image": self.text_to_image.to_dict(),
            "mean_recall": self.mean_recall,
        }


def retrieval_scores(
    images: Floats,
    texts: Floats,
    image_of_text: Sequence[int] | Ints,
    *,
    failed: Sequence[int] = (),
    ks: Sequence[int] = KS,
    chunk: int = 256,
) -> RetrievalScores:
    """Recall at ``ks`` and median rank, in memory that grows with ``chunk`` times the larger side.

    Args:
        images: float [N, D], normalised here; the rows of ``failed`` do not matter.
        texts: float [M, D], every image's captions, in any order.
        image_of_text: For each text the row of its image, int [M]; every image has at least one.
        failed: Images without an embedding: nothing finds them and they find nothing, and they count all the same.
        ks: How many answers count.
        chunk: Queries compared at a time.

    Raises:
        OptionError: Shapes do not fit, an image has no text, or a vector that is zero or not finite.
    """
    owner = np.asarray(image_of_text, np.int64)
    lost = lost_rows(failed, len(images))
    problems = []
    if images.ndim != 2 or texts.ndim != 2 or not len(images) or images.shape[1:] != texts.shape[1:]:
        problems.append(f"embeddings are {list(images.shape)} and {list(texts.shape)}, expected [N, D] and [M, D]")
    if owner.shape != texts.shape[:1]:
        problems.append(f"image_of_text is {list(owner.shape)} for {len(texts)} texts: give one row per text")
    elif len(owner) and not (owner.min() >= 0 and owner.max() < len(images)):
        problems.append(f"image_of_text goes from {owner.min()} to {owner.max()}, expected 0 to {len(images) - 1}")
    elif bare := sorted(set(range(len(images))) - set(owner.tolist())):
        problems.append(f"{len(bare)} of {len(images)} images have no text, the first is number {bare[0]}")
    if problems:
        raise OptionError("; ".join(problems))
    images = unit_rows(np.where(lost[:, None], 1.0, images), "image") * ~lost[:, None]
    texts = unit_rows(texts, "text")

    text_ranks = np.empty(len(texts), np.int64)
    for start in range(0, len(texts), chunk):
        rows = slice(start, start + chunk)
        similarity = texts[rows] @ images.T
        own = np.take_along_axis(similarity, owner[rows, None], axis=1)
        similarity[:, lost] = -np.inf
        np.put_along_axis(similarity, owner[rows, None], -np.inf, axis=1)
        text_ranks[rows] = 1 + (similarity >= own - TIE).sum(axis=1)
    beyond = max(len(images), len(texts), *ks) + 1  # a rank that no k reaches, however few images there are
    text_ranks[lost[owner]] = beyond

    image_ranks = np.empty(len(images), np.int64)
    for start in range(0, len(images), chunk):
        rows = slice(start, start + chunk)
        similarity = images[rows] @ texts.T
        own = owner[None] == np.arange(len(images))[rows, None]
        best = np.where(own, similarity, -np.inf).max(axis=1)
        image_ranks[rows] = 1 + ((similarity >= best[:, None] - TIE) & ~own).sum(axis=1)
    image_ranks[lost] = beyond
    return RetrievalScores(image_to_text=_direction(image_ranks, ks), text_to_image=_direction(text_ranks, ks))


def chance_retrieval(captions_per_image: Sequence[int], *, ks: Sequence[int] = KS) -> RetrievalScores:
    """What random embeddings score on average, exactly: of M texts in random order, c of them right, the first k hold
    none with probability C(M - c, k) / C(M, k). OptionError where there is no image, or one without a caption.
    """
    if not len(captions_per_image) or min(captions_per_image) < 1:
        raise OptionError("chance needs at least one image, and at least one caption of each")
    images, texts = len(captions_per_image), sum(captions_per_image)

    def found(right: int, k: int) -> float:
        return 1.0 - math.comb(texts - right, k) / math.comb(texts, k) if k < texts else 1.0

    forward = {k: math.fsum(found(count, k) for count in captions_per_image) / images for k in ks}
    backward = {k: min(k / images, 1.0) for k in ks}
    return RetrievalScores(
        image_to_text=Direction(recall=forward, median_rank=None, queries=images),
        text_to_image=Direction(recall=backward, median_rank=(images + 1) / 2, queries=texts),
    )


def lost_rows(failed: Sequence[int], count: int) -> NDArray[np.bool_]:
    """Bool [count], true at the rows named; OptionError where there is no such row."""
    if wrong := [row for row in failed if not 0 <= row < count]:
        raise OptionError(f"failed names row {wrong[0]}, expected 0 to {count - 1}")
    lost = np.zeros(count, bool)
    lost[list(failed)] = True
    return lost


def _direction(ranks: Ints, ks: Sequence[int]) -> Direction:
    recall = {k: float((ranks <= k).mean()) for k in ks}
    return Direction(recall=recall, median_rank=float(np.median(ranks)), queries=len(ranks))


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ZeroShotScores:
    """How often the right class is among the nearest.

    Attributes:
        labels: The classes, in the order of ``confusion``.
        images: Failed ones included.
        top: k → share of images whose class is among the k nearest.
        per_class: Class → share of its images that are right at 1; only classes that have images.
        confusion: int64 [C, C + 1], rows the truth, columns the answer; the last column counts failed images.
    """

    labels: tuple[str, ...]
    images: int
    top: dict[int, float]
    per_class: dict[str, float]
    confusion: NDArray[np.int64]

    @property
    def mean_per_class(self) -> float:
        """The mean of ``per_class``: accuracy where every class weighs the same."""
        return sum(self.per_class.values()) / len(self.per_class)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "images": self.images,
            **{f"top_{k}": value for k, value in self.top.items()},
            "mean_per_class": self.mean_per_class,
            "chance_top_1": 1 / len(self.labels),
            "per_class": self.per_class,
            "labels": list(self.labels),
            "confusion": self.confusion.tolist(),
        }


def zero_shot_scores(
    images: Floats,
    classes: Floats,
    truth: Sequence[str],
    labels: Sequence[str],
    *,
    failed: Sequence[int] = (),
    ks: Sequence[int] = TOP_KS,
) -> ZeroShotScores:
    """Top-k accuracy, pessimistic: a class as similar as the right one, as in retrieval, comes before it.

    Args:
        images: float [N, D]; the rows of ``failed``, images without an embedding, do not matter: they are wrong at
            every k. classes: float [C, D], one row per label. truth: The class of each image, one of ``labels``. ks:
            Those not below the number of classes are left out, as they would be 1 whatever the model.

    Raises:
        OptionError: Sizes differ, there is no image, a class occurs twice, or an image is of one not among the labels.
    """
    problems = []
    if not len(truth) or len(images) != len(truth) or len(classes) != len(labels):
        problems.append(
            f"{len(images)} embeddings for {len(truth)} images and {len(classes)} for {len(labels)} classes: "
            "give one of each, and at least one image"
        )
    if images.ndim != 2 or classes.ndim != 2 or images.shape[1:] != classes.shape[1:]:
        problems.append(f"embeddings are {list(images.shape)} and {list(classes.shape)}, expected [N, D] and [C, D]")
    if len(set(labels)) < len(labels):
        problems.append(f"labels are {', '.join(labels)}: give each class once")
    if unknown := sorted(set(truth) - set(labels)):
        problems.append(
            f"images are of {', '.join(unknown)}, which is not among the classes {', '.join(labels)}: add it to the "
            "labels, or leave its images out"
        )
    if problems:
        raise OptionError("; ".join(problems))
    lost = lost_rows(failed, len(truth))
    column = {label: index for index, label in enumerate(labels)}
    right = np.array([column[label] for label in truth])
    found = np.where(lost[:, None], np.ones((1, classes.shape[1])), images)
    similarity = unit_rows(found, "image") @ unit_rows(classes, "class").T
    own = np.take_along_axis(similarity, right[:, None], axis=1)
    np.put_along_axis(similarity, right[:, None], -np.inf, axis=1)
    ranks = 1 + (similarity >= own - TIE).sum(axis=1)
    ranks[lost] = len(labels) + 1
    answer = np.where(ranks == 1, right, similarity.argmax(axis=1))
    answer[lost] = len(labels)
    confusion = np.zeros((len(labels), len(labels) + 1), np.int64)
    np.add.at(confusion, (right, answer), 1)
    totals = confusion.sum(axis=1)
    return ZeroShotScores(
        labels=tuple(labels),
        images=len(truth),
        top={k: float((ranks <= k).mean()) for k in ks if k < len(labels)},
        per_class={label: float(confusion[i, i] / totals[i]) for i, label in enumerate(labels) if totals[i]},
        confusion=confusion,
    )
