"""Cores and memory of this machine, and the memory of this process; None for what the system does not tell."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

# psutil is imported at first use: counting cores, which every engine does, needs none of it. Without /proc it raises.
_UNTOLD = (ImportError, OSError, AttributeError)


def usable_cores() -> int:
    """Return the number of cores this process may use; macOS and Windows cannot tell, so there it is all of them."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def memory_total() -> int | None:
    """Return the bytes of memory of this machine."""
    with suppress(*_UNTOLD):
        import psutil

        return int(psutil.virtual_memory().total)
    return None


def memory_available() -> int | None:
    """Return the bytes that programs can have, with what the system would give back from its file cache."""
    with suppress(*_UNTOLD):
        import psutil

        return int(psutil.virtual_memory().available)
    return None


def memory_now() -> int | None:
    """Return the resident memory of this process, bytes."""
    with suppress(*_UNTOLD):
        import psutil

        return int(psutil.Process().memory_info().rss)
    return None


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
    with suppress(*_UNTOLD):
        import psutil

        return round(float(psutil.getloadavg()[0]), 2)
    return None
