"""Does reading and writing cost anything beside inference, and does memory stay flat on the way?

`rsedge caption` on a deflate-compressed GeoTIFF against captioning the same tiles from memory, BLIP-base at 224 px
(random weights, seeded), greedy, 20 new tokens; pairs in one process, medians over rounds.

    python bench/pipeline.py [--precision int8] [--rounds 3] [--tiles 8]
    python bench/pipeline.py --whole [--precision int8]

`--whole` does it once for a deflate COG of 10980 × 10980 px, which takes minutes. The run has a process of its own; it
is stopped (SIGSTOP, its readers too) at the beginning and after every tenth of the scene while another process captions
the segment just done from memory. Resident memory is taken after every segment.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common
from bench.memory import SIDE, write_scene

if TYPE_CHECKING:
    import numpy as np

    from rsedge.runtime.captioner import TileCaptions
    from rsedge.runtime.outputs.records import Caption
    from rsedge.runtime.run.pipeline import Progress

TOKENS, TILE = 20, 224
STRETCHES = 10


def captions(bundle: Path) -> TileCaptions:
    """The model, ready to caption tiles with as many tokens each."""
    from rsedge import Captioner

    captioner = Captioner.load(bundle, device="cpu")
    return captioner.with_options(num_beams=1, max_new_tokens=TOKENS, min_new_tokens=TOKENS)


# ---- a few tiles, in rounds ----


def measure_rounds(bundle: Path, side: int, rounds: int) -> dict[str, Any]:
    """Rounds of the model alone and the pipeline, over a scene of ``side`` × ``side`` px, a multiple of ``TILE``."""
    from rsedge import Scene
    from rsedge.pixels import stack_images
    from rsedge.runtime.run.pipeline import SEGMENT_TILES, run
    from rsedge.runtime.scenes.readahead import read_tiles
    from rsedge.runtime.scenes.tiles import TileGrid

    task = captions(bundle)
    model_only, whole = [], []
    with tempfile.TemporaryDirectory() as folder:
        scene = Scene.open(write_scene(Path(folder) / "scene.tif", side))
        grid = TileGrid(scene.width, scene.height, TILE)
        tiles = stack_images([pixels.image for pixels in read_tiles(scene, grid, image_size=task.image_size)])
        task.caption_tiles(tiles[:16], range(len(tiles[:16])))  # the first run allocates
        for number in range(rounds):
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
    values = {"tiles": len(tiles), "model_ms": common.median(model_only), "pipeline_ms": common.median(whole)}
    return {"rounds": rounds, **values, "ratio": ratio}


# ---- a whole scene ----


@dataclass(frozen=True)
class Stretch:
    """A part of the run between two stops: tiles that the model saw, and seconds."""

    tiles: int
    seconds: float


def write_cog(path: Path, side: int) -> Path:
    """The scene of `bench/memory.py` as a deflate COG."""
    import rasterio.shutil

    plain = write_scene(path.with_suffix(".plain.tif"), side)
    rasterio.shutil.copy(plain, path, driver="COG", compress="DEFLATE", blocksize=512, overviews="NONE", num_threads=2)
    plain.unlink()
    return path


def measure_whole(bundle: Path, scene: Path, *, stretches: int = STRETCHES) -> dict[str, Any]:
    """One run over ``scene``, stopped ``stretches`` - 1 times, and the model alone at each stop and both ends."""
    found: list[Stretch] = []
    alone: list[float] = []  # ms per tile, one more than there are stretches
    memory: list[tuple[int, float]] = []  # tiles done, MB
    with tempfile.TemporaryDirectory() as folder, common.Process(__file__, "model", str(bundle), str(scene)) as model:

        def time_alone(segment: int) -> None:
            answer = model.ask(segment)
            alone.append(answer["seconds"] / answer["tiles"] * 1e3)

        model.read()
        time_alone(0)
        output = Path(folder) / "captions.geojson"
        with common.Process(__file__, "run", str(bundle), str(scene), str(output)) as running:
            state = running.read()
            begin, seen, segment = time.perf_counter(), 0, 0
            segments = state["segments"]
            stops = {segments * number // stretches for number in range(1, stretches)} - {0}
            while not state["ended"]:
                state = running.read()
                memory.append((state["done"], state["rss_mb"]))
                segment += 1
                if segment in stops or state["ended"]:
                    running.pause()
                    found.append(Stretch(state["seen"] - seen, time.perf_counter() - begin))
                    time_alone(min(segment, segments) - 1)
                    print(f"{state['done']} tiles: {_said(found[-1], alone)}", file=sys.stderr)
                    running.resume()
                    begin, seen = time.perf_counter(), state["seen"]
    return {"side": state["side"], **summarise(found, alone), **flatness(memory), "peak_rss_mb": state["peak_rss_mb"]}


def _said(stretch: Stretch, alone: Sequence[float]) -> str:
    pipeline = f"{stretch.seconds / stretch.tiles * 1e3:.1f}" if stretch.tiles else "no"
    return f"pipeline {pipeline}, model {alone[-2]:.1f} and {alone[-1]:.1f} ms/tile"


def summarise(stretches: Sequence[Stretch], alone: Sequence[float]) -> dict[str, Any]:
    """The run against the model alone, which during a stretch is what it was, on average, at both of its ends.

    Args:
        stretches: The whole run, with its beginning and the writing of its output.
        alone: ms per tile of the model before the first and after each of them.
    """
    expected = [
        stretch.tiles * (before + after) / 2e3
        for stretch, before, after in zip(stretches, alone[:-1], alone[1:], strict=True)
    ]
    tiles, seconds = sum(stretch.tiles for stretch in stretches), sum(stretch.seconds for stretch in stretches)
    pairs = [stretch.seconds / least for stretch, least in zip(stretches, expected, strict=True) if least]
    return {
        "tiles": tiles,
        "seconds": round(seconds, 2),
        "tiles_per_second": float(f"{tiles / seconds:.4g}"),
        "pipeline_ms": float(f"{seconds / tiles * 1e3:.4g}"),
        "model_ms": float(f"{sum(expected) / tiles * 1e3:.4g}"),
        "ratio": round(seconds / sum(expected), 3),
        "ratios": [round(ratio, 3) for ratio in pairs],
    }


def flatness(memory: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """Resident memory after a tenth of the tiles and at the end, and about a hundred points between."""
    total = memory[-1][0]
    early = next(size for done, size in memory if done >= total / 10)
    step = -(-len(memory) // 100)
    return {
        "rss_mb_at_a_tenth": early,
        "rss_mb_at_the_end": memory[-1][1],
        "rss_ratio": round(memory[-1][1] / early, 3),
        "rss_mb": [*memory[:-1:step], memory[-1]],
    }


def model_worker(bundle: Path, name: Path) -> None:
    """Caption the segment that a line names from memory, and tell how long that took."""
    from rsedge import Scene
    from rsedge.pixels import stack_images
    from rsedge.runtime.run.pipeline import Models
    from rsedge.runtime.run.sources import SEGMENT_TILES, SceneTiles, TileOptions

    task = captions(bundle)
    models = Models(captioner=task)
    source = SceneTiles(Scene.open(name), TileOptions(tile_size=TILE))

    def images(segment: int) -> np.ndarray:
        """Of a segment that the model sees at least half of, this one or one before it."""
        while True:
            tiles = next(source.segments(segment, models.sizes, models.model))
            shown = [tile.images[0] for tile in tiles if tile.record.status == "ok"]
            if segment == 0 or 2 * len(shown) >= SEGMENT_TILES:
                return stack_images(shown)
            segment -= 1

    task.caption_tiles(images(0), range(len(images(0))))  # the first run allocates
    print("{}", flush=True)
    for line in sys.stdin:
        pixels = images(int(line))
        start = time.perf_counter()
        task.caption_tiles(pixels, range(len(pixels)))
        print(json.dumps({"tiles": len(pixels), "seconds": time.perf_counter() - start}), flush=True)


class _Counted:
    """A captioner that counts the tiles it has seen."""

    def __init__(self, task: TileCaptions) -> None:
        self.seen, self._task = 0, task

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def caption_tiles(self, images: np.ndarray, keys: Sequence[int], tick: Any = None) -> list[Caption]:  # noqa: ARG002
        self.seen += len(images)
        return self._task.caption_tiles(images, keys)


def run_worker(bundle: Path, name: Path, output: Path) -> None:
    """What `rsedge caption` does, with a line at the beginning, after each segment and at the end."""
    from rsedge import Scene, host
    from rsedge.runtime.run.pipeline import SEGMENT_TILES, run

    scene, task = Scene.open(name), _Counted(captions(bundle))

    def report(done: int, total: int, *, ended: bool = False) -> None:
        values = {"done": done, "seen": task.seen, "segments": -(-total // SEGMENT_TILES), "side": scene.width}
        values |= {"rss_mb": round((host.memory_now() or 0) / 2**20, 1), "ended": ended}
        print(json.dumps(values | {"peak_rss_mb": round(common.peak_rss_mb(), 1)}), flush=True)

    def progress(now: Progress) -> None:
        report(now.tiles_done, now.tiles_total)

    done = run([scene], task, output, progress=progress, tile_size=TILE)
    report(done.tiles, done.tiles, ended=True)


def save(values: dict[str, Any]) -> Path:
    """Write what was measured over what was measured before: the rounds, or the whole scene beside them."""
    path = common.RESULTS / "pipeline.json"
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept = old if "whole" in values else {"whole": old["whole"]} if "whole" in old else {}
    return common.save("pipeline", kept | values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", choices=["fp32", "int8"], default="int8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiles", type=int, default=8, help="tiles along each side of the scene")
    parser.add_argument("--whole", action="store_true", help=f"a COG of {SIDE} x {SIDE} px instead, once")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        kind, *paths = options.worker
        {"model": model_worker, "run": run_worker}[kind](*map(Path, paths))
        return

    bundle, load = common.bundle(options.precision), round(os.getloadavg()[0], 2)
    values: dict[str, Any] = {"machine": common.machine(), "load_before": load, "precision": options.precision}
    if options.whole:
        with tempfile.TemporaryDirectory() as folder:
            values |= measure_whole(bundle, write_cog(Path(folder) / "scene.tif", SIDE))
        print(
            f"{values['tiles']} tiles, {values['tiles_per_second']} tiles/s: {values['ratio']:.3f} times the model "
            f"alone; memory {values['rss_mb_at_a_tenth']} MB after a tenth, {values['rss_mb_at_the_end']} at the end"
        )
        values = {"whole": values}
    else:
        values |= measure_rounds(bundle, options.tiles * TILE, options.rounds)
        row = (values["model_ms"], values["pipeline_ms"], values["ratio"])
        print("model only {:.0f} ms/tile, from GeoTIFF {:.0f} ms/tile: {:.3f} times".format(*row))
    print(f"written to {save(values)}")


if __name__ == "__main__":
    main()
