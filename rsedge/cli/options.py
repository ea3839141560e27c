"""Options that several commands share, each defined once, and the ``--config`` file that can set them.

:func:`over_scenes` gives a command over scenes its common options as one :class:`SceneRun`.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from rsedge.cli.sandbox import sandboxed
from rsedge.cli.say import note, warn

if TYPE_CHECKING:
    from rsedge.runtime.captioner import Captioner
    from rsedge.runtime.embedder import Embedder
    from rsedge.runtime.outputs.files import Target
    from rsedge.runtime.run.sources import Inputs
    from rsedge.runtime.scenes.scene import Scene

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

PATH = click.Path(path_type=Path)
NEW_FILE = click.Path(dir_okay=False, path_type=Path)
OLD_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
AT_LEAST_0, AT_LEAST_1 = click.IntRange(min=0), click.IntRange(min=1)


def option(*flags: str, **settings: Any) -> Callable[[Decorated], Decorated]:
    """Return ``click.option`` with its default, if any, in the help."""
    return click.option(*flags, show_default=True, **settings)


def load_config(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:  # noqa: ARG001
    """Read option values from a TOML file. Flags on the command line override them."""
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
            f"{value} has unknown keys {', '.join(unknown)}; rsedge {ctx.info_name} accepts {accepted}"
        )
    for name, entry in given.items():
        entries = entry if getattr(names[name], "multiple", False) and isinstance(entry, list) else [entry]
        if isinstance(names[name].type, click.types.IntParamType) and any(type(one) is not int for one in entries):
            raise click.BadParameter(f"{value}: {name} is {entry!r}, expected a whole number")
    ctx.default_map = {**(ctx.default_map or {}), **{str(names[name].name): entry for name, entry in given.items()}}
    return value


def _spellings(command: click.Command) -> dict[str, click.Parameter]:
    """Return key in a configuration file → parameter: the spelling of the flag, with ``_`` for ``-``."""
    names = {}
    for parameter in command.params:
        flags = [flag.lstrip("-") for flag in parameter.opts if flag.startswith("--")] or [parameter.name or ""]
        if parameter.name not in ("config", "as_json", "overwrite"):
            names[flags[0].replace("-", "_")] = parameter
    return names


def save_config(output: Path, resolved: Mapping[str, Any]) -> None:
    """Save the options of this command beside the output, with the values in ``resolved`` and without those that are
    None, in a file that ``--config`` reads to repeat the run. Signatures of URLs are secrets and are left out.
    """
    from rsedge.errors import OutputError
    from rsedge.runtime.scenes.remote import is_remote, unsigned
    from rsedge.texts import redact
    from rsedge.tomlfile import write_toml

    def plain(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return list(map(plain, value))
        text = str(value) if isinstance(value, Path) else value
        return redact(unsigned(text) if is_remote(text) else text) if isinstance(text, str) else value

    ctx = click.get_current_context()
    values = {**ctx.params, "output": str(output), **resolved}
    path = output.with_name(f"{output.name}.config.toml")
    try:
        named = {key: values.get(str(parameter.name)) for key, parameter in _spellings(ctx.command).items()}
        write_toml(path, {key: plain(value) for key, value in named.items() if value is not None})
    except OSError as error:
        raise OutputError(
            f"{output} is complete, but {path} cannot be written: {error.strerror}; move it away"
        ) from error


class Bands(click.ParamType):  # type: ignore[type-arg]  # generic only in newer click
    """``4,3,2``, or a list of three numbers from a configuration file."""

    name = "R,G,B"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int, int]:
        """Return three band numbers."""
        try:
            red, green, blue = (int(part) for part in (value.split(",") if isinstance(value, str) else value))
        except (TypeError, ValueError):
            self.fail(f"{value!r}: give three band numbers for red, green and blue, such as 4,3,2", param, ctx)
        return red, green, blue


class BoaOffset(click.ParamType):  # type: ignore[type-arg]
    """``auto``, or a whole number."""

    name = "auto|0|-1000"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """Return the number, or None for ``auto``."""
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
        """Return True, False or ``"never"``."""
        if isinstance(value, bool):
            return value
        text = super().convert(value, param, ctx)
        return text if text == "never" else text == "true"


def _all_of(*added: Callable[[Decorated], Decorated]) -> Callable[[Decorated], Decorated]:
    """Return a decorator that adds several options, in the order of the help."""

    def add(function: Decorated) -> Decorated:
        for option in reversed(added):
            function = option(function)
        return function

    return add


family = click.argument("family", type=click.Choice(["blip", "clip", "clipcap"]))
sources = option("--data", "sources", multiple=True, help="Caption set; may be repeated.")
recipe = option(
    "--recipe",
    help="TOML file or a name from rsedge train --list-recipes.  [default: FAMILY-cpu, a small model from scratch; "
    "with a model or tokenizer of your own, the defaults of --list-keys]",
)
changes = _all_of(
    option(
        "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change a key of the recipe; may be repeated."
    ),
    option("--limit", type=AT_LEAST_1, help="Largest number of images per split."),
    option(
        "--val-fraction",
        type=click.FloatRange(0, 1, max_open=True),
        help="Share of the training images to validate on, for sets with splits but without val.",
    ),
    option("--skip-bad", is_flag=True, help="Skip unusable records."),
)
"""The options that change a recipe, for :func:`recipe_changes`."""
config = option(
    "--config",
    type=OLD_FILE,
    callback=load_config,
    is_eager=True,
    expose_value=False,
    help="TOML file with any of these options. Flags override it.",
)
bundle = option(
    "-m",
    "--model",
    type=PATH,
    help="Bundle, NAME.rsedge.  [default: RSEDGE_MODEL, else rsedge config get model, else the built-in model]",
)
embedder = option(
    "-m",
    "--model",
    type=PATH,
    help="Embedding bundle, CLIP.rsedge.  [default: RSEDGE_MODEL, else rsedge config get model]",
)
embedding_type = option(
    "--dtype",
    type=click.Choice(["float16", "float32"]),
    help="Number type of the stored embeddings.  [default: float16]",
)
device = option("--device", default="auto", help="auto (CUDA if it works, else CPU), cpu, cuda or cuda:N.")
backend = option(
    "--backend",
    type=click.Choice(["auto", "onnxruntime", "tensorrt"]),
    default="auto",
    help="Engine that runs the graphs. auto: TensorRT if it works, else ONNX Runtime.",
)
threads = option("--threads", type=AT_LEAST_1, help="CPU threads for inference.  [default: all cores]")
batch_size = option(
    "--batch-size",
    type=AT_LEAST_1,
    help="Images per batch.  [default: 16 on CPU; on CUDA 32 for captions, 64 for embeddings, or as many as fit]",
)
overwrite = option("--overwrite", is_flag=True, help="Replace an existing output.")
as_json = option("--json", "as_json", is_flag=True, help="Print a machine-readable summary.")
views = _all_of(
    option("--html", type=NEW_FILE, help="Write a report: one offline page, .html."),
    option("--sheet", type=NEW_FILE, help="Write a contact sheet of the tiles, .png."),
    option("--stac", type=NEW_FILE, help="Write a STAC item that describes the result, .json."),
    option(
        "--style/--no-style",
        default=True,
        help="Write a QGIS style, .qml, beside .geojson and .gpkg output; an existing style stays.",
    ),
)
"""The options of the extra outputs of a run over tiles."""

generation = _all_of(
    option("--beams", "num_beams", type=click.IntRange(1, 64), help="Width of the beam search; 1 is greedy search."),
    option("--max-new-tokens", type=AT_LEAST_1, help="Longest caption, in tokens."),
    option("--min-new-tokens", type=AT_LEAST_0, help="Shortest caption, in tokens."),
    option("--length-penalty", type=float, help="Above 0 favours longer captions in beam search."),
    option(
        "--early-stopping",
        type=EarlyStopping(),
        help="When beam search stops: true at the first full set, false when a better caption is unlikely, never when "
        "none is possible.",
    ),
    option("--repetition-penalty", type=float, help="Above 1 makes repeated tokens less likely."),
    option("--no-repeat-ngram-size", type=AT_LEAST_0, help="Forbid repeated n-grams of this size; 0 is off."),
    option("--top-p", type=float, help="Sample from the most likely tokens whose probabilities add up to this."),
    option("--top-k", type=AT_LEAST_0, help="Sample from this many most likely tokens; 0 is off."),
    option(
        "--temperature",
        type=float,
        help="Sample at this temperature: below 1 sharpens the distribution, above 1 flattens it.",
    ),
    option("--seed", type=AT_LEAST_0, help="Seed of the sampling. The same seed gives the same captions."),
)
"""All decoding options. Their defaults are the bundle's."""


_GRID = (
    option("--tile-size", type=AT_LEAST_1, default=224, help="Edge of a tile, in source pixels."),
    option("--overlap", type=AT_LEAST_0, default=0, help="Source pixels that neighbours share."),
    option(
        "--edge",
        type=click.Choice(["shift", "mirror", "pad", "drop"]),
        default="shift",
        help="Tiles at the right and lower edge: move them inward, fill them up with the scene mirrored or with black "
        "(pad), or drop them.",
    ),
)
_READING = (
    option(
        "--max-nodata",
        type=click.FloatRange(0, 1),
        default=0.5,
        help="Skip tiles with a larger share of pixels without data, or of pure black or white.",
    ),
    option(
        "--max-cloud",
        type=click.FloatRange(0, 1),
        default=0.8,
        help="Skip tiles with a larger share of cloud, where a cloud mask exists.",
    ),
    option("--bands", type=Bands(), help="Bands for red, green and blue, such as 4,3,2."),
    option(
        "--boa-offset",
        type=BoaOffset(),
        help="Offset added to Sentinel-2 digital numbers: -1000 from baseline 04.00 on, else 0; auto reads it from the "
        "metadata and checks it on the pixels.  [default: auto]",
    ),
    option("--nodata", type=float, help="No-data value.  [default: declared by the raster]"),
    option(
        "--pixel-values",
        type=click.Choice(["reflectance", "dn", "colours"]),
        help="Meaning of floating-point pixels: 0 to 1, 0 to 10000, or 0 to 255.  [default: guessed from the pixels]",
    ),
    option("--scl", help="Raster with Sen2Cor's scene classification.  [default: the product's own]"),
    option("--cloud-mask", help="Raster that marks clouds by values other than 0."),
    option("--resolution", type=float, help="Resample to pixels of this size, in map units, such as 10."),
    option("--allow-remote", is_flag=True, help="Read over the network: https://, s3://, gs:// and az://."),
    option(
        "--allow-host",
        "allow_hosts",
        multiple=True,
        help="Allow redirects and STAC items to name this host with a local or private address; may be repeated.",
    ),
    option(
        "--allow-root",
        "allow_roots",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        multiple=True,
        help="Allow STAC items, products and VRTs to name files in this folder too; may be repeated.",
    ),
    option("--allow-vrt", is_flag=True, help="Open VRT files. Their sources pass the same checks."),
    option("--max-pixels", type=AT_LEAST_1, default=20_000_000_000, help="Refuse rasters with more pixels."),
    option("--readers", type=AT_LEAST_1, default=2, help="Threads that read tiles."),
    option(
        "--sandbox",
        is_flag=True,
        help="Linux: run in a process that has no network and opens only the files named here.",
    ),
    sandboxed,
)
tiling = _all_of(*_GRID, *_READING)
"""The options for cutting and reading scenes; with ``--sandbox`` the command runs in a confined process."""
OF_SCENES = (
    *("bands", "boa_offset", "nodata", "pixel_values", "scl", "cloud_mask", "resolution"),
    *("allow_remote", "allow_hosts", "allow_roots", "allow_vrt", "max_pixels"),
)
"""The reading options for opening a scene: the fields of ``SceneOptions``."""
OF_TILES = ("tile_size", "overlap", "edge", "max_nodata", "max_cloud", "readers")
"""The options for cutting and reading tiles: the fields of ``TileOptions``."""
OF_SCENES_ALONE = tuple(name for name in (*OF_TILES, *OF_SCENES) if name != "readers")
"""The options that mean nothing for images."""
_OF_RUN = (
    *("model", "device", "backend", "threads", "batch_size", "overwrite", "as_json"),
    *("html", "sheet", "stac", "style"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneRun:
    """The options of a command over scenes that all such commands have, and what they stand for."""

    model: Path | None
    device: str
    backend: str
    threads: int | None
    batch_size: int | None
    as_json: bool
    overwrite: bool = False
    html: Path | None = None
    sheet: Path | None = None
    stac: Path | None = None
    style: bool = False
    scene: dict[str, Any] = field(default_factory=dict)
    """The fields of ``SceneOptions``."""
    tiling: dict[str, Any] = field(default_factory=dict)
    """The given fields of ``TileOptions``."""

    @property
    def engine(self) -> dict[str, Any]:
        """The options of the engine, as ``Captioner.load`` takes them."""
        return {name: getattr(self, name) for name in ("device", "backend", "threads", "batch_size")}

    def load_embedder(self) -> tuple[Path, Embedder]:
        """Load the chosen embedder; return its bundle too."""
        from rsedge.runtime.embedder import Embedder

        path = chosen_embedder(self.model)
        return path, Embedder.load(path, **self.engine)

    def check_outputs(
        self, output: str | None, *others: Path | str | None, file_format: str | None = None, formats: bool = True
    ) -> None:
        """Check the outputs before a scene or a model is opened. Raises OptionError for a suffix that names no format,
        and OutputError for a file that cannot be written or exists.
        """
        from rsedge.runtime.outputs.writers import parse_format
        from rsedge.runtime.run.pipeline import check_outputs

        if output is not None and formats:
            parse_format(output, file_format)
        named = [None if output in (None, "-") else Path(output), self.html, self.sheet, self.stac]
        named += [Path(each) for each in others if each is not None]
        check_outputs(named[0], [path for path in named if path is not None], overwrite=self.overwrite)

    def targets(
        self,
        scenes: Sequence[Scene],
        model: str,
        output: str,
        others: Mapping[str, Path | None],
        *,
        key: str = "captions",
        file_format: str | None = None,
        classes: Sequence[str] | None = None,
    ) -> list[Target]:
        """Return the report, contact sheet, QGIS style and STAC item that the user asked for, as outputs of a run.

        Args:
            scenes: The scenes of the run, in order.
            model: ``name@hash12`` of the bundle.
            output: Path of the main output, or ``-``.
            others: Kind of file → path, for the item; None for files that are not written.
            key: Asset key of the main output.
            file_format: Format of the main output if its suffix does not name it.
            classes: Labels of a classification.
        """
        found: list[Target] = []
        if self.html is not None:
            from rsedge.runtime.outputs.report.report import report_target

            found.append(report_target(self.html, scenes, classes=classes))
        if self.sheet is not None:
            from rsedge.runtime.outputs.report.sheet import sheet_target

            found.append(sheet_target(self.sheet, scenes))
        if self.style and Path(output).suffix.lower() in (".geojson", ".gpkg"):
            from rsedge.runtime.outputs.qgis_style import style_path, style_target

            if self.overwrite or not style_path(Path(output)).exists():
                found.append(style_target(Path(output), classes=classes))
        if self.stac is not None:
            from rsedge.runtime.outputs.stac_item import result_item_target

            files = {"report": self.html, "sheet": self.sheet, **others}
            item = result_item_target(
                self.stac,
                scenes=scenes,
                model=model,
                output=None if output == "-" else Path(output),
                others={name: file for name, file in files.items() if file is not None},
                key=key,
                file_format=file_format,
            )
            found.append(item)
        return found


def over_scenes(*, tiles: bool = True, overwrites: bool = True) -> Callable[[Decorated], Decorated]:
    """Return a decorator that adds the options for reading, the engine and the output, with ``tiles`` those for cutting
    and with ``overwrites`` the one for replacing. The command gets their values as a :class:`SceneRun`, and the values
    of all other options by name.
    """

    def add(function: Decorated) -> Decorated:
        @functools.wraps(function)
        def call(**values: Any) -> Any:
            scene, tiling = take(values, OF_SCENES), take(values, OF_TILES)
            return function(SceneRun(**take(values, _OF_RUN), scene=scene, tiling=tiling), **values)

        cutting = _GRID if tiles else ()
        engine = (device, backend, threads, batch_size)
        replacing = (overwrite,) if overwrites else ()
        return cast("Decorated", _all_of(*cutting, *_READING, *engine, *replacing, as_json, config)(call))

    return add


def used(model: Captioner | Embedder) -> dict[str, Any]:
    """Return the options of the engine that a model runs with."""
    return {"device": model.device, "backend": model.backend, "batch_size": model.batch_size}


@contextmanager
def needed_for(task: str, extra: str) -> Iterator[None]:
    """Raise BackendError with the command that installs what the imports in the block lack."""
    from rsedge.errors import BackendError

    try:
        yield
    except ImportError as error:
        raise BackendError(f"{task} needs {error.name}: pip install 'rsedge[{extra}]'") from error


def recipe_changes(
    settings: Sequence[str],
    sources: Sequence[str],
    limit: int | None,
    val_fraction: float | None,
    skip_bad: bool,
    *,
    init: str | None = None,
) -> list[str]:
    """Return the changes of a recipe that the options stand for, as ``KEY=VALUE``."""
    changes = [*settings]
    if sources:
        changes.append(f"data.sources={json.dumps(list(sources))}")
    if init is not None:
        changes.append(f"model.init={json.dumps(init)}")
    if limit is not None:
        changes.append(f"data.limit={limit}")
    if val_fraction is not None:
        changes.append(f"data.val_fraction={val_fraction}")
    if skip_bad:
        changes.append("data.skip_bad=true")
    return changes


def given(names: Iterable[str]) -> list[str]:
    """Return the flags of the parameters in ``names`` that the user gave, on the command line or in a file."""
    ctx, default, wanted = click.get_current_context(), click.core.ParameterSource.DEFAULT, set(names)
    return [
        parameter.opts[0]
        for parameter in ctx.command.params
        if parameter.name in wanted and ctx.get_parameter_source(parameter.name) not in (default, None)
    ]


def take(values: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Remove the entries ``names`` from ``values`` and return them."""
    return {name: values.pop(name) for name in names if name in values}


def open_scenes(
    names: Sequence[str],
    outputs: Iterable[Path | str | None] = (),
    unopened: list[str] | None = None,
    **scene_options: Any,
) -> list[Scene]:
    """Open the scenes that ``names`` stand for and print a line for each; ``-`` is STAC on standard input.

    Files in ``outputs`` are skipped: an earlier run may have left them in an input folder. With a list in ``unopened``,
    scenes that cannot be opened beside others are added to it, with a warning.
    """
    from rsedge.runtime.scenes.opening import open_scenes as open_all

    written = [output for output in outputs if output is not None]
    scenes = open_all(names, stdin=standard_input(names), outputs=written, unopened=unopened, **scene_options)
    for scene in scenes:
        introduce(scene)
    return scenes


image_kind = option(
    "--as",
    "kind",
    type=click.Choice(["auto", "scene", "image"]),
    default="auto",
    help="Treat files as scenes, cut into tiles, or as images, seen whole; auto: georeferenced files are scenes.",
)


def open_inputs(
    names: Sequence[str], kind: Any, given_options: SceneRun, outputs: Iterable[Path | str | None] = ()
) -> Inputs:
    """Open the scenes and images that ``names`` stand for, and print a line for each scene and warning. Raises
    UsageError for options of scenes if there is none.
    """
    from rsedge.datasets.images import SUFFIXES, FileImage
    from rsedge.runtime.run.sources import find_inputs
    from rsedge.runtime.scenes.opening import SceneOptions
    from rsedge.runtime.scenes.scene import Scene

    found = find_inputs(
        names,
        open_scene=functools.partial(Scene.open, **given_options.scene),
        open_image=FileImage,
        suffixes=SUFFIXES,
        kind=kind,
        access=SceneOptions(**given_options.scene).access,
        stdin=standard_input(names),
        outputs=[output for output in outputs if output is not None],
    )
    scenes = [entry for entry in found.entries if isinstance(entry, Scene)]
    if not scenes and (useless := given(OF_SCENES_ALONE)):
        raise click.UsageError(
            f"{', '.join(useless)}: for scenes only, and none of the inputs is one (a raster with a georeference); "
            "leave out, or pass --as scene to cut images into tiles"
        )
    for scene in scenes:
        introduce(scene)
    for warning in found.warnings:
        warn(warning)
    return found


def standard_input(names: Sequence[str]) -> str | None:
    """Read standard input if ``names`` contains ``-``, else return None."""
    from rsedge.jsonvalues import LARGEST

    return sys.stdin.read(LARGEST + 1) if "-" in names else None


def introduce(scene: Scene) -> None:
    """Print a line about a scene: its size, its bands and its rendering."""
    note(f"{scene.name}: {scene.width} x {scene.height} px, {scene.bands_reason}; {scene.rule}")


def chosen_bundle(model: Path | None) -> Path:
    """Return the bundle of ``-m``, or the default bundle after printing which one it is and why."""
    if model is not None:
        return model
    from rsedge.cli.config import default_model

    path, reason = default_model()
    note(f"model: {path} ({reason})")
    return path


def chosen_captioner(model: Path | None) -> Path:
    """Return the chosen bundle; raise OptionError unless it is a captioner."""
    from rsedge.bundle import read_bundle
    from rsedge.errors import OptionError

    path = chosen_bundle(model)
    manifest = read_bundle(path).manifest
    if manifest.generation is None:
        raise OptionError(
            f"{path} is a {manifest.family} bundle: it computes embeddings (rsedge embed) and writes no captions; pass "
            "a captioner, such as a BLIP bundle, with -m"
        )
    return path


def chosen_embedder(model: Path | None) -> Path:
    """Return the chosen bundle; raise OptionError unless it computes embeddings."""
    from rsedge.bundle import read_bundle
    from rsedge.errors import OptionError

    path = chosen_bundle(model)
    manifest = read_bundle(path).manifest
    if manifest.embedding is None:
        raise OptionError(
            f"{path} is a {manifest.family} bundle: it writes captions (rsedge caption) and computes no embeddings; "
            "export a CLIP or SigLIP checkpoint and pass that bundle"
        )
    return path


def chosen_output(output: str | None, scenes: Sequence[Scene], suffix: str) -> str:
    """Return the output that the user named, else a name made from the only scene."""
    if output is not None:
        return output
    if len(scenes) > 1:
        raise click.UsageError(f"{len(scenes)} scenes need a named output: pass -o, such as -o all.geojson")
    return file_name(scenes[0], suffix)


def file_name(scene: Scene, suffix: str) -> str:
    """Return a file name in this folder made from a scene's name. The name may come from a stranger's product or item:
    ``../.x/y`` becomes ``_.x_y`` and the suffix.
    """
    return f"{scene.name.replace('/', '_').replace(os.sep, '_').lstrip('.') or 'scene'}{suffix}"
