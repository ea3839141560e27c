"""Image augmentation against Pillow, SciPy and colorsys; seeds and captions against what they promise."""

from __future__ import annotations

import colorsys
import dataclasses
import hashlib
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from scipy.ndimage import gaussian_filter

from rsedge.datasets.examples import Example
from rsedge.errors import OptionError
from rsedge.tomlfile import write_toml
from rsedge.training.data import augment_ops as ops
from rsedge.training.data.augment import ImageAugmentation, choose_caption, sample_seed
from rsedge.training.recipe import load_recipe, save_recipe

EVERYTHING = ImageAugmentation(
    crop_scale=(0.6, 1.0),
    horizontal_flip=0.5,
    vertical_flip=0.5,
    rotation=(0.0, 180.0),
    brightness=(0.5, 1.1),
    contrast=(0.8, 1.2),
    saturation=(0.65, 2.5),
    hue=(-0.1, 0.1),
    sharpness=(0.75, 2.0),
    blur=(0.1, 2.0),
)


def picture(height: int = 40, width: int = 40, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image).transpose(2, 0, 1)).float() / 255


def levels(image: torch.Tensor) -> np.ndarray:
    return image.numpy().transpose(1, 2, 0) * 255


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 1.1, 2.5])
@pytest.mark.parametrize(
    ("change", "enhance"),
    [
        (ops.brightness, ImageEnhance.Brightness),
        (ops.contrast, ImageEnhance.Contrast),
        (ops.saturation, ImageEnhance.Color),
        (ops.sharpness, ImageEnhance.Sharpness),
    ],
)
def test_factors_mean_what_they_mean_in_pillow(change, enhance, factor):
    image = picture(30, 50)
    expected = np.asarray(enhance(image).enhance(factor), dtype=np.float64)
    # Pillow rounds the grey, smooth or mean image to 8 bits before it extrapolates.
    np.testing.assert_allclose(levels(change(tensor(image), factor)), expected, atol=1.01 + abs(1 - factor) / 2)


@pytest.mark.parametrize(("degrees", "transpose"), [(90, 2), (180, 3), (270, 4), (-90, 4), (0, None)])
def test_quarter_turns_are_pillows(degrees, transpose):
    image = picture(24, 24)
    expected = image if transpose is None else image.transpose(Image.Transpose(transpose))
    np.testing.assert_allclose(levels(ops.rotate(tensor(image), degrees)), np.asarray(expected), atol=0.01)


def test_half_turns_of_oblong_images_are_pillows():
    image = picture(20, 31)
    expected = np.asarray(image.transpose(Image.Transpose.ROTATE_180))
    np.testing.assert_allclose(levels(ops.rotate(tensor(image), 180)), expected, atol=0.01)


@pytest.mark.parametrize("degrees", [17, 60, 133])
@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_rotation_goes_pillows_way_round_and_keeps_the_shape(degrees, size):
    rows, columns = np.mgrid[: size[0], : size[1]]
    smooth = np.stack([128 + 100 * np.sin(rows / 9 + k) * np.cos(columns / 11) for k in range(3)], axis=-1)
    image = Image.fromarray(smooth.astype(np.uint8))
    expected = np.asarray(image.rotate(degrees, Image.Resampling.BILINEAR), dtype=np.float64)
    result = levels(ops.rotate(tensor(image), degrees))
    inside = np.hypot(rows - size[0] / 2 + 0.5, columns - size[1] / 2 + 0.5) < min(size) / 2 - 2
    assert np.abs(result - expected)[inside].max() < 2
    assert result.min() > 10  # no black corners


def test_hue_turns_as_in_colorsys():
    image = tensor(picture(12, 12))
    image[:, 0, 0] = 0.3  # grey has no hue
    image[:, 0, 1] = 0.0
    for turn in (-0.5, -0.13, 0.0, 0.08, 0.4):
        result = ops.hue(image, turn)
        for row, column in ((0, 0), (0, 1), *((i, j) for i in range(1, 12) for j in range(12))):
            h, s, v = colorsys.rgb_to_hsv(*image[:, row, column].tolist())
            expected = colorsys.hsv_to_rgb((h + turn) % 1, s, v)
            assert result[:, row, column].tolist() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.7])
def test_blur_is_scipys(sigma):
    image = tensor(picture(33, 20))
    radius = math.ceil(3 * sigma)
    expected = gaussian_filter(image.double().numpy(), (0, sigma, sigma), mode="mirror", radius=(0, radius, radius))
    np.testing.assert_allclose(ops.gaussian_blur(image, sigma).numpy(), expected, atol=1e-6)


def test_blur_and_sharpness_of_tiny_images():
    one = torch.full((3, 1, 1), 0.4)
    assert torch.equal(ops.gaussian_blur(one, 3.0), one)
    assert torch.equal(ops.sharpness(one, 2.0), one)
    assert ops.gaussian_blur(tensor(picture(2, 5)), 3.0).shape == (3, 2, 5)


def test_crop_is_pillows_crop_and_resize():
    image = picture(40, 40)
    side = round(40 * math.sqrt(0.6))
    result = ops.resized_crop(tensor(image), 0.6, 1.0, 0.999, 0.0)
    crop = image.crop((0, 40 - side, side, 40))
    expected = np.asarray(crop.resize((40, 40), Image.Resampling.BILINEAR), dtype=np.float64)
    np.testing.assert_allclose(levels(result), expected, atol=1.01)


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.floats(0.01, 1), st.floats(0.2, 5), st.floats(0, 1), st.floats(0, 1))
def test_any_crop_lies_in_the_image(height, width, scale, ratio, row, column):
    image = torch.full((3, height, width), 0.5)
    result = ops.resized_crop(image, scale, ratio, row, column)
    assert result.shape == image.shape
    torch.testing.assert_close(result, image)


def test_flips():
    image = tensor(picture())
    assert torch.equal(ImageAugmentation(horizontal_flip=1.0)(image, seed=1), image.flip(2))
    assert torch.equal(ImageAugmentation(vertical_flip=1.0)(image, seed=1), image.flip(1))
    assert torch.equal(ImageAugmentation(vertical_flip=0.0, horizontal_flip=0.0)(image, seed=1), image)


def test_only_the_seed_is_random():
    image = tensor(picture())
    before = image.clone()
    torch.manual_seed(1)
    first = EVERYTHING(image, seed=5)
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    np.random.seed(3)  # noqa: NPY002 - the global state is what is tested
    again = EVERYTHING(image, seed=5)
    assert torch.equal(first, again)
    assert torch.equal(image, before)
    assert not torch.equal(first, EVERYTHING(image, seed=6))
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.shape == image.shape
    assert first.dtype == torch.float32
    assert 0 <= first.min() <= first.max() <= 1


def test_what_a_seed_means_is_fixed():
    """Philox4x64 and BLAKE2b are: a change here changes every run."""
    assert sample_seed(0, 3, "rsicd/a.jpg") == int.from_bytes(
        hashlib.blake2b(b"sample\x000\x003\x00rsicd/a.jpg", digest_size=8).digest(), "big"
    )
    image = torch.full((3, 2, 2), 0.5)
    first = np.random.Philox(key=9).random_raw(9)
    share = int(first[8] >> np.uint64(11)) / 2**53
    assert ImageAugmentation(brightness=(0.0, 2.0))(image, seed=9)[0, 0, 0] == pytest.approx(share, abs=1e-6)


def test_switching_one_change_on_leaves_the_others():
    image = tensor(picture())
    plain = ImageAugmentation(rotation=(0.0, 180.0))(image, seed=3)
    both = ImageAugmentation(rotation=(0.0, 180.0), brightness=(0.5, 0.5))(image, seed=3)
    torch.testing.assert_close(both, plain * 0.5)


def test_probabilities():
    image = torch.full((3, 4, 4), 0.5)
    rare = ImageAugmentation(probability=0.25, brightness=(0.5, 0.5))
    changed = sum(rare(image, seed=seed) is not image for seed in range(2000))
    assert 420 < changed < 580
    flips = ImageAugmentation(horizontal_flip=0.3)
    image = tensor(picture(4, 4))
    assert 520 < sum(not torch.equal(flips(image, seed=seed), image) for seed in range(2000)) < 680
    assert ImageAugmentation()(image, seed=0) is image


def test_draws_fill_the_range_evenly():
    image = torch.full((3, 1, 1), 0.5)
    dims = [float(ImageAugmentation(brightness=(0.5, 1.5))(image, seed=seed)[0, 0, 0]) * 2 for seed in range(3000)]
    counts, _ = np.histogram(dims, bins=10, range=(0.5, 1.5))
    assert counts.min() > 230
    assert counts.max() < 370


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rotation": (90.0,)}, r"rotation is \[90.0\]: give a lower and an upper number from -360 to 360"),
        ({"brightness": (1.1, 0.5)}, r"brightness is \[1.1, 0.5\]"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale .* above 0 to 1"),
        ({"crop_scale": (0.5, 1.1)}, "crop_scale"),
        ({"hue": (-0.6, 0.1)}, "hue"),
        ({"sharpness": (0.5, math.inf)}, "sharpness"),
        ({"contrast": (math.nan, 1.0)}, "contrast"),
        ({"horizontal_flip": 1.5}, "horizontal_flip is 1.5: give a probability from 0 to 1"),
        ({"crop_ratio": (0.75, 1.5)}, "crop_ratio is set but crop_scale is not"),
        ({"blur_probability": 0.1}, "blur_probability is set but blur is not"),
    ],
)
def test_impossible_settings_are_refused(values, message):
    with pytest.raises(OptionError, match=message):
        ImageAugmentation(**values)


def test_all_problems_at_once():
    with pytest.raises(OptionError, match=r"probability is 2.*hue.*blur"):
        ImageAugmentation(probability=2, hue=(1.0, 2.0), blur=(0.0, 1.0))


def test_toml_round_trip(tmp_path):
    recipe = dataclasses.replace(load_recipe("clip-rsicd", family="clip"), augmentation=EVERYTHING)
    save_recipe(tmp_path / "a.toml", recipe)
    assert load_recipe(tmp_path / "a.toml", family="clip").augmentation == EVERYTHING
    write_toml(tmp_path / "a.toml", {"augmentation": {"rotate": [0, 1]}})
    with pytest.raises(OptionError, match="rotate"):
        load_recipe(tmp_path / "a.toml", family="clip")


def test_images_of_another_form_are_refused():
    for image in (torch.zeros(1, 4, 4), torch.zeros(1, 3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="expected a float image"):
            EVERYTHING(image, seed=0)


def test_settings_need_no_torch():
    code = (
        "import sys; import rsedge.training.data.augment as a; a.ImageAugmentation(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class NoImage:
    def read(self):
        raise AssertionError


def example(count: int, paraphrases: tuple[tuple[str, ...], ...] = ()) -> Example:
    return Example("s/a.jpg", NoImage(), tuple(f"caption {i}" for i in range(count)), "train", paraphrases)


@given(st.integers(1, 7), st.integers(0, 1000), st.integers(0, 5))
def test_any_k_epochs_show_each_of_k_captions(count, start, seed):
    sample = example(count)
    shown = [choose_caption(sample, epoch=epoch, seed=seed) for epoch in range(start, start + count)]
    assert sorted(shown) == sorted(sample.captions)


def test_paraphrases_stand_in_with_their_probability():
    sample = example(2, (("a", "b"), ()))
    shown = [choose_caption(sample, epoch=epoch, seed=1, paraphrase_probability=0.5) for epoch in range(4000)]
    counts = {text: shown.count(text) for text in set(shown)}
    assert counts["caption 1"] == 2000
    assert 900 < counts["caption 0"] < 1100
    assert 430 < counts["a"] < 570
    assert counts["a"] + counts["b"] + counts["caption 0"] == 2000
    assert choose_caption(sample, epoch=0, seed=1) in sample.captions
    always = {choose_caption(sample, epoch=epoch, seed=1, paraphrase_probability=1.0) for epoch in range(50)}
    assert always == {"a", "b", "caption 1"}


def test_no_caption_is_refused():
    with pytest.raises(OptionError, match=r"s/a\.jpg has no caption"):
        choose_caption(Example("s/a.jpg", NoImage(), (), "test", label="x"), epoch=0, seed=0)


def test_seeds_differ():
    seeds = {sample_seed(s, e, k) for s in range(5) for e in range(20) for k in ("a", "b", "1", "11")}
    assert len(seeds) == 400
