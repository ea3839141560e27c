"""Whether a ``tokenizer.json`` is one that ``rsedge export`` could have written, or could read.

The file may come from a stranger and says by itself what is done to a text. A regular expression can take longer than
anyone lives on a short text, replacements can double it at every step, padding can fill memory. So it may hold the
steps and the expressions that the models rsedge serves are made of, and no others.
"""

from __future__ import annotations

import contextlib
import string
from collections.abc import Callable, Iterator
from typing import Any

from rsedge import jsonvalues

PUNCTUATION = "[" + "".join(f"\\{mark}" for mark in string.punctuation) + "]"
"""What SigLIP's tokenizer takes out of a text."""
_CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
EXPRESSIONS = frozenset({
    r"\s+", r"\A\s+", r"\s+\z", r"[\s▁]+", " {2,}", PUNCTUATION,
    _CLIP_WORDS, rf"<\|startoftext\|>|<\|endoftext\|>|{_CLIP_WORDS}",
})  # fmt: skip
"""Every regular expression a tokenizer may hold; each takes time in proportion to the text."""

_PARTS = {"version", "truncation", "padding", "added_tokens", "model"}
# Part → the name of its list in a Sequence, and the steps it may have.
_STEPS = {
    "normalizer": ("normalizers", {"BertNormalizer", "NFC", "NFKC", "Lowercase", "Strip", "Precompiled", "Replace"}),
    "pre_tokenizer": ("pretokenizers", {"BertPreTokenizer", "ByteLevel", "Metaspace", "Split"}),
    "post_processor": ("processors", {"BertProcessing", "ByteLevel", "RobertaProcessing", "TemplateProcessing"}),
    "decoder": ("decoders", {"ByteLevel", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"}),
}
_MODELS = {"BPE", "Unigram", "WordPiece"}
_MOST_STEPS = 32
_MOST_TOKENS = 1 << 20
_LARGEST_NUMBER = 1 << 22
_LONGEST_TOKEN = 512
_LONGEST_SETTING = 64  # text or list
_LONGEST_WORD = 1000
_LONGEST_CHARSMAP = 2 << 20  # that of SigLIP, in base64, has 320,000 characters


@contextlib.contextmanager
def no_panic(refusal: Callable[[str], Exception]) -> Iterator[None]:
    """Raise what ``refusal`` makes of the reason in place of a panic of the ``tokenizers`` package.

    A panic, which a broken table of a file brings about, is no Exception of Python's.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise refusal(str(error)) from error


def tokenizer_problems(data: bytes) -> list[str]:
    """Everything that keeps a ``tokenizer.json`` from being used, each a sentence without its name."""
    try:
        values = jsonvalues.parse(data)
    except ValueError as error:
        return [f"is not JSON that can be used: {error}"]
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        return ["holds no tokenizer model"]
    found = [
        f"has {name[:40]!r}, which no tokenizer of rsedge has" for name in sorted(set(values) - _PARTS - set(_STEPS))
    ]
    for part, (inner, known) in _STEPS.items():
        steps = list(_flat(values.get(part), inner))
        if len(steps) > _MOST_STEPS:
            found.append(f"has more than {_MOST_STEPS} steps in its {part}")
        else:
            found += [f"has {problem} in its {part}" for step in steps for problem in _step_problems(step, known)]
    found += [
        f"has {problem} in its {part}" for part in ("truncation", "padding") for problem in _plain(values.get(part))
    ]
    found += [f"has {problem}" for problem in _model_problems(values["model"], values.get("added_tokens") or [])]
    return list(dict.fromkeys(found))


def _flat(step: Any, inner: str) -> Iterator[Any]:
    """The steps of a part, those of its sequences one after another."""
    if isinstance(step, dict) and step.get("type") == "Sequence" and isinstance(step.get(inner), list):
        for item in step[inner]:
            yield from _flat(item, inner)  # parse() has bounded how deep this goes
    elif step is not None:
        yield step


def _step_problems(step: Any, known: set[str]) -> Iterator[str]:
    kind = step.get("type") if isinstance(step, dict) else None
    if not isinstance(kind, str) or kind not in known:
        yield f"the step {str(kind)[:40]!r}, which rsedge never writes"
        return
    settings = {name: value for name, value in step.items() if name not in ("type", "pattern", "precompiled_charsmap")}
    yield from _plain(settings)
    charsmap = step.get("precompiled_charsmap")
    if charsmap is not None and not (isinstance(charsmap, str) and len(charsmap) <= _LONGEST_CHARSMAP):
        yield "a table of characters that is too large"
    if kind in ("Replace", "Split"):
        pattern, content = step.get("pattern"), step.get("content", "")
        if not isinstance(pattern, dict) or len(pattern) != 1:
            yield "a pattern of an unknown kind"
            return
        ((sort, text),) = pattern.items()
        if sort == "Regex" and text not in EXPRESSIONS:
            yield f"the regular expression {str(text)[:80]!r}, which rsedge never writes"
        elif sort not in ("Regex", "String") or not isinstance(text, str) or not 0 < len(text) <= 256:
            yield f"the pattern {str(text)[:80]!r}"
        elif not isinstance(content, str) or len(content) > (1 if sort == "Regex" else len(text)):
            yield f"a replacement of {str(text)[:80]!r} by something longer, which can grow without end"
    if kind == "TemplateProcessing":
        for name in ("single", "pair"):
            pieces = step.get(name)
            texts = [piece for piece in pieces if "Sequence" in piece] if isinstance(pieces, list) else []
            if len(texts) > (2 if name == "pair" else 1):  # it would make ten texts of one
                yield "a template that repeats the text"


def _plain(value: Any) -> Iterator[str]:
    """What is wrong with settings: they are short texts, small numbers and short lists of them."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict | list):
            if len(item) > _LONGEST_SETTING:
                yield f"a list of {len(item)}"
                return
            pending += [*item, *item.values()] if isinstance(item, dict) else item
        elif isinstance(item, str):
            if len(item) > _LONGEST_TOKEN:
                yield f"a text of {len(item)} characters"
                return
        elif isinstance(item, int | float) and abs(item) > _LARGEST_NUMBER:
            yield f"the number {item}"
            return


def _model_problems(model: dict[str, Any], added: Any) -> Iterator[str]:
    kind = model.get("type")
    if kind is not None and kind not in _MODELS:
        yield f"a model {str(kind)[:40]!r}, expected one of {', '.join(sorted(_MODELS))}"
    yield from _plain({name: value for name, value in model.items() if name not in ("vocab", "merges")})
    longest = model.get("max_input_chars_per_word", 0)
    if not isinstance(longest, int) or not 0 <= longest <= _LONGEST_WORD:  # WordPiece takes its square
        yield f"max_input_chars_per_word {str(longest)[:40]}, at most {_LONGEST_WORD} are accepted"
    vocab, merges = model.get("vocab"), model.get("merges", [])
    if isinstance(vocab, dict):
        words, ids = list(vocab), list(vocab.values())
    elif isinstance(vocab, list):
        pairs = [pair for pair in vocab if isinstance(pair, list) and len(pair) == 2]
        words, ids = [pair[0] for pair in pairs], list(range(len(vocab)))
        if len(pairs) != len(vocab) or not all(isinstance(pair[1], int | float) for pair in pairs):
            yield "a vocabulary that is no list of pieces and scores"
    else:
        yield "no vocabulary"
        return
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        yield "added tokens that are no list of objects"
        return
    words += [token.get("content") for token in added]
    ids += [token.get("id") for token in added]
    if len(words) > _MOST_TOKENS:
        yield f"{len(words)} tokens, at most {_MOST_TOKENS} are accepted"
    if not all(isinstance(word, str) and len(word) <= _LONGEST_TOKEN for word in words):
        yield f"a token that is no text of up to {_LONGEST_TOKEN} characters"
    if not all(type(number) is int and 0 <= number < _LARGEST_NUMBER for number in ids):
        yield f"a token whose id is not in 0 to {_LARGEST_NUMBER - 1}"
    if not isinstance(merges, list) or len(merges) > 2 * _MOST_TOKENS:
        yield "merges that are no list, or too long"
    elif not all(
        isinstance(merge, str)
        or (isinstance(merge, list) and len(merge) == 2 and all(isinstance(part, str) for part in merge))
        for merge in merges
    ):
        yield "a merge that is no pair of tokens"
