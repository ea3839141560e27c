"""What a run has and takes: cores and memory of this machine, memory of this process, time of its stages.

Sizes are None where the system does not tell them.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

interrupted = threading.Event()
"""Set once a signal asked this process to end: Python drops a KeyboardInterrupt that meets a finalizer."""

CGROUPS = Path("/sys/fs/cgroup")
ADDRESSES = "the ulimit -v"
"""The limit on addresses, of which a process takes more than of memory."""

# What Linux, ONNX Runtime, CUDA, cuBLAS, cuDNN, TensorRT and C++ say when memory runs out.
_SIGNS = (
    "out of memory",
    "outofmemory",
    "failed to allocate memory",
    "cannot allocate memory",
    "failed to map segment",
    "available memory of",
    "alloc_failed",
    "cudaerrormemoryallocation",
    "cuda failure 2:",
    "bad_alloc",
    "bad allocation",
    "could not be allocated",
)


def usable_cores() -> int:
    """Return the number of cores this process may use; macOS and Windows cannot tell, so there it is all of them."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _told(measure: Callable[[Any], T]) -> T | None:
    """What psutil measures; imported at first use, since counting cores, which every engine does, needs none of it."""
    with suppress(ImportError, OSError, AttributeError):  # without /proc it raises
        import psutil

        return measure(psutil)
    return None


def memory_total() -> int | None:
    """Return the bytes of memory of this machine."""
    return _told(lambda psutil: int(psutil.virtual_memory().total))


def memory_available() -> int | None:
    """Return the bytes that programs can have, with what the system would give back from its file cache."""
    return _told(lambda psutil: int(psutil.virtual_memory().available))


def memory_limits() -> Iterator[tuple[str, int]]:
    """Yield the limits on the memory of this process: the name of each and its bytes."""
    with suppress(ImportError, OSError, ValueError):  # Windows has none
        import resource

        if (most := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
            yield ADDRESSES, most
    for line in _lines("/proc/self/cgroup"):
        _, controllers, place = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root, file = ("memory", "memory.limit_in_bytes") if controllers else ("", "memory.max")
        base = CGROUPS / root
        for folder in (base / place.strip("/"), *(base / place.strip("/")).parents):
            if folder.is_relative_to(base) and (found := _lines(folder / file)) and found[0].isdigit():
                yield "the control group's", int(found[0])


def _lines(path: str | Path) -> list[str]:
    """Return the lines of a file of the system, none where it is not there."""
    with suppress(OSError):
        return Path(path).read_text(encoding="utf-8").splitlines()
    return []


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error tells that memory ran out, of the device or of this machine."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(sign in text for sign in _SIGNS)


def memory_now() -> int | None:
    """Return the resident memory of this process, bytes."""
    return _told(lambda psutil: int(psutil.Process().memory_info().rss))


def memory_peak() -> int | None:
    """Return the highest resident memory of this process until now, bytes."""
    with suppress(OSError):  # psutil has no peak on Linux, and getrusage would count the parent's
        found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
        return int(found[1]) * 1024 if found else None
    return None


def forget_memory_peak() -> None:
    """Let :func:`memory_peak` count from now on, where the system can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def load() -> float | None:
    """Return the load of the last minute: above 0 where programs are at work."""
    return _told(lambda psutil: round(float(psutil.getloadavg()[0]), 2))


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
        self.seconds, self.calls = Counter(), Counter()

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
