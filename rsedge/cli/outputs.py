"""Shared steps of commands over tiles: report an interruption, save the options, print the summary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsedge.cli import options
from rsedge.cli.say import say, say_json

if TYPE_CHECKING:
    import click

    from rsedge.runtime.run.pipeline import Summary

SOME_TILES_FAILED = 3


@contextmanager
def resumable(output: str) -> Iterator[None]:
    """On an interruption, print where the finished tiles are."""
    try:
        yield
    except KeyboardInterrupt:
        journal = Path(f"{output}.journal")
        if output != "-" and journal.exists():
            say(f"\nfinished tiles are in {journal}; the same command continues from there", err=True)
        raise


def save_config(ctx: click.Context, output: Path, resolved: Mapping[str, Any]) -> None:
    """Save the options beside the output, with the values in ``resolved``, in a file that ``--config`` reads to repeat
    the run. Signatures of URLs are secrets and are left out.
    """
    from rsedge.errors import OutputError
    from rsedge.tomlfile import write_toml

    path = output.with_name(f"{output.name}.config.toml")
    try:
        values = {**ctx.params, "output": str(output), **resolved}
        write_toml(path, options.to_config(ctx.command, {name: _unsigned(value) for name, value in values.items()}))
    except OSError as error:
        raise OutputError(
            f"{output} is complete, but {path} cannot be written: {error.strerror}; move it away"
        ) from error


def _unsigned(value: Any) -> Any:
    """Return a text, a path or a tuple of them without credentials, and any other value unchanged."""
    from rsedge.runtime.scenes.remote import is_remote, unsigned
    from rsedge.texts import redact

    if isinstance(value, (tuple, list)):
        return tuple(map(_unsigned, value))
    text = str(value) if isinstance(value, Path) else value
    return redact(unsigned(text) if is_remote(text) else text) if isinstance(text, str) else value


def report(summary: Summary, made: str, device: str, device_reason: str, *, as_json: bool) -> int:
    """Print a summary of the run and return the exit code: JSON on stdout (on stderr if data goes to stdout), else a
    line on stderr.
    """
    for warning in summary.warnings:
        options.warn(warning)
    if as_json:
        values = {**summary.to_dict(), "device": device, "device_reason": device_reason}
        say_json(values, err=summary.output == "-")
    else:
        kept = f", {summary.resumed_tiles} of them from the interrupted run" if summary.resumed_tiles else ""
        parts = [f"{summary.ok} {made}", f"{summary.nodata} without data"]
        parts += [f"{summary.cloud} under cloud"] if summary.cloud else []
        parts += [f"{summary.read_errors} unreadable"]
        outputs = " and ".join(name for name in (summary.output, summary.embeddings) if name)
        unit = "images" if not summary.scenes else "tiles and images" if summary.images else "tiles"
        options.note(
            f"{outputs}: {summary.tiles} {unit} ({', '.join(parts)}){kept}; "
            f"{summary.seconds:.1f} s, {summary.tiles_per_second} {unit.split()[0]}/s on {device}"
        )
    return SOME_TILES_FAILED if summary.read_errors else 0
