"""Scenes to captions and embeddings: read ahead, compute, keep a journal, write; an interrupted run continues.

The tiles of a segment go through one model, or through two that see the same pixels, decoded once. Finished segments
are journalled; outputs are written from the journal, and appear by rename when they are whole.
"""

from __future__ import annotations

import os
import time
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from rsedge.errors import OptionError, OutputError
from rsedge.host import NO_CLOCK, WAIT, WRITE, Clock, interrupted
from rsedge.pixels import ImageSize, stack_images
from rsedge.runtime.outputs.files import Target, check_room, check_target
from rsedge.runtime.outputs.geoparquet import EmbeddingsInfo, open_embeddings
from rsedge.runtime.outputs.records import (
    EMBEDDING_TYPES,
    RESULTS,
    Caption,
    Embedding,
    EmbeddingType,
    TileRecord,
    TileResult,
)
from rsedge.runtime.outputs.writers import STDOUT, open_writer, parse_format
from rsedge.runtime.run.journal import Journal
from rsedge.runtime.run.sources import (
    SEGMENT_TILES,
    ImageSource,
    SceneTiles,
    Source,
    TileInput,
    TileOptions,
    Tiling,
    make_sources,
    rounded,
    spare_scenes,
)
from rsedge.runtime.scenes.scene import Scene

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Unpack

    from rsedge.manifest import Domain
    from rsedge.pixels import UInt8


_LEAST_LINE, _LEAST_RECORD = 300, 16  # bytes per tile, in the journal and in an output


class TileModel(Protocol):
    """A model that sees tiles."""

    @property
    def model(self) -> str:
        """``name@hash12`` of the bundle."""

    @property
    def image_size(self) -> int:
        """Side of the images it takes, in pixels."""

    @property
    def resample(self) -> str:
        """Filter that brings tiles to that size, see ``rsedge.pixels.resize``."""

    @property
    def crop(self) -> bool:
        """Whether it takes the middle of images that are not square, see :class:`rsedge.pixels.ImageSize`."""

    @property
    def domain(self) -> Domain | None:
        """Imagery that it was trained on, or None."""


class TileCaptioner(TileModel, Protocol):
    """The pipeline's view of a captioner."""

    def caption_tiles(self, images: UInt8, keys: Sequence[int], tick: Callable[[int], None]) -> list[Caption]:
        """Return a caption per image, uint8 [N, image_size, image_size, 3], RGB; ``keys`` seed the sampling of each,
        and ``tick`` gets the numbers of captions that were finished together.
        """


class TileEmbedder(TileModel, Protocol):
    """The pipeline's view of an embedder."""

    @property
    def hash(self) -> str:
        """The whole hash, 64 hexadecimal digits."""

    @property
    def dim(self) -> int:
        """Length of an embedding."""

    def embed_images(self, images: UInt8) -> np.typing.NDArray[np.float32]:
        """Return float32 [N, dim], unit length, for uint8 [N, image_size, image_size, 3]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """The models that see each tile: a captioner, an embedder, or both. Raises OptionError for an unknown ``dtype``."""

    captioner: TileCaptioner | None = None
    embedder: TileEmbedder | None = None
    dtype: EmbeddingType = "float16"
    """Number type of the stored embeddings."""

    def __post_init__(self) -> None:
        if self.captioner is None and self.embedder is None:
            raise ValueError("neither a captioner nor an embedder was given")
        if self.dtype not in EMBEDDING_TYPES:
            raise OptionError(f"dtype is {self.dtype!r}, expected one of {', '.join(EMBEDDING_TYPES)}")

    @property
    def model(self) -> str:
        """Name in the records: of the captioner, else of the embedder."""
        return (self.captioner or self.embedder).model  # type: ignore[union-attr]  # __post_init__ checks it

    @property
    def domain(self) -> Domain | None:
        """Imagery that the captioner, else the embedder, was trained on."""
        return (self.captioner or self.embedder).domain  # type: ignore[union-attr]

    @property
    def sizes(self) -> list[ImageSize]:
        """Image sizes of the models, the captioner first."""
        return [
            ImageSize(model.image_size, model.resample, model.crop, model.domain.resolution if model.domain else None)
            for model in (self.captioner, self.embedder)
            if model
        ]

    def see(self, segment: Sequence[TileInput], tick: Callable[[int], None] = lambda _: None) -> list[TileResult]:
        """Return the results of a segment; each model is called once, with the tiles that are ``ok``; ``tick`` gets the
        numbers of captions that were finished together.
        """
        chosen = [position for position, tile in enumerate(segment) if tile.record.status == "ok"]
        records = [tile.record for tile in segment]
        vectors: dict[int, Embedding] = {}
        if chosen and self.captioner:
            images = stack_images([segment[position].images[0] for position in chosen])
            # A number per scene and tile, below 2**64, seeds its sampling.
            tiles = [records[position] for position in chosen]
            names = [zlib.crc32(tile.scene.encode("utf-8", "surrogateescape")) for tile in tiles]
            keys = [name << 32 ^ tile.row << 16 ^ tile.col for name, tile in zip(names, tiles, strict=True)]
            captions = self.captioner.caption_tiles(images, keys, tick)
            for position, caption in zip(chosen, captions, strict=True):
                records[position] = replace(records[position], caption=caption.text, score=rounded(caption.score))
        if chosen and self.embedder:
            images = stack_images([segment[position].images[-1] for position in chosen])
            vectors = dict(zip(chosen, self.embedder.embed_images(images).astype(self.dtype), strict=True))
        return [
            TileResult(record, tile.path, vectors.get(position))
            for position, (record, tile) in enumerate(zip(records, segment, strict=True))
        ]


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a run."""

    scene: str
    """Name of the scene in work, or the number of images."""
    tiles_done: int
    """Finished tiles of all scenes, ``tiles_resumed`` included."""
    tiles_total: int
    """Tiles of all scenes."""
    tiles_resumed: int
    """Tiles that an earlier, interrupted run had finished."""


class Work:
    """The segments of several sources, numbered through.

    ``progress`` is called at the start of each source, as captions are finished, and after each segment. ``clock``
    times ``WAIT`` and ``WRITE``.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        models: Models,
        progress: Callable[[Progress], None] | None = None,
        clock: Clock = NO_CLOCK,
    ) -> None:
        self.sources, self.models, self.clock = sources, models, clock
        lengths = map(len, sources)
        self.sizes = [min(SEGMENT_TILES, n - first) for n in lengths for first in range(0, n, SEGMENT_TILES)]
        self._progress = progress or (lambda _: None)

    def fingerprint(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return everything that decides the results, as JSON values."""
        captioner, embedder = self.models.captioner, self.models.embedder
        return {
            **({"model": captioner.model, "image_size": captioner.image_size} if captioner else {}),
            **({"embedder": embedder.model, "dtype": self.models.dtype} if embedder else {}),
            "segment_tiles": SEGMENT_TILES,
            **settings,
            "scenes": [source.identity() for source in self.sources],
        }

    def segments(self, start: int = 0) -> Generator[list[TileResult], None, None]:
        """Yield the segments from number ``start`` on; report progress when the consumer comes back for more."""
        resumed = done = sum(self.sizes[:start])
        total = sum(self.sizes)
        for source in self.sources:
            count = -(-len(source) // SEGMENT_TILES)
            if start >= count:
                start -= count
                continue
            self._progress(Progress(source.name, done, total, resumed))
            with closing(source.segments(start, self.models.sizes, self.models.model)) as segments:
                for _ in range(start, count):
                    if interrupted.is_set():
                        raise KeyboardInterrupt
                    with self.clock(WAIT):
                        segment = next(segments)
                    now = done

                    def tick(count: int, name: str = source.name) -> None:
                        nonlocal now
                        now += count
                        self._progress(Progress(name, now, total, resumed))

                    yield self.models.see(segment, tick)
                    done += len(segment)
                    if done != now:
                        self._progress(Progress(source.name, done, total, resumed))
            start = 0


def execute(
    work: Work, targets: Sequence[Target], *, overwrite: bool, settings: Mapping[str, Any]
) -> tuple[Counter[str], int, Mapping[str, str]]:
    """Do the work and write every target.

    Finished segments go to ``<first target>.journal``, which is removed once all targets are whole. The same call
    continues an interrupted run, and the outputs are the same to the byte. Without a path for the first target there
    is no journal, and results are written as they finish.

    Args:
        work: The segments to compute.
        targets: Outputs of the same results.
        overwrite: Replace outputs, or a journal of another run.
        settings: Other values that decide the results, as JSON values: a journal with others is refused.

    Returns:
        The number of records by status, of tiles that an earlier run had finished, and the files with tiles that cannot
        be read: path → first reason.

    Raises:
        OutputError: A target exists, the journal belongs to another run or is in use, or something cannot be written.
        SceneError: A scene is gone before the first tile is read.
    """
    # 1. Check the targets.
    paths = [target.path for target in targets if target.path is not None]
    first = targets[0].path
    exists = check_outputs(first, paths, overwrite=overwrite)
    journal_path = first and first.with_name(f"{first.name}.journal")

    with ExitStack() as stack:
        journal, resumed = None, 0
        if journal_path is None:
            # 2. Without a journal: compute segments when they are written.
            segments: Iterator[list[TileResult]] = stack.enter_context(closing(work.segments()))
        else:
            # 2. With one: a whole journal beside an output is a run killed between the rename and the removal.
            journal = stack.enter_context(Journal.open(journal_path, work.fingerprint(settings), overwrite=overwrite))
            if exists and journal.finished < len(work.sizes):
                raise OutputError(exists)
            resumed, total = sum(work.sizes[: journal.finished]), sum(work.sizes)
            embedder = work.models.embedder
            line = _LEAST_LINE + (embedder.dim * 2 if embedder else 0)
            check_room(dict.fromkeys(paths, total * _LEAST_RECORD) | {journal_path: (total - resumed) * line})
            _fill(journal, work)
            segments = journal.segments()

        # 3. Write the segments to all targets; count records by status. Targets appear when the block ends well.
        counts: Counter[str] = Counter()
        unread: dict[str, str] = {}
        with ExitStack() as outputs:
            with work.clock(WRITE):
                writers = [outputs.enter_context(target.open()) for target in targets]
            for segment in segments:
                counts.update(result.record.status for result in segment)
                for result in segment:
                    if result.record.status == "read_error":
                        unread.setdefault(result.path or result.record.scene, result.record.message or "")
                with work.clock(WRITE):
                    for writer in writers:
                        writer.write(segment)
            with work.clock(WRITE):
                outputs.close()

        # 4. All is whole: remove the journal.
        if journal:
            journal.remove()
    return counts, resumed, unread


def check_outputs(first: Path | None, paths: Sequence[Path], *, overwrite: bool) -> str:
    """Check the files that a run is to write before anything is computed.

    Args:
        first: The main output, or None for standard output.
        paths: All files.
        overwrite: Replace existing ones.

    Returns:
        A message that names the existing ones if a journal beside ``first`` may show that the run wrote them, else "".

    Raises:
        OutputError: A file cannot be written, or exists.
    """
    for path in paths:
        check_target(path)
    existing = [path for path in paths if path.exists()] if not overwrite else []
    exists = "\n".join(
        f"{path} exists already: pass --overwrite to replace it, or choose another output" for path in existing
    )
    if existing and not (first and first.with_name(f"{first.name}.journal").exists()):
        raise OutputError(exists)
    return exists


def _fill(journal: Journal, work: Work) -> None:
    """Append every missing segment to the journal; compute the next one while the disk writes."""
    first = journal.finished
    with ThreadPoolExecutor(1, thread_name_prefix="rsedge-journal") as disk:
        written: Future[None] | None = None
        with closing(work.segments(first)) as segments:
            for number, segment in enumerate(segments, first):
                if written:
                    written.result()
                written = disk.submit(journal.append, number, segment)
        if written:
            written.result()


@dataclass(frozen=True, slots=True)
class Summary:
    """Result of a run."""

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
    unread: tuple[str, ...]
    """Files with tiles that cannot be read, each with the first reason."""
    warnings: tuple[str, ...]
    """One line each."""
    embeddings: str | None = None
    """Path of the embeddings written beside captions, or None."""
    unopened: tuple[str, ...] = ()
    """Inputs that could not be opened, each with the reason."""

    def to_dict(self) -> dict[str, Any]:
        """The summary as JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingsOutput:
    """Embeddings to compute in the same pass as captions."""

    path: str | os.PathLike[str]
    """GeoParquet file, whose name ends in ``.parquet``."""
    embedder: TileEmbedder
    dtype: EmbeddingType = "float16"


def caption_scene(
    captioner: TileCaptioner, scene: Scene, *, start_segment: int = 0, **tiling: Unpack[Tiling]
) -> Generator[list[TileRecord], None, None]:
    """Yield the records of a scene by segments of ``SEGMENT_TILES`` consecutive tiles, while later tiles are read.

    Args:
        captioner: Called once per segment.
        scene: The scene.
        start_segment: First segment; the segments are the same wherever a run begins.
        **tiling: See ``TileOptions``.

    Raises:
        OptionError: An option does not fit.
    """
    work = Work([SceneTiles(scene, TileOptions(**tiling))], Models(captioner=captioner))
    return ([result.record for result in segment] for segment in work.segments(start_segment))


def embed_scene(
    embedder: TileEmbedder, scene: Scene, **tiling: Unpack[Tiling]
) -> Iterator[tuple[TileRecord, np.typing.NDArray[np.float32] | None]]:
    """Yield the records of a scene, while later tiles are read: each with float32 [dim], or None unless it is ``ok``.

    Args:
        embedder: Called once per segment of ``SEGMENT_TILES`` tiles.
        scene: The scene.
        **tiling: See ``TileOptions``.

    Raises:
        OptionError: An option does not fit.
    """
    work = Work([SceneTiles(scene, TileOptions(**tiling))], Models(embedder=embedder, dtype="float32"))
    return (
        (result.record, cast("np.typing.NDArray[np.float32] | None", result.embedding))
        for segment in work.segments()
        for result in segment
    )


def run(
    scenes: Sequence[Scene | ImageSource],
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
    """Caption scenes into one output; the same call continues an interrupted run.

    Finished segments go to ``<output>.journal``, which is removed once the output is whole; the output is the same to
    the byte after interruptions. Standard output (``-``) has no journal and streams records as they finish.

    Args:
        scenes: Scenes, and image files that are captioned whole, in the order of the output.
        captioner: Writes the captions.
        output: Path, whose suffix names the format, or ``-``.
        format: Format, where the suffix does not name it.
        embeddings: Embeddings of the same tiles, each pixel read once; their file contains the captions too.
        beside: Other outputs of the same results: a report, a contact sheet, a style.
        overwrite: Replace an output, or a journal of another run.
        settings: Other values that decide the captions, as JSON values: a journal with others is refused.
        progress: Called at the start and after each segment.
        **tiling: See ``TileOptions``.

    Raises:
        OptionError: An option does not fit.
        OutputError: The output exists, its journal belongs to another run or is in use, or it cannot be written.
        SceneError: A scene is gone before the first tile is read.
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
        embedder: Computes the embeddings.
        output: Path that ends in ``.parquet``.
        dtype: Number type of the stored embeddings.
        overwrite, settings, progress, **tiling: As in :func:`run`.

    Raises:
        OptionError, OutputError, SceneError: As in :func:`run`.
    """
    models, options = Models(embedder=embedder, dtype=dtype), TileOptions(**tiling)
    targets = [embeddings_target(output, embedder, dtype)]
    return execute_run(inputs, models, targets, options, overwrite, settings or {}, progress)


def check_distinct(targets: Sequence[Target]) -> None:
    """Raise OptionError if several outputs have one path."""
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
    """Run ``inputs`` through ``models`` into ``targets``. Raises the errors of :func:`run`."""
    scenes = [entry for entry in inputs if isinstance(entry, Scene)]
    spare_scenes(scenes, (target.path for target in targets if target.path is not None))
    sources = make_sources(inputs, options)
    tiling = {name: value for name, value in asdict(options).items() if name != "readers"}
    warnings = [warning for scene in scenes for warning in scene.warnings]
    warnings += [doubt for scene in scenes if (doubt := scene.outside(models.domain)) is not None]
    warnings += [
        f"{count} scenes are called {name}, and so are their records: rename the files to tell them apart"
        for name, count in Counter(scene.name for scene in scenes).items()
        if count > 1
    ]
    began = time.monotonic()
    work = Work(sources, models, progress)
    settings = {**tiling, "settings": dict(settings)}
    counts, resumed, unread = execute(work, targets, overwrite=overwrite, settings=settings)
    seconds = time.monotonic() - began
    tiles = counts.total()
    return Summary(
        output=str(targets[0].path or STDOUT),
        model=models.model,
        scenes=len(scenes),
        images=len(inputs) - len(scenes),
        tiles=tiles,
        ok=counts["ok"],
        nodata=counts["nodata"],
        cloud=counts["cloud"],
        read_errors=counts["read_error"],
        resumed_tiles=resumed,
        seconds=round(seconds, 3),
        tiles_per_second=round((tiles - resumed) / seconds, 2) if seconds else 0.0,
        unread=tuple(f"{path}: {reason}" for path, reason in unread.items()),
        warnings=tuple(warnings),
    )


def records_target(output: str, file_format: str | None = None) -> Target:
    """Return the output of records alone, a path or ``-``."""
    return Target(None if output == STDOUT else Path(output), lambda: open_writer(output, file_format, RESULTS))


def embeddings_target(
    output: str | os.PathLike[str], embedder: TileEmbedder, dtype: EmbeddingType, caption_model: str | None = None
) -> Target:
    """Return the output of embeddings with their records. Raises OptionError unless its name ends in ``.parquet``."""
    path = Path(output)
    if path.suffix.lower() != ".parquet":
        raise OptionError(f"embeddings are written as GeoParquet: end {os.fspath(output)!r} in .parquet")
    info = EmbeddingsInfo(
        model=embedder.model, model_hash=embedder.hash, dim=embedder.dim, dtype=dtype, caption_model=caption_model
    )
    return Target(path, lambda: open_embeddings(path, info))
