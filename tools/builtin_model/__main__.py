"""Rebuild the captioner that ships with rsedge: python -m tools.builtin_model --eurosat eurosat_rgb.zip

Composes training tiles, trains in three runs of growing size, exports, measures, and writes the bundle with its card.
What is there already is not made again, and an interrupted run goes on: the same command continues.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from rsedge.training.recipe import load_recipe
from rsedge.training.train import train
from tools.builtin_model import tiles
from tools.builtin_model.package import package
from tools.builtin_model.start import make_start

if TYPE_CHECKING:
    from rsedge.training.loop import Event

BUNDLE = Path("rsedge/builtin/sentinel2-rgb.rsedge")

_log = logging.getLogger(__name__)


def main() -> None:
    """Compose, train, export, measure."""
    parser = argparse.ArgumentParser(prog="python -m tools.builtin_model", description=__doc__.splitlines()[0])
    parser.add_argument("--eurosat", type=Path, required=True, help="zip of EuroSAT's RGB chips, a folder per class")
    parser.add_argument("--scenes", type=Path, help="folder of real products to measure on (TCI.tif with SCL.tif)")
    parser.add_argument("--work", type=Path, default=Path("out/builtin"), help="folder for tiles and runs, about 2 GB")
    parser.add_argument("-o", "--output", type=Path, default=BUNDLE, help="bundle to write")
    parser.add_argument("--precision", choices=["fp32", "fp16", "int8"], default="int8")
    parser.add_argument("--workers", type=int, default=2, help="processes that compose tiles; no result depends on it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["compose", "train", "package"], help="stop after, or do only, this step")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("rsedge").setLevel(logging.INFO)

    work: Path = options.work
    if options.only in (None, "compose"):
        compose(options.eurosat, work, seed=options.seed, workers=options.workers)
    if options.only in (None, "train"):
        fit(work, seed=options.seed)
    if options.only in (None, "package"):
        best = work / tiles.TILES.name / "best"
        package(best, options.output, options.eurosat, precision=options.precision, scenes=options.scenes)


def compose(archive: Path, work: Path, *, seed: int, workers: int) -> None:
    """Make the tiles of all runs."""
    lands = work / "lands"
    tiles.make_lands(lands, seed=seed + 1000, workers=workers)
    for wanted in tiles.SETS:
        tiles.make(wanted, archive, lands, work, seed=seed, workers=workers)


def fit(work: Path, *, seed: int) -> None:
    """Train in three runs, each from the best checkpoint of the one before."""
    before = work / "start"
    for wanted in tiles.SETS:
        run, data = work / wanted.name, tiles.load(wanted, work, seed=seed)
        recipe = dataclasses.replace(load_recipe(f"builtin-{wanted.name}", family="blip"), seed=seed)
        if recipe.model.init is None and not before.exists():
            make_start(recipe, data, before)
        # What it starts from has the shape and the words already.
        model = dataclasses.replace(recipe.model, init=str(before), tokenizer=None, config={})
        recipe = dataclasses.replace(recipe, model=model)
        train(recipe, run, data=data, resume=run.exists(), cpu=True, trackers=(), observe=_report)
        before = run / "best"


def _report(event: Event) -> None:
    shown = ", ".join(f"{name} {value:.4g}" for name, value in event.values.items() if name != "gradient_norm")
    _log.info("step %d of %d: %s", event.step, event.steps, shown)


if __name__ == "__main__":
    main()
