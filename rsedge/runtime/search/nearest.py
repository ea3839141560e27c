"""Exact nearest neighbours: every stored embedding is compared once, in constant memory.

Products are taken in float32 to find candidates, with a margin above anything float32 can be wrong by, and candidates
are compared again in float64, row by row. So the order is that of the stored numbers: it depends neither on threads
nor on where a block began, and equal embeddings rank in the order of files and rows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Stored = NDArray[np.float16] | NDArray[np.float32]

BLOCK_BYTES = 2**21
"""Embeddings compared at a time: with what they become in float32 they stay in the cache."""

_HALF_SCALE = 2.0**112
_HALF_BITS = np.int32(0x8FFFE000 - 2**32)  # where the sign, exponent and fraction of a float16 lie in a float32


class Scorer:
    """Similarities of stored embeddings to queries, with buffers of its own; belongs to one thread.

    float16 becomes float32 by moving its bits: sign-extended, shifted by 13 and masked they are the float32 of 2^-112
    times the value, the smallest numbers included, and the query is multiplied by 2^112 instead. NumPy's own
    conversion takes eight times as long.

    Args:
        queries: float64 [Q, D] of unit length.
        dtype: float16 or float32, what is stored.
        rows: Embeddings at a time, at most.
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
    """The best of what has been offered so far, for each of several queries.

    Args:
        queries: float64 [Q, D] of unit length.
        top: How many to keep for each.

    Attributes:
        scores: Per query float64 [n], descending.
        positions: Per query int64 [n].
    """

    def __init__(self, queries: Float64, top: int) -> None:
        self._queries, self._top = queries, top
        # A sum of D products is off by at most D roundings of the whole; the query's own rounding and embeddings
        # slightly above unit length (float16) are the rest.
        self._margin = (queries.shape[1] + 8) * 2.0**-23
        self.scores: list[Float64] = [np.empty(0) for _ in queries]
        self.positions: list[NDArray[np.int64]] = [np.empty(0, np.int64) for _ in queries]

    def offer(self, products: NDArray[np.float32], vectors: Stored, positions: NDArray[np.int64]) -> None:
        """Take what is among the best of a block.

        Args:
            products: float32 [N, Q] by a :class:`Scorer`.
            vectors: The block itself, [N, D].
            positions: int64 [N], what to call them; ascending numbers win where scores are equal.
        """
        for number in range(len(self._queries)):
            column = products[:, number]
            full = len(self.scores[number]) == self._top
            floor = self.scores[number][-1] - self._margin if full else -np.inf
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
        scores = np.concatenate([self.scores[number], scores])
        positions = np.concatenate([self.positions[number], positions])
        order = np.lexsort((positions, -scores))[: self._top]
        self.scores[number], self.positions[number] = scores[order], positions[order]

    def merge(self, others: Iterable[Nearest]) -> Nearest:
        """Take what others have found; gives itself."""
        for other in others:
            for number in range(len(self._queries)):
                self._keep(number, other.scores[number], other.positions[number])
        return self


def block_rows(dim: int, itemsize: int) -> int:
    """Embeddings in a block."""
    return max(1, BLOCK_BYTES // (dim * itemsize))
