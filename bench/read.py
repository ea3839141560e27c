"""Are tiles read at the rate GDAL decodes the same file from its first block to its last, with as many threads?

Seeded land (painted, repeated with flips, with noise of a sensor: deflate takes it to about three quarters, as it does
real bands) in the layouts scenes come in; the first case is a whole Sentinel-2 tile. Two sides, in turns:

- GDAL: N threads, each with a dataset handle of its own, decode every block of the file once into a buffer that is used
  again and again. They take pieces in file order from one counter, so that none is idle before the end. A piece is a
  block, of strips (and of blocks below 512 x 512) as many as hold 512 x 512 pixels. Nothing else is done with the
  pixels. Of a file with more bands than three, the three of the scene are asked for; of a product, its files follow one
  another, with the scene classification.
- rsedge: `read_tiles` with N readers gives all tiles of 224 px: decoded, masked, as 8-bit, cut, in order.

Each turn runs in a process of its own (imports and opening not counted) with the page cache warm; GDAL's block cache
has the same size on both sides. Ratios are medians over rounds of GDAL's time by the reader's, of wall clock and of
processor time. GDAL_NUM_THREADS is 1 on both sides, or all cores would decode each JPEG 2000 block. The stages come
from one more run with one reader and a clock of its thread in each stage.

    python bench/read.py [--rounds 5] [--cases cog-deflate,striped-lzw] [--threads 1,2]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import rasterio.shutil
from rasterio.transform import from_origin
from rasterio.windows import Window

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common

TILE = 224
_PATCH = 1832
_PIECE = 512 * 512
_OPTIONS = {"deflate": {"compress": "deflate", "predictor": 2}, "lzw": {"compress": "lzw", "predictor": 2}}
_OPTIONS |= {"zstd": {"compress": "zstd", "predictor": 2}}
_JP2 = {"driver": "JP2OpenJPEG", "REVERSIBLE": "YES", "QUALITY": "100", "YCC": "NO"}


def _blocks(side: int) -> dict[str, Any]:
    return {"tiled": True, "blockxsize": side, "blockysize": side}


@dataclass(frozen=True, slots=True)
class Case:
    """A file to read.

    Attributes:
        width, height, bands: Its size; uint16.
        options: How it is stored, as rasterio takes it.
        resolution: Given to the scene, in metres; the file has 10.
    """

    width: int
    height: int
    bands: int = 3
    options: dict[str, Any] = field(default_factory=dict)
    resolution: float | None = None


CASES = {
    "cog-deflate": Case(10980, 10980, 3, {"driver": "COG", "blocksize": 512, **_OPTIONS["deflate"]}),
    "cog-1024-bands4": Case(5490, 5490, 4, {"driver": "COG", "blocksize": 1024, **_OPTIONS["deflate"]}),
    "tiled-256-deflate": Case(5490, 5490, 3, {**_blocks(256), **_OPTIONS["deflate"]}),
    "tiled-256-bsq": Case(5490, 5490, 3, {**_blocks(256), **_OPTIONS["deflate"], "interleave": "band"}),
    "tiled-2048-deflate": Case(8192, 6144, 3, {**_blocks(2048), **_OPTIONS["deflate"]}),
    "tiled-512-lzw": Case(5490, 5490, 3, {**_blocks(512), **_OPTIONS["lzw"]}),
    "tiled-512-zstd": Case(5490, 5490, 3, {**_blocks(512), **_OPTIONS["zstd"]}),
    "striped-deflate": Case(5490, 5490, 3, _OPTIONS["deflate"]),
    "striped-16-lzw": Case(5490, 5490, 3, {"blockysize": 16, **_OPTIONS["lzw"]}),
    "striped-zstd": Case(5490, 5490, 3, _OPTIONS["zstd"]),
    "uncompressed": Case(5490, 5490, 3, _blocks(512)),
    "jp2-1024": Case(4392, 4392, 3, {**_JP2, "blockxsize": 1024, "blockysize": 1024}),
    "safe-jp2-1024": Case(4392, 4392, 3, {**_JP2, "blockxsize": 1024, "blockysize": 1024}),
    "cog-20m": Case(5490, 5490, 3, {"driver": "COG", "blocksize": 512, **_OPTIONS["deflate"]}, 20),
}


# ---- files ----


def land(case: Case) -> Iterator[tuple[Window, np.ndarray]]:
    """The pixels, band of lines by band of lines: uint16 [bands, lines, width]."""
    from rsedge.runtime.demo.scene import compose_scene

    patch = compose_scene(seed=5, tiles=(8, 8), tile_size=_PATCH // 8).dn
    patch = np.concatenate([patch, patch[1:2] * 2])[: case.bands]
    random = np.random.default_rng(6)
    for number, top in enumerate(range(0, case.height, _PATCH)):
        upright = patch[:, :: -1 if number % 2 else 1]
        repeats = -(-case.width // _PATCH)
        row = np.concatenate([upright[..., :: -1 if n % 2 else 1] for n in range(repeats)], axis=2)
        row = row[:, : min(_PATCH, case.height - top), : case.width]
        noise = random.integers(-3, 4, row.shape, dtype=np.int16)
        data = np.where(row == 0, 0, np.maximum(row.astype(np.int16) + noise, 1)).astype(np.uint16)
        yield Window(0, top, case.width, data.shape[1]), data


def scene_file(name: str) -> Path:
    """The file of a case, or the folder of its product; made on first use."""
    case = CASES[name]
    if name.startswith("safe"):
        return _product(CASES[name])
    driver = case.options.get("driver", "GTiff")
    twin = next((n for n, other in CASES.items() if n != name and other.options == case.options), name)
    path = common.CACHE / f"read-{name if case.resolution is None else twin}.{'jp2' if 'JP2' in driver else 'tif'}"
    if path.exists():
        return path
    common.CACHE.mkdir(exist_ok=True)
    print(f"writing {path.name}", file=sys.stderr)
    plain = path.with_suffix(".plain")
    profile = {"driver": "GTiff", "width": case.width, "height": case.height, "count": case.bands, "dtype": "uint16"}
    profile |= {"crs": "EPSG:32632", "transform": from_origin(600000, 5100000, 10, 10), "nodata": 0}
    final = driver == "GTiff"
    with rasterio.open(plain, "w", **profile, **(case.options if final else _blocks(512))) as dataset:
        for window, data in land(case):
            dataset.write(data, window=window)
        for band, text in enumerate(("B04", "B03", "B02", "B08")[: case.bands], 1):
            dataset.set_band_description(band, text)
    if not final:
        more = {"overviews": "none", "num_threads": 2} if driver == "COG" else {}
        rasterio.shutil.copy(plain, path.with_suffix(".part"), **{**case.options, **more})
        plain.unlink()
        plain = path.with_suffix(".part")
    plain.rename(path)
    return path


def _product(case: Case) -> Path:
    """A SAFE product whose files have the blocks that ESA's have."""
    from tests import safe_products

    folder = common.CACHE / "read-safe"
    if not folder.exists():
        print(f"writing {folder.name}", file=sys.stderr)
        part = folder.with_suffix(".part")
        small = safe_products.write_safe(part, seed=3, size=540)
        grid = {"crs": small.crs, "transform": small.transform, "width": case.width, "height": case.height}
        data = np.concatenate([lines for _, lines in land(case)], axis=1)
        for band, pixels in zip(("B04", "B03", "B02"), data, strict=True):
            stored = np.where(pixels == 0, 0, pixels.astype(np.int32) - small.offset).astype(np.uint16)
            _write(small.path / small.image(band), stored, grid | case.options)
        classes = np.where(data[2, ::2, ::2] == 0, 0, np.where(data[2, ::2, ::2] > 1500, 9, 4)).astype(np.uint8)
        half = {
            "width": case.width // 2,
            "height": case.height // 2,
        }
        half["transform"] = from_origin(small.transform.c, small.transform.f, 20, 20)
        _write(small.path / small.image("SCL"), classes, grid | half | case.options)
        part.rename(folder)
    return next(folder.glob("*.SAFE"))


def _write(path: Path, data: np.ndarray, profile: dict[str, Any]) -> None:
    with rasterio.open(path, "w", count=1, dtype=data.dtype, **{k: v for k, v in profile.items() if k != "YCC"}) as to:
        to.write(data, 1)


# ---- both sides ----


def gdal(scene: Any, threads: int) -> None:
    """Decode every block once: see above."""
    if scene.path.startswith("<"):
        names = [name for name in scene.files if name.endswith(tuple(f"_{b}_10m.jp2" for b in ("B04", "B03", "B02")))]
        jobs = [(name, (1,)) for name in [*names, scene.clouds.file.path]]
    else:
        jobs = [(scene.path, scene.bands)]
    counter, guard = iter(_pieces(jobs)), threading.Lock()

    def work() -> None:
        opened: dict[str, Any] = {}
        buffers: dict[Any, np.ndarray] = {}
        while True:
            with guard:
                piece = next(counter, None)
            if piece is None:
                break
            name, bands, window = piece
            if name not in opened:
                opened[name] = rasterio.open(name)
            shape = (len(bands), window.height, window.width)
            dtype = opened[name].dtypes[0]
            if (shape, dtype) not in buffers:
                buffers[shape, dtype] = np.empty(shape, dtype)
            opened[name].read(bands, window=window, out=buffers[shape, dtype])
        for dataset in opened.values():
            dataset.close()

    running = [threading.Thread(target=work) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


def _pieces(jobs: list[tuple[str, tuple[int, ...]]]) -> Iterator[tuple[str, tuple[int, ...], Window]]:
    for name, bands in jobs:
        with rasterio.open(name) as dataset:
            (rows, cols), width, height = dataset.block_shapes[0], dataset.width, dataset.height
        if cols * 2 <= width:
            cols *= max(1, _PIECE // (rows * cols))
        else:
            rows *= max(1, _PIECE // (rows * cols))
        for top, left in itertools.product(range(0, height, rows), range(0, width, cols)):
            yield name, bands, Window(left, top, min(cols, width - left), min(rows, height - top))


def rsedge(scene: Any, threads: int) -> None:
    """Make every tile and drop it."""
    from rsedge.runtime.scenes.readahead import read_tiles

    for _ in read_tiles(scene, _grid(scene), image_size=TILE, readers=threads):
        pass


def _grid(scene: Any) -> Any:
    from rsedge.runtime.scenes.tiles import TileGrid

    return TileGrid(scene.width, scene.height, TILE)


def run_worker(name: str, side: str, threads: str) -> None:
    from rsedge import Scene
    from rsedge.runtime.scenes.readahead import cache_bytes

    os.environ["GDAL_NUM_THREADS"] = "1"
    case = CASES[name]
    bands = None if name.startswith("safe") else (1, 2, 3)
    scene = Scene.open(scene_file(name), bands=bands, resolution=case.resolution)
    if side == "stages":
        print(json.dumps(stages(scene)))
        return
    with scene.environment(GDAL_CACHEMAX=cache_bytes(scene, _grid(scene))):
        start, cpu = time.perf_counter(), time.process_time()
        (gdal if side == "gdal" else rsedge)(scene, int(threads))
        values = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    print(json.dumps(values | {"tiles": len(_grid(scene)), "peak_rss_mb": round(common.peak_rss_mb(), 1)}))


# ---- where the time goes ----


class _Timed:
    """A dataset whose reads are timed."""

    def __init__(self, dataset: Any, timed: Callable[..., Any]) -> None:
        self._dataset, self.read = dataset, timed(dataset.read, "decode")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)


def stages(scene: Any) -> dict[str, float]:
    """Share of the reading thread's time by stage, each without what it calls."""
    from rsedge.runtime.scenes import readahead as reader
    from rsedge.runtime.scenes import scene as scene_reader
    from rsedge.runtime.scenes.rendering import FastRule

    spent: dict[str, float] = {}
    inner: list[float] = []

    def timed(function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            start = time.thread_time()
            inner.append(0.0)
            try:
                return function(*arguments, **options)
            finally:
                took = time.thread_time() - start
                spent[stage] = spent.get(stage, 0.0) + took - inner.pop()
                if inner:
                    inner[-1] += took

        return wrapper

    queue = reader._RowQueue
    for owner, name, stage in (
        (scene_reader.SceneReader, "read_pixels", "masks"),  # with the search for extremes
        (FastRule, "apply", "rule"),
        (reader, "_lay", "cut"),
        (queue, "_new_row", "cut"),
        (reader, "resize_all", "resize"),
        (queue, "_fill", "rest"),
        (queue, "_enter", "rest"),
        (queue, "_finish", "rest"),
    ):
        setattr(owner, name, timed(getattr(owner, name), stage))
    made = scene_reader.SceneReader.__init__

    def make(self: Any, *arguments: Any) -> None:
        made(self, *arguments)
        self._dataset = _Timed(self._dataset, timed)
        if self._clouds is not None:
            self._clouds.read = timed(self._clouds.read, "decode")

    scene_reader.SceneReader.__init__ = make  # type: ignore[method-assign]
    rsedge(scene, 1)
    total = sum(spent.values())
    return {
        stage: round(spent.get(stage, 0.0) / total, 3) for stage in ("decode", "masks", "rule", "cut", "resize", "rest")
    }


def measure(name: str, threads: str, rounds: int) -> dict[str, Any]:
    """The medians of a case."""
    runs = [{side: common.worker(__file__, name, side, threads) for side in ("gdal", "rsedge")} for _ in range(rounds)]

    def medians(value: str, side: str) -> float:
        return common.median([run[side][value] for run in runs])

    row: dict[str, Any] = {"case": name, "threads": int(threads), "tiles": runs[0]["rsedge"]["tiles"]}
    for side in ("gdal", "rsedge"):
        row[side] = {value: medians(value, side) for value in ("seconds", "cpu", "peak_rss_mb")}
    row["ratio"] = common.median([run["gdal"]["seconds"] / run["rsedge"]["seconds"] for run in runs])
    row["cpu_ratio"] = common.median([run["gdal"]["cpu"] / run["rsedge"]["cpu"] for run in runs])
    row["tiles_per_second"] = common.median([row["tiles"] / run["rsedge"]["seconds"] for run in runs])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        run_worker(*options.worker)
        return
    load = os.getloadavg()
    rows = []
    print(
        f"{'case':20}{'N':>2}{'GDAL s':>8}{'rsedge s':>9}{'ratio':>7}{'by CPU':>7}{'tiles/s':>8}{'peak RSS':>9}  stages"
    )
    for name in options.cases.split(","):
        scene_file(name)
        shares = common.worker(__file__, name, "stages", "1")
        for threads in options.threads.split(","):
            row = measure(name, threads, options.rounds) | {"stages": shares}
            rows.append(row)
            print(
                f"{name:20}{threads:>2}{row['gdal']['seconds']:8.2f}{row['rsedge']['seconds']:9.2f}{row['ratio']:7.2f}"
                f"{row['cpu_ratio']:7.2f}{row['tiles_per_second']:8.0f}{row['rsedge']['peak_rss_mb']:9.0f}  "
                + ", ".join(f"{stage} {share:.0%}" for stage, share in shares.items()),
                flush=True,
            )
    values = {"machine": common.machine(), "load": [list(load), list(os.getloadavg())], "rounds": options.rounds}
    print(f"written to {common.save('read', values | {'tile': TILE, 'rows': rows})}")


if __name__ == "__main__":
    main()
