"""How good the bundle is, measured as it will run: by the words of its captions."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import rasterio
from rasterio.enums import Resampling

from rsedge.runtime.demo.scene import compose_scene
from rsedge.runtime.scenes.scene import Scene
from tools.builtin_model.chips import COVERS, Chips
from tools.builtin_model.compose import GENERATED, TILE, chip_tile, mixture, mosaic
from tools.builtin_model.words import WORDS, covers, named_covers, worth_naming

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from rsedge.pixels import UInt8
    from rsedge.runtime.captioner import Captioner

SCENES = (7, 8, 9)  # 7 is the one of the demo; those of training count from 1000
_BARE, _CLOUDS = 5, (8, 9, 10)
_SEED = 99
_BATCH = 64


def measure(captioner: Captioner, held_out: Chips) -> str:
    """Everything measured, as the lines of the card's section on quality."""
    lines = [
        "A chip counts as right if its caption holds one of its class's words (below). No word names two classes, but",
        "a caption may name several things; how many it names is given beside.",
        "",
        "| held-out EuroSAT class | counts as named by | right, L2A look | right, as published |",
        "|---|---|---|---|",
    ]
    looks = [_chips(captioner, held_out, clearing) for clearing in (1.0, None)]
    for number, (name, cover) in enumerate(COVERS.items()):
        rates = " | ".join(f"{np.mean(right[held_out.classes == number]):.1%}" for right, _ in looks)
        lines.append(f"| {name} | {', '.join(WORDS[cover])} | {rates} |")
    overall = " | ".join(f"**{np.mean(right):.1%}**" for right, _ in looks)
    named = " and ".join(f"{mean:.2f}" for _, mean in looks)
    lines += [
        f"| all {len(held_out)} | | {overall} |",
        "",
        f"Each chip is mirrored to fill a tile of {TILE} px; the captions name {named} covers on average.",
        "L2A look: air taken away and rendered by rsedge's reflectance rule. As published: EuroSAT's own 8-bit (L1C).",
        "",
    ]
    rng = np.random.default_rng(_SEED)
    sets = {
        "mosaics of held-out chips of one class": [mosaic(rng, held_out) for _ in range(400)],
        "mixtures of held-out chips of one to four classes": [mixture(rng, held_out) for _ in range(400)],
    }
    for title, tiles in sets.items():
        texts = _captions(captioner, [tile.image for tile in tiles])
        lines.append(f"- {len(tiles)} {title}: {_agreement(texts, [covers(tile.shares) for tile in tiles])}")
    images, shares = _scene_tiles()
    lines.append(f"- {len(images)} tiles of generated scenes: {_agreement(_captions(captioner, images), shares)}")
    return "\n".join(lines)


def measure_scene(captioner: Captioner, tci: Path, scl: Path) -> str:
    """A real product's true-colour image against its own scene classification, as a line of the card.

    Args:
        captioner: The model.
        tci: The product's true-colour image.
        scl: Its scene classification, of any resolution: 5 is ground without vegetation, 8 to 10 are clouds.
    """
    with Scene.open(tci) as scene, rasterio.open(scl) as classes:
        found = classes.read(1, out_shape=(scene.height, scene.width), resampling=Resampling.nearest)
        records = [record for record in captioner.caption_scene(scene) if record.caption is not None]
        size = scene.transform.a
    windows = [np.s_[record.row_off : record.row_off + record.height, :] for record in records]
    bare, cloudy = [], []
    for record, rows in zip(records, windows, strict=True):
        part = found[rows][:, record.col_off : record.col_off + record.width]
        named = named_covers(record.caption or "")
        if (part == _BARE).mean() > 0.5:
            bare.append("desert" in named)
        if worth_naming("cloud", float(np.isin(part, _CLOUDS).mean())):
            cloudy.append("cloud" in named)
    said = ", ".join(f"{cover} {count}" for cover, count in word_counts(record.caption or "" for record in records))
    return (
        f"- {scene.name} of {tci.parent.name} ({size:g} m pixels), by its own scene classification: desert is named in "
        f"{sum(bare)} of the {len(bare)} tiles that are mostly bare ground, cloud in {sum(cloudy)} of the "
        f"{len(cloudy)} with clouds enough for a word. Covers named in its {len(records)} tiles: {said}."
    )


def word_counts(texts: Iterable[str]) -> list[tuple[str, int]]:
    """How many captions name each cover, the most frequent first."""
    return Counter(cover for text in texts for cover in named_covers(text)).most_common()


def _chips(captioner: Captioner, chips: Chips, clearing: float | None) -> tuple[np.ndarray, float]:
    """Whether each chip's class is named, bool [N], and the mean number of covers named."""
    texts = _captions(captioner, [chip_tile(chip, clearing=clearing) for chip in chips.pixels])
    named = [named_covers(text) for text in texts]
    right = np.array([chips.cover(index) in covers_ for index, covers_ in enumerate(named)])
    return right, float(np.mean([len(covers_) for covers_ in named]))


def _captions(captioner: Captioner, images: Sequence[UInt8]) -> list[str]:
    parts = range(0, len(images), _BATCH)
    return [result.text for start in parts for result in captioner.caption(np.stack(images[start : start + _BATCH]))]


def _scene_tiles() -> tuple[list[UInt8], list[dict[str, float]]]:
    """Tiles of generated scenes that are mostly data, and the shares of the covers in them."""
    images, shares = [], []
    for seed in SCENES:
        land = compose_scene(seed=seed)
        image = land.image
        for row in range(0, image.shape[0], TILE):
            for col in range(0, image.shape[1], TILE):
                window = image[row : row + TILE, col : col + TILE]
                if (window == 0).all(-1).mean() <= 0.5:
                    images.append(window)
                    found = land.shares(row, col, TILE)
                    shares.append(covers({GENERATED[name]: share for name, share in found.items()}))
    return images, shares


def _agreement(texts: Sequence[str], shares: Sequence[Mapping[str, float]]) -> str:
    largest, there, told = [], defaultdict(list), defaultdict(list)
    for text, found in zip(texts, shares, strict=True):
        named = named_covers(text)
        largest.append(max(found, key=found.__getitem__) in named)
        for cover in named:
            there[cover].append(found.get(cover, 0) > 0)
        for cover, share in found.items():
            if worth_naming(cover, share):
                told[cover].append(cover in named)
    precision = np.mean([hit for hits in there.values() for hit in hits])
    recall = np.mean([hit for hits in told.values() for hit in hits])
    return (
        f"the largest cover is named in {np.mean(largest):.1%} of the captions; {precision:.1%} of the covers named "
        f"are there; {recall:.1%} of the covers large enough for a word are named"
    )
