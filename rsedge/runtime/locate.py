"""Where in a scene is the thing a text names: a heat map from overlapping windows.

Each window of the scene is embedded and compared with the texts; a cell of the map, one step of the window wide, holds
the mean over all windows that cover it, each weighted by the part of the cell it covers. Memory is 8 bytes per cell
and text, and a cell stands for a window that a model has seen, so time runs out long before memory does.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rasterio.errors import RasterioError

from rsedge.errors import OptionError
from rsedge.pixels import stack_images
from rsedge.runtime.classify import TextImageEmbedder, need_scale, softmax
from rsedge.runtime.outputs.files import write_bytes
from rsedge.runtime.outputs.rasters import Cells, write_heat
from rsedge.runtime.outputs.report.sheet import wrap
from rsedge.runtime.run.pipeline import Progress
from rsedge.runtime.run.sources import SEGMENT_TILES, judge
from rsedge.runtime.scenes.readahead import read_tiles
from rsedge.runtime.scenes.tiles import TileGrid

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rsedge.pixels import UInt8
    from rsedge.runtime.scenes.scene import Scene

COSINE = "cosine similarity"
PROBABILITY = "probability"

# matplotlib's magma (CC0) at 17 places: perceptually uniform, and as clear in grey or to the colour-blind.
_MAGMA = (
    "000004 0a0822 1d1147 36106b 51127c 6a1c81 832681 9c2e7f b73779 "
    "cf4070 e55064 f4695c fb8761 fea571 fec287 fde0a1 fcfdbf"
)
LEAST_SPAN = 0.05
"""Similarities that differ by less than this do not tell places apart."""
_HEAT_SHARE = 0.7  # of a pixel's colour; the rest is the scene
_PAPER, _INK, _FAINT = (255, 255, 255), (24, 24, 24), (120, 120, 120)
_TEXT, _LEADING, _GAP, _BAR = 14, 18, 12, 14  # pixels
_LONGEST, _SHORTEST = 1024, 384  # of a picture's longer side
_BLOCK = 64


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
            return {"text": text, "value": None, "least": None, "row": None, "col": None}
        row, col = np.unravel_index(np.nanargmax(band), band.shape)
        # The last cells may hang over, and the middle of what is in the scene is meant.
        y, x = (
            (int(place) * self.cells.step + min((int(place) + 1) * self.cells.step, size)) / 2
            for place, size in ((row, self.scene.height), (col, self.scene.width))
        )
        least = round(float(np.nanmin(band)), 4)
        return {"text": text, "value": round(float(band[row, col]), 4), "least": least, "row": y, "col": x}

    def write(self, path: Path) -> None:
        """Write the map as a GeoTIFF, a band per text.

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
    scale = need_scale(embedder) if contrasts else 1.0
    anchors = embedder.embed_texts([*texts, *contrasts]).astype(np.float64)

    def values(images: Sequence[UInt8]) -> NDArray[np.float64]:
        """float64 [N, texts] for N images uint8 [S, S, 3]."""
        similarity = embedder.embed_images(stack_images(images)).astype(np.float64) @ anchors.T
        if not contrasts:
            return similarity
        others = np.broadcast_to(similarity[:, None, len(texts) :], (len(images), len(texts), len(contrasts)))
        return softmax(scale * np.concatenate([similarity[:, : len(texts), None], others], axis=-1))[..., 0]

    grid = options.grid(scene)
    size = -(-scene.height // stride), -(-scene.width // stride)
    sums, weights = np.zeros((len(texts), *size)), np.zeros(size)
    gaps = np.zeros(size[0], np.bool_)  # rows of cells in which some pixel may lack data
    seen = read_errors = done = 0
    say = progress or (lambda _: None)
    say(Progress(scene.name, 0, len(grid), 0))
    with closing(
        read_tiles(scene, grid, image_size=embedder.image_size, resample=embedder.resample, readers=options.readers)
    ) as pixels:
        while segment := list(islice(pixels, SEGMENT_TILES)):
            for found in segment:
                read_errors += found.nodata_fraction is None
                if found.nodata_fraction:
                    gaps[_shares(found.tile.row_off, found.tile.height, stride)[0]] = True
            fit = [found for found in segment if judge(found, max_nodata, max_cloud)[0] == "ok"]
            for found, value in zip(fit, values([found.images[0] for found in fit]) if fit else (), strict=True):
                rows, down = _shares(found.tile.row_off, found.tile.height, stride)
                cols, across = _shares(found.tile.col_off, found.tile.width, stride)
                weight = down[:, None] * across
                sums[:, rows, cols] += value[:, None, None] * weight
                weights[rows, cols] += weight
            seen += len(fit)
            done += len(segment)
            say(Progress(scene.name, done, len(grid), 0))
    means = np.full(sums.shape, np.nan)
    np.divide(sums, weights, out=means, where=(weights > 0) & _with_data(scene, gaps, stride))
    return HeatMap(
        scene=scene,
        texts=tuple(texts),
        contrasts=tuple(contrasts),
        heat=means.astype(np.float32),
        cells=Cells(step=stride),
        model=embedder.model,
        window=window,
        windows=len(grid),
        seen=seen,
        read_errors=read_errors,
    )


def _shares(start: int, length: int, step: int) -> tuple[slice, NDArray[np.float64]]:
    """The cells along an axis that ``length`` pixels from ``start`` on touch, and the share of each they cover."""
    stop = start + length
    first, last = start // step, -(-stop // step)
    edges = np.clip(np.arange(first, last + 1) * step, start, stop)
    return slice(first, last), np.diff(edges) / step


def _with_data(scene: Scene, gaps: NDArray[np.bool_], step: int) -> NDArray[np.bool_]:
    """Which cells have a pixel with data. Windows tell only how much they lack, so rows with gaps are read again."""
    columns = np.arange(0, scene.width, step)
    found = np.ones((len(gaps), len(columns)), np.bool_)
    if gaps.any():
        with scene.reader() as reader:
            for row in np.flatnonzero(gaps).tolist():
                with suppress(RasterioError):  # the windows there were not read either
                    _, empty = reader.read(row * step, 0, min(step, scene.height - row * step), scene.width)
                    found[row] = np.logical_or.reduceat(~empty.all(axis=0), columns)
    return found


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


def write_overlay(path: Path, found: HeatMap) -> None:
    """A PNG with a panel per text: scene, heat, and a scale with its ends.

    The scale of similarities runs from the lowest to the highest value of its panel, as their size depends on the model
    and the text, and spans at least ``LEAST_SPAN``; that of probabilities from 0 to 1. Cells without a value show the
    scene alone.

    Raises:
        OutputError: It cannot be written.
        SceneError: The scene cannot be opened any more.
    """
    columns = math.ceil(math.sqrt(len(found.texts)))
    step, picture = quicklook(found.scene, _LONGEST // columns)
    font = ImageFont.load_default(_TEXT)
    times = max(1, _SHORTEST // max(picture.shape))  # a small scene is shown larger
    width = max(picture.shape[1] * times, _SHORTEST // 2)
    titles = [wrap(text, font, width) for text in found.texts]
    above = max(map(len, titles)) * _LEADING + 4  # the same in all panels, so that they stand level
    panels = [_panel(picture, step, times, found, number, title, above) for number, title in enumerate(titles)]
    height = panels[0].height
    rows = -(-len(panels) // columns)
    sheet = Image.new("RGB", (columns * (width + _GAP) + _GAP, rows * (height + _GAP) + _GAP), _PAPER)
    for number, panel in enumerate(panels):
        row, column = divmod(number, columns)
        sheet.paste(panel, (_GAP + column * (width + _GAP), _GAP + row * (height + _GAP)))
    data = io.BytesIO()
    sheet.save(data, format="PNG", optimize=True)
    write_bytes(path, data.getvalue())


def quicklook(scene: Scene, longest: int) -> tuple[int, UInt8]:
    """Source pixels per pixel, and the scene as uint8 [H, W, 3], black where it has no data or cannot be read.

    It is made smaller by a whole number, so that the longer side has at most ``longest`` pixels.
    """
    step = -(-max(scene.width, scene.height) // longest)
    grid = TileGrid(scene.width, scene.height, _BLOCK * step, edge="pad")
    picture = np.zeros((grid.rows * _BLOCK, grid.cols * _BLOCK, 3), np.uint8)
    with closing(read_tiles(scene, grid, image_size=_BLOCK, resample="bilinear")) as tiles:
        for pixels in tiles:
            if pixels.images:
                top, left = pixels.tile.row * _BLOCK, pixels.tile.col * _BLOCK
                picture[top : top + _BLOCK, left : left + _BLOCK] = pixels.images[0]
    return step, picture[: -(-scene.height // step), : -(-scene.width // step)]


def magma(values: NDArray[np.float32]) -> UInt8:
    """R, G, B [..., 3] of values from 0 to 1; black where they are NaN."""
    table = np.array([list(bytes.fromhex(colour)) for colour in _MAGMA.split()], np.float64)
    places = np.linspace(0, 1, len(table))
    colours = np.stack([np.interp(np.nan_to_num(values), places, table[:, channel]) for channel in range(3)], axis=-1)
    return np.where(np.isnan(values)[..., None], 0, np.round(colours)).astype(np.uint8)


def blend(picture: UInt8, step: int, heat: NDArray[np.float32], cell: int) -> UInt8:
    """The picture, uint8 [H, W, 3], in grey with the heat over it, float32 [rows, cols], 0 to 1.

    ``step`` and ``cell`` are the source pixels per pixel and per cell. Where the heat is NaN, the picture stays.
    """
    rows, cols = ((np.arange(size) * step + step // 2) // cell for size in picture.shape[:2])
    over = heat[np.minimum(rows, heat.shape[0] - 1)][:, np.minimum(cols, heat.shape[1] - 1)]
    grey = np.asarray(Image.fromarray(picture).convert("L"), np.float32)[..., None]
    mixed = np.round((1 - _HEAT_SHARE) * grey + _HEAT_SHARE * magma(over)).astype(np.uint8)
    return np.where(np.isnan(over)[..., None], picture, mixed)


def _panel(
    picture: UInt8, step: int, times: int, found: HeatMap, number: int, title: list[str], above: int
) -> Image.Image:
    """Title lines in the ``above`` uppermost pixels, the picture ``times`` larger with its heat, the scale."""
    heat = found.heat[number]
    known = heat[np.isfinite(heat)]
    low, high = (float(known.min()), float(known.max())) if known.size and not found.contrasts else (0.0, 1.0)
    if high - low < LEAST_SPAN:  # noise is not stretched to the whole scale
        low, high = (low + high - LEAST_SPAN) / 2, (low + high + LEAST_SPAN) / 2
    image = Image.fromarray(blend(picture, step, (heat - low) / ((high - low) or 1), found.cells.step))
    image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    font = ImageFont.load_default(_TEXT)
    width = max(image.width, _SHORTEST // 2)
    panel = Image.new("RGB", (width, above + image.height + _BAR + _LEADING + 12), _PAPER)
    draw = ImageDraw.Draw(panel)
    for line, text in enumerate(title):
        draw.text((0, line * _LEADING), text, fill=_INK, font=font)
    panel.paste(image, (0, above))
    bar = above + image.height + 6
    ramp = magma(np.linspace(0, 1, width, dtype=np.float32))
    panel.paste(Image.fromarray(np.broadcast_to(ramp, (_BAR, width, 3)).copy()), (0, bar))
    below = bar + _BAR + 3
    if not known.size:
        draw.text((0, below), "no value anywhere", fill=_FAINT, font=font)
        return panel
    draw.text((0, below), f"{low:.3g}", fill=_INK, font=font)
    draw.text((width, below), f"{high:.3g}", fill=_INK, font=font, anchor="ra")
    draw.text((width / 2, below), found.quantity, fill=_FAINT, font=font, anchor="ma")
    return panel
