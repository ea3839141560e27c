"""Does reading and writing cost anything beside inference?

`rsedge caption` on a deflate-compressed GeoTIFF against captioning the same tiles from memory, BLIP-base at 224 px
(random weights, seeded), greedy, 20 new tokens; pairs in one process, medians over rounds.

    python bench/pipeline.py [--precision int8] [--rounds 3] [--tiles 8]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common
from bench.memory import write_scene


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", choices=["fp32", "int8"], default="int8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiles", type=int, default=8, help="tiles along each side of the scene")
    options = parser.parse_args()

    from rsedge import Captioner, Scene
    from rsedge.runtime.pipeline import SEGMENT_TILES, run
    from rsedge.runtime.reader import read_tiles
    from rsedge.runtime.tiles import TileGrid

    captioner = Captioner.load(common.bundle(options.precision), device="cpu")
    task = captioner.with_options(num_beams=1, max_new_tokens=20, min_new_tokens=20)
    model_only, whole = [], []
    with tempfile.TemporaryDirectory() as folder:
        scene = Scene.open(write_scene(Path(folder) / "scene.tif", options.tiles * 224))
        grid = TileGrid(scene.width, scene.height, 224)
        tiles = np.array([pixels.image for pixels in read_tiles(scene, grid, image_size=224)])
        for number in range(options.rounds):
            start = time.perf_counter()
            for first in range(0, len(tiles), SEGMENT_TILES):
                part = tiles[first : first + SEGMENT_TILES]
                task.caption_tiles(part, range(len(part)))
            model_only.append((time.perf_counter() - start) / len(tiles) * 1e3)
            start = time.perf_counter()
            run([scene], task, Path(folder) / f"{number}.geojson")
            whole.append((time.perf_counter() - start) / len(tiles) * 1e3)
            print(f"round {number + 1}: model {model_only[-1]:.0f}, pipeline {whole[-1]:.0f} ms/tile", file=sys.stderr)
    ratio = common.median([b / a for a, b in zip(model_only, whole, strict=True)])
    row = {"precision": options.precision, "tiles": len(tiles), "model_ms": common.median(model_only)}
    row |= {"pipeline_ms": common.median(whole), "ratio": ratio}
    print(f"model only {row['model_ms']:.0f} ms/tile, from GeoTIFF {row['pipeline_ms']:.0f} ms/tile: {ratio:.3f} times")
    common.save("pipeline", {"machine": common.machine(), "rounds": options.rounds, **row})


if __name__ == "__main__":
    main()
