"""Progress on stderr: a bar on a terminal, a line now and then elsewhere, nothing when quiet."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rsedge.cli import options

if TYPE_CHECKING:
    from rsedge.runtime.pipeline import Progress

_LINE_EVERY = 30.0  # seconds


@contextmanager
def tile_progress() -> Iterator[Callable[[Progress], None] | None]:
    """What to call with each :class:`~rsedge.runtime.pipeline.Progress`."""
    if not logging.getLogger("rsedge").isEnabledFor(logging.INFO):
        yield None
    elif sys.stderr.isatty():
        with _bar() as update:
            yield update
    else:
        yield _lines()


@contextmanager
def _bar() -> Iterator[Callable[[Progress], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("tiles"))
    with Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)

        def update(progress: Progress) -> None:
            bar.update(task, description=progress.scene, completed=progress.tiles_done, total=progress.tiles_total)

        yield update


def _lines() -> Callable[[Progress], None]:
    last = time.monotonic()

    def update(progress: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _LINE_EVERY:
            last = now
            options.note(f"{progress.scene}: {progress.tiles_done} of {progress.tiles_total} tiles")

    return update
