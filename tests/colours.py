"""An embedder of colours: what it says of pixels and words can be worked out by hand."""

from __future__ import annotations

import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np

LONGEST = 20  # words of a text
WORDS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "grey": (1, 1, 1), "dark": (0.2, 0.1, 0.1)}


class ColourEmbedder:
    """An image's embedding is the direction of its mean colour, a text's that of the colours it names."""

    def __init__(
        self, image_size: int = 16, *, logit_scale: float | None = 10.0, logit_bias: float | None = None
    ) -> None:
        self.image_size, self.resample, self.dim = image_size, "bicubic", 3
        self.logit_scale, self.logit_bias = logit_scale, logit_bias
        self.domain, self.crop = None, False
        self.model, self.hash = "colours@abcdefabcdef", "abcdefabcdef" + 52 * "0"
        self.device, self.device_reason, self.batch_size = "cpu", "asked for", 16
        self.backend = "onnxruntime"
        self.texts: list[str] = []
        self.seen = 0

    @classmethod
    def load(cls, path: Path, **_: object) -> ColourEmbedder:
        """As ``Embedder.load``."""
        return cls()

    def embed_images(self, images: np.ndarray) -> np.ndarray:
        assert images.dtype == np.uint8
        assert images.shape == (len(images), self.image_size, self.image_size, 3)
        self.seen += len(images)
        return unit(images.reshape(len(images), -1, 3).mean(axis=1) + 1e-3)

    def embed_texts(self, texts: list[str]) -> np.ndarray:
        self.texts += texts
        return np.stack([embed_text(text) for text in texts])

    def token_ids(self, texts: list[str]) -> np.ndarray:
        return np.array([_word_ids(text) for text in texts])


def _word_ids(text: str) -> list[int]:
    return [zlib.crc32(word.encode()) for word in text.split()[:LONGEST]]


def embed_text(text: str) -> np.ndarray:
    """The sum of the colours a text names; the opposite of every colour for a text that names none."""
    named = [WORDS[word] for word in text.lower().replace(",", " ").split() if word in WORDS]
    return unit(np.sum(named or [(-1, -1, -1)], axis=0)[None])[0]


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def install(monkeypatch) -> None:
    """Let the commands use it in place of a bundle."""
    monkeypatch.setattr("rsedge.runtime.embedder.Embedder", SimpleNamespace(load=ColourEmbedder.load))
    monkeypatch.setattr("rsedge.cli.options.chosen_embedder", lambda model: model)


def blocks(rows: list[list[str]], size: int, seed: int = 0) -> np.ndarray:
    """uint8 [3, H, W]: squares of ``size`` pixels in the colours named, noisy, or without data where "-" stands."""
    generator = np.random.default_rng(seed)
    data = np.zeros((3, len(rows) * size, len(rows[0]) * size), np.uint8)
    for row, names in enumerate(rows):
        for col, name in enumerate(names):
            if name != "-":
                colour = np.array(WORDS[name])[:, None, None] * 150 + 20
                noise = generator.integers(0, 30, (3, size, size))
                data[:, row * size : (row + 1) * size, col * size : (col + 1) * size] = colour + noise
    return data
