"""Scores of captions against references, by the reference implementations, each with what computed it.

BLEU, ROUGE-L and CIDEr-D come from pycocoevalcap's Python, METEOR and SPICE from its Java, the Sentence-BERT similarity
from sentence-transformers. What pycocoevalcap calls CIDEr is CIDEr-D (clipped counts, a Gaussian penalty on the length
difference, sigma 6, times 10), its document frequencies those of the references scored: a value belongs to its set of
images, and a single image always scores 0.

Papers differ in what a corpus score is. ``value`` is the corpus score as pycocoevalcap has it: for BLEU and METEOR from
counts added over all images, else the mean over images. ``mean_of_images`` is the mean for all of them, which is what
RSDiX reports (it scores one image at a time and averages), for BLEU a different and usually smaller figure.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsedge.errors import BackendError, OptionError
from rsedge.metrics import java
from rsedge.metrics.text import TokenizerName, check_tokenizer, describe_tokenizer, packages_problem, tokenize
from rsedge.texts import first_line

Floats = NDArray[np.float64]

METRICS = ("bleu", "meteor", "rouge_l", "cider_d", "spice", "sbert")
"""What can be asked for: ``bleu`` gives ``bleu_1`` to ``bleu_4``, ``sbert`` gives ``sbert_sim`` and ``sbert_max``."""

_NGRAMS = 4


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Score:
    """One metric over a set of images."""

    metric: str
    """Its name, such as ``bleu_4``."""
    value: float
    """Of the corpus; 0 to 1, CIDEr-D 0 to 10, Sentence-BERT similarities -1 to 1."""
    per_image: Floats
    """float64 [N]."""
    library: str
    version: str
    """What computed it."""
    tokenizer: str
    per_corpus: bool = False
    """Whether ``value`` is something else than the mean over images."""

    @property
    def mean_of_images(self) -> float:
        """The mean of ``per_image``."""
        return float(self.per_image.mean())

    def to_dict(self) -> dict[str, Any]:
        """Everything but the images' scores, ready for JSON."""
        return {
            "value": self.value,
            "mean_of_images": self.mean_of_images,
            "library": self.library,
            "version": self.version,
            "tokenizer": self.tokenizer,
        }


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class CaptionScores:
    """Every score of one set of predictions.

    Attributes:
        scores: Metric → score, in the order of :data:`METRICS`.
        images: How many predictions were scored, empty ones included.
        missing: Metric → why it could not be computed and what to do; only where metrics were not named.
        bleu_counts: int64 [N, 2 + 2 · 4]: words of prediction and closest reference, then n-grams and matches for
            n = 1 to 4, from which BLEU of any sample of images follows; None without BLEU.
    """

    scores: Mapping[str, Score]
    images: int
    missing: Mapping[str, str] = field(default_factory=dict)
    bleu_counts: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        problems = [
            f"{name} has {len(score.per_image)} scores for {self.images} images"
            for name, score in self.scores.items()
            if score.per_image.shape != (self.images,)
        ]
        shape = None if self.bleu_counts is None else self.bleu_counts.shape
        expected = (self.images, 2 + 2 * _NGRAMS) if any(name.startswith("bleu_") for name in self.scores) else None
        if shape != expected:
            problems.append(f"bleu_counts is {shape}, expected {expected}")
        if problems:
            raise OptionError("; ".join(problems))

    def __getitem__(self, metric: str) -> Score:
        return self.scores[metric]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "images": self.images,
            "scores": {name: score.to_dict() for name, score in self.scores.items()},
            "missing": dict(self.missing),
        }


def score_captions(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    metrics: Sequence[str] | None = None,
    tokenizer: TokenizerName = "treebank",
    sbert: str | None = None,
    device: str = "cpu",
) -> CaptionScores:
    """Score one caption per image.

    Args:
        predictions: One text per image; an empty one is scored as such: 0 by every metric of words.
        references: For each image at least one text with a word in it. One without any, such as the lone full stops
            in RSICD, counts as a reference that nothing matches, as it does in pycocoevalcap.
        metrics: Some of :data:`METRICS`. None takes all that can be computed here and says why the others cannot.
        tokenizer: ``treebank`` or ``ptb``; see :func:`rsedge.metrics.text.tokenize`.
        sbert: Folder or hub id of a Sentence-BERT model; aac-metrics and RSDiX use
            ``sentence-transformers/paraphrase-TinyBERT-L6-v2``.
        device: Where the Sentence-BERT model runs, as torch names it.

    Raises:
        OptionError: Unknown metrics, sizes that differ, images without a reference.
        BackendError: A metric was named, or a tokenizer, that cannot run here; lists all of them.
    """
    check_tokenizer(tokenizer)
    chosen, missing = _choose(metrics, sbert, tokenizer)
    texts, cut = _checked(predictions, references, tokenizer)
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    hypotheses = {index: [text] for index, text in enumerate(texts)}
    answers = dict(enumerate(cut))
    label = {
        "library": "pycocoevalcap",
        "version": version("pycocoevalcap"),
        "tokenizer": describe_tokenizer(tokenizer),
    }
    scores: dict[str, Score] = {}

    def add(metric: str, value: float, per_image: Sequence[float] | Floats, **about: Any) -> None:
        each = np.asarray(per_image, np.float64)
        scores[metric] = Score(metric=metric, value=float(value), per_image=each, **{**label, **about})

    counts = None
    for metric in chosen:
        if metric == "bleu":
            values, each = Bleu(_NGRAMS).compute_score(answers, hypotheses, verbose=0)
            counts = bleu_counts(texts, cut)
            for n in range(_NGRAMS):
                add(f"bleu_{n + 1}", values[n], each[n], per_corpus=True)
        elif metric == "rouge_l":
            add("rouge_l", *Rouge().compute_score(answers, hypotheses))
        elif metric == "cider_d":
            add("cider_d", *Cider().compute_score(answers, hypotheses))
        elif metric == "meteor":
            add("meteor", *java.meteor(texts, cut), per_corpus=True)
        elif metric == "spice":
            add("spice", *java.spice(texts, cut))
        elif metric == "sbert":
            assert sbert is not None
            mean, best = sbert_similarity(predictions, references, model=sbert, device=device)
            about = {
                "library": f"sentence-transformers ({sbert})",
                "version": version("sentence-transformers"),
                "tokenizer": "the sentence model's own",
            }
            add("sbert_sim", mean.mean(), mean, **about)
            add("sbert_max", best.mean(), best, **about)
    return CaptionScores(scores=scores, images=len(texts), missing=missing, bleu_counts=counts)


def check_metrics(metrics: Sequence[str] | None, *, sbert: str | None, tokenizer: TokenizerName) -> None:
    """Raise what :func:`score_captions` would raise for these, before there is anything to score."""
    check_tokenizer(tokenizer)
    _choose(metrics, sbert, tokenizer)


def bleu_counts(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> NDArray[np.int64]:
    """What BLEU is made of, per image; see :attr:`CaptionScores.bleu_counts`. Takes tokenized text."""
    from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test

    rows = []
    for text, texts in zip(predictions, references, strict=True):
        found = cook_test(text, cook_refs(texts), eff="closest")
        rows.append([found["testlen"], found["reflen"], *found["guess"], *found["correct"]])
    return np.array(rows, np.int64).reshape(-1, 2 + 2 * _NGRAMS)


def corpus_bleu(counts: NDArray[Any]) -> Floats:
    """BLEU-1 to 4 of counts added over images, [..., 10] → float64 [..., 4], as pycocoevalcap has it."""
    tiny, small = 1e-15, 1e-9  # its own, so that nothing divided by nothing is 0
    summed = np.asarray(counts, np.float64)
    words, closest = summed[..., 0], summed[..., 1]
    guesses, matches = summed[..., 2 : 2 + _NGRAMS], summed[..., 2 + _NGRAMS :]
    precision = np.cumprod((matches + tiny) / (guesses + small), axis=-1) ** (1 / np.arange(1, _NGRAMS + 1))
    ratio = (words + tiny) / (closest + small)
    with np.errstate(over="ignore"):
        brevity = np.where(ratio < 1, np.exp(1 - 1 / ratio), 1.0)
    return np.asarray(precision * brevity[..., None], np.float64)


def _choose(
    metrics: Sequence[str] | None, sbert: str | None, tokenizer: TokenizerName
) -> tuple[list[str], dict[str, str]]:
    """The metrics to compute in their fixed order, and why the others of the default set cannot be."""
    wanted = METRICS if metrics is None else tuple(metrics)
    if unknown := sorted(set(wanted) - set(METRICS)):
        raise OptionError(f"unknown metrics {', '.join(unknown)}; there are {', '.join(METRICS)}")
    if not wanted:
        raise OptionError(f"no metric was named; there are {', '.join(METRICS)}")
    if sbert is not None and "sbert" not in wanted:
        raise OptionError(
            "a Sentence-BERT model was given, but sbert is not among the metrics: add it or drop the model"
        )
    checks: dict[str, Callable[[], str | None]] = {
        "meteor": java.java_problem,
        "spice": java.spice_problem,
        "sbert": lambda: sbert_problem(sbert),
    }
    if problem := packages_problem():
        raise BackendError(problem)
    problems = {name: problem for name, check in checks.items() if name in wanted and (problem := check())}
    # What was asked for by name must be had; what merely belongs to the default set need not.
    refused = {name: text for name, text in problems.items() if metrics is not None or (name == "sbert" and sbert)}
    if tokenizer == "ptb" and (problem := java.java_problem()):
        refused["tokenizer ptb"] = f"{problem}; or choose treebank"
    if refused:
        raise BackendError("\n".join(f"{name}: {problem}" for name, problem in refused.items()))
    return [name for name in METRICS if name in wanted and name not in problems], problems


def _checked(
    predictions: Sequence[str], references: Sequence[Sequence[str]], tokenizer: TokenizerName
) -> tuple[list[str], list[list[str]]]:
    """Predictions and references, tokenized."""
    if len(predictions) != len(references):
        raise OptionError(
            f"{len(predictions)} predictions for {len(references)} images: give one per image, '' for none"
        )
    if not predictions:
        raise OptionError("there is no prediction to score: give at least one image")
    if any(isinstance(texts, str) for texts in references):
        raise OptionError("references are a list of texts for each image, got a text: wrap it in a list")
    flat = [*predictions, *(text for texts in references for text in texts)]
    words = iter(tokenize(flat, tokenizer))
    found = [next(words) for _ in predictions]
    cut = [[next(words) for _ in texts] for texts in references]
    if bare := [index for index, texts in enumerate(cut) if not any(texts)]:
        raise OptionError(
            f"{len(bare)} of {len(cut)} images have no reference with a word in it, the first is number {bare[0]}: "
            "give each at least one"
        )
    return found, cut


def sbert_problem(model: str | None) -> str | None:
    """Why the similarity cannot be computed and what to do, or None where it can."""
    if not model:
        return "no Sentence-BERT model is named: give a folder or hub id with --sbert, such as all-MiniLM-L6-v2"
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
    """Mean and largest cosine of each prediction with its references, float64 [N] each; 0 for an empty prediction.

    The mean over references, averaged over images, is what aac-metrics calls SBERT-sim and RSDiX reports. ``model`` is
    a folder of sentence-transformers or a hub id, ``device`` as torch names it.

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
        reason = first_line(error)
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
