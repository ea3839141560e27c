"""Compare what to do with tiles that hang over the edge of a scene: shift, mirror, pad.

A tile of one land cover (EuroSAT chips side by side) is cut after a few columns, as the edge of a scene cuts it, and
captioned after each treatment. ``python bench/edges.py EUROSAT.zip`` prints how often the class is named, and how
often water is named on land.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from zipfile import ZipFile

import numpy as np
from PIL import Image

from rsedge.cli.config import built_in_model
from rsedge.runtime.captioner import Captioner

WORDS = {
    "AnnualCrop": ("crop", "field"),
    "Forest": ("forest", "trees"),
    "HerbaceousVegetation": ("grass", "scrub", "shrub"),
    "Industrial": ("industrial", "warehouse"),
    "Pasture": ("pasture", "meadow"),
    "PermanentCrop": ("orchard", "vineyard"),
    "Residential": ("residential", "houses"),
}
SIZE, COLUMNS = 224, (4, 16, 64)


def main() -> None:
    """Read chips, caption each treatment, print shares as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("archive", type=Path, help="zip of EuroSAT's RGB chips")
    parser.add_argument("--tiles", type=int, default=6, help="tiles of each class")
    arguments = parser.parse_args()
    captioner = Captioner.load(built_in_model(), device="cpu")
    random = np.random.default_rng(0)
    found: dict[str, dict[str, float]] = {}
    with ZipFile(arguments.archive) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        tiles = []
        for label in WORDS:
            own = [name for name in names if f"/{label}_" in name]
            for _ in range(arguments.tiles):
                chips = [
                    np.asarray(Image.open(io.BytesIO(archive.read(own[at]))).convert("RGB"))
                    for at in random.choice(len(own), 16, replace=False)
                ]
                whole = np.concatenate([np.concatenate(chips[row * 4 : row * 4 + 4], axis=1) for row in range(4)])
                tiles.append((label, whole[:SIZE, :SIZE]))
    for columns in COLUMNS:
        for edge in ("shift", "mirror", "pad"):
            images = []
            for _, tile in tiles:
                mode = "symmetric" if edge == "mirror" else "constant"
                beyond = ((0, 0), (0, SIZE - columns), (0, 0))
                images.append(tile if edge == "shift" else np.pad(tile[:, :columns], beyond, mode))
            texts = [caption.text for caption in captioner.caption(np.stack(images))]
            named = [any(word in text for word in WORDS[label]) for (label, _), text in zip(tiles, texts, strict=True)]
            water = [any(word in text for word in ("water", "lake", "sea")) for text in texts]
            found[f"{columns} columns, {edge}"] = {
                "class_named": round(float(np.mean(named)), 3),
                "water_named": round(float(np.mean(water)), 3),
            }
    print(json.dumps({"model": captioner.model, "tiles": len(tiles), "found": found}, indent=1))


if __name__ == "__main__":
    main()
