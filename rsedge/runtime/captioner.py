"""Captions for images and scenes from a bundle, without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from rsedge.errors import BundleError, OptionError
from rsedge.host import CACHES, ENCODE, NO_CLOCK, STEPS, Clock
from rsedge.pixels import check_image_spec, fitting_images
from rsedge.runtime.decoding.decoder import REFILL, Decoder
from rsedge.runtime.decoding.options import DecodingOptions, DecodingOverrides
from rsedge.runtime.decoding.search import make_search
from rsedge.runtime.decoding.tokenizer import Tokenizer
from rsedge.runtime.engines.choose import open_bundle
from rsedge.runtime.engines.memory import smaller_batch
from rsedge.runtime.outputs.records import Caption, TileRecord
from rsedge.runtime.run.pipeline import caption_scene
from rsedge.runtime.run.sources import Tiling

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from rsedge.bundle import Bundle
    from rsedge.runtime.engines.contract import Backend
    from rsedge.runtime.scenes.scene import Scene

UInt8 = NDArray[np.uint8]

BATCH_SIZE = {"cpu": 16, "cuda": 32}
"""Images decoded together unless the caller says otherwise: fewer than a scene's segment has, so that images follow."""


class SceneOverrides(Tiling, DecodingOverrides):
    """Keywords of :meth:`Captioner.caption_scene`."""


class Captioner:
    """A captioning model, ready to run; made by :meth:`load`.

    Attributes:
        bundle: The open bundle.
        device, device_reason: ``cpu`` or ``cuda:N``, and why it runs there.
        batch_size: Images decoded together; halved where memory runs out.
        model: ``name@hash12``, as in every record.
        domain: Imagery that the model was trained on, or None.
        image_size, resample: Side in pixels of the images the model sees, and the filter that brings others to it.
        decoder: Its graphs and caches.
        clock: Times the stages of decoding.
    """

    def __init__(
        self, bundle: Bundle, backend: Backend, *, device_reason: str, batch_size: int, clock: Clock = NO_CLOCK
    ) -> None:
        manifest = bundle.manifest
        if manifest.tokens is None or manifest.generation is None:
            raise BundleError(f"{bundle.path} is a {manifest.family} bundle and cannot write captions")
        self.bundle, self.device, self.device_reason = bundle, backend.device, device_reason
        self.backend = backend.name
        self.batch_size, self.model = batch_size, bundle.model
        self.image_size, self.resample, self.crop = manifest.image.size, manifest.image.resample, manifest.image.crop
        self.domain = manifest.domain
        check_image_spec(bundle)
        self._tokens, self._defaults = manifest.tokens, manifest.generation
        self._averaged = manifest.family == "clipcap"
        self._tokenizer = Tokenizer.load(bundle.tokenizer_path)
        self.decoder, self.clock = Decoder(bundle, backend), clock

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str = "auto",
        backend: str = "auto",
        threads: int | None = None,
        batch_size: int | None = None,
        num_beams: int | None = None,
        max_new_tokens: int | None = None,
        clock: Clock = NO_CLOCK,
    ) -> Captioner:
        """Open a bundle.

        Args:
            path: A ``NAME.rsedge`` directory.
            device: ``auto`` (a CUDA GPU if usable, else the CPU; logged), ``cpu``, ``cuda`` or ``cuda:N``.
            backend: ``auto`` (TensorRT where it works, else ONNX Runtime; logged), ``onnxruntime`` or ``tensorrt``.
            threads: CPU threads; None takes the cores this process may use.
            batch_size: Images decoded together; None takes 16 on the CPU, 32 on CUDA or what fits.
            num_beams, max_new_tokens: What engines of TensorRT have to serve, if that is more than the bundle's
                defaults. Still more at run time builds them once more.
            clock: Times the stages of decoding.

        Raises:
            BundleError: The bundle is damaged, or no captioner.
            BackendError: The device or the backend cannot be used, or ONNX Runtime is missing.
            OptionError: A value that is not accepted.
        """
        bundle, made, reason, size = open_bundle(
            path,
            device=device,
            backend=backend,
            threads=threads,
            batch_size=batch_size,
            usual=BATCH_SIZE,
            beams=num_beams,
            tokens=max_new_tokens,
        )
        return cls(bundle, made, device_reason=reason, batch_size=size, clock=clock)

    def options(self, **overrides: Unpack[DecodingOverrides]) -> DecodingOptions:
        """The bundle's generation defaults with ``overrides`` over them.

        Raises:
            OptionError: An unknown option, a value that is not accepted, one that the model's kind of search does not
                know, or more tokens than the model has positions.
        """
        options = DecodingOptions.resolve(self._defaults, dict(overrides))
        problems = options.averaged_problems(self._tokens.vocab_size) if self._averaged else []
        if options.max_new_tokens > self.decoder.spec.max_positions:
            problems.append(
                f"max_new_tokens is {options.max_new_tokens}, {self.model} has positions for "
                f"{self.decoder.spec.max_positions}: pass at most that"
            )
        if problems:
            raise OptionError("; ".join(problems))
        return options

    def caption(
        self, images: NDArray[Any], *, keys: Sequence[int] | None = None, **overrides: Unpack[DecodingOverrides]
    ) -> list[Caption]:
        """A caption per image.

        Args:
            images: uint8 [B, H, W, 3], R, G, B; brought to ``image_size`` if they differ.
            keys: A number per image that seeds its sampling; None counts from 0.
            overrides: Decoding options over the bundle's defaults, such as ``num_beams=3`` or ``top_p=0.9``.

        Raises:
            OptionError: Images of another shape or type, or a decoding option that is not accepted.
        """
        images = fitting_images(images, self.image_size, self.resample)
        if keys is not None and len(keys) != len(images):
            raise OptionError(f"{len(keys)} keys for {len(images)} images: pass one per image or none")
        return self._decode(images, range(len(images)) if keys is None else keys, self.options(**overrides))

    def _decode(
        self, images: UInt8, keys: Sequence[int], options: DecodingOptions, tick: Callable[[int], None] = lambda _: None
    ) -> list[Caption]:
        """Captions in the order of the images; where memory runs out the batch is halved and what is left goes on.
        ``tick`` is called with the number of captions that were finished together.
        """
        captions: list[Caption | None] = [None] * len(images)
        while left := [image for image, caption in enumerate(captions) if caption is None]:
            try:
                self._decode_some(images, keys, options, left, captions, tick)
            except Exception as error:  # noqa: PERF203 - a try per halving
                self.batch_size = smaller_batch(error, self.batch_size, f"captioning with {self.model}")
                self.decoder.release()
        return [caption for caption in captions if caption is not None]

    def _decode_some(
        self,
        images: UInt8,
        keys: Sequence[int],
        options: DecodingOptions,
        wanted: list[int],
        captions: list[Caption | None],
        tick: Callable[[int], None],
    ) -> None:
        """Caption the images ``wanted`` as far as memory goes; images enter the batch as others leave it."""
        slots = min(self.batch_size, len(wanted))
        search = make_search(
            options,
            slots=slots,
            bos=self._tokens.bos,
            eos=self._tokens.eos,
            vocab_size=self._tokens.vocab_size,
            averaged=self._averaged,
        )
        clock = self.clock
        # Encoding a few images at a time is as fast as many; on CUDA it would leave the device idle.
        refill = max(1, slots // REFILL)
        active: list[int] = []  # slot → image
        sources = np.arange(0)  # slot → the slot it takes over from
        entered, left = 0, False
        with closing(self.decoder.batch(slots=slots, rows=search.rows, columns=options.max_new_tokens)) as batch:
            upcoming = images[:0]
            while entered < len(wanted) or active:
                free = slots - len(active)
                fresh = wanted[entered : entered + min(free, batch.together or free)] if free >= refill else []
                if fresh or left:
                    with clock(ENCODE if fresh else CACHES):
                        batch.arrange(sources, upcoming if len(upcoming) and fresh else images[fresh])
                    for image in fresh:
                        search.start(len(active), keys[image])
                        active.append(image)
                    entered += len(fresh)
                if fresh and batch.together:
                    upcoming = images[wanted[entered : entered + batch.together]]
                    with clock(ENCODE):
                        batch.expect(upcoming)
                request = search.request(len(active))
                with clock(STEPS):
                    output = batch.step(request)
                parents, done = search.advance(len(active), output)
                with clock(CACHES):
                    batch.advance(parents)
                for slot in np.flatnonzero(done).tolist():
                    token_ids, score = search.result(slot)
                    captions[active[slot]] = Caption(self._tokenizer.decode(token_ids).strip(), score, token_ids)
                # Slots to keep, those from the end moved into the gaps: the fewest caches move.
                staying = np.flatnonzero(~done)
                sources = np.arange(len(staying))
                sources[done[: len(staying)]] = staying[staying >= len(staying)]
                left = bool(done.any())
                if left:
                    tick(int(done.sum()))
                    search.keep(sources)
                    active = [active[slot] for slot in sources.tolist()]

    def with_options(self, **overrides: Unpack[DecodingOverrides]) -> TileCaptions:
        """The captioner with fixed decoding options, as :mod:`rsedge.runtime.run.pipeline` takes it."""
        return TileCaptions(self, self.options(**overrides))

    def caption_scene(self, scene: Scene, **options: Unpack[SceneOverrides]) -> Iterator[TileRecord]:
        """The records of a scene, lazily, in row-major order of its tiles.

        The options are those of :class:`rsedge.runtime.run.sources.TileOptions`, and decoding options over the bundle's
        defaults.

        Raises:
            OptionError: A value that is not accepted.
        """
        tiling = {name: value for name, value in options.items() if name in Tiling.__annotations__}
        decoding = {name: value for name, value in options.items() if name not in tiling}
        task = self.with_options(**cast("DecodingOverrides", decoding))
        for records in caption_scene(task, scene, **cast("Tiling", tiling)):
            yield from records


class TileCaptions:
    """A captioner with its decoding options settled."""

    def __init__(self, captioner: Captioner, options: DecodingOptions) -> None:
        self.options, self.model = options, captioner.model
        self.image_size, self.resample, self.crop = captioner.image_size, captioner.resample, captioner.crop
        self.domain = captioner.domain
        self._captioner = captioner

    def caption_tiles(
        self, images: UInt8, keys: Sequence[int], tick: Callable[[int], None] = lambda _: None
    ) -> list[Caption]:
        """A caption per image, uint8 [N, image_size, image_size, 3]; ``keys`` seed the sampling, ``tick`` gets the
        numbers of captions that were finished together.
        """
        return self._captioner._decode(images, keys, self.options, tick)
