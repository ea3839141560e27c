"""Embeddings as directions. NumPy only."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsedge.errors import OptionError

Floats = NDArray[np.floating[Any]]


def unit_rows(vectors: Floats, what: str) -> NDArray[np.float32]:
    """Each row over its length, float32.

    Args:
        vectors: Float [N, D].
        what: What they are embeddings of, for the message.

    Raises:
        OptionError: A row is zero or not finite: no direction, hence no similarity.
    """
    values = np.asarray(vectors, np.float64)
    length = np.linalg.norm(values, axis=-1, keepdims=True)
    if bad := np.flatnonzero(~(np.isfinite(length) & (length > 0))).tolist():
        raise OptionError(
            f"{len(bad)} of {len(values)} {what} embeddings are zero or not finite, the first is number {bad[0]}: "
            "the model is broken, or overflows in this precision"
        )
    return np.asarray(values / length, np.float32)
