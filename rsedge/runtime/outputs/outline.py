"""Where many tiles lie, as few polygons: convex hulls in longitude and latitude that touch nowhere.

A hull's longitudes run on from its west end, which is in [-180, 180), so that one across the antimeridian is in one
piece until it is asked for as GeoJSON, where RFC 7946 wants it cut.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsedge.runtime.outputs.geometry import polygons

Points = NDArray[np.float64]

_TURN = 360.0
_DECIMALS = 7  # about a centimetre


class Outline:
    """The hull of the tiles of one scene, which may be added in any number of calls."""

    def __init__(self) -> None:
        # Twice: with longitudes from -180 and from 0. The narrower hull is the one that is not torn apart.
        self._hulls: list[Points] = [np.empty((0, 2)), np.empty((0, 2))]

    def add(self, geometries: Iterable[dict[str, Any]]) -> None:
        """Take in GeoJSON Polygons and MultiPolygons, cut at the antimeridian."""
        rings = [np.array(rings[0], np.float64) for geometry in geometries for rings in polygons(geometry)]
        if rings:
            more = np.concatenate(rings), np.concatenate([_eastward(ring) for ring in rings])
            self._hulls = [
                convex_hull(np.concatenate([hull, points])) for hull, points in zip(self._hulls, more, strict=True)
            ]

    def hull(self) -> Points | None:
        """float64 [N, 2], longitude and latitude, counter-clockwise, not closed; None where nothing was added."""
        if not len(self._hulls[0]):
            return None
        return _normal(min(self._hulls, key=lambda hull: float(np.ptp(hull[:, 0]))))


def _eastward(ring: Points) -> Points:
    """A ring with longitudes from 0 to 360; one across Greenwich reaches all the way round, torn as it is."""
    (west, south), (east, north) = ring.min(axis=0), ring.max(axis=0)
    if west >= 0:
        return ring
    if east <= 0:
        return _moved(ring, _TURN)
    return np.array([(0, south), (0, north), (_TURN, south), (_TURN, north)], np.float64)


def _moved(points: Points, east: float) -> Points:
    moved: Points = points + np.array([east, 0.0])
    return moved


def convex_hull(points: Points) -> Points:
    """The corners of the convex hull of [N, 2], counter-clockwise, not closed (Andrew's monotone chain)."""
    ordered = np.unique(points, axis=0)  # sorted by the first coordinate, then by the second
    halves = []
    for half in (ordered, ordered[::-1]):
        chain: list[list[float]] = []
        for x, y in half.tolist():
            while len(chain) > 1 and _turn(chain[-2], chain[-1], x, y) <= 0:
                chain.pop()
            chain.append([x, y])
        halves.append(chain[:-1])
    return np.array([*halves[0], *halves[1]] or ordered.tolist())


def _turn(a: list[float], b: list[float], x: float, y: float) -> float:
    return (b[0] - a[0]) * (y - a[1]) - (b[1] - a[1]) * (x - a[0])


def merge(hulls: Iterable[Points]) -> list[Points]:
    """Hulls none of whose bounding boxes touch: those that do become one."""
    apart: list[Points] = []
    for hull in hulls:
        joined, found = hull, True
        while found:
            shifts = [_shift(other, joined) for other in apart]
            near = [_moved(other, shift) for other, shift in zip(apart, shifts, strict=True) if shift is not None]
            apart = [other for other, shift in zip(apart, shifts, strict=True) if shift is None]
            joined, found = _normal(convex_hull(np.concatenate([joined, *near]))), bool(near)
        apart.append(joined)
    return sorted(apart, key=lambda hull: hull.min(axis=0).tolist())


def _shift(hull: Points, to: Points) -> float | None:
    """What brings ``hull`` to where its box meets that of ``to``: whole turns; None if none does."""
    low, high, to_low, to_high = hull.min(axis=0), hull.max(axis=0), to.min(axis=0), to.max(axis=0)
    if low[1] > to_high[1] or to_low[1] > high[1]:
        return None
    for shift in (0.0, _TURN, -_TURN):
        if low[0] + shift <= to_high[0] and to_low[0] <= high[0] + shift:
            return shift
    return None


def _normal(hull: Points) -> Points:
    """With the west end in [-180, 180); all the way round is from -180 to 180."""
    low, high = hull.min(axis=0), hull.max(axis=0)
    if high[0] - low[0] >= _TURN:
        return np.array([(-180, low[1]), (180, low[1]), (180, high[1]), (-180, high[1])], np.float64)
    return _moved(hull, -_TURN * float(np.floor((low[0] + 180) / _TURN)))


def to_geojson(hulls: list[Points]) -> dict[str, Any] | None:
    """A Polygon, or a MultiPolygon where there are several or one is cut at the antimeridian; None of nothing."""
    rings = [part for hull in hulls for part in _cut(hull)]
    if not rings:
        return None
    rounded = [(np.round(ring, _DECIMALS) + 0.0).tolist() for ring in rings]  # + 0.0 turns -0.0 into 0.0
    closed = [[[*ring, ring[0]]] for ring in rounded]
    if len(closed) == 1:
        return {"type": "Polygon", "coordinates": closed[0]}
    return {"type": "MultiPolygon", "coordinates": closed}


def bounding_box(hulls: list[Points]) -> list[float] | None:
    """West, south, east, north; west is more than east across the antimeridian, as RFC 7946 has it."""
    if not hulls:
        return None
    south, north = min(hull[:, 1].min() for hull in hulls), max(hull[:, 1].max() for hull in hulls)
    spans = sorted((float(hull[:, 0].min()), float(hull[:, 0].max())) for hull in hulls)
    # The box lies across from the widest gap between neighbours on the circle.
    gaps, reach = [], max(span[1] for span in spans) - _TURN
    for west, east in spans:
        gaps.append((west - reach, west))
        reach = max(reach, east)
    gap, west = max(gaps, key=lambda found: (found[0], -found[1]))
    if gap <= 0:
        west, east = -180.0, 180.0
    else:
        east = west + _TURN - gap
        east -= _TURN if east > 180 else 0
    return [float(value) + 0.0 for value in np.round([west, south, east, north], _DECIMALS)]


def _cut(hull: Points) -> list[Points]:
    """The parts west and east of longitude 180, the latter a turn further west."""
    if hull[:, 0].max() <= 180 + 10**-_DECIMALS:
        return [np.minimum(hull, 180)]
    parts = []
    for side, shift in ((-1.0, 0.0), (1.0, -_TURN)):
        kept: list[tuple[float, float]] = []
        for here, there in zip(hull.tolist(), np.roll(hull, -1, axis=0).tolist(), strict=True):
            if (here[0] - 180) * side >= 0:
                kept.append((here[0] + shift, here[1]))
            if (here[0] - 180) * (there[0] - 180) < 0:
                share = (180 - here[0]) / (there[0] - here[0])
                kept.append((180.0 + shift, here[1] + share * (there[1] - here[1])))
        parts.append(np.array(kept))
    return parts
