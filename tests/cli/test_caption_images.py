"""`rsedge caption` of image files: one record each, seen whole."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rsedge.cli.main import run
from rsedge.pixels import ImageSize, fit_image
from tests import scenes
from tests.conftest import shared_data


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chips").mkdir()
    for number, size in enumerate([(64, 64), (300, 200), (224, 224)]):
        pixels = scenes.pixels(3, *size, seed=number).transpose(1, 2, 0)
        Image.fromarray(pixels).save(tmp_path / "chips" / f"c{number}.png")
    return tmp_path


def rows(path: str) -> list[dict[str, str]]:
    with Path(path).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_images_are_captioned_whole_as_the_api_does(folder):
    assert run(["-q", "caption", "chips", "-o", "out.csv", "--device", "cpu"]) == 0
    from rsedge import Captioner
    from rsedge.cli.config import built_in_model

    captioner = Captioner.load(built_in_model(), device="cpu")
    found = rows("out.csv")
    assert [row["scene"] for row in found] == ["c0", "c1", "c2"]
    wanted = ImageSize(224, "bicubic", resolution=(10, 10))
    for row in found:
        pixels = np.asarray(Image.open(folder / "chips" / f"{row['scene']}.png"))
        image = fit_image(pixels, wanted)
        (caption,) = captioner.caption(image[None])
        assert row["caption"] == caption.text
        assert [int(row["height"]), int(row["width"])] == list(pixels.shape[:2])


def test_small_images_are_mirrored_for_a_model_that_knows_its_resolution():
    pixels = scenes.pixels(3, 64, 50).transpose(1, 2, 0)
    known = ImageSize(224, resolution=(10.0, 10.0))
    np.testing.assert_array_equal(fit_image(pixels, known), np.pad(pixels, ((0, 160), (0, 174), (0, 0)), "symmetric"))
    np.testing.assert_array_equal(fit_image(pixels, known, 10.0), fit_image(pixels, known))
    # 20 m per pixel: twice as many at 10 m. 5 m: half as many.
    twice = Image.fromarray(pixels).resize((100, 128), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(fit_image(pixels, known, 20.0)[:128, :100], np.asarray(twice))
    half = Image.fromarray(pixels).resize((25, 32), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(fit_image(pixels, known, 5.0)[:32, :25], np.asarray(half))
    # A model that knows none sees it blown up, as transformers does.
    blown = Image.fromarray(pixels).resize((224, 224), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(fit_image(pixels, ImageSize(224)), np.asarray(blown))


@pytest.mark.parametrize("size", [(300, 500), (224, 900), (1000, 224), (400, 400), (2000, 100)])
def test_large_images_fill_the_input(size):
    pixels = scenes.pixels(3, *size).transpose(1, 2, 0)
    fitted = fit_image(pixels, ImageSize(224, resolution=(10.0, 10.0)))
    assert fitted.shape == (224, 224, 3)
    assert fit_image(pixels, ImageSize(224, crop=True)).shape == (224, 224, 3)


def test_images_beside_scenes_and_what_cannot_be_opened(folder, capsys):
    scenes.write(folder / "scene.tif", scenes.pixels(3, 300, 300))
    (folder / "broken.tif").write_bytes((folder / "scene.tif").read_bytes()[:200])
    assert run(["caption", "scene.tif", "broken.tif", "chips", "-o", "o.csv", "--device", "cpu", "--json"]) == 3
    summary = json.loads(capsys.readouterr().out)
    assert (summary["scenes"], summary["images"] >= 3, summary["tiles"] >= 7) == (1, True, True)
    assert len(summary["unopened"]) + summary["read_errors"] == 1


def test_options_of_scenes_and_views_are_refused_for_images(folder, capsys):
    assert run(["caption", "chips", "-o", "o.csv", "--tile-size", "64"]) == 2
    assert "--tile-size: for scenes only" in capsys.readouterr().err
    assert run(["caption", "chips", "--as", "image", "-o", "o.csv", "--html", "a.html"]) == 2
    assert "--html: for scenes" in capsys.readouterr().err
    # With a view wanted, they are scenes.
    assert run(["-q", "caption", "chips/c0.png", "-o", "v.csv", "--html", "v.html", "--device", "cpu"]) == 0
    assert run(["caption", "chips"]) == 2
    assert "need a named output" in capsys.readouterr().err
    assert run(["caption", "chips", "nowhere.tif", "-o", "o.csv"]) in (1, 2)
    assert "nowhere.tif does not exist" in capsys.readouterr().err


def test_as_decides(folder):
    chip = "chips/c1.png"
    assert run(["-q", "caption", chip, "-o", "image.csv", "--device", "cpu"]) == 0
    assert run(["-q", "caption", chip, "-o", "scene.csv", "--as", "scene", "--device", "cpu"]) == 0
    assert (len(rows("image.csv")), len(rows("scene.csv"))) == (1, 2)


NAMES = {
    "AnnualCrop": ("crop", "field"), "Forest": ("forest", "trees"), "HerbaceousVegetation": ("grass", "scrub", "shrub"),
    "Highway": ("road", "highway"), "Industrial": ("industrial", "warehouse"), "Pasture": ("pasture", "meadow"),
    "PermanentCrop": ("orchard", "vineyard"), "Residential": ("residential", "houses"), "River": ("river",),
    "SeaLake": ("sea", "lake", "water"),
}  # fmt: skip


def test_chips_name_their_class(tmp_path, monkeypatch):
    from io import BytesIO
    from zipfile import ZipFile

    archive = shared_data("eurosat/eurosat_rgb.zip")
    monkeypatch.chdir(tmp_path)
    Path("chips").mkdir()
    with ZipFile(archive) as zipped:
        names = sorted(name for name in zipped.namelist() if name.endswith(".jpg"))
        for kind in NAMES:
            own = [name for name in names if f"/{kind}_" in name]
            for name in own[:: len(own) // 4][:4]:
                Image.open(BytesIO(zipped.read(name))).save(Path("chips") / Path(name).name, quality=95)
    assert run(["-q", "caption", "chips", "-o", "out.csv", "--device", "cpu"]) == 0
    found = rows("out.csv")
    right = [row for row in found if any(word in row["caption"] for word in NAMES[row["scene"].split("_")[0]])]
    assert len(found) == 40
    assert len(right) >= 34
