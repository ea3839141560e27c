"""The page of performance figures: what it shows is what the benchmarks wrote, measured or not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools import performance

ROOT = Path(__file__).resolve().parents[2]
MACHINE = {"cpu": "A CPU", "cores": 2, "instructions": ["avx2"], "date": "2026-01-02"}
LIMIT = {
    "vision_share_of_gemm": 0.71,
    "step_share_of_bandwidth": 0.5,
    "least_ms_per_image": 160.0,
    "share_of_limit": 0.8,
    "ratio": 3.4,
}


def row(engine: str, taken: float, times: float, **limit: float) -> dict:
    same = {"captions": 0.625, "tokens": 0.88}
    values = {"search": "greedy", "engine": engine, "ms_per_image": taken, "ratio": times, "agreement": same}
    return values | {"peak_rss_mb": 900} | ({"limit": LIMIT | limit} if engine != "transformers" else {})


CAPTIONING = {
    "machine": MACHINE,
    "load_before_each_round": [0.1, 2.0],
    "rounds": 2,
    "images": 16,
    "tokens": 20,
    "gflop_per_image": {"encoder": 35.13, "keys and values for the decoder": 5.58},
    "limits": {
        "threads": 2,
        "gemm": {"fp32": {"gflops": 150.0}, "int8": {"gflops": 285.0}},
        "memory": {"read_gb_per_s": 21.0, "copy_gb_per_s": 18.0},
    },
    "rows": [row("transformers", 550.0, 1.0), row("rsedge fp32", 300.0, 1.83), row("rsedge int8", 200.0, 2.75)],
}
GPU = {
    "machine": {"gpu": "A GPU", "versions": {"onnxruntime": "1.31.1", "torch": "2.13.0"}},
    "tokens": 20,
    "limits": {"gemm": {"tflops": 700.0}, "memory": {"gb_per_s": 3000.0}},
    "pairs": {
        "beam3": {
            "transformers float16": {"batch": 128, "images_per_s": 100.0, "rsedge_graphs_is_times": 6.0},
            "rsedge graphs": {"batch": 64, "images_per_s": 600.0, "rsedge_graphs_is_times": 1.0},
            "transformers float16 compiled": {"error": "RuntimeError: no"},
        }
    },
    "profile": {"beam3": {"stages_ms_per_image": {"encoder": 0.4}}},
    "shares": {
        "gflop_per_image_encoder": 40.7,
        "beam3": {"encoder_share_of_gemm": 0.55, "step_share_of_bandwidth": 0.31},
    },
    "failed": [],
}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder of results, empty at first, and what puts one into it."""
    monkeypatch.setattr(performance, "RESULTS", tmp_path)
    return lambda name, values: (tmp_path / f"{name}.json").write_text(json.dumps(values))


def section(title: str) -> str:
    return performance.page().partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_the_page_and_the_plot_show_what_the_benchmarks_wrote():
    result = subprocess.run([sys.executable, "tools/performance.py", "--check"], cwd=ROOT, check=False)
    assert result.returncode == 0


def test_what_was_not_measured_is_said_to_be(results):
    page = performance.page()
    for script in ("caption_cpu", "profile_cpu", "clipcap", "read", "pipeline", "memory", "search"):
        assert f"Not measured yet: `python bench/{script}.py` measures it." in page
    assert "Not measured: no GPU was at hand; `python bench/gpu.py` measures it." in page


def test_an_aim_that_the_limit_forbids_is_told_from_one_that_is_missed(results):
    results("caption_cpu", CAPTIONING)
    text = " ".join(section("How near to the limits of the machine").split())
    assert "int8, greedy: 4 times was aimed at, 2.75 is reached. The limit forbids it here: at the full rate" in text
    assert "it would be 3.40. Of that limit 80% is reached." in text
    assert "fp32, greedy" not in text, "1.8 was reached"
    results("caption_cpu", CAPTIONING | {"rows": [*CAPTIONING["rows"][:2], row("rsedge int8", 200.0, 2.75, ratio=4.5)]})
    text = " ".join(section("How near to the limits of the machine").split())
    assert "The limit would allow 4.50" in text


def test_the_tables_have_a_cell_for_every_title(results):
    results("caption_cpu", CAPTIONING)
    results("gpu", GPU)
    row = {"case": "striped", "threads": 2, "ratio": 0.95, "cpu_ratio": 0.96, "tiles_per_second": 700.5}
    row |= {"rsedge": {"peak_rss_mb": 128.4}, "stages": {"decode": 0.74}}
    results("read", {"machine": MACHINE, "rows": [row]})
    tables = [block.splitlines() for block in performance.page().split("\n\n") if block.startswith("| ")]
    assert len(tables) == 6
    for table in tables:
        assert {line.count("|") for line in table} == {table[1].count("|")}, table


def test_a_gpu_is_shown_once_it_was_measured(results):
    results("gpu", GPU)
    text = section("GPU")
    assert "no GPU was at hand" not in text
    assert "| beam3 | transformers float16 | 128 | 100 | 6.00 |" in text
    assert "| beam3 | transformers float16 compiled |  | RuntimeError: no |  |" in text
    assert "| beam3 | 55% | 31% |" in text


WHOLE = {"machine": MACHINE, "load_before": 0.3, "precision": "int8", "side": 10980, "tiles": 2500}
WHOLE |= {"tiles_per_second": 4.15, "pipeline_ms": 241.0, "model_ms": 239.5, "ratio": 1.006, "ratios": [0.99, 1.02]}
WHOLE |= {"rss_mb_at_a_tenth": 410.2, "rss_mb_at_the_end": 415.9, "rss_ratio": 1.014, "peak_rss_mb": 430.0}


@pytest.mark.parametrize("rounds", [True, False])
def test_a_whole_scene_stands_beside_the_rounds_or_is_said_to_be_missing(results, rounds):
    some = {"machine": MACHINE, "rounds": 3, "precision": "int8", "tiles": 64}
    some |= {"model_ms": 251.4, "pipeline_ms": 240.5, "ratio": 0.957}
    results("pipeline", (some if rounds else {}) | {"whole": WHOLE})
    text = " ".join(section("Reading, captioning and writing together").split())
    assert ("64 tiles: 240 ms per tile" in text) == rounds
    assert "10980 × 10980 px, int8, greedy, 2,500 tiles: 4.15 tiles/s" in text
    assert "1.006 times (0.990 to 1.020 between stops" in text
    assert "410 MB after a tenth of the tiles, 416 at the end (1.014 times), 430 at most" in text
    results("pipeline", some)
    text = section("Reading, captioning and writing together")
    assert "A whole scene was not measured yet: `python bench/pipeline.py --whole` measures it." in text


def test_the_plot_is_the_same_for_the_same_figures(results, tmp_path):
    results("caption_cpu", CAPTIONING)
    paths = [tmp_path / name for name in ("a.svg", "b.svg")]
    for path in paths:
        performance.draw(path, performance.bars())
    first, second = (path.read_bytes() for path in paths)
    assert first == second
    assert performance.stamp(performance.bars()).encode() in first
    assert b"rsedge int8" in first
    results("caption_cpu", CAPTIONING | {"rows": CAPTIONING["rows"][:2]})
    assert performance.stamp(performance.bars()).encode() not in first
