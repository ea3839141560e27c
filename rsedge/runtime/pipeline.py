"""Scenes to captions: reading ahead, inference, and the journal at the same time; nothing is lost on the way."""

from __future__ import annotations

import math
import os
import time
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from rsedge.errors import OptionError, OutputError
from rsedge.runtime.journal import Journal
from rsedge.runtime.reader import TilePixels, read_tiles
from rsedge.runtime.records import Caption, TileRecord
from rsedge.runtime.tiles import Edge, TileGrid
from rsedge.runtime.writers import STDOUT, check_target, open_writer, parse_format

if TYPE_CHECKING:
    from rsedge.pixels import UInt8
    from rsedge.runtime.scene import Scene

SEGMENT_TILES = 64
"""Consecutive tiles that are captioned together and journalled together: what is computed with what is fixed by the
grid alone, so a result never depends on where a run was cut."""


class TileCaptioner(Protocol):
    """What the pipeline needs of a captioner."""

    @property
    def model(self) -> str:
        """``name@hash12`` of the bundle."""

    @property
    def image_size(self) -> int:
        """Side of the images it takes, in pixels."""

    @property
    def resample(self) -> str:
        """Filter that brings tiles to that size, see ``rsedge.pixels.resize``."""

    def caption_tiles(self, images: UInt8, keys: Sequence[int]) -> list[Caption]:
        """A caption per image.

        Args:
            images: uint8 [N, image_size, image_size, 3], R, G, B.
            keys: A number per image that seeds its sampling, the same in every run.
        """


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is.

    Attributes:
        scene: Name of the scene in work.
        tiles_done: Finished tiles of all scenes, ``tiles_resumed`` included.
        tiles_total: Tiles of all scenes.
        tiles_resumed: Tiles that an earlier, interrupted run had finished.
    """

    scene: str
    tiles_done: int
    tiles_total: int
    tiles_resumed: int


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run did.

    Attributes:
        output: Path of the output, or ``-``.
        model: ``name@hash12`` of the bundle.
        scenes: Number of scenes.
        tiles: Records written.
        ok, nodata, cloud, read_errors: Records by status.
        resumed_tiles: Tiles that an earlier, interrupted run had finished.
        seconds: Wall time of this run.
        tiles_per_second: Tiles of this run per second.
        warnings: What the user should know, one line each.
    """

    output: str
    model: str
    scenes: int
    tiles: int
    ok: int
    nodata: int
    cloud: int
    read_errors: int
    resumed_tiles: int
    seconds: float
    tiles_per_second: float
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The summary as JSON values."""
        return asdict(self) | {"warnings": list(self.warnings)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TileOptions:
    """How a scene is cut and read; all but ``readers`` decide the result.

    Attributes:
        tile_size, overlap, edge: See ``TileGrid``.
        max_nodata: Share of a tile's pixels that may lack data; tiles beyond it, and empty ones, get no caption.
        readers: Reading threads.
    """

    tile_size: int = 224
    overlap: int = 0
    edge: Edge = "pad"
    max_nodata: float = 0.5
    readers: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.max_nodata <= 1:
            raise OptionError(f"max_nodata is {self.max_nodata}, expected a share from 0 to 1, such as 0.5")
        if self.readers < 1:
            raise OptionError(f"readers is {self.readers}, expected at least 1 thread")

    def grid(self, scene: Scene) -> TileGrid:
        """The tiles of a scene."""
        return TileGrid(scene.width, scene.height, self.tile_size, self.overlap, self.edge)


def caption_scene(
    captioner: TileCaptioner,
    scene: Scene,
    *,
    tile_size: int = 224,
    overlap: int = 0,
    edge: Edge = "pad",
    max_nodata: float = 0.5,
    readers: int = 2,
    start_segment: int = 0,
) -> Generator[list[TileRecord], None, None]:
    """The records of a scene, a segment of ``SEGMENT_TILES`` consecutive tiles at a time, while later tiles are read.

    Args:
        captioner: Turns images into captions, one call per segment.
        scene: The scene.
        tile_size: Side of a tile in source pixels.
        overlap: Pixels that neighbouring tiles share.
        edge: What happens at the right and lower edge, see ``TileGrid``.
        max_nodata: Share of a tile's pixels that may lack data, see ``TileOptions``.
        readers: Reading threads.
        start_segment: Segment to begin with; those from there on are the same wherever a run begins.

    Raises:
        OptionError: An option does not fit.
        SceneError: The scene cannot be opened any more. Pixels that cannot be read are ``read_error`` records instead.
    """
    options = TileOptions(tile_size=tile_size, overlap=overlap, edge=edge, max_nodata=max_nodata, readers=readers)
    return _segments(captioner, scene, options.grid(scene), options, start_segment)


def _segments(
    captioner: TileCaptioner, scene: Scene, grid: TileGrid, options: TileOptions, start_segment: int
) -> Generator[list[TileRecord], None, None]:
    pixels = read_tiles(
        scene,
        grid,
        image_size=captioner.image_size,
        resample=captioner.resample,
        start=start_segment * SEGMENT_TILES,
        readers=options.readers,
    )
    with closing(pixels):
        while segment := list(islice(pixels, SEGMENT_TILES)):
            yield _caption_segment(captioner, scene, segment, options.max_nodata)


def _caption_segment(
    captioner: TileCaptioner, scene: Scene, segment: list[TilePixels], max_nodata: float
) -> list[TileRecord]:
    geometries = scene.footprints([pixels.tile for pixels in segment])
    records = [
        _blank_record(pixels, scene, geometry, captioner.model, max_nodata)
        for pixels, geometry in zip(segment, geometries, strict=True)
    ]
    chosen = [position for position, record in enumerate(records) if record.status == "ok"]
    if chosen:
        images = np.stack([image for position in chosen if (image := segment[position].image) is not None])
        keys = [_key(records[position]) for position in chosen]
        captions = captioner.caption_tiles(images, keys)
        for position, caption in zip(chosen, captions, strict=True):
            records[position] = replace(records[position], caption=caption.text, score=_rounded(caption.score))
    return records


def _key(record: TileRecord) -> int:
    """A number per scene and tile that seeds its sampling, below 2**64."""
    return zlib.crc32(record.scene.encode("utf-8", "surrogateescape")) << 32 ^ record.row << 16 ^ record.col


def _blank_record(
    pixels: TilePixels, scene: Scene, geometry: dict[str, Any] | None, model: str, max_nodata: float
) -> TileRecord:
    """The record of a tile before it has a caption; its status says whether it gets one."""
    tile, fraction = pixels.tile, pixels.nodata_fraction
    record = TileRecord(
        scene=scene.name,
        row=tile.row,
        col=tile.col,
        row_off=tile.row_off,
        col_off=tile.col_off,
        width=tile.width,
        height=tile.height,
        geometry=geometry,
        caption=None,
        score=None,
        status="ok",
        nodata_fraction=_rounded(fraction),
        cloud_fraction=None,
        datetime=scene.datetime,
        model=model,
    )
    if pixels.error is not None or fraction is None:
        return replace(record, status="read_error", message=pixels.error)
    if fraction == 1:
        return replace(record, status="nodata", message="no pixel has data")
    if fraction > max_nodata:
        message = f"{fraction:.2%} of the pixels have no data, more than {max_nodata:.2%}"
        return replace(record, status="nodata", message=message)
    return record


def _rounded(value: float | None) -> float | None:
    """4 decimals, as records keep them: enough to rank by, too few for the noise of another batch or device."""
    return None if value is None or not math.isfinite(value) else round(float(value), 4) + 0.0


def run(
    scenes: Sequence[Scene],
    captioner: TileCaptioner,
    output: str | os.PathLike[str],
    *,
    tile_size: int = 224,
    overlap: int = 0,
    edge: Edge = "pad",
    max_nodata: float = 0.5,
    readers: int = 2,
    format: str | None = None,  # noqa: A002 - the option's name
    overwrite: bool = False,
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Caption scenes into one output; after an interruption the same call goes on where it was.

    Finished segments go to ``<output>.journal``, which is removed once the output is whole; the output is the same to
    the byte however often the run was cut. Standard output (``-``) has no journal and streams records as they finish.

    Args:
        scenes: Scenes in the order of the output.
        captioner: Turns images into captions.
        output: Path, whose suffix names the format, or ``-``.
        tile_size: Side of a tile in source pixels.
        overlap: Pixels that neighbouring tiles share.
        edge: What happens at the right and lower edge, see ``TileGrid``.
        max_nodata: Share of a tile's pixels that may lack data, see ``TileOptions``.
        readers: Reading threads.
        format: Format, where the suffix does not name it.
        overwrite: Replace an output, or a journal of another run.
        settings: What else decides the captions (decoding options), as JSON values: a journal with others is refused.
        progress: Called at the start and after each segment.

    Raises:
        OptionError: An option does not fit.
        OutputError: The output exists, its journal belongs to another run or is in use, or it cannot be written.
        SceneError: A scene cannot be opened any more; the journal is kept.
    """
    if not scenes:
        raise OptionError("no scene was given: pass at least one raster")
    options = TileOptions(tile_size=tile_size, overlap=overlap, edge=edge, max_nodata=max_nodata, readers=readers)
    work = _Work(scenes, captioner, options, progress)
    began = time.monotonic()
    target = os.fspath(output)
    parse_format(target, format)
    counts: Counter[str] = Counter()
    if target == STDOUT:
        with open_writer(target, format) as writer:
            for segment in work.segments(0):
                writer.write(_counted(segment, counts))
        resumed = 0
    else:
        resumed = _run_to_file(work, Path(target), format, overwrite, settings or {}, counts)
    seconds = time.monotonic() - began
    return Summary(
        output=target,
        model=captioner.model,
        scenes=len(scenes),
        tiles=counts.total(),
        ok=counts["ok"],
        nodata=counts["nodata"],
        cloud=counts["cloud"],
        read_errors=counts["read_error"],
        resumed_tiles=resumed,
        seconds=round(seconds, 3),
        tiles_per_second=round((counts.total() - resumed) / seconds, 2) if seconds else 0.0,
        warnings=tuple(_warnings(scenes)),
    )


class _Work:
    """The segments of several scenes, numbered through."""

    def __init__(
        self,
        scenes: Sequence[Scene],
        captioner: TileCaptioner,
        options: TileOptions,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self.captioner = captioner
        self.options = options
        self.parts = [(scene, options.grid(scene)) for scene in scenes]
        self.sizes = [
            min(SEGMENT_TILES, len(grid) - start)
            for _, grid in self.parts
            for start in range(0, len(grid), SEGMENT_TILES)
        ]
        self._progress = progress or (lambda _: None)

    def fingerprint(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Everything that decides the records."""
        options = asdict(self.options)
        del options["readers"]
        return {
            "model": self.captioner.model,
            "image_size": self.captioner.image_size,
            "segment_tiles": SEGMENT_TILES,
            **options,
            "settings": dict(settings),
            "scenes": [scene.identity() for scene, _ in self.parts],
        }

    def segments(self, start: int) -> Generator[list[TileRecord], None, None]:
        """The segments from number ``start`` on, reporting progress as the consumer comes back for more."""
        resumed = done = sum(self.sizes[:start])
        total = sum(self.sizes)
        for scene, grid in self.parts:
            count = -(-len(grid) // SEGMENT_TILES)
            if start >= count:
                start -= count
                continue
            self._progress(Progress(scene.name, done, total, resumed))
            with closing(_segments(self.captioner, scene, grid, self.options, start)) as segments:
                for segment in segments:
                    yield segment
                    done += len(segment)
                    self._progress(Progress(scene.name, done, total, resumed))
            start = 0


def _run_to_file(
    work: _Work,
    output: Path,
    file_format: str | None,
    overwrite: bool,
    settings: Mapping[str, Any],
    counts: Counter[str],
) -> int:
    """Fill the journal, write the output from it, remove it; gives the number of tiles an earlier run had finished."""
    check_target(output)
    journal_path = output.with_name(f"{output.name}.journal")
    exists = f"{output} exists already: pass --overwrite to replace it, or choose another output"
    if output.exists() and not overwrite and not journal_path.exists():
        raise OutputError(exists)
    with Journal.open(journal_path, work.fingerprint(settings), overwrite=overwrite) as journal:
        # A whole journal beside an output is a run killed between the rename and the removal: finish it.
        if output.exists() and not overwrite and journal.finished < len(work.sizes):
            raise OutputError(exists)
        resumed = sum(work.sizes[: journal.finished])
        _fill(journal, work)
        with open_writer(output, file_format) as writer:
            writer.write(_counted(journal.records(), counts))
        journal.remove()
    return resumed


def _fill(journal: Journal, work: _Work) -> None:
    """Append every segment that is missing; the disk is waited for while the next segment is computed."""
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


def _warnings(scenes: Sequence[Scene]) -> Iterator[str]:
    for scene in scenes:
        yield from scene.warnings
    for name, count in Counter(scene.name for scene in scenes).items():
        if count > 1:
            yield f"{count} scenes are called {name}, and so are their records: rename the files to tell them apart"


def _counted(records: Iterable[TileRecord], counts: Counter[str]) -> Iterator[TileRecord]:
    """The same records, counted by status as they pass."""
    for record in records:
        counts[record.status] += 1
        yield record
