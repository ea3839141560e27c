"""Bands that lie beside each other as files: which belong together, and what their names say."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest

from rsedge.runtime.scenes.products.loose_bands import read_loose_bands, sibling_bands
from tests.conftest import shared_data
from tests.safe_products import write_safe

COMPACT = "S2A_MSIL2A_20230823T095559_N0509_R122_T34UCF_20230823T124759"


def touch(folder: Path, names: Iterable[str]) -> Path:
    """Files without content: no pixel is read."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def bands_of(product) -> list[str]:
    return [Path(product.bands[colour].path).name for colour in ("red", "green", "blue")]


@pytest.mark.parametrize(
    ("pattern", "name", "facts"),
    [
        ("T34UCF_20230823T095559_{}_10m.jp2", "T34UCF_20230823T095559", ("2023-08-23T09:55:59Z", "34UCF", None, None)),
        (f"{COMPACT}_{{}}.tif", COMPACT, ("2023-08-23T09:55:59Z", "34UCF", "05.09", -1000)),
        (f"{COMPACT.replace('0509', '0214')}_{{}}.TIF", None, ("2023-08-23T09:55:59Z", "34UCF", "02.14", 0)),
        ("S2A_29RKH_20200219_0_L2A-{}.tiff", "S2A_29RKH_20200219_0_L2A", ("2020-02-19T00:00:00Z", "29RKH", None, None)),
        ("{}.tif", "folder", (None, None, None, None)),
        ("my.scene.{}.tif", "my.scene", (None, None, None, None)),
    ],
)
def test_names(tmp_path, pattern, name, facts):
    files = [pattern.format(band) for band in ("B02", "B03", "B04", "B08", "SCL", "TCI")]
    folder = touch(tmp_path / "folder", files)
    (product,) = read_loose_bands(folder)
    assert bands_of(product) == [files[2], files[1], files[0]]
    assert Path(product.scl.path).name == files[4]
    assert product.name == (name or Path(files[0]).stem.removesuffix("_B02"))
    assert (product.datetime, product.mgrs_tile, product.baseline, product.boa_offset) == facts
    assert product.source == str(folder)
    assert product.files == tuple(sorted(str((folder / files[index]).resolve()) for index in (0, 1, 2, 4)))
    assert (product.visual, product.quantification, product.warnings) == (False, None, ())


def test_short_and_lower_case_band_names(tmp_path):
    touch(tmp_path, ["20230823T095559_20230823T095553_T34UCF.B4.tif", "20230823T095559_20230823T095553_T34UCF.b3.tif"])
    touch(tmp_path, ["20230823T095559_20230823T095553_T34UCF.B02.tif"])
    (product,) = read_loose_bands(tmp_path)
    assert (product.product_id, product.mgrs_tile) == ("20230823T095559_20230823T095553_T34UCF", "34UCF")


def test_several_acquisitions_in_one_folder(tmp_path):
    days = ["T34UCF_20230825T095559", "T34UCF_20230823T095559"]
    touch(tmp_path, [f"{day}_{band}.jp2" for day in days for band in ("B02", "B03", "B04")])
    touch(
        tmp_path, [f"{days[0]}_SCL_20m.jp2", "T34UCF_20230827T095559_B04.jp2", "notes.txt", "MTD_MSIL2A.xml", "i.json"]
    )
    products = read_loose_bands(tmp_path)
    assert [product.name for product in products] == sorted(days)
    assert [product.scl is not None for product in products] == [False, True]
    left_out = "T34UCF_20230827T095559_B04.jp2 left out, as the same scene lacks B03 and B02"
    assert products[0].warnings == (f"{tmp_path}: {left_out}",)
    assert products[1].warnings == ()


@pytest.mark.parametrize("named", ["B02", "B03", "B04"])
def test_one_of_the_three_stands_for_all(tmp_path, named):
    touch(tmp_path, [f"{day}_{band}.tif" for day in ("one", "two") for band in ("B02", "B03", "B04", "B08", "TCI")])
    product = sibling_bands(tmp_path / f"two_{named}.tif")
    assert product.name == "two"
    assert product.source == str(tmp_path / f"two_{named}.tif")
    assert bands_of(product) == ["two_B04.tif", "two_B03.tif", "two_B02.tif"]
    assert read_loose_bands(tmp_path / f"two_{named}.tif") == [product]
    assert product.warnings == ()
    for other in ("two_B08.tif", "two_TCI.tif", "two_B05.tif"):
        assert sibling_bands(tmp_path / other) is None
        assert read_loose_bands(tmp_path / other) == []


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["B04.tif", "B03.tif"],
        ["a_B04.tif", "a_B03.tif", "b_B02.tif"],
        ["B04.txt", "B03.txt", "B02.txt"],
        ["LC08_L2SP_193026_20230823_20230830_02_T1_SR_B4.TIF".replace("B4", f"B{band}") for band in (2, 3, 4)],
        ["subB04.tif", "subB03.tif", "subB02.tif"],
        ["B4_10.tif", "B3_10.tif", "B2_10.tif"],
    ],
)
def test_no_set(tmp_path, names):
    touch(tmp_path, names)
    assert read_loose_bands(tmp_path) == []
    assert [sibling_bands(tmp_path / name) for name in names] == [None] * len(names)


def test_a_folder_named_as_a_band_is_no_band(tmp_path):
    touch(tmp_path, ["B03.tif", "B02.tif"])
    (tmp_path / "B04.tif").mkdir()
    assert read_loose_bands(tmp_path) == []
    assert sibling_bands(tmp_path / "missing_B04.tif") is None
    assert read_loose_bands(tmp_path / "missing") == []


def test_the_finest_grid_is_taken(tmp_path):
    touch(tmp_path, [f"x_{band}_{metres}m.jp2" for band in ("B02", "B03", "B04") for metres in (60, 10, 20)])
    touch(tmp_path, ["x_SCL_60m.jp2", "x_SCL_20m.jp2"])
    (product,) = read_loose_bands(tmp_path)
    assert bands_of(product) == ["x_B04_10m.jp2", "x_B03_10m.jp2", "x_B02_10m.jp2"]
    assert Path(product.scl.path).name == "x_SCL_20m.jp2"
    (tmp_path / "x_B03_10m.jp2").unlink()
    (product,) = read_loose_bands(tmp_path)
    assert bands_of(product)[1] == "x_B03_20m.jp2"
    assert product.reason.endswith("at 10 and 20 m")


def test_of_two_files_of_a_band_the_faster_is_taken(tmp_path):
    touch(tmp_path, [f"x_{band}.{suffix}" for band in ("B02", "B03", "B04") for suffix in ("jp2", "tif")])
    (product,) = read_loose_bands(tmp_path)
    assert bands_of(product) == ["x_B04.tif", "x_B03.tif", "x_B02.tif"]


def test_folders_around_say_what_the_files_do_not(tmp_path):
    granule = "T34UCF_20230823T095559"
    images = tmp_path / f"{COMPACT}.SAFE" / "GRANULE" / "L2A_T34UCF_A033753_20230823T095553" / "IMG_DATA"
    touch(images / "R10m", [f"{granule}_{band}_10m.jp2" for band in ("B02", "B03", "B04")])
    touch(images / "R20m", [f"{granule}_SCL_20m.jp2", f"{granule}_B04_20m.jp2", "T34UCF_20200101T000000_SCL_20m.jp2"])
    (product,) = read_loose_bands(images / "R10m")
    assert (product.baseline, product.boa_offset, product.product_id) == ("05.09", -1000, COMPACT)
    assert Path(product.scl.path).name == f"{granule}_SCL_20m.jp2"
    (whole,) = read_loose_bands(images)
    assert (whole.bands, whole.scl) == (product.bands, product.scl)


@pytest.mark.parametrize("prefix", ["T34UDF_20230823T095559_", "T34UCF_20230824T095559_"])
def test_folders_of_another_place_or_day_say_nothing(tmp_path, prefix):
    (product,) = read_loose_bands(touch(tmp_path / COMPACT, [f"{prefix}{band}.tif" for band in ("B02", "B03", "B04")]))
    assert (product.baseline, product.boa_offset, product.product_id) == (None, None, None)
    assert product.mgrs_tile == prefix[1:6]


def test_a_folder_of_several_unnamed_acquisitions_says_nothing_of_one(tmp_path):
    folder = touch(tmp_path / COMPACT, [f"{day}_{band}.tif" for day in "ab" for band in ("B02", "B03", "B04")])
    assert [product.product_id for product in read_loose_bands(folder)] == [None, None]
    for file in folder.glob("b_*"):
        file.unlink()
    assert [product.product_id for product in read_loose_bands(folder)] == [COMPACT]


def test_bands_taken_out_of_a_product(tmp_path):
    written = write_safe(tmp_path, seed=1, size=64)
    for band in ("B04", "B03", "B02", "SCL"):
        shutil.copy(written.path / written.image(band), tmp_path)
    (product,) = read_loose_bands(tmp_path)
    assert (product.mgrs_tile, product.datetime) == ("34UCF", "2023-08-23T09:55:59Z")
    assert product.boa_offset is None  # nothing says it any more
    assert product.scl is not None


def test_real_bands():
    folder = shared_data("scenes/S2A_29RKH_20200219_L2A")
    (product,) = read_loose_bands(folder)
    assert (product.name, product.mgrs_tile, product.datetime) == (folder.name, "29RKH", "2020-02-19T00:00:00Z")
    assert bands_of(product) == ["B04.tif", "B03.tif", "B02.tif"]
    assert product.scl is not None
