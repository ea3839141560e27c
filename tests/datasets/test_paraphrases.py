"""The file of other wordings, attached to its examples or refused with reasons."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rsedge.datasets import load_examples
from rsedge.datasets.layouts import to_line
from rsedge.errors import OptionError
from tests.datasets.builders import CAPTIONS, images, json_lines, karpathy


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    return karpathy(tmp_path / "set")


def test_written_lines_come_back(annotations: Path, tmp_path: Path):
    data = load_examples([annotations])
    path = tmp_path / "p.jsonl"
    path.write_text("".join(to_line(example, [["été", "b"], []]) + "\n" for example in data.split("train")))
    loaded = load_examples([annotations], paraphrases=path)
    assert [example.paraphrases for example in loaded.examples] == [(("été", "b"), ())] * 2 + [()] * 2
    assert "été" in path.read_text()
    # Lines for images of other splits are no mistake, and a caption set may name files in place of keys.
    assert load_examples([annotations], paraphrases=path, splits=("val",)).split("val")[0].paraphrases == ()
    json_lines(path, [{"filename": "c.png", "captions": CAPTIONS["c.png"], "paraphrases": [[], ["x"]]}])
    assert load_examples([annotations], paraphrases=path).split("val")[0].paraphrases == ((), ("x",))


def test_all_mismatches_at_once(annotations: Path, tmp_path: Path):
    path = tmp_path / "p.jsonl"
    good = {"key": "tiny/a.png", "captions": CAPTIONS["a.png"], "paraphrases": [[], ["x"]]}
    lines = [
        good,
        good,
        {**good, "key": "tiny/z.png"},
        {**good, "key": "tiny/b.png"},
        {**good, "key": "tiny/c.png", "paraphrases": [["x"]]},
        {**good, "key": "tiny/d.png", "paraphrases": "x"},
        {"filename": "z.png", "captions": ["x"], "paraphrases": [[]]},
    ]
    path.write_text("\n".join([*map(json.dumps, lines), "{", "3"]))
    with pytest.raises(OptionError) as error:
        load_examples([annotations], paraphrases=path)
    message = str(error.value)
    for problem in (
        "line 2: tiny/a.png is there twice",
        "line 3: there is no image 'tiny/z.png' in the data",
        "line 5: it has 2 captions, but paraphrases of 1",
        "line 6: it needs captions, a list of texts",
        "line 7: the file name 'z.png' is that of 0 images in the data: give key",
        "line 8: ",
        "line 9: it is no JSON object",
        "tiny/b.png has other captions in the data",
        "rsedge back-translate",
    ):
        assert problem in message


def test_empty_and_missing_files(annotations: Path, tmp_path: Path):
    (tmp_path / "empty").touch()
    with pytest.raises(OptionError, match="it is empty"):
        load_examples([annotations], paraphrases=tmp_path / "empty")
    with pytest.raises(OptionError, match="cannot be read"):
        load_examples([annotations], paraphrases=tmp_path / "none")


def test_a_table_may_hold_them(tmp_path: Path):
    images(tmp_path)
    row = {"filename": "./a.png", "captions": ["x", "y"], "paraphrases": [["z "], []], "split": "train"}
    example = load_examples([json_lines(tmp_path / "mine.jsonl", [row])]).examples[0]
    assert (example.key, example.paraphrases) == ("mine/a.png", (("z",), ()))
    path = tmp_path / "p.jsonl"
    path.write_text(to_line(example, [["v"], ["w"]]))
    assert load_examples([tmp_path / "mine.jsonl"], paraphrases=path).examples[0].paraphrases == (("v",), ("w",))
    for wrong, message in (([["z"]], "paraphrases of 1 captions, but 2"), (["z", "w"], "a list of texts for each")):
        path = json_lines(tmp_path / "mine.jsonl", [{**row, "paraphrases": wrong}])
        with pytest.raises(OptionError, match=message):
            load_examples([path])
