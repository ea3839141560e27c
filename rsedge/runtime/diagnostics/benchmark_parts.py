"""What a benchmark runs: a model, an output and a scene that tell a clock what they take, in rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import rasterio
from rasterio.windows import Window

from rsedge.bundle import read_bundle
from rsedge.errors import OptionError
from rsedge.images import stack_images
from rsedge.runtime.captioner import Captioner
from rsedge.runtime.diagnostics.benchmark_report import Spread, Stage
from rsedge.runtime.diagnostics.stage_clock import StageClock, TimedDecoder, TimedEmbedder
from rsedge.runtime.embedder import Embedder
from rsedge.runtime.outputs.geoparquet import EmbeddingsInfo, open_embeddings
from rsedge.runtime.outputs.target import ResultWriter, Target
from rsedge.runtime.outputs.writers import Writer, open_writer
from rsedge.runtime.run.run import Models
from rsedge.runtime.run.sources import SEGMENT_TILES, SceneTiles, TileInput

if TYPE_CHECKING:
    from rsedge.pixels import UInt8
    from rsedge.runtime.decoding.decoder import Decoder
    from rsedge.runtime.decoding.options import DecodingOverrides
    from rsedge.runtime.outputs.records import TileResult
    from rsedge.runtime.scenes.readahead import ImageSize

WAIT = "wait for tiles"


class Subject:
    """The model, with every stage of it told to a clock.

    Args:
        path: A bundle.
        clock: What is told.
        decoding: Decoding options of a captioner.
        **where: ``device``, ``backend``, ``threads`` and ``batch_size``, as ``Captioner.load`` takes them.
    """

    def __init__(self, path: str | Path, clock: StageClock, decoding: Mapping[str, Any], **where: Any) -> None:
        self.manifest = read_bundle(path).manifest
        self.decoding: dict[str, Any] | None = None
        if self.manifest.generation is not None:
            most: dict[str, Any] = {name: decoding.get(name) for name in ("num_beams", "max_new_tokens")}
            captioner = Captioner.load(path, **where, **most)
            captioner.decoder = cast("Decoder", TimedDecoder(captioner.decoder, clock))
            task = captioner.with_options(**cast("DecodingOverrides", decoding))
            self.model: Captioner | Embedder = captioner
            self.does, self.decoding, self.models = "caption", asdict(task.options), Models(captioner=task)
            self._run: Callable[[UInt8], object] = lambda images: task.caption_tiles(images, range(len(images)))
            return
        if decoding:
            names = ", ".join(sorted(decoding))
            raise OptionError(f"{path} is a {self.manifest.family} bundle and generates nothing: leave {names} out")
        self.model = Embedder.load(path, **where)
        timed = cast("Embedder", TimedEmbedder(self.model, clock))
        self.does, self.models, self._run = "embed", Models(embedder=timed), timed.embed_images

    @property
    def size(self) -> ImageSize:
        """What the model wants to see."""
        return self.models.sizes[0]

    def run(self, images: Sequence[UInt8], counts: Iterable[int]) -> float:
        """Seconds that the model takes for images, over again where there are few, so many together as ``counts`` say.

        Getting them together is not counted.
        """
        seconds, shown = 0.0, cycle(images)
        for count in counts:
            together = stack_images(list(islice(shown, count)))
            begin = time.perf_counter()
            self._run(together)
            seconds += time.perf_counter() - begin
        return seconds

    def target(self, folder: Path) -> Target:
        """An output, as the commands write it by default."""
        if isinstance(self.model, Captioner):
            path = folder / "captions.geojson"
            return Target(path, partial(_open_records, path))
        path, model = folder / "embeddings.parquet", self.model
        info = EmbeddingsInfo(model=model.model, model_hash=model.hash, dim=model.dim, dtype=self.models.dtype)
        return Target(path, lambda: open_embeddings(path, info))


class _Records:
    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def write(self, results: Sequence[TileResult]) -> None:
        self._writer.write([result.record for result in results])


@contextmanager
def _open_records(path: Path) -> Iterator[ResultWriter]:
    with open_writer(path) as writer:
        yield _Records(writer)


def in_segments(count: int) -> list[int]:
    """How many of ``count`` tiles a run over a scene gives a model together."""
    whole, rest = divmod(count, SEGMENT_TILES)
    return [SEGMENT_TILES] * whole + [rest] * (rest > 0)


def repeat_scene(source: Path, path: Path, times: int) -> Path:
    """A larger scene, of ``source`` at least so many times: painting takes longer than measuring.

    Reading a small one over and over would count, each time, that the first tiles are waited for.

    Args:
        source: A GeoTIFF.
        path: Where it is written, with the source's format, bands and tags.
        times: Is rounded up to rows of 4, and bounded by 52.
    """
    rows, across = min(-(-times // 4), 13), 4
    with rasterio.open(source) as dataset:
        pixels, profile, names, tags = dataset.read(), dataset.profile, dataset.descriptions, dataset.tags()
    height, width = pixels.shape[1:]
    with rasterio.open(path, "w", **profile | {"height": rows * height, "width": across * width}) as dataset:
        dataset.descriptions = names
        dataset.update_tags(**tags)
    for row in range(rows):  # opened for each, so that GDAL keeps no more of it in memory
        with rasterio.open(path, "r+") as dataset:
            for column in range(across):
                dataset.write(pixels, window=Window(column * width, row * height, width, height))
    return path


class First:
    """The first tiles of a scene, so that a run over a large one ends in time.

    Attributes:
        shown: How many of each segment a model saw, in the last run that had any.
    """

    def __init__(self, tiles: SceneTiles, count: int, clock: StageClock) -> None:
        self.name, self.warnings = tiles.name, tiles.warnings
        self.shown: list[int] = []
        self._tiles, self._count, self._clock = tiles, min(count, len(tiles)), clock

    def __len__(self) -> int:
        return self._count

    def identity(self) -> dict[str, Any]:
        """See ``Source.identity``."""
        return self._tiles.identity()

    def segments(self, start: int, sizes: Sequence[ImageSize], model: str) -> Generator[list[TileInput], None, None]:
        """See ``Source.segments``; what is waited for them is told to the clock."""
        left = self._count - start * SEGMENT_TILES
        self.shown = []
        with closing(self._tiles.segments(start, sizes, model)) as segments:
            while left > 0:
                with self._clock(WAIT):
                    segment = next(segments)[:left]
                if shown := sum(tile.record.status == "ok" for tile in segment):
                    self.shown.append(shown)
                yield segment
                left -= len(segment)


@dataclass(frozen=True, slots=True)
class Plan:
    """How many tiles a round has.

    Attributes:
        seconds: What all rounds of all parts may take.
        asked: Tiles, where the user said so.
        rounds, parts: Of the benchmark; a part is a batch size, the whole runs, or the model alone beside them.
    """

    seconds: float
    asked: int | None
    rounds: int
    parts: int

    def tiles(self, batch_size: int, seconds_per_tile: float) -> int:
        """Whole batches, one at least, or what was asked for."""
        if self.asked:
            return self.asked
        fit = self.seconds / (self.rounds * self.parts) / max(seconds_per_tile, 1e-6)
        return max(1, round(fit / batch_size)) * batch_size


class Rounds:
    """What rounds took: in all, and per stage.

    Args:
        runs: Stage of the clock → how it runs, see ``Stage.runs``.
        rest: What to call the time that is in no stage, or None to leave it out.
    """

    def __init__(self, runs: Mapping[str, str], rest: str | None) -> None:
        self._runs, self._rest = runs, rest
        self.seconds_per_tile: list[float] = []
        self._stages: list[dict[str, float]] = []
        self._calls: dict[str, int] = {}
        self._tiles = 0

    def add(self, seconds: float, clock: StageClock, tiles: int) -> None:
        """Keep a round."""
        self.seconds_per_tile.append(seconds / tiles)
        stages = {name: clock.seconds[name] / tiles for name in self._runs if clock.calls[name]}
        if self._rest:
            stages[self._rest] = max(0.0, seconds / tiles - sum(stages.values()))
        self._stages.append(stages)
        self._calls, self._tiles = dict(clock.calls), tiles

    def stages(self) -> Iterator[Stage]:
        """The stages, in the order of ``runs``."""
        for name in self._stages[0]:
            spread = Spread.of([stages[name] * 1e3 for stages in self._stages])
            runs = self._runs.get(name, "in turn")
            yield Stage(name=name, runs=runs, ms_per_tile=spread, calls=self._calls.get(name), tiles=self._tiles)
