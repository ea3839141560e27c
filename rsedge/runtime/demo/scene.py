"""Generated Sentinel-2-like land at 10 m: scenes to demonstrate on and to test with, the same for the same seed.

A plan says what lies where, and one painter gives it shape and texture, for a tile as for a scene, so that what is
learned from one holds for the other. Everything is continuous over a scene: rivers, roads and coasts run through many
tiles. NumPy and rasterio only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.transform import from_origin
from rasterio.windows import Window

from rsedge.pixels import ReflectanceRule, UInt8

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Point = tuple[float, float]

CLASSES = (
    "farmland", "forest", "grassland", "desert", "town", "industrial area",
    "lake", "sea", "river", "road", "snow", "cloud",
)  # fmt: skip
"""Land cover by its number in ``Landscape.cover``; ``NO_DATA`` is none of them."""
NO_DATA = 255
_FARMLAND, _FOREST, _GRASSLAND, _DESERT, _TOWN, _INDUSTRIAL = range(6)
_LAKE, _SEA, _RIVER, _ROAD, _SNOW, _CLOUD = range(6, len(CLASSES))

# Colours below are grey levels of a true-colour image, 0 to 255.
_CROPS = (
    (58, 86, 46), (46, 74, 38), (78, 100, 54), (98, 106, 60), (146, 132, 86), (166, 148, 104),
    (122, 98, 72), (100, 78, 60), (174, 156, 120), (138, 138, 52), (66, 92, 52), (112, 90, 66),
)  # fmt: skip
_ROOFS = (
    (156, 108, 88), (132, 128, 126), (190, 184, 176), (70, 86, 54), (46, 62, 40), (148, 120, 104), (112, 108, 106),
)  # fmt: skip
_HALLS = ((218, 218, 216), (180, 182, 186), (150, 166, 190), (202, 188, 174), (122, 114, 106), (232, 230, 226))
_RELIEF = (0.10, 0.45, 0.45, 0.60, 0.04, 0.0, 0.0, 0.0, 0.0, 0.0, 0.6, 0.0)  # how much hill shading each class shows


@dataclass(frozen=True, slots=True)
class Landscape:
    """Painted land.

    Attributes:
        dn: Reflectance digital numbers, uint16 [3, H, W] in R, G, B order; 0 is no data.
        cover: Number of the class in ``CLASSES`` or ``NO_DATA``, uint8 [H, W].
    """

    dn: npt.NDArray[np.uint16]
    cover: UInt8

    @property
    def image(self) -> UInt8:
        """The land as the runtime shows it to a model, uint8 [H, W, 3], 0 where there is no data."""
        image = np.moveaxis(ReflectanceRule().apply(self.dn), 0, -1)
        return np.where(self.cover[..., None] == NO_DATA, np.uint8(0), image)

    def shares(self, row_off: int = 0, col_off: int = 0, size: int | None = None) -> dict[str, float]:
        """Share of each class present among the pixels with data of a square window, the largest first.

        The window begins at ``row_off``, ``col_off`` and is ``size`` pixels wide, or reaches the lower and right edges.
        """
        end_row, end_col = (None, None) if size is None else (row_off + size, col_off + size)
        window = self.cover[row_off:end_row, col_off:end_col]
        counts = np.bincount(window[window != NO_DATA], minlength=len(CLASSES))
        order = np.argsort(-counts, kind="stable")
        return {CLASSES[index]: float(counts[index] / counts.sum()) for index in order if counts[index]}


def compose_scene(*, seed: int = 7, tiles: tuple[int, int] = (6, 8), tile_size: int = 224) -> Landscape:
    """A continuous landscape of ``tiles`` (rows, columns) with no data beyond a slanting swath edge, upper left."""
    rng = np.random.default_rng(seed)
    height, width = tiles[0] * tile_size, tiles[1] * tile_size
    land = Landscape(*paint(rng, height, width, _scene_plan(rng, height, width)))
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) / tile_size
    return _blank(land, x + 0.5 * y < 1.5)


def compose_tile(rng: np.random.Generator, size: int = 224) -> Landscape:
    """A tile of random land, ``size`` pixels square, sometimes at a swath edge."""
    land = Landscape(*paint(rng, size, size, _tile_plan(rng, size)))
    if rng.random() < 0.06:
        y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size - 0.5
        angle = rng.uniform(0, 2 * np.pi)
        land = _blank(land, x * math.cos(angle) + y * math.sin(angle) > rng.uniform(0.1, 0.4))
    return land


def write_scene(path: str | Path, *, seed: int = 7, tiles: tuple[int, int] = (6, 8), tile_size: int = 224) -> Path:
    """Write :func:`compose_scene` as a tiled GeoTIFF of reflectance, 10 m in UTM, bands B04, B03, B02; return ``path``.

    What is in each tile is ``compose_scene(...).shares(row * tile_size, col * tile_size, tile_size)``.
    """
    dn = compose_scene(seed=seed, tiles=tiles, tile_size=tile_size).dn
    profile = {
        "driver": "GTiff",
        "count": 3,
        "height": dn.shape[1],
        "width": dn.shape[2],
        "dtype": "uint16",
        "crs": "EPSG:32632",
        "transform": from_origin(500000, 4910000, 10, 10),
        "nodata": 0,
        "tiled": True,
        "blockxsize": 256,
        "blockysize": 256,
        "compress": "deflate",
        "predictor": 2,
    }
    with rasterio.open(path, "w", **profile) as dataset:
        dataset.write(dn)
        for band, name in enumerate(("B04", "B03", "B02"), 1):
            dataset.set_band_description(band, name)
        dataset.update_tags(TIFFTAG_IMAGEDESCRIPTION=f"Generated by rsedge with seed {seed}; not a satellite image")
    return Path(path)


def _scene_plan(rng: np.random.Generator, height: int, width: int) -> Plan:
    """Coast on one side, desert on the other, and between them fields, forests, towns, a river and roads."""
    half = min(height, width) / 2
    seaward = rng.uniform(0, 2 * np.pi)
    coast = 0.72 * half
    dry = seaward + np.pi + rng.uniform(-0.6, 0.6)
    taken: list[tuple[Point, float]] = []

    def place(radius: float, *, cool: bool = False) -> tuple[Point, float]:
        """A spot off the sea, clear of those taken, far from the desert if ``cool``; as far as 60 tries find one."""
        for _ in range(60):
            x, y = rng.uniform(0.06, 0.94) * width, rng.uniform(0.06, 0.94) * height
            towards = (x - width / 2) * math.cos(seaward) + (y - height / 2) * math.sin(seaward)
            clear = all(math.dist((x, y), spot) > 1.1 * (radius + other) for spot, other in taken)
            warmth = (x - width / 2) * math.cos(dry) + (y - height / 2) * math.sin(dry)
            if clear and towards < coast - 0.5 * radius - 30 and not (cool and warmth > -0.1 * half):
                break
        taken.append(((x, y), radius))
        return (x, y), radius

    scale = math.sqrt(height * width / (1344 * 1792))
    lakes = [place(rng.uniform(90, 150)), *(place(rng.uniform(30, 60)) for _ in range(round(2 * scale)))]
    towns = [place(rng.uniform(120, 190)), *(place(rng.uniform(50, 110)) for _ in range(round(5 * scale)))]
    works = []
    for (x, y), radius in towns[:3]:
        angle = rng.uniform(0, 2 * np.pi)
        reach = 0.95 * radius
        works.append(((x + reach * math.cos(angle), y + reach * math.sin(angle)), rng.uniform(0.45, 0.6) * radius))
    links = zip(towns, [*towns[1:], towns[0]], strict=True)
    roads = [(a, math.atan2(b[1] - a[1], b[0] - a[0])) for (a, _), (b, _) in list(links)[:4] if a != b]
    river = (rng.uniform(0.35, 0.65) * width, rng.uniform(0.35, 0.65) * height)
    return Plan(
        dryness=rng.uniform(-0.9, -0.5),
        dry_slope=(2.2 / scale * math.cos(dry), 2.2 / scale * math.sin(dry)),
        woods=rng.uniform(-0.4, 0.1),
        meadows=rng.uniform(-1.2, -0.7),
        sea=(seaward, coast),
        lakes=lakes,
        towns=towns,
        works=works,
        rivers=[(river, seaward + rng.uniform(-0.4, 0.4), rng.uniform(6, 10))],
        roads=roads,
        snows=[place(rng.uniform(150, 220), cool=True)],
        clouds=[place(rng.uniform(150, 220)) for _ in range(max(1, round(2 * scale)))],
    )


def _tile_plan(rng: np.random.Generator, size: int) -> Plan:
    """Land where every class is about as likely as any other to fill much of the tile."""

    def chance(share: float) -> bool:
        return bool(rng.random() < share)

    def spot() -> Point:
        return rng.uniform(0, size), rng.uniform(0, size)

    themes = ("fields", "forest", "meadow", "desert", "town", "works", "lake", "sea", "snow", "cloud", "mixed")
    theme = str(rng.choice(themes))
    plan = Plan(
        dryness=rng.uniform(-1, 0.3),
        dry_slope=(rng.normal(0, 2), rng.normal(0, 2)),
        woods=rng.uniform(-0.8, 0.3),
        meadows=rng.uniform(-1.5, -0.5),
        rivers=[(spot(), rng.uniform(0, 2 * np.pi), rng.uniform(4.5, 11))] if chance(0.25) else [],
        roads=[(spot(), rng.uniform(0, 2 * np.pi))] if chance(0.3) else [],
        lakes=[(spot(), rng.uniform(30, 70))] if chance(0.12) else [],
        towns=[(spot(), rng.uniform(40, 100))] if chance(0.15) else [],
        works=[(spot(), rng.uniform(30, 60))] if chance(0.08) else [],
        snows=[(spot(), rng.uniform(40, 160))] if chance(0.05) else [],
        clouds=[(spot(), rng.uniform(40, 160))] if chance(0.08) else [],
    )
    spots: dict[str, tuple[list[tuple[Point, float]], float, float]] = {
        "town": (plan.towns, 80, 200),
        "works": (plan.works, 50, 140),
        "lake": (plan.lakes, 60, 200),
        "snow": (plan.snows, 150, 600),
        "cloud": (plan.clouds, 150, 600),
    }  # theme → where its spots go, least and largest radius
    if theme == "forest":
        plan.woods = rng.uniform(0.3, 2.5)
    elif theme == "meadow":
        plan.meadows, plan.woods = rng.uniform(0.3, 2.5), rng.uniform(-1.5, 0)
    elif theme == "desert":
        plan.dryness = rng.uniform(0.8, 2)
    elif theme == "sea":
        plan.sea = (rng.uniform(0, 2 * np.pi), rng.uniform(-1.0, 0.3) * size)
    elif theme in spots:
        spots[theme][0].append((spot(), rng.uniform(*spots[theme][1:])))
    return plan


def _blank(land: Landscape, empty: npt.NDArray[np.bool_]) -> Landscape:
    """The landscape without data where ``empty``, bool [H, W]."""
    return Landscape(np.where(empty, np.uint16(0), land.dn), np.where(empty, np.uint8(NO_DATA), land.cover))


def repeat_scene(source: Path, path: Path, times: int) -> Path:
    """Write the GeoTIFF ``source`` at least ``times`` times, in rows of 4 and at most 52, as one scene; give ``path``.

    A benchmark reads it, as painting takes longer than measuring, and reading a small scene over and over would count
    the wait for the first tiles each time.
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


@dataclass(slots=True, kw_only=True)
class Plan:
    """What lies where: points in pixels as (x, y), angles in radians, fields in standard deviations of noise."""

    dryness: float = -1.0  # in the middle; above 0.4 is grassland, above 0.9 desert
    dry_slope: Point = (0.0, 0.0)  # its change per 1000 pixels along x and y
    woods: float = 0.0  # the higher, the more forest
    meadows: float = -1.0
    sea: tuple[float, float] | None = None  # direction it lies in, distance of the coast from the middle
    lakes: list[tuple[Point, float]] = field(default_factory=list)  # middle, radius
    towns: list[tuple[Point, float]] = field(default_factory=list)
    works: list[tuple[Point, float]] = field(default_factory=list)
    rivers: list[tuple[Point, float, float]] = field(default_factory=list)  # a point, direction, half width
    roads: list[tuple[Point, float]] = field(default_factory=list)  # a point, direction
    snows: list[tuple[Point, float]] = field(default_factory=list)  # middle, radius
    clouds: list[tuple[Point, float]] = field(default_factory=list)


def paint(  # noqa: PLR0915 - one layer after another, each once
    rng: np.random.Generator, height: int, width: int, plan: Plan
) -> tuple[npt.NDArray[np.uint16], UInt8]:
    """Digital numbers of reflectance, uint16 [3, H, W], and numbers of classes, uint8 [H, W].

    The classes are laid over one another, coloured, and seen through air and a sensor.
    """
    shape = (height, width)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    relief = _noise(rng, shape, 110, octaves=4)
    edge = _noise(rng, shape, 45, octaves=3)  # makes every outline irregular
    fine = _noise(rng, shape, 2.2)
    dune = _noise(rng, shape, 30, octaves=2)
    cover = np.full(shape, _FARMLAND, np.uint8)

    slope = plan.dry_slope[0] * (x - width / 2) + plan.dry_slope[1] * (y - height / 2)
    dryness = plan.dryness + slope / 1000 + 0.25 * _noise(rng, shape, 160, octaves=3)
    ragged = 0.07 * _noise(rng, shape, 9, octaves=2)
    dryness += ragged
    cover[_noise(rng, shape, 120, octaves=3) + ragged + plan.meadows > 0] = _GRASSLAND
    cover[dryness > 0.4] = _GRASSLAND
    cover[(_noise(rng, shape, 100, octaves=3) + 1.3 * ragged + plan.woods > 0.35) & (dryness < 0.5)] = _FOREST
    cover[dryness > 0.9] = _DESERT

    crops, crop_edge = _crops(rng, x, y, edge)
    colour = np.empty((*shape, 3), np.float32)
    colour[:] = crops + 2 * fine[..., None]
    hedge = crop_edge < 0.8
    colour[hedge] = 0.5 * colour[hedge] + _f32((24, 32, 20))
    broad = _noise(rng, shape, 70, octaves=2)
    _tint(colour, cover == _FOREST, (26, 43, 30), 5.5 * fine + 2.5 * broad, (0.7, 1.2, 0.6))
    _tint(colour, cover == _GRASSLAND, (98, 108, 66), 9 * broad + 3 * dune + 2 * fine, (1.4, 0.7, 0.7))
    parched = (0.75 * (dryness - 0.4) / 0.5).clip(0, 0.75)[..., None] * (cover == _GRASSLAND)[..., None]
    colour += parched * (_f32((178, 148, 104)) - colour)
    ripple = np.sin((x * 0.6 + y * 0.8 + 9 * dune) / 2.6) * np.clip(0.5 + broad, 0, 1)
    _tint(colour, cover == _DESERT, (192, 156, 114), 9 * broad + 6 * ripple + 2 * fine, (1.0, 1.0, 0.9))

    for (px, py), radius in plan.towns:
        cover[1 - np.hypot(x - px, y - py) / radius + 0.16 * edge > 0] = _TOWN
    for (px, py), radius in plan.works:
        angle = px % np.pi  # whatever, but settled
        across, along = _turn(x - px, y - py, angle)
        cover[np.maximum(abs(across), 1.3 * abs(along)) + 0.05 * radius * edge < radius] = _INDUSTRIAL
    for built, pattern in ((_TOWN, _streets(rng, x, y)), (_INDUSTRIAL, _halls(rng, x, y, fine))):
        colour[cover == built] = pattern[cover == built]

    rivers = [
        _course(rng, x, y, point, angle, bend=rng.uniform(35, 70), length=rng.uniform(60, 90), warp=22) - half
        for point, angle, half in plan.rivers
    ]
    for beyond in rivers:
        _tint(colour, (beyond > 0) & (beyond < 3 + 2 * edge), (72, 88, 50), 5 * fine, (1, 1, 1))  # the banks
        cover[beyond <= 0] = _RIVER
        _tint(colour, beyond <= 0, (38, 60, 58), fine, (1, 1, 1))
        _tint(colour, (abs(beyond) < 2.0) & (dune > 0.8), (158, 148, 122), 3 * fine, (1, 1, 1))  # gravel
    for (px, py), radius in plan.lakes:
        deep = (1 - np.hypot(x - px, y - py) / radius + 0.2 * edge) * radius
        _tint(colour, (deep > -2) & (cover != _RIVER), (90, 96, 66), 3 * fine, (1, 1, 1))
        cover[deep > 0] = _LAKE
        _tint(colour, deep > 0, (14, 33, 38), np.clip(8 - deep, 0, 8) + 0.5 * fine, (0.8, 1.2, 0.8))
    if plan.sea is not None:
        along, _ = _turn(x - width / 2, y - height / 2, plan.sea[0])
        # Bounded, so that no hollow far inland fills with sea.
        deep = along - plan.sea[1] + (22 * edge + 45 * relief).clip(-90, 90)
        _tint(colour, deep > -3, (200, 184, 148), 4 * fine, (1, 1, 1))
        cover[deep > -3] = _SEA
        shallow = 22 * np.exp(-np.maximum(deep, 0) / 14)
        swell = 2.2 * np.sin((x * 0.35 + y * 0.94 + 2 * dune) / 2.9) + fine
        _tint(colour, deep > 0, (10, 36, 66), shallow + swell, (0.6, 1.4, 1.2))

    for point, angle in plan.roads:
        away = _course(rng, x, y, point, angle, bend=25, length=300, warp=5)
        land = (cover != _SEA) & (cover != _LAKE)
        cover[(away < 2.5) & land] = _ROAD
        _tint(colour, (away < 2.5) & land, (62, 74, 48), 2 * fine, (1, 1, 1))
        _tint(colour, (away < 1.5) & land, (178, 172, 166), 3 * fine, (1, 1, 1))

    for (px, py), radius in plan.snows:
        depth = 4 * (1 - np.hypot(x - px, y - py) / radius) + 0.8 * edge
        colour, white = under_snow(rng, colour, depth * (cover != _SEA))
        cover[white] = _SNOW
    light = np.gradient(relief, axis=1) + np.gradient(relief, axis=0)
    colour *= (1 + 14 * light * _f32(_RELIEF)[cover] / 1.6).clip(0.6, 1.5)[..., None]
    for (px, py), radius in plan.clouds:
        thickness = 2 * (1 - np.hypot(x - px, y - py) / radius) + _noise(rng, shape, 60, octaves=4)
        colour, white = under_clouds(rng, colour, thickness)
        cover[white] = _CLOUD
    return _observe(rng, colour), cover


def under_snow(rng: np.random.Generator, colour: Floats, depth: Floats) -> tuple[Floats, Mask]:
    """Snow on grey levels, float32 [H, W, 3], wherever ``depth`` [H, W] is above 0, closed from 0.3 on.

    Returns:
        Colours, float32 [H, W, 3], in which dark land shows through a little, and bool [H, W], more than half is snow.
    """
    shape = (colour.shape[0], colour.shape[1])
    drifts = 7 * _noise(rng, shape, 40, octaves=2) + 2 * _noise(rng, shape, 3)
    white = _f32((226, 231, 240)) * np.float32(rng.uniform(0.88, 1.1)) + drifts[..., None]
    white += np.float32(rng.uniform(0.05, 0.45)) * (colour - 100)
    return _over(colour, white, (depth / 0.3).clip(0, 1))


def under_clouds(rng: np.random.Generator, colour: Floats, thickness: Floats) -> tuple[Floats, Mask]:
    """Clouds wherever ``thickness`` [H, W] is above 0, opaque from 1 on, and their shadows; see :func:`under_snow`."""
    shape = (colour.shape[0], colour.shape[1])
    opacity = thickness.clip(0, 1)
    rows, cols = (np.arange(size) + rng.integers(8, 30) * rng.choice([-1, 1]) for size in shape)
    shadow = opacity[rows.clip(0, shape[0] - 1)[:, None], cols.clip(0, shape[1] - 1)]
    lumps = 9 * _noise(rng, shape, 24, octaves=4) + 12 * thickness.clip(0, 2)
    white = np.repeat(np.float32(rng.uniform(205, 245)) + lumps[..., None], 3, axis=-1)
    return _over(colour * (1 - np.float32(0.55) * shadow[..., None]), white, opacity)


def _over(under: Floats, over: Floats, opacity: Floats) -> tuple[Floats, Mask]:
    return _f32(under + opacity[..., None] * (over - under)), np.asarray(opacity > 0.5)


def _f32(values: Any) -> Floats:
    return np.asarray(values, np.float32)


def _observe(rng: np.random.Generator, colour: Floats) -> npt.NDArray[np.uint16]:
    """Digital numbers [3, H, W] of colours [H, W, 3] behind optics, haze, exposure and sensor noise."""
    for axis in (0, 1):
        colour = 0.7 * colour + 0.15 * (np.roll(colour, 1, axis) + np.roll(colour, -1, axis))
    thickness = 1 + 0.4 * _noise(rng, (colour.shape[0], colour.shape[1]), 300)
    haze = _f32(rng.uniform(0, 0.16) * thickness.clip(0, 2))[..., None]
    colour = colour * (1 - haze) + haze * _f32((120, 132, 150))
    colour = rng.uniform(0.88, 1.15) * colour + rng.uniform(0.6, 2.0) * rng.standard_normal(colour.shape, np.float32)
    # The runtime's rule backwards; a digital number of 0 would mean no data.
    dn = np.clip(np.rint((colour - 1) * (ReflectanceRule().full_scale / 254)), 1, 6000)
    return np.ascontiguousarray(np.moveaxis(dn, -1, 0)).astype(np.uint16)


def _noise(rng: np.random.Generator, shape: tuple[int, int], scale: float, *, octaves: int = 1) -> Floats:
    """Smooth noise [H, W] of about unit deviation: cubic B-splines over random knots ``scale`` pixels apart."""
    total, power = np.zeros(shape, np.float32), 0.0
    for octave in range(octaves):
        step, gain = max(scale / 2**octave, 1.5), 0.55**octave
        knots = rng.standard_normal([int(size / step) + 5 for size in shape], np.float32)
        for axis, size in enumerate(shape):
            at = np.arange(size) / step + rng.random()
            first = at.astype(int)
            t = (at - first).astype(np.float32)
            weights = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
            column = (-1, 1) if axis == 0 else (1, -1)
            knots = sum(w.reshape(column) / 6 * knots.take(first + k, axis) for k, w in enumerate(weights))
        total += gain * knots
        power += gain**2
    return total / np.float32(0.48 * math.sqrt(power))


def _turn(x: Floats, y: Floats, angle: float | Floats) -> tuple[Floats, Floats]:
    """Coordinates in a frame turned by ``angle``."""
    cos, sin = np.cos(angle, dtype=np.float32), np.sin(angle, dtype=np.float32)
    return x * cos + y * sin, y * cos - x * sin


def _course(
    rng: np.random.Generator,
    x: Floats,
    y: Floats,
    point: Point,
    angle: float,
    *,
    bend: float,
    length: float,
    warp: float,
) -> Floats:
    """Distance in pixels from a winding line through about ``point``: a sine of ``bend`` and ``length``, warped."""
    along, across = _turn(x - np.float32(point[0]), y - np.float32(point[1]), angle)
    along = along + warp * _noise(rng, x.shape, 80)
    across = across + warp * _noise(rng, x.shape, 80, octaves=2)
    phase = rng.uniform(0, 2 * np.pi)
    slope = bend / length * np.cos(along / length + phase)
    away = across - bend * (np.sin(along / length + phase) - math.sin(phase))
    return _f32(np.abs(away) / np.sqrt(1 + slope**2))


def _cells(
    rng: np.random.Generator, x: Floats, y: Floats, size: float, *, aspect: float = 1.0, district: float = 260
) -> tuple[npt.NDArray[np.int64], Floats, Floats]:
    """Jittered rectangles about ``size`` by ``size * aspect``, turned anew in every district.

    Returns a number per rectangle, 0 to 65535, and in pixels the distance to its edge and the position across it.
    """
    warp = district / 5 * _noise(rng, x.shape, district / 2, octaves=2)
    column, row = ((x + warp) / district + 40).astype(int), ((y - warp) / district + 40).astype(int)
    town = (column * 92821 + row * 68917) % 1021
    across, along = _turn(x, y, rng.uniform(0, np.pi / 2, 1021).astype(np.float32)[town])
    reach = int(np.hypot(x.max(), y.max())) + 8
    first, first_edge = _strips(rng, size, 2 * reach)
    second, second_edge = _strips(rng, size * aspect, 2 * reach + 20 * int(size * aspect))
    at = ((across + reach) * 2).astype(int)
    shift = rng.integers(0, 20 * int(size * aspect), first.max() + 1)  # neighbouring strips are cut at other places
    then = ((along + reach) * 2).astype(int) + 2 * shift[first[at]]
    key = (first[at] * 7919 + second[then] * 104729 + town * 15485863) % 65536
    return key, np.minimum(first_edge[at], second_edge[then]), across


def _strips(rng: np.random.Generator, size: float, reach: int) -> tuple[npt.NDArray[np.int64], Floats]:
    """Strips of jittered width along a line: number of the strip, and distance to its edge, at every half pixel."""
    ends = np.cumsum(rng.uniform(0.5, 1.5, int(reach / size * 2) + 8) * size)
    at = np.arange(2 * reach) / 2
    strip = np.searchsorted(ends, at, side="right")
    starts = np.concatenate([[0.0], ends])
    return strip, np.minimum(at - starts[strip], ends[strip] - at).astype(np.float32)


def _crops(rng: np.random.Generator, x: Floats, y: Floats, uneven: Floats) -> tuple[Floats, Floats]:
    """Parcels with tramlines: colours [H, W, 3], and the distance to the parcel's edge [H, W]."""
    key, edge, across = _cells(rng, x, y, rng.uniform(24, 40), aspect=rng.uniform(1.2, 2.2))
    season = rng.dirichlet(np.full(len(_CROPS), 2.0))
    parcel = _f32(_CROPS)[rng.choice(len(_CROPS), 65536, p=season)]
    parcel *= rng.normal(1, 0.07, (65536, 1)).clip(0.8, 1.2)
    parcel += rng.normal(0, 3, parcel.shape)
    lines = rng.uniform(0, 5, 65536).astype(np.float32)[key] * np.sin(across * np.float32(2 * np.pi / 4.5))
    return parcel.astype(np.float32)[key] + (lines + 3 * uneven)[..., None], edge


def _streets(rng: np.random.Generator, x: Floats, y: Floats) -> Floats:
    """Blocks of small roofs and gardens between streets, colours [H, W, 3]."""
    block, street, _ = _cells(rng, x, y, 13, aspect=1.4, district=110)
    house, gap, _ = _cells(rng, x, y, 2.8, aspect=1.3, district=110)
    # Some quarters are dense, some are leafy, and some blocks are parks.
    leafy = rng.uniform(0.1, 0.5, 65536)[block]
    leafy[rng.random(65536)[block] < 0.06] = 1
    green = rng.random(65536)[house] < leafy
    built = rng.choice([0, 1, 2, 5, 6], 65536, p=[0.3, 0.2, 0.2, 0.15, 0.15])
    roofs = _f32(_ROOFS)
    colour = np.where(green[..., None], roofs[rng.choice([3, 4], 65536)][house], roofs[built][house])
    colour *= rng.normal(1, 0.12, 65536).astype(np.float32).clip(0.7, 1.4)[house][..., None]
    colour[gap < 0.4] *= 0.9
    colour[street < 1.0] = _f32((128, 125, 122))
    return _f32(colour)


def _halls(rng: np.random.Generator, x: Floats, y: Floats, fine: Floats) -> Floats:
    """Large pale roofs on asphalt, colours [H, W, 3]."""
    key, edge, across = _cells(rng, x, y, 22, aspect=1.7, district=400)
    ribs = 4 * np.sin(across * np.float32(2 * np.pi / 5))
    colour = _f32(_HALLS)[rng.integers(0, len(_HALLS), 65536)][key] + (ribs + 2 * fine)[..., None]
    colour[edge < 2.6] = _f32((96, 97, 98)) + 3 * fine[edge < 2.6][:, None]
    verge = (rng.random(65536) < 0.12)[key]
    colour[verge] = _f32((84, 98, 62)) + 3 * fine[verge][:, None]
    return _f32(colour)


def _tint(
    colour: Floats, where: npt.NDArray[np.bool_], base: tuple[int, int, int], texture: Floats, gains: tuple[float, ...]
) -> None:
    """Paint ``where`` in ``base`` with ``texture`` [H, W] on it, stronger or weaker per channel."""
    colour[where] = _f32(base) + texture[where][:, None] * _f32(gains)
