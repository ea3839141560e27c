"""Caption sets as they are published: NWPU-Captions, folders of the hub, and sets without a validation split."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from rsedge.datasets import load_examples
from rsedge.errors import OptionError


def image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8))


def write_nwpu(folder: Path, *, in_classes: bool) -> Path:
    classes = {}
    for label, count in (("airplane", 4), ("bridge", 2)):
        entries = []
        for number in range(count):
            split = ("train", "train", "val", "test")[number]
            raw = {"raw" + (f"_{k}" if k else ""): f"{label} {number} caption {k} ." for k in range(5)}
            entries.append({"filename": f"{label}_{number:03}.jpg", "imgid": number, "split": split, **raw})
            place = folder / "NWPU_images" / (label if in_classes else "") / f"{label}_{number:03}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            image(number).save(place)
        classes[label] = entries
    (folder / "dataset_nwpu.json").write_text(json.dumps(classes))
    return folder


@pytest.mark.parametrize("in_classes", [True, False])
def test_nwpu_as_published(tmp_path, in_classes):
    folder = write_nwpu(tmp_path, in_classes=in_classes)
    for source in (folder, folder / "dataset_nwpu.json", f"{folder / 'dataset_nwpu.json'}@{folder / 'NWPU_images'}"):
        data = load_examples([str(source)])
        assert [len(data.split(name)) for name in ("train", "val", "test")] == [4, 1, 1]
        first = data.split("train")[0]
        assert first.captions == tuple(f"airplane 0 caption {k} ." for k in range(5))
        assert first.label == "airplane"
        assert first.image.read().shape == (8, 8, 3)


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "a/../../b.jpg"])
def test_names_of_nwpu_stay_in_its_folder(tmp_path, name):
    folder = write_nwpu(tmp_path / "set", in_classes=True)
    values = json.loads((folder / "dataset_nwpu.json").read_text())
    values["airplane"][0]["filename"] = name
    (folder / "dataset_nwpu.json").write_text(json.dumps(values))
    with pytest.raises(OptionError, match="outside the image folder"):
        load_examples([str(folder)])


@pytest.mark.parametrize("below", ["data", ""])
def test_a_folder_of_the_hub(tmp_path, below):
    (tmp_path / "set" / below).mkdir(parents=True)
    for split, count in (("train", 3), ("test", 2)):
        columns = {"image": [image(number) for number in range(count)], "captions": [["a field", "fields"]] * count}
        rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
        rows.to_parquet(str(tmp_path / "set" / below / f"{split}-00000-of-00001.parquet"))
    data = load_examples([str(tmp_path / "set")])
    assert [len(data.split(name)) for name in ("train", "val", "test")] == [3, 0, 2]
    assert data.split("train")[0].captions == ("a field", "fields")


def plain(folder: Path, splits: list[str | None]) -> Path:
    folder.mkdir()
    lines = []
    for number, split in enumerate(splits):
        image(number).save(folder / f"{number}.png")
        lines.append(json.dumps({"filename": f"{number}.png", "captions": ["a field"], "split": split}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


def test_a_share_of_the_training_images_validates(tmp_path):
    folder = plain(tmp_path / "set", ["train"] * 200 + ["test"] * 20)
    data = load_examples([str(folder)], val_fraction=0.2)
    sizes = [len(data.split(name)) for name in ("train", "val", "test")]
    assert sum(sizes[:2]) == 200
    assert sizes[2] == 20
    assert 20 < sizes[1] < 60
    again = load_examples([str(folder)], val_fraction=0.2, splits=("val",))
    assert again.examples == data.split("val")
    more = {each.key for each in load_examples([str(folder)], val_fraction=0.4).split("val")}
    assert {each.key for each in data.split("val")} < more
    assert not load_examples([str(folder)]).split("val")


def test_a_set_that_has_a_validation_split_keeps_it(tmp_path):
    folder = plain(tmp_path / "set", ["train"] * 20 + ["val"] * 5)
    assert len(load_examples([str(folder)], val_fraction=0.5).split("val")) == 5
    with pytest.raises(OptionError, match="val_fraction is 1"):
        load_examples([str(folder)], val_fraction=1)
