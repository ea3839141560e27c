"""Where does the time go on the CPU, per stage and per operator?

BLIP-base at 224 px (random weights, seeded), 20 new tokens, 16 images in work, int8 and fp32, greedy and beam 3. Stages
are timed in a run of their own; operators in a second one, with ONNX Runtime's profiler, without what warmed it up.
Every run is a process of its own.

    python bench/profile_cpu.py [--images 16] [--precisions int8 fp32]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import caption_cpu, common, cpu_limits

LEAST_SHARE = 0.01
"""Operators below this part of a graph's time are summed up as others."""


class Profiled:
    """ONNX Runtime on the CPU, writing down when each operator of each graph ran."""

    def __init__(self, folder: Path) -> None:
        from rsedge.runtime.engines.ort import OrtBackend, OrtGraph

        graphs: dict[str, Any] = {}

        class Graph(OrtGraph):
            runs = 0

            def run(self, feeds: Any, outputs: Any) -> Any:
                self.runs += 1
                return super().run(feeds, outputs)

        class Backend(OrtBackend):
            def open(self, path: Path, *, capture: bool = False) -> OrtGraph:  # noqa: ARG002 - of the interface
                import onnxruntime

                options = onnxruntime.SessionOptions()
                options.intra_op_num_threads = self.threads
                options.log_severity_level = 3
                options.enable_profiling = True
                options.profile_file_prefix = str(folder / path.stem)
                session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
                graphs[path.stem] = Graph(self, session)
                return graphs[path.stem]

        self.backend, self._graphs = Backend("cpu"), graphs

    def runs(self) -> dict[str, int]:
        """How often each graph has run."""
        return {name: graph.runs for name, graph in self._graphs.items()}

    def operators(self, warm: dict[str, int]) -> dict[str, dict[str, tuple[float, int]]]:
        """Graph → operator → seconds and calls, without the first ``warm[graph]`` runs; ends profiling."""
        found: dict[str, dict[str, tuple[float, int]]] = {}
        for name, graph in self._graphs.items():
            events = json.loads(Path(graph._session.end_profiling()).read_text())
            begin = sorted(event["ts"] for event in events if event["name"] == "model_run")[warm[name]]
            spent: Counter[str] = Counter()
            calls: Counter[str] = Counter()
            for event in events:
                if event["cat"] == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= begin:
                    operator = event["args"]["op_name"]
                    spent[operator] += event["dur"]
                    calls[operator] += 1
            found[name] = {operator: (spent[operator] / 1e6, calls[operator]) for operator in spent}
        return found


def run_worker(precision: str, count: int, search: str) -> dict[str, Any]:
    from rsedge.bundle import read_bundle
    from rsedge.runtime.captioner import Captioner

    bundle, pixels = read_bundle(common.bundle(precision)), caption_cpu.images(count)
    beams = caption_cpu.SEARCHES[search]
    tokens = caption_cpu.TOKENS
    settings = {"num_beams": beams, "max_new_tokens": tokens, "min_new_tokens": tokens}
    with tempfile.TemporaryDirectory() as folder:
        profiled = Profiled(Path(folder))
        captioner = Captioner(bundle, profiled.backend, device_reason="a benchmark", batch_size=caption_cpu.BATCH)
        captioner.caption(pixels[: caption_cpu.BATCH], **{**settings, "max_new_tokens": 2, "min_new_tokens": 2})
        warm = profiled.runs()
        start = time.perf_counter()
        captioner.caption(pixels, **settings)
        taken = time.perf_counter() - start
        runs = profiled.runs()
        operators = profiled.operators(warm)
    graphs = {}
    for name, found in operators.items():
        whole = sum(seconds for seconds, _ in found.values())
        kept = {key: value for key, value in found.items() if value[0] >= LEAST_SHARE * whole}
        others = whole - sum(seconds for seconds, _ in kept.values())
        rows = [
            {
                "operator": key,
                "ms_per_image": round(seconds / count * 1e3, 2),
                "share": round(seconds / whole, 3),
                "calls": n,
            }
            for key, (seconds, n) in sorted(kept.items(), key=lambda item: -item[1][0])
        ]
        graphs[name] = {
            "ms_per_image": round(whole / count * 1e3, 2),
            "runs": runs[name] - warm[name],
            "operators": rows,
            "others_ms_per_image": round(others / count * 1e3, 2),
        }
    return {"ms_per_image_profiled": round(taken / count * 1e3, 1), "graphs": graphs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=16, choices=range(16, 33), metavar="16..32")
    parser.add_argument("--precisions", nargs="+", default=["int8", "fp32"], choices=["fp32", "int8"])
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    count = options.images
    if options.worker:
        print(json.dumps(run_worker(options.worker[0], count, options.worker[1])))
        return

    load = round(os.getloadavg()[0], 2)
    rows = []
    for precision in options.precisions:
        common.bundle(precision)
        plain = common.worker(caption_cpu.__file__, precision, "--images", str(count))["results"]
        for search in caption_cpu.SEARCHES:
            found = common.worker(__file__, precision, search, "--images", str(count))
            stages = {name: round(value, 2) for name, value in plain[search]["stages"].items()}
            rows.append(
                {
                    "precision": precision,
                    "search": search,
                    "ms_per_image": round(plain[search]["ms"], 1),
                    "stages_ms_per_image": stages,
                    **found,
                }
            )
            print(
                f"{precision} {search}: {plain[search]['ms']:.0f} ms/image; "
                + ", ".join(f"{k} {v:.0f}" for k, v in stages.items())
            )
            for name, graph in found["graphs"].items():
                top = ", ".join(f"{row['operator']} {row['share']:.0%}" for row in graph["operators"][:8])
                print(f"  {name}: {graph['ms_per_image']:.0f} ms/image: {top}")
    values = {
        "machine": common.machine(),
        "threads": cpu_limits.usable_cores(),
        "load_before": load,
        "images": count,
        "batch": caption_cpu.BATCH,
        "tokens": caption_cpu.TOKENS,
        "rows": rows,
    }
    print(f"written to {common.save('profile_cpu', values)}")


if __name__ == "__main__":
    main()
