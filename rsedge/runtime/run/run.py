"""What models make of a run's tiles, and the run itself: read ahead, compute, journal, write, nothing lost on the way.

The tiles of a segment go through one model or two that look at the same pixels, decoded once. Finished segments are
journalled; outputs are written from the journal, and appear by rename when they are whole.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from rsedge.errors import OptionError, OutputError
from rsedge.host import NO_CLOCK, WAIT, WRITE, Clock
from rsedge.pixels import stack_images
from rsedge.runtime.outputs.files import check_target
from rsedge.runtime.outputs.records import EMBEDDING_TYPES, Caption, Embedding, EmbeddingType, TileRecord, TileResult
from rsedge.runtime.run.journal import Journal
from rsedge.runtime.run.sources import SEGMENT_TILES, Source, TileInput, rounded
from rsedge.runtime.scenes.readahead import ImageSize

if TYPE_CHECKING:
    import numpy as np

    from rsedge.pixels import UInt8
    from rsedge.runtime.outputs.files import Target


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


class TileCaptioner(TileModel, Protocol):
    """What the pipeline needs of a captioner."""

    def caption_tiles(self, images: UInt8, keys: Sequence[int]) -> list[Caption]:
        """Return a caption per image.

        Args:
            images: uint8 [N, image_size, image_size, 3], R, G, B.
            keys: A number per image that seeds its sampling, the same in every run.
        """


class TileEmbedder(TileModel, Protocol):
    """What the pipeline needs of an embedder."""

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
    """The models that see each tile: a captioner, an embedder, or both.

    Raises:
        OptionError: ``dtype`` is not known.
    """

    captioner: TileCaptioner | None = None
    """Writes captions."""
    embedder: TileEmbedder | None = None
    """Makes embeddings."""
    dtype: EmbeddingType = "float16"
    """What embeddings are kept as."""

    def __post_init__(self) -> None:
        if self.captioner is None and self.embedder is None:
            raise ValueError("neither a captioner nor an embedder was given")
        if self.dtype not in EMBEDDING_TYPES:
            raise OptionError(f"dtype is {self.dtype!r}, expected one of {', '.join(EMBEDDING_TYPES)}")

    @property
    def model(self) -> str:
        """What records name: the captioner, else the embedder."""
        return (self.captioner or self.embedder).model  # type: ignore[union-attr]  # __post_init__ checks it

    @property
    def sizes(self) -> list[ImageSize]:
        """What each model wants to see, the captioner first."""
        return [ImageSize(model.image_size, model.resample) for model in (self.captioner, self.embedder) if model]

    def fingerprint(self) -> dict[str, Any]:
        """What of the models decides the results."""
        values: dict[str, Any] = {}
        if self.captioner:
            values |= {"model": self.captioner.model, "image_size": self.captioner.image_size}
        if self.embedder:
            values |= {"embedder": self.embedder.model, "dtype": self.dtype}
        return values

    def see(self, segment: Sequence[TileInput]) -> list[TileResult]:
        """The results of a segment; each model is called once, with the tiles that are ``ok``."""
        chosen = [position for position, tile in enumerate(segment) if tile.record.status == "ok"]
        records = [tile.record for tile in segment]
        vectors: dict[int, Embedding] = {}
        if chosen and self.captioner:
            images = stack_images([segment[position].images[0] for position in chosen])
            captions = self.captioner.caption_tiles(images, [_key(records[position]) for position in chosen])
            for position, caption in zip(chosen, captions, strict=True):
                records[position] = replace(records[position], caption=caption.text, score=rounded(caption.score))
        if chosen and self.embedder:
            images = stack_images([segment[position].images[-1] for position in chosen])
            vectors = dict(zip(chosen, self.embedder.embed_images(images).astype(self.dtype), strict=True))
        return [
            TileResult(record, tile.path, vectors.get(position))
            for position, (record, tile) in enumerate(zip(records, segment, strict=True))
        ]


def _key(record: TileRecord) -> int:
    """A number per scene and tile that seeds its sampling, below 2**64."""
    return zlib.crc32(record.scene.encode("utf-8", "surrogateescape")) << 32 ^ record.row << 16 ^ record.col


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is."""

    scene: str
    """Name of the scene in work, or the number of images."""
    tiles_done: int
    """Finished tiles of all scenes, ``tiles_resumed`` included."""
    tiles_total: int
    """Tiles of all scenes."""
    tiles_resumed: int
    """Tiles that an earlier, interrupted run had finished."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run did: records by status, tiles that an earlier run had finished."""

    counts: Counter[str]
    resumed: int


class Work:
    """The segments of several sources, numbered through.

    Args:
        sources: Where tiles come from.
        models: What sees them.
        progress: Called at the start of each source and after each segment.
        clock: Times what is waited for tiles and for writing.
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
        """Return everything that decides the results."""
        return {
            **self.models.fingerprint(),
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
                    with self.clock(WAIT):
                        segment = next(segments)
                    yield self.models.see(segment)
                    done += len(segment)
                    self._progress(Progress(source.name, done, total, resumed))
            start = 0


def execute(work: Work, targets: Sequence[Target], *, overwrite: bool, settings: Mapping[str, Any]) -> Outcome:
    """Do the work and write every target.

    Finished segments go to ``<first target>.journal``, which is removed once all targets are whole; the same call goes
    on where an interrupted one was, and the outputs are the same to the byte. Without a path for the first target there
    is no journal, and results are written as they finish.

    Args:
        work: What is to be done.
        targets: Outputs of the same results.
        overwrite: Replace outputs, or a journal of another run.
        settings: What else decides the results, as JSON values: a journal with others is refused.

    Raises:
        OutputError: A target exists, the journal belongs to another run or is in use, or something cannot be written.
        SceneError: A scene cannot be opened any more; the journal is kept.
    """
    # 1. Check the targets; an existing one is refused unless a journal beside it may tell that the run wrote it.
    paths = [target.path for target in targets if target.path is not None]
    for path in paths:
        check_target(path)
    existing = [path for path in paths if path.exists()] if not overwrite else []
    exists = "\n".join(
        f"{path} exists already: pass --overwrite to replace it, or choose another output" for path in existing
    )
    first = targets[0].path
    journal_path = first and first.with_name(f"{first.name}.journal")
    if existing and not (journal_path and journal_path.exists()):
        raise OutputError(exists)

    with ExitStack() as stack:
        journal, resumed = None, 0
        if journal_path is None:
            # 2. Without a journal: compute segments when they are written.
            segments: Iterator[list[TileResult]] = stack.enter_context(closing(work.segments()))
        else:
            # 2. With one: a whole journal beside an output is a run killed between the rename and the removal.
            journal = stack.enter_context(Journal.open(journal_path, work.fingerprint(settings), overwrite=overwrite))
            if existing and journal.finished < len(work.sizes):
                raise OutputError(exists)
            resumed = sum(work.sizes[: journal.finished])
            _fill(journal, work)
            segments = journal.segments()

        # 3. Write the segments to all targets; count records by status. Targets appear when the block ends well.
        counts: Counter[str] = Counter()
        with ExitStack() as outputs:
            with work.clock(WRITE):
                writers = [outputs.enter_context(target.open()) for target in targets]
            for segment in segments:
                counts.update(result.record.status for result in segment)
                with work.clock(WRITE):
                    for writer in writers:
                        writer.write(segment)
            with work.clock(WRITE):
                outputs.close()

        # 4. All is whole: remove the journal.
        if journal:
            journal.remove()
    return Outcome(counts, resumed)


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
