"""Printing for the command line: plain text without control characters or credentials."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import traceback
import warnings
from collections.abc import Mapping
from typing import Any

import click

from rsedge.texts import plain, redact


def say(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print text on standard output or standard error, without control characters and credentials.

    Args:
        text: One line, or several.
        err: Whether it goes to standard error.
        nl: Whether a line end follows.
    """
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
        if args.exc_value is not None:
            say_traceback(args.exc_value)

    warnings.formatwarning = format_warning
    threading.excepthook = say_thread
