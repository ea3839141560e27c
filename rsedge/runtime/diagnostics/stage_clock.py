"""A clock for the stages that a tile goes through, and the models, decoders and writers that tell it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from rsedge.runtime.outputs.target import Target

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from rsedge.pixels import UInt8
    from rsedge.runtime.decoding.decoder import Batch, Decoder
    from rsedge.runtime.decoding.fixed_batch import FixedBatch
    from rsedge.runtime.decoding.search import Ints, Request, StepOutput
    from rsedge.runtime.embedder import Embedder
    from rsedge.runtime.outputs.records import TileResult
    from rsedge.runtime.outputs.target import ResultWriter

ENCODE, STEPS, CACHES, WRITE = "encode", "decode steps", "caches", "write"


class StageClock:
    """Time by stage, of one thread.

    Attributes:
        seconds: Stage → time on the clock.
        calls: Stage → how often it was entered.
    """

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count what the block takes as ``stage``."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - begin  # type: ignore[assignment]  # Counter[str] is of int
            self.calls[stage] += 1

    def reset(self) -> None:
        """Forget everything."""
        self.seconds.clear()
        self.calls.clear()


class TimedDecoder:
    """A decoder whose batches tell a clock how long they encode, step and rearrange caches; else as it was.

    Where the encoder runs beside the decoder, as on CUDA, ``encode`` is what was waited for.
    """

    def __init__(self, decoder: Decoder, clock: StageClock) -> None:
        self._decoder, self._clock = decoder, clock

    def batch(self, *, slots: int, rows: int, columns: int) -> TimedBatch:
        """See ``Decoder.batch``."""
        return TimedBatch(self._decoder.batch(slots=slots, rows=rows, columns=columns), self._clock)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)


class TimedBatch:
    """A batch of :class:`TimedDecoder`."""

    def __init__(self, batch: Batch | FixedBatch, clock: StageClock) -> None:
        self._batch, self._clock = batch, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    def expect(self, pixels: UInt8) -> None:
        """See ``Batch.expect``."""
        with self._clock(ENCODE):
            self._batch.expect(pixels)

    def arrange(self, sources: Ints, pixels: UInt8) -> None:
        """See ``Batch.arrange``."""
        with self._clock(ENCODE if len(pixels) else CACHES):
            self._batch.arrange(sources, pixels)

    def step(self, request: Request) -> StepOutput:
        """See ``Batch.step``."""
        with self._clock(STEPS):
            return self._batch.step(request)

    def advance(self, parents: Ints) -> None:
        """See ``Batch.advance``."""
        with self._clock(CACHES):
            self._batch.advance(parents)


class TimedEmbedder:
    """An embedder that tells a clock how long it encodes; else as it was."""

    def __init__(self, embedder: Embedder, clock: StageClock) -> None:
        self._embedder, self._clock = embedder, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._embedder, name)

    def embed_images(self, images: UInt8) -> NDArray[np.float32]:
        """See ``Embedder.embed_images``."""
        with self._clock(ENCODE):
            return self._embedder.embed_images(images)


def timed_target(target: Target, clock: StageClock) -> Target:
    """The target, with opening, writing and closing counted as ``write``."""

    @contextmanager
    def opened() -> Iterator[ResultWriter]:
        with ExitStack() as stack:
            yield _TimedWriter(_enter(target.open(), stack, clock), clock)
            with clock(WRITE):
                stack.close()

    return Target(target.path, opened)


def _enter(context: AbstractContextManager[ResultWriter], stack: ExitStack, clock: StageClock) -> ResultWriter:
    with clock(WRITE):
        return stack.enter_context(context)


class _TimedWriter:
    def __init__(self, writer: ResultWriter, clock: StageClock) -> None:
        self._writer, self._clock = writer, clock

    def write(self, results: Sequence[TileResult]) -> None:
        with self._clock(WRITE):
            self._writer.write(results)
