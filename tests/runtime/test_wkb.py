from __future__ import annotations

import struct

import pytest

from rsedge.runtime.outputs.geometry import from_wkb, wkb
from tests.runtime.search_files import box

SQUARE = box(1, 2, 3, 4)
TWO = {"type": "MultiPolygon", "coordinates": [SQUARE["coordinates"], box(5, 6, 7, 8)["coordinates"]]}


@pytest.mark.parametrize("geometry", [SQUARE, TWO])
def test_what_was_written_comes_back(geometry):
    assert from_wkb(wkb(geometry)) == geometry


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "cut off"),
        (wkb(SQUARE)[:7], "cut off"),
        (wkb(SQUARE)[:-1], "do not fit"),
        (wkb(SQUARE) + b"x", "1 bytes behind"),
        (struct.pack("<BII", 1, 1, 1), "geometry type 1, expected 3 or 6"),
        (struct.pack("<BII", 1, 6, 1) * 5000, "geometry type 6, expected 3"),
        (struct.pack("<BII", 1, 3, 0), "empty"),
        (struct.pack("<BII", 1, 6, 0), "empty"),
        (struct.pack("<BIII", 1, 3, 1, 0), "a ring of 0 points"),
        (struct.pack("<BIII8d", 1, 3, 1, 4, *[float("nan")] * 8), "finite"),
    ],
)
def test_what_no_polygon_is_says_why(data, said):
    with pytest.raises(ValueError, match=said):
        from_wkb(data)
