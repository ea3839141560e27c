"""How a CLIPCap checkpoint becomes a bundle: its graphs, its part of the manifest, its parity report."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from rsedge.bundle import DecoderSpec, GenerationDefaults
from rsedge.export import verify_clipcap
from rsedge.export.graphs import caches
from rsedge.export.graphs.precision import Precision, float_type
from rsedge.export.models import clipcap

if TYPE_CHECKING:
    from rsedge.bundle import Bundle
    from rsedge.export.checkpoint import Checkpoint
    from rsedge.export.graphs.builder import GraphBuilder
    from rsedge.export.models.clipcap_layout import ClipCapSettings


class ClipCapPlan:
    """One CLIPCap at one image size; see :class:`rsedge.export.families.Plan`."""

    def __init__(self, checkpoint: Checkpoint[ClipCapSettings], image_size: int) -> None:
        from rsedge.training.models.clipcap_model import register_auto_classes

        register_auto_classes()  # else transformers warns of an unknown model when it reads the tokenizer
        self._checkpoint, self._settings = checkpoint, checkpoint.settings
        self._image = dataclasses.replace(checkpoint.image, size=image_size)

    def graphs(self, precision: Precision) -> dict[str, GraphBuilder]:
        """The captioner's two graphs, and those that keep its caches on a device."""
        settings, text, tensors = self._settings, self._settings.text, self._checkpoint.tensors
        dtype = float_type(precision)
        sizes = {"layers": text.layers, "heads": text.heads, "head_dim": text.head_dim}
        return {
            "vision": clipcap.vision_graph(settings, tensors, self._image, precision),
            "step": clipcap.step_graph(settings, tensors, precision),
            **caches.cache_graphs(
                **sizes, image_tokens=settings.image_tokens, dtype=dtype, start=text.width, codes=False
            ),
        }

    def manifest_fields(self) -> dict[str, Any]:
        """Tokens, CLIPCap's own decoding defaults and the sizes of the caches."""
        from rsedge.training.models.clipcap_decode import DEFAULTS

        settings, text = self._settings, self._settings.text
        longest = min(DEFAULTS.max_new_tokens, settings.max_new_tokens)
        decoder = DecoderSpec(
            layers=text.layers,
            heads=text.heads,
            head_dim=text.head_dim,
            max_positions=settings.max_new_tokens,
            image_tokens=settings.image_tokens,
        )
        beams = min(DEFAULTS.num_beams, text.vocab_size)
        generation = GenerationDefaults(max_new_tokens=longest, num_beams=beams)
        return {"tokens": settings.token_spec, "generation": generation, "decoder": decoder}

    def parity(self, bundle: Bundle) -> dict[str, Any]:
        """See :func:`rsedge.export.verify_clipcap.parity_report`."""
        return verify_clipcap.parity_report(self._checkpoint, bundle)
