"""What any caption model must beat: one fixed caption for every image."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

from rsedge.errors import OptionError
from rsedge.metrics.tokens import TokenizerName, tokenize


def most_frequent_caption(captions: Sequence[str], *, tokenizer: TokenizerName = "treebank") -> str:
    """The caption that occurs most often, word for word, as it was first written; of several the first in the alphabet.

    Raises:
        OptionError: There is no caption with a word in it.
    """
    counts, written = _distinct(captions, tokenizer)
    return written[min(counts, key=lambda text: (-counts[text], text))]


def consensus_caption(captions: Sequence[str], *, tokenizer: TokenizerName = "treebank") -> str:
    """The caption most like all others: the largest mean cosine of its words' counts with those of every caption.

    One pass over the captions: the mean of cosines is the product with the mean of the unit vectors.

    Raises:
        OptionError: There is no caption with a word in it.
    """
    counts, written = _distinct(captions, tokenizer)
    vectors = {}
    mean: defaultdict[str, float] = defaultdict(float)
    for text, times in counts.items():
        words = Counter(text.split())
        length = math.sqrt(sum(count * count for count in words.values()))
        vectors[text] = {word: count / length for word, count in words.items()}
        for word, value in vectors[text].items():
            mean[word] += times * value
    closeness = {
        text: math.fsum(value * mean[word] for word, value in vector.items()) for text, vector in vectors.items()
    }
    return written[min(closeness, key=lambda text: (-closeness[text], text))]


def _distinct(captions: Sequence[str], tokenizer: TokenizerName) -> tuple[Counter[str], dict[str, str]]:
    """How often each different caption with a word in it occurs, tokenized, and how it was first written."""
    texts = tokenize(captions, tokenizer)
    counts = Counter(text for text in texts if text)
    if not counts:
        raise OptionError(f"none of {len(captions)} captions has a word in it: a baseline needs training captions")
    written: dict[str, str] = {}
    for text, caption in zip(texts, captions, strict=True):
        written.setdefault(text, caption)
    return counts, written
