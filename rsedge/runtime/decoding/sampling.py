"""Drawing a token: temperature, top-k and top-p as transformers filters them, and draws that do not depend on company.

Each draw comes from a counter-based generator (Philox) keyed by the seed and the image's key, with the position in the
caption as its counter. So an image's caption is the same in whatever batch, order or thread it is decoded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rsedge.runtime.decoding.options import DecodingOptions

# Enough of the most likely tokens that a top-p filter seldom needs the whole vocabulary sorted.
_HEAD = 512


def filtered(logits: NDArray[np.float32], options: DecodingOptions) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The distribution that is drawn from.

    Args:
        logits: float32 [V], repetition and length rules already applied; −inf rules a token out.
        options: ``temperature``, ``top_k`` and ``top_p``.

    Returns:
        The tokens that can be drawn, ascending, and their probabilities, which sum to 1.
    """
    scaled = logits.astype(np.float64) / options.temperature
    keep = np.arange(len(scaled))
    if 0 < options.top_k < len(scaled):
        keep = np.flatnonzero(scaled >= np.partition(scaled, -options.top_k)[-options.top_k])
    weights = np.exp(scaled[keep] - scaled[keep].max())
    weights /= weights.sum()
    if options.top_p < 1:
        head = _nucleus(weights, options.top_p)
        keep, weights = keep[head], weights[head]
        weights /= weights.sum()
    possible = weights > 0
    return keep[possible], weights[possible]


def _nucleus(weights: NDArray[np.float64], top_p: float) -> NDArray[np.int64]:
    """Indices, ascending, of the fewest most likely tokens that hold at least ``top_p``."""
    order: NDArray[np.int64] = np.arange(len(weights))
    if len(weights) > _HEAD:
        head = np.argpartition(-weights, _HEAD)[:_HEAD]
        if weights[head].sum() >= top_p:
            order = np.sort(head)
    order = order[np.argsort(-weights[order], kind="stable")]
    before = np.cumsum(weights[order]) - weights[order]
    return np.sort(order[(before < top_p) | (np.arange(len(order)) == 0)])


def draw(logits: NDArray[np.float32], options: DecodingOptions, *, key: int, position: int) -> int:
    """One token from the filtered distribution.

    Args:
        logits: float32 [V].
        options: The filter and the seed.
        key: The image's key, 0 to 2**64 − 1.
        position: The token's position in the caption, from 0.
    """
    tokens, weights = filtered(logits, options)
    # Inverting the cumulative sum in order of id, not of likelihood: two tokens of nearly equal likelihood then do not
    # trade places with the last bit of a logit.
    edges = np.cumsum(weights)
    chosen = np.searchsorted(edges, uniform(options.seed, key, position) * edges[-1], side="right")
    return int(tokens[min(int(chosen), len(tokens) - 1)])


def uniform(seed: int, key: int, position: int) -> float:
    """The draw in [0, 1) of an image's key at a position, the same for ever."""
    bits = np.random.Philox(key=[seed, key], counter=[position, 0, 0, 0]).random_raw()
    return (int(bits) >> 11) * 2.0**-53
