"""`rsedge doctor`: what it says, and that it says it wherever something is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rsedge.cli.main import run
from rsedge.runtime.diagnostics import doctor

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def own_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("RSEDGE_MODEL", raising=False)


def without(*modules: str, arguments: str = "'doctor', '--json'") -> tuple[int, dict, str]:
    """Exit code and findings of a process in which these modules cannot be imported."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({modules!r})); from rsedge.cli.main import run\n"
        f"code = run([{arguments}]); print(sorted(sys.modules), file=sys.stderr); sys.exit(code)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert process.stdout, process.stderr
    return process.returncode, json.loads(process.stdout), process.stderr


def test_a_healthy_machine(bundle_path, capsys):
    assert run(["doctor", "-m", str(bundle_path), "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["works"]
    trial = found["trial"]
    assert (trial["path"], trial["chosen"]) == (str(bundle_path), "named with -m")
    assert (trial["backend"], trial["device"], trial["reason"]) == ("onnxruntime", "cpu", "cpu was asked for")
    assert isinstance(trial["caption"], str)
    assert found["software"]["libraries"]["numpy"] == __import__("numpy").__version__
    assert found["software"]["gdal"] == __import__("rasterio").__gdal_version__
    assert "CPUExecutionProvider" in found["software"]["providers"]
    assert found["processor"]["usable"] == len(os.sched_getaffinity(0))
    assert all(found["rasters"]["drivers"].values())
    assert found["rasters"]["remote"]
    assert found["rasters"]["maps"]
    assert [extra["name"] for extra in found["extras"]] == list(doctor.EXTRAS)


def test_as_text_problems_come_last(bundle_path, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_SCARCE_DISK", 2**60)
    assert run(["doctor", "-m", str(bundle_path)]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line and not line.startswith(" ")] == [
        "software", "processor", "room", "devices", "rasters", "sandbox",
        "captioning", "for more", "1 problem", "captioning works",
    ]  # fmt: skip
    assert "next: make room, or set RSEDGE_CACHE" in out


def test_without_torch_and_without_importing_it():
    code, found, err = without("transformers", "onnx", "accelerate")
    assert (code, found["works"]) == (0, True)
    assert found["trial"]["model"].startswith("sentinel2-rgb@")
    assert "'torch'" not in err


def test_without_onnxruntime():
    code, found, _ = without("onnxruntime")
    assert (code, found["works"], found["software"]["providers"]) == (1, False, [])
    (problem,) = [problem for problem in found["problems"] if problem["fatal"]]
    assert "ONNX Runtime is not installed" in problem["text"]
    assert "pip install 'rsedge[" in problem["remedy"]


@pytest.mark.parametrize("module", ["rasterio", "tokenizers", "numpy", "PIL"])
def test_without_what_every_installation_has(module):
    code, found, _ = without(module)
    assert (code, found["works"]) == (1, False)
    assert module in " ".join(problem["text"] for problem in found["problems"] if problem["fatal"])


def test_without_raster_drivers(bundle_path, capsys, monkeypatch):
    import rasterio

    monkeypatch.setattr(rasterio.Env, "drivers", lambda self: {"GTiff": "", "VRT": ""})
    assert run(["doctor", "-m", str(bundle_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    texts = [problem["text"] for problem in found["problems"]]
    assert any("JP2OpenJPEG (JPEG 2000" in text and "GTiff" not in text for text in texts)
    assert any("without curl" in text for text in texts)


def test_a_default_model_that_is_gone(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RSEDGE_MODEL", str(tmp_path / "gone.rsedge"))
    assert run(["doctor", "--json"]) == 1
    (problem,) = [p for p in json.loads(capsys.readouterr().out)["problems"] if p["fatal"]]
    assert "gone.rsedge" in problem["text"]
    assert "RSEDGE_MODEL" in problem["text"]


def test_a_default_model_that_writes_no_captions(tmp_path, capsys):
    from rsedge.export.convert import export
    from tests.dual_encoders import make_clip

    clip = export(make_clip(tmp_path / "model"), tmp_path / "clip.rsedge").path
    assert run(["doctor", "-m", str(clip), "--json"]) == 1
    assert "makes embeddings" in json.loads(capsys.readouterr().out)["problems"][0]["text"]


def test_a_device_that_is_not_there(bundle_path, capsys):
    assert run(["doctor", "-m", str(bundle_path), "--device", "cuda:7", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert "cuda:7 cannot be used" in found["trial"]["problem"]


def test_a_gpu_that_is_not_used(tmp_path, monkeypatch, capsys, bundle_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA L4, 570.86.15, 23034 MiB, 8.9'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    problem = "onnxruntime 1.20.0 here is built without CUDA"
    monkeypatch.setattr("rsedge.runtime.engines.ort._cuda_problem", lambda number: problem)
    assert run(["doctor", "-m", str(bundle_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["devices"]["gpus"] == ["NVIDIA L4, driver 570.86.15, 23034 MiB, compute capability 8.9"]
    assert found["devices"]["cuda_problem"] == problem
    (told,) = [p for p in found["problems"] if "GPU" in p["text"]]
    assert told["remedy"] == "pip uninstall -y onnxruntime && pip install 'rsedge[gpu]'"


def test_a_gpu_that_tensorrt_uses_is_no_problem(tmp_path, monkeypatch, capsys, bundle_path):
    """As on a Jetson, whose TensorRT comes with the system and whose ONNX Runtime has no CUDA."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'Orin (nvgpu), 540.4.0, [N/A], 8.7'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("rsedge.runtime.engines.tensorrt.backend.tensorrt_problem", lambda number, precision: "")
    assert run(["doctor", "-m", str(bundle_path), "--backend", "onnxruntime", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "TensorRT         usable; awaits confirmation on hardware" in out
    assert "a GPU that is not used" not in out


def test_a_backend_that_is_not_there(bundle_path, capsys):
    assert run(["doctor", "-m", str(bundle_path), "--backend", "tensorrt", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert "backend tensorrt cannot be used" in found["trial"]["problem"]
    assert not found["devices"]["tensorrt"]
    assert found["devices"]["tensorrt_problem"] in found["trial"]["problem"]
    assert run(["doctor", "--selftest", "--backend", "tensorrt"]) == 2


# ---- what is read from the system ----

X86 = "processor\t: 0\nmodel name\t: AMD EPYC 9004\nflags\t\t: fpu sse avx2 avx512f avx512_vnni\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd asimdhp asimddp i8mm\nCPU implementer\t: 0x41\n"


def test_instruction_sets():
    assert doctor.parse_cpuinfo(X86, "x86_64") == (
        "AMD EPYC 9004",
        {"AVX2": True, "AVX-512": True, "VNNI": True, "AMX": False},
    )
    assert doctor.parse_cpuinfo(ARM, "aarch64") == (
        None,
        {"dotprod": True, "i8mm": True, "fp16": True, "SVE": False},
    )
    assert doctor.parse_cpuinfo("", "arm64") == (None, {})


def test_jetpack():
    text = "# R36 (release), REVISION: 4.0, GCID: 37537400, BOARD: generic, EABI: aarch64, DATE: Fri Sep 13"
    assert doctor.parse_tegra(text) == "6 (L4T 36.4.0)"
    assert doctor.parse_tegra("# R99 (release), REVISION: 1.0,") == "of unknown version (L4T 99.1.0)"
    assert doctor.parse_tegra("") is None


def test_extras_include_others():
    requirements = [
        "numpy>=1.26",
        'torch>=2.4; extra == "export"',
        'rsedge[evaluate,export]; extra == "train"',
        'nltk>=3.9 ; extra == "evaluate"',
        'accelerate>=1.2; extra == "train"',
    ]
    assert doctor.needed_by("train", requirements) == {"torch", "nltk", "accelerate"}
    assert doctor.needed_by("search", requirements) == set()


def test_every_extra_has_a_purpose():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(doctor.EXTRAS) == set(project["optional-dependencies"]) - {"dev"}


def test_what_is_missing_is_named_with_the_command(monkeypatch):
    def version_of(name):
        return None if name in ("torch", "tensorrt", "cuda-python", "onnxruntime-gpu") else "1.0"

    monkeypatch.setattr(doctor, "version_of", version_of)
    found = {extra.name: extra for extra in doctor.extras()}
    assert found["export"].missing == ("torch",)
    assert found["export"].command == "pip install 'rsedge[export]'"
    assert found["evaluate"].command is None
    assert found["tensorrt"].command == "pip install 'rsedge[tensorrt]' tensorrt"
    assert found["gpu"].command == "pip uninstall -y onnxruntime && pip install 'rsedge[gpu]'"
    on_jetson = {extra.name: extra for extra in doctor.extras(jetpack=True)}
    assert on_jetson["tensorrt"].command == "sudo apt install python3-libnvinfer && pip install 'rsedge[tensorrt]'"


def test_both_runtimes_at_once(bundle_path, monkeypatch):
    monkeypatch.setattr(doctor, "version_of", lambda name: "1.0")
    found = doctor.check_up(lambda: (bundle_path, "named with -m"))
    assert any("overwrite each other" in problem.text for problem in found.problems)
    assert found.works


def test_selftest_runs_every_engine_there_is(capsys):
    assert run(["doctor", "--selftest", "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)
    assert [check["passed"] for check in checks if "cpu" in check["name"]] == [True]
    assert any("TensorRT" in check["name"] for check in checks)
    assert run(["doctor", "--selftest", "-m", "x.rsedge"]) == 2


def test_selftest_fails_where_an_engine_gives_something_else(monkeypatch, capsys):
    from rsedge.runtime.diagnostics import selftest

    expected = selftest.expected_results()
    wrong = {name: [[7] * len(row) for row in expected[name]] for name in ("greedy", "beam3")}
    monkeypatch.setattr(selftest, "expected_results", lambda: {**expected, **wrong})
    assert run(["doctor", "--selftest", "--device", "cpu"]) == 1
    assert "FAILED" in capsys.readouterr().out
