"""The parity report: what a fresh bundle computes, held against torch on the same images.

The bundle runs as users will run it (same decoder, same search), the checkpoint through ``transformers.generate``, or
what its family has in that place, in float32. Three questions: how far is the encoder's output, how often does the
bundle choose torch's next token when fed torch's own caption (errors cannot add up), and how many tokens of whole
captions agree (they can).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rsedge.errors import ParityError
from rsedge.runtime.captioner import Captioner
from rsedge.runtime.decoding.search import Request
from rsedge.runtime.engines.ort import OrtBackend

if TYPE_CHECKING:
    from rsedge.bundle import Bundle
    from rsedge.export.checkpoint import Checkpoint
    from rsedge.export.graphs.precision import Precision
    from rsedge.export.models.blip_layout import BlipSettings
    from rsedge.runtime.decoding.decoder import Decoder

IMAGES = 8
TOKENS = 20
SEED = 20
SEARCHES = {"greedy": 1, "beam3": 3}

UInt8 = NDArray[np.uint8]
TorchResults = Callable[["Bundle", UInt8, int], tuple[NDArray[np.float32], dict[str, list[tuple[int, ...]]]]]
"""Bundle, images uint8 [B, H, W, 3], longest caption → the checkpoint's encoder output, and per search of ``SEARCHES``
its captions' token ids.
"""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What a precision may cost before an export fails.

    Attributes:
        encoder_max, encoder_mean: Largest and mean absolute error of the encoder's output over its mean magnitude.
        next_token: Share of torch's tokens that the bundle too ranks first, fed torch's caption.
        caption_tokens: Share of equal tokens, position by position, of freely decoded captions.
    """

    encoder_max: float
    encoder_mean: float
    next_token: float
    caption_tokens: float


TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(encoder_max=1e-3, encoder_mean=1e-4, next_token=1.0, caption_tokens=1.0),
    "fp16": Tolerance(encoder_max=0.5, encoder_mean=2e-2, next_token=0.97, caption_tokens=0.8),
    "int8": Tolerance(encoder_max=5.0, encoder_mean=0.15, next_token=0.8, caption_tokens=0.4),
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


def parity_report(checkpoint: Checkpoint[BlipSettings], bundle: Bundle) -> dict[str, Any]:
    """Compare a BLIP bundle with its checkpoint on seeded images; see :func:`captioner_report`."""
    return captioner_report(bundle, partial(_torch_results, checkpoint), reference="transformers.generate, float32")


def captioner_report(bundle: Bundle, torch_results: TorchResults, *, reference: str) -> dict[str, Any]:
    """Compare a captioner's bundle with its checkpoint on seeded images.

    Args:
        bundle: A fresh one.
        torch_results: What the checkpoint gives.
        reference: What that is, for the report.

    Returns:
        The images, tokens and seed used, ``encoder`` errors (``max``, ``mean``, ``mean_magnitude``), ``next_token``
        agreement, per search ``caption_tokens`` and ``captions`` agreement (shares), the tolerance, and ``passed``.
    """
    images = seeded_images(IMAGES, bundle.manifest.image.size)
    backend = OrtBackend("cpu")
    captioner = Captioner(bundle, backend, device_reason="the reference device", batch_size=IMAGES)
    decoder = captioner.decoder
    tokens = min(TOKENS, decoder.spec.max_positions)
    expected, captions = torch_results(bundle, images, tokens)
    tolerance = TOLERANCES[bundle.manifest.precision]

    error = np.abs(decoder.encode(images) - expected)
    magnitude = float(np.abs(expected).mean())
    searches: dict[str, dict[str, float]] = {}
    for name, beams in SEARCHES.items():
        ours = [caption.token_ids for caption in captioner.caption(images, **_settings(beams, tokens))]
        agreement = [_agreement(mine, torch) for mine, torch in zip(ours, captions[name], strict=True)]
        searches[name] = {
            "caption_tokens": _rounded(np.mean(agreement)),
            "captions": _rounded(np.mean([share == 1.0 for share in agreement])),
        }
    next_token = _next_token_agreement(decoder, bundle, images, captions["greedy"])
    report: dict[str, Any] = {
        "reference": reference,
        "device": "cpu",
        "images": IMAGES,
        "image_seed": SEED,
        "new_tokens": tokens,
        "encoder": {
            "max": _rounded(error.max()),
            "mean": _rounded(error.mean()),
            "mean_magnitude": _rounded(magnitude),
        },
        "next_token": _rounded(next_token),
        **searches,
        "tolerance": {
            "encoder_max_over_magnitude": tolerance.encoder_max,
            "encoder_mean_over_magnitude": tolerance.encoder_mean,
            "next_token": tolerance.next_token,
            "caption_tokens": tolerance.caption_tokens,
        },
    }
    report["problems"] = _problems(report, tolerance)
    return report


def check(report: dict[str, Any], precision: Precision) -> None:
    """Raise ParityError, naming every figure beyond its tolerance, if the report has any."""
    if report["problems"]:
        lines = "\n".join(f"  - {problem}" for problem in report["problems"])
        raise ParityError(
            f"the {precision} graphs stray from torch, nothing was written:\n{lines}\n"
            "if the checkpoint is sound, export it with --fp32"
        )


def _problems(report: dict[str, Any], tolerance: Tolerance) -> list[str]:
    """Every figure beyond its tolerance, as a sentence; NaN compares false, so a graph that yields it is caught too."""
    encoder, problems = report["encoder"], []
    for kind, limit in (("max", tolerance.encoder_max), ("mean", tolerance.encoder_mean)):
        relative = encoder[kind] / max(encoder["mean_magnitude"], 1e-12)
        if not relative <= limit:
            problems.append(f"the encoder's {kind} error is {relative:.2g} of its magnitude, accepted is {limit:g}")
    shares = {"next tokens": (report["next_token"], tolerance.next_token)}
    shares |= {f"{name} tokens": (report[name]["caption_tokens"], tolerance.caption_tokens) for name in SEARCHES}
    problems += [
        f"{name} agree to {share:.2%}, accepted is at least {least:.2%}"
        for name, (share, least) in shares.items()
        if not share >= least
    ]
    return problems


def _settings(beams: int, tokens: int) -> dict[str, Any]:
    """The same generation for both sides, whatever defaults the checkpoint carries."""
    return {
        "num_beams": beams,
        "max_new_tokens": tokens,
        "min_new_tokens": 0,
        "length_penalty": 1.0,
        "early_stopping": False,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
    }


def _torch_results(
    checkpoint: Checkpoint[BlipSettings], bundle: Bundle, images: UInt8, tokens: int
) -> tuple[NDArray[np.float32], dict[str, list[tuple[int, ...]]]]:
    """Encoder output [B, S, D] and, per search, the generated token ids of the checkpoint in torch."""
    import torch
    from transformers import BlipForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    image = bundle.manifest.image
    model = BlipForConditionalGeneration.from_pretrained(
        checkpoint.path, local_files_only=True, use_safetensors=True, dtype=torch.float32
    ).eval()
    pixels = (images / 255.0 - np.asarray(image.mean)) / np.asarray(image.std)
    values = torch.from_numpy(pixels.astype(np.float32)).permute(0, 3, 1, 2)
    resized = checkpoint.settings.vision["image_size"] != image.size
    eos = checkpoint.settings.token_spec.eos
    with torch.no_grad():
        embeds = model.vision_model(pixel_values=values, interpolate_pos_encoding=resized)[0].numpy()
        captions = {}
        for name, beams in SEARCHES.items():
            ids = model.generate(
                pixel_values=values, interpolate_pos_encoding=resized, do_sample=False, **_settings(beams, tokens)
            )
            captions[name] = [_until(row[1:].tolist(), eos) for row in ids]
    return embeds, captions


def _until(ids: list[int], eos: int) -> tuple[int, ...]:
    return tuple(ids[: ids.index(eos) + 1] if eos in ids else ids)


def _agreement(mine: tuple[int, ...], theirs: tuple[int, ...]) -> float:
    equal = sum(a == b for a, b in zip(mine, theirs, strict=False))
    return equal / max(len(mine), len(theirs))


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


def _rounded(value: Any) -> float:
    return float(f"{float(value):.4g}")
