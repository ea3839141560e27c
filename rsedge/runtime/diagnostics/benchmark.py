"""How fast a bundle is on this machine, where the time goes, and how much memory it takes.

The model alone is timed at several batch sizes, in rounds that go through all of them; then reading alone, and whole
runs with reading and writing at the best batch size. What runs first (allocations, files the system has not cached,
CUDA graphs) is left out.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rsedge import host
from rsedge.bundle import read_bundle
from rsedge.errors import OptionError, SceneError
from rsedge.host import CACHES, ENCODE, STEPS, WAIT, WRITE, StageClock
from rsedge.pixels import stack_images
from rsedge.runtime.captioner import Captioner
from rsedge.runtime.demo.scene import repeat_scene, write_scene
from rsedge.runtime.diagnostics.benchmark_report import BatchRate, BenchmarkReport, Spread, Stage, this_machine
from rsedge.runtime.embedder import Embedder
from rsedge.runtime.engines.contract import parse_device
from rsedge.runtime.engines.memory import free_memory
from rsedge.runtime.outputs.target import Target
from rsedge.runtime.engines.cuda_graphs import free_memory
from rsedge.runtime.outputs.files import Target
from rsedge.runtime.run.pipeline import embeddings_target, records_target
from rsedge.runtime.run.run import Models, Work, execute
from rsedge.runtime.run.sources import SEGMENT_TILES, SceneTiles, TileOptions, Tiling, judge
from rsedge.runtime.scenes.readahead import ImageSize, read_tiles, resize_all
from rsedge.runtime.scenes.scene import Scene

if TYPE_CHECKING:
    from rsedge.pixels import UInt8
    from rsedge.runtime.decoding.options import DecodingOverrides
    from rsedge.runtime.outputs.records import TileResult

__all__ = ["BatchRate", "BenchmarkReport", "Spread", "Stage", "benchmark"]

SECONDS = 30.0
"""What measuring takes unless the caller says otherwise: about, and at least a batch of each size in every round."""

READ, RESIZE, REST = "read", "resize", "search and text"
_DISTINCT = 256  # images kept in memory
_RESIZED = 32  # tiles whose resizing is timed


def benchmark(
    model: str | Path,
    *,
    scene: Scene | None = None,
    device: str = "auto",
    backend: str = "auto",
    threads: int | None = None,
    batch_sizes: Sequence[int] = (),
    seconds: float | None = None,
    tiles: int | None = None,
    rounds: int = 3,
    say: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> BenchmarkReport:
    """Time a bundle on this machine.

    Args:
        model: A captioner's or embedder's bundle.
        scene: What is read; None generates one, in which 4 × 5 painted tiles are repeated for as long as a run takes.
        device, backend, threads: As ``Captioner.load`` takes them.
        batch_sizes: Images computed together, at most the 64 that a run works on together; none tries 1, a quarter of
            the usual number and that number on the CPU, and a quarter, the usual number and twice as many on CUDA.
        seconds: About how long to measure, ``SECONDS`` if neither this nor ``tiles`` is given.
        tiles: Tiles in a round, instead; a batch at least.
        rounds: Rounds behind each figure.
        say: Called with a line about each part that begins.
        **options: How the scene is cut and read, see ``TileOptions``, and a captioner's decoding options.

    Raises:
        BundleError: The bundle is damaged.
        BackendError: The device cannot be used.
        OptionError: A value that is not accepted.
        SceneError: No tile of the scene can be shown to a model.
    """
    tiling = {name: options.pop(name) for name in list(options) if name in Tiling.__annotations__}
    options = {name: value for name, value in options.items() if value is not None}
    _check(batch_sizes, seconds, tiles, rounds)
    tile_options = TileOptions(**tiling)
    before = _free_device_memory(device)
    clock = StageClock()
    where = {"device": device, "backend": backend, "threads": threads, "batch_size": max(batch_sizes, default=None)}
    subject = Subject(model, clock, options, **where)
    sizes = sorted(set(batch_sizes)) or _usual_sizes(subject.model.batch_size, subject.model.device, tiles)
    described = this_machine()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rsedge-bench-")))
        generated = scene is None
        if scene is None:
            say("generating a scene")
            scene = stack.enter_context(Scene.open(write_scene(folder / "painted.tif", tiles=(4, 5))))
            host.forget_memory_peak()  # painting takes more than a small model
        images, places = _images(scene, tile_options, subject.size)
        plan = Plan(seconds or SECONDS, tiles, rounds, len(sizes) + 2)
        batches, best, alone = _time_model(subject, images, sizes, plan, clock, say)
        subject.model.batch_size = best
        count = plan.tiles(best, statistics.median(alone.seconds_per_tile))
        if generated and count > len(images):
            larger = repeat_scene(folder / "painted.tif", folder / "generated.tif", -(-count // len(images)))
            scene = stack.enter_context(Scene.open(larger))
            images, places = _images(scene, tile_options, subject.size)
        reading = _time_reading(scene, tile_options, subject.size, rounds, say)
        total = len(tile_options.grid(scene))
        sources = [SceneTiles(scene, tile_options, stop=end) for end in _ends(places, total, count)]
        whole, ratios = _time_whole(subject, images, sources, folder, rounds, clock, say)
    after = _free_device_memory(subject.model.device)
    grid = tile_options.grid(scene)
    return BenchmarkReport(
        machine=described,
        model=subject.model.model,
        family=subject.manifest.family,
        precision=subject.manifest.precision,
        does=subject.does,
        device=subject.model.device,
        device_reason=subject.model.device_reason,
        backend=subject.model.backend,
        threads=threads or host.usable_cores(),
        decoding=subject.decoding,
        scene={
            "name": scene.name,
            "generated": generated,
            "width": scene.width,
            "height": scene.height,
            "tiles": len(grid),
            "tile_size": grid.tile_size,
            "readers": tile_options.readers,
        },
        rounds=rounds,
        batches=batches,
        batch_size=best,
        tiles_per_second=Spread.of([1 / taken for taken in alone.seconds_per_tile]),
        stages=(*reading, *alone.stages(), *whole.stages()),
        whole_tiles_per_second=Spread.of([1 / taken for taken in whole.seconds_per_tile]),
        whole_ratio=Spread.of(ratios),
        peak_memory_mb=None if (peak := host.memory_peak()) is None else round(peak / 1e6, 1),
        device_memory_mb=round((before - after) / 1e6, 1) if before and after else None,
    )


class Subject:
    """The model, with a clock for its stages.

    Args:
        path: A bundle.
        clock: Times the stages of the model.
        decoding: Decoding options of a captioner.
        **where: ``device``, ``backend``, ``threads`` and ``batch_size``, as ``Captioner.load`` takes them.
    """

    def __init__(self, path: str | Path, clock: StageClock, decoding: Mapping[str, Any], **where: Any) -> None:
        self.manifest = read_bundle(path).manifest
        self.decoding: dict[str, Any] | None = None
        if self.manifest.generation is not None:
            most: dict[str, Any] = {name: decoding.get(name) for name in ("num_beams", "max_new_tokens")}
            captioner = Captioner.load(path, clock=clock, **where, **most)
            task = captioner.with_options(**cast("DecodingOverrides", decoding))
            self.model: Captioner | Embedder = captioner
            self.does, self.decoding, self.models = "caption", asdict(task.options), Models(captioner=task)
            self._run: Callable[[UInt8], object] = lambda images: task.caption_tiles(images, range(len(images)))
            return
        if decoding:
            names = ", ".join(sorted(decoding))
            raise OptionError(f"{path} is a {self.manifest.family} bundle and generates nothing: leave {names} out")
        self.model = embedder = Embedder.load(path, clock=clock, **where)
        self.does, self.models, self._run = "embed", Models(embedder=embedder), embedder.embed_images

    @property
    def size(self) -> ImageSize:
        """The size of the images it takes."""
        return self.models.sizes[0]

    def run(self, images: Sequence[UInt8], counts: Iterable[int]) -> float:
        """Return the seconds that the model takes for batches of ``counts`` images, taken in turn from ``images``.

        Stacking them is not counted.
        """
        seconds, shown = 0.0, cycle(images)
        for count in counts:
            together = stack_images(list(islice(shown, count)))
            begin = time.perf_counter()
            self._run(together)
            seconds += time.perf_counter() - begin
        return seconds

    def target(self, folder: Path) -> Target:
        """Return an output, as the commands write it by default."""
        if isinstance(self.model, Captioner):
            return records_target(str(folder / "captions.geojson"))
        return embeddings_target(folder / "embeddings.parquet", self.model, self.models.dtype)


@dataclass(frozen=True, slots=True)
class Plan:
    """How many tiles a round has."""

    seconds: float
    """What all rounds of all parts may take."""
    asked: int | None
    """Tiles, where the user said so."""
    rounds: int
    parts: int
    """Batch sizes, and two more: the whole runs, and the model alone beside them."""

    def tiles(self, batch_size: int, seconds_per_tile: float) -> int:
        """Return whole batches, one at least, or what was asked for."""
        if self.asked:
            return self.asked
        fit = self.seconds / (self.rounds * self.parts) / max(seconds_per_tile, 1e-6)
        return max(1, round(fit / batch_size)) * batch_size


class Rounds:
    """The time of rounds: in all, and per stage.

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


def _time_model(
    subject: Subject,
    images: Sequence[UInt8],
    sizes: Sequence[int],
    plan: Plan,
    clock: StageClock,
    say: Callable[[str], None],
) -> tuple[tuple[BatchRate, ...], int, Rounds]:
    """The model alone: rates per batch size, the best size, and its rounds."""
    counts: dict[int, int] = {}
    for size in sizes:
        say(f"warming up with batch size {size}")
        subject.model.batch_size = size
        subject.run(images, [1])  # loads what is loaded late, so that the batch tells how fast it is
        taken = subject.run(images, [size])
        if subject.model.batch_size == size:
            counts[size] = plan.tiles(size, taken / size)
    captioning = isinstance(subject.model, Captioner)
    stages = dict.fromkeys((ENCODE, STEPS, CACHES) if captioning else (ENCODE,), "in turn")
    found = {size: Rounds(stages, REST if captioning else None) for size in counts}
    for number in range(plan.rounds):
        for size, count in list(counts.items()):
            say(f"round {number + 1} of {plan.rounds}: {count} tiles, batch size {size}")
            subject.model.batch_size = size
            clock.reset()
            seconds = subject.run(
                images, [min(SEGMENT_TILES, count - first) for first in range(0, count, SEGMENT_TILES)]
            )
            if subject.model.batch_size == size:
                found[size].add(seconds, clock, count)
            else:  # memory ran out, and it went on with less
                del counts[size]
    if not counts:
        tried = ", ".join(map(str, sizes))
        raise OptionError(f"no batch of {tried} images fits into memory: name a smaller --batch-size")
    best = min(counts, key=lambda size: statistics.median(found[size].seconds_per_tile))
    rates = tuple(
        BatchRate(
            batch_size=size,
            tiles=counts.get(size, 0),
            tiles_per_second=Spread.of([1 / taken for taken in found[size].seconds_per_tile])
            if size in counts
            else None,
        )
        for size in sizes
    )
    return rates, best, found[best]


def _time_reading(
    scene: Scene, options: TileOptions, size: ImageSize, rounds: int, say: Callable[[str], None]
) -> list[Stage]:
    """Reading alone, and resizing alone in one thread."""
    say("reading alone")
    grid = options.grid(scene)
    count = min(len(grid), _DISTINCT)
    read: list[float] = []
    resized: list[float] = []
    kept: list[UInt8] = []
    for _ in range(rounds):
        kept.clear()
        begin = time.perf_counter()
        with closing(read_tiles(scene, grid, image_size=grid.tile_size, stop=count, readers=options.readers)) as tiles:
            for tile in tiles:
                if tile.image is not None and len(kept) < _RESIZED:
                    kept.append(tile.image)
        read.append((time.perf_counter() - begin) / count * 1e3)
        begin = time.perf_counter()
        for image in kept:
            resize_all(image, [size])
        resized.append((time.perf_counter() - begin) / max(len(kept), 1) * 1e3)
    stages = [Stage(name=READ, runs="beside", ms_per_tile=Spread.of(read), calls=None, tiles=count)]
    if grid.tile_size != size.size:
        stages.append(Stage(name=RESIZE, runs="beside", ms_per_tile=Spread.of(resized), calls=None, tiles=len(kept)))
    return stages


@dataclass(frozen=True, slots=True)
class _Shown:
    """A second output of a run: it keeps how many tiles of each segment the model saw, where there were any."""

    counts: list[int]

    def write(self, results: Sequence[TileResult]) -> None:
        if count := sum(result.record.status == "ok" for result in results):
            self.counts.append(count)


def _time_whole(
    subject: Subject,
    images: Sequence[UInt8],
    sources: Sequence[SceneTiles],
    folder: Path,
    rounds: int,
    clock: StageClock,
    say: Callable[[str], None],
) -> tuple[Rounds, list[float]]:
    """Whole runs over ``sources``, per tile that the model saw, and their time over that of ``images`` alone.

    The model alone gets as many together as each segment of the run had for it, so that batches are the same.
    """
    found, ratios = Rounds({WAIT: "in turn", WRITE: "in turn"}, None), []
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}: {sum(map(len, sources))} tiles with reading and writing")
        clock.reset()
        begin = time.perf_counter()
        shown = _Shown([])
        targets = [subject.target(folder), Target(None, lambda shown=shown: nullcontext(shown))]  # type: ignore[misc]
        done = execute(Work(sources, subject.models, clock=clock), targets, overwrite=True, settings={})
        found.add(time.perf_counter() - begin, clock, done.counts["ok"])
        alone = subject.run(images, shown.counts)
        ratios.append(found.seconds_per_tile[-1] * done.counts["ok"] / alone)
    return found, ratios


def _images(scene: Scene, options: TileOptions, size: ImageSize) -> tuple[list[UInt8], list[int]]:
    """Tiles that a model sees, from the beginning of the scene, and where in its grid they are."""
    grid = options.grid(scene)
    images: list[UInt8] = []
    places: list[int] = []
    pixels = read_tiles(scene, grid, image_size=size.size, resample=size.resample, readers=options.readers)
    with closing(pixels):
        for place, tile in enumerate(pixels):
            if tile.image is not None and judge(tile, options.max_nodata, options.max_cloud)[0] == "ok":
                images.append(tile.image)
                places.append(place)
            if len(images) == _DISTINCT:
                break
    if not images:
        raise SceneError(f"no tile of {scene.name} can be shown to a model: see rsedge info for what is in it")
    return images, places


def _ends(places: Sequence[int], total: int, count: int) -> list[int]:
    """How far to go into a scene, and again from its beginning, to meet about ``count`` tiles that a model sees.

    Args:
        places: The first of these tiles in the grid; beyond them as many are expected among the rest.
        total: Tiles in the grid.
        count: At least 1.
    """
    if count <= len(places):
        return [places[count - 1] + 1]
    passes, more = divmod(math.ceil(count * (places[-1] + 1) / len(places)), total)
    # A pass of its own begins with tiles to wait for, and may meet none: a short one is left out.
    return [total] * passes + ([more] if not passes or more > places[0] + SEGMENT_TILES else [])


def _check(batch_sizes: Sequence[int], seconds: float | None, tiles: int | None, rounds: int) -> None:
    expected = f"expected 1 to {SEGMENT_TILES}, the tiles of a scene that are worked on together"
    problems = [f"batch_sizes has {size}, {expected}" for size in batch_sizes if not 1 <= size <= SEGMENT_TILES]
    if seconds is not None and tiles is not None:
        problems.append(f"seconds {seconds:g} and tiles {tiles} both say how long to measure: leave one out")
    for name, value in (("seconds", seconds), ("tiles", tiles), ("rounds", rounds)):
        if value is not None and not 0 < value < math.inf:
            problems.append(f"{name} is {value:g}, expected a number above 0")
    if tiles is not None and 0 < tiles < max(batch_sizes, default=0):
        problems.append(f"tiles is {tiles}, fewer than a batch of {max(batch_sizes)}: time that many at least")
    if problems:
        raise OptionError("; ".join(problems))


def _usual_sizes(usual: int, device: str, tiles: int | None) -> list[int]:
    factors = (0.25, 1, 2) if device.startswith("cuda") else (0, 0.25, 1)
    most = min(SEGMENT_TILES, tiles or SEGMENT_TILES)
    return sorted({min(most, max(1, int(usual * factor))) for factor in factors})


def _free_device_memory(device: str) -> int | None:
    """Return the free bytes of the GPU that ``device`` names or may stand for."""
    kind, number = parse_device(device)
    found = None if kind == "cpu" else free_memory(number)
    return found[0] if found else None
