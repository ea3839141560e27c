"""The benchmark for GPUs runs to its end on any machine, so that on a GPU only its figures are news."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import caption_gpu, common, gpu

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(common, "CACHE", tmp_path)
    return tmp_path


def test_it_runs_to_its_end_without_a_gpu(cache: Path, capsys: pytest.CaptureFixture[str]):
    output = cache / "results" / "gpu.json"
    arguments = ["--device", "cpu", "--tiny", "--skip-compile", "--images", "6", "--tokens", "5"]
    assert gpu.main([*arguments, "--output", str(output)]) == 0
    values = json.loads(output.read_text())
    assert values["failed"] == []
    assert {"onnxruntime", "torch", "transformers"} <= set(values["machine"]["versions"])
    assert values["out_of_memory"]["to"] < values["out_of_memory"]["from"] == values["out_of_memory"]["captioned"] == 6
    for search in ("greedy", "beam3"):
        assert values["captions"][search]["fp16_against_torch_fp32"]["tokens"] >= 0.99
        rows = values["pairs"][search]
        assert set(rows) == {"transformers float16", "rsedge graphs", "rsedge fixed", "rsedge values"}
        assert all(row["images_per_s"] > 0 and row["batch"] == 4 for row in rows.values())
        assert values["profile"][search]["steps"] >= 5
        assert values["shares"][search]["encoder_share_of_gemm"] > 0


def test_a_failed_check_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch):
    captions = {"greedy": {"passed": False}, "beam3": {"passed": True}}
    for name, value in {"check_captions": captions, "check_embeddings": {"passed": True}}.items():
        monkeypatch.setattr(gpu, name, lambda *_, found=value: found)
    monkeypatch.setattr(gpu, "check_memory", lambda *_: {"passed": True})
    monkeypatch.setattr(gpu, "make_case", lambda options: caption_gpu.Case(cache, cache, "cpu", [], 5, (), ()))
    for name in ("Torch", "Rsedge"):
        monkeypatch.setattr(gpu, name, lambda *_, **__: type("Engine", (), {"name": "rsedge graphs"}))
    monkeypatch.setattr(gpu, "pairs", lambda *_: {})
    monkeypatch.setattr(gpu, "shares", lambda *_: {})
    monkeypatch.setattr(gpu.gpu_limits, "measure", lambda *_, **__: {})
    output = cache / "gpu.json"
    assert gpu.main(["--device", "cpu", "--tiny", "--output", str(output)]) == 1
    assert json.loads(output.read_text())["failed"] == ["captions greedy"]


def test_agreement_counts_missing_tokens():
    assert gpu.agreement([[1, 2], [3]], [[1, 2], [3, 4]]) == {"tokens": 0.75, "captions": 0.5}


def test_rsedge_is_there_without_raster_and_table_libraries():
    code = """
import sys
names = ("rasterio", "pyarrow", "rich", "affine")
sys.modules |= dict.fromkeys(names)
from bench import caption_gpu
caption_gpu.prepare()
for name in names:
    del sys.modules[name]
from rsedge.runtime.captioner import Captioner
from rsedge.runtime.embedder import Embedder
import rasterio
print(Captioner.__name__, Embedder.__name__, getattr(rasterio, "__version__", None))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Captioner Embedder <class")
