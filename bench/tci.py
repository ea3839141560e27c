"""How closely the rule for reflectance gives a product's own true-colour image (TCI), on a real Sentinel-2 L2A product.

    python bench/tci.py ../shared/data/scenes/S2A_29RKH_20200219_L2A

The folder holds red, green and blue as digital numbers and TCI.tif on the same grid. Compared are pixels where the TCI
is not saturated (255), and again those with nothing saturated within two pixels: the product here was resampled band by
band after its TCI had been clipped, so that a pixel beside a saturated one is a mean of clipped values.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.lib.stride_tricks import sliding_window_view

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common


def measure(folder: Path) -> dict[str, Any]:
    from rsedge.runtime.scenes.scene import Scene

    scene = Scene.open(folder)
    with scene.reader() as reader:
        ours = reader.read(0, 0, scene.height, scene.width)[0].astype(int)
    with rasterio.open(folder / "TCI.tif") as dataset:
        theirs = dataset.read().transpose(1, 2, 0).astype(int)
    saturated = theirs == 255
    around = sliding_window_view(np.pad(saturated, ((2, 2), (2, 2), (0, 0))), (5, 5), axis=(0, 1)).any(axis=(-1, -2))
    values = {"product": scene.product_id, "rule": scene.rule}
    for name, chosen in (("not_saturated", ~saturated & (theirs > 0)), ("none_saturated_near", ~around & (theirs > 0))):
        difference = np.abs(ours - theirs)[chosen]
        values[name] = {
            "share_of_values": round(float(chosen.mean()), 4),
            "mean_absolute_difference": round(float(difference.mean()), 3),
            "within_1": round(float((difference <= 1).mean()), 4),
            "within_2": round(float((difference <= 2).mean()), 4),
        }
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    values = {"machine": common.machine(), **measure(parser.parse_args().folder)}
    common.save("tci", values)
    print(json.dumps(values, indent=2))


if __name__ == "__main__":
    main()
