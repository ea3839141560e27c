"""Well-known binary back to GeoJSON: the polygons that ``rsedge.runtime.outputs.geoparquet`` writes."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

_POLYGON, _MULTIPOLYGON = 3, 6


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
