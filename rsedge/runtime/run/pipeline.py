"""Scenes to captions and embeddings: what callers run; how it is done is in :mod:`rsedge.runtime.run.run`."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rsedge.errors import OptionError
from rsedge.runtime.outputs.files import Target
from rsedge.runtime.outputs.geoparquet import EmbeddingsInfo, open_embeddings
from rsedge.runtime.outputs.records import RESULTS
from rsedge.runtime.outputs.writers import STDOUT, open_writer, parse_format
from rsedge.runtime.run.run import (
    Models,
    Progress,
    TileCaptioner,
    TileEmbedder,
    Work,
    execute,
)
from rsedge.runtime.run.sources import (
    SEGMENT_TILES,
    ImageSource,
    SceneTiles,
    TileOptions,
    Tiling,
    make_sources,
    spare_scenes,
)
from rsedge.runtime.scenes.scene import Scene

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Unpack

    from rsedge.runtime.outputs.records import EmbeddingType, TileRecord, TileResult

__all__ = [
    "SEGMENT_TILES",
    "EmbeddingsOutput",
    "Progress",
    "Summary",
    "TileCaptioner",
    "TileEmbedder",
    "TileOptions",
    "caption_scene",
    "embed",
    "embed_scene",
    "run",
]


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run did."""

    output: str
    """Path of the output, or ``-``."""
    model: str
    """``name@hash12`` of the bundle."""
    scenes: int
    """Number of scenes."""
    images: int
    """Number of image files."""
    tiles: int
    """Records written, one per tile and image."""
    ok: int
    nodata: int
    cloud: int
    read_errors: int
    """Records by status."""
    resumed_tiles: int
    """Tiles that an earlier, interrupted run had finished."""
    seconds: float
    """Wall time of this run."""
    tiles_per_second: float
    """Tiles of this run per second."""
    warnings: tuple[str, ...]
    """What the user should know, one line each."""
    embeddings: str | None = None
    """Path of the embeddings written beside captions, or None."""

    def to_dict(self) -> dict[str, Any]:
        """The summary as JSON values."""
        return asdict(self) | {"warnings": list(self.warnings)}


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingsOutput:
    """Embeddings to be made in the same pass as captions."""

    path: str | os.PathLike[str]
    """GeoParquet file, whose name ends in ``.parquet``."""
    embedder: TileEmbedder
    """Makes them."""
    dtype: EmbeddingType = "float16"
    """What they are stored as."""


def caption_scene(
    captioner: TileCaptioner,
    scene: Scene,
    *,
    start_segment: int = 0,
    **tiling: Unpack[Tiling],
) -> Generator[list[TileRecord], None, None]:
    """The records of a scene, a segment of ``SEGMENT_TILES`` consecutive tiles at a time, while later tiles are read.

    Args:
        captioner: Turns images into captions, one call per segment.
        scene: The scene.
        start_segment: Segment to begin with; those from there on are the same wherever a run begins.
        **tiling: See ``TileOptions``.

    Raises:
        OptionError: An option does not fit.
        SceneError: The scene cannot be opened any more. Pixels that cannot be read are ``read_error`` records instead.
    """
    options = TileOptions(**tiling)
    segments = _results(Models(captioner=captioner), scene, options, start_segment)
    return ([result.record for result in segment] for segment in segments)


def embed_scene(
    embedder: TileEmbedder,
    scene: Scene,
    **tiling: Unpack[Tiling],
) -> Iterator[tuple[TileRecord, NDArray[np.float32] | None]]:
    """The records of a scene with their embeddings, while later tiles are read.

    Args:
        embedder: Makes the embeddings, one call per segment of ``SEGMENT_TILES`` tiles.
        scene: The scene.
        **tiling: See ``TileOptions``.

    Returns:
        Per tile its record, and float32 [dim], or None where its status is not ``ok``.

    Raises:
        OptionError: An option does not fit.
        SceneError: The scene cannot be opened any more. Pixels that cannot be read are ``read_error`` records instead.
    """
    options = TileOptions(**tiling)
    segments = _results(Models(embedder=embedder, dtype="float32"), scene, options, 0)
    return (
        (result.record, cast("NDArray[np.float32] | None", result.embedding))
        for segment in segments
        for result in segment
    )


def _results(models: Models, scene: Scene, options: TileOptions, start: int) -> Generator[list[TileResult], None, None]:
    """Check the options now, and return what the models see when it is asked for."""
    return Work([SceneTiles(scene, options)], models).segments(start)


def run(
    scenes: Sequence[Scene],
    captioner: TileCaptioner,
    output: str | os.PathLike[str],
    *,
    format: str | None = None,  # noqa: A002 - the option's name
    embeddings: EmbeddingsOutput | None = None,
    beside: Sequence[Target] = (),
    overwrite: bool = False,
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[Progress], None] | None = None,
    **tiling: Unpack[Tiling],
) -> Summary:
    """Caption scenes into one output; after an interruption the same call goes on where it was.

    Finished segments go to ``<output>.journal``, which is removed once the output is whole; the output is the same to
    the byte however often the run was cut. Standard output (``-``) has no journal and streams records as they finish.

    Args:
        scenes: Scenes in the order of the output.
        captioner: Turns images into captions.
        output: Path, whose suffix names the format, or ``-``.
        format: Format, where the suffix does not name it.
        embeddings: Embeddings to make of the same tiles, each pixel read once; their file holds the captions too.
        beside: What else to make of the same results: a report, a contact sheet, a style.
        overwrite: Replace an output, or a journal of another run.
        settings: What else decides the captions (decoding options), as JSON values: a journal with others is refused.
        progress: Called at the start and after each segment.
        **tiling: See ``TileOptions``.

    Raises:
        OptionError: An option does not fit.
        OutputError: The output exists, its journal belongs to another run or is in use, or it cannot be written.
        SceneError: A scene cannot be opened any more; the journal is kept.
    """
    options = TileOptions(**tiling)
    target = os.fspath(output)
    parse_format(target, format)
    targets = [records_target(target, format)]
    models = Models(captioner=captioner)
    if embeddings is not None:
        models = Models(captioner=captioner, embedder=embeddings.embedder, dtype=embeddings.dtype)
        targets.append(embeddings_target(embeddings.path, embeddings.embedder, embeddings.dtype, captioner.model))
    targets += beside
    check_distinct(targets)
    summary = execute_run(scenes, models, targets, options, overwrite, settings or {}, progress)
    return replace(summary, embeddings=None if embeddings is None else os.fspath(embeddings.path))


def embed(
    inputs: Sequence[Scene | ImageSource],
    embedder: TileEmbedder,
    output: str | os.PathLike[str],
    *,
    dtype: EmbeddingType = "float16",
    overwrite: bool = False,
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[Progress], None] | None = None,
    **tiling: Unpack[Tiling],
) -> Summary:
    """Embed the tiles of scenes, and whole images, into one GeoParquet file; journal and resumption as in :func:`run`.

    Args:
        inputs: Scenes and image files in the order of the output.
        embedder: Makes the embeddings.
        output: Path that ends in ``.parquet``.
        dtype: What embeddings are stored as.
        overwrite: Replace an output, or a journal of another run.
        settings: What else decides the embeddings (the device), as JSON values: a journal with others is refused.
        progress: Called at the start and after each segment.
        **tiling: See ``TileOptions``.

    Raises:
        OptionError: An option does not fit.
        OutputError: The output exists, its journal belongs to another run or is in use, or it cannot be written.
        SceneError: A scene cannot be opened any more; the journal is kept.
    """
    options = TileOptions(**tiling)
    models = Models(embedder=embedder, dtype=dtype)
    targets = [embeddings_target(output, embedder, dtype)]
    return execute_run(inputs, models, targets, options, overwrite, settings or {}, progress)


def check_distinct(targets: Sequence[Target]) -> None:
    """Refuse outputs that would replace each other.

    Raises:
        OptionError: Several have one path.
    """
    counts = Counter(target.path.resolve() for target in targets if target.path is not None)
    if twice := [str(path) for path, count in counts.items() if count > 1]:
        raise OptionError(f"several outputs were to be written to {', '.join(twice)}: name a file for each")


def execute_run(
    inputs: Sequence[Scene | ImageSource],
    models: Models,
    targets: Sequence[Target],
    options: TileOptions,
    overwrite: bool,
    settings: Mapping[str, Any],
    progress: Callable[[Progress], None] | None,
) -> Summary:
    """Do the work of a run: sources of ``inputs``, through ``models``, into ``targets``; gives what was done.

    Raises:
        OptionError, OutputError, SceneError: As :func:`run`.
    """
    scenes = [entry for entry in inputs if isinstance(entry, Scene)]
    spare_scenes(scenes, (target.path for target in targets if target.path is not None))
    sources = make_sources(inputs, options)
    tiling = {name: value for name, value in asdict(options).items() if name != "readers"}
    began = time.monotonic()
    work = Work(sources, models, progress)
    done = execute(work, targets, overwrite=overwrite, settings={**tiling, "settings": dict(settings)})
    seconds = time.monotonic() - began
    tiles = done.counts.total()
    return Summary(
        output=str(targets[0].path or STDOUT),
        model=models.model,
        scenes=len(scenes),
        images=len(inputs) - len(scenes),
        tiles=tiles,
        ok=done.counts["ok"],
        nodata=done.counts["nodata"],
        cloud=done.counts["cloud"],
        read_errors=done.counts["read_error"],
        resumed_tiles=done.resumed,
        seconds=round(seconds, 3),
        tiles_per_second=round((tiles - done.resumed) / seconds, 2) if seconds else 0.0,
        warnings=tuple(_warnings(scenes)),
    )


def records_target(output: str, file_format: str | None = None) -> Target:
    """Return the output of records alone, a path or ``-``."""
    return Target(None if output == STDOUT else Path(output), lambda: open_writer(output, file_format, RESULTS))


def embeddings_target(
    output: str | os.PathLike[str], embedder: TileEmbedder, dtype: EmbeddingType, caption_model: str | None = None
) -> Target:
    """Return the output of embeddings with their records.

    Raises:
        OptionError: Its name does not end in ``.parquet``.
    """
    path = Path(output)
    if path.suffix.lower() != ".parquet":
        raise OptionError(f"embeddings are written as GeoParquet: end {os.fspath(output)!r} in .parquet")
    info = EmbeddingsInfo(
        model=embedder.model, model_hash=embedder.hash, dim=embedder.dim, dtype=dtype, caption_model=caption_model
    )
    return Target(path, lambda: open_embeddings(path, info))


def _warnings(scenes: Sequence[Scene]) -> Iterator[str]:
    for scene in scenes:
        yield from scene.warnings
    for name, count in Counter(scene.name for scene in scenes).items():
        if count > 1:
            yield f"{count} scenes are called {name}, and so are their records: rename the files to tell them apart"
