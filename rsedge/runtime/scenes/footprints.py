"""Footprints of tiles as GeoJSON geometries in WGS 84 longitude and latitude, valid under RFC 7946.

A side of a tile is straight on the map of its scene, and a side of a GeoJSON polygon is straight in longitude and
latitude: between its corners a footprint has as many points as it takes to keep the two together, which is none for
Sentinel-2 tiles in UTM. All tiles of a call go through PROJ together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from rasterio._err import CPLE_BaseError  # what rasterio.warp raises; it has no public name
from rasterio.crs import CRS
from rasterio.warp import transform as warp

if TYPE_CHECKING:
    from rsedge.runtime.scenes.tiles import Tile

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_WGS84 = "EPSG:4326"
_DECIMALS = 7  # about a centimetre
_TOUCH = 10.0**-_DECIMALS
_STRAY = 1e-3
"""How far a footprint may stray from the true side, as a share of the tile's width: a fifth of a pixel for 224."""
_DEPTH = 12
"""Sides are cut in three this often at most: a piece of 3**-12 is shorter than any that may stray."""
_ENDLESS = frozenset({"merc", "webmerc", "eqc", "cea", "mill"})
"""PROJ's names of maps that go on beyond their rim with the world once more."""
_POINTS = 12
"""Of a ring that are looked at first: four corners, and two in between on each side."""
_AT_POLE = 90 - 1e-9
_SMALL = 4 * _TOUCH**2
"""Twice an area, square degrees: what rounding may make of a line."""


def footprints(tiles: Sequence[Tile], crs: Any, transform: Any) -> list[dict[str, Any] | None]:
    """The covered part of each tile in WGS 84.

    Args:
        tiles: Any tiles of one scene.
        crs: Coordinate reference system of the scene, as rasterio takes it.
        transform: Affine from (column, row) to its coordinates; may rotate, shear or run south-up.

    Returns:
        Per tile a Polygon, or a MultiPolygon where it crosses the antimeridian, where it is cut; rings are closed and
        counter-clockwise, longitudes in [-180, 180], latitudes in [-90, 90]. Round a pole the ring runs along ±180 to
        the pole and along ±90 across it. None for a tile that is not wholly inside the projection.
    """
    crs = CRS.from_user_input(crs)
    found: list[dict[str, Any] | None] = [None] * len(tiles)
    if not tiles or not (crs.is_geographic or crs.is_projected):  # such as the plan of a building
        return found
    scene = _Scene(crs, transform, tiles)
    done, limits, ends, lat = _rings(scene)
    # 1. Nearly every tile there is, all at once: four corners, far from poles and antimeridian.
    simple = done & (np.diff(limits) == 4)
    pieces = limits[:-1][simple][:, None] + np.arange(4)
    corner_lon, corner_lat = ends[pieces], np.round(lat[pieces], _DECIMALS) + 0.0  # + 0.0 turns -0.0 into 0.0
    inside = (np.abs(corner_lon).max(axis=(1, 2)) < 180) & (np.abs(corner_lat).max(axis=1) < 90)
    corners = np.stack([np.round(corner_lon[..., 0], _DECIMALS) + 0.0, corner_lat], axis=-1)
    first, second = corners[:, 2] - corners[:, 0], corners[:, 3] - corners[:, 1]  # the diagonals
    area = first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]
    inside &= np.abs(area) > _SMALL
    simple[simple] = inside
    corners = np.where(area[:, None, None] > 0, corners, corners[:, ::-1])[inside]
    closed = np.concatenate([corners, corners[:, :1]], axis=1)
    for tile, ring in zip(np.flatnonzero(simple).tolist(), closed.tolist(), strict=True):
        found[tile] = {"type": "Polygon", "coordinates": [ring]}
    # 2. The others one by one.
    for tile in np.flatnonzero(done & ~simple).tolist():
        piece = slice(limits[tile], limits[tile + 1])
        found[tile] = _geometry(scene, tile, ends[piece], lat[piece])
    return found


class _Scene:
    """Tiles in pixels, and their way to WGS 84."""

    def __init__(self, crs: CRS, transform: Any, tiles: Sequence[Tile]) -> None:
        self.crs, self.transform, self.geographic = crs, transform, bool(crs.is_geographic)
        boxes = [(tile.col_off, tile.row_off, tile.width, tile.height) for tile in tiles]
        self.left, self.top, self.width, self.height = np.array(boxes, dtype=np.float64).T

    def map_points(self, tile: Ints, across: Floats, down: Floats) -> tuple[Floats, Floats]:
        """Map coordinates of points in tiles; ``across`` and ``down`` are 0 at the first edge and 1 at the last."""
        cols = self.left[tile] + across * self.width[tile]
        rows = self.top[tile] + down * self.height[tile]
        a = self.transform
        return a.a * cols + a.b * rows + a.c, a.d * cols + a.e * rows + a.f

    def on_ring(self, tile: Ints, s: Floats) -> tuple[Floats, Floats]:
        """Map coordinates of points on rings; ``s`` runs from 0 to 4, down the left side first."""
        # Side by side, so that corners are exact: across is 0, then grows, then 1, then falls.
        across = np.clip(np.minimum(s - 1, 4 - s), 0, 1)
        down = np.clip(np.minimum(s, 3 - s), 0, 1)
        return self.map_points(tile, across, down)

    def to_wgs84(self, x: Floats, y: Floats, together: int = 1) -> tuple[Floats, Floats]:
        """Longitudes and latitudes; NaN where there are none for any of ``together`` points in a row."""
        lon, lat = _warp(self.crs, _WGS84, x, y, together)
        outside = ~np.isfinite(lon) | (np.abs(lat) > 90 + _TOUCH)
        return np.where(outside, np.nan, lon), np.where(outside, np.nan, np.clip(lat, -90, 90))


def _warp(source: Any, target: Any, x: Floats, y: Floats, together: int) -> tuple[Floats, Floats]:
    """Coordinates [N] in another system; NaN where there are none for any of ``together`` points in a row."""
    known = np.isfinite(x + y).reshape(-1, together).all(axis=1)
    new_x, new_y = np.full(x.size, np.nan), np.full(x.size, np.nan)
    parts = [np.arange(x.size).reshape(-1, together)[known]] if known.any() else []
    while parts:
        part = parts.pop()
        try:
            new = warp(source, target, x[part.ravel()].tolist(), y[part.ravel()].tolist())
        except CPLE_BaseError:  # one point outside the projection, and PROJ refuses them all
            half = len(part) // 2
            parts += [part[:half], part[half:]] if half else []
            continue
        new_x[part.ravel()], new_y[part.ravel()] = new
    finite = np.isfinite(new_x) & np.isfinite(new_y)
    return np.where(finite, new_x, np.nan), np.where(finite, new_y, np.nan)


# From sides to rings


class _Sides(NamedTuple):
    """Pieces of sides, each with the two points that cut it in three."""

    tile: Ints  # [N] number of the tile
    s: Floats  # [N, 4] where the points are on its ring
    lon: Floats  # and lat: [N, 4] the points; longitudes are continuous along a piece
    lat: Floats
    stray: Floats  # [N] how far the footprint may stray from the points, degrees of latitude

    def where(self, chosen: npt.NDArray[np.bool_]) -> _Sides:
        """Some of them."""
        return _Sides(self.tile[chosen], self.s[chosen], self.lon[chosen], self.lat[chosen], self.stray[chosen])


def _half_turn(steps: Floats) -> Floats:
    """Differences of longitudes, the short way round."""
    return np.asarray((steps + 180) % 360 - 180)


def _continuous(scene: _Scene, lon: Floats, lat: Floats) -> Floats:
    """Longitudes [N, 4] without jumps of a turn; a pole takes the longitude of the point beside it."""
    lon = lon.copy()
    if not scene.geographic:  # there a pole is a line, and its longitudes are what they say
        at_pole = np.abs(lat) >= _AT_POLE
        for point, beside in ((1, 0), (2, 3), (0, 1), (3, 2)):
            lon[:, point] = np.where(at_pole[:, point], lon[:, beside], lon[:, point])
    steps = _half_turn(np.diff(lon))
    return np.asarray(lon[:, :1] + np.concatenate([np.zeros((len(lon), 1)), np.cumsum(steps, axis=1)], axis=1))


def _astray(sides: _Sides) -> npt.NDArray[np.bool_]:
    """Which pieces are too far from the straight line between their ends."""
    span, rise = sides.lon[:, 3] - sides.lon[:, 0], sides.lat[:, 3] - sides.lat[:, 0]
    found = np.zeros(len(span), dtype=np.bool_)
    for point in (1, 2):
        scale = np.cos(np.radians(sides.lat[:, point]))  # a degree of longitude there, in degrees of latitude
        along, across = (sides.lon[:, point] - sides.lon[:, 0]) * scale, sides.lat[:, point] - sides.lat[:, 0]
        length = (span * scale) ** 2 + rise**2
        foot = (along * span * scale + across * rise) / np.where(length > 0, length, 1)
        foot = np.clip(foot, 0, 1)
        found |= np.hypot(along - foot * span * scale, across - foot * rise) > sides.stray
    return found


def _rings(scene: _Scene) -> tuple[npt.NDArray[np.bool_], Ints, Floats, Floats]:
    """The rings of all tiles, as pieces with as many points as they need, those of a tile one after the other.

    Returns:
        Bool [tiles], whether the projection has a place for all of the tile's ring; [tiles + 1], where the pieces of
        each tile begin; [N, 2], longitudes of both ends of a piece, which begins where the last one ended, but for a
        pole, which has another longitude in each; [N], latitude of its first end.
    """
    # 1. The four sides of each tile, where the projection has a place for them.
    count = len(scene.left)
    tile = np.repeat(np.arange(count), _POINTS)
    s = np.tile(np.arange(_POINTS) / 3, count)
    x, y = scene.on_ring(tile, s)
    lon, lat = scene.to_wgs84(x, y, _POINTS)
    done = np.isfinite(lon).reshape(count, _POINTS).all(axis=1)
    if not scene.geographic and scene.crs.to_dict().get("proj") not in _ENDLESS:
        # Beyond the rim of most world maps the way back does not end where it began.
        size = np.maximum(*(np.ptp(values.reshape(count, _POINTS), axis=1) for values in (x, y)))
        back_x, back_y = _warp(_WGS84, scene.crs, lon, lat, _POINTS)
        back = np.hypot(back_x - x, back_y - y) <= np.repeat(size * _STRAY, _POINTS)
        done &= back.reshape(count, _POINTS).all(axis=1)
    # Its width across its longer sides, as a share of these; 0 where the transform flattens it.
    a = scene.transform
    longer = np.maximum(np.hypot(a.b, a.e) * scene.height, np.hypot(a.a, a.d) * scene.width)
    area = abs(a.a * a.e - a.b * a.d) * scene.width * scene.height
    slim = area / np.maximum(longer**2, np.finfo(np.float64).tiny)
    done &= slim > 0
    points = (np.arange(0, _POINTS, 3)[:, None] + np.arange(4)) % _POINTS  # [4 sides, 4 points]
    lon, lat = (values.reshape(count, _POINTS)[done][:, points].reshape(-1, 4) for values in (lon, lat))
    lon = _continuous(scene, lon, lat)
    middle = np.radians((lat[:, 1:] + lat[:, :-1]) / 2)
    lengths = np.hypot(np.diff(lon) * np.cos(middle), np.diff(lat)).sum(axis=1)  # degrees of latitude
    sides = _Sides(
        np.repeat(np.flatnonzero(done), 4),
        np.tile((np.arange(4)[:, None] + np.arange(4) / 3), (int(done.sum()), 1)),
        lon,
        lat,
        np.repeat(_STRAY * lengths.reshape(-1, 4).max(axis=1) * slim[done] + _TOUCH / 100, 4),
    )
    # 2. Cut those that are too far from a straight line, as often as it takes.
    final = []
    for _ in range(_DEPTH):
        astray = _astray(sides)
        final.append(sides.where(~astray))
        sides = _cut(scene, sides.where(astray))
        lost = ~np.isfinite(sides.lon + sides.lat).all(axis=1)
        done[sides.tile[lost]] = False
        sides = sides.where(done[sides.tile])
        if not len(sides.tile):
            break
    final.append(sides)
    # 3. Put them in order.
    tile = np.concatenate([part.tile for part in final])
    order = np.lexsort((np.concatenate([part.s[:, 0] for part in final]), tile))
    ends = np.concatenate([part.lon[:, [0, 3]] for part in final])[order]
    lat = np.concatenate([part.lat[:, 0] for part in final])[order]
    return done, np.searchsorted(tile[order], np.arange(count + 1)), ends, lat


def _cut(scene: _Scene, sides: _Sides) -> _Sides:
    """Each piece as three, with new points in between."""
    thirds = [(sides.s[:, k], sides.s[:, k + 1]) for k in range(3)]
    first, last = (np.stack(ends, axis=1).ravel() for ends in zip(*thirds, strict=True))
    s = np.stack([first, first + (last - first) / 3, first + (last - first) * 2 / 3, last], axis=1)
    tile = np.repeat(sides.tile, 3)
    lon, lat = np.empty(s.shape), np.empty(s.shape)
    lon[:, 0], lon[:, 3] = sides.lon[:, :3].ravel(), sides.lon[:, 1:].ravel()
    lat[:, 0], lat[:, 3] = sides.lat[:, :3].ravel(), sides.lat[:, 1:].ravel()
    new = scene.on_ring(np.repeat(tile, 2), s[:, 1:3].ravel())
    new_lon, new_lat = scene.to_wgs84(*new)
    lon[:, 1:3], lat[:, 1:3] = new_lon.reshape(-1, 2), new_lat.reshape(-1, 2)
    return _Sides(tile, s, _continuous(scene, lon, lat), lat, np.repeat(sides.stray, 3))


# From rings to geometries


def _geometry(scene: _Scene, tile: int, ends: Floats, lat: Floats) -> dict[str, Any] | None:
    """The geometry of a ring with its pieces' longitudes [K, 2] and first latitudes [K]."""
    jumps = _half_turn(np.roll(ends[:, 0], -1) - ends[:, 1])
    if np.abs(ends).max() < 180 and np.abs(jumps).max() < 1e-6 and (np.abs(ends[1:, 0] - ends[:-1, 1]) < 1).all():
        return _assemble([np.stack([ends[:, 0], lat], axis=1)])
    total = float((ends[:, 1] - ends[:, 0] + jumps).sum())
    poles = np.abs(jumps) > 1e-6
    if poles.any() and abs(total) > 180:  # the pole is on the ring, not inside: the jump goes the other way round
        widest = int(np.abs(jumps).argmax())
        jumps[widest] -= 360 * np.sign(total)
        total = 0.0
    starts = ends[0, 0] + np.concatenate([[0.0], np.cumsum(ends[:, 1] - ends[:, 0] + jumps)[:-1]])
    finish = starts + ends[:, 1] - ends[:, 0]
    beside = np.roll(lat, -1)
    points = [
        point
        for n in range(len(lat))
        for point in ([(starts[n], lat[n]), (finish[n], beside[n])] if poles[n] else [(starts[n], lat[n])])
    ]
    line = np.array(points)
    if abs(total) > 180:
        return _assemble([_round_pole(line, total, north=_turns_left(scene, tile) == (total > 0))])
    line[:, 0] -= 360 * np.floor((line[:, 0].min() + 180 + _TOUCH) / 360)  # the west end lies in [-180, 180)
    east = line[:, 0] - line[:, 0].min()
    if len(line) == 4 and east.max() > 360 - _TOUCH:  # all round, wherever the map begins, or more than once round
        line[:, 0] = np.where(east > 180, 180, -180)
    if line[:, 0].max() <= 180 + _TOUCH:
        return _assemble([line])
    return _assemble(_split(line))


def _turns_left(scene: _Scene, tile: int) -> bool:
    """Whether the ring of a tile has the tile on its left, seen from above the ground."""
    across, down_by = np.array([0.5, 0.5, 0.501]), np.array([0.5, 0.501, 0.5])
    lon, lat = map(np.radians, scene.to_wgs84(*scene.map_points(np.full(3, tile), across, down_by)))
    middle, down, right = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=1)
    # The ring goes down the left side first and then to the right.
    return bool(np.dot(middle, np.cross(down - middle, right - middle)) > 0)


def _round_pole(line: Floats, total: float, *, north: bool) -> Floats:
    """The ring round a pole, cut open at the antimeridian and closed over the pole."""
    if total < 0:
        line = line[::-1]
    once_more = line + np.array([360.0, 0.0])
    after = np.concatenate([line[1:], once_more[:1]])
    turn = np.floor((line[:, 0] + 180) / 360)
    cut = int(np.flatnonzero(np.floor((after[:, 0] + 180) / 360) > turn)[0])  # after this point it crosses
    edge = 360 * (turn[cut] + 1) - 180
    share = (edge - line[cut, 0]) / (after[cut, 0] - line[cut, 0])
    lat = line[cut, 1] + share * (after[cut, 1] - line[cut, 1])
    line = np.concatenate([line[cut + 1 :], once_more[: cut + 1]]) - (edge + 180, 0)
    pole = 90.0 if north else -90.0
    return np.concatenate([[(-180, lat)], line, [(180, lat), (180, pole), (-180, pole)]])


def _split(line: Floats) -> list[Floats]:
    """The parts of a simple ring west of longitude 180, then those east of it, 360 degrees less."""
    east = line[:, 0] > 180
    first = int(np.flatnonzero(east != np.roll(east, 1))[0])  # begin where it has just crossed
    line, east = np.roll(line, -first, axis=0), np.roll(east, -first)
    begins = np.flatnonzero(np.concatenate([[True], east[1:] != east[:-1]]))
    chains = np.split(line, begins[1:])
    here, there = np.roll(line, 1, axis=0)[begins], line[begins]  # the two ends of each side that crosses
    lat = here[:, 1] + (180 - here[:, 0]) / (there[:, 0] - here[:, 0]) * (there[:, 1] - here[:, 1])
    # Between the first and the second crossing of the antimeridian the ring encloses it, and so on.
    rank = np.argsort(np.argsort(lat, kind="stable"))
    partner = np.argsort(rank)[rank ^ 1]
    parts: tuple[list[Floats], list[Floats]] = [], []
    left = set(range(len(chains)))
    while left:
        start = number = min(left)
        pieces: list[npt.ArrayLike] = []
        while number in left:
            left.remove(number)
            leaves = (number + 1) % len(chains)  # the crossing at which the chain ends
            pieces += [[(180.0, lat[number])], chains[number], [(180.0, lat[leaves])]]
            number = int(partner[leaves])
        parts[int(east[begins[start]])].append(np.concatenate([np.asarray(piece) for piece in pieces]))
    return parts[0] + [part - (360, 0) for part in parts[1]]


def _assemble(rings: Sequence[Floats]) -> dict[str, Any] | None:
    """A GeoJSON geometry of open rings [K, 2]; None where rounding leaves nothing of them."""
    polygons = []
    for ring in rings:
        points = np.round(ring, _DECIMALS) + 0.0  # + 0.0 turns -0.0 into 0.0
        points = np.clip(points, (-180, -90), (180, 90))
        points = points[(points != np.roll(points, 1, axis=0)).any(axis=1)]
        if len(points) < 3:
            continue
        lon, lat = (points - points[0]).T
        area = float(np.sum(lon * np.roll(lat, -1) - np.roll(lon, -1) * lat))
        if abs(area) < _SMALL:
            continue
        corners = (points if area > 0 else points[::-1]).tolist()
        polygons.append([[*corners, corners[0]]])
    if not polygons:
        return None
    if len(polygons) == 1:
        return {"type": "Polygon", "coordinates": polygons[0]}
    return {"type": "MultiPolygon", "coordinates": polygons}
