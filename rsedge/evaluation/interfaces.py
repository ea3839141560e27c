"""What evaluation needs of a model and reports of it, and the images that it shows to a model, a block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from rsedge.errors import OptionError, SceneError
from rsedge.texts import in_lines

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from rsedge.datasets.examples import Example
    from rsedge.pixels import UInt8

Kind = Literal["bundle", "checkpoint"]
Progress = Callable[[int, int], None]
"""Called with the images done and their number."""

_BLOCK = 32  # images read before the model sees them: enough to fill a batch, few enough for steady progress


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What was evaluated."""

    name: str
    """The bundle's ``name@hash12``, or the checkpoint as it was named."""
    kind: Kind
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


def read_blocks(
    examples: Sequence[Example], *, skip_bad: bool, progress: Progress | None = None
) -> Iterator[tuple[list[int], list[UInt8], dict[int, str]]]:
    """Yield the images of ``examples`` in order, block by block: indices of the images that could be read, these
    images, and for the others index → why not. ``progress`` is called after each block.

    Raises:
        OptionError: There is no example, or without ``skip_bad`` images of a block cannot be read; all of the block are
            listed.
    """
    if not examples:
        raise OptionError("there is no image to evaluate: choose another split, or give more data")
    for start in range(0, len(examples), _BLOCK):
        indices: list[int] = []
        images: list[UInt8] = []
        failed: dict[int, str] = {}
        for index in range(start, min(start + _BLOCK, len(examples))):
            try:
                images.append(examples[index].image.read())
                indices.append(index)
            except SceneError as error:  # noqa: PERF203 - reading an image takes far longer
                failed[index] = str(error)
        if failed and not skip_bad:
            lines = in_lines(f"{examples[index].key}: {reason}" for index, reason in failed.items())
            remedy = "mend them, or count them as failed with --skip-bad"
            raise OptionError("\n".join([f"{len(failed)} images cannot be read:", *lines, remedy]))
        yield indices, images, failed
        if progress is not None:
            progress(min(start + _BLOCK, len(examples)), len(examples))
