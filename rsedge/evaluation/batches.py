"""Examples through a model, a block at a time, so that memory does not grow with their number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from rsedge.errors import OptionError, SceneError

if TYPE_CHECKING:
    from rsedge.datasets.examples import Example
    from rsedge.pixels import UInt8

Progress = Callable[[int, int], None]
"""Called with the images done and their number."""

BLOCK = 64
"""Images read before the model sees them: enough that a captioner's batch stays full."""

_SHOWN = 20


def read_blocks(
    examples: Sequence[Example], *, skip_bad: bool, progress: Progress | None = None
) -> Iterator[tuple[list[int], list[UInt8], dict[int, str]]]:
    """The images of ``examples`` in order, block by block.

    Args:
        examples: To read.
        skip_bad: Go on where an image cannot be read, and say so, instead of failing at the end of its block.
        progress: Told after each block.

    Yields:
        Indices of the images that could be read, these images, and for the others index → why not.

    Raises:
        OptionError: There is no example, or images of a block cannot be read; all of the block are listed.
    """
    if not examples:
        raise OptionError("there is no image to evaluate: choose another split, or give more data")
    for start in range(0, len(examples), BLOCK):
        indices: list[int] = []
        images: list[UInt8] = []
        failed: dict[int, str] = {}
        for index in range(start, min(start + BLOCK, len(examples))):
            found = _read(examples[index])
            if isinstance(found, str):
                failed[index] = found
            else:
                indices.append(index)
                images.append(found)
        if failed and not skip_bad:
            lines = [f"  {examples[index].key}: {reason}" for index, reason in failed.items()]
            more = [f"  and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
            raise OptionError(
                "\n".join(
                    [
                        f"{len(failed)} images cannot be read:",
                        *lines[:_SHOWN],
                        *more,
                        "mend them, or count them as failed with --skip-bad",
                    ]
                )
            )
        yield indices, images, failed
        if progress is not None:
            progress(min(start + BLOCK, len(examples)), len(examples))


def _read(example: Example) -> UInt8 | str:
    """The image, or why there is none."""
    try:
        return example.image.read()
    except SceneError as error:
        return str(error)
