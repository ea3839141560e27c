"""Where in a scene is the thing a text names: a heat map from overlapping windows.

Each window of the scene is embedded and compared with the texts; a cell of the map, one step of the window wide, holds
the mean over all windows that cover it, each weighted by the part of the cell it covers. Memory is 8 bytes per cell
and text, and a cell stands for a window that a model has seen, so time runs out long before memory does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rasterio.errors import RasterioError

from rsedge.errors import OptionError
from rsedge.images import stack_images
from rsedge.runtime.classify import TextImageEmbedder, need_scale, softmax
from rsedge.runtime.outputs.rasters import Cells, write_heat
from rsedge.runtime.run.pipeline import Progress
from rsedge.runtime.run.sources import SEGMENT_TILES, judge
from rsedge.runtime.scenes.readahead import TilePixels, read_tiles
from rsedge.runtime.scenes.tiles import Tile, TileGrid

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rsedge.runtime.scenes.scene import Scene

COSINE = "cosine similarity"
PROBABILITY = "probability"


@dataclass(frozen=True, slots=True, kw_only=True)
class LocateOptions:
    """How a scene is searched.

    Attributes:
        window: Side of a window in source pixels; what it is brought to is the model's affair.
        stride: Source pixels from one window to the next, and the side of a cell of the map.
        max_nodata: Share of a window's pixels that may lack data, or be pure black or white; windows beyond it, and
            empty ones, say nothing.
        max_cloud: Share of its pixels that may be cloud, where the scene has a cloud mask.
        readers: Reading threads.

    Raises:
        OptionError: A value is out of range; all are named.
    """

    window: int = 224
    stride: int = 56
    max_nodata: float = 0.5
    max_cloud: float = 0.8
    readers: int = 2

    def __post_init__(self) -> None:
        problems = []
        if self.window < 1:
            problems.append(f"window is {self.window}, expected at least 1 pixel")
        elif not 1 <= self.stride <= self.window:
            problems.append(
                f"stride is {self.stride}, expected 1 to {self.window} (the window): beyond it, parts of the scene "
                "would be in no window"
            )
        problems += [
            f"{name} is {value}, expected a share from 0 to 1, such as 0.5"
            for name in ("max_nodata", "max_cloud")
            if not 0 <= (value := getattr(self, name)) <= 1
        ]
        if self.readers < 1:
            problems.append(f"readers is {self.readers}, expected at least 1 thread")
        if problems:
            raise OptionError("; ".join(problems))

    def grid(self, scene: Scene) -> TileGrid:
        """The windows of a scene: the last ones moved inward, so that no model sees an edge that is not there."""
        return TileGrid(scene.width, scene.height, self.window, self.window - self.stride, "shift")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class HeatMap:
    """Where texts fit.

    Attributes:
        scene: What was searched.
        texts: What was looked for.
        contrasts: What each text was held against; none for similarities.
        heat: float32 [texts, rows, cols], NaN where the scene has no data or no window could be seen. Similarities,
            -1 to 1, or with contrasts probabilities, 0 to 1.
        cells: Where the cells are; the last row and column may hang over the scene.
        model: ``name@hash12`` of the bundle.
        window: Side of a window in source pixels.
        windows: Number of windows.
        seen: Those the model saw.
        read_errors: Those that could not be read.
    """

    scene: Scene
    texts: tuple[str, ...]
    contrasts: tuple[str, ...]
    heat: NDArray[np.float32]
    cells: Cells
    model: str
    window: int
    windows: int
    seen: int
    read_errors: int

    @property
    def quantity(self) -> str:
        """What the values are."""
        return PROBABILITY if self.contrasts else COSINE

    def summary(self) -> dict[str, Any]:
        """What was found, as JSON values: per text its highest value and the middle of that cell, in source pixels."""
        return {
            "model": self.model,
            "quantity": self.quantity,
            "texts": [self._best(text, band) for text, band in zip(self.texts, self.heat, strict=True)],
            "contrasts": list(self.contrasts),
            "window": self.window,
            "stride": self.cells.step,
            "windows": self.windows,
            "seen": self.seen,
            "read_errors": self.read_errors,
        }

    def _best(self, text: str, band: NDArray[np.float32]) -> dict[str, Any]:
        if not np.isfinite(band).any():
            return {"text": text, "value": None, "row": None, "col": None}
        row, col = np.unravel_index(np.nanargmax(band), band.shape)
        # The last cells may hang over, and the middle of what is in the scene is meant.
        y, x = (
            (int(place) * self.cells.step + min((int(place) + 1) * self.cells.step, size)) / 2
            for place, size in ((row, self.scene.height), (col, self.scene.width))
        )
        return {"text": text, "value": round(float(band[row, col]), 4), "row": y, "col": x}

    def write(self, path: Path) -> None:
        """The map as a GeoTIFF, a band per text.

        Raises:
            OutputError: It cannot be written.
        """
        tags = {
            "quantity": self.quantity,
            "model": self.model,
            "scene": self.scene.name,
            "window": str(self.window),
            "stride": str(self.cells.step),
        }
        if self.contrasts:
            tags["contrasts"] = " | ".join(self.contrasts)
        write_heat(path, self.heat, self.texts, scene=self.scene, cells=self.cells, tags=tags)


def locate(
    embedder: TextImageEmbedder,
    scene: Scene,
    texts: Sequence[str],
    *,
    contrasts: Sequence[str] = (),
    window: int = 224,
    stride: int = 56,
    max_nodata: float = 0.5,
    max_cloud: float = 0.8,
    readers: int = 2,
    progress: Callable[[Progress], None] | None = None,
) -> HeatMap:
    """Find what texts name.

    Args:
        embedder: Of images and texts.
        scene: Where to look.
        texts: What to look for, as the model reads it: no template is put round it.
        contrasts: What else may be there, such as "a forest". With them the value of a text is its probability among
            itself and the contrasts: the softmax over the model's logits, in which the bias of a sigmoid model cancels.
        window, stride, max_nodata, max_cloud, readers: See :class:`LocateOptions`.
        progress: Called at the start and after each batch of windows.

    Raises:
        OptionError: A value is not accepted, a text is empty or there twice.
        BundleError: Contrasts are given, and the model has no logit scale.
        SceneError: The scene cannot be opened any more. Windows that cannot be read are left out and counted.
    """
    options = LocateOptions(window=window, stride=stride, max_nodata=max_nodata, max_cloud=max_cloud, readers=readers)
    check_texts(texts, contrasts)
    scores = _Scores(embedder, texts, contrasts)
    grid = options.grid(scene)
    heat = _Accumulator(len(texts), scene, options)
    say = progress or (lambda _: None)
    say(Progress(scene.name, 0, len(grid), 0))
    pixels = read_tiles(
        scene, grid, image_size=embedder.image_size, resample=embedder.resample, readers=options.readers
    )
    done = 0
    with closing(pixels):
        while segment := list(islice(pixels, SEGMENT_TILES)):
            fit = [found for found in segment if heat.wants(found)]
            if fit:
                heat.add([found.tile for found in fit], scores.of([found.images[0] for found in fit]))
            done += len(segment)
            say(Progress(scene.name, done, len(grid), 0))
    return HeatMap(
        scene=scene,
        texts=tuple(texts),
        contrasts=tuple(contrasts),
        heat=heat.result(),
        cells=Cells(step=options.stride),
        model=embedder.model,
        window=window,
        windows=len(grid),
        seen=heat.seen,
        read_errors=heat.read_errors,
    )


def check_texts(texts: Sequence[str], contrasts: Sequence[str]) -> None:
    """Refuse texts that say nothing.

    Raises:
        OptionError: There is none, one is empty or there twice, or a string stands for a list of them; all problems
            are named.
    """
    # Taken for a list, a string would be looked for letter by letter.
    strings = [(name, value) for name, value in (("texts", texts), ("contrasts", contrasts)) if isinstance(value, str)]
    if strings:
        raise OptionError(
            "; ".join(f"{name} is the string {value[:40]!r}: pass a list, [text]" for name, value in strings)
        )
    problems = []
    if not texts:
        problems.append("there is no text to look for: give at least one")
    if not all(text.strip() for text in (*texts, *contrasts)):
        problems.append("a text is empty: name what to look for, such as 'an airport'")
    twice = sorted({text for text in (*texts, *contrasts) if [*texts, *contrasts].count(text) > 1})
    if twice:
        problems.append(f"{', '.join(map(repr, twice))} is given twice: give each text and contrast once")
    if problems:
        raise OptionError("; ".join(problems))


class _Scores:
    """What windows are worth."""

    def __init__(self, embedder: TextImageEmbedder, texts: Sequence[str], contrasts: Sequence[str]) -> None:
        self._embedder, self._count = embedder, len(texts)
        self._scale = need_scale(embedder) if contrasts else 1.0
        self._anchors = embedder.embed_texts([*texts, *contrasts]).astype(np.float64)

    def of(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float64]:
        """float64 [N, texts] for N images uint8 [S, S, 3]."""
        similarity = self._embedder.embed_images(stack_images(images)).astype(np.float64) @ self._anchors.T
        texts, contrasts = similarity[:, : self._count, None], similarity[:, None, self._count :]
        if not contrasts.shape[-1]:
            return similarity
        among = np.concatenate([texts, np.broadcast_to(contrasts, (*texts.shape[:2], contrasts.shape[-1]))], axis=-1)
        return softmax(self._scale * among)[..., 0]


class _Accumulator:
    """Weighted means on the grid of cells."""

    def __init__(self, texts: int, scene: Scene, options: LocateOptions) -> None:
        self._scene, self._step, self._options = scene, options.stride, options
        rows, cols = -(-scene.height // self._step), -(-scene.width // self._step)
        self._sums = np.zeros((texts, rows, cols))
        self._weights = np.zeros((rows, cols))
        self._gaps = np.zeros(rows, np.bool_)  # rows of cells in which some pixel may lack data
        self.seen = self.read_errors = 0

    def wants(self, pixels: TilePixels) -> bool:
        """Whether the model should see a window; what it holds of gaps is noted."""
        if pixels.nodata_fraction is None:
            self.read_errors += 1
            return False
        if pixels.nodata_fraction > 0:
            rows, _ = self._shares(pixels.tile.row_off, pixels.tile.height)
            self._gaps[rows] = True
        return judge(pixels, self._options.max_nodata, self._options.max_cloud)[0] == "ok"

    def add(self, tiles: Sequence[Tile], values: NDArray[np.float64]) -> None:
        """Count windows with their values [N, texts]."""
        for tile, value in zip(tiles, values, strict=True):
            rows, down = self._shares(tile.row_off, tile.height)
            cols, across = self._shares(tile.col_off, tile.width)
            weight = down[:, None] * across
            self._sums[:, rows, cols] += value[:, None, None] * weight
            self._weights[rows, cols] += weight
            self.seen += 1

    def _shares(self, start: int, length: int) -> tuple[slice, NDArray[np.float64]]:
        """The cells along an axis that ``length`` pixels from ``start`` on touch, and the share of each they cover."""
        stop = start + length
        first, last = start // self._step, -(-stop // self._step)
        edges = np.clip(np.arange(first, last + 1) * self._step, start, stop)
        return slice(first, last), np.diff(edges) / self._step

    def result(self) -> NDArray[np.float32]:
        """float32 [texts, rows, cols], NaN where no window was seen or no pixel has data."""
        known = (self._weights > 0) & self._cells_with_data()
        means = np.full(self._sums.shape, np.nan)
        np.divide(self._sums, self._weights, out=means, where=known)
        return means.astype(np.float32)

    def _cells_with_data(self) -> NDArray[np.bool_]:
        """Which cells have a pixel with data. Windows tell only how much they lack, so gaps are looked at again."""
        found = np.ones(self._weights.shape, np.bool_)
        if self._gaps.any():
            with self._scene.reader() as reader:
                for row in np.flatnonzero(self._gaps).tolist():
                    top = row * self._step
                    height = min(self._step, self._scene.height - top)
                    try:
                        _, empty = reader.read(top, 0, height, self._scene.width)
                    except RasterioError:  # the windows there were not read either
                        continue
                    columns = np.arange(0, self._scene.width, self._step)
                    found[row] = np.logical_or.reduceat(~empty.all(axis=0), columns)
        return found
