"""The parity report of an embedding model: a fresh bundle's embeddings, held against transformers' in float32.

The bundle runs as users will run it. Images are seeded; texts have lengths from nothing to more than the model takes.
Embeddings of one model point much the same way whatever they are of, so the cosine is also told with the mean embedding
taken away from both sides, where only the differences between inputs are left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rsedge.export.verify import IMAGES, SEED, seeded_images
from rsedge.runtime.embedder import Embedder
from rsedge.runtime.engines.ort import OrtBackend

if TYPE_CHECKING:
    from rsedge.bundle import Bundle
    from rsedge.export.checkpoint import Checkpoint
    from rsedge.export.graphs.precision import Precision
    from rsedge.export.models.clip_layout import DualEncoderSettings

TOLERANCES: dict[Precision, float] = {"fp32": 0.99999, "fp16": 0.999, "int8": 0.99}
"""Smallest cosine between an embedding and transformers' that a precision may give."""

TEXTS = (
    "",
    "water",
    "an aerial photograph of an airport",
    "Two planes, parked beside a terminal; it's a RAINY day.",
    "many buildings and green trees are in a dense residential area near a river with a bridge over it",
    "fields of wheat, maize and rape between hedges, " * 30,
)

UInt8 = NDArray[np.uint8]
Float32 = NDArray[np.float32]


def parity_report(checkpoint: Checkpoint[DualEncoderSettings], bundle: Bundle) -> dict[str, Any]:
    """Compare a bundle with its checkpoint.

    Returns:
        The images, texts and seed used, for ``image_embeds`` and ``text_embeds`` the smallest and mean cosine
        (``cosine_min``, ``cosine_mean``, and with the mean embedding taken away ``centred_min``), the tolerance, and
        ``problems``.
    """
    images = seeded_images(IMAGES, bundle.manifest.image.size)
    embedder = Embedder(bundle, OrtBackend("cpu"), device_reason="the reference device", batch_size=IMAGES)
    tokenizer = _tokenizer(checkpoint)
    ids = _token_ids(tokenizer, checkpoint)
    theirs = reference(checkpoint, bundle, images, ids)
    tolerance = TOLERANCES[bundle.manifest.precision]
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
    problems = [
        f"{name} have a cosine of {report[key]['cosine_min']:.7g} with torch's, accepted is at least {tolerance:g}"
        for key, name in (("image_embeds", "image embeddings"), ("text_embeds", "text embeddings"))
        if not report[key]["cosine_min"] >= tolerance  # NaN compares false, so a graph that yields it is caught too
    ]
    report["problems"] = problems + _token_problems(checkpoint, embedder, ids)
    return report


def compare(ours: Float32, theirs: Float32) -> dict[str, float]:
    """Cosines between the rows of two arrays [N, D]: smallest, mean, and smallest about the mean of ``theirs``."""
    plain = _cosines(ours, theirs)
    centre = theirs.mean(axis=0)
    return {
        "cosine_min": _rounded(plain.min()),
        "cosine_mean": _rounded(plain.mean()),
        "centred_min": _rounded(_cosines(ours - centre, theirs - centre).min()),
    }


def _cosines(first: Float32, second: Float32) -> NDArray[np.float64]:
    a, b = first.astype(np.float64), second.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines: NDArray[np.float64] = (a * b).sum(axis=1) / np.maximum(lengths, 1e-300)
    return cosines


def _rounded(value: Any) -> float:
    return round(float(value), 8)


def reference(
    checkpoint: Checkpoint[DualEncoderSettings], bundle: Bundle, images: UInt8, ids: list[list[int]]
) -> tuple[Float32, Float32]:
    """Transformers' embeddings of unit length of ``images`` uint8 [B, S, S, 3] and of texts given by their tokens."""
    import torch
    from transformers import CLIPModel, SiglipModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    image, settings = bundle.manifest.image, checkpoint.settings
    loader = CLIPModel if settings.kind == "clip" else SiglipModel
    model = loader.from_pretrained(
        checkpoint.path, local_files_only=True, use_safetensors=True, dtype=torch.float32
    ).eval()
    pixels = ((images / 255.0 - np.asarray(image.mean)) / np.asarray(image.std)).astype(np.float32)
    resized = settings.image_size != image.size
    values = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    with torch.no_grad():
        image_embeds = model.vision_model(pixel_values=values, interpolate_pos_encoding=resized).pooler_output
        # One by one: texts differ in length, and transformers' own padding is not in question here.
        text_embeds = torch.cat([model.text_model(input_ids=torch.tensor([row])).pooler_output for row in ids])
        if settings.kind == "clip":
            image_embeds = model.visual_projection(image_embeds)
            text_embeds = model.text_projection(text_embeds)
    normalize = torch.nn.functional.normalize
    return normalize(image_embeds, dim=-1).numpy(), normalize(text_embeds, dim=-1).numpy()


def _tokenizer(checkpoint: Checkpoint[DualEncoderSettings]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)


def _token_ids(tokenizer: Any, checkpoint: Checkpoint[DualEncoderSettings]) -> list[list[int]]:
    """The tokens transformers gives the model for each of ``TEXTS``."""
    text = checkpoint.settings.text
    padding = "max_length" if text.kind == "siglip" else False
    rows = tokenizer(list(TEXTS), padding=padding, truncation=True, max_length=text.context_length)
    ids: list[list[int]] = rows["input_ids"]
    return ids


def _token_problems(checkpoint: Checkpoint[DualEncoderSettings], embedder: Embedder, ids: list[list[int]]) -> list[str]:
    """Tokens that differ from transformers', and texts without the token at which the model reads them."""
    text, problems = checkpoint.settings.text, []
    ours = [embedder.token_ids([one])[0].tolist() for one in TEXTS]
    if ours != ids:
        problems.append("texts become other tokens than with transformers: save tokenizer and model together")
    if text.kind == "clip" and any(row[-1] != (max(row) if text.end is None else text.end) for row in ids):
        wanted = "the largest id" if text.end is None else f"token {text.end} (text_config.eos_token_id)"
        problems.append(
            f"the model reads a text at {wanted}, but the tokenizer does not end texts with it: save them together"
        )
    return problems
