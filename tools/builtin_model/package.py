"""From the trained checkpoint to the bundle with its card."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from rsedge.export.convert import export
from rsedge.manifest import Domain
from rsedge.runtime.captioner import Captioner
from tools.builtin_model.chips import HELD_OUT, read_chips
from tools.builtin_model.quality import measure, measure_scene

if TYPE_CHECKING:
    from rsedge.export.graphs.builder import Precision

_log = logging.getLogger(__name__)

ABOUT = f"""
## What it is

A small captioner of Sentinel-2 true-colour tiles of 224 × 224 pixels at 10 m, so that rsedge has something to run when
it has just been installed. It knows land cover and says it in a small closed vocabulary: crop fields, forest, grassland
and scrub, pasture, orchards and vineyards, residential and industrial areas, roads, rivers, lakes and the sea, desert,
snow, cloud. It does not know ships, bridges, airports or anything smaller than a field; on aerial images, on other
resolutions and on other sensors it guesses. For anything else, fine-tune a captioner and export it.

It was trained by `python -m tools.builtin_model` (rsedge's own trainer) on tiles composed from EuroSAT chips and from
generated land (rsedge.runtime.demo). What it knows of desert, snow, cloud and the coast it has from generated land
only, and EuroSAT shows Europe.

## Quality

{HELD_OUT} chips of each EuroSAT class, fixed by the hash of their file names, never entered training.

"""
CREDIT = """
## Credit

EuroSAT: P. Helber, B. Bischke, A. Dengel and D. Borth, "EuroSAT: A Novel Dataset and Deep Learning Benchmark for Land
Use and Land Cover Classification", IEEE Journal of Selected Topics in Applied Earth Observations and Remote Sensing,
2019; MIT licence (github.com/phelber/EuroSAT). Contains modified Copernicus Sentinel data. The bundle holds weights, no
images.
"""


def package(checkpoint: Path, output: Path, archive: Path, *, precision: Precision, scenes: Path | None = None) -> None:
    """Export the checkpoint, measure the bundle as it will run, and add what was found to its model card.

    Args:
        checkpoint: Of the last run.
        output: The bundle to write.
        archive: Zip of EuroSAT's chips, for those held out.
        precision: Of the bundle.
        scenes: Folder with Sentinel-2 products as folders with ``TCI.tif`` and ``SCL.tif``.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    bundle = export(
        checkpoint,
        output,
        precision=precision,
        generation={"repetition_penalty": 1.3},  # without it: "a lake or sea or sea"
        domain=Domain(resolution=(10.0, 10.0), surface_reflectance=True),
        overwrite=True,
        progress=_log.info,
    )
    _, _, held_out = read_chips(archive)
    captioner = Captioner.load(output, device="cpu")
    products = sorted(scenes.glob("*/TCI.tif")) if scenes else []
    lines = [measure(captioner, held_out), *(measure_scene(captioner, tci, tci.parent / "SCL.tif") for tci in products)]
    quality = "\n".join(lines)
    card = output / "README.md"  # the manifest does not hash it
    text = card.read_text("utf-8").replace("---\n", "---\nlicense: apache-2.0\n", 1)
    card.write_text(f"{text}{ABOUT}{quality}\n{CREDIT}", "utf-8")
    size = sum(path.stat().st_size for path in output.iterdir())
    _log.info("%s\n%s: %s, %.2f MB", quality, output, bundle.model, size / 1e6)
