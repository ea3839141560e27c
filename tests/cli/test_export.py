"""`rsedge export` as a user runs it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from rsedge.bundle import read_bundle
from rsedge.cli.main import run


def test_export_prints_the_parity_report(checkpoint: Path, tmp_path: Path, capsys):
    target = tmp_path / "tiny.rsedge"
    assert run(["export", str(checkpoint), "-o", str(target), "--image-size", "40"]) == 0
    output = capsys.readouterr()
    bundle = read_bundle(target)
    assert bundle.model in output.out
    assert "greedy  captions 100.00% identical" in output.out
    assert "40 px" in output.out
    assert bundle.manifest.precision == "fp32"


def test_precision_and_json(checkpoint: Path, tmp_path: Path, capsys):
    target = tmp_path / "tiny.rsedge"
    settings = ["--generation", "repetition_penalty=1.3", "--generation", "num-beams=2", "--resolution", "10"]
    assert run(["export", str(checkpoint), "-o", str(target), "--int8", "--json", *settings]) == 0
    summary = json.loads(capsys.readouterr().out)
    manifest = read_bundle(target).manifest
    assert (manifest.generation.repetition_penalty, manifest.generation.num_beams) == (1.3, 2)
    assert manifest.domain.resolution == (10, 10)
    assert "10 m per pixel" in (target / "README.md").read_text()
    assert manifest.precision == "int8"
    assert summary["parity"] == manifest.parity


def test_a_bundle_has_one_precision(checkpoint: Path, tmp_path: Path, capsys):
    assert run(["export", str(checkpoint), "-o", str(tmp_path / "x.rsedge"), "--fp16", "--int8"]) == 2
    assert "--fp16 and --int8: a bundle has one precision" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("repetition_penalti=1.3", "did you mean repetition_penalty?"),
        ("num_beams=many", "num_beams is 'many', expected a value such as"),
        ("num_beams=0", "num_beams"),
        ("num_beams", "give KEY=VALUE"),
    ],
)
def test_settings_of_generation_are_checked(checkpoint: Path, tmp_path: Path, capsys, setting, said):
    assert run(["export", str(checkpoint), "-o", str(tmp_path / "x.rsedge"), "--generation", setting]) == 2
    assert said in capsys.readouterr().err


def test_a_bad_checkpoint_is_refused_with_every_reason(checkpoint: Path, tmp_path: Path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((checkpoint / "config.json").read_text())
    (broken / "pytorch_model.bin").write_bytes(b"pickle")
    assert run(["export", str(broken), "-o", str(tmp_path / "x.rsedge")]) == 1
    error = capsys.readouterr().err
    assert "pickle" in error
    assert "tokenizer" in error
    assert "preprocessor_config.json" in error
    assert not (tmp_path / "x.rsedge").exists()


def test_a_bad_target_is_a_usage_error(checkpoint: Path, tmp_path: Path, capsys):
    assert run(["export", str(checkpoint), "-o", str(tmp_path / "x")]) == 2
    assert ".rsedge" in capsys.readouterr().err


def test_without_torch_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    for name in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run(["export", str(tmp_path), "-o", str(tmp_path / "a.rsedge")]) == 1
    assert "exporting needs torch and transformers: pip install 'rsedge[export,cpu]'" in capsys.readouterr().err
