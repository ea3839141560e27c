"""Sentence-BERT similarity of captions: how close in meaning, whatever the wording."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from rsedge.errors import BackendError, OptionError

Floats = NDArray[np.float64]


def sbert_problem(model: str | None) -> str | None:
    """Why the similarity cannot be computed and what to do, or None where it can."""
    if not model:
        return "Sentence-BERT similarity needs a model: name a folder or hub id with sbert"
    if find_spec("sentence_transformers") is None:
        return "Sentence-BERT similarity needs sentence-transformers: pip install 'rsedge[sbert]'"
    return None


def sbert_similarity(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    model: str,
    device: str = "cpu",
    batch_size: int = 64,
) -> tuple[Floats, Floats]:
    """Cosine of each prediction with its references.

    The mean over references, averaged over images, is what aac-metrics calls SBERT-sim and RSDiX reports.

    Args:
        predictions: Raw text, one per image.
        references: At least one raw text per image.
        model: Folder of a sentence-transformers model, or a hub id.
        device: As torch names it.
        batch_size: Texts embedded together.

    Returns:
        Mean and largest cosine over the references of each image, float64 [N] each; 0 for an empty prediction.

    Raises:
        BackendError: sentence-transformers is missing, or the device cannot be used.
        OptionError: There is no such model, sizes differ, or a prediction has no reference.
    """
    if len(predictions) != len(references) or not all(references):
        raise OptionError(
            f"{len(predictions)} predictions for {len(references)} groups of references: give one text each, and at "
            "least one reference"
        )
    if problem := sbert_problem(model):
        raise BackendError(problem)
    # Read once, when the libraries below are first imported; a user's own value stands.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from sentence_transformers import SentenceTransformer

    try:
        encoder = SentenceTransformer(model, device=device)
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise OptionError(
            f"{model} is no Sentence-BERT model ({reason}): give a folder saved by sentence-transformers, or a hub id "
            "such as sentence-transformers/paraphrase-TinyBERT-L6-v2"
        ) from error
    except (AssertionError, RuntimeError) as error:  # torch without CUDA asserts
        raise BackendError(
            f"{model} cannot be loaded on {device} ({error}): try another device, such as cpu"
        ) from error

    texts = list(dict.fromkeys([*predictions, *(text for group in references for text in group)]))  # each once
    embedded = encoder.encode(texts, batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False)
    vectors, row = np.asarray(embedded, np.float64), {text: index for index, text in enumerate(texts)}
    owner = np.repeat(np.arange(len(predictions)), [len(group) for group in references])
    theirs = vectors[[row[text] for group in references for text in group]]
    cosines = np.einsum("ij,ij->i", vectors[[row[text] for text in predictions]][owner], theirs)
    cosines[np.array([not text.strip() for text in predictions])[owner]] = 0.0
    starts = [0, *accumulate(len(group) for group in references)][:-1]
    return np.add.reduceat(cosines, starts) / np.bincount(owner), np.maximum.reduceat(cosines, starts)
