"""How a BLIP captioning checkpoint becomes a bundle: its graphs, its part of the manifest, its parity report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rsedge.bundle import DecoderSpec
from rsedge.export import verify
from rsedge.export.generation import generation_defaults
from rsedge.export.graphs import caches
from rsedge.export.graphs.encoder import interpolate_positions
from rsedge.export.graphs.precision import Precision, float_type
from rsedge.export.models import blip

if TYPE_CHECKING:
    from rsedge.bundle import Bundle
    from rsedge.export.checkpoint import Checkpoint
    from rsedge.export.graphs.builder import GraphBuilder
    from rsedge.export.models.blip_layout import BlipSettings


class BlipPlan:
    """One BLIP captioner at one image size; see :class:`rsedge.export.families.Plan`."""

    def __init__(self, checkpoint: Checkpoint[BlipSettings], image_size: int) -> None:
        self._checkpoint = checkpoint
        self._shape = blip.BlipShape.from_checkpoint(checkpoint, image_size)
        self._generation = generation_defaults(checkpoint, positions=self._shape.positions)

    def graphs(self, precision: Precision) -> dict[str, GraphBuilder]:
        """The captioner's two graphs, and those that keep its caches on a device."""
        shape, tensors, image = self._shape, self._checkpoint.tensors, self._checkpoint.image
        positions = tensors["vision_model.embeddings.position_embedding"][0]
        positions = interpolate_positions(positions, shape.grid)
        dtype = float_type(precision)
        sizes = {"layers": shape.layers, "heads": shape.heads, "head_dim": shape.head_dim}
        return {
            "vision": blip.vision_graph(shape, tensors, positions, image.mean, image.std, precision),
            "step": blip.step_graph(shape, tensors, precision),
            **caches.cache_graphs(**sizes, image_tokens=shape.image_tokens, dtype=dtype, codes=precision == "int8"),
        }

    def manifest_fields(self) -> dict[str, Any]:
        """Tokens, decoding defaults and the sizes of the caches."""
        shape = self._shape
        decoder = DecoderSpec(
            layers=shape.layers,
            heads=shape.heads,
            head_dim=shape.head_dim,
            max_positions=shape.positions,
            image_tokens=shape.image_tokens,
        )
        return {"tokens": self._checkpoint.tokens, "generation": self._generation, "decoder": decoder}

    def parity(self, bundle: Bundle) -> dict[str, Any]:
        """See :func:`rsedge.export.verify.parity_report`."""
        return verify.parity_report(self._checkpoint, bundle)
