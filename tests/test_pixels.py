from __future__ import annotations

import numpy as np
import pytest
import rasterio
from PIL import Image

from rsedge.errors import OptionError
from rsedge.pixels import ReflectanceRule, resize
from tests.conftest import shared_data


@pytest.mark.parametrize(
    "rule", [ReflectanceRule(), ReflectanceRule(boa_offset=-1000), ReflectanceRule(full_scale=2750)]
)
def test_rule_is_the_formula_for_every_number(rule):
    dn = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    exact = 1 + 254 * (dn.astype(np.float64) + rule.boa_offset) / rule.full_scale
    expected = np.clip(np.floor(exact + 0.5), 1, 255).astype(np.uint8)
    np.testing.assert_array_equal(rule.apply(dn), expected)
    assert rule.apply(dn).min() == 1  # 0 is left for no-data


def test_rule_known_values():
    rule = ReflectanceRule(boa_offset=-1000)
    np.testing.assert_array_equal(rule.apply(np.array([0, 1000, 1005, 3500, 65535], np.uint16)), [1, 1, 2, 255, 255])


def test_rule_rounds_half_up():
    # 254 * 1 / 508 = 0.5 exactly
    assert ReflectanceRule(full_scale=508).apply(np.array([1], np.uint16)) == 2


def test_rule_takes_signed_numbers():
    np.testing.assert_array_equal(
        ReflectanceRule().apply(np.array([-300, -1, 0, 2500, 32767], np.int16)), [1, 1, 1, 255, 255]
    )


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float32"])
def test_rule_refuses_other_types(dtype):
    with pytest.raises(TypeError, match=dtype):
        ReflectanceRule().apply(np.zeros(3, dtype))


@pytest.mark.parametrize("values", [{"boa_offset": 70000}, {"full_scale": 0}, {"full_scale": 70000}])
def test_rule_refuses_what_makes_no_sense(values):
    with pytest.raises(OptionError, match=str(next(iter(values.values())))):
        ReflectanceRule(**values)


def test_rule_round_trip_and_description():
    rule = ReflectanceRule(boa_offset=-1000, full_scale=2600)
    assert ReflectanceRule.from_dict(rule.to_dict()) == rule
    assert rule.describe() == "uint8 = clip(round(1 + 254 * (DN - 1000) / 2600), 1, 255)"


@pytest.mark.parametrize(("channel", "band"), [(1, "B04"), (2, "B03"), (3, "B02")])
def test_rule_agrees_with_the_true_colour_image_of_the_product(channel, band):
    folder = shared_data("scenes/S2A_29RKH_20200219_L2A")
    with rasterio.open(folder / "TCI.tif") as tci, rasterio.open(folder / f"{band}.tif") as digital_numbers:
        rendered, dn = tci.read(channel).astype(int), digital_numbers.read(1)
    # Both files are averages of 10 m pixels, so they may only be compared where none of those was saturated.
    neighbourhood = np.lib.stride_tricks.sliding_window_view(dn, (5, 5)).max(axis=(2, 3))
    clean = neighbourhood < 1900
    difference = np.abs(ReflectanceRule().apply(dn).astype(int) - rendered)[2:-2, 2:-2][clean]
    assert difference.size > 1000
    assert difference.mean() < 0.35
    assert np.quantile(difference, 0.999) <= 1


def test_resize_is_pillow_bicubic():
    image = np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(image).resize((32, 32), resample=Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(resize(image, 32), expected)
    assert resize(image, 32).dtype == np.uint8


def test_resize_is_what_blip_was_trained_with():
    processor = pytest.importorskip("transformers").BlipImageProcessor(
        size={"height": 64, "width": 64}, do_normalize=False, do_rescale=False, resample=3
    )
    image = np.random.default_rng(1).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    expected = processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    # Releases whose default processor works in torch round a little differently from Pillow.
    assert np.abs(resize(image, 64).astype(int) - expected.astype(int)).max() <= 1


def test_resize_leaves_the_right_size_alone():
    image = np.zeros((32, 32, 3), np.uint8)
    assert resize(image, 32) is image
