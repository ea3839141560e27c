"""`rsedge back-translate` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from rsedge.cli.main import run
from rsedge.datasets import load_examples
from tests.marian import make_marian


def make_set(folder: Path) -> Path:
    (folder / "images").mkdir(parents=True)
    lines = []
    for number, split in enumerate(["train", "train", "val"]):
        Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(folder / "images" / f"{number}.png")
        captions = ["a long river", f"{number} green fields"]
        lines.append(json.dumps({"filename": f"{number}.png", "captions": captions, "split": split}))
    path = folder / "captions.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_captions_are_reworded_for_training(tmp_path: Path, capsys):
    data = make_set(tmp_path / "set")
    forward = make_marian(tmp_path / "f", languages=("fr", "es"), seed=1)
    backward = make_marian(tmp_path / "b", languages=(), seed=2)
    output = tmp_path / "out.jsonl"
    arguments = ["back-translate", str(data), "-o", str(output), "--forward", str(forward), "--backward", str(backward)]
    arguments += ["--max-new-tokens", "6"]
    assert run([*arguments, "--languages", "fr, es", "--json"]) == 0
    printed = capsys.readouterr()
    summary = json.loads(printed.out)
    assert (summary["images"], summary["captions"], summary["bad"]) == (2, 4, 0)
    loaded = load_examples([data], paraphrases=output)
    assert loaded.summary()["splits"]["train"]["paraphrases"] == summary["paraphrases"] > 0
    assert loaded.summary()["splits"]["val"]["paraphrases"] == 0

    assert run([*arguments, "--languages", "fr"]) == 1
    assert "exists already" in capsys.readouterr().err
    assert run([*arguments, "--overwrite"]) == 2
    assert "choose some of fr, es" in capsys.readouterr().err
    assert run([*arguments, "--overwrite", "--languages", "es", "--splits", "train,val"]) == 0
    assert "6 captions, 3 images" in capsys.readouterr().out


def test_unknown_splits_and_sources(tmp_path: Path, capsys):
    data = make_set(tmp_path / "set")
    arguments = ["-o", str(tmp_path / "o.jsonl"), "--forward", "f", "--backward", "b"]
    assert run(["back-translate", str(data), *arguments, "--splits", "training"]) == 2
    assert "give some of train, val, test" in capsys.readouterr().err
    assert run(["back-translate", str(tmp_path / "none.json"), *arguments]) == 2
    assert "does not exist" in capsys.readouterr().err
