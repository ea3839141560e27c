"""The checkpoints that parity tests run on must be worth comparing on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BlipForConditionalGeneration

from tests.models import make_blip, random_images

SIZES = [
    {},
    {"hidden": 48, "heads": 3, "text_hidden": 64, "text_heads": 8, "vocab": 1000, "image_size": 64, "patch": 16},
]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_captions_differ_vary_and_end(tmp_path: Path, sizes: dict, num_beams: int):
    model = BlipForConditionalGeneration.from_pretrained(make_blip(tmp_path, seed=1, **sizes)).eval()
    pixels = torch.from_numpy(random_images(24, model.config.vision_config.image_size)).permute(0, 3, 1, 2) / 127.5 - 1
    end = model.config.text_config.sep_token_id
    rows = model.generate(pixels, max_new_tokens=16, num_beams=num_beams).tolist()
    captions = [tuple(row[1 : row.index(end) if end in row else None]) for row in rows]
    assert len(set(captions)) > 12
    assert len({len(caption) for caption in captions}) >= 4
    words = [len(set(caption)) / len(caption) for caption in captions if len(caption) > 3]
    assert sum(words) / len(words) > 0.4


def test_equal_seeds_give_equal_files(tmp_path: Path):
    first, second, other = (make_blip(tmp_path / str(i), seed=seed) for i, seed in enumerate((5, 5, 6)))
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()
