"""Search files of embeddings for the tiles most similar to a text, an image, a tile, or any embedding.

An exact search compares every stored embedding once, in constant memory. Products in float32 find candidates, with a
margin above any error of float32, and candidates are compared again in float64, row by row. So the order is that of the
stored numbers: it depends neither on threads nor on where a block began, and equal embeddings rank in the order of
files and rows.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rsedge.errors import OptionError
from rsedge.host import usable_cores
from rsedge.runtime.search import approximate as ann
from rsedge.runtime.search.filters import Filters, RowFilter
from rsedge.runtime.search.hits import Hit, read_records
from rsedge.runtime.search.search_file import SearchFile, block_rows

if TYPE_CHECKING:
    from rsedge.runtime.outputs.geoparquet import EmbeddingsInfo
    from rsedge.runtime.outputs.records import TileRecord

Float64 = NDArray[np.float64]
Stored = NDArray[np.float16] | NDArray[np.float32]

_log = logging.getLogger("rsedge")

_FEW_ROWS = 100_000
"""Where filters leave no more than these, comparing them all is as fast as an index, and exact."""
_CANDIDATES, _FEWEST_CANDIDATES = 20, 400
"""Candidates of an approximate search that are compared exactly, per tile wanted and at least."""


_HALF_SCALE = 2.0**112
_HALF_BITS = np.int32(0x8FFFE000 - 2**32)  # where the sign, exponent and fraction of a float16 lie in a float32


class QueryEmbedder(Protocol):
    """What turns texts and images into queries: an :class:`rsedge.runtime.embedder.Embedder`."""

    model: str
    hash: str

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """float32 [B, D] of unit length."""

    def embed_images(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """float32 [B, D] of unit length for uint8 [B, H, W, 3]."""


class Index:
    """Files of embeddings by one model, searched together. Made by :meth:`open`; may be searched by several threads.

    Attributes:
        files: In the order of their paths; equal scores rank in the order of files and rows.
        info: Description of the embeddings, common to all.
        rows: Tiles in all of them, those without an embedding included.
    """

    def __init__(self, files: Sequence[SearchFile]) -> None:
        self.files = tuple(files)
        self.info: EmbeddingsInfo = self.files[0].info
        self._starts = np.concatenate([[0], np.cumsum([file.rows for file in self.files], dtype=np.int64)])
        self.rows = int(self._starts[-1])
        self._indexes: dict[Path, ann.Approximate] = {}

    @classmethod
    def open(cls, *paths: str | os.PathLike[str]) -> Index:
        """Files of embeddings, and folders of them (``*.parquet``, not in folders below).

        Raises:
            OptionError: Something is missing, damaged, or no file of embeddings, or the files are of several models;
                everything that is wrong is listed.
        """
        problems: list[str] = []
        found: dict[Path, None] = {}
        for name in paths:
            path = Path(name)
            inside = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
            if not inside:
                problems.append(f"{path} is a folder without .parquet files: make one with rsedge embed")
            found.update(dict.fromkeys(inside))
        files = []
        for path in found:
            try:
                files.append(SearchFile.open(path))
            except OptionError as error:  # noqa: PERF203 - a try per file
                problems.append(str(error))
        if len({(file.info.model_hash, file.info.dim) for file in files}) > 1:
            made = "".join(f"\n  - {f.path}: {f.info.model}, {f.info.dim} numbers" for f in files)
            problems.append(f"embeddings of different models cannot be compared: search those of one model{made}")
        unfit = [file for file in files if not file.info.normalized]
        problems += [f"{file.path} holds embeddings that are not of unit length: embed again" for file in unfit]
        if problems:
            raise OptionError("\n".join(problems))
        if not files:
            raise OptionError("no file of embeddings was given: pass at least one")
        return cls(files)

    def search(
        self,
        embedding: NDArray[Any] | None = None,
        *,
        text: str | None = None,
        image: NDArray[np.uint8] | None = None,
        tile: tuple[str, int, int] | None = None,
        embedder: QueryEmbedder | None = None,
        top: int = 20,
        filters: Filters | None = None,
        approximate: bool | None = None,
        threads: int | None = None,
    ) -> list[Hit]:
        """The tiles most similar to one query, best first; fewer than ``top`` where there are no more.

        Args:
            embedding: Query [D], of any length but 0.
            text: Query by words; needs ``embedder``.
            image: Query by pixels, uint8 [H, W, 3]; needs ``embedder``.
            tile: Query by scene name, row and column of a tile in these files, which itself is no hit.
            embedder: The model that made the embeddings.
            top: How many.
            filters: Which tiles to look at; None looks at all.
            approximate: Use the indexes made by :meth:`build_approximate`, or not; None uses those of large files
                that have one.
            threads: Of an exact search; None takes the cores this process may use.

        Raises:
            OptionError: Not exactly one query, one that does not fit the files, a value that is not accepted, or a
                file that is damaged.
            BackendError: ``approximate`` without FAISS.
        """
        queries = {"embedding": embedding, "text": text, "image": image, "tile": tile}
        given = [name for name, value in queries.items() if value is not None]
        if len(given) != 1:
            raise OptionError(f"{' and '.join(given) or 'nothing'} given: give one of embedding, text, image, tile")
        own = None
        if tile is not None:
            own, query = self._tile(*tile)
        elif embedding is not None:
            query = np.asarray(embedding)
        else:
            query = self._embed(text, image, embedder)
        scores, positions = self.nearest(
            query[None] if query.ndim == 1 else query,
            top=top if own is None else top + 1,
            filters=filters,
            approximate=approximate,
            threads=threads,
        )[0]
        others = positions != (-1 if own is None else own)
        places = [self.locate(position) for position in positions[others][:top].tolist()]
        records: dict[tuple[Path, int], tuple[TileRecord, str | None]] = {}
        for file in dict.fromkeys(file for file, _ in places):
            rows = [row for other, row in places if other is file]
            records.update(zip([(file.path, row) for row in rows], read_records(file, rows), strict=True))
        hits = []
        for rank, (score, (file, row)) in enumerate(zip(scores[others][:top].tolist(), places, strict=True), 1):
            # Stored in 16 bits, embeddings may be a little longer than 1.
            cosine = round(min(1.0, max(-1.0, score)), 6) + 0.0
            record, path = records[file.path, row]
            hits.append(Hit(rank, cosine, record, path, str(file.path), row))
        return hits

    def nearest(
        self,
        queries: NDArray[Any],
        *,
        top: int,
        filters: Filters | None = None,
        approximate: bool | None = None,
        threads: int | None = None,
    ) -> list[tuple[Float64, NDArray[np.int64]]]:
        """The nearest tiles of many queries [Q, D] in one pass, without their records; options as in :meth:`search`.

        Returns:
            Per query the cosines float64 [n], descending, and positions int64 [n]: rows counted through all files, see
            :meth:`locate`.

        Raises:
            OptionError: See :meth:`search`.
            BackendError: ``approximate`` without FAISS.
        """
        queries = np.asarray(queries)
        if queries.ndim != 2 or queries.shape[1] != self.info.dim or not len(queries):
            raise OptionError(
                f"a query of shape {list(queries.shape[-1:] if queries.ndim == 2 else queries.shape)} was given, these "
                f"embeddings by {self.info.model} have {self.info.dim} numbers"
            )
        wide = queries.astype(np.float64)
        length = np.linalg.norm(wide, axis=1, keepdims=True)
        if not (np.isfinite(length) & (length > 0)).all():
            raise OptionError("a query has length 0 or numbers that are not finite: nothing is similar to it")
        unit = wide / length
        if top < 1:
            raise OptionError(f"top is {top}, expected at least 1")
        if threads is not None and threads < 1:
            raise OptionError(f"threads is {threads}, expected at least 1")
        for file in self.files:
            file.check_unchanged()
        chosen = filters if filters is not None else Filters()
        rows = [RowFilter(file, chosen) for file in self.files]
        indexes = self._choose(approximate)
        if indexes:
            return self._probe(indexes, unit, top, rows if chosen else None, threads)
        return self._scan(unit, top, lambda file, group: rows[file].mask(group), threads)

    def locate(self, position: int) -> tuple[SearchFile, int]:
        """The file and the row in it of a position."""
        number = int(np.searchsorted(self._starts, position, side="right")) - 1
        return self.files[number], position - int(self._starts[number])

    def build_approximate(
        self, *, cells: int | None = None, progress: Callable[[int, int], None] | None = None
    ) -> list[Path]:
        """Make an approximate index beside each file; see :func:`rsedge.runtime.search.approximate.build`."""
        self._indexes.clear()
        return [ann.build(file, cells=cells, progress=progress) for file in self.files]

    def measure_recall(self, *, top: int = 20, queries: int = 100, seed: int = 0) -> float:
        """Share of the exactly nearest tiles that the approximate indexes find, 0 to 1, for tiles drawn as queries.

        Raises:
            OptionError: See :meth:`search`; or there are no embeddings.
            BackendError: FAISS is not installed.
        """
        if queries < 1:
            raise OptionError(f"queries is {queries}, expected at least 1")
        drawn = np.random.default_rng(seed).choice(self.rows, min(queries, self.rows), replace=False)
        vectors = []
        for number, file in enumerate(self.files):
            inside = drawn[(drawn >= self._starts[number]) & (drawn < self._starts[number + 1])]
            vectors.append(file.vectors(inside - self._starts[number])[0].astype(np.float32))
        sample = np.concatenate(vectors)
        sample = sample[np.isfinite(sample).all(axis=1) & (sample != 0).any(axis=1)]
        if not len(sample):
            raise OptionError("no embeddings were drawn to measure recall with: draw more, or embed more tiles")
        exact = self.nearest(sample, top=top, approximate=False)
        found = self.nearest(sample, top=top, approximate=True)
        shares = [len(np.intersect1d(a[1], b[1])) / len(a[1]) for a, b in zip(exact, found, strict=True)]
        return float(np.mean(shares))

    def _embed(
        self, text: str | None, image: NDArray[np.uint8] | None, embedder: QueryEmbedder | None
    ) -> NDArray[np.float32]:
        if embedder is None:
            kind = "image" if text is None else "text"
            raise OptionError(
                f"a {kind} as query needs the model of these embeddings: pass the bundle {self.info.model}"
            )
        self.check_model(embedder)
        if text is None:
            return np.asarray(embedder.embed_images(np.asarray(image)[None])[0])
        if not text.strip():
            raise OptionError("the text to search for is empty: give some words")
        return np.asarray(embedder.embed_texts([text])[0])

    def check_model(self, embedder: QueryEmbedder) -> None:
        """Refuse a model other than the one that made the embeddings.

        Raises:
            OptionError: It is another; names both.
        """
        if embedder.hash != self.info.model_hash:
            raise OptionError(
                f"the query's model is {embedder.model} (hash {embedder.hash}), but the embeddings in "
                f"{self.files[0].path} are by {self.info.model} (hash {self.info.model_hash}): they cannot be "
                "compared; search with that bundle, or embed again with this one"
            )

    def _tile(self, scene: str, row: int, col: int) -> tuple[int, NDArray[Any]]:
        """Position and embedding of a tile."""
        quoted = scene.replace("'", "''")
        wanted = Filters(where=f"scene = '{quoted}' and \"row\" = {int(row)} and col = {int(col)}")
        found: list[tuple[int, NDArray[Any]]] = []
        without = 0
        for number, file in enumerate(self.files):
            wanted_rows = np.flatnonzero(_whole_mask(file, RowFilter(file, wanted)))
            vectors, present = file.vectors(wanted_rows)
            without += len(wanted_rows) - len(present)
            found += zip((present + self._starts[number]).tolist(), vectors, strict=True)
        name = f"{scene}:{row}:{col}"
        if not found:
            reason = "has no embedding: it holds too little data" if without else "is not in these files"
            raise OptionError(f"tile {name} {reason}; give another as SCENE:ROW:COL")
        if len(found) > 1:
            places = [self.locate(at) for at, _ in found]
            listed = ", ".join(f"{file.path} row {at}" for file, at in places)
            raise OptionError(f"tile {name} is there {len(found)} times ({listed}): search fewer files")
        return found[0]

    def _choose(self, approximate: bool | None) -> list[ann.Approximate]:
        """The indexes to use; none for an exact search."""
        if approximate is False or (
            approximate is None
            and (self.rows < ann.WORTHWHILE_ROWS or not all(ann.index_path(file).exists() for file in self.files))
        ):
            return []
        try:
            for file in self.files:
                if file.path not in self._indexes:
                    self._indexes[file.path] = ann.Approximate.open(file)
        except OptionError as error:
            if approximate:
                raise
            _log.warning("Warning: searching exactly: %s", error)
            return []
        return [self._indexes[file.path] for file in self.files]

    def _probe(
        self,
        indexes: Sequence[ann.Approximate],
        unit: Float64,
        top: int,
        filters: Sequence[RowFilter] | None,
        threads: int | None,
    ) -> list[tuple[Float64, NDArray[np.int64]]]:
        """Candidates from the indexes, compared exactly."""
        keeps: list[NDArray[np.bool_] | None] = [None] * len(self.files)
        if filters is not None:
            keeps = [_whole_mask(file, rows) for file, rows in zip(self.files, filters, strict=True)]
            if sum(int(keep.sum()) for keep in keeps if keep is not None) <= _FEW_ROWS:

                def mask(number: int, group: int) -> NDArray[np.bool_] | None:
                    keep, starts = keeps[number], self.files[number].starts
                    return None if keep is None else keep[starts[group] : starts[group + 1]]

                return self._scan(unit, top, mask, threads)
        wanted, found = max(_CANDIDATES * top, _FEWEST_CANDIDATES), []
        for query in unit:
            best = Nearest(query[None], top)
            for place, (file, index) in enumerate(zip(self.files, indexes, strict=True)):
                vectors, present = file.vectors(index.candidates(query, wanted, keep=keeps[place]))
                scorer = Scorer(query[None], file.dtype, max(1, len(present)))
                best.offer(scorer(vectors), vectors, present + self._starts[place])
            found += best.found()
        return found

    def _scan(
        self, unit: Float64, top: int, mask: Callable[[int, int], NDArray[np.bool_] | None], threads: int | None
    ) -> list[tuple[Float64, NDArray[np.int64]]]:
        """Compare every embedding; threads take row groups in turn."""
        work = [(number, group) for number, file in enumerate(self.files) for group in range(file.groups)]
        taken, stopped = count(), threading.Event()

        def run() -> Nearest:
            best = Nearest(unit, top)
            scorers: dict[np.dtype[Any], Scorer] = {}
            try:
                while (turn := next(taken)) < len(work) and not stopped.is_set():
                    number, group = work[turn]
                    file, keep = self.files[number], mask(number, group)
                    if keep is not None and not keep.any():
                        continue
                    if file.dtype not in scorers:
                        rows = block_rows(file.info.dim, file.dtype.itemsize)
                        scorers[file.dtype] = Scorer(unit, file.dtype, rows)
                    for vectors, rows_found in file.blocks(group, keep):
                        best.offer(scorers[file.dtype](vectors), vectors, rows_found + self._starts[number])
            except BaseException:
                stopped.set()
                raise
            return best

        workers = max(1, min(threads or usable_cores(), len(work)))
        if workers == 1:
            return run().found()
        with ThreadPoolExecutor(workers, thread_name_prefix="rsedge-search") as pool:
            futures = [pool.submit(run) for _ in range(workers)]
            return Nearest(unit, top).merge(future.result() for future in futures).found()


def _whole_mask(file: SearchFile, rows: RowFilter) -> NDArray[np.bool_]:
    """Which rows of a file pass, bool [rows]."""
    parts = [rows.mask(group) for group in range(file.groups)]
    whole = [np.ones(file.group_rows(g), np.bool_) if part is None else part for g, part in enumerate(parts)]
    return np.concatenate(whole) if whole else np.empty(0, np.bool_)


class Scorer:
    """Similarities of stored embeddings to queries float64 [Q, D] of unit length, for one thread.

    float16 becomes float32 by moving its bits: sign-extended, shifted by 13 and masked they are the float32 of 2^-112
    times the value, the smallest numbers included, and the query is multiplied by 2^112 instead. NumPy's own
    conversion takes eight times as long. ``rows`` are the most embeddings at a time.
    """

    def __init__(self, queries: Float64, dtype: np.dtype[np.float16] | np.dtype[np.float32], rows: int) -> None:
        self._half = dtype == np.float16 and sys.byteorder == "little"
        self._queries = np.ascontiguousarray((queries * (_HALF_SCALE if self._half else 1)).astype(np.float32))
        self._wide = np.empty((rows, queries.shape[1]), np.int32)

    def __call__(self, vectors: Stored) -> NDArray[np.float32]:
        """Products float32 [N, Q] with ``vectors`` [N, D]; what is not finite there gives any value."""
        if self._half:
            bits = self._wide[: len(vectors)]
            np.copyto(bits, vectors.view(np.int16))
            np.left_shift(bits, 13, out=bits)
            np.bitwise_and(bits, _HALF_BITS, out=bits)
            wide = bits.view(np.float32)
        else:
            wide = vectors.astype(np.float32, copy=False)
        if len(self._queries) == 1:
            # A product per row: BLAS would start its threads for each block, beside ours.
            single: NDArray[np.float32] = np.matmul(wide[:, None, :], self._queries[0][:, None])[:, :, 0]
            return single
        return wide @ self._queries.T


class Nearest:
    """The ``top`` best of what has been offered so far, for each of the queries float64 [Q, D] of unit length."""

    def __init__(self, queries: Float64, top: int) -> None:
        self._queries, self._top = queries, top
        # A sum of D products is off by at most D roundings of the whole; the query's own rounding and embeddings
        # slightly above unit length (float16) are the rest.
        self._margin = (queries.shape[1] + 8) * 2.0**-23
        self._scores: list[Float64] = [np.empty(0) for _ in queries]
        self._positions: list[NDArray[np.int64]] = [np.empty(0, np.int64) for _ in queries]

    def offer(self, products: NDArray[np.float32], vectors: Stored, positions: NDArray[np.int64]) -> None:
        """Keep what is among the best of a block ``vectors`` [N, D], with ``products`` float32 [N, Q] of a scorer.

        ``positions`` int64 [N] name its rows; ascending numbers win where scores are equal.
        """
        for number in range(len(self._queries)):
            column = products[:, number]
            full = len(self._scores[number]) == self._top
            floor = self._scores[number][-1] - self._margin if full else -np.inf
            near = column >= floor
            if not near.any():
                continue
            found = np.flatnonzero(near)
            if len(found) > 4 * self._top:  # those of this block alone set a higher floor
                least = np.partition(column[found], len(found) - self._top)[len(found) - self._top]
                found = found[column[found] >= least - 2 * self._margin]
            # Row by row in float64: the score of a row does not depend on its neighbours.
            with np.errstate(invalid="ignore", over="ignore"):
                scores = (vectors[found].astype(np.float64) * self._queries[number]).sum(axis=1)
            finite = np.isfinite(scores)
            self._keep(number, scores[finite], positions[found][finite])

    def _keep(self, number: int, scores: Float64, positions: NDArray[np.int64]) -> None:
        scores = np.concatenate([self._scores[number], scores])
        positions = np.concatenate([self._positions[number], positions])
        order = np.lexsort((positions, -scores))[: self._top]
        self._scores[number], self._positions[number] = scores[order], positions[order]

    def found(self) -> list[tuple[Float64, NDArray[np.int64]]]:
        """Per query the scores float64 [n], descending, and positions int64 [n]."""
        return list(zip(self._scores, self._positions, strict=True))

    def merge(self, others: Iterable[Nearest]) -> Nearest:
        """Take what others have found; gives itself."""
        for other in others:
            for number in range(len(self._queries)):
                self._keep(number, other._scores[number], other._positions[number])
        return self
