"""GeoJSON Polygons and MultiPolygons: their parts and bounds, and their forms in files (WKB, WKT)."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

_POLYGON, _MULTIPOLYGON = 3, 6


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
