"""Write docs/performance.md and its plot from bench/results; with --check only say if they are what they would be."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.performance_plot import Bar, draw, stamp
from tools.performance_text import YOUR_MACHINE, missing, paragraph, table, where

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
PLOT = ROOT / "docs" / "performance.svg"
RESULTS = ROOT / "bench" / "results"

_GOALS: dict[tuple[str, str], float] = {
    ("rsedge int8", "greedy"): 4,
    ("rsedge int8", "beam3"): 5,
    ("rsedge fp32", "greedy"): 1.8,
    ("rsedge fp32", "beam3"): 1.8,
}
"""Ratios to transformers that were aimed at."""
_OPERATORS = 6  # of a graph that are listed


def page() -> str:
    """The page's text."""
    sections: dict[str, Callable[[], Iterable[str]]] = {
        "Captioning on the CPU": _captioning,
        "How near to the limits of the machine": _limits,
        "Where the time goes on the CPU": _profile,
        "CLIPCap": _clipcap,
        "Reading": _reading,
        "Reading, captioning and writing together": _pipeline,
        "Memory": _memory,
        "Search": _search,
        "GPU": _gpu,
    }
    lines = ["# Performance", ""]
    lines += paragraph(
        "Measured with the scripts of `bench/`, each in pairs within one run, medians over rounds; this page is made "
        "from `bench/results/` by `make docs`. What was tried and did not help is in `bench/LOG.md`. How fast a bundle "
        "is on your machine, and where its time goes there, `rsedge bench` tells, see [below](#your-machine)."
    )
    for title, section in sections.items():
        lines += ["", f"## {title}", "", *section()]
    return "\n".join([*lines, "", "## Your machine", YOUR_MACHINE])


def read(name: str) -> dict[str, Any] | None:
    """One benchmark's results, or None where it has not been run."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


# ---- the CPU ----


def _captioning() -> Iterable[str]:
    found = read("caption_cpu")
    if found is None:
        yield from missing("bench/caption_cpu.py")
        return
    yield from paragraph(
        f"BLIP-base at 224 px (random weights, seeded), {found['tokens']} tokens, {found['images']} images, against "
        "transformers eager in float32 at the best of batch 1, 8 and 16; the same weights, images and settings "
        f"(`bench/caption_cpu.py`). {where(found)}"
    )
    yield ""
    yield from paragraph(
        "The captions of random weights turn on the smallest difference: what int8 changes in a trained model stands "
        "in [results](results.md#blip)."
    )
    yield from ("", "![Milliseconds per image by engine](performance.svg)", "")
    titles = ("ms per image", "times as fast", "aim", "identical captions", "equal tokens", "peak RSS")
    yield from table(
        ("search", "engine", *titles),
        [
            (
                row["search"],
                row["engine"],
                f"{row['ms_per_image']:.0f}",
                f"{row['ratio']:.2f}",
                f"{_GOALS.get((row['engine'], row['search']), '')}",
                f"{row['agreement']['captions']:.0%}",
                f"{row['agreement']['tokens']:.1%}",
                f"{row['peak_rss_mb']} MB",
            )
            for row in found["rows"]
        ],
        text=2,
    )


def _limits() -> Iterable[str]:
    found = read("caption_cpu")
    if found is None:
        yield from missing("bench/caption_cpu.py")
        return
    limits, flop = found["limits"], found["gflop_per_image"]
    gemm, memory = limits["gemm"], limits["memory"]
    yield from paragraph(
        f"Measured in the same run with {limits['threads']} threads, the best of all rounds: products at the shapes of "
        f"ViT-B/16 through ONNX Runtime at {gemm['fp32']['gflops']:.0f} GFLOP/s in float32 and "
        f"{gemm['int8']['gflops']:.0f} in int8 ({gemm['int8']['gflops'] / gemm['fp32']['gflops']:.2f} times); memory "
        f"read at {memory['read_gb_per_s']:.1f} GB/s, copied at {memory['copy_gb_per_s']:.1f}. An image takes "
        f"{flop['encoder']:.1f} GFLOP in the encoder and {flop['keys and values for the decoder']:.1f} for the keys "
        "and "
        "values that the decoder looks at. The least time is what these products, and the bytes or the products of the "
        "decoder's steps, would take at those rates and nothing else; the highest ratio is transformers' time over it."
    )
    titles = ("encoder, of the products' rate", "steps, of the bandwidth", "least ms per image", "of it reached")
    rows = [(row, row["limit"]) for row in found["rows"] if "limit" in row]
    yield ""
    yield from table(
        ("search", "engine", *titles, "highest ratio", "aim"),
        [
            (
                row["search"],
                row["engine"],
                f"{limit['vision_share_of_gemm']:.0%}",
                f"{limit['step_share_of_bandwidth']:.0%}",
                f"{limit['least_ms_per_image']:.0f}",
                f"{limit['share_of_limit']:.0%}",
                f"{limit['ratio']:.2f}",
                f"{_GOALS[row['engine'], row['search']]:g}",
            )
            for row, limit in rows
        ],
        text=2,
    )
    for row, limit in rows:
        goal = _GOALS[row["engine"], row["search"]]
        if row["ratio"] < goal:
            yield ""
            yield from paragraph(f"{row['engine'][7:]}, {row['search']}: {_verdict(row['ratio'], goal, limit)}")


def _verdict(ratio: float, goal: float, limit: dict[str, float]) -> str:
    """Why a ratio that was aimed at is not there."""
    said = f"{goal:g} times was aimed at, {ratio:.2f} is reached. "
    if limit["ratio"] < goal:
        return said + (
            f"The limit forbids it here: at the full rate of the machine it would be {limit['ratio']:.2f}. Of that "
            "limit "
            f"{limit['share_of_limit']:.0%} is reached."
        )
    return said + (
        f"The limit would allow {limit['ratio']:.2f}, with nothing but products and memory; "
        f"{limit['share_of_limit']:.0%} "
        "of it is reached."
    )


def _profile() -> Iterable[str]:
    found = read("profile_cpu")
    if found is None:
        yield from missing("bench/profile_cpu.py")
        return
    yield from paragraph(
        f"The same model, {found['images']} images, {found['batch']} in work, {found['threads']} threads; milliseconds "
        f"per image (`bench/profile_cpu.py`). {where(found)}"
    )
    rows = found["rows"]
    stages = list(rows[0]["stages_ms_per_image"])
    yield ""
    yield from table(
        ("precision", "search", "in all", *stages),
        [
            (
                row["precision"],
                row["search"],
                f"{row['ms_per_image']:.0f}",
                *(f"{row['stages_ms_per_image'][stage]:.1f}" for stage in stages),
            )
            for row in rows
        ],
        text=2,
    )
    yield ""
    yield from paragraph(
        "Operators of each graph, by ONNX Runtime's profiler: share of the graph's time. MatMulIntegerToFloat is the "
        "int8 product, Gemm the float32 one, MatMul that of attention."
    )
    yield ""
    yield from table(
        ("precision", "search", "graph", "ms per image", "operators"),
        [
            (
                row["precision"],
                row["search"],
                name,
                f"{graph['ms_per_image']:.1f}",
                ", ".join(f"{entry['operator']} {entry['share']:.0%}" for entry in graph["operators"][:_OPERATORS]),
            )
            for row in rows
            for name, graph in row["graphs"].items()
        ],
        text=3,
        last_is_text=True,
    )


def _clipcap() -> Iterable[str]:
    found = read("clipcap")
    if found is None:
        yield from missing("bench/clipcap.py")
        return
    yield from paragraph(
        f"GPT-2 small behind CLIP B/32, random weights, {found['tokens']} tokens, {found['images']} images in a batch, "
        "against the same model in torch without a cache and one image at a time, as ClipCap does it; 20 times was "
        "aimed "
        f"at (`bench/clipcap.py`). {where(found)}"
    )
    yield ""
    yield from table(
        ("search", "engine", "ms per image", "ratio", "ratio of processor time"),
        [
            (
                row["search"],
                row["engine"],
                f"{row['ms_per_image']:.0f}",
                f"{row['ratio']:.1f}",
                f"{row['cpu_ratio']:.1f}",
            )
            for row in found["rows"]
        ],
        text=2,
    )


# ---- around the model ----


def _reading() -> Iterable[str]:
    found = read("read")
    if found is None:
        yield from missing("bench/read.py")
        return
    yield from paragraph(
        "Tiles of 224 px against GDAL that decodes every block of the same file once, with as many threads; the "
        "ratio is "
        f"GDAL's time by the reader's, 0.9 was aimed at (`bench/read.py`). {where(found)}"
    )
    yield ""
    yield from table(
        ("file", "threads", "tiles/s", "ratio", "ratio of processor time", "of it decoding", "peak RSS"),
        [
            (
                row["case"],
                str(row["threads"]),
                f"{row['tiles_per_second']:.0f}",
                f"{row['ratio']:.2f}",
                f"{row['cpu_ratio']:.2f}",
                f"{row['stages']['decode']:.0%}" if row.get("stages") else "",
                f"{row['rsedge']['peak_rss_mb']:.0f} MB",
            )
            for row in found["rows"]
        ],
        text=1,
    )
    yield ""
    yield from paragraph(
        "The reader does more than GDAL here: it finds what has no data, makes pixels 8-bit and cuts tiles; *of it "
        "decoding* is the share of its time that GDAL takes. `cog-20m` is resampled by GDAL's warper."
    )


def _pipeline() -> Iterable[str]:
    found = read("pipeline")
    if found is None:
        yield from missing("bench/pipeline.py")
        return
    if "tiles" in found:
        yield from paragraph(
            f"From a deflate-compressed GeoTIFF to GeoJSON, {found['precision']}, greedy, {found['tiles']} tiles: "
            f"{found['pipeline_ms']:.0f} ms per tile, the model alone {found['model_ms']:.0f}: {found['ratio']:.3f} "
            f"times; 1.05 at most was aimed at (`bench/pipeline.py`). {where(found)}"
        )
    yield ""
    whole = found.get("whole")
    if whole is None:
        yield from missing("bench/pipeline.py --whole", "A whole scene was not measured yet")
        return
    yield from paragraph(
        f"A whole scene in one run, a deflate COG of {whole['side']} × {whole['side']} px, {whole['precision']}, "
        f"greedy, {whole['tiles']:,} tiles: {whole['tiles_per_second']:.2f} tiles/s, {whole['pipeline_ms']:.0f} ms per "
        f"tile, the model alone {whole['model_ms']:.0f}: {whole['ratio']:.3f} times ({min(whole['ratios']):.3f} to "
        f"{max(whole['ratios']):.3f} between stops, at each of which the model alone was timed while the run stood "
        f"still). Resident memory: {whole['rss_mb_at_a_tenth']:.0f} MB after a tenth of the tiles, "
        f"{whole['rss_mb_at_the_end']:.0f} at the end ({whole['rss_ratio']:.3f} times), {whole['peak_rss_mb']:.0f} at "
        f"most (`bench/pipeline.py --whole`). {where(whole)}"
    )


def _memory() -> Iterable[str]:
    found = read("memory")
    if found is None:
        yield from missing("bench/memory.py")
        return
    yield from paragraph(
        f"Peak resident memory of `rsedge caption` with a small model, for a scene of {found['side']} × "
        f"{found['side']} "
        f"px and for its quarter (`bench/memory.py`). {where(found)}"
    )
    yield ""
    yield from table(
        ("pixels", "a quarter, MB", "whole, MB", "ratio"),
        [
            (row["dtype"], f"{row['quarter_mb']:.0f}", f"{row['whole_mb']:.0f}", f"{row['ratio']:.3f}")
            for row in found["rows"]
        ],
        text=1,
    )


def _search() -> Iterable[str]:
    found = read("search")
    if found is None:
        yield from missing("bench/search.py")
        return
    wall = found["wall_s"]
    yield from paragraph(
        f"Exact search over {found['rows']:,} float16 embeddings of {found['dim']} numbers in a file: "
        f"{wall['search']:.2f} s, {wall['ratio_to_float32']:.2f} times NumPy's product of the same numbers as "
        "float32 in "
        f"memory; peak RSS {found['peak_rss_mb']:.0f} MB (`bench/search.py`; more in [results](results.md#search)). "
        f"{where(found)}"
    )


# ---- the GPU ----


def _gpu() -> Iterable[str]:
    found = read("gpu")
    if found is None:
        yield "Not measured: no GPU was at hand; `python bench/gpu.py` measures it."
        return
    machine, limits = found["machine"], found["limits"]
    gpu = machine.get("gpu", "no GPU: the same code on a CPU")
    yield from paragraph(
        f"BLIP-base at 224 px, float16, {found['tokens']} tokens, each engine at the batch size at which it is fastest "
        f"(`bench/gpu.py`), on {gpu}, onnxruntime {machine['versions']['onnxruntime']}, torch "
        f"{machine['versions']['torch']}. In the same run torch's products reach {limits['gemm']['tflops']:.0f} "
        "TFLOP/s "
        f"and memory {limits['memory']['gb_per_s']:.0f} GB/s."
    )
    failed = found.get("failed")
    yield ""
    yield from paragraph(
        "The run ended before all parts were measured."
        if failed is None
        else f"Checks that failed: {', '.join(failed)}."
        if failed
        else "All checks of correctness passed."
    )
    if "pairs" in found:
        yield ""
        yield from table(
            ("search", "engine", "batch", "images/s", "rsedge with CUDA graphs is times"),
            [
                (
                    search,
                    name,
                    str(row.get("batch", "")),
                    f"{row['images_per_s']:.0f}" if "images_per_s" in row else row.get("error", "does not fit")[:60],
                    f"{row['rsedge_graphs_is_times']:.2f}" if "rsedge_graphs_is_times" in row else "",
                )
                for search, rows in found["pairs"].items()
                for name, row in rows.items()
            ],
            text=2,
        )
    if "profile" in found:
        yield ""
        yield from table(
            ("search", "stage", "ms per image"),
            [
                (search, stage, f"{value:.3f}")
                for search, entry in found["profile"].items()
                for stage, value in entry["stages_ms_per_image"].items()
            ],
            text=2,
        )
    if "shares" in found:
        shares = {name: entry for name, entry in found["shares"].items() if isinstance(entry, dict)}
        yield ""
        yield from table(
            ("search", "encoder, of the products' rate", "steps, of the bandwidth"),
            [
                (name, f"{entry['encoder_share_of_gemm']:.0%}", f"{entry['step_share_of_bandwidth']:.0%}")
                for name, entry in shares.items()
            ],
            text=1,
        )


# ---- the plot ----


def bars() -> list[Bar]:
    """Search, engine, milliseconds per image and the least that the machine's limits allow, as the plot shows them."""
    found = read("caption_cpu")
    return [
        (row["search"], row["engine"], row["ms_per_image"], row.get("limit", {}).get("least_ms_per_image"))
        for row in (found["rows"] if found else [])
    ]


def main() -> int:
    """Write or check the page and its plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if not options.check:
        PAGE.write_text(page(), encoding="utf-8")
        draw(PLOT, bars())
        return 0
    stale = []
    if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
        stale.append("docs/performance.md")
    if not PLOT.exists() or stamp(bars()) not in PLOT.read_text(encoding="utf-8"):
        stale.append("docs/performance.svg")
    if stale:
        print(f"{' and '.join(stale)} do not show what is in bench/results: run 'make docs'", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
