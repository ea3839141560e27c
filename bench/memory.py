"""Does memory stay flat however large the scene is?

A generated 10980 × 10980 scene (a whole Sentinel-2 tile; tiled deflate GeoTIFF, as 8-bit colours and as 16-bit
reflectance) and its upper left quarter are captioned by `rsedge caption` with a small random model; the peak resident
memory of each process is compared, medians over rounds.

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


def write_scene(path: Path, side: int, dtype: str = "uint8") -> Path:
    """A smooth seeded scene that compresses about as well as a real one."""
    random = np.random.default_rng(1)
    profile = {"driver": "GTiff", "width": side, "height": side, "count": 3, "dtype": dtype, "crs": "EPSG:32632"}
    profile |= {"transform": from_origin(600000, 5100000, 10, 10), "compress": "deflate", "interleave": "pixel"}
    profile |= {"tiled": True, "blockxsize": 512, "blockysize": 512, "zlevel": 1, "photometric": "rgb"}
    texture = random.integers(0, 32, (3, 512, side), dtype=np.uint8)
    with rasterio.open(path, "w", **profile) as dataset:
        for top in range(0, side, 512):
            height = min(512, side - top)
            data = (texture[:, :height] + np.uint8(60 + top % 120)).astype(dtype)
            dataset.write(data if dtype == "uint8" else data * 9, window=Window(0, top, side, height))
    return path


def run_worker(scene: Path, output: Path) -> None:
    from rsedge.cli.main import run

    start = time.perf_counter()
    model = common.bundle("fp32", "small", **SMALL)
    code = run(["-q", "caption", str(scene), "-m", str(model), "-o", str(output), "--device", "cpu"])
    seconds = time.perf_counter() - start
    values = {"exit": code, "peak_rss_mb": round(common.peak_rss_mb(), 1), "seconds": round(seconds, 1)}
    print(json.dumps(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        run_worker(*options.worker)
        return
    common.bundle("fp32", "small", **SMALL)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for dtype in ("uint8", "uint16"):
            peaks = {}
            for side in (SIDE // 2, SIDE):
                scene = write_scene(folder / f"{side}.tif", side, dtype)
                outputs = [str(folder / f"{dtype}-{side}-{number}.geojson") for number in range(options.rounds)]
                results = [common.worker(__file__, str(scene), output) for output in outputs]
                peaks[side] = common.median([result["peak_rss_mb"] for result in results])
                print(f"{dtype} {side:6} px: {(-(-side // 224)) ** 2:5} tiles, peak RSS {peaks[side]} MB")
            ratio = round(peaks[SIDE] / peaks[SIDE // 2], 3)
            rows.append({"dtype": dtype, "quarter_mb": peaks[SIDE // 2], "whole_mb": peaks[SIDE], "ratio": ratio})
            print(f"{dtype}: the whole scene takes {ratio} times the memory of its quarter")
    common.save("memory", {"machine": common.machine(), "side": SIDE, "rounds": options.rounds, "rows": rows})


if __name__ == "__main__":
    main()
