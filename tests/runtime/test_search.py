from __future__ import annotations

import io
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from rsedge.errors import OptionError
from rsedge.runtime.search import search_file
from rsedge.runtime.search.filters import Filters
from rsedge.runtime.search.index import Index, Scorer
from rsedge.runtime.search.search_file import SearchFile, _levels, find_pieces
from tests.runtime.search_files import MODEL_HASH, box, brute_force, unit_vectors, write_file
from tests.scenes import truncate


class FakeEmbedder:
    """Texts and images to fixed vectors."""

    def __init__(self, vector: np.ndarray, model_hash: str = MODEL_HASH) -> None:
        self.model, self.hash, self._vector = f"other@{model_hash[:12]}", model_hash, vector

    def embed_texts(self, texts):
        assert texts == ["a lake"]
        return self._vector[None]

    def embed_images(self, images):
        assert images.shape == (1, 8, 8, 3)
        return self._vector[None]


def rows_of(hits):
    return [hit.row for hit in hits]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
def test_hits_are_those_of_brute_force(tmp_path, dtype, plain, threads):
    vectors = unit_vectors(730, 24, dtype=dtype)
    missing = np.r_[3, 99, 100, 101, 200:310, 729]
    index = Index.open(write_file(tmp_path / "a.parquet", vectors, missing=missing, plain=plain))
    allowed = np.ones(730, bool)
    allowed[missing] = False
    for query in unit_vectors(5, 24, seed=1, dtype="float32") * 3:
        rows, scores = brute_force(vectors, query, allowed, 20)
        hits = index.search(query, threads=threads)
        assert rows_of(hits) == rows.tolist()
        np.testing.assert_allclose([hit.score for hit in hits], scores, atol=6e-7)
        assert [hit.rank for hit in hits] == list(range(1, 21))


@pytest.mark.parametrize("page_bytes", [64, 700, 2**20])
def test_plain_pages_are_read_as_they_lie_whatever_their_size(tmp_path, page_bytes):
    vectors = unit_vectors(3000, 8)
    missing = np.flatnonzero(np.random.default_rng(1).random(3000) < 0.4)
    path = write_file(tmp_path / "a.parquet", vectors, missing=missing, group_rows=1100, page_bytes=page_bytes)
    file = SearchFile.open(path)
    assert all(file._find(group) is not None for group in range(3))
    present = np.delete(np.arange(3000), missing)
    found = [(block.copy(), rows) for group in range(3) for block, rows in file.blocks(group)]
    assert np.array_equal(np.concatenate([rows for _, rows in found]), present)
    assert np.array_equal(np.concatenate([block for block, _ in found]), vectors[present])
    some = [2999, 0, 7, 1500, 7]
    block, rows = file.vectors(some)
    assert rows.tolist() == [row for row in (0, 7, 1500, 2999) if row in present]
    assert np.array_equal(block, vectors[rows])


def test_compressed_pages_are_left_to_pyarrow(tmp_path):
    vectors = unit_vectors(250, 8)
    file = SearchFile.open(write_file(tmp_path / "a.parquet", vectors, missing=[4], plain=False))
    assert file._find(0) is None
    block, rows = file.vectors([249, 3, 4])
    assert rows.tolist() == [3, 249]
    assert np.array_equal(block, vectors[rows])


def test_levels_are_decoded_as_parquet_packs_them():
    packed = bytes([0x03, 0b10_01_00_10, 0b00_01_10_10, 200 << 1 & 0x7F | 0x80, 3, 1])
    assert _levels(packed, 2, 208).tolist() == [2, 0, 1, 2, 2, 2, 1, 0] + [1] * 200


def test_every_float16_is_compared_to_the_bit():
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)].reshape(-1, 1)
    products = Scorer(np.ones((1, 1)), np.dtype(np.float16), len(finite))(finite)
    assert np.array_equal(products, finite.astype(np.float32))


def test_equal_embeddings_rank_in_the_order_of_files_and_rows(tmp_path):
    same = unit_vectors(1, 16)
    first = write_file(tmp_path / "a.parquet", np.repeat(same, 333, axis=0), group_rows=50)
    second = write_file(tmp_path / "b.parquet", np.repeat(same, 40, axis=0))
    index = Index.open(tmp_path)
    hits = index.search(same[0], top=350, threads=3)
    assert [hit.file for hit in hits] == [str(first)] * 333 + [str(second)] * 17
    assert rows_of(hits) == [*range(333), *range(17)]
    assert len({hit.score for hit in hits}) == 1


def test_several_files_are_one_and_may_differ_in_type(tmp_path):
    a, b = unit_vectors(150, 16, 1, "float16"), unit_vectors(170, 16, 2, "float32")
    write_file(tmp_path / "a.parquet", a, missing=[0])
    write_file(tmp_path / "b.parquet", b)
    query = unit_vectors(1, 16, 3, "float32")[0]
    allowed = np.ones(320, bool)
    allowed[0] = False
    rows, _ = brute_force(np.concatenate([a.astype("float64"), b]), query, allowed, 400)
    hits = Index.open(tmp_path / "a.parquet", tmp_path / "b.parquet").search(query, top=400)
    assert [hit.row + 150 * hit.file.endswith("b.parquet") for hit in hits] == rows.tolist()
    assert len(hits) == 319, "fewer than asked for: all there are"


def test_many_queries_in_one_pass_find_what_each_alone_finds(tmp_path):
    index = Index.open(write_file(tmp_path / "a.parquet", unit_vectors(500, 16)))
    queries = unit_vectors(7, 16, 5, "float32")
    for query, (scores, rows) in zip(queries, index.nearest(queries, top=9), strict=True):
        alone = index.nearest(query[None], top=9)[0]
        assert np.array_equal(rows, alone[1])
        assert np.array_equal(scores, alone[0])


def test_embeddings_that_are_not_finite_are_passed_over(tmp_path):
    for dtype in ("float16", "float32"):
        vectors = unit_vectors(300, 16, dtype=dtype)
        vectors[7, 3], vectors[8, 2] = np.nan, np.inf
        hits = Index.open(write_file(tmp_path / "a.parquet", vectors)).search(vectors[0], top=300)
        assert sorted(rows_of(hits)) == [row for row in range(300) if row not in (7, 8)]


def test_a_record_comes_back_as_it_was_written(tmp_path):
    halves = [box(179, 0, 180, 1), box(-180, 0, -179, 1)]
    corners = {"type": "MultiPolygon", "coordinates": [half["coordinates"] for half in halves]}
    path = write_file(
        tmp_path / "a.parquet",
        unit_vectors(2, 4),
        captions=True,
        geometries=[corners, None],
        cloud_fraction=[0.25, None],
        path=["scenes/a.tif", None],
    )
    both = Index.open(path).search(unit_vectors(2, 4)[0])
    hit = next(hit for hit in both if hit.row == 0)
    assert hit.record.geometry == corners
    assert (hit.record.scene, hit.record.row, hit.record.col_off) == ("a", 0, 0)
    assert (hit.record.datetime, hit.record.cloud_fraction) == ("2024-05-31T10:30:00Z", 0.25)
    assert (hit.record.caption, hit.record.score, hit.path) == ("a field", -0.5, "scenes/a.tif")
    assert next(hit for hit in both if hit.row == 1).record.geometry is None


def test_a_tile_finds_others_and_needs_no_model(tmp_path):
    vectors = unit_vectors(120, 16)
    index = Index.open(write_file(tmp_path / "a.parquet", vectors, missing=[13]))
    rows, _ = brute_force(vectors, vectors[42], np.arange(120) != 13, 6)
    assert rows_of(index.search(tile=("a", 4, 2), top=5)) == rows[1:].tolist()
    with pytest.raises(OptionError, match="tile a:1:3 has no embedding"):
        index.search(tile=("a", 1, 3))
    with pytest.raises(OptionError, match="tile it's:0:0 is not in these files"):
        index.search(tile=("it's", 0, 0))
    write_file(tmp_path / "b.parquet", vectors, scene=["a"] * 120)
    with pytest.raises(OptionError, match=r"there 2 times \(.*a.parquet row 42, .*b.parquet row 42"):
        Index.open(tmp_path).search(tile=("a", 4, 2))


def test_texts_and_images_need_the_very_model(tmp_path):
    vectors = unit_vectors(120, 16)
    index = Index.open(write_file(tmp_path / "a.parquet", vectors))
    same = FakeEmbedder(vectors[5].astype("float32"))
    assert index.search(text="a lake", embedder=same)[0].row == 5
    assert index.search(image=np.zeros((8, 8, 3), np.uint8), embedder=same)[0].row == 5
    other = FakeEmbedder(vectors[5], "f" * 64)
    with pytest.raises(OptionError, match=f"(?s){other.model}.*{'f' * 64}.*clip@0123456789ab.*{MODEL_HASH}"):
        index.search(text="a lake", embedder=other)
    with pytest.raises(OptionError, match="pass the bundle clip@0123456789ab"):
        index.search(text="a lake")
    with pytest.raises(OptionError, match="is empty"):
        index.search(text=" ", embedder=same)


def test_queries_that_cannot_be_are_refused(tmp_path):
    index = Index.open(write_file(tmp_path / "a.parquet", unit_vectors(20, 16)))
    one = np.ones(16)
    for values, message in (
        ({}, "nothing given"),
        ({"embedding": one, "text": "x"}, "embedding and text given"),
        ({"embedding": np.ones(15)}, r"shape \[15\].*have 16 numbers"),
        ({"embedding": np.zeros(16)}, "length 0"),
        ({"embedding": one * np.nan}, "not finite"),
        ({"embedding": one, "top": 0}, "top is 0"),
        ({"embedding": one, "threads": 0}, "threads is 0"),
    ):
        with pytest.raises(OptionError, match=message):
            index.search(**values)


def test_files_of_several_models_are_refused_together(tmp_path):
    write_file(tmp_path / "a.parquet", unit_vectors(9, 16))
    write_file(tmp_path / "b.parquet", unit_vectors(9, 16), model_hash="b" * 64, model="b@bbbbbbbbbbbb")
    write_file(tmp_path / "c.parquet", unit_vectors(9, 8), model_hash="d" * 64, model="d@dddddddddddd")
    (tmp_path / "e.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(
        OptionError, match=r"(?s)e.parquet.*a.parquet: clip@.*b.parquet: b@b.*c.parquet: d@d.*8 numbers"
    ):
        Index.open(tmp_path)


def test_what_is_no_embeddings_is_refused(tmp_path):
    with pytest.raises(OptionError, match=r"nowhere\.parquet does not exist"):
        Index.open(tmp_path / "nowhere.parquet")
    with pytest.raises(OptionError, match=r"folder without \.parquet files"):
        Index.open(tmp_path)
    with pytest.raises(OptionError, match="at least one"):
        Index.open()


def test_damage_is_an_error_that_names_the_file(tmp_path):
    whole = write_file(tmp_path / "a.parquet", unit_vectors(900, 64))
    index = Index.open(whole)
    content = whole.read_bytes()
    truncate(whole, 0.5)
    with pytest.raises(OptionError, match=r"a\.parquet was changed since it was opened"):
        index.search(np.ones(64))
    with pytest.raises(OptionError, match=r"a\.parquet"):
        Index.open(whole)
    whole.write_bytes(content)
    index = Index.open(whole)
    file = index.files[0]
    place = parquet.ParquetFile(whole).metadata.row_group(4).column(file._leaf[0]).data_page_offset
    whole.write_bytes(content[:place] + b"\xff" * 40 + content[place + 40 :])
    with pytest.raises(OptionError, match=r"a\.parquet is damaged in row group 4"):
        Index.open(whole).search(np.ones(64), threads=2)


def test_a_file_that_ends_while_it_is_read_is_an_error(tmp_path):
    path = write_file(tmp_path / "a.parquet", unit_vectors(300, 64))
    file = SearchFile.open(path)
    for group in range(3):
        file._find(group)
    truncate(path, 0.2)
    with pytest.raises(OptionError, match=r"a\.parquet is damaged in row group 2: the file ends early"):
        list(file.blocks(2))


def test_rows_that_filters_leave_out_are_not_found(tmp_path):
    vectors = unit_vectors(700, 16)
    clouds = [None if k % 11 == 0 else (k % 10) / 10 for k in range(700)]
    index = Index.open(write_file(tmp_path / "a.parquet", vectors, missing=[25, 35], cloud_fraction=clouds))
    allowed = np.array([cloud is not None and cloud <= 0.2 for cloud in clouds])
    allowed[[25, 35]] = False
    query = unit_vectors(1, 16, 9)[0]
    rows, _ = brute_force(vectors, query, allowed, 1000)
    hits = index.search(query, top=1000, filters=Filters(max_cloud=0.2))
    assert rows_of(hits) == rows.tolist()
    assert index.search(query, filters=Filters(where="row = 12345")) == []


def test_rows_that_take_no_room_in_the_file_are_not_believed(tmp_path, monkeypatch):
    monkeypatch.setattr("rsedge.runtime.search.search_file._FREE_ROWS", 10)
    few = write_file(tmp_path / "a.parquet", unit_vectors(1, 4), missing=[0])
    table = parquet.read_table(few).take(pa.array(np.zeros(200_000, np.int64)))
    parquet.write_table(table, tmp_path / "b.parquet", compression="zstd")
    assert (tmp_path / "b.parquet").stat().st_size < 200_000
    assert Index.open(few).rows == 1
    with pytest.raises(OptionError, match="claims 200000 rows in"):
        Index.open(tmp_path / "b.parquet")


@pytest.mark.parametrize(
    "header", [b"\x1c" * 1024, b"\x15\x06\x25\x00\x55\x02\x00", b"\x15\x06\x21\x5c\x15\x02\x11\x00\x00"]
)
def test_a_page_header_of_other_types_is_left_to_pyarrow(header):
    chunk = SimpleNamespace(
        compression="UNCOMPRESSED", has_dictionary_page=False, physical_type="FLOAT", data_page_offset=4,
        total_compressed_size=2**50,
    )  # fmt: skip
    metadata = SimpleNamespace(row_group=lambda _: SimpleNamespace(num_rows=1, column=lambda _: chunk))
    assert find_pieces(io.BytesIO(b"PAR1" + header), metadata, 1, 0, 0, 8) is None


@pytest.mark.parametrize("fields", [(2**40, 2**40, 2**40), (0, 0, -5), (8, -1, 1), (0, 0, 0)])
def test_a_page_that_claims_other_rows_than_its_group_is_left_to_pyarrow(fields):
    def number(value):
        value = value << 1 ^ value >> 63
        content = b""
        while value > 127:
            content, value = content + bytes([value & 127 | 128]), value >> 7
        return content + bytes([value])

    page = b"".join(b"\x15" + number(value) for value in (*fields, 0, 0, 0)) + b"\0"
    header = b"\x15" + number(3) + b"\x15\0\x15\0" + b"\x5c" + page + b"\0"
    chunk = SimpleNamespace(
        compression="UNCOMPRESSED", has_dictionary_page=False, physical_type="FLOAT", data_page_offset=4,
        total_compressed_size=2**50,
    )  # fmt: skip
    group = SimpleNamespace(num_rows=1, column=lambda _: chunk)
    metadata = SimpleNamespace(row_group=lambda _: group)
    assert find_pieces(io.BytesIO(b"PAR1" + header), metadata, 1, 0, 0, 8) is None


def _repeated(path: Path, rows: int, **columns: Any) -> Path:
    """A file of few bytes: every row has the same embedding, and the dictionary of a column one long text."""
    return write_file(
        path, np.tile(np.eye(8, dtype=np.float32)[:1], (rows, 1)), plain=False, group_rows=rows, **columns
    )


@pytest.mark.parametrize("where", [None, "scene != 'a'"])
@pytest.mark.parametrize("column", ["scene", "geometry"])
def test_long_texts_are_refused_before_they_are_repeated(tmp_path, column, where):
    if column == "geometry" and where:
        pytest.skip("no filter reads geometries without a box")
    long = b"\0" * 70_000 if column == "geometry" else "x" * 70_000
    path = _repeated(tmp_path / "a.parquet", 600, **{column: [long] * 600})
    assert path.stat().st_size < 30_000
    with pytest.raises(OptionError, match="a text has 70000 bytes, and at most 65536 are read"):
        Index.open(path).search(np.eye(8, dtype=np.float32)[0], filters=Filters(where=where) if where else None)


def test_embeddings_that_unpack_to_much_are_refused(tmp_path, monkeypatch):
    path = _repeated(tmp_path / "a.parquet", 10_000)
    monkeypatch.setattr(search_file, "_FREE_BYTES", 10_000)
    with pytest.raises(OptionError, match="bytes of embedding"):
        Index.open(path)


def test_a_time_beyond_all_calendars_is_damage(tmp_path):
    moments = pa.array([2**60] * 4, pa.timestamp("ms", tz="UTC"))
    path = write_file(tmp_path / "a.parquet", np.eye(8, dtype=np.float32)[:4], datetime=moments)
    with pytest.raises(OptionError, match="damaged"):
        Index.open(path).search(np.eye(8, dtype=np.float32)[0])


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "p.parquet")
    with pytest.raises(OptionError, match="no regular file"):
        SearchFile.open(tmp_path / "p.parquet")
