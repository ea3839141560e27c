"""The sources of a run: scenes, cut into tiles, and image files, each one record.

Both yield segments of tiles. The segments of a source are the same wherever a run begins.
"""

from __future__ import annotations

import glob
import hashlib
import math
import os
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict, cast, get_args

from rsedge.errors import OptionError, SceneError
from rsedge.pixels import fit_image
from rsedge.runtime.outputs.records import Status, TileRecord
from rsedge.runtime.scenes.access import LOCAL, Access
from rsedge.runtime.scenes.catalog import STDIN, find
from rsedge.runtime.scenes.composite import Grid
from rsedge.runtime.scenes.gdal import open_dataset
from rsedge.runtime.scenes.products.sentinel2 import printable
from rsedge.runtime.scenes.readahead import TilePixels, read_tiles
from rsedge.runtime.scenes.remote import is_remote
from rsedge.runtime.scenes.scene import Scene
from rsedge.runtime.scenes.sidecars import is_vrt
from rsedge.runtime.scenes.tiles import Edge, TileGrid
from rsedge.texts import first_few, redact

if TYPE_CHECKING:
    from rsedge.pixels import ImageSize, UInt8
    from rsedge.runtime.scenes.products.product import Product

SEGMENT_TILES = 64
"""Consecutive tiles that are computed and journalled together. The grid alone decides them, so a result never depends
on where a run was interrupted."""

_AHEAD_IMAGES = 96
_PICTURES = frozenset({"JPEG", "PNG", "WEBP"})  # GDAL's drivers
_LARGEST_CHIP = 512  # px on a side
_LARGE_IMAGE = 1500 * 1500  # px; a larger image is rather a scene that lost its georeference


@dataclass(frozen=True, slots=True, eq=False)
class TileInput:
    """A tile before the models see it."""

    record: TileRecord
    """Its record; the models see it if ``status`` is ``ok``."""
    images: tuple[UInt8, ...]
    """Its pixels in each requested size, uint8 [size, size, 3]; empty if unreadable."""
    path: str
    """Its file, as the user named it."""


class Source(Protocol):
    """Tiles in a fixed order; ``len()`` is their number."""

    @property
    def name(self) -> str:
        """Name in the progress."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """One line each."""

    def __len__(self) -> int: ...

    def identity(self) -> dict[str, Any]:
        """Return what decides the pixels, as JSON values."""

    def segments(self, start: int, sizes: Sequence[ImageSize], model: str) -> Generator[list[TileInput], None, None]:
        """Yield the segments of ``SEGMENT_TILES`` tiles from number ``start`` on, while later tiles are read."""


class ImageSource(Protocol):
    """An image file that can be read."""

    @property
    def path(self) -> Path:
        """Its path, as the user named it."""

    def read(self) -> UInt8:
        """Return its pixels, uint8 [H, W, 3], RGB. Raises SceneError if they cannot be read."""

    def metres_per_pixel(self) -> float | None:
        """Return the size of its pixels on the ground, or None if it is unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileOptions:
    """Options for cutting and reading scenes; all but ``readers`` decide the result."""

    tile_size: int = 224
    overlap: int = 0
    edge: Edge = "shift"
    """See ``TileGrid``."""
    max_nodata: float = 0.5
    """Largest share of a tile's pixels without data, or of pure black or white; the models see no tile beyond it."""
    max_cloud: float = 0.8
    """Largest share of cloud, where the scene has a cloud mask."""
    readers: int = 2
    """Reading threads."""

    def __post_init__(self) -> None:
        for name in ("max_nodata", "max_cloud"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise OptionError(f"{name} is {value}, expected a share from 0 to 1, such as 0.5")
        if self.readers < 1:
            raise OptionError(f"readers is {self.readers}, expected at least 1 thread")

    def grid(self, scene: Scene) -> TileGrid:
        """Return the tile grid of a scene."""
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
        self._stamps = {name: stamp for name in scene.files if (stamp := _stamp(name))}

    def __len__(self) -> int:
        return self._count

    def identity(self) -> dict[str, Any]:
        """See ``Scene.identity``."""
        return self._scene.identity()

    def segments(self, start: int, sizes: Sequence[ImageSize], model: str) -> Generator[list[TileInput], None, None]:
        """See ``Source.segments``. Pixels that cannot be read, also of a file that is removed or changes meanwhile, are
        ``read_error`` records.
        """
        path = printable(self._scene.source)
        with closing(self._read(start * SEGMENT_TILES, sizes)) as pixels:
            while segment := list(islice(pixels, SEGMENT_TILES)):
                changed = [name for name, stamp in self._stamps.items() if _stamp(name) not in (stamp, None)]
                if changed:
                    error = f"{changed[0]} changed while it was read: run again with --overwrite"
                    segment = [TilePixels(tile.tile, (), None, error=error) for tile in segment]
                geometries = self._scene.footprints([tile.tile for tile in segment])
                pairs = zip(segment, geometries, strict=True)
                yield [TileInput(self._record(tile, geometry, model), tile.images, path) for tile, geometry in pairs]

    def _read(self, start: int, sizes: Sequence[ImageSize]) -> Generator[TilePixels, None, None]:
        """The tiles from number ``start`` on. Where the scene cannot be opened any more the rest has that error."""
        first, *others = sizes
        pixels = read_tiles(
            self._scene,
            self._grid,
            image_size=first.size,
            resample=first.resample,
            also=others,
            start=start,
            stop=self._count,
            readers=self._options.readers,
        )
        try:
            with closing(pixels):
                for start, tile in enumerate(pixels, start + 1):  # noqa: B007, B020 - the first one not yielded
                    yield tile
        except SceneError as error:
            reason = " ".join(str(error).split())
            for missing in self._grid.slice(start, self._count):
                yield TilePixels(missing, (), None, error=reason)

    def _record(self, pixels: TilePixels, geometry: dict[str, Any] | None, model: str) -> TileRecord:
        tile, scene = pixels.tile, self._scene
        status, message = judge(pixels, self._options.max_nodata, self._options.max_cloud)
        return TileRecord(
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
            status=status,
            message=message,
            nodata_fraction=rounded(pixels.nodata_fraction),
            cloud_fraction=rounded(pixels.cloud_fraction),
            datetime=scene.datetime,
            model=model,
            scene_crs=scene.crs_name,
            product_id=scene.product_id,
            mgrs_tile=scene.mgrs_tile,
            rendering=scene.rule,
            covered=rounded(tile.width * tile.height / self._grid.tile_size**2),
        )


def _stamp(name: str) -> tuple[int, int] | None:
    """Return size and time of a file, or None where it is gone."""
    try:
        found = os.stat(name)  # noqa: PTH116 - of a text
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def judge(pixels: TilePixels, most: float, cloudiest: float) -> tuple[Status, str | None]:
    """Return the status of a tile, and the reason unless it is ``ok``.

    Args:
        pixels: The tile.
        most: Largest share of pixels without data, or of pure black or white.
        cloudiest: Largest share of cloud.
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
    """Image files without a georeference: each is one record, and the models see the whole image."""

    def __init__(self, images: Sequence[ImageSource], *, readers: int = 2) -> None:
        self.warnings: tuple[str, ...] = ()
        self.name = "1 image" if len(images) == 1 else f"{len(images)} images"
        self._images, self._readers = images, readers

    def __len__(self) -> int:
        return len(self._images)

    def identity(self) -> dict[str, Any]:
        """Return one hash of the names, sizes and times of all files: they may be a million."""
        digest = hashlib.sha256()
        for image in self._images:
            try:
                found = image.path.stat()
                state = f"{found.st_size} {found.st_mtime_ns}"
            except OSError:  # its record in the output will say so
                state = "missing"
            digest.update(f"{os.fspath(image.path)!a} {state}\n".encode())
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
    metres = image.metres_per_pixel() if any(size.resolution for size in sizes) else None
    fitted = {size: fit_image(pixels, size, metres) for size in dict.fromkeys(sizes)}
    images = tuple(fitted[size] for size in sizes)
    return TileInput(replace(record, width=width, height=height), images, path)


InputKind = Literal["auto", "scene", "image", "chip"]


@dataclass(frozen=True, slots=True)
class Inputs:
    """The scenes and images of :func:`find_inputs`."""

    entries: tuple[Scene | ImageSource, ...]
    """In order."""
    warnings: tuple[str, ...]
    """One line each."""
    unopened: tuple[str, ...] = ()
    """Inputs that cannot be opened, beside others that can: one line each."""


def find_inputs(
    names: Sequence[str],
    *,
    open_scene: Callable[[str | Product], Scene],
    open_image: Callable[[Path], ImageSource],
    suffixes: Collection[str],
    kind: InputKind = "auto",
    access: Access = LOCAL,
    stdin: str | None = None,
    outputs: Iterable[str | os.PathLike[str]] = (),
) -> Inputs:
    """Return the scenes and images that files and folders stand for.

    - A georeferenced raster (coordinate reference system, geotransform or ground control points) is a scene; so is any
      product (see ``rsedge.runtime.scenes.catalog``), a raster of subdatasets, and a name that only GDAL understands.
    - Every other file is an image: one record. A file that cannot be opened is an image too; its record has the reason.
    - A folder stands for its image files and products, at any depth, in the order of the names, without hidden names
      and without links back to a folder above them.

    Args:
        names: As the user gave them.
        open_scene: Opens a scene from a name or a product.
        open_image: Makes an image from a path, without reading it.
        suffixes: Suffixes of image files in folders, lower case with the dot.
        kind: ``auto`` decides by the rule above; ``scene`` and ``image`` decide for every file; ``chip`` takes a file
            without a georeference for an image only if it is a picture (JPEG, PNG …) or has at most 512 px a side.
        access: Access of the inputs.
        stdin: Content of ``-``.
        outputs: Files to be written: the results of an earlier run are no inputs in the folder they lie in.

    Raises:
        OptionError: Inputs do not exist, or folders contain nothing to read; all are named.
        SceneError: An input does not exist, or none can be opened; all are named.
    """
    if kind not in get_args(InputKind):
        raise OptionError(f"kind is {kind!r}, expected one of {', '.join(get_args(InputKind))}")
    found: list[str | Product] = []
    problems = []
    written = {Path(output).resolve() for output in outputs}
    for name in names:
        if name != STDIN and not Path(name).exists() and not is_remote(name) and not glob.has_magic(name):
            found.append(name)  # a name for GDAL, or an error that opening it explains
            continue
        if kind == "image" and Path(name).is_file():
            found.append(name)
            continue
        try:
            inside = find(name, access=access, stdin=stdin, suffixes=suffixes)
            found += [each for each in inside if each == name or not _is_one_of(each, written)]
        except SceneError as error:
            problems.append(str(error))
    if problems:
        raise OptionError("; ".join(problems))
    entries: list[Scene | ImageSource] = []
    large: list[str] = []
    unusable: list[str] = []
    missing = False
    for entry in found:
        if isinstance(entry, str) and not _is_scene(entry, kind, access, large):
            entries.append(open_image(Path(entry)))
            continue
        try:
            entries.append(open_scene(entry))
        except SceneError as error:
            unusable.append(str(error))
            missing |= isinstance(entry, str) and not is_remote(entry) and not Path(entry).exists()
    if missing or (unusable and not entries):
        raise SceneError("\n".join(first_few(unusable)))
    if not large:
        return Inputs(tuple(entries), (), tuple(unusable))
    others = f"; so do {len(large) - 1} others of more than {_LARGE_IMAGE} px" if len(large) > 1 else ""
    text = f"{large[0]} and no place on a map: it becomes one record{others}; --as scene cuts it into tiles"
    return Inputs(tuple(entries), (text,), tuple(unusable))


def _is_one_of(entry: str | Product, written: Collection[Path]) -> bool:
    return isinstance(entry, str) and Path(entry).resolve() in written


def _is_scene(name: str, kind: InputKind, access: Access, large: list[str]) -> bool:
    """Return whether ``name`` is a scene; add an image as large as a scene to ``large``."""
    path = Path(name)
    if kind == "scene" or path.is_dir() or not path.exists():
        return True  # without a file it is a name for GDAL, or an error that opening it explains
    if kind == "image":
        return False
    if access.vrt and is_vrt(path):
        return True
    try:
        dataset = open_dataset(name, access)
    except SceneError:
        # What neither GDAL nor Pillow reads is told as a scene that cannot be opened.
        return kind == "chip" and path.suffix.lower() not in (".gif", ".bmp")
    with dataset:
        grid = Grid.of(dataset)
        if grid.crs or not grid.transform.is_identity or dataset.gcps[0] or dataset.count == 0:
            return True
        if kind == "chip" and dataset.driver not in _PICTURES and max(dataset.width, dataset.height) > _LARGEST_CHIP:
            return True
        if dataset.width * dataset.height > _LARGE_IMAGE:
            large.append(f"{name} has {dataset.width} x {dataset.height} px")
    return False


def make_sources(inputs: Sequence[Scene | ImageSource], options: TileOptions) -> list[Source]:
    """Return a source per scene and per run of consecutive images, in order. Raises OptionError if there is none, or
    if an option does not fit a scene.
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
    """Raise OptionError for outputs that are files of a scene, its metadata or its cloud mask: ``--overwrite`` would
    destroy them.
    """
    own = {Path(name).resolve() for scene in scenes for name in scene.files}
    if found := [str(path) for path in outputs if path.resolve() in own]:
        raise OptionError(f"{' and '.join(found)}: the scene itself is never replaced; choose another output")


def rounded(value: float | None) -> float | None:
    """Round to 4 decimals: enough to rank by, too few for the noise of another batch or device."""
    return None if value is None or not math.isfinite(value) else round(float(value), 4) + 0.0
