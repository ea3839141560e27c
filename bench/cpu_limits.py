"""What can this machine do at best: products through ONNX Runtime at the shapes of ViT-B/16, and memory.

The shares that `bench/caption_cpu.py` and `docs/performance.md` report are of these figures, measured in the same run.

    python bench/cpu_limits.py [--threads N]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from rsedge.host import usable_cores

TOKENS, WIDTH = 197, 768
LAYERS = 12
SHAPES = {  # of the products in one layer: name → (K, N)
    "queries, keys, values": (WIDTH, 3 * WIDTH),
    "projection": (WIDTH, WIDTH),
    "first of the MLP": (WIDTH, 4 * WIDTH),
    "second of the MLP": (4 * WIDTH, WIDTH),
}
IMAGES = (4, 16)  # rows of the products: those of four images, as the encoder runs them, and of a batch


def encoder_gflop() -> float:
    """Of one image: products, attention and patches; two operations per multiplication and addition."""
    products = sum(2 * TOKENS * k * n for k, n in SHAPES.values())
    return (LAYERS * (products + 4 * TOKENS**2 * WIDTH) + 2 * (TOKENS - 1) * WIDTH**2) / 1e9


def cross_gflop(layers: int = LAYERS) -> float:
    """Of the keys and values of one image for all layers of the decoder, computed with it."""
    return 4 * layers * TOKENS * WIDTH**2 / 1e9


def seconds(work: Callable[[], object], *, rounds: int = 12, least: float = 0.06) -> float:
    """The least time of ``work`` on the clock, over rounds of at least ``least`` seconds after one to warm up.

    Not the median: a limit is what the machine does undisturbed.
    """
    work()
    start = time.perf_counter()
    work()
    repeats = max(1, int(least / max(time.perf_counter() - start, 1e-6)))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        times.append((time.perf_counter() - start) / repeats)
    return min(times)


def product(rows: int, k: int, n: int, precision: str, threads: int) -> Callable[[], object]:
    """A product [rows, k] × [k, n] as the bundles have it, ready to be run in ONNX Runtime."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    if precision == "fp32":
        weights = [numpy_helper.from_array(random.standard_normal((k, n), np.float32), "w")]
        weights.append(numpy_helper.from_array(np.zeros(n, np.float32), "b"))
        node, kind = helper.make_node("Gemm", ["x", "w", "b"], ["y"]), TensorProto.FLOAT
        x = random.standard_normal((rows, k), np.float32)
    else:
        weights = [
            numpy_helper.from_array(random.integers(-63, 64, (k, n)).astype(np.int8), "w"),
            numpy_helper.from_array(np.float32(1 / 127), "xs"),
            numpy_helper.from_array(random.random(n, np.float32), "ws"),
            numpy_helper.from_array(np.uint8(128), "xz"),
        ]
        inputs = ["x", "w", "xs", "ws", "xz", ""]
        node = helper.make_node("MatMulIntegerToFloat", inputs, ["y"], domain="com.microsoft")
        kind, x = TensorProto.UINT8, random.integers(1, 256, (rows, k)).astype(np.uint8)
    given = helper.make_tensor_value_info("x", kind, [rows, k])
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, n])
    graph = helper.make_graph([node], "product", [given], [made], initializer=weights)
    sets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model: Any = helper.make_model(graph, opset_imports=sets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(["y"], {"x": x})


def products(precision: str, threads: int, *, images: tuple[int, ...] = IMAGES) -> dict[str, Any]:
    """GFLOP/s of each product of a layer and of a whole layer's, for the number of images that is fastest."""
    found = []
    for count in images:
        rows, taken, flop = count * TOKENS, 0.0, 0.0
        rates = {}
        for name, (k, n) in SHAPES.items():
            took = seconds(product(rows, k, n, precision, threads))
            rates[name] = round(2 * rows * k * n / took / 1e9, 1)
            taken, flop = taken + took, flop + 2 * rows * k * n
        found.append({"gflops": round(flop / taken / 1e9, 1), "images": count, "rows": rows, "by_product": rates})
    return max(found, key=lambda entry: entry["gflops"])


def memory(threads: int, *, size: int = 2**29) -> dict[str, Any]:
    """GB/s of a copy (each byte read and written) and of reading alone, ``size`` bytes and ``threads`` threads."""
    a, b = np.ones(size // 4, np.float32), np.ones(size // 4, np.float32)
    edges = np.linspace(0, len(a), threads + 1).astype(int)
    parts = [slice(first, last) for first, last in pairwise(edges)]
    with ThreadPoolExecutor(threads) as pool:
        copied = seconds(lambda: list(pool.map(lambda part: np.copyto(b[part], a[part]), parts)))
        # A scalar product does nothing but read; BLAS takes no lock of the interpreter.
        read = seconds(lambda: list(pool.map(lambda part: float(np.dot(a[part], b[part])), parts)))
    return {
        "copy_gb_per_s": round(2 * a.nbytes / copied / 1e9, 1),
        "read_gb_per_s": round(2 * a.nbytes / read / 1e9, 1),
        "bytes": size,
    }


def measure(threads: int) -> dict[str, Any]:
    """All limits, with ``threads`` threads."""
    gemm = {precision: products(precision, threads) for precision in ("fp32", "int8")}
    return {"threads": threads, "gemm": gemm, "memory": memory(threads)}


def best(limits: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The limits from several rounds: the highest of each."""
    return {
        "threads": limits[0]["threads"],
        "gemm": {
            precision: max((entry["gemm"][precision] for entry in limits), key=lambda found: found["gflops"])
            for precision in limits[0]["gemm"]
        },
        "memory": {name: max(entry["memory"][name] for entry in limits) for name in limits[0]["memory"]},
        "by_round": {
            "fp32_gflops": [entry["gemm"]["fp32"]["gflops"] for entry in limits],
            "int8_gflops": [entry["gemm"]["int8"]["gflops"] for entry in limits],
            "read_gb_per_s": [entry["memory"]["read_gb_per_s"] for entry in limits],
        },
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=Path(__file__).read_text().splitlines()[0].strip('"'))
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.threads), indent=None if arguments.worker else 2))
