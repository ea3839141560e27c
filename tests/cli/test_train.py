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
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == keys()


def test_without_a_recipe_a_small_model_is_trained(tmp_path, capsys):
    source = write_set(tmp_path / "set", caption_data(train=34, val=3))
    assert (
        run(["train", "clip", "--data", str(source), "-o", str(tmp_path / "no"), "--cpu", "--set", "batch_size=0"]) == 2
    )
    few = ["--set", "max_steps=1", "--set", "batch_size=8", "--set", "workers=0", "--set", "loop.micro_batch_size="]
    assert run(["train", "clip", "--data", str(source), "-o", str(tmp_path / "run"), "--cpu", *few]) == 0
    assert "next: rsedge export" in capsys.readouterr().out
    frozen = ["train", "clipcap", "--data", str(source), "-o", str(tmp_path / "caps"), "--cpu", *few]
    assert run(frozen) == 2
    assert "--set model.encoder=RUNS/clip/best" in capsys.readouterr().err


def test_an_output_that_cannot_be_is_told_before_the_data_is_read(tmp_path, capsys):
    (tmp_path / "file").touch()
    output = ["--data", str(tmp_path / "absent"), "-o", str(tmp_path / "file" / "run")]
    for command in (["train", "blip"], ["tune", "blip", "--search", "epochs=1,2"], ["tune", "blip", "--find-lr"]):
        assert run([*command, *output]) == 1
        assert f"{tmp_path / 'file'} is no folder: choose another with -o" in capsys.readouterr().err
    for name, code, message in (
        ("x", 2, "must end in .rsedge"),
        ("file/x.rsedge", 1, "does not exist: create it first"),
    ):
        assert run(["export", "absent/model", "-o", str(tmp_path / name)]) == code
        assert message in capsys.readouterr().err


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
