from __future__ import annotations

import pytest

from rsedge.cli.main import run


@pytest.fixture(autouse=True)
def no_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("RSEDGE_MODEL", raising=False)


def test_a_setting_is_set_shown_read_and_removed(bundle_path, tmp_path, capsys):
    assert run(["config", "path"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "rsedge" / "config.toml")
    assert run(["config", "get", "model"]) == 1
    assert capsys.readouterr().out == ""
    assert run(["config", "set", "model", str(bundle_path)]) == 0
    assert run(["config", "get", "model"]) == 0
    assert capsys.readouterr().out.strip() == str(bundle_path.resolve())
    assert run(["config", "show"]) == 0
    assert f"default model: {bundle_path.resolve()} (model in" in capsys.readouterr().out
    assert run(["config", "unset", "model"]) == 0
    assert run(["config", "get", "model"]) == 1
    assert run(["config", "show"]) == 0
    assert "(not set)" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["get", "colour"], ["set", "colour", "red"], ["unset", "colour"]])
def test_unknown_settings_are_refused_by_name(arguments, capsys):
    assert run(["config", *arguments]) == 2
    assert "unknown setting 'colour': expected model" in capsys.readouterr().err


def test_what_is_no_bundle_is_refused(tmp_path, capsys):
    assert run(["config", "set", "model", str(tmp_path / "absent.rsedge")]) == 1
    assert "no bundle at" in capsys.readouterr().err
