"""`rsedge tune` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rsedge.cli.main import run
from rsedge.training.recipe import load_recipe


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    lines = []
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        caption = f"{['one', 'two', 'three'][number % 3]} fields"
        split = "train" if number < 8 else "val"
        lines.append(json.dumps({"filename": f"{number}.png", "captions": [caption], "split": split}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder / "captions.jsonl"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    part = "hidden_size = 16\nintermediate_size = 32\nnum_hidden_layers = 1\nnum_attention_heads = 2\n"
    path.write_text(
        'family = "clip"\n[data]\nworkers = 0\n[model]\nimage_size = 16\ntokenizer = "captions"\n'
        "vocabulary_size = 64\nmax_tokens = 8\n[model.config]\nprojection_dim = 8\n"
        f"[model.config.vision]\npatch_size = 8\n{part}[model.config.text]\n{part}"
        "[loop]\nepochs = 1\nbatch_size = 4\n"
    )
    return path


def test_a_search_prints_its_best_and_goes_on(captions: Path, recipe: Path, tmp_path: Path, capsys):
    file = tmp_path / "space.toml"
    file.write_text('[search]\nloop.batch_size = [4, 8]\noptimizer.learning_rate = "log:1e-4:1e-2"\n')
    study = tmp_path / "study"
    arguments = ["tune", "clip", "--data", str(captions), "--recipe", str(recipe), "-o", str(study), "--cpu"]
    arguments += ["--search-file", str(file), "--search", "schedule.name=linear,cosine"]
    assert run([*arguments, "--trials", "2"]) == 0
    printed = capsys.readouterr()
    assert "study  2 trials: 2 complete" in printed.out
    assert "best: trial" in printed.out
    assert f"next: rsedge train clip --recipe {study / 'best.toml'} -o RUN" in printed.out
    best = load_recipe(study / "best.toml", family="clip")
    assert best.data.sources == (str(captions),)
    assert best.loop.batch_size in (4, 8)

    assert run([*arguments, "--trials", "2"]) == 1
    assert "--resume" in capsys.readouterr().err
    assert run([*arguments, "--trials", "3", "--resume", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["trials"] == {"complete": 3}
    assert set(summary["settings"]) == {"loop.batch_size", "optimizer.learning_rate", "schedule.name"}
    assert summary["recipe"] == str(study / "best.toml")


def test_the_learning_rate_finder(captions: Path, recipe: Path, tmp_path: Path, capsys):
    arguments = ["tune", "clip", "--data", str(captions), "--recipe", str(recipe), "-o", str(tmp_path / "s"), "--cpu"]
    arguments += ["--find-lr", "--steps", "12", "--min-lr", "1e-5"]
    assert run(arguments) == 0
    printed = capsys.readouterr().out
    assert "12 steps" in printed
    assert "next: rsedge train clip --set learning_rate=" in printed
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["lr-finder.csv", "lr-finder.png"]
    assert run(arguments) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert run([*arguments, "--overwrite", "--json"]) == 0
    assert 1e-5 <= json.loads(capsys.readouterr().out)["steepest"] <= 1


def test_options_that_would_change_nothing_are_refused(tmp_path: Path, capsys):
    output = ["-o", str(tmp_path / "s")]
    assert run(["tune", "clip", *output, "--find-lr", "--search", "epochs=1,2", "--trials", "3"]) == 2
    assert "leave out --search, --trials" in capsys.readouterr().err
    assert run(["tune", "clip", *output, "--search", "epochs=1,2", "--min-lr", "1e-5", "--steps", "20"]) == 2
    assert "only it uses --min-lr, --steps" in capsys.readouterr().err
    assert run(["tune", "clip", *output, "--search", "epochs=1,2", "--resume", "--overwrite"]) == 2
    assert "give one of them" in capsys.readouterr().err


def test_bad_ranges_are_refused_with_what_is_accepted(recipe: Path, tmp_path: Path, capsys):
    arguments = ["tune", "clip", "--recipe", str(recipe), "-o", str(tmp_path / "s")]
    assert run([*arguments, "--search", "learning_rate", "--search", "epochs=1,2", "--search", "epochs=2,3"]) == 2
    error = capsys.readouterr().err
    assert "write KEY=RANGE with float:LOW:HIGH, log:LOW:HIGH" in error
    assert "epochs is given twice" in error
    assert run([*arguments, "--search", "learning_rate=1e-6..1e-3", "--search", "epoch=1,2"]) == 2
    error = capsys.readouterr().err
    assert "learning_rate: '1e-6..1e-3' is no range: give float:LOW:HIGH" in error
    assert "did you mean epochs" in error
    file = tmp_path / "space.toml"
    file.write_text('learning_rate = "log:1e-4:1e-2"\n')
    assert run([*arguments, "--search-file", str(file)]) == 2
    assert "must have the table [search]" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
