"""What a run works through: scenes, cut into tiles, and image files, each a record of its own.

Either way the work comes in segments, and the segments of a source are the same wherever a run begins.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, cast

from rsedge.errors import OptionError, SceneError
from rsedge.runtime.outputs.records import Status, TileRecord
from rsedge.runtime.scenes.products.sentinel2 import printable
from rsedge.runtime.scenes.readahead import ImageSize, TilePixels, read_tiles, resize_all
from rsedge.runtime.scenes.scene import Scene
from rsedge.runtime.scenes.tiles import Edge, TileGrid
from rsedge.texts import redact

if TYPE_CHECKING:
    from rsedge.pixels import UInt8

SEGMENT_TILES = 64
"""Consecutive tiles that are worked on together and journalled together: what is computed with what is fixed by the
grid alone, so a result never depends on where a run was cut."""

_AHEAD_IMAGES = 96


@dataclass(frozen=True, slots=True, eq=False)
class TileInput:
    """A tile before a model has seen it."""

    record: TileRecord
    """Its record; ``status`` is ``ok`` where a model shall see it."""
    images: tuple[UInt8, ...]
    """Its pixels in each size asked for, uint8 [size, size, 3]; empty if unreadable."""
    path: str
    """The file they come from, as the user named it."""


class Source(Protocol):
    """Tiles in a fixed order. ``name`` is what progress calls them, ``len()`` their number."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know, one line each."""

    def __len__(self) -> int: ...

    def identity(self) -> dict[str, Any]:
        """What decides the pixels, as JSON values."""

    def segments(self, start: int, sizes: Sequence[ImageSize], model: str) -> Generator[list[TileInput], None, None]:
        """The segments of ``SEGMENT_TILES`` tiles from number ``start`` on, while later tiles are read."""


class ImageSource(Protocol):
    """An image file that can be read."""

    @property
    def path(self) -> Path:
        """Where it is, as the user named it."""

    def read(self) -> UInt8:
        """Its pixels, uint8 [H, W, 3], RGB.

        Raises:
            SceneError: They cannot be read.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class TileOptions:
    """How a scene is cut and read; all but ``readers`` decide the result."""

    tile_size: int = 224
    overlap: int = 0
    edge: Edge = "pad"
    """See ``TileGrid``."""
    max_nodata: float = 0.5
    """Share of a tile's pixels that may lack data, or be pure black or white; no model sees tiles beyond it, and
    empty ones."""
    max_cloud: float = 0.8
    """Share of its pixels that may be cloud, where the scene has a cloud mask."""
    readers: int = 2
    """Reading threads."""

    def __post_init__(self) -> None:
        for name in ("max_nodata", "max_cloud"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise OptionError(f"{name} is {value}, expected a share from 0 to 1, such as 0.5")
        if self.readers < 1:
            raise OptionError(f"readers is {self.readers}, expected at least 1 thread")

    def grid(self, scene: Scene) -> TileGrid:
        """The tiles of a scene."""
        return TileGrid(scene.width, scene.height, self.tile_size, self.overlap, self.edge)


class Tiling(TypedDict, total=False):
    """The fields of :class:`TileOptions`, as keywords of the functions that take them."""

    tile_size: int
    overlap: int
    edge: Edge
    max_nodata: float
    max_cloud: float
    readers: int


class SceneTiles:
    """The tiles of a scene, or the first ``stop`` of them."""

    def __init__(self, scene: Scene, options: TileOptions, stop: int | None = None) -> None:
        self.name, self.warnings = scene.name, scene.warnings
        self._scene, self._options, self._grid = scene, options, options.grid(scene)
        self._count = len(self._grid) if stop is None else min(stop, len(self._grid))

    def __len__(self) -> int:
        return self._count

    def identity(self) -> dict[str, Any]:
        """See ``Scene.identity``."""
        return self._scene.identity()

    def segments(self, start: int, sizes: Sequence[ImageSize], model: str) -> Generator[list[TileInput], None, None]:
        """See ``Source.segments``. Raises SceneError where the scene cannot be opened any more; pixels that cannot be
        read are ``read_error`` records instead.
        """
        first, *others = sizes
        path = printable(self._scene.source)
        pixels = read_tiles(
            self._scene,
            self._grid,
            image_size=first.size,
            resample=first.resample,
            also=others,
            start=start * SEGMENT_TILES,
            stop=self._count,
            readers=self._options.readers,
        )
        with closing(pixels):
            while segment := list(islice(pixels, SEGMENT_TILES)):
                geometries = self._scene.footprints([tile.tile for tile in segment])
                yield [
                    TileInput(self._record(tile, geometry, model), tile.images, path)
                    for tile, geometry in zip(segment, geometries, strict=True)
                ]

    def _record(self, pixels: TilePixels, geometry: dict[str, Any] | None, model: str) -> TileRecord:
        tile, scene = pixels.tile, self._scene
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
            nodata_fraction=rounded(pixels.nodata_fraction),
            cloud_fraction=rounded(pixels.cloud_fraction),
            datetime=scene.datetime,
            model=model,
            scene_crs=scene.crs_name,
            product_id=scene.product_id,
            mgrs_tile=scene.mgrs_tile,
            rendering=scene.rule,
        )
        status, message = judge(pixels, self._options.max_nodata, self._options.max_cloud)
        return replace(record, status=status, message=message)


def judge(pixels: TilePixels, most: float, cloudiest: float) -> tuple[Status, str | None]:
    """Whether a model shall see a tile, and why not.

    Args:
        pixels: The tile.
        most: Share of its pixels that may lack data, or be pure black or white.
        cloudiest: Share of its pixels that may be cloud.
    """
    empty, fill, cloud = pixels.nodata_fraction, pixels.fill_fraction or 0.0, pixels.cloud_fraction
    if pixels.error is not None or empty is None:
        return "read_error", pixels.error and redact(pixels.error)
    if empty == 1:
        return "nodata", "no pixel has data"
    if empty > most:
        return "nodata", f"{empty:.2%} of the pixels have no data, more than {most:.2%}"
    if empty + fill > most:
        lacking = f" and {empty:.2%} have no data" if empty else ""
        reason = f"low content: {fill:.2%} of the pixels are pure black or white{lacking}, more than {most:.2%}"
        return "nodata", reason
    if cloud is not None and cloud > cloudiest:
        return "cloud", f"{cloud:.2%} of the pixels are cloud, more than {cloudiest:.2%}"
    return "ok", None


class ImageFiles:
    """Image files without a place on a map: each is one record, and its whole image is what a model sees."""

    def __init__(self, images: Sequence[ImageSource], *, readers: int = 2) -> None:
        self.warnings: tuple[str, ...] = ()
        self.name = "1 image" if len(images) == 1 else f"{len(images)} images"
        self._images, self._readers = images, readers

    def __len__(self) -> int:
        return len(self._images)

    def identity(self) -> dict[str, Any]:
        """Names, sizes and times of all files, as one hash: they may be a million."""
        digest = hashlib.sha256()
        for image in self._images:
            digest.update(f"{os.fspath(image.path)!a} {_state(image.path)}\n".encode())
        return {"images": len(self._images), "names_sizes_times": digest.hexdigest()}

    def segments(self, start: int, sizes: Sequence[ImageSize], model: str) -> Generator[list[TileInput], None, None]:
        """See ``Source.segments``; an image that cannot be read is a ``read_error`` record."""
        with closing(self._read(start * SEGMENT_TILES, sizes, model)) as inputs:
            while segment := list(islice(inputs, SEGMENT_TILES)):
                yield segment

    def _read(self, start: int, sizes: Sequence[ImageSize], model: str) -> Generator[TileInput, None, None]:
        """The images from number ``start`` on, in order, read ahead by threads."""
        waiting: deque[Future[TileInput]] = deque()
        pool = ThreadPoolExecutor(self._readers, thread_name_prefix="rsedge-images")
        try:
            for image in islice(self._images, start, None):
                waiting.append(pool.submit(_read_image, image, sizes, model))
                if len(waiting) > _AHEAD_IMAGES:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _state(path: Path) -> str:
    try:
        state = path.stat()
    except OSError:  # its record in the output will say so
        return "missing"
    return f"{state.st_size} {state.st_mtime_ns}"


def _read_image(image: ImageSource, sizes: Sequence[ImageSize], model: str) -> TileInput:
    path = printable(os.fspath(image.path))
    record = TileRecord(
        scene=printable(image.path.stem),
        row=0,
        col=0,
        row_off=0,
        col_off=0,
        width=0,
        height=0,
        geometry=None,
        caption=None,
        score=None,
        status="ok",
        nodata_fraction=None,
        cloud_fraction=None,
        datetime=None,
        model=model,
    )
    try:
        pixels = image.read()
    except SceneError as error:
        reason = " ".join(redact(str(error)).split())
        return TileInput(replace(record, status="read_error", message=reason), (), path)
    height, width = pixels.shape[:2]
    return TileInput(replace(record, width=width, height=height), resize_all(pixels, sizes), path)


def make_sources(inputs: Sequence[Scene | ImageSource], options: TileOptions) -> list[Source]:
    """Return a source per scene and per run of consecutive images, in order.

    Raises:
        OptionError: There is none, or an option does not fit a scene.
    """
    sources: list[Source] = []
    for are_scenes, group in groupby(inputs, lambda entry: isinstance(entry, Scene)):
        if are_scenes:
            sources += [SceneTiles(cast("Scene", scene), options) for scene in group]
        else:
            sources.append(ImageFiles(cast("tuple[ImageSource, ...]", tuple(group)), readers=options.readers))
    if not sources:
        raise OptionError("no scene was given: pass at least one raster")
    return sources


def spare_scenes(scenes: Iterable[Scene], outputs: Iterable[Path]) -> None:
    """Refuse outputs that are files of a scene, of its metadata or its cloud mask, which ``--overwrite`` would destroy.

    Raises:
        OptionError: One is; all are named.
    """
    own = {Path(name).resolve() for scene in scenes for name in scene.files}
    if found := [str(path) for path in outputs if path.resolve() in own]:
        raise OptionError(f"{' and '.join(found)}: the scene itself is never replaced; choose another output")


def rounded(value: float | None) -> float | None:
    """4 decimals, as records keep them: enough to rank by, too few for the noise of another batch or device."""
    return None if value is None or not math.isfinite(value) else round(float(value), 4) + 0.0
