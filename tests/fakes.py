"""Stand-ins for slow parts, small enough to know by heart."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from rsedge.runtime.outputs.records import Caption


class FakeCaptioner:
    """Captions that are a pure function of pixels and key, and nothing else: equal captions mean equal inputs."""

    def __init__(self, image_size: int = 32, model: str = "fake@0123456789ab") -> None:
        self.image_size = image_size
        self.resample = "bicubic"
        self.domain, self.crop = None, False
        self.model = model
        self.batches: list[int] = []

    def caption_tiles(self, images: np.ndarray, keys: Sequence[int], tick=None) -> list[Caption]:
        assert images.dtype == np.uint8
        assert images.shape == (len(keys), self.image_size, self.image_size, 3)
        self.batches.append(len(keys))
        return [self._caption(image, key) for image, key in zip(images, keys, strict=True)]

    @staticmethod
    def _caption(image: np.ndarray, key: int) -> Caption:
        checksum = zlib.crc32(image.tobytes(), key & 0xFFFFFFFF) ^ (key >> 32)
        return Caption(
            text=f"a field numbered {checksum}", score=-(checksum % 100003) / 7e4, token_ids=(checksum % 97,)
        )


class FakeEmbedder:
    """Embeddings that are a pure function of the pixels: equal ones mean equal images."""

    def __init__(self, image_size: int = 32, dim: int = 8, model: str = "eye@abcdefabcdef") -> None:
        self.image_size = image_size
        self.resample = "bicubic"
        self.domain, self.crop = None, False
        self.dim = dim
        self.model = model
        self.hash = "abcdefabcdef" + 52 * "0"
        self.batches: list[int] = []

    def embed_images(self, images: np.ndarray) -> np.ndarray:
        assert images.dtype == np.uint8
        assert images.shape == (len(images), self.image_size, self.image_size, 3)
        self.batches.append(len(images))
        vectors = [np.random.default_rng(zlib.crc32(image.tobytes())).standard_normal(self.dim) for image in images]
        return np.array([vector / np.linalg.norm(vector) for vector in vectors], np.float32).reshape(-1, self.dim)
