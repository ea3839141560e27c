"""Vision transformers at another image size: position embeddings, interpolated once and for all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rsedge.errors import OptionError


def interpolate(positions: Tensor, grid: int, *, class_token: bool) -> Tensor:
    """Position embeddings for ``grid`` × ``grid`` patches, by bicubic interpolation as in transformers.

    Args:
        positions: [N, D], that of the class token first if there is one; the patches are a square.
        grid: Patches per side.
        class_token: Whether there is one; it stays as it is.

    Returns:
        [grid² (+ 1), D] in the dtype of ``positions``.
    """
    first, patches = positions[: int(class_token)], positions[int(class_token) :]
    side = round(len(patches) ** 0.5)
    square = patches.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([first, resized.permute(0, 2, 3, 1).reshape(grid * grid, -1).to(positions.dtype)])


@torch.no_grad()
def resize_vision(model: Any, image_size: int) -> None:
    """Give the vision tower of a BLIP, CLIP or SigLIP model another image size; its configuration says so after.

    Args:
        model: With ``vision_model``, or such a tower alone.
        image_size: Pixels.

    Raises:
        OptionError: The size is not a multiple of the patch size.
    """
    tower = getattr(model, "vision_model", model)
    config, embeddings = tower.config, tower.embeddings
    patch = config.patch_size
    if image_size % patch:
        raise OptionError(
            f"model.image_size is {image_size}, not a multiple of the patch size {patch}: choose "
            f"{image_size // patch * patch or patch}"
        )
    if image_size == config.image_size:
        return
    grid, positions = image_size // patch, embeddings.position_embedding
    if isinstance(positions, nn.Embedding):  # CLIP with a class token, SigLIP without
        rows = interpolate(positions.weight, grid, class_token=hasattr(embeddings, "class_embedding"))
        embeddings.position_embedding = nn.Embedding(rows.shape[0], rows.shape[1], _weight=rows)
        numbers = torch.arange(len(rows), device=rows.device)[None]
        embeddings.register_buffer("position_ids", numbers, persistent=False)
    else:
        rows = interpolate(positions[0], grid, class_token=True)
        embeddings.position_embedding = nn.Parameter(rows[None])
    embeddings.num_patches, embeddings.num_positions = grid * grid, len(rows)
    embeddings.image_size = config.image_size = image_size
    if hasattr(model.config, "vision_config"):
        model.config.vision_config.image_size = image_size
