"""Tiles of 224 pixels at 10 m composed from chips and generated land, with the share of everything in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageFilter

from rsedge.runtime.demo.scene import NO_DATA, under_clouds, under_snow
from tools.builtin_model.chips import COVERS, SIZE, Chips, random_air, to_runtime_look, to_uint8

if TYPE_CHECKING:
    import numpy.typing as npt

    from rsedge.pixels import UInt8
    from rsedge.runtime.demo.scene import Landscape

    Floats = npt.NDArray[np.float32]
    Mask = npt.NDArray[np.bool_]

TILE = 224
GENERATED = {
    "farmland": "fields",
    "forest": "forest",
    "grassland": "grassland",
    "desert": "desert",
    "town": "homes",
    "industrial area": "industry",
    "lake": "lake",
    "sea": "sea",
    "river": "river",
    "road": "road",
    "snow": "snow",
    "cloud": "cloud",
}
"""Classes of the scene generator → what captions of this model call them."""

_SHARP = {"AnnualCrop", "Pasture", "PermanentCrop", "Industrial", "Residential"}  # their borders are drawn by people


@dataclass(frozen=True, slots=True)
class Tile:
    """A tile and what is in it.

    Attributes:
        image: uint8 [S, S, 3], 1 to 255; 0 where there is no data.
        shares: Share of each thing, ``lake`` and ``sea`` apart where it is known which.
    """

    image: UInt8
    shares: dict[str, float]


def chip_tile(chip: UInt8, *, size: int = TILE, clearing: float | None = None) -> UInt8:
    """A chip mirrored at its edges until it fills a tile: how a held-out chip is shown to the model.

    Args:
        chip: uint8 [64, 64, 3].
        size: Of the tile.
        clearing: None leaves EuroSAT's grey levels; else see :func:`to_runtime_look`.
    """
    if clearing is not None:
        chip = to_uint8(to_runtime_look(chip.astype(np.float32), clearing=clearing))
    before = (size - SIZE) // 2
    return np.pad(chip, ((before, size - SIZE - before), (before, size - SIZE - before), (0, 0)), mode="symmetric")


def single(rng: np.random.Generator, chips: Chips, index: int, size: int = TILE) -> Tile:
    """One chip, mirrored, from a random place, seen through random air."""
    return Tile(observe(rng, _mirrored(rng, chips.pixels[index], size)), {chips.cover(index): 1.0})


def mosaic(rng: np.random.Generator, chips: Chips, size: int = TILE) -> Tile:
    """Several chips of one class."""
    name = str(rng.choice(tuple(COVERS)))
    return Tile(observe(rng, _texture(rng, chips, name, size)), {COVERS[name]: 1.0})


def mixture(rng: np.random.Generator, chips: Chips, size: int = TILE) -> Tile:
    """Two to four classes side by side, sometimes with a river or a road from one edge to another."""
    count = int(rng.choice([1, 2, 3, 4], p=[0.2, 0.45, 0.25, 0.1]))
    names = [str(name) for name in rng.choice(tuple(COVERS), count, replace=False)]
    owner = _regions(rng, size, count)
    image = _texture(rng, chips, names[0], size)
    shares = {COVERS[names[0]]: float((owner == 0).mean())}
    for number, name in enumerate(names[1:], 1):
        mask = owner == number
        image = _blend(image, _texture(rng, chips, name, size), mask, 0.8 if name in _SHARP else rng.uniform(1, 3))
        shares[COVERS[name]] = float(mask.mean())
    if rng.random() < (0.8 if count == 1 else 0.25):
        kind = str(rng.choice(["river", "road"]))
        if not shares.keys() & {kind, "water"}:
            line = _line(rng, size, rng.uniform(3.5, 9) if kind == "river" else rng.uniform(1.0, 2.0))
            image = _blend(image, _line_colour(rng, kind, size), line, 0.7)
            shares = {key: share * float(1 - line.mean()) for key, share in shares.items()}
            shares[kind] = float(line.mean())
    return Tile(observe(rng, image), shares)


def generated(rng: np.random.Generator, land: Landscape, size: int = TILE) -> Tile:
    """A window of generated land, turned, in another season; the brightest deserts saturate."""
    while True:  # at a swath edge a window may be mostly empty
        row, col = (int(rng.integers(length - size + 1)) for length in land.cover.shape)
        if (land.cover[row : row + size, col : col + size] == NO_DATA).mean() <= 0.5:
            break
    window = land.image[row : row + size, col : col + size]
    shares: dict[str, float] = {}
    for name, share in land.shares(row, col, size).items():
        shares[GENERATED[name]] = shares.get(GENERATED[name], 0.0) + share
    colour = window.astype(np.float32)
    if shares.get("desert", 0) > 0.2 and rng.random() < 0.7:  # from grey rock to Saharan sands, which saturate
        tint = np.array([1.0, rng.uniform(0.97, 1.12), rng.uniform(0.85, 1.15)], np.float32)
        colour *= np.float32(rng.uniform(0.8, 1.65)) * tint
    image = to_uint8(_vary(rng, colour))
    image[(window == 0).all(-1)] = 0
    image = np.rot90(image, rng.integers(4))
    return Tile(np.ascontiguousarray(image[:, ::-1] if rng.random() < 0.5 else image), shares)


def weather(rng: np.random.Generator, chips: Chips, size: int = TILE) -> Tile:
    """Chips of one class, or a mixture, under snow or clouds."""
    base = mixture(rng, chips, size) if rng.random() < 0.5 else mosaic(rng, chips, size)
    name, change = ("snow", _snow) if rng.random() < 0.5 else ("cloud", _clouds)
    image, white = change(rng, base.image)
    # What shows of the land is taken to be an even sample of it.
    shares = {key: share * float(1 - white.mean()) for key, share in base.shares.items()}
    return Tile(to_uint8(image), {**shares, name: float(white.mean())})


def observe(rng: np.random.Generator, image: Floats) -> UInt8:
    """EuroSAT's grey levels [H, W, 3] as another satellite pass over the same land would show them."""
    clearing, air = random_air(rng)
    return to_uint8(_vary(rng, to_runtime_look(image, clearing=clearing, air=air)))


def _vary(rng: np.random.Generator, image: Floats) -> Floats:
    """Season, haze, exposure, focus and sensor noise."""
    gains = np.exp(rng.normal(0, 0.10)) * np.exp(rng.normal(0, 0.035, 3))
    image = image * gains.astype(np.float32)
    if rng.random() < 0.25:
        haze = np.float32(rng.uniform(0, 0.22))
        image = image * (1 - haze) + haze * np.array([130, 140, 155], np.float32)
    if rng.random() < 0.2:
        amount = np.float32(rng.uniform(0.3, 1.0))
        for axis in (0, 1):
            near = (np.roll(image, 1, axis) + np.roll(image, -1, axis)) / 2
            image = image * (1 - amount / 2) + near * (amount / 2)
    return image + rng.uniform(0, 2.0) * rng.standard_normal(image.shape, np.float32)


def _mirrored(rng: np.random.Generator, chip: UInt8, size: int) -> Floats:
    """A window of the plane that a turned chip fills by reflection, float32 [size, size, 3]."""
    chip = np.rot90(chip, rng.integers(4))
    if rng.random() < 0.5:
        chip = chip[:, ::-1]
    period = np.concatenate([np.arange(SIZE), np.arange(SIZE)[::-1]])
    rows, cols = (period[(np.arange(size) + rng.integers(2 * SIZE)) % (2 * SIZE)] for _ in range(2))
    return np.asarray(chip[rows[:, None], cols[None]], np.float32)


def _texture(rng: np.random.Generator, chips: Chips, name: str, size: int) -> Floats:
    """A tile of one class, float32 [size, size, 3]: chips of like colours, each mirrored, in irregular cells."""
    members = chips.of(name)
    first = int(rng.choice(members))
    distance = np.abs(chips.means[members] - chips.means[first]).sum(1)
    near = members[np.argsort(distance)[: int(rng.choice([12, 40, len(members)]))]]
    count = int(rng.integers(1, 8))
    chosen = [first, *rng.choice(near, count - 1)]
    owner = _cells(rng, size, count, rough=rng.uniform(0, 8))
    level = rng.uniform(0.3, 0.9)  # how far colours are drawn together, as one pass shows neighbours
    soft = 0.7 if name in _SHARP else rng.uniform(1, 4)
    image = _mirrored(rng, chips.pixels[first], size)
    for number, index in enumerate(chosen[1:], 1):
        patch = _mirrored(rng, chips.pixels[index], size)
        patch += np.float32(level) * (chips.means[first] - chips.means[index])
        image = _blend(image, patch, owner == number, soft)
    return image


def _blend(under: Floats, over: Floats, where: Mask, softness: float) -> Floats:
    """``over`` laid on ``under`` where the mask says, the border blurred by ``softness`` pixels."""
    stencil = Image.fromarray((where * np.uint8(255)).astype(np.uint8)).filter(ImageFilter.GaussianBlur(softness))
    weight = np.asarray(stencil, np.float32)[..., None] / 255
    return np.asarray(under + weight * (over - under), np.float32)


def _cells(rng: np.random.Generator, size: int, count: int, rough: float) -> npt.NDArray[np.int64]:
    """Voronoi cells of ``count`` random points, their borders bent by ``rough`` pixels, int64 [size, size]."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    y, x = y + rough * _noise(rng, size, 28), x + rough * _noise(rng, size, 28)
    points = rng.uniform(0, size, (count, 2)).astype(np.float32)
    shape = np.float32(rng.choice([1.0, 2.0]))  # city-block distance makes borders like those of parcels
    away = [np.abs(y - py) ** shape + np.abs(x - px) ** shape for py, px in points]
    return np.argmin(away, axis=0)


def _regions(rng: np.random.Generator, size: int, count: int) -> npt.NDArray[np.int64]:
    """Which of ``count`` classes each pixel belongs to, int64 [size, size]."""
    if count == 2:
        y, x = np.mgrid[0:size, 0:size].astype(np.float32) - np.float32(size / 2)
        angle, shift = rng.uniform(0, 2 * np.pi), rng.normal(0, 0.16 * size)
        field = x * np.cos(angle) + y * np.sin(angle) + shift + rng.uniform(2, 24) * _noise(rng, size, 45)
        if rng.random() < 0.4:  # islands of the one in the other
            field = _noise(rng, size, rng.uniform(40, 80)) + rng.uniform(-0.6, 0.6)
        return (field > 0).astype(np.int64)
    return _cells(rng, size, count, rough=rng.uniform(2, 16))


def _line(rng: np.random.Generator, size: int, half_width: float) -> Mask:
    """A winding band across the middle of the tile, bool [size, size]."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) - np.float32(size / 2)
    angle = rng.uniform(0, 2 * np.pi)
    across = x * np.cos(angle) + y * np.sin(angle) + rng.normal(0, 0.12 * size)
    across += rng.uniform(3, 22) * _noise(rng, size, rng.uniform(60, 110))
    return np.asarray(np.abs(across) < half_width)


def _line_colour(rng: np.random.Generator, kind: str, size: int) -> Floats:
    """Water or asphalt in EuroSAT's grey levels, float32 [size, size, 3]."""
    waters = ((45, 68, 82), (60, 84, 92), (78, 104, 104), (52, 74, 96))
    roads = ((118, 118, 124), (150, 146, 148), (98, 102, 112))
    base = rng.choice(waters if kind == "river" else roads) * rng.uniform(0.85, 1.15)
    return np.asarray(base + 2.5 * rng.standard_normal((size, size, 1)), np.float32)


def _snow(rng: np.random.Generator, image: UInt8) -> tuple[Floats, Mask]:
    """Snow from thin patches to a closed cover."""
    size = len(image)
    depth = _noise(rng, size, rng.uniform(25, 90)) + 0.2 * _noise(rng, size, 8) + np.float32(rng.uniform(-0.7, 2.2))
    return under_snow(rng, image.astype(np.float32), depth)


def _clouds(rng: np.random.Generator, image: UInt8) -> tuple[Floats, Mask]:
    """Clouds from a few to a closed cover, small and large."""
    size, scale = len(image), rng.uniform(30, 110)
    field = sum(0.5**octave * _noise(rng, size, scale / 3**octave) for octave in range(3))
    thickness = np.asarray(rng.uniform(0.8, 2) * (field + rng.uniform(-1.2, 1.6)), np.float32)
    return under_clouds(rng, image.astype(np.float32), thickness)


def _noise(rng: np.random.Generator, size: int, scale: float) -> Floats:
    """Smooth noise of about unit deviation, float32 [size, size], with knots ``scale`` pixels apart."""
    count = max(3, int(size / scale) + 3)
    knots = Image.fromarray(rng.standard_normal((count, count), np.float32) / 0.72)
    side = (count - 1) * scale
    left, top = rng.uniform(0, max(side - size, 1), 2) / scale
    box = (float(left), float(top), float(min(left + size / scale, count)), float(min(top + size / scale, count)))
    return np.asarray(knots.resize((size, size), Image.Resampling.BICUBIC, box=box), np.float32)
