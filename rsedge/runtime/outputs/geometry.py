"""GeoJSON Polygons and MultiPolygons: their parts and bounds, their forms in files (WKB, WKT), and outlines of many."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]

_POLYGON, _MULTIPOLYGON = 3, 6
_TURN = 360.0
_DECIMALS = 7  # about a centimetre


def polygons(geometry: Mapping[str, Any]) -> list[list[list[list[float]]]]:
    """The rings of each polygon of a GeoJSON Polygon or MultiPolygon."""
    found: list[Any] = [geometry["coordinates"]] if geometry["type"] == "Polygon" else geometry["coordinates"]
    return found


def bounding_box(geometry: Mapping[str, Any]) -> list[float]:
    """West, south, east, north of a GeoJSON Polygon or MultiPolygon: plain minima and maxima."""
    points = np.array([point for rings in polygons(geometry) for ring in rings for point in ring])
    return [*points.min(axis=0).tolist(), *points.max(axis=0).tolist()]


def wkt(geometry: Mapping[str, Any] | None) -> str | None:
    """A GeoJSON Polygon or MultiPolygon as well-known text, numbers as Python writes them."""
    if geometry is None:
        return None
    parts = [
        f"({', '.join('(' + ', '.join(f'{x!r} {y!r}' for x, y in ring) + ')' for ring in rings)})"
        for rings in polygons(geometry)
    ]
    return f"POLYGON {parts[0]}" if geometry["type"] == "Polygon" else f"MULTIPOLYGON ({', '.join(parts)})"


def wkb(geometry: Mapping[str, Any] | None) -> bytes | None:
    """A GeoJSON Polygon or MultiPolygon as little-endian well-known binary."""
    if geometry is None:
        return None
    parts = []
    for rings in polygons(geometry):
        packed = [struct.pack("<I", len(ring)) + np.array(ring, "<f8").tobytes() for ring in rings]
        parts.append(struct.pack("<BII", 1, _POLYGON, len(rings)) + b"".join(packed))
    if geometry["type"] == "Polygon":
        return parts[0]
    return struct.pack("<BII", 1, _MULTIPOLYGON, len(parts)) + b"".join(parts)


def from_wkb(data: bytes) -> dict[str, Any]:
    """The GeoJSON Polygon or MultiPolygon, two coordinates a point.

    Raises:
        ValueError: It is another geometry, is cut off, has no ring or one of less than four points, places that are
            none, or there is more.
    """
    try:
        geometry, end = _geometry(data, 0, (_POLYGON, _MULTIPOLYGON))
    except struct.error as error:
        raise ValueError(f"it is cut off: {error}") from error
    if end != len(data):
        raise ValueError(f"{len(data) - end} bytes behind a geometry")
    return geometry


def _geometry(data: bytes, at: int, kinds: tuple[int, ...]) -> tuple[dict[str, Any], int]:
    order = "<" if data[at : at + 1] == b"\x01" else ">"
    kind, count = struct.unpack_from(f"{order}II", data, at + 1)
    at += 9
    if kind not in kinds:
        raise ValueError(f"geometry type {kind}, expected {' or '.join(map(str, kinds))}")
    if not count:
        raise ValueError("it is empty")
    coordinates: list[Any] = []
    if kind == _MULTIPOLYGON:
        for _ in range(count):
            part, at = _geometry(data, at, (_POLYGON,))
            coordinates.append(part["coordinates"])
        return {"type": "MultiPolygon", "coordinates": coordinates}, at
    for _ in range(count):
        (points,) = struct.unpack_from(f"{order}I", data, at)
        at += 4
        if points * 16 > len(data) - at:
            raise ValueError(f"{points} points do not fit {len(data) - at} bytes")
        ring = np.frombuffer(data, f"{order}f8", count=points * 2, offset=at)
        if points < 4 or not np.isfinite(ring).all():
            raise ValueError(f"a ring of {points} points, expected at least 4 with finite numbers")
        coordinates.append(ring.reshape(-1, 2).tolist())
        at += points * 16
    return {"type": "Polygon", "coordinates": coordinates}, at


class Outline:
    """The convex hull of the tiles of one scene, which may be added in any number of calls.

    A hull's longitudes run on from its west end, which is in [-180, 180), so that a hull across the antimeridian is in
    one piece until :func:`to_geojson` cuts it, as RFC 7946 asks.
    """

    def __init__(self) -> None:
        # Twice: with longitudes from -180 and from 0. The narrower hull is the one that is not torn apart.
        self._hulls: list[Points] = [np.empty((0, 2)), np.empty((0, 2))]

    def add(self, geometries: Iterable[dict[str, Any]]) -> None:
        """Add GeoJSON Polygons and MultiPolygons, cut at the antimeridian."""
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


def _normal(hull: Points) -> Points:
    """With the west end in [-180, 180); all the way round is from -180 to 180."""
    low, high = hull.min(axis=0), hull.max(axis=0)
    if high[0] - low[0] >= _TURN:
        return np.array([(-180, low[1]), (180, low[1]), (180, high[1]), (-180, high[1])], np.float64)
    return _moved(hull, -_TURN * float(np.floor((low[0] + 180) / _TURN)))


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
            while len(chain) > 1:
                (ax, ay), (bx, by) = chain[-2:]
                if (bx - ax) * (y - ay) - (by - ay) * (x - ax) > 0:  # a turn to the left
                    break
                chain.pop()
            chain.append([x, y])
        halves.append(chain[:-1])
    return np.array([*halves[0], *halves[1]] or ordered.tolist())


def merge(hulls: Iterable[Points]) -> list[Points]:
    """Join hulls until none of their bounding boxes touch, by whole turns in longitude if need be."""
    apart: list[Points] = []
    for hull in hulls:
        joined, found = hull, True
        while found:
            low, high = joined.min(axis=0), joined.max(axis=0)
            near, far = [joined], []
            for other in apart:
                (west, south), (east, north) = other.min(axis=0), other.max(axis=0)
                turns = [turn for turn in (0.0, _TURN, -_TURN) if west + turn <= high[0] and low[0] <= east + turn]
                if turns and south <= high[1] and low[1] <= north:
                    near.append(_moved(other, turns[0]))
                else:
                    far.append(other)
            joined, apart, found = _normal(convex_hull(np.concatenate(near))), far, len(near) > 1
        apart.append(joined)
    return sorted(apart, key=lambda hull: hull.min(axis=0).tolist())


def to_geojson(hulls: list[Points]) -> dict[str, Any] | None:
    """A Polygon, or a MultiPolygon where there are several or one is cut at the antimeridian; None of nothing."""
    rings = [part for hull in hulls for part in _cut(hull)]
    rounded = [(np.round(ring, _DECIMALS) + 0.0).tolist() for ring in rings]  # + 0.0 turns -0.0 into 0.0
    closed = [[[*ring, ring[0]]] for ring in rounded]
    if len(closed) > 1:
        return {"type": "MultiPolygon", "coordinates": closed}
    return {"type": "Polygon", "coordinates": closed[0]} if closed else None


def _cut(hull: Points) -> list[Points]:
    """The parts west and east of longitude 180, the latter a turn further west."""
    if hull[:, 0].max() <= 180 + 10**-_DECIMALS:
        return [np.minimum(hull, 180)]
    parts = []
    for side, shift in ((-1.0, 0.0), (1.0, -_TURN)):
        kept: list[tuple[float, float]] = []
        for (x, y), (next_x, next_y) in zip(hull.tolist(), np.roll(hull, -1, axis=0).tolist(), strict=True):
            if (x - 180) * side >= 0:
                kept.append((x + shift, y))
            if (x - 180) * (next_x - 180) < 0:
                kept.append((180.0 + shift, y + (180 - x) / (next_x - x) * (next_y - y)))
        parts.append(np.array(kept))
    return parts


def outline_box(hulls: list[Points]) -> list[float] | None:
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
