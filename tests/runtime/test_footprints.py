"""Footprints against shapely and pyproj: over many maps, round the poles, across the antimeridian."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import pyproj
import pytest
import rasterio.crs
import shapely
import shapely.geometry
from rasterio.transform import Affine, from_origin
from rasterio.warp import transform_geom

from rsedge.runtime.scenes import footprints as module
from rsedge.runtime.scenes.footprints import footprints
from rsedge.runtime.scenes.scene import Scene
from rsedge.runtime.scenes.tiles import TileGrid
from tests import scenes

TRANSFORMS = {
    "north-up": from_origin(600000, 5100000, 10, 10),
    "south-up": Affine(10, 0, 600000, 0, 10, 5000000),
    "rotated": Affine.translation(600000, 5100000) @ Affine.rotation(33) @ Affine.scale(10, -10),
}
LAEA_FIJI = "+proj=laea +lat_0=-18 +lon_0=179 +datum=WGS84 +units=m +no_defs"
MERCATOR_41 = "+proj=merc +lon_0=150 +datum=WGS84 +units=m +no_defs"


def found_for(crs, transform, width=100, height=100, tile_size=100):
    grid = TileGrid(width, height, tile_size)
    return footprints(list(grid), rasterio.crs.CRS.from_user_input(crs), transform)


def parts_of(geometry):
    """The rings of a geometry."""
    many = geometry["type"] == "MultiPolygon"
    polygons = geometry["coordinates"] if many else [geometry["coordinates"]]
    assert not many or len(polygons) > 1
    assert all(len(polygon) == 1 for polygon in polygons)  # a tile has no holes
    return [polygon[0] for polygon in polygons]


def signed_area(ring):
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in pairwise(ring))


def check_rfc7946(geometry):
    """What sections 3.1.6 and 3.1.9 ask for, and that shapely takes it."""
    for ring in parts_of(geometry):
        assert len(ring) >= 4
        assert ring[0] == ring[-1]
        assert signed_area(ring) > 0
        assert all(-180 <= lon <= 180 and -90 <= lat <= 90 for lon, lat in ring)
        assert all(here != there for here, there in pairwise(ring))
        assert all(round(number, 7) == number for point in ring for number in point)
    shape = shapely.geometry.shape(geometry)
    assert shape.is_valid, shapely.is_valid_reason(shape)
    assert shape.area > 0
    return shape


# ---- an oracle: points of the tile and beside it, and its area on the ground ----


@cache
def transformer(crs):
    """Longitude and latitude → map."""
    return pyproj.Transformer.from_crs("EPSG:4326", crs, always_xy=True)


class Truth:
    """A tile of ``width`` × ``height`` pixels, by way of pyproj."""

    def __init__(self, crs, transform, width, height):
        self.map = transformer(crs)
        self.transform, self.width, self.height = transform, width, height
        lon, lat = self.lonlat(np.array([0.5]), np.array([0.5]))
        self.equal_area = pyproj.Proj(f"+proj=laea +lat_0={lat[0]} +lon_0={lon[0]} +datum=WGS84")

    def lonlat(self, across, down):
        a, cols, rows = self.transform, across * self.width, down * self.height
        x, y = a.a * cols + a.b * rows + a.c, a.d * cols + a.e * rows + a.f
        lon, lat = self.map.transform(x, y, direction="INVERSE")
        return (np.asarray(lon) + 180) % 360 - 180, np.asarray(lat)

    def ground_area(self, lon, lat):
        """Area inside a ring, square metres; seams that are walked both ways count nothing."""
        x, y = self.equal_area(lon, lat)
        return abs(float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y))) / 2

    def area(self):
        t = np.linspace(0, 1, 400, endpoint=False)
        zero, one = np.zeros_like(t), np.ones_like(t)
        return self.ground_area(
            *self.lonlat(np.concatenate([zero, t, one, 1 - t]), np.concatenate([t, one, 1 - t, zero]))
        )

    def contains(self, lon, lat):
        """Whether a place lies in the tile."""
        x, y = self.map.transform(lon, lat)
        if not np.isfinite(x + y):
            return False
        col, row = ~self.transform @ (x, y)
        return 0 < col < self.width and 0 < row < self.height


def footprint_area(geometry, truth):
    total = 0.0
    for ring in parts_of(geometry):
        points = np.array(ring)
        share = np.linspace(0, 1, 60, endpoint=False)
        along = points[:-1, None] + share[:, None] * (points[1:] - points[:-1])[:, None]
        total += truth.ground_area(*along.reshape(-1, 2).T)
    return total


def check_against_truth(geometry, shape, truth, random):
    """The same points and the same area."""
    margin = 0.004
    inside = random.uniform(margin, 1 - margin, (2, 60))
    assert shapely.contains_xy(shape, *truth.lonlat(*inside)).all()
    around = random.uniform(-0.5, 1.5, (2, 120))
    around = around[:, ((around < -margin) | (around > 1 + margin)).any(axis=0)]
    lon, lat = truth.lonlat(*around)
    known = np.isfinite(lon + lat)
    assert not shapely.contains_xy(shape, lon[known], lat[known]).any()
    assert footprint_area(geometry, truth) == pytest.approx(truth.area(), rel=4e-3)
    for pole in (90, -90):
        if truth.contains(0.0, pole):
            assert shape.covers(shapely.geometry.LineString([(-180, pole), (180, pole)]))


# ---- 500 maps ----

FIXED = {
    "EPSG:3031": (-90, 2e6),
    "EPSG:3413": (90, 2e6),
    "EPSG:5041": (90, 1e6),
    "EPSG:5042": (-90, 1e6),
    "EPSG:3035": (None, 5e5),
    LAEA_FIJI: (None, 1e6),
    "EPSG:4326": (None, None),
    "EPSG:4269": (None, None),
    "EPSG:3857": (None, 2e6),
    MERCATOR_41: (None, 2e6),
    "EPSG:6933": (None, 3e5),
}


def random_map(random):
    """A CRS, an affine, and a tile's size in pixels, where the CRS is used; often at a pole or the antimeridian."""
    zone = random.integers(1, 61) if random.random() < 0.5 else random.choice([1, 60])
    names = [*FIXED, *[f"EPSG:{hemisphere + zone}" for hemisphere in (32600, 32700)] * 4]
    crs = names[random.integers(len(names))]
    forward = transformer(crs)
    pole, extent = FIXED.get(crs, (None, 3e5))
    near = random.random() < 0.5  # the places where things go wrong
    if crs[5:8] in ("326", "327"):
        east = 6 * zone - 183 + random.uniform(-3, 3)
        if near and zone in (1, 60):
            east = (-180 if zone == 1 else 180) + random.uniform(-0.3, 0.3)
        x, y = forward.transform(east, random.uniform(0, 83.5) * (1 if crs[5:8] == "326" else -1))
    elif pole is not None:
        x, y = forward.transform(random.uniform(-180, 180), pole)
        x, y = x + random.normal() * 3e4 * (not near or 20), y + random.normal() * 3e4 * (not near or 20)
    elif crs == "EPSG:3035":
        x, y = random.uniform(2.5e6, 6.5e6), random.uniform(1.5e6, 5.4e6)
    elif crs == LAEA_FIJI:
        x, y = random.uniform(-2e6, 2e6, 2)
    else:
        x, y = forward.transform(
            179.9 if near and crs != MERCATOR_41 else random.uniform(-170, 170), random.uniform(-70, 70)
        )
    size = int(random.integers(8, 512))
    side = 10 ** random.uniform(2, np.log10(extent)) if extent else 10 ** random.uniform(-3, np.log10(12))
    pixel = side / size
    kind = random.integers(4)
    shape = Affine.identity()
    if kind == 1:
        shape = Affine.rotation(random.uniform(0, 360))
    elif kind == 2:
        shape = Affine.rotation(random.uniform(0, 360)) @ Affine.shear(random.uniform(-40, 40), 0)
    south_up = kind == 3 or random.random() < 0.1
    shape = shape @ Affine.scale(pixel, pixel * (1 if south_up else -1) * random.uniform(0.7, 1.4))
    middle = Affine.translation(-random.uniform(0, size), -random.uniform(0, size))
    return crs, Affine.translation(x, y) @ shape @ middle, size


def check_maps(count, seed=5):
    """Footprints of tiles on random maps against the oracle; gives how often what occurred."""
    random = np.random.default_rng(seed)
    seen = {"Polygon": 0, "MultiPolygon": 0, "pole": 0, "dense": 0}
    for number in range(count):
        crs, transform, size = random_map(random)
        (geometry,) = found_for(crs, transform, size, size, size)
        where = f"map {number}: {crs}, {tuple(transform)[:6]}, {size} px"
        assert geometry is not None, where
        try:
            shape = check_rfc7946(geometry)
            check_against_truth(geometry, shape, Truth(crs, transform, size, size), random)
        except AssertionError as error:
            raise AssertionError(where) from error
        seen[geometry["type"]] += 1
        seen["pole"] += abs(shape.bounds[1]) == 90 or abs(shape.bounds[3]) == 90
        seen["dense"] += sum(map(len, parts_of(geometry))) > 20
    return seen


def test_500_maps():
    seen = check_maps(500)
    assert seen["MultiPolygon"] > 30, seen
    assert seen["pole"] > 10, seen
    assert seen["dense"] > 40, seen


FAULTS = {
    "sides stay straight": {"_STRAY": 1.0},
    "nothing is split": {"_split": lambda line: [line]},
    "the other pole": {"_turns_left": lambda scene, tile: False},
    "no short way round": {"_half_turn": lambda steps: steps},
    "coarse numbers": {"_DECIMALS": 1},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_finds_faults(fault, monkeypatch):
    for name, value in FAULTS[fault].items():
        monkeypatch.setattr(module, name, value)
    with pytest.raises(AssertionError):
        check_maps(120)


# ---- single cases ----


@pytest.mark.parametrize("kind", TRANSFORMS)
@pytest.mark.parametrize("crs", ["EPSG:32632", "EPSG:3857", "EPSG:32732"])
def test_footprints_lie_where_rasterio_says(tmp_path, kind, crs):
    transform = TRANSFORMS[kind]
    path = scenes.write(tmp_path / "a.tif", scenes.pixels(3, 70, 90), crs=crs, transform=transform)
    grid = TileGrid(90, 70, 32, edge="pad")
    for tile, found in zip(grid, Scene.open(path).footprints(list(grid)), strict=True):
        corners = [(0, 0), (0, tile.height), (tile.width, tile.height), (tile.width, 0), (0, 0)]
        ring = [transform @ (tile.col_off + x, tile.row_off + y) for x, y in corners]
        expected = transform_geom(crs, "EPSG:4326", {"type": "Polygon", "coordinates": [ring]})["coordinates"][0]
        check_rfc7946(found)
        (exterior,) = found["coordinates"]
        np.testing.assert_allclose(sorted(exterior[:-1]), sorted(map(list, expected[:-1])), rtol=0, atol=6e-8)


def test_sentinel_2_tiles_have_four_corners_up_to_the_end_of_utm():
    for crs, north in (("EPSG:32629", 3500000), ("EPSG:32633", 9300000), ("EPSG:32720", 1200000)):
        found = found_for(crs, from_origin(300000, north, 10, 10), 10976, 10976, 224)
        assert len(found) == 2401
        assert {len(geometry["coordinates"][0]) for geometry in found} == {5}


def test_neighbours_share_their_corners():
    grid = TileGrid(1120, 1120, 224)
    found = found_for("EPSG:32629", from_origin(300000, 3500000, 10, 10), 1120, 1120, 224)
    for tile, geometry in zip(grid, found, strict=True):
        if tile.col:
            here, left = (set(map(tuple, g["coordinates"][0])) for g in (geometry, found[tile.index - 1]))
            assert len(here & left) == 2


@pytest.mark.parametrize(("crs", "west"), [("EPSG:4326", 179.98), ("EPSG:32601", 166000), ("EPSG:4326", -180.02)])
def test_antimeridian_splits(crs, west):
    size = 0.001 if crs == "EPSG:4326" else 100
    found = found_for(crs, from_origin(west, 10 if crs == "EPSG:4326" else 1000000, size, size), 80, 40, 40)
    split = [geometry for geometry in found if geometry["type"] == "MultiPolygon"]
    assert len(split) == 1
    east, west_part = parts_of(split[0])
    assert max(x for x, _ in east) == 180
    assert min(x for x, _ in west_part) == -180
    assert min(x for x, _ in east) > 170
    assert max(x for x, _ in west_part) < -170
    if crs == "EPSG:4326":
        assert signed_area(east) + signed_area(west_part) == pytest.approx(2 * 0.04**2)


@pytest.mark.parametrize("west", [179.96, -180.0, 180.0])
def test_touching_the_antimeridian_does_not_split(west):
    (found,) = found_for("EPSG:4326", from_origin(west, 10, 0.001, 0.001), 40, 40, 40)
    assert found["type"] == "Polygon"
    check_rfc7946(found)
    assert {abs(x) for x, _ in found["coordinates"][0]} == {180, 179.96}


def test_a_side_that_bends_over_the_antimeridian_leaves_two_parts_on_one_side_of_it():
    # The right side is straight on the map, and east of longitude 180 in the far north and south only.
    crs = "+proj=laea +lat_0=0 +lon_0=179.5 +datum=WGS84"
    x, _ = transformer(crs).transform(180.02, 60.0)
    transform = Affine(40000, 0, x - 400000, 0, -46000, 6.9e6)
    found = found_for(crs, transform, 10, 300, 300)
    shape = check_rfc7946(found[0])
    check_against_truth(found[0], shape, Truth(crs, transform, 10, 300), np.random.default_rng(0))
    assert len(parts_of(found[0])) == 3


@pytest.mark.parametrize(("crs", "pole"), [("EPSG:3995", 90), ("EPSG:3031", -90)])
@pytest.mark.parametrize("south_up", [False, True])
def test_round_the_pole(crs, pole, south_up):
    """The tile holds the pole and nothing else changes but the side the ring is closed on."""
    transform = Affine(10, 0, -700, 0, 10 if south_up else -10, -900 if south_up else 900)
    (found,) = found_for(crs, transform, 200, 200, 200)
    shape = check_rfc7946(found)
    assert found["type"] == "Polygon"
    assert {(-180.0, pole), (180.0, pole)} <= set(map(tuple, found["coordinates"][0]))
    assert shape.bounds[0::2] == (-180, 180)
    check_against_truth(found, shape, Truth(crs, transform, 200, 200), np.random.default_rng(0))


@pytest.mark.parametrize("crs", ["EPSG:3413", "EPSG:3031", "EPSG:5041"])
@pytest.mark.parametrize("shift", [0.0, 0.5, 0.25])
def test_tiles_that_meet_at_the_pole_cover_its_surroundings_once(crs, shift):
    """The pole is a corner of four tiles, lies on the side of two, or within one."""
    middle = 2e6 if crs == "EPSG:5041" else 0.0
    transform = from_origin(middle - (2 - shift) * 1000, middle + (2 - shift) * 1000, 10, 10)
    found = found_for(crs, transform, 400, 400, 100)
    shapes = [check_rfc7946(geometry) for geometry in found]
    for geometry, shape, tile in zip(found, shapes, TileGrid(400, 400, 100), strict=True):
        placed = transform @ Affine.translation(tile.col_off, tile.row_off)
        check_against_truth(geometry, shape, Truth(crs, placed, 100, 100), np.random.default_rng(0))
    whole = shapely.union_all(shapes)
    assert sum(shape.area for shape in shapes) == pytest.approx(whole.area, rel=1e-3)
    pole = -90 if crs == "EPSG:3031" else 90
    assert whole.intersects(shapely.Point(0, pole))


def test_a_side_through_the_pole():
    transform = from_origin(-500, 1000, 10, 10)
    for found in found_for("EPSG:3413", transform, 100, 200, 100):
        shape = check_rfc7946(found)
        assert shape.bounds[3] == pytest.approx(90, abs=1e-4)
        assert shape.bounds[2] - shape.bounds[0] <= 360


def test_the_whole_world():
    for west in (-180, 0, 17.5):
        (found,) = found_for("EPSG:4326", from_origin(west, 90, 1, 1), 360, 180, 360)
        assert check_rfc7946(found).area == 360 * 180
    (found,) = found_for("EPSG:3857", from_origin(-20037508.342789, 20037508.342789, 156543, 156543), 256, 256, 256)
    assert check_rfc7946(found).bounds == pytest.approx((-180, -85.05, 180, 85.05), abs=0.01)


def test_a_strip_of_one_pixel_is_where_it_should_be():
    for crs, place in (("EPSG:3035", (2.6e6, 5.2e6)), ("EPSG:5041", (2.01e6, 2.01e6))):
        transform = from_origin(*place, 100, 100)
        (found,) = found_for(crs, transform, 512, 1, 512)
        shape = check_rfc7946(found)
        check_against_truth(found, shape, Truth(crs, transform, 512, 1), np.random.default_rng(0))


def test_what_is_not_wholly_on_the_map_has_no_footprint():
    disk = "+proj=geos +h=35785831 +sweep=x +lon_0=0 +datum=WGS84"
    found = found_for(disk, from_origin(0, 1e6, 1e5, 1e5), 60, 20, 20)
    assert [geometry is None for geometry in found] == [False, False, True]
    # The sinusoidal map of the world is a lens: its rim is at 180 degrees, and what lies beyond comes round again.
    found = found_for("ESRI:54008", from_origin(0, 6e6, 1e5, 1e5), 200, 10, 10)
    inside = [geometry is not None for geometry in found]
    assert inside == sorted(inside, reverse=True)
    assert inside[0]
    assert not inside[-1]
    assert found_for("EPSG:4326", from_origin(0, 91, 1, 1), 2, 2, 2) == [None]
    assert found_for("EPSG:32632", Affine(10, 10, 6e5, 10, 10, 5e6), 20, 20, 20) == [None]


def test_a_map_of_no_place_on_earth_has_no_footprints():
    crs = rasterio.crs.CRS.from_wkt('LOCAL_CS["plan of a building",UNIT["metre",1]]')
    assert found_for(crs, from_origin(0, 0, 1, 1), 3, 3, 1) == [None] * 9


def test_a_disk_of_the_earth_keeps_its_tiles():
    disk = "+proj=geos +h=35785831 +sweep=x +lon_0=0 +datum=WGS84"
    found = found_for(disk, from_origin(-5.5e6, 5.5e6, 3000, 3000), 3666, 3666, 100)
    assert 0.5 < sum(geometry is not None for geometry in found) / len(found) < 0.78
    for geometry in filter(None, found[::29]):
        check_rfc7946(geometry)


def test_no_tiles_no_footprints():
    assert footprints([], rasterio.crs.CRS.from_epsg(4326), Affine.identity()) == []


@pytest.mark.parametrize(("missing", "word"), [("crs", "reference system"), ("transform", "geotransform")])
def test_without_georeference(tmp_path, missing, word):
    scene = Scene.open(scenes.write(tmp_path / "a.tif", scenes.pixels(3, 8, 9), **{missing: None}))
    assert scene.footprints(list(TileGrid(9, 8))) == [None]
    assert word in scene.warnings[0]
