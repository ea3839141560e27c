"""Captions → words, as the caption metrics count them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Literal, get_args

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
