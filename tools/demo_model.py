"""Train the captioner behind ``rsedge demo`` on generated land, and export it: python tools/demo_model.py.

Two cores take about a quarter of an hour. The model has seen nothing real: it is there so that the demo works offline,
in seconds, from an installation of a few megabytes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional
from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration

from rsedge.export.convert import export
from rsedge.pixels import UInt8, resize
from rsedge.runtime.captioner import Captioner
from rsedge.runtime.synthetic import CLASSES, compose_scene, compose_tile
from rsedge.tomlfile import write_toml

if TYPE_CHECKING:
    from rsedge.export.precision import Precision

IMAGE_SIZE, TILE_SIZE = 112, 224
MEAN, STD = (0.30, 0.33, 0.26), (0.20, 0.15, 0.13)  # of the training tiles, about
HELD_OUT_SCENES = (7, 8, 9)  # 7 is the demo's own; training scenes count from 1000
DATA = "generated scenes only (rsedge.runtime.synthetic), no real imagery"

WORDS = {
    "farmland": ("farmland", "fields"),
    "forest": ("forest", "woodland"),
    "grassland": ("grassland", "meadows"),
    "desert": ("desert", "sand"),
    "town": ("town", "houses"),
    "industrial area": ("industrial",),
    "lake": ("lake",),
    "sea": ("sea",),
    "river": ("river",),
    "road": ("road",),
}
"""Words that name a class in a caption; no word names two."""

# What a tile mostly is, what else is in it, and how it lies by that one other thing.
_MOST = {
    "farmland": ("farmland", "crop fields", "a patchwork of fields"),
    "forest": ("dense forest", "woodland"),
    "grassland": ("open grassland", "green meadows"),
    "desert": ("bare desert", "desert sand"),
    "town": ("a town", "houses and streets of a town"),
    "industrial area": ("an industrial area", "large industrial roofs"),
    "lake": ("a lake",),
    "sea": ("the open sea", "the sea"),
    "river": ("a wide river",),
    "road": ("a road",),
}
_ALSO = {
    "farmland": ("some farmland", "a few fields"),
    "forest": ("patches of forest", "some woodland"),
    "grassland": ("some grassland", "a few meadows"),
    "desert": ("some desert",),
    "town": ("a town", "some houses"),
    "industrial area": ("an industrial area",),
    "lake": ("a lake",),
    "sea": ("the sea",),
    "river": ("a winding river", "a river"),
    "road": ("a road",),
}
_BY = {
    "farmland": ("surrounded by crop fields", "beside farmland"),
    "forest": ("beside a forest", "with patches of forest"),
    "desert": ("at the edge of the desert",),
    "town": ("around a town",),
    "lake": ("beside a lake", "on the shore of a lake"),
    "sea": ("by the sea", "on the coast of the sea"),
    "river": ("along a winding river", "on a river"),
    "road": ("crossed by a road",),
}
_ENOUGH = {"river": 0.012, "road": 0.008}  # shares worth a word; thin things are small but catch the eye
_ENOUGH_AREA = 0.06


def caption(rng: np.random.Generator, shares: dict[str, float]) -> str:
    """A caption that follows from the shares, largest first; the wording varies, what is named does not."""
    most, *others = shares
    named = [name for name in others if shares[name] >= _ENOUGH.get(name, _ENOUGH_AREA)][:3]
    head = str(rng.choice(_MOST[most]))
    if not named:
        return f"nothing but {head}" if rng.random() < 0.3 else head
    if len(named) == 1:
        other = named[0]
        if shares[other] > 0.6 * shares[most]:
            return f"{head} and {rng.choice(_MOST[other])}"
        if most in ("lake", "sea") and other not in _ENOUGH:
            return f"{head} with {rng.choice(_ALSO[other])} on the shore"
        if other in _BY and rng.random() < 0.8:
            return f"{head} {rng.choice(_BY[other])}"
    *first, last = [str(rng.choice(_ALSO[name])) for name in named]
    return f"{head} with {', '.join(first)} and {last}" if first else f"{head} with {last}"


def named_classes(text: str) -> set[str]:
    """The classes a caption names."""
    words = set(text.replace(",", " ").split())
    return {name for name, synonyms in WORDS.items() if words & set(synonyms)}


def vocabulary() -> list[str]:
    """Whole words of every phrase, between BERT's special tokens and BLIP's."""
    phrases = [phrase for table in (_MOST, _ALSO, _BY) for choices in table.values() for phrase in choices]
    words = sorted({word for phrase in phrases for word in phrase.split()} | {"nothing", "but", "and", "with", ","})
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, "[DEC]", "[ENC]"]


# Tiles

Tiles = tuple[UInt8, list[dict[str, float]]]


def scene_tiles(seed: int, extra: int = 30) -> Tiles:
    """The tiles of a scene and as many more windows of it; those mostly without data are left out."""
    rng = np.random.default_rng(seed)
    rows, cols = 6, 8
    scene = compose_scene(seed=seed, tiles=(rows, cols), tile_size=TILE_SIZE)
    offsets = [(row * TILE_SIZE, col * TILE_SIZE) for row in range(rows) for col in range(cols)]
    offsets += [tuple(rng.integers(0, [(rows - 1) * TILE_SIZE, (cols - 1) * TILE_SIZE])) for _ in range(extra)]
    image, kept, shares = scene.image, [], []
    for row, col in offsets:
        window = image[row : row + TILE_SIZE, col : col + TILE_SIZE]
        if (window.max(axis=-1) == 0).mean() <= 0.5:
            kept.append(resize(window, IMAGE_SIZE))
            shares.append(scene.shares(row, col, TILE_SIZE))
    return np.stack(kept), shares


def single_tiles(seed: int, count: int = 100) -> Tiles:
    """Tiles that show every class often."""
    rng = np.random.default_rng(seed)
    tiles = [compose_tile(rng, TILE_SIZE) for _ in range(count)]
    return np.stack([resize(image, IMAGE_SIZE) for image, _ in tiles]), [shares for _, shares in tiles]


def gather(parts: Iterable[Tiles]) -> Tiles:
    """Several sets of tiles as one."""
    images, shares = zip(*parts, strict=True)
    return np.concatenate(images), [entry for part in shares for entry in part]


# Model


def new_model(words: Sequence[str], seed: int) -> BlipForConditionalGeneration:
    """A random captioner of about a million weights."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4}
    text = {
        **shape,
        "encoder_hidden_size": 128,
        "num_hidden_layers": 2,
        "vocab_size": len(words),
        "max_position_embeddings": 32,
        "bos_token_id": words.index("[DEC]"),
        "sep_token_id": words.index("[SEP]"),
        "eos_token_id": words.index("[SEP]"),
        "pad_token_id": words.index("[PAD]"),
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    vision = {**shape, "num_hidden_layers": 3, "image_size": IMAGE_SIZE, "patch_size": 16}
    return BlipForConditionalGeneration(BlipConfig(vision_config=vision, text_config=text))


def train(model: BlipForConditionalGeneration, tiles: Tiles, words: Sequence[str], *, steps: int, seed: int) -> None:
    """Fit captions drawn anew in every step; a head that guesses the shares helps the encoder and is dropped."""
    images, shares = tiles
    rng = np.random.default_rng(seed)
    index = {word: number for number, word in enumerate(words)}
    truth = torch.tensor([[entry.get(name, 0.0) for name in CLASSES] for entry in shares])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (MEAN, STD))
    shares_head = torch.nn.Linear(model.config.vision_config.hidden_size, len(CLASSES))
    optimizer = torch.optim.AdamW([*model.parameters(), *shares_head.parameters()], lr=1e-3, weight_decay=0.02)
    warm_up = 80
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / warm_up) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    model.train()
    began, running = time.monotonic(), 0.0
    for step in range(steps):
        chosen = rng.integers(0, len(images), 64)
        batch = torch.rot90(pixels[chosen], int(rng.integers(4)), (2, 3))
        batch = batch.flip(3) if rng.random() < 0.5 else batch
        texts = [caption(rng, shares[number]).replace(",", " ,").split() for number in chosen]
        rows = [[index["[DEC]"], *(index[word] for word in text), index["[SEP]"]] for text in texts]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        mask = (ids != index["[PAD]"]).long()
        labels = ids.masked_fill(mask == 0, -100)
        output = model((batch / 255.0 - mean) / std, input_ids=ids, attention_mask=mask, labels=labels)
        guess = shares_head(output.last_hidden_state[:, 1:].mean(dim=1))
        loss = output.loss + functional.cross_entropy(guess, truth[chosen])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running += (output.loss.item() - running) / min(step + 1, 100)
        if (step + 1) % 100 == 0:
            logging.info("step %d of %d, loss %.3f, %.0f s", step + 1, steps, running, time.monotonic() - began)


def save(model: BlipForConditionalGeneration, words: Sequence[str], folder: Path, recipe: dict[str, object]) -> None:
    """A checkpoint in Hugging Face layout, with the recipe that the manifest will quote."""
    model.generation_config.max_new_tokens = 24
    model.eval().save_pretrained(folder)
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[DEC]", "[ENC]"]})
    tokenizer.save_pretrained(folder)
    processor = {
        "image_processor_type": "BlipImageProcessor",
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": MEAN,
        "image_std": STD,
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")
    write_toml(folder / "recipe.toml", recipe)


def quality(captioner: Captioner, tiles: Tiles) -> str:
    """How often captions name the largest class, and how often what they name covers 1 % (lines: 0.3 %) or more."""
    images, shares = tiles
    hits, there = [], {}
    for result, entry in zip(captioner.caption(images), shares, strict=True):
        named = named_classes(result.text)
        hits.append(next(iter(entry)) in named)
        for name in named:
            there.setdefault(name, []).append(entry.get(name, 0) >= (0.003 if name in _ENOUGH else 0.01))
    right = {name: float(np.mean(entries)) for name, entries in there.items()}
    overall = np.mean([*itertools.chain(*there.values())])
    weakest = min(right, key=right.__getitem__)
    return (
        f"the largest class is named in {np.mean(hits):.1%} of the captions; {overall:.1%} of the classes "
        f"named are there, the least reliable being {weakest} ({right[weakest]:.0%})"
    )


def package(checkpoint: Path, output: Path, precision: Precision, tests: dict[str, Tiles]) -> None:
    """Export, measure the bundle as the demo will run it, and add the figures to its model card."""
    output.parent.mkdir(exist_ok=True)
    bundle = export(checkpoint, output, precision=precision, overwrite=True)
    captioner = Captioner.load(output, device="cpu")
    lines = [f"Trained on {DATA}: it makes the demo work and is not for real images.", ""]
    lines += [f"- {len(test[0])} held-out {name}: {quality(captioner, test)}" for name, test in tests.items()]
    with (output / "README.md").open("a", encoding="utf-8") as card:  # the manifest does not hash the card
        card.write("\n## Quality\n\n" + "\n".join(lines) + "\n")
    size = sum(path.stat().st_size for path in output.iterdir())
    logging.info("%s\n%s: %s, %.2f MB", "\n".join(lines), output, bundle.model, size / 1e6)


def main() -> None:
    """Generate, train, and package."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("rsedge/builtin/sentinel2-rgb.rsedge"), help="bundle to write"
    )
    parser.add_argument("--checkpoint", type=Path, default=Path("out/demo"), help="checkpoint folder to write")
    parser.add_argument("--precision", choices=["fp32", "fp16", "int8"], default="int8")
    parser.add_argument("--scenes", type=int, default=40, help="training scenes")
    parser.add_argument("--tiles", type=int, default=3000, help="training tiles beside them")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    with ProcessPoolExecutor() as pool:
        scenes = pool.map(scene_tiles, range(1000, 1000 + options.scenes))
        singles = pool.map(single_tiles, range(2000, 2000 + options.tiles // 100))
        held_out = pool.map(scene_tiles, HELD_OUT_SCENES)
        held_out_singles = pool.map(single_tiles, range(100, 104))
        tiles = gather([*scenes, *singles])
        tests = {"scene tiles": gather(held_out), "single tiles": gather(held_out_singles)}
    logging.info("%d training tiles", len(tiles[0]))
    words = vocabulary()
    model = new_model(words, options.seed)
    train(model, tiles, words, steps=options.steps, seed=options.seed)
    recipe = {"data": DATA, "scenes": options.scenes, "tiles": options.tiles, "steps": options.steps}
    save(model, words, options.checkpoint, {**recipe, "seed": options.seed})
    package(options.checkpoint, options.output, options.precision, tests)


if __name__ == "__main__":
    main()
