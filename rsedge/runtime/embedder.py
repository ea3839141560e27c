"""Embeddings of images and texts from a bundle, without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rsedge.errors import BundleError, OptionError
from rsedge.host import ENCODE, NO_CLOCK, Clock
from rsedge.pixels import check_image_spec, fitting_images
from rsedge.runtime.decoding.tokenizer import Tokenizer
from rsedge.runtime.engines.choose import open_bundle
from rsedge.runtime.engines.memory import smaller_batch
from rsedge.runtime.run.pipeline import embed_scene

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from rsedge.bundle import Bundle, EmbeddingSpec
    from rsedge.runtime.engines.contract import Backend, Graph
    from rsedge.runtime.outputs.records import TileRecord
    from rsedge.runtime.run.sources import Tiling
    from rsedge.runtime.scenes.scene import Scene

UInt8 = NDArray[np.uint8]
Float32 = NDArray[np.float32]
Ints = NDArray[np.int64]

BATCH_SIZE = {"cpu": 16, "cuda": 64}
"""Images or texts computed together unless the caller says otherwise."""


class Embedder:
    """A model that puts images and texts into one space, ready to run; made by :meth:`load`.

    Attributes:
        bundle: The open bundle.
        model: ``name@hash12``, as in every record.
        hash: The bundle's hash, 64 hexadecimal digits: embeddings of other models must not be compared with these.
        device, device_reason: ``cpu`` or ``cuda:N``, and why it runs there.
        batch_size: Images or texts computed together; halved where memory runs out.
        image_size, resample: Side in pixels of the images the model sees, and the filter that brings others to it.
        dim: Length of an embedding.
        logit_scale, logit_bias: Similarity × scale + bias is the model's own logit, where it has one, else None.
        clock: Times the encoding of images.
    """

    def __init__(
        self, bundle: Bundle, backend: Backend, *, device_reason: str, batch_size: int, clock: Clock = NO_CLOCK
    ) -> None:
        manifest = bundle.manifest
        if manifest.embedding is None or "vision" not in manifest.graphs:
            raise BundleError(
                f"{bundle.path} is a {manifest.family} bundle and cannot embed: give one of a CLIP or SigLIP model"
            )
        check_image_spec(bundle)
        spec: EmbeddingSpec = manifest.embedding
        self.bundle, self.model, self.hash = bundle, bundle.model, bundle.hash
        self.device, self.device_reason, self.batch_size = backend.device, device_reason, batch_size
        self.backend, self.clock = backend.name, clock
        self.image_size, self.resample, self.crop = manifest.image.size, manifest.image.resample, manifest.image.crop
        self.domain = manifest.domain
        self.dim, self.logit_scale, self.logit_bias = spec.dim, spec.logit_scale, spec.logit_bias
        self._spec, self._backend = spec, backend
        # Opened when first needed: embedding a scene needs no texts, searching by text no images.
        self._graphs: dict[str, Graph] = {}
        self._tokenizer: Tokenizer | None = None

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str = "auto",
        backend: str = "auto",
        threads: int | None = None,
        batch_size: int | None = None,
        clock: Clock = NO_CLOCK,
    ) -> Embedder:
        """Open a bundle.

        Args:
            path: A ``NAME.rsedge`` directory.
            device, backend, threads: As in :meth:`rsedge.Captioner.load`.
            batch_size: Images or texts computed together; None takes 16 on the CPU, 64 on CUDA or what fits.
            clock: Times the encoding of images.

        Raises:
            BundleError: The bundle is damaged, or no embedding model.
            BackendError: The device or the backend cannot be used, or ONNX Runtime is missing.
            OptionError: A value that is not accepted.
        """
        bundle, made, reason, size = open_bundle(
            path, device=device, backend=backend, threads=threads, batch_size=batch_size, usual=BATCH_SIZE
        )
        return cls(bundle, made, device_reason=reason, batch_size=size, clock=clock)

    def embed_images(self, images: NDArray[Any]) -> Float32:
        """The embeddings, float32 [B, D] of unit length, of images uint8 [B, H, W, 3] of any size.

        Raises:
            OptionError: Images of another shape or type.
        """
        with self.clock(ENCODE):
            images, vision = fitting_images(images, self.image_size, self.resample), self._graph("vision")
            rows = np.empty((len(images), self.dim), np.float32)

            def compute(part: slice) -> None:
                rows[part] = vision.run({"pixels": images[part]}, ["image_embeds"])[0]

            self._in_parts(len(images), compute)
        return rows

    def embed_texts(self, texts: Sequence[str]) -> Float32:
        """The embeddings of texts, float32 [B, D] of unit length; what is too long for the model is cut.

        Raises:
            BundleError: The bundle has no text encoder.
            OptionError: ``texts`` is one string, not a list of them, or holds something else.
        """
        if isinstance(texts, str):
            raise OptionError(f"texts is the string {texts[:40]!r}, expected a list of strings: pass [text]")
        if others := [text for text in texts if not isinstance(text, str)]:
            raise OptionError(f"texts hold {others[0]!r}, expected strings")
        ids, text = self._encode(texts), self._graph("text")
        rows = np.empty((len(texts), self.dim), np.float32)
        # Neighbours in length are computed together, so that little is filled.
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))

        def compute(part: slice) -> None:
            filled = self._fill([ids[index] for index in order[part]])
            rows[order[part]] = text.run({"input_ids": filled}, ["text_embeds"])[0]

        self._in_parts(len(order), compute)
        return rows

    def embed_scene(self, scene: Scene, **tiling: Unpack[Tiling]) -> Iterator[tuple[TileRecord, Float32 | None]]:
        """The records of a scene with their embeddings, see :func:`rsedge.runtime.run.pipeline.embed_scene`."""
        return embed_scene(self, scene, **tiling)

    def token_ids(self, texts: Sequence[str]) -> Ints:
        """What the text graph is given for ``texts`` computed together, int64 [B, T].

        Raises:
            BundleError: The bundle has no text encoder.
        """
        return self._fill(self._encode(texts))

    def _in_parts(self, count: int, compute: Callable[[slice], None]) -> None:
        """Call ``compute`` for all of 0 to ``count``, a batch at a time, of half the size where memory runs out."""
        start = 0
        while start < count:
            part = slice(start, start + self.batch_size)
            try:
                compute(part)
            except Exception as error:
                self.batch_size = smaller_batch(error, self.batch_size, f"embedding with {self.model}")
            else:
                start = part.stop

    def _graph(self, role: str) -> Graph:
        if role not in self._graphs:
            self._graphs[role] = self._backend.open(self.bundle.graph_path(role))
        return self._graphs[role]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if self._tokenizer is None:
            if self._spec.context_length is None:
                raise BundleError(f"{self.bundle.path} has no text encoder: it embeds images only")
            self._tokenizer = Tokenizer.load(self.bundle.tokenizer_path, longest=self._spec.context_length)
        return [self._tokenizer.encode(text) for text in texts]

    def _fill(self, rows: list[list[int]]) -> Ints:
        """Texts side by side, each filled behind its end by the rule of the manifest."""
        spec = self._spec
        assert spec.context_length is not None
        assert spec.pad_id is not None
        longest = spec.context_length if spec.pad_to_context else max(map(len, rows), default=0)
        filled = np.full((len(rows), longest), spec.pad_id, np.int64)
        for place, row in zip(filled, rows, strict=True):
            place[: len(row)] = row
        return filled
