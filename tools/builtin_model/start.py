"""Where training starts: the recipe's random model, its vision tower given weights that learn sooner.

With little data and compute a vision transformer spends most of its training on finding out that neighbouring pixels
belong together. Two known initialisations spare it that: patch embeddings that whiten natural patches, and attention
that starts near the identity with positions on a grid (Trockman & Kolter 2023, "Mimetic initialization of
self-attention layers").
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rsedge.datasets.examples import CaptionData, Example
from rsedge.training.models.blip import make
from tools.builtin_model.words import phrases

if TYPE_CHECKING:
    from rsedge.training.recipe import Recipe

_IMAGES = 4000  # whose patches are looked at
_PATCHES = 40_000
_NEVER = 0.05  # added to standard deviations before dividing by them
_GAIN = 0.1  # standard deviation of a whitened patch's embedding
_QUERY_KEY = (0.7, 0.7)  # noise and identity in the product of the query and key weights
_VALUE_OUT = (0.4, -0.4)
_POSITIONS = 0.5


def make_start(recipe: Recipe, data: CaptionData, folder: Path) -> None:
    """Write the checkpoint to start from: model, tokenizer and image settings as the recipe says.

    Args:
        recipe: Of the first run; its model is random, and its tokenizer learns the words of all runs.
        data: Of the first run; its images show what patches look like.
        folder: Where the checkpoint goes.
    """
    torch.manual_seed(recipe.seed)
    image = data.examples[0].image
    task = make(recipe, CaptionData((Example("words", image, phrases(), "train"),)))
    tower = task.model.vision_model
    sources = [example.image for example in data.split("train")]
    chosen = np.random.default_rng(recipe.seed).choice(len(sources), min(_IMAGES, len(sources)), replace=False)
    images = torch.from_numpy(np.stack([sources[index].read() for index in chosen])).permute(0, 3, 1, 2)
    with torch.no_grad():
        _whiten_patches(tower.embeddings, task.normalize(images), tower.config.patch_size)
        _grid_positions(tower.embeddings, tower.config.image_size // tower.config.patch_size)
        for layer in tower.encoder.layers:
            _mimic(layer.self_attn, tower.config.num_attention_heads)
    folder.mkdir(parents=True, exist_ok=True)
    task.save(folder, task.state_dict())


def _whiten_patches(embeddings: torch.nn.Module, images: Tensor, size: int) -> None:
    """Embed a patch by its principal components, whitened and mixed, so that fine detail counts as much as colour."""
    patches = torch.nn.functional.unfold(images, size, stride=size).transpose(1, 2).reshape(-1, 3 * size * size)
    patches = patches[torch.randperm(len(patches))[:_PATCHES]]
    mean = patches.mean(0)
    variance, axes = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    width = embeddings.patch_embedding.out_channels
    axes, variance = axes[:, -width:], variance[-width:].clamp(min=0)
    mixing = torch.linalg.qr(torch.randn(axes.shape[1], axes.shape[1]))[0]
    weight = _GAIN * mixing @ (axes / (variance.sqrt() + _NEVER)).T
    embeddings.patch_embedding.weight.copy_(weight.reshape(-1, 3, size, size))
    embeddings.patch_embedding.bias.copy_(-weight @ mean)


def _grid_positions(embeddings: torch.nn.Module, grid: int) -> None:
    """Sines and cosines of row and column."""
    width = embeddings.position_embedding.shape[-1]
    frequencies = 10_000.0 ** -(torch.arange(width // 4) / (width // 4))
    row, col = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    waves = [wave(axis.reshape(-1, 1) * frequencies) for axis in (row, col) for wave in (torch.sin, torch.cos)]
    embeddings.position_embedding[0, 1:] = _POSITIONS * torch.cat(waves, dim=1)


def _mimic(attention: torch.nn.Module, heads: int) -> None:
    """Give an attention layer the products of weights that trained ones have."""
    weight = attention.qkv.weight
    width = weight.shape[1]
    step = width // heads

    def factors(noise: float, identity: float) -> tuple[Tensor, Tensor]:
        left, sizes, right = torch.linalg.svd(
            noise * torch.randn(width, width) / width**0.5 + identity * torch.eye(width)
        )
        return left * sizes.sqrt(), right.T * sizes.sqrt()

    for start in range(0, width, step):
        query, key = factors(*_QUERY_KEY)
        weight[start : start + step] = query[:, :step].T
        weight[width + start : width + start + step] = key[:, :step].T
    out, value = factors(*_VALUE_OUT)
    weight[2 * width :] = value.T
    attention.projection.weight.copy_(out)
