"""Pieces that image and text encoders are made of; shapes use B images or texts of S tokens, width W, H heads of d."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rsedge.bundle import DecoderSpec

if TYPE_CHECKING:
    from rsedge.bundle import ImageSpec
    from rsedge.export.graphs.builder import Float32, GraphBuilder, Layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Tower:
    """The numbers of a transformer."""

    width: int
    inner: int
    """Width of the MLPs."""
    layers: int
    heads: int
    act: str
    """A key of :data:`rsedge.export.graphs.builder.ACTIVATIONS`."""
    eps: float
    """Epsilon of the LayerNorms."""

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.width // self.heads

    def caches(self, positions: int, image_tokens: int) -> DecoderSpec:
        """Sizes of its caches as a decoder of that many positions and image tokens."""
        sizes = {"layers": self.layers, "heads": self.heads, "head_dim": self.head_dim}
        return DecoderSpec(**sizes, max_positions=positions, image_tokens=image_tokens)


def interpolate_positions(positions: Float32, grid: int, *, extra: int = 1) -> Float32:
    """Position embeddings [extra + g², W] at another grid, as transformers' ``interpolate_pos_encoding`` has them.

    Args:
        positions: Those of tokens that are no patches first.
        grid: Patches along an edge.
        extra: How many tokens are no patches; theirs stay as they are.

    Returns:
        float32 [extra + grid², W]; the very same values where the grid stays.
    """
    import torch

    old = round((len(positions) - extra) ** 0.5)
    if old == grid:
        return positions
    square = torch.from_numpy(positions[extra:]).reshape(1, old, old, -1).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return np.concatenate([positions[:extra], resized.permute(0, 2, 3, 1).reshape(grid * grid, -1).numpy()])


def embed_patches(nn: Layers, image: ImageSpec, patch: int, kernel: Float32, bias: Float32 | None) -> str:
    """Declare the input ``pixels`` uint8 [B, size, size, 3], normalise it and embed its patches, [B, grid², W].

    Args:
        nn: Layers of the vision graph.
        image: Size, mean and deviation.
        patch: Pixels along an edge of a patch.
        kernel: Of the convolution over patches, [W, 3, patch, patch].
        bias: [W], or None.
    """
    graph, size, grid, width = nn.graph, image.size, image.size // patch, len(kernel)
    x = graph.cast(graph.input("pixels", "uint8", ["batch", size, size, 3]), "float32")
    deviation = np.asarray(image.std, np.float64)
    x = graph.op("Mul", x, graph.const(1.0 / (255.0 * deviation), "float32"))
    x = graph.op("Add", x, graph.const(-np.asarray(image.mean, np.float64) / deviation, "float32"))
    # Patches do not overlap, so the convolution is a matrix product over their pixels. A trailing margin narrower
    # than a patch is ignored, as the convolution ignores it.
    if size != grid * patch:
        edge = graph.ints(grid * patch, grid * patch)
        x = graph.op("Slice", x, graph.ints(0, 0), edge, graph.ints(1, 2))
    x = graph.reshape(x, -1, grid, patch, grid, patch * 3)
    x = nn.from_float32(graph.reshape(graph.transpose(x, 0, 1, 3, 2, 4), -1, patch * patch * 3))
    weight = nn.array("patch_embedding.weight", kernel.transpose(2, 3, 1, 0).reshape(patch * patch * 3, width))
    terms = [x, weight] if bias is None else [x, weight, nn.array("patch_embedding.bias", bias)]
    return graph.reshape(graph.op("Gemm", *terms), -1, grid * grid, width)


def prepend_token(nn: Layers, x: str, token: Float32) -> str:
    """The class token [W] before the patches, [B, S, W] → [B, S + 1, W]."""
    graph, width = nn.graph, len(token)
    batch = graph.op("Shape", x, start=0, end=1)
    first = nn.array("class_embedding", token.reshape(1, 1, width))
    first = graph.op("Expand", first, graph.op("Concat", batch, graph.ints(1, width), axis=0))
    return graph.op("Concat", first, x, axis=1)


def unit_length(nn: Layers, rows: str) -> str:
    """``rows`` [B, D] of any precision as float32 of unit length, zero where torch's ``normalize`` leaves zero."""
    graph, rows = nn.graph, nn.to_float32(rows)
    length = graph.op("ReduceL2", rows, graph.ints(-1), keepdims=1)
    return graph.op("Div", rows, graph.op("Max", length, graph.const(1e-12, "float32")))


def split_heads(graph: GraphBuilder, rows: str, length: int, heads: int, head_dim: int, parts: int = 3) -> list[str]:
    """Split projections [B·T, parts·H·d] into ``parts`` values [B, H, T, d]."""
    split = graph.transpose(graph.reshape(rows, -1, length, parts, heads, head_dim), 2, 0, 3, 1, 4)
    return [graph.op("Gather", split, graph.const(index, "int64"), axis=0) for index in range(parts)]


def attend(nn: Layers, q: str, k: str, v: str, mask: str | None = None) -> str:
    """Attention of scaled queries [B, H, T, d] over keys and values [B, H, S, d] → [B, T, H, d]."""
    graph = nn.graph
    weights = nn.softmax(graph.op("MatMul", q, graph.transpose(k, 0, 1, 3, 2)), mask)
    return graph.transpose(graph.op("MatMul", weights, v), 0, 2, 1, 3)


def mlp(nn: Layers, x: str, name: str, act: str) -> str:
    """The two linear layers ``name.fc1`` and ``name.fc2``, [M, W] → [M, W]."""
    return nn.linear(nn.activation(nn.linear(x, f"{name}.fc1"), act), f"{name}.fc2")


@dataclass(frozen=True, slots=True)
class Reading:
    """The one token of each image or text that its embedding is read off."""

    rows: Callable[[str], str]
    """[B·S, W] → [B, W], those of that token."""
    mask: str | None = None
    """The tokens it may see, float32 that broadcasts to [B, H, 1, S]; None: all."""


class Encoder:
    """The pre-norm layers of CLIP's and SigLIP's encoders.

    Args:
        nn: Layers of the graph.
        tower: Their sizes.
        prefix: What the names of their weights begin with: ``vision_model`` or ``text_model``.
        by_token: int64 [2], the lengths B and S; one may be −1.
    """

    def __init__(self, nn: Layers, tower: Tower, prefix: str, by_token: str) -> None:
        self.nn, self.tower, self._prefix, self._by_token = nn, tower, prefix, by_token

    def run(self, x: str, *, mask: str | None = None, reading: Reading | None = None) -> str:
        """All layers, [B·S, W] → [B·S, W]; with ``reading`` → [B, W].

        The last layer of an encoder that is read at one token computes nothing else for the others than their keys
        and values.

        Args:
            x: Embedded tokens.
            mask: Added to the scores, float32 that broadcasts to [B, H, S, S].
            reading: Where the output is read.
        """
        nn, graph, tower = self.nn, self.nn.graph, self.tower
        for index in range(tower.layers):
            name = f"{self._prefix}.encoder.layers.{index}"
            attention, normed = f"{name}.self_attn", nn.norm(x, f"{name}.layer_norm1", tower.eps)
            if reading is None or index < tower.layers - 1:
                q, k, v = self._heads(normed, attention, ("q_proj", "k_proj", "v_proj"))
                context = attend(nn, q, k, v, mask)
            else:
                k, v = self._heads(normed, attention, ("k_proj", "v_proj"))
                q = nn.linear(reading.rows(normed), f"{attention}.q_proj", *self._stack(attention, "q_proj"))
                context = attend(nn, graph.reshape(q, -1, tower.heads, 1, tower.head_dim), k, v, reading.mask)
                x = reading.rows(x)
            context = nn.linear(graph.reshape(context, -1, tower.width), f"{attention}.out_proj")
            x = graph.op("Add", context, x)
            normed = nn.norm(x, f"{name}.layer_norm2", tower.eps)
            x = graph.op("Add", mlp(nn, normed, f"{name}.mlp", tower.act), x)
        return x

    def _heads(self, x: str, name: str, parts: tuple[str, ...]) -> list[str]:
        """Projections of ``x`` [B·S, W] side by side in one product, each [B, H, S, d]."""
        graph, tower, count = self.nn.graph, self.tower, len(parts)
        both = self.nn.linear(x, f"{name}.{'_'.join(parts)}", *self._stack(name, *parts))
        shape = graph.op("Concat", self._by_token, graph.ints(count, tower.heads, tower.head_dim), axis=0)
        both = graph.transpose(graph.op("Reshape", both, shape), 2, 0, 3, 1, 4)
        return [graph.op("Gather", both, graph.const(index, "int64"), axis=0) for index in range(count)]

    def _stack(self, name: str, *parts: str) -> list[Float32]:
        """Weights [n·W, W] and biases [n·W] of projections; attention's 1/√d is folded into the query's."""
        scales = [np.float32(self.tower.head_dim**-0.5 if part == "q_proj" else 1.0) for part in parts]
        return [
            np.concatenate(
                [self.nn.tensors[f"{name}.{part}.{kind}"] * s for part, s in zip(parts, scales, strict=True)]
            )
            for kind in ("weight", "bias")
        ]
