"""Does memory stay flat however large the scene is?

A generated 10980 × 10980 scene (uint8 RGB, tiled deflate GeoTIFF: a whole Sentinel-2 tile) and its upper left quarter
are captioned by `rsedge caption` with a small random model; the peak resident memory of each process is compared.

    python bench/memory.py
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import rasterio
from rasterio.transform import from_origin
from rasterio.windows import Window

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common

SIDE = 10980
SMALL = {"hidden": 64, "layers": 2, "heads": 4, "vocab": 500, "image_size": 64, "patch": 16}


def write_scene(path: Path, side: int) -> Path:
    """A smooth seeded scene that compresses about as well as a real one."""
    random = np.random.default_rng(1)
    profile = {"driver": "GTiff", "width": side, "height": side, "count": 3, "dtype": "uint8", "crs": "EPSG:32632"}
    profile |= {"transform": from_origin(600000, 5100000, 10, 10), "compress": "deflate", "interleave": "pixel"}
    profile |= {"tiled": True, "blockxsize": 512, "blockysize": 512, "zlevel": 1, "photometric": "rgb"}
    texture = random.integers(0, 32, (3, 512, side), dtype=np.uint8)
    with rasterio.open(path, "w", **profile) as dataset:
        for top in range(0, side, 512):
            height = min(512, side - top)
            data = texture[:, :height] + np.uint8(60 + top % 120)
            dataset.write(data, window=Window(0, top, side, height))
    return path


def run_worker(scene: Path, output: Path) -> None:
    from rsedge.cli.main import run

    start = time.perf_counter()
    model = common.bundle("fp32", "small", **SMALL)
    code = run(["-q", "caption", str(scene), "-m", str(model), "-o", str(output), "--device", "cpu"])
    seconds = time.perf_counter() - start
    print(json.dumps({"exit": code, "peak_rss_mb": round(common.peak_rss_mb(), 1), "seconds": round(seconds, 1)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        run_worker(*options.worker)
        return
    common.bundle("fp32", "small", **SMALL)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for side in (SIDE // 2, SIDE):
            scene = write_scene(Path(folder) / f"{side}.tif", side)
            result = common.worker(__file__, str(scene), str(Path(folder) / f"{side}.geojson"))
            rows.append({"side": side, "tiles": (-(-side // 224)) ** 2, **result})
            print(
                f"{side:6} px: {rows[-1]['tiles']:5} tiles, peak RSS {result['peak_rss_mb']} MB, {result['seconds']} s"
            )
    ratio = rows[1]["peak_rss_mb"] / rows[0]["peak_rss_mb"]
    print(f"the whole scene takes {ratio:.3f} times the memory of its quarter")
    common.save("memory", {"machine": common.machine(), "rows": rows, "ratio": round(ratio, 4)})


if __name__ == "__main__":
    main()
