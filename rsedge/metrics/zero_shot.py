"""Classification by prompts: an image is of the class whose prompt it is most similar to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsedge.errors import OptionError
from rsedge.metrics.retrieval import TIE, lost_rows
from rsedge.pixels import unit_rows

Floats = NDArray[np.floating[Any]]

KS = (1, 3, 5, 10)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ZeroShotScores:
    """How often the right class is among the nearest.

    Attributes:
        labels: The classes, in the order of ``confusion``.
        images: How many were classified, failed ones included.
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
    ks: Sequence[int] = KS,
) -> ZeroShotScores:
    """Top-k accuracy, pessimistic: a class as similar as the right one, as in retrieval, comes before it.

    Args:
        images: float [N, D]; the rows of ``failed`` do not matter.
        classes: float [C, D], one row per label.
        truth: The class of each image.
        labels: The classes.
        failed: Images without an embedding: wrong at every k.
        ks: Those not below the number of classes are left out, as they would be 1 whatever the model.

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
