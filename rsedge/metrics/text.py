"""Captions as words, as the metrics count them: how long, rich and varied they are, and the fixed captions that any
model must beat.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from statistics import fmean, pstdev
from typing import Any, Literal, get_args

from rsedge.errors import BackendError, OptionError
from rsedge.metrics.java import ptb_tokens

TokenizerName = Literal["treebank", "ptb"]
TOKENIZERS: tuple[TokenizerName, ...] = get_args(TokenizerName)

_SENTENCE_END = re.compile(r"(?<=[^\W\d_]{2}[.!?])\s+")  # two letters before: not the dots of U.S.
_QUOTES = str.maketrans({"\u2019": "'", "\u2018": "`", "\u201c": '"', "\u201d": '"'})


def tokenize(captions: Sequence[str], tokenizer: TokenizerName = "treebank") -> list[str]:
    """Each caption as lower-case words with a space between them, punctuation dropped as pycocoevalcap drops it.

    ``ptb`` is Stanford's in Java, what the field reports with. ``treebank`` is nltk's, the same rules in Python: on the
    49,140 captions of RSICD it differs for 2.

    Raises:
        OptionError: There is no such tokenizer.
        BackendError: nltk or pycocoevalcap is missing, or ``ptb`` without Java.
    """
    check_tokenizer(tokenizer)
    if problem := packages_problem():
        raise BackendError(problem)
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

    # Lower-casing makes brackets -lrb-, which the list, in capitals, keeps: so does pycocoevalcap.
    distinct = list(dict.fromkeys(captions))  # caption sets repeat themselves: a third of RSICD's are different
    if tokenizer == "ptb":
        found = ptb_tokens(distinct)
    else:
        from nltk.tokenize import NLTKWordTokenizer

        cut = NLTKWordTokenizer().tokenize
        # It takes a full stop off the end only, so it is given one sentence at a time.
        split = [_SENTENCE_END.split(caption.translate(_QUOTES)) for caption in distinct]
        found = [[word.lower() for text in texts for word in cut(text, convert_parentheses=True)] for texts in split]
    dropped = frozenset(PUNCTUATIONS)
    words = [" ".join(token for token in tokens if token not in dropped) for tokens in found]
    known = dict(zip(distinct, words, strict=True))
    return [known[caption] for caption in captions]


def check_tokenizer(tokenizer: str) -> None:
    """Raise OptionError unless there is such a tokenizer."""
    if tokenizer not in TOKENIZERS:
        raise OptionError(f"tokenizer is {tokenizer!r}, expected {' or '.join(TOKENIZERS)}")


def packages_problem() -> str | None:
    """Which packages captions cannot be cut or scored without are missing, and what to do, or None where none is."""
    absent = [name for name in ("nltk", "pycocoevalcap") if find_spec(name) is None]
    return (
        f"words and scores of captions need {' and '.join(absent)}: pip install 'rsedge[evaluate]'" if absent else None
    )


def describe_tokenizer(tokenizer: TokenizerName) -> str:
    """Which tokenizer exactly, to stand beside a score."""
    if tokenizer == "ptb":
        return "Stanford PTBTokenizer 3.4.1, lower case, no punctuation"
    return f"nltk NLTKWordTokenizer {version('nltk')}, lower case, no punctuation"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextStatistics:
    """Length, vocabulary and variety of captions. Captions that are equal word for word count as the same.

    ``words_mean`` to ``words_max`` are words per caption; ``vocabulary`` and ``distinct`` count different words and
    captions.
    """

    captions: int
    empty: int
    """Captions without a word."""
    words: int
    words_mean: float
    words_sd: float
    """Of the population."""
    words_min: int
    words_max: int
    vocabulary: int
    unseen_share: float | None
    """Share of the words that are not in the known captions; None where none were given."""
    distinct: int
    distinct_share: float
    most_frequent: str
    """Of several the first in the alphabet."""
    most_frequent_share: float

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def text_statistics(
    captions: Sequence[str], *, known: Iterable[str] | None = None, tokenizer: TokenizerName = "treebank"
) -> TextStatistics:
    """Statistics of ``captions``, in words as the metrics count them (lower case, no punctuation).

    Words of ``known`` captions, as a rule those of the training split, are not unseen. OptionError without a caption.
    """
    if not captions:
        raise OptionError("there is no caption to describe: give at least one")
    texts = tokenize(captions, tokenizer)
    lengths = [len(text.split()) for text in texts]
    counts = Counter(word for text in texts for word in text.split())
    unseen = None
    if known is not None:
        seen = {word for text in tokenize(list(known), tokenizer) for word in text.split()}
        unseen = sum(count for word, count in counts.items() if word not in seen) / max(sum(lengths), 1)
    variety = Counter(texts)
    text, count = min(variety.items(), key=lambda item: (-item[1], item[0]))
    return TextStatistics(
        captions=len(texts),
        empty=lengths.count(0),
        words=sum(lengths),
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


def most_frequent_caption(captions: Sequence[str], *, tokenizer: TokenizerName = "treebank") -> str:
    """The caption that occurs most often, word for word, as it was first written; of several the first in the alphabet.
    OptionError where no caption has a word in it.
    """
    counts, written = _distinct(captions, tokenizer)
    return written[min(counts, key=lambda text: (-counts[text], text))]


def consensus_caption(captions: Sequence[str], *, tokenizer: TokenizerName = "treebank") -> str:
    """The caption most like all others: the largest mean cosine of its words' counts with those of every caption.

    One pass over the captions: the mean of cosines is the product with the mean of the unit vectors. OptionError where
    no caption has a word in it.
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
