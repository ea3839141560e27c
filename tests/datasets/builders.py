"""Small caption sets on disk in every layout, all with the same images."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

SPLITS = {"a.png": "train", "b.png": "train", "c.png": "val", "d.png": "test"}
CAPTIONS = {name: [f"first of {name[0]}", f"second of {name[0]}"] for name in SPLITS}


def pixels(name: str) -> np.ndarray:
    """The image called ``name``, whatever folder it is in."""
    seed = list(Path(name).name.encode())
    return np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)


def images(folder: Path, names: Iterable[str] = SPLITS) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(name)).save(folder / name)
    return folder


def json_lines(path: Path, rows: Iterable[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def table(path: Path, rows: Iterable[dict]) -> Path:
    rows = list(rows)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def karpathy(folder: Path, *, name: str | None = "tiny", splits: dict[str, str] = SPLITS) -> Path:
    """``dataset.json`` with its images in ``images/``."""
    images(folder / "images")
    entries = [
        {"filename": file, "split": split, "sentences": [{"raw": f" {text} ", "tokens": []} for text in CAPTIONS[file]]}
        for file, split in splits.items()
    ]
    path = folder / "dataset.json"
    path.write_text(json.dumps({"images": entries, **({"dataset": name} if name else {})}))
    return path
