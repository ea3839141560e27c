"""What holds for any value: journals, geometries, manifests. Tiles have theirs in tests/runtime/test_tiles.py."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from rsedge.bundle import BundleError, Manifest
from rsedge.errors import OutputError
from rsedge.runtime.diagnostics.selftest import selftest_bundle
from rsedge.runtime.outputs.geometry import bounding_box, convex_hull, from_wkb, wkb, wkt
from rsedge.runtime.outputs.records import TileResult
from rsedge.runtime.run.journal import Journal
from rsedge.runtime.scenes.footprints import footprints
from rsedge.runtime.scenes.tiles import TileGrid
from tests.runtime.test_writers import RECORD

TEXT = st.text(max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
POINTS = st.tuples(st.floats(-180, 180), st.floats(-90, 90))
NUMBERS = st.floats(-8, 8, width=16, allow_nan=False)


@st.composite
def results(draw):
    """A result with any texts and numbers."""
    record = dataclasses.replace(
        RECORD,
        scene=draw(TEXT),
        caption=draw(st.none() | TEXT),
        score=draw(st.none() | st.floats(allow_nan=False, allow_infinity=False)),
        row=draw(st.integers(0, 2**31)),
    )
    vector = draw(st.none() | st.lists(NUMBERS, min_size=1, max_size=5))
    return TileResult(record, draw(st.none() | TEXT), None if vector is None else np.array(vector, np.float16))


def values(result):
    """A result to compare."""
    return json.dumps(result.to_dict())


@settings(deadline=None)
@given(st.dictionaries(TEXT, JSON, max_size=4), st.lists(st.lists(results(), max_size=3), max_size=4), st.data())
def test_a_journal_gives_back_the_segments_before_any_damage(fingerprint, segments, data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "j"
        with Journal.open(path, fingerprint) as journal:
            ends = [path.stat().st_size]
            for number, segment in enumerate(segments):
                journal.append(number, segment)
                ends.append(path.stat().st_size)
            found = [[values(result) for result in segment] for segment in journal.segments()]
        written = [[values(result) for result in segment] for segment in segments]
        assert found == written
        content = bytearray(path.read_bytes())
        place = data.draw(st.integers(ends[0], max(ends[0], len(content) - 1)))
        if data.draw(st.booleans()) and place < len(content):
            content[place] ^= data.draw(st.integers(1, 255))
        else:
            del content[place:]
        path.write_bytes(content)
        with Journal.open(path, fingerprint) as journal:
            kept = [[values(result) for result in segment] for segment in journal.segments()]
        assert kept == written[: sum(end <= place for end in ends[1:])]


@settings(deadline=None)
@given(st.dictionaries(TEXT, JSON, max_size=4), st.dictionaries(TEXT, JSON, max_size=4))
def test_a_journal_of_another_run_is_refused(first, second):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "j"
        Journal.open(path, first).close()
        before = path.read_bytes()
        if json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True):
            Journal.open(path, second).close()
        elif first != second:  # 1 and 1.0, or True, are equal to Python
            with pytest.raises(OutputError, match="belongs to a run with other options"):
                Journal.open(path, second)
        assert path.read_bytes() == before


@st.composite
def polygons(draw):
    """A GeoJSON Polygon or MultiPolygon of any closed rings."""
    rings = st.lists(POINTS, min_size=3, max_size=6).map(lambda ring: [list(point) for point in [*ring, ring[0]]])
    parts = draw(st.lists(st.lists(rings, min_size=1, max_size=3), min_size=1, max_size=3))
    if len(parts) == 1:
        return {"type": "Polygon", "coordinates": parts[0]}
    return {"type": "MultiPolygon", "coordinates": parts}


@settings(deadline=None)
@given(polygons())
def test_geometries_come_back_and_are_those_of_shapely(geometry):
    assert from_wkb(wkb(geometry)) == geometry
    shape = shapely.geometry.shape(geometry)
    assert shapely.from_wkb(wkb(geometry)).equals_exact(shape)
    assert shapely.from_wkt(wkt(geometry)).equals_exact(shape)
    points = shapely.get_coordinates(shape)
    assert bounding_box(geometry) == [*points.min(axis=0), *points.max(axis=0)]


@settings(deadline=None)
@given(st.binary(max_size=80))
def test_bytes_that_are_no_geometry(data):
    try:
        geometry = from_wkb(data)
    except ValueError:
        return
    assert shapely.from_wkb(data).equals_exact(shapely.geometry.shape(geometry))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-20, 20), st.integers(-20, 20)), min_size=3, max_size=12, unique=True))
def test_hulls_are_those_of_shapely(points):
    expected = shapely.MultiPoint(points).convex_hull
    if expected.geom_type == "Polygon":
        assert shapely.Polygon(convex_hull(np.array(points, float))).equals(expected)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(8, 64), st.integers(1, 60), st.sampled_from([-1, 1]))
def test_footprints_lie_in_the_scene(width, height, side, zone, hemisphere):
    """Of any UTM zone, of both hemispheres: every footprint is in the box of the scene's, and they fill it."""
    import rasterio.warp
    from rasterio.transform import array_bounds, from_origin

    crs = f"EPSG:{(32600 if hemisphere > 0 else 32700) + zone}"
    place = from_origin(500_000, 5_000_000, 10, 10)
    found = footprints(list(TileGrid(width, height, side)), rasterio.CRS.from_string(crs), place)
    west, south, east, north = rasterio.warp.transform_bounds(
        crs, "EPSG:4326", *array_bounds(height, width, place), densify_pts=50
    )
    boxes = np.array([bounding_box(geometry) for geometry in found])
    expected = [west, south, east, north]
    np.testing.assert_allclose([*boxes[:, :2].min(axis=0), *boxes[:, 2:].max(axis=0)], expected, atol=2e-5)


MANIFEST = selftest_bundle().manifest


def places(value, at=()):
    """Every place in JSON values, as keys from the root."""
    yield at
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*at, key))


WHOLE = json.loads(MANIFEST.to_json())
PLACES = [place for place in places(WHOLE) if place]


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(PLACES), JSON, st.booleans())
def test_a_manifest_with_any_other_value_is_refused_or_comes_back(place, value, remove):
    changed = json.loads(MANIFEST.to_json())
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    if remove:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    try:
        found = Manifest.from_json(json.dumps(changed).encode())
    except BundleError:
        return
    assert Manifest.from_json(found.to_json()) == found
    for number in [number for number in json.loads(found.to_json()).values() if isinstance(number, float)]:
        assert math.isfinite(number)
