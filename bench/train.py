"""How fast is full-size training, and what does mixed precision buy? python bench/train.py [--data SOURCE] [--tiny]

BLIP-base at 224 px, CLIP B/32 and CLIPCap with GPT-2 small, with random weights (speed does not depend on them),
through `rsedge train`'s own loop: fp32, bf16 and fp16 in turn, images per second and peak GPU memory as the loop logs
them, medians after a warm-up. Without --data images and captions are made up. --tiny checks the script itself, on a
CPU too.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from common import machine, median, save

from rsedge.datasets import CaptionData, Example, load_examples
from rsedge.training.loop import Trainer, make_accelerator
from rsedge.training.recipe import load_recipe
from rsedge.training.train import make_task

WORDS = [
    "many",
    "some",
    "green",
    "grey",
    "white",
    "planes",
    "trees",
    "buildings",
    "are",
    "near",
    "a",
    "an",
    "in",
    "the",
    "airport",
    "road",
    "river",
    "forest",
    "field",
]
FULL: dict[str, list[str]] = {
    "blip": ["model.image_size=224", "max_tokens=50", "batch_size=16"],
    "clip": ["model.image_size=224", "max_tokens=50", "batch_size=256", "micro_batch_size=64"],
    "clipcap": ["model.image_size=224", "max_tokens=50", "batch_size=64", "freeze=['encoder']"],
}
_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY: dict[str, list[str]] = {
    family: [
        "model.image_size=32",
        "max_tokens=20",
        "batch_size=4",
        *(
            f"model.config.{section}.{name}={value}"
            for section in (("vision",) if family == "clipcap" else ("vision", "text"))
            for name, value in _TOWER.items()
        ),
        *(
            ["model.config.text.n_embd=32", "model.config.text.n_layer=1", "model.config.text.n_head=2"]
            * (family == "clipcap")
        ),
    ]
    for family in FULL
}


@dataclass(frozen=True)
class Noise:
    """A made-up image."""

    seed: int

    def read(self) -> np.ndarray:
        """Uint8 [224, 224, 3]."""
        return np.random.default_rng(self.seed).integers(0, 256, (224, 224, 3), np.uint8)


def made_up(count: int) -> CaptionData:
    """Images of noise with five captions each of the length RSICD's have."""
    random = np.random.default_rng(0)
    examples = []
    for number in range(count):
        captions = tuple(" ".join(random.choice(WORDS, random.integers(8, 15))) + " ." for _ in range(5))
        examples.append(Example(f"noise/{number:05d}", Noise(number), captions, "train" if number % 10 else "val"))
    return CaptionData(tuple(examples))


def measure(
    family: str, precision: str, data: CaptionData, settings: list[str], steps: int, cpu: bool
) -> dict[str, Any]:
    """Images per second and memory of some steps."""
    common = [f"max_steps={steps}", f"mixed_precision={precision}", "log_every=5", "tokenizer=captions", "epochs=1000"]
    recipe = load_recipe(None, family=family, settings=[*common, *settings, "learning_rate=1e-4"])  # type: ignore[arg-type]
    AcceleratorState._reset_state(reset_partial_state=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    accelerator = make_accelerator(recipe, cpu=cpu)
    torch.manual_seed(0)
    seen: list[dict[str, float]] = []
    trainer = Trainer(
        recipe,
        make_task(recipe, data),
        data.split("train"),
        data.split("val")[:8],
        accelerator,
        observe=lambda event: None if event.evaluated else seen.append(dict(event.values)),
    )
    trainer.run()
    warm = seen[2:] or seen
    return {
        "family": family,
        "precision": precision,
        "images_per_second": median([line["samples_per_second"] for line in warm]),
        "gpu_memory_mb": round(max(line.get("gpu_memory_mb", 0.0) for line in seen)),
        "loss": [round(seen[0]["loss"], 3), round(seen[-1]["loss"], 3)],
        "parameters": sum(value.numel() for value in trainer.task.model.parameters()),
    }


def main() -> None:
    """Measure, print, write bench/results/train.json (unless tiny)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="caption set, as rsedge train takes it")
    parser.add_argument("--tiny", action="store_true", help="tiny models, a few steps, nothing written")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--workers", type=int, default=8)
    options = parser.parse_args()
    cpu = not torch.cuda.is_available()
    if cpu and not options.tiny:
        raise SystemExit("full-size training wants a GPU; --tiny checks the script on a CPU")
    data = load_examples([options.data], splits=("train", "val")) if options.data else made_up(3000 if not cpu else 60)
    precisions = ("no", "bf16") if cpu else ("no", "bf16", "fp16")
    rows: list[dict[str, Any]] = []
    for family in FULL:
        settings = [*(TINY if options.tiny else FULL)[family], f"workers={0 if options.tiny else options.workers}"]
        for precision in precisions:
            row = measure(family, precision, data, settings, 10 if options.tiny else options.steps, cpu)
            first = next(entry for entry in (*rows, row) if entry["family"] == family)
            row["ratio_to_fp32"] = round(row["images_per_second"] / first["images_per_second"], 2)
            rows.append(row)
            print(row, flush=True)
    if not options.tiny:
        device = torch.cuda.get_device_name()
        print(save("train", {"machine": {**machine(), "gpu": device}, "rows": rows}))


if __name__ == "__main__":
    main()
