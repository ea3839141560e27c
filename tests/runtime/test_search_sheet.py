from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rsedge.errors import OptionError
from rsedge.runtime.scenes.scene import Scene
from rsedge.runtime.search import hit_sheet as search_sheet
from rsedge.runtime.search.hit_sheet import write_hit_sheet
from rsedge.runtime.search.index import Index
from tests.runtime.search_files import unit_vectors, write_file
from tests.safe_products import write_old_l1c
from tests.scenes import pixels, write


@pytest.fixture
def cards(monkeypatch):
    """What is put on the sheet."""
    seen = []

    def write_sheet(path, tiles, *, columns):
        seen.extend(tiles)
        return real(path, tiles, columns=columns)

    real = search_sheet.write_sheet
    monkeypatch.setattr(search_sheet, "write_sheet", write_sheet)
    return seen


def search(path, **options):
    return Index.open(path).search(np.ones(4), **options)


def test_pixels_come_from_the_scene_and_each_card_says_rank_score_and_place(tmp_path, cards):
    data = pixels(3, 36, 36)
    (tmp_path / "scenes" / "deep").mkdir(parents=True)
    write(tmp_path / "scenes" / "deep" / "a.tif", data)
    (tmp_path / "scenes" / "deep" / "a.json").write_text("{}")
    hits = search(
        write_file(
            tmp_path / "a.parquet",
            unit_vectors(25, 4),
            row=[k // 5 for k in range(25)],
            col=[k % 5 for k in range(25)],
            row_off=[k // 5 * 8 for k in range(25)],
            col_off=[k % 5 * 8 for k in range(25)],
            width=[4 if k % 5 == 4 else 8 for k in range(25)],
        ),
        top=25,
    )
    assert write_hit_sheet(tmp_path / "hits.png", hits, folders=[tmp_path / "scenes"]) == 0
    assert Image.open(tmp_path / "hits.png").format == "PNG"
    for hit, (image, record) in zip(hits, cards, strict=True):
        top, left, width = hit.record.row_off, hit.record.col_off, hit.record.width
        stored = data[:, top : top + 8, left : left + width].transpose(1, 2, 0)
        height = stored.shape[0]
        assert np.array_equal(image[:height, :width], stored)
        assert not image[:, width:].any(), "an edge tile keeps its shape"
        assert record.caption.startswith(f"#{hit.rank} · {hit.score:.4f} · ")
        assert "°N" in record.caption
        assert record.caption.endswith(" · a")


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path, cards):
    images = {name: pixels(3, 8, 8, seed=seed) for seed, name in enumerate(("harbour", "meadow"))}
    for name, data in images.items():
        (tmp_path / "sets" / name).mkdir(parents=True)
        write(tmp_path / "sets" / name / "1.tif", data)
    file = write_file(
        tmp_path / "a.parquet",
        unit_vectors(2, 4),
        scene=["1", "1"],
        col_off=[0, 0],
        path=["meadow/1.tif", "harbour/1.tif"],
    )
    hits = search(file)
    write_hit_sheet(tmp_path / "x.png", hits, folders=[tmp_path / "sets"])
    for hit, (image, _) in zip(hits, cards, strict=True):
        assert np.array_equal(image, images[hit.path.split("/")[0]].transpose(1, 2, 0))


def test_scenes_are_found_where_they_were_and_beside_the_embeddings(tmp_path, cards):
    data = pixels(3, 8, 8)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    there = write(elsewhere / "other-name.tif", data)
    vectors = unit_vectors(1, 4)
    write_hit_sheet(tmp_path / "x.png", search(write_file(tmp_path / "a.parquet", vectors, path=[str(there)])))
    write(tmp_path / "b.tif", data)
    write_hit_sheet(tmp_path / "x.png", search(write_file(tmp_path / "b.parquet", vectors)))
    assert len(cards) == 2
    assert all(np.array_equal(image, data.transpose(1, 2, 0)) for image, _ in cards)


def test_a_card_without_pixels_says_why(tmp_path, cards):
    vectors = unit_vectors(1, 4)
    hits = search(write_file(tmp_path / "a.parquet", vectors))
    assert write_hit_sheet(tmp_path / "x.png", hits) == 1
    (tmp_path / "a.tif").write_bytes(b"not a raster")
    assert write_hit_sheet(tmp_path / "x.png", hits) == 1
    small = search(write_file(tmp_path / "b.parquet", vectors, row_off=[99]))
    write(tmp_path / "b.tif", pixels(3, 8, 8))
    assert write_hit_sheet(tmp_path / "x.png", small) == 1
    texts = [record.caption for _, record in cards]
    assert "pixels not found: --pixels-from FOLDER" in texts[0]
    assert "pixels cannot be read" in texts[1]
    assert "b is smaller than when it was embedded" in texts[2]
    assert all(image is None for image, _ in cards)


def test_a_file_of_embeddings_names_scenes_below_its_own_folder_only(tmp_path, cards):
    outside, own = tmp_path / "outside", tmp_path / "own"
    outside.mkdir()
    own.mkdir()
    private = write(outside / "private.tif", pixels(3, 8, 8))
    (own / "link.tif").symlink_to(private)
    (own / "inner").mkdir()
    names = [str(private), "../outside/private.tif", "link.tif", "/", "a" * 5000, "a\0b", str(own / "inner")]
    hits = search(write_file(own / "a.parquet", unit_vectors(len(names), 4), col_off=[0] * len(names), path=names))
    assert write_hit_sheet(tmp_path / "x.png", hits) == len(names)
    assert all("pixels not found: --pixels-from FOLDER" in record.caption for _, record in cards)
    named = [hit for hit in hits if hit.path == str(private)]
    assert write_hit_sheet(tmp_path / "x.png", named, folders=[outside]) == 0


def test_tiles_that_cannot_be_are_not_read(tmp_path, cards):
    write(tmp_path / "a.tif", pixels(3, 8, 8))
    columns = {"row_off": [-(2**31), 0, 0], "height": [2**31 - 1, 8, 8], "width": [8, -5, 0], "col_off": [0, 0, 0]}
    hits = search(write_file(tmp_path / "a.parquet", unit_vectors(3, 4), **columns))
    assert write_hit_sheet(tmp_path / "x.png", hits) == 3
    assert all("no tile of a has" in record.caption for _, record in cards)


def test_a_tile_that_is_too_large_for_a_card_is_not_read(tmp_path, cards, monkeypatch):
    monkeypatch.setattr(search_sheet, "_LARGEST_SIDE", 7)
    write(tmp_path / "a.tif", pixels(3, 8, 8))
    hits = search(write_file(tmp_path / "a.parquet", unit_vectors(1, 4)))
    assert write_hit_sheet(tmp_path / "x.png", hits) == 1
    assert "8 x 8 px are too many for a card" in cards[0][1].caption


def test_what_cannot_be_shown_is_refused(tmp_path):
    hits = search(write_file(tmp_path / "a.parquet", unit_vectors(1, 4)))
    with pytest.raises(OptionError, match="no hits"):
        write_hit_sheet(tmp_path / "x.png", [])
    with pytest.raises(OptionError, match="nowhere is no folder"):
        write_hit_sheet(tmp_path / "x.png", hits, folders=[tmp_path / "nowhere"])


def test_one_granule_of_a_product_of_several(tmp_path, cards):
    granules = write_old_l1c(tmp_path, seed=3, size=64)
    scene = f"{granules[1].name}_T{granules[1].tile}"
    whole = {"row_off": [0], "col_off": [0], "width": [64], "height": [64]}
    written = write_file(
        tmp_path / "a.parquet", unit_vectors(1, 4), scene=[scene], path=[str(granules[1].path)], **whole
    )
    assert write_hit_sheet(tmp_path / "hits.png", search(written)) == 0
    ((image, _),) = cards
    dn = granules[1].dn[:3].transpose(1, 2, 0)
    assert np.array_equal(image.any(axis=2), dn.any(axis=2))
    with Scene.open(Path(f"{granules[1].path}") / granules[1].granule).reader() as reader:
        assert np.array_equal(image, reader.read(0, 0, 64, 64)[0])
