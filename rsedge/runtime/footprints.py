"""Footprints of tiles as GeoJSON geometries in WGS 84 longitude and latitude."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from rasterio._err import CPLE_BaseError  # what rasterio.warp raises; it has no public name
from rasterio.warp import transform as warp

if TYPE_CHECKING:
    from rsedge.runtime.tiles import Tile

Points = npt.NDArray[np.float64]

_DECIMALS = 7  # about a centimetre


def footprints(tiles: Sequence[Tile], crs: Any, transform: Any) -> list[dict[str, Any] | None]:
    """The covered part of each tile, its four corners brought to WGS 84 in one call.

    Args:
        tiles: Any tiles of one scene.
        crs: Coordinate reference system of the scene.
        transform: Affine from (column, row) to its coordinates; may rotate, shear or run south-up.

    Returns:
        Per tile a Polygon (exterior ring closed and counter-clockwise), a MultiPolygon where it crosses the
        antimeridian, or None where it has no place in longitude and latitude (outside the projection, round a pole).
    """
    if not tiles:
        return []
    left, top, width, height = np.array(
        [(tile.col_off, tile.row_off, tile.width, tile.height) for tile in tiles], dtype=np.float64
    ).T
    cols = np.stack([left, left, left + width, left + width], axis=1)
    rows = np.stack([top, top + height, top + height, top], axis=1)
    x = transform.a * cols + transform.b * rows + transform.c
    y = transform.d * cols + transform.e * rows + transform.f
    return [_geometry(ring) for ring in _to_wgs84(crs, x, y)]


def _to_wgs84(crs: Any, x: Points, y: Points) -> Points:
    """Longitudes and latitudes [N, 4, 2] of corners given as x and y [N, 4]; not finite where there are none."""
    try:
        lon, lat = warp(crs, "EPSG:4326", x.ravel().tolist(), y.ravel().tolist())
    except CPLE_BaseError:  # one point outside the projection, and PROJ refuses them all
        if len(x) == 1:
            return np.full((1, 4, 2), np.nan)
        return np.concatenate([_to_wgs84(crs, x[n : n + 1], y[n : n + 1]) for n in range(len(x))])
    return np.stack([np.asarray(lon), np.asarray(lat)], axis=-1).reshape(-1, 4, 2)


def _geometry(ring: Points) -> dict[str, Any] | None:
    """The GeoJSON geometry of an open ring [4, 2] of longitudes and latitudes."""
    if not np.isfinite(ring).all() or np.abs(ring[:, 1]).max() > 90:
        return None
    # Each corner within half a turn of the one before it; a ring that does not come back goes round a pole.
    steps = (np.diff(ring[:, 0], append=ring[:1, 0]) + 180) % 360 - 180
    if abs(steps.sum()) > 1:
        return None
    lon = ring[0, 0] + np.concatenate([[0.0], np.cumsum(steps[:-1])])
    lon -= 360 * np.floor((lon.min() + 180) / 360)  # the west end lies in [-180, 180)
    ring = np.stack([lon, ring[:, 1]], axis=1)
    if lon.max() <= 180 + 10**-_DECIMALS:
        return _polygon(ring)
    east, west = _clip(ring, keep_west=True), _clip(ring, keep_west=False) - (360, 0)
    return {"type": "MultiPolygon", "coordinates": [_polygon(part)["coordinates"] for part in (east, west)]}


def _clip(ring: Points, *, keep_west: bool) -> Points:
    """The part of a convex ring west of longitude 180, or east of it."""
    kept = []
    for here, there in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        if here[0] == 180 or (here[0] < 180) == keep_west:
            kept.append(here)
        if (here[0] - 180) * (there[0] - 180) < 0:
            share = (180 - here[0]) / (there[0] - here[0])
            kept.append(np.array([180.0, here[1] + share * (there[1] - here[1])]))
    return np.array(kept)


def _polygon(ring: Points) -> dict[str, Any]:
    """A GeoJSON Polygon, counter-clockwise as RFC 7946 wants it and closed."""
    lon, lat = ring.T
    if np.sum(lon * np.roll(lat, -1) - np.roll(lon, -1) * lat) < 0:
        ring = ring[::-1]
    points = (np.round(ring, _DECIMALS) + 0.0).tolist()  # + 0.0 turns -0.0 into 0.0
    return {"type": "Polygon", "coordinates": [[*points, points[0]]]}
