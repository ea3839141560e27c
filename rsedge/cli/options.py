"""Options that several commands share, each defined once, and the configuration file that can give any of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def load_config(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:  # noqa: ARG001
    """Take option values from a TOML file; flags on the command line win."""
    if value is None:
        return None
    from rsedge.errors import OptionError
    from rsedge.tomlfile import read_toml

    try:
        given = {name.replace("-", "_"): entry for name, entry in read_toml(value).items()}
    except OptionError as error:
        raise click.BadParameter(str(error)) from error
    known = {parameter.name for parameter in ctx.command.params} - {"config"}
    unknown = sorted(set(given) - {name for name in known if name})
    if unknown:
        names = ", ".join(sorted(name for name in known if name))
        raise click.BadParameter(f"{value} has unknown keys {', '.join(unknown)}; rsedge {ctx.info_name} has {names}")
    ctx.default_map = {**(ctx.default_map or {}), **given}
    return value


def parse_bands(ctx: click.Context, param: click.Parameter, value: Any) -> tuple[int, int, int] | None:  # noqa: ARG001
    """``4,3,2`` → (4, 3, 2)."""
    if value is None or value == "":
        return None
    parts = str(value).split(",") if isinstance(value, str) else list(value)
    try:
        red, green, blue = (int(part) for part in parts)
    except ValueError as error:
        message = f"{value!r}: give three band numbers for red, green and blue, such as 4,3,2"
        raise click.BadParameter(message) from error
    return red, green, blue


config = click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    callback=load_config,
    is_eager=True,
    expose_value=False,
    help="TOML file with any of these options; flags win.",
)
bundle = click.option("-m", "--model", type=click.Path(path_type=Path), required=True, help="Bundle, NAME.rsedge.")
device = click.option(
    "--device", default="auto", show_default=True, help="auto (CUDA if usable, else CPU), cpu, cuda or cuda:N."
)
threads = click.option("--threads", type=click.IntRange(min=1), help="CPU threads of inference.  [default: all cores]")
batch_size = click.option(
    "--batch-size", type=click.IntRange(min=1), help="Images decoded together.  [default: 16 on CPU, 64 on CUDA]"
)
overwrite = click.option("--overwrite", is_flag=True, help="Replace an existing output.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print a machine-readable summary.")

_GENERATION = (
    click.option("--beams", "num_beams", type=click.IntRange(1, 64), help="Beam search width; 1 is greedy."),
    click.option("--max-new-tokens", type=click.IntRange(min=1), help="Longest caption, in tokens."),
    click.option("--min-new-tokens", type=click.IntRange(min=0), help="Shortest caption, in tokens."),
    click.option("--length-penalty", type=float, help="Above 0 favours longer captions in beam search."),
    click.option("--early-stopping/--no-early-stopping", default=None, help="Stop at the first full set of captions."),
    click.option("--repetition-penalty", type=float, help="Above 1 makes repeated tokens less likely."),
    click.option("--no-repeat-ngram-size", type=click.IntRange(min=0), help="No n-gram of this size twice; 0 is off."),
    click.option("--top-p", type=float, help="Sample from the most likely tokens that hold this share."),
    click.option("--top-k", type=click.IntRange(min=0), help="Sample from this many most likely tokens; 0 is off."),
    click.option("--temperature", type=float, help="Sample; below 1 sharpens, above 1 flattens."),
    click.option("--seed", type=click.IntRange(min=0), help="Of sampling; the same seed gives the same captions."),
)


def generation(function: Decorated) -> Decorated:
    """All decoding options; those not given are the bundle's defaults."""
    for option in reversed(_GENERATION):
        function = option(function)
    return function


_TILING = (
    click.option("--tile-size", type=click.IntRange(min=1), default=224, show_default=True, help="Source pixels."),
    click.option("--overlap", type=click.IntRange(min=0), default=0, show_default=True, help="Source pixels shared."),
    click.option(
        "--edge",
        type=click.Choice(["pad", "shift", "drop"]),
        default="pad",
        show_default=True,
        help="Tiles at the right and lower edge: fill up, move inward, or leave out.",
    ),
    click.option(
        "--max-nodata",
        type=click.FloatRange(0, 1),
        default=0.5,
        show_default=True,
        help="Tiles with a larger share without data get no caption.",
    ),
    click.option("--bands", callback=parse_bands, help="Bands for red, green and blue, such as 4,3,2."),
    click.option(
        "--boa-offset",
        type=int,
        help="Added to Sentinel-2 DN: -1000 from baseline 04.00 on, else 0.  [default: what the bands declare]",
    ),
    click.option("--nodata", type=float, help="Value without data.  [default: what the raster declares]"),
    click.option("--readers", type=click.IntRange(min=1), default=2, show_default=True, help="Reading threads."),
)


def tiling(function: Decorated) -> Decorated:
    """How scenes are read and cut."""
    for option in reversed(_TILING):
        function = option(function)
    return function


def note(text: str) -> None:
    """A line for the person at the terminal, on stderr unless ``--quiet``."""
    logging.getLogger("rsedge").info(text)
