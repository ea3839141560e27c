"""Open what is to be evaluated: a bundle (runtime, no torch), a checkpoint or a run of training (torch)."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rsedge.errors import BackendError, OptionError
from rsedge.evaluation.interfaces import CaptionModel, EmbeddingModel, Kind, ModelInfo
from rsedge.pixels import ImageSize, UInt8, fit_image

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rsedge.runtime.captioner import Captioner
    from rsedge.runtime.embedder import Embedder

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(?<!\.rsedge)")  # and not the bundle that is missing


def locate(source: str | Path) -> tuple[Kind, str]:
    """What ``source`` is, and where: a run folder stands for its best checkpoint, what is no folder is a hub id.

    OptionError where it is none of them.
    """
    path = Path(source)
    if not path.exists():
        if not _HUB_ID.fullmatch(str(source)):
            raise OptionError(
                f"there is no {source}: give a bundle, a checkpoint folder, a run of training, or a hub id such as "
                "openai/clip-vit-base-patch32"
            )
        return "checkpoint", str(source)
    if (path / "manifest.json").is_file():
        return "bundle", str(path)
    best = path / "best"
    if (best / "config.json").is_file():
        if not best.resolve().is_relative_to(path.resolve()):
            raise OptionError(f"{best} leads out of the run, to {best.resolve()}: give that checkpoint itself")
        logging.getLogger("rsedge").info("best checkpoint of the run: %s", best)
        return "checkpoint", str(best)
    if (path / "config.json").is_file():
        return "checkpoint", str(path)
    raise OptionError(
        f"{source} is neither a bundle (manifest.json), nor a checkpoint (config.json), nor a run (best/): give one of "
        "them, or a hub id"
    )


def open_captioner(
    source: str | Path,
    *,
    device: str = "auto",
    threads: int | None = None,
    batch_size: int | None = None,
    **options: Any,
) -> CaptionModel:
    """The captioner at ``source``.

    Args:
        source: Bundle, checkpoint folder, run folder or hub id.
        device: ``auto``, ``cpu`` or ``cuda[:N]``.
        threads: CPU threads; None takes all cores.
        batch_size: Images decoded together.
        options: Decoding options over the model's own defaults, None where the default holds;
            see :class:`~rsedge.runtime.decoding.options.DecodingOptions`.

    Raises:
        OptionError, BundleError, BackendError: It cannot be opened, or options do not fit.
    """
    kind, path = locate(source)
    if kind == "bundle":
        return _BundleCaptioner(path, device, threads, batch_size, options)
    _need_torch(threads)
    from rsedge.evaluation.checkpoints import open_checkpoint_captioner

    return open_checkpoint_captioner(path, str(source), device, batch_size or 16, options)


def open_embedder(
    source: str | Path, *, device: str = "auto", threads: int | None = None, batch_size: int | None = None
) -> EmbeddingModel:
    """The CLIP or SigLIP model at ``source``; arguments and errors as :func:`open_captioner`."""
    kind, path = locate(source)
    if kind == "bundle":
        return _BundleEmbedder(path, device, threads, batch_size)
    _need_torch(threads)
    from rsedge.evaluation.checkpoints import CheckpointEmbedder

    return CheckpointEmbedder(path, str(source), device, batch_size or 64)


class _BundleCaptioner:
    def __init__(
        self, path: str, device: str, threads: int | None, batch_size: int | None, options: dict[str, Any]
    ) -> None:
        from rsedge.runtime.captioner import Captioner

        self._captioner = Captioner.load(path, device=device, threads=threads, batch_size=batch_size)
        self._options = options
        settled = self._captioner.options(**options)  # refused before the images are read
        precision = self._captioner.bundle.manifest.precision
        self.info = ModelInfo(self._captioner.model, "bundle", path, self._captioner.device, precision, asdict(settled))

    def caption(self, images: Sequence[UInt8], *, keys: Sequence[int] | None = None) -> list[str]:
        """As :class:`CaptionModel`."""
        stack = _stack(images, self._captioner)
        return [caption.text for caption in self._captioner.caption(stack, keys=keys, **self._options)]


class _BundleEmbedder:
    def __init__(self, path: str, device: str, threads: int | None, batch_size: int | None) -> None:
        from rsedge.runtime.embedder import Embedder

        self._embedder = Embedder.load(path, device=device, threads=threads, batch_size=batch_size)
        precision = self._embedder.bundle.manifest.precision
        self.info = ModelInfo(self._embedder.model, "bundle", path, self._embedder.device, precision)

    def embed_images(self, images: Sequence[UInt8]) -> NDArray[np.float32]:
        """As :class:`EmbeddingModel`."""
        return self._embedder.embed_images(_stack(images, self._embedder))

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """As :class:`EmbeddingModel`."""
        return self._embedder.embed_texts(texts)


def _stack(images: Sequence[UInt8], model: Captioner | Embedder) -> UInt8:
    """uint8 [B, S, S, 3], of the size that ``model`` takes."""
    domain = model.domain.resolution if model.domain else None
    wanted = ImageSize(model.image_size, model.resample, model.crop, domain)
    return np.stack([fit_image(image, wanted) for image in images])


def _need_torch(threads: int | None) -> None:
    if missing := [name for name in ("torch", "transformers") if find_spec(name) is None]:
        raise BackendError(
            f"evaluating a checkpoint needs {' and '.join(missing)}: pip install 'rsedge[train]', or export it and "
            "evaluate the bundle"
        )
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
