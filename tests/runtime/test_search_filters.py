from __future__ import annotations

from datetime import datetime, timedelta, timezone

import numpy as np
import pytest

from rsedge.errors import OptionError
from rsedge.runtime.search.filters import Filters, RowFilter
from rsedge.runtime.search.index import Index
from rsedge.runtime.search.search_file import SearchFile
from tests.runtime.search_files import box, unit_vectors, write_file

UTC = timezone.utc


def passing(path, **filters) -> list[int]:
    """Rows that filters leave, as one whole search finds them."""
    index = Index.open(path)
    hits = index.search(np.ones(index.info.dim), top=index.rows, filters=Filters(**filters))
    return sorted(hit.row for hit in hits)


def tile(west: float, south: float, size: float = 0.5):
    """A tile, in two parts if it crosses 180 degrees."""
    if west + size <= 180:
        return box(west, south, west + size, south + size)
    parts = (box(west, south, 180, south + size), box(-180, south, west + size - 360, south + size))
    return {"type": "MultiPolygon", "coordinates": [part["coordinates"] for part in parts]}


def touches(west: float, south: float, size: float, area) -> bool:
    """The oracle: on a circle of longitudes, by the way east from the western edges."""
    left, low, right, high = area
    width = (right - left) % 360
    apart = (west - left) % 360
    along = apart <= width or (left - west) % 360 <= size
    return along and south <= high and south + size >= low


@pytest.mark.parametrize(
    "area", [(178, -5, -178, 5), (10, -3, 20, 3), (-180, -90, 180, 90), (179.9, 0, 180, 1), (100, -9, -100, 9)]
)
def test_a_box_finds_what_it_touches_also_across_the_antimeridian(tmp_path, area):
    corners = np.random.default_rng(4).uniform((-180, -8), (180, 8), (400, 2)).tolist()
    corners += [(179.75, float(s)) for s in np.linspace(-8, 7, 20)]  # tiles that cross it
    path = write_file(
        tmp_path / "a.parquet", unit_vectors(420, 4), geometries=[tile(*corner) for corner in corners], group_rows=60
    )
    whole = area == (-180, -90, 180, 90)
    wanted = [k for k, (w, s) in enumerate(corners) if whole or touches(w, s, 0.5, area)]
    assert passing(path, bbox=area) == wanted
    assert len(wanted) > 0


def test_tiles_without_a_place_time_or_cloud_share_are_left_out_where_one_is_asked_for(tmp_path):
    path = write_file(
        tmp_path / "a.parquet",
        unit_vectors(3, 4),
        geometries=[None, tile(0, 0), tile(0, 0)],
        datetime=[datetime(2024, 1, 1, tzinfo=UTC), None, datetime(2024, 1, 1, tzinfo=UTC)],
        cloud_fraction=[0.0, 0.0, None],
    )
    assert passing(path, bbox=(-1, -1, 1, 1)) == [1, 2]
    assert passing(path, since="2000-01-01") == [0, 2]
    assert passing(path, max_cloud=1.0) == [0, 1]
    assert passing(path) == [0, 1, 2]


def test_dates_bound_the_time_of_acquisition(tmp_path):
    start = datetime(2024, 5, 30, tzinfo=UTC)
    moments = [start + timedelta(hours=hours) for hours in range(0, 96, 3)]
    path = write_file(tmp_path / "a.parquet", unit_vectors(len(moments), 4), datetime=moments, group_rows=5)

    def rows(first, last):
        return [k for k, moment in enumerate(moments) if first <= moment <= last]

    day = timedelta(days=1)
    whole_day = rows(start + day, start + 2 * day - timedelta(seconds=1))
    assert passing(path, since="2024-05-31", until="2024-05-31") == whole_day
    assert passing(path, until="2024-05-31T09:00:00Z") == rows(start, start + timedelta(hours=33))
    assert passing(path, since="2024-05-31T09:00:00+02:00") == rows(start + timedelta(hours=31), start + 9 * day)
    assert passing(path, since="2024-05-31T09:00") == rows(start + timedelta(hours=33), start + 9 * day)


CLOUDS = [None, 0.0, 0.1, 0.5, 1.0]
NAMES = ["S2A_x", "S2B_x", "it's", "100%", "S2A_y"]
TRUE = {
    "cloud_fraction = 0.5": [3],
    "cloud_fraction != 0": [2, 3, 4],
    "cloud_fraction <> 0": [2, 3, 4],
    "cloud_fraction < 1e-1": [1],
    "cloud_fraction <= .1": [1, 2],
    "row > 1 and row<=3": [2, 3],
    "row >= +4 or row = 0": [0, 4],
    "not row = 2": [0, 1, 3, 4],
    "not cloud_fraction = 0.5": [1, 2, 4],
    "cloud_fraction is null": [0],
    "cloud_fraction IS NOT NULL": [1, 2, 3, 4],
    "cloud_fraction not in (0, 1)": [2, 3],
    "not (cloud_fraction in (0, 1))": [2, 3],
    "row in (1, 3, 99)": [1, 3],
    "scene = 'it''s'": [2],
    "scene in ('S2A_x', 'S2A_y')": [0, 4],
    "scene like 'S2A%'": [0, 4],
    "scene like 'S2_!_%' or scene like 'S2__x'": [0, 1],
    "scene not like 'S2%'": [2, 3],
    "row = 1 or row = 2 and scene = 'x'": [1],
    "(row = 1 or row = 2) and scene = 'it''s'": [2],
    '"row" = 1': [1],
    "bbox.xmin >= 3": [3, 4],
    "datetime >= '2024-05-31' and datetime < '2024-06-01T00:00:00Z'": [0, 1, 2, 3, 4],
    "datetime < '2024-05-31'": [],
}


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    return write_file(
        tmp_path_factory.mktemp("where") / "a.parquet",
        unit_vectors(5, 4),
        scene=NAMES,
        row=list(range(5)),
        cloud_fraction=CLOUDS,
        group_rows=2,
    )


@pytest.mark.parametrize("condition", TRUE)
def test_conditions_mean_what_they_mean_in_sql(five, condition):
    assert passing(five, where=condition) == TRUE[condition]


WRONG = {
    "": (1, "a column"),
    "row": (4, "=, !="),
    "row = 'x'": (7, "a value for row, which is a number"),
    "scene = 3": (9, "a text in quotes"),
    "rwo = 3": (1, "one of the columns scene, row"),
    "row = 3 row = 4": (9, "and, or, or the end"),
    "(row = 3": (9, ")"),
    "row in (1, )": (12, "a value for row"),
    "row in 1": (8, "("),
    "row not = 3": (9, "in or like"),
    "row like '3'": (10, "row is a number"),
    "scene = 'x": (9, "a text ends with a quote"),
    "datetime > 'May'": (12, "ISO 8601"),
    "row = 3; drop": (8, "a column, a value or an operator"),
    "row = __import__('os')": (7, "a value for row"),
    "row = 3 and": (12, "a column"),
    "row is 3": (8, "null"),
    "not " * 60 + "row = 1": (205, "at most 50"),
    "embedding is null": (1, "one of the columns"),
}


@pytest.mark.parametrize("condition", WRONG)
def test_what_is_no_condition_is_refused_with_its_place(five, condition):
    place, message = WRONG[condition]
    with pytest.raises(OptionError) as caught:
        passing(five, where=condition)
    first, shown, mark = str(caught.value).splitlines()
    assert message in first
    assert f"at position {place}:" in first
    assert shown == f"  {condition}"
    assert mark == " " * (place + 1) + "^"


def test_every_value_that_cannot_be_is_named_at_once():
    with pytest.raises(OptionError) as caught:
        Filters(bbox=(200, 5, 0, -5), since="May", until="2024-13-01", max_cloud=7)
    for part in ("longitude 200", "latitude 5 to -5", "since is 'May'", "until is '2024-13-01'", "max_cloud is 7"):
        assert part in str(caught.value)
    with pytest.raises(OptionError, match="exchange them"):
        Filters(since="2024-06-01", until="2024-05-01")


def test_row_groups_that_statistics_rule_out_are_not_read(tmp_path):
    path = write_file(tmp_path / "a.parquet", unit_vectors(500, 4), row=list(range(500)), group_rows=100)
    rows = RowFilter(SearchFile.open(path), Filters(where="row >= 310 and row < 330"))
    assert rows._groups == {3}
    assert [int(rows.mask(group).sum()) for group in range(5)] == [0, 0, 0, 20, 0]
