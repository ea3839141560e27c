"""Soft targets of RSDiX-CLIP: which images and captions of a batch a teacher takes to belong together.

The method is OTTER's (Wu et al., "OTTER: Data Efficient Language-Supervised Zero-Shot Recognition with Optimal
Transport Distillation", 2021): the teacher's similarities are the negative cost of an optimal transport between the
images and the captions of a batch, and its entropy-regularised plan, rows normalised, is what the student is to give.
"""

from __future__ import annotations

import torch
from torch import Tensor

_DIAGONAL = 1e2  # what remove_diag subtracts: far more than any cosine similarity


def similarities(first: Tensor, second: Tensor) -> Tensor:
    """Dot products of all rows, float [M, D] and [N, D] → [M, N], in float32 (or float64) under autocast too."""
    with torch.autocast(first.device.type, enabled=False):
        return at_least_float32(first) @ at_least_float32(second).T


def at_least_float32(tensor: Tensor) -> Tensor:
    """``tensor``, or its float32 copy where it is of half precision."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def sinkhorn(cost: Tensor, *, regulariser: float = 0.1, iterations: int = 4) -> Tensor:
    """The transport plan of ``cost`` after some Sinkhorn iterations, its rows scaled to sum 1.

    It starts from exp(−cost / regulariser); each iteration scales every row to 1/m, then every column to 1/n. The work
    is done on logarithms, which gives the same numbers but neither overflows nor loses a row where costs are large.

    Args:
        cost: float [m, n].
        regulariser: λ > 0; the smaller, the sharper the plan.
        iterations: At least 0.

    Returns:
        [m, n], of float32 or float64; each row sums to 1.
    """
    # The sums 1/m, 1/n and that of the start are factors common to all; the last scaling would take them out.
    plan = at_least_float32(cost) / -regulariser
    for _ in range(iterations):
        plan = plan - plan.logsumexp(dim=1, keepdim=True)
        plan = plan - plan.logsumexp(dim=0, keepdim=True)
    return plan.softmax(dim=1)


@torch.no_grad()
def teacher_targets(
    image: Tensor,
    text: Tensor,
    *,
    ii_coeff: float = 1.0,
    tt_coeff: float = 1.0,
    remove_diag: bool = False,
    sinkhorn_lambda: float = 0.1,
    iterations: int = 4,
) -> tuple[Tensor, Tensor]:
    """What the student's softmax over captions, and over images, is to be; no gradient flows back.

    Args:
        image, text: The teacher's embeddings, float [N, D], of unit length; row i of each belong together.
        ii_coeff, tt_coeff: Weights of the similarities among images, and among captions.
        remove_diag: Subtract 100 from the similarity of each image, and each caption, to itself, so that pairs are no
            target by identity alone.
        sinkhorn_lambda, iterations: See :func:`sinkhorn`.

    Returns:
        Targets of the images (over captions) and of the captions (over images), each [N, N] with rows of sum 1.
    """
    ii, tt, it = similarities(image, image), similarities(text, text), similarities(image, text)
    if remove_diag:
        diagonal = _DIAGONAL * torch.eye(len(ii), dtype=ii.dtype, device=ii.device)
        ii, tt = ii - diagonal, tt - diagonal
    among = ii * ii_coeff + tt * tt_coeff
    return (
        sinkhorn(-(among + it), regulariser=sinkhorn_lambda, iterations=iterations),
        sinkhorn(-(among + it.T), regulariser=sinkhorn_lambda, iterations=iterations),
    )
