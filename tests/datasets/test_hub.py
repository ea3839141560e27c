"""Sets of the datasets library: saved to disk, loaded from a folder, and by id (with the hub replaced)."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from rsedge.datasets import hub, load_examples, load_labelled
from rsedge.errors import OptionError, SceneError
from tests.datasets.builders import CAPTIONS, SPLITS, images, json_lines, pixels

datasets = pytest.importorskip("datasets")


def rows(names: list[str], **columns: list) -> datasets.Dataset:
    pictures = [Image.fromarray(pixels(name)) for name in names]
    features = datasets.Dataset.from_dict({"image": pictures}).cast_column("image", datasets.Image())
    for name, values in columns.items():
        features = features.add_column(name, values)
    return features


def whole() -> datasets.DatasetDict:
    parts = {"train": ["a.png", "b.png"], "validation": ["c.png"], "test": ["d.png"]}
    return datasets.DatasetDict(
        {word: rows(names, filename=names, captions=[CAPTIONS[n] for n in names]) for word, names in parts.items()}
    )


def test_a_saved_set(tmp_path: Path):
    whole().save_to_disk(tmp_path / "mine")
    data = load_examples([tmp_path / "mine"])
    assert [(e.key, e.split, list(e.captions)) for e in data.examples] == [
        (f"mine/{name}", SPLITS[name], CAPTIONS[name]) for name in SPLITS
    ]
    for example in pickle.loads(pickle.dumps(data.examples)):
        np.testing.assert_array_equal(example.image.read(), pixels(example.key[-5:]))
    assert load_examples([tmp_path / "mine"], limit=1).summary()["splits"]["train"]["images"] == 1


def test_the_only_split_train_is_none(tmp_path: Path):
    names = [f"{number}.png" for number in range(30)]
    rows(names, text=[f"number {name}" for name in names]).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows(names, text=["x"] * 30)}).save_to_disk(tmp_path / "two")
    for folder in ("one", "two"):
        splits = load_examples([tmp_path / folder], fractions=(0.5, 0.3, 0.2)).summary()["splits"]
        assert set(splits) == {"train", "val", "test"}
    assert load_examples([tmp_path / "one"]).examples[4].key == "one/row-000004"


def test_an_imagefolder_through_the_library(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for word, name in {"train": "a.png", "test": "d.png"}.items():
        images(tmp_path / "set" / word, [name])
        json_lines(tmp_path / "set" / word / "metadata.jsonl", [{"file_name": name, "text": CAPTIONS[name][0]}])
    data = load_examples([f"hf:{tmp_path / 'set'}"])
    assert [(e.split, e.captions) for e in data.examples] == [("train", ("first of a",)), ("test", ("first of d",))]
    assert all(example.key.endswith(".png") for example in data.examples)
    np.testing.assert_array_equal(data.examples[1].image.read(), pixels("d.png"))


def test_hub_ids(monkeypatch):
    asked = []

    def load_dataset(path, config, *, revision):
        asked.append((path, config, revision))
        return whole()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_examples(["hf:someone/rs-captions:big@v1.0"])
    assert asked == [("someone/rs-captions", "big", "v1.0")]
    assert data.examples[0].key == "someone/rs-captions/a.png"
    load_examples(["hf:someone/rs-captions"])
    assert asked[1] == ("someone/rs-captions", None, None)
    with pytest.raises(OptionError, match="hf: is no id of a set: give hf:OWNER/NAME"):
        hub.read_hub("hf:")


def test_what_cannot_be_loaded(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OptionError, match=r"hf:.*nowhere cannot be loaded"):
        load_examples([f"hf:{tmp_path / 'nowhere'}"])
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "text")
    with pytest.raises(OptionError, match="has no column of images among text"):
        load_examples([tmp_path / "text"])
    datasets.DatasetDict({"holdout": rows(["a.png"], text=["a"])}).save_to_disk(tmp_path / "odd")
    with pytest.raises(OptionError, match="has unknown splits holdout: accepted are train"):
        load_examples([tmp_path / "odd"])


def test_classes_and_missing_images(tmp_path: Path):
    labelled = rows(["a.png", "b.png"], label=[1, 0])
    labelled = labelled.cast_column("label", datasets.ClassLabel(names=["river", "harbour"]))
    labelled.save_to_disk(tmp_path / "classes")
    assert [example.label for example in load_labelled(tmp_path / "classes")] == ["harbour", "river"]

    blank = datasets.Dataset.from_dict({"image": [None], "text": ["a"]}).cast_column("image", datasets.Image())
    blank.save_to_disk(tmp_path / "blank")
    example = load_examples([tmp_path / "blank"], check=False).examples[0]
    with pytest.raises(SceneError, match="row-000000 has no image"):
        example.image.read()
    with pytest.raises(OptionError, match="1 record cannot be used"):
        load_examples([tmp_path / "blank"])


@pytest.mark.parametrize("loaded", [True, False])
def test_a_set_names_files_below_its_own_folder_only(tmp_path: Path, monkeypatch, loaded):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    for folder in (tmp_path, tmp_path / "set"):
        Image.fromarray(pixels("a.png")).save(folder / "a.png")

    def named(path: str) -> None:
        features = datasets.Features({"image": datasets.Image(decode=False), "text": datasets.Value("string")})
        part = datasets.Dataset.from_dict({"image": [{"bytes": None, "path": path}], "text": ["x"]}, features=features)
        whole = part.cast_column("image", datasets.Image())
        monkeypatch.setattr(datasets, "load_dataset" if loaded else "load_from_disk", lambda *_, **__: whole)

    read = hub.read_hub if loaded else lambda source: hub.read_saved(source, tmp_path / "set")
    source = f"hf:{tmp_path / 'set'}"
    named(str(tmp_path / "set" / "a.png"))
    np.testing.assert_array_equal(read(source).records[0].image.read(), pixels("a.png"))
    for path in (str(tmp_path / "a.png"), str(tmp_path / "set" / ".." / "a.png"), "/dev/stdin"):
        named(path)
        with pytest.raises(SceneError, match="in no folder of the set"):
            read(source).records[0].image.read()


@pytest.mark.parametrize(
    "name", ["{outside}/a.csv", "../a.csv", "https://127.0.0.1:1/a.csv", "zip://x::{outside}/a.zip"]
)
def test_a_card_names_no_data_elsewhere(tmp_path: Path, name: str):
    (outside := tmp_path / "outside").mkdir()
    (outside / "a.csv").write_text("filename,caption\nx.png,a secret\n")
    (folder := tmp_path / "mine").mkdir()
    listed = name.format(outside=outside)
    card = f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {listed!r}\n---\n"
    (folder / "README.md").write_text(card)
    with pytest.raises(OptionError, match="which is not below the folder"):
        hub.read_hub(f"hf:{folder}")


def test_a_card_may_name_files_of_its_folder(tmp_path: Path):
    (folder := tmp_path / "mine").mkdir()
    (folder / "part.csv").write_text("image,caption\nx.png,a field\n")
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: '*.csv'\n---\n# Mine\n")
    hub._check_data_files(folder, "hf:mine")


@pytest.mark.parametrize("file", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize(
    "shape",
    ["---\n{}\n---\n", "---\r{}\r---\n", "\u00a0---\n{}\n---\n", "\ufeff---\n{}\n---\n", "---\n---b: 1\n{}\n---\n"],
)
def test_a_card_hides_no_data_elsewhere(tmp_path: Path, monkeypatch, file: str, shape: str):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the library was asked"))
    (folder := tmp_path / "mine").mkdir()
    configs = f"configs: [{{config_name: default, data_files: {str(tmp_path / 'a.csv')!r}}}]"
    text = shape.format(configs) if file == "README.md" else f"{configs}\n"
    (folder / file).write_bytes(text.encode())
    with pytest.raises(OptionError, match="which is not below the folder"):
        hub.read_hub(f"hf:{folder}")


def test_a_saved_set_names_no_parts_elsewhere(tmp_path: Path):
    rows(["a.png"], text=["a secret"]).save_to_disk(tmp_path / "outside")
    part = next((tmp_path / "outside").glob("*.arrow"))
    for name in (str(part), f"../outside/{part.name}"):
        folder = tmp_path / f"mine{len(name)}"
        rows(["b.png"], text=["x"]).save_to_disk(folder)
        state = json.loads((folder / "state.json").read_bytes())
        (folder / "state.json").write_text(json.dumps({**state, "_data_files": [{"filename": name}]}))
        with pytest.raises(OptionError, match="which is not below the folder"):
            load_examples([folder])
    (folder := tmp_path / "dict").mkdir()
    (folder / "dataset_dict.json").write_text('{"splits": ["../outside"]}')
    with pytest.raises(OptionError, match="which is not below the folder"):
        load_examples([folder])


@pytest.mark.parametrize("kind", ["image", "images", "audio"])
def test_other_media_of_a_row_are_not_decoded(tmp_path: Path, monkeypatch, kind: str):
    decoded: list[str] = []
    monkeypatch.setattr(datasets.Image, "decode_example", lambda _, value, **__: decoded.append(value))
    monkeypatch.setattr(datasets.Audio, "decode_example", lambda _, value, **__: decoded.append(value))
    media = datasets.Audio() if kind == "audio" else datasets.Image()
    Image.fromarray(pixels("a.png")).save(stored := io.BytesIO(), "PNG")
    named = {"bytes": None, "path": str(tmp_path / "secret.png")}
    extra = datasets.List(media) if kind == "images" else media
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string"), "extra": extra})
    columns = {
        "image": [{"bytes": stored.getvalue(), "path": "a.png"}],
        "text": ["x"],
        "extra": [[named] if kind == "images" else named],
    }
    whole = datasets.Dataset(pa.table(columns, schema=features.arrow_schema))
    assert whole.features == features
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: whole)
    record = hub.read_hub(f"hf:{tmp_path}").records[0]
    assert record.captions == ("x",)
    record.image.read()
    assert decoded == []


@pytest.mark.parametrize(
    "head", ["configs: &a [*a]", "a: &a [x]\nb: &b [*a, *a]\nconfigs: *b", "x: [" + "1," * 2**15 + "1]"]
)
def test_a_card_takes_no_time(tmp_path: Path, head: str):
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n")
    with pytest.raises(OptionError, match=r"aliases, which no card needs|more than 32768 characters"):
        hub.read_hub(f"hf:{tmp_path}")
