"""SAFE products: found, described and read from folders and zips, real layouts and generated ones; damage told."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import rasterio

from rsedge.errors import SceneError
from rsedge.runtime.scenes.products.safe import is_safe, read_safe
from tests.conftest import shared_data
from tests.safe_products import SafeProduct, write_old_l1c, write_safe, zip_safe

SIZE = 192


@pytest.fixture(scope="module")
def l2a(tmp_path_factory) -> SafeProduct:
    """Read only: tests that change a product copy it."""
    return write_safe(tmp_path_factory.mktemp("l2a"), seed=1, size=SIZE)


@pytest.fixture
def copy(l2a, tmp_path) -> Path:
    return Path(shutil.copytree(l2a.path, tmp_path / l2a.path.name))


def pixels(path: str, band: int = 1) -> np.ndarray:
    with rasterio.open(path) as dataset:
        return dataset.read(band)


def metadata_of(folder: Path) -> Path:
    (found,) = folder.glob("MTD_MSI*.xml")
    return found


def rewrite(path: Path, *changes: tuple[str, str]) -> None:
    text = path.read_text(encoding="utf-8")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")


def check(product, written: SafeProduct) -> None:
    """The product is where the generator put it, with what it put there."""
    for index, colour in enumerate(("red", "green", "blue")):
        np.testing.assert_array_equal(pixels(product.bands[colour].path), written.dn[index])
    with rasterio.open(product.bands["red"].path) as dataset:
        assert dataset.crs.to_string() == written.crs
        assert dataset.transform == written.transform
    assert (product.scl is not None) == (written.level == "L2A")
    if product.scl:
        np.testing.assert_array_equal(pixels(product.scl.path), written.scl)
    assert (product.boa_offset, product.quantification) == (written.offset, 10000)
    assert (product.baseline, product.mgrs_tile) == (written.baseline, written.tile)
    assert product.datetime.removesuffix("Z") in written.datetime  # milliseconds of microseconds
    assert product.product_id == written.name
    assert not product.visual
    assert product.warnings == ()


# ---- what is read ----


@pytest.mark.parametrize("level", ["L1C", "L2A"])
@pytest.mark.parametrize(("baseline", "offset"), [("02.14", 0), ("03.01", 0), ("04.00", -1000), ("05.11", -1000)])
def test_every_level_and_baseline_from_folder_and_zip(tmp_path, level, baseline, offset):
    written = write_safe(tmp_path, seed=2, size=96, level=level, baseline=baseline)
    (product,) = read_safe(written.path)
    assert product.boa_offset == offset
    assert product.name == written.name
    check(product, written)
    (zipped,) = read_safe(zip_safe(written.path))
    assert zipped.name == product.name
    check(zipped, written)


def test_gdal_finds_the_same_bands(l2a):
    (product,) = read_safe(l2a.path)
    with rasterio.open(metadata_of(l2a.path)) as container:
        ten_metres = next(name for name in container.subdatasets if ":10m:" in name)
    with rasterio.open(ten_metres) as dataset:
        assert [text[:2] for text in dataset.descriptions[:3]] == ["B4", "B3", "B2"]
        for index, colour in enumerate(("red", "green", "blue"), 1):
            np.testing.assert_array_equal(dataset.read(index), pixels(product.bands[colour].path))
            assert int(dataset.tags(index)["BOA_ADD_OFFSET"]) == product.boa_offset


@pytest.mark.parametrize("part", ["MTD_MSIL2A.xml", "{granule}", "{granule}/MTD_TL.xml", "{granule}/IMG_DATA/R10m"])
def test_parts_stand_for_the_product(l2a, part):
    path = l2a.path / part.format(granule=l2a.granule)
    (product,) = read_safe(path)
    (whole,) = read_safe(l2a.path)
    assert is_safe(path)
    assert product.source == str(path)
    assert (product.name, product.bands, product.files) == (whole.name, whole.bands, whole.files)


def test_relative_names_give_absolute_paths(l2a, monkeypatch):
    monkeypatch.chdir(l2a.path)
    (product,) = read_safe(".")
    assert (product.source, product.name) == (".", l2a.name)
    assert is_safe(".")
    assert all(Path(file).is_absolute() and Path(file).is_file() for file in product.files)


def test_files_are_those_whose_change_changes_records(l2a, tmp_path):
    (product,) = read_safe(l2a.path)
    wanted = ["MTD_MSIL2A.xml", f"{l2a.granule}/MTD_TL.xml", *map(l2a.image, ("B04", "B03", "B02", "SCL"))]
    assert set(product.files) == {str((l2a.path / name).resolve()) for name in wanted}
    packed = zip_safe(Path(shutil.copytree(l2a.path, tmp_path / l2a.path.name)))
    assert read_safe(packed)[0].files == (str(packed.resolve()),)


@pytest.mark.parametrize("zipped", [False, True])
def test_old_products_have_a_granule_for_each_tile(tmp_path, zipped):
    written = write_old_l1c(tmp_path, seed=3, size=96, zipped=zipped)
    products = read_safe(written[0].path)
    assert [product.name for product in products] == [f"{one.name}_T{one.tile}" for one in written]
    for product, one in zip(products, written, strict=True):
        check(product, one)
    if not zipped:
        granule = written[1].path / written[1].granule
        assert [product.name for product in read_safe(granule)] == [products[1].name]
        assert len(read_safe(next(written[0].path.glob("*.xml")))) == 2


def test_granules_that_were_not_downloaded_are_told(tmp_path):
    first, *_, last = write_old_l1c(tmp_path, seed=3, tiles=("32TQR", "32TRQ", "32TQQ"), size=96)
    assert all(product.warnings == () for product in read_safe(first.path))
    shutil.rmtree(last.path / last.granule)
    for product in read_safe(first.path):
        assert product.warnings == (f"{first.path}: not there of the granules in its metadata: 32TQQ",)
    shutil.rmtree(first.path / first.granule)
    assert [product.name for product in read_safe(first.path)] == [f"{first.name}_T32TRQ"]  # as it was before


def test_metadata_without_image_names_are_enough(tmp_path):
    written = write_safe(tmp_path, seed=4, size=96, image_files=False)
    check(read_safe(written.path)[0], written)


def test_image_names_in_the_metadata_come_first(copy, l2a):
    other = copy / l2a.granule / "IMG_DATA" / "R10m" / "T34UCF_20200101T000000_B04_10m.jp2"
    shutil.copy(copy / l2a.image("B03"), other)  # sorts before the right one
    check(read_safe(copy)[0], l2a)


def test_names_of_the_metadata_do_not_lead_out_of_the_product(copy, l2a, tmp_path):
    outside = tmp_path / "x_B04_10m.jp2"
    shutil.copy(copy / l2a.image("B04"), outside)
    rewrite(metadata_of(copy), (l2a.image("B04").removesuffix(".jp2"), "../x_B04_10m"))
    (product,) = read_safe(copy)
    assert product.bands["red"].path == str((copy / l2a.image("B04")).resolve())


@pytest.mark.parametrize(
    "name", ["{a}{b}.zip", "open {.zip", "with space é.zip", "download.ZIP", "x.SAFE.zip", "a.zip.zip"], ids=repr
)
@pytest.mark.parametrize("below", ["", "in{ner/data.zip/"])
def test_zips_of_any_name(l2a, tmp_path, name, below):
    copy = Path(shutil.copytree(l2a.path, tmp_path / "in {0}.zip" / l2a.path.name))
    path = zip_safe(copy, name, below=below)
    assert is_safe(path)
    (product,) = read_safe(path)
    assert product.name == l2a.name
    check(product, l2a)


def test_a_zip_of_the_inside_of_a_product(l2a, tmp_path):
    path = tmp_path / f"{l2a.name}.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in l2a.path.rglob("*"):
            archive.write(file, file.relative_to(l2a.path))
    assert is_safe(path)
    (product,) = read_safe(path)
    assert product.name == l2a.name
    check(product, l2a)


def test_a_zip_of_several_products(l2a, tmp_path):
    copy = Path(shutil.copytree(l2a.path, tmp_path / "all" / l2a.path.name))
    other = write_safe(tmp_path / "all", seed=5, size=96, tile="34UDF")
    path = tmp_path / "all.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in (tmp_path / "all").rglob("*"):
            archive.write(file, file.relative_to(tmp_path / "all"))
    assert [product.name for product in read_safe(path)] == [l2a.name, other.name]
    assert copy.is_dir()


def test_a_product_in_a_folder_of_its_own_name(copy, l2a, tmp_path):
    outer = tmp_path / "unpacked" / copy.name
    outer.mkdir(parents=True)
    shutil.move(copy, outer / copy.name)
    check(read_safe(outer)[0], l2a)


def test_a_product_inside_another_is_not_the_one_that_was_meant(copy, l2a):
    shutil.copytree(l2a.path, copy / "old.SAFE")
    assert [product.name for product in read_safe(copy)] == [l2a.name]


def test_a_renamed_product_keeps_its_identifier(copy, l2a, tmp_path):
    (renamed,) = read_safe(copy.rename(tmp_path / "mine.SAFE"))
    assert (renamed.name, renamed.product_id) == ("mine", l2a.name)
    (plain,) = read_safe((tmp_path / "mine.SAFE").rename(tmp_path / "mine"))
    assert (plain.name, plain.product_id) == (l2a.name, l2a.name)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("safe_l1c_gdal", {"32TQR": (0, 1000.0, "01.03"), "32TRQ": (0, 1000.0, "01.03")}),
        ("safe_l2a_n0509_gdal", {"34UCF": (-1000, 10000.0, "05.09")}),
    ],
)
def test_real_layouts(tmp_path, folder, expected, zipped):
    (path,) = shared_data(f"scenes/{folder}").glob("*.SAFE")
    if zipped:
        path = zip_safe(Path(shutil.copytree(path, tmp_path / path.name)))
    products = read_safe(path)
    assert {p.mgrs_tile: (p.boa_offset, p.quantification, p.baseline) for p in products} == expected
    assert [product.warnings for product in products] == [()] * len(expected)
    for product in products:
        for band in (*product.bands.values(), *([product.scl] if product.scl else [])):
            with rasterio.open(band.path) as dataset:
                assert dataset.width == (5490 if band is product.scl else 10980)
        assert product.datetime in ("2015-12-31T23:59:59.999Z", "2023-08-23T10:05:35.271Z")  # the granule's


# ---- offsets ----


def test_offsets_are_those_of_red_green_and_blue(copy):
    rewrite(metadata_of(copy), ('band_id="0">-1000', 'band_id="0">-900'), ('band_id="7">-1000', 'band_id="7">0'))
    assert read_safe(copy)[0].boa_offset == -1000
    rewrite(metadata_of(copy), *((f'band_id="{band}">-1000', f'band_id="{band}">-250.0') for band in (1, 2, 3)))
    assert read_safe(copy)[0].boa_offset == -250


def test_bands_of_different_offsets_are_refused(copy):
    rewrite(metadata_of(copy), ('band_id="1">-1000', 'band_id="1">0'))
    with pytest.raises(SceneError, match=r"different offsets \(B04 -1000, B03 -1000, B02 0\)"):
        read_safe(copy)


def test_an_offset_that_is_not_listed_follows_the_baseline(copy):
    rewrite(metadata_of(copy), ("BOA_ADD_OFFSET", "X"))
    (product,) = read_safe(copy)
    assert product.boa_offset == -1000
    assert "taken from baseline 05.09" in product.warnings[0]
    rewrite(metadata_of(copy), ("BASELINE>05.09", "BASELINE>99.99"))  # Sen2Cor on a user's machine
    assert read_safe(copy)[0].boa_offset is None
    rewrite(metadata_of(copy), ("<PROCESSING_BASELINE>99.99", "<PROCESSING_BASELINE>"))
    (product,) = read_safe(copy)
    assert (product.baseline, product.boa_offset) == (None, None)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('band_id="3">-1000', 'band_id="3">many', "offset of B04 is 'many', expected a whole number"),
        ('band_id="3">-1000', 'band_id="3">nan', "offset of B04 is 'nan'"),
        ('band_id="3">-1000', 'band_id="3">-0.1', "offset of B04 is '-0.1'"),
        (">10000<", ">0<", "quantification is '0', expected a positive number"),
    ],
)
def test_numbers_that_are_none(copy, old, new, message):
    rewrite(metadata_of(copy), (old, new))
    with pytest.raises(SceneError, match=message):
        read_safe(copy)


# ---- what is missing ----


def test_the_true_colour_image_stands_in_for_missing_bands(copy, l2a):
    (copy / l2a.image("B03")).unlink()
    (product,) = read_safe(copy)
    assert product.visual
    assert (product.boa_offset, product.quantification) == (None, None)
    assert "TCI" in product.reason
    assert product.warnings == (f"{l2a.name}: B03 missing, so its true-colour image (TCI) is used as it is",)
    for index, colour in enumerate(("red", "green", "blue")):
        np.testing.assert_array_equal(pixels(product.bands[colour].path, product.bands[colour].band), l2a.tci[index])
    assert product.scl is not None


@pytest.mark.parametrize("zipped", [False, True])
def test_missing_bands_are_named_with_what_is_there(copy, l2a, zipped):
    for band in ("B04", "B02", "TCI"):
        (copy / l2a.image(band)).unlink()
    path = zip_safe(copy) if zipped else copy
    there = r"IMG_DATA there is T34UCF_\w+_B03_10m.jp2, T34UCF_\w+_B08_10m.jp2, T34UCF_\w+_SCL_20m.jp2"
    with pytest.raises(SceneError, match=rf"lacks B04 and B02 at 10 m(.*){there}"):
        read_safe(path)


def test_bands_at_20_m_are_not_those_at_10_m(copy, l2a):
    for band in ("B04", "TCI"):
        (copy / l2a.image(band)).rename(copy / l2a.image(band).replace("10m", "20m"))
    with pytest.raises(SceneError, match="lacks B04 at 10 m"):
        read_safe(copy)


def test_a_missing_classification_is_told(copy, l2a):
    (copy / l2a.image("SCL")).unlink()
    (product,) = read_safe(copy)
    assert product.scl is None
    assert "no scene classification" in product.warnings[0]


def test_without_granule_metadata_the_datatake_says_when(copy, l2a):
    (copy / l2a.granule / "MTD_TL.xml").unlink()
    (product,) = read_safe(copy)
    assert (product.datetime, product.mgrs_tile) == ("2023-08-23T09:55:59.024Z", "34UCF")


def test_no_metadata(copy):
    metadata_of(copy).unlink()
    assert is_safe(copy)
    with pytest.raises(SceneError, match=r"no product metadata \(MTD_MSIL1C.xml or MTD_MSIL2A.xml\), there is GRANULE"):
        read_safe(copy)


def test_no_granule(copy):
    shutil.rmtree(copy / "GRANULE")
    with pytest.raises(SceneError, match="has no granule"):
        read_safe(copy)


def test_no_such_file(tmp_path):
    assert not is_safe(tmp_path / "S2A.SAFE")
    with pytest.raises(SceneError, match="does not exist"):
        read_safe(tmp_path / "S2A.SAFE")


# ---- damage and malice ----

BOMB = """<?xml version="1.0"?>
<!DOCTYPE a [<!ENTITY a0 "ha"><!ENTITY a1 "&a0;&a0;&a0;&a0;&a0;&a0;&a0;&a0;&a0;&a0;">]>
<Level-2A_User_Product>&a1;</Level-2A_User_Product>
"""


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("file", ["MTD_MSIL2A.xml", "{granule}/MTD_TL.xml"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is damaged: no element found"),
        (b"<a><b></a>", "is damaged: mismatched tag"),
        (b"\x00\x01\x02", "not in UTF-8"),
        (b"<?xml version='1.0' encoding='none'?><a/>", "is damaged: unknown encoding"),
        (BOMB.encode(), "declares a document type"),
        (BOMB.encode("utf-16"), "not in UTF-8"),
        (b"<a>" + b" " * (8 << 20), "more than 8 MiB"),
    ],
)
def test_damaged_metadata(copy, l2a, file, data, message, zipped):
    (copy / file.format(granule=l2a.granule)).write_bytes(data)
    name = Path(file).name
    with pytest.raises(SceneError, match=rf"{name}(.*){message}"):
        read_safe(zip_safe(copy) if zipped else copy)


def test_metadata_of_something_else(copy):
    metadata_of(copy).write_text("<html/>", encoding="utf-8")
    with pytest.raises(SceneError, match="its outermost element is 'html'"):
        read_safe(copy)


def test_a_truncated_zip(copy, tmp_path):
    path = zip_safe(copy)
    path.write_bytes(path.read_bytes()[:-100])
    assert is_safe(path)  # by its name, else that of its first member: reading it says what is wrong
    with pytest.raises(SceneError, match=r"is no whole zip: File is not a zip file; download it again"):
        read_safe(path)
    assert is_safe(path.rename(tmp_path / "some.zip"))


def test_a_zip_damaged_inside(copy):
    path = zip_safe(copy)
    with zipfile.ZipFile(path) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith("MTD_MSIL2A.xml"))
    data = bytearray(path.read_bytes())
    start = info.header_offset + 30 + len(info.filename)
    data[start + 20 : start + 60] = bytes(40)
    path.write_bytes(data)
    with pytest.raises(SceneError, match=r"MTD_MSIL2A.xml in .* cannot be read: .*; download the zip again"):
        read_safe(path)


def test_a_zip_without_a_product(tmp_path):
    path = tmp_path / "other.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "x")
        archive.writestr("a/b.tif", "x")
    assert not is_safe(path)
    with pytest.raises(SceneError, match=r"there is a, readme\.txt"):
        read_safe(path)


# ---- what is one ----


def test_what_is_safe(l2a, tmp_path, copy):
    assert is_safe(l2a.path)
    assert is_safe(str(l2a.path))
    assert not is_safe(l2a.path.parent)
    assert not is_safe(l2a.path / "manifest.safe")
    assert not is_safe(l2a.path / "INSPIRE.xml")
    assert not is_safe(l2a.path / l2a.image("B04"))  # a raster, or one of three bands beside each other
    assert not is_safe(l2a.path / l2a.granule / "IMG_DATA" / "R20m")
    plain = copy.rename(tmp_path / "plain")
    assert is_safe(plain)
    assert is_safe(plain / l2a.granule)
    shutil.rmtree(plain / "GRANULE")
    assert not is_safe(plain)  # metadata that somebody kept beside other files
    assert not is_safe(plain / "MTD_MSIL2A.xml")
    (tmp_path / "file.SAFE").write_text("x")
    assert not is_safe(tmp_path / "file.SAFE")
