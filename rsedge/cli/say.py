"""Printing for the command line: results, warnings and progress, as text without control characters or credentials.

Progress appears on stderr: a bar on a terminal, a line every 30 seconds elsewhere, nothing with ``--quiet``.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rsedge.texts import first_few, plain, redact

if TYPE_CHECKING:
    from rsedge.runtime.engines.tensorrt.build import BuildProgress
    from rsedge.runtime.run.batch import BatchProgress
    from rsedge.runtime.run.pipeline import Progress, Summary
    from rsedge.training.loop import Event

SOME_TILES_FAILED = 3
_LINE_EVERY = 30.0  # seconds
_FAILED_LINES = 100


def say(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print lines on standard output, or standard error, without control characters and credentials."""
    click.echo(shown(text), err=err, nl=nl)


def say_json(values: Any, *, err: bool = False) -> None:
    """Print values as one line of JSON. Texts are cleaned, and infinite numbers and NaN become null; ``err`` as for
    :func:`say`.
    """
    say(json.dumps(_for_json(values), allow_nan=False), err=err)


def _for_json(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {_for_json(name): _for_json(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_for_json(value) for value in values]
    if isinstance(values, float) and not math.isfinite(values):
        return None
    return plain(values) if isinstance(values, str) else values


def note(text: str) -> None:
    """Print a line on stderr, unless ``--quiet``."""
    logging.getLogger("rsedge").info(text)


def warn(text: str) -> None:
    """Print a warning on stderr, unless ``--quiet``."""
    logging.getLogger("rsedge").warning("Warning: %s", text)


def shown(text: str) -> str:
    """Return text without control characters and credentials; line feeds stay."""
    return plain(redact(text), lines=True)


def say_traceback(error: BaseException) -> None:
    """Print the traceback of an error on standard error."""
    say("".join(traceback.format_exception(error)), err=True, nl=False)


class Formatter(logging.Formatter):
    """Formats log records and their tracebacks with :func:`shown`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines of a record."""
        return shown(super().format(record))


def guard_process() -> None:
    """Clean Python's own messages, warnings and the tracebacks of threads, with :func:`shown`.

    Messages of GDAL's own threads are discarded unless ``CPL_LOG`` names a file: GDAL prints them, addresses included,
    on standard error itself. Important errors are raised as exceptions. PROJ fetches no grid, whatever a coordinate
    reference system asks for.
    """
    os.environ.setdefault("CPL_LOG", os.devnull)
    os.environ["PROJ_NETWORK"] = "OFF"
    formatted = warnings.formatwarning

    def format_warning(*args: Any, **options: Any) -> str:
        return shown(formatted(*args, **options))

    def say_thread(args: threading.ExceptHookArgs) -> None:
        if isinstance(args.exc_value, OSError):  # of a tracker: the disk is full, as the run itself will find too
            say(f"{type(args.exc_value).__name__}: {args.exc_value}", err=True)
        elif args.exc_value is not None:
            say_traceback(args.exc_value)

    warnings.formatwarning = format_warning
    threading.excepthook = say_thread


def report(
    summary: Summary, made: str, device: str, device_reason: str, *, as_json: bool, others: Iterable[Path | None] = ()
) -> int:
    """Print a summary of the run and return the exit code: JSON on stdout (on stderr if data goes to stdout), else a
    line on stderr, which names the ``others`` of its files too.
    """
    for warning in summary.warnings:
        warn(warning)
    unread = (f"cannot be read: {line}" for line in summary.unread)
    for line in first_few([*(f"not opened: {line}" for line in summary.unopened), *unread], _FAILED_LINES):
        warn(line)
    if as_json:
        values = {**summary.to_dict(), "device": device, "device_reason": device_reason}
        say_json(values, err=summary.output == "-")
    else:
        kept = f", {summary.resumed_tiles} of them from the interrupted run" if summary.resumed_tiles else ""
        parts = [f"{summary.ok} {made}", f"{summary.nodata} without data"]
        parts += [f"{summary.cloud} under cloud"] if summary.cloud else []
        parts += [f"{summary.read_errors} unreadable"]
        *names, last = (str(name) for name in (summary.output, summary.embeddings, *others) if name)
        outputs = f"{', '.join(names)} and {last}" if names else last
        unit = "images" if not summary.scenes else "tiles and images" if summary.images else "tiles"
        note(
            f"{outputs}: {summary.tiles} {unit} ({', '.join(parts)}){kept}; "
            f"{summary.seconds:.1f} s, {summary.tiles_per_second} {unit.split()[0]}/s on {device}"
        )
    return SOME_TILES_FAILED if summary.read_errors or summary.unopened else 0


# Progress


@contextmanager
def tile_progress(output: str = "-") -> Iterator[Callable[[Progress], None] | None]:
    """Yield a function to call with each :class:`~rsedge.runtime.run.pipeline.Progress`. On an interruption print where
    the finished tiles of ``output`` are.
    """
    try:
        with _progress("tiles") as show:
            yield show and (
                lambda now: show(
                    f"{now.scene}: {now.tiles_done} of {now.tiles_total} tiles",
                    now.tiles_done,
                    now.tiles_total,
                    now.scene,
                )
            )
    except KeyboardInterrupt:
        journal = Path(f"{output}.journal")
        if output != "-" and journal.exists():
            say(f"\nfinished tiles are in {journal}; the same command continues from there", err=True)
        raise


@contextmanager
def batch_progress() -> Iterator[Callable[[BatchProgress], None] | None]:
    """Yield a function to call with each :class:`~rsedge.runtime.run.batch.BatchProgress`."""
    with _progress("scenes") as show:

        def update(now: BatchProgress) -> None:
            assert show is not None
            speed = f", {now.tiles / now.seconds:.1f} tiles/s" if now.tiles and now.seconds else ""
            failed = f", {now.failed} failed" if now.failed else ""
            line = f"{now.scene}: {now.scenes_done} of {now.scenes_total} scenes{failed}{speed}"
            show(line, now.scenes_done, now.scenes_total, now.scene)

        yield update if show else None


@contextmanager
def image_progress() -> Iterator[Callable[[int, int], None] | None]:
    """Yield a function to call with the number of finished images and of all images."""
    with _progress("images", named=False) as show:
        yield show and (lambda done, total: show(f"{done} of {total} images", done, total))


@contextmanager
def training_progress() -> Iterator[Callable[[Event], None] | None]:
    """Yield a function to call with each :class:`~rsedge.training.loop.Event`. It prints a line per evaluation."""
    with _progress("steps") as show:

        def update(event: Event) -> None:
            assert show is not None
            if event.evaluated:
                values = "  ".join(f"{name.removeprefix('val_')} {value:.4g}" for name, value in event.values.items())
                show(f"step {event.step}: {values}")
                return
            if event.stage:
                show(f"step {event.step}: {event.stage}", event.step, event.steps, event.stage)
                return
            text = f"epoch {event.epoch:.2f}  loss {event.values['loss']:.4f}  lr {event.values['learning_rate']:.2g}"
            if (speed := event.values.get("samples_per_second")) is not None:  # a learning-rate test measures none
                text += f"  {speed:.1f} images/s"
            if (memory := event.values.get("gpu_memory_mb")) is not None:
                text += f"  {memory:.0f} MB"
            show(f"step {event.step} of {event.steps}, {text}", event.step, event.steps, text)

        yield update if show else None


@contextmanager
def build_progress() -> Iterator[Callable[[BuildProgress], None] | None]:
    """Yield a function to call with each :class:`~rsedge.runtime.engines.tensorrt.build.BuildProgress`: it draws a bar
    on a terminal; elsewhere yield None, and the backend logs lines itself.
    """
    if not sys.stderr.isatty():
        yield None
        return
    with _progress(None) as show:
        yield show and (lambda now: show("", now.step, now.steps, f"{now.role}: {now.phase}"))


@contextmanager
def _progress(unit: str | None, *, named: bool = True) -> Iterator[Callable[..., None] | None]:
    """Yield a function ``show(line, done, total, name)`` that draws a bar or prints a line; without numbers it always
    prints the line. Without a unit the bar shows the elapsed time, not the remaining time.
    """
    if not logging.getLogger("rsedge").isEnabledFor(logging.INFO):
        yield None
        return
    if not sys.stderr.isatty():
        last = time.monotonic()

        def show_line(line: str, done: int | None = None, total: int | None = None, name: str = "") -> None:  # noqa: ARG001
            nonlocal last
            if done is None:
                note(line)
            elif time.monotonic() - last >= _LINE_EVERY:
                last = time.monotonic()
                note(line)

        yield show_line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = [
        *([TextColumn("{task.description}", markup=False)] if named else []),
        *(BarColumn(), MofNCompleteColumn()),
        *([TextColumn(unit), TimeRemainingColumn()] if unit else [TimeElapsedColumn()]),
    ]
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)

        def show_bar(line: str, done: int | None = None, total: int | None = None, name: str = "") -> None:
            if done is None:
                bar.console.print(line, highlight=False, markup=False)
            else:
                bar.update(task, description=name, completed=done, total=total)

        yield show_bar
