"""Every layout gives the same examples; splits, limits, faults."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from rsedge.datasets import load_examples, load_labelled
from rsedge.datasets.examples import Splitter
from rsedge.datasets.layouts import _caption_faults
from rsedge.datasets.tables import Record, caption_columns
from rsedge.errors import OptionError
from tests.conftest import shared_data
from tests.datasets.builders import CAPTIONS, SPLITS, images, json_lines, karpathy, pixels, table


def check(data, set_name: str, *, prefix=lambda split: "") -> None:
    """All four images, with their captions, splits and pixels."""
    assert [example.key for example in data.examples] == sorted(
        f"{set_name}/{prefix(split)}{name}" for name, split in SPLITS.items()
    )
    for example in data.examples:
        name = Path(example.key).name
        assert list(example.captions) == CAPTIONS[name]
        assert example.split == SPLITS[name]
        np.testing.assert_array_equal(example.image.read(), pixels(name))


def rows(*, file: str = "file_name", captions: str = "captions", split: str | None = "split") -> list[dict]:
    return [
        {file: name, captions: texts, **({split: SPLITS[name]} if split else {})} for name, texts in CAPTIONS.items()
    ]


def flat(rows: list[dict], captions: str = "captions", to: str = "caption") -> list[dict]:
    """A caption a row."""
    return [{**{k: v for k, v in row.items() if k != captions}, to: text} for row in rows for text in row[captions]]


def test_karpathy(tmp_path: Path):
    path = karpathy(tmp_path)
    check(load_examples([path]), "tiny")
    check(load_examples([tmp_path]), "tiny")
    (tmp_path / "images").rename(tmp_path / "pictures")
    check(load_examples([f"{path}@{tmp_path / 'pictures'}"]), "tiny")
    with pytest.raises(OptionError, match=r"no image of it, such as a\.png.*dataset\.json@FOLDER"):
        load_examples([path])


def test_karpathy_images_in_the_same_folder_and_no_name(tmp_path: Path):
    path = karpathy(tmp_path / "ucm", name=None)
    (tmp_path / "ucm" / "images").rename(tmp_path / "ucm" / "UCM_images")
    check(load_examples([path]), "ucm")
    images(tmp_path / "ucm")
    for file in (tmp_path / "ucm" / "UCM_images").iterdir():
        file.unlink()
    check(load_examples([path]), "ucm")


@pytest.mark.parametrize("file", ["file_name", "filename", "image"])
@pytest.mark.parametrize("captions", ["captions", "caption", "text", "sentences"])
def test_json_lines(tmp_path: Path, file, captions):
    images(tmp_path)
    check(load_examples([json_lines(tmp_path / "mine.jsonl", rows(file=file, captions=captions))]), "mine")


def test_json_lists_and_numbered_columns(tmp_path: Path):
    images(tmp_path / "images")
    numbered = [
        {"filename": name, "caption_10": texts[1], "caption_2": texts[0], "caption_11": "", "split": SPLITS[name]}
        for name, texts in CAPTIONS.items()
    ]
    (tmp_path / "mine.json").write_text(json.dumps(numbered))
    check(load_examples([tmp_path / "mine.json"]), "mine")
    check(load_examples([table(tmp_path / "other.csv", numbered)]), "other")


def test_csv_has_a_row_for_each_caption(tmp_path: Path):
    images(tmp_path)
    lines = flat(rows(file="filename"))
    check(load_examples([table(tmp_path / "mine.csv", lines)]), "mine")
    path = table(tmp_path / "bom.csv", lines)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    check(load_examples([path]), "bom")
    path = json_lines(tmp_path / "flat.jsonl", lines)
    check(load_examples([path]), "flat")


def test_parquet(tmp_path: Path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    images(tmp_path)
    parquet.write_table(pyarrow.Table.from_pylist(rows()), tmp_path / "mine.parquet")
    check(load_examples([tmp_path / "mine.parquet"]), "mine")
    with_pixels = pyarrow.Table.from_pylist([{"image": {"bytes": b"", "path": "a"}, "text": "b"}])
    parquet.write_table(with_pixels, tmp_path / "shard.parquet")
    with pytest.raises(OptionError, match="holds the images themselves: have its folder loaded, hf:"):
        load_examples([tmp_path / "shard.parquet"])


def test_imagefolder_with_folders_for_splits(tmp_path: Path):
    folder = tmp_path / "village"
    words = {"train": "train", "val": "validation", "test": "test"}
    for split, word in words.items():
        names = [name for name in SPLITS if SPLITS[name] == split]
        images(folder / word, names)
        json_lines(folder / word / "metadata.jsonl", [row for row in rows(split=None) if row["file_name"] in names])
    check(load_examples([folder]), "village", prefix=lambda split: f"{words[split]}/")

    # The metadata may as well lie at the top.
    for word in words.values():
        (folder / word / "metadata.jsonl").unlink()
    top = [{**row, "file_name": f"{words[SPLITS[row['file_name']]]}/{row['file_name']}"} for row in rows(split=None)]
    table(folder / "metadata.csv", flat(top, to="text"))
    check(load_examples([folder]), "village", prefix=lambda split: f"{words[split]}/")


def test_imagefolder_with_a_split_column(tmp_path: Path):
    json_lines(images(tmp_path / "village") / "metadata.jsonl", rows())
    check(load_examples([tmp_path / "village"]), "village")
    check(load_examples([tmp_path / "village" / "metadata.jsonl"]), "village")


def test_a_file_for_each_split(tmp_path: Path):
    images(tmp_path / "set" / "images")
    for split, word in {"train": "train", "val": "dev", "test": "test"}.items():
        json_lines(tmp_path / "set" / f"{word}.jsonl", [r for r in rows(split=None) if SPLITS[r["file_name"]] == split])
    check(load_examples([tmp_path / "set"]), "set")
    assert {example.split for example in load_examples([tmp_path / "set" / "dev.jsonl"]).examples} == {"val"}


def test_several_sets_and_names_that_clash(tmp_path: Path):
    one, two = karpathy(tmp_path / "one"), karpathy(tmp_path / "two")
    other = json_lines(images(tmp_path / "x" / "mine") / "metadata.jsonl", rows())
    data = load_examples([one, two, other.parent])
    assert sorted({example.key.rpartition("/")[0] for example in data.examples}) == [
        "mine",
        "one/dataset",
        "two/dataset",
    ]
    assert data.examples == load_examples([other.parent, two, one]).examples
    assert len(data.summary()["sources"]) == 3
    with pytest.raises(OptionError, match="are one set"):
        load_examples([one, tmp_path / "two" / ".." / "one" / "dataset.json"])


def test_a_set_without_splits_is_split_by_key_whatever_its_order(tmp_path: Path):
    names = [f"{number}.png" for number in range(40)]
    images(tmp_path / "images", names)
    lines = [{"filename": name, "caption": f"{text} of {name}"} for name in names for text in ("one", "two")]
    first = load_examples([table(tmp_path / "mine.csv", lines)], seed=5, fractions=(0.5, 0.25, 0.25))
    for example in first.examples:
        assert example.split == Splitter(5, (0.5, 0.25, 0.25)).split(example.key)
        assert len(example.captions) == 2
    assert len({example.split for example in first.examples}) == 3
    images_only = lines[::2]
    random.Random(1).shuffle(images_only)
    table(tmp_path / "mine.csv", images_only)
    second = load_examples([tmp_path / "mine.csv"], seed=5, fractions=(0.5, 0.25, 0.25))
    splits = [[(example.key, example.split) for example in data.examples] for data in (first, second)]
    assert splits[0] == splits[1]


def test_limit_is_a_stable_subset_of_each_split(tmp_path: Path):
    names = [f"{number}.png" for number in range(30)]
    images(tmp_path, names)
    lines = [{"filename": name, "caption": "x", "split": "train" if i % 3 else "val"} for i, name in enumerate(names)]
    path = table(tmp_path / "mine.csv", lines)
    chosen = [{example.key for example in load_examples([path], limit=limit).examples} for limit in (3, 4, 15)]
    assert [len(keys) for keys in chosen] == [6, 8, 25]
    assert chosen[0] < chosen[1] < chosen[2]
    assert chosen[0] != {example.key for example in load_examples([path], limit=3, seed=1).examples}
    with pytest.raises(OptionError, match="limit is 0: give a number of images above 0"):
        load_examples([path], limit=0)


def test_images_of_other_splits_need_not_be_there(tmp_path: Path):
    path = karpathy(tmp_path)
    (tmp_path / "images" / "d.png").unlink()
    assert {example.split for example in load_examples([path], splits=("train", "val")).examples} == {"train", "val"}
    with pytest.raises(
        OptionError, match=r"1 record cannot be used:\n.*: d\.png: there is no image .*d\.png\nmend them"
    ):
        load_examples([path])
    (tmp_path / "images" / "a.png").unlink()
    karpathy(tmp_path / "more", splits={"a.png": "train"})
    with pytest.raises(OptionError, match="hold no usable image of the splits val: there are no records"):
        load_examples([tmp_path / "more" / "dataset.json"], splits=("val",))


def faulty(folder: Path) -> Path:
    """Eleven records, two of them usable."""
    images(
        folder / "images", ["a.png", "b.png", "cut.png", "no.png", "blank.png", "number.png", "split.png", "none.png"]
    )
    content = (folder / "images" / "cut.png").read_bytes()
    (folder / "images" / "cut.png").write_bytes(content[: len(content) // 2])
    good = {"captions": ["fine"], "split": "train"}
    entries = [
        {**good, "filename": "a.png"},
        {**good, "filename": "b.png"},
        {**good, "filename": "missing.png"},
        {**good, "filename": "cut.png"},
        {**good, "filename": "no.png", "captions": []},
        {**good, "filename": "blank.png", "captions": ["fine", "  "]},
        {**good, "filename": "number.png", "captions": [3]},
        {**good, "filename": "split.png", "split": "holdout"},
        {"filename": "none.png", "captions": ["fine"]},
        {**good, "filename": "./a.png"},
        {**good, "filename": "../secret.png"},
        good,
    ]
    path = json_lines(folder / "mine.jsonl", entries)
    path.write_text(path.read_text() + "{torn\n[1]\n\n")
    return path


FAULTS = {
    "line 13": "it is not JSON",
    "line 14": "it is no JSON object",
    "no.png (line 5)": "it has no caption",
    "blank.png (line 6)": "a caption is empty",
    "number.png (line 7)": "a caption is 3, expected text",
    "split.png (line 8)": "unknown split: 'holdout'; accepted are train",
    "none.png (line 9)": "unknown split: it has no split, though other records have",
    "./a.png (line 10)": "a.png is there more than once",
    "../secret.png (line 11)": "../secret.png lies outside the image folder",
    "line 12": "it names no image file",
    "missing.png (line 3)": "there is no image",
    "mine/cut.png": "cut.png cannot be decoded (PNG)",
}


def test_all_faults_are_listed_at_once(tmp_path: Path):
    path = faulty(tmp_path)
    with pytest.raises(OptionError) as error:
        load_examples([path])
    message = str(error.value)
    for record, reason in FAULTS.items():
        assert f"{path}: {record}: " in message
        assert reason in message
    assert message.startswith("12 records cannot be used:\n")
    assert message.endswith("leave them out with --skip-bad")


def test_skip_bad_leaves_them_out(tmp_path: Path):
    data = load_examples([faulty(tmp_path)], skip_bad=True)
    assert [example.key for example in data.examples] == ["mine/a.png", "mine/b.png"]
    assert {record.record for record in data.bad} == set(FAULTS)
    for record in data.bad:
        assert FAULTS[record.record] in record.reason
    assert data.summary()["bad"] == 12
    unchecked = load_examples([tmp_path / "mine.jsonl"], skip_bad=True, check=False)
    assert [example.key for example in unchecked.examples] == ["mine/a.png", "mine/b.png", "mine/cut.png"]


def test_only_the_first_20_in_full(tmp_path: Path):
    images(tmp_path)
    path = json_lines(tmp_path / "mine.jsonl", [{"filename": f"{n}.jpg", "caption": ""} for n in range(35)])
    with pytest.raises(OptionError) as error:
        load_examples([path])
    lines = str(error.value).splitlines()
    assert len(lines) == 23
    assert lines[0] == "35 records cannot be used:"
    assert lines[-2] == "  and 15 more"


def test_csv_faults(tmp_path: Path):
    images(tmp_path)
    path = tmp_path / "mine.csv"
    path.write_text(
        "filename,caption,split\na.png,fine,train\na.png,other,val\nb.png,short\nc.png,a,b,c\n"
        "d.png,\"['x', 'y']\",test\n"
    )
    data = load_examples([path], skip_bad=True)
    assert [(example.key, example.captions) for example in data.examples] == [("mine/a.png", ("fine",))]
    assert [record.reason.partition(":")[0] for record in sorted(data.bad, key=lambda record: record.record)] == [
        "its split or label is not that of a.png (line 2)",
        "it has not the 3 cells of the header",
        "it has not the 3 cells of the header",
        "['x', 'y'] looks like a list",
    ]
    path.write_text('filename,caption\na.png,"torn\n')
    with pytest.raises(OptionError, match="is no CSV after line"):
        load_examples([path])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"name": "a", "caption": "b"}, "no column of image files among name, caption; accepted are file_name"),
        ({"filename": "a", "title": "b"}, "no column of captions among filename, title; accepted are captions"),
        ({"filename": "a", "caption": "b", "text": "c"}, "both caption and text may be the captions"),
        ({"filename": "a", "file_name": "b", "text": "c"}, "both file_name and filename may be the image file"),
    ],
)
def test_unclear_columns(tmp_path: Path, columns, message):
    with pytest.raises(OptionError, match=message):
        load_examples([json_lines(tmp_path / "mine.jsonl", [columns])])


def test_unclear_layouts(tmp_path: Path):
    for name, content, message in [
        ("a.txt", "x", r"is a \.txt, which is no layout; accepted are Karpathy JSON"),
        (
            "coco.json",
            '{"images": [], "annotations": []}',
            "an object with images, annotations: Karpathy JSON has images",
        ),
        ("bad.json", "{", "cannot be read as JSON"),
        ("number.json", "3", "no list of images"),
    ]:
        (tmp_path / name).write_text(content)
        with pytest.raises(OptionError, match=message):
            load_examples([tmp_path / name])
    with pytest.raises(OptionError, match=r"it holds bad\.json and coco\.json and number\.json: give the one"):
        load_examples([tmp_path])
    (tmp_path / "empty").mkdir()
    with pytest.raises(OptionError, match="it holds nothing"):
        load_examples([tmp_path / "empty"])
    both = images(tmp_path / "both")
    json_lines(both / "metadata.jsonl", rows())
    table(both / "metadata.csv", flat(rows()))
    with pytest.raises(OptionError, match=r"it holds metadata\.jsonl and metadata\.csv"):
        load_examples([both])
    with pytest.raises(OptionError, match="no caption set is named"):
        load_examples([])


def test_every_unusable_source_is_named(tmp_path: Path):
    path = karpathy(tmp_path)
    with pytest.raises(OptionError) as error:
        load_examples([tmp_path / "none.json", f"{path}@{tmp_path / 'nowhere'}", "hf:"])
    lines = str(error.value).splitlines()
    assert "none.json does not exist" in lines[0]
    assert "there is no folder" in lines[1]
    assert "hf: is no id of a set" in lines[2]


def test_folders_of_classes(tmp_path: Path):
    images(tmp_path / "uc", ["river/r1.png", "sea lake/s1.png", "sea lake/s2.png"])
    (tmp_path / "uc" / "river" / "notes.txt").write_text("x")
    examples = load_labelled(tmp_path / "uc")
    assert [(e.key, e.label, e.split, e.captions) for e in examples] == [
        ("uc/river/r1.png", "river", "test", ()),
        ("uc/sea lake/s1.png", "sea lake", "test", ()),
        ("uc/sea lake/s2.png", "sea lake", "test", ()),
    ]
    np.testing.assert_array_equal(examples[0].image.read(), pixels("r1.png"))
    with pytest.raises(OptionError, match="a folder whose layout cannot be told: it holds river/, sea lake/"):
        load_examples([tmp_path / "uc"])
    images(tmp_path / "parts", ["train/river/a.png", "test/river/b.png"])
    assert [(e.label, e.split) for e in load_labelled(tmp_path / "parts")] == [("river", "test"), ("river", "train")]
    assert len(load_labelled(tmp_path / "parts", splits=("test",))) == 1


def test_classes_in_file_names(tmp_path: Path):
    images(tmp_path / "flat", ["airport_12.png", "dense_residential-3.png", "beach7.png"])
    assert [e.label for e in load_labelled(tmp_path / "flat")] == ["airport", "beach", "dense_residential"]
    images(tmp_path / "flat", ["00012.png"])
    with pytest.raises(OptionError, match=r"00012\.png: it has no class: neither a label nor a file name such as"):
        load_labelled(tmp_path / "flat")
    assert len(load_labelled(tmp_path / "flat", skip_bad=True, limit=2)) == 2
    (tmp_path / "none").mkdir()
    with pytest.raises(OptionError, match="neither annotations nor images"):
        load_labelled(tmp_path / "none")


def test_labels_in_annotations(tmp_path: Path):
    images(tmp_path)
    path = table(tmp_path / "mine.csv", [{"filename": n, "label": i, "split": "test"} for i, n in enumerate(SPLITS)])
    assert [example.label for example in load_labelled(path)] == ["0", "1", "2", "3"]
    with pytest.raises(OptionError, match="it has no caption"):
        load_examples([path])
    karpathy(tmp_path / "k")
    with pytest.raises(OptionError, match="it has no class"):
        load_labelled(tmp_path / "k")


def test_rsicd_as_published(tmp_path: Path):
    annotations = shared_data("rsicd/dataset_rsicd.json")
    values = json.loads(annotations.read_text())
    for image in values["images"]:
        (tmp_path / image["filename"]).touch()
    sizes = load_examples([f"{annotations}@{tmp_path}"], check=False).summary()["splits"]
    assert {name: (size["images"], size["captions"]) for name, size in sizes.items()} == {
        "train": (8734, 43670),
        "val": (1094, 5470),
    }
    classes = load_labelled(f"{annotations}@{tmp_path}", splits=("val",), skip_bad=True, check=False)
    assert len({example.label for example in classes}) == 30


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a" * 300 + ".png", "a part of more than 255 bytes"),
        ("a/" * 1500 + "b.png", "can be no name of a file"),
        ("a\ud800.png", "can be no name of a file"),
        ("a\0.png", "can be no name of a file"),
    ],
)
def test_names_that_no_file_can_have(tmp_path, name, said):
    (tmp_path / "captions.jsonl").write_text(json.dumps({"file_name": name, "captions": ["a field"]}), encoding="utf-8")
    with pytest.raises(OptionError, match=said):
        load_examples([tmp_path])


@pytest.mark.parametrize("name", ["captions.json", "captions.jsonl"])
def test_json_that_nests_too_deeply_is_said(tmp_path, name):
    (tmp_path / name).write_text("[" * 200_000, encoding="utf-8")
    with pytest.raises(OptionError, match="nests too deeply"):
        load_examples([tmp_path])


def test_a_column_with_a_number_of_thousands_of_digits_is_no_caption_column():
    assert caption_columns(["caption_1", "caption_" + "9" * 5000], "x.csv") == ("caption_1",)


def test_a_caption_with_half_a_character_is_bad():
    record = Record("line 1", "x.png", ("a \ud800 road",))
    assert "half a character" in next(_caption_faults(record, needed=True))
