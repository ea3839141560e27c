"""What names of Sentinel-2 products say."""

from __future__ import annotations

import os

import pytest

from rsedge.runtime.scenes.products.sentinel2 import (
    ProductName,
    acquisition_time,
    baseline_offset,
    parse_time,
    printable,
)

COMPACT = "S2A_MSIL2A_20230823T095559_N0509_R122_T34UCF_20230823T124759"
OLD = "S2A_OPER_PRD_MSIL1C_PDMC_20160103T120000_R022_V20160102T101402_20160102T101402"
OLD_GRANULE = "S2A_OPER_MSI_L1C_TL_EPA__20160102T153057_A000123_T32TQR_N02.01"  # the time in it is that of processing
ENGINE = "20230823T095559_20230823T095553_T34UCF"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{COMPACT}.SAFE", ("S2A", "L2A", "2023-08-23T09:55:59Z", "05.09", "34UCF", COMPACT)),
        (f"mine_{COMPACT}_B04.tif", ("S2A", "L2A", "2023-08-23T09:55:59Z", "05.09", "34UCF", COMPACT)),
        (f"{OLD}.SAFE", ("S2A", "L1C", "2016-01-02T10:14:02Z", None, None, OLD)),
        (OLD_GRANULE, ("S2A", "L1C", None, "02.01", "32TQR", None)),
        ("S2A_29RKH_20200219_0_L2A", ("S2A", "L2A", "2020-02-19T00:00:00Z", None, "29RKH", "S2A_29RKH_20200219_0_L2A")),
        (
            "S2B_5VNK_20200219_1_L2A.tif",
            ("S2B", "L2A", "2020-02-19T00:00:00Z", None, "05VNK", "S2B_5VNK_20200219_1_L2A"),
        ),
        (
            "S2C_T29RKH_20250219T113425_L2A",
            ("S2C", "L2A", "2025-02-19T11:34:25Z", None, "29RKH", "S2C_T29RKH_20250219T113425_L2A"),
        ),
        (f"{ENGINE}.B4.tif", (None, None, "2023-08-23T09:55:59Z", None, "34UCF", ENGINE)),
        ("L2A_T32TQR_20170105T102401_B04_10m.jp2", (None, None, "2017-01-05T10:24:01Z", None, "32TQR", None)),
        ("T34UCF_20239923T095559_B04.jp2", (None, None, None, None, "34UCF", None)),  # no such month
    ],
)
def test_product_names(text, expected):
    name = ProductName.parse(text)
    found = (name.mission, name.level, name.datetime, name.baseline, name.mgrs_tile, name.product_id)
    assert found == expected


@pytest.mark.parametrize("text", ["", "scene.tif", "LC08_L2SP_193026_20230823_B4.TIF", "XS2A_29RKH_20200219_0_L2A"])
def test_other_names(text):
    assert ProductName.parse(text) is None


def test_offsets_of_baselines():
    known = {"00.01": 0, "02.14": 0, "03.01": 0, "04.00": -1000, "05.11": -1000, "99.99": None}
    assert {baseline: baseline_offset(baseline) for baseline in known} == known
    with pytest.raises(ValueError, match="no processing baseline"):
        baseline_offset("0509")


@pytest.mark.parametrize(
    ("tags", "name", "expected"),
    [
        ({}, f"{COMPACT}.tif", "2023-08-23T09:55:59Z"),
        ({}, "S2A_MSIL2A_20200219T112111_crop.tif", "2020-02-19T11:21:11Z"),
        ({}, "S2A_20200219.tif", "2020-02-19T00:00:00Z"),
        ({}, f"{OLD_GRANULE}.tif", None),
        ({"TIFFTAG_DATETIME": "2024:01:01 00:00:00"}, "S2A_20200219.tif", "2020-02-19T00:00:00Z"),
        ({"TIFFTAG_DATETIME": "2024:01:01 00:00:00"}, "a.tif", "2024-01-01T00:00:00Z"),
        ({"PRODUCT_START_TIME": "2015-12-31T23:59:59.999Z"}, "S2A_20200219.tif", "2015-12-31T23:59:59.999Z"),
    ],
)
def test_acquisition_times(tags, name, expected):
    assert acquisition_time(tags, name) == expected


def test_times():
    assert parse_time("2023-08-23T10:05:35.271949Z") == "2023-08-23T10:05:35.271Z"
    assert parse_time(" 2023-08-23T10:05:35 ") == "2023-08-23T10:05:35Z"
    assert parse_time("soon") is None


def test_names_that_are_not_utf_8():
    assert printable(os.fsdecode(b"S2A_\xff.SAFE")) == "S2A_\ufffd.SAFE"
