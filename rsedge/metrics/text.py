"""What captions look like as text: how long, how rich, how varied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, pstdev
from typing import Any

from rsedge.errors import OptionError
from rsedge.metrics.tokens import TokenizerName, tokenize


@dataclass(frozen=True, slots=True, kw_only=True)
class TextStatistics:
    """Length, vocabulary and variety of captions. Captions that are equal word for word count as the same.

    Attributes:
        captions: How many.
        empty: How many have no word.
        words: All words together.
        words_mean, words_sd, words_min, words_max: Words per caption; the deviation is the population's.
        vocabulary: Different words.
        unseen_share: Share of the words that are not in the known captions; None where none were given.
        distinct: Different captions.
        distinct_share: ``distinct`` over ``captions``.
        most_frequent: The caption given most often; of several the first in the alphabet.
        most_frequent_share: Share of the captions that are it.
    """

    captions: int
    empty: int
    words: int
    words_mean: float
    words_sd: float
    words_min: int
    words_max: int
    vocabulary: int
    unseen_share: float | None
    distinct: int
    distinct_share: float
    most_frequent: str
    most_frequent_share: float

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def text_statistics(
    captions: Sequence[str], *, known: Iterable[str] | None = None, tokenizer: TokenizerName = "treebank"
) -> TextStatistics:
    """Statistics of ``captions``, in words as the metrics count them (lower case, no punctuation).

    Args:
        captions: At least one.
        known: Captions whose words are not unseen, as a rule those of the training split.
        tokenizer: ``treebank`` or ``ptb``.

    Raises:
        OptionError: There is no caption.
    """
    if not captions:
        raise OptionError("there is no caption to describe: give at least one")
    texts = tokenize(captions, tokenizer)
    lengths = [len(text.split()) for text in texts]
    counts = Counter(word for text in texts for word in text.split())
    total = sum(lengths)
    unseen = None
    if known is not None:
        seen = {word for text in tokenize(list(known), tokenizer) for word in text.split()}
        unseen = sum(count for word, count in counts.items() if word not in seen) / max(total, 1)
    variety = Counter(texts)
    text, count = min(variety.items(), key=lambda item: (-item[1], item[0]))
    return TextStatistics(
        captions=len(texts),
        empty=lengths.count(0),
        words=total,
        words_mean=fmean(lengths),
        words_sd=pstdev(lengths),
        words_min=min(lengths),
        words_max=max(lengths),
        vocabulary=len(counts),
        unseen_share=unseen,
        distinct=len(variety),
        distinct_share=len(variety) / len(texts),
        most_frequent=text,
        most_frequent_share=count / len(texts),
    )
