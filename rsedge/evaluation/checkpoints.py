"""Checkpoints in torch, as the models that evaluation knows: the same pixels and settings as their bundles get."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from rsedge.errors import BundleError, OptionError
from rsedge.evaluation.interfaces import CaptionModel, ModelInfo
from rsedge.manifest import GenerationDefaults, ImageSpec
from rsedge.pixels import ImageSize, UInt8, fit_image
from rsedge.runtime.decoding.options import DecodingOptions
from rsedge.texts import first_line
from rsedge.training.models.loading import config_type, image_spec, load_pretrained, open_tokenizer, torch_device
from rsedge.training.recipe import ModelRecipe

if TYPE_CHECKING:
    from numpy.typing import NDArray


def open_checkpoint_captioner(
    path: str, name: str, device: str, batch_size: int, options: dict[str, Any]
) -> CaptionModel:
    """The BLIP or CLIPCap captioner in ``path``; OptionError where it is no captioner, or options do not fit."""
    kind = _kind(path)
    if kind not in ("blip", "clipcap"):
        raise OptionError(f"{name} is a {kind} model, which writes no captions: give a BLIP or CLIPCap checkpoint")
    return (_Blip if kind == "blip" else _ClipCap)(path, name, device, batch_size, options)


class _Checkpoint:
    def __init__(self, cls: Any, path: str, name: str, device: str, batch_size: int) -> None:
        self._batch_size, self._device = batch_size, torch_device(device)
        self.info = ModelInfo(name, "checkpoint", path, self._device)
        self._image = image_spec(path)
        self._tokenizer = open_tokenizer(path)
        # Weights load in a moment: a bar would only stand in the way of what is printed. Set back after, for notebooks.
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            self._model: Any = load_pretrained(cls, ModelRecipe(init=path)).eval().to(self._device)
        finally:
            if shown:
                logging.enable_progress_bar()

    def _batches(self, images: Sequence[UInt8]) -> Iterator[Tensor]:
        for start in range(0, len(images), self._batch_size):
            yield normalized(images[start : start + self._batch_size], self._image).to(self._device)


class _Blip(_Checkpoint):
    def __init__(self, path: str, name: str, device: str, batch_size: int, options: dict[str, Any]) -> None:
        from transformers import BlipForConditionalGeneration

        super().__init__(BlipForConditionalGeneration, path, name, device, batch_size)
        positions = self._model.config.text_config.max_position_embeddings
        file = Path(path) / "generation_config.json"
        try:
            config = json.loads(file.read_bytes()) if file.is_file() else {}
            defaults = GenerationDefaults.from_transformers(config, positions=positions)
        except (BundleError, TypeError, ValueError) as error:
            raise OptionError(f"{file} cannot be used: {error}; mend or delete it") from error
        self._options = DecodingOptions.resolve(defaults, options)
        self.info = replace(self.info, options=asdict(self._options))
        if self._options.do_sample:
            raise OptionError(
                "transformers draws for a whole batch at once, so a caption would depend on its neighbours: evaluate "
                "the checkpoint with beams, or export it and sample with the bundle"
            )

    @torch.no_grad()
    def caption(self, images: Sequence[UInt8], *, keys: Sequence[int] | None = None) -> list[str]:  # noqa: ARG002
        """Captions by ``transformers.generate``, which does not sample here and needs no keys."""
        options, texts = self._options, []
        settings: dict[str, Any] = {
            "num_beams": options.num_beams,
            "max_new_tokens": options.max_new_tokens,
            "min_new_tokens": options.min_new_tokens or None,
            "repetition_penalty": options.repetition_penalty,
            "no_repeat_ngram_size": options.no_repeat_ngram_size,
            "do_sample": False,
        }
        if options.num_beams > 1:
            settings |= {"length_penalty": options.length_penalty, "early_stopping": options.early_stopping}
        for pixels in self._batches(images):
            ids = self._model.generate(pixel_values=pixels, **settings)
            texts += [text.strip() for text in self._tokenizer.batch_decode(ids, skip_special_tokens=True)]
        return texts


class _ClipCap(_Checkpoint):
    def __init__(self, path: str, name: str, device: str, batch_size: int, options: dict[str, Any]) -> None:
        from rsedge.training.models.clipcap_model import DEFAULTS, ClipCapModel

        super().__init__(ClipCapModel, path, name, device, batch_size)
        config = self._model.config
        room = config.text_config.n_positions - config.prefix_length + 1  # the last token is not run
        longest = min(DEFAULTS.max_new_tokens, room)
        defaults = GenerationDefaults(max_new_tokens=longest, num_beams=DEFAULTS.num_beams)
        self._options = DecodingOptions.resolve(defaults, options)
        self.info = replace(self.info, options=asdict(self._options))

    @torch.no_grad()
    def caption(self, images: Sequence[UInt8], *, keys: Sequence[int] | None = None) -> list[str]:
        """Captions by :func:`rsedge.training.models.clipcap_model.generate`."""
        from rsedge.training.models.clipcap_model import generate

        texts: list[str] = []
        for pixels in self._batches(images):
            embeddings = self._model.embed_images(pixels)
            rows = range(len(images))[len(texts) : len(texts) + len(pixels)]
            seeds = rows if keys is None else [keys[row] for row in rows]
            found = generate(self._model, embeddings, self._options, keys=seeds)
            texts += [self._tokenizer.decode(caption.token_ids, skip_special_tokens=True).strip() for caption in found]
        return texts


class CheckpointEmbedder(_Checkpoint):
    """The CLIP or SigLIP model in ``path``; OptionError where it is another kind of model."""

    def __init__(self, path: str, name: str, device: str, batch_size: int) -> None:
        from transformers import CLIPModel, SiglipModel

        kind = _kind(path)
        if kind not in ("clip", "siglip"):
            raise OptionError(f"{name} is a {kind} model, which does not embed: give a CLIP or SigLIP checkpoint")
        super().__init__(CLIPModel if kind == "clip" else SiglipModel, path, name, device, batch_size)
        # SigLIP was trained on texts of one length, its padding seen like any other token.
        self._padding = "max_length" if kind == "siglip" else "longest"

    @torch.no_grad()
    def embed_images(self, images: Sequence[UInt8]) -> NDArray[np.float32]:
        """Float32 [N, D] of unit length."""
        from rsedge.training.models.clip import embed_pixels

        return np.concatenate([_unit(embed_pixels(self._model, pixels)) for pixels in self._batches(images)])

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Float32 [N, D] of unit length."""
        from rsedge.training.models.clip import embed_tokens

        rows, longest = [], self._model.config.text_config.max_position_embeddings
        for start in range(0, len(texts), self._batch_size):
            tokens = self._tokenizer(
                list(texts[start : start + self._batch_size]),
                padding=self._padding,
                truncation=True,
                max_length=longest,
                return_tensors="pt",
                return_attention_mask=True,
            )
            rows.append(_unit(embed_tokens(self._model, {name: tokens[name].to(self._device) for name in tokens})))
        return np.concatenate(rows)


def normalized(images: Sequence[UInt8], image: ImageSpec) -> Tensor:
    """float32 [B, 3, S, S] as the model wants it: resized and normalised as in training and in the bundle."""
    wanted = ImageSize(image.size, image.resample, image.crop)
    stack = np.stack([fit_image(pixels, wanted) for pixels in images])
    values = (torch.from_numpy(stack).float() / 255 - torch.tensor(image.mean)) / torch.tensor(image.std)
    return values.permute(0, 3, 1, 2).contiguous()


def _unit(rows: Tensor) -> NDArray[np.float32]:
    unit: NDArray[np.float32] = torch.nn.functional.normalize(rows.float(), dim=-1).cpu().numpy()
    return unit


def _kind(path: str) -> str:
    try:
        return config_type(path)
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot open {path}: {first_line(error)}") from error
