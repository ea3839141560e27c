"""How a CLIP or SigLIP checkpoint becomes a bundle: its graphs, its part of the manifest, its parity report."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from rsedge.bundle import EmbeddingSpec
from rsedge.errors import CheckpointError
from rsedge.export import verify_embeddings
from rsedge.export.models import clip

if TYPE_CHECKING:
    from rsedge.bundle import Bundle
    from rsedge.export.checkpoint import Checkpoint
    from rsedge.export.graphs.builder import GraphBuilder
    from rsedge.export.graphs.precision import Precision
    from rsedge.export.models.clip_layout import DualEncoderSettings


class DualEncoderPlan:
    """One CLIP or SigLIP model at one image size; see :class:`rsedge.export.families.Plan`."""

    def __init__(self, checkpoint: Checkpoint[DualEncoderSettings], image_size: int) -> None:
        self._checkpoint = checkpoint
        self._image = dataclasses.replace(checkpoint.image, size=image_size)
        self._embedding = _embedding(checkpoint)

    def graphs(self, precision: Precision) -> dict[str, GraphBuilder]:
        """The two encoders."""
        settings, tensors = self._checkpoint.settings, self._checkpoint.tensors
        return {
            "vision": clip.vision_graph(settings.vision, tensors, self._image, precision),
            "text": clip.text_graph(settings.text, tensors, precision),
        }

    def manifest_fields(self) -> dict[str, Any]:
        """What an embedding is, and how a text is brought to the graph."""
        return {"embedding": self._embedding}

    def parity(self, bundle: Bundle) -> dict[str, Any]:
        """See :func:`rsedge.export.verify_embeddings.parity_report`."""
        return verify_embeddings.parity_report(self._checkpoint, bundle)


def _embedding(checkpoint: Checkpoint[DualEncoderSettings]) -> EmbeddingSpec:
    tensors, text = checkpoint.tensors, checkpoint.settings.text
    scale = float(tensors["logit_scale"].reshape(-1)[0])
    bias = float(tensors["logit_bias"].reshape(-1)[0]) if "logit_bias" in tensors else None
    if not (math.isfinite(scale) and scale < math.log(1e6)) or not math.isfinite(bias or 0.0):
        raise CheckpointError(
            checkpoint.source,
            [f"its logit_scale is exp({scale:g}), its bias {bias}: training diverged, take an earlier checkpoint"],
        )
    return EmbeddingSpec(
        dim=text.dim,
        logit_scale=math.exp(scale),
        logit_bias=bias,
        context_length=text.context_length,
        pad_to_context=text.kind == "siglip",
        pad_id=text.pad,
    )
