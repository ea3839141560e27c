"""Clocks for the stages of a run: one that adds up seconds, and one that does nothing, the default everywhere."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

WAIT, ENCODE, STEPS, CACHES, WRITE = "wait for tiles", "encode", "decode steps", "caches", "write"
"""Stages of a tile. Where the encoder runs beside the decoder, as on CUDA, ``ENCODE`` is the time spent waiting."""


class Clock:
    """A clock that does nothing: ``with clock(ENCODE): …`` runs the block."""

    def __call__(self, stage: str) -> AbstractContextManager[None]:  # noqa: ARG002 - StageClock uses it
        """Return a context manager for a block of ``stage``."""
        return nullcontext()


NO_CLOCK = Clock()


class StageClock(Clock):
    """Time by stage, of one thread."""

    seconds: Counter[str]
    """Stage → time spent in it."""
    calls: Counter[str]
    """Stage → how often it was entered."""

    def __init__(self) -> None:
        self.seconds = Counter()
        self.calls = Counter()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time of the block to ``stage``."""
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
