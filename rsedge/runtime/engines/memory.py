"""Memory of the device: how many images fit, and what to do when they do not."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from rsedge.manifest import Manifest, TensorSpec

_log = logging.getLogger("rsedge")

# What ONNX Runtime, CUDA, cuBLAS, cuDNN, TensorRT and C++ say when memory runs out.
_SIGNS = (
    "out of memory",
    "outofmemory",
    "failed to allocate memory",
    "available memory of",
    "alloc_failed",
    "cudaerrormemoryallocation",
    "cuda failure 2:",
    "bad_alloc",
    "bad allocation",
    "could not be allocated",
)

SHARE = 0.5
"""Of the free memory that images in work may take: the rest is for weights, fragmentation and other programs."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an engine's error says that memory ran out, of the device or of this machine."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(sign in text for sign in _SIGNS)


def smaller_batch(error: Exception, size: int, what: str) -> int:
    """Half the batch size, with a warning, if ``error`` says that memory ran out; else ``error`` is raised.

    Args:
        error: What an engine raised.
        size: Images (or texts) computed together until now.
        what: Who computes, for the warning.
    """
    if size <= 1 or not is_out_of_memory(error):
        raise error
    reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
    _log.warning("%s ran out of memory with batch size %d, going on with %d: %s", what, size, size // 2, reason)
    return size // 2


def fitting_batch(manifest: Manifest, free: int, *, most: int, tokens: int = 32, rows: int = 3) -> int:
    """How many images fit: a power of two, or ``most``; 1 at least.

    Args:
        manifest: Of the bundle.
        free: Bytes.
        most: Images that are enough.
        tokens: Cached tokens of a row.
        rows: Rows (beams) of an image.
    """
    fit = int(free * SHARE / bytes_per_image(manifest, tokens=tokens, rows=rows))
    return most if fit >= most else max(1, 2 ** int(math.log2(max(fit, 1))))


def bytes_per_image(manifest: Manifest, *, tokens: int, rows: int) -> int:
    """An upper estimate of what one image in work takes on the device: its caches, and activations of both graphs."""
    vision = manifest.graphs["vision"]
    given = sum(_bytes(tensor) for tensor in vision.outputs)
    # An encoder's activations are not in the manifest: taken as four bytes for each of 64 channels a pixel.
    total = given + 64 * 4 * manifest.image.size**2
    if manifest.decoder is None or manifest.tokens is None:
        return total
    decoder = manifest.decoder
    step = manifest.graphs["step"]
    wide = np.dtype(next(tensor.dtype for tensor in step.inputs if tensor.name == "self_k.0")).itemsize
    self_cache = 2 * decoder.layers * decoder.heads * decoder.head_dim * tokens * wide
    logits = 4 * 4 * manifest.tokens.vocab_size
    # The cross cache of images just encoded stands beside that of images in work. Self caches of all widths stand
    # beside each other (16, 32, … columns): together less than three times the widest.
    return total + given + rows * (3 * self_cache + logits)


def _bytes(tensor: TensorSpec) -> int:
    """Of one image's share of a tensor."""
    sizes = [size for size in tensor.shape if isinstance(size, int)]
    return math.prod(sizes) * np.dtype(tensor.dtype).itemsize
