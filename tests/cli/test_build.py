"""``rsedge build`` on a machine with a fake GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rsedge.cli.build import command
from rsedge.errors import BackendError, OptionError
from tests.fake_cuda import FakeCuda
from tests.runtime.trt_machines import make_machine


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    command.main(args=list(arguments), prog_name="build", standalone_mode=False)
    return capsys.readouterr().out


def test_builds_once_and_says_where(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle_path: Path, capsys: pytest.CaptureFixture[str]
):
    machine = make_machine(monkeypatch, tmp_path / "cache")
    summary = json.loads(run(capsys, str(bundle_path), "--json", "--beams", "2", "--batch-size", "4", "--level", "1"))
    assert set(summary["engines"]) == {"vision", "step", "self_cache"}
    assert all(Path(engine["path"]).stat().st_size == engine["bytes"] for engine in summary["engines"].values())
    assert machine.trt.levels == [1] * 3
    lines = run(capsys, str(bundle_path), "--beams", "2", "--batch-size", "4", "--level", "1").splitlines()
    assert len(lines) == 3
    assert all("existing" in line for line in lines)
    run(capsys, str(bundle_path), "--beams", "2", "--batch-size", "4", "--level", "1", "--force")
    assert len(machine.trt.builds) == 6


def test_other_sizes_are_other_engines(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle_path: Path, capsys: pytest.CaptureFixture[str]
):
    machine = make_machine(monkeypatch, tmp_path / "cache")
    for batch_size in ("2", "4"):
        run(capsys, str(bundle_path), "--batch-size", batch_size)
    assert len(machine.trt.builds) == 6


def test_without_a_gpu_it_says_so_and_touches_no_tensorrt(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle_path: Path, capsys: pytest.CaptureFixture[str]
):
    make_machine(monkeypatch, tmp_path / "cache", cuda=FakeCuda(error=35))
    with pytest.raises(BackendError, match="driver version is insufficient"):
        run(capsys, str(bundle_path))
    with pytest.raises(OptionError, match="expected cuda or cuda:N"):
        run(capsys, str(bundle_path), "--device", "cpu")


def test_an_int8_bundle_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from rsedge.cli.config import built_in_model

    make_machine(monkeypatch, tmp_path / "cache")
    with pytest.raises(BackendError, match="export with --fp16"):
        run(capsys, str(built_in_model()))
