"""The self-test: it passes where an engine computes rightly, fails where not, and says what it could not test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rsedge.errors import OptionError
from rsedge.runtime.diagnostics import selftest
from rsedge.runtime.engines.tensorrt.graph import TrtGraph
from tests.fake_cuda import FakeCuda
from tests.runtime.trt_api import VERSIONS
from tests.runtime.trt_machines import make_machine


@pytest.mark.parametrize("version", VERSIONS)
def test_tensorrt_passes_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str):
    machine = make_machine(monkeypatch, tmp_path / "cache", version=version)
    (check,) = selftest.selftest(backend="tensorrt")
    assert check.passed, check.detail
    assert check.name.startswith(f"TensorRT {version} on Fake Orin, compute capability 8.7, 8.0 GiB memory shared")
    assert set(check.seconds) == {"build", "first run", "second run"}
    assert len(machine.trt.builds) == 3
    assert machine.cuda.launches > 0, "the second run replays"
    assert not list((tmp_path / "cache").glob("engines/*")), "the user's engines stay as they are"


def test_onnx_runtime_passes_on_the_cpu():
    (check,) = selftest.selftest(backend="onnxruntime", device="cpu")
    assert check.passed, check.detail


def test_wrong_results_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    make_machine(monkeypatch, tmp_path / "cache")
    right = TrtGraph.run_on_device

    def wrong(self, feeds, *, host=(), device=()):
        arrays, values = right(self, feeds, host=host, device=device)
        return [array + np.float32(0.3) if array.dtype == np.float32 else array[::-1] for array in arrays], values

    monkeypatch.setattr(TrtGraph, "run_on_device", wrong)
    (check,) = selftest.selftest(backend="tensorrt")
    assert check.passed is False
    assert "first run: encoder error" in check.detail


def test_what_is_not_there_is_not_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    make_machine(monkeypatch, tmp_path / "cache", cuda=FakeCuda(devices=0))
    lines: list[str] = []
    checks = selftest.selftest(progress=lines.append)
    assert [check.passed for check in checks] == [True, None, None]
    assert "no CUDA device 0: the driver knows 0" in checks[2].detail
    assert len(lines) == 3


def test_a_build_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    machine = make_machine(monkeypatch, tmp_path / "cache")
    machine.trt.problem = "no kernel"
    (check,) = selftest.selftest(backend="tensorrt", device="cuda:0")
    assert check.passed is False
    assert "no kernel" in check.detail


def test_the_stored_results_are_those_of_another_precision_too(tmp_path: Path):
    """The margins are wide: a float32 model of the same weights says the same."""
    from rsedge.export.convert import export
    from rsedge.runtime.engines.ort import OrtBackend
    from tests.models import make_blip

    made = make_blip(tmp_path / "same", seed=4, hidden=32, layers=2, heads=4, vocab=200)
    found = selftest.results(export(made, tmp_path / "same.rsedge"), OrtBackend("cpu", threads=1))
    passed, detail = selftest.compare(found, selftest.expected_results())
    assert passed, detail
    assert {len(tokens) for tokens in found["greedy"]} > {12}, "captions of several lengths"


def test_options_are_checked():
    with pytest.raises(OptionError, match="backend is 'torch'"):
        selftest.selftest(backend="torch")
    with pytest.raises(OptionError, match="device is 'gpu'"):
        selftest.selftest(device="gpu")
