"""Classification by prompts, worked out by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rsedge.errors import OptionError
from rsedge.metrics.retrieval import zero_shot_scores

LABELS = ("river", "forest", "port", "road")


def hand_made():
    """Similarities equal the image's own coordinates up to its length."""
    images = np.array(
        [
            [0.9, 0.3, 0.2, 0.1],  # river, first
            [0.5, 0.6, 0.1, 0.2],  # river, second after forest
            [0.1, 0.9, 0.3, 0.2],  # forest, first
            [0.4, 0.3, 0.2, 0.6],  # port, last, taken for road
            [0.9, 0.1, 0.1, 0.1],  # port, failed
        ]
    )
    return images, np.eye(4), ["river", "river", "forest", "port", "port"], LABELS


def test_by_hand():
    scores = zero_shot_scores(*hand_made(), failed=[4], ks=(1, 2, 3, 4, 10))
    assert scores.images == 5
    assert scores.top == {1: pytest.approx(2 / 5), 2: pytest.approx(3 / 5), 3: pytest.approx(3 / 5)}  # 4 says nothing
    assert scores.per_class == {"river": 0.5, "forest": 1.0, "port": 0.0}
    assert scores.mean_per_class == pytest.approx(0.5)
    assert scores.confusion.tolist() == [[1, 1, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]
    found = json.loads(json.dumps(scores.to_dict()))
    assert found["chance_top_1"] == 0.25
    assert found["top_1"] == pytest.approx(0.4)


def test_nothing_of_a_failed_image_matters():
    images, *rest = hand_made()
    broken = images.copy()
    broken[4] = np.nan
    first, second = (zero_shot_scores(values, *rest, failed=[4]) for values in (images, broken))
    assert first.to_dict() == second.to_dict()


def test_a_failed_image_is_right_by_no_chance():
    scores = zero_shot_scores(np.ones((1, 2)), np.array([[1, 1], [1, -1]]), ["a"], ["a", "b"], failed=[0])
    assert scores.top == {1: 0.0}


def test_brute_force():
    random = np.random.default_rng(2)
    images, classes = random.normal(size=(60, 5)), random.normal(size=(7, 5))
    labels = [f"class {n}" for n in range(7)]
    truth = random.choice(labels, 60).tolist()
    cosines = [[i @ c / np.linalg.norm(i) / np.linalg.norm(c) for c in classes] for i in images]
    order = [sorted(labels, key=lambda label, row=row: -row[labels.index(label)]) for row in cosines]
    scores = zero_shot_scores(images, classes, truth, labels)
    assert scores.top == {
        k: pytest.approx(np.mean([label in best[:k] for label, best in zip(truth, order, strict=True)]))
        for k in (1, 3, 5)
    }
    for label, best in zip(truth, order, strict=True):
        scores.confusion[labels.index(label), labels.index(best[0])] -= 1
    assert not scores.confusion.any()


def test_a_tie_is_wrong():
    scores = zero_shot_scores(np.ones((2, 3)), np.ones((4, 3)), ["river", "road"], LABELS)
    assert scores.top == {1: 0.0, 3: 0.0}
    assert scores.confusion.trace() == 0
    assert scores.confusion.sum() == 2


def test_everything_that_does_not_fit_is_told_at_once():
    with pytest.raises(OptionError) as caught:
        zero_shot_scores(np.ones((2, 3)), np.ones((2, 4)), ["a", "sea", "b"], ["a", "a"])
    message = str(caught.value)
    assert "2 embeddings for 3 images and 2 for 2 classes" in message
    assert "embeddings are [2, 3] and [2, 4]" in message
    assert "labels are a, a: give each class once" in message
    assert "images are of b, sea, which is not among the classes" in message
    with pytest.raises(OptionError, match="at least one image"):
        zero_shot_scores(np.ones((0, 3)), np.ones((2, 3)), [], ["a", "b"])
    with pytest.raises(OptionError, match="failed names row 9, expected 0 to 0"):
        zero_shot_scores(np.ones((1, 3)), np.ones((2, 3)), ["a"], ["a", "b"], failed=[9])
