"""Classes as prompts: labels, the sentences they are put into, and the one embedding a class has. NumPy only."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsedge.errors import OptionError
from rsedge.pixels import unit_rows

Floats = NDArray[np.floating[Any]]

TEMPLATES = ("An aerial photograph of {category}",)
"""The prompt of the first CLIP fine-tuned on RSICD, whose published figures are with it alone."""

ENSEMBLE = (
    "An aerial photograph of {category}",
    "a satellite image of {category}",
    "a satellite photo of {category}",
    "an aerial view of {category}",
    "a remote sensing image of {category}",
)
"""Several wordings, averaged."""

_PLACES = ("{category}", "{}")


def read_labels(value: str) -> list[str]:
    """Classes from a UTF-8 text file with one per line, or from a list with commas; blank ones are left out.

    Raises:
        OptionError: The file cannot be read or is not UTF-8, or there are no two different classes.
    """
    path = Path(value)
    is_file = os.path.isfile(value)  # noqa: PTH113 - Path.is_file fails on a list longer than a name may be
    try:
        data = path.read_bytes() if is_file else b""
        lines = data.decode("utf-8-sig").splitlines() if is_file else value.split(",")
    except OSError as error:
        raise OptionError(f"labels {value} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise OptionError(
            f"labels {path}, line {line}, are not UTF-8 (byte {data[error.start]:#04x}): save the file as UTF-8, with "
            "a class per line"
        ) from error
    labels = [label.strip() for label in lines if label.strip()]
    if len(labels) < 2 and not is_file:
        raise OptionError(
            f"labels are {value!r}, which is neither a file nor a list: give a text file with a class per line, or at "
            "least two classes with commas, such as forest,water"
        )
    check_labels(labels)
    return labels


def check_labels(labels: Sequence[str]) -> None:
    """Refuse labels that leave no choice.

    Raises:
        OptionError: Fewer than two classes, or two that are the same words, and so the same prompts.
    """
    spelled: dict[str, list[str]] = {}
    for label in labels:
        spelled.setdefault(as_words(label), []).append(label)
    twice = [" and ".join(same) for same in spelled.values() if len(same) > 1]
    if len(labels) < 2 or twice:
        reason = f" ({'; '.join(twice)} mean the same)" if twice else ""
        raise OptionError(f"labels are {', '.join(labels) or 'none'}{reason}: give at least two classes, each once")


def prompts(label: str, templates: Sequence[str] = TEMPLATES) -> list[str]:
    """The label in each template, as words: ``SparseResidential`` and ``sparse_residential`` are sparse residential.

    Raises:
        OptionError: A template has neither ``{category}`` nor ``{}``, or there is none.
    """
    if bad := [template for template in templates if not any(place in template for place in _PLACES)]:
        raise OptionError(
            f"template {', '.join(map(repr, bad))} has no {{category}} and no {{}}: write one such as {TEMPLATES[0]!r}"
        )
    if not templates:
        raise OptionError(f"there is no template: give at least one, such as {TEMPLATES[0]!r}")
    words = as_words(label)
    return [words.join(words.join(part.split("{}")) for part in template.split("{category}")) for template in templates]


def overlong(texts: Sequence[str], token_ids: Callable[[list[str]], NDArray[np.int64]]) -> list[str]:
    """Texts that take every token a model reads: one more word changes nothing in ``Embedder.token_ids``."""
    return [text for text in texts if np.array_equal(token_ids([text]), token_ids([f"{text} more"]))]


def as_words(label: str) -> str:
    """A class name as folders have it, written as words: lower case, no underscores, no camel case."""
    parts: list[str] = []
    for word in label.replace("_", " ").replace("-", " ").split():
        humps = [0, *(at for at in range(1, len(word)) if word[at].isupper() and word[at - 1].islower()), len(word)]
        parts += [word[start:end] for start, end in pairwise(humps)]
    return " ".join(parts).lower()


def class_embeddings(
    labels: Sequence[str], embed: Callable[[list[str]], Floats], templates: Sequence[str] = TEMPLATES
) -> NDArray[np.float32]:
    """One unit vector per class: the mean of its prompts' unit vectors, normalised again. float32 [C, D].

    ``embed`` returns float [N, D] for texts.

    Raises:
        OptionError: Fewer than two classes, one twice, a bad template, or prompts whose embeddings have no direction.
    """
    check_labels(labels)
    texts = [text for label in labels for text in prompts(label, templates)]
    vectors = unit_rows(embed(texts), "prompt").reshape(len(labels), len(templates), -1)
    return unit_rows(vectors.mean(axis=1), "class")
