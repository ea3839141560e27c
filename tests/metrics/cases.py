"""Captions to score: made up, seeded, with all that goes wrong in real ones."""

from __future__ import annotations

import numpy as np

WORDS = np.array(
    ["a", "by", "near", "two", "many", "green", "river", "bridge", "road", "field", "house", "tree", "port", "boat"]
)

PREDICTIONS = [
    "A river near a green field .",
    "two roads by a bridge",
    "the the the the the",
    "many boats in the port, near houses.",
    "a house",
    "",
]
REFERENCES = [
    ["a river by a green field", "a river near a field .", "a river near a field ."],  # one twice
    ["two roads near the bridge and a river"],  # one alone
    ["the port of the river", "boats"],
    ["many boats in a port", "many boats are near the houses", "."],  # one without a word
    ["a house by a road", "a big house near two trees"],
    ["a field", "green field"],
]


def random_captions(seed: int, images: int) -> tuple[list[str], list[str], list[list[str]]]:
    """Predictions of A, those of B, which are nearer to the references, and five references per image."""
    random = np.random.default_rng(seed)

    def altered(words: np.ndarray, share: float) -> str:
        return " ".join(np.where(random.random(len(words)) < share, random.choice(WORDS, len(words)), words))

    worse, better, references = [], [], []
    for _ in range(images):
        words = random.choice(WORDS, random.integers(6, 12))
        references.append([altered(words, 0.3) for _ in range(5)])
        short = words[: len(words) - random.integers(3)]  # so that brevity is penalised, a little
        worse.append(altered(short, 0.5))
        better.append(altered(short, 0.2))
    return worse, better, references
