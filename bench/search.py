"""How fast is exact search, against the bare product NumPy takes over embeddings that are in memory already?

A million synthetic embeddings (512 numbers, float16, random directions) are written by the writer of `rsedge embed` and
searched by `Index.search` for the 20 nearest, their records read: file in the page cache, index open. Beside it, in a
process of its own, NumPy's `matrix @ query` over the same embeddings as a float32 matrix in memory (2 GB, its fastest
case: no file, no conversion, no ranking), and the same from a float16 matrix, converted block by block. The processes
take turns query by query; figures are medians, of wall-clock and of CPU time.

    python bench/search.py [--rows 1000000] [--dim 512] [--rounds 9] [--approximate]

`--approximate` also builds the FAISS index of as many embeddings round 5000 centres (random directions have no
neighbours worth the name), and measures its recall of the exact 20.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common

CHUNK, TOP, CENTRES = 8192, 20, 5000


def chunks(rows: int, dim: int, kind: str) -> Iterator[np.ndarray]:
    """The embeddings, float16 [n, dim], the same each time."""
    centres = np.random.default_rng(1).standard_normal((CENTRES, dim), dtype=np.float32)
    for first in range(0, rows, CHUNK):
        random = np.random.default_rng((2, first))
        vectors = random.standard_normal((min(CHUNK, rows - first), dim), dtype=np.float32)
        if kind == "clustered":
            vectors = centres[random.integers(0, CENTRES, len(vectors))] + 0.7 * vectors
        yield (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def make_file(rows: int, dim: int, kind: str) -> Path:
    """The file, written on first use."""
    from rsedge.runtime.outputs.geoparquet import EmbeddingsInfo, open_embeddings
    from rsedge.runtime.outputs.records import TileRecord, TileResult

    path = common.CACHE / f"{kind}-{rows}x{dim}.parquet"
    if path.exists():
        return path
    common.CACHE.mkdir(parents=True, exist_ok=True)
    info = EmbeddingsInfo(model="bench@000000000000", model_hash="0" * 64, dim=dim, dtype="float16")
    with open_embeddings(path, info) as writer:
        number = 0
        for vectors in chunks(rows, dim, kind):
            results = []
            for vector in vectors:
                scene, (row, col) = number // 2500, divmod(number % 2500, 50)
                west, south = scene % 300 + col / 50, scene // 300 + row / 50
                ring = [[west, south], [west + 0.02, south], [west + 0.02, south + 0.02], [west, south]]
                geometry = {"type": "Polygon", "coordinates": [ring]}
                record = TileRecord(f"S2A_{scene:04}", row, col, row * 224, col * 224, 224, 224, geometry, None, None,
                                    "ok", 0.0, None, "2024-05-31T10:30:00Z", info.model)  # fmt: skip
                results.append(TileResult(record, f"{record.scene}.tif", vector))
                number += 1
            writer.write(results)
    return path


def timed(work: Callable[[], Any]) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def serve(work: Callable[[np.ndarray], dict[str, Any]], dim: int) -> None:
    """Answer each line, the seed of a query, with a line of JSON."""
    print("{}", flush=True)
    for line in sys.stdin:
        query = np.random.default_rng(int(line)).standard_normal(dim).astype(np.float32)
        print(json.dumps(work(query / np.linalg.norm(query))), flush=True)


def numpy_worker(rows: int, dim: int) -> None:
    half = np.concatenate(list(chunks(rows, dim, "random")))
    whole = np.concatenate([half[first : first + CHUNK].astype(np.float32) for first in range(0, rows, CHUNK)])

    def convert(query: np.ndarray) -> None:
        for first in range(0, rows, CHUNK):
            half[first : first + CHUNK].astype(np.float32) @ query

    def work(query: np.ndarray) -> dict[str, Any]:
        scores = whole @ query
        best = np.argsort(-scores, kind="stable")[:TOP]
        return {
            "float32": timed(lambda: whole @ query),
            "float16": timed(lambda: convert(query)),
            "best": best.tolist(),
        }

    serve(work, dim)


def search_worker(path: Path, dim: int) -> None:
    from rsedge.runtime.search.index import Index

    opened = time.perf_counter()
    index = Index.open(path)
    opened = time.perf_counter() - opened

    def work(query: np.ndarray) -> dict[str, Any]:
        hits = index.search(query, top=TOP, approximate=False)  # as the other process computes its best first
        times = timed(lambda: index.search(query, top=TOP, approximate=False))
        product = timed(lambda: index.nearest(query[None], top=TOP, approximate=False))
        values = {"search": times, "without_records": product, "best": [hit.row for hit in hits]}
        return {**values, "open_s": opened, "peak_rss_mb": common.peak_rss_mb()}

    serve(work, dim)


def measure_approximate(rows: int, dim: int) -> dict[str, Any]:
    from rsedge.runtime.search.index import Index

    index = Index.open(make_file(rows, dim, "clustered"))
    build = timed(lambda: index.build_approximate())
    recall = index.measure_recall(top=TOP, queries=100)
    queries = np.concatenate([index.files[0].vectors([row])[0] for row in range(0, rows, rows // 20)])
    times = [timed(lambda query=query: index.search(query, top=TOP, approximate=True))["wall_s"] for query in queries]
    size = Path(f"{index.files[0].path}.index").stat().st_size / 2**20
    values = {"build_s": round(build["wall_s"], 1), "build_cpu_s": round(build["cpu_s"], 1), "index_mb": round(size, 1)}
    return {**values, "recall_at_20": round(recall, 4), "search_s": common.median(times)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--approximate", action="store_true", help="measure the approximate index too")
    parser.add_argument("--worker", choices=["numpy", "search"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker == "numpy":
        numpy_worker(options.rows, options.dim)
        return
    if options.worker == "search":
        search_worker(make_file(options.rows, options.dim, "random"), options.dim)
        return
    path = make_file(options.rows, options.dim, "random")
    size = ["--rows", str(options.rows), "--dim", str(options.dim)]
    rounds = []
    with common.Process(__file__, "numpy", *size) as bare, common.Process(__file__, "search", *size) as search:
        bare.read()
        search.read()
        for seed in range(options.rounds + 1):
            one = {"numpy": bare.ask(seed), "search": search.ask(seed)}
            assert one["numpy"]["best"] == one["search"]["best"], "the same tiles in the same order"
            if seed:  # the first warms the page cache and the threads
                rounds.append(one)
                took = {"float32": one["numpy"]["float32"]["wall_s"], "search": one["search"]["search"]["wall_s"]}
                print({name: round(value, 3) for name, value in took.items()}, file=sys.stderr)

    def over(*names: str) -> float:
        return common.median([each[names[0]][names[1]][names[2]] for each in rounds])

    def ratio(clock: str) -> float:
        return common.median([each["search"]["search"][clock] / each["numpy"]["float32"][clock] for each in rounds])

    values: dict[str, Any] = {"machine": common.machine(), "load": round(os.getloadavg()[0], 1)}
    values |= {"rows": options.rows, "dim": options.dim, "rounds": options.rounds, "file_mb": path.stat().st_size >> 20}
    for clock in ("wall_s", "cpu_s"):
        values[clock] = {
            "numpy_float32_in_memory": over("numpy", "float32", clock),
            "numpy_float16_converted": over("numpy", "float16", clock),
            "search": over("search", "search", clock),
            "search_without_records": over("search", "without_records", clock),
            "ratio_to_float32": ratio(clock),
        }
    values |= {"open_s": round(rounds[-1]["search"]["open_s"], 3)}
    values |= {"peak_rss_mb": round(rounds[-1]["search"]["peak_rss_mb"], 1)}
    if options.approximate:
        values["approximate"] = measure_approximate(options.rows, options.dim)
    print(json.dumps(values, indent=2))
    common.save("search", values)


if __name__ == "__main__":
    main()
