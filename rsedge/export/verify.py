"""The parity report: compare a fresh bundle with its checkpoint in torch, float32, on the same seeded inputs.

The bundle runs as users will run it (same decoder, same search, same embedder), the checkpoint as its model family runs
it (:mod:`rsedge.export.models`). A captioner answers three questions: how far is the encoder's output, how often does
the bundle choose torch's next token when fed torch's own caption (errors cannot add up), and how many tokens of whole
captions agree (they can). An embedding model answers one, the cosine between both embeddings. Embeddings of one model
point in much the same direction for every input, so the report also has the cosine without the mean embedding, which
leaves only the differences between inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rsedge.errors import ParityError
from rsedge.runtime.captioner import Captioner
from rsedge.runtime.decoding.search import Request
from rsedge.runtime.embedder import Embedder
from rsedge.runtime.engines.ort import OrtBackend

if TYPE_CHECKING:
    import torch

    from rsedge.bundle import Bundle, ImageSpec
    from rsedge.export.graphs.builder import Precision
    from rsedge.runtime.decoding.decoder import Decoder

IMAGES = 8
TOKENS = 20
SEED = 20
SEARCHES = {"greedy": 1, "beam3": 3}
TEXTS = (
    "",
    "water",
    "an aerial photograph of an airport",
    "Two planes, parked beside a terminal; it's a RAINY day.",
    "many buildings and green trees are in a dense residential area near a river with a bridge over it",
    "fields of wheat, maize and rape between hedges, " * 30,
)
"""From nothing to more than a model takes."""

UInt8 = NDArray[np.uint8]
Float32 = NDArray[np.float32]
Captions = dict[str, list[tuple[int, ...]]]
"""Search of ``SEARCHES`` → token ids of each image's caption."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Largest loss of a precision before an export fails."""

    encoder_max: float
    """Largest absolute error of the encoder's output over its mean magnitude."""
    encoder_mean: float
    """Mean absolute error over the same."""
    next_token: float
    """Smallest share of torch's tokens that the bundle too ranks first, fed torch's caption."""
    caption_tokens: float
    """Smallest share of equal tokens, position by position, of freely decoded captions."""
    cosine: float
    """Smallest cosine between an embedding and torch's."""


TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(encoder_max=1e-3, encoder_mean=1e-4, next_token=1.0, caption_tokens=1.0, cosine=0.99999),
    "fp16": Tolerance(encoder_max=0.5, encoder_mean=2e-2, next_token=0.97, caption_tokens=0.8, cosine=0.999),
    "int8": Tolerance(encoder_max=5.0, encoder_mean=0.15, next_token=0.8, caption_tokens=0.4, cosine=0.99),
}


def seeded_images(count: int, size: int, *, seed: int = SEED) -> UInt8:
    """Smooth fields, edges and noise in different colours, uint8 [count, size, size, 3]; the same for ever."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size
    images = []
    for _ in range(count):
        waves = [np.sin(2 * np.pi * (fx * x + fy * y + phase)) for fx, fy, phase in random.uniform(-4, 4, (3, 3))]
        field = np.stack(waves, axis=-1) * random.uniform(20, 70, 3) + random.uniform(60, 190, 3)
        angle, offset = random.uniform(0, np.pi), random.uniform(-0.3, 0.9)
        beyond = (np.cos(angle) * x + np.sin(angle) * y > offset)[..., None]
        field = np.where(beyond, random.uniform(20, 235, 3), field)
        images.append(field + random.normal(0, random.uniform(1, 12), field.shape))
    return np.clip(np.rint(images), 0, 255).astype(np.uint8)


def torch_images(images: UInt8, image: ImageSpec) -> torch.Tensor:
    """Normalise uint8 [B, H, W, 3] for torch, float32 [B, 3, H, W]."""
    import torch

    pixels = (images / 255.0 - np.asarray(image.mean)) / np.asarray(image.std)
    return torch.from_numpy(pixels.astype(np.float32)).permute(0, 3, 1, 2)


def torch_model(model_class: Any, folder: Path) -> Any:
    """Load a checkpoint in float32, in evaluation mode, without code and pickles."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    return model_class.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=torch.float32).eval()


def captioner_report(
    bundle: Bundle, torch_results: Callable[[UInt8, ImageSpec, int], tuple[Float32, Captions]], *, reference: str
) -> dict[str, Any]:
    """Compare a captioner's fresh bundle with its checkpoint on seeded images.

    Args:
        bundle: Of the checkpoint.
        torch_results: Images uint8 [B, H, W, 3], their normalisation, longest caption → the checkpoint's encoder output
            and captions.
        reference: Name of ``torch_results``, for the report.

    Returns:
        The images, tokens and seed used, ``encoder`` errors (``max``, ``mean``, ``mean_magnitude``), ``next_token``
        agreement, per search ``caption_tokens`` and ``captions`` agreement (shares), the tolerance, and ``problems``.
    """
    images = seeded_images(IMAGES, bundle.manifest.image.size)
    captioner = Captioner(bundle, OrtBackend("cpu"), device_reason="the reference device", batch_size=IMAGES)
    decoder = captioner.decoder
    tokens = min(TOKENS, decoder.spec.max_positions)
    expected, captions = torch_results(images, bundle.manifest.image, tokens)
    tolerance = TOLERANCES[bundle.manifest.precision]

    error = np.abs(decoder.encode(images) - expected)
    magnitude = _rounded(np.abs(expected).mean())
    searches: dict[str, dict[str, float]] = {}
    for name, beams in SEARCHES.items():
        ours = [caption.token_ids for caption in captioner.caption(images, **generation(beams, tokens))]
        agreement = [
            sum(a == b for a, b in zip(mine, theirs, strict=False)) / max(len(mine), len(theirs))
            for mine, theirs in zip(ours, captions[name], strict=True)
        ]
        searches[name] = {
            "caption_tokens": _rounded(np.mean(agreement)),
            "captions": _rounded(np.mean([share == 1.0 for share in agreement])),
        }
    report: dict[str, Any] = {
        "reference": reference,
        "device": "cpu",
        "images": IMAGES,
        "image_seed": SEED,
        "new_tokens": tokens,
        "encoder": {"max": _rounded(error.max()), "mean": _rounded(error.mean()), "mean_magnitude": magnitude},
        "next_token": _rounded(_next_token_agreement(decoder, bundle, images, captions["greedy"])),
        **searches,
        "tolerance": {
            "encoder_max_over_magnitude": tolerance.encoder_max,
            "encoder_mean_over_magnitude": tolerance.encoder_mean,
            "next_token": tolerance.next_token,
            "caption_tokens": tolerance.caption_tokens,
        },
    }
    # Every figure beyond its tolerance, as a sentence; NaN compares false, so a graph that yields it is caught too.
    encoder, problems = report["encoder"], []
    for kind, limit in (("max", tolerance.encoder_max), ("mean", tolerance.encoder_mean)):
        relative = encoder[kind] / max(encoder["mean_magnitude"], 1e-12)
        if not relative <= limit:
            problems.append(f"the encoder's {kind} error is {relative:.2g} of its magnitude, accepted is {limit:g}")
    shares = {"next tokens": (report["next_token"], tolerance.next_token)}
    shares |= {f"{name} tokens": (report[name]["caption_tokens"], tolerance.caption_tokens) for name in SEARCHES}
    for name, (share, least) in shares.items():
        if not share >= least:
            problems.append(f"{name} agree to {share:.2%}, accepted is at least {least:.2%}")
    return report | {"problems": problems}


def generation(beams: int, tokens: int) -> dict[str, Any]:
    """The same generation for both sides, whatever the defaults of the checkpoint."""
    neutral = {"length_penalty": 1.0, "early_stopping": False, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    return {"num_beams": beams, "max_new_tokens": tokens, "min_new_tokens": 0, **neutral}


def _next_token_agreement(decoder: Decoder, bundle: Bundle, images: UInt8, captions: list[tuple[int, ...]]) -> float:
    """Share of the captions' tokens that the decoder ranks first, each fed the true tokens before it."""
    tokens = bundle.manifest.tokens
    assert tokens is not None
    batch = decoder.batch(slots=len(images), rows=1, columns=max(map(len, captions)))
    batch.arrange(np.arange(0), images)
    fed = np.full(len(images), tokens.bos, np.int64)
    hits = total = 0
    for position in range(max(map(len, captions))):
        request = Request(fed, np.full(len(images), position, np.int64), 1, np.zeros((len(images), 0), np.int64), False)
        best = batch.step(request).top_ids[:, 0]
        batch.advance(np.arange(len(images)))
        alive = np.array([position < len(caption) for caption in captions])
        fed = np.array([caption[min(position, len(caption) - 1)] for caption in captions], np.int64)
        hits += int((best == fed)[alive].sum())
        total += int(alive.sum())
    return hits / total


def embedder_report(
    bundle: Bundle, token_ids: list[list[int]], torch_results: Callable[[UInt8, ImageSpec], tuple[Float32, Float32]]
) -> dict[str, Any]:
    """Compare an embedding model's bundle with its checkpoint on seeded images and on ``TEXTS``.

    Args:
        bundle: A fresh one.
        token_ids: The tokens that transformers makes of each of ``TEXTS``.
        torch_results: Images uint8 [B, H, W, 3] and their normalisation → the checkpoint's embeddings of the images and
            of the texts, each of unit length.

    Returns:
        The images, texts and seed used, for ``image_embeds`` and ``text_embeds`` the smallest and mean cosine
        (``cosine_min``, ``cosine_mean``, and without the mean embedding ``centred_min``), the tolerance, and
        ``problems``.
    """
    images = seeded_images(IMAGES, bundle.manifest.image.size)
    embedder = Embedder(bundle, OrtBackend("cpu"), device_reason="the reference device", batch_size=IMAGES)
    theirs = torch_results(images, bundle.manifest.image)
    tolerance = TOLERANCES[bundle.manifest.precision].cosine
    report: dict[str, Any] = {
        "reference": "transformers, float32",
        "device": "cpu",
        "images": IMAGES,
        "image_seed": SEED,
        "texts": len(TEXTS),
        "image_embeds": compare(embedder.embed_images(images), theirs[0]),
        "text_embeds": compare(embedder.embed_texts(TEXTS), theirs[1]),
        "tolerance": {"cosine_min": tolerance},
    }
    report["problems"] = [
        f"{name} have a cosine of {report[key]['cosine_min']:.7g} with torch's, accepted is at least {tolerance:g}"
        for key, name in (("image_embeds", "image embeddings"), ("text_embeds", "text embeddings"))
        if not report[key]["cosine_min"] >= tolerance  # NaN compares false, so a graph that yields it is caught too
    ]
    if [embedder.token_ids([text])[0].tolist() for text in TEXTS] != token_ids:
        report["problems"].append("texts become other tokens than with transformers: save tokenizer and model together")
    return report


def compare(ours: Float32, theirs: Float32) -> dict[str, float]:
    """Cosines between the rows of two arrays [N, D]: smallest, mean, and smallest about the mean of ``theirs``."""

    def cosines(first: Float32, second: Float32) -> NDArray[np.float64]:
        a, b = first.astype(np.float64), second.astype(np.float64)
        lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        return np.asarray((a * b).sum(axis=1) / np.maximum(lengths, 1e-300))

    plain, centre = cosines(ours, theirs), theirs.mean(axis=0)
    return {
        "cosine_min": round(float(plain.min()), 8),
        "cosine_mean": round(float(plain.mean()), 8),
        "centred_min": round(float(cosines(ours - centre, theirs - centre).min()), 8),
    }


def check(report: dict[str, Any], precision: Precision) -> None:
    """Raise ParityError, naming every figure beyond its tolerance, if the report has any."""
    if report["problems"]:
        lines = "\n".join(f"  - {problem}" for problem in report["problems"])
        raise ParityError(
            f"the {precision} graphs stray from torch, nothing was written:\n{lines}"
            + ("" if precision == "fp32" else "\nif the checkpoint is sound, export it with --fp32")
        )


def _rounded(value: Any) -> float:
    return float(f"{float(value):.4g}")
