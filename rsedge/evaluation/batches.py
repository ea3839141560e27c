"""Examples through a model, a block at a time, so that memory does not grow with their number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from rsedge.errors import OptionError, SceneError
from rsedge.texts import in_lines

if TYPE_CHECKING:
    from rsedge.datasets.examples import Example
    from rsedge.pixels import UInt8

Progress = Callable[[int, int], None]
"""Called with the images done and their number."""

BLOCK = 64
"""Images read before the model sees them: enough that a captioner's batch stays full."""


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
            progress(min(start + BLOCK, len(examples)), len(examples))
