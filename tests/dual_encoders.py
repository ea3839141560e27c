"""Seeded generators of tiny CLIP and SigLIP checkpoints in Hugging Face layout, weights loud as in tests.models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from rsedge.bundle import ImageSpec
from rsedge.checkpointfiles import write_image_spec
from rsedge.training.models.loading import learn_clip_bpe

CAPTIONS = (
    "many planes are parked at the airport .",
    "a river runs through green fields",
    "two bridges over a wide river, and some buildings",
    "dense forest beside the lake",
)
TEXTS = (
    "",
    "river",
    "a bridge over the river",
    "Many planes, parked beside two large buildings at the airport; it's raining.",
    "green fields " * 40,
)
_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def make_clip(
    path: Path,
    *,
    seed: int = 0,
    image_size: int = 32,
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    dim: int = 24,
) -> Path:
    """Save a random CLIP to ``path``, made if absent, and return it; ``vision`` and ``text`` change its config."""
    tokenizer = _tokenizer(path)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 20, "pad_token_id": 1}
    config = CLIPConfig(
        vision_config={**_TOWER, "image_size": image_size, "patch_size": 8, **(vision or {})},
        text_config={**_TOWER, **sizes, **ids, **(text or {})},
        projection_dim=dim,
    )
    spec = ImageSpec(size=image_size, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
    return _save(path, CLIPModel(config), spec, seed, "clip")


def make_siglip(
    path: Path,
    *,
    seed: int = 0,
    image_size: int = 32,
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
) -> Path:
    """Save a random SigLIP, its tokenizer CLIP's; see :func:`make_clip`."""
    tokenizer = _tokenizer(path)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "pad_token_id": tokenizer.pad_token_id}
    config = SiglipConfig(
        vision_config={**_TOWER, "image_size": image_size, "patch_size": 8, **(vision or {})},
        text_config={**_TOWER, **sizes, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, **(text or {})},
    )
    spec = ImageSpec(size=image_size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return _save(path, SiglipModel(config), spec, seed, "siglip")


def embeddings(path: Path, images: np.ndarray, *, resized: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of unit length of ``images`` and of ``TEXTS`` in transformers, padded as its tokenizer pads."""
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    values = json.loads((path / "preprocessor_config.json").read_text())
    pixels = (images / 255 - np.array(values["image_mean"])) / np.array(values["image_std"])
    tensor = torch.from_numpy(pixels.astype(np.float32)).permute(0, 3, 1, 2)
    siglip, text = model.config.model_type == "siglip", model.config.text_config
    rows = tokenizer(
        list(TEXTS),
        padding="max_length" if siglip else True,
        truncation=True,
        max_length=text.max_position_embeddings,
        return_tensors="pt",
        return_attention_mask=not siglip,  # as it was trained: padding is seen
    )
    with torch.no_grad():
        image = model.get_image_features(tensor, interpolate_pos_encoding=resized)
        found = [getattr(value, "pooler_output", value) for value in (image, model.get_text_features(**rows))]
    return tuple(torch.nn.functional.normalize(value, dim=-1).numpy() for value in found)


def _tokenizer(path: Path) -> Any:
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = learn_clip_bpe(CAPTIONS, 560)
    tokenizer.save_pretrained(path)
    return tokenizer


def _save(path: Path, model: Any, spec: ImageSpec, seed: int, kind: str) -> Path:
    _fill(model, np.random.default_rng(seed))
    model.save_pretrained(path)
    write_image_spec(path, spec, model_type=kind)
    return path


@torch.no_grad()
def _fill(model: Any, random: np.random.Generator) -> None:
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if "norm" in name and name.endswith("weight"):
            values = random.uniform(0.6, 1.4, shape)
        elif "norm" in name:
            values = random.normal(0, 0.3, shape)
        elif name == "logit_scale":
            values = np.full(shape, 2.6)
        elif name == "logit_bias":
            values = np.full(shape, -9.5)
        elif name.endswith("bias"):
            values = random.normal(0, 0.1, shape)
        elif "embedding" in name or "probe" in name:
            values = random.normal(0, 2 / np.sqrt(shape[-1]), shape)
        else:
            gain = 2.0 if any(part in name for part in ("q_proj", "k_proj", "in_proj", "patch")) else 1.0
            values = random.normal(0, gain / np.sqrt(np.prod(shape[1:])), shape)
        parameter.copy_(torch.from_numpy(np.asarray(values)))
