"""A heat map as a picture: the scene in grey, the heat over it in colours, and what the colours mean. Pillow only."""

from __future__ import annotations

import io
import math
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rsedge.runtime.outputs.files import write_bytes
from rsedge.runtime.outputs.report.sheet import wrap
from rsedge.runtime.scenes.readahead import read_tiles
from rsedge.runtime.scenes.tiles import TileGrid

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rsedge.pixels import UInt8
    from rsedge.runtime.locate import HeatMap
    from rsedge.runtime.scenes.scene import Scene


# matplotlib's magma (CC0) at 17 places: perceptually uniform, and as clear in grey or to the colour-blind.
_MAGMA = (
    "000004 0a0822 1d1147 36106b 51127c 6a1c81 832681 9c2e7f b73779 "
    "cf4070 e55064 f4695c fb8761 fea571 fec287 fde0a1 fcfdbf"
)
_HEAT_SHARE = 0.7  # of a pixel's colour; the rest is the scene
_PAPER, _INK, _FAINT = (255, 255, 255), (24, 24, 24), (120, 120, 120)
_TEXT, _LEADING, _GAP, _BAR = 14, 18, 12, 14  # pixels
_LONGEST, _SHORTEST = 1024, 384  # of a picture's longer side
_BLOCK = 64


def write_overlay(path: Path, found: HeatMap) -> None:
    """A PNG with a panel per text: scene, heat, and a scale with its ends.

    The scale of similarities runs from the lowest to the highest value of its panel, as their size depends on the model
    and the text; that of probabilities from 0 to 1. Cells without a value show the scene alone.

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
    """The scene made smaller by a whole number; black where it has no data or cannot be read.

    Args:
        scene: What to show.
        longest: Pixels of the longer side, at most.

    Returns:
        Source pixels per pixel, and uint8 [H, W, 3].
    """
    step = -(-max(scene.width, scene.height) // longest)
    grid = TileGrid(scene.width, scene.height, _BLOCK * step)
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
    """The picture in grey with the heat over it.

    Args:
        picture: uint8 [H, W, 3].
        step: Source pixels per pixel of the picture.
        heat: float32 [rows, cols], 0 to 1, NaN where the picture shall stay as it is.
        cell: Source pixels per cell.
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
    low, high = (0.0, 1.0) if found.contrasts else _limits(heat)
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
    if not np.isfinite(heat).any():
        draw.text((0, below), "no value anywhere", fill=_FAINT, font=font)
        return panel
    draw.text((0, below), f"{low:.3g}", fill=_INK, font=font)
    draw.text((width, below), f"{high:.3g}", fill=_INK, font=font, anchor="ra")
    draw.text((width / 2, below), found.quantity, fill=_FAINT, font=font, anchor="ma")
    return panel


def _limits(heat: NDArray[np.float32]) -> tuple[float, float]:
    """The lowest and the highest value, 0 and 1 where there is none."""
    known = heat[np.isfinite(heat)]
    return (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
