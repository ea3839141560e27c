from __future__ import annotations

import sys

import pytest

from rsedge.cli import config as module
from rsedge.cli.config import built_in_model, change_setting, default_model, read_settings, settings_path
from rsedge.errors import BundleError, OptionError, OutputError


@pytest.fixture(autouse=True)
def no_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("RSEDGE_MODEL", raising=False)


def test_the_environment_wins_over_the_settings_and_those_over_the_built_in(bundle_path, monkeypatch):
    path, reason = default_model()
    assert path == built_in_model()
    assert reason.startswith("built in")
    change_setting("model", str(bundle_path))
    path, reason = default_model()
    assert path == bundle_path.resolve()
    assert str(settings_path()) in reason
    monkeypatch.setenv("RSEDGE_MODEL", str(bundle_path))
    assert default_model() == (bundle_path, "RSEDGE_MODEL in the environment")
    monkeypatch.delenv("RSEDGE_MODEL")
    change_setting("model", None)
    assert default_model()[0] == built_in_model()


def test_a_relative_path_is_kept_absolute(bundle_path, monkeypatch, tmp_path):
    monkeypatch.chdir(bundle_path.parent)
    change_setting("model", bundle_path.name)
    monkeypatch.chdir(tmp_path)
    assert default_model()[0] == bundle_path.resolve()


def test_what_is_no_bundle_is_not_kept(tmp_path):
    with pytest.raises(BundleError, match="no bundle at"):
        change_setting("model", str(tmp_path))
    assert not settings_path().exists()
    with pytest.raises(OptionError, match="unknown setting 'modle': expected model"):
        change_setting("modle", "x")


def test_a_default_that_went_away_says_who_chose_it(bundle_path, monkeypatch):
    change_setting("model", str(bundle_path))
    text = settings_path().read_text(encoding="utf-8")
    settings_path().write_text(text.replace("tiny", "gone"), encoding="utf-8")
    with pytest.raises(BundleError, match=r"(?s)config\.toml.*gone.*rsedge config unset model"):
        default_model()
    monkeypatch.setenv("RSEDGE_MODEL", "nowhere.rsedge")
    with pytest.raises(BundleError, match=r"(?s)RSEDGE_MODEL in the environment.*nowhere.*unset it"):
        default_model()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle = 1\nmodel = 2\n", "unknown setting modle; model is 2, expected text"),
        ("model = ''\n", "expected text"),
        ("model =\n", "cannot read"),
    ],
)
def test_settings_that_cannot_be_are_all_named(text, message):
    settings_path().parent.mkdir(parents=True)
    settings_path().write_text(text, encoding="utf-8")
    with pytest.raises(OptionError, match=message):
        read_settings()


def test_a_folder_that_cannot_be_made_is_an_error_with_its_path(bundle_path, tmp_path):
    (tmp_path / "config").write_text("a file")
    with pytest.raises(OutputError, match=r"cannot write .*config\.toml"):
        change_setting("model", str(bundle_path))


def test_where_settings_live(monkeypatch, tmp_path):
    assert settings_path() == tmp_path / "config" / "rsedge" / "config.toml"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert settings_path() == tmp_path / ".config" / "rsedge" / "config.toml"
    monkeypatch.setattr(module.sys, "platform", "win32")
    monkeypatch.setenv("APPDATA", str(tmp_path / "Roaming"))
    assert settings_path() == tmp_path / "Roaming" / "rsedge" / "config.toml"
    assert sys.platform == "win32", "undone by monkeypatch"
