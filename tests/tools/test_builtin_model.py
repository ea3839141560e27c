"""What trains the built-in model: its chips, tiles and captions."""

from __future__ import annotations

import io
import itertools
import json
import zipfile
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import rasterio
from PIL import Image

from rsedge.pixels import ReflectanceRule
from rsedge.runtime.demo.scene import CLASSES, compose_tile
from tests.conftest import shared_data
from tools.builtin_model import tiles as tile_sets
from tools.builtin_model.chips import COVERS, HELD_OUT, VALIDATION, Chips, read_chips, to_runtime_look
from tools.builtin_model.compose import GENERATED, chip_tile, generated, mixture, mosaic, single, weather
from tools.builtin_model.quality import word_counts
from tools.builtin_model.words import WORDS, caption, covers, named_covers, phrases, worth_naming


@pytest.fixture
def rng():
    return np.random.default_rng(4)


@pytest.fixture
def chips(rng):
    """Three noisy chips of each class, each class of one brightness."""
    classes = np.repeat(np.arange(len(COVERS)), 3)
    noise = rng.integers(-3, 4, (len(classes), 64, 64, 3))
    pixels = (60 + 15 * classes[:, None, None, None] + noise).astype(np.uint8)
    return Chips(pixels, classes, pixels.mean((1, 2), dtype=np.float32))


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A zip laid out like EuroSAT's, with just enough tiny chips."""
    path = tmp_path_factory.mktemp("eurosat") / "chips.zip"
    with zipfile.ZipFile(path, "w") as files:
        for grey, name in enumerate(COVERS):
            buffer = io.BytesIO()
            Image.new("RGB", (64, 64), (40 + 10 * grey,) * 3).save(buffer, "JPEG")
            for number in range(HELD_OUT + VALIDATION + 3):
                files.writestr(f"eurosat/{name}/{name}_{number}.jpg", buffer.getvalue())
    return path


def test_no_word_names_two_covers_and_every_phrase_names_only_its_own():
    words = list(itertools.chain(*WORDS.values()))
    assert len(words) == len(set(words))
    assert set(COVERS.values()) <= set(WORDS)
    assert set(GENERATED) == set(CLASSES)
    assert {next(iter(covers({name: 1.0}))) for name in GENERATED.values()} <= set(WORDS)


@pytest.mark.parametrize("name", [*WORDS, "lake", "sea"])
def test_a_caption_of_one_thing_names_it_and_nothing_else(rng, name):
    for _ in range(40):
        assert named_covers(caption(rng, {name: 1.0})) == set(covers({name: 1.0}))


def test_captions_name_what_is_worth_a_word_largest_first(rng):
    seen = set()
    for _ in range(300):
        names = rng.choice([name for name in WORDS if name != "water"], 3, replace=False)
        shares = dict(zip(map(str, names), rng.dirichlet([2, 1, 0.3]).tolist(), strict=True))
        text = caption(rng, shares)
        largest = max(shares, key=shares.__getitem__)
        expected = {largest} | {name for name, share in shares.items() if worth_naming(name, share)}
        assert named_covers(text) == expected, text
        assert named_covers(text.split(" with ")[0].split(",")[0]) >= {largest}
        seen |= set(text.replace(",", " ,").split())
    assert seen <= set(" ".join(phrases()).split()), "the vocabulary has every word"
    assert len({caption(rng, {"fields": 0.5, "forest": 0.4, "road": 0.1}) for _ in range(50)}) >= 6


def test_the_first_word_decides_the_cover_and_each_has_two_of_equal_chance(rng):
    openings = {name: Counter(caption(rng, {name: 1.0}).split()[0] for _ in range(400)) for name in WORDS}
    for name, counts in openings.items():
        assert len(counts) == 2
        assert min(counts.values()) > 150
        assert all(named_covers(word) in ({name}, set()) for word in counts)
    words = list(itertools.chain(*openings.values()))
    assert len(words) == len(set(words)), "no two covers begin alike"


def test_thin_things_are_named_early():
    assert worth_naming("river", 0.02)
    assert not worth_naming("forest", 0.02)
    assert named_covers("pastures and hedges crossed by a highway") == {"pasture", "road"}
    assert word_counts(["a river", "a river and forest"]) == [("river", 2), ("forest", 1)]


def test_chips_are_placed_by_the_hash_of_their_names(archive, tmp_path):
    training, validation, held_out = read_chips(archive)
    assert [len(part) for part in (training, validation, held_out)] == [10 * n for n in (3, VALIDATION, HELD_OUT)]
    assert (np.bincount(held_out.classes) == HELD_OUT).all()
    for number, name in enumerate(COVERS):
        assert np.allclose(held_out.means[held_out.of(name)], 40 + 10 * number, atol=1)
    with zipfile.ZipFile(archive) as files, zipfile.ZipFile(tmp_path / "turned.zip", "w") as turned:
        for entry in reversed(files.namelist()):
            turned.writestr(entry, files.read(entry))
    again = read_chips(tmp_path / "turned.zip")[2]
    assert np.array_equal(again.pixels, held_out.pixels)
    with zipfile.ZipFile(tmp_path / "few.zip", "w"):
        pass
    with pytest.raises(SystemExit, match="0 chips of AnnualCrop"):
        read_chips(tmp_path / "few.zip")


def test_the_look_of_published_chips_is_undone_to_digital_numbers():
    """EuroSAT's 8-bit against its 13 bands: without clearing, a chip is what our rule makes of its DN."""
    for name in ("AnnualCrop_1", "Forest_2"):
        published = np.asarray(Image.open(shared_data(f"eurosat/ms/{name}.jpg")))
        with rasterio.open(shared_data(f"eurosat/ms/{name}.tif")) as bands:
            dn = np.moveaxis(bands.read([4, 3, 2]), 0, -1)
        ours = to_runtime_look(published.astype(np.float32), clearing=0)
        assert np.abs(ours - ReflectanceRule().apply(dn)).mean() < 3
    forest = to_runtime_look(published.astype(np.float32)).mean((0, 1))
    assert forest[2] < 0.45 * published[..., 2].mean(), "the ground is darker than the top of the atmosphere"


def test_a_held_out_chip_fills_the_tile_by_reflection(rng):
    chip = rng.integers(1, 255, (64, 64, 3)).astype(np.uint8)
    tile = chip_tile(chip)
    assert tile.shape == (224, 224, 3)
    assert np.array_equal(tile[80:144, 80:144], chip)
    assert np.array_equal(tile[80:144, 144:208], chip[:, ::-1])
    assert np.array_equal(tile[16:80, 80:144], chip[::-1])
    assert chip_tile(chip, clearing=1.0).min() >= 1


@pytest.mark.parametrize("size", [64, 112])
@pytest.mark.parametrize("make", [mosaic, mixture, weather])
def test_tiles_are_seeded_whole_and_their_shares_add_up(make, size, chips):
    for seed in range(6):
        tile, twin = make(np.random.default_rng(seed), chips, size), make(np.random.default_rng(seed), chips, size)
        assert tile.image.shape == (size, size, 3)
        assert tile.image.dtype == np.uint8
        assert tile.image.min() >= 1, "0 would be no data"
        assert np.array_equal(tile.image, twin.image)
        assert tile.shares == twin.shares
        assert sum(tile.shares.values()) == pytest.approx(1)
        assert named_covers(caption(np.random.default_rng(0), tile.shares))


def test_a_single_chip_is_its_class(rng, chips):
    for index in (0, 14, 29):
        tile = single(rng, chips, index, 64)
        assert tile.shares == {chips.cover(index): 1.0}
        assert tile.image.std((0, 1)).max() < 10, "one colour, changed as a whole"


def test_windows_of_generated_land_have_the_shares_of_what_they_show():
    for seed in range(8):
        land = compose_tile(np.random.default_rng(seed), 96)
        tile = generated(np.random.default_rng(seed), land, 96)
        expected: dict[str, float] = {}
        for name, share in land.shares().items():
            expected[GENERATED[name]] = expected.get(GENERATED[name], 0) + share
        assert tile.shares == pytest.approx(expected)
        assert (tile.image == 0).all(-1).mean() == pytest.approx((land.cover == 255).mean())


@pytest.fixture
def small(monkeypatch):
    """Few tiles, and little land."""
    monkeypatch.setattr(tile_sets, "_PART", 5)
    for name, value in {"_SCENES": 0, "_SINGLES": 1, "_EACH": 24}.items():
        monkeypatch.setattr(tile_sets, name, value)
    return replace(tile_sets.TILES, size=64, count=12, validation=3)


def test_a_set_is_made_once_and_read_as_examples(archive, small, tmp_path, monkeypatch):
    monkeypatch.setattr(tile_sets, "_parallel", lambda job, count, workers: map(job, range(count)))
    tile_sets.make_lands(tmp_path / "lands", seed=1, workers=1)
    tile_sets.make(small, archive, tmp_path / "lands", tmp_path, seed=3, workers=1)
    data = tile_sets.load(small, tmp_path, seed=3)
    assert [len(data.split(name)) for name in ("train", "val", "test")] == [12, 3, 0]
    assert {len(example.captions) for example in data.examples} == {small.captions}
    first = data.examples[0].image.read()
    assert first.shape == (64, 64, 3)
    records = [json.loads(line) for line in (tmp_path / "tiles.jsonl").read_text().splitlines()]
    assert all(sum(record["shares"].values()) == pytest.approx(1, abs=1e-3) for record in records)
    before = (tmp_path / "tiles.npy").stat().st_mtime_ns
    tile_sets.make(small, archive, tmp_path / "lands", tmp_path, seed=3, workers=1)
    assert (tmp_path / "tiles.npy").stat().st_mtime_ns == before
    other = tmp_path / "other"
    other.mkdir()
    tile_sets.make(small, archive, tmp_path / "lands", other, seed=4, workers=1)
    assert not np.array_equal(tile_sets.load(small, other, seed=3).examples[0].image.read(), first)


def test_plain_captions_are_one_word(rng):
    shares = {"sea": 0.3, "lake": 0.25, "forest": 0.45}
    assert tile_sets._captions(rng, tile_sets.CHIPS, shares) == ("lake",), "water as a whole is the largest"


def test_the_start_is_a_checkpoint_that_knows_every_word(rng, tmp_path):
    from transformers import BertTokenizer, BlipForConditionalGeneration

    from rsedge.datasets.examples import CaptionData, Example
    from rsedge.training.recipe import load_recipe
    from tools.builtin_model.start import make_start

    np.save(tmp_path / "a.npy", rng.integers(1, 255, (64, 64, 64, 3)).astype(np.uint8))
    data = CaptionData(
        tuple(Example(f"a/{i:02}", tile_sets.Row(str(tmp_path / "a.npy"), i), ("forest",), "train") for i in range(64))
    )
    make_start(load_recipe("builtin-chips", family="blip"), data, tmp_path / "start")
    tokenizer = BertTokenizer.from_pretrained(tmp_path / "start")
    for _ in range(100):
        names = rng.choice(list(WORDS), 3, replace=False)
        text = caption(rng, dict(zip(map(str, names), (0.5, 0.3, 0.2), strict=True)))
        assert "[UNK]" not in (tokens := tokenizer.tokenize(text))
        assert not any(token.startswith("##") for token in tokens), "a word is a token"
    model = BlipForConditionalGeneration.from_pretrained(tmp_path / "start")
    attention = model.vision_model.encoder.layers[0].self_attn
    width = model.config.vision_config.hidden_size
    product = attention.projection.weight @ attention.qkv.weight[2 * width :]
    assert product.diagonal().mean().item() == pytest.approx(-0.4, abs=0.15)
