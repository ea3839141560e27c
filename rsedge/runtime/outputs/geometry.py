"""Well-known binary back to GeoJSON: the polygons that ``rsedge.runtime.outputs.geoparquet`` writes."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

_POLYGON, _MULTIPOLYGON = 3, 6


def from_wkb(data: bytes) -> dict[str, Any]:
    """The GeoJSON Polygon or MultiPolygon, two coordinates a point.

    Raises:
        ValueError: It is another geometry, or there is more.
        struct.error: It is cut off.
    """
    geometry, end = _geometry(data, 0)
    if end != len(data):
        raise ValueError(f"{len(data) - end} bytes behind a geometry")
    return geometry


def _geometry(data: bytes, at: int) -> tuple[dict[str, Any], int]:
    order = "<" if data[at : at + 1] == b"\x01" else ">"
    kind, count = struct.unpack_from(f"{order}II", data, at + 1)
    at += 9
    coordinates: list[Any] = []
    if kind == _MULTIPOLYGON:
        for _ in range(count):
            part, at = _geometry(data, at)
            coordinates.append(part["coordinates"])
        return {"type": "MultiPolygon", "coordinates": coordinates}, at
    if kind != _POLYGON:
        raise ValueError(f"geometry type {kind}, expected a Polygon or MultiPolygon")
    for _ in range(count):
        (points,) = struct.unpack_from(f"{order}I", data, at)
        at += 4
        if points * 16 > len(data) - at:
            raise struct.error(f"{points} points do not fit {len(data) - at} bytes")
        ring = np.frombuffer(data, f"{order}f8", count=points * 2, offset=at)
        coordinates.append(ring.reshape(-1, 2).tolist())
        at += points * 16
    return {"type": "Polygon", "coordinates": coordinates}, at
