"""``rsedge batch``: caption or embed the scenes of a catalogue, a file per scene."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rsedge.cli import options
from rsedge.cli.say import SOME_TILES_FAILED, batch_progress, note, say, say_json, warn

if TYPE_CHECKING:
    from rsedge.runtime.outputs.files import Target
    from rsedge.runtime.run.batch import Batch, Shard
    from rsedge.runtime.run.pipeline import Models
    from rsedge.runtime.run.sources import TileOptions
    from rsedge.runtime.scenes.scene import Scene

_ROW_BYTES = 100
"""Size of a record in GeoParquet, about."""
_SUFFIXES = {"html": ".html", "sheet": ".png", "stac": ".json"}
_ARRAYS = (
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
    ("AWS_BATCH_JOB_ARRAY_INDEX", "AWS_BATCH_JOB_ARRAY_SIZE", None),
    ("JOB_COMPLETION_INDEX", "JOB_COMPLETION_COUNT", None),
)
"""Environment variables of job arrays: index, number of jobs, first index if it is not 0."""


class ShardType(click.ParamType):  # type: ignore[type-arg]  # generic only in newer click
    """``I/N``, or ``auto``."""

    name = "I/N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Shard:
        """Return the shard; ``auto`` reads the environment of Slurm, AWS Batch and Kubernetes."""
        from rsedge.errors import OptionError
        from rsedge.runtime.run.batch import Shard

        text = str(value)
        if text == "auto":
            index, count, first = next((names for names in _ARRAYS if names[0] in os.environ), (None, None, None))
            if index is None:
                known = ", ".join(names[0] for names in _ARRAYS)
                self.fail(f"auto: none of {known} is set; give I/N, such as 0/8", param, ctx)
            if count is None or count not in os.environ:
                self.fail(f"auto: {index} is set and {count} is not: set it to the number of jobs", param, ctx)
            try:
                offset = int(os.environ.get(first, "0")) if first else 0
                text = f"{int(os.environ[index]) - offset}/{int(os.environ[count])}"
            except ValueError:
                found = f"{index}={os.environ[index]!r}, {count}={os.environ[count]!r}"
                self.fail(f"auto: {found} are no whole numbers", param, ctx)
        number, _, count = text.partition("/")
        try:
            return Shard(int(number), int(count))
        except (ValueError, OptionError) as error:
            reason = str(error) if isinstance(error, OptionError) else "give I/N, such as 0/8 to 7/8, or auto"
            self.fail(f"{value!r}: {reason}", param, ctx)


@click.command("batch")
@click.argument("catalog", metavar="CATALOG...", nargs=-1, required=True)
@options.bundle
@options.option("-o", "--output", type=options.FOLDER, required=True, help="Folder of the outputs.")
@options.option("--embedder", type=options.PATH, help="Bundle that computes embeddings of the same tiles, CLIP.rsedge.")
@options.embedding_type
@options.option(
    "--also",
    type=click.Choice(["html", "sheet", "stac"]),
    multiple=True,
    help="Write a report (.html), a contact sheet (.png) or a STAC item (.json) per scene too; may be repeated.",
)
@options.option("--shard", type=ShardType(), help="Do part I of N of the catalogue; auto: the part of this array job.")
@options.option("--retry-failed", is_flag=True, help="Also do scenes that failed in an earlier run.")
@options.option("--redo-stale", is_flag=True, help="Also do scenes finished with other options or another input.")
@options.option("--max-failures", type=options.AT_LEAST_0, help="End when more scenes than this failed.")
@options.option("--dry-run", is_flag=True, help="Print the plan: scenes, tiles, expected time and size.")
@options.generation
@options.over_scenes(overwrites=False)
def command(
    given: options.SceneRun,
    *,
    catalog: tuple[str, ...],
    output: Path,
    embedder: Path | None,
    dtype: Any,
    also: tuple[str, ...],
    shard: Shard | None,
    retry_failed: bool,
    redo_stale: bool,
    max_failures: int | None,
    dry_run: bool,
    **decoding: Any,
) -> int:
    """Caption the scenes of a CATALOG, or compute embeddings, into a file per scene.

    A CATALOG is a folder, a pattern, a STAC item or collection of items, or a text file (.txt) with one scene per line.
    The output of a scene is OUTPUT/COLLECTION/MGRS TILE/SCENE.parquet, whole or absent. The same command continues: it
    does the scenes without an output. Failed scenes are listed in OUTPUT/failed.jsonl, never stop the others, and the
    exit code is 3. A bundle that computes embeddings (-m CLIP.rsedge) writes embeddings without captions.
    """
    from rsedge.bundle import read_bundle
    from rsedge.runtime.run.batch import Batch, Job
    from rsedge.runtime.run.batch_catalog import read_catalog
    from rsedge.runtime.run.sources import TileOptions
    from rsedge.runtime.scenes.opening import SceneOptions

    # 1. The models: a captioner, an embedder, or both.
    bundle = options.chosen_bundle(given.model)
    if read_bundle(bundle).manifest.generation is None and (useless := options.given([*decoding, "embedder"])):
        message = f"{', '.join(useless)}: {bundle} computes embeddings and writes no captions; leave out"
        raise click.UsageError(message)
    models, settings, device = _models(given, bundle, embedder, dtype, decoding)

    # 2. The batch.
    def beside(scene: Scene, main: Path) -> list[Target]:
        named: dict[str, Any] = {name: main.with_suffix(_SUFFIXES[name]) for name in also}
        views = dataclasses.replace(given, style=False, **named)
        return views.targets([scene], models.model, str(main), {}, key="captions" if models.captioner else "embeddings")

    tiling = TileOptions(**given.tiling)
    access, stdin = SceneOptions(**given.scene).access, options.standard_input(catalog)
    batch = Batch(
        lambda: read_catalog(catalog, access=access, stdin=stdin),
        Job(models=models, tiling=tiling, scene=given.scene, settings=settings, beside=beside),
        output,
        shard=shard,
        retry_failed=retry_failed,
        redo_stale=redo_stale,
    )

    # 3. The plan alone, or the run.
    if dry_run:
        _print_plan(batch, given, tiling, [path for path in (bundle, embedder) if path], models)
        return 0
    with batch_progress() as progress:
        summary = batch.run(max_failures=max_failures, progress=progress)
    if given.as_json:
        say_json({**summary.to_dict(), "device": device})
    else:
        parts = [f"{summary.done} scenes done", f"{summary.finished_before} finished before"]
        counts = {
            "failed": summary.failed,
            "failed before": summary.failed_before,
            "made with other options": summary.stale,
        }
        counts |= {"in use by another process": summary.in_use, "of other shards": summary.other_shards}
        parts += [f"{count} {label}" for label, count in counts.items() if count]
        note(f"{output}: {', '.join(parts)}; {summary.tiles} tiles in {summary.seconds:.1f} s")
        if summary.failed_before:
            note("scenes that failed before are left alone: --retry-failed does them again")
        if summary.stale:
            note("scenes made with other models or options are left alone: --redo-stale does them again")
        if summary.failures:
            warn(f"{summary.failures} lists the scenes that failed")
    return SOME_TILES_FAILED if summary.failed or summary.failed_before else 0


def _models(
    given: options.SceneRun, bundle: Path, embedder: Path | None, dtype: Any, decoding: dict[str, Any]
) -> tuple[Models, dict[str, Any], str]:
    """Load the models; return them, the settings that decide the results, and the device."""
    from rsedge.bundle import read_bundle
    from rsedge.runtime.captioner import Captioner
    from rsedge.runtime.embedder import Embedder
    from rsedge.runtime.run.pipeline import Models

    if read_bundle(bundle).manifest.generation is None:
        second = Embedder.load(bundle, **given.engine)
        return Models(embedder=second, dtype=dtype or "float16"), {"embedder": options.used(second)}, second.device
    if dtype is not None and embedder is None:
        raise click.UsageError("--dtype is the number type of embeddings: pass --embedder BUNDLE too")
    limits = {name: decoding[name] for name in ("num_beams", "max_new_tokens")}
    captioner = Captioner.load(bundle, **given.engine, **limits)
    task = captioner.with_options(**decoding)
    other = Embedder.load(options.chosen_embedder(embedder), **given.engine) if embedder else None
    settings = {**dataclasses.asdict(task.options), **options.used(captioner)}
    settings["embedder"] = options.used(other) if other else None
    return Models(captioner=task, embedder=other, dtype=dtype or "float16"), settings, captioner.device


def _print_plan(
    batch: Batch, given: options.SceneRun, tiling: TileOptions, bundles: list[Path], models: Models
) -> None:
    """Print the number of scenes by state, and what the run would take, estimated from some of the scenes."""
    import numpy as np

    from rsedge.runtime.diagnostics.describe import measure_model

    states, sampled = batch.sample()
    scenes = sum(count for state, count in states.items() if batch.wanted(state))
    tiles = round(sum(len(tiling.grid(scene)) for scene in sampled) / len(sampled) * scenes) if sampled else 0
    seconds = 0.0
    for path in bundles if sampled else []:
        rate = measure_model(path, **given.engine)(sampled[0], tiling).tiles_per_second
        seconds += tiles / rate if rate else 0
    size = tiles * (_ROW_BYTES + (models.embedder.dim * np.dtype(models.dtype).itemsize if models.embedder else 0))
    if given.as_json:
        say_json({"scenes": dict(states), "to_do": scenes, "tiles": tiles, "seconds": round(seconds), "bytes": size})
        return
    listed = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    say(f"{states.total()} scenes: {listed or 'none'}")
    time = f"{seconds / 3600:.1f} h" if seconds > 3600 else f"{seconds:.0f} s"
    say(f"{scenes} to do: about {tiles} tiles, by {len(sampled)} scenes; {time} of inference, {size / 1e6:.1f} MB")
