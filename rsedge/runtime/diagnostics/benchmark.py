"""The speed of a bundle on this machine, by stage, and its memory.

The model alone is timed at several batch sizes, in rounds over all of them; then reading alone, and whole runs with
reading and writing at the best batch size. The first runs are left out: they allocate, fill the file cache and capture
CUDA graphs.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rsedge import host
from rsedge.bundle import read_bundle
from rsedge.errors import OptionError, SceneError
from rsedge.host import CACHES, ENCODE, STEPS, WAIT, WRITE, StageClock
from rsedge.pixels import ImageSize, stack_images
from rsedge.runtime.captioner import Captioner
from rsedge.runtime.demo.scene import repeat_scene, write_scene
from rsedge.runtime.diagnostics import doctor
from rsedge.runtime.embedder import Embedder
from rsedge.runtime.engines.contract import parse_device
from rsedge.runtime.engines.memory import free_memory
from rsedge.runtime.outputs.files import Target
from rsedge.runtime.run.pipeline import Models, Work, embeddings_target, execute, records_target
from rsedge.runtime.run.sources import SEGMENT_TILES, SceneTiles, TileOptions, Tiling, judge
from rsedge.runtime.scenes.readahead import read_tiles, resize_all
from rsedge.runtime.scenes.scene import Scene

if TYPE_CHECKING:
    from rsedge.pixels import UInt8
    from rsedge.runtime.decoding.options import DecodingOverrides
    from rsedge.runtime.outputs.records import TileResult

SECONDS = 30.0
"""Default duration, about; every round takes at least a batch of each size."""

READ, RESIZE, REST = "read", "resize", "search and text"
_DISTINCT = 256  # images kept in memory
_RESIZED = 32  # tiles whose resizing is timed


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, lowest and highest value of the rounds."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of at least one value, to 4 figures."""
        return cls(*(float(f"{value:.4g}") for value in (statistics.median(values), min(values), max(values))))


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRate:
    """The model alone at one batch size."""

    batch_size: int
    tiles: int
    """Tiles in a round."""
    tiles_per_second: Spread | None
    """None if the batch did not fit into memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Time of a tile in one stage."""

    name: str
    """Such as ``encode``."""
    runs: str
    """``beside`` the model (reading, timed alone, with its threads) or ``in turn``."""
    ms_per_tile: Spread
    calls: int | None
    """Number of times the stage was entered in a round of ``tiles`` tiles, or None."""
    tiles: int
    """Tiles in a round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkReport:
    """Result of a benchmark, and the machine."""

    machine: Mapping[str, Any]
    """CPU, cores, instructions, memory, GPUs, versions, date, and the load before measuring."""
    model: str
    family: str
    precision: str
    does: str
    """``caption`` or ``embed``."""
    device: str
    device_reason: str
    backend: str
    threads: int
    """CPU threads of inference."""
    decoding: Mapping[str, Any] | None
    """The decoding options, or None for an embedder."""
    scene: Mapping[str, Any]
    """Name, size and tiling; ``generated`` if none was named."""
    rounds: int
    """Rounds behind each figure."""
    batches: tuple[BatchRate, ...]
    """The model alone, per batch size tried."""
    batch_size: int
    """The fastest of them, used for the stages and the whole runs."""
    tiles_per_second: Spread
    """The model alone at that batch size."""
    stages: tuple[Stage, ...]
    whole_tiles_per_second: Spread
    """With reading and writing."""
    whole_ratio: Spread
    """Time of a whole run over that of the model alone, in pairs."""
    peak_memory_mb: float | None
    """Highest resident memory of the process while measuring, for all batch sizes, MB; None if unknown."""
    device_memory_mb: float | None
    """Memory taken on the GPU, MB, or None."""

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        values = asdict(self)
        return values | {name: list(values[name]) for name in ("batches", "stages")}


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
    """Measure a bundle on this machine.

    Args:
        model: Bundle of a captioner or an embedder.
        scene: The scene; None generates one, which repeats 4 × 5 painted tiles for as long as a run takes.
        device, backend, threads: As in ``Captioner.load``.
        batch_sizes: Images per batch, at most 64, the tiles of a segment; none tries 1, a quarter of the usual number
            and that number on the CPU, and a quarter, the usual number and twice as many on CUDA.
        seconds: Duration, about; ``SECONDS`` if neither this nor ``tiles`` is given.
        tiles: Tiles in a round instead of a duration; at least a batch.
        rounds: Rounds behind each figure.
        say: Called with a line at the start of each part.
        **options: The fields of ``TileOptions``, and a captioner's decoding options.

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
    machine = _this_machine()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rsedge-bench-")))
        generated = scene is None
        if scene is None:
            say("generating a scene")
            scene = stack.enter_context(Scene.open(write_scene(folder / "painted.tif", tiles=(4, 5))))
            host.forget_memory_peak()  # painting takes more than a small model
        images, places = _images(scene, tile_options, subject.size)
        # All rounds share the seconds: those of each batch size, of the whole runs and of the model alone beside them.
        share = (seconds or SECONDS) / (rounds * (len(sizes) + 2))

        def tiles_of_round(batch_size: int, seconds_per_tile: float) -> int:
            return tiles or max(1, round(share / max(seconds_per_tile, 1e-6) / batch_size)) * batch_size

        batches, best, alone = _time_model(subject, images, sizes, tiles_of_round, rounds, clock, say)
        subject.model.batch_size = best
        count = tiles_of_round(best, statistics.median(alone.seconds_per_tile))
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
        machine=machine,
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

    ``decoding`` are decoding options of a captioner; ``where`` are ``device``, ``backend``, ``threads`` and
    ``batch_size``, as in ``Captioner.load``.
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
        """Size of its images."""
        return self.models.sizes[0]

    def run(self, images: Sequence[UInt8], counts: Iterable[int]) -> float:
        """Return the seconds for batches of ``counts`` images, taken in turn from ``images``, without stacking them."""
        seconds, shown = 0.0, cycle(images)
        for count in counts:
            together = stack_images(list(islice(shown, count)))
            begin = time.perf_counter()
            self._run(together)
            seconds += time.perf_counter() - begin
        return seconds

    def target(self, folder: Path) -> Target:
        """Return the default output of the commands."""
        if isinstance(self.model, Captioner):
            return records_target(str(folder / "captions.geojson"))
        return embeddings_target(folder / "embeddings.parquet", self.model, self.models.dtype)


class Rounds:
    """Times of rounds, in all and per stage.

    ``runs`` is stage of the clock → ``Stage.runs``; ``rest`` names the time outside all stages, None leaves it out.
    """

    def __init__(self, runs: Mapping[str, str], rest: str | None) -> None:
        self._runs, self._rest = runs, rest
        self.seconds_per_tile: list[float] = []
        self._stages: list[dict[str, float]] = []
        self._calls: dict[str, int] = {}
        self._tiles = 0

    def add(self, seconds: float, clock: StageClock, tiles: int) -> None:
        """Add a round."""
        self.seconds_per_tile.append(seconds / tiles)
        stages = {name: clock.seconds[name] / tiles for name in self._runs if clock.calls[name]}
        if self._rest:
            stages[self._rest] = max(0.0, seconds / tiles - sum(stages.values()))
        self._stages.append(stages)
        self._calls, self._tiles = dict(clock.calls), tiles

    def stages(self) -> Iterator[Stage]:
        """Yield the stages, in the order of ``runs``."""
        for name in self._stages[0]:
            spread = Spread.of([stages[name] * 1e3 for stages in self._stages])
            runs = self._runs.get(name, "in turn")
            yield Stage(name=name, runs=runs, ms_per_tile=spread, calls=self._calls.get(name), tiles=self._tiles)


def _time_model(
    subject: Subject,
    images: Sequence[UInt8],
    sizes: Sequence[int],
    tiles_of_round: Callable[[int, float], int],
    rounds: int,
    clock: StageClock,
    say: Callable[[str], None],
) -> tuple[tuple[BatchRate, ...], int, Rounds]:
    """Time the model alone; return the rates per batch size, the best size, and its rounds."""
    counts: dict[int, int] = {}
    for size in sizes:
        say(f"warming up with batch size {size}")
        subject.model.batch_size = size
        subject.run(images, [1])  # loads what is loaded late, so that the batch shows the speed
        taken = subject.run(images, [size])
        if subject.model.batch_size == size:
            counts[size] = tiles_of_round(size, taken / size)
    captioning = isinstance(subject.model, Captioner)
    stages = dict.fromkeys((ENCODE, STEPS, CACHES) if captioning else (ENCODE,), "in turn")
    found = {size: Rounds(stages, REST if captioning else None) for size in counts}
    for number in range(rounds):
        for size, count in list(counts.items()):
            say(f"round {number + 1} of {rounds}: {count} tiles, batch size {size}")
            subject.model.batch_size = size
            clock.reset()
            segments = [min(SEGMENT_TILES, count - first) for first in range(0, count, SEGMENT_TILES)]
            seconds = subject.run(images, segments)
            if subject.model.batch_size == size:
                found[size].add(seconds, clock, count)
            else:  # memory ran out, and the model continued with smaller batches
                del counts[size]
    if not counts:
        tried = ", ".join(map(str, sizes))
        raise OptionError(f"no batch of {tried} images fits into memory: name a smaller --batch-size")
    best = min(counts, key=lambda size: statistics.median(found[size].seconds_per_tile))
    spreads = {size: Spread.of([1 / taken for taken in found[size].seconds_per_tile]) for size in counts}
    rates = (
        BatchRate(batch_size=size, tiles=counts.get(size, 0), tiles_per_second=spreads.get(size)) for size in sizes
    )
    return tuple(rates), best, found[best]


def _time_reading(
    scene: Scene, options: TileOptions, size: ImageSize, rounds: int, say: Callable[[str], None]
) -> list[Stage]:
    """Time reading alone, and resizing alone in one thread."""
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
    """An output that keeps the number of tiles the model saw of each segment, if any."""

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
    """Time whole runs over ``sources``, per tile that the model saw; return them with their ratios to ``images`` alone.

    The model alone gets as many images together as in each segment of the run, so that batches are the same.
    """
    found, ratios = Rounds({WAIT: "in turn", WRITE: "in turn"}, None), []
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}: {sum(map(len, sources))} tiles with reading and writing")
        clock.reset()
        begin = time.perf_counter()
        shown = _Shown([])
        targets = [subject.target(folder), Target(None, lambda shown=shown: nullcontext(shown))]  # type: ignore[misc]
        counts, *_ = execute(Work(sources, subject.models, clock=clock), targets, overwrite=True, settings={})
        found.add(time.perf_counter() - begin, clock, counts["ok"])
        alone = subject.run(images, shown.counts)
        ratios.append(found.seconds_per_tile[-1] * counts["ok"] / alone)
    return found, ratios


def _images(scene: Scene, options: TileOptions, size: ImageSize) -> tuple[list[UInt8], list[int]]:
    """Return the first tiles of the scene that a model sees, and their numbers in its grid."""
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
    """Return the ends of passes over a scene that together have about ``count`` tiles that a model sees.

    ``places`` are the numbers of the first of them; the rest of the ``total`` tiles should have the same share.
    """
    if count <= len(places):
        return [places[count - 1] + 1]
    passes, more = divmod(math.ceil(count * (places[-1] + 1) / len(places)), total)
    # A short pass is left out: it begins by waiting for tiles, and may have none.
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


def _this_machine() -> dict[str, Any]:
    """Return ``BenchmarkReport.machine``, with the load now."""
    found, room, software = doctor.processor(), doctor.room(), doctor.software()
    libraries = ("numpy", "rasterio", "onnxruntime", "onnxruntime-gpu", "tensorrt")
    versions = {name: software.libraries[name] for name in libraries if software.libraries[name]}
    return {
        "cpu": found.model,
        "architecture": found.architecture,
        "cores": found.usable,
        "instructions": [name for name, there in found.features.items() if there],
        "memory_mb": room.memory and round(room.memory / 1e6),
        "gpus": list(doctor.devices().gpus),
        "platform": software.platform,
        "python": software.python.split(" (")[0],
        "versions": {"rsedge": software.rsedge, "gdal": software.gdal, **versions},
        "date": datetime.now(timezone.utc).date().isoformat(),
        "load": host.load(),  # before measuring
    }
