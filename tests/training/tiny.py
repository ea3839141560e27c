"""Small generated caption sets, and recipes of models that train on them in a second."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from rsedge.datasets.examples import CaptionData, Example
from rsedge.training.recipe import load_recipe

if TYPE_CHECKING:
    from pathlib import Path

    from rsedge.training.recipe import Recipe

COLOURS = {"red": (200, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 200), "grey": (120, 120, 120)}
_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_MODELS = {
    "blip": {
        "vision": {**_TOWER, "patch_size": 8},
        "text": {**_TOWER, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.0},
    },
    "clip": {"vision": {**_TOWER, "patch_size": 8}, "text": _TOWER, "projection_dim": 16},
    "clipcap": {
        "vision": {**_TOWER, "patch_size": 8, "projection_dim": 16},
        "text": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48},
        "prefix_length": 3,
    },
}


@dataclass(frozen=True)
class Plain:
    """An image of one colour with a noise of its own."""

    colour: str
    seed: int

    def read(self) -> np.ndarray:
        noise = np.random.default_rng(self.seed).integers(-20, 20, (40, 40, 3))
        return np.clip(np.array(COLOURS[self.colour]) + noise, 0, 255).astype(np.uint8)


def caption_data(train: int = 24, val: int = 8) -> CaptionData:
    """Images of four colours, two captions each that name theirs."""
    examples = []
    for number in range(train + val):
        colour = list(COLOURS)[number % len(COLOURS)]
        captions = (f"a field that is {colour} .", f"this is some {colour} land, seen from above")
        split = "train" if number < train else "val"
        examples.append(Example(f"plain/{number:03d}.png", Plain(colour, number), captions, split))
    return CaptionData(tuple(examples))


def write_set(folder: Path, data: CaptionData) -> Path:
    """The set as images and JSON lines, for the command line."""
    folder.mkdir()
    lines = []
    for example in data.examples:
        name = example.key.partition("/")[2]
        Image.fromarray(example.image.read()).save(folder / name)
        lines.append(json.dumps({"filename": name, "captions": example.captions, "split": example.split}))
    (folder / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder / "captions.jsonl"


def tiny_recipe(family: str, *settings: str, siglip: bool = False) -> Recipe:
    """A recipe for 16 px images, 8 to a step."""
    model = json.loads(json.dumps(_MODELS[family]))
    if siglip:
        model = {
            "vision": model["vision"],
            "text": {**model["text"], "max_position_embeddings": 16},
            "model_type": "siglip",
        }
    flat = [f"model.config.{key}={json.dumps(value)}" for key, value in model.items() if not isinstance(value, dict)]
    flat += [
        f"model.config.{section}.{key}={json.dumps(value)}"
        for section, values in model.items()
        if isinstance(values, dict)
        for key, value in values.items()
    ]
    base = [
        "model.image_size=16", "model.tokenizer=captions", "model.vocabulary_size=600", "model.max_tokens=16",
        "data.workers=0", "loop.batch_size=8", "loop.epochs=2", "loop.log_every=1", "optimizer.learning_rate=0.003",
    ]  # fmt: skip
    return load_recipe(None, family=family, settings=[*base, *flat, *settings])  # type: ignore[arg-type]
