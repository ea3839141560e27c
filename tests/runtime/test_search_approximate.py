from __future__ import annotations

import os
import sys

import numpy as np
import pytest

from rsedge.errors import BackendError, OptionError
from rsedge.runtime.search import approximate
from rsedge.runtime.search import index as index_module
from rsedge.runtime.search.filters import Filters
from rsedge.runtime.search.index import Index
from tests.runtime.search_files import unit_vectors, write_file

faiss = pytest.importorskip("faiss")


def clustered(rows: int, dim: int = 32, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    centres = random.standard_normal((40, dim))
    vectors = centres[random.integers(0, 40, rows)] + 0.5 * random.standard_normal((rows, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype("float16")


@pytest.fixture
def path(tmp_path):
    return write_file(tmp_path / "a.parquet", clustered(4000), missing=range(50, 90), group_rows=1000)


def test_it_finds_nearly_all_that_an_exact_search_finds_with_the_same_scores(path):
    index = Index.open(path)
    assert [made.name for made in index.build_approximate()] == ["a.parquet.index"]
    assert index.measure_recall(top=10, queries=40) > 0.95
    query = clustered(1, seed=3)[0]
    exact = {hit.row: hit for hit in index.search(query, approximate=False, top=30)}
    found = index.search(query, approximate=True)
    assert [hit.score for hit in found] == sorted((hit.score for hit in found), reverse=True)
    for hit in found:
        if hit.row in exact:
            assert hit.score == exact[hit.row].score
    tile = index.search(tile=("a", 0, 7), approximate=True, top=3)
    assert tile == index.search(tile=("a", 0, 7), approximate=False, top=3)


def test_it_is_opened_again_and_made_the_same_each_time(path):
    (made,) = Index.open(path).build_approximate(cells=16)
    first = made.read_bytes()
    query = clustered(1, seed=3)[0]
    hits = Index.open(path).search(query, approximate=True)
    assert Index.open(path).search(query, approximate=True) == hits
    Index.open(path).build_approximate(cells=16)
    assert made.read_bytes() == first


def test_filters_hold_in_the_index_too(path, monkeypatch):
    index = Index.open(path)
    index.build_approximate()
    query, filters = clustered(1, seed=3)[0], Filters(where="row < 150")
    few = index.search(query, approximate=True, filters=filters)
    assert few == index.search(query, approximate=False, filters=filters), "few rows are all compared"
    monkeypatch.setattr(index_module, "_FEW_ROWS", 0)
    found = index.search(query, approximate=True, filters=filters)
    assert len({hit.row for hit in found} & {hit.row for hit in few}) > 15
    assert all(hit.record.row < 150 for hit in found)


def test_an_index_of_another_state_of_the_file_is_refused_with_the_remedy(path):
    index = Index.open(path)
    with pytest.raises(OptionError, match=r"has no index a\.parquet\.index: make it with rsedge search --build-index"):
        index.search(np.ones(32), approximate=True)
    (made,) = index.build_approximate()
    content = made.read_bytes()
    made.write_bytes(content[:2000])
    with pytest.raises(OptionError, match="cannot be read as an index"):
        Index.open(path).search(np.ones(32), approximate=True)
    made.write_bytes(b"something else")
    with pytest.raises(OptionError, match="does not begin as one"):
        Index.open(path).search(np.ones(32), approximate=True)
    made.write_bytes(content)
    os.utime(path, ns=(1, 1))
    with pytest.raises(OptionError, match=r"out of date.*another mtime_ns.*--build-index"):
        Index.open(path).search(np.ones(32), approximate=True)
    write_file(path, clustered(4000), model_hash="e" * 64)
    with pytest.raises(OptionError, match=r"another.*model_hash"):
        Index.open(path).search(np.ones(32), approximate=True)


def test_large_files_use_an_index_unasked_if_it_is_good(path, monkeypatch, caplog):
    index, used = Index.open(path), []
    index.build_approximate()
    real = approximate.Approximate.candidates
    monkeypatch.setattr(approximate.Approximate, "candidates", lambda *a, **k: used.append(1) or real(*a, **k))
    index.search(np.ones(32))
    assert not used, "a small file is searched exactly"
    monkeypatch.setattr(approximate, "WORTHWHILE_ROWS", 1000)
    index.search(np.ones(32))
    assert used
    index.search(np.ones(32), approximate=False)
    assert len(used) == 1
    os.utime(path, ns=(1, 1))
    assert Index.open(path).search(np.ones(32))
    assert len(used) == 1
    assert "searching exactly" in caplog.text


def test_without_faiss_the_extra_is_named(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(BackendError, match=r"rsedge\[search\]"):
        Index.open(path).build_approximate()


def test_what_cannot_be_indexed_is_refused(tmp_path):
    index = Index.open(write_file(tmp_path / "a.parquet", unit_vectors(5, 4), missing=range(5)))
    with pytest.raises(OptionError, match="holds no embeddings"):
        index.build_approximate()
    with pytest.raises(OptionError, match="cells is 9"):
        index.build_approximate(cells=9)
    tiny = Index.open(write_file(tmp_path / "b.parquet", unit_vectors(5, 4)))
    tiny.build_approximate()
    assert len(tiny.search(np.ones(4), approximate=True)) == 5
