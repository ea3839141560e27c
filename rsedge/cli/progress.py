"""Progress on stderr: a bar on a terminal, a line every 30 seconds elsewhere, nothing with ``--quiet``."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rsedge.cli import options

if TYPE_CHECKING:
    from rsedge.runtime.run.pipeline import Progress
    from rsedge.training.loop import Event

_LINE_EVERY = 30.0  # seconds


@contextmanager
def tile_progress() -> Iterator[Callable[[Progress], None] | None]:
    """Yield a function to call with each :class:`~rsedge.runtime.run.pipeline.Progress`."""
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

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn("tiles"))
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


@contextmanager
def training_progress() -> Iterator[Callable[[Event], None] | None]:
    """Yield a function to call with each :class:`~rsedge.training.loop.Event`. It prints a line per evaluation."""
    if not logging.getLogger("rsedge").isEnabledFor(logging.INFO):
        yield None
    elif sys.stderr.isatty():
        with _training_bar() as update:
            yield update
    else:
        yield _training_lines()


@contextmanager
def _training_bar() -> Iterator[Callable[[Event], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
    with Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)

        def update(event: Event) -> None:
            if event.evaluated:
                bar.console.print(_evaluation(event), highlight=False, markup=False)
            else:
                bar.update(task, description=_step(event), completed=event.step, total=event.steps)

        yield update


def _training_lines() -> Callable[[Event], None]:
    last = time.monotonic()

    def update(event: Event) -> None:
        nonlocal last
        if event.evaluated:
            options.note(_evaluation(event))
        elif time.monotonic() - last >= _LINE_EVERY:
            last = time.monotonic()
            options.note(f"step {event.step} of {event.steps}, {_step(event)}")

    return update


def _step(event: Event) -> str:
    """Return the values of a training step as one short text."""
    text = f"epoch {event.epoch:.2f}  loss {event.values['loss']:.4f}  lr {event.values['learning_rate']:.2g}"
    if (speed := event.values.get("samples_per_second")) is not None:  # a learning-rate test measures none
        text += f"  {speed:.1f} images/s"
    memory = event.values.get("gpu_memory_mb")
    return f"{text}  {memory:.0f} MB" if memory is not None else text


def _evaluation(event: Event) -> str:
    values = "  ".join(f"{name.removeprefix('val_')} {value:.4g}" for name, value in event.values.items())
    return f"step {event.step}: {values}"


@contextmanager
def image_progress() -> Iterator[Callable[[int, int], None] | None]:
    """Yield a function to call with the number of finished images and of all images."""
    if not logging.getLogger("rsedge").isEnabledFor(logging.INFO):
        yield None
    elif not sys.stderr.isatty():
        yield _image_lines()
    else:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("images"), TimeRemainingColumn())
        with Bar(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)


def _image_lines() -> Callable[[int, int], None]:
    last = time.monotonic()

    def update(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _LINE_EVERY:
            last = time.monotonic()
            options.note(f"{done} of {total} images")

    return update
