"""Options that several commands share, each defined once, and the configuration file that can give any of them."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from rsedge.cli.sandbox import sandboxed

if TYPE_CHECKING:
    from rsedge.runtime.scenes.scene import Scene

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def load_config(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:  # noqa: ARG001
    """Take option values from a TOML file; flags on the command line win."""
    if value is None:
        return None
    from rsedge.errors import OptionError
    from rsedge.tomlfile import read_toml

    names = _spellings(ctx.command)
    try:
        given = {name.replace("-", "_"): entry for name, entry in read_toml(value).items()}
    except OptionError as error:
        raise click.BadParameter(str(error)) from error
    if unknown := sorted(set(given) - set(names)):
        accepted = ", ".join(names)
        raise click.BadParameter(
            f"{value} has unknown keys {', '.join(unknown)}; rsedge {ctx.info_name} has {accepted}"
        )
    for name, entry in given.items():
        entries = entry if getattr(names[name], "multiple", False) and isinstance(entry, list) else [entry]
        if isinstance(names[name].type, click.types.IntParamType) and any(type(one) is not int for one in entries):
            raise click.BadParameter(f"{value}: {name} is {entry!r}, expected a whole number")
    ctx.default_map = {**(ctx.default_map or {}), **{str(names[name].name): entry for name, entry in given.items()}}
    return value


def _spellings(command: click.Command) -> dict[str, click.Parameter]:
    """What a file may call each parameter: its flag's spelling, with ``_`` for ``-``."""
    names = {}
    for parameter in command.params:
        flags = [flag.lstrip("-") for flag in parameter.opts if flag.startswith("--")] or [parameter.name or ""]
        if parameter.name not in ("config", "as_json", "overwrite"):
            names[flags[0].replace("-", "_")] = parameter
    return names


def to_config(command: click.Command, values: dict[str, Any]) -> dict[str, Any]:
    """Parameter values as :func:`load_config` takes them; those that are None are left out."""
    return {
        name: list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
        for name, parameter in _spellings(command).items()
        if (value := values.get(str(parameter.name))) is not None
    }


class Bands(click.ParamType):  # type: ignore[type-arg]  # generic only in newer click
    """``4,3,2``, or a list of three numbers from a configuration file."""

    name = "R,G,B"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int, int]:
        """Three band numbers."""
        try:
            red, green, blue = (int(part) for part in (value.split(",") if isinstance(value, str) else value))
        except (TypeError, ValueError):
            self.fail(f"{value!r}: give three band numbers for red, green and blue, such as 4,3,2", param, ctx)
        return red, green, blue


class BoaOffset(click.ParamType):  # type: ignore[type-arg]
    """``auto``, or a whole number."""

    name = "auto|0|-1000"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """The number, or None for ``auto``."""
        if value == "auto":
            return None
        try:
            return int(value)
        except (TypeError, ValueError):
            self.fail(f"{value!r}: give auto, 0 or -1000", param, ctx)


class EarlyStopping(click.Choice):  # type: ignore[type-arg]
    """``true``, ``false`` or ``never``; TOML's own booleans too."""

    def __init__(self) -> None:
        super().__init__(["true", "false", "never"])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """True, False or ``"never"``."""
        if isinstance(value, bool):
            return value
        text = super().convert(value, param, ctx)
        return text if text == "never" else text == "true"


config = click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    callback=load_config,
    is_eager=True,
    expose_value=False,
    help="TOML file with any of these options; flags win.",
)
bundle = click.option(
    "-m",
    "--model",
    type=click.Path(path_type=Path),
    help="Bundle, NAME.rsedge.  [default: RSEDGE_MODEL, else rsedge config get model, else the built-in one]",
)
embedder = click.option(
    "-m",
    "--model",
    type=click.Path(path_type=Path),
    help="Embedding bundle, CLIP.rsedge.  [default: RSEDGE_MODEL, else rsedge config get model]",
)
embedding_type = click.option(
    "--dtype",
    type=click.Choice(["float16", "float32"]),
    help="What embeddings are stored as.  [default: float16]",
)
device = click.option(
    "--device", default="auto", show_default=True, help="auto (CUDA if usable, else CPU), cpu, cuda or cuda:N."
)
backend = click.option(
    "--backend",
    type=click.Choice(["auto", "onnxruntime", "tensorrt"]),
    default="auto",
    show_default=True,
    help="What runs the graphs; auto: TensorRT where it works, else ONNX Runtime.",
)
threads = click.option("--threads", type=click.IntRange(min=1), help="CPU threads of inference.  [default: all cores]")
batch_size = click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    help="Images computed together.  [default: 16 on CPU; on CUDA 32 to caption, 64 to embed, or what fits]",
)
overwrite = click.option("--overwrite", is_flag=True, help="Replace an existing output.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print a machine-readable summary.")

_GENERATION = (
    click.option("--beams", "num_beams", type=click.IntRange(1, 64), help="Beam search width; 1 is greedy."),
    click.option("--max-new-tokens", type=click.IntRange(min=1), help="Longest caption, in tokens."),
    click.option("--min-new-tokens", type=click.IntRange(min=0), help="Shortest caption, in tokens."),
    click.option("--length-penalty", type=float, help="Above 0 favours longer captions in beam search."),
    click.option(
        "--early-stopping",
        type=EarlyStopping(),
        help="When beam search ends: at the first full set, or when unbeatable.",
    ),
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


_GRID = (
    click.option("--tile-size", type=click.IntRange(min=1), default=224, show_default=True, help="Source pixels."),
    click.option("--overlap", type=click.IntRange(min=0), default=0, show_default=True, help="Source pixels shared."),
    click.option(
        "--edge",
        type=click.Choice(["pad", "shift", "drop"]),
        default="pad",
        show_default=True,
        help="Tiles at the right and lower edge: fill up, move inward, or leave out.",
    ),
)
_READING = (
    click.option(
        "--max-nodata",
        type=click.FloatRange(0, 1),
        default=0.5,
        show_default=True,
        help="Tiles with a larger share without data, or of pure black or white, are left out.",
    ),
    click.option(
        "--max-cloud",
        type=click.FloatRange(0, 1),
        default=0.8,
        show_default=True,
        help="Tiles with a larger share of cloud are left out, where clouds are known.",
    ),
    click.option("--bands", type=Bands(), help="Bands for red, green and blue, such as 4,3,2."),
    click.option(
        "--boa-offset",
        type=BoaOffset(),
        help="Added to Sentinel-2 DN: -1000 from baseline 04.00 on, else 0; auto: what metadata say, checked on the "
        "pixels.  [default: auto]",
    ),
    click.option("--nodata", type=float, help="Value without data.  [default: what the raster declares]"),
    click.option(
        "--pixel-values",
        type=click.Choice(["reflectance", "dn", "colours"]),
        help="What floating-point pixels are: 0 to 1, 0 to 10000, or 0 to 255.  [default: told from the pixels]",
    ),
    click.option("--scl", help="Raster of Sen2Cor's scene classification.  [default: the product's own]"),
    click.option("--cloud-mask", help="Raster in which what is not 0 is cloud."),
    click.option("--resolution", type=float, help="Resample to pixels of this size, in map units, such as 10."),
    click.option("--allow-remote", is_flag=True, help="Read over the network: https://, s3:// and the like."),
    click.option(
        "--allow-host",
        "allow_hosts",
        multiple=True,
        help="Host with a local or private address that redirects and STAC items may name; may be repeated.",
    ),
    click.option(
        "--allow-root",
        "allow_roots",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        multiple=True,
        help="Folder that STAC items, products and VRTs may name files of, beside their own; may be repeated.",
    ),
    click.option("--allow-vrt", is_flag=True, help="Open VRT files; their sources pass the same checks."),
    click.option(
        "--max-pixels",
        type=click.IntRange(min=1),
        default=20_000_000_000,
        show_default=True,
        help="Largest raster that is opened, in pixels.",
    ),
    click.option("--readers", type=click.IntRange(min=1), default=2, show_default=True, help="Reading threads."),
    click.option(
        "--sandbox",
        is_flag=True,
        help="Linux: read in a process without network that can open only what is named here.",
    ),
)
OF_ACCESS = ("allow_remote", "allow_hosts", "allow_roots", "allow_vrt", "max_pixels")
"""What of the reading options limits what an input may touch: the last fields of ``SceneOptions``."""
OF_SCENES = ("bands", "boa_offset", "nodata", "pixel_values", "scl", "cloud_mask", "resolution", *OF_ACCESS)
"""What of the reading options decides how a scene is opened: the fields of ``SceneOptions``."""
OF_TILES = ("tile_size", "overlap", "edge", "max_nodata", "max_cloud", "readers")
"""What of the tiling options decides how it is cut and read: the fields of ``TileOptions``."""


def given(ctx: click.Context, names: Iterable[str]) -> list[str]:
    """The flags of those of the parameters ``names`` that were given, on the command line or in a file."""
    default = click.core.ParameterSource.DEFAULT
    wanted = set(names)
    return [
        parameter.opts[0]
        for parameter in ctx.command.params
        if parameter.name in wanted and ctx.get_parameter_source(parameter.name) not in (default, None)
    ]


def take(values: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Those of ``values`` that are called ``names``, removed from it."""
    return {name: values.pop(name) for name in names if name in values}


def open_scenes(names: Sequence[str], outputs: Iterable[Path | str | None] = (), **scene_options: Any) -> list[Scene]:
    """The scenes that ``names`` stand for, with a line for each; ``-`` is STAC on standard input.

    What ``outputs`` name is none of them, where it was left in a folder by an earlier run.
    """
    from rsedge.runtime.scenes.opening import open_scenes as open_all

    written = [output for output in outputs if output is not None]
    scenes = open_all(names, stdin=standard_input(names), outputs=written, **scene_options)
    for scene in scenes:
        introduce(scene)
    return scenes


def standard_input(names: Sequence[str]) -> str | None:
    """What stands on standard input, where one of ``names`` asks for it."""
    from rsedge.jsontext import LARGEST

    return sys.stdin.read(LARGEST + 1) if "-" in names else None


def introduce(scene: Scene) -> None:
    """What is read of a scene, and how, as a line for people."""
    note(f"{scene.name}: {scene.width} x {scene.height} px, {scene.bands_reason}; {scene.rule}")


def reading(function: Decorated) -> Decorated:
    """How scenes are read, and where: with ``--sandbox`` in a process of its own."""
    function = sandboxed(function)
    for option in reversed(_READING):
        function = option(function)
    return function


def tiling(function: Decorated) -> Decorated:
    """How scenes are cut and read."""
    function = reading(function)
    for option in reversed(_GRID):
        function = option(function)
    return function


def chosen_bundle(model: Path | None) -> Path:
    """The bundle of ``-m``, else the default one, saying which and why."""
    if model is not None:
        return model
    from rsedge.cli.settings import default_model

    path, reason = default_model()
    note(f"model: {path} ({reason})")
    return path


def chosen_captioner(model: Path | None) -> Path:
    """The bundle that :func:`chosen_bundle` gives; an OptionError unless it writes captions."""
    return _of_kind(chosen_bundle(model), captions=True)


def chosen_embedder(model: Path | None) -> Path:
    """The bundle that :func:`chosen_bundle` gives; an OptionError unless it makes embeddings."""
    return _of_kind(chosen_bundle(model), captions=False)


def _of_kind(path: Path, *, captions: bool) -> Path:
    from rsedge.bundle import read_bundle
    from rsedge.errors import OptionError

    manifest = read_bundle(path).manifest
    if captions and manifest.generation is None:
        raise OptionError(
            f"{path} is a {manifest.family} bundle: it makes embeddings (rsedge embed) and writes no captions; pass a "
            "captioner, such as a BLIP bundle, with -m"
        )
    if not captions and manifest.embedding is None:
        raise OptionError(
            f"{path} is a {manifest.family} bundle: it writes captions (rsedge caption) and makes no embeddings; "
            "export a CLIP or SigLIP checkpoint and pass that bundle"
        )
    return path


def chosen_output(output: str | None, scenes: Sequence[Scene], suffix: str) -> str:
    """The output as named, else one after the only scene."""
    if output is not None:
        return output
    if len(scenes) > 1:
        raise click.UsageError(f"{len(scenes)} scenes go into one output: name it with -o, such as -o all.geojson")
    return file_name(scenes[0], suffix)


def file_name(scene: Scene, suffix: str) -> str:
    """An output in this folder that is called after a scene, whatever a product or an item calls it: the identifier
    ``../.x/y`` gives ``_.x_y`` and the suffix.
    """
    return f"{scene.name.replace('/', '_').replace(os.sep, '_').lstrip('.') or 'scene'}{suffix}"


def note(text: str) -> None:
    """A line for the person at the terminal, on stderr unless ``--quiet``."""
    logging.getLogger("rsedge").info(text)


def warn(text: str) -> None:
    """A line the person should act on, on stderr unless ``--quiet``."""
    logging.getLogger("rsedge").warning("Warning: %s", text)
