from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsedge.errors import OptionError
from rsedge.runtime.scenes.tiles import EDGES, TileGrid


@st.composite
def grids(draw, edges=EDGES):
    tile_size = draw(st.integers(1, 12))
    edge = draw(st.sampled_from(edges))
    smallest = tile_size if edge == "drop" else 1
    return TileGrid(
        width=draw(st.integers(smallest, 60)),
        height=draw(st.integers(smallest, 60)),
        tile_size=tile_size,
        overlap=draw(st.integers(0, tile_size - 1)),
        edge=edge,
    )


def coverage(grid: TileGrid) -> np.ndarray:
    count = np.zeros((grid.height, grid.width), int)
    for tile in grid:
        count[tile.row_off : tile.row_off + tile.height, tile.col_off : tile.col_off + tile.width] += 1
    return count


@given(grids())
def test_tiles_lie_inside_in_order_and_once(grid):
    tiles = list(grid)
    assert [tile.index for tile in tiles] == list(range(len(grid)))
    assert [(tile.row, tile.col) for tile in tiles] == [(r, c) for r in range(grid.rows) for c in range(grid.cols)]
    assert len({(tile.row_off, tile.col_off) for tile in tiles}) == len(tiles)
    for tile in tiles:
        assert 0 <= tile.row_off < tile.row_off + tile.height <= grid.height
        assert 0 <= tile.col_off < tile.col_off + tile.width <= grid.width
        assert max(tile.width, tile.height) <= grid.tile_size
    assert tiles == [grid.tile(index) for index in range(len(grid))]


@given(grids(edges=("pad", "shift")))
def test_pad_and_shift_cover_every_pixel(grid):
    assert coverage(grid).min() >= 1


@given(grids(edges=("pad",)))
def test_pad_without_overlap_covers_once(grid):
    if grid.overlap == 0:
        assert coverage(grid).max() == 1


@given(grids(edges=("drop", "shift")))
def test_drop_and_shift_give_whole_tiles(grid):
    for tile in grid:
        assert tile.width == min(grid.tile_size, grid.width)
        assert tile.height == min(grid.tile_size, grid.height)


@given(grids(edges=("drop",)))
def test_drop_leaves_less_than_a_stride(grid):
    covered = coverage(grid) > 0
    assert grid.width - covered.any(axis=0).sum() < grid.stride
    assert grid.height - covered.any(axis=1).sum() < grid.stride


@given(grids())
def test_neighbours_share_the_overlap(grid):
    for tile in grid:
        if tile.col and not (grid.edge == "shift" and tile.col == grid.cols - 1):
            assert tile.col_off - grid.tile(tile.index - 1).col_off == grid.tile_size - grid.overlap
        if tile.row and not (grid.edge == "shift" and tile.row == grid.rows - 1):
            assert tile.row_off - grid.tile(tile.index - grid.cols).row_off == grid.tile_size - grid.overlap


@given(grids(edges=("shift",)))
def test_shift_moves_the_last_tile_inward_only(grid):
    padded = TileGrid(grid.width, grid.height, grid.tile_size, grid.overlap, "pad")
    assert len(padded) == len(grid)
    for shifted, tile in zip(grid, padded, strict=True):
        assert shifted.col_off <= tile.col_off
        assert shifted.row_off <= tile.row_off


def test_a_sentinel_2_scene():
    assert len(TileGrid(10980, 10980, edge="drop")) == 49 * 49
    padded = TileGrid(10980, 10980, edge="pad")
    assert (padded.rows, padded.cols) == (50, 50)
    assert padded.tile(len(padded) - 1).width == 10980 - 49 * 224


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"tile_size": 0}, "tile size is 0"),
        ({"overlap": 224}, "0 to 223"),
        ({"overlap": -1}, "overlap is -1"),
        ({"edge": "wrap"}, "shift, mirror, pad, drop"),
        ({"width": 0}, "0 × 500"),
        ({"edge": "drop", "width": 223}, "no whole tile"),
    ],
)
def test_what_is_refused(values, words):
    with pytest.raises(OptionError, match=words):
        TileGrid(**{"width": 500, "height": 500, **values})


@pytest.mark.parametrize("index", [-1, 9])
def test_no_such_tile(index):
    with pytest.raises(IndexError):
        TileGrid(500, 500).tile(index)


def test_slice_stops_at_the_end():
    assert [tile.index for tile in TileGrid(500, 500).slice(7, 99)] == [7, 8]


@pytest.mark.parametrize("tile_size", [0, -1, 16385])
def test_tiles_that_no_memory_holds_are_refused(tile_size):
    with pytest.raises(OptionError, match=f"tile size is {tile_size} pixels, expected 1 to 16384"):
        TileGrid(100, 100, tile_size)
