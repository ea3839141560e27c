"""Ranks against brute force, chance against simulation, and the models that cheat."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rsedge.errors import OptionError
from rsedge.metrics.retrieval import TIE, chance_retrieval, retrieval_scores
from rsedge.pixels import unit_rows


def case(seed: int, images: int = 23, width: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images with one to four texts each, in random order, the texts near their image."""
    random = np.random.default_rng(seed)
    owner = random.permutation(np.repeat(np.arange(images), random.integers(1, 5, images)))
    pictures = random.normal(size=(images, width))
    return pictures, pictures[owner] + random.normal(scale=0.7, size=(len(owner), width)), owner


def brute_force(images, texts, owner, failed=()) -> tuple[list[int], list[int]]:
    """Ranks of images' best text and of texts' image, one comparison at a time."""

    def cosine(i: int, j: int) -> float:
        return float(images[i] @ texts[j] / np.linalg.norm(images[i]) / np.linalg.norm(texts[j]))

    forward, backward = [], []
    for i in range(len(images)):
        if i in failed:
            forward.append(len(texts) + 1)
            continue
        best = max(cosine(i, j) for j in range(len(texts)) if owner[j] == i)
        forward.append(1 + sum(cosine(i, j) >= best - TIE for j in range(len(texts)) if owner[j] != i))
    for j, own in enumerate(owner):
        others = [i for i in range(len(images)) if i != own and i not in failed]
        rank = 1 + sum(cosine(i, j) >= cosine(own, j) - TIE for i in others) if own not in failed else len(images) + 1
        backward.append(rank)
    return forward, backward


@pytest.mark.parametrize("failed", [(), (0, 7, 22)])
@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_brute_force(chunk, failed):
    images, texts, owner = case(1)
    forward, backward = brute_force(images, texts, owner, failed)
    broken = images.copy()
    broken[list(failed)] = np.nan  # rows of failed images do not matter
    scores = retrieval_scores(broken, texts, owner, failed=failed, chunk=chunk)
    for direction, ranks in ((scores.image_to_text, forward), (scores.text_to_image, backward)):
        assert direction.recall == {k: pytest.approx(sum(rank <= k for rank in ranks) / len(ranks)) for k in (1, 5, 10)}
        assert direction.median_rank == np.median(ranks)
        assert direction.queries == len(ranks)
    recalls = [*scores.image_to_text.recall.values(), *scores.text_to_image.recall.values()]
    assert scores.mean_recall == pytest.approx(np.mean(recalls))
    assert 0 < scores.mean_recall < 1


def test_by_hand():
    images = np.array([[1, 0], [0, 1], [1, 1]], np.float32)
    texts = np.array([[2, 0], [0, 3], [1, 0.1]], np.float32)  # the third belongs to image 2, but lies by image 0
    scores = retrieval_scores(images, texts, [0, 1, 2], ks=(1, 2, 3))
    assert scores.image_to_text.recall == {1: 1.0, 2: 1.0, 3: 1.0}
    assert scores.text_to_image.recall == {1: pytest.approx(2 / 3), 2: 1.0, 3: 1.0}
    assert (scores.image_to_text.median_rank, scores.text_to_image.median_rank) == (1.0, 1.0)


def test_a_failed_image_stands_before_none():
    scores = retrieval_scores(np.eye(2), np.array([[-1.0, 0.0], [0.0, 1.0]]), [0, 1], failed=[1], ks=(1,))
    assert scores.text_to_image.recall[1] == 0.5  # the first text is opposite to its image, which is the only one
    assert scores.image_to_text.recall[1] == 0.0  # but a failed image's text is still among all texts


def test_length_does_not_matter():
    images, texts, owner = case(2)
    scale = np.random.default_rng(0).uniform(0.01, 100, (len(texts), 1))
    assert retrieval_scores(images * 5, texts * scale, owner) == retrieval_scores(images, texts, owner)


def test_a_model_that_gives_one_answer_scores_nothing():
    texts = np.random.default_rng(0).normal(size=(40, 8))
    scores = retrieval_scores(np.ones((20, 8)), texts, np.repeat(np.arange(20), 2))
    assert scores.text_to_image.recall == {1: 0.0, 5: 0.0, 10: 0.0}
    same = retrieval_scores(np.ones((20, 8)), np.ones((40, 8)), np.repeat(np.arange(20), 2))
    assert same.mean_recall == 0


def test_a_caption_that_two_images_share_is_right_for_neither():
    eye = np.eye(3)
    shared = retrieval_scores(eye, np.array([eye[0], eye[1], eye[0]]), [0, 1, 2], ks=(1,))
    assert shared.image_to_text.recall[1] == pytest.approx(1 / 3)
    assert shared.text_to_image.recall[1] == pytest.approx(2 / 3)


@pytest.mark.parametrize("counts", [[5] * 6, [1, 2, 3, 4, 5], [1, 30]])
def test_chance_by_simulation(counts):
    random = np.random.default_rng(5)
    owner = np.repeat(np.arange(len(counts)), counts)
    runs = 6000
    forward, backward = dict.fromkeys((1, 5, 10), 0.0), dict.fromkeys((1, 5, 10), 0.0)
    for _ in range(runs):
        first = [int(np.argmax(owner[random.permutation(len(owner))] == image)) for image in range(len(counts))]
        place = random.integers(len(counts), size=len(owner))
        for k in forward:
            forward[k] += np.mean(np.array(first) < k) / runs
            backward[k] += np.mean(place < k) / runs
    chance = chance_retrieval(counts)
    tolerance = 4 * 0.5 / np.sqrt(runs)
    assert chance.image_to_text.recall == {k: pytest.approx(value, abs=tolerance) for k, value in forward.items()}
    assert chance.text_to_image.recall == {k: pytest.approx(value, abs=tolerance) for k, value in backward.items()}
    assert (chance.image_to_text.queries, chance.text_to_image.queries) == (len(counts), sum(counts))
    assert (chance.image_to_text.median_rank, chance.text_to_image.median_rank) == (None, (len(counts) + 1) / 2)


def test_random_embeddings_are_at_chance():
    random = np.random.default_rng(8)
    owner = np.repeat(np.arange(400), 5)
    scores = retrieval_scores(random.normal(size=(400, 16)), random.normal(size=(2000, 16)), owner)
    chance = chance_retrieval([5] * 400)
    assert scores.mean_recall == pytest.approx(chance.mean_recall, abs=0.01)
    assert scores.text_to_image.median_rank == pytest.approx(chance.text_to_image.median_rank, rel=0.1)


def test_ready_for_json():
    found = json.loads(json.dumps(retrieval_scores(*case(4)).to_dict()))
    assert list(found) == ["image_to_text", "text_to_image", "mean_recall"]
    assert list(found["image_to_text"]) == ["recall_1", "recall_5", "recall_10", "median_rank", "queries"]


@pytest.mark.parametrize(
    ("images", "texts", "owner", "failed", "message"),
    [
        (np.ones((2, 3)), np.ones((2, 4)), [0, 1], (), r"embeddings are \[2, 3\] and \[2, 4\]"),
        (np.ones((0, 3)), np.ones((0, 3)), [], (), r"expected \[N, D\]"),
        (np.ones((2, 3)), np.ones((2, 3)), [0], (), r"image_of_text is \[1\] for 2 texts"),
        (np.ones((2, 3)), np.ones((2, 3)), [0, 2], (), "goes from 0 to 2, expected 0 to 1"),
        (np.ones((2, 3)), np.ones((2, 3)), [-1, 1], (), "goes from -1 to 1"),
        (np.ones((3, 3)), np.ones((2, 3)), [0, 2], (), "1 of 3 images have no text, the first is number 1"),
        (np.ones((2, 3)), np.zeros((2, 3)), [0, 1], (), "2 of 2 text embeddings are zero or not finite"),
        (np.full((2, 3), np.nan), np.ones((2, 3)), [0, 1], (0,), "1 of 2 image embeddings .* the first is number 1"),
        (np.ones((2, 3)), np.ones((2, 3)), [0, 1], (2,), "failed names row 2, expected 0 to 1"),
        (np.ones((2, 3)), np.ones((2, 3)), [0, 1], (-1,), "failed names row -1"),
    ],
)
def test_what_does_not_fit(images, texts, owner, failed, message):
    with pytest.raises(OptionError, match=message):
        retrieval_scores(images, texts, owner, failed=failed)


@pytest.mark.parametrize("counts", [[], [3, 0]])
def test_chance_of_nothing(counts):
    with pytest.raises(OptionError, match="at least one caption of each"):
        chance_retrieval(counts)


def test_unit_rows():
    found = unit_rows(np.array([[3.0, 4.0], [0.0, 1e-20]]), "image")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [[0.6, 0.8], [0, 1]], atol=1e-7)
    with pytest.raises(OptionError, match="1 of 2 image embeddings are zero"):
        unit_rows(np.array([[1.0], [np.inf]]), "image")
