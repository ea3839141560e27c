"""What evaluation needs of a model, and what it reports of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from rsedge.pixels import UInt8

Kind = Literal["bundle", "checkpoint"]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What was evaluated."""

    name: str
    """The bundle's ``name@hash12``, or the checkpoint as it was named."""
    kind: Kind
    """``bundle`` or ``checkpoint``."""
    path: str
    """Folder, or hub id."""
    device: str
    """Where it ran."""
    precision: str = "fp32"
    """The bundle's, or fp32."""
    options: dict[str, Any] = field(default_factory=dict)
    """Decoding options, of captioners."""

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


class CaptionModel(Protocol):
    """Writes captions."""

    info: ModelInfo

    def caption(self, images: Sequence[UInt8], *, keys: Sequence[int] | None = None) -> list[str]:
        """A caption per uint8 [H, W, 3]; ``keys``, a number per image, seed its sampling."""
        ...


class EmbeddingModel(Protocol):
    """Embeds images and texts in one space."""

    info: ModelInfo

    def embed_images(self, images: Sequence[UInt8]) -> NDArray[np.float32]:
        """Float32 [N, D] of unit length."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Float32 [N, D] of unit length."""
        ...
