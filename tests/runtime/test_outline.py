from __future__ import annotations

import numpy as np
import pytest
import shapely
from shapely.geometry import box, mapping, shape

from rsedge.runtime.outputs.geometry import Outline, convex_hull, merge, outline_box, to_geojson


def outline(*geometries):
    found = Outline()
    for geometry in geometries:
        found.add([mapping(geometry) if isinstance(geometry, shapely.Geometry) else geometry])
    return found.hull()


def geometry(*hulls):
    found = shape(to_geojson(merge(hulls)))
    assert found.is_valid
    return found


def test_hulls_are_shapelys():
    generator = np.random.default_rng(0)
    for count in (3, 4, 10, 500):
        points = generator.integers(-50, 50, (count, 2)).astype(np.float64)
        expected = shapely.MultiPoint(points).convex_hull
        hull = convex_hull(points)
        assert shapely.Polygon(hull).equals(expected)
        assert shapely.LinearRing(hull).is_ccw
        assert len(hull) == len(expected.exterior.coords) - 1  # no point on a side


def test_a_scene_is_the_hull_of_its_tiles():
    tiles = [box(x, y, x + 1, y + 1) for x in range(8, 12) for y in range(3)]
    assert geometry(outline(*tiles)).equals(box(8, 0, 12, 3))
    assert outline_box([outline(*tiles)]) == [8, 0, 12, 3]


@pytest.mark.parametrize("shift", [-3, -1, 0, 2])
def test_a_scene_across_greenwich_is_not_torn(shift):
    tiles = [box(x + shift, 0, x + shift + 1, 1) for x in range(-1, 2)]
    assert geometry(outline(*tiles)).equals(box(shift - 1, 0, shift + 2, 1))


def test_a_scene_across_the_antimeridian_is_cut_there():
    tiles = [
        box(178, 10, 179.5, 11),
        {"type": "MultiPolygon", "coordinates": [mapping(box(179.5, 10, 180, 11))["coordinates"],
                                                 mapping(box(-180, 10, -179, 11))["coordinates"]]},
        box(-179, 10, -177.5, 11),
    ]  # fmt: skip
    hull = outline(*tiles)
    found = geometry(hull)
    assert found.geom_type == "MultiPolygon"
    assert found.equals(shapely.MultiPolygon([box(178, 10, 180, 11), box(-180, 10, -177.5, 11)]))
    assert all(part.exterior.is_ccw for part in found.geoms)
    assert outline_box([hull]) == [178, 10, -177.5, 11]


def test_a_scene_that_ends_at_the_antimeridian_is_not_cut():
    assert geometry(outline(box(178, 0, 180, 1))).equals(box(178, 0, 180, 1))
    assert geometry(outline(box(-180, 0, -178, 1))).equals(box(-180, 0, -178, 1))
    assert outline_box([outline(box(-180, 0, -178, 1))]) == [-180, 0, -178, 1]


def test_a_scene_across_the_antimeridian_may_reach_greenwich():
    tiles = [box(170, 0, 180, 1), *(box(x, 0, x + 10, 1) for x in range(-180, 0, 10))]
    hull = outline(*tiles)
    assert outline_box([hull]) == [170, 0, 0, 1]
    assert geometry(hull).equals(shapely.MultiPolygon([box(170, 0, 180, 1), box(-180, 0, 0, 1)]))


def test_a_scene_round_the_world_is_whole():
    tiles = [box(x, -90, x + 3.6, 90) for x in np.arange(-180, 180, 3.6).tolist()]
    hull = outline(*tiles)
    assert geometry(hull).equals(box(-180, -90, 180, 90))
    assert outline_box([hull]) == [-180, -90, 180, 90]


def test_scenes_that_touch_become_one_polygon():
    hulls = [outline(box(0, 0, 1, 1)), outline(box(5, 5, 6, 6)), outline(box(1, 0, 2, 1)), outline(box(1.5, 0.5, 3, 2))]
    found = geometry(*hulls)
    assert len(found.geoms) == 2
    assert found.contains(shapely.union_all([box(0, 0, 1, 1), box(1, 0, 2, 1), box(1.5, 0.5, 3, 2)]))
    assert outline_box(merge(hulls)) == [0, 0, 6, 6]


def test_scenes_that_touch_across_the_antimeridian_become_one():
    hulls = [outline(box(-180, 0, -179, 1)), outline(box(179, 0, 180, 1))]
    assert len(merge(hulls)) == 1
    assert outline_box(merge(hulls)) == [179, 0, -179, 1]
    assert geometry(*hulls).equals(shapely.MultiPolygon([box(179, 0, 180, 1), box(-180, 0, -179, 1)]))


def test_the_box_leaves_out_the_widest_gap():
    hulls = [outline(box(-170, 0, -160, 1)), outline(box(150, 0, 160, 1)), outline(box(100, -5, 110, -4))]
    assert outline_box(merge(hulls)) == [100, -5, -160, 1]
    assert outline_box(merge(reversed(hulls))) == [100, -5, -160, 1]


def test_the_order_of_tiles_and_scenes_is_of_no_consequence():
    generator = np.random.default_rng(1)
    boxes = [box(x, y, x + 20, y + 5) for x, y in generator.uniform((-180, -90), (160, 85), (40, 2)).tolist()]
    first = to_geojson([outline(*boxes)])
    generator.shuffle(boxes)
    assert to_geojson([outline(*boxes)]) == first


def test_nothing_has_no_place():
    assert outline() is None
    assert to_geojson([]) is None
    assert outline_box([]) is None
