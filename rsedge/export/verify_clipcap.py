"""The parity report of a CLIPCap: a fresh bundle held against the model in torch, float32."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from rsedge.export.verify import SEARCHES, UInt8, captioner_report

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rsedge.bundle import Bundle
    from rsedge.export.checkpoint import Checkpoint
    from rsedge.export.models.clipcap_layout import ClipCapSettings


def parity_report(checkpoint: Checkpoint[ClipCapSettings], bundle: Bundle) -> dict[str, Any]:
    """Compare a bundle with its checkpoint on seeded images; see :func:`rsedge.export.verify.captioner_report`."""
    reference = "rsedge.training.models.clipcap_decode.generate, float32"
    return captioner_report(bundle, partial(_torch_results, checkpoint), reference=reference)


def _torch_results(
    checkpoint: Checkpoint[ClipCapSettings], bundle: Bundle, images: UInt8, tokens: int
) -> tuple[NDArray[np.float32], dict[str, list[tuple[int, ...]]]]:
    """Image embeddings [B, D] of unit length and, per search, the generated token ids of the checkpoint in torch."""
    import torch
    from transformers.utils import logging

    from rsedge.training.models.clipcap_decode import DEFAULTS, generate
    from rsedge.training.models.clipcap_model import ClipCapModel

    logging.disable_progress_bar()
    image = bundle.manifest.image
    model = ClipCapModel.from_pretrained(
        checkpoint.path, local_files_only=True, use_safetensors=True, dtype=torch.float32
    ).eval()
    pixels = ((images / 255.0 - np.asarray(image.mean)) / np.asarray(image.std)).astype(np.float32)
    resized = checkpoint.settings.image_size != image.size
    with torch.no_grad():
        output = model.encoder(
            pixel_values=torch.from_numpy(pixels).permute(0, 3, 1, 2), interpolate_pos_encoding=resized
        )
        raw = output.image_embeds if checkpoint.settings.vision.kind == "clip" else output.pooler_output
        embeds = torch.nn.functional.normalize(raw, dim=-1)
    captions = {}
    for name, beams in SEARCHES.items():
        options = dataclasses.replace(DEFAULTS, num_beams=beams, max_new_tokens=tokens)
        captions[name] = [caption.token_ids for caption in generate(model, embeds, options)]
    return embeds.numpy(), captions
