"""The benchmark for GPUs runs to its end on any machine, so that on a GPU only its figures are news."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import caption_gpu, common, gpu
from bench.gpu_checks import agreement

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
    assert values["failed"] == values["left_out"] == []
    assert values["errors"] == {}
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
    stub_parts(cache, monkeypatch, {"check_captions": {"greedy": {"passed": False}, "beam3": {"passed": True}}})
    output = cache / "gpu.json"
    assert gpu.main(["--device", "cpu", "--tiny", "--output", str(output)]) == 1
    assert json.loads(output.read_text())["failed"] == ["captions greedy"]


def stub_parts(cache: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]) -> None:
    """Let every part give ``values`` by the name of its function, or {"passed": True}; an exception is raised."""

    def stub(name: str) -> Any:
        def part(*_: Any, **__: Any) -> Any:
            value = values.get(name, {"passed": True})
            if isinstance(value, Exception):
                raise value
            return value

        return part

    for name in ("check_captions", "check_embeddings", "check_memory", "pairs", "profiles", "shares"):
        monkeypatch.setattr(gpu, name, stub(name))
    monkeypatch.setattr(gpu.gpu_limits, "measure", stub("limits"))
    monkeypatch.setattr(gpu, "make_case", lambda options: caption_gpu.Case(cache, cache, "cpu", [1] * 12, 5, (), ()))


def test_a_part_that_ends_in_an_error_is_named_and_the_rest_goes_on(cache: Path, monkeypatch: pytest.MonkeyPatch):
    stub_parts(cache, monkeypatch, {"check_captions": RuntimeError("CUDA failure 700")})
    output = cache / "gpu.json"
    arguments = ["--device", "cpu", "--tiny", "--output", str(output)]
    assert gpu.main(arguments) == 1
    values = json.loads(output.read_text())
    assert values["errors"] == {"captions": "RuntimeError: CUDA failure 700"}
    assert values["failed"] == ["captions"]
    assert {"limits", "embeddings", "pairs", "profile", "shares"} <= set(values)

    stub_parts(cache, monkeypatch, {"limits": ValueError("is not run")})
    assert gpu.main([*arguments, "--only", "captions"]) == 0
    values = json.loads(output.read_text())
    assert values["failed"] == []
    assert values["limits"] == {"passed": True}, "what was not asked for is kept"


def test_nothing_is_begun_when_the_time_is_over(cache: Path, monkeypatch: pytest.MonkeyPatch):
    stub_parts(cache, monkeypatch, {})
    output = cache / "gpu.json"
    assert gpu.main(["--device", "cpu", "--tiny", "--output", str(output), "--minutes", "1e-9"]) == 0
    values = json.loads(output.read_text())
    assert set(values["left_out"]) >= {"limits", "captions", "pairs"}
    assert "failed" not in values, "nothing is known of checks that never ran"


class Scripted:
    """An engine that fails when it is told to."""

    def __init__(self, *, fails_at: int | None = None) -> None:
        self.calls, self._fails_at = 0, fails_at

    def caption(self, images: Any, batch: int, **settings: Any) -> list[list[int]]:
        self.calls += 1
        if self.calls == self._fails_at:
            raise RuntimeError("CUDA failure 700: an illegal memory access was encountered")
        return [[1]] * len(images)

    def close(self) -> None:
        pass


def test_an_engine_that_fails_does_not_keep_others_from_running(cache: Path):
    def absent() -> Scripted:
        raise ImportError("no compiler")

    case = caption_gpu.Case(cache, cache, "cpu", [0] * 8, 5, (), (), {"greedy": 1})
    makers = {"rsedge graphs": Scripted, "late": lambda: Scripted(fails_at=3), "absent": absent, "other": Scripted}
    saved: list[str] = []
    found = gpu.pairs(case, makers, [4], 2, progress=lambda results: saved.append(json.dumps(results)))["greedy"]
    assert found["absent"] == {"error": "ImportError: no compiler"}
    assert "CUDA failure 700" in found["late"]["error"]
    assert found["late"]["images_per_s"] > 0, "what was measured before is kept"
    assert found["rsedge graphs"]["rsedge_graphs_is_times"] == 1
    assert len(found["other"]["rounds"]) == 2
    assert len(saved) == 5, "after each engine, and at the end"
    assert gpu.pairs(case, {"rsedge graphs": absent}, [4], 1)["greedy"]["rsedge graphs"]["error"]


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as exit_info:
        gpu.main([])
    assert exit_info.value.code == 2
    assert "sees no CUDA device" in capsys.readouterr().err


def test_agreement_counts_missing_tokens():
    assert agreement([[1, 2], [3]], [[1, 2], [3, 4]]) == {"tokens": 0.75, "captions": 0.5}


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
