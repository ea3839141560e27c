"""`rsedge train` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rsedge.cli.main import run
from rsedge.training.recipe import keys, presets, save_recipe
from tests.training.tiny import caption_data, tiny_recipe, write_set


@pytest.fixture
def ready(tmp_path: Path) -> list[str]:
    """A set and a recipe on disk, as arguments."""
    source = write_set(tmp_path / "set", caption_data())
    save_recipe(tmp_path / "tiny.toml", tiny_recipe("blip", "loop.epochs=1"))
    return ["--data", str(source), "--recipe", str(tmp_path / "tiny.toml"), "--cpu", "--trackers", "none"]


def test_train_resume_and_export(ready, tmp_path, capsys):
    folder = tmp_path / "run"
    assert run(["train", "blip", *ready, "-o", str(folder), "--limit", "20", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["steps"] == 2
    assert summary["values"]["val_loss"] > 0

    assert run(["train", "blip", "-o", str(folder), "--resume", "--cpu", "--trackers", "none"]) == 0
    output = capsys.readouterr().out
    assert "best  step 2 of 2" in output
    assert f"next: rsedge export {folder / 'best'} -o run.rsedge" in output

    assert run(["train", "blip", *ready, "-o", str(folder)]) == 1
    assert "go on with --resume" in capsys.readouterr().err
    assert run(["train", "blip", *ready, "-o", str(folder), "--resume"]) == 2
    assert "data.limit was 20, now None" in capsys.readouterr().err

    assert run(["export", str(folder / "best"), "-o", str(tmp_path / "run.rsedge")]) == 0
    manifest = json.loads((tmp_path / "run.rsedge" / "manifest.json").read_text())
    assert manifest["provenance"]["recipe"]["loop"]["batch_size"] == 8
    assert manifest["generation"]["max_new_tokens"] == 14


def test_lists(capsys):
    assert run(["train", "--list-recipes"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(presets())
    assert run(["train", "--list-keys"]) == 0
    assert capsys.readouterr().out.split() == keys()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--set", "bogus=1"], "bogus is not a key"),
        (["--set", "learning_rate=fast"], "must be a number"),
        (["--resume", "--overwrite"], "give one of them"),
        (["--recipe", "nothing"], "there is no recipe nothing"),
        (["--init", "some/where", "--set", "model.tokenizer=captions"], "has a tokenizer of its own"),
    ],
)
def test_bad_usage(extra, message, ready, tmp_path, capsys):
    assert run(["train", "blip", *ready, "-o", str(tmp_path / "run"), *extra]) == 2
    assert message in capsys.readouterr().err


def test_bad_records_are_listed_and_nothing_is_trained(ready, tmp_path, capsys):
    (tmp_path / "set" / "003.png").unlink()
    (tmp_path / "set" / "005.png").write_bytes(b"no image")
    folder = tmp_path / "run"
    assert run(["train", "blip", *ready, "-o", str(folder)]) == 2
    message = capsys.readouterr().err
    assert "003.png" in message
    assert "005.png" in message
    assert "--skip-bad" in message
    assert run(["train", "blip", *ready, "-o", str(folder), "--skip-bad"]) == 0
